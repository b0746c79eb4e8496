"""What the simulated Ollama does, in virtual time."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest

from vram_manager.simulator.ledger import GIB, MIB
from vram_manager.simulator.ollama import SimulatedOllama
from vram_manager.simulator.ollama_library import keep_alive_seconds
from vram_manager.simulator.ollama_runner import OllamaSettings
from vram_manager.simulator.world import OLLAMA_MODELS

pytestmark = [pytest.mark.asyncio, pytest.mark.looptime]

LLAMA = OLLAMA_MODELS[0]


def fill(tenants, free_bytes):
    """A foreign process leaves exactly `free_bytes`."""
    tenants.ledger.resize("foreign", 0)
    tenants.ledger.resize("foreign", tenants.ledger.free_bytes - free_bytes)


async def test_a_model_that_fits_is_wholly_on_the_gpu_and_holds_more_than_it_says(settle):
    tenants = settle()
    await tenants.generate()
    model = (await tenants.listed())["llama3.1:8b"]
    assert model["size_vram"] == model["size"] == LLAMA.need_bytes(4096)
    assert tenants.ledger.held_bytes("ollama:llama3.1:8b") == model["size_vram"] + 400 * MIB
    assert tenants.world.ollama.counters.served_on_gpu == 1


@pytest.mark.parametrize(("short_bytes", "spilled"), [(0, 0), (1, 1)])
async def test_one_gib_must_stay_free_or_a_layer_spills(settle, short_bytes, spilled):
    tenants = settle()
    fill(tenants, LLAMA.need_bytes(4096) + 400 * MIB + GIB - short_bytes)
    await tenants.generate()
    model = (await tenants.listed())["llama3.1:8b"]
    assert (model["size_vram"] < model["size"]) == bool(spilled)
    assert tenants.world.ollama.counters.loads_with_cpu_layers == spilled
    assert tenants.world.ollama.counters.served_partially == spilled


async def test_on_a_full_card_everything_is_on_the_cpu_and_much_slower(settle):
    tenants = settle()
    fast = await tenants.generate()
    await tenants.preload(keep_alive=0)
    await tenants.listed()
    fill(tenants, GIB)
    slow = await tenants.generate()
    assert (await tenants.listed())["llama3.1:8b"]["size_vram"] == 0
    assert slow["eval_duration"] > 10 * fast["eval_duration"]
    assert tenants.world.ollama.counters.served_on_cpu == 1


async def test_the_split_is_never_rebalanced(settle):
    tenants = settle()
    fill(tenants, 4 * GIB)
    await tenants.generate()
    before = (await tenants.listed())["llama3.1:8b"]["size_vram"]
    tenants.ledger.release("foreign")
    await tenants.generate()
    assert (await tenants.listed())["llama3.1:8b"]["size_vram"] == before > 0


async def test_a_model_is_listed_only_when_its_load_has_finished(settle):
    tenants = settle()
    loading = asyncio.ensure_future(tenants.preload())
    await asyncio.sleep(1)
    assert await tenants.listed() == {}
    assert tenants.ledger.held_bytes("ollama:llama3.1:8b") > 0
    await loading
    assert list(await tenants.listed()) == ["llama3.1:8b"]


async def test_before_v0_30_a_model_is_listed_while_it_loads(settle):
    ollama = SimulatedOllama(settle().ledger, OLLAMA_MODELS, version="0.24.0")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(ollama.app), base_url="http://o") as client:
        loading = asyncio.ensure_future(client.post("/api/generate", json={"model": "llama3.1:8b"}))
        await asyncio.sleep(1)
        listed = (await client.get("/api/ps")).json()["models"]
        await loading
    assert [model["name"] for model in listed] == ["llama3.1:8b"]
    await ollama.close()


async def test_a_sliding_window_model_reports_less_than_it_holds(settle):
    tenants = settle()
    await tenants.preload("gemma3:4b")
    model, real = (await tenants.listed())["gemma3:4b"], tenants.ledger.held_bytes("ollama:gemma3:4b")
    gemma = OLLAMA_MODELS[2]
    assert model["size"] == model["size_vram"]
    assert real - model["size_vram"] == gemma.swa_undercount_bytes + gemma.projector_bytes + 400 * MIB


async def test_unload_answers_before_the_memory_is_free_and_ps_waits_for_it(settle):
    tenants = settle()
    await tenants.preload()
    asked_at = asyncio.get_running_loop().time()
    reply = await tenants.preload(keep_alive=0)
    assert reply["done_reason"] == "unload"
    assert tenants.ledger.held_bytes("ollama:llama3.1:8b") > 0
    assert await tenants.listed() == {}
    assert tenants.ledger.held_bytes("ollama:llama3.1:8b") == 0
    assert asyncio.get_running_loop().time() - asked_at == pytest.approx(0.8)


async def test_unloading_what_is_not_loaded_says_the_same_and_loads_nothing(settle):
    tenants = settle()
    reply = await tenants.preload(keep_alive=0)
    assert reply["done_reason"] == "unload"
    assert tenants.world.ollama.counters.loads == 0


async def test_unload_waits_for_the_running_request(settle):
    tenants = settle()
    running = asyncio.ensure_future(tenants.generate())
    await asyncio.sleep(3)
    await tenants.preload(keep_alive=0)
    assert list(await tenants.listed()) == ["llama3.1:8b"]
    assert (await running)["done_reason"] == "stop"
    assert await tenants.listed() == {}


async def test_a_new_keep_alive_takes_back_a_pending_unload(settle):
    tenants = settle()
    first = asyncio.ensure_future(tenants.generate())
    await asyncio.sleep(3)
    await tenants.preload(keep_alive=0)
    await tenants.generate(keep_alive="5m")
    await first
    assert list(await tenants.listed()) == ["llama3.1:8b"]


async def test_an_idle_model_leaves_after_its_keep_alive(settle):
    tenants = settle()
    await tenants.preload(keep_alive="1m")
    await asyncio.sleep(59)
    assert list(await tenants.listed()) == ["llama3.1:8b"]
    await asyncio.sleep(2)
    assert await tenants.listed() == {}


async def test_forever_is_the_year_2318_or_so(settle):
    tenants = settle()
    await tenants.preload(keep_alive=-1)
    assert int((await tenants.listed())["llama3.1:8b"]["expires_at"][:4]) >= 2318
    await asyncio.sleep(100_000)
    assert list(await tenants.listed()) == ["llama3.1:8b"]


async def test_expires_at_keeps_its_old_value_while_busy(settle):
    tenants = settle()
    await tenants.preload(keep_alive="1m")
    before = (await tenants.listed())["llama3.1:8b"]["expires_at"]
    running = asyncio.ensure_future(tenants.generate(options={"num_predict": 6000}))
    await asyncio.sleep(90)
    assert (await tenants.listed())["llama3.1:8b"]["expires_at"] == before
    await running


async def test_a_second_model_is_judged_by_the_free_memory_of_the_first_ones_load(settle):
    """Memory freed since is invisible: the idle first model is evicted although both would fit."""
    tenants = settle()
    fill(tenants, 10 * GIB)
    await tenants.preload("llama3.1:8b")
    tenants.ledger.release("foreign")
    await tenants.preload("qwen3:14b")
    assert list(await tenants.listed()) == ["qwen3:14b"]
    assert tenants.world.ollama.counters.evictions == 1


async def test_memory_taken_since_the_first_load_ends_in_a_silent_partial_offload(settle):
    tenants = settle()
    await tenants.preload("llama3.1:8b")
    fill(tenants, 6 * GIB)
    await tenants.preload("qwen3:14b")
    models = await tenants.listed()
    assert set(models) == {"llama3.1:8b", "qwen3:14b"}
    assert 0 < models["qwen3:14b"]["size_vram"] < models["qwen3:14b"]["size"]


async def test_one_load_at_a_time(settle):
    tenants = settle()
    both = asyncio.gather(tenants.preload("llama3.1:8b"), tenants.preload("gemma3:4b"))
    await asyncio.sleep(2)
    assert list(tenants.ledger.holders()) == ["comfyui", "ollama:llama3.1:8b"]
    await both
    assert set(await tenants.listed()) == {"llama3.1:8b", "gemma3:4b"}


async def test_too_many_models_evict_the_idle_one_with_the_shortest_keep_alive(settle):
    tenants = settle(ollama_settings=OllamaSettings(max_loaded=2))
    await tenants.preload("llama3.1:8b", keep_alive="10m")
    await tenants.preload("gemma3:4b", keep_alive="1m")
    await tenants.ollama.post("/api/embed", json={"model": "nomic-embed-text", "input": "x"})
    assert set(await tenants.listed()) == {"llama3.1:8b", "nomic-embed-text:latest"}


@pytest.mark.parametrize(
    ("options", "loads"),
    [({}, 1), ({"temperature": 1}, 1), ({"num_ctx": 4096}, 1), ({"num_ctx": 8192}, 2), ({"num_gpu": 10}, 2)],
    ids=str,
)
async def test_only_other_runner_options_reload(settle, options, loads):
    tenants = settle()
    await tenants.preload()
    await tenants.generate(options=options)
    assert tenants.world.ollama.counters.loads == loads


async def test_num_gpu_zero_is_cpu_by_wish_and_serves_default_requests(settle):
    tenants = settle()
    await tenants.generate(options={"num_gpu": 0})
    await tenants.generate()
    assert (await tenants.listed())["llama3.1:8b"]["size_vram"] == 0
    assert tenants.world.ollama.counters.loads == 1
    assert tenants.ledger.held_bytes("ollama:llama3.1:8b") == 0


async def test_all_layers_by_wish_on_a_full_card_is_an_error_and_not_a_cpu_load(settle):
    tenants = settle()
    fill(tenants, 3 * GIB)
    reply = await tenants.ollama.post("/api/generate", json={"model": "llama3.1:8b", "options": {"num_gpu": 999}})
    assert reply.status_code == 500
    assert "out of memory" in reply.json()["error"]
    assert list(tenants.ledger.holders()) == ["comfyui", "foreign"]


async def test_a_client_that_hangs_up_aborts_the_load(settle):
    tenants = settle()
    loading = asyncio.ensure_future(tenants.preload())
    await asyncio.sleep(1)
    loading.cancel()
    await asyncio.gather(loading, return_exceptions=True)
    assert "ollama:llama3.1:8b" not in tenants.ledger.holders()
    assert await tenants.listed() == {}


async def test_a_client_that_hangs_up_ends_its_generation(settle):
    tenants = settle()
    await tenants.preload()
    running = asyncio.ensure_future(tenants.generate(options={"num_predict": 100_000}))
    await asyncio.sleep(10)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    tokens = tenants.world.ollama.counters.tokens
    await asyncio.sleep(10)
    assert tenants.world.ollama.counters.tokens == tokens > 0
    assert tenants.ledger.utilization_percent == 0


async def test_a_lost_gpu_puts_everything_on_the_cpu_without_a_word(settle):
    tenants = settle()
    tenants.ledger.lost = True
    assert (await tenants.generate())["done_reason"] == "stop"
    assert (await tenants.listed())["llama3.1:8b"]["size_vram"] == 0


async def test_a_hanging_scheduler_still_serves_what_is_loaded(settle):
    tenants = settle()
    await tenants.preload("llama3.1:8b")
    tenants.world.ollama.scheduler.hang = True
    waiting = asyncio.ensure_future(tenants.preload("gemma3:4b"))
    assert (await tenants.generate("llama3.1:8b"))["done_reason"] == "stop"
    await asyncio.sleep(1000)
    assert not waiting.done()
    tenants.world.ollama.scheduler.hang = False
    assert (await waiting)["done_reason"] == "load"


async def test_a_full_queue_is_a_503(settle):
    tenants = settle(ollama_settings=OllamaSettings(max_queue=1))
    first = asyncio.ensure_future(tenants.preload("llama3.1:8b"))
    await asyncio.sleep(0.1)
    reply = await tenants.ollama.post("/api/generate", json={"model": "gemma3:4b"})
    assert reply.status_code == 503
    assert reply.json() == {"error": "server busy, please try again.  maximum pending requests exceeded"}
    await first


@pytest.mark.parametrize(
    ("path", "body", "status", "name"),
    [
        ("/api/generate", {"model": "no-such-model"}, 404, "error.404"),
        ("/api/generate", {"model": "no-such-model", "keep_alive": 0}, 404, "error.404"),
        ("/api/chat", {"model": "no-such-model"}, 404, "error.404"),
        ("/api/embed", {"model": "no-such-model"}, 404, "error.404.embeddings"),
        ("/v1/chat/completions", {"model": "no-such-model"}, 404, "error.v1.404"),
    ],
)
async def test_an_unknown_model_is_refused_in_the_words_of_its_endpoint(settle, recorded, path, body, status, name):
    reply = await settle().ollama.post(path, json=body)
    assert reply.status_code == status
    assert reply.json() == recorded(f"ollama/{name}.json")


async def test_show_names_the_full_tag_of_an_unknown_model(settle):
    reply = await settle().ollama.post("/api/show", json={"model": "X"})
    assert (reply.status_code, reply.json()) == (404, {"error": "model 'x:latest' not found"})


async def test_an_embedding_model_does_not_generate_but_can_be_unloaded(settle):
    tenants = settle()
    refused = await tenants.ollama.post("/api/generate", json={"model": "nomic-embed-text", "prompt": "x"})
    unloaded = await tenants.ollama.post("/api/generate", json={"model": "nomic-embed-text", "keep_alive": 0})
    assert refused.status_code == 400
    assert "does not support generate" in refused.json()["error"]
    assert unloaded.json()["done_reason"] == "unload"


async def test_embed_with_keep_alive_zero_loads_runs_and_then_unloads(settle):
    tenants = settle()
    reply = await tenants.ollama.post(
        "/api/embed", json={"model": "nomic-embed-text", "input": ["a", "b"], "keep_alive": 0}
    )
    assert len(reply.json()["embeddings"]) == 2
    assert await tenants.listed() == {}
    assert tenants.world.ollama.counters.loads == 1


async def test_names_ignore_case_and_default_to_latest(settle):
    tenants = settle()
    await tenants.ollama.post("/api/embed", json={"model": "Nomic-Embed-Text"})
    assert list(await tenants.listed()) == ["nomic-embed-text:latest"]


async def test_streams_are_lines_of_json_with_the_numbers_in_the_last(settle):
    reply = await settle().ollama.post("/api/chat", json={"model": "llama3.1:8b", "messages": [{"role": "user"}]})
    lines = [json.loads(line) for line in reply.text.splitlines()]
    assert reply.headers["content-type"] == "application/x-ndjson"
    assert [line["done"] for line in lines] == [False] * 48 + [True]
    assert lines[-1]["eval_count"] == 48


async def test_v1_streams_are_server_sent_events(settle):
    tenants = settle()
    body = {"model": "llama3.1:8b", "messages": [{"role": "user"}], "max_tokens": 2}
    streamed = await tenants.ollama.post("/v1/chat/completions", json=body | {"stream": True})
    whole = await tenants.ollama.post("/v1/chat/completions", json=body)
    assert streamed.text.endswith("data: [DONE]\n\n")
    assert whole.json()["usage"]["completion_tokens"] == 2
    assert whole.json()["choices"][0]["message"]["content"] == "word word "


@pytest.mark.parametrize(
    ("method", "path", "body", "name"),
    [
        ("GET", "/api/ps", None, "ps.one_gpu"),
        ("GET", "/api/version", None, "version"),
        ("GET", "/api/tags", None, "tags"),
        ("POST", "/api/generate", {"model": "llama3.1:8b"}, "generate.load"),
        ("POST", "/api/generate", {"model": "llama3.1:8b", "keep_alive": 0}, "generate.unload"),
        ("POST", "/api/chat", {"model": "llama3.1:8b", "keep_alive": 0}, "chat.unload"),
    ],
)
async def test_replies_have_the_shape_of_the_contract(settle, recorded, shape, method, path, body, name):
    tenants = settle()
    await tenants.preload()
    reply = await tenants.ollama.request(method, path, json=body)
    assert shape(reply.json()) == shape(recorded(f"ollama/{name}.json"))


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (300, 300),
        ("5m", 300),
        ("1h30m", 5400),
        ("0", 0),
        (0, 0),
        ("0s", 0),
        (-1, float("inf")),
        ("-1m", float("inf")),
    ],
)
async def test_a_keep_alive_is_seconds_or_a_go_duration(value, seconds):
    assert keep_alive_seconds(value) == seconds


async def test_a_keep_alive_without_a_unit_is_a_400(settle):
    reply = await settle().ollama.post("/api/generate", json={"model": "llama3.1:8b", "keep_alive": "300"})
    assert reply.status_code == 400
