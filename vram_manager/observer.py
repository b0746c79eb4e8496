"""Asks every sensor in a task of its own, each with its cadence, and puts together what they last said.

An Ollama that takes 15 s to answer delays nobody; a reading older than its limit is a `Missing`; a sensor that
fails is told once, and once more when it is back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Generic, TypeVar

from vram_manager.backends import ComfyUI, Ollama
from vram_manager.clock import Clock
from vram_manager.domain.event import Event, EventType
from vram_manager.domain.reading import Missing, Off, Reading, Seen
from vram_manager.domain.snapshot import ComfyUIState, Gpu, GpuMemory, Gpus, LoadedModel, OllamaState, Queue, Snapshot
from vram_manager.errors import SensorError, TimedOut
from vram_manager.gpus import GpuSensor

T = TypeVar("T")

# One look costs about 0.1 ms for four GPUs; at 1 s a new fill is seen before it is half done.
GPU_SECONDS, GPU_FAST_SECONDS, GPU_LIMIT_SECONDS = 1.0, 0.25, 5.0
# A new model is to be seen within a second; before v0.32.4 a faster poll races with Ollama's own unloads.
OLLAMA_SECONDS, OLLAMA_LIMIT_SECONDS = 1.0, 20.0
# The websocket tells at once; the poll beside it catches a socket that died without a word.
QUEUE_SECONDS, QUEUE_FAST_SECONDS, QUEUE_LIMIT_SECONDS = 2.0, 1.0, 10.0
QUEUE_FOLLOWED_SECONDS = 4.0
STATS_FAST_SECONDS = 1.0
# The process list costs 4.5 ms a GPU under the driver's global lock (MangoHud PR 2104), so it is asked rarely.
PROCESSES_SECONDS, PROCESSES_FAST_SECONDS = 60.0, 10.0
# While somebody waits or a free settles, what moved since makes it a wrong answer to who holds what.
PROCESSES_MOVED_BYTES = 2**28
RECONNECT_SECONDS = 5.0
# A sensor that hangs at the start keeps the others waiting no longer than this; a first NVML call may take seconds.
FIRST_LOOK_SECONDS = 5.0
# Longest wait for a fresh look at the GPUs before a promise; one takes a millisecond.
FRESH_SECONDS = 0.5


@dataclass(slots=True)
class _Sense(Generic[T]):
    """One thing that is read again and again. `fold` joins a new value with the one before.

    A reading `of_its_begin` is as old as the question: what was true when it came back need not be in it.
    """

    sensor: str
    read: Callable[[], Awaitable[T]]
    fold: Callable[[T | None, T, float], T]
    slow_seconds: float
    fast_seconds: float
    limit_seconds: float
    reading: Seen[T] | Missing
    last: T | None = None
    tried: bool = False
    of_its_begin: bool = False

    def now(self, at: float) -> Seen[T] | Missing:
        """The reading as it may be used at `at`: too old is Missing."""
        if isinstance(self.reading, Missing) or at - self.reading.at <= self.limit_seconds:
            return self.reading
        return Missing(f"last answered {at - self.reading.at:.0f} s ago", last_seen_at=self.reading.at)


class Observer:
    """What was last seen of everything. `changed` is set when a turn should look before its beat."""

    def __init__(
        self,
        clock: Clock,
        tell: Callable[[Event], object],
        *,
        gpus: GpuSensor | None,
        ollama: Ollama | None,
        comfyui: ComfyUI | None,
        interval_seconds: float,
    ) -> None:
        self._clock = clock
        self._tell = tell
        self._gpu_sensor = gpus
        self._comfyui = comfyui
        self._pace_seconds = interval_seconds
        self._faster = asyncio.Event()
        self.changed = asyncio.Event()
        self._began_at: float | None = None
        self._processes_at: float | None = None
        self._free_at_processes: dict[str, int] = {}
        self._last_queue: Queue | None = None
        self._followed = False
        self._looking: asyncio.Task[None] | None = None
        self._list_is_new = False
        self.served: Callable[[OllamaState], OllamaState] = lambda ollama: ollama
        """Adds to Ollama's models what goes through a gateway in front of them."""
        self.follow_processes = False
        """Somebody's memory is told by its process: the list is read again whenever memory has moved."""
        self.wake: Callable[[], object] = lambda: None
        """Has the next look touch GPUs that are let go of so that they can sleep: somebody is about to use one."""
        self._told: dict[str, str] = {}
        slow = interval_seconds
        self._gpus: _Sense[Gpus] | None = (
            None
            if gpus is None
            else self._sense(
                "nvml", self._read_gpus, _keep_processes, min(slow, GPU_SECONDS), GPU_FAST_SECONDS, GPU_LIMIT_SECONDS
            )
        )
        if self._gpus is not None:
            self._gpus.of_its_begin = True
        self._ollama: _Sense[OllamaState] | None = (
            None
            if ollama is None
            else self._sense(
                "ollama", ollama.models, self._traffic, min(slow, OLLAMA_SECONDS), OLLAMA_SECONDS, OLLAMA_LIMIT_SECONDS
            )
        )
        self._stats: _Sense[ComfyUIState] | None = (
            None
            if comfyui is None
            else self._sense("comfyui", comfyui.stats, _newest, slow, STATS_FAST_SECONDS, 3 * slow + 10)
        )
        self._queue: _Sense[Queue] | None = (
            None
            if comfyui is None
            else self._sense(
                "comfyui", self._read_queue, _newest, min(slow, QUEUE_SECONDS), QUEUE_FAST_SECONDS, QUEUE_LIMIT_SECONDS
            )
        )

    @staticmethod
    def _sense(
        sensor: str,
        read: Callable[[], Awaitable[T]],
        fold: Callable[[T | None, T, float], T],
        slow: float,
        fast: float,
        limit: float,
    ) -> _Sense[T]:
        return _Sense(sensor, read, fold, slow, min(slow, fast), limit, Missing("not read yet"))

    def look(self) -> Snapshot:
        """What is known now. Tells sensors that were lost or came back since the last look."""
        snapshot = self.known()
        self._announce()
        return snapshot

    def known(self) -> Snapshot:
        """What is known now."""
        at = self._clock.monotonic()
        return Snapshot(
            taken_at=at,
            gpus=self._gpus.now(at) if self._gpus else Off(),
            ollama=self._ollama_now(at) if self._ollama else Off(),
            comfyui=self._stats.now(at) if self._stats else Off(),
            queue=self._queue.now(at) if self._queue else Off(),
        )

    def _traffic(self, before: OllamaState | None, value: OllamaState, at: float) -> OllamaState:
        return _traffic(before, value, at, _only_free_bytes(self._gpus.reading) if self._gpus else None)

    def _ollama_now(self, at: float) -> Reading[OllamaState]:
        assert self._ollama is not None
        reading = self._ollama.now(at)
        return Seen(self.served(reading.value), reading.at) if isinstance(reading, Seen) else reading

    @property
    def ready(self) -> bool:
        """Every sensor has been tried once, or has had its time for that."""
        late = self._began_at is not None and self._clock.monotonic() - self._began_at >= FIRST_LOOK_SECONDS
        return late or all(sense.tried for sense in self._senses())

    def sensors(self) -> dict[str, Reading[object]]:
        """The state of each sensor by name; ComfyUI's two readings count as one, the missing one first."""
        at = self._clock.monotonic()
        states: dict[str, Reading[object]] = {"nvml": Off(), "ollama": Off(), "comfyui": Off()}
        for sense in self._senses():
            reading = sense.now(at)
            if isinstance(states[sense.sensor], Off) or isinstance(reading, Missing):
                states[sense.sensor] = reading
        return states

    async def look_again(
        self,
        max_age_seconds: float,
        *,
        after: float = float("-inf"),
        with_processes: bool = False,
        about_to_use: bool = False,
    ) -> None:
        """The GPUs are read now, unless that was done less than so long ago and `after` that moment.

        Waits no longer than FRESH_SECONDS; what a driver that hangs does not tell stays as old as it is.
        """
        sense = self._gpus
        if sense is None:
            return
        if about_to_use and isinstance(sense.reading, Seen) and _unread(sense.reading.value):
            self.wake()
            after = self._clock.monotonic()
        # Twice: a look under way that is joined may have been begun without the processes.
        for _ in range(2):
            known = sense.reading.at if isinstance(sense.reading, Seen) else float("-inf")
            fresh = self._clock.monotonic() - known <= max_age_seconds and known > after
            if fresh and (self._list_is_new or not with_processes):
                return
            if self._looking is None or self._looking.done():
                read = partial(self._read_gpus, wanted=with_processes)
                self._looking = asyncio.create_task(self._read(sense, read), name="look again")
            await asyncio.wait({self._looking}, timeout=FRESH_SECONDS)
            if not self._looking.done():
                return
            self._looking.result()
            if self._list_is_new or not with_processes:
                return

    def pace(self, seconds: float) -> None:
        """How fast the cycle beats now: sensors that can follow, do."""
        if seconds < self._pace_seconds:
            self._faster.set()
        self._pace_seconds = seconds

    async def run(self) -> None:
        """Reads everything until cancelled. An error that is no SensorError is a bug and ends the process."""
        self._began_at = self._clock.monotonic()
        async with asyncio.TaskGroup() as tasks:
            for sense in self._senses():
                tasks.create_task(self._read_forever(sense), name=f"read {sense.sensor}")
            if self._comfyui is not None:
                tasks.create_task(self._follow_queue(self._comfyui), name="follow comfyui queue")

    def _senses(self) -> list[_Sense[object]]:
        senses = (self._gpus, self._ollama, self._stats, self._queue)
        return [sense for sense in senses if sense is not None]  # type: ignore[misc]

    async def _read_forever(self, sense: _Sense[T]) -> None:
        while True:
            await self._read(sense)
            read_at = self._clock.monotonic()
            while (pause := read_at + self._beat_seconds(sense) - self._clock.monotonic()) > 0:
                # A pace that quickens shortens the pause, so that a proof is not awaited at the slow beat.
                self._faster.clear()
                try:
                    async with asyncio.timeout(pause):
                        await self._faster.wait()
                except TimeoutError:
                    break

    def _beat_seconds(self, sense: _Sense[T]) -> float:
        if self._followed and sense.read == self._read_queue:
            return QUEUE_FOLLOWED_SECONDS
        return min(sense.slow_seconds, max(sense.fast_seconds, self._pace_seconds))

    async def _read(self, sense: _Sense[T], read: Callable[[], Awaitable[T]] | None = None) -> None:
        began = self._clock.monotonic()
        first, was_missing = not sense.tried, isinstance(sense.now(self._clock.monotonic()), Missing)
        before = sense.last
        try:
            value = await (read or sense.read)()
        except TimedOut as error:
            # Slow is not down: the last reading stays and ages until its limit.
            if isinstance(sense.reading, Missing):
                sense.reading = Missing(error.why, error.remedy, sense.reading.last_seen_at)
        except SensorError as error:
            last = sense.reading.at if isinstance(sense.reading, Seen) else sense.reading.last_seen_at
            sense.reading = Missing(error.why, error.remedy, last)
        else:
            at = began if sense.of_its_begin else self._clock.monotonic()
            sense.last = sense.fold(sense.last, value, at)
            sense.reading = Seen(sense.last, at)
        sense.tried = True
        if first or was_missing != isinstance(sense.reading, Missing) or _matters(before, sense.reading):
            self.changed.set()

    async def _read_gpus(self, *, wanted: bool = False) -> Gpus:
        assert self._gpu_sensor is not None
        due = wanted or self._processes_due()
        gpus = await self._gpu_sensor.read(with_processes=due)
        self._list_is_new = due
        if due:
            self._processes_at = self._clock.monotonic()
            self._free_at_processes = _free_bytes(gpus)
        return gpus

    def _processes_due(self) -> bool:
        """The list is old, or wrong where it matters, or was lost with the reading it came with."""
        known = self._gpus.reading if self._gpus is not None else None
        if self._processes_at is None or not isinstance(known, Seen):
            return True
        fast = self._pace_seconds <= 1.0 or self.follow_processes
        then, now = self._free_at_processes, _free_bytes(known.value)
        if fast and any(abs(free - then.get(uuid, 0)) >= PROCESSES_MOVED_BYTES for uuid, free in now.items()):
            return True
        age = self._clock.monotonic() - self._processes_at
        return age >= (PROCESSES_FAST_SECONDS if fast else PROCESSES_SECONDS)

    async def _read_queue(self) -> Queue:
        assert self._comfyui is not None
        before = self._last_queue
        remaining = await self._comfyui.queue_remaining()
        # What was pushed meanwhile is newer than the answer to a poll that may have been made before it.
        pushed = self._last_queue if self._last_queue is not before else None
        return pushed or self._queue_after(remaining)

    def _queue_after(self, remaining: int) -> Queue:
        at = self._clock.monotonic()
        known = self._last_queue
        self._last_queue = known.observed(remaining, at) if known else Queue.first(remaining, at)
        return self._last_queue

    async def _follow_queue(self, comfyui: ComfyUI) -> None:
        """Takes queue changes from the websocket as they come; a lost socket is only a slower look."""
        while True:
            try:
                async for remaining in comfyui.statuses():
                    self._followed = True
                    before = self._last_queue
                    queue = self._queue_after(remaining)
                    assert self._queue is not None
                    self._queue.reading = Seen(queue, self._clock.monotonic())
                    if before is None or before.idle != queue.idle:
                        self.changed.set()
            except SensorError:
                pass
            self._followed = False
            await asyncio.sleep(RECONNECT_SECONDS)

    def _announce(self) -> None:
        untried = {sense.sensor for sense in self._senses() if not sense.tried}
        for sensor, reading in self.sensors().items():
            if sensor in untried:
                continue
            match reading:
                case Missing(why=why, remedy=remedy):
                    if self._told.get(sensor) != "lost":
                        self._told[sensor] = "lost"
                        words = f"{why}; {remedy}" if remedy else why
                        self._tell(Event(type=EventType.SENSOR_LOST, target=sensor, reason=words))
                case Seen(value=value) if self._told.get(sensor) != "ok":
                    self._told[sensor] = "ok"
                    self._tell(Event(type=EventType.SENSOR_BACK, target=sensor, reason=_described(value)))


