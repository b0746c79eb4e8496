"""Recorded once, told once, and still there after a restart."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from io import StringIO
from pathlib import Path

import pytest
from loguru import logger

from tests.fakes import GIB, FakeStore
from vram_manager import journal as journals
from vram_manager.clock import Clock
from vram_manager.daemon import log_to
from vram_manager.domain.action import FreeComfyUI, Stage
from vram_manager.domain.decision import Decision
from vram_manager.domain.event import Event, EventType
from vram_manager.domain.watch import Watch
from vram_manager.journal import MAX_UNWRITTEN, RING_DECISIONS, RING_EVENTS, Entry, Journal, as_json
from vram_manager.store import FILE_NAME, Row, Store

NOON = datetime(2026, 7, 1, 12, tzinfo=UTC)
CLOCK = Clock(lambda: 0.0, lambda: NOON)
BACK = Event(type=EventType.SENSOR_BACK, target="ollama", reason="version 0.33.1")
FREED = Event(
    type=EventType.FREED,
    target="comfyui",
    stage=Stage.SOFT,
    gpu="GPU-a",
    reason="llama3.1:8b is 38 % on CPU",
    freed_bytes=int(9.8 * GIB),
    took_seconds=1.234,
    used_percent_before=90.6,
    used_percent_after=52.4,
    action_id="free-0411",
)


@contextlib.contextmanager
def journal_in(directory: Path) -> Iterator[Journal]:
    """A journal over the history in `directory`, as a daemon has it from its start to its end."""
    journal = Journal(CLOCK, Store.open(directory))
    try:
        yield journal
    finally:
        journal.close()


def a_journal(*rows: Row) -> Journal:
    return Journal(CLOCK, FakeStore(*rows))  # type: ignore[arg-type]


@pytest.fixture
def log() -> Iterator[list[str]]:
    """Every log line, as `LEVEL message`."""
    lines: list[str] = []
    sink = logger.add(lines.append, level=0, format="{level} {message}")
    yield lines
    logger.remove(sink)


def decision(branch: str, reason: str = "why", **more: object) -> Decision:
    return Decision(branch=branch, reason=reason, watch=Watch(), **more)  # type: ignore[arg-type]


ACT = FreeComfyUI(stage=Stage.SOFT)


# What outlives a restart.


def test_ids_count_on_after_a_restart(tmp_path: Path):
    with journal_in(tmp_path) as first:
        ids = [first.record(BACK).id, first.record(FREED).id]
    with journal_in(tmp_path) as second:
        ids.append(second.record(FREED).id)
    assert ids == ["event-0001", "free-0002", "free-0003"]


@pytest.mark.parametrize("kind", EventType)
def test_an_event_comes_back_from_disk_as_it_was(tmp_path: Path, kind: EventType):
    event = replace(FREED, type=kind, models=("llama3.1:8b", "ü\n"), reason='quotes " and \\ and {braces}')
    with journal_in(tmp_path) as first:
        recorded = first.record(event)
    with journal_in(tmp_path) as second:
        assert second.events() == [recorded]


def test_the_ring_holds_the_newest_after_a_restart(tmp_path: Path):
    with journal_in(tmp_path) as first:
        for _ in range(RING_EVENTS + 5):
            first.record(BACK)
        assert len(first.events()) == RING_EVENTS
    with journal_in(tmp_path) as second:
        assert [entry.seq for entry in second.events()] == list(range(6, RING_EVENTS + 6))


def stored(seq: int, **body: object) -> Row:
    """What some version wrote for an event."""
    at = "2026-07-01T12:00:00.000Z"
    whole = {"id": f"free-{seq:04d}", "at": at, "type": "freed", "target": "comfyui", "reason": "why", **body}
    return Row(seq=seq, at=at, type=str(whole["type"]), body=json.dumps(whole))


def test_event_types_of_a_newer_version_are_skipped_and_their_ids_are_not_given_out_again():
    journal = a_journal(stored(1), stored(2, type="meteorite"), stored(3, stage="thaw"))
    assert [entry.seq for entry in journal.events()] == [1]
    assert journal.record(BACK).seq == 4


def test_fields_of_a_newer_version_are_ignored():
    journal = a_journal(stored(1, node="gpu-box-2", tenant={"id": 5}))
    assert [entry.event.reason for entry in journal.events()] == ["why"]


@pytest.mark.parametrize(
    "body",
    ["", "not JSON", "null", "5", '"text"', "[]", "[1, 2]", "{}", '{"type": "freed"}', '{"type": []}', '{"type": {}}'],
)
def test_a_row_that_makes_no_sense_is_skipped(body: str):
    journal = a_journal(stored(1), Row(seq=2, at="2026-07-01T12:00:00Z", type="freed", body=body), stored(3))
    assert [entry.seq for entry in journal.events()] == [1, 3]


@pytest.mark.parametrize("at", ["", "yesterday", "2026-13-01T00:00:00Z"])
def test_a_row_without_a_time_is_skipped(at: str):
    assert a_journal(replace(stored(1), at=at)).events() == []


def test_a_time_without_a_zone_is_still_a_moment():
    entry = a_journal(replace(stored(1), at="2026-07-01T12:00:00")).events()[0]
    assert entry.at.tzinfo is not None


def test_a_damaged_history_is_set_aside_and_the_journal_begins_anew(tmp_path: Path):
    (tmp_path / FILE_NAME).write_bytes(b"garbage" * 1000)
    with journal_in(tmp_path) as journal:
        assert journal.events() == []
        assert journal.record(BACK).id == "event-0001"
    with journal_in(tmp_path) as journal:
        assert [entry.id for entry in journal.events()] == ["event-0001"]


def test_a_history_with_a_row_that_is_no_text_gives_the_others(tmp_path: Path):
    with journal_in(tmp_path) as journal:
        journal.record(replace(BACK, reason="x" * 300))
        journal.record(FREED)
    path = tmp_path / FILE_NAME
    path.write_bytes(path.read_bytes().replace(b'"reason":"' + b"x" * 300, b"\xff" * 310))
    with journal_in(tmp_path) as journal:
        assert [entry.id for entry in journal.events()] == ["free-0002"]
        assert journal.record(BACK).seq == 3


# What is asked of it.


def test_events_after_an_id_are_the_oldest_of_those_that_follow():
    journal = a_journal()
    for _ in range(10):
        journal.record(BACK)
    assert [entry.seq for entry in journal.events(after=3, limit=4)] == [4, 5, 6, 7]
    assert [entry.seq for entry in journal.events(limit=4)] == [7, 8, 9, 10]
    assert journal.events(after=10) == []


def test_an_event_names_the_newest_decision_unless_it_is_told_another():
    journal = a_journal()
    assert journal.record(BACK).decision_id is None
    first, second = journal.decided(decision("3 nobody")), journal.decided(decision("5 idle"))
    assert journal.record(BACK).decision_id == second.id
    assert journal.record(BACK, decision_id=first.id).decision_id == first.id


def test_equal_neighbours_are_folded_with_a_count_and_the_newest_numbers():
    now = NOON
    journal = Journal(Clock(lambda: 0.0, lambda: now), FakeStore())  # type: ignore[arg-type]
    for number in range(5):
        now = NOON + timedelta(seconds=number)
        journal.decided(decision("3 nobody", f"GPU 0 {number} % used", inputs={"n": number}))
    (folded,) = journal.decisions(10)
    assert (folded.count, folded.at, folded.until) == (5, NOON, NOON + timedelta(seconds=4))
    assert folded.decision.reason == "GPU 0 4 % used"
    assert folded.decision.inputs == {"n": 4}


def test_a_decision_that_acts_is_never_folded():
    journal = a_journal()
    for _ in range(2):
        journal.decided(decision("6 act", action=ACT))
    for branch in ("1 settling", "3 nobody", "1 settling"):
        journal.decided(decision(branch))
    decided = journal.decisions(10)
    assert [entry.decision.branch for entry in decided] == ["1 settling", "3 nobody", "1 settling", "6 act", "6 act"]
    assert [entry.id for entry in decided] == [f"decision-000{number}" for number in (5, 4, 3, 2, 1)]
    assert {entry.count for entry in decided} == {1}


def test_decisions_are_remembered_up_to_a_limit_newest_first():
    journal = a_journal()
    for number in range(RING_DECISIONS + 3):
        journal.decided(decision(f"{number}"))
    assert len(journal.decisions(10_000)) == RING_DECISIONS
    assert [entry.decision.branch for entry in journal.decisions(2)] == ["502", "501"]


def test_a_decision_does_not_keep_its_events_alive():
    journal = a_journal()
    assert journal.decided(decision("3 nobody", events=(BACK,))).decision.events == ()


@pytest.mark.asyncio
async def test_a_follower_gets_what_is_recorded_from_then_on():
    journal = a_journal()
    journal.record(BACK)
    async with journal.following() as queue:
        journal.record(FREED)
        assert (await queue.get()).event == FREED
        assert queue.empty()
    journal.record(BACK)
    assert queue.empty()


@pytest.mark.asyncio
async def test_a_follower_that_is_too_slow_loses_the_oldest_only_and_holds_up_nobody():
    journal = a_journal()
    async with journal.following() as slow, journal.following() as quick:
        quick_got = []
        for _ in range(RING_EVENTS + 10):
            journal.record(BACK)
            quick_got.append((await quick.get()).seq)
        slow_got = [slow.get_nowait().seq for _ in range(slow.qsize())]
    assert quick_got == list(range(1, RING_EVENTS + 11))
    assert slow_got == list(range(11, RING_EVENTS + 11))


def test_listeners_are_called_with_each_entry():
    journal = a_journal()
    heard: list[Entry] = []
    journal.listen(heard.append)
    assert [journal.record(BACK)] == heard


# The disk.


@contextlib.asynccontextmanager
async def time_flies() -> AsyncIterator[None]:
    """On this loop an hour goes by in each moment that it is idle: a pause of 5 s costs nothing."""
    loop = asyncio.get_running_loop()
    time, ahead = loop.time, 0.0
    loop.time = lambda: time() + ahead  # type: ignore[method-assign]

    async def fly() -> None:
        nonlocal ahead
        while True:
            ahead += 3600.0
            await asyncio.sleep(0.001)

    flying = asyncio.create_task(fly())
    try:
        yield
    finally:
        flying.cancel()
        await asyncio.gather(flying, return_exceptions=True)


class Said:
    """Log lines, and a way to wait for one on the loop."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._more = asyncio.Event()
        self._sink = logger.add(self._take, level="INFO", format="{message}")

    def _take(self, line: str) -> None:
        self.lines.append(line.strip())
        self._more.set()

    async def line(self, beginning: str) -> str:
        while True:
            for line in self.lines:
                if line.startswith(beginning):
                    return line
            self._more.clear()
            await self._more.wait()

    def close(self) -> None:
        logger.remove(self._sink)


