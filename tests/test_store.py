"""The history on disk: what was written is there after a restart, and a disk in trouble ends nothing."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vram_manager.errors import AlreadyRunning
from vram_manager.retention import DAY_MS, expire, used_bytes
from vram_manager.store import (
    FILE_NAME,
    MAX_EVENTS,
    MAX_PEAKS,
    MOST_BYTES_IN_MEMORY,
    Peak,
    Row,
    Store,
    alone_in,
)


def row(seq: int, body: str = "{}") -> Row:
    return Row(seq=seq, at="2026-07-01T12:00:00.000Z", type="freed", body=body)


@contextlib.contextmanager
def history(directory: Path) -> Iterator[Store]:
    store = Store.open(directory)
    try:
        yield store
    finally:
        store.close()


@contextlib.contextmanager
def nobody() -> Iterator[None]:
    """Without root's right to write everywhere."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def read_only() -> Iterator[Path]:
    """A directory that anybody may read and nobody but root may write."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o555)
        yield directory
        directory.chmod(0o755)


def test_what_was_appended_is_there_after_a_restart_oldest_first(tmp_path: Path):
    with history(tmp_path) as store:
        store.append([row(1), row(2)])
        store.append([row(3)])
    with history(tmp_path) as store:
        assert store.newest(10) == [row(1), row(2), row(3)]
        assert store.newest(2) == [row(2), row(3)]
        assert store.problem is None


def test_the_directory_is_made_with_all_its_parents(tmp_path: Path):
    with history(tmp_path / "a" / "b") as store:
        assert store.path == tmp_path / "a" / "b" / FILE_NAME
        assert store.problem is None


def test_rows_come_back_exactly(tmp_path: Path):
    odd = row(1, body='{"reason": "ü \\u2028 \'\\" ; DROP TABLE events"}')
    with history(tmp_path) as store:
        store.append([odd])
    with history(tmp_path) as store:
        assert store.newest(1) == [odd]


def test_the_oldest_events_make_room_for_new_ones(tmp_path: Path):
    with history(tmp_path) as store:
        store.append([row(1), row(2)])
        store.append([row(MAX_EVENTS + 1)])
        assert [kept.seq for kept in store.newest(10)] == [2, MAX_EVENTS + 1]


def test_a_batch_is_stored_at_once_or_not_at_all(tmp_path: Path):
    with history(tmp_path) as store:
        with pytest.raises(sqlite3.Error):
            store.append([row(1), Row(seq=2, at=None, type="freed", body="{}")])  # type: ignore[arg-type]
        assert store.newest(10) == []


def written(directory: Path) -> Path:
    """A history of 200 events."""
    with history(directory) as store:
        store.append([row(number, body='{"reason": "' + "x" * 200 + '"}') for number in range(200)])
    return directory / FILE_NAME


def garbage(path: Path) -> None:
    path.write_bytes(b"this is no database at all, and it is long enough to be looked at" * 20)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def a_torn_page(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4096:12288] = os.urandom(8192)
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [garbage, cut_off, a_torn_page])
def test_a_damaged_history_is_set_aside_and_a_new_one_begins(tmp_path: Path, damage):
    path = written(tmp_path)
    damage(path)
    damaged = path.read_bytes()
    with history(tmp_path) as store:
        assert store.problem is not None
        assert "was damaged" in store.problem
        assert f"{FILE_NAME}.damaged-1" in store.problem
        assert store.path == path
        assert store.newest(10) == []
        store.append([row(1)])
    assert (tmp_path / f"{FILE_NAME}.damaged-1").read_bytes() == damaged
    with history(tmp_path) as store:
        assert store.problem is None
        assert store.newest(10) == [row(1)]


def test_each_damaged_history_keeps_a_name_of_its_own(tmp_path: Path):
    for number in (1, 2, 3):
        garbage(tmp_path / FILE_NAME)
        with history(tmp_path) as store:
            assert store.problem is not None
        assert (tmp_path / f"{FILE_NAME}.damaged-{number}").exists()


def test_an_empty_file_is_a_new_history_and_no_damage(tmp_path: Path):
    (tmp_path / FILE_NAME).touch()
    with history(tmp_path) as store:
        assert store.problem is None


def test_bytes_that_are_no_text_do_not_keep_the_daemon_from_starting(tmp_path: Path):
    """SQLite's own check does not look inside a text."""
    path = written(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"x" * 200, b"\xff" * 200, 1))
    with history(tmp_path) as store:
        assert len(store.newest(1000)) == 200


