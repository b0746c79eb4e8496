"""GET /v1/history: a window of what was seen, for the page and for a spreadsheet."""

from __future__ import annotations

import asyncio
import csv
import io
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request
from starlette.types import Message

from tests.api.conftest import Served, error_of
from tests.api.schema import complaints
from tests.fakes import GIB, Card
from vram_manager.api.history import HistoryRoute, _csv
from vram_manager.api.openapi import DOCUMENT
from vram_manager.clock import Clock
from vram_manager.domain.reading import Off, Seen
from vram_manager.domain.sample import Device, GpuSeries, Level, Series, TenantSeries, Window
from vram_manager.domain.snapshot import Gpu, GpuMemory, Gpus, Snapshot
from vram_manager.history import MAX_EVENTS, History
from vram_manager.journal import Journal
from vram_manager.policy.series import COLUMNS
from vram_manager.store import Store

pytestmark = pytest.mark.asyncio
Serve = Callable[..., Any]
SCHEMA = DOCUMENT["paths"]["/v1/history"]["get"]["responses"]["200"]["content"]["application/json"]["schema"]


def has_seen(body: Any) -> bool:
    return bool(body["gpus"]) and any(value is not None for value in body["gpus"][0]["taken_bytes"])


async def answer(served: Served, query: str = "") -> dict[str, Any]:
    """Once something was seen."""
    reply = await served.got(f"/v1/history{query}", has_seen)
    assert complaints(reply.json(), SCHEMA, "/v1/history") == []
    return dict(reply.json())


async def test_the_last_hour_is_told_with_who_had_how_much(served: Served):
    served.ollama.load("llama3.1:8b", 8)
    served.daemon.observer.changed.set()
    deadline = asyncio.get_running_loop().time() + 20
    while not (found := (await answer(served))["gpus"][0]["tenants"]) or found[-1]["tenant"] != "ollama:llama3.1:8b":
        assert asyncio.get_running_loop().time() < deadline, found

    body = await answer(served)
    (gpu,) = body["gpus"]
    assert (body["step_seconds"], body["level"]) == (10, "raw")
    begin, end = (datetime.fromisoformat(body[name]) for name in ("from", "to"))
    assert end - begin == timedelta(hours=1)
    assert (gpu["uuid"], gpu["index"], gpu["name"], gpu["total_bytes"]) == ("GPU-a", 0, "Fake card 0", 24 * GIB)
    assert {len(gpu[name]) for name in COLUMNS} == {len(gpu["at"])}
    assert gpu["taken_max_bytes"][-1] == 16 * GIB
    assert gpu["free_min_bytes"][-1] == 8 * GIB
    assert {one["tenant"]: one["max_bytes"][-1] for one in gpu["tenants"]}["ollama:llama3.1:8b"] == 8 * GIB
    assert len(body["queue"]["at"]) == len(body["queue"]["remaining"]) > 0


async def test_as_csv_it_is_one_row_a_gpu_and_step(served: Served):
    served.gpus.cards.append(Card("GPU-b", total_gib=48, game=12 * GIB))
    await served.got("/v1/history", lambda body: len(body["gpus"]) == 2)

    for headers, query in (({}, "?format=csv"), ({"accept": "text/csv"}, "")):
        reply = await served.http.get(f"/v1/history{query}", headers=headers)
        assert reply.headers["content-type"].startswith("text/csv")
        assert reply.headers["content-disposition"].startswith('attachment; filename="vram-20')
        head, *rows = csv.reader(io.StringIO(reply.text))
        assert head[: 2 + len(COLUMNS)] == ["at", "gpu", *COLUMNS]
        assert set(head[2 + len(COLUMNS) :]) >= {"comfyui in use", "others"}
        last = {row[1]: dict(zip(head, row, strict=True)) for row in rows}
        assert last["GPU-b"]["taken_max_bytes"] == str(12 * GIB)
        assert last["GPU-b"]["comfyui in use"] == "0"
        assert datetime.fromisoformat(last["GPU-a"]["at"]).tzinfo is UTC


async def test_no_column_is_a_formula_whatever_a_model_is_called(served: Served):
    served.ollama.load("=1+1|'", 8)
    served.daemon.observer.changed.set()
    deadline = asyncio.get_running_loop().time() + 20
    while "ollama:" not in (text := (await served.http.get("/v1/history?format=csv")).text):
        assert asyncio.get_running_loop().time() < deadline

    cells = [cell for row in csv.reader(io.StringIO(text)) for cell in row]
    assert "ollama:=1+1|'" in cells
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@", "\t"))]


