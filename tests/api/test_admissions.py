"""Admission and leases over the socket: what is granted, refused, waited for, held and lost."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from typing import Any

import pytest

from tests.api.conftest import Served, error_of
from tests.api.schema import complaints
from tests.api.test_routes import described
from tests.fakes import GIB, Card
from vram_manager.domain.event import EventType
from vram_manager.errors import SensorError

pytestmark = pytest.mark.asyncio
Serve = Callable[..., Any]


async def ask(served: Served, required: str | None = "4GiB", **more: Any) -> dict[str, Any]:
    body = {"owner": "worker-1", **({} if required is None else {"required": required}), **more}
    reply = await served.http.post("/v1/admissions", json=body)
    assert reply.status_code == 200, reply.text
    assert complaints(reply.json(), described("/v1/admissions", "post", 200)) == []
    return dict(reply.json())


async def leases(served: Served) -> list[dict[str, Any]]:
    return list((await served.http.get("/v1/leases")).json()["leases"])


def told(served: Served, kind: EventType) -> list[str]:
    return [entry.event.reason for entry in served.daemon.journal.events() if entry.event.type is kind]


async def ended(served: Served, lease_id: str) -> None:
    """Goes on once the lease is no more."""
    over = asyncio.Event()
    served.daemon.journal.listen(lambda entry: over.set() if entry.event.lease == lease_id else None)
    while lease_id in served.daemon.admissions.book.leases:
        over.clear()
        await asyncio.wait_for(over.wait(), 20)


# The card has 24 GiB; ComfyUI, idle, holds 8 of them.


async def test_what_fits_is_admitted_with_a_lease(served: Served):
    answer = await ask(served)
    assert answer["admitted"]
    assert answer["lease"]["bytes"] == 4 * GIB
    assert answer["lease"]["owner"] == "worker-1"
    assert (answer["gpu"], answer["estimate_source"]) == ("GPU-a", "request")
    assert [lease["id"] for lease in await leases(served)] == [answer["lease"]["id"]]


async def test_two_who_ask_for_the_same_bytes_do_not_both_get_them(served: Served):
    first, second = await asyncio.gather(
        ask(served, "9GiB", owner="a", wait_seconds=0), ask(served, "9GiB", owner="b", wait_seconds=0)
    )
    assert sorted((first["admitted"], second["admitted"])) == [False, True]


async def test_a_check_reserves_nothing(served: Served):
    assert (await ask(served, lease=False))["lease"] is None
    assert await leases(served) == []


async def test_a_refusal_says_what_is_missing(served: Served):
    answer = await ask(served, "20GiB", lease=False)
    assert not answer["admitted"]
    assert answer["reason"].startswith(
        "Insufficient GPU memory: need 22.0 GiB (20.0 + 2.0 safety margin), 16.0 GiB available on GPU 0 (Fake card 0); "
        "ComfyUI holds 8.0 GiB and is idle"
    )
    assert answer["shortfall_bytes"] == 6 * GIB
    assert answer["alternatives"][0]["required_bytes"] == 14 * GIB


async def test_more_than_the_card_has_is_refused_at_once_however_long_one_would_wait(served: Served):
    answer = await ask(served, "80GiB", wait_seconds=3600)
    assert not answer["admitted"]
    assert "no waiting helps" in answer["reason"]
    assert answer["waited_seconds"] < 3600


async def test_room_is_made_and_proven_before_the_grant(served: Served):
    answer = await ask(served, "20GiB")
    assert answer["admitted"]
    assert served.comfyui.posts
    assert answer["available_bytes"] == 24 * GIB
    assert served.daemon.journal.events()[-1].event.type in (EventType.ADMITTED, EventType.FREED)


async def test_while_a_prompt_runs_nobody_is_made_room_for(served: Served):
    served.comfyui.push(1)
    await served.got("/v1/snapshot", lambda body: body["comfyui"]["queue_remaining"] == 1)
    answer = await ask(served, "20GiB", wait_seconds=0.5)
    assert not answer["admitted"]
    assert "ComfyUI holds 8.0 GiB and is rendering" in answer["reason"]
    assert "was number 1 in line" in answer["reason"]
    assert answer["position"] == 1
    assert answer["retry_after_seconds"] > 0
    assert served.comfyui.posts == []


async def test_who_waits_gets_what_another_gives_back(served: Served):
    served.comfyui.push(1)
    first = await ask(served, "10GiB", owner="a")
    waiting = asyncio.create_task(ask(served, "10GiB", owner="b", wait_seconds=60))
    await served.got("/v1/leases", lambda body: body["line"])
    line = (await served.http.get("/v1/leases")).json()["line"]
    assert [(one["position"], one["owner"], one["required_bytes"]) for one in line] == [(1, "b", 10 * GIB)]
    assert (await served.http.delete(f"/v1/leases/{first['lease']['id']}")).status_code == 204
    assert (await waiting)["admitted"]


async def test_who_hangs_up_leaves_the_line(served: Served):
    served.comfyui.push(1)
    body = json.dumps({"required": "20GiB", "owner": "gone", "wait_seconds": 600}).encode()
    head = f"POST /v1/admissions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    _, writer = await served.connect(head + body)
    await served.got("/v1/leases", lambda body: body["line"])
    writer.close()
    await served.got("/v1/leases", lambda body: not body["line"])
    assert await leases(served) == []


async def test_the_same_question_again_is_given_the_same_lease(served: Served):
    first, again = await ask(served, request_id="q-1"), await ask(served, request_id="q-1")
    assert again["admitted"]
    assert again["lease"]["id"] == first["lease"]["id"]
    assert (await ask(served, owner="other", request_id="q-1"))["lease"]["id"] != first["lease"]["id"]


async def test_an_id_is_not_given_to_two_questions(served: Served):
    await ask(served, "4GiB", request_id="q-1")
    reply = await served.http.post(
        "/v1/admissions", json={"required": "8GiB", "owner": "worker-1", "request_id": "q-1"}
    )
    assert (reply.status_code, error_of(reply)["field"]) == (409, "request_id")
    assert "asked for 4.0 GiB before and asks for 8.0 GiB now" in error_of(reply)["message"]


@pytest.mark.parametrize("depth", [900, 960, 970, 985, 2000])
async def test_a_value_nested_as_deeply_as_can_be_read_is_a_wrong_value(served: Served, depth: int):
    body = '{"required": ' + "[" * depth + "]" * depth + "}"
    reply = await served.http.post("/v1/admissions", content=body)
    assert reply.status_code in (400, 422)
    error_of(reply)


async def test_a_lease_ends_when_it_is_given_back_and_only_once(served: Served):
    lease_id = (await ask(served))["lease"]["id"]
    assert (await served.http.delete(f"/v1/leases/{lease_id}")).status_code == 204
    again = await served.http.delete(f"/v1/leases/{lease_id}")
    assert again.status_code == 404
    assert lease_id in error_of(again)["message"]
    assert await leases(served) == []


async def test_a_lease_that_is_not_renewed_expires(served: Served):
    lease_id = (await ask(served, ttl_seconds=1))["lease"]["id"]
    await ended(served, lease_id)
    assert (await served.http.post(f"/v1/leases/{lease_id}/renew", json={})).status_code == 404
    assert told(served, EventType.LEASE_EXPIRED)[0].startswith("not renewed for 1 s")


async def test_a_renewed_lease_has_its_time_before_it(served: Served):
    lease_id = (await ask(served, ttl_seconds=30))["lease"]["id"]
    reply = await served.http.post(f"/v1/leases/{lease_id}/renew", json={"ttl_seconds": 900})
    assert reply.json()["lease"]["ttl_seconds"] == 900
    assert complaints(reply.json(), described("/v1/leases/{id}/renew", "post", 200)) == []


async def test_what_is_claimed_is_told(served: Served):
    lease_id = (await ask(served))["lease"]["id"]
    all_of_it = await served.http.post(f"/v1/leases/{lease_id}/claimed", json={})
    assert all_of_it.json()["lease"]["claimed_bytes"] == 4 * GIB
    some = await served.http.post(f"/v1/leases/{lease_id}/claimed", json={"bytes": 5 * GIB})
    assert some.json()["lease"]["claimed_bytes"] == 5 * GIB
    served.card.holders["worker"] = 5 * GIB
    seen = await served.got("/v1/leases", lambda body: body["leases"][0]["visible_bytes"])
    assert seen.json()["leases"][0]["overclaimed_bytes"] == GIB
    metrics = (await served.http.get("/metrics")).text
    assert 'vram_manager_lease_overclaimed_bytes{owner="worker-1"} 1.073741824e+09' in metrics


async def test_a_held_lease_lives_as_long_as_its_connection(served: Served):
    lease_id = (await ask(served, ttl_seconds=1))["lease"]["id"]
    async with served.http.stream("GET", f"/v1/leases/{lease_id}/hold") as held:
        assert held.status_code == 200
        lines = held.aiter_lines()
        assert json.loads(await anext(lines))["lease"]["held"]
        served.ahead = 3600
        await served.got("/v1/leases", lambda body: body["leases"] and body["leases"][0]["expires_at"] is None)
    await ended(served, lease_id)
    assert told(served, EventType.LEASE_ENDED)[0].startswith("its connection closed")


async def test_a_holder_hears_when_the_lease_is_over(served: Served):
    lease_id = (await ask(served))["lease"]["id"]
    async with served.http.stream("GET", f"/v1/leases/{lease_id}/hold") as held:
        lines = held.aiter_lines()
        await anext(lines)
        await served.http.delete(f"/v1/leases/{lease_id}")
        assert [line async for line in lines] == []


async def test_of_two_connections_the_last_one_ends_it(served: Served):
    lease_id = (await ask(served))["lease"]["id"]
    async with served.http.stream("GET", f"/v1/leases/{lease_id}/hold") as one:
        lines = one.aiter_lines()
        await anext(lines)
        async with served.http.stream("GET", f"/v1/leases/{lease_id}/hold") as other:
            others = other.aiter_lines()
            await anext(others)
            assert served.daemon.admissions.lease(lease_id).holds == 2
        # The daemon hears of the end of a connection a moment later.
        await served.got("/v1/snapshot", lambda _: served.daemon.admissions.lease(lease_id).holds == 1)
        assert (await leases(served))[0]["held"]
    await ended(served, lease_id)


async def test_a_lease_ends_with_its_process(served: Served):
    child = await asyncio.create_subprocess_exec("sleep", "60")
    lease_id = (await ask(served, pid=child.pid))["lease"]["id"]
    assert (await leases(served))[0]["pid"] == child.pid
    child.kill()
    await ended(served, lease_id)
    await child.wait()
    assert told(served, EventType.LEASE_ENDED)[0].startswith(f"its process {child.pid} is gone")


async def test_another_process_may_take_a_lease_over(served: Served):
    lease_id = (await ask(served, pid=os.getpid()))["lease"]["id"]
    child = await asyncio.create_subprocess_exec("sleep", "60")
    reply = await served.http.post(f"/v1/leases/{lease_id}/renew", json={"pid": child.pid})
    assert reply.json()["lease"]["pid"] == child.pid
    child.kill()
    await ended(served, lease_id)
    await child.wait()


async def test_a_process_that_is_not_there_is_not_waited_for(served: Served):
    assert (await ask(served, pid=2**22))["lease"]["pid"] is None


async def test_without_a_gpu_everybody_is_admitted_with_the_mark_of_it(serve: Serve):
    async with serve(working=False) as served:
        for fake in (served.gpus, served.comfyui):
            fake.error = SensorError("driver gone")
        answer = await ask(served, "80GiB")
    assert (answer["admitted"], answer["fail_open"], answer["available_bytes"]) == (True, True, None)
    assert answer["lease"]["gpu"] is None


async def test_without_a_gpu_nobody_is_admitted_where_that_is_the_setting(serve: Serve):
    async with serve(working=False, VRAM_FAIL_OPEN="false") as served:
        for fake in (served.gpus, served.comfyui):
            fake.error = SensorError("driver gone")
        answer = await ask(served, "1GiB")
    assert (answer["admitted"], answer["fail_open"], answer["lease"]) == (False, False, None)


async def test_with_monitoring_off_everybody_is_admitted_and_every_answer_says_so(serve: Serve):
    async with serve(ENABLE_VRAM_MONITORING="false") as served:
        answer = await ask(served, "80GiB")
    assert (answer["admitted"], answer["monitoring"]) == (True, False)
    assert "ENABLE_VRAM_MONITORING=false" in answer["reason"]


async def test_in_a_dry_run_a_refusal_is_only_told(serve: Serve):
    async with serve(VRAM_CHECK_DRY_RUN="true") as served:
        answer = await ask(served, "80GiB")
        assert (answer["admitted"], answer["dry_run"], answer["lease"]) == (True, True, None)
        assert answer["reason"].startswith("DRY RUN: would refuse: Insufficient GPU memory: need 82.0 GiB")
        assert told(served, EventType.DRY_RUN)[0].startswith("Insufficient GPU memory: need 82.0 GiB")


async def test_the_default_estimate_stands_in_for_what_is_not_said(serve: Serve):
    async with serve(VRAM_DEFAULT_ESTIMATE_MB="1024") as served:
        answer = await ask(served, None)
    assert (answer["required_bytes"], answer["estimate_source"]) == (GIB, "default")


async def test_a_model_of_the_table_is_estimated_by_it(serve: Serve):
    async with serve(VRAM_ESTIMATES='{"ltx2-19b": 24576}') as served:
        answer = await ask(served, None, model="ltx2-19b-distilled", lease=False)
    assert (answer["required_bytes"], answer["estimate_source"]) == (24 * GIB, "table")


async def test_a_peak_that_was_measured_is_told_beside_its_estimate_and_remembered(served: Served):
    for _ in range(3):
        answer = await ask(served, "4GiB", model="flux2-klein-9b")
        lease_id = answer["lease"]["id"]
        await served.http.post(f"/v1/leases/{lease_id}/claimed", json={"bytes": 3 * GIB})
        await served.http.delete(f"/v1/leases/{lease_id}")
    assert "estimated 4.0 GiB, peak 3.0 GiB" in told(served, EventType.LEASE_ENDED)[0]
    learned = await ask(served, None, model="flux2-klein-9b", lease=False)
    assert (learned["estimate_source"], learned["required_bytes"]) == ("learned", 3 * GIB)
    assert 'vram_manager_estimate_peak_ratio_count{source="request"} 3.0' in (await served.http.get("/metrics")).text


async def test_the_other_gpu_is_taken_where_it_has_more_room(served: Served):
    served.gpus.cards.append(Card("GPU-b", total_gib=48))
    await served.got("/v1/snapshot", lambda body: len(body["gpus"]) == 2)
    assert (await ask(served, "20GiB"))["gpu"] == "GPU-b"
    assert (await ask(served, "1GiB", gpu=0))["gpu"] == "GPU-a"
    assert (await ask(served, "1GiB", gpu="GPU-a"))["gpu"] == "GPU-a"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"required": 24}, "required"),
        ({"required": "24"}, "required"),
        ({"required": "24 bananas"}, "required"),
        ({"required": "0GiB"}, "required"),
        ({"required": "-1GiB"}, "required"),
        ({"required": "101%"}, "required"),
        ({"required": "1e9GiB"}, "required"),
        ({"required": "9" * 400 + "GiB"}, "required"),
        ({"required": ["24GiB"]}, "required"),
        ({"required_mb": 0}, "required_mb"),
        ({"required_mb": -5}, "required_mb"),
        ({"required_mb": 1.5}, "required_mb"),
        ({"required_mb": True}, "required_mb"),
        ({"required_mb": "8192"}, "required_mb"),
        ({"required_mb": 10**30}, "required_mb"),
        ({"required": "1GiB", "required_mb": 1024}, "required_mb"),
        ({"model": ""}, "model"),
        ({"model": "a\nb"}, "model"),
        ({"model": "m", "workflow": {}}, "workflow"),
        ({"workflow": "not an object"}, "workflow"),
        ({"margin_mb": -1}, "margin_mb"),
        ({"owner": " "}, "owner"),
        ({"owner": "x" * 201}, "owner"),
        ({"pid": 0}, "pid"),
        ({"priority": "urgent"}, "priority"),
        ({"wait_seconds": -1}, "wait_seconds"),
        ({"wait_seconds": float("nan")}, "wait_seconds"),
        ({"wait_seconds": 10**9}, "wait_seconds"),
        ({"ttl_seconds": 0}, "ttl_seconds"),
        ({"ttl_seconds": 3e8}, "ttl_seconds"),
        ({"lease": "yes"}, "lease"),
        ({"dry_run": 1}, "dry_run"),
        ({"context": 0}, "context"),
        ({"gpu": {}}, "gpu"),
        ({"amount": "24GiB"}, "amount"),
    ],
    ids=lambda value: ascii(value)[:40],
)
async def test_a_wrong_field_is_422_and_named(served: Served, body: dict[str, Any], field: str):
    reply = await served.http.post("/v1/admissions", content=json.dumps(body))
    assert reply.status_code == 422
    assert error_of(reply)["field"] == field
    assert await leases(served) == []


async def test_a_gpu_that_is_not_there_is_404_and_names_those_that_are(served: Served):
    reply = await served.http.post("/v1/admissions", json={"required": "1GiB", "gpu": "GPU-x"})
    assert reply.status_code == 404
    assert error_of(reply)["field"] == "gpu"
    assert "0 (GPU-a)" in error_of(reply)["message"]


async def test_a_workflow_of_ten_megabytes_is_413(served: Served):
    reply = await served.http.post("/v1/admissions", json={"workflow": {"1": {"inputs": {"text": "x" * 10**7}}}})
    assert reply.status_code == 413


async def test_a_workflow_that_is_nonsense_gets_an_estimate_all_the_same(served: Served):
    cyclic = {"1": {"class_type": "A", "inputs": {"a": ["2", 0]}}, "2": {"class_type": "B", "inputs": {"b": ["1", 0]}}}
    for workflow in (cyclic, {"1": 5}, {"prompt": []}, {}):
        answer = await ask(served, None, workflow=workflow, lease=False)
        assert answer["required_bytes"] > 0


@pytest.mark.parametrize("verb", ["renew", "claimed"])
async def test_a_lease_that_never_was_is_404(served: Served, verb: str):
    reply = await served.http.post(f"/v1/leases/lease-x/{verb}", json={})
    assert reply.status_code == 404
    assert (await served.http.get("/v1/leases/lease-x/hold")).status_code == 404


async def test_a_flood_of_one_owner_fills_its_own_share_of_the_line_only(served: Served):
    served.comfyui.push(1)
    flood = [
        asyncio.create_task(
            served.http.post("/v1/admissions", json={"required": "20GiB", "owner": "f", "wait_seconds": 9})
        )
        for _ in range(16)
    ]
    await served.got("/v1/leases", lambda body: len(body["line"]) == 16)
    reply = await served.http.post("/v1/admissions", json={"required": "20GiB", "owner": "f", "wait_seconds": 9})
    assert (reply.status_code, error_of(reply)["type"]) == (503, "busy")
    assert "16 requests of f are in line already" in error_of(reply)["message"]
    other = asyncio.create_task(ask(served, "20GiB", owner="other", wait_seconds=60))
    await served.got("/v1/leases", lambda body: len(body["line"]) == 17)
    for task in flood:
        task.cancel()
    await asyncio.gather(*flood, return_exceptions=True)
    served.comfyui.push(0)
    assert (await other)["admitted"]


async def test_an_owner_cannot_have_leases_without_end(served: Served):
    for _ in range(128):
        await ask(served, "1MiB", margin_mb=0)
    reply = await served.http.post("/v1/admissions", json={"required": "1MiB", "owner": "worker-1"})
    assert reply.status_code == 503
    assert "128 leases" in error_of(reply)["message"]
    assert (await ask(served, "1MiB", owner="other"))["admitted"]


async def test_equal_refusals_in_a_row_are_told_once(served: Served):
    for _ in range(20):
        await ask(served, "80GiB", lease=False)
    assert len(told(served, EventType.REFUSED)) == 1
    assert 'vram_manager_admissions_total{outcome="refused"} 20.0' in (await served.http.get("/metrics")).text


async def test_every_lease_goes_on_after_a_restart(serve: Serve):
    async with serve() as served:
        kept = [(await ask(served, "2GiB", owner=owner))["lease"]["id"] for owner in ("a", "b")]
        given_back = (await ask(served, "2GiB", owner="c"))["lease"]["id"]
        await served.http.delete(f"/v1/leases/{given_back}")
        async with served.http.stream("GET", f"/v1/leases/{kept[0]}/hold") as held:
            lines = held.aiter_lines()
            await anext(lines)
            served.daemon.admissions.hang_up()
    async with serve() as again:
        assert sorted(lease["id"] for lease in await leases(again)) == sorted(kept)
        answer = await ask(again, "12GiB", owner="d", lease=False)
        assert answer["available_bytes"] == 12 * GIB


async def test_over_tcp_without_a_token_nobody_is_promised_anything(serve: Serve, free_port: int):
    async with serve(VRAM_HTTP_PORT=str(free_port)) as served:
        import httpx

        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{free_port}", trust_env=False) as tcp:
            assert (await tcp.post("/v1/admissions", json={"required": "1GiB"})).status_code == 403
            assert (await tcp.get("/v1/leases")).status_code == 200
            assert (await tcp.get("/v1/leases/lease-x/hold")).status_code == 403
        assert await leases(served) == []


async def test_a_hold_ends_with_its_connection_whatever_else_was_asked_on_it(served: Served):
    lease_id = (await ask(served, ttl_seconds=600))["lease"]["id"]
    reader, writer = await served.connect(f"GET /v1/leases/{lease_id}/hold HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    await asyncio.wait_for(reader.readuntil(b'"held": true'), 20)
    writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 2)
    await writer.drain()
    writer.close()
    await ended(served, lease_id)


async def test_a_look_at_the_head_of_a_hold_holds_and_ends_nothing(served: Served):
    lease_id = (await ask(served))["lease"]["id"]
    assert (await served.http.head(f"/v1/leases/{lease_id}/hold")).status_code == 405
    assert [lease["held"] for lease in await leases(served)] == [False]


async def test_who_waits_while_the_daemon_stops_is_told_to_ask_the_next(served: Served):
    served.comfyui.push(1)
    waiting = asyncio.create_task(
        served.http.post("/v1/admissions", json={"required": "20GiB", "owner": "w", "wait_seconds": 600})
    )
    await served.got("/v1/leases", lambda body: body["line"])
    served.daemon.admissions.hang_up()
    reply = await waiting
    assert (reply.status_code, error_of(reply)["type"]) == (503, "stopping")
    assert served.daemon.admissions.book.leases == {}
