"""Keeps the floors of ComfyUI, of Ollama and of the workers, and tells when one drifts. The rules: `policy.drift`.

Every method but `write_behind` and `flush` is immediate; called each turn, most turns have nothing to do.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from loguru import logger

from vram_manager.clock import Clock
from vram_manager.domain.event import EventType
from vram_manager.domain.floor import Floor, Growth, Kept, Mark, Work
from vram_manager.domain.reading import Missing, Seen
from vram_manager.domain.snapshot import Queue, Snapshot
from vram_manager.domain.worker import Worker
from vram_manager.floor_records import as_text, restored
from vram_manager.journal import Entry, Journal, rfc3339
from vram_manager.policy import Rules
from vram_manager.policy.drift import (
    IDLE,
    STEADY_SECONDS,
    Freed,
    Look,
    after_free,
    agree,
    beyond_size,
    leak_event,
    marked,
    sees_runners,
    shown,
    stayed,
    told,
    unaccounted,
    when_idle,
    without_models,
)
from vram_manager.store import write_behind

Key = tuple[str, str]
_Judge = Callable[[Floor | None, str, Kept, Mark, Rules], tuple[Floor, Growth | None]]

COMFYUI, OLLAMA, OTHERS = "comfyui", "ollama", "others"
# The least recently marked go first; one with all its marks takes some 60 kB.
MAX_FLOORS = 32
MAX_NAMES = 256
# How many names a mark remembers, and how many marks a view shows.
TOP_NAMES, SHOWN_MARKS = 5, 30
# What a crash loses is a minute of a trend over days.
SAVE_SECONDS = 60.0
AFTER_GENERATIONS = "after its generations"


class Keeps(Protocol):
    """Where floors outlive the daemon; both block."""

    def floors(self) -> dict[str, str]: ...

    def save_floors(self, bodies: Mapping[str, str | None]) -> None: ...


class _Ran:
    """What ran, since each floor was last marked."""

    def __init__(self, total: int = 0) -> None:
        self.total = total
        self._names: Counter[str] = Counter()
        self._at: dict[Key, tuple[int, Counter[str]]] = {}

    def add(self, runs: int, names: Iterable[str] = ()) -> None:
        self.total += runs
        self._names.update(names)
        if len(self._names) > MAX_NAMES:
            self._names = Counter(dict(self._names.most_common(MAX_NAMES // 2)))

    def since(self, key: Key) -> tuple[int, Counter[str]]:
        """How many runs since it was last asked for `key`, and what they worked with."""
        total, names = self._at.get(key, (0, Counter()))
        self._at[key] = (self.total, self._names.copy())
        return self.total - total, self._names - names


class Floors:
    """The floors by tenant and measure, the last marked last. `leaks` were told since the start.

    `workers` gives all workers that are known.
    """

    def __init__(
        self,
        clock: Clock,
        journal: Journal,
        rules: Rules,
        store: Keeps,
        *,
        workers: Callable[[], Iterable[Worker]] = tuple,
    ) -> None:
        self._clock = clock
        self._journal = journal
        self._rules = rules
        self._store = store
        self._workers = workers
        self._floors = {(floor.tenant, floor.measure): floor for floor in restored(store.floors().values())}
        self._unsaved: dict[Key, Floor | None] = {}
        self._saving = threading.Lock()
        self._to_save = asyncio.Event()
        self._saved_at = clock.monotonic()
        self.leaks = 0
        self._looks: dict[Key, Look] = {}
        # ComfyUI's.
        self._runs = _Ran()
        self._queue: Queue | None = None
        self._freed: Freed | None = None
        self._frees = 0
        self._free_to_mark = False
        self._worked: tuple[int, frozenset[Work]] = (0, frozenset())
        self._streak = 0
        self._idle_at: int | None = None
        # Ollama's.
        self._loads = _Ran()
        self._listed: frozenset[tuple[str, float | None]] | None = None
        self._listings = 0
        self._empty_since: float | None = None
        self._empty_at: int | None = None
        self._runners_seen = False
        self._used: tuple[str, float | None] | None = None
        # Others' and workers'.
        self._others_at = (0, 0)
        self._generations: dict[str, int] = {}

    def worked(self, run: int, works: frozenset[Work]) -> None:
        """ComfyUI's run of that number is over; `works` is what is known of what it worked with."""
        if self._worked != (run - 1, works):
            self._streak += 1
        self._worked = (run, works)
        self._runs.add(0, {work.name for work in works if work.name})

    def freed(self, entry: Entry) -> None:
        """Takes an entry of the journal: after a proven free of ComfyUI its floor is to be read."""
        event = entry.event
        if event.type is EventType.FREED and event.stage is not None and self._queue is not None:
            self._freed = Freed(at=self._clock.monotonic(), stage=event.stage, runs=self._queue.runs)
            self._free_to_mark = True
            self._frees += 1

    def turned(self, snapshot: Snapshot) -> None:
        """One turn of the cycle: marks what can be told now and was not told yet."""
        self._see_ollama(snapshot)
        self._see_comfyui(snapshot)
        self._mark_comfyui(snapshot)
        self._mark_ollama(snapshot)
        self._mark_others(snapshot)
        self._mark_workers()
        if self._unsaved and snapshot.taken_at - self._saved_at >= SAVE_SECONDS:
            self._saved_at = snapshot.taken_at
            self._to_save.set()

    def now(self) -> tuple[Floor, ...]:
        """Every floor, the last marked first."""
        return tuple(reversed(self._floors.values()))

    def views(self) -> list[dict[str, Any]]:
        """Every floor as JSON, the last marked first, with its newest marks."""
        return [_view(floor) for floor in self.now()]

    async def write_behind(self) -> None:
        """Writes floors to the store, in a worker thread, until cancelled."""
        await write_behind(
            self._to_save,
            self.flush,
            lambda problem: logger.warning("Floors cannot be written ({}): kept in memory until they can", problem),
            lambda: logger.info("Floors are written again"),
        )

    def flush(self) -> str | None:
        """Writes what is not yet written; what went wrong, or None. Blocks."""
        with self._saving:
            batch = dict(self._unsaved)
            bodies = {"\n".join(key): None if floor is None else as_text(floor) for key, floor in batch.items()}
            try:
                self._store.save_floors(bodies)
            except sqlite3.Error as error:
                return str(error)
            for key, floor in batch.items():
                if self._unsaved.get(key) is floor:
                    self._unsaved.pop(key, None)
            return None

    def _see_comfyui(self, snapshot: Snapshot) -> None:
        if isinstance(snapshot.comfyui, Missing) and isinstance(snapshot.queue, Missing) and self._queue is not None:
            # Away, and not only slow: what comes back may be another process.
            self._queue, self._freed = None, None
            for key in [key for key in self._floors if key[0] in (COMFYUI, OTHERS)]:
                self._forget(key)
        if isinstance(snapshot.queue, Seen):
            before, self._queue = self._queue, snapshot.queue.value
            if before is not None:
                self._runs.add(self._queue.runs - before.runs)

    def _see_ollama(self, snapshot: Snapshot) -> None:
        if not isinstance(snapshot.ollama, Seen):
            self._empty_since = None
            return
        models = snapshot.ollama.value.models
        listed = frozenset((model.name, model.since) for model in models)
        if listed != self._listed:
            new = listed - (self._listed or frozenset())
            self._loads.add(len(new), (name for name, _ in new))
            self._listed = listed
            self._listings += 1
        if models:
            self._empty_since = None
        elif self._empty_since is None:
            self._empty_since = snapshot.ollama.at
        self._runners_seen = self._runners_seen or sees_runners(snapshot)

    def _mark_comfyui(self, snapshot: Snapshot) -> None:
        if self._freed is not None and self._free_to_mark:
            kept = self._agreed(COMFYUI, after_free(self._freed, snapshot, self._rules), snapshot, self._frees)
            if kept is not None:
                self._free_to_mark = False
                self._mark(COMFYUI, kept, self._runs)
        run, works = self._worked
        if self._queue is None or self._queue.runs != run or run == self._idle_at or len(works) != 1:
            return
        beside = f"{self._streak} {self._frees} {self._listings} {sorted(snapshot.workers_bytes.values())}"
        kept = self._agreed(COMFYUI, when_idle(snapshot, beside), snapshot, run)
        if kept is not None:
            self._idle_at = run
            self._mark(COMFYUI, kept, self._runs)

    def _mark_ollama(self, snapshot: Snapshot) -> None:
        loads = self._loads.total
        if self._empty_since is not None and self._runners_seen and self._empty_at != loads:
            kept = self._agreed(OLLAMA, without_models(snapshot, self._empty_since), snapshot, loads)
            if kept is not None:
                self._empty_at = loads
                self._mark(OLLAMA, kept, self._loads, judge=stayed)
        found = beyond_size(snapshot)
        if found is None or self._used == (used := (found[0].name, found[0].active_at)):
            return
        tenant = f"{OLLAMA}:{found[0].name}"
        kept = self._agreed(tenant, found[1], snapshot, used)
        if kept is not None:
            self._used = used
            self._mark(tenant, kept, _Ran(1))

    def _mark_others(self, snapshot: Snapshot) -> None:
        ran = (self._runs.total, self._loads.total)
        if ran == self._others_at:
            return
        found = unaccounted(self._freed, self._empty_since, snapshot)
        kept = self._agreed(OTHERS, found, snapshot, (self._frees, ran))
        if kept is not None:
            self._others_at = ran
            self._mark(OTHERS, kept, self._runs, self._loads)

    def _agreed(self, tenant: str, kept: Kept | None, snapshot: Snapshot, rest: object) -> Kept | None:
        """The lesser of two looks that agree, None until there are two."""
        if kept is None:
            return None
        key, look = (tenant, kept.measure), Look(at=snapshot.taken_at, kept=kept, rest=rest)
        first = self._looks.get(key)
        if first is None or not agree(first, look):
            self._looks[key] = look
            return None
        if look.at - first.at < STEADY_SECONDS:
            return None
        # Others that were begun are of rests that are over.
        self._looks = {known: one for known, one in self._looks.items() if known != key and known in self._floors}
        return min(first.kept, kept, key=lambda one: one.bytes)

    def _mark_workers(self) -> None:
        """What `policy.leaks` goes by, to be shown beside the others."""
        before, self._generations = self._generations, {}
        for worker in self._workers():
            count, trend = worker.generations.count, worker.generations.trend
            self._generations[worker.owner] = count
            runs = count - before.get(worker.owner, 0)
            if not runs or not trend.newest_bytes:
                continue
            kept = Kept(bytes=trend.newest_bytes[-1], measure=AFTER_GENERATIONS, life=str(trend.measure))
            mark = Mark(at=self._clock.utcnow(), bytes=kept.bytes, runs=runs)
            key = (f"worker:{worker.owner}", AFTER_GENERATIONS)
            leaks = int(trend.leak is not None)
            self._put(key, shown(self._floors.get(key), key[0], kept, mark, leaks=leaks))

    def _mark(self, tenant: str, kept: Kept, *sources: _Ran, judge: _Judge = marked) -> None:
        key = (tenant, kept.measure)
        runs, names = 0, Counter[str]()
        for source in sources:
            more, others = source.since(key)
            runs, names = runs + more, names + others
        mark = Mark(at=self._clock.utcnow(), bytes=kept.bytes, runs=runs, ran=tuple(names.most_common(TOP_NAMES)))
        floor, growth = judge(self._floors.get(key), tenant, kept, mark, self._rules)
        self._put(key, floor)
        if growth is None:
            return
        self.leaks += 1
        self._journal.record(leak_event(tenant, kept.measure, growth))
        for other, known in list(self._floors.items()):
            # By whatever it was measured, it is the same growth.
            if other[0] == tenant and other != key:
                self._put(other, told(known, growth))

    def _put(self, key: Key, floor: Floor) -> None:
        self._floors.pop(key, None)
        self._floors[key] = floor
        # A run of the same files ends with this process, and workers tell of their generations anew.
        if key[1] not in (IDLE, AFTER_GENERATIONS):
            self._unsaved[key] = floor
        if len(self._floors) > MAX_FLOORS:
            self._forget(next(iter(self._floors)))

    def _forget(self, key: Key) -> None:
        del self._floors[key]
        self._unsaved[key] = None


def _view(floor: Floor) -> dict[str, Any]:
    return {
        "tenant": floor.tenant,
        "measure": floor.measure,
        "baseline_bytes": floor.baseline_bytes,
        "floor_bytes": floor.floor_bytes,
        "growth_bytes": floor.growth_bytes,
        "generations": floor.generations,
        "leak": floor.leaks > 0,
        "points": [
            {"at": rfc3339(mark.at), "bytes": mark.bytes, "runs": mark.runs, "ran": [name for name, _ in mark.ran]}
            for mark in floor.marks[-SHOWN_MARKS:]
        ],
    }
