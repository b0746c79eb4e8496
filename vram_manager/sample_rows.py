"""Samples in SQLite: a row is a moment, a minute or an hour of all GPUs, as compressed JSON.

Minutes and hours are made from what is written already, not from what a process remembers: whoever was killed in the
middle of one has lost nothing of it.
"""

from __future__ import annotations

import json
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise

from vram_manager.domain.sample import Device, GpuUse, Level, Sample
from vram_manager.policy.series import folded, pieces

_TABLES = {Level.RAW: "samples_raw", Level.MINUTE: "samples_minute", Level.HOUR: "samples_hour"}
# What most rows have in common, so that a short one shrinks too. Never to be changed: rows are unpacked with it.
_COMMON = (
    b'0,null,null,null,{"process process:python3":,"worker worker:":,"process process:Xorg":,"process process:gnome-'
    b'shell":,"comfyui_unseen comfyui unseen":,"comfyui_cached comfyui cached":,"comfyui_in_use comfyui in use":,'
    b'"ollama ollama:llama3.1:8b":,"ollama ollama:qwen2.5:7b-instruct":,"others others":},{}]}][null,{"1":[0,[60.0,'
)


def packed(sample: Sample) -> bytes:
    """Its body as stored: the queue, then the use of each GPU; extremes as their distance."""
    gpus = {
        number: [
            round(use.seconds, 3),
            use.taken_bytes,
            _distance(use.taken_max_bytes, use.taken_bytes),
            use.free_bytes,
            _distance(use.free_bytes, use.free_min_bytes),
            *use[5:],
        ]
        for number, use in sample.gpus.items()
    }
    packer = zlib.compressobj(zdict=_COMMON)
    return packer.compress(json.dumps([sample.queue, gpus], separators=(",", ":")).encode()) + packer.flush()


def _distance(more: int | None, less: int | None) -> int | None:
    return None if more is None or less is None else more - less


def unpacked(at_ms: int, body: bytes, only: int | None = None) -> Sample | None:
    """The sample, of `only` one GPU if that is all that is wanted.

    None where the disk has spoilt it, or a newer version wrote what this one cannot read.
    """
    try:
        unpacker = zlib.decompressobj(zdict=_COMMON)
        queue, gpus = json.loads(unpacker.decompress(body))
        if only is not None:
            gpus = {only: gpus[str(only)]} if str(only) in gpus else {}
        return Sample(at_ms / 1000, queue, {int(number): _use(*fields) for number, fields in gpus.items()})
    except (zlib.error, ValueError, TypeError, AttributeError):
        return None


def _use(
    seconds: float, taken: int | None, over: int | None, free: int | None, under: int | None, *rest: object
) -> GpuUse:
    known = taken is not None and free is not None and over is not None and under is not None
    extremes = (taken + over, free, free - under) if known else (None, None, None)  # type: ignore[operator]
    return GpuUse._make((seconds, taken, *extremes, *rest))


def key(at: float) -> int:
    """Rows are named by their millisecond."""
    return round(at * 1000)


def read(
    connection: sqlite3.Connection, level: Level, begin: float, end: float, only: int | None = None
) -> Iterator[Sample]:
    """Samples from `begin` until before `end`, in order, of one GPU or all; what cannot be read is left out."""
    found = connection.execute(
        f"SELECT at, body FROM {_TABLES[level]} WHERE at >= ? AND at < ? ORDER BY at", (key(begin), key(end))
    )
    return (sample for at, body in found if (sample := unpacked(at, body, only)) is not None)


def oldest(connection: sqlite3.Connection) -> dict[Level, float]:
    """How far back each level reaches, where it has anything."""
    found = {level: connection.execute(f"SELECT min(at) FROM {name}").fetchone()[0] for level, name in _TABLES.items()}
    return {level: at / 1000 for level, at in found.items() if at is not None}


def newest(connection: sqlite3.Connection) -> Sample | None:
    """The last moment that was written."""
    row = connection.execute("SELECT at, body FROM samples_raw ORDER BY at DESC LIMIT 1").fetchone()
    return None if row is None else unpacked(*row) or Sample(row[0] / 1000, None, {})


def are_written(connection: sqlite3.Connection, moments: Sequence[Sample]) -> set[int]:
    """The keys of those that are in the history already."""
    if not moments:
        return set()
    keys = [key(moment.at) for moment in moments]
    between = "SELECT at FROM samples_raw WHERE at BETWEEN ? AND ?"
    return {at for (at,) in connection.execute(between, (min(keys), max(keys)))}.intersection(keys)


def write(
    connection: sqlite3.Connection, moments: Sequence[Sample], before: Sample | None, hold_seconds: float
) -> None:
    """Stores `moments`, the one `before` them being stored already, and makes their minutes and hours anew."""
    _store(connection, Level.RAW, moments)
    line = moments if before is None else (before, *moments)
    minutes = {minute for one, after in pairwise((*line, line[-1])) for minute in _minutes(one, after, hold_seconds)}
    for begin, end in _runs(sorted(minutes)):
        near = read(connection, Level.RAW, begin - hold_seconds, end + hold_seconds)
        parts = pieces(near, line[-1].at, Level.MINUTE.seconds, hold_seconds)
        made = folded((part for part in parts if begin <= part[0] < end), Level.MINUTE.seconds)
        _store(connection, Level.MINUTE, made)
    for hour in sorted({minute // 3600 * 3600 for minute in minutes}):
        within = read(connection, Level.MINUTE, hour, hour + 3600)
        _store(connection, Level.HOUR, folded(((one.at, one, None) for one in within), Level.HOUR.seconds))


def _store(connection: sqlite3.Connection, level: Level, samples: Iterable[Sample]) -> None:
    connection.executemany(
        f"INSERT OR REPLACE INTO {_TABLES[level]} (at, body) VALUES (?, ?)",
        ((key(one.at), packed(one)) for one in samples),
    )


def _minutes(one: Sample, after: Sample, hold_seconds: float) -> range:
    """Those in which `one` was true; the wall clock may have been put back meanwhile."""
    end = min(after.at, one.at + hold_seconds) if after.at >= one.at else one.at + hold_seconds
    return range(int(one.at // 60) * 60, int(end) + 1, 60)


def _runs(minutes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Neighbours together, from when until when: what lies around them is read once."""
    begin = None
    for minute, after in pairwise((*minutes, None)):
        assert minute is not None
        begin = minute if begin is None else begin
        if after != minute + 60:
            yield begin, minute + 60
            begin = None


def devices(connection: sqlite3.Connection) -> dict[int, Device]:
    """Every GPU that the history knows, by its number."""
    found: dict[int, Device] = {}
    for number, body in connection.execute("SELECT id, body FROM gpus ORDER BY id"):
        try:
            found[number] = Device(**json.loads(body))
        except (ValueError, TypeError):
            found[number] = Device(uuid=f"unreadable-{number}", index=-1, name="", total_bytes=0, reserved_bytes=None)
    return found


def write_devices(connection: sqlite3.Connection, known: Mapping[int, Device]) -> None:
    """Stores or replaces them."""
    rows = [(number, json.dumps(asdict(device))) for number, device in known.items()]
    connection.executemany("INSERT OR REPLACE INTO gpus (id, body) VALUES (?, ?)", rows)