class CountingStore(Store):
    """The real one; counts how often it was asked to write."""

    tries = 0
    _asked = threading.Condition()

    def append(self, rows: list[Row]) -> None:
        with self._asked:
            self.tries += 1
            self._asked.notify_all()
        super().append(rows)

    async def tried(self, times: int) -> None:
        def wait() -> None:
            with self._asked:
                assert self._asked.wait_for(lambda: self.tries >= times, 60)

        await asyncio.to_thread(wait)


@pytest.mark.asyncio
async def test_a_full_disk_loses_nothing_is_said_once_and_is_written_when_there_is_room(tmp_path: Path):
    connection = sqlite3.connect(tmp_path / FILE_NAME, check_same_thread=False)
    connection.execute("CREATE TABLE events (seq INTEGER PRIMARY KEY, at TEXT, type TEXT, body TEXT)")
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count = {pages + 2}")
    big = replace(BACK, reason="x" * 3000)

    said = Said()
    store = CountingStore(connection, tmp_path / FILE_NAME, None)
    journal = Journal(CLOCK, store)
    writing = asyncio.create_task(journal.write_behind())
    try:
        for _ in range(20):
            journal.record(big)
        await said.line("History cannot be written")
        async with time_flies():
            for _ in range(3):
                journal.record(big)
                tries = store.tries
                await store.tried(tries + 2)
        assert len(journal.events()) == 23
        assert [line for line in said.lines if "History" in line] == [
            "History cannot be written (database or disk is full): kept in memory until it can"
        ]
        connection.execute("PRAGMA max_page_count = 10000")
        async with time_flies():
            assert await said.line("History is written again") == "History is written again"
    finally:
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        said.close()
        journal.close()
    with journal_in(tmp_path) as restarted:
        assert [entry.seq for entry in restarted.events()] == list(range(1, 24))


