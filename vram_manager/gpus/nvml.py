"""NVIDIA GPUs, asked through NVML."""

from __future__ import annotations

from pathlib import Path

from vram_manager.domain.snapshot import Gpu
from vram_manager.gpus._nvml_calls import NvmlCalls
from vram_manager.gpus._threaded import ThreadedSensor


class NvmlSensor(ThreadedSensor):
    """A GpuSensor that holds NVML open from the first read until `close`; with `gpu_sleep`, while a GPU is used."""

    _calls: NvmlCalls

    def __init__(
        self,
        *,
        deadline_seconds: float = 5.0,
        proc_root: Path = Path("/proc"),
        sys_root: Path = Path("/sys"),
        gpu_sleep: bool = False,
    ) -> None:
        calls = NvmlCalls(proc_root, sys_root, gpu_sleep=gpu_sleep)
        super().__init__("NVML", calls, deadline_seconds=deadline_seconds)

    @property
    def revoked(self) -> bool:
        """NVML worked in this process and was then taken away (999, 17): only a restart brings it back."""
        return self._calls.revoked

    @property
    def known(self) -> tuple[Gpu, ...]:
        """The GPUs of the last sweep that listed any, whatever became of them since."""
        return self._calls.known

    def wake(self) -> None:
        """The next read touches the GPUs even where they sleep: somebody is about to use one."""
        self._calls.wake()
