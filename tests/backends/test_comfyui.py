"""ComfyUI over HTTP: its replies as they are, bad replies, and the calls we make."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio
import respx
from hypothesis import given
from hypothesis import strategies as st

from vram_manager.backends import ComfyUI
from vram_manager.backends.comfyui import HttpComfyUI
from vram_manager.backends.comfyui_replies import (
    parse_model_sizes,
    parse_prompt,
    parse_prompts,
    parse_queue,
    parse_status,
    parse_system_stats,
)
from vram_manager.backends.http import HttpStatus, JsonClient
from vram_manager.domain.reading import Missing
from vram_manager.errors import Rejected, SensorError, TimedOut

from .samples import comfyui, cuda_bodies, names, websocket_lines

BASE = "http://comfyui.test:8188"
MIB = 1024 * 1024


def stats(**changes: object) -> dict[str, Any]:
    """A reply with one CUDA device, with fields of that device changed."""
    device = {
        "name": "cuda:0 NVIDIA GeForce RTX 3090 : cudaMallocAsync",
        "type": "cuda",
        "index": 0,
        "vram_total": 25298141184,
        "vram_free": 5987286066,
        "torch_vram_total": 17112760320,
        "torch_vram_free": 25541682,
    }
    return {"system": {"comfyui_version": "0.3.27", "argv": ["main.py"]}, "devices": [device | changes]}


def foreign(**fields: object) -> dict[str, Any]:
    """A device as forks tell it, without ComfyUI's own fields."""
    return {"devices": [{"name": "gpu", "type": "cuda"} | fields]}


@pytest_asyncio.fixture
async def server() -> AsyncIterator[respx.MockRouter]:
    """A mocked wire on which every call must be expected."""
    with respx.mock(base_url=BASE) as router:
        yield router


@pytest_asyncio.fixture
async def sut() -> AsyncIterator[ComfyUI]:
    backend: ComfyUI = HttpComfyUI(JsonClient(BASE, name="ComfyUI"))
    yield backend
    await backend.aclose()


@pytest.mark.asyncio
@pytest.mark.parametrize("name", names("comfyui", "*system_stats*cpu*.json"))
async def test_in_cpu_mode_there_is_no_device_with_vram(server: respx.MockRouter, sut: ComfyUI, name: str) -> None:
    server.get("/system_stats").mock(return_value=comfyui(name))
    state = await sut.stats()
    assert state.devices == ()
    assert state.version == ("0.33.0" if "v0.33.0" in name else "0.3.64")
    assert state.has_flag("--cpu")


@pytest.mark.parametrize("body", cuda_bodies(), ids=["RTX 3090", "RTX 4060", "RTX 4090"])
def test_cuda_devices_are_read_in_bytes(body: dict[str, Any]) -> None:
    (told,) = body["devices"]
    (device,) = parse_system_stats(body).devices
    assert (device.name, device.type, device.index) == (told["name"], "cuda", told.get("index"))
    assert (device.vram_total_bytes, device.vram_free_bytes) == (told["vram_total"], told["vram_free"])
    assert device.torch_total_bytes == told["torch_vram_total"]
    assert device.torch_free_bytes == told["torch_vram_free"]


def test_the_free_memory_others_can_have_is_a_whole_number_of_driver_pages() -> None:
    (device,) = parse_system_stats(cuda_bodies()[0]).devices
    assert device.device_free_bytes == 90969 * 65536


def test_several_devices_keep_their_order_and_those_without_vram_are_left_out() -> None:
    document = stats()
    document["devices"] += [stats(type="cpu", index=None)["devices"][0], stats(index=1)["devices"][0]]
    assert [device.index for device in parse_system_stats(document).devices] == [0, 1]


@pytest.mark.parametrize("kind", ["cpu", "CPU", "mps", "privateuseone"])
def test_ram_and_made_up_constants_are_not_vram(kind: str) -> None:
    assert parse_system_stats(stats(type=kind)).devices == ()


