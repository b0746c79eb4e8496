"""What gateways of this kind have been seen to do wrong, each as the truth that must hold here.

A card of 12 GiB: it holds the chat model or the checkpoint, never both.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.scenarios.stack import Stack, a_world, running
from vram_manager.gateway.proxy import Head
from vram_manager.simulator.comfyui_memory import Mode

pytestmark = [pytest.mark.asyncio, pytest.mark.looptime]

MODES: tuple[Mode, ...] = ("legacy", "dynamic", "highvram")
# What an unload or a free takes until it is proven, and what is left to do before and after it.
SWAP_SECONDS = 5.0
REPLY_SECONDS = 0.8


@asynccontextmanager
async def through_gateways(directory: Path, mode: Mode = "legacy", **changed: Any) -> AsyncIterator[Stack]:
    ports = {"gateway_ollama_port": 1, "gateway_comfyui_port": 2}
    async with running(a_world(12, mode=mode), directory, **ports, **changed) as stack:
        await asyncio.sleep(6)
        yield stack


def now() -> float:
    return asyncio.get_running_loop().time()


async def drawn(stack: Stack) -> None:
    while stack.world.comfyui.queue.remaining:
        await asyncio.sleep(0.25)


@pytest.mark.parametrize("mode", MODES)
async def test_a_chat_that_comes_after_an_image_job_has_begun_waits_until_it_has_ended(
    tmp_path: Path, mode: Mode
) -> None:
    async with through_gateways(tmp_path, mode) as stack:
        await stack.render(steps=40)
        await asyncio.sleep(0.2)
        chat = asyncio.create_task(stack.chat(keep_alive=-1))
        await drawn(stack)
        ended_at = now()
        await chat
        (served,) = stack.world.ollama.served
        (entry,) = stack.world.comfyui.queue.history.values()

    assert served.at > ended_at
    assert served.gpu_ratio == 1.0
    assert entry["status"]["status_str"] == "success"
    assert stack.world.comfyui.counters.frees_posted_while_busy == 0


@pytest.mark.parametrize("mode", MODES)
async def test_no_model_is_unloaded_under_a_chat_for_an_image_job_that_comes_meanwhile(
    tmp_path: Path, mode: Mode
) -> None:
    async with through_gateways(tmp_path, mode) as stack:
        chat = asyncio.create_task(stack.chat(keep_alive=-1, options={"num_predict": 600}))
        await asyncio.sleep(5)
        job = asyncio.create_task(stack.rendered())
        answer = await chat
        ended_at = now()
        accepted = list(stack.world.comfyui.accepted)
        await job

    assert answer.json()["eval_count"] == 600
    assert accepted == []
    assert now() > ended_at
    assert stack.world.ollama.counters.loads == 1
    assert stack.world.comfyui.counters.out_of_memory == 0


async def test_a_page_that_polls_comfyui_swaps_nothing_and_makes_nobody_wait(tmp_path: Path) -> None:
    async with through_gateways(tmp_path) as stack:
        await stack.chat(keep_alive=-1)
        answers = []
        for _ in range(20):
            for path in ("/queue", "/api/queue", "/prompt", "/history", "/system_stats", "/object_info"):
                (await stack.comfyui.get(path)).raise_for_status()
            await asyncio.sleep(2)
            answers.append(await stack.chat(keep_alive=-1))
        leases = dict(stack.daemon.admissions.book.leases)

    assert [answer.headers.get("x-vram-manager-waited-seconds") for answer in answers] == [None] * 20
    assert stack.world.ollama.counters.loads == 1
    assert stack.world.ollama.counters.unloads == 0
    assert stack.posts == 0
    assert leases == {}


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("GET", "/ws?clientId=1"),
        ("GET", "/api/ws"),
        ("GET", "/queue"),
        ("POST", "/queue"),
        ("GET", "/api/queue"),
        ("GET", "/prompt"),
        ("GET", "/api/history/1"),
        ("POST", "/upload/image"),
        ("POST", "/interrupt"),
        ("POST", "/api/free"),
        ("OPTIONS", "/prompt"),
    ],
)
async def test_only_a_prompt_is_looked_at_on_its_way_to_comfyui(tmp_path: Path, method: str, target: str) -> None:
    async with through_gateways(tmp_path) as stack:
        gate = stack.daemon.gateways.comfyui
        assert gate is not None
        held = gate.watch(Head(method=method, target=target, headers=()))

    assert held is None


async def test_first_chats_that_come_together_load_their_model_once(tmp_path: Path) -> None:
    async with through_gateways(tmp_path) as stack:
        await asyncio.gather(*(stack.chat(prompt=f"chat {number}") for number in range(3)))
        counters = stack.world.ollama.counters

    assert (counters.loads, counters.unloads, counters.evictions) == (1, 0, 0)
    assert counters.served_on_gpu == 3


async def test_two_overlapping_loops_of_chats_do_not_starve_an_image(tmp_path: Path) -> None:
    async with through_gateways(tmp_path) as stack:
        over = asyncio.Event()

        async def chats(pause: float) -> None:
            await asyncio.sleep(pause)
            while not over.is_set():
                (await stack.chat(keep_alive=-1)).raise_for_status()

        async with asyncio.TaskGroup() as people:
            people.create_task(chats(0.0))
            people.create_task(chats(REPLY_SECONDS / 2))
            await asyncio.sleep(20)
            waits = []
            for seed, pause in ((1, 30), (2, 0)):
                asked_at = now()
                await stack.render(seed=seed)
                waits.append(now() - asked_at)
                await drawn(stack)
                await asyncio.sleep(pause)
            over.set()
        counters = stack.world.ollama.counters
        longest = stack.daemon.cycle.rules.image_turn_seconds + 3 * REPLY_SECONDS + SWAP_SECONDS

    assert max(waits) <= longest
    assert counters.served_with_cpu_layers_that_would_have_fitted == 0
    assert counters.load_failures == stack.world.comfyui.counters.out_of_memory == 0


@pytest.mark.parametrize("mode", MODES)
async def test_a_stream_of_images_does_not_starve_a_chat(tmp_path: Path, mode: Mode) -> None:
    async with through_gateways(tmp_path, mode) as stack:
        over = asyncio.Event()
        render_seconds = 10.0

        async def images(first: int) -> None:
            seed = first
            while not over.is_set():
                await stack.render(seed=seed)
                seed += 1
                await drawn(stack)

        async with asyncio.TaskGroup() as people:
            people.create_task(images(0))
            people.create_task(images(1000))
            await asyncio.sleep(20)
            waits = []
            for pause in (30, 0):
                asked_at = now()
                await stack.chat(keep_alive=-1)
                waits.append(now() - asked_at)
                await asyncio.sleep(pause)
            over.set()
        counters = stack.world.ollama.counters
        # Its turn, the two prompts that ComfyUI has by then, the pause before a free, the swap, a load and the reply.
        longest = 10.0 + 2 * render_seconds + 2.0 + 2 * SWAP_SECONDS + 4.0

    assert max(waits) <= longest
    assert counters.served_on_gpu == 2
    assert stack.world.comfyui.counters.frees_posted_while_busy == 0


async def test_behind_a_long_render_a_chat_goes_on_when_its_time_is_over(tmp_path: Path) -> None:
    async with through_gateways(tmp_path) as stack:
        await stack.render(steps=1000)
        await asyncio.sleep(2)
        asked_at = now()
        answer = await stack.chat()
        (served,) = stack.world.ollama.served

    assert answer.status_code == 200
    assert answer.headers["x-vram-manager-waited-seconds"] == "60.00"
    assert served.at - asked_at < 60 + 5


async def test_behind_a_long_render_a_chat_is_refused_where_that_was_chosen(tmp_path: Path) -> None:
    async with through_gateways(tmp_path, gateway_on_timeout="refuse") as stack:
        await stack.render(steps=1000)
        await asyncio.sleep(2)
        answer = await stack.chat()
        served = list(stack.world.ollama.served)

    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) > 0
    assert "error" in answer.json()
    assert served == []