class FullStore(FakeStore):
    """A disk that is full until it is not."""

    full = True

    def append(self, rows: list[Row]) -> None:
        if self.full:
            raise sqlite3.OperationalError("database or disk is full")
        super().append(rows)


@pytest.mark.asyncio
async def test_what_a_full_disk_made_the_journal_forget_is_said_when_there_is_room():
    said = Said()
    store = FullStore()
    journal = Journal(CLOCK, store)  # type: ignore[arg-type]
    writing = asyncio.create_task(journal.write_behind())
    try:
        with quiet():
            for _ in range(MAX_UNWRITTEN + 7):
                journal.record(BACK)
        await said.line("History cannot be written")
        store.full = False
        async with time_flies():
            line = await said.line("History is written again")
        assert "7 of the oldest events" in line
        assert [row.seq for row in store.rows] == list(range(8, MAX_UNWRITTEN + 8))
    finally:
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        said.close()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Ten thousand log lines are of no use to anybody."""
    logger.disable(journals.__name__)
    try:
        yield
    finally:
        logger.enable(journals.__name__)


def test_what_could_not_be_written_at_the_end_is_said(log: list[str]):
    store = FullStore()
    journal = Journal(CLOCK, store)  # type: ignore[arg-type]
    journal.record(BACK)
    journal.close()
    assert log[-1].strip() == "WARNING 1 events could not be written: database or disk is full"
    assert store.closed


class SlowStore(FakeStore):
    """A disk that takes its time, and notices when it is asked for two things at once."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = threading.Event()
        self.release = threading.Event()
        self.two_at_once = threading.Event()
        self._busy = threading.Lock()

    def append(self, rows: list[Row]) -> None:
        if not self._busy.acquire(blocking=False):
            self.two_at_once.set()
            return
        try:
            self.entered.set()
            assert self.release.wait(10)
            super().append(rows)
        finally:
            self._busy.release()

    def close(self) -> None:
        if self._busy.locked():
            self.two_at_once.set()
        super().close()


