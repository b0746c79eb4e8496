"""Values only: frozen dataclasses from the standard library. No I/O, no clock, no log.

Everything that flows through the daemon is one of these: a `Snapshot` (what was seen) becomes a
`Decision` (what follows, and why), which may carry an `Action` (what to ask), which becomes an `Event`
(what happened). Bytes are `int`, times are seconds of the loop's monotonic clock unless a name says
otherwise, and what is not known is a `Missing`, never a zero.
"""
