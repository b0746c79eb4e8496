"""The SQLite file under VRAM_STATE_DIR: what happened and what was seen, so that a restart forgets nothing.

Every write keeps the whole of it within its bound (`retention`). Every call here blocks; whoever writes does so in a
worker thread. A database that is corrupt is set aside under another name, one that cannot be written gives way to
memory; `problem` says so in words.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from vram_manager.errors import AlreadyRunning
from vram_manager.retention import keep_within

FILE_NAME = "history.sqlite3"
RETRY_SECONDS = 5.0
# About 300 bytes a row: some 30 MB at most. Older rows are dropped.
MAX_EVENTS = 100_000
# About 100 bytes a row. All are read at the start, in some 20 ms.
MAX_PEAKS = 10_000
MOST_BYTES = 128 * 2**20
# Where there is no disk: it then is part of the daemon's own memory.
MOST_BYTES_IN_MEMORY = 8 * 2**20
# What the write-ahead log takes beside the file, more or less: SQLite's own 1000 pages would be 4 MiB.
_WAL_PAGES = 256

_SCHEMA = """
CREATE TABLE IF NOT EXISTS events (seq INTEGER PRIMARY KEY, at TEXT NOT NULL, type TEXT NOT NULL, body TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS peaks (subject TEXT NOT NULL, at TEXT NOT NULL, peak_bytes INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS leases (id TEXT PRIMARY KEY, body TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS floors (id TEXT PRIMARY KEY, body TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS events_at ON events (at);
CREATE TABLE IF NOT EXISTS gpus (id INTEGER PRIMARY KEY, body TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS samples_raw (at INTEGER PRIMARY KEY, body BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS samples_minute (at INTEGER PRIMARY KEY, body BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS samples_hour (at INTEGER PRIMARY KEY, body BLOB NOT NULL);
"""
# Named, as a newer version may have added some.
_COLUMNS = "seq, at, type, body"
_PEAK_COLUMNS = "subject, at, peak_bytes"


@dataclass(frozen=True, slots=True)
class Row:
    """One event as stored: `at` is RFC 3339 UTC, `body` its JSON."""

    seq: int
    at: str
    type: str
    body: str


@dataclass(frozen=True, slots=True)
class Peak:
    """The most memory that one run of `subject` held; `at` is RFC 3339 UTC."""

    subject: str
    at: str
    peak_bytes: int


async def write_behind(
    due: asyncio.Event,
    flush: Callable[[], str | None],
    failing: Callable[[str], object],
    again: Callable[[], object],
) -> None:
    """Calls `flush` in a worker thread whenever `due` is set, until cancelled.

    While it says what went wrong it is tried again every RETRY_SECONDS; `failing` is told once, and `again` once it
    works again.
    """
    failed = False
    while True:
        await due.wait()
        due.clear()
        problem = await asyncio.to_thread(flush)
        if problem and not failed:
            failing(problem)
        if failed and not problem:
            again()
        failed = problem is not None
        if failed:
            await asyncio.sleep(RETRY_SECONDS)
            due.set()


@contextlib.contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """Nobody else keeps their history in `directory` meanwhile. Raises AlreadyRunning.

    Two daemons would promise the same memory, and write each other's leases. The lock ends with the process.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / "lock").open("a")
    except OSError:
        # Nothing can be kept there, so there is nothing to share.
        yield
        return
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            words = f"VRAM_STATE_DIR={directory} is in use by another vram-manager: only one may act on a GPU"
            raise AlreadyRunning(words) from error
        except OSError:
            pass  # a file system without locks
        yield


class Store:
    """An open history. Any thread may call; one call waits for another."""

    def __init__(
        self, connection: sqlite3.Connection, path: Path | None, problem: str | None, most_bytes: int = MOST_BYTES
    ) -> None:
        self._connection = connection
        self._one_at_a_time = threading.Lock()
        self._most_bytes = most_bytes
        self.path = path
        self.problem = problem

    @classmethod
    def open(cls, directory: Path, most_bytes: int = MOST_BYTES) -> Store:
        """The history in `directory`; in memory, with a `problem`, when it cannot be had there.

        It takes `most_bytes` at most, in memory MOST_BYTES_IN_MEMORY: the oldest makes room.
        """
        path = directory / FILE_NAME
        problem: str | None = None
        try:
            directory.mkdir(parents=True, exist_ok=True)
            try:
                return cls(_connect(str(path)), path, None, most_bytes)
            except sqlite3.DatabaseError as error:
                if isinstance(error, sqlite3.OperationalError):
                    raise
                aside = _set_aside(path)
                problem = f"{path} was damaged ({error}): set aside as {aside.name}, history starts anew"
                return cls(_connect(str(path)), path, problem, most_bytes)
        except (OSError, sqlite3.Error) as error:
            problem = f"{directory} cannot be written ({error}): history is kept in memory and ends with this process"
            return cls(_connect(":memory:"), None, problem, min(most_bytes, MOST_BYTES_IN_MEMORY))

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """What is written inside the block is there at once or not at all, and within the bound. Others wait."""
        with self._one_at_a_time, self._connection:
            yield self._connection
            keep_within(self._connection, self._most_bytes)

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """One moment of the history; nobody who writes waits for the block, unless it is kept in memory."""
        if self.path is None:
            with self._one_at_a_time:
                yield self._connection
            return
        # One that stays open would keep pages in memory.
        with contextlib.closing(sqlite3.connect(f"{self.path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            connection.text_factory = _text
            connection.execute("BEGIN")
            yield connection

    def append(self, rows: Iterable[Row]) -> None:
        """Stores `rows` at once or not at all. Raises sqlite3.Error, for example when the disk is full."""
        with self.writing() as connection:
            connection.executemany(
                f"INSERT OR REPLACE INTO events ({_COLUMNS}) VALUES (?, ?, ?, ?)",
                [(row.seq, row.at, row.type, row.body) for row in rows],
            )
            connection.execute("DELETE FROM events WHERE seq <= (SELECT max(seq) FROM events) - ?", (MAX_EVENTS,))

    def newest(self, limit: int) -> list[Row]:
        """The newest `limit` events, oldest first."""
        newest = f"SELECT {_COLUMNS} FROM events ORDER BY seq DESC LIMIT ?"
        with self._one_at_a_time:
            found = self._connection.execute(newest, (limit,)).fetchall()
        return [Row(*row) for row in reversed(found)]

    def between(self, begin: str, end: str, limit: int) -> list[Row]:
        """The newest `limit` events from `begin` until before `end`, oldest first."""
        within = f"SELECT {_COLUMNS} FROM events WHERE at >= ? AND at < ? ORDER BY at DESC, seq DESC LIMIT ?"
        with self.reading() as connection:
            found = connection.execute(within, (begin, end, limit)).fetchall()
        return [Row(*row) for row in reversed(found)]

    def leases(self) -> dict[str, str]:
        """The live leases of the last run, as JSON by id."""
        return self._bodies("leases")

    def save_leases(self, bodies: Mapping[str, str | None]) -> None:
        """Writes leases by id, None for one that is over, at once or not at all. Raises sqlite3.Error."""
        self._save("leases", bodies)

    def floors(self) -> dict[str, str]:
        """What tenants kept, as JSON by tenant and measure."""
        return self._bodies("floors")

    def save_floors(self, bodies: Mapping[str, str | None]) -> None:
        """Writes floors by id, None for one that is forgotten, at once or not at all. Raises sqlite3.Error."""
        self._save("floors", bodies)

    def _bodies(self, table: str) -> dict[str, str]:
        with self._one_at_a_time:
            return dict(self._connection.execute(f"SELECT id, body FROM {table}").fetchall())

    def _save(self, table: str, bodies: Mapping[str, str | None]) -> None:
        with self.writing() as connection:
            connection.executemany(
                f"INSERT OR REPLACE INTO {table} (id, body) VALUES (?, ?)",
                [(key, body) for key, body in bodies.items() if body is not None],
            )
            connection.executemany(
                f"DELETE FROM {table} WHERE id = ?", [(key,) for key, body in bodies.items() if body is None]
            )

    def add_peaks(self, peaks: Iterable[Peak]) -> None:
        """Stores `peaks` at once or not at all. Raises sqlite3.Error."""
        with self.writing() as connection:
            connection.executemany(
                f"INSERT INTO peaks ({_PEAK_COLUMNS}) VALUES (?, ?, ?)",
                [(peak.subject, peak.at, peak.peak_bytes) for peak in peaks],
            )
            connection.execute("DELETE FROM peaks WHERE rowid <= (SELECT max(rowid) FROM peaks) - ?", (MAX_PEAKS,))

    def peaks(self) -> list[Peak]:
        """All that are kept, oldest first."""
        with self._one_at_a_time:
            found = self._connection.execute(f"SELECT {_PEAK_COLUMNS} FROM peaks ORDER BY rowid").fetchall()
        return [Peak(*peak) for peak in found]

    def close(self) -> None:
        with self._one_at_a_time:
            self._connection.close()


def _connect(name: str) -> sqlite3.Connection:
    # Calls come from worker threads, never two at a time (Store has a lock).
    connection = sqlite3.connect(name, timeout=2.0, check_same_thread=False)
    connection.text_factory = _text
    try:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        # KiB of pages that are kept in memory; by default 2 MiB, which a history that is mostly written has no use for.
        connection.execute("PRAGMA cache_size=-256")
        connection.execute(f"PRAGMA wal_autocheckpoint={_WAL_PAGES}")
        connection.execute(f"PRAGMA journal_size_limit={_WAL_PAGES * 4096}")
        connection.executescript(_SCHEMA)
        verdict = connection.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != ("ok",):
            raise sqlite3.DatabaseError(str(verdict[0]))
        connection.execute(f"SELECT {_COLUMNS} FROM events LIMIT 0")
        connection.execute(f"SELECT {_PEAK_COLUMNS} FROM peaks LIMIT 0")
        for table in ("floors.id", "gpus.id", "samples_raw.at", "samples_minute.at", "samples_hour.at"):
            connection.execute(f"SELECT {table}, body FROM {table.partition('.')[0]} LIMIT 0")
        connection.execute("BEGIN IMMEDIATE")
        connection.rollback()
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def _text(raw: bytes) -> str:
    """SQLite does not check what is inside a text: bytes that are none make one row unreadable, not the history."""
    return raw.decode(errors="replace")


def _set_aside(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    path.rename(aside)
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    return aside
