"""What is on the simulated Ollama's disk: blobs, tags over the same weights, pulls."""

from __future__ import annotations

import hashlib
import json

import pytest

from vram_manager.backends.ollama import parse_show
from vram_manager.simulator.world import OLLAMA_MODELS

pytestmark = [pytest.mark.asyncio, pytest.mark.looptime]

MODEL = "llama3.1:8b"
LLAMA = OLLAMA_MODELS[0]


def lines(reply):
    return [json.loads(line) for line in reply.text.splitlines()]


async def facts(tenants, model):
    return parse_show((await tenants.ollama.post("/api/show", json={"model": model})).json())


async def derive(tenants, name, **parameters):
    body = {"model": name, "from": MODEL, "parameters": parameters}
    return lines(await tenants.ollama.post("/api/create", json=body))


async def test_a_blob_is_counted_and_hashed_as_it_comes(settle):
    tenants = settle()
    content = b"weights " * 500_000
    digest = hashlib.sha256(content).hexdigest()

    async def pieces():
        for start in range(0, len(content), 65536):
            yield content[start : start + 65536]

    before = await tenants.ollama.head(f"/api/blobs/sha256:{digest}")
    put = await tenants.ollama.post(f"/api/blobs/sha256:{digest}", content=pieces())
    after = await tenants.ollama.head(f"/api/blobs/sha256:{digest}")
    again = await tenants.ollama.post(f"/api/blobs/sha256:{digest}", content=content)
    assert [reply.status_code for reply in (before, put, after, again)] == [404, 201, 200, 200]
    assert tenants.world.ollama.store.blobs == {digest: len(content)}


async def test_a_blob_with_another_digest_is_refused_and_forgotten(settle):
    tenants = settle()
    told, sent = "0" * 64, hashlib.sha256(b"other").hexdigest()
    reply = await tenants.ollama.post(f"/api/blobs/sha256:{told}", content=b"other")
    assert reply.status_code == 400
    assert reply.json() == {"error": f'digest mismatch, expected "sha256:{told}", got "sha256:{sent}"'}
    assert tenants.world.ollama.store.blobs == {}
    assert (await tenants.ollama.post("/api/blobs/short", content=b"")).status_code == 400


async def test_a_model_made_of_an_uploaded_file_runs(settle):
    tenants = settle()
    digest = hashlib.sha256(b"gguf").hexdigest()
    await tenants.ollama.post(f"/api/blobs/sha256:{digest}", content=b"gguf")
    body = {"model": "own", "files": {"own.gguf": f"sha256:{digest}"}}
    steps = lines(await tenants.ollama.post("/api/create", json=body))
    assert steps[-1] == {"status": "success"}
    assert (await facts(tenants, "own")).blob == digest
    assert (await tenants.generate("own"))["done_reason"] == "stop"


async def test_a_derived_model_has_the_blob_of_its_source_and_a_digest_of_its_own(settle):
    tenants = settle()
    assert (await derive(tenants, "mine", num_ctx=8192, num_gpu=0))[-1] == {"status": "success"}
    source, derived = await facts(tenants, MODEL), await facts(tenants, "mine")
    assert derived.blob == source.blob != None  # noqa: E711 - a chain
    assert (derived.asked_context, derived.asked_num_gpu) == (8192, 0)
    assert (source.asked_context, source.asked_num_gpu) == (None, None)
    digests = {model["name"]: model["digest"] for model in (await tenants.ollama.get("/api/tags")).json()["models"]}
    assert digests["mine:latest"] != digests[MODEL]


async def test_a_copy_has_the_digest_of_its_source(settle):
    tenants = settle()
    copied = await tenants.ollama.post("/api/copy", json={"source": MODEL, "destination": "second"})
    models = tenants.world.ollama.models
    assert copied.status_code == 200
    assert models["second:latest"].digest == models[MODEL].digest
    assert models["second:latest"].blob_digest == models[MODEL].blob_digest


async def test_two_tags_of_one_blob_share_one_runner_and_the_first_is_listed(settle):
    tenants = settle()
    await derive(tenants, "mine")
    await tenants.generate("mine")
    await tenants.generate(MODEL)
    listed = await tenants.listed()
    assert list(listed) == ["mine:latest"]
    assert listed["mine:latest"]["digest"] == tenants.world.ollama.models["mine:latest"].digest
    assert listed["mine:latest"]["digest"] != LLAMA.digest
    assert tenants.world.ollama.counters.loads == 1
    assert [served.model for served in tenants.world.ollama.served] == ["mine:latest"] * 2


