"""Every route over the socket, held against the document that describes it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.api.conftest import Served, error_of
from tests.api.schema import complaints
from tests.fakes import GIB, Card
from vram_manager import __version__
from vram_manager.api.openapi import DOCUMENT
from vram_manager.domain.event import EventType
from vram_manager.domain.reading import Missing
from vram_manager.errors import SensorError

pytestmark = pytest.mark.asyncio

# Those of one lease need a lease: tests/api/test_admissions.py.
GETS = [path for path, verbs in DOCUMENT["paths"].items() if "get" in verbs and "{" not in path]
JSON_GETS = [path for path in GETS if path != "/metrics"]
Serve = Callable[..., Any]


def described(path: str, verb: str, status: int) -> dict[str, Any]:
    """The schema that the document promises for this answer."""
    answer = DOCUMENT["paths"][path][verb]["responses"][str(status)]
    return dict(answer["content"]["application/json"]["schema"])


async def holds(served: Served) -> None:
    for path in JSON_GETS:
        reply = await served.http.get(path)
        assert reply.headers["content-type"] == "application/json"
        schema = described(path, "get", reply.status_code)
        assert complaints(reply.json(), schema, path) == []


async def test_every_answer_is_what_the_document_says(served: Served):
    served.ollama.load("llama3.1:8b", 8, on_gpu=0.5)
    served.record()
    await holds(served)


async def test_every_answer_is_what_the_document_says_before_the_first_look(serve: Serve):
    async with serve(working=False) as served:
        await holds(served)


async def test_every_answer_is_what_the_document_says_when_nothing_can_be_read(serve: Serve):
    async with serve(working=False) as served:
        for fake in (served.gpus, served.ollama, served.comfyui):
            fake.error = SensorError("gone", "bring it back")
        work = asyncio.create_task(served.daemon.run())
        await served.turned()
        await holds(served)
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)


async def test_the_document_is_the_one_that_is_served(served: Served):
    assert (await served.http.get("/openapi.json")).json() == DOCUMENT


async def test_the_document_names_every_route_and_no_other(served: Served):
    for path, verbs in DOCUMENT["paths"].items():
        for verb in ("get", "post", "put", "delete", "patch"):
            reply = await served.http.request(verb, path)
            assert (reply.status_code != 405) == (verb in verbs), f"{verb} {path}"
            # There is no lease named "{id}", and its route says so in words of its own.
            assert reply.status_code != 404 or "{id} is no live lease" in reply.text


async def test_health_is_ok_when_every_sensor_is(served: Served):
    reply = await served.http.get("/health")
    body = reply.json()
    assert (reply.status_code, body["status"], body["version"]) == (200, "ok", __version__)
    assert {sensor["state"] for sensor in body["sensors"].values()} == {"ok"}
    assert 0 <= body["cycle_age_seconds"] < 20


async def test_health_is_degraded_and_still_200_when_a_sensor_is_missing(served: Served):
    served.ollama.error = SensorError("GET /api/ps: connection refused", "check that ollama runs")
    reply = await served.got("/health", lambda body: body["status"] == "degraded")
    body = reply.json()
    assert reply.status_code == 200
    assert body["sensors"]["ollama"]["state"] == "missing"
    assert body["sensors"]["ollama"]["why"] == "GET /api/ps: connection refused"
    assert body["sensors"]["ollama"]["remedy"] == "check that ollama runs"
    assert body["sensors"]["ollama"]["age_seconds"] >= 0
    assert body["sensors"]["nvml"]["state"] == "ok"


async def test_health_is_503_when_the_cycle_has_stalled(served: Served):
    served.ahead = 3600
    reply = await served.http.get("/health")
    # No turn comes between: the reply is made from the clock that jumped and the turn before.
    assert (reply.status_code, reply.json()["status"]) == (503, "stalled")
    assert complaints(reply.json(), described("/health", "get", 503)) == []


async def test_ready_is_503_before_the_first_look_and_200_after(serve: Serve):
    async with serve(working=False) as served:
        before = await served.http.get("/ready")
        work = asyncio.create_task(served.daemon.run())
        await served.turned()
        after = await served.http.get("/ready")
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
    assert (before.status_code, before.json()) == (503, {"ready": False})
    assert (after.status_code, after.json()) == (200, {"ready": True})


async def test_health_vram_sums_over_the_cards_that_can_be_read(served: Served):
    served.gpus.cards += [Card("GPU-b", total_gib=48, game=12 * GIB), Card("GPU-c")]
    served.gpus.cards[2].broken = Missing("GPU is lost")
    body = (await served.got("/health/vram", lambda body: len(body["gpus"]) == 3)).json()
    assert (body["total_mb"], body["used_mb"], body["free_mb"]) == (72 * 1024, 20 * 1024, 52 * 1024)
    assert body["usage_percent"] == pytest.approx(100 * 20 / 72, abs=0.1)
    assert [gpu["uuid"] for gpu in body["gpus"]] == ["GPU-a", "GPU-b", "GPU-c"]
    assert body["gpus"][2]["free_mb"] is None
    assert body["gpus"][2]["usage_percent"] is None


async def test_what_is_not_known_is_null_and_never_zero(serve: Serve):
    async with serve(working=False) as served:
        body = (await served.http.get("/health/vram")).json()
    assert body == {"total_mb": None, "used_mb": None, "free_mb": None, "usage_percent": None, "gpus": []}


async def test_a_snapshot_shows_who_holds_what_and_who_needs_what(served: Served):
    served.comfyui.hold(20)
    served.ollama.load("llama3.1:8b", 8, on_gpu=0.5)
    body = (await served.got("/v1/snapshot", lambda body: body["demands"])).json()
    assert body["gpus"][0]["free_bytes"] == 0
    assert body["ollama"]["models"][0]["cpu_ratio"] == 0.5
    assert body["comfyui"]["queue_remaining"] == 0
    assert body["demands"][0]["reason"] == "llama3.1:8b is 50 % on CPU"
    assert body["leases"] == []


async def test_a_snapshot_says_when_it_was_taken_and_not_when_it_was_asked_for(serve: Serve):
    async with serve(working=False) as served:
        served.daemon.cycle.snapshot = served.daemon.observer.look()
        served.ahead = 60
        body = (await served.http.get("/v1/snapshot")).json()
        taken = datetime.fromisoformat(body["taken_at"])
    assert body["age_seconds"] == pytest.approx(60, abs=15)
    assert taken == pytest.approx(datetime.now(UTC) - timedelta(seconds=60), abs=timedelta(seconds=20))


async def test_a_snapshot_has_the_same_fields_before_and_after_the_first_look(serve: Serve, served: Served):
    after = (await served.http.get("/v1/snapshot")).json()
    async with serve(working=False, VRAM_SOCKET=str(served.path) + "2") as fresh:
        before = (await fresh.http.get("/v1/snapshot")).json()
    assert before.keys() == after.keys()


async def test_decisions_come_newest_first_with_the_numbers_they_were_made_on(served: Served):
    served.comfyui.hold(20)
    served.ollama.load("llama3.1:8b", 8, on_gpu=0.5)
    body = (await served.got("/v1/decisions", lambda body: len(body["decisions"]) > 2)).json()
    ids = [decision["id"] for decision in body["decisions"]]
    assert ids == sorted(ids, reverse=True)
    newest = body["decisions"][0]
    assert newest["inputs"]["gpus"][0]["gpu"] == "GPU-a"
    assert (await served.http.get("/v1/decisions?limit=1")).json()["decisions"][0]["id"] == ids[0]


async def test_metrics_are_the_text_that_prometheus_reads(served: Served):
    reply = await served.http.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 'vram_manager_gpu_memory_used_bytes{gpu="GPU-a"}' in reply.text
    assert 'vram_manager_sensor_up{sensor="comfyui"} 1.0' in reply.text


async def test_a_head_request_has_no_body(served: Served):
    reply = await served.http.head("/health")
    assert (reply.status_code, reply.content) == (200, b"")


# Wishes.


async def test_a_wish_is_accepted_with_the_id_of_its_event_and_proven_after(served: Served):
    reply = await served.http.post("/v1/free", json={"stage": "soft"})
    assert reply.status_code == 202
    assert complaints(reply.json(), described("/v1/free", "post", 202)) == []
    asked = reply.json()["event_id"]
    async with served.http.stream("GET", f"/v1/events?after={asked}", headers={"Accept": "text/event-stream"}) as lines:
        async for line in lines.aiter_lines():
            if line.startswith("data: ") and (event := json.loads(line[6:]))["action_id"] == asked:
                break
    assert (event["type"], event["freed_bytes"], event["stage"]) == ("freed", 8 * GIB, "soft")
    assert [sent for _, sent in served.comfyui.posts] == [{"unload_models": True, "free_memory": False}]


async def test_a_wish_without_a_body_is_a_soft_free(served: Served):
    assert (await served.http.post("/v1/free")).status_code == 202
    assert [sent for _, sent in served.comfyui.posts] == [{"unload_models": True, "free_memory": False}]


async def test_a_wish_that_cannot_be_granted_is_409_with_why(served: Served):
    served.comfyui.push(1)
    served.comfyui.remaining = 1
    await served.got("/v1/snapshot", lambda body: body["comfyui"]["queue_remaining"])
    reply = await served.http.post("/v1/free", json={"stage": "unload"})
    assert reply.status_code == 409
    assert error_of(reply) == {"type": "not_now", "message": "ComfyUI is busy (1 running or waiting)"}
    assert complaints(reply.json(), described("/v1/free", "post", 409)) == []
    assert served.comfyui.posts == []


async def test_a_second_wish_while_one_settles_is_409(served: Served):
    served.comfyui.acts_after_seconds = None
    first = await served.http.post("/v1/free", json={})
    second = await served.http.post("/v1/free", json={"force": True})
    assert (first.status_code, second.status_code) == (202, 409)
    assert "still settling" in error_of(second)["message"]


async def test_a_model_is_unloaded_by_hand(served: Served):
    served.ollama.load("llama3.1:8b", 5)
    await served.got("/v1/snapshot", lambda body: body["ollama"]["models"])
    reply = await served.http.post("/v1/free", json={"target": "ollama", "model": "llama3.1:8b"})
    assert reply.status_code == 202
    assert served.ollama.unloads == ["llama3.1:8b"]


async def test_a_model_whose_name_is_no_text_is_refused_and_no_crash(served: Served):
    reply = await served.http.post("/v1/free", content=json.dumps({"target": "ollama", "model": "\ud800"}))
    assert reply.status_code == 409
    assert "no model" in error_of(reply)["message"]


async def test_what_comfyui_was_started_with_may_be_no_text(served: Served):
    """Arguments in another encoding than the system's come as lone surrogates."""
    served.comfyui.argv = ("main.py", "--output-directory", "/data/K\udcfcnstler")
    reply = await served.got("/v1/snapshot", lambda body: len(body["comfyui"]["argv"]) == 3)
    assert reply.json()["comfyui"]["argv"][2] == "/data/K\udcfcnstler"


