"""Ollama: its replies as they are, bad replies, and the calls we make."""

from __future__ import annotations

import asyncio
import copy
import json
import math
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
from vram_manager.backends.ollama import HttpOllama, parse_ps, parse_show, parse_tags, parse_version
from vram_manager.domain.model_facts import ModelFacts, StoredModel
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


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("context", "keep_alive_seconds", "asked"),
    [
        (None, None, {}),
        (8192, None, {"options": {"num_ctx": 8192}}),
        (None, 300, {"keep_alive": 300}),
        (None, 0.5, {"keep_alive": 0.5}),
        (4096, math.inf, {"options": {"num_ctx": 4096}, "keep_alive": -1}),
        (None, 0, {}),
    ],
)
async def test_loading_asks_for_the_model_without_a_prompt_and_with_what_was_told(
    server: respx.MockRouter,
    sut: Ollama,
    context: int | None,
    keep_alive_seconds: float | None,
    asked: dict[str, object],
) -> None:
    generate = server.post("/api/generate").respond(json=ollama("generate.load.json"))
    await sut.load("llama3.1:8b", context=context, keep_alive_seconds=keep_alive_seconds)
    assert json.loads(generate.calls.last.request.content) == {"model": "llama3.1:8b"} | asked
    assert generate.call_count == 1


@pytest.mark.asyncio
async def test_a_model_that_only_embeds_is_loaded_by_embedding_nothing(server: respx.MockRouter, sut: Ollama) -> None:
    server.post("/api/generate").respond(400, json={"error": '"nomic-embed-text" does not support generate'})
    embed = server.post("/api/embed").respond(json={"model": "nomic-embed-text", "embeddings": []})
    await sut.load("nomic-embed-text", context=2048, keep_alive_seconds=60)
    asked = {"model": "nomic-embed-text", "keep_alive": 60, "options": {"num_ctx": 2048}}
    assert json.loads(embed.calls.last.request.content) == asked


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("reply", "kind", "why"),
    [
        (
            httpx.Response(404, json=ollama("error.404.json")),
            HttpStatus,
            "POST /api/generate: HTTP 404: model 'no-such-model' not found",
        ),
        (
            httpx.Response(400, json={"error": "invalid model name"}),
            HttpStatus,
            "POST /api/generate: HTTP 400: invalid model name",
        ),
        (
            httpx.Response(500, json={"error": "llama-server process has terminated: out of memory"}),
            HttpStatus,
            "POST /api/generate: HTTP 500: llama-server process has terminated: out of memory",
        ),
        (httpx.ReadTimeout("slow"), TimedOut, "POST /api/generate: no answer within 330 s"),
        (httpx.ReadError("gone"), SensorError, "POST /api/generate: gone"),
    ],
)
async def test_a_load_that_fails_says_why_and_is_not_asked_for_again(
    server: respx.MockRouter, sut: Ollama, reply: Any, kind: type[SensorError], why: str
) -> None:
    generate = server.post("/api/generate").mock(side_effect=[reply])
    with pytest.raises(SensorError) as caught:
        await sut.load("no-such-model", context=None, keep_alive_seconds=None)
    assert type(caught.value) is kind
    assert caught.value.why == why
    assert generate.call_count == 1


def show(*tensors: tuple[str, str, list[int]], **info: object) -> dict[str, Any]:
    """A reply with these tensors; `info` counts for more than what the sample says, None takes a key away."""
    document: dict[str, Any] = copy.deepcopy(ollama("show.json"))
    document["tensors"] = [{"name": name, "type": kind, "shape": shape} for name, kind, shape in tensors]
    elements = sum(math.prod(shape) for _, _, shape in tensors)
    changed = document["model_info"] | {"general.parameter_count": elements} | info
    document["model_info"] = {key: value for key, value in changed.items() if value is not None}
    return document


def test_the_library_has_digest_and_size_of_each_model_and_no_cloud_models() -> None:
    assert parse_tags(ollama("tags.json")) == {
        "llama3.1:8b": StoredModel(
            digest="46e0c10c039e019119339687c3c1757cc81b9da49709a3b3924863ba87ca666e", file_bytes=4920753328
        )
    }


def test_a_model_with_a_remote_host_is_left_out_whatever_it_is_called() -> None:
    entry = {"name": "mine:8b", "digest": "ab", "size": 381}
    assert list(parse_tags({"models": [entry]})) == ["mine:8b"]
    assert parse_tags({"models": [entry | {"remote_host": "https://ollama.com:443"}]}) == {}
    assert parse_tags({"models": [entry | {"name": "gpt-oss:120b-cloud"}]}) == {}


