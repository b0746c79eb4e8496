"""Ollama: its replies as they are, bad replies, and the calls we make."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest
import pytest_asyncio
import respx
from hypothesis import given
from hypothesis import strategies as st

from vram_manager.backends import Ollama
from vram_manager.backends.http import HttpStatus, JsonClient
from vram_manager.backends.ollama import HttpOllama, parse_ps, parse_version
from vram_manager.domain.reading import Missing
from vram_manager.errors import Rejected, SensorError, TimedOut

from .samples import names, ollama

BASE = "http://ollama.test:11434"


def ps(**changes: object) -> dict[str, Any]:
    """The reply with one model on one GPU, with fields of that model changed."""
    document: dict[str, Any] = copy.deepcopy(ollama("ps.one_gpu.json"))
    document["models"][0].update(changes)
    return document


@pytest_asyncio.fixture
async def server() -> AsyncIterator[respx.MockRouter]:
    """A mocked wire on which every call must be expected."""
    with respx.mock(base_url=BASE) as router:
        yield router


@pytest_asyncio.fixture
async def sut() -> AsyncIterator[Ollama]:
    backend: Ollama = HttpOllama(JsonClient(BASE, name="Ollama"))
    yield backend
    await backend.aclose()


@pytest.mark.parametrize("name", names("ollama", "ps.*.json"))
def test_every_recorded_list_is_parsed_as_it_is(name: str) -> None:
    document = ollama(name)
    models = parse_ps(document)
    assert [(model.name, model.digest, model.size_bytes, model.size_vram_bytes) for model in models] == [
        (entry["name"], entry["digest"], entry["size"], entry["size_vram"]) for entry in document["models"]
    ]
    assert all(model.expires_at is not None and model.expires_at.tzinfo is UTC for model in models)


def test_no_model_loaded_is_an_empty_list() -> None:
    assert parse_ps(ollama("ps.empty.json")) == ()


@pytest.mark.parametrize(
    ("name", "ratio"),
    [("ps.one_gpu.json", 0.0), ("ps.cpu.json", 1.0), ("ps.partial.json", 1 - 3789113261 / 6175902922)],
)
def test_the_part_on_the_cpu_follows_from_the_two_sizes(name: str, ratio: float) -> None:
    assert parse_ps(ollama(name))[0].cpu_ratio == pytest.approx(ratio)


def test_before_v0_10_there_is_no_context_length() -> None:
    assert parse_ps(ollama("ps.legacy_no_context_length.json"))[0].context_length is None


@pytest.mark.parametrize(
    ("name", "moment"),
    [
        ("ps.one_gpu.json", datetime(2026, 8, 22, 10, 5, 12, 345678, UTC)),
        ("ps.partial.json", datetime(2026, 8, 22, 10, 5, 12, 345678, UTC)),
        ("ps.legacy_no_context_length.json", datetime(2024, 12, 20, 19, 5, 12, 345678, UTC)),
        ("ps.forever.json", datetime(2318, 12, 2, 9, 47, 28, 854775, UTC)),
        ("ps.stopping.json", datetime(2026, 8, 22, 9, 59, 58, 0, UTC)),
    ],
)
def test_the_time_of_expiry_is_in_utc(name: str, moment: datetime) -> None:
    assert parse_ps(ollama(name))[0].expires_at == moment


@pytest.mark.parametrize(
    "odd",
    [
        "",
        "soon",
        "2026-08-22T10:05:12",
        "2026-13-01T00:00:00Z",
        "9999-12-31T23:59:59-08:00",
        5,
        None,
        [],
        True,
    ],
)
def test_an_odd_time_of_expiry_is_none(odd: object) -> None:
    assert parse_ps(ps(expires_at=odd))[0].expires_at is None


@pytest.mark.parametrize("name", ["gpt-oss:120b-cloud", "glm-5:cloud", "GLM-5:CLOUD", "user/deepseek-v4:671b-cloud"])
def test_cloud_models_are_left_out(name: str) -> None:
    document = ps()
    document["models"].append(ps(name=name)["models"][0])
    assert [model.name for model in parse_ps(document)] == ["llama3.1:8b"]


def test_a_model_with_cloud_elsewhere_in_its_name_stays() -> None:
    assert len(parse_ps(ps(name="cloud-writer:8b"))) == 1


def test_unknown_fields_are_ignored_and_families_may_be_null() -> None:
    document = ps(details={"families": None}, gpu_uuid="GPU-1", size_ram={"a": 1}) | {"next": 7}
    assert parse_ps(document) == parse_ps(ps())


@pytest.mark.parametrize(
    ("document", "why"),
    [
        pytest.param(ps(size_vram=-1), "models[0].size_vram: must be >= 0, is -1", id="negative"),
        pytest.param(ps(size=2**60), f"models[0].size: must be <= {2**50}, is {2**60}", id="absurd"),
        pytest.param(ps(size="5"), 'models[0].size: must be a integer, is "5"', id="text for a number"),
        pytest.param(ps(size=5.0), "models[0].size: must be a integer, is 5.0", id="float"),
        pytest.param(ps(size=True), "models[0].size: must be a integer, is true", id="bool"),
        pytest.param(ps(size=None), "models[0].size: must be a integer, is null", id="null size"),
        pytest.param(ps(name=""), 'models[0].name: must have at least 1 character, is ""', id="no name"),
        pytest.param(ps(name=7), "models[0].name: must be a string, is 7", id="number for a name"),
        pytest.param(ps(digest={}), "models[0].digest: must be a string, is an object", id="object"),
        pytest.param(ps(context_length=-1), "models[0].context_length: must be >= 0, is -1", id="context"),
        pytest.param({"models": None}, "models: must be a list, is null", id="null models"),
        pytest.param({"models": {}}, "models: must be a list, is an object", id="models is an object"),
        pytest.param({"models": [None]}, "models[0]: must be an object, is null", id="null model"),
        pytest.param({}, "models: is missing", id="no models"),
        pytest.param([], "the reply: must be an object, is a list", id="a list"),
        pytest.param(None, "the reply: must be an object, is null", id="null"),
    ],
)
def test_a_list_that_breaks_the_contract_is_rejected_with_the_place(document: object, why: str) -> None:
    with pytest.raises(Rejected) as caught:
        parse_ps(document)
    assert caught.value.why.replace("an integer", "a integer") == why


def test_a_model_without_a_size_is_rejected_and_not_taken_for_empty() -> None:
    document = ps()
    del document["models"][0]["size_vram"]
    with pytest.raises(Rejected, match=r"models\[0\]\.size_vram: is missing"):
        parse_ps(document)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
MODELS = st.fixed_dictionaries(
    {},
    optional={
        name: JSON | st.integers(0, 2**40) | st.text(st.characters())
        for name in ("name", "digest", "size", "size_vram", "context_length", "expires_at")
    },
)


@given(JSON | st.fixed_dictionaries({"models": JSON | st.lists(MODELS)}))
def test_whatever_json_comes_it_is_parsed_or_rejected(document: object) -> None:
    try:
        models, why = parse_ps(document), ""
    except Rejected as error:
        models, why = (), error.why
    assert why.isprintable()
    assert all(0 <= model.size_vram_bytes <= 2**50 for model in models)
    assert all(model.name.encode() for model in models)


@given(st.text())
def test_whatever_text_is_the_expiry_it_is_no_reason_to_reject(text: str) -> None:
    assert len(parse_ps(ps(expires_at=text))) == 1


@pytest.mark.parametrize("document", [{}, {"version": ""}, {"version": 3}, {"version": "1" * 2000}, [], None])
def test_a_version_that_is_none_is_rejected(document: object) -> None:
    with pytest.raises(Rejected):
        parse_version(document)


@pytest.mark.asyncio
async def test_a_reading_has_the_models_and_the_version(server: respx.MockRouter, sut: Ollama) -> None:
    server.get("/api/ps").respond(json=ollama("ps.partial.json"))
    server.get("/api/version").respond(json=ollama("version.json"))
    state = await sut.models()
    assert state.version == "0.32.15"
    assert state.models == parse_ps(ollama("ps.partial.json"))
    assert state.active_at is None


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("reply", "kind", "why"),
    [
        (httpx.Response(500), HttpStatus, "GET /api/ps: HTTP 500"),
        (httpx.Response(200, html="<p>"), Rejected, "GET /api/ps: not JSON (text/html)"),
        (
            httpx.Response(200, json=ps(size_vram=-1)),
            Rejected,
            "GET /api/ps: models[0].size_vram: must be >= 0, is -1",
        ),
        (httpx.ReadTimeout("slow"), TimedOut, "GET /api/ps: no answer within 15 s"),
        (httpx.ConnectError("refused"), SensorError, "GET /api/ps: refused"),
    ],
)
async def test_a_reading_that_fails_says_which_call_and_why(
    server: respx.MockRouter, sut: Ollama, reply: Any, kind: type[SensorError], why: str
) -> None:
    server.get("/api/ps").mock(side_effect=[reply, reply])
    with pytest.raises(SensorError) as caught:
        await sut.models()
    assert type(caught.value) is kind
    assert caught.value.why == why


@pytest.mark.asyncio
async def test_without_a_version_it_is_still_a_reading(server: respx.MockRouter, sut: Ollama) -> None:
    server.get("/api/ps").respond(json=ollama("ps.one_gpu.json"))
    server.get("/api/version").respond(404)
    state = await sut.models()
    assert isinstance(state.version, Missing)
    assert state.version.why == "GET /api/version: HTTP 404"
    assert len(state.models) == 1


@pytest.mark.asyncio
async def test_the_version_is_asked_again_after_it_failed(server: respx.MockRouter, sut: Ollama) -> None:
    server.get("/api/ps").respond(json=ollama("ps.empty.json"))
    server.get("/api/version").mock(side_effect=[httpx.Response(500), httpx.Response(200, json=ollama("version.json"))])
    assert isinstance((await sut.models()).version, Missing)
    assert (await sut.models()).version == "0.32.15"


@pytest.mark.asyncio
async def test_the_version_is_asked_again_after_a_reading_failed(server: respx.MockRouter, sut: Ollama) -> None:
    empty = httpx.Response(200, json=ollama("ps.empty.json"))
    server.get("/api/ps").mock(side_effect=[empty, httpx.Response(502), empty])
    server.get("/api/version").mock(
        side_effect=[httpx.Response(200, json={"version": "1"}), httpx.Response(200, json={"version": "2"})]
    )
    assert (await sut.models()).version == "1"
    with pytest.raises(SensorError):
        await sut.models()
    assert (await sut.models()).version == "2"


@pytest.mark.asyncio
@pytest.mark.looptime
async def test_the_version_is_asked_once_in_ten_minutes(server: respx.MockRouter, sut: Ollama) -> None:
    server.get("/api/ps").respond(json=ollama("ps.empty.json"))
    version = server.get("/api/version").respond(json=ollama("version.json"))
    await sut.models()
    await asyncio.sleep(599)  # virtual seconds
    await sut.models()
    assert version.call_count == 1
    await asyncio.sleep(1)
    await sut.models()
    assert version.call_count == 2


@pytest.mark.asyncio
async def test_unloading_asks_for_keep_alive_0_once(server: respx.MockRouter, sut: Ollama) -> None:
    server.get("/api/ps").respond(json=ollama("ps.one_gpu.json"))
    generate = server.post("/api/generate").respond(json=ollama("generate.unload.json"))
    await sut.unload("llama3.1:8b")
    assert json.loads(generate.calls.last.request.content) == {"model": "llama3.1:8b", "keep_alive": 0}
    assert generate.call_count == 1


@pytest.mark.asyncio
async def test_a_model_that_is_not_loaded_is_not_unloaded(server: respx.MockRouter, sut: Ollama) -> None:
    server.get("/api/ps").respond(json=ollama("ps.forever.json"))
    with pytest.raises(Rejected, match=r"llama3\.1:8b: not in GET /api/ps"):
        await sut.unload("llama3.1:8b")  # a POST would fail the test: nothing is mocked for it


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("status", "sample", "why"),
    [
        (404, "error.404.json", "POST /api/generate: HTTP 404: model 'no-such-model' not found"),
        (499, "error.499.json", "POST /api/generate: HTTP 499: request canceled"),
        (
            503,
            "error.503.json",
            "POST /api/generate: HTTP 503: server busy, please try again.  maximum pending requests exceeded",
        ),
    ],
)
async def test_an_unload_that_is_refused_says_what_ollama_said(
    server: respx.MockRouter, sut: Ollama, status: int, sample: str, why: str
) -> None:
    server.get("/api/ps").respond(json=ollama("ps.one_gpu.json"))
    server.post("/api/generate").respond(status, json=ollama(sample))
    with pytest.raises(Rejected) as caught:
        await sut.unload("llama3.1:8b")
    assert caught.value.why == why


@pytest.mark.asyncio
async def test_an_unload_that_gets_no_answer_is_timed_out_and_not_sent_again(
    server: respx.MockRouter, sut: Ollama
) -> None:
    server.get("/api/ps").respond(json=ollama("ps.one_gpu.json"))
    generate = server.post("/api/generate").mock(side_effect=httpx.ReadTimeout("slow"))
    with pytest.raises(TimedOut, match="POST /api/generate: no answer within 15 s"):
        await sut.unload("llama3.1:8b")
    assert generate.call_count == 1
