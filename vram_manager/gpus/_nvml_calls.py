"""Everything that is said to NVML, as plain blocking code for one thread.

Codes, units and struct versions are those of nvml.h (NVML API 13) as nvidia-ml-py 13 binds them. Two traps
of that binding are avoided throughout: an NVMLError has no hash and compares by `other.value`, and its str()
calls into the driver for codes it does not know. Hence only `error.value` is ever looked at.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import suppress
from enum import IntEnum
from pathlib import Path
from typing import Any, Final, TypeVar

from vram_manager.domain.reading import Missing
from vram_manager.domain.snapshot import Gpu, GpuMemory, Gpus, ProcessMemory
from vram_manager.errors import SensorError

T = TypeVar("T")


class Code(IntEnum):
    """The nvmlReturn_t values that are acted on."""

    UNINITIALIZED = 1
    NOT_SUPPORTED = 3
    NO_PERMISSION = 4
    INSUFFICIENT_SIZE = 7
    DRIVER_NOT_LOADED = 9
    LIBRARY_NOT_FOUND = 12
    FUNCTION_NOT_FOUND = 13
    GPU_IS_LOST = 15
    RESET_REQUIRED = 16
    OPERATING_SYSTEM = 17
    LIB_RM_VERSION_MISMATCH = 18
    GPU_NOT_FOUND = 28
    UNKNOWN = 999


REVOKING: Final = frozenset({Code.OPERATING_SYSTEM, Code.UNKNOWN})
"""What NVML says in a container whose device cgroup was taken away."""

RENEWING: Final = REVOKING | {
    Code.UNINITIALIZED,
    Code.DRIVER_NOT_LOADED,
    Code.GPU_IS_LOST,
    Code.RESET_REQUIRED,
    Code.LIB_RM_VERSION_MISMATCH,
    Code.GPU_NOT_FOUND,
}
"""After these only shutdown and a new init can help."""

FIRST_WAIT_SECONDS: Final = 1.0
LONGEST_WAIT_SECONDS: Final = 30.0  # an init can be a full bring-up: 1.5 s (system76-power issue 492)

# These drivers returned a larger process struct under the same name, so pids come out scrambled
# (gpustat issue 161, nvitop issue 75).
SCRAMBLED_PROCESSES: Final = ((535, 43), (535, 85))

_RESET = "read its Xid in the host's kernel log, then reset it (nvidia-smi --gpu-reset) or reboot the host"
_RESTART = "docker restart this container"
_BLOCKED = "the container lost the GPU device (a daemon-reload on the host does that)"
_UNBLOCK = f"{_RESTART}; to prevent it use CDI or nvidia-ctk system create-dev-char-symlinks"

MEANING: Final[dict[int, Missing]] = {
    Code.UNINITIALIZED: Missing("NVML was shut down under us"),
    Code.NOT_SUPPORTED: Missing("the GPU does not report it; unified memory and some vGPUs never do"),
    Code.NO_PERMISSION: Missing("NVML does not permit it", "run the container with more privileges"),
    Code.INSUFFICIENT_SIZE: Missing("the process list kept growing while it was read"),
    Code.DRIVER_NOT_LOADED: Missing(
        "the NVIDIA driver is not loaded",
        "make nvidia-smi work on the host, then reserve the GPU in compose and recreate this container",
    ),
    Code.LIBRARY_NOT_FOUND: Missing(
        "libnvidia-ml.so.1 cannot be loaded: no NVIDIA driver is visible here",
        "reserve the GPU in compose with capabilities [gpu, utility] (the host needs the NVIDIA Container"
        " Toolkit); the image must be glibc-based, never Alpine",
    ),
    Code.FUNCTION_NOT_FOUND: Missing("this driver is too old for it", "update the NVIDIA driver on the host"),
    Code.GPU_IS_LOST: Missing("the GPU is lost: it has fallen off the bus", _RESET),
    Code.RESET_REQUIRED: Missing("the GPU needs a reset", _RESET),
    Code.OPERATING_SYSTEM: Missing(f"{_BLOCKED}: NVML is blocked by the operating system (17)", _UNBLOCK),
    Code.LIB_RM_VERSION_MISMATCH: Missing(
        "the NVML library and the driver have different versions: the host's driver was updated",
        f"{_RESTART}, after a reboot of the host if its own nvidia-smi fails too; with CDI run"
        " nvidia-ctk cdi generate on the host first",
    ),
    Code.GPU_NOT_FOUND: Missing("the GPU is gone from the bus", _RESET),
    Code.UNKNOWN: Missing(f"{_BLOCKED}: NVML says Unknown Error (999)", _UNBLOCK),
}

BLOCKED: Final = tuple(MEANING[code] for code in REVOKING)


def meaning(code: int) -> Missing:
    """The code in words, without asking the driver for them."""
    return MEANING.get(code) or Missing(f"NVML error {code}")


def load() -> Any:
    """The module of nvidia-ml-py, and of nothing else: other packages wear its name and misread memory."""
    remedy = "pip uninstall pynvml nvidia-ml-py3 py3nvml; pip install --force-reinstall nvidia-ml-py"
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError as error:
        raise SensorError(f"nvidia-ml-py cannot be imported: {error}", "pip install nvidia-ml-py") from error
    if not (hasattr(nvml, "_nvmlGetFunctionPointer") and hasattr(nvml, "nvmlMemory_v2")):
        raise SensorError("the installed pynvml module is not a current nvidia-ml-py", remedy)
    return nvml


class NvmlCalls:
    """NVML, initialised once and held; initialised anew, ever more rarely, after errors that need it."""

    def __init__(self, proc_root: Path) -> None:
        self.revoked = False
        self._proc_root = proc_root
        self._nvml: Any = None
        self._open = False
        self._worked = False
        self._renew = False  # an answer of this sweep asks for a new init
        self._retry_at: float | None = None
        self._wait = FIRST_WAIT_SECONDS
        self._refusal = Missing("NVML was not asked yet")
        self._absent: set[tuple[object, ...]] = set()
        self._driver_version: str | Missing = self._refusal
        self._count = 0
        self._uuids: dict[int, str] = {}
        self._names: dict[str, str] = {}

    def sweep(self, now: float, *, with_processes: bool) -> Gpus:
        """Every GPU at `now`. Raises SensorError when NVML cannot be opened or shows none."""
        self._ensure_open(now)
        nvml = self._nvml
        self._renew = False
        try:
            count = int(nvml.nvmlDeviceGetCount())
        except nvml.NVMLError as error:
            if error.value in RENEWING:
                raise self._refuse(meaning(error.value), now) from error
            said = meaning(error.value)
            raise SensorError(f"NVML does not count its GPUs: {said.why}", said.remedy) from error
        if count == 0:
            raise self._refuse(Missing("NVML counts 0 GPUs", _RESTART), now)
        if count != self._count:
            self._uuids.clear()  # the others may have moved up: an index means another card now
            self._count = count
        gpus = tuple(gpu for index in range(count) if (gpu := self._gpu(index, with_processes)) is not None)
        if not gpus:
            said = meaning(Code.NO_PERMISSION)
            raise SensorError(f"none of {count} GPUs can be opened: {said.why}", said.remedy)
        blocked = [why for gpu in gpus if isinstance(why := gpu.memory, Missing) and why in BLOCKED]
        if len(blocked) == len(gpus):
            raise self._refuse(blocked[0], now)
        self._settle(now, read_something=any(isinstance(gpu.memory, GpuMemory) for gpu in gpus))
        return Gpus(gpus=gpus, driver_version=self._driver_version)

    def shutdown(self) -> None:
        """Lets the driver go. What nvmlShutdown answers changes nothing, so it is not looked at."""
        if self._open:
            self._open = False
            with suppress(self._nvml.NVMLError):
                self._nvml.nvmlShutdown()

    def _ensure_open(self, now: float) -> None:
        """NVML is initialised; a new init that is due has been done, one that is not due is refused."""
        if self._nvml is None:
            self._nvml = load()
        if self._retry_at is not None:
            if now >= self._retry_at:
                self.shutdown()
            elif not self._open:
                raise SensorError(self._refusal.why, self._refusal.remedy)
        if self._open:
            return
        try:
            self._nvml.nvmlInit()
        except self._nvml.NVMLError as error:
            raise self._refuse(meaning(error.value), now) from error
        self._open = True
        self._retry_at = None
        self._absent.clear()
        self._driver_version = self._text("nvmlSystemGetDriverVersion") or Missing("NVML does not say")

    def _refuse(self, said: Missing, now: float) -> SensorError:
        """NVML is let go until the wait is over, and until then every read gets this same answer."""
        self.shutdown()
        self._renew_later(now)
        self._refusal = said
        self.revoked = self._worked and said in BLOCKED
        return SensorError(said.why, said.remedy)

    def _settle(self, now: float, *, read_something: bool) -> None:
        """A lost card leaves NVML open for the others, with a new init due; a clean sweep cancels it."""
        self.revoked = False
        self._worked = self._worked or read_something
        if self._renew:
            self._renew_later(now)
        else:
            self._retry_at = None
            self._wait = FIRST_WAIT_SECONDS

    def _renew_later(self, now: float) -> None:
        if self._retry_at is None or self._retry_at <= now:
            self._retry_at = now + self._wait
            self._wait = min(LONGEST_WAIT_SECONDS, 2 * self._wait)

    def _gpu(self, index: int, with_processes: bool) -> Gpu | None:
        """The GPU with what it tells and what is missing; None where this process may not open it."""
        nvml = self._nvml
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)  # 4 us; no handle is promised to outlive a reset
        except nvml.NVMLError as error:
            if error.value == Code.NO_PERMISSION:  # the count includes GPUs hidden from us
                return None
            said = self._said(error.value)
            uuid = self._uuids.get(index, f"index-{index}")
            name = self._names.get(uuid, "unknown GPU")
            return Gpu(uuid=uuid, index=index, name=name, memory=said, utilization_percent=said)
        uuid, name = self._identity(index, handle)
        memory = self._field(lambda: self._memory(handle))
        utilization = self._field(lambda: int(nvml.nvmlDeviceGetUtilizationRates(handle).gpu))
        if not with_processes:
            return Gpu(uuid=uuid, index=index, name=name, memory=memory, utilization_percent=utilization)
        return Gpu(
            uuid=uuid,
            index=index,
            name=name,
            memory=memory,
            utilization_percent=utilization,
            temperature_celsius=self._field(lambda: self._temperature(handle)),
            power_watts=self._field(lambda: int(nvml.nvmlDeviceGetPowerUsage(handle)) / 1000),  # mW
            processes=self._field(lambda: self._processes(handle, memory)),
        )

    def _identity(self, index: int, handle: Any) -> tuple[str, str]:
        """UUID and name; what was last known of this index where the card does not say."""
        uuid = self._text("nvmlDeviceGetUUID", handle)
        if uuid is None:
            uuid = self._uuids.get(index, f"index-{index}")
        else:
            self._uuids[index] = uuid
        name = self._names.get(uuid)
        if name is None and (name := self._text("nvmlDeviceGetName", handle)) is not None:
            self._names[uuid] = name
        return uuid, name or "unknown GPU"

    def _memory(self, handle: Any) -> GpuMemory | Missing:
        """Struct v2, or v1 on drivers before 510. In v1 `used` includes the reserve; `free` is the same."""
        info = self._newest(handle, ("nvmlDeviceGetMemoryInfo", self._nvml.nvmlMemory_v2), ("nvmlDeviceGetMemoryInfo",))
        total, used, free, reserved = info.total, info.used, info.free, getattr(info, "reserved", None)
        if total == 0 or used > total or free > total:
            return Missing(f"NVML contradicts itself: {total} bytes in total, {used} used, {free} free")
        return GpuMemory(
            total_bytes=total,
            used_bytes=used,
            free_bytes=free,
            reserved_bytes=Missing("drivers before 510 do not say") if reserved is None else reserved,
        )

    def _temperature(self, handle: Any) -> int:
        sensor = self._nvml.NVML_TEMPERATURE_GPU
        return int(self._newest(handle, ("nvmlDeviceGetTemperatureV", sensor), ("nvmlDeviceGetTemperature", sensor)))

    def _processes(self, handle: Any, memory: GpuMemory | Missing) -> tuple[ProcessMemory, ...] | Missing:
        """Processes of all kinds by pid. A kind that this GPU or driver does not have adds none."""
        lowest, highest = SCRAMBLED_PROCESSES
        if isinstance(self._driver_version, str) and lowest <= _numbers(self._driver_version) <= highest:
            why = f"driver {self._driver_version} scrambles its process list"
            return Missing(why, "update the NVIDIA driver on the host")
        used_by: dict[int, int | None] = {}
        absent: Exception | None = None
        for kind in ("MPSCompute", "Graphics", "Compute"):
            try:
                for process in self._process_list(handle, kind):
                    if used_by.get(process.pid) is None:
                        used_by[process.pid] = process.usedGpuMemory
            except self._nvml.NVMLError as error:
                if error.value not in (Code.NOT_SUPPORTED, Code.FUNCTION_NOT_FOUND):
                    raise
                absent = error if kind == "Compute" else None
        if used_by:
            return tuple(self._process(pid, used) for pid, used in sorted(used_by.items()))
        if absent is not None:
            raise absent
        # Since driver 535.113 the pids of other pid namespaces are left out without an error: an empty list
        # means "none" only on an empty GPU, or on a driver that is older by far, one without struct v2.
        match memory:
            case GpuMemory(used_bytes=0) | GpuMemory(reserved_bytes=Missing()):
                return ()
        return Missing("processes are not visible", "run the container with pid: host")

    def _process_list(self, handle: Any, kind: str) -> list[Any]:
        """One list. It is asked for its length and then filled, and may grow in between: three tries."""
        stem = f"nvmlDeviceGet{kind}RunningProcesses"
        tries = 3
        while True:
            try:
                return list(self._newest(handle, (f"{stem}_v3",), (f"{stem}_v2",)))
            except self._nvml.NVMLError as error:
                tries -= 1
                if error.value != Code.INSUFFICIENT_SIZE or tries == 0:
                    raise

    def _process(self, pid: int, used: int | None) -> ProcessMemory:
        command: tuple[str, ...] | Missing = Missing("it has no command line")
        try:
            line = (self._proc_root / str(pid) / "cmdline").read_bytes().decode(errors="replace")
        except OSError as error:
            command = Missing(f"its command line cannot be read: {error.strerror}")
        else:
            if line:  # a zombie's is empty
                command = tuple(line.removesuffix("\0").split("\0"))
        used_bytes = Missing("not available") if used is None else used
        return ProcessMemory(pid=pid, used_bytes=used_bytes, command=command)

    def _newest(self, handle: Any, *calls: tuple[Any, ...]) -> Any:
        """The answer of the first call that the driver has; what it lacks is not tried until a new init."""
        for call in calls:
            if call not in self._absent:
                try:
                    return getattr(self._nvml, call[0])(handle, *call[1:])
                except self._nvml.NVMLError as error:
                    if error.value != Code.FUNCTION_NOT_FOUND:
                        raise
                    self._absent.add(call)
        raise self._nvml.NVMLError(int(Code.FUNCTION_NOT_FOUND))

    def _field(self, ask: Callable[[], T]) -> T | Missing:
        """The value, or why there is none: every field fails alone."""
        try:
            return ask()
        except self._nvml.NVMLError as error:
            return self._said(error.value)

    def _text(self, call: str, *arguments: Any) -> str | None:
        try:
            return str(getattr(self._nvml, call)(*arguments))
        except UnicodeDecodeError:  # the driver's buffer held no text: a name is not worth a crash
            return None
        except self._nvml.NVMLError as error:
            self._said(error.value)
            return None

    def _said(self, code: int) -> Missing:
        self._renew = self._renew or code in RENEWING
        return meaning(code)


def _numbers(version: str) -> tuple[int, ...]:
    """Branch and release of a driver version: "535.54.03" is (535, 54)."""
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