def _described(value: object) -> str:
    match value:
        case Gpus(gpus=gpus):
            return ", ".join(f"GPU {gpu.index} {gpu.name}" for gpu in gpus)
        case OllamaState(version=version):
            return f"version {version}" if isinstance(version, str) else "version unknown"
        case ComfyUIState(version=version, devices=devices):
            where = devices[0].name if devices else "no GPU"
            return f"version {version if isinstance(version, str) else 'unknown'} on {where}"
    return "now"


def _free_bytes(gpus: Gpus) -> dict[str, int]:
    return {gpu.uuid: gpu.memory.free_bytes for gpu in gpus.gpus if isinstance(gpu.memory, GpuMemory)}


def _unread(gpus: Gpus) -> bool:
    return any(isinstance(gpu.memory, Missing) for gpu in gpus.gpus)


def _newest(before: T | None, value: T, at: float) -> T:
    return value


def _keep_processes(before: Gpus | None, value: Gpus, at: float) -> Gpus:
    """The list of processes is asked rarely: between, the last one stands."""
    if before is None:
        return value
    known = {gpu.uuid: gpu for gpu in before.gpus}
    kept = tuple(
        replace(
            gpu,
            processes=known[gpu.uuid].processes,
            listed_free_bytes=_listed_free_bytes(known[gpu.uuid]),
            temperature_celsius=known[gpu.uuid].temperature_celsius,
            power_watts=known[gpu.uuid].power_watts,
        )
        if gpu.uuid in known and gpu.processes == Missing("not asked")
        else gpu
        for gpu in value.gpus
    )
    return replace(value, gpus=kept)


