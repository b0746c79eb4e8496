"""Workers beside the stack: what they are promised is there, whoever had it before."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.policy.desk import request
from tests.scenarios.stack import Stack, a_world, running
from vram_manager.admissions import Answer
from vram_manager.domain.event import EventType
from vram_manager.simulator.ledger import GIB

pytestmark = [pytest.mark.asyncio, pytest.mark.looptime]


async def ask(stack: Stack, size: float, **more: Any) -> Answer:
    return await stack.daemon.admissions.ask(request(size, **more), asyncio.Event().wait)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["legacy", "dynamic"])
async def test_an_idle_comfyui_gives_way_and_the_worker_loads_what_it_was_promised(tmp_path: Path, mode: str) -> None:
    world = a_world(gpu_gib=12, mode=mode)  # type: ignore[arg-type]
    async with running(world, tmp_path) as stack:
        await stack.rendered()
        assert world.ledger.free_bytes < 9 * GIB
        answer = await ask(stack, 8, wait_seconds=120.0, margin_gib=1)
        assert answer.lease is not None
        world.ledger.claim("worker", 8 * GIB)
        assert world.ledger.ooms == 0
        freed = await stack.until(EventType.FREED)
        assert freed.reason == "worker-1 waits for 8.0 GiB"
        assert stack.told(EventType.FREE_UNCONFIRMED) == []


async def test_a_render_is_never_cut_short_for_a_worker(tmp_path: Path) -> None:
    world = a_world(gpu_gib=12, mode="legacy")
    async with running(world, tmp_path) as stack:
        await stack.rendered()
        await stack.render(steps=200)
        waiting = asyncio.create_task(ask(stack, 8, wait_seconds=1200.0, margin_gib=1))
        while (await stack.comfyui.get("/prompt")).json()["exec_info"]["queue_remaining"]:
            assert (stack.posts, waiting.done()) == (0, False)
            await asyncio.sleep(0.5)
        assert (await waiting).lease is not None
        world.ledger.claim("worker", 8 * GIB)


async def test_a_worker_waits_for_a_model_to_leave_and_is_told_when(tmp_path: Path) -> None:
    world = a_world(gpu_gib=12, mode="legacy")
    async with running(world, tmp_path, ollama_evict=False) as stack:
        await stack.chat(keep_alive="60s")
        await asyncio.sleep(5)
        refused = (await ask(stack, 8, wait_seconds=0.0, margin_gib=1)).verdict
        assert "Ollama holds" in refused.reason
        assert refused.retry_after_seconds == pytest.approx(55, abs=2)
        answer = await ask(stack, 8, id="again", wait_seconds=300.0, margin_gib=1)
        assert answer.lease is not None
        assert answer.waited_seconds == pytest.approx(55, abs=8)
        world.ledger.claim("worker", 8 * GIB)


async def test_a_model_of_ollama_is_asked_about_by_its_files_and_then_by_what_it_took(tmp_path: Path) -> None:
    world = a_world(gpu_gib=24, mode="legacy")
    async with running(world, tmp_path) as stack:
        estimates = stack.daemon.estimates
        first = await estimates.of(required=None, model="llama3.1:8b", context=None, workflow=None)
        assert first.source == "files"
        for _ in range(3):
            await stack.chat()
            await asyncio.sleep(3)
            await stack.unload()
            await asyncio.sleep(3)
        learned = await estimates.of(required=None, model="llama3.1:8b", context=None, workflow=None)
        assert (learned.source, learned.words) == ("learned", "p95 of 3 runs with a context of 4096")
        assert learned.size.bytes == pytest.approx(6 * GIB, rel=0.1)
