"""The SQLite file under VRAM_STATE_DIR: what happened, so that a restart forgets nothing.

Every call here blocks; the journal makes them in a worker thread. A database that is corrupt is set aside under
another name, one that cannot be written gives way to memory; `problem` says so in words.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

FILE_NAME = "history.sqlite3"
# About 300 bytes a row: some 30 MB at most. Older rows are dropped.
MAX_EVENTS = 100_000

_SCHEMA = """
CREATE TABLE IF NOT EXISTS events (seq INTEGER PRIMARY KEY, at TEXT NOT NULL, type TEXT NOT NULL, body TEXT NOT NULL);
"""
# Named, as a newer version may have added some.
_COLUMNS = "seq, at, type, body"


@dataclass(frozen=True, slots=True)
class Row:
    """One event as stored: `at` is RFC 3339 UTC, `body` its JSON."""

    seq: int
    at: str
    type: str
    body: str


class Store:
    """An open history. Not thread-safe: one call at a time."""

    def __init__(self, connection: sqlite3.Connection, path: Path | None, problem: str | None) -> None:
        self._connection = connection
        self.path = path
        self.problem = problem

    @classmethod
    def open(cls, directory: Path) -> Store:
        """The history in `directory`; in memory, with a `problem`, when it cannot be had there."""
        path = directory / FILE_NAME
        problem: str | None = None
        try:
            directory.mkdir(parents=True, exist_ok=True)
            try:
                return cls(_connect(str(path)), path, None)
            except sqlite3.DatabaseError as error:
                if isinstance(error, sqlite3.OperationalError):
                    raise
                aside = _set_aside(path)
                problem = f"{path} was damaged ({error}): set aside as {aside.name}, history starts anew"
                return cls(_connect(str(path)), path, problem)
        except (OSError, sqlite3.Error) as error:
            problem = f"{directory} cannot be written ({error}): history is kept in memory and ends with this process"
            return cls(_connect(":memory:"), None, problem)

    def append(self, rows: Iterable[Row]) -> None:
        """Stores `rows` at once or not at all. Raises sqlite3.Error, for example when the disk is full."""
        with self._connection:
            self._connection.executemany(
                f"INSERT OR REPLACE INTO events ({_COLUMNS}) VALUES (?, ?, ?, ?)",
                [(row.seq, row.at, row.type, row.body) for row in rows],
            )
            self._connection.execute("DELETE FROM events WHERE seq <= (SELECT max(seq) FROM events) - ?", (MAX_EVENTS,))

    def newest(self, limit: int) -> list[Row]:
        """The newest `limit` events, oldest first."""
        newest = f"SELECT {_COLUMNS} FROM events ORDER BY seq DESC LIMIT ?"
        found = self._connection.execute(newest, (limit,)).fetchall()
        return [Row(*row) for row in reversed(found)]

    def close(self) -> None:
        self._connection.close()


def _connect(name: str) -> sqlite3.Connection:
    # Every call comes through the journal's single writer, though not always on the same worker thread.
    connection = sqlite3.connect(name, timeout=2.0, check_same_thread=False)
    # SQLite does not check what is inside a text: bytes that are none make one row unreadable, not the history.
    connection.text_factory = lambda raw: raw.decode(errors="replace")
    try:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.executescript(_SCHEMA)
        verdict = connection.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != ("ok",):
            raise sqlite3.DatabaseError(str(verdict[0]))
        connection.execute(f"SELECT {_COLUMNS} FROM events LIMIT 0")
        connection.execute("BEGIN IMMEDIATE")
        connection.rollback()
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def _set_aside(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    path.rename(aside)
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    return aside
