"""The gate in front of ComfyUI: prompts keep their order whatever becomes of their clients, and leave no promise."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import looptime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes import until
from tests.scenarios.stack import Stack, a_world, running
from vram_manager.domain.action import FreeComfyUI
from vram_manager.domain.event import EventType
from vram_manager.gateway.comfyui import MOST_BYTES, ComfyUIGate
from vram_manager.gateway.proxy import Head, Held, Passage, Reply
from vram_manager.simulator.world import txt2img

T = TypeVar("T")
SD15 = "v1-5-pruned-emaonly-fp16.safetensors"
WAITED = "x-vram-manager-waited-seconds"
NO_FILES = {"1": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}}}


class Gated(Stack):
    """A stack with its gate at hand."""

    @property
    def gate(self) -> ComfyUIGate:
        gate = self.daemon.gateways.comfyui
        assert gate is not None
        return gate

    def prompt(self, body: bytes | None = None, **workflow: Any) -> Held:
        """A prompt that is on its way: its body has been seen."""
        held = self.gate.watch(Head(method="POST", target="/prompt", headers=()))
        assert held is not None
        held.look(json.dumps({"prompt": txt2img(**workflow)}).encode() if body is None else body)
        return held

    @property
    def promised(self) -> list[str]:
        return [lease.owner for lease in self.daemon.admissions.book.leases.values()]

    @property
    def line(self) -> list[str]:
        return [ticket.request.owner for ticket in self.daemon.admissions.book.line]


@asynccontextmanager
async def gated(directory: Path, *, gib: float = 12, mode: str = "legacy", **changed: Any) -> AsyncIterator[Gated]:
    ports = {"gateway_ollama_port": 1, "gateway_comfyui_port": 2}
    async with running(a_world(gib, mode=mode), directory, **ports, **changed) as stack:
        await asyncio.sleep(6)
        yield Gated(stack.world, stack.daemon, stack.ollama, stack.comfyui, stack.events)


def in_virtual_time(work: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=lambda: looptime.patch_event_loop(asyncio.new_event_loop())) as runner:
        return runner.run(work)


async def turns(number: int) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


# ---- order

# When it comes, for how many turns of the loop it stays at most, and how long ComfyUI takes to answer it.
clients = st.lists(
    st.tuples(st.integers(0, 5), st.one_of(st.none(), st.integers(0, 30)), st.integers(0, 5)), min_size=2, max_size=8
)


@given(plan=clients)
@settings(max_examples=60, deadline=None)
def test_whoever_leaves_at_whatever_moment_the_others_pass_in_the_order_in_which_they_came(
    plan: list[tuple[int, int | None, int]],
) -> None:
    came: list[int] = []
    passed: list[int] = []
    answered: list[int] = []

    async def client(stack: Gated, number: int, comes: int, reply: int) -> None:
        await turns(comes)
        held = stack.prompt(json.dumps({"prompt": NO_FILES}).encode())
        came.append(number)
        try:
            verdict = await held.may_pass()
            assert isinstance(verdict, Passage)
            passed.append(number)
            await turns(reply)
            held.answered(200)
            answered.append(number)
        finally:
            held.over()

    async def main() -> None:
        with tempfile.TemporaryDirectory() as directory:
            async with gated(Path(directory)) as stack:
                tasks = []
                for number, (comes, _, reply) in enumerate(plan):
                    tasks.append(asyncio.create_task(client(stack, number, comes, reply)))
                for turn in range(40):
                    await asyncio.sleep(0)
                    for task, (_, leaves, _) in zip(tasks, plan, strict=True):
                        if leaves == turn:
                            task.cancel()
                await asyncio.wait(tasks)
                late = stack.prompt(json.dumps({"prompt": NO_FILES}).encode())
                async with asyncio.timeout(1):
                    assert isinstance(await late.may_pass(), Passage)
                late.over()

    in_virtual_time(main())

    assert passed == [number for number in came if number in passed]
    stayed = [number for number, (_, leaves, _) in enumerate(plan) if leaves is None]
    assert sorted(answered) == sorted({*stayed, *answered})


@pytest.mark.asyncio
@pytest.mark.looptime
async def test_no_prompt_passes_before_comfyui_has_answered_the_one_before(tmp_path: Path) -> None:
    async with gated(tmp_path, gib=24) as stack:
        first, second = stack.prompt(), stack.prompt(seed=2)
        await first.may_pass()
        waiting = asyncio.create_task(second.may_pass())
        await asyncio.sleep(5)
        passed_too_soon = waiting.done()
        first.answered(200)
        await asyncio.wait_for(waiting, 1)
        first.over()
        second.over()

    assert not passed_too_soon


@pytest.mark.asyncio
@pytest.mark.looptime
async def test_a_client_that_leaves_while_it_waits_in_line_holds_up_nobody(tmp_path: Path) -> None:
    async with gated(tmp_path) as stack:
        talking = asyncio.create_task(stack.chat(keep_alive=-1, options={"num_predict": 1200}))
        await asyncio.sleep(4)
        first, second = stack.prompt(), stack.prompt(seed=2)
        gone = asyncio.create_task(first.may_pass())
        waiting = asyncio.create_task(second.may_pass())
        await asyncio.sleep(3)
        assert stack.line == ["comfyui"]
        gone.cancel()
        await asyncio.wait({gone})
        first.over()
        await talking
        verdict = await asyncio.wait_for(waiting, 20)
        second.over()

    assert isinstance(verdict, Passage)


@pytest.mark.asyncio
@pytest.mark.looptime
async def test_a_burst_of_prompts_arrives_whole_and_in_order(tmp_path: Path) -> None:
    async with gated(tmp_path, gib=24) as stack:
        ids = [f"00000000-0000-4000-8000-{number:012d}" for number in range(200)]
        workflow = txt2img(SD15, steps=1)
        bodies = [{"prompt": workflow, "prompt_id": prompt_id} for prompt_id in ids]
        answers = await asyncio.gather(*(stack.comfyui.post("/prompt", json=body) for body in bodies))
        accepted = list(stack.world.comfyui.accepted)
        promised = stack.promised

    assert [answer.status_code for answer in answers] == [200] * 200
    assert accepted == ids
    assert promised == ["comfyui"]


# ---- what is not understood passes


@pytest.mark.asyncio
@pytest.mark.looptime
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[1, 2]",
        b"null",
        b'{"no": "prompt"}',
        b'{"prompt": 3}',
        b'{"prompt": {"1": 2}}',
        b'{"prompt": {"1": {"class_type": null, "inputs": []}}}',
        b"\xff\xfe",
        b"[" * 100_000,
        json.dumps({"prompt": NO_FILES}).encode(),
        b'{"prompt": "' + b"x" * MOST_BYTES + b'"}',
    ],
    ids=range(12),
)
async def test_a_prompt_that_tells_nothing_of_what_it_loads_passes_without_a_promise(
    tmp_path: Path, body: bytes
) -> None:
    async with gated(tmp_path) as stack:
        await stack.chat(keep_alive=-1)
        held = stack.prompt(body)
        began = asyncio.get_running_loop().time()
        verdict = await held.may_pass()
        held.over()

        assert verdict == Passage()
        assert asyncio.get_running_loop().time() - began < 0.5
        assert stack.promised == []


# ---- promises


@pytest.mark.asyncio
@pytest.mark.looptime
async def test_one_promise_lasts_until_the_queue_is_empty(tmp_path: Path) -> None:
    async with gated(tmp_path, gib=24) as stack:
        await stack.render(steps=40)
        again = await stack.comfyui.post("/prompt", json={"prompt": txt2img(steps=40, seed=2)})
        assert stack.promised == ["comfyui"]
        while stack.world.comfyui.queue.remaining:
            assert stack.promised == ["comfyui"]
            await asyncio.sleep(1)
        await asyncio.sleep(10)

        assert WAITED not in again.headers
        assert stack.promised == []


@pytest.mark.asyncio
@pytest.mark.looptime
async def test_a_prompt_that_comfyui_refuses_leaves_no_promise(tmp_path: Path) -> None:
    async with gated(tmp_path, gib=24) as stack:
        body = {"prompt": {**txt2img(), "99": {"class_type": "NoSuchNode", "inputs": {}}}, "prompt_id": "not a uuid"}
        answer = await stack.comfyui.post("/prompt", json=body)
        await asyncio.sleep(12)

        assert answer.status_code == 400
        assert stack.promised == []


@pytest.mark.asyncio
@pytest.mark.looptime
@pytest.mark.parametrize("after", [*range(12), 20, 40])
async def test_a_client_that_leaves_while_it_is_promised_something_leaves_no_promise(
    tmp_path: Path, after: int
) -> None:
    async with gated(tmp_path, gib=24) as stack:
        held = stack.prompt()
        asking = asyncio.create_task(held.may_pass())
        await turns(after)
        asking.cancel()
        await asyncio.wait({asking})
        held.over()
        await asyncio.sleep(15)

        assert stack.promised == stack.line == []
        assert stack.daemon.gateways.waiting() == ()


@pytest.mark.asyncio
@pytest.mark.looptime
async def test_prompts_are_held_while_a_free_settles(tmp_path: Path) -> None:
    async with gated(tmp_path) as stack:
        await stack.rendered()
        chat = asyncio.create_task(stack.chat(keep_alive=5))
        cycle = stack.daemon.cycle
        await until(lambda: cycle.watch.pending is not None)
        assert cycle.watch.pending is not None
        assert isinstance(cycle.watch.pending.action, FreeComfyUI)
        held = stack.prompt(seed=2)
        asking = asyncio.create_task(held.may_pass())
        while cycle.watch.pending is not None:
            assert not asking.done()
            await asyncio.sleep(0.05)
        await asking
        held.over()
        await chat

    assert stack.told(EventType.FREED) != []


# ---- the wait is over


@pytest.mark.asyncio
@pytest.mark.looptime
async def test_a_prompt_that_waited_too_long_goes_on(tmp_path: Path) -> None:
    async with gated(tmp_path, gateway_max_wait=5.0) as stack:
        talking = asyncio.create_task(stack.chat(keep_alive=-1, options={"num_predict": 1200}))
        await asyncio.sleep(4)
        answer = await stack.comfyui.post("/prompt", json={"prompt": txt2img()})
        await asyncio.sleep(1)

        assert answer.status_code == 200
        assert float(answer.headers[WAITED]) == pytest.approx(5, abs=0.5)
        assert stack.line == stack.promised == []
        talking.cancel()
        await asyncio.wait({talking})


@pytest.mark.asyncio
@pytest.mark.looptime
async def test_or_is_refused_in_comfyuis_words(tmp_path: Path) -> None:
    async with gated(tmp_path, gateway_max_wait=5.0, gateway_on_timeout="refuse") as stack:
        talking = asyncio.create_task(stack.chat(keep_alive=-1, options={"num_predict": 1200}))
        await asyncio.sleep(4)
        answer = await stack.comfyui.post("/prompt", json={"prompt": txt2img()})
        accepted = list(stack.world.comfyui.accepted)
        talking.cancel()
        await asyncio.wait({talking})

    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.json()["error"]["type"] == "no_room"
    assert answer.json()["node_errors"] == {}
    assert accepted == []


@pytest.mark.asyncio
@pytest.mark.looptime
async def test_a_comfyui_out_of_reach_is_told_in_its_own_words(tmp_path: Path) -> None:
    async with gated(tmp_path) as stack:
        reply = stack.gate.unreachable(Head(method="POST", target="/prompt", headers=()), "connection refused")

    assert isinstance(reply, Reply)
    assert reply.status == 502
    assert json.loads(reply.body)["error"]["message"] == "ComfyUI cannot be reached: connection refused"


@pytest.mark.asyncio
@pytest.mark.looptime
@pytest.mark.parametrize("changed", [{"enable_vram_monitoring": False}, {"vram_dry_run": True}])
async def test_a_daemon_that_only_watches_holds_no_prompt(tmp_path: Path, changed: dict[str, Any]) -> None:
    async with gated(tmp_path, **changed) as stack:
        await stack.chat(keep_alive=-1)
        answer = await stack.comfyui.post("/prompt", json={"prompt": txt2img()})

        assert WAITED not in answer.headers
        assert stack.promised == []


@pytest.mark.asyncio
@pytest.mark.looptime
async def test_what_is_held_is_shown_with_the_reason(tmp_path: Path) -> None:
    async with gated(tmp_path) as stack:
        talking = asyncio.create_task(stack.chat(keep_alive=-1, options={"num_predict": 1200}))
        await asyncio.sleep(4)
        asking = asyncio.create_task(stack.comfyui.post("/prompt", json={"prompt": txt2img()}))
        await asyncio.sleep(2)
        (waiter,) = stack.daemon.gateways.waiting()
        for task in (asking, talking):
            task.cancel()
            await asyncio.wait({task})

    assert waiter.upstream == "comfyui"
    assert waiter.why.startswith("waits for ")
