"""Ollama's models give way to ComfyUI, come back, and are repaired; what is pinned or forbidden is left alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.scenarios.stack import Stack, a_world, running
from vram_manager.domain.event import EventType

pytestmark = [pytest.mark.asyncio, pytest.mark.looptime]

GIB = 2**30
LLAMA = "llama3.1:8b"
PORTS = {"gateway_ollama_port": 1, "gateway_comfyui_port": 2}
WAITED = "x-vram-manager-waited-seconds"


@asynccontextmanager
async def stacked(directory: Path, gib: float = 12, mode: str = "dynamic", **changed: Any) -> AsyncIterator[Stack]:
    async with running(a_world(gib, mode=mode), directory, **changed) as stack:
        await asyncio.sleep(6)
        yield stack


def now() -> float:
    return asyncio.get_running_loop().time()


async def drawn(stack: Stack) -> None:
    while stack.world.comfyui.queue.remaining:
        await asyncio.sleep(0.25)


def loaded(stack: Stack) -> dict[str, float]:
    """The share of each model that is on the GPU."""
    return {runner.model.name: runner.gpu_ratio for runner in stack.world.ollama.scheduler.runners.values()}


def asked_to_leave(stack: Stack) -> list[str | None]:
    return [event.target for event in stack.told(EventType.FREE_ASKED) if str(event.target).startswith("ollama:")]


# ---- ComfyUI's own edge


async def test_an_idle_model_leaves_when_comfyui_begins_to_work_though_nobody_told_before(tmp_path: Path) -> None:
    async with stacked(tmp_path) as stack:
        await stack.chat(keep_alive=-1)
        await asyncio.sleep(60)
        await stack.render(steps=100)
        posted_at = now()
        while loaded(stack):
            assert now() < posted_at + 10
            await asyncio.sleep(0.1)
        await drawn(stack)
        (entry,) = stack.world.comfyui.queue.history.values()

    assert asked_to_leave(stack) == [f"ollama:{LLAMA}"]
    assert entry["status"]["status_str"] == "success"


async def test_a_model_in_use_stays_when_comfyui_begins_to_work(tmp_path: Path) -> None:
    async with stacked(tmp_path, gateway_ollama_port=1) as stack:
        chat = asyncio.create_task(stack.chat(keep_alive=-1, options={"num_predict": 3000}))
        await asyncio.sleep(10)
        await stack.render(steps=20)
        answer = await chat

    assert answer.json()["eval_count"] == 3000
    assert stack.world.ollama.counters.loads == 1


async def test_a_model_that_fits_beside_what_comfyui_needs_stays(tmp_path: Path) -> None:
    async with stacked(tmp_path, gib=24) as stack:
        await stack.chat(keep_alive=-1)
        await asyncio.sleep(60)
        await stack.render(steps=100)
        await drawn(stack)
        await asyncio.sleep(30)

        assert loaded(stack) == {LLAMA: 1.0}


@pytest.mark.parametrize("changed", [{"ollama_pinned": (LLAMA,)}, {"ollama_evict": False}])
async def test_a_model_that_is_pinned_or_may_not_be_unloaded_is_never_asked_to_leave(
    tmp_path: Path, changed: dict[str, Any]
) -> None:
    async with stacked(tmp_path, gateway_max_wait=20.0, **PORTS, **changed) as stack:
        await stack.chat(keep_alive=-1)
        await asyncio.sleep(60)
        await stack.render(steps=50)
        await drawn(stack)
        await asyncio.sleep(60)

        assert loaded(stack) == {LLAMA: 1.0}
        assert stack.world.ollama.counters.unloads == 0
        assert asked_to_leave(stack) == []


# ---- warm back


async def test_the_last_model_comes_back_with_its_context_and_what_was_left_of_its_time(tmp_path: Path) -> None:
    async with stacked(tmp_path, ollama_warm_back=True, **PORTS) as stack:
        await stack.chat(keep_alive=1800, options={"num_ctx": 8192})
        left_at = now()
        await asyncio.sleep(30)
        for seed in (1, 2):
            await stack.render(seed=seed)
            await drawn(stack)
        assert loaded(stack) == {}
        await stack.until(EventType.WARMED_BACK, 200)
        (runner,) = stack.world.ollama.scheduler.runners.values()
        leaves_at = now() + runner.keep_alive_seconds

    assert runner.num_ctx == 8192
    assert runner.gpu_ratio == 1.0
    assert leaves_at == pytest.approx(left_at + 1800, abs=20)
    assert stack.told(EventType.REPAIR_FAILED) == []


async def test_a_model_does_not_come_back_while_prompts_still_come(tmp_path: Path) -> None:
    async with stacked(tmp_path, ollama_warm_back=True, **PORTS) as stack:
        await stack.chat(keep_alive=-1)
        await asyncio.sleep(30)
        for seed in range(8):
            await stack.render(seed=seed)
            await drawn(stack)
            await asyncio.sleep(20)
            assert loaded(stack) == {}
        counters = stack.world.ollama.counters

    assert counters.loads == 1


async def test_alternating_work_swaps_no_more_often_than_the_work_does(tmp_path: Path) -> None:
    async with stacked(tmp_path, ollama_warm_back=True, **PORTS) as stack:
        rounds = 0
        while now() < 1000:
            (await stack.chat(keep_alive=-1)).raise_for_status()
            await asyncio.sleep(20)
            await stack.render(seed=rounds)
            await drawn(stack)
            await asyncio.sleep(45)
            rounds += 1
        counters = stack.world.ollama.counters

    assert rounds >= 10
    assert counters.loads <= rounds + 1
    assert counters.unloads <= rounds + 1
    assert stack.posts <= rounds
    assert counters.served_on_gpu == rounds
    assert stack.world.comfyui.counters.out_of_memory == 0


# ---- profiles


async def _waits(directory: Path, profile: str) -> tuple[float, float]:
    """How long a chat waits in a stream of images, and an image in a stream of chats."""
    async with stacked(directory, vram_profile=profile, **PORTS) as stack:
        over = asyncio.Event()

        async def images() -> None:
            seed = 0
            while not over.is_set():
                seed += 1
                await stack.render(seed=seed, steps=8)
                await drawn(stack)

        async def chats() -> None:
            while not over.is_set():
                await stack.chat(keep_alive=-1)
                await asyncio.sleep(0.2)

        stream = asyncio.create_task(images())
        await asyncio.sleep(30)
        chat = await stack.chat(keep_alive=-1)
        over.set()
        await stream
        await drawn(stack)
        await asyncio.sleep(60)
        over.clear()
        stream = asyncio.create_task(chats())
        await asyncio.sleep(20)
        asked_at = now()
        await stack.render(seed=1000)
        image_waited = now() - asked_at
        over.set()
        await stream
        return float(chat.headers.get(WAITED, 0)), image_waited


async def test_who_waits_longer_for_the_other_is_chosen_by_the_profile(tmp_path: Path) -> None:
    chat_with_chats_first, image_with_chats_first = await _waits(tmp_path / "chat", "chat")
    chat_with_images_first, image_with_images_first = await _waits(tmp_path / "image", "image")

    assert chat_with_chats_first < chat_with_images_first < 60
    assert image_with_images_first < image_with_chats_first < 60


# ---- repair


async def test_a_model_on_the_cpu_is_repaired_before_it_serves_a_call_through_the_gateway(tmp_path: Path) -> None:
    async with stacked(tmp_path, mode="legacy", gateway_ollama_port=1) as stack:
        await stack.rendered()
        stack.world.ledger.resize("stranger", 4 * GIB)
        direct = {"model": LLAMA, "prompt": "hello", "stream": False, "keep_alive": -1}
        await _directly(stack, direct)
        assert loaded(stack)[LLAMA] < 1.0
        stack.world.ledger.release("stranger")
        await asyncio.sleep(2)
        answer = await stack.chat(keep_alive=-1)

        assert answer.status_code == 200
        assert stack.world.ollama.served[-1].gpu_ratio == 1.0
        assert len(stack.told(EventType.REPAIRED)) == 1


async def _directly(stack: Stack, body: dict[str, Any]) -> None:

    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app=stack.world.ollama.app), base_url="http://ollama", timeout=6000
    ) as client:
        path = "/api/embed" if "input" in body else "/api/generate"
        (await client.post(path, json=body)).raise_for_status()


async def test_an_embedding_model_is_repaired_like_any_other(tmp_path: Path) -> None:
    async with stacked(tmp_path, mode="legacy") as stack:
        free = stack.world.ledger.free_bytes
        stack.world.ledger.resize("stranger", free - GIB)
        await asyncio.sleep(2)
        body = {"model": "nomic-embed-text", "input": "hello", "keep_alive": -1}
        await _directly(stack, body)
        assert loaded(stack)["nomic-embed-text:latest"] < 1.0
        stack.world.ledger.release("stranger")
        repaired = await stack.until(EventType.REPAIRED)

        assert loaded(stack) == {"nomic-embed-text:latest": 1.0}
        assert repaired.models == ("nomic-embed-text:latest",)


async def test_who_asks_for_the_cpu_is_repaired_no_more_often_than_allowed(tmp_path: Path) -> None:
    async with stacked(tmp_path, gib=24) as stack:
        while now() < 900:
            (await stack.chat(keep_alive=-1, options={"num_gpu": 0})).raise_for_status()
            await asyncio.sleep(90)
        tries = stack.told(EventType.REPAIRED, EventType.REPAIR_FAILED)
        counters = stack.world.ollama.counters

    # There was room when it was loaded, so that is how it was meant.
    assert len(tries) <= 1
    assert counters.loads <= 2 + len(tries)


async def test_two_users_who_want_the_cpu_and_the_gpu_are_not_helped_for_ever(tmp_path: Path) -> None:
    async with stacked(tmp_path, mode="legacy") as stack:
        await stack.rendered()
        while now() < 900:
            await stack.chat(keep_alive=-1, options={"num_gpu": 0})
            await asyncio.sleep(100)
        tries = stack.told(EventType.REPAIRED, EventType.REPAIR_FAILED)

    assert len(tries) <= stack.daemon.cycle.rules.max_repairs_per_hour
