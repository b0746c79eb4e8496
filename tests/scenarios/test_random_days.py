"""Random schedules of chats, renders and pauses: what must never happen does not."""

from __future__ import annotations

import asyncio
import itertools
import tempfile
from pathlib import Path
from typing import TypeAlias

import looptime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.scenarios.stack import Stack, a_world, running
from vram_manager.domain.event import EventType

Act: TypeAlias = tuple[float, str, int]

acts = st.lists(
    st.tuples(
        st.one_of(st.floats(0, 3), st.floats(0, 60)),
        st.sampled_from(["chat llama3.1:8b", "chat qwen3:14b", "render", "unload"]),
        st.integers(1, 60),
    ),
    min_size=2,
    max_size=10,
)


async def _live(stack: Stack, day: list[Act]) -> None:
    async with asyncio.TaskGroup() as people:
        for number, (pause, act, amount) in enumerate(day):
            await asyncio.sleep(pause)
            if act.startswith("chat"):
                people.create_task(_quietly(stack.chat(act.removeprefix("chat "), keep_alive=amount)))
            elif act == "render":
                people.create_task(_quietly(stack.render(steps=amount, seed=number)))
            else:
                people.create_task(_quietly(stack.unload("llama3.1:8b")))
    await asyncio.sleep(90)


async def _quietly(call: object) -> None:
    await call  # type: ignore[misc]


def _spend(day: list[Act], mode: str, **changed: float) -> Stack:
    async def main() -> Stack:
        with tempfile.TemporaryDirectory() as directory:
            async with running(a_world(12, mode=mode), Path(directory), **changed) as stack:
                await _live(stack, day)
        return stack

    with asyncio.Runner(loop_factory=lambda: looptime.patch_event_loop(asyncio.new_event_loop())) as runner:
        return runner.run(main())


@pytest.mark.parametrize("mode", ["legacy", "dynamic", "highvram"])
@given(day=acts)
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_free_is_posted_while_a_prompt_runs_or_waits_and_none_within_the_cooldown(mode: str, day: list[Act]) -> None:
    stack = _spend(day, mode, vram_grace_seconds=5.0, comfyui_idle_seconds=4.0, vram_free_cooldown=20.0)

    assert stack.world.comfyui.counters.frees_posted_while_busy == 0
    firsts = [
        (at, event)
        for at, event in stack.events
        if event.type is EventType.FREE_ASKED and "asked again" not in event.reason
    ]
    for target in {event.target for _, event in firsts}:
        of_target = [(at, event) for at, event in firsts if event.target == target]
        for (earlier, _), (later, event) in itertools.pairwise(of_target):
            escalated = "still used after the soft free" in event.reason
            assert later - earlier >= (2.0 if escalated else 20.0)
    settled = stack.told(EventType.FREED, EventType.FREE_UNCONFIRMED)
    assert len(settled) == len(firsts)
    assert all((event.freed_bytes or 0) >= 0 for event in settled)
