"""The simulated Ollama in the shapes of OpenAI and Anthropic, in virtual time."""

from __future__ import annotations

import asyncio
import base64
import importlib
import json
import struct

import pytest

from vram_manager.simulator.ollama_runner import OllamaSettings

pytestmark = [pytest.mark.asyncio, pytest.mark.looptime]

MODEL = "llama3.1:8b"
ASK = {"model": MODEL, "max_tokens": 3, "messages": [{"role": "user", "content": "why?"}]}
WORDS = "word word word "


def events(text):
    """Name and content of each named event."""
    pairs = [block.split("\n") for block in text.strip().split("\n\n")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in pairs]


async def test_a_completion_is_one_text_and_streams_as_chunks(settle):
    tenants = settle()
    body = {"model": MODEL, "prompt": "why?", "max_tokens": 3}
    whole = (await tenants.ollama.post("/v1/completions", json=body)).json()
    streamed = await tenants.ollama.post("/v1/completions", json=body | {"stream": True})
    *chunks, done = [line.removeprefix("data: ") for line in streamed.text.split("\n\n") if line]
    assert whole["object"] == "text_completion"
    assert whole["choices"][0]["text"] == WORDS
    assert "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks) == WORDS
    assert json.loads(chunks[-1])["choices"][0]["finish_reason"] == "stop"
    assert done == "[DONE]"


async def test_the_usage_comes_last_in_a_stream_that_asks_for_it(settle):
    body = ASK | {"stream": True, "stream_options": {"include_usage": True}}
    streamed = await settle().ollama.post("/v1/chat/completions", json=body)
    last = json.loads(streamed.text.split("\n\n")[-3].removeprefix("data: "))
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 3


async def test_a_response_streams_as_numbered_events_and_ends_with_the_whole(settle):
    tenants = settle()
    body = {"model": MODEL, "input": "why?", "max_output_tokens": 3}
    whole = (await tenants.ollama.post("/v1/responses", json=body)).json()
    streamed = events((await tenants.ollama.post("/v1/responses", json=body | {"stream": True})).text)
    assert whole["output"][0]["content"][0]["text"] == WORDS
    assert [name for name, _ in streamed] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * 3,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [data["sequence_number"] for _, data in streamed] == list(range(11))
    assert all(data["type"] == name for name, data in streamed)
    assert streamed[-1][1]["response"]["output"] == whole["output"]


async def test_a_message_streams_as_anthropics_events(settle):
    tenants = settle()
    whole = (await tenants.ollama.post("/v1/messages", json=ASK)).json()
    streamed = events((await tenants.ollama.post("/v1/messages", json=ASK | {"stream": True})).text)
    assert whole["content"] == [{"type": "text", "text": WORDS}]
    assert [name for name, _ in streamed] == [
        "message_start",
        "content_block_start",
        *["content_block_delta"] * 3,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert "".join(data["delta"]["text"] for name, data in streamed if name == "content_block_delta") == WORDS


@pytest.mark.parametrize(
    ("body", "status", "kind", "message"),
    [
        (ASK | {"model": "no-such-model"}, 404, "not_found_error", "model 'no-such-model' not found"),
        (ASK | {"max_tokens": 0}, 400, "invalid_request_error", "max_tokens is required and must be positive"),
        (ASK | {"model": "nomic-embed-text"}, 400, "invalid_request_error", None),
    ],
)
async def test_anthropics_clients_are_refused_in_anthropics_shape(settle, body, status, kind, message):
    reply = await settle().ollama.post("/v1/messages", json=body)
    assert reply.status_code == status
    assert set(reply.json()) == {"type", "error", "request_id"}
    assert reply.json()["error"]["type"] == kind
    assert message in {reply.json()["error"]["message"], None}


async def test_a_full_queue_is_overloaded_to_anthropics_clients(settle):
    tenants = settle(ollama_settings=OllamaSettings(max_queue=1))
    first = asyncio.ensure_future(tenants.preload("qwen3:14b"))
    await asyncio.sleep(0.1)
    reply = await tenants.ollama.post("/v1/messages", json=ASK)
    assert (reply.status_code, reply.json()["error"]["type"]) == (503, "overloaded_error")
    await first


async def test_vectors_are_numbers_or_base64_as_asked(settle):
    tenants = settle()
    body = {"model": "nomic-embed-text", "input": ["a", "b"]}
    plain = (await tenants.ollama.post("/v1/embeddings", json=body)).json()
    packed = (await tenants.ollama.post("/v1/embeddings", json=body | {"encoding_format": "base64"})).json()
    assert [entry["index"] for entry in plain["data"]] == [0, 1]
    unpacked = struct.unpack("<2f", base64.b64decode(packed["data"][0]["embedding"]))
    assert unpacked == pytest.approx(plain["data"][0]["embedding"])


async def test_the_old_way_to_embed_has_one_vector(settle):
    tenants = settle()
    full = await tenants.ollama.post("/api/embeddings", json={"model": "nomic-embed-text", "prompt": "a"})
    empty = await tenants.ollama.post("/api/embeddings", json={"model": "nomic-embed-text"})
    assert full.json() == {"embedding": [0.6, 0.8]}
    assert empty.json() == {"embedding": []}


async def test_speech_is_sent_as_a_form_and_comes_back_as_text(settle):
    tenants = settle()
    files = {"file": ("speech.wav", b"RIFF" * 1000)}
    as_json = await tenants.ollama.post("/v1/audio/transcriptions", data={"model": MODEL}, files=files)
    wanted = {"model": MODEL, "response_format": "text"}
    as_text = await tenants.ollama.post("/v1/audio/transcriptions", data=wanted, files=files)
    without = await tenants.ollama.post("/v1/audio/transcriptions", data={"model": MODEL})
    assert as_json.json()["text"] == as_text.text != ""
    assert without.status_code == 400


async def test_one_model_is_told_or_refused(settle):
    tenants = settle()
    assert (await tenants.ollama.get(f"/v1/models/{MODEL}")).json()["id"] == MODEL
    assert (await tenants.ollama.get("/v1/models/no-such")).json()["error"]["type"] == "not_found_error"


async def test_a_zstd_body_is_unpacked_under_v1_only(settle):
    tenants = settle()
    pytest.importorskip("zstandard")
    packed = importlib.import_module("zstandard").compress(json.dumps(ASK).encode())
    headers = {"content-encoding": "zstd"}
    taken = await tenants.ollama.post("/v1/chat/completions", content=packed, headers=headers)
    native = await tenants.ollama.post("/api/chat", content=packed, headers=headers)
    assert (taken.status_code, native.status_code) == (200, 400)


async def test_what_cannot_be_unpacked_is_a_400(settle):
    reply = await settle().ollama.post("/v1/completions", content=b"{}", headers={"content-encoding": "zstd"})
    assert (reply.status_code, reply.json()["error"]["type"]) == (400, "invalid_request_error")


async def test_the_root_and_the_status_answer_without_a_model(settle):
    tenants = settle()
    assert (await tenants.ollama.get("/")).text == "Ollama is running"
    assert (await tenants.ollama.head("/")).status_code == 200
    assert (await tenants.ollama.get("/api/status")).json() == {"cloud": {"disabled": False, "source": "none"}}
