"""Who had how much of each GPU over time: moments as they come, in SQLite a few seconds later, and windows of both.

A moment is kept when something moved, and at least once a minute; what went up and down between two is in the extremes
of the second. A daemon that was away leaves a gap.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from heapq import merge
from itertools import chain

from loguru import logger

from vram_manager import sample_rows
from vram_manager.clock import Clock
from vram_manager.domain.reading import Missing, Seen
from vram_manager.domain.sample import Device, GpuUse, Level, Sample, Series, Window
from vram_manager.domain.share import Share
from vram_manager.domain.snapshot import Gpu, GpuMemory, Gpus, Snapshot
from vram_manager.policy.accounting import SECOND_HAND_UUID
from vram_manager.policy.series import (
    MOMENT_SECONDS,
    Piece,
    folded,
    in_columns,
    moved,
    pieces,
    plan,
    queue_in_columns,
    with_peaks,
)
from vram_manager.retention import expire
from vram_manager.store import Row, Store, write_behind

# While it moves, at most so often (or once a beat, where that is faster), and the peaks between are in the next; while
# it does not, at least: with the slowest beat by default, once a minute.
FAST_SECONDS, QUIET_SECONDS = MOMENT_SECONDS, 55.0
# A moment is true until the next, but no longer than this (or than one and a half beats, where those are slow).
HOLD_SECONDS, HOLD_BEATS = 90.0, 1.5
# What is written at once: a crash loses no more.
BATCH_MOMENTS, BATCH_SECONDS = 32, 10.0
# What waits for a full disk to have room again; beyond that the oldest are lost, and that is said.
MAX_UNWRITTEN = 1000
EXPIRE_SECONDS = 600.0
MAX_EVENTS = 500
# A wall clock that is put back by less only keeps moments in order; by more, they are dated as it says.
_SLEW_SECONDS = 5.0


class History:
    """Remembers how the GPUs were used. Only `read`, `events`, `flush` and `close` wait for the disk."""

    def __init__(self, clock: Clock, store: Store, *, interval_seconds: float = 5.0) -> None:
        self._clock = clock
        self._store = store
        self._fast_seconds = min(FAST_SECONDS, interval_seconds)
        self._hold_seconds = max(HOLD_SECONDS, HOLD_BEATS * interval_seconds)
        self._unwritten: deque[Sample] = deque(maxlen=MAX_UNWRITTEN)
        self._unwritten_lost = 0
        self._due = asyncio.Event()
        # A write under way does not end with the task that waits for it; the last one must not run beside it.
        self._writing = threading.Lock()
        # What is written moves from one of these to the other at once.
        self._moving = threading.Lock()
        self._last_written: Sample | None = None
        self._expired_at = float("-inf")
        # Since the last moment that was kept, in the loop's time.
        self._last: Sample | None = None
        self._last_at = self._oldest_unwritten_at = float("-inf")
        self._extremes: Sample | None = None
        with store.reading() as connection:
            self._devices = sample_rows.devices(connection)
            self._last_written = sample_rows.newest(connection)
        self._devices_written = dict(self._devices)
        self._numbers = {device.uuid: number for number, device in self._devices.items()}
        if self._last_written is not None and self._last_written.gpus:
            # The daemon before us was killed, nobody knows when: what it saw last was true for that moment.
            self._unwritten.append(Sample(self._last_written.at + 1.0, None, {}))

    def turned(self, snapshot: Snapshot, gpus: Gpus | Missing, shares: Mapping[str, tuple[Share, ...]]) -> None:
        """A turn of the cycle saw this. `shares` is who has how much of each GPU, by its UUID."""
        now = self._clock.monotonic()
        queue = snapshot.queue.value.remaining if isinstance(snapshot.queue, Seen) else None
        # What only ComfyUI tells has no UUID: where the card is known by its own, it would be taken for another one.
        known = any(not uuid.startswith(SECOND_HAND_UUID) for uuid in self._numbers)
        seen = () if isinstance(gpus, Missing) or (gpus.second_hand and known) else gpus.gpus
        uses = {self._number(gpu): _use(gpu, snapshot, shares.get(gpu.uuid, ())) for gpu in seen}
        at = self._clock.utcnow().timestamp()
        sample = Sample(at, queue, {number: use for number, use in uses.items() if use is not None})
        sample = self._extremes = sample if self._extremes is None else with_peaks(self._extremes, sample)
        waited = now - self._last_at
        if (
            self._last is None
            or waited >= QUIET_SECONDS
            or (waited >= self._fast_seconds and moved(self._last, sample))
        ):
            self._keep(sample, now)
        if self._unwritten and now - self._oldest_unwritten_at >= BATCH_SECONDS:
            self._due.set()

    def _keep(self, sample: Sample, now: float) -> None:
        if self._last is not None and 0 <= self._last.at - sample.at < _SLEW_SECONDS:
            sample = sample._replace(at=self._last.at + 0.001)
        self._last, self._last_at, self._extremes = sample, now, None
        if not self._unwritten:
            self._oldest_unwritten_at = now
        self._unwritten_lost += len(self._unwritten) == MAX_UNWRITTEN
        self._unwritten.append(sample)
        if len(self._unwritten) >= BATCH_MOMENTS:
            self._due.set()

    def _number(self, gpu: Gpu) -> int:
        """The GPU's number in the history, whose identity is that of now."""
        number = self._numbers.get(gpu.uuid)
        if number is None:
            number = self._numbers[gpu.uuid] = max(self._devices, default=0) + 1
        known = self._devices.get(number)
        memory = gpu.memory
        if isinstance(memory, GpuMemory):
            reserved = None if isinstance(memory.reserved_bytes, Missing) else memory.reserved_bytes
            total = memory.total_bytes
        else:
            total, reserved = (0, None) if known is None else (known.total_bytes, known.reserved_bytes)
        if known is None or (known.index, known.total_bytes, known.reserved_bytes, known.name) != (
            gpu.index,
            total,
            reserved,
            gpu.name,
        ):
            self._devices[number] = Device(
                uuid=gpu.uuid, index=gpu.index, name=gpu.name, total_bytes=total, reserved_bytes=reserved
            )
        return number

    async def write_behind(self) -> None:
        """Writes what is seen to the store, in a worker thread, until cancelled."""

        def again() -> None:
            lost, self._unwritten_lost = self._unwritten_lost, 0
            logger.info("Samples are written again" + (f", without {lost} of the oldest" if lost else ""))

        await write_behind(
            self._due,
            self.flush,
            lambda problem: logger.warning("Samples cannot be written ({}): kept in memory until they can", problem),
            again,
        )

    def flush(self) -> str | None:
        """Writes what is not yet written; what went wrong, or None. Blocks."""
        with self._writing:
            batch = list(self._unwritten)
            if not batch:
                return None
            known = dict(self._devices)
            changed = {number: one for number, one in known.items() if self._devices_written.get(number) != one}
            until = batch[-1].at
            try:
                with self._store.writing() as connection:
                    sample_rows.write_devices(connection, changed)
                    sample_rows.write(connection, batch, self._last_written, self._hold_seconds)
                    if abs(until - self._expired_at) >= EXPIRE_SECONDS:
                        expire(connection, sample_rows.key(until))
            except sqlite3.Error as error:
                return str(error)
            if abs(until - self._expired_at) >= EXPIRE_SECONDS:
                self._expired_at = until
            self._devices_written = known
            with self._moving:
                self._last_written = batch[-1]
                for sample in batch:
                    if self._unwritten and self._unwritten[0] is sample:
                        self._unwritten.popleft()
            return None

    def close(self) -> None:
        """Writes the rest, and that nothing is known from now on. Blocks."""
        if self._last is not None:
            at = max(self._clock.utcnow().timestamp(), self._last.at + 0.001)
            self._unwritten.append(Sample(at, None, {}))
        problem = self.flush()
        if problem:
            logger.warning("{} samples could not be written: {}", len(self._unwritten), problem)

    def gpu(self, name: str) -> Device | None:
        """The GPU with that UUID, or that is or last was number `name` on this machine."""
        if name in self._numbers:
            return self._devices[self._numbers[name]]
        now = () if self._last is None else self._last.gpus
        newest_last = sorted(self._devices.items(), key=lambda item: (item[0] in now, item[0]))
        return next((device for _, device in reversed(newest_last) if str(device.index) == name), None)

    def uuids(self) -> list[str]:
        """Of every GPU that the history knows."""
        return [device.uuid for device in dict(self._devices).values()]

    def read(self, window: Window, now: float) -> Series:
        """What is known of a window, what is not yet written among it; `now` as in a window. Blocks.

        Raises sqlite3.Error where the history cannot be read.
        """
        with self._moving:
            last_written, unwritten = self._last_written, list(self._unwritten)
        with self._store.reading() as connection:
            newest = _not_in(connection, unwritten, last_written)
            asked = None if window.gpu is None else self._numbers[window.gpu]
            count = 1 if asked is not None or self._last is None else len(self._last.gpus)
            oldest = sample_rows.oldest(connection)
            level, step = plan(window.begin, window.end, window.step_seconds, oldest, count)
            begin = window.begin // step * step
            parts = self._parts(connection, level, begin, window.end, newest, now, step, asked)
            samples = folded((part for part in parts if begin <= part[0] < window.end), step)
        numbers = {number for one in samples for number in one.gpus} if asked is None else {asked}
        known = sorted(((number, self._devices[number]) for number in numbers), key=lambda one: one[1].index)
        queue_at, queue_remaining = queue_in_columns(samples, step)
        return Series(
            window=window,
            step_seconds=step,
            level=level,
            gpus=tuple(in_columns(samples, number, device, step) for number, device in known),
            queue_at=queue_at,
            queue_remaining=queue_remaining,
        )

    def _parts(
        self,
        connection: sqlite3.Connection,
        level: Level,
        begin: float,
        end: float,
        newest: list[Sample],
        now: float,
        step: int,
        only: int | None,
    ) -> Iterator[Piece]:
        """What was written, and behind it what was not: that is not in any minute yet."""
        hold = self._hold_seconds
        if level is Level.RAW:
            stored = sample_rows.read(connection, level, begin - hold, end + hold, only)
            newest = sorted(newest, key=_at)
            return pieces(merge(stored, newest, key=_at), now, step, hold)
        stored = sample_rows.read(connection, level, begin, end, only)
        return chain(((one.at, one, None) for one in stored), pieces(newest, now, step, hold))

    def events(self, begin: str, end: str) -> list[Row]:
        """The newest events from `begin` until before `end` (RFC 3339), oldest first. Blocks; raises sqlite3.Error."""
        return self._store.between(begin, end, MAX_EVENTS)


