"""Memory stays short while nobody waits."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

import pytest

from tests.scenarios.stack import a_world, running
from vram_manager.domain.action import Stage
from vram_manager.domain.event import EventType
from vram_manager.simulator.comfyui_executor import ComfyUISettings

pytestmark = [pytest.mark.asyncio, pytest.mark.looptime]
GIB = 2**30
QUICK = {"vram_grace_seconds": 20.0, "comfyui_idle_seconds": 15.0}


async def test_an_idle_comfyui_is_freed_when_use_stays_over_the_threshold(tmp_path: Path) -> None:
    async with running(a_world(12), tmp_path, **QUICK) as stack:
        await stack.rendered()
        done = asyncio.get_running_loop().time()
        stack.world.ledger.claim("desktop", 3 * GIB)
        freed = await stack.until(EventType.FREED)
        at = next(at for at, event in stack.events if event.type is EventType.FREED)

    assert "over 75 %" in freed.reason
    assert freed.used_percent_before is not None
    assert freed.used_percent_before > 75
    assert freed.used_percent_after is not None
    assert freed.used_percent_after < 75
    assert at >= done + 15
    assert stack.told(EventType.PRESSURE_BEGAN, EventType.PRESSURE_ENDED)[-1].type is EventType.PRESSURE_ENDED


async def test_what_a_custom_node_holds_past_the_unload_threshold_is_unloaded_in_the_same_episode(
    tmp_path: Path,
) -> None:
    held = ComfyUISettings(custom_node_bytes=2 * GIB)
    async with running(a_world(12, comfyui_settings=held), tmp_path, **QUICK) as stack:
        await stack.rendered()
        stack.world.ledger.claim("worker", stack.world.ledger.free_bytes - GIB // 4)
        await stack.until(EventType.FREE_ASKED)
        await asyncio.sleep(1.5)
        stack.world.ledger.claim("other worker", stack.world.ledger.free_bytes - GIB // 2)
        await asyncio.sleep(20)

    stages = [event.stage for event in stack.told(EventType.FREED)]
    assert stages == [Stage.SOFT, Stage.UNLOAD]
    assert [event.stage for event in stack.told(EventType.FREE_ASKED)] == [Stage.SOFT, Stage.UNLOAD]


async def test_between_the_thresholds_the_node_cache_is_left_alone(tmp_path: Path) -> None:
    held = ComfyUISettings(custom_node_bytes=2 * GIB)
    async with running(a_world(12, comfyui_settings=held), tmp_path, **QUICK) as stack:
        await stack.rendered()
        stack.world.ledger.claim("worker", int(2.5 * GIB))
        await stack.until(EventType.FREE_ASKED)
        stack.world.ledger.claim("worker", int(0.2 * GIB))
        await asyncio.sleep(20)
        used_percent = 100 * (1 - stack.world.ledger.free_bytes / stack.world.ledger.usable_bytes)

    assert [event.stage for event in stack.told(EventType.FREE_ASKED)] == [Stage.SOFT]
    assert used_percent < 85


async def test_an_artist_between_two_renders_does_not_pay_for_an_empty_room(tmp_path: Path) -> None:
    async with running(a_world(12), tmp_path) as stack:
        stack.world.ledger.claim("desktop", 3 * GIB)
        await stack.rendered()
        await asyncio.sleep(300)

    assert stack.posts == 0


async def test_a_free_that_gives_nothing_back_is_said_once_and_not_repeated_until_comfyui_ran_again(
    tmp_path: Path,
) -> None:
    async with running(a_world(12, mode="dynamic"), tmp_path, **QUICK) as stack:
        stack.world.ledger.claim("somebody else", int(9.5 * GIB))
        await stack.until(EventType.FREE_UNCONFIRMED)
        await asyncio.sleep(600)
        quiet = stack.told(EventType.FREE_UNCONFIRMED)
        posts = stack.posts

    assert len(quiet) == 1
    assert posts == 2  # once, and once more in case the flag was lost


async def test_frees_keep_the_cooldown_between_them(tmp_path: Path) -> None:
    async with running(a_world(12), tmp_path, vram_free_cooldown=100.0, **QUICK) as stack:
        for seed in range(5):
            await stack.rendered(seed=seed)
            stack.world.ledger.claim("worker", stack.world.ledger.free_bytes - GIB)
            await asyncio.sleep(60)
            stack.world.ledger.release("worker")
        asked = [at for at, event in stack.events if event.type is EventType.FREE_ASKED]

    assert len(asked) >= 2
    assert min(later - earlier for earlier, later in itertools.pairwise(asked)) >= 100


async def test_a_dead_worker_is_told_once(tmp_path: Path) -> None:
    async with running(a_world(12), tmp_path) as stack:
        stack.world.comfyui.dead_worker = True
        await stack.render()
        await asyncio.sleep(1500)

    assert len(stack.told(EventType.WORKER_DEAD)) == 1
    assert stack.posts == 0
