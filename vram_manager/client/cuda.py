"""What torch knows of this process's memory, where the caller has already imported it. We never import it."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple


class TorchMemory(NamedTuple):
    """Bytes of this process on one device: in tensors, and kept from the driver. None: torch cannot say."""

    allocated_bytes: int | None = None
    reserved_bytes: int | None = None


def memory(gpu: str | None = None) -> TorchMemory:
    """torch's numbers of the GPU with that UUID, or of the current device."""
    cuda = _cuda()
    if cuda is None:
        return TorchMemory()
    try:
        device = _device(cuda, gpu)
        return TorchMemory(int(cuda.memory_allocated(*device)), int(cuda.memory_reserved(*device)))
    except Exception:  # a lost GPU, or a torch that is half imported: then it does not know
        return TorchMemory()


def empty_cache() -> None:
    """What torch keeps and does not use goes back to the driver."""
    cuda = _cuda()
    if cuda is not None:
        cuda.empty_cache()


def _cuda() -> Any | None:
    """torch.cuda, if somebody uses it."""
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    initialized = getattr(cuda, "is_initialized", None)
    return cuda if initialized is not None and initialized() else None


def _device(cuda: Any, gpu: str | None) -> tuple[int, ...]:
    """The device with that UUID; nothing, for torch's current one, where torch tells none (old ones do not)."""
    if gpu is None or cuda.device_count() == 1:
        return ()
    for index in range(cuda.device_count()):
        if str(getattr(cuda.get_device_properties(index), "uuid", "")) == gpu.removeprefix("GPU-"):
            return (index,)
    return ()
