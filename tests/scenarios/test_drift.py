"""A ComfyUI that keeps a little more after each run, and one that does not."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.scenarios.stack import Stack, a_world, running
from vram_manager.domain.action import FreeComfyUI, Stage
from vram_manager.domain.decision import ManualFree
from vram_manager.domain.event import EventType
from vram_manager.simulator.comfyui_memory import Mode
from vram_manager.simulator.ledger import MIB
from vram_manager.simulator.world import SDXL

pytestmark = [pytest.mark.asyncio, pytest.mark.looptime]
SD15 = "v1-5-pruned-emaonly-fp16.safetensors"
# Two of them warm up.
RENDERS = 14


def marks(stack: Stack) -> int:
    """How often it was seen what stays after a free."""
    return sum(floor.count for floor in stack.daemon.floors.now() if "full unload" in floor.measure)


async def freed(stack: Stack) -> None:
    """Somebody presses the button, and renders again once it has been seen what stays."""
    before = marks(stack)
    free = FreeComfyUI(stage=Stage.UNLOAD, forced=True)
    answer = await stack.daemon.cycle.free(ManualFree(action=free, force=True))
    assert answer.accepted, answer.why
    async with asyncio.timeout(60):
        while marks(stack) == before:
            await asyncio.sleep(1)


async def a_day(stack: Stack) -> None:
    """A render and a free, again and again; now and then a chat with a model that leaves at once."""
    for number in range(RENDERS):
        await stack.rendered(checkpoint=SDXL if number % 4 == 0 else SD15, seed=number, steps=30)
        if number % 5 == 0:
            await stack.chat(keep_alive=0)
        await asyncio.sleep(5)
        await freed(stack)


@pytest.mark.parametrize("mode", ["legacy", "dynamic"])
async def test_a_leaking_comfyui_is_told_once_with_what_ran_most(tmp_path: Path, mode: Mode) -> None:
    async with running(a_world(24, mode=mode), tmp_path) as stack:
        stack.world.comfyui.memory.leak_bytes_per_run = 50 * MIB
        await a_day(stack)

    (leak,) = stack.told(EventType.LEAK)
    assert leak.target == "comfyui"
    assert leak.reason == (
        "0.1 GiB -> 0.6 GiB kept after 11 runs: +450 MiB, 40.9 MiB each; "
        f"most often with {SD15} (8 runs) (measured: torch's memory in use after a full unload)"
    )
    assert any(view["leak"] for view in stack.daemon.floors.views())


@pytest.mark.parametrize("mode", ["dynamic", "highvram"])
async def test_the_same_day_without_a_leak_tells_of_none(tmp_path: Path, mode: Mode) -> None:
    async with running(a_world(24, mode=mode), tmp_path) as stack:
        await a_day(stack)

    assert stack.told(EventType.LEAK) == []
    (view,) = [view for view in stack.daemon.floors.views() if "full unload" in view["measure"]]
    assert view["growth_bytes"] == 0
    assert marks(stack) == RENDERS


async def test_a_leak_shows_where_nothing_is_ever_freed(tmp_path: Path) -> None:
    async with running(a_world(24), tmp_path) as stack:
        stack.world.comfyui.memory.leak_bytes_per_run = 20 * MIB
        for number in range(RENDERS):
            await stack.rendered(checkpoint=SD15, seed=number, steps=30)
            await asyncio.sleep(40)

    (leak,) = stack.told(EventType.LEAK)
    assert leak.reason.endswith(f"most often with {SD15} (11 runs) (measured: torch's memory in use when idle)")