async def test_a_body_that_is_too_large_is_413(served: Served):
    reply = await served.http.post("/v1/free", content=b" " * (2**20 + 1))
    assert (reply.status_code, error_of(reply)["type"]) == (413, "too_large")
    reply = await served.http.post("/v1/free", content=b" " * (2**20 - 2) + b"{}")
    assert reply.status_code == 202


# Events, all at once.


async def test_events_come_oldest_first_after_an_id_and_up_to_a_limit(served: Served):
    ids = served.record(5)
    reply = await served.http.get("/v1/events", params={"after": ids[1], "limit": 2})
    assert [event["id"] for event in reply.json()["events"]] == ids[2:4]
    reply = await served.http.get("/v1/events", params={"limit": 2})
    assert [event["id"] for event in reply.json()["events"]] == ids[3:]
    reply = await served.http.get("/v1/events", params={"after": ids[4]})
    assert reply.json()["events"] == []


async def test_the_number_of_an_id_is_enough(served: Served):
    ids = served.record(3)
    number = ids[0].removeprefix("event-")
    for after in (number, f"free-{number}", number.lstrip("0")):
        reply = await served.http.get("/v1/events", params={"after": after})
        assert [event["id"] for event in reply.json()["events"]] == ids[1:]


async def test_an_id_of_an_earlier_life_is_no_reason_to_keep_silent(served: Served):
    """Without a history on disk ids begin anew at a restart; a poller's id is then ahead of all of them."""
    ids = served.record(2)
    reply = await served.http.get("/v1/events", params={"after": "free-0412"})
    assert [event["id"] for event in reply.json()["events"]][-2:] == ids


async def test_events_have_the_types_that_dashboards_know(served: Served):
    await served.http.post("/v1/free")
    known = {kind.value for kind in EventType}
    events = (await served.http.get("/v1/events")).json()["events"]
    assert {event["type"] for event in events} <= known
    assert {"sensor_back", "free_asked"} <= {event["type"] for event in events}
    document = DOCUMENT["paths"]["/v1/events"]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    assert set(document["properties"]["events"]["items"]["properties"]["type"]["enum"]) == known
    assert {"repaired", "repair_failed", "warmed_back", "ollama_stuck"} <= known
