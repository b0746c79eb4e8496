"""What the simulated Ollama records: who asked, in which order, and who ran on the CPU without need."""

from __future__ import annotations

import asyncio

import pytest

from vram_manager.simulator.ledger import GIB
from vram_manager.simulator.ollama import SimulatedOllama
from vram_manager.simulator.ollama_runner import OllamaSettings
from vram_manager.simulator.world import OLLAMA_MODELS, flux_txt2img, txt2img

pytestmark = [pytest.mark.asyncio, pytest.mark.looptime]

MODEL = "qwen3:14b"  # 9.7 GiB of weights, cache and buffer, 0.4 of context, 1 of margin


def counted(tenants):
    """Requests that were served with layers on the CPU, and those of them that need not have been."""
    counters = tenants.world.ollama.counters
    served = tenants.world.ollama.served
    unneeded = counters.served_with_cpu_layers_that_would_have_fitted
    assert unneeded == sum(entry.gpu_ratio < 1 and entry.would_have_fitted for entry in served)
    return counters.served_partially + counters.served_on_cpu, unneeded


async def test_beside_an_idle_comfyui_a_model_on_the_cpu_need_not_be_there(settle):
    tenants = settle(gpu_gib=16)
    await tenants.render(flux_txt2img())
    await asyncio.sleep(5)
    await tenants.generate(MODEL)
    assert counted(tenants) == (1, 1)


async def test_beside_a_comfyui_with_prompts_it_must(settle):
    tenants = settle(gpu_gib=16)
    await tenants.render(flux_txt2img())
    await tenants.post(flux_txt2img(steps=1000, seed=2))
    await asyncio.sleep(5)
    await tenants.generate(MODEL)
    assert counted(tenants) == (1, 0)


async def test_beside_a_stranger_it_must(settle):
    tenants = settle(gpu_gib=16)
    tenants.ledger.claim("game", 8 * GIB)
    await tenants.generate(MODEL)
    assert counted(tenants) == (1, 0)


@pytest.mark.parametrize(("busy", "unneeded"), [(False, 1), (True, 0)])
async def test_beside_another_model_it_depends_on_whether_that_is_busy(settle, busy, unneeded):
    """The memory is taken after the first model's load, so that the second passes the preflight and spills."""
    tenants = settle(gpu_gib=20)
    await tenants.preload("llama3.1:8b")
    tenants.ledger.claim("game", 5 * GIB)
    first = asyncio.ensure_future(tenants.generate(options={"num_predict": 2000})) if busy else None
    await asyncio.sleep(1)
    await tenants.generate(MODEL)
    if first is not None:
        await first
    assert counted(tenants) == (1, unneeded)


async def test_the_context_of_an_idle_comfyui_cannot_be_had(settle):
    need = OLLAMA_MODELS[1].need_bytes(4096) + OllamaSettings().cuda_context_bytes + GIB
    for short_bytes, unneeded in ((0, 1), (1, 0)):
        tenants = settle(gpu_gib=24)
        await tenants.render(txt2img())
        await asyncio.sleep(20)
        context = tenants.world.comfyui.memory.lasting_bytes
        tenants.ledger.claim("game", tenants.ledger.usable_bytes - context - need + short_bytes)
        await tenants.generate(MODEL)
        assert counted(tenants) == (1, unneeded)


@pytest.mark.parametrize("layers", [0, 10])
async def test_layers_set_by_the_client_never_count(settle, layers):
    tenants = settle()
    await tenants.generate(MODEL, options={"num_gpu": layers})
    await tenants.generate(MODEL)
    assert counted(tenants) == (2, 0)


async def test_without_a_gpu_nothing_would_have_fitted(settle):
    tenants = settle()
    tenants.ledger.lost = True
    await tenants.generate(MODEL)
    assert counted(tenants) == (1, 0)


async def test_an_ollama_alone_takes_all_that_others_hold_for_immovable(settle):
    tenants = settle(gpu_gib=16)
    await tenants.render(flux_txt2img())
    alone = SimulatedOllama(tenants.ledger, OLLAMA_MODELS)
    others = tenants.ledger.held_bytes("comfyui")
    assert alone.scheduler.immovable_bytes() == others
    assert tenants.world.ollama.scheduler.immovable_bytes() < others


async def test_requests_are_recorded_in_the_order_in_which_they_arrived(settle):
    tenants = settle()
    calls = [
        ("/api/generate", {"prompt": "one", "stream": False}),
        ("/api/chat", {"messages": [{"role": "user", "content": "no"}, {"role": "user", "content": "two"}]}),
        ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_text", "text": "three"}]}]}),
        ("/v1/embeddings", {"input": ["three and a half", "four"]}),
    ]
    for path, body in calls:
        await tenants.ollama.post(path, json={"model": "llama3.1:8b"} | body)
    await tenants.ollama.post("/api/chat", json={"model": "none"}, headers={"x-request-id": "five"})
    ollama = tenants.world.ollama
    assert [asked.request_id for asked in ollama.asked] == ["one", "two", "three", "four", "five"]
    assert [asked.path for asked in ollama.asked] == [path for path, _ in calls] + ["/api/chat"]
    assert [served.request_id for served in ollama.served] == ["one", "two", "three", "four"]