def _listed_free_bytes(known: Gpu) -> int | None:
    """What was free when the processes of `known` were listed."""
    if known.listed_free_bytes is not None:
        return known.listed_free_bytes
    return known.memory.free_bytes if isinstance(known.memory, GpuMemory) else None


def _only_free_bytes(gpus: Seen[Gpus] | Missing) -> int | None:
    """What is free on the only GPU there is."""
    free = [] if isinstance(gpus, Missing) else list(_free_bytes(gpus.value).values())
    return free[0] if len(free) == 1 else None


def _traffic(before: OllamaState | None, value: OllamaState, at: float, free_bytes: int | None) -> OllamaState:
    """Models that come, go or get a new expiry are the traffic a bystander can see."""
    if before is None:
        models = tuple(replace(model, active_at=at) for model in value.models)
        return replace(value, models=models, active_at=at if value.models else None)
    value = replace(value, models=tuple(_followed(model, before, at, free_bytes) for model in value.models))
    seen = {(model.name, model.expires_at) for model in before.models}
    moved = seen != {(model.name, model.expires_at) for model in value.models}
    return replace(value, active_at=at if moved else before.active_at)


def _followed(model: LoadedModel, before: OllamaState, at: float, free_bytes: int | None) -> LoadedModel:
    """The model with when this load of it was first seen, and when its expiry last moved."""
    same = (one for one in before.models if (one.name, one.digest) == (model.name, model.digest))
    known = next((one for one in same if one.size_vram_bytes == model.size_vram_bytes), None)
    if known is None:
        return replace(model, since=at, active_at=at, free_after_bytes=free_bytes)
    active_at = at if known.expires_at != model.expires_at else known.active_at
    return replace(model, since=known.since, active_at=active_at, free_after_bytes=known.free_after_bytes)


def _matters(before: object, reading: object) -> bool:
    """Whether a new reading should wake the cycle: other models or placements, or a queue that starts or ends."""
    if not isinstance(reading, Seen) or before is None:
        return False
    match before, reading.value:
        case OllamaState(models=old), OllamaState(models=new):
            return {(m.name, m.size_vram_bytes) for m in old} != {(m.name, m.size_vram_bytes) for m in new}
        case Queue(remaining=old_remaining), Queue(remaining=new_remaining):
            return (old_remaining == 0) != (new_remaining == 0)
    return False