@pytest.mark.parametrize(
    ("document", "why"),
    [
        ({"models": [{"name": "a", "digest": "b"}]}, "models[0].size: is missing"),
        ({"models": [{"name": "a", "digest": "b", "size": -1}]}, "models[0].size: must be >= 0, is -1"),
        ({"models": None}, "models: must be a list, is null"),
        ([], "the reply: must be an object, is a list"),
    ],
)
def test_a_library_that_breaks_the_contract_is_rejected_with_the_place(document: object, why: str) -> None:
    with pytest.raises(Rejected) as caught:
        parse_tags(document)
    assert caught.value.why == why


def test_the_facts_of_the_sample_are_read_as_they_are() -> None:
    assert parse_show(ollama("show.json")) == ModelFacts(
        architecture="llama",
        weights_bytes=None,  # 3 tensors of 292 are not all of its 8030261312 parameters
        layers=32,
        embedding_length=4096,
        heads=32,
        kv_heads=8,
        trained_context=131072,
        asked_context=8192,
        blob="667b0c1932bc6ffc593ed1d03f895bf2dc8dc6df21db3042284a6f4416b06a29",
    )


def test_keys_of_the_models_own_architecture_count() -> None:
    document = show(
        **{
            "general.architecture": "gemma3",
            "gemma3.attention.key_length": 256,
            "gemma3.attention.value_length": 128,
            "gemma3.attention.sliding_window": 1024,
            "gemma3.attention.sliding_window_pattern": 6,
            "gemma3.block_count": 34,
        }
    )
    facts = parse_show(document)
    assert (facts.architecture, facts.layers, facts.heads) == ("gemma3", 34, None)
    assert (facts.key_length, facts.value_length) == (256, 128)
    assert (facts.sliding_window, facts.layer_pattern) == (1024, 6)


@pytest.mark.parametrize("value", [None, [8, 8, 0, 8]])
def test_a_number_for_each_layer_is_not_one_number(value: object) -> None:
    document = ollama("show.json")
    document["model_info"]["llama.attention.head_count_kv"] = value
    assert parse_show(document).kv_heads is None


EMBEDDING = ("token_embd.weight", "Q4_K", [256, 1000])
OUTPUT = ("output.weight", "Q6_K", [256, 1000])
NORM = ("output_norm.weight", "F32", [256])


def test_the_input_embedding_stays_on_the_cpu_where_the_output_has_its_own() -> None:
    assert parse_show(show(EMBEDDING, OUTPUT, NORM)).weights_bytes == 1000 * 210 + 256 * 4


def test_an_embedding_that_is_the_output_too_counts() -> None:
    assert parse_show(show(EMBEDDING, NORM)).weights_bytes == 1000 * 144 + 256 * 4


@pytest.mark.parametrize(
    ("projector", "weights", "has"),
    [
        ({"general.parameter_count": 500}, 1000 * 144 + 1000, True),
        ({"general.architecture": "clip"}, None, True),
        ({}, 1000 * 144, False),
        (None, 1000 * 144, False),
    ],
)
def test_a_projector_counts_with_16_bits_for_each_parameter(
    projector: dict[str, object] | None, weights: int | None, has: bool
) -> None:
    facts = parse_show(show(EMBEDDING) | {"projector_info": projector})
    assert (facts.weights_bytes, facts.has_projector) == (weights, has)


@pytest.mark.parametrize(
    "document",
    [
        pytest.param(show(), id="no tensors"),
        pytest.param(show() | {"tensors": None}, id="null"),
        pytest.param(show(EMBEDDING, ("a", "Q9_Z", [256])), id="a type of the future"),
        pytest.param(show(EMBEDDING, **{"general.parameter_count": 300_000}), id="some are not listed"),
    ],
)
def test_weights_that_cannot_be_told_exactly_are_not_told(document: object) -> None:
    assert parse_show(document).weights_bytes is None


@pytest.mark.parametrize(
    ("parameters", "context"),
    [
        ("num_ctx                        8192", 8192),
        ('stop "a"\nnum_ctx 4096\nnum_gpu 1', 4096),
        ("num_ctx 0", None),
        ("num_ctx many", None),
        ('stop "num_ctx 5"', None),
        ("", None),
        (None, None),
    ],
)
def test_the_context_that_the_model_asks_for_is_in_its_parameters(parameters: object, context: int | None) -> None:
    assert parse_show(ollama("show.json") | {"parameters": parameters}).asked_context == context


@pytest.mark.parametrize(
    ("parameters", "layers"),
    [
        ("num_gpu                        0", 0),
        ("num_ctx 4096\nnum_gpu 33", 33),
        ("num_gpu -1", None),
        ("num_ctx 4096", None),
        (None, None),
    ],
)
def test_the_layers_that_the_model_wants_on_the_gpu_are_in_its_parameters(
    parameters: object, layers: int | None
) -> None:
    assert parse_show(ollama("show.json") | {"parameters": parameters}).asked_num_gpu == layers