@pytest.mark.parametrize(
    "fields",
    [
        {"total_mem_mb": 24000, "free_mem_mb": 6000.5},
        {"total_mem_mb": 24000, "used_mem_mb": 17999.5},
        {"free_mem_mb": 6000.5, "used_mem_mb": 17999.5},
        {"vram_total": 24000 * MIB, "vram_used": 17999 * MIB + MIB // 2},
        {"vram_used": 17999 * MIB + MIB // 2, "vram_free": 6000 * MIB + MIB // 2},
        {"vram_total": 24000 * MIB, "vram_free": 6000 * MIB + MIB // 2, "total_mem_mb": 1, "free_mem_mb": 1},
    ],
)
def test_other_names_for_the_same_memory_are_understood(fields: dict[str, object]) -> None:
    (device,) = parse_system_stats(foreign(**fields)).devices
    assert (device.vram_total_bytes, device.vram_free_bytes) == (24000 * MIB, 6000 * MIB + MIB // 2)
    assert device.device_free_bytes == device.vram_free_bytes


@pytest.mark.parametrize(
    ("document", "why"),
    [
        pytest.param(stats(vram_free=-1), "devices[0].vram_free: must be >= 0, is -1", id="negative"),
        pytest.param(stats(vram_free=2**60), f"devices[0].vram_free: must be <= {2**50}, is {2**60}", id="absurd"),
        pytest.param(stats(vram_free="1"), 'devices[0].vram_free: must be a integer, is "1"', id="text"),
        pytest.param(stats(index="0"), 'devices[0].index: must be a integer, is "0"', id="index is text"),
        pytest.param(foreign(), "devices[0]: total and free memory do not follow from what it says", id="nothing"),
        pytest.param(
            foreign(vram_total=5, vram_used=6),
            "devices[0]: total and free memory do not follow from what it says",
            id="more used than there is",
        ),
        pytest.param(
            foreign(total_mem_mb=float("inf"), free_mem_mb=1),
            "devices[0].total_mem_mb: must be a finite number, is Infinity",
            id="infinite",
        ),
        pytest.param({"devices": None}, "devices: must be a list, is null", id="null devices"),
        pytest.param({"devices": [7]}, "devices[0]: must be an object, is 7", id="number for a device"),
        pytest.param({"system": {}}, "devices: is missing", id="no devices"),
        pytest.param(stats() | {"system": None}, "system: must be an object, is null", id="null system"),
        pytest.param(stats() | {"system": {"argv": "main.py"}}, 'system.argv: must be a list, is "main.py"', id="argv"),
        pytest.param([], "the reply: must be an object, is a list", id="a list"),
    ],
)
def test_stats_that_break_the_contract_are_rejected_with_the_place(document: object, why: str) -> None:
    with pytest.raises(Rejected) as caught:
        parse_system_stats(document)
    assert caught.value.why.replace("an integer", "a integer") == why


def test_a_server_that_hides_version_and_arguments_is_still_read() -> None:
    state = parse_system_stats({"devices": stats()["devices"]})
    assert isinstance(state.version, Missing)
    assert state.argv == ()
    assert len(state.devices) == 1


def test_unknown_fields_are_ignored() -> None:
    document = stats(temperature=80) | {"new": [1]}
    document["system"]["deploy_environment"] = "local-git"
    assert parse_system_stats(document) == parse_system_stats(stats())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
NUMBERS = ("vram_total", "vram_free", "vram_used", "torch_vram_total", "torch_vram_free")
MEGABYTES = ("total_mem_mb", "free_mem_mb", "used_mem_mb")
DEVICES = st.fixed_dictionaries(
    {"name": st.just("gpu") | JSON},
    optional={
        **{name: st.integers(0, 2**41) | JSON for name in NUMBERS},
        **{name: st.floats(0, 2**31) | JSON for name in MEGABYTES},
        "type": st.just("cuda") | JSON,
        "index": JSON,
    },
)


@given(JSON | st.fixed_dictionaries({"devices": JSON | st.lists(DEVICES)}, optional={"system": JSON}))
def test_whatever_json_comes_it_is_parsed_or_rejected(document: object) -> None:
    try:
        devices, why = parse_system_stats(document).devices, ""
    except Rejected as error:
        devices, why = (), error.why
    assert why.isprintable()
    assert all(0 <= device.vram_free_bytes <= 2**50 for device in devices)


@given(JSON)
def test_json_without_a_count_is_rejected_whatever_else_it_is(document: object) -> None:
    for parse in (parse_prompt, parse_queue):
        with pytest.raises(Rejected):  # never parsed: random JSON does not hit the right keys
            parse(document)


@pytest.mark.asyncio
@pytest.mark.parametrize("name", names("comfyui", "*prompt.get.*.json"))
async def test_the_queue_is_counted_from_get_prompt(server: respx.MockRouter, sut: ComfyUI, name: str) -> None:
    server.get("/prompt").mock(return_value=comfyui(name))
    assert await sut.queue_remaining() == (2 if "running" in name else 0)


@pytest.mark.asyncio
@pytest.mark.parametrize("status", [404, 405])
@pytest.mark.parametrize("name", names("comfyui", "*queue.*.json"))
async def test_where_there_is_no_get_prompt_the_queue_itself_is_counted(
    server: respx.MockRouter, sut: ComfyUI, name: str, status: int
) -> None:
    server.get("/prompt").respond(status)
    server.get("/queue").mock(return_value=comfyui(name))
    expected = 0 if "idle" in name else 2 if "running" in name else 1
    assert await sut.queue_remaining() == expected


@pytest.mark.asyncio
async def test_another_failure_of_get_prompt_is_not_answered_by_asking_more(
    server: respx.MockRouter, sut: ComfyUI
) -> None:
    server.get("/prompt").respond(500)
    with pytest.raises(HttpStatus, match="GET /prompt: HTTP 500"):
        await sut.queue_remaining()


@pytest.mark.parametrize(
    "document",
    [
        None,
        {},
        {"exec_info": None},
        {"exec_info": {"queue_remaining": -1}},
        {"exec_info": {"queue_remaining": "0"}},
    ],
)
def test_a_count_that_is_none_is_rejected_and_not_taken_for_idle(document: object) -> None:
    with pytest.raises(Rejected):
        parse_prompt(document)


@pytest.mark.asyncio
@pytest.mark.parametrize("name", names("comfyui", "*queue.*.json"))
async def test_the_workflows_of_the_recorded_queues_are_read_as_they_are(
    server: respx.MockRouter, sut: ComfyUI, name: str
) -> None:
    server.get("/queue").mock(return_value=comfyui(name))
    queue = comfyui(name).json()
    expected = [item[2] for item in queue["queue_running"] + queue["queue_pending"]]
    assert list(await sut.prompts()) == expected
    assert ("running" in name) == bool(queue["queue_pending"])


def queued(*numbers: float) -> list[object]:
    return [[number, f"id {number}", {"1": number}, {}, ["9"]] for number in numbers]


def test_running_workflows_come_first_and_pending_ones_in_the_order_of_their_turn() -> None:
    document = {"queue_running": queued(3), "queue_pending": queued(5, 7, 6.5, -8)}
    assert parse_prompts(document) == tuple({"1": number} for number in (3, -8, 5, 6.5, 7))


def test_at_most_twenty_workflows_are_kept() -> None:
    document = {"queue_running": queued(0), "queue_pending": queued(*range(30, 0, -1))}
    assert parse_prompts(document) == tuple({"1": number} for number in range(20))


@pytest.mark.parametrize(
    ("document", "why"),
    [
        ({}, "queue_running: is missing"),
        ({"queue_running": [], "queue_pending": None}, "queue_pending: must be a list, is null"),
        ({"queue_running": [[1, "id"]], "queue_pending": []}, "queue_running[0]: must be an object, is a list"),
        ({"queue_running": [], "queue_pending": ["id"]}, 'queue_pending[0]: must be an object, is "id"'),
        (
            {"queue_running": [], "queue_pending": [["1", "id", {}]]},
            'queue_pending[0].number: must be a number, is "1"',
        ),
        ([], "the reply: must be an object, is a list"),
    ],
)
def test_workflows_of_a_queue_that_breaks_the_contract_are_rejected_with_the_place(document: object, why: str) -> None:
    with pytest.raises(Rejected) as caught:
        parse_prompts(document)
    assert caught.value.why == why


QUEUED = JSON | st.lists(st.tuples(st.integers() | JSON, JSON, JSON, JSON).map(list))


@given(JSON | st.fixed_dictionaries({"queue_running": QUEUED, "queue_pending": QUEUED}))
def test_whatever_queue_comes_its_workflows_are_parsed_or_rejected(document: object) -> None:
    try:
        workflows, why = parse_prompts(document), ""
    except Rejected as error:
        workflows, why = (), error.why
    assert why.isprintable()
    assert len(workflows) <= 20


@pytest.mark.asyncio
async def test_a_queue_that_cannot_be_had_is_an_error_and_not_no_prompts(
    server: respx.MockRouter, sut: ComfyUI
) -> None:
    server.get("/queue").respond(500)
    with pytest.raises(HttpStatus, match="GET /queue: HTTP 500"):
        await sut.prompts()


@pytest.mark.parametrize("document", [{}, {"queue_running": []}, {"queue_running": [], "queue_pending": None}])
def test_half_a_queue_is_rejected_and_not_taken_for_idle(document: object) -> None:
    with pytest.raises(Rejected):
        parse_queue(document)


@pytest.mark.asyncio
@pytest.mark.parametrize("name", names("comfyui", "free.*.json", "api.free*.json"))
async def test_a_free_is_taken_when_the_status_is_2xx_and_refused_otherwise(
    server: respx.MockRouter, sut: ComfyUI, name: str
) -> None:
    reply = comfyui(name)
    route = server.post("/free").mock(return_value=reply)
    if reply.is_success:
        await sut.free({"unload_models": True})
    else:
        with pytest.raises(HttpStatus) as caught:
            await sut.free({"unload_models": True})
        assert caught.value.why == f"POST /free: HTTP {reply.status_code}"
    assert json.loads(route.calls.last.request.content) == {"unload_models": True}
    assert route.call_count == 1


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("failure", "kind", "calls"),
    [
        (httpx.ReadTimeout, TimedOut, 1),
        (httpx.ReadError, SensorError, 1),
        (httpx.ConnectError, SensorError, 2),
    ],
)
async def test_a_free_that_may_have_arrived_is_not_sent_again(
    server: respx.MockRouter,
    sut: ComfyUI,
    failure: type[httpx.TransportError],
    kind: type[SensorError],
    calls: int,
) -> None:
    route = server.post("/free").mock(side_effect=failure("gone"))
    with pytest.raises(SensorError) as caught:
        await sut.free({"unload_models": True})
    assert type(caught.value) is kind
    assert route.call_count == calls


@pytest.mark.parametrize("name", names("comfyui", "ws.events*.jsonl"))
def test_of_a_recorded_websocket_only_the_status_messages_count(name: str) -> None:
    lines = websocket_lines(name)
    told = [parse_status(line) for line in lines]
    expected = [
        message["data"]["status"]["exec_info"]["queue_remaining"] if message["type"] == "status" else None
        for message in map(json.loads, lines)
    ]
    assert told == expected
    assert told[0] == 0


@pytest.mark.parametrize(
    "message",
    [
        b'{"type": "status", "data": {"status": {"exec_info": {"queue_remaining": 3}}}}',
        b"\x00\x00\x00\x01\xff\xd8",
        "",
        "{",
        "[" * 100_000,
        "null",
        "[]",
        '{"type": ["status"]}',
        '{"type": "status"}',
        '{"type": "status", "data": null}',
        '{"type": "status", "data": {"status": {"exec_info": {"queue_remaining": -1}}}}',
        '{"type": "status", "data": {"status": {"exec_info": {"queue_remaining": true}}}}',
        '{"type": "crystools.monitor", "data": {"gpus": [{"vram_used": 1}]}}',
    ],
)
def test_every_other_message_is_nothing(message: str | bytes) -> None:
    assert parse_status(message) is None


@pytest.mark.asyncio
@pytest.mark.parametrize("name", names("comfyui", "experiment.models.vae*.json"))
async def test_the_sizes_of_the_files_in_a_folder_are_read(server: respx.MockRouter, sut: ComfyUI, name: str) -> None:
    server.get("/experiment/models/vae").mock(return_value=comfyui(name))
    assert await sut.model_sizes("vae") == {"PROBE_vae.safetensors": 105, "fake_sd_vae.safetensors": 334641044}


@pytest.mark.asyncio
@pytest.mark.parametrize("name", names("comfyui", "experiment.models.checkpoints*.json"))
async def test_an_empty_folder_has_no_files(server: respx.MockRouter, sut: ComfyUI, name: str) -> None:
    server.get("/experiment/models/checkpoints").mock(return_value=comfyui(name))
    assert await sut.model_sizes("checkpoints") == {}


@pytest.mark.asyncio
async def test_a_folder_that_is_not_there_is_rejected(server: respx.MockRouter, sut: ComfyUI) -> None:
    server.get("/experiment/models/no%2Fsuch").respond(404)
    with pytest.raises(HttpStatus, match="GET /experiment/models/no%2Fsuch: HTTP 404"):
        await sut.model_sizes("no/such")


def test_files_in_subfolders_keep_their_path_and_files_without_a_size_are_left_out() -> None:
    document = [{"name": "sub/a.safetensors", "size": 7}, {"name": "old.ckpt"}, {"name": "b.ckpt", "size": None}]
    assert parse_model_sizes(document) == {"sub/a.safetensors": 7}


def test_of_two_files_with_one_name_the_first_counts_as_it_is_the_one_that_is_loaded() -> None:
    assert parse_model_sizes([{"name": "a", "size": 1}, {"name": "a", "size": 2}]) == {"a": 1}


@pytest.mark.parametrize(
    ("document", "why"),
    [
        ({}, "files: must be a list, is an object"),
        ([7], "files[0]: must be an object, is 7"),
        ([{"name": "a", "size": -1}], "files[0].size: must be >= 0, is -1"),
        ([{"size": 1}], "files[0].name: is missing"),
    ],
)
def test_sizes_that_break_the_contract_are_rejected_with_the_place(document: object, why: str) -> None:
    with pytest.raises(Rejected) as caught:
        parse_model_sizes(document)
    assert caught.value.why == why
