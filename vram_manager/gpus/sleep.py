"""Lets NVIDIA's GPUs sleep: whoever holds NVML open keeps a laptop's second GPU awake, and NVML wakes a sleeping one.

Only where the kernel may suspend every one of them (`power/control` is "auto"), so a server is never let go.

    awake         read. Nobody has used them for 30 s -> let go
    letting go    not read. Suspended -> asleep. Still awake after 20 s -> somebody else holds them: awake, and the
                  next try is 5 minutes away, then twice that, at most an hour
    asleep        not read. One is awake -> somebody woke it: awake

Who else holds them cannot be seen, since an open device file is on no list, and while NVML is open here it cannot be
seen to be closed there either: hence tries, ever rarer ones. `power/runtime_status` is a plain read that wakes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum, auto
from pathlib import Path
from typing import Final

from vram_manager.domain.reading import Missing
from vram_manager.domain.snapshot import Gpu, GpuMemory
from vram_manager.gpus._files import NVIDIA, PciGpu, on_the_bus, power_of, text_of

IDLE_SECONDS: Final = 30.0
# Suspended about 6 s after the last handle was closed (cosmic-ext-applet-system-monitor issue 38); 3x margin.
SUSPEND_SECONDS: Final = 20.0
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 300.0, 3600.0
# An X server or a compositor leaves a few MiB on a card that nobody uses; a context of CUDA's takes more than this.
IDLE_BYTES: Final = 64 * 2**20
LOOK_SECONDS: Final = 60.0

ASLEEP: Final = Missing("asleep: the kernel has suspended it, and it is not woken to be read")
LETTING_GO: Final = Missing("let go of for some seconds, so that it can fall asleep: nobody uses it")


class _Phase(Enum):
    AWAKE = auto()
    LETTING_GO = auto()
    ASLEEP = auto()


class Sleep:
    """Whether NVML may be touched now. One thread asks `before` and `after` each read; `wake` may come from another."""

    def __init__(self, sys_root: Path, proc_root: Path) -> None:
        self._sys_root = sys_root
        self._proc_root = proc_root
        self.devices: list[PciGpu] = []
        self._looked_at: float | None = None
        self._phase = _Phase.AWAKE
        self._idle_since: float | None = None
        self._let_go_at = 0.0
        self._next_try_at = float("-inf")
        self._wait = FIRST_WAIT_SECONDS
        self._wanted = False

    def wake(self) -> None:
        """The next read touches them, asleep or not: somebody is about to use one."""
        self._wanted = True

    def before(self, now: float) -> Missing | None:
        """Why NVML is to be left alone now, or None to read."""
        if self._looked_at is None or now - self._looked_at >= LOOK_SECONDS:
            self.devices, self._looked_at = on_the_bus(self._sys_root, NVIDIA), now
        powers = [power_of(device) for device in self.devices]
        if not powers or any(control != "auto" for control, _ in powers):
            self._begin_to_read()
            return None
        if self._wanted:
            self._wanted = False
            self._idle_since = None
            self._begin_to_read()
            return None
        statuses = {status for _, status in powers}
        if statuses == {"suspended"}:
            self._phase = _Phase.ASLEEP
            self._wait, self._next_try_at = FIRST_WAIT_SECONDS, now
            return ASLEEP
        if self._phase is _Phase.ASLEEP:
            if "active" not in statuses:  # on the way to or from sleep
                return ASLEEP
            self._begin_to_read()
        elif self._phase is _Phase.LETTING_GO:
            if now - self._let_go_at < SUSPEND_SECONDS:
                return LETTING_GO
            self._next_try_at = now + self._wait
            self._wait = min(LONGEST_WAIT_SECONDS, 2 * self._wait)
            self._begin_to_read()
        idle = self._idle_since is not None and now - self._idle_since >= IDLE_SECONDS
        if not idle or now < self._next_try_at or not all(map(self._can_sleep, self.devices)):
            return None
        self._phase, self._let_go_at = _Phase.LETTING_GO, now
        return LETTING_GO

    def after(self, now: float, gpus: Iterable[Gpu]) -> None:
        """What the read at `now` found."""
        if not all(map(_is_idle, gpus)):
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = now

    def _begin_to_read(self) -> None:
        """Idle counts from here on; while they are read already, nothing begins."""
        if self._phase is not _Phase.AWAKE:
            self._phase, self._idle_since = _Phase.AWAKE, None

    def _can_sleep(self, device: PciGpu) -> bool:
        """Desktops have control "auto" too, and a driver that never suspends: where it says so, no try is made.

        The driver's README, chapter "PCI-Express Runtime D3 (RTD3) Power Management"; containers may not have the file.
        """
        told = text_of(self._proc_root / "driver" / "nvidia" / "gpus" / device.slot / "power")
        lines = told.splitlines() if isinstance(told, str) else []
        statuses = [line.partition(":")[2] for line in lines if line.startswith("Runtime D3 status:")]
        return not statuses or "Enabled" in statuses[0]


def _is_idle(gpu: Gpu) -> bool:
    unused = isinstance(gpu.memory, GpuMemory) and gpu.memory.used_bytes <= IDLE_BYTES
    return unused and (isinstance(gpu.utilization_percent, Missing) or gpu.utilization_percent == 0)
