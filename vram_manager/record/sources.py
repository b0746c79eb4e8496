"""Who can be asked how much GPU memory is taken: this machine's drivers, ComfyUI, the daemon; in this order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Protocol

from pydantic import Field

from vram_manager.backends.http import JsonClient
from vram_manager.backends.shape import Amount, Name, Shape, shaped
from vram_manager.client import call
from vram_manager.domain.reading import Missing
from vram_manager.domain.size import MIB
from vram_manager.domain.snapshot import Gpu, ProcessMemory
from vram_manager.errors import Rejected, SensorError, Unreachable
from vram_manager.gpus import GpuSensor
from vram_manager.processes import Processes
from vram_manager.record.timeline import Look, Unread


class Source(Protocol):
    """Somebody who tells how much of each GPU is taken, and is not asked again within `rest_seconds`."""

    name: str
    rest_seconds: float

    async def look(self, command_pid: int | None) -> tuple[Look | Unread, ...]:
        """Every GPU now, a Look at one at least; nothing at all where nothing new is known since the last time.

        `command_pid`: list processes too, and say what this one and its descendants have. Raises SensorError.
        """
        ...

    async def close(self) -> None:
        """No connection is left open."""
        ...


class Drivers:
    """The GPUs of this machine, asked directly. The sensor is made on the thread that looks."""

    name = "the GPU driver"
    rest_seconds = 0.0  # NVML tells the memory of a card in some 12 us

    def __init__(self, sensor: Callable[[], GpuSensor], processes: Processes | None = None) -> None:
        self._make = sensor
        self._sensor: GpuSensor | None = None
        self._processes = processes or Processes()

    async def look(self, command_pid: int | None) -> tuple[Look | Unread, ...]:
        """What the drivers count."""
        self._sensor = self._sensor or self._make()
        seen = (await self._sensor.read(with_processes=command_pid is not None)).gpus
        looks = tuple(self._one(gpu, command_pid) for gpu in seen)
        if not any(isinstance(look, Look) for look in looks):
            why = next((gpu.memory for gpu in seen if isinstance(gpu.memory, Missing)), Missing("there is no GPU"))
            raise SensorError(why.why, why.remedy)
        return looks

    async def close(self) -> None:
        if self._sensor is not None:
            self._sensor.close()

    def _one(self, gpu: Gpu, command_pid: int | None) -> Look | Unread:
        memory = gpu.memory
        if isinstance(memory, Missing):
            return Unread(uuid=gpu.uuid, index=gpu.index, why=memory.why)
        reserved = memory.reserved_bytes
        return Look(
            uuid=gpu.uuid,
            index=gpu.index,
            name=gpu.name,
            source=gpu.source,
            taken_bytes=memory.taken_bytes,
            free_bytes=memory.free_bytes,
            reserved_bytes=None if isinstance(reserved, Missing) else reserved,
            total_bytes=memory.total_bytes,
            command_bytes=None if command_pid is None else self._command(gpu.processes, command_pid),
        )

    def _command(self, processes: tuple[ProcessMemory, ...] | Missing, pid: int) -> int | None:
        if isinstance(processes, Missing):
            return None
        family = self._processes.families([pid], [process.pid for process in processes])[pid]
        total = 0
        for process in processes:
            if process.pid in family:
                if isinstance(process.used_bytes, Missing):
                    return None
                total += process.used_bytes
        return total


# Forks and front-ends say megabytes, with decimals.
_Megabytes = Annotated[float, Field(ge=0, le=2**30, allow_inf_nan=False)]


class _Device(Shape):
    """ComfyUI's server.py:system_stats, in bytes; the last four fields are what others call the same."""

    name: Name = "ComfyUI's GPU"
    type: Name = "unknown"
    index: Amount | None = None
    vram_total: Amount | None = None
    vram_free: Amount | None = None
    torch_vram_free: Amount = 0
    vram_used: Amount | None = None
    total_mem_mb: _Megabytes | None = None
    free_mem_mb: _Megabytes | None = None
    used_mem_mb: _Megabytes | None = None


class _Stats(Shape):
    devices: list[_Device]


