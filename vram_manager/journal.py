"""The only place that records: a ring for the API, SQLite for the next start, a log line for people.

An event is recorded once and told once. Decisions live in a ring of their own; equal neighbours are folded.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime

from loguru import logger

from vram_manager.clock import Clock
from vram_manager.domain.action import Stage
from vram_manager.domain.decision import Decision
from vram_manager.domain.event import Event, EventType
from vram_manager.domain.size import gib
from vram_manager.domain.watch import Watch
from vram_manager.store import Row, Store, write_behind

RING_EVENTS = 1000
RING_DECISIONS = 500
# What waits for a full disk to have room again; beyond that the oldest are lost, and that is said.
MAX_UNWRITTEN = 10_000

_PREFIX = {
    EventType.FREE_ASKED: "free",
    EventType.FREED: "free",
    EventType.FREE_UNCONFIRMED: "free",
    EventType.FREE_REFUSED: "free",
    EventType.DRY_RUN: "free",
    EventType.MODEL_DETECTED: "model",
    EventType.CPU_FALLBACK: "model",
    EventType.REPAIRED: "repair",
    EventType.REPAIR_FAILED: "repair",
    EventType.WARMED_BACK: "repair",
    EventType.PRESSURE_BEGAN: "pressure",
    EventType.PRESSURE_ENDED: "pressure",
    EventType.ADMITTED: "lease",
    EventType.REFUSED: "lease",
    EventType.LEASE_ENDED: "lease",
    EventType.LEASE_EXPIRED: "lease",
    EventType.SOFT_LIMIT: "limit",
    EventType.HARD_LIMIT: "limit",
    EventType.LEAK: "leak",
}


_OF_WORKERS = frozenset(
    (
        EventType.ADMITTED,
        EventType.REFUSED,
        EventType.LEASE_ENDED,
        EventType.LEASE_EXPIRED,
        EventType.SOFT_LIMIT,
        EventType.HARD_LIMIT,
        EventType.LEAK,
    )
)


@dataclass(frozen=True, slots=True)
class Entry:
    """A recorded event: `id` is what people quote, `seq` counts up over restarts."""

    id: str
    seq: int
    at: datetime
    event: Event
    decision_id: str | None = None


@dataclass(frozen=True, slots=True)
class DecisionEntry:
    """A recorded decision; `count` equal ones in a row between `at` and `until`, with the newest numbers."""

    id: str
    at: datetime
    until: datetime
    count: int
    decision: Decision


_FORGOTTEN = Watch()


class Journal:
    """Records events and decisions. All methods but `write_behind` are immediate and never block."""

    def __init__(self, clock: Clock, store: Store) -> None:
        self._clock = clock
        self._store = store
        self._entries: deque[Entry] = deque(maxlen=RING_EVENTS)
        self._decisions: deque[DecisionEntry] = deque(maxlen=RING_DECISIONS)
        self._decided = 0
        self._unwritten: deque[Row] = deque(maxlen=MAX_UNWRITTEN)
        self._unwritten_lost = 0
        # A write under way does not end with the task that waits for it; the last one must not run beside it.
        self._writing = threading.Lock()
        self._something_to_write = asyncio.Event()
        self._listeners: list[Callable[[Entry], None]] = []
        self._followers: list[Callable[[Entry | None], None]] = []
        rows = store.newest(RING_EVENTS)
        self._entries.extend(entry for row in rows if (entry := _restored(row)))
        self._seq = rows[-1].seq if rows else 0

    def record(self, event: Event, decision_id: str | None = None) -> Entry:
        """Remembers `event`, tells it in the log and to whoever listens. It comes from the newest decision, or that."""
        self._seq += 1
        entry = Entry(
            id=f"{_PREFIX.get(event.type, 'event')}-{self._seq:04d}",
            seq=self._seq,
            at=self._clock.utcnow(),
            event=event,
            decision_id=decision_id or self._behind(event),
        )
        self._entries.append(entry)
        level, words = line(entry)
        logger.bind(event=as_json(entry)).log(level, words)
        body = json.dumps(as_json(entry), separators=(",", ":"))
        self._unwritten_lost += len(self._unwritten) == MAX_UNWRITTEN
        self._unwritten.append(Row(seq=entry.seq, at=rfc3339(entry.at), type=event.type, body=body))
        self._something_to_write.set()
        for listener in self._listeners:
            listener(entry)
        return entry

    def _behind(self, event: Event) -> str | None:
        """The decision that an event comes from: the newest. What workers ask and do comes from none."""
        of_workers = event.type in _OF_WORKERS or (event.target or "").startswith("worker:")
        return None if of_workers or not self._decisions else self._decisions[-1].id

    def decided(self, decision: Decision) -> DecisionEntry:
        """Remembers `decision`, folded into the newest one if that concluded the same."""
        now = self._clock.utcnow()
        last = self._decisions[-1] if self._decisions else None
        # What it remembers for the next turn is not what people ask about, and there may be hundreds of these.
        lone = replace(decision, events=(), watch=_FORGOTTEN)
        if last is not None and last.decision.branch == decision.branch and decision.action is None:
            entry = replace(last, until=now, count=last.count + 1, decision=lone)
            self._decisions[-1] = entry
            return entry
        self._decided += 1
        entry = DecisionEntry(id=f"decision-{self._decided:04d}", at=now, until=now, count=1, decision=lone)
        self._decisions.append(entry)
        logger.debug("{}: {}", decision.branch, decision.reason)
        return entry

    def events(self, after: int = 0, limit: int = RING_EVENTS) -> list[Entry]:
        """Entries with a larger `seq` than `after`, oldest first; an `after` of an earlier life is older than all."""
        after = 0 if after > self._seq else after
        newer = [entry for entry in self._entries if entry.seq > after]
        return newer[:limit] if after else newer[-limit:]

    def decisions(self, limit: int) -> list[DecisionEntry]:
        """Newest first."""
        return list(reversed(self._decisions))[:limit]

    def listen(self, listener: Callable[[Entry], None]) -> None:
        """`listener` is called with each entry recorded from now on."""
        self._listeners.append(listener)

    @asynccontextmanager
    async def following(self) -> AsyncIterator[asyncio.Queue[Entry | None]]:
        """A queue of everything recorded from now on, None when nothing more will come.

        A reader too slow for 1000 entries loses the oldest.
        """
        queue: asyncio.Queue[Entry | None] = asyncio.Queue(maxsize=RING_EVENTS)

        def push(entry: Entry | None) -> None:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(entry)

        self._listeners.append(push)
        self._followers.append(push)
        try:
            yield queue
        finally:
            self._listeners.remove(push)
            self._followers.remove(push)

    def hang_up(self) -> None:
        """Everybody who follows is told that nothing more will come."""
        for push in self._followers:
            push(None)

    async def write_behind(self) -> None:
        """Writes what is recorded to the store, in a worker thread, until cancelled."""

        def again() -> None:
            lost, self._unwritten_lost = self._unwritten_lost, 0
            logger.info("History is written again" + (f", without {lost} of the oldest events" if lost else ""))

        await write_behind(
            self._something_to_write,
            self.flush,
            lambda problem: logger.warning("History cannot be written ({}): kept in memory until it can", problem),
            again,
        )

    def flush(self) -> str | None:
        """Writes what is not yet written; what went wrong, or None. Blocks."""
        with self._writing:
            batch = list(self._unwritten)
            try:
                self._store.append(batch)
            except sqlite3.Error as error:
                return str(error)
            for row in batch:
                if self._unwritten and self._unwritten[0] is row:
                    self._unwritten.popleft()
            return None

    def close(self) -> None:
        """Writes the rest and closes the store. Blocks."""
        problem = self.flush()
        if problem:
            logger.warning("{} events could not be written: {}", len(self._unwritten), problem)
        self._store.close()


def rfc3339(at: datetime) -> str:
    return at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def as_json(entry: Entry) -> dict[str, object]:
    """The entry as the API, the log and the store give it."""
    fields = asdict(entry.event)
    fields.pop("final")
    return {"id": entry.id, "at": rfc3339(entry.at), **fields, "decision_id": entry.decision_id}


def _restored(row: Row) -> Entry | None:
    """An entry of an earlier run; None when another version wrote something this one cannot read."""
    try:
        body = json.loads(row.body)
        known = {name: body[name] for name in Event.__dataclass_fields__ if name in body}
        event = Event(
            **{
                **known,
                "type": EventType(body["type"]),
                "stage": Stage(body["stage"]) if body.get("stage") else None,
                "models": tuple(body.get("models") or ()),
            }
        )
        return Entry(id=body["id"], seq=row.seq, at=datetime.fromisoformat(row.at).astimezone(UTC), event=event)
    except (ValueError, TypeError, KeyError):
        return None


_SENSOR_NAMES = {"nvml": "GPU", "ollama": "Ollama", "comfyui": "ComfyUI"}


def _who(target: str | None) -> str:
    if target is None:
        return "-"
    if target.startswith("ollama:"):
        return f"Ollama model {target.removeprefix('ollama:')}"
    if target.startswith("worker:"):
        return target.removeprefix("worker:")
    if target.startswith("node:"):
        return f"Ollama at {target.removeprefix('node:')}"
    return _SENSOR_NAMES.get(target, target)


def _percents(event: Event) -> str:
    before, after = event.used_percent_before, event.used_percent_after
    if before is None or after is None:
        return ""
    return f" used {before:.0f} % -> {after:.0f} %"


def line(entry: Entry) -> tuple[str, str]:
    """The log line of an entry and its level: one event, one line, who + why + how much."""
    event = entry.event
    who, tag = _who(event.target), f"[{entry.id}]"
    stage = f"{event.stage}; " if event.stage else ""
    size = gib(event.freed_bytes or 0)
    took = f"{event.took_seconds or 0:.1f} s"
    what = f"{who} memory" if event.target == "comfyui" else who
    match event.type:
        case EventType.FREED:
            return "INFO", f"Freed {what}: {size} in {took} ({stage}{event.reason}){_percents(event)} {tag}"
        case EventType.FREE_UNCONFIRMED if not event.final:
            return "INFO", f"{who} soft free gave nothing back in {took} ({event.reason}): unload stage next {tag}"
        case EventType.FREE_UNCONFIRMED:
            words = f"{size} in {took} ({stage}{event.reason}){_percents(event)}"
            return "WARNING", f"{who} free not confirmed: {words} {tag}"
        case EventType.FREE_ASKED:
            return "DEBUG", f"Asked {who} to free memory ({stage}{event.reason}) {tag}"
        case EventType.FREE_REFUSED:
            return "WARNING", f"{who} free not asked: {event.reason} {tag}"
        case EventType.DRY_RUN if (event.target or "").startswith("worker:"):
            return "INFO", f"DRY RUN: would refuse {who}: {event.reason} {tag}"
        case EventType.DRY_RUN:
            return "INFO", f"DRY RUN: would ask for {event.reason} {tag}"
        case EventType.MODEL_DETECTED:
            return "INFO", f"New Ollama model(s) detected: {event.reason} {tag}"
        case EventType.CPU_FALLBACK:
            model, _, rest = event.reason.partition(" is ")
            return "WARNING", f"CPU fallback: {model} is {rest} {tag}"
        case EventType.REPAIRED:
            return "INFO", f"Repaired: {event.reason}, in {took} {tag}"
        case EventType.REPAIR_FAILED:
            return "WARNING", f"Not repaired: {event.reason} {tag}"
        case EventType.WARMED_BACK:
            return "INFO", f"Warmed back: {event.reason}, in {took} {tag}"
        case EventType.PRESSURE_BEGAN:
            return "INFO", f"Pressure on {who}: {event.reason} {tag}"
        case EventType.PRESSURE_ENDED:
            return "INFO", f"Pressure on {who} is over: {event.reason} {tag}"
        case EventType.WORKER_DEAD | EventType.READINGS_DISAGREE | EventType.OLLAMA_STUCK:
            return "WARNING", f"{who}: {event.reason} {tag}"
        case EventType.ADMITTED:
            return "INFO", f"Admitted {who}: {event.reason} {tag}"
        case EventType.REFUSED:
            return "WARNING", f"Refused {who}: {event.reason} {tag}"
        case EventType.LEASE_ENDED:
            return "INFO", f"Lease of {who} ended: {event.reason} {tag}"
        case EventType.LEASE_EXPIRED:
            return "WARNING", f"Lease of {who} expired: {event.reason} {tag}"
        case EventType.SOFT_LIMIT:
            return "WARNING", f"VRAM soft limit exceeded by {who}: {event.reason} {tag}"
        case EventType.HARD_LIMIT:
            return "ERROR", f"VRAM hard limit exceeded by {who}: {event.reason} {tag}"
        case EventType.LEAK:
            return "WARNING", f"Potential memory leak of {who}: {event.reason} {tag}"
        case EventType.SENSOR_LOST:
            return "WARNING", f"{who} cannot be read: {event.reason} {tag}"
        case EventType.SENSOR_BACK:
            return "INFO", f"{who} can be read: {event.reason} {tag}"
