"""The state of the fake NVML library (tests/fake_nvml/fake_nvml.c), shared with it through one mapped file.

The layout stands here and in `struct state` of that file, in the same order; a test compares their sizes.
The library opens the file named by the environment variable FAKE_NVML_STATE at nvmlInit and looks at it in
every call, so a change made here is seen by the next call in whatever process.
"""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path
from types import TracebackType
from typing import Final

MAX_GPUS: Final = 8
MAX_PARTS: Final = 8
"""MIG instances of all cards together: they follow the cards in `NvmlState.gpus`."""
MAX_PLACES: Final = 7
"""Places for instances on one card."""
MAX_PROCESSES: Final = 16
COMPUTE, GRAPHICS, MPS = 1, 2, 4
NOT_AVAILABLE: Final = 2**64 - 1
"""NVML's word for "memory of this process unknown" (WSL2, MIG, vGPU)."""

_MIB = 1024 * 1024


class FakeProcess(ctypes.Structure):
    """One process. `kinds` adds up COMPUTE, GRAPHICS and MPS: the lists that it is in."""

    _fields_ = [("pid", ctypes.c_uint32), ("kinds", ctypes.c_uint32), ("used", ctypes.c_uint64)]


class FakeGpu(ctypes.Structure):
    """One device. Each `*_error` is an nvmlReturn_t that the calls of that field answer; 0 is success."""

    _fields_ = [
        ("total", ctypes.c_uint64),  # bytes, as in struct v2: total = reserved + used + free
        ("reserved", ctypes.c_uint64),
        ("used", ctypes.c_uint64),
        ("free", ctypes.c_uint64),
        ("handle_error", ctypes.c_int32),  # nvmlDeviceGetHandleByIndex
        ("error", ctypes.c_int32),  # every call that takes the handle
        ("uuid_error", ctypes.c_int32),
        ("name_error", ctypes.c_int32),
        ("memory_error", ctypes.c_int32),
        ("utilization_error", ctypes.c_int32),
        ("temperature_error", ctypes.c_int32),
        ("power_error", ctypes.c_int32),
        ("compute_error", ctypes.c_int32),
        ("graphics_error", ctypes.c_int32),
        ("mps_error", ctypes.c_int32),
        ("mig_mode_error", ctypes.c_int32),  # nvmlDeviceGetMigMode; 3 on a card that cannot be split
        ("mig_error", ctypes.c_int32),  # nvmlDeviceGetMigDeviceHandleByIndex
        ("mig_mode", ctypes.c_uint32),  # 1 on a card that is split
        ("places", ctypes.c_uint32 * MAX_PLACES),  # which of `NvmlState.gpus` is the instance there; 0 is a hole
        ("utilization", ctypes.c_uint32),  # percent
        ("temperature", ctypes.c_uint32),  # degrees Celsius
        ("power", ctypes.c_uint32),  # milliwatts
        ("process_count", ctypes.c_uint32),
        ("grows", ctypes.c_uint32),  # so many times the list has grown when it is filled: INSUFFICIENT_SIZE
        ("processes", FakeProcess * MAX_PROCESSES),
        ("name", ctypes.c_char * 96),
        ("uuid", ctypes.c_char * 80),
    ]


class NvmlState(ctypes.Structure):
    """A new state file with `gpus` healthy cards; its fields may be read and set at any time.

    Leaving the context ends a hang, so that no thread stays inside the library.
    """

    _fields_ = [
        ("gpu_count", ctypes.c_uint32),
        ("init_error", ctypes.c_int32),
        ("count_error", ctypes.c_int32),
        ("hang_ms", ctypes.c_uint32),  # every call lasts that long, or until this is 0 again
        ("hanging", ctypes.c_uint32),  # calls that are inside a hang now
        ("inits", ctypes.c_uint32),  # attempts, failed ones included
        ("shutdowns", ctypes.c_uint32),
        ("name_calls", ctypes.c_uint32),
        ("process_calls", ctypes.c_uint32),
        ("newest_error", ctypes.c_int32),  # what memory v2, process lists v3 and TemperatureV answer
        ("newest_calls", ctypes.c_uint32),  # calls of those
        ("calls", ctypes.c_uint32),  # all
        ("driver_version", ctypes.c_char * 80),
        ("gpus", FakeGpu * (MAX_GPUS + MAX_PARTS)),
    ]

    def __new__(cls, path: Path, gpus: int = 1) -> NvmlState:
        with path.open("w+b") as file:
            file.truncate(ctypes.sizeof(cls))
            return cls.from_buffer(mmap.mmap(file.fileno(), ctypes.sizeof(cls)))

    def __init__(self, path: Path, gpus: int = 1) -> None:
        self.path = path
        self.gpu_count = gpus
        self.driver_version = b"595.71.05"
        for index in range(MAX_GPUS + MAX_PARTS):
            # An idle 4080 Super under driver 595.71, from a capture of nvidia_gpu_exporter.
            self.set_memory(index, total=16376 * _MIB, reserved=434 * _MIB, used=596 * _MIB, free=15348 * _MIB)
            self.set_identity(index, name=f"Fake GPU {index}", uuid=f"GPU-00000000-0000-0000-0000-{index:012d}")
            self.gpus[index].utilization = 7
            self.gpus[index].temperature = 41
            self.gpus[index].power = 17_500
            self.gpus[index].mig_mode_error = 3

    def __enter__(self) -> NvmlState:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.hang_ms = 0

    def set_memory(self, index: int, *, total: int, reserved: int, used: int, free: int) -> None:
        """All four at once, in bytes; they need not add up."""
        gpu = self.gpus[index]
        gpu.total, gpu.reserved, gpu.used, gpu.free = total, reserved, used, free

    def set_identity(self, index: int, *, name: str, uuid: str) -> None:
        """The card at `index` is another one now."""
        self.gpus[index].name, self.gpus[index].uuid = name.encode(), uuid.encode()

    def add_process(self, index: int, pid: int, used_bytes: int | None, *, kinds: int = COMPUTE) -> None:
        """One more process on that GPU; None is a memory that the driver does not tell."""
        gpu = self.gpus[index]
        used = NOT_AVAILABLE if used_bytes is None else used_bytes
        gpu.processes[gpu.process_count] = FakeProcess(pid, kinds, used)
        gpu.process_count += 1

    def split(self, index: int, *parts: int | None) -> None:
        """The card is split: in each of its places is that one of MAX_PARTS instances, or none."""
        gpu = self.gpus[index]
        gpu.mig_mode, gpu.mig_mode_error = 1, 0
        for place in range(MAX_PLACES):
            part = parts[place] if place < len(parts) else None
            gpu.places[place] = 0 if part is None else MAX_GPUS + part
