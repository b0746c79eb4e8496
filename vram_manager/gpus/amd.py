"""AMD GPUs as the amdgpu driver tells them in /sys, which needs no ROCm, no device file and no rights.

Every file fails on its own (EBUSY while the card is suspended, ENOENT on chips that lack the thing). `gpu_metrics` is
never read: that wakes a sleeping card (ROCm/rocm-systems pull request 8024).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vram_manager.domain.reading import Missing
from vram_manager.domain.snapshot import Gpu, GpuMemory, ProcessMemory, Trust
from vram_manager.gpus import unified
from vram_manager.gpus._files import PciGpu, device_id, power_of, text_of, whole_of
from vram_manager.gpus.fdinfo import HIDDEN, sees_all
from vram_manager.gpus.sleep import ASLEEP

SOURCE: Final = "amdgpu sysfs"
UNIFIED_SOURCE: Final = "amdgpu sysfs (unified memory)"
NO_RESERVE: Final = Missing("AMD counts its driver's reserve as used")

# The largest part of the machine's memory that a BIOS sets aside as the VRAM of a GPU in the CPU; models live in GTT.
_CARVE_OUT_BYTES: Final = 8 * 2**30
# What a card has in use while nobody works with it. Older kernels keep it awake as long as its load is asked for.
_IDLE_BYTES: Final = 256 * 2**20


def read(
    gpu: PciGpu,
    index: int,
    *,
    proc_root: Path,
    gpu_sleep: bool,
    processes: Mapping[str, tuple[ProcessMemory, ...]] | None,
) -> Gpu:
    """The GPU now. `processes` is what is visible by slot, None where they are not asked for."""
    uuid, name = _identity(gpu)
    control, status = power_of(gpu)
    sizes = Sizes.of(gpu)  # the one thing that is told of a sleeping card without waking it (glances issue 3590)
    if gpu_sleep and status == "suspended":
        return Gpu(
            uuid=uuid,
            index=index,
            name=name,
            memory=ASLEEP,
            utilization_percent=ASLEEP,
            temperature_celsius=ASLEEP,
            power_watts=ASLEEP,
            processes=ASLEEP,
            vendor="amd",
            source=SOURCE,
            unified=sizes.is_apu,
            asleep=True,
        )
    memory = sizes.shared_pool(proc_root) if sizes.is_apu else sizes.memory()
    unused = isinstance(sizes.vram_used, int) and sizes.vram_used <= _IDLE_BYTES
    may_sleep = gpu_sleep and control == "auto" and unused and not sizes.is_apu
    left_alone = Missing("not asked while nobody uses it, so that it can fall asleep")
    unasked = Missing("not asked")
    return Gpu(
        uuid=uuid,
        index=index,
        name=name,
        memory=memory,
        utilization_percent=left_alone if may_sleep else _percent(whole_of(gpu.directory / "gpu_busy_percent")),
        temperature_celsius=unasked if processes is None else left_alone if may_sleep else temperature(gpu),
        power_watts=unasked if processes is None else left_alone if may_sleep else power(gpu),
        processes=unasked if processes is None else processes.get(gpu.slot) or _nobody(memory, proc_root),
        vendor="amd",
        source=UNIFIED_SOURCE if sizes.is_apu else SOURCE,
        trust=Trust.DERIVED if sizes.is_apu else Trust.MEASURED,
        unified=sizes.is_apu,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What the driver tells of both memories, in bytes: its own, and the machine's as far as the GPU may have it."""

    vram_total: int | Missing
    vram_used: int | Missing
    gtt_total: int | Missing
    gtt_used: int | Missing
    chips: str | Missing

    @staticmethod
    def of(gpu: PciGpu) -> Sizes:
        def size(name: str) -> int | Missing:
            return whole_of(gpu.directory / f"mem_info_{name}")

        return Sizes(
            vram_total=size("vram_total"),
            vram_used=size("vram_used"),
            gtt_total=size("gtt_total"),
            gtt_used=size("gtt_used"),
            chips=text_of(gpu.directory / "mem_info_vram_vendor"),
        )

    @property
    def is_apu(self) -> bool:
        """Whether this is the GPU of a CPU: a small VRAM set aside by the BIOS, of chips that nobody made.

        Summing both memories would count the machine's twice (legacy-rocm-build issue 6004), and VRAM alone says
        "full" of an idle machine (homelab-monitor pull request 237).
        """
        if isinstance(self.vram_total, Missing) or isinstance(self.gtt_total, Missing):
            return False
        made_by_somebody = isinstance(self.chips, str) and self.chips not in ("", "0", "unknown")
        return not made_by_somebody and self.vram_total <= _CARVE_OUT_BYTES and self.gtt_total > 2 * self.vram_total

    def memory(self) -> GpuMemory | Missing:
        """Of a card. Trusted over HIP, which counts its own and leaves out desktops and games (amdgpu issue 223)."""
        return _memory(self.vram_total, self.vram_used)

    def shared_pool(self, proc_root: Path) -> GpuMemory | Missing:
        """What the GPU may have of the machine's memory, of which no more is free than the machine has left."""
        gtt, machine = _memory(self.gtt_total, self.gtt_used), unified.pool(proc_root)
        if isinstance(gtt, Missing):
            return gtt
        free = gtt.free_bytes if isinstance(machine, Missing) else min(gtt.free_bytes, machine.free_bytes)
        return GpuMemory(
            total_bytes=gtt.total_bytes,
            used_bytes=gtt.total_bytes - free,
            free_bytes=free,
            reserved_bytes=unified.NO_RESERVE,
        )