async def test_either_tag_unloads_the_runner_they_share(settle):
    tenants = settle()
    await derive(tenants, "mine")
    await tenants.preload("mine")
    await tenants.preload(MODEL, keep_alive=0)
    assert await tenants.listed() == {}


async def test_a_tag_with_another_context_reloads_the_runner_they_share(settle):
    tenants = settle()
    await derive(tenants, "mine", num_ctx=8192)
    await tenants.generate(MODEL)
    await tenants.generate("mine")
    assert [model["context_length"] for model in (await tenants.listed()).values()] == [8192]
    assert tenants.world.ollama.counters.loads == 2


async def test_a_model_that_asks_for_the_cpu_gets_it_until_a_request_says_otherwise(settle):
    tenants = settle()
    await derive(tenants, "cpu", num_gpu=0)
    await tenants.generate("cpu")
    assert (await tenants.listed())["cpu:latest"]["size_vram"] == 0
    await tenants.generate("cpu", options={"num_gpu": 999})
    assert (await tenants.listed())["cpu:latest"]["size_vram"] > 0


async def test_a_pull_tells_its_progress_line_by_line(settle):
    tenants = settle()
    steps = lines(await tenants.ollama.post("/api/pull", json={"model": MODEL}))
    completed = [step["completed"] for step in steps if "completed" in step]
    assert steps[0] == {"status": "pulling manifest"}
    assert completed == sorted(completed)
    assert completed[-1] == LLAMA.file_bytes
    assert steps[-1] == {"status": "success"}


@pytest.mark.parametrize(("path", "source"), [("/api/pull", {}), ("/api/create", {"from": "no-such"})])
async def test_what_is_nowhere_ends_the_stream_with_an_error_and_is_a_500_without_one(settle, path, source):
    tenants = settle()
    streamed = await tenants.ollama.post(path, json={"model": "no-such"} | source)
    whole = await tenants.ollama.post(path, json={"model": "no-such", "stream": False} | source)
    wrong = {"error": "pull model manifest: file does not exist"}
    assert (streamed.status_code, lines(streamed)[-1]) == (200, wrong)
    assert (whole.status_code, whole.json()) == (500, wrong)


async def test_a_deleted_model_is_gone_and_cannot_be_deleted_again(settle):
    tenants = settle()
    first = await tenants.ollama.request("DELETE", "/api/delete", json={"model": MODEL})
    second = await tenants.ollama.request("DELETE", "/api/delete", json={"model": MODEL})
    copied = await tenants.ollama.post("/api/copy", json={"source": MODEL, "destination": "x"})
    assert (first.status_code, second.status_code, copied.status_code) == (200, 404, 404)
    assert second.json() == {"error": f"model '{MODEL}' not found"}
    assert copied.json() == {"error": f'model "{MODEL}" not found'}


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:11434", 200),
        ("127.0.0.1", 200),
        ("[::1]:11434", 200),
        ("192.168.1.10:11434", 200),
        ("0.0.0.0", 200),
        ("box.local", 200),
        ("ollama.internal:80", 200),
        ("ollama:11434", 403),
        ("evil.example", 403),
        ("8.8.8.8", 403),
    ],
)
async def test_on_loopback_a_foreign_host_is_refused(settle, host, status):
    tenants = settle(loopback=True)
    reply = await tenants.ollama.get("/api/version", headers={"host": host})
    anywhere = await settle().ollama.get("/api/version", headers={"host": host})
    assert (reply.status_code, anywhere.status_code) == (status, 200)
    assert (reply.text == "") == (status == 403)


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://ollama", 200),
        ("https://ollama", 200),
        ("http://localhost:3000", 200),
        ("https://127.0.0.1", 200),
        ("app://obsidian.md", 200),
        ("chrome-extension://abc", 200),
        ("http://evil.example", 403),
        ("http://localhost.evil.example", 403),
        ("null", 403),
    ],
)
async def test_a_foreign_origin_is_refused_on_any_listener(settle, origin, status):
    reply = await settle().ollama.get("/api/version", headers={"origin": origin})
    assert reply.status_code == status


async def test_a_page_that_may_ask_is_told_so_before_it_does(settle):
    tenants = settle()
    allowed = await tenants.ollama.options("/api/chat", headers={"origin": "http://localhost:3000"})
    refused = await tenants.ollama.options("/api/chat", headers={"origin": "http://evil.example"})
    assert (allowed.status_code, refused.status_code) == (204, 403)
    assert allowed.headers["access-control-allow-origin"] == "http://localhost:3000"
