"""Who has how much of an AMD or Intel GPU, from /proc/PID/fdinfo (kernel docs, "DRM client usage stats").

A process is visible only in a pid namespace that has it and to its own user, or to one with CAP_SYS_PTRACE.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from vram_manager.domain.reading import Missing
from vram_manager.domain.snapshot import ProcessMemory
from vram_manager.gpus._files import command_line, text_of

HIDDEN: Final = Missing(
    "processes are not visible", "run the container with pid: host, user: root and cap_add: [SYS_PTRACE, DAC_OVERRIDE]"
)

_UNITS: Final = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}  # a bare number is bytes
# What is on the device now; older kernels call that "memory", and "total" may be swapped out in part.
_KEYS: Final = ("resident", "memory", "total")
_SIZE: Final = re.compile(r"drm-(resident|memory|total)-(\S+):\s*(\d{1,19})(?:\s+(KiB|MiB|GiB))?\s*", re.ASCII)

# amdgpu says "vram", xe "vram0", i915 "local0"; what they have of the machine's memory amdgpu calls "gtt".
_OWN: Final = re.compile(r"(vram|local)\d*")
_SHARED: Final = re.compile(r"(vram|local)\d*|gtt")


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """One open connection of a process to a GPU at `slot`. `regions` is bytes by name ("vram", "gtt", "vram0")."""

    slot: str
    number: str
    regions: dict[str, int]


@dataclass(slots=True)
class _Held:
    """What one process holds of one GPU."""

    pid: int
    bytes: int | None = None
    numbers: set[str] = field(default_factory=set)


def parse(text: str) -> Client | None:
    """One fdinfo file; None where it is no DRM client, or none that can be told from the others."""
    slot = number = ""
    sizes: dict[str, dict[str, int]] = {}
    for line in text.splitlines():
        if line.startswith("drm-pdev:"):
            slot = line.partition(":")[2].strip()
        elif line.startswith("drm-client-id:"):
            number = line.partition(":")[2].strip()
        elif found := _SIZE.fullmatch(line):
            key, region, amount, unit = found.groups(default="")
            sizes.setdefault(region, {})[key] = int(amount) * _UNITS[unit]
    if not slot or not number:
        return None
    regions = {region: next(told[key] for key in _KEYS if key in told) for region, told in sizes.items()}
    return Client(slot=slot, number=number, regions=regions)


def processes(proc_root: Path, shared: Collection[str] = ()) -> dict[str, tuple[ProcessMemory, ...]]:
    """The processes on each GPU by its slot, as far as they are visible here.

    `shared` are the slots of GPUs whose memory is the machine's. A connection that several processes have open, or one
    process several times, is counted once, for the lowest pid.
    """
    held: dict[tuple[str, int], _Held] = {}
    seen: set[tuple[str, str]] = set()
    for pid in _pids(proc_root):
        for client in _clients(proc_root / str(pid)):
            if (client.slot, client.number) in seen:
                continue
            seen.add((client.slot, client.number))
            process = held.setdefault((client.slot, pid), _Held(pid))
            of_the_gpu = _SHARED if client.slot in shared else _OWN
            sizes = [size for region, size in client.regions.items() if of_the_gpu.fullmatch(region)]
            if sizes:
                process.bytes = (process.bytes or 0) + sum(sizes)
    found: dict[str, list[ProcessMemory]] = {}
    for (slot, pid), process in held.items():
        used = Missing("its driver does not tell") if process.bytes is None else process.bytes
        one = ProcessMemory(pid=pid, used_bytes=used, command=command_line(proc_root, pid))
        found.setdefault(slot, []).append(one)
    return {slot: tuple(ones) for slot, ones in found.items()}


def sees_all(proc_root: Path) -> bool:
    """Whether every process of the machine is visible: the kernel's own are, and another user's open files."""
    try:
        next((proc_root / "1" / "fd").iterdir(), None)
    except OSError:
        return False
    return text_of(proc_root / "2" / "comm") == "kthreadd"


def _pids(proc_root: Path) -> list[int]:
    try:
        return sorted(int(one.name) for one in proc_root.iterdir() if one.name.isascii() and one.name.isdigit())
    except OSError:
        return []


def _clients(process: Path) -> list[Client]:
    """What the process has open under /dev/dri; nothing where we may not look, or where it has ended meanwhile."""
    found: list[Client] = []
    try:
        for link in (process / "fd").iterdir():
            # A link costs less to read than the file: of a thousand open files a handful is a GPU.
            if str(link.readlink()).startswith("/dev/dri/"):
                client = parse((process / "fdinfo" / link.name).read_text(errors="replace"))
                found += [client] if client is not None else []
    except OSError:
        pass
    return found