def test_a_column_that_a_newer_version_added_is_left_alone(tmp_path: Path):
    path = written(tmp_path)
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("ALTER TABLE events ADD COLUMN node TEXT")
    with history(tmp_path) as store:
        assert store.problem is None
        store.append([row(500)])
        assert store.newest(1) == [row(500)]


def test_a_table_of_that_name_with_other_columns_gives_way_to_memory_and_says_so(tmp_path: Path):
    with contextlib.closing(sqlite3.connect(tmp_path / FILE_NAME)) as connection, connection:
        connection.execute("CREATE TABLE events (what TEXT)")
    with history(tmp_path) as store:
        assert store.path is None
        assert store.problem is not None
        store.append([row(1)])
        assert store.newest(10) == [row(1)]


def under_a_file(tmp_path: Path) -> Path:
    (tmp_path / "file").touch()
    return tmp_path / "file" / "state"


def where_the_history_is_a_directory(tmp_path: Path) -> Path:
    (tmp_path / FILE_NAME).mkdir()
    return tmp_path


@pytest.mark.parametrize("place", [under_a_file, where_the_history_is_a_directory])
def test_where_it_cannot_be_written_history_is_kept_in_memory_and_says_so(tmp_path: Path, place):
    directory = place(tmp_path)
    with history(directory) as store:
        assert store.path is None
        assert store.problem is not None
        assert store.problem.startswith(f"{directory} cannot be written (")
        assert "kept in memory" in store.problem
        store.append([row(1)])
        assert store.newest(10) == [row(1)]


def test_a_read_only_directory_gives_way_to_memory(read_only: Path):
    with nobody(), history(read_only) as store:
        assert store.path is None
        assert store.problem is not None
        store.append([row(1)])
        assert store.newest(10) == [row(1)]


def test_a_history_that_may_be_read_and_not_written_gives_way_to_memory(read_only: Path):
    read_only.chmod(0o755)
    written(read_only).chmod(0o444)
    read_only.chmod(0o555)
    with nobody(), history(read_only) as store:
        assert store.path is None
        assert store.problem is not None


def test_a_damaged_history_in_a_read_only_directory_gives_way_to_memory(read_only: Path):
    read_only.chmod(0o755)
    garbage(read_only / FILE_NAME)
    read_only.chmod(0o555)
    with nobody(), history(read_only) as store:
        assert store.path is None
        assert store.problem is not None


def peak(number: int, subject: str = "model:46e0:4096") -> Peak:
    return Peak(subject=subject, at="2026-07-01T12:00:00.000Z", peak_bytes=number)


def test_measured_peaks_are_there_after_a_restart_oldest_first(tmp_path: Path):
    with history(tmp_path) as store:
        store.add_peaks([peak(3), peak(1)])
        store.add_peaks([peak(2, "workflow:ü'")])
    with history(tmp_path) as store:
        assert store.peaks() == [peak(3), peak(1), peak(2, "workflow:ü'")]


def test_the_oldest_peaks_make_room_for_new_ones(tmp_path: Path):
    with history(tmp_path) as store:
        store.add_peaks(peak(number) for number in range(1, MAX_PEAKS + 4))
        kept = store.peaks()
    assert (len(kept), kept[0], kept[-1]) == (MAX_PEAKS, peak(4), peak(MAX_PEAKS + 3))


def test_peaks_are_stored_at_once_or_not_at_all(tmp_path: Path):
    with history(tmp_path) as store:
        with pytest.raises(sqlite3.Error):
            store.add_peaks([peak(1), Peak(subject="x", at="y", peak_bytes=None)])  # type: ignore[arg-type]
        assert store.peaks() == []


def test_a_history_from_before_there_were_peaks_gets_room_for_them(tmp_path: Path):
    path = written(tmp_path)
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("DROP TABLE peaks")
    with history(tmp_path) as store:
        assert store.problem is None
        store.add_peaks([peak(1)])
        assert (store.peaks(), len(store.newest(1000))) == ([peak(1)], 200)


def test_a_table_of_peaks_with_other_columns_gives_way_to_memory_and_says_so(tmp_path: Path):
    with contextlib.closing(sqlite3.connect(tmp_path / FILE_NAME)) as connection, connection:
        connection.execute("CREATE TABLE peaks (what TEXT)")
    with history(tmp_path) as store:
        assert store.path is None
        assert "no such column" in str(store.problem)