@pytest.mark.asyncio
async def test_the_end_waits_for_the_write_under_way_and_never_writes_beside_it():
    store = SlowStore()
    journal = Journal(CLOCK, store)  # type: ignore[arg-type]
    writing = asyncio.create_task(journal.write_behind())
    journal.record(BACK)
    assert await asyncio.to_thread(store.entered.wait, 10)
    writing.cancel()
    await asyncio.gather(writing, return_exceptions=True)
    journal.record(FREED)
    closing = asyncio.create_task(asyncio.to_thread(journal.close))
    assert not await asyncio.to_thread(store.two_at_once.wait, 0.2)
    assert not store.closed
    store.release.set()
    await closing
    assert store.closed
    assert [row.seq for row in store.rows] == [1, 2]


# The words.

UNCONFIRMED = replace(FREED, type=EventType.FREE_UNCONFIRMED, freed_bytes=0, took_seconds=10.0)
LINES = {
    "freed": (
        FREED,
        "INFO Freed ComfyUI memory: 9.8 GiB in 1.2 s (soft; llama3.1:8b is 38 % on CPU) used 91 % -> 52 % [free-0001]",
    ),
    "unloaded": (
        replace(FREED, target="ollama:qwen3:14b", stage=None, reason="asked by hand"),
        "INFO Freed Ollama model qwen3:14b: 9.8 GiB in 1.2 s (asked by hand) used 91 % -> 52 % [free-0001]",
    ),
    "not confirmed": (
        replace(UNCONFIRMED, reason="why; what is left", used_percent_after=90.6),
        "WARNING ComfyUI free not confirmed: 0.0 GiB in 10.0 s (soft; why; what is left) used 91 % -> 91 % [free-0001]",
    ),
    "not confirmed, unload stage next": (
        replace(UNCONFIRMED, reason="why", final=False),
        "INFO ComfyUI soft free gave nothing back in 10.0 s (why): unload stage next [free-0001]",
    ),
    "asked": (
        replace(FREED, type=EventType.FREE_ASKED),
        "DEBUG Asked ComfyUI to free memory (soft; llama3.1:8b is 38 % on CPU) [free-0001]",
    ),
    "refused": (
        replace(FREED, type=EventType.FREE_REFUSED, reason="ComfyUI became busy (asked by hand)"),
        "WARNING ComfyUI free not asked: ComfyUI became busy (asked by hand) [free-0001]",
    ),
    "dry run": (
        replace(FREED, type=EventType.DRY_RUN, reason="a soft free of ComfyUI, which holds 9.8 GiB (why)"),
        "INFO DRY RUN: would ask for a soft free of ComfyUI, which holds 9.8 GiB (why) [free-0001]",
    ),
    "dry run of a refusal": (
        Event(type=EventType.DRY_RUN, target="worker:tts", reason="need 26.0 GiB, 15.0 GiB available"),
        "INFO DRY RUN: would refuse tts: need 26.0 GiB, 15.0 GiB available [free-0001]",
    ),
    "admitted": (
        Event(type=EventType.ADMITTED, target="worker:tts", reason="4.0 GiB on GPU 0 (request: as asked for)"),
        "INFO Admitted tts: 4.0 GiB on GPU 0 (request: as asked for) [lease-0001]",
    ),
    "worker refused": (
        Event(type=EventType.REFUSED, target="worker:tts", reason="Insufficient GPU memory: need 26.0 GiB"),
        "WARNING Refused tts: Insufficient GPU memory: need 26.0 GiB [lease-0001]",
    ),
    "lease ended": (
        Event(
            type=EventType.LEASE_ENDED,
            target="worker:tts",
            reason="released after 35 s; estimated 4.0 GiB, peak 3.7 GiB",
        ),
        "INFO Lease of tts ended: released after 35 s; estimated 4.0 GiB, peak 3.7 GiB [lease-0001]",
    ),
    "lease expired": (
        Event(type=EventType.LEASE_EXPIRED, target="worker:tts", reason="not renewed for 60 s"),
        "WARNING Lease of tts expired: not renewed for 60 s [lease-0001]",
    ),
    "soft limit": (
        Event(type=EventType.SOFT_LIMIT, target="worker:tts", reason="11.3 GiB used of 11.0 GiB"),
        "WARNING VRAM soft limit exceeded by tts: 11.3 GiB used of 11.0 GiB [limit-0001]",
    ),
    "hard limit": (
        Event(type=EventType.HARD_LIMIT, target="worker:tts", reason="11.2 GiB used + 0.8 GiB requested"),
        "ERROR VRAM hard limit exceeded by tts: 11.2 GiB used + 0.8 GiB requested [limit-0001]",
    ),
    "leak": (
        Event(type=EventType.LEAK, target="worker:tts", reason="10.8 GiB -> 11.0 GiB over 100 generations"),
        "WARNING Potential memory leak of tts: 10.8 GiB -> 11.0 GiB over 100 generations [leak-0001]",
    ),
    "new model": (
        Event(type=EventType.MODEL_DETECTED, target="ollama", reason="llama3.1:8b (5.8 GiB, 100 % GPU)"),
        "INFO New Ollama model(s) detected: llama3.1:8b (5.8 GiB, 100 % GPU) [model-0001]",
    ),
    "cpu fallback": (
        Event(type=EventType.CPU_FALLBACK, target="ollama", reason="llama3.1:8b is 38 % on CPU"),
        "WARNING CPU fallback: llama3.1:8b is 38 % on CPU [model-0001]",
    ),
    "repaired": (
        Event(
            type=EventType.REPAIRED,
            target="ollama:llama3.1:8b",
            reason="llama3.1:8b was 45 % on CPU, now 100 % GPU (5.5 GiB)",
            took_seconds=4.26,
        ),
        "INFO Repaired: llama3.1:8b was 45 % on CPU, now 100 % GPU (5.5 GiB), in 4.3 s [repair-0001]",
    ),
    "repair failed": (
        Event(
            type=EventType.REPAIR_FAILED,
            target="ollama:llama3.1:8b",
            reason="llama3.1:8b was 45 % on CPU; 2.0 GiB are missing",
        ),
        "WARNING Not repaired: llama3.1:8b was 45 % on CPU; 2.0 GiB are missing [repair-0001]",
    ),
    "warmed back": (
        Event(
            type=EventType.WARMED_BACK,
            target="ollama:llama3.1:8b",
            reason="llama3.1:8b made room for ComfyUI, now 100 % GPU (5.5 GiB)",
            took_seconds=2.0,
        ),
        "INFO Warmed back: llama3.1:8b made room for ComfyUI, now 100 % GPU (5.5 GiB), in 2.0 s [repair-0001]",
    ),
    "stuck": (
        Event(type=EventType.OLLAMA_STUCK, target="ollama:llama3.1:8b", reason="was asked to leave and stays"),
        "WARNING Ollama model llama3.1:8b: was asked to leave and stays [event-0001]",
    ),
    "pressure began": (
        Event(type=EventType.PRESSURE_BEGAN, target="GPU 0", reason="91 % used for 30 s, threshold 75 %"),
        "INFO Pressure on GPU 0: 91 % used for 30 s, threshold 75 % [pressure-0001]",
    ),
    "pressure ended": (
        Event(type=EventType.PRESSURE_ENDED, target="GPU 0", reason="52 % used, threshold 75 %"),
        "INFO Pressure on GPU 0 is over: 52 % used, threshold 75 % [pressure-0001]",
    ),
    "dead worker": (
        Event(type=EventType.WORKER_DEAD, target="comfyui", reason="restart ComfyUI"),
        "WARNING ComfyUI: restart ComfyUI [event-0001]",
    ),
    "disagreement": (
        Event(type=EventType.READINGS_DISAGREE, target="ollama", reason="Ollama claims 5.0 GiB"),
        "WARNING Ollama: Ollama claims 5.0 GiB [event-0001]",
    ),
    "sensor lost": (
        Event(type=EventType.SENSOR_LOST, target="nvml", reason="GPU is lost; restart the container"),
        "WARNING GPU cannot be read: GPU is lost; restart the container [event-0001]",
    ),
    "sensor back": (BACK, "INFO Ollama can be read: version 0.33.1 [event-0001]"),
}


