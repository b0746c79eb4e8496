"""Everything that can go wrong and is expected to.

    VramManagerError
    ├── SettingsError          a setting is wrong: named, with its value and what is allowed (exit 2)
    ├── AlreadyRunning         another daemon answers on the socket (exit 1)
    ├── Unreachable            the daemon's socket does not answer (exit 4 for the CLI)
    ├── InvalidRequest         client: the daemon cannot use what was asked (a ValueError too)
    ├── InsufficientVram       client: refused, the memory is not there
    ├── MemoryPressureError    client: the hard limit, before the allocation (a RuntimeError too)
    └── SensorError            an outside system could not be read or asked
        ├── TimedOut           it did not answer in time; it is not therefore down
        └── Rejected           it answered, and the answer was no

    UserWarning
    ├── MemoryPressureWarning  client: the soft limit, or a model over its budget
    └── ManagerAwayWarning     client: nobody could be asked; work goes on

Raised at the rim with `from`; the observer turns a SensorError into a `Missing`, the actuator into a
`free_refused` event. Past those two nothing is caught: a bug ends the process and the container restarts it.
"""

from __future__ import annotations

from typing import Any


class VramManagerError(Exception):
    """Base of everything this package raises on purpose."""


class SettingsError(VramManagerError):
    """One line that names the variable, its value and what is allowed."""


class AlreadyRunning(VramManagerError):
    """A second daemon on the same socket would fight the first."""


class Unreachable(VramManagerError):
    """Nothing answers on the daemon's socket."""


class SensorError(VramManagerError):
    """An outside system could not be read or asked; `remedy` says what a person can do, where known."""

    def __init__(self, why: str, remedy: str | None = None) -> None:
        super().__init__(why)
        self.why = why
        self.remedy = remedy


class TimedOut(SensorError):
    """No answer within the deadline. Ollama can take 15 s while it unloads: slow is not down."""


class Rejected(SensorError):
    """An answer came and refuses: a status code, or a body that is not what the contract says."""


class InsufficientVram(VramManagerError):
    """The memory is not there: refused before anything was allocated.

    `admission` is the daemon's whole answer (`vram_manager.client.Admission`), None where another question was asked.
    """

    def __init__(self, why: str, admission: Any = None) -> None:
        super().__init__(why)
        self.admission = admission


class MemoryPressureError(VramManagerError, RuntimeError):
    """The hard limit is passed, or would be: raised before the caller allocates.

    `limits` is the daemon's whole answer (`vram_manager.client.Limits`).
    """

    def __init__(self, why: str, limits: Any = None) -> None:
        super().__init__(why)
        self.limits = limits


class InvalidRequest(VramManagerError, ValueError):
    """The daemon cannot use what the caller asked; `field` names the wrong one, where one is."""

    def __init__(self, why: str, field: str | None = None) -> None:
        super().__init__(why)
        self.field = field


class MemoryPressureWarning(UserWarning):
    """Over the soft limit for some time, or a model over its budget; work goes on."""


class ManagerAwayWarning(UserWarning):
    """The daemon cannot be asked, and work goes on without it; said once per outage."""