def _at(sample: Sample) -> float:
    return sample.at


def _not_in(connection: sqlite3.Connection, unwritten: list[Sample], last_written: Sample | None) -> list[Sample]:
    """The last moment that is in the history, and those behind it: a write may have ended since they were listed."""
    written = sample_rows.are_written(connection, unwritten)
    number = sum(sample_rows.key(one.at) in written for one in unwritten)
    last = unwritten[number - 1] if number else last_written
    return [*([] if last is None else [last]), *unwritten[number:]]


def _use(gpu: Gpu, snapshot: Snapshot, shares: tuple[Share, ...]) -> GpuUse | None:
    """None: nothing is known of it."""
    memory = gpu.memory
    gauges = (
        None if isinstance(gpu.utilization_percent, Missing) else gpu.utilization_percent,
        None if isinstance(gpu.temperature_celsius, Missing) else gpu.temperature_celsius,
        None if isinstance(gpu.power_watts, Missing) else gpu.power_watts,
    )
    if isinstance(memory, Missing):
        nothing = gauges == (None, None, None)
        return None if nothing else GpuUse(0.0, None, None, None, None, 0, *gauges, {}, {})
    taken, free = max(0, memory.taken_bytes), memory.free_bytes
    tenants: dict[str, int] = {}
    for share in shares:
        name = f"{share.kind} {share.tenant}"
        tenants[name] = tenants.get(name, 0) + share.bytes
    return GpuUse(0.0, taken, taken, free, free, snapshot.leased_on(gpu.uuid), *gauges, tenants, {})