@pytest.mark.parametrize(("event", "line"), LINES.values(), ids=LINES.keys())
def test_log_lines_are_in_the_form_that_people_grep_for(log: list[str], event: Event, line: str):
    a_journal().record(event)
    assert [said.strip() for said in log] == [line]


def test_every_type_of_event_has_a_line():
    assert {event.type for event, _ in LINES.values()} == set(EventType)


@pytest.fixture
def stream() -> Iterator[StringIO]:
    """What goes to stdout; afterwards the log is as it was."""
    yield StringIO()
    logger.remove()
    logger.configure(patcher=lambda record: None)


NASTY = "llama3\n2026-07-01 Freed ComfyUI memory: 99 GiB\r\x1b[2J\u2028 {oops} {0} %s <red>x</red> \ud800"


@pytest.mark.parametrize("json_lines", [False, True], ids=["text", "json"])
def test_one_event_is_one_line_whatever_a_model_is_called(stream: StringIO, json_lines: bool):
    log_to(stream, json_lines=json_lines, debug=True)
    journal = a_journal()
    journal.record(Event(type=EventType.MODEL_DETECTED, target="ollama", reason=NASTY))
    journal.decided(decision("5 idle", NASTY))
    written = stream.getvalue()
    assert written.count("\n") == len(written.splitlines()) == 2
    assert written.encode().decode() == written
    assert "\x1b" not in written
    assert "{oops} {0} %s" in written