async def test_a_program_with_a_name_of_several_lines_has_one_cell():
    gpu = Device(uuid="GPU-a", index=0, name="", total_bytes=1, reserved_bytes=0)
    columns: dict[str, list[float | None]] = {name: [1] for name in COLUMNS}
    evil = TenantSeries(kind="process", tenant="process:a\rb\n\ud800", bytes=[1], max_bytes=[1])
    series = Series(
        window=Window(begin=0, end=60),
        step_seconds=60,
        level=Level.MINUTE,
        gpus=(GpuSeries(device=gpu, at=[0], columns=columns, tenants=(evil,)),),
        queue_at=[],
        queue_remaining=[],
    )
    head, row = _csv(series).decode().splitlines()
    assert head.endswith(",power_watts,process:a?b??")
    assert row.startswith("1970-01-01T00:00:00.000Z,GPU-a,1,")


async def test_json_is_told_to_whoever_says_so_however_csv_is_accepted(served: Served):
    reply = await served.http.get("/v1/history?format=json", headers={"accept": "text/csv"})

    assert reply.headers["content-type"] == "application/json"


async def test_a_step_of_which_nothing_is_known_is_an_empty_cell(serve: Serve, tmp_path: Path):
    now = datetime.now(UTC)
    for seconds in (300, 10):
        daemon_that_looked_once(tmp_path / "state", now - timedelta(seconds=seconds))
    async with serve(working=False) as served:
        reply = await served.http.get("/v1/history?format=csv&from=-10m")
    head, *rows = csv.reader(io.StringIO(reply.text))
    assert [row[2] == "" for row in rows] == [False, True, False]
    assert set(rows[1][2:]) == {""}
    assert len(rows[1]) == len(head)


def daemon_that_looked_once(state: Path, at: datetime) -> None:
    store = Store.open(state)
    history = History(Clock(lambda: 0.0, lambda: at), store)
    memory = GpuMemory(total_bytes=24 * GIB, used_bytes=GIB, free_bytes=23 * GIB, reserved_bytes=0)
    card = Gpu(uuid="GPU-a", index=0, name="Card", memory=memory, utilization_percent=1)
    gpus = Gpus(gpus=(card,), driver_version="580.95.05")
    snapshot = Snapshot(taken_at=0.0, gpus=Seen(gpus, 0.0), ollama=Off(), comfyui=Off(), queue=Off())
    history.turned(snapshot, gpus, {})
    history.close()
    store.close()


@pytest.mark.parametrize(
    ("query", "field", "words"),
    [
        ("from=yesterday", "from", 'from is "yesterday": must be RFC 3339'),
        ("from=2026-07-01T12:00:00", "from", "with its offset"),
        ("to=-5x", "to", "-90s, -30m, -2h, -7d"),
        ("from=-999999999d", "from", "must be RFC 3339"),
        ("from=", "from", 'from is ""'),
        ("from=now", "from", "must be before to, which is 20"),
        ("from=-1h&to=-2h", "from", "must be before to"),
        ("from=2026-07-01T12:00:00Z&to=2026-07-01T12:00:00%2B00:00", "from", "2026-07-01T12:00:00.000Z"),
        ("step=0", "step", 'step is "0": must be whole seconds from 1 to 2678400'),
        ("step=-5", "step", "from 1"),
        ("step=1.5", "step", "whole"),
        ("step=9999999", "step", "to 2678400"),
        ("gpu=GPU-z", "gpu", 'gpu is "GPU-z": must be the UUID or index of a GPU that the history knows: GPU-a'),
        ("gpu=7", "gpu", "GPU-a"),
        ("format=xml", "format", "must be json or csv"),
        ("since=-2h", "since", "since is not a field"),
    ],
)
async def test_a_wrong_query_is_told_what_is_wrong_and_what_would_be_right(
    served: Served, query: str, field: str, words: str
):
    await answer(served)
    reply = await served.http.get(f"/v1/history?{query}")

    assert reply.status_code == 422
    assert error_of(reply)["field"] == field
    assert words in error_of(reply)["message"]


@pytest.mark.parametrize(
    ("begin", "seconds"), [("-90s", 90), ("-30m", 1800), ("-2h", 7200), ("-7d", 604800), ("-1d", 86400)]
)
async def test_a_window_may_begin_so_long_ago(served: Served, begin: str, seconds: int):
    body = await answer(served, f"?from={begin}&to=now")

    first, last = (datetime.fromisoformat(body[name]) for name in ("from", "to"))
    assert (last - first).total_seconds() == seconds


@pytest.mark.parametrize("begin", ["2026-07-01T12:00:00Z", "2026-07-01T14:00:00+02:00", "2026-07-01T14:00:00%2B02:00"])
async def test_a_moment_is_understood_with_any_offset_also_where_nobody_escaped_the_plus(served: Served, begin: str):
    reply = await served.http.get(f"/v1/history?from={begin}&to=2026-07-01T13:00:00Z")

    assert (reply.json()["from"], reply.json()["to"]) == ("2026-07-01T12:00:00.000Z", "2026-07-01T13:00:00.000Z")
    assert reply.json()["gpus"] == []


