"""A chat falls to the CPU while an idle ComfyUI holds the card."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.scenarios.stack import a_world, running
from vram_manager.domain.action import Stage
from vram_manager.domain.event import EventType

pytestmark = [pytest.mark.asyncio, pytest.mark.looptime]
GIB = 2**30


@pytest.mark.parametrize("mode", ["legacy", "dynamic"])
async def test_an_idle_comfyui_is_freed_for_a_model_that_fell_to_the_cpu(mode: str, tmp_path: Path) -> None:
    async with running(a_world(12, mode=mode), tmp_path) as stack:
        await stack.rendered()
        await asyncio.sleep(15)
        await stack.chat()
        freed = await stack.until(EventType.FREED)
        await stack.unload()
        await stack.chat()
        models = (await stack.ollama.get("/api/ps")).json()["models"]

    assert freed.stage is Stage.SOFT
    assert freed.freed_bytes is not None
    assert freed.freed_bytes > 5 * GIB
    assert [model["size_vram"] for model in models] == [model["size"] for model in models]
    assert stack.posts == 1


async def test_every_byte_that_came_back_is_reported(tmp_path: Path) -> None:
    async with running(a_world(12), tmp_path) as stack:
        await stack.rendered()
        await asyncio.sleep(15)
        before = stack.world.ledger.held_bytes("comfyui")
        await stack.chat()
        freed = await stack.until(EventType.FREED)
        after = stack.world.ledger.held_bytes("comfyui")

    assert freed.freed_bytes == before - after


async def test_highvram_goes_straight_to_the_unload_stage(tmp_path: Path) -> None:
    async with running(a_world(12, mode="highvram"), tmp_path) as stack:
        await stack.rendered()
        await asyncio.sleep(15)
        await stack.chat()
        freed = await stack.until(EventType.FREED)

    assert freed.stage is Stage.UNLOAD


async def test_a_model_that_fits_beside_comfyui_frees_nothing(tmp_path: Path) -> None:
    async with running(a_world(24), tmp_path) as stack:
        await stack.rendered()
        await asyncio.sleep(15)
        await stack.chat()
        await asyncio.sleep(60)

    assert [event.models for event in stack.told(EventType.MODEL_DETECTED)] == [("llama3.1:8b",)]
    assert stack.posts == 0


async def test_a_model_put_on_the_cpu_by_wish_frees_nothing_when_there_is_room(tmp_path: Path) -> None:
    async with running(a_world(24), tmp_path) as stack:
        await stack.rendered()
        await asyncio.sleep(15)
        await stack.chat(options={"num_gpu": 0})
        await asyncio.sleep(60)

    assert stack.told(EventType.CPU_FALLBACK) != []
    assert stack.posts == 0


async def test_a_trigger_that_meets_a_long_render_is_answered_after_it(tmp_path: Path) -> None:
    async with running(a_world(13), tmp_path, vram_repair_fallback=False, ollama_evict=False) as stack:
        await stack.rendered()
        await stack.render(steps=400, seed=2)
        await asyncio.sleep(3)
        await stack.chat("qwen3:14b", keep_alive=-1)
        busy_until = 0.0
        while (await stack.comfyui.get("/prompt")).json()["exec_info"]["queue_remaining"]:
            await asyncio.sleep(0.2)
            busy_until = asyncio.get_running_loop().time()
            assert stack.posts == 0
        await stack.until(EventType.FREED)
        freed_at = next(at for at, event in stack.events if event.type is EventType.FREED)

    assert freed_at > busy_until
    assert stack.world.comfyui.counters.frees_posted_while_busy == 0


async def test_one_placement_is_answered_once(tmp_path: Path) -> None:
    async with running(a_world(12), tmp_path) as stack:
        await stack.rendered()
        await asyncio.sleep(15)
        await stack.chat(keep_alive=-1)
        await stack.until(EventType.FREED)
        for seed in (2, 3):
            await stack.rendered(seed=seed)
            await asyncio.sleep(20)

    assert stack.posts == 1


async def test_dry_run_says_what_it_would_do_and_does_nothing(tmp_path: Path) -> None:
    async with running(a_world(12), tmp_path, vram_dry_run=True) as stack:
        await stack.rendered()
        await asyncio.sleep(15)
        await stack.chat(keep_alive=-1)
        await asyncio.sleep(120)

    assert len([event for event in stack.told(EventType.DRY_RUN) if "on CPU" in event.reason]) == 1
    assert stack.posts == 0


async def test_a_lost_gpu_is_not_a_full_gpu(tmp_path: Path) -> None:
    async with running(a_world(12), tmp_path) as stack:
        await stack.rendered()
        await asyncio.sleep(15)
        stack.world.ledger.lost = True
        await stack.chat(keep_alive=-1)
        await asyncio.sleep(60)

    assert stack.told(EventType.SENSOR_LOST) != []
    assert stack.posts == 0
