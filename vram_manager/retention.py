"""How long the history is kept, and how large it may become: the oldest goes first.

What counts is pages in use. The file itself does not shrink, but what is free in it is used again.
"""

from __future__ import annotations

import sqlite3

DAY_MS = 86_400_000
# How long moments, minutes and hours are kept, in ms. Hours are few; they make long windows quick.
KEPT_MS = {"samples_raw": DAY_MS, "samples_minute": 31 * DAY_MS, "samples_hour": 31 * DAY_MS}
# An hour and a day of them, at least: before that, events go.
_ROWS_LEFT = {"samples_raw": 3600, "samples_minute": 1440}
# As many as a daemon reads when it starts.
_EVENTS_LEFT = 1000
_ROWS_AT_ONCE = 256


def used_bytes(connection: sqlite3.Connection) -> int:
    """What all tables and indices take, what is not yet committed among it."""
    return _pragma(connection, "page_size") * (
        _pragma(connection, "page_count") - _pragma(connection, "freelist_count")
    )


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    return int(connection.execute(f"PRAGMA {name}").fetchone()[0])


def expire(connection: sqlite3.Connection, now_ms: int) -> None:
    """Deletes the samples whose time is over."""
    for table, kept_ms in KEPT_MS.items():
        connection.execute(f"DELETE FROM {table} WHERE at < ?", (now_ms - kept_ms,))


def keep_within(connection: sqlite3.Connection, most_bytes: int) -> None:
    """Deletes the oldest where more is used than `most_bytes`: samples, then events. Leases and peaks stay."""
    if used_bytes(connection) > most_bytes:
        # A little more, so that the next write finds room.
        goal = most_bytes - most_bytes // 64
        while used_bytes(connection) > goal and _delete_some(connection):
            pass


def _delete_some(connection: sqlite3.Connection) -> bool:
    """The oldest of what is worth least; False: nothing is left."""
    long = [table for table, rows in _ROWS_LEFT.items() if _has_more(connection, table, rows)]
    if long:
        return _delete_oldest(connection, max(long, key=lambda table: _reach(connection, table)))
    if _has_more(connection, "events", _EVENTS_LEFT):
        return _delete_oldest(connection, "events")
    return any(_delete_oldest(connection, table) for table in (*KEPT_MS, "events"))


def _has_more(connection: sqlite3.Connection, table: str, rows: int) -> bool:
    # rowid is seq of events, and at of samples.
    found = connection.execute(f"SELECT 1 FROM {table} ORDER BY rowid DESC LIMIT 1 OFFSET ?", (rows,))
    return found.fetchone() is not None


def _reach(connection: sqlite3.Connection, table: str) -> float:
    """How far back it goes, as a part of how long it is kept: of two, both shrink alike."""
    oldest, newest = connection.execute(f"SELECT min(at), max(at) FROM {table}").fetchone()
    return float(newest - oldest) / KEPT_MS[table]


def _delete_oldest(connection: sqlite3.Connection, table: str) -> bool:
    oldest = f"SELECT rowid FROM {table} ORDER BY rowid LIMIT {_ROWS_AT_ONCE}"
    return connection.execute(f"DELETE FROM {table} WHERE rowid IN ({oldest})").rowcount > 0
