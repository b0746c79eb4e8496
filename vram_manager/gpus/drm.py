"""The GPUs of AMD and Intel, as plain blocking code for one thread."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from vram_manager.domain.reading import Missing
from vram_manager.domain.snapshot import Gpu, GpuMemory, Gpus, ProcessMemory, Trust
from vram_manager.gpus._files import AMD, INTEL, PciGpu, device_id, drm_gpus, is_in_an_intel_cpu

LOOK_SECONDS: Final = 60.0
_NO_VERSION: Final = Missing("the kernel's own driver has no version")


class DrmCalls:
    """Looks for cards once a minute, and reads what is there."""

    def __init__(self, proc_root: Path, sys_root: Path, *, gpu_sleep: bool, tools_path: str | None = None) -> None:
        self._proc_root = proc_root
        self._sys_root = sys_root
        self._gpu_sleep = gpu_sleep
        self._tools_path = tools_path
        self._tools: Any = None
        self._found: list[PciGpu] = []
        self.left_out: tuple[str, ...] = ()
        self._has_tool = False
        self._looked_at: float | None = None

    def anything(self, now: float) -> bool:
        """Whether there is something to read. Lists one folder, once a minute; `left_out` is what has no memory."""
        if self._looked_at is None or now - self._looked_at >= LOOK_SECONDS:
            self._looked_at = now
            found = [gpu for gpu in drm_gpus(self._sys_root) if gpu.vendor in (AMD, INTEL)]
            self._found = [gpu for gpu in found if not is_in_an_intel_cpu(gpu)]
            self.left_out = tuple(
                f"Intel GPU {device_id(gpu)} ({gpu.slot}) is part of the CPU and has no memory of its own"
                for gpu in found
                if is_in_an_intel_cpu(gpu)
            )
            tools = ("amd-smi", "rocm-smi")
            self._has_tool = any(shutil.which(tool, path=self._tools_path) for tool in tools)
        return bool(self._found) or self._has_tool

    def sweep(self, now: float, *, with_processes: bool) -> Gpus:
        """Every card of both vendors, and AMD's GPUs in CPUs."""
        amd = [gpu for gpu in self._found if gpu.vendor == AMD]
        intel = [gpu for gpu in self._found if gpu.vendor == INTEL]
        # What is used of Intel's memory may be known from processes alone: theirs are looked up in each sweep.
        processes = self._processes(amd) if self._found and (with_processes or intel) else {}
        gpus = self._amd(now, amd, processes if with_processes else None)
        gpus += self._intel(intel, len(gpus), processes, with_processes=with_processes)
        return Gpus(gpus=tuple(gpus), driver_version=_NO_VERSION, left_out=self.left_out)

    def shutdown(self) -> None:
        """Nothing is held open."""

    def _processes(self, amd: list[PciGpu]) -> dict[str, tuple[ProcessMemory, ...]]:
        from vram_manager.gpus import fdinfo  # noqa: PLC0415 - only where there is such a GPU
        from vram_manager.gpus.amd import Sizes  # noqa: PLC0415

        return fdinfo.processes(self._proc_root, {gpu.slot for gpu in amd if Sizes.of(gpu).is_apu})

    def _amd(
        self, now: float, found: list[PciGpu], processes: dict[str, tuple[ProcessMemory, ...]] | None
    ) -> list[Gpu]:
        gpus: list[Gpu] = []
        if found:
            from vram_manager.gpus import amd  # noqa: PLC0415 - only where there is such a GPU

            for index, gpu in enumerate(found):
                gpus.append(
                    amd.read(gpu, index, proc_root=self._proc_root, gpu_sleep=self._gpu_sleep, processes=processes)
                )
        silent = all(isinstance(gpu.memory, Missing) and not gpu.asleep for gpu in gpus)
        return self._by_tool(now, gpus) if silent and self._has_tool else gpus

    def _by_tool(self, now: float, gpus: list[Gpu]) -> list[Gpu]:
        """The cards as one of AMD's programs tells them. Which of several is which it does not say in one breath."""
        from vram_manager.gpus.amd_tools import AmdTools  # noqa: PLC0415 - only where the kernel tells nothing

        if self._tools is None:
            self._tools = AmdTools(self._tools_path)
        told = self._tools.memories(now)
        if not any(isinstance(memory, GpuMemory) for memory in told):
            return gpus
        unknown = Missing(f"{self._tools.name} is asked for memory only")
        bare = [
            Gpu(uuid=f"amd-{place}", index=place, name=f"AMD GPU {place}", memory=memory, utilization_percent=unknown)
            for place, memory in enumerate(told)
        ]
        if len(told) == len(gpus) == 1:
            bare = [replace(gpus[0], memory=told[0])]
        return [replace(gpu, vendor="amd", source=self._tools.name, trust=Trust.SECOND_HAND) for gpu in bare]

    def _intel(
        self, found: list[PciGpu], before: int, processes: dict[str, tuple[ProcessMemory, ...]], *, with_processes: bool
    ) -> list[Gpu]:
        if not found:
            return []
        from vram_manager.gpus import intel  # noqa: PLC0415 - only where there is such a card

        return [
            intel.read(
                gpu,
                before + place,
                proc_root=self._proc_root,
                gpu_sleep=self._gpu_sleep,
                processes=processes,
                with_processes=with_processes,
            )
            for place, gpu in enumerate(found)
        ]