def test_text_lines_carry_time_level_and_message(stream: StringIO):
    log_to(stream, json_lines=False, debug=False)
    a_journal().record(FREED)
    when, clock, level, words = stream.getvalue().split(maxsplit=3)
    datetime.fromisoformat(f"{when} {clock}")
    assert level == "INFO"
    assert words.startswith("Freed ComfyUI memory: 9.8 GiB in 1.2 s (soft; ")


def test_json_lines_carry_the_event(stream: StringIO):
    log_to(stream, json_lines=True, debug=False)
    entry = a_journal().record(FREED)
    said = json.loads(stream.getvalue())
    assert said["event"] == json.loads(json.dumps(as_json(entry)))
    assert said["level"] == "INFO"
    assert said["message"].startswith("Freed ComfyUI memory: 9.8 GiB")
    assert datetime.fromisoformat(said["at"]).tzinfo is not None


def test_json_lines_that_are_no_event_parse_too(stream: StringIO):
    log_to(stream, json_lines=True, debug=False)
    try:
        raise ValueError("a bug\nin two lines")
    except ValueError:
        logger.exception("A part of the daemon died")
    (line,) = stream.getvalue().splitlines()
    said = json.loads(line)
    assert "event" not in said
    assert "a bug" in said["error"]
    assert "raise ValueError(" in said["traceback"]