async def test_a_window_of_ages_has_no_more_points_than_one_of_an_hour(served: Served):
    body = await answer(served, "?from=0001-01-01T00:00:00Z&to=9999-12-31T00:00:00Z&step=1")

    assert body["step_seconds"] > 86400
    assert len(body["gpus"][0]["at"]) == 1


async def test_the_gpu_may_be_named_by_uuid_or_index(served: Served):
    served.gpus.cards.append(Card("GPU-b"))
    await served.got("/v1/history", lambda body: len(body["gpus"]) == 2)

    for name in ("GPU-b", "1"):
        body = (await served.http.get(f"/v1/history?gpu={name}")).json()
        assert [gpu["uuid"] for gpu in body["gpus"]] == ["GPU-b"]


async def test_the_events_of_the_window_are_told_also_those_that_only_the_disk_remembers(serve: Serve):
    async with serve(working=False) as served:
        ids = served.record(times=MAX_EVENTS + 700)
        body = (await served.http.get("/v1/history")).json()
        assert [event["id"] for event in body["events"]] == ids[-MAX_EVENTS:]
        served.daemon.journal.flush()
        again = (await served.http.get("/v1/history")).json()
        assert again["events"] == body["events"]
        middle = body["events"][0]["at"]
        older = (await served.http.get(f"/v1/history?from=-1h&to={middle}")).json()["events"]
        assert older == [] or older[-1]["at"] < middle
        assert (await served.http.get("/v1/history?from=-2h&to=-1h")).json()["events"] == []


async def test_an_event_that_the_disk_has_spoilt_is_left_out(serve: Serve):
    async with serve(working=False) as served:
        served.record(times=3)
        served.daemon.journal.flush()
        with served.store.writing() as connection:
            connection.execute("UPDATE events SET body = '{\"id\": ' WHERE seq = 2")
        served.daemon.journal._entries.clear()
        body = (await served.http.get("/v1/history")).json()
        assert len(body["events"]) == 2


async def test_a_history_that_cannot_be_read_is_a_503_that_says_so(serve: Serve):
    async with serve(working=False) as served:
        with served.store.writing() as connection:
            connection.execute("DROP TABLE samples_raw")
        reply = await served.http.get("/v1/history")
        assert reply.status_code == 503
        assert "the history cannot be read (no such table: samples_raw)" in error_of(reply)["message"]
        with served.store.writing() as connection:
            connection.execute("CREATE TABLE samples_raw (at INTEGER PRIMARY KEY, body BLOB NOT NULL)")


async def test_before_the_first_look_there_is_nothing_to_tell(serve: Serve):
    async with serve(working=False) as served:
        body = (await served.http.get("/v1/history")).json()
        assert (body["gpus"], body["queue"], body["events"]) == ([], {"at": [], "remaining": []}, [])
        assert complaints(body, SCHEMA, "/v1/history") == []


async def test_many_who_ask_at_once_are_all_answered(served: Served):
    await answer(served)
    replies = await asyncio.gather(*(served.http.get("/v1/history?from=-2h") for _ in range(8)))

    assert {reply.status_code for reply in replies} == {200}


class Counted(History):
    """How often it was read."""

    reads = 0

    def read(self, window: Window, now: float) -> Series:
        self.reads += 1
        return super().read(window, now)


async def test_nothing_is_read_for_whoever_has_hung_up(tmp_path: Path):
    clock = Clock.of_running_loop()
    store = Store.open(tmp_path)
    history = Counted(clock, store)
    route = HistoryRoute(clock, history, Journal(clock, store))
    here = asyncio.Event()

    async def gone() -> Message:
        return {"type": "http.disconnect"}

    async def waits() -> Message:
        await here.wait()
        return {"type": "http.disconnect"}

    scope = {"type": "http", "method": "GET", "path": "/v1/history", "query_string": b"", "headers": []}
    replies = await asyncio.gather(*(route.get(Request(scope, receive)) for receive in (gone, waits, gone)))
    history.close()
    store.close()

    assert [reply.status_code for reply in replies] == [499, 200, 499]
    assert history.reads == 1


async def test_what_was_seen_is_there_after_a_restart(serve: Serve):
    async with serve() as served:
        first = await answer(served)
    async with serve(working=False) as served:
        again = (await served.http.get("/v1/history")).json()
    assert again["gpus"][0]["at"][0] == first["gpus"][0]["at"][0]
    assert again["gpus"][0]["name"] == "Fake card 0"
