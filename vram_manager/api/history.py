"""GET /v1/history: how the GPUs were used over time, for the page, for scripts and for a spreadsheet."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import re
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta

from starlette.requests import Request
from starlette.responses import Response

from vram_manager.api import fields
from vram_manager.api.fields import error
from vram_manager.clock import Clock
from vram_manager.domain.sample import GpuSeries, Series, Window
from vram_manager.history import MAX_EVENTS, History
from vram_manager.journal import Entry, Journal, as_json, rfc3339
from vram_manager.policy.series import COLUMNS

DEFAULT_SECONDS = 3600.0
MOST_STEP_SECONDS = 31 * 86400
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
_MUST = "be RFC 3339 with its offset, such as 2026-07-01T12:00:00Z, or now, or a time before now: -90s, -30m, -2h, -7d"


class HistoryRoute:
    """One window is read at a time: what many ask for at once must not fill the memory."""

    def __init__(self, clock: Clock, history: History, journal: Journal) -> None:
        self._clock = clock
        self._history = history
        self._journal = journal
        self._one_at_a_time = asyncio.Lock()

    async def get(self, request: Request) -> Response:
        """The window as JSON, or as CSV. It is read and written down in a worker thread."""
        now = self._clock.utcnow()
        window = self._window(request, now)
        wanted = fields.one_of(request.query_params, "format", ("json", "csv"))
        as_csv = wanted == "csv" or (wanted is None and "text/csv" in request.headers.get("accept", ""))
        begin, end = _datetime(window.begin), _datetime(window.end)
        entries = [] if as_csv else [entry for entry in self._journal.events() if begin <= entry.at < end]

        def body() -> bytes:
            series = self._history.read(window, now.timestamp())
            if as_csv:
                return _csv(series)
            return _json(series, _events(self._history, begin, end, entries))

        try:
            async with self._one_at_a_time:
                if await request.is_disconnected():
                    # Those behind wait for nobody who has hung up. 499 is what nginx logs then; no one sees it.
                    return Response(status_code=499)
                content = await asyncio.to_thread(body)
        except sqlite3.Error as problem:
            return error(503, "unreadable", f"the history cannot be read ({problem}): try again")
        if not as_csv:
            return Response(content, media_type="application/json")
        name = f"vram-{begin:%Y%m%dT%H%M%SZ}-{end:%Y%m%dT%H%M%SZ}.csv"
        return Response(
            content, media_type="text/csv", headers={"content-disposition": f'attachment; filename="{name}"'}
        )

    def _window(self, request: Request, now: datetime) -> Window:
        asked = request.query_params
        fields.no_others(asked, ("from", "to", "step", "gpu", "format"))
        end = _time(asked.get("to"), "to", now) or now
        begin = _time(asked.get("from"), "from", now) or end - timedelta(seconds=DEFAULT_SECONDS)
        if begin >= end:
            raise fields.wrong("from", asked.get("from"), f"be before to, which is {rfc3339(end)}")
        gpu = None
        if (name := asked.get("gpu")) is not None:
            device = self._history.gpu(name)
            if device is None:
                known = ", ".join(self._history.uuids()) or "none yet"
                raise fields.wrong("gpu", name, f"be the UUID or index of a GPU that the history knows: {known}")
            gpu = device.uuid
        return Window(begin=begin.timestamp(), end=end.timestamp(), step_seconds=_step(asked.get("step")), gpu=gpu)


def _step(text: str | None) -> int | None:
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,7}", text, re.ASCII) or not 1 <= int(text) <= MOST_STEP_SECONDS:
        raise fields.wrong("step", text, f"be whole seconds from 1 to {MOST_STEP_SECONDS}")
    return int(text)


def _time(text: str | None, name: str, now: datetime) -> datetime | None:
    """A moment, or how long before now it is. What is not given is None."""
    if text is None:
        return None
    if text == "now":
        return now
    try:
        if before := re.fullmatch(r"-([0-9]{1,9})([smhd])", text, re.ASCII):
            return now - timedelta(**{_UNITS[before[2]]: int(before[1])})
        # In a query, a plus sign that nobody escaped is a space.
        at = datetime.fromisoformat(re.sub(r" (\d\d:\d\d)$", r"+\1", text))
        if at.tzinfo is None:
            raise ValueError
        return at.astimezone(UTC)
    except (ValueError, OverflowError):
        raise fields.wrong(name, text, _MUST) from None


def _datetime(at: float) -> datetime:
    return datetime.fromtimestamp(at, UTC)


def _events(history: History, begin: datetime, end: datetime, entries: list[Entry]) -> list[str]:
    """The JSON of each event in the window: the stored ones, and behind them those that are not stored yet."""
    rows = history.events(rfc3339(begin), rfc3339(end))
    stored = {row.seq: row.body for row in rows if _is_json(row.body)}
    for entry in entries:
        if entry.seq not in stored:
            stored[entry.seq] = _encoded(as_json(entry))
    return [stored[seq] for seq in sorted(stored)[-MAX_EVENTS:]]


def _is_json(body: str) -> bool:
    """A disk may spoil what is inside a text."""
    try:
        return isinstance(json.loads(body), dict)
    except ValueError:
        return False


def _encoded(value: object) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def _json(series: Series, events: Iterable[str]) -> bytes:
    """Piece by piece: whoever encodes holds the interpreter, and the daemon has other things to do."""
    head = {
        "from": rfc3339(_datetime(series.window.begin)),
        "to": rfc3339(_datetime(series.window.end)),
        "step_seconds": series.step_seconds,
        "level": series.level,
    }
    queue = {"at": series.queue_at, "remaining": series.queue_remaining}
    gpus = ",".join(_encoded(_gpu(gpu)) for gpu in series.gpus)
    return f'{_encoded(head)[:-1]},"gpus":[{gpus}],"queue":{_encoded(queue)},"events":[{",".join(events)}]}}'.encode()


def _gpu(gpu: GpuSeries) -> dict[str, object]:
    device = gpu.device
    return {
        "uuid": device.uuid,
        "index": device.index,
        "name": device.name,
        "total_bytes": device.total_bytes,
        "reserved_bytes": device.reserved_bytes,
        "at": gpu.at,
        **gpu.columns,
        "tenants": [
            {"tenant": one.tenant, "kind": one.kind, "bytes": one.bytes, "max_bytes": one.max_bytes}
            for one in gpu.tenants
        ],
    }


def _csv(series: Series) -> bytes:
    tenants = sorted({one.tenant for gpu in series.gpus for one in gpu.tenants})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["at", "gpu", *COLUMNS, *map(_on_one_line, tenants)])
    for gpu in series.gpus:
        writer.writerows(_rows(gpu, tenants))
    return text.getvalue().encode()


def _on_one_line(name: str) -> str:
    """A program calls itself what it likes; a lone carriage return would end the row for some readers."""
    return "".join(sign if sign.isprintable() else "?" for sign in name)


def _rows(gpu: GpuSeries, tenants: list[str]) -> Iterator[list[object]]:
    """One row a step; a cell with nothing in it is not known."""
    has = {one.tenant: one.bytes for one in gpu.tenants}
    columns: list[Sequence[float | None]] = [gpu.columns[name] for name in COLUMNS]
    columns += [has.get(tenant) or [None if taken is None else 0 for taken in columns[0]] for tenant in tenants]
    for at, *values in zip(gpu.at, *columns, strict=True):
        yield [rfc3339(_datetime(at)), gpu.device.uuid, *values]