@pytest.mark.parametrize("debug", [False, True])
def test_what_is_asked_and_decided_is_logged_in_debug_only(stream: StringIO, debug: bool):
    log_to(stream, json_lines=False, debug=debug)
    journal = a_journal()
    journal.decided(decision("5 idle"))
    journal.record(replace(FREED, type=EventType.FREE_ASKED))
    assert len(stream.getvalue().splitlines()) == (2 if debug else 0)


def test_an_entry_as_json_has_every_field_that_outsiders_read():
    entry = a_journal().record(FREED)
    assert as_json(entry) == {
        "id": "free-0001",
        "at": "2026-07-01T12:00:00.000Z",
        "type": "freed",
        "target": "comfyui",
        "reason": "llama3.1:8b is 38 % on CPU",
        "gpu": "GPU-a",
        "stage": "soft",
        "freed_bytes": int(9.8 * GIB),
        "took_seconds": 1.234,
        "used_percent_before": 90.6,
        "used_percent_after": 52.4,
        "action_id": "free-0411",
        "models": (),
        "lease": None,
        "estimated_bytes": None,
        "peak_bytes": None,
        "decision_id": None,
    }


def test_what_a_worker_is_told_comes_from_no_decision_of_a_turn():
    journal = a_journal()
    journal.decided(Decision(branch="3 nobody", reason="nobody needs more", watch=Watch()))
    assert journal.record(BACK).decision_id == "decision-0001"
    for kind in (EventType.ADMITTED, EventType.SOFT_LIMIT, EventType.LEAK):
        assert journal.record(Event(type=kind, target="GPU 0")).decision_id is None
    assert journal.record(Event(type=EventType.DRY_RUN, target="worker:tts")).decision_id is None
