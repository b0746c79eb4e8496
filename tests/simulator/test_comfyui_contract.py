"""The simulated ComfyUI answers recorded requests as the recorded server did (ComfyUI 0.33.0)."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from vram_manager.simulator.comfyui import SimulatedComfyUI
from vram_manager.simulator.ledger import GIB, Ledger
from vram_manager.simulator.world import COMFYUI_FILES, txt2img

pytestmark = [pytest.mark.asyncio, pytest.mark.looptime]

SAME_BODY = [
    "features",
    "free.array_body",
    "free.ct_text_plain",
    "free.empty_body",
    "free.empty_object",
    "free.get_method",
    "free.invalid_json",
    "free.null_body",
    "free.put_method",
    "free.string_values",
    "free.trailing_slash",
    "history.unknown_id",
    "interrupt.idle",
    "options.free",
    "origin.host_container_origin_other",
    "origin.host_localhost_origin_127",
    "origin.host_loopback_origin_null",
    "origin.host_loopback_origin_other",
    "origin.host_loopback_origin_same",
    "origin.host_loopback_origin_same_otherport",
    "origin.none_host_container",
    "origin.sec_fetch_cross_site",
    "prompt.get.idle",
    "prompt.invalid",
    "prompt.invalid.bad_json",
    "prompt.invalid.empty_object",
    "prompt.invalid.no_outputs",
    "prompt.invalid.unknown_node",
    "queue.clear",
    "queue.delete_unknown",
    "queue.idle",
]
SAME_SHAPE = [
    "experiment.models.vae",
    "prompt.invalid.model_not_in_list",
    "prompt.prompt_id_not_uuid",
    "prompt.valid",
]


async def replay(tenants, exchange):
    request = exchange["request"]
    return await tenants.comfyui.request(
        request["method"], request["path"], headers=request["headers"], content=request["body"]
    )


@pytest.mark.parametrize("name", SAME_BODY)
async def test_the_reply_is_the_recorded_one(settle, recorded, name):
    exchange = recorded(f"comfyui/{name}.v0.33.0.json")
    reply = await replay(settle(), exchange)
    expected = exchange["response"]
    assert reply.status_code == expected["status"]
    if expected["json"] is None:
        assert reply.text == (expected["text"] or "")
    else:
        assert reply.json() == expected["json"]


@pytest.mark.parametrize("name", SAME_SHAPE)
async def test_the_reply_has_the_recorded_shape(settle, recorded, shape, name):
    exchange = recorded(f"comfyui/{name}.v0.33.0.json")
    reply = await replay(settle(), exchange)
    assert reply.status_code == exchange["response"]["status"]
    actual, expected = reply.json(), exchange["response"]["json"]
    if name == "prompt.invalid.model_not_in_list":
        for reasons in (actual, expected):
            reasons["node_errors"]["1"]["errors"][0]["extra_info"].pop("input_config")
    assert shape(actual) == shape(expected)


async def test_system_stats_has_the_recorded_keys(settle, recorded):
    expected = recorded("comfyui/system_stats.cpu.v0.33.0.json")["response"]["json"]
    actual = (await settle().comfyui.get("/api/system_stats")).json()
    assert list(actual["system"]) == list(expected["system"])
    assert list(actual["devices"][0]) == list(expected["devices"][0])
    assert actual["devices"][0]["name"] == "cuda:0 Simulated RTX 4090 : cudaMallocAsync"


async def test_history_and_queue_have_the_recorded_shape(settle, recorded, shape):
    tenants = settle()
    first = await tenants.post(txt2img(seed=1), client_id="me")
    await tenants.post(txt2img(seed=2), client_id="me")
    await asyncio.sleep(1)
    queue = (await tenants.comfyui.get("/queue")).json()
    expected = recorded("comfyui/queue.running.v0.33.0.json")["response"]["json"]
    for kind in ("queue_running", "queue_pending"):
        number, prompt_id, _, extra_data, outputs = queue[kind][0]
        assert shape([number, prompt_id, extra_data, outputs]) == shape(
            [value for index, value in enumerate(expected[kind][0]) if index != 2]
        )
    entry = await tenants.ended(first)
    (success,) = recorded("comfyui/history.success.v0.33.0.json")["response"]["json"].values()
    for part in ("status", "outputs", "meta"):
        assert shape(list(entry[part])) == shape(list(success[part]))
    assert shape(entry["status"]) == shape(success["status"])
    assert [name for name, _ in entry["status"]["messages"]] == [name for name, _ in success["status"]["messages"]]


async def test_an_older_server_takes_any_prompt_id_and_a_foreign_fetch_site():
    old = SimulatedComfyUI(Ledger(24 * GIB), COMFYUI_FILES, version="0.3.64")
    transport = httpx.ASGITransport(old.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://comfyui") as client:
        body = {"prompt": txt2img(), "prompt_id": "not-a-uuid"}
        reply = await client.post("/prompt", json=body, headers={"Sec-Fetch-Site": "cross-site"})
        unknown = await client.post("/prompt", json={"prompt": {"1": {"class_type": "X", "inputs": {}}}})
    await old.close()
    assert reply.json()["prompt_id"] == "not-a-uuid"
    assert unknown.json()["error"]["type"] == "invalid_prompt"


@pytest.mark.parametrize(
    "prompt",
    [
        [],
        {"1": "node"},
        {"1": {"class_type": "PreviewImage"}},
        {"1": {"class_type": "A", "inputs": {"x": ["9", 0]}}},
    ],
    ids=str,
)
async def test_a_malformed_prompt_is_refused(settle, prompt):
    reply = await settle().comfyui.post("/prompt", json={"prompt": prompt})
    assert reply.status_code == 400
    assert reply.json()["error"]["type"] == "invalid_prompt"
