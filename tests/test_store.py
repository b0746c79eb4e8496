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

from vram_manager.errors import AlreadyRunning
from vram_manager.store import FILE_NAME, MAX_EVENTS, MAX_PEAKS, Peak, Row, Store, alone_in


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
