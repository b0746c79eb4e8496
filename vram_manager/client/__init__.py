"""The standard-library door to the daemon's socket, for workers and the CLI: no dependency, none of the daemon's parts.

>>> from vram_manager.client import VramClient
>>> with VramClient().lease("24GiB", wait_seconds=60):
...     render()

    VramClient, AsyncVramClient   ask, wait, hold, report          questions, sync, aio, held
    get_available_vram, ...       three functions for a quick check  dropin
    call, follow                  one request, one event stream     door
                                  HTTP by hand, without I/O         wire
                                  answers as values                 answers
                                  torch, if it is there already     cuda

Each is imported when it is first asked for: the CLI wants one request, and only some have an event loop.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vram_manager.client.door import DEFAULT_SOCKET, call, follow, socket_path
from vram_manager.client.wire import Reply

if TYPE_CHECKING:
    from vram_manager.client.aio import AsyncGeneration, AsyncLease, AsyncVramClient
    from vram_manager.client.answers import Admission, Alternative, Leak, LeaseInfo, Limits, ModelsReport, OverBudget
    from vram_manager.client.dropin import check_vram_sufficient, get_available_vram, get_vram_stats
    from vram_manager.client.sync import Generation, Lease, VramClient
    from vram_manager.errors import InsufficientVram, MemoryPressureError, MemoryPressureWarning

__all__ = [
    "DEFAULT_SOCKET",
    "Admission",
    "Alternative",
    "AsyncGeneration",
    "AsyncLease",
    "AsyncVramClient",
    "Generation",
    "InsufficientVram",
    "Leak",
    "Lease",
    "LeaseInfo",
    "Limits",
    "MemoryPressureError",
    "MemoryPressureWarning",
    "ModelsReport",
    "OverBudget",
    "Reply",
    "VramClient",
    "call",
    "check_vram_sufficient",
    "follow",
    "get_available_vram",
    "get_vram_stats",
    "socket_path",
]


_LATER = {
    "vram_manager.client.aio": ("AsyncGeneration", "AsyncLease", "AsyncVramClient"),
    "vram_manager.client.answers": (
        "Admission",
        "Alternative",
        "Leak",
        "LeaseInfo",
        "Limits",
        "ModelsReport",
        "OverBudget",
    ),
    "vram_manager.client.dropin": ("check_vram_sufficient", "get_available_vram", "get_vram_stats"),
    "vram_manager.client.sync": ("Generation", "Lease", "VramClient"),
    "vram_manager.errors": ("InsufficientVram", "MemoryPressureError", "MemoryPressureWarning"),
}
_HOMES = {name: module for module, names in _LATER.items() for name in names}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(home), name)
    return value
