"""What is remembered of the GPUs: every peak, no more than the disk has for it, and nothing that nobody saw."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loguru import logger

from tests.test_journal import time_flies
from vram_manager import sample_rows
from vram_manager.clock import Clock
from vram_manager.domain.reading import Missing, Off, Seen
from vram_manager.domain.sample import GpuSeries, GpuUse, Level, Sample, Series, Window
from vram_manager.domain.share import Share, ShareKind
from vram_manager.domain.snapshot import Gpu, GpuMemory, Gpus, Queue, Snapshot
from vram_manager.history import BATCH_MOMENTS, HOLD_SECONDS, MAX_UNWRITTEN, History
from vram_manager.policy.series import folded, pieces
from vram_manager.retention import used_bytes
from vram_manager.store import FILE_NAME, Store

MIB, GIB = 2**20, 2**30
TOTAL = 24 * GIB
NOON = datetime(2026, 7, 1, 12, tzinfo=UTC)
BEGAN = NOON.timestamp()
HOUR, DAY = 3600.0, 86400.0


class Box:
    """A machine with some cards, two clocks, and a daemon that may be started anew."""

    def __init__(self, directory: Path, most_bytes: int = 128 * MIB, interval_seconds: float = 5.0) -> None:
        self.directory = directory
        self.most_bytes = most_bytes
        self.interval_seconds = interval_seconds
        self.monotonic = 1000.0
        self.wall = NOON
        self.cards: dict[str, dict[str, int] | Missing] = {"GPU-a": {}}
        self.remaining: int | None = 0
        self.leased = 0
        self.start()

    def start(self) -> None:
        self.store = Store.open(self.directory, self.most_bytes)
        clock = Clock(lambda: self.monotonic, lambda: self.wall)
        self.history = History(clock, self.store, interval_seconds=self.interval_seconds)

    def stop(self) -> None:
        self.history.close()
        self.store.close()

    def crash(self) -> None:
        """Nothing more is written."""
        self.store.close()

    @property
    def now(self) -> float:
        return self.wall.timestamp()

    def later(self, seconds: float) -> None:
        self.monotonic += seconds
        self.wall += timedelta(seconds=seconds)

    def turn(self, seconds: float = 0.0, /, **has: float) -> None:
        """A turn after so many seconds; `has` is GiB by worker on the first card."""
        self.later(seconds)
        if has:
            self.cards["GPU-a"] = {name: int(size * GIB) for name, size in has.items()}
        gpus = tuple(gpu(index, uuid, held) for index, (uuid, held) in enumerate(self.cards.items()))
        seen = Gpus(gpus=gpus, driver_version="580.95.05")
        snapshot = Snapshot(
            taken_at=self.monotonic,
            gpus=Seen(seen, self.monotonic),
            ollama=Off(),
            comfyui=Off(),
            queue=Off() if self.remaining is None else Seen(Queue.first(self.remaining, 0.0), self.monotonic),
            leased_bytes={"GPU-a": self.leased},
        )
        shares = {uuid: parts(held) for uuid, held in self.cards.items() if not isinstance(held, Missing)}
        self.history.turned(snapshot, seen if gpus else Missing("no GPU"), shares)

    def turns(self, seconds: float, every: float = 5.0, **has: float) -> None:
        for _ in range(int(seconds / every)):
            self.turn(every, **has)

    def read(self, seconds: float, step: int | None = None, gpu: str | None = None) -> Series:
        """The last so many seconds."""
        window = Window(begin=self.now - seconds, end=self.now, step_seconds=step, gpu=gpu)
        return self.history.read(window, self.now)

    def card(self, seconds: float, step: int | None = None) -> GpuSeries:
        (found,) = self.read(seconds, step).gpus
        return found

    def stored(self, level: Level = Level.RAW) -> list[Sample]:
        with self.store.reading() as connection:
            return list(sample_rows.read(connection, level, -1e11, 1e11))


def parts(held: dict[str, int]) -> tuple[Share, ...]:
    return tuple(Share(kind=ShareKind.WORKER, tenant=f"worker:{name}", bytes=size) for name, size in held.items())


def gpu(index: int, uuid: str, held: dict[str, int] | Missing) -> Gpu:
    memory: GpuMemory | Missing = Missing("driver error")
    if not isinstance(held, Missing):
        taken = sum(held.values())
        memory = GpuMemory(total_bytes=TOTAL, used_bytes=taken, free_bytes=TOTAL - taken, reserved_bytes=0)
    nothing = isinstance(held, Missing)
    return Gpu(
        uuid=uuid,
        index=index,
        name=f"Card {index}",
        memory=memory,
        utilization_percent=Missing("driver error") if nothing else 7,
        temperature_celsius=Missing("driver error") if nothing else 50,
        power_watts=Missing("driver error") if nothing else 99.5,
    )


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    made = Box(tmp_path)
    yield made
    made.stop()


def gib(values: list[float | None]) -> list[float | None]:
    return [None if value is None else value / GIB for value in values]


def whole(values: list[Any]) -> list[Any]:
    return [value for value in values if value is not None]


# Moments.


def test_what_stands_still_is_kept_about_once_a_minute(box: Box) -> None:
    box.turns(600, tts=4)
    box.history.flush()

    assert len(box.stored()) in (10, 11)


def test_what_moves_is_kept_at_most_once_in_five_seconds(box: Box) -> None:
    for number in range(400):
        box.turn(0.25, tts=1 + number % 2)
    box.history.flush()

    assert 19 <= len(box.stored()) <= 21


def test_a_small_change_is_no_moment_and_a_queue_that_moved_is(box: Box) -> None:
    box.turn(0, tts=1)
    box.turn(5, tts=1 + 15 / 1024)
    box.remaining = 3
    box.turn(5)
    box.history.flush()

    assert [one.queue for one in box.stored()] == [0, 3]


def test_a_peak_between_two_moments_is_not_lost(box: Box) -> None:
    box.turn(0, tts=1)
    box.turn(0.25, tts=20)
    box.turn(0.25, tts=2)
    box.turns(60)

    found = box.card(HOUR, 10)
    assert max(whole(found.columns["taken_max_bytes"])) == 20 * GIB
    assert min(whole(found.columns["free_min_bytes"])) == 4 * GIB
    assert max(whole(found.columns["taken_bytes"])) <= 2 * GIB
    assert max(whole(found.tenants[0].max_bytes)) == 20 * GIB


def test_an_answer_has_what_is_not_written_yet(box: Box) -> None:
    box.turn(0, tts=4)
    box.turn(5, tts=6)
    box.later(5)

    assert box.stored() == []
    for step in (5, 60, 3600):
        found = box.card(HOUR, step)
        assert whole(found.columns["taken_max_bytes"])[-1] == 6 * GIB
        assert gib(whole(found.columns["taken_bytes"])) == ([4, 6] if step == 5 else [5])


def test_an_answer_is_the_same_before_and_after_it_is_written(box: Box) -> None:
    for number in range(200):
        box.turn(5, tts=1 + number % 7, voice=2)
        if number == 77:
            box.history.flush()
    before = [box.read(HOUR, step) for step in (5, 60, 3600)]
    box.history.flush()

    for one, step in zip(before, (5, 60, 3600), strict=True):
        assert len(one.gpus[0].at) > 0
        after = box.card(HOUR, step)
        assert after.at == one.gpus[0].at
        for name, values in one.gpus[0].columns.items():
            assert after.columns[name] == pytest.approx(values, rel=1e-4), name  # a millisecond counts twice
        assert after.columns["taken_max_bytes"] == one.gpus[0].columns["taken_max_bytes"]


def test_tenants_add_up_to_what_is_taken_at_every_moment(box: Box) -> None:
    for number in range(50):
        box.turn(5, tts=1 + number / 7, voice=number / 9)
    box.history.flush()

    for one in box.stored():
        assert sum(one.gpus[1].tenants.values()) == one.gpus[1].taken_bytes


def test_the_gpus_of_a_box_are_told_apart_and_in_order(box: Box) -> None:
    box.cards = {"GPU-b": {"x": GIB}, "GPU-a": {"y": 2 * GIB}}
    box.turns(60)

    found = box.read(60, 60)
    assert [(one.device.uuid, one.device.index, one.device.name) for one in found.gpus] == [
        ("GPU-b", 0, "Card 0"),
        ("GPU-a", 1, "Card 1"),
    ]
    assert [one.device.uuid for one in box.read(60, 60, "GPU-a").gpus] == ["GPU-a"]


def test_a_card_that_was_taken_out_is_still_named(tmp_path: Path) -> None:
    box = Box(tmp_path)
    box.cards = {"GPU-a": {"x": GIB}, "GPU-b": {"x": 2 * GIB}}
    box.turns(60)
    box.stop()
    box.start()
    box.cards = {"GPU-c": {"x": 3 * GIB}}
    box.turns(60)

    assert {one.device.uuid: one.device.name for one in box.read(HOUR).gpus} == {
        "GPU-a": "Card 0",
        "GPU-b": "Card 1",
        "GPU-c": "Card 0",
    }
    assert [box.history.gpu(name) and box.history.gpu(name).uuid for name in ("GPU-b", "1", "0", "7")] == [  # type: ignore[union-attr]
        "GPU-b",
        "GPU-b",
        "GPU-c",
        None,
    ]
    assert box.history.uuids() == ["GPU-a", "GPU-b", "GPU-c"]
    box.stop()


def test_a_card_whose_identity_changes_keeps_its_past(box: Box) -> None:
    box.cards = {"GPU-a": Missing("driver error"), "GPU-b": {"x": GIB}}
    box.turns(60)
    assert box.history.gpu("GPU-a").total_bytes == 0  # type: ignore[union-attr]
    box.cards = {"GPU-b": {"x": GIB}, "GPU-a": {"x": GIB}}
    box.turns(60)
    box.cards = {"GPU-b": {"x": GIB}, "GPU-a": Missing("driver error")}
    box.turn(5)

    device = box.history.gpu("GPU-a")
    assert device is not None
    assert (device.index, device.total_bytes) == (1, TOTAL)


# Gaps.


def test_a_card_that_falls_silent_leaves_a_gap(box: Box) -> None:
    box.turns(60, tts=4)
    box.cards["GPU-a"] = Missing("driver error")
    box.turns(60)
    box.turns(60, tts=4)

    found = box.card(HOUR, 5)
    assert found.columns["taken_bytes"].count(None) == 1
    gap = found.columns["taken_bytes"].index(None)
    assert 50 <= found.at[gap + 1] - found.at[gap] <= 60


def test_where_no_gpu_can_be_read_the_queue_still_is(box: Box) -> None:
    box.turns(60, tts=4)
    box.cards, box.remaining = {}, 5
    box.turns(60)

    found = box.read(HOUR, 5)
    assert found.queue_remaining[-1] == 5
    assert found.gpus[0].at[-1] < found.queue_at[-1]


def test_a_daemon_that_was_stopped_leaves_a_gap_however_short(tmp_path: Path) -> None:
    box = Box(tmp_path)
    box.turns(60, tts=4)
    box.stop()
    box.later(30)
    box.start()
    box.turns(60, tts=4)

    found = box.card(HOUR, 5)
    gap = found.columns["taken_bytes"].index(None)
    assert 20 <= found.at[gap + 1] - found.at[gap] <= 30
    box.stop()


def test_a_daemon_that_was_killed_leaves_a_gap_from_what_it_saw_last(tmp_path: Path) -> None:
    box = Box(tmp_path)
    box.turns(120, tts=4)
    box.history.flush()
    last = box.stored()[-1].at
    box.crash()
    box.later(60)
    box.start()
    box.turns(60, tts=4)

    found = box.card(HOUR, 1)
    gap = found.columns["taken_bytes"].index(None)
    assert last <= found.at[gap - 1] <= last + 1
    assert found.at[gap + 1] >= last + 60
    box.stop()


def test_a_machine_that_slept_leaves_a_gap_though_its_monotonic_clock_stood_still(box: Box) -> None:
    box.turns(60, tts=4)
    box.wall += timedelta(hours=2)
    box.turns(60, tts=4)

    found = box.card(3 * HOUR, 60)
    gap = found.columns["taken_bytes"].index(None)
    assert found.at[gap + 1] - found.at[gap] > 1.9 * HOUR


def test_where_looks_are_rare_what_was_seen_is_true_for_longer(tmp_path: Path) -> None:
    box = Box(tmp_path, interval_seconds=600)
    box.turns(3 * HOUR, every=600, tts=4)

    assert None not in box.card(3 * HOUR, 60).columns["taken_bytes"]
    box.stop()


# Restarts and clocks.


def test_a_restart_in_the_middle_of_an_hour_keeps_what_was_there_of_it(tmp_path: Path) -> None:
    box = Box(tmp_path)
    for size in (20.0, 4.0, 8.0):
        box.turns(600, tts=size)
        box.stop()
        box.start()
    box.turns(10, tts=8)
    box.history.flush()

    (hour,) = box.stored(Level.HOUR)
    use = hour.gpus[1]
    assert hour.at == BEGAN
    assert use.taken_max_bytes == 20 * GIB
    assert use.seconds == pytest.approx(1800, abs=30)
    assert use.taken_bytes == pytest.approx((20 + 4 + 8) / 3 * GIB, rel=0.02)
    box.stop()


def test_a_daemon_that_is_killed_in_the_middle_of_a_minute_keeps_what_was_there_of_it(tmp_path: Path) -> None:
    box = Box(tmp_path)
    for size in (1, 20, 2, 3):
        box.turn(5, tts=size)
    box.history.flush()
    box.crash()
    box.start()
    box.turns(20, tts=3)
    box.history.flush()

    (minute,) = box.stored(Level.MINUTE)
    assert minute.gpus[1].taken_max_bytes == 20 * GIB
    box.stop()


def test_minutes_and_hours_are_what_all_moments_make_whenever_they_are_written(tmp_path: Path) -> None:
    box = Box(tmp_path)
    for number in range(900):
        box.turn(4.3, tts=number * 7 % 20, voice=number % 3)
        if number % 11 == 3:
            box.history.flush()
        if number in (200, 500):
            box.stop()
            box.later(17)
            box.start()
    box.history.flush()

    moments = box.stored()
    minutes = folded(pieces(moments, moments[-1].at, 60, HOLD_SECONDS), 60)
    assert [one.at for one in box.stored(Level.MINUTE)] == [one.at for one in minutes]
    for one, expected in zip(box.stored(Level.MINUTE), minutes, strict=True):
        assert one.gpus[1].taken_max_bytes == expected.gpus[1].taken_max_bytes
        assert one.gpus[1].taken_bytes == pytest.approx(expected.gpus[1].taken_bytes, rel=1e-4)
    (first, *_), highest = box.stored(Level.HOUR), [one.gpus[1].taken_max_bytes for one in minutes if one.gpus]
    assert first.gpus[1].taken_max_bytes == max(whole(highest[:60]))
    box.stop()


@pytest.mark.parametrize("seconds", [-2.0, -3600.0, -400 * DAY, 3600.0, 400 * DAY])
def test_a_wall_clock_that_jumps_breaks_nothing(tmp_path: Path, seconds: float) -> None:
    box = Box(tmp_path)
    box.turns(300, tts=4)
    box.wall += timedelta(seconds=seconds)
    box.turns(300, tts=8)
    assert box.history.flush() is None
    box.turns(300, tts=8)
    assert box.card(250, 10).columns["taken_bytes"] == [8 * GIB] * len(box.card(250, 10).at)
    assert len(box.card(250, 10).at) >= 25
    box.stop()
    box.start()
    box.turns(60, tts=8)
    assert box.history.flush() is None
    assert all(use.seconds <= 60 for one in box.stored(Level.MINUTE) for use in one.gpus.values())
    box.stop()


def test_a_clock_that_is_put_back_a_little_keeps_moments_in_order(box: Box) -> None:
    for number in range(30):
        box.wall -= timedelta(seconds=6 if number in (10, 20) else 0)
        box.turn(5, tts=1 + number % 2)
    box.history.flush()

    assert [one.gpus[1].taken_bytes for one in box.stored()] == [(1 + number % 2) * GIB for number in range(30)]


def test_the_same_hour_lived_twice_is_told_once(box: Box) -> None:
    box.turns(300, tts=4)
    box.history.flush()
    box.wall -= timedelta(seconds=300)
    box.turns(300, tts=8)
    box.history.flush()
    box.turns(60, tts=8)

    found = box.card(360, 10)
    assert found.at == sorted(set(found.at))
    assert all(4 * GIB <= value <= 8 * GIB for value in whole(found.columns["taken_bytes"]))


# The disk.


def failing(box: Box, problem: bool) -> None:
    """Nobody may write while another program has the file."""
    if problem:
        box.other = sqlite3.connect(box.directory / FILE_NAME, isolation_level=None)  # type: ignore[attr-defined]
        box.other.execute("BEGIN IMMEDIATE")  # type: ignore[attr-defined]
        box.store._connection.execute("PRAGMA busy_timeout = 0")
    else:
        box.other.close()  # type: ignore[attr-defined]


def test_while_another_program_has_the_file_nothing_is_lost_and_reading_goes_on(box: Box) -> None:
    box.turns(60, tts=4)
    box.history.flush()
    failing(box, True)
    box.turns(600, tts=6)
    assert "locked" in str(box.history.flush())
    assert box.card(HOUR, 60).columns["taken_max_bytes"][-1] == 6 * GIB
    failing(box, False)
    assert box.history.flush() is None
    assert len(box.stored()) > 10


def test_a_file_that_became_read_only_is_said_and_ends_nothing(box: Box) -> None:
    box.turns(60, tts=4)
    box.store._connection.execute("PRAGMA query_only = 1")
    assert "readonly" in str(box.history.flush())
    assert box.card(HOUR, 60).columns["taken_max_bytes"] == [4 * GIB]
    box.store._connection.execute("PRAGMA query_only = 0")


def test_a_history_in_memory_answers_too(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    box = Box(tmp_path / "file")
    assert box.store.path is None
    box.turns(600, tts=4)
    box.history.flush()
    box.turn(5, tts=9)
    box.later(5)
    found = box.card(HOUR, 60)
    assert max(whole(found.columns["taken_max_bytes"])) == 9 * GIB
    box.stop()


def test_a_row_that_the_disk_has_spoilt_is_left_out(tmp_path: Path) -> None:
    box = Box(tmp_path)
    for number in range(20):
        box.turn(5, tts=number % 2)
    box.stop()
    with contextlib.closing(sqlite3.connect(tmp_path / FILE_NAME)) as connection, connection:
        bad = (b"", b"\x00" * 40, "text", None)
        places = [at for (at,) in connection.execute("SELECT at FROM samples_raw ORDER BY at")]
        rows = [(value, at) for value, at in zip(bad[:3], places[2:5], strict=True)]
        connection.executemany("UPDATE samples_raw SET body = ? WHERE at = ?", rows)
        connection.execute("UPDATE samples_raw SET body = X'00' WHERE at = ?", (places[-1],))
        connection.execute("INSERT INTO gpus VALUES (77, 'no json')")
    box.start()
    assert len(box.stored()) == len(places) - 4
    box.turns(60, tts=1)
    assert box.card(HOUR, 5).at
    box.stop()


def test_moments_of_more_than_a_day_ago_are_forgotten_and_their_minutes_are_not(tmp_path: Path) -> None:
    box = Box(tmp_path)
    box.turns(600, tts=20)
    box.stop()
    box.later(2 * DAY)
    box.start()
    box.turns(60, tts=4)
    box.history.flush()

    assert box.stored()[0].at > box.now - 100
    assert len(box.stored(Level.MINUTE)) > 10
    found = box.read(3 * DAY, 600)
    assert found.level is Level.MINUTE
    assert whole(found.gpus[0].columns["taken_max_bytes"])[0] == 20 * GIB
    box.stop()


@settings(max_examples=10, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.sampled_from((1.0, 5.0, 70.0))), max_size=12))
def test_a_history_never_grows_beyond_its_bound(tmp_path_factory: pytest.TempPathFactory, work: list[Any]) -> None:
    box = Box(tmp_path_factory.mktemp("state"), most_bytes=100 * 1024)
    for turns, every in work:
        for number in range(turns):
            names = {f"w{number}-{place}-{every}": place % 5 + number % 3 for place in range(12)}
            box.turn(every, **names)
        assert box.history.flush() is None
        with box.store.reading() as connection:
            assert used_bytes(connection) <= 100 * 1024
    box.stop()


@pytest.mark.asyncio
async def test_a_batch_is_written_by_itself_and_what_a_full_disk_lost_is_said_once(tmp_path: Path) -> None:
    box = Box(tmp_path)
    lines: list[str] = []
    told = asyncio.Event()
    sink = logger.add(lambda line: (lines.append(str(line).strip()), told.set()), level="INFO", format="{message}")
    failing(box, True)
    writing = asyncio.create_task(box.history.write_behind())
    try:
        for number in range(MAX_UNWRITTEN + 7):
            box.turn(5, tts=number % 2)
        await told.wait()
        assert lines == ["Samples cannot be written (database is locked): kept in memory until they can"]
        failing(box, False)
        told.clear()
        async with time_flies():
            await told.wait()
        assert lines[1:] == ["Samples are written again, without 7 of the oldest"]
        assert len(box.stored()) == MAX_UNWRITTEN
        for number in range(BATCH_MOMENTS):
            box.turn(5, tts=1 + number % 2)
        async with asyncio.timeout(30):
            while len(await asyncio.to_thread(box.stored)) < MAX_UNWRITTEN + BATCH_MOMENTS:
                pass
    finally:
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        logger.remove(sink)
        box.stop()


def test_what_could_not_be_written_at_the_end_is_said(tmp_path: Path) -> None:
    box = Box(tmp_path)
    box.turn(0, tts=4)
    lines: list[str] = []
    sink = logger.add(lambda line: lines.append(str(line).strip()), format="{level} {message}")
    failing(box, True)
    box.stop()
    failing(box, False)
    logger.remove(sink)
    assert lines == ["WARNING 2 samples could not be written: database is locked"]


def test_whoever_reads_while_it_is_written_sees_every_moment_once(tmp_path: Path) -> None:
    box = Box(tmp_path)
    failures: list[BaseException] = []
    done = threading.Event()
    lock = threading.Lock()

    def write() -> None:
        while not done.is_set():
            if problem := box.history.flush():
                failures.append(AssertionError(problem))

    def read() -> None:
        try:
            while not done.is_set():
                with lock:
                    window = Window(begin=BEGAN, end=box.now, step_seconds=60)
                    series = box.history.read(window, box.now)
                for one in series.gpus:
                    assert all(value == 4 * GIB for value in one.columns["taken_bytes"])
                    assert one.at == sorted(set(one.at))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=target) for target in (write, read, read)]
    for thread in threads:
        thread.start()
    for number in range(600):
        with lock:
            box.remaining = number
            box.turn(5.0, tts=4)
    done.set()
    for thread in threads:
        thread.join(60)
    assert failures == []
    box.history.flush()
    assert len(box.stored()) == 600
    box.stop()


names = st.text(min_size=1, max_size=5)
whole_numbers = st.integers(0, 2**50)
known = st.builds(
    lambda taken, over, free, under, tenants, gauges: GpuUse(
        1.5,
        taken,
        taken + over,
        free,
        free - under,
        3,
        *gauges,
        tenants,
        {name: size + 1 for name, size in tenants.items()},
    ),
    whole_numbers,
    whole_numbers,
    whole_numbers,
    whole_numbers,
    st.dictionaries(names, whole_numbers, max_size=2),
    st.tuples(*[st.one_of(st.none(), st.integers(0, 300), st.floats(0, 500))] * 3),
)
unknown = st.just(GpuUse(0.0, None, None, None, None, 0, 5.0, None, None, {}, {}))


@settings(max_examples=30, deadline=None)
@given(
    st.one_of(st.none(), st.integers(0, 99)), st.dictionaries(st.integers(1, 99), st.one_of(known, unknown), max_size=2)
)
def test_a_sample_comes_back_from_its_row_as_it_was(queue: int | None, gpus: dict[int, GpuUse]) -> None:
    sample = Sample(12.345, queue, gpus)
    assert sample_rows.unpacked(12345, sample_rows.packed(sample)) == sample


def test_a_row_is_small() -> None:
    kinds = ("ollama ollama:llama3.1:8b", "comfyui_in_use comfyui in use", "worker worker:tts", "others others")
    tenants = {name: 1234567890 + place * 98765432 for place, name in enumerate(kinds)}
    taken = sum(tenants.values())
    use = GpuUse(0.0, taken, taken, TOTAL - taken, TOTAL - taken, 0, 47, 61, 271.3, tenants, {})
    assert len(sample_rows.packed(Sample(1.0, 0, {1: use}))) < 130
    assert len(sample_rows.packed(Sample(1.0, 0, dict.fromkeys(range(1, 9), use)))) < 400


def second_hand(box: Box) -> None:
    """A turn at which only ComfyUI tells of the card."""
    box.later(5)
    seen = Gpus(gpus=(gpu(0, "comfyui-0", {}),), driver_version=Missing("told by ComfyUI"), second_hand=True)
    snapshot = Snapshot(taken_at=box.monotonic, gpus=Missing("timed out"), ollama=Off(), comfyui=Off(), queue=Off())
    box.history.turned(snapshot, seen, {})


def test_a_card_that_only_comfyui_tells_of_for_a_while_is_no_further_one(box: Box) -> None:
    box.turns(60, tts=4)
    second_hand(box)
    box.turns(60, tts=4)

    assert [one.device.uuid for one in box.read(200).gpus] == ["GPU-a"]
    assert None in box.card(200, 1).columns["taken_bytes"]


def test_where_nothing_else_tells_of_a_card_comfyuis_word_is_kept(box: Box) -> None:
    for _ in range(5):
        second_hand(box)

    assert [one.device.uuid for one in box.read(60).gpus] == ["comfyui-0"]
