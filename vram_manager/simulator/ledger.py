"""The memory of one simulated GPU, as a ledger of who holds how much.

A holder is a process: `ollama:llama3.1:8b`, `comfyui`, `desktop`. Everything that happens to the card happens
here, so whatever a simulated server says about itself can be compared with what is true.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from vram_manager.domain.reading import Missing
from vram_manager.domain.snapshot import Gpu, GpuMemory, Gpus, ProcessMemory
from vram_manager.errors import SensorError

GIB = 1024**3
MIB = 1024**2

BUSY_PERCENT = 97
"""What NVML's utilization tends to say while a kernel is always running."""


class OutOfMemory(Exception):
    """A claim that does not fit: cudaMalloc would have failed. Nothing was changed."""

    def __init__(self, holder: str, wanted_bytes: int, free_bytes: int) -> None:
        super().__init__(f"{holder} wants {wanted_bytes} more bytes, {free_bytes} are free")
        self.holder = holder
        self.wanted_bytes = wanted_bytes
        self.free_bytes = free_bytes


class Ledger:
    """One GPU: total = reserved by the driver + used by holders + free, and free is never negative."""

    def __init__(
        self,
        total_bytes: int,
        reserved_bytes: int = 450 * MIB,  # a 24576 MiB RTX 3090 offers 24126 MiB to CUDA
        name: str = "Simulated RTX 4090",
        uuid: str = "GPU-5107a7ed-0000-4000-8000-000000000000",
    ) -> None:
        self.total_bytes = total_bytes
        self.reserved_bytes = reserved_bytes
        self.name = name
        self.uuid = uuid
        self.lost = False
        self.peak_used_bytes = 0
        self.ooms = 0
        self.on_change: list[Callable[[], None]] = []
        self._held: dict[str, int] = {}
        self._computing = 0

    @property
    def usable_bytes(self) -> int:
        """What holders can have together; CUDA's cudaMemGetInfo calls this the total."""
        return self.total_bytes - self.reserved_bytes

    @property
    def used_bytes(self) -> int:
        return sum(self._held.values())

    @property
    def free_bytes(self) -> int:
        return self.usable_bytes - self.used_bytes

    @property
    def utilization_percent(self) -> int:
        return BUSY_PERCENT if self._computing else 0

    def holders(self) -> dict[str, int]:
        """Bytes of every holder, in the order in which they arrived."""
        return dict(self._held)

    def held_bytes(self, holder: str) -> int:
        return self._held.get(holder, 0)

    def claim(self, holder: str, claimed_bytes: int) -> None:
        """`holder` has `claimed_bytes` more than before, or OutOfMemory and nothing changed."""
        self.resize(holder, self.held_bytes(holder) + claimed_bytes)

    def resize(self, holder: str, held_bytes: int) -> None:
        """`holder` has exactly `held_bytes`, or OutOfMemory and nothing changed. Zero is a release."""
        if held_bytes < 0:
            raise ValueError(f"{holder} cannot hold {held_bytes} bytes")
        growth_bytes = held_bytes - self.held_bytes(holder)
        if growth_bytes > self.free_bytes:
            self.ooms += 1
            raise OutOfMemory(holder, growth_bytes, self.free_bytes)
        if growth_bytes == 0:
            return
        if held_bytes:
            self._held[holder] = held_bytes
        else:
            del self._held[holder]
        self.peak_used_bytes = max(self.peak_used_bytes, self.used_bytes)
        for changed in self.on_change:
            changed()

    def release(self, holder: str) -> int:
        """`holder` is gone; returns what came back."""
        held_bytes = self.held_bytes(holder)
        self.resize(holder, 0)
        return held_bytes

    @contextmanager
    def computing(self, really: bool = True) -> Iterator[None]:
        """The GPU is busy for the length of the block (not if only the CPU works, `really=False`)."""
        self._computing += really
        try:
            yield
        finally:
            self._computing -= really


class LedgerGpuSensor:
    """Reads ledgers the way NVML would be read: implements `vram_manager.gpus.GpuSensor`."""

    def __init__(self, *ledgers: Ledger, show_processes: bool = False) -> None:
        self._ledgers: Sequence[Ledger] = ledgers
        self._show_processes = show_processes
        self._pids: dict[str, int] = {}

    async def read(self, *, with_processes: bool = False) -> Gpus:
        """Every GPU now. A lost card takes the whole reading with it, as a lost driver does."""
        for ledger in self._ledgers:
            if ledger.lost:
                raise SensorError("GPU is lost", remedy="restart the container, or the host's driver")
        gpus = tuple(self._gpu(index, ledger, with_processes) for index, ledger in enumerate(self._ledgers))
        return Gpus(gpus=gpus, driver_version="580.95.05")

    def close(self) -> None:
        """Nothing to let go."""

    def _gpu(self, index: int, ledger: Ledger, with_processes: bool) -> Gpu:
        return Gpu(
            uuid=ledger.uuid,
            index=index,
            name=ledger.name,
            memory=GpuMemory(
                total_bytes=ledger.total_bytes,
                used_bytes=ledger.used_bytes,
                free_bytes=ledger.free_bytes,
                reserved_bytes=ledger.reserved_bytes,
            ),
            utilization_percent=ledger.utilization_percent,
            processes=self._processes(ledger) if with_processes else Missing("not asked"),
        )

    def _processes(self, ledger: Ledger) -> tuple[ProcessMemory, ...] | Missing:
        if not self._show_processes:
            return Missing("not visible: needs pid: host")
        return tuple(
            ProcessMemory(
                pid=self._pids.setdefault(holder, 1000 + len(self._pids)),
                used_bytes=held_bytes,
                command=(holder,),
            )
            for holder, held_bytes in ledger.holders().items()
        )