def temperature(gpu: PciGpu) -> int | Missing:
    """Degrees Celsius of the first sensor its driver has."""
    told: int | Missing = Missing("its driver tells no temperature")
    for path in sorted(gpu.directory.glob("hwmon/hwmon*/temp[0-9]_input")):
        told = whole_of(path)  # thousandths
        if isinstance(told, int):
            return told // 1000
    return told


def power(gpu: PciGpu) -> float | Missing:
    """Watts: the average where the chip has one, else of this moment."""
    told: int | Missing = Missing("its driver tells no power")
    for name in ("power1_average", "power1_input"):
        for path in sorted(gpu.directory.glob(f"hwmon/hwmon*/{name}")):
            told = whole_of(path)  # millionths
            if isinstance(told, int):
                return told / 1e6
    return told


def _identity(gpu: PciGpu) -> tuple[str, str]:
    """Its name everywhere, as ROCm calls it too ("GPU-" and its serial number), else its PCI address; and its model."""
    serial = text_of(gpu.directory / "unique_id")
    model = text_of(gpu.directory / "product_name")
    told = isinstance(serial, str) and serial.strip("0x")
    uuid = f"GPU-{str(serial).removeprefix('0x').lower()}" if told else gpu.slot
    return uuid, model if isinstance(model, str) and model else f"AMD GPU {device_id(gpu)}"


def _memory(total: int | Missing, used: int | Missing) -> GpuMemory | Missing:
    if isinstance(total, Missing) or isinstance(used, Missing):
        why = total if isinstance(total, Missing) else used
        return Missing(f"its driver tells no memory: {why.why if isinstance(why, Missing) else why}")
    if total == 0 or used > total:
        return Missing(f"its driver contradicts itself: {total} bytes in total, {used} used")
    return GpuMemory(total_bytes=total, used_bytes=used, free_bytes=total - used, reserved_bytes=NO_RESERVE)


def _percent(told: int | Missing) -> int | Missing:
    return told if isinstance(told, Missing) or told <= 100 else Missing(f"its driver tells a load of {told} %")


def _nobody(memory: GpuMemory | Missing, proc_root: Path) -> tuple[ProcessMemory, ...] | Missing:
    """No process on a GPU that is in use means that they cannot be seen, unless all can."""
    unused = isinstance(memory, GpuMemory) and memory.used_bytes == 0
    return () if unused or sees_all(proc_root) else HIDDEN
