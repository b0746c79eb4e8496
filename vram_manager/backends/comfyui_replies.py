"""What ComfyUI's replies look like, and what they mean in our values. Function names are ComfyUI's."""

from __future__ import annotations

import json
from operator import attrgetter
from typing import Annotated, Final

from pydantic import BeforeValidator, Field

from vram_manager.backends.shape import Amount, Name, Shape, shaped
from vram_manager.domain.reading import Missing
from vram_manager.domain.snapshot import ComfyUIState, TorchDevice
from vram_manager.errors import Rejected

_MIB: Final = 1024 * 1024
_PROMPTS_AT_MOST: Final = 20  # each holds some 100 kB of workflow, and only what comes next matters
# model_management.py:get_total_memory: here the numbers are RAM (cpu, mps) or a constant 1 GiB (DirectML).
_NO_VRAM: Final = frozenset({"cpu", "mps", "privateuseone"})

# Some forks and front-ends say megabytes, with decimals.
_Megabytes = Annotated[float, Field(ge=0, le=2**30, allow_inf_nan=False)]


class _Device(Shape):
    """server.py:system_stats; the last four fields are what others call the same."""

    name: Name
    type: Name = "unknown"
    index: Amount | None = None
    vram_total: Amount | None = None
    vram_free: Amount | None = None
    torch_vram_total: Amount = 0
    torch_vram_free: Amount = 0
    vram_used: Amount | None = None
    total_mem_mb: _Megabytes | None = None
    free_mem_mb: _Megabytes | None = None
    used_mem_mb: _Megabytes | None = None

    def memory(self) -> tuple[int, int]:
        """Total and free bytes, under whichever names they came."""
        total = _bytes_of(self.vram_total, self.total_mem_mb)
        free = _bytes_of(self.vram_free, self.free_mem_mb)
        used = _bytes_of(self.vram_used, self.used_mem_mb)
        if total is None and free is not None and used is not None:
            total = free + used
        if free is None and total is not None and used is not None and used <= total:
            free = total - used
        if total is None or free is None:
            raise Rejected("total and free memory do not follow from what it says")
        return total, free


class _System(Shape):
    comfyui_version: Name | None = None
    argv: list[str] = Field(default_factory=list)


class _Stats(Shape):
    system: _System = _System()
    devices: list[_Device]


class _ExecInfo(Shape):
    queue_remaining: Amount


class _Prompt(Shape):
    exec_info: _ExecInfo


class _Queue(Shape):
    queue_running: list[object]
    queue_pending: list[object]


def _named(item: object) -> object:
    """An item is a list: number, prompt_id, workflow, and more with every year."""
    return {"number": item[0], "workflow": item[2]} if isinstance(item, list) and len(item) > 2 else item


class _Numbered(Shape):
    number: float
    workflow: object


_Item = Annotated[_Numbered, BeforeValidator(_named)]


class _Workflows(Shape):
    """execution.py:PromptQueue.get_current_queue."""

    queue_running: list[_Item]
    queue_pending: list[_Item]


class _Status(Shape):
    status: _Prompt


class _StatusMessage(Shape):
    data: _Status


class _File(Shape):
    """app/model_manager.py:recursive_search_models_; `size` came in August 2025."""

    name: Name
    size: Amount | None = None


class _Folder(Shape):
    files: list[_File]


def _bytes_of(exact: int | None, megabytes: float | None) -> int | None:
    return exact if exact is not None or megabytes is None else int(megabytes * _MIB)


def parse_system_stats(document: object) -> ComfyUIState:
    """Version, launch arguments, and the devices with memory of their own: none under --cpu.

    A device that does not tell of torch's pool has none: its free memory is then what it says is free.
    """
    stats = shaped(_Stats, document)
    devices = []
    for place, device in enumerate(stats.devices):
        if device.type.lower() in _NO_VRAM:
            continue
        try:
            total, free = device.memory()
        except Rejected as error:
            raise Rejected(f"devices[{place}]: {error.why}") from error
        devices.append(
            TorchDevice(
                name=device.name,
                type=device.type,
                index=device.index,
                vram_total_bytes=total,
                vram_free_bytes=free,
                torch_total_bytes=device.torch_vram_total,
                torch_free_bytes=device.torch_vram_free,
            )
        )
    version = stats.system.comfyui_version or Missing("GET /system_stats: has no comfyui_version")
    return ComfyUIState(version=version, argv=tuple(stats.system.argv), devices=tuple(devices))


def parse_prompt(document: object) -> int:
    """Running + pending prompts in a `GET /prompt` reply (server.py:get_prompt, 37 bytes)."""
    return shaped(_Prompt, document).exec_info.queue_remaining


def parse_queue(document: object) -> int:
    """Running + pending prompts in a `GET /queue` reply, which carries whole workflows."""
    queue = shaped(_Queue, document)
    return len(queue.queue_running) + len(queue.queue_pending)


def parse_prompts(document: object) -> tuple[object, ...]:
    """The workflows of a `GET /queue` reply: running ones, then pending ones by their number, 20 at most.

    The pending ones come as a heap, so their order in the reply is not the order of their turn.
    """
    queue = shaped(_Workflows, document)
    pending = sorted(queue.queue_pending, key=attrgetter("number"))
    return tuple(item.workflow for item in [*queue.queue_running, *pending][:_PROMPTS_AT_MOST])


def parse_model_sizes(document: object) -> dict[str, int]:
    """Bytes by file name in a `GET /experiment/models/{folder}` reply; files whose size it does not tell are left out.

    Several directories may hold a file of one name: the first is the one that ComfyUI loads.
    """
    files = shaped(_Folder, {"files": document}).files
    return {file.name: file.size for file in reversed(files) if file.size is not None}


def parse_status(message: str | bytes) -> int | None:
    """The number in a `status` message of the websocket (server.py:queue_updated), else None."""
    if isinstance(message, bytes):
        return None
    try:
        document = json.loads(message)
        if not isinstance(document, dict) or document.get("type") != "status":
            return None
        return shaped(_StatusMessage, document).data.status.exec_info.queue_remaining
    except (ValueError, RecursionError, Rejected):
        return None
