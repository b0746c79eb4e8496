"""What NVML tells of each card, and of each instance of a card that is split (MIG)."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any, Final

from vram_manager.domain.reading import Missing
from vram_manager.domain.snapshot import Gpu, GpuMemory, ProcessMemory, Trust
from vram_manager.gpus import unified
from vram_manager.gpus._files import command_line, is_wsl
from vram_manager.gpus._nvml_asks import Asks
from vram_manager.gpus._nvml_codes import MEANING, Code

# These drivers returned a larger process struct under the same name, so pids come out scrambled
# (gpustat issue 161, nvitop issue 75).
SCRAMBLED_PROCESSES: Final = ((535, 43), (535, 85))

MIG_HIDDEN: Final = Missing(
    "NVML does not permit to look at its MIG instances",
    "run the container privileged and with NVIDIA_MIG_MONITOR_DEVICES=all",
)
MIG_EMPTY: Final = Missing(
    "it is split (MIG), and has no instance to work on", "on the host: nvidia-smi mig -cgi PROFILE -C"
)
_OF_THE_CARD: Final = Missing("NVML tells it of the whole card only, not of a MIG instance")
_WSL: Final = Missing("WSL2 tells no memory per process")

# Its memory is a NUMA node of the system's, so the kernel may keep files in it: what is used is at most that
# (nvml.h at nvmlDeviceGetMemoryInfo; eth-cscs/cscs-docs pull request 216).
_WITH_CACHE: Final = re.compile(r"\bG[HB]200\b")
_NEWEST_MEMORY: Final = "nvmlDeviceGetMemoryInfo"


class Cards:
    """Reads every card of an open NVML, and remembers what does not change."""

    def __init__(self, asks: Asks, proc_root: Path) -> None:
        self.driver_version: str | Missing = Missing("NVML was not asked yet")
        self._asks = asks
        self._proc_root = proc_root
        self._wsl = is_wsl(proc_root)
        self._count = 0
        self._uuids: dict[int, str] = {}
        self._names: dict[str, str] = {}
        self._integrated: dict[str, bool] = {}
        self._never_split: set[str] = set()

    def begin(self) -> None:
        """NVML was initialised: what the driver cannot do may have changed."""
        self.driver_version = self._asks.text("nvmlSystemGetDriverVersion") or Missing("NVML does not say")
        self._never_split.clear()

    def read(self, count: int, *, with_processes: bool) -> tuple[Gpu, ...]:
        """Every GPU that may be opened. A card that is split is left out for its instances.

        A card's index is NVML's own. The first instance of a split card takes it, as it does for CUDA, and the others
        are numbered on after all cards: no two GPUs have one index.
        """
        if count != self._count:
            self._uuids.clear()  # the others may have moved up: an index means another card now
            self._count = count
        gpus: list[Gpu] = []
        numbers = itertools.count(count)
        for index in range(count):
            found = self._card(index, with_processes)
            if isinstance(found, Gpu):
                gpus.append(found)
                continue
            for place, instance in enumerate(found):
                gpus.append(self._part(*instance, index if place == 0 else next(numbers), with_processes))
        return tuple(sorted(gpus, key=lambda gpu: gpu.index))

    def _card(self, index: int, with_processes: bool) -> Gpu | list[tuple[Any, str, str]]:
        """The card with what it tells and what is missing; its instances instead; [] where it may not be opened."""
        nvml = self._asks.nvml
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)  # 4 us; no handle is promised to outlive a reset
        except nvml.NVMLError as error:
            if error.value == Code.NO_PERMISSION:  # the count includes GPUs hidden from us
                return []
            said = self._asks.said(error.value)
            uuid = self._uuids.get(index, f"index-{index}")
            name = self._names.get(uuid, "unknown GPU")
            return Gpu(uuid=uuid, index=index, name=name, memory=said, utilization_percent=said)
        uuid, name = self._identity(index, handle)
        instances = None if uuid in self._never_split else self._instances(handle, uuid, name)
        if isinstance(instances, Missing):
            return Gpu(uuid=uuid, index=index, name=name, memory=instances, utilization_percent=_OF_THE_CARD)
        if instances is not None:
            return instances
        memory, is_pool = self._memory(handle, uuid, name)
        return Gpu(
            uuid=uuid,
            index=index,
            name=name,
            memory=memory,
            utilization_percent=self._asks.field(lambda: int(nvml.nvmlDeviceGetUtilizationRates(handle).gpu)),
            source=unified.SOURCE
            if is_pool
            else "NVML, with the cache of files"
            if _WITH_CACHE.search(name)
            else "NVML",
            trust=Trust.DERIVED if is_pool else Trust.MEASURED,
            unified=is_pool,
            **self._slow(handle, memory) if with_processes else {},
        )

    def _slow(self, handle: Any, memory: GpuMemory | Missing) -> dict[str, Any]:
        """The fields that are asked rarely."""
        watts = self._asks.field(lambda: int(self._asks.nvml.nvmlDeviceGetPowerUsage(handle)) / 1000)  # mW
        return {
            "temperature_celsius": self._asks.field(lambda: self._temperature(handle)),
            "power_watts": watts,
            "processes": self._asks.field(lambda: self._processes(handle, memory)),
        }

    def _part(self, handle: Any, uuid: str, name: str, index: int, with_processes: bool) -> Gpu:
        """One MIG instance. Its processes are its own; everything else but memory is the card's."""
        memory, _ = self._memory(handle, uuid, name)
        processes: tuple[ProcessMemory, ...] | Missing = Missing("not asked")
        if with_processes:
            processes = self._asks.field(lambda: self._processes(handle, memory))
        return Gpu(
            uuid=uuid,
            index=index,
            name=name,
            memory=MIG_HIDDEN if memory == MEANING[Code.NO_PERMISSION] else memory,
            utilization_percent=_OF_THE_CARD,
            temperature_celsius=_OF_THE_CARD,
            power_watts=_OF_THE_CARD,
            processes=processes,
        )

    def _instances(self, card: Any, uuid: str, name: str) -> list[tuple[Any, str, str]] | Missing | None:
        """Handle, UUID and name of each instance; why there is none on a card that is split; None on a whole card.

        Looked up in every sweep: a handle turns invalid with its instance, and may come to mean another one (nvml.h).
        """
        nvml = self._asks.nvml
        try:
            if not nvml.nvmlDeviceGetMigMode(card)[0]:
                return None
            places = range(int(nvml.nvmlDeviceGetMaxMigDeviceCount(card)))
        except nvml.NVMLError as error:  # anything else that is wrong with the card, its own fields tell
            if error.value in (Code.NOT_SUPPORTED, Code.FUNCTION_NOT_FOUND):
                self._never_split.add(uuid)
            return None
        found: list[tuple[Any, str, str]] = []
        why = MIG_EMPTY
        for place in places:
            try:
                handle = nvml.nvmlDeviceGetMigDeviceHandleByIndex(card, place)
            except nvml.NVMLError as error:
                if error.value != Code.NOT_FOUND:  # that is a hole: no instance in this place
                    why = MIG_HIDDEN if error.value == Code.NO_PERMISSION else self._asks.said(error.value)
                continue
            if (own := self._asks.text("nvmlDeviceGetUUID", handle)) is not None:  # else it went away just now
                found.append((handle, own, self._name(own, handle) or f"{name} MIG"))
        return found or why

    def _identity(self, index: int, handle: Any) -> tuple[str, str]:
        """UUID and name; what was last known of this index where the card does not say."""
        uuid = self._asks.text("nvmlDeviceGetUUID", handle)
        if uuid is None:
            uuid = self._uuids.get(index, f"index-{index}")
        else:
            self._uuids[index] = uuid
        return uuid, self._name(uuid, handle) or "unknown GPU"

    def _name(self, uuid: str, handle: Any) -> str | None:
        """Asked once for each UUID. An instance's says its profile: "NVIDIA H100 80GB HBM3 MIG 1g.10gb"."""
        name = self._names.get(uuid)
        if name is None and (name := self._asks.text("nvmlDeviceGetName", handle)) is not None:
            self._names[uuid] = name
        return name

    def _memory(self, handle: Any, uuid: str, name: str) -> tuple[GpuMemory | Missing, bool]:
        """The GPU's memory, and whether that is a pool which it shares with the CPU."""
        told = self._asks.field(lambda: self._told_memory(handle))
        if isinstance(told, GpuMemory) or told == MEANING[Code.NOT_SUPPORTED] or told == _NO_MEMORY:
            if uuid not in self._integrated:
                self._integrated[uuid] = unified.is_integrated(name, self._proc_root)
            # A GPU of the CPU's chip may also tell nothing less than the machine's memory as its own, which counts
            # what programs on the CPU have as free or as the GPU's (nvtop pull request 511).
            if self._integrated[uuid]:
                shared = unified.pool(self._proc_root)
                whole = shared.total_bytes if isinstance(shared, GpuMemory) else 0
                if not isinstance(told, GpuMemory) or (whole and told.total_bytes >= 0.9 * whole):
                    return shared, True
        return told, False

    def _told_memory(self, handle: Any) -> GpuMemory | Missing:
        """Struct v2, or v1 on drivers before 510. In v1 `used` includes the reserve; `free` is the same."""
        info = self._asks.newest(handle, (_NEWEST_MEMORY, self._asks.nvml.nvmlMemory_v2), (_NEWEST_MEMORY,))
        total, used, free, reserved = info.total, info.used, info.free, getattr(info, "reserved", None)
        if total == 0:
            return _NO_MEMORY
        if used > total or free > total:
            return Missing(f"NVML contradicts itself: {total} bytes in total, {used} used, {free} free")
        return GpuMemory(
            total_bytes=total,
            used_bytes=used,
            free_bytes=free,
            reserved_bytes=Missing("drivers before 510 do not say") if reserved is None else reserved,
        )

    def _temperature(self, handle: Any) -> int:
        sensor = self._asks.nvml.NVML_TEMPERATURE_GPU
        return int(
            self._asks.newest(handle, ("nvmlDeviceGetTemperatureV", sensor), ("nvmlDeviceGetTemperature", sensor))
        )

    def _processes(self, handle: Any, memory: GpuMemory | Missing) -> tuple[ProcessMemory, ...] | Missing:
        """Processes of all kinds by pid. A kind that this GPU or driver does not have adds none."""
        lowest, highest = SCRAMBLED_PROCESSES
        if isinstance(self.driver_version, str) and lowest <= _numbers(self.driver_version) <= highest:
            why = f"driver {self.driver_version} scrambles its process list"
            return Missing(why, "update the NVIDIA driver on the host")
        used_by: dict[int, int | None] = {}
        absent: Exception | None = None
        for kind in ("MPSCompute", "Graphics", "Compute"):
            try:
                for process in self._process_list(handle, kind):
                    if used_by.get(process.pid) is None:
                        used_by[process.pid] = process.usedGpuMemory
            except self._asks.nvml.NVMLError as error:
                if error.value not in (Code.NOT_SUPPORTED, Code.FUNCTION_NOT_FOUND):
                    raise
                absent = error if kind == "Compute" else None
        if used_by:
            return tuple(self._process(pid, used) for pid, used in sorted(used_by.items()))
        if absent is not None:
            raise absent
        # Since driver 535.113 the pids of other pid namespaces are left out without an error: an empty list
        # means "none" only on an empty GPU, or on a driver that is older by far, one without struct v2.
        older = self._asks.lacks(_NEWEST_MEMORY, self._asks.nvml.nvmlMemory_v2)
        if isinstance(memory, GpuMemory) and (memory.used_bytes == 0 or older):
            return ()
        return _WSL if self._wsl else Missing("processes are not visible", "run the container with pid: host")

    def _process_list(self, handle: Any, kind: str) -> list[Any]:
        """One list. It is asked for its length and then filled, and may grow in between: three tries."""
        stem = f"nvmlDeviceGet{kind}RunningProcesses"
        tries = 3
        while True:
            try:
                return list(self._asks.newest(handle, (f"{stem}_v3",), (f"{stem}_v2",)))
            except self._asks.nvml.NVMLError as error:
                tries -= 1
                if error.value != Code.INSUFFICIENT_SIZE or tries == 0:
                    raise

    def _process(self, pid: int, used: int | None) -> ProcessMemory:
        unknown = _WSL if self._wsl else Missing("not available")
        used_bytes = unknown if used is None else used
        return ProcessMemory(pid=pid, used_bytes=used_bytes, command=command_line(self._proc_root, pid))


_NO_MEMORY: Final = Missing("NVML contradicts itself: a card with 0 bytes of memory in total")


def _numbers(version: str) -> tuple[int, ...]:
    """Branch and release of a driver version: "535.54.03" is (535, 54)."""
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
