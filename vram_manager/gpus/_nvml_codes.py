"""What NVML's return codes mean for people, and the one module that may speak for NVML.

Codes are those of nvml.h (NVML API 13) as nvidia-ml-py 13 binds them.
"""

from __future__ import annotations

import importlib
from enum import IntEnum
from typing import Any, Final

from vram_manager.domain.reading import Missing
from vram_manager.errors import SensorError


class Code(IntEnum):
    """The nvmlReturn_t values that are acted on."""

    UNINITIALIZED = 1
    NOT_SUPPORTED = 3
    NO_PERMISSION = 4
    NOT_FOUND = 6
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

_RESET = "read its Xid in the host's kernel log, then reset it (nvidia-smi --gpu-reset) or reboot the host"
RESTART: Final = "docker restart this container"
_BLOCKED = "the container lost the GPU device (a daemon-reload on the host does that)"
_UNBLOCK = f"{RESTART}; to prevent it use CDI or nvidia-ctk system create-dev-char-symlinks"

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
        f"{RESTART}, after a reboot of the host if its own nvidia-smi fails too; with CDI run"
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