def test_threads_that_write_and_read_at_once_lose_nothing(tmp_path: Path):
    def work(number: int) -> None:
        try:
            for turn in range(40):
                store.add_peaks([peak(1, f"{number}")])
                store.append([row(number * 1000 + turn)])
                store.newest(5)
                store.peaks()
                if turn % 10 == 9:
                    with contextlib.suppress(sqlite3.IntegrityError):  # it rolls back, and nobody else's with it
                        store.append([Row(seq=9, at=None, type="x", body="")])  # type: ignore[arg-type]
        except BaseException as error:
            failures.append(error)

    failures: list[BaseException] = []
    with history(tmp_path) as store:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert failures == []
        assert len(store.peaks()) == len(store.newest(1000)) == 160


def test_two_daemons_do_not_share_one_directory(tmp_path: Path):
    with alone_in(tmp_path), pytest.raises(AlreadyRunning, match=f"VRAM_STATE_DIR={tmp_path} is in use by another"):
        alone_in(tmp_path).__enter__()
    with alone_in(tmp_path):
        pass


def test_a_directory_that_cannot_be_had_keeps_nobody_out(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with alone_in(tmp_path / "file" / "state"), alone_in(tmp_path / "file" / "state"):
        pass


MIB = 2**20
MINUTE_MS = 60_000
BODY = os.urandom(600)


def put(store: Store, table: str, ats: range, body: bytes = BODY) -> None:
    """Rows of samples at these milliseconds."""
    with store.writing() as connection:
        connection.executemany(f"INSERT OR REPLACE INTO {table} VALUES (?, ?)", [(at, body) for at in ats])


def used(store: Store) -> int:
    with store.reading() as connection:
        return used_bytes(connection)


def ats(store: Store, table: str) -> list[int]:
    with store.reading() as connection:
        return [at for (at,) in connection.execute(f"SELECT at FROM {table} ORDER BY at")]


def seqs(store: Store) -> list[int]:
    return [kept.seq for kept in store.newest(MAX_EVENTS)]


def test_the_oldest_moments_and_minutes_make_room_each_as_far_as_it_reaches(tmp_path: Path):
    with contextlib.closing(Store.open(tmp_path, 8 * MIB)) as store:
        put(store, "samples_raw", range(0, DAY_MS, 14_400))
        put(store, "samples_minute", range(0, 6000 * MINUTE_MS, MINUTE_MS))
        put(store, "samples_raw", range(DAY_MS, 2 * DAY_MS, 14_400))
        raw, minutes = ats(store, "samples_raw"), ats(store, "samples_minute")
        assert used(store) <= 8 * MIB
    assert raw == list(range(raw[0], 2 * DAY_MS, 14_400))
    assert minutes == list(range(minutes[0], 6000 * MINUTE_MS, MINUTE_MS))
    assert (len(raw) >= 3600, len(minutes) >= 1440) == (True, True)
    assert raw[0] > 0


def test_an_hour_of_moments_outlives_older_events_and_a_thousand_events_outlive_all_samples(tmp_path: Path):
    with contextlib.closing(Store.open(tmp_path, 8 * MIB)) as store:
        put(store, "samples_raw", range(3000))
        for first in range(1, 40_000, 10_000):
            store.append([row(first + number, body="x" * 400) for number in range(10_000)])
        assert used(store) <= 8 * MIB
        assert len(ats(store, "samples_raw")) == 3000
        assert 1000 <= len(seqs(store)) < 20_000
        assert seqs(store)[-1] == 40_000
        put(store, "samples_hour", range(40_000))
        assert used(store) <= 8 * MIB
        assert ats(store, "samples_raw") == []
        assert len(seqs(store)) >= 744


def test_even_events_make_room_where_nothing_else_is_left(tmp_path: Path):
    with contextlib.closing(Store.open(tmp_path, 8 * MIB)) as store:
        store.append([row(number, body="x" * 20_000) for number in range(1, 901)])
        assert used(store) <= 8 * MIB
        assert seqs(store)[-1] == 900


WRITES = st.lists(
    st.tuples(
        st.sampled_from(("samples_raw", "samples_minute", "samples_hour", "events", "peaks")),
        st.integers(-(2**40), 2**42),
        st.integers(1, 2000),
        st.integers(0, 3000),
    ),
    max_size=8,
)


@given(WRITES)
@settings(max_examples=25, deadline=None)
def test_no_sequence_of_writes_goes_beyond_the_bound(writes: list[tuple[str, int, int, int]]):
    most = 512 * 1024
    with tempfile.TemporaryDirectory() as name, contextlib.closing(Store.open(Path(name), most)) as store:
        for table, first, count, size in writes:
            if table == "events":
                store.append([row(first + number, body="x" * size) for number in range(count)])
            elif table == "peaks":
                store.add_peaks([peak(number) for number in range(min(count, 500))])
            else:
                put(store, table, range(first, first + count * 1000, 1000), BODY[:size])
            assert used(store) <= most


def test_the_log_beside_the_file_stays_small(tmp_path: Path):
    with contextlib.closing(Store.open(tmp_path)) as store:
        for turn in range(200):
            put(store, "samples_raw", range(turn * 100, turn * 100 + 100))
        log = (tmp_path / f"{FILE_NAME}-wal").stat().st_size
        assert used(store) > 10 * MIB
    assert log < 2 * MIB


def test_a_history_in_memory_takes_no_more_than_memory_has_for_it(tmp_path: Path):
    (tmp_path / "file").touch()
    with contextlib.closing(Store.open(tmp_path / "file")) as store:
        assert store.path is None
        put(store, "samples_raw", range(40_000))
        assert MOST_BYTES_IN_MEMORY * 0.9 < used(store) <= MOST_BYTES_IN_MEMORY
        assert ats(store, "samples_raw")[-1] == 39_999


def test_moments_are_kept_for_a_day_minutes_and_hours_for_a_month(tmp_path: Path):
    now = 100 * DAY_MS
    with history(tmp_path) as store:
        for table in ("samples_raw", "samples_minute", "samples_hour"):
            put(store, table, range(0, now, DAY_MS // 2))
        with store.writing() as connection:
            expire(connection, now)
        assert ats(store, "samples_raw")[0] == now - DAY_MS
        assert ats(store, "samples_minute")[0] == ats(store, "samples_hour")[0] == now - 31 * DAY_MS


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path):
    with history(tmp_path) as store:
        with pytest.raises(sqlite3.Error):
            put(store, "samples_raw", range(3), None)  # type: ignore[arg-type]
        put(store, "samples_minute", range(3))
        assert (ats(store, "samples_raw"), len(ats(store, "samples_minute"))) == ([], 3)


def test_whoever_reads_sees_one_moment_and_keeps_no_writer_waiting(tmp_path: Path):
    with history(tmp_path) as store:
        put(store, "samples_raw", range(3))
        with store.reading() as connection:
            count = "SELECT count(*) FROM samples_raw"
            assert connection.execute(count).fetchone() == (3,)
            put(store, "samples_raw", range(10))
            assert connection.execute(count).fetchone() == (3,)
            with pytest.raises(sqlite3.OperationalError, match="readonly"):
                connection.execute("DELETE FROM samples_raw")
        assert len(ats(store, "samples_raw")) == 10


def test_a_directory_with_odd_characters_can_be_read(tmp_path: Path):
    with history(tmp_path / "a ?b#c%20") as store:
        put(store, "samples_raw", range(3))
        assert len(ats(store, "samples_raw")) == 3


def test_events_are_found_by_their_time_the_newest_first_to_be_told(tmp_path: Path):
    def at(number: int) -> str:
        return f"2026-07-01T12:00:{number:02}.000Z"

    with history(tmp_path) as store:
        store.append([Row(seq=number, at=at(number), type="freed", body="{}") for number in range(1, 31)])
        assert [found.seq for found in store.between(at(5), at(9), 100)] == [5, 6, 7, 8]
        assert [found.seq for found in store.between(at(5), at(25), 3)] == [22, 23, 24]
        assert store.between(at(40), at(50), 3) == []


def test_a_history_from_before_there_were_samples_gets_room_for_them(tmp_path: Path):
    path = written(tmp_path)
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        for table in ("gpus", "samples_raw", "samples_minute", "samples_hour"):
            connection.execute(f"DROP TABLE {table}")
        connection.execute("DROP INDEX events_at")
    with history(tmp_path) as store:
        assert store.problem is None
        put(store, "samples_minute", range(3))
        assert len(store.between("2026", "2027", 1000)) == 200


def test_a_table_of_samples_with_other_columns_gives_way_to_memory_and_says_so(tmp_path: Path):
    with contextlib.closing(sqlite3.connect(tmp_path / FILE_NAME)) as connection, connection:
        connection.execute("CREATE TABLE samples_minute (what TEXT)")
    with history(tmp_path) as store:
        assert store.path is None
        assert "no such column" in str(store.problem)
        put(store, "samples_minute", range(3))
        assert len(ats(store, "samples_minute")) == 3
