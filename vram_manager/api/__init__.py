"""What people and machines read and ask over the socket: HTTP/1.1 + JSON, described by /openapi.json.

Nothing is decided here: a wish goes into the cycle's inbox, everything else is a view of its last turn.
"""