def looks_of_comfyui(document: object) -> tuple[Look, ...]:
    """What `GET /system_stats` tells of its GPUs. What a fork leaves out is unknown; how much is taken must follow.

    `vram_free` counts what torch keeps without using it as free: for everybody else that is taken.
    """
    looks = []
    for place, device in enumerate(shaped(_Stats, document).devices):
        if device.type.lower() in ("cpu", "mps", "privateuseone"):
            continue  # its numbers are the computer's memory, or made up
        total = _either(device.vram_total, device.total_mem_mb)
        free = _either(device.vram_free, device.free_mem_mb)
        used = _either(device.vram_used, device.used_mem_mb)
        if free is not None:
            free = max(0, free - device.torch_vram_free)
        if total is not None and free is not None:
            used = max(0, total - free)
        if used is None:
            raise Rejected(f"devices[{place}]: how much memory is used does not follow from what it says")
        if total is not None and free is None:
            free = max(0, total - used)
        looks.append(
            Look(
                uuid=f"comfyui-{place}",
                index=place if device.index is None else device.index,
                name=device.name,
                source="ComfyUI",
                taken_bytes=used,
                free_bytes=free,
                total_bytes=total,
            )
        )
    if not looks:
        raise Rejected("it runs without a GPU")
    return tuple(looks)


def _either(exact: int | None, megabytes: float | None) -> int | None:
    return exact if exact is not None or megabytes is None else int(megabytes * MIB)


class ComfyUI:
    """What ComfyUI says of the GPUs it uses: all that is taken there, by whomever."""

    name = "ComfyUI"
    # Its event loop answers this itself, some 10 ms each time, while it should serve the run that is recorded.
    rest_seconds = 0.25
    # A whole gc.collect may be in the way; longer than that would be too long before a command.
    _DEADLINE_SECONDS: Final = 4.0

    def __init__(self, url: str, headers: Mapping[str, str]) -> None:
        self._url, self._headers = url, headers
        self._client: JsonClient | None = None

    async def look(self, command_pid: int | None) -> tuple[Look, ...]:
        """What `GET /system_stats` says."""
        self._client = self._client or JsonClient(self._url, headers=self._headers, name="ComfyUI")
        return await self._client.get("/system_stats", looks_of_comfyui, deadline=self._DEADLINE_SECONDS)

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()


class Daemon:
    """What vram-manager's daemon saw last: up to some seconds old, and each snapshot counts once."""

    name = "the daemon"
    rest_seconds = 0.5
    _DEADLINE_SECONDS: Final = 3.0

    def __init__(self) -> None:
        self._taken_at: str | None = None

    async def look(self, command_pid: int | None) -> tuple[Look, ...]:
        """What its snapshot says, if that is a new one."""
        try:
            reply = await asyncio.to_thread(call, "GET", "/v1/snapshot", timeout_seconds=self._DEADLINE_SECONDS)
        except Unreachable as error:
            raise SensorError(str(error)) from error
        if reply.error is not None:
            raise Rejected(reply.error)
        try:
            taken_at = reply.body["taken_at"]
            looks = looks_of_the_daemon(reply.body, datetime.now(UTC))
        except (KeyError, TypeError, ValueError) as error:
            raise Rejected("its snapshot cannot be read: is it of another version?") from error
        if taken_at == self._taken_at:
            return ()
        self._taken_at = taken_at
        return looks

    async def close(self) -> None:
        """Each call has its own connection."""


def looks_of_the_daemon(snapshot: dict[str, Any], now: datetime) -> tuple[Look, ...]:
    """What a snapshot (`GET /v1/snapshot`) tells of the GPUs whose memory is known. Raises Rejected when none is."""
    known = [gpu for gpu in snapshot["gpus"] if gpu["total_bytes"] is not None]
    if not known:
        raise Rejected(snapshot["gpus_why"] or "it has not seen a GPU yet")
    age_seconds = max(0.0, (now - datetime.fromisoformat(snapshot["taken_at"])).total_seconds())
    return tuple(
        Look(
            uuid=gpu["uuid"],
            index=gpu["index"],
            name=gpu["name"],
            source="ComfyUI, by the daemon" if snapshot["second_hand"] else "the daemon",
            taken_bytes=gpu["total_bytes"] - (gpu["reserved_bytes"] or 0) - gpu["free_bytes"],
            free_bytes=gpu["free_bytes"],
            reserved_bytes=gpu["reserved_bytes"],
            total_bytes=gpu["total_bytes"],
            age_seconds=age_seconds,
        )
        for gpu in known
    )