BLOB = "0123456789abcdef" * 4
OTHER = "f" * 64


@pytest.mark.parametrize(
    ("modelfile", "blob"),
    [
        (f"FROM /blobs/sha256-{BLOB}\n", BLOB),
        (f"# FROM /blobs/sha256-{OTHER}\n\nFROM C:\\models\\blobs\\sha256-{BLOB}\nPARAMETER num_ctx 1", BLOB),
        (f"FROM sha256:{BLOB}", BLOB),
        (f"FROM /blobs/sha256-{BLOB}\nFROM /blobs/sha256-{OTHER}", BLOB),
        (f"FROM /models/safetensors\nFROM /blobs/sha256-{OTHER}", None),
        (f"FROM /blobs/sha256-{BLOB[:-1]}", None),
        (f"FROM /blobs/sha256-{BLOB}0", None),
        ("FROM llama3.1:8b", None),
        ("", None),
        (None, None),
    ],
)
def test_the_blob_is_the_digest_in_the_first_from(modelfile: object, blob: str | None) -> None:
    assert parse_show(ollama("show.json") | {"modelfile": modelfile}).blob == blob


def test_a_trained_context_of_nothing_is_not_told() -> None:
    assert parse_show(show(**{"llama.context_length": 0})).trained_context is None


def test_a_model_that_is_no_gguf_tells_little() -> None:
    assert parse_show({"details": {"format": "safetensors"}}) == ModelFacts(architecture="unknown")


@pytest.mark.parametrize(
    ("document", "why"),
    [
        (show(**{"llama.block_count": "32"}), 'block_count: must be a integer, is "32"'),
        (show(**{"llama.attention.head_count": -1}), "attention.head_count: must be >= 0, is -1"),
        (show(**{"general.architecture": 7}), "general.architecture: must be a string, is 7"),
        (show(("a", "F16", [2, -2])), "tensors[0].shape[1]: must be >= 0, is -2"),
        ({"model_info": []}, "model_info: must be a dictionary, is a list"),
        ({"modelfile": 7}, "modelfile: must be a string, is 7"),
        (None, "the reply: must be an object, is null"),
    ],
)
def test_facts_that_break_the_contract_are_rejected_with_the_place(document: object, why: str) -> None:
    with pytest.raises(Rejected) as caught:
        parse_show(document)
    assert caught.value.why.replace("an integer", "a integer").replace("a valid ", "a ") == why


INFO = st.dictionaries(
    st.sampled_from(
        ["general.architecture", "general.parameter_count", "llama.block_count", "llama.attention.head_count", "x"]
    ),
    st.sampled_from(["llama", "general"]) | st.integers(0, 2**60) | JSON,
)
TENSOR = st.fixed_dictionaries(
    {"name": st.text(), "type": st.sampled_from(["F16", "Q4_K", "?"]), "shape": st.lists(st.integers(0, 2**51))}
)


@given(
    JSON
    | st.fixed_dictionaries(
        {}, optional={"model_info": INFO | JSON, "projector_info": INFO | JSON, "tensors": st.lists(TENSOR) | JSON}
    )
)
def test_whatever_json_is_shown_it_is_parsed_or_rejected(document: object) -> None:
    try:
        facts, why = parse_show(document), ""
    except Rejected as error:
        facts, why = ModelFacts(architecture=""), error.why
    assert why.isprintable()
    assert facts.weights_bytes is None or facts.weights_bytes >= 0


@pytest.mark.asyncio
async def test_the_library_is_asked_of_api_tags(server: respx.MockRouter, sut: Ollama) -> None:
    server.get("/api/tags").respond(json=ollama("tags.json"))
    assert await sut.library() == parse_tags(ollama("tags.json"))


@pytest.mark.asyncio
async def test_showing_a_model_names_it_and_parses_the_reply(server: respx.MockRouter, sut: Ollama) -> None:
    route = server.post("/api/show").respond(json=ollama("show.json"))
    assert await sut.show("llama3.1:8b") == parse_show(ollama("show.json"))
    assert json.loads(route.calls.last.request.content) == {"model": "llama3.1:8b"}


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("reply", "why"),
    [
        (
            httpx.Response(404, json=ollama("error.404.json")),
            "POST /api/show: HTTP 404: model 'no-such-model' not found",
        ),
        (httpx.Response(200, html="<p>"), "POST /api/show: not JSON (text/html)"),
        (httpx.Response(200, json=[]), "POST /api/show: the reply: must be an object, is a list"),
    ],
)
async def test_a_model_that_cannot_be_shown_is_rejected(
    server: respx.MockRouter, sut: Ollama, reply: httpx.Response, why: str
) -> None:
    server.post("/api/show").mock(return_value=reply)
    with pytest.raises(Rejected) as caught:
        await sut.show("no-such-model")
    assert caught.value.why == why
