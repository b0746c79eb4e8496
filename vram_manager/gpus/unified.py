"""Memory that the CPU and the GPU share: the kernel tells what is left of it, the GPU's driver does not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from vram_manager.domain.reading import Missing
from vram_manager.domain.snapshot import GpuMemory
from vram_manager.gpus._files import text_of

SOURCE: Final = "/proc/meminfo (unified memory)"

# GPUs of NVIDIA that are one chip with the CPU. A list of names, since what NVML answers is no proof: vGPUs say
# NOT_SUPPORTED for their memory too (gpustat pull request 179 decides the same way).
_INTEGRATED: Final = re.compile(r"\b(GB10|Orin|Thor|Xavier|Tegra|Jetson)\b", re.IGNORECASE)
_FIELD: Final = re.compile(r"^(MemTotal|MemAvailable):\s+(\d{1,15}) kB$", re.MULTILINE | re.ASCII)

NO_RESERVE: Final = Missing("memory that the CPU shares has no reserve")


def is_integrated(name: str, proc_root: Path) -> bool:
    """Whether this NVIDIA GPU has no memory of its own, by its name or by the board's (a Jetson may name none)."""
    if _INTEGRATED.search(name):
        return True
    board = text_of(proc_root / "device-tree" / "model")
    return isinstance(board, str) and _INTEGRATED.search(board) is not None


def pool(proc_root: Path) -> GpuMemory | Missing:
    """The machine's memory as a GPU of the same chip can have it. In a container too it is the host's."""
    text = text_of(proc_root / "meminfo")
    return text if isinstance(text, Missing) else parse_meminfo(text)


def parse_meminfo(text: str) -> GpuMemory | Missing:
    """MemTotal as the pool and MemAvailable as what is free of it, which counts caches that the kernel gives up."""
    told = {name: int(kib) * 1024 for name, kib in _FIELD.findall(text)}
    total, free = told.get("MemTotal"), told.get("MemAvailable")
    if not total or free is None or free > total:
        return Missing("/proc/meminfo does not tell MemTotal and MemAvailable")
    return GpuMemory(total_bytes=total, used_bytes=total - free, free_bytes=free, reserved_bytes=NO_RESERVE)
