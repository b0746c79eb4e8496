"""Every GPU of this machine, whoever made it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

from vram_manager.domain.reading import Missing
from vram_manager.domain.snapshot import Gpu, GpuMemory, Gpus
from vram_manager.errors import SensorError
from vram_manager.gpus._files import NVIDIA, on_the_bus
from vram_manager.gpus._nvml_calls import unread, without_reading
from vram_manager.gpus._threaded import ThreadedSensor
from vram_manager.gpus.drm import DrmCalls
from vram_manager.gpus.nvml import NvmlSensor


class AllGpus:
    """A GpuSensor over NVIDIA's GPUs by NVML, and AMD's and Intel's by the kernel's files.

    Indexes are unique: NVIDIA's first, as NVML numbers them, then AMD's and Intel's in PCI order. The GPU in a CPU is
    left out where there is a card. A vendor that fails hides no other: its cards are then known and not read.
    """

    def __init__(
        self,
        *,
        deadline_seconds: float = 5.0,
        gpu_sleep: bool = True,
        proc_root: Path = Path("/proc"),
        sys_root: Path = Path("/sys"),
        tools_path: str | None = None,
    ) -> None:
        self._sys_root = sys_root
        self._nvml = NvmlSensor(
            deadline_seconds=deadline_seconds, proc_root=proc_root, sys_root=sys_root, gpu_sleep=gpu_sleep
        )
        self._drm_calls = DrmCalls(proc_root, sys_root, gpu_sleep=gpu_sleep, tools_path=tools_path)
        self._drm = ThreadedSensor("amdgpu/i915/xe", self._drm_calls, deadline_seconds=deadline_seconds)
        self._drm_known: tuple[Gpu, ...] = ()

    @property
    def revoked(self) -> bool:
        """NVML worked in this process and was then taken away: only a restart brings it back."""
        return self._nvml.revoked

    def wake(self) -> None:
        """The next read touches NVIDIA's GPUs even where they sleep: somebody is about to use one."""
        self._nvml.wake()

    async def read(self, *, with_processes: bool = False) -> Gpus:
        """Every GPU now. Raises SensorError when there is none that can be read."""
        if not self._drm_calls.anything(asyncio.get_running_loop().time()):
            return await self._only_nvidia(with_processes)
        nvidia, others = await asyncio.gather(_answer(self._nvml, with_processes), _answer(self._drm, with_processes))
        return self._joined(nvidia, others)

    def close(self) -> None:
        """Lets the drivers go. Never blocks."""
        self._nvml.close()
        self._drm.close()

    async def _only_nvidia(self, with_processes: bool) -> Gpus:
        try:
            gpus = await self._nvml.read(with_processes=with_processes)
        except SensorError as error:
            others = self._drm_calls.left_out or ("no GPU of AMD or Intel is here either",)
            raise _with_words(error, *others) from error
        return replace(gpus, left_out=self._drm_calls.left_out)

    def _joined(self, nvidia: Gpus | SensorError, others: Gpus | SensorError) -> Gpus:
        left_out = self._drm_calls.left_out
        mine = self._nvidia_of(nvidia)
        if isinstance(others, SensorError):
            why = Missing(others.why, others.remedy)
            theirs = tuple(without_reading(gpu, why) for gpu in self._drm_known)
        else:
            self._drm_known = theirs = others.gpus
        cards = tuple(gpu for gpu in theirs if not gpu.unified)
        if mine or cards:
            left_out += tuple(
                f"{gpu.name} ({gpu.uuid}) is part of the CPU and has the machine's memory"
                for gpu in theirs
                if gpu.unified
            )
            theirs = cards
        read = [gpu for gpu in (*mine, *theirs) if isinstance(gpu.memory, GpuMemory) or gpu.asleep]
        if isinstance(nvidia, SensorError) and not read and (mine or not theirs):
            raise _with_words(nvidia, *left_out, *(f"{gpu.name}: {_why(gpu)}" for gpu in theirs))
        first = 1 + max((gpu.index for gpu in mine), default=-1)
        numbered = tuple(replace(gpu, index=first + place) for place, gpu in enumerate(theirs))
        version = nvidia.driver_version if isinstance(nvidia, Gpus) else Missing("no NVIDIA driver was read")
        return Gpus(gpus=(*mine, *numbered), driver_version=version, left_out=left_out)

    def _nvidia_of(self, answer: Gpus | SensorError) -> tuple[Gpu, ...]:
        """NVIDIA's GPUs; where NVML fails, those that it listed before or that are on the bus, not read."""
        if isinstance(answer, Gpus):
            return answer.gpus
        why = Missing(answer.why, answer.remedy)
        return tuple(
            without_reading(gpu, why) for gpu in self._nvml.known or unread(on_the_bus(self._sys_root, NVIDIA))
        )


async def _answer(sensor: ThreadedSensor, with_processes: bool) -> Gpus | SensorError:
    try:
        return await sensor.read(with_processes=with_processes)
    except SensorError as error:
        return error


def _with_words(error: SensorError, *more: str) -> SensorError:
    """The same error, which also tells what else was looked for; slow stays slow and is not taken for down."""
    return type(error)("; ".join((error.why, *more)), error.remedy)


def _why(gpu: Gpu) -> str:
    return gpu.memory.why if isinstance(gpu.memory, Missing) else "read"
