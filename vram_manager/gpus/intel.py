"""Intel's cards (Arc, Flex, Max) as the i915 and xe drivers tell them in /sys, as far as they do.

Not tried on a card by us. Neither driver tells in a file what is used of the memory, and what other ways there are
answer 0 without CAP_PERFMON (level-zero issue 133), which is therefore no answer. What is left is to add up what the
processes have that can be seen: at least so much is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from vram_manager.domain.reading import Missing
from vram_manager.domain.size import gib
from vram_manager.domain.snapshot import Gpu, GpuMemory, ProcessMemory, Trust
from vram_manager.gpus._files import PciGpu, device_id, driver_of, power_of, text_of, whole_of
from vram_manager.gpus.amd import temperature
from vram_manager.gpus.fdinfo import HIDDEN, sees_all
from vram_manager.gpus.sleep import ASLEEP

CAP_SYS_ADMIN, CAP_PERFMON = 21, 38  # linux/capability.h

_NO_RESERVE: Final = Missing("Intel's drivers do not say")
_NO_LOAD: Final = Missing("Intel's drivers tell the load of processes only")
_NO_POWER: Final = Missing("Intel's drivers count energy only")


def read(
    gpu: PciGpu,
    index: int,
    *,
    proc_root: Path,
    gpu_sleep: bool,
    processes: Mapping[str, tuple[ProcessMemory, ...]],
    with_processes: bool,
) -> Gpu:
    """The card now. `processes` is what is visible by slot: its memory may be known from nothing else."""
    name = f"Intel GPU {device_id(gpu)}"
    asleep = gpu_sleep and power_of(gpu)[1] == "suspended"
    mine = processes.get(gpu.slot, ())
    unasked = Missing("not asked")
    return Gpu(
        uuid=gpu.slot,
        index=index,
        name=name,
        memory=ASLEEP if asleep else memory(gpu, proc_root, mine),
        utilization_percent=ASLEEP if asleep else _NO_LOAD,
        temperature_celsius=ASLEEP if asleep else temperature(gpu) if with_processes else unasked,
        power_watts=ASLEEP if asleep else _NO_POWER if with_processes else unasked,
        processes=ASLEEP if asleep else _listed(mine, proc_root) if with_processes else unasked,
        vendor="intel",
        source=f"{driver_of(gpu)} sysfs and /proc",
        trust=Trust.UNVERIFIED,
        asleep=asleep,
    )


def _listed(mine: tuple[ProcessMemory, ...], proc_root: Path) -> tuple[ProcessMemory, ...] | Missing:
    return mine if mine or sees_all(proc_root) else HIDDEN


def memory(gpu: PciGpu, proc_root: Path, mine: tuple[ProcessMemory, ...]) -> GpuMemory | Missing:
    """From the driver, where it may say; else what the visible processes add up to."""
    total, used = total_bytes(gpu), used_bytes(gpu)
    if total is None:
        return Missing("its driver tells neither the size of its memory nor what is used of it")
    if used is None or (used == 0 and not may_measure(proc_root)):
        used = _sum(mine, proc_root)
    if used is None:
        return Missing(f"its driver tells {gib(total)} in total, and not what is used of it", HIDDEN.remedy)
    if used > total:
        return Missing(f"its driver contradicts itself: {total} bytes in total, {used} used")
    return GpuMemory(total_bytes=total, used_bytes=used, free_bytes=total - used, reserved_bytes=_NO_RESERVE)


def _sum(mine: tuple[ProcessMemory, ...], proc_root: Path) -> int | None:
    """What the visible processes have, where they tell it; nothing, where all are visible and none is there."""
    known = [process.used_bytes for process in mine if isinstance(process.used_bytes, int)]
    return sum(known) if known or (not mine and sees_all(proc_root)) else None


def total_bytes(gpu: PciGpu) -> int | None:
    """xe: the sum of its tiles (igt reads the same). i915: only Intel's own builds of it, beside `device`."""
    tiles = [whole_of(path) for path in sorted(gpu.directory.glob("tile[0-9]/physical_vram_size_bytes"))]
    if tiles:
        told = [one for one in tiles if not isinstance(one, Missing)]
        return sum(told) or None if len(told) == len(tiles) else None
    return _first(
        gpu.directory.parent / "lmem_total_bytes",
        gpu.directory / "mem_info_vram_total",
        gpu.directory / "tile0" / "vram0" / "total_bytes",
    )


def used_bytes(gpu: PciGpu) -> int | None:
    """Where some build of a driver has a file for it; 0 may mean that it does not say."""
    return _first(gpu.directory / "mem_info_vram_used", gpu.directory / "tile0" / "vram0" / "used_bytes")


def may_measure(proc_root: Path) -> bool:
    """Whether the drivers tell this process what others use."""
    status = text_of(proc_root / "self" / "status")
    lines = status.splitlines() if isinstance(status, str) else []
    told = next((line.partition(":")[2].strip() for line in lines if line.startswith("CapEff:")), "")
    try:
        held = int(told, 16)
    except ValueError:
        return False
    return bool(held >> CAP_PERFMON & 1 or held >> CAP_SYS_ADMIN & 1)


def _first(*paths: Path) -> int | None:
    return next((size for path in paths if isinstance(size := whole_of(path), int)), None)
