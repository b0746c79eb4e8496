"""The gate in front of Ollama: which calls pass at once, which wait, together with whom, and what is left behind."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import until
from tests.scenarios.stack import Stack, a_world, running
from vram_manager.domain.action import UnloadModel
from vram_manager.gateway.ollama import OllamaGate
from vram_manager.gateway.proxy import Head, Held, Passage, Reply
from vram_manager.simulator.ollama_library import OllamaModel
from vram_manager.simulator.world import OLLAMA_MODELS

pytestmark = [pytest.mark.asyncio, pytest.mark.looptime]

GIB = 2**30
LLAMA = "llama3.1:8b"
WAITED = b"X-Vram-Manager-Waited-Seconds"
CHAT = {"messages": [{"role": "user", "content": "hello"}]}
# Another name for the weights of llama3.1:8b, with a manifest of its own.
TWIN = replace(OLLAMA_MODELS[0], name="twin:latest", blob=OLLAMA_MODELS[0].blob_digest)
MODELS: tuple[OllamaModel, ...] = (*OLLAMA_MODELS, TWIN)


class Gated(Stack):
    """A stack with its gate at hand."""

    @property
    def gate(self) -> OllamaGate:
        gate = self.daemon.gateways.ollama
        assert gate is not None
        return gate

    def call(self, model: str | None = LLAMA, path: str = "/api/chat", **body: Any) -> Held:
        """A call that is on its way: its body has been seen."""
        held = self.gate.watch(Head(method="POST", target=path, headers=()))
        assert held is not None
        held.look(json.dumps({"model": model, **(body or CHAT)}).encode())
        return held

    def passes_at_once(self, held: Held) -> bool:
        """Whether the call may go on without one turn of the loop."""
        asking = held.may_pass()
        try:
            asking.send(None)  # type: ignore[attr-defined]
        except StopIteration as told:
            held.over()
            return told.value == Passage()
        asking.close()  # type: ignore[attr-defined]
        held.over()
        return False

    @property
    def line(self) -> list[str]:
        return [ticket.request.owner for ticket in self.daemon.admissions.book.line]

    @property
    def promised(self) -> list[str]:
        return [lease.owner for lease in self.daemon.admissions.book.leases.values()]

    @property
    def waiting(self) -> list[str]:
        return [waiter.what for waiter in self.daemon.gateways.waiting()]

    async def fill(self) -> None:
        """A render takes the card, and lasts."""
        await self.render(steps=1500)
        await asyncio.sleep(10)


@asynccontextmanager
async def gated(directory: Path, *, gib: float = 12, settled: bool = True, **changed: Any) -> AsyncIterator[Gated]:
    made = a_world(gib, ollama_models=MODELS)
    async with running(made, directory, gateway_ollama_port=1, **changed) as stack:
        if settled:
            await asyncio.sleep(6)
        yield Gated(stack.world, stack.daemon, stack.ollama, stack.comfyui, stack.events)


async def soon(seconds: float = 2.0) -> None:
    await asyncio.sleep(seconds)


def waited_seconds(verdict: Passage | Reply) -> float:
    return float(dict(verdict.headers).get(WAITED, b"0"))


# ---- who passes at once


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/chat", CHAT),
        ("/api/generate", {"prompt": "hello", "keep_alive": "5m"}),
        ("/api/generate", {"prompt": "hello", "options": {"num_ctx": 4096, "temperature": 1}}),
        ("/v1/chat/completions", CHAT),
        ("/v1/responses", {"input": "hello"}),
        ("/v1/messages", CHAT),
    ],
)
async def test_a_call_of_a_model_on_the_gpu_is_not_held_for_one_turn_of_the_loop(
    tmp_path: Path, path: str, body: dict[str, Any]
) -> None:
    async with gated(tmp_path) as stack:
        await stack.chat(keep_alive=-1)
        await soon()

        assert stack.passes_at_once(stack.call(path=path, **body))
        assert stack.promised == []


@pytest.mark.parametrize("name", ["llama3.1:8b", "LLAMA3.1:8B", "library/llama3.1:8b", "llama3.1:8b:local"])
async def test_every_way_to_write_a_name_is_the_same_model(tmp_path: Path, name: str) -> None:
    async with gated(tmp_path) as stack:
        await stack.chat(keep_alive=-1)
        await soon()

        assert stack.passes_at_once(stack.call(name))


async def test_another_tag_of_the_same_weights_is_answered_by_the_model_that_is_loaded(tmp_path: Path) -> None:
    async with gated(tmp_path) as stack:
        await stack.chat(keep_alive=-1)
        await soon()
        first = await stack.chat(TWIN.name, keep_alive=-1)
        await soon()

        assert waited_seconds_of(first) < 0.5
        assert stack.passes_at_once(stack.call(TWIN.name))
        assert stack.world.ollama.counters.loads == 1
        assert stack.world.ollama.counters.unloads == 0
        assert stack.promised == stack.line == []


def waited_seconds_of(response: Any) -> float:
    return float(response.headers.get(WAITED.decode(), 0))


@pytest.mark.parametrize(
    ("model", "path", "body"),
    [
        ("gpt-oss:120b-cloud", "/api/chat", CHAT),
        ("gpt-oss:cloud", "/v1/chat/completions", CHAT),
        (LLAMA, "/api/generate", {"keep_alive": 0}),
        (LLAMA, "/api/chat", {"messages": [], "keep_alive": "0s"}),
        (LLAMA, "/api/generate", {"prompt": "hello", "options": {"num_gpu": 0}}),
        (None, "/api/chat", CHAT),
    ],
)
async def test_a_call_that_loads_nothing_onto_the_gpu_passes_at_once_on_a_full_card(
    tmp_path: Path, model: str | None, path: str, body: dict[str, Any]
) -> None:
    async with gated(tmp_path) as stack:
        await stack.fill()

        assert stack.passes_at_once(stack.call(model, path, **body))


async def test_a_body_that_is_no_json_passes_at_once(tmp_path: Path) -> None:
    async with gated(tmp_path) as stack:
        held = stack.gate.watch(Head(method="POST", target="/api/chat", headers=()))
        assert held is not None
        held.look(b'{"model": "llama3.1:8b", ')

        assert stack.passes_at_once(held)


async def test_a_model_that_ollama_does_not_have_is_left_to_its_own_answer(tmp_path: Path) -> None:
    async with gated(tmp_path) as stack:
        await stack.fill()
        answer = await stack.chat("no-such-model")

        assert answer.status_code == 404
        assert waited_seconds_of(answer) == 0
        assert stack.promised == stack.line == stack.waiting == []


# ---- who asks


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/generate", {}),
        ("/api/generate", {"prompt": "hello"}),
        ("/api/generate", {"prompt": "hello", "keep_alive": 0}),
        ("/api/generate", {"prompt": "hello", "options": {"num_gpu": -1}}),
        ("/v1/completions", {"prompt": "hello"}),
    ],
)
async def test_whatever_loads_a_model_waits_on_a_full_card(tmp_path: Path, path: str, body: dict[str, Any]) -> None:
    async with gated(tmp_path) as stack:
        await stack.fill()
        held = stack.call(path=path, **{"stream": False, **body})
        asking = asyncio.create_task(held.may_pass())
        await soon(30.0)

        assert stack.line == [f"ollama:{LLAMA}"]
        assert not asking.done()
        asking.cancel()
        await asyncio.wait({asking})
        held.over()


async def test_a_model_on_the_gpu_is_asked_for_again_where_another_context_reloads_it(tmp_path: Path) -> None:
    async with gated(tmp_path) as stack:
        await stack.chat(keep_alive=-1)
        await soon()
        held = stack.call(options={"num_ctx": 8192}, **CHAT)
        verdict = await held.may_pass()

        assert isinstance(verdict, Passage)
        assert stack.promised == [f"ollama:{LLAMA}"]
        (lease,) = stack.daemon.admissions.book.leases.values()
        assert lease.estimate.context == 8192
        held.over()


async def test_a_model_that_is_about_to_leave_is_asked_for_again(tmp_path: Path) -> None:
    async with gated(tmp_path) as stack:
        await stack.chat(keep_alive=5)
        await soon(3.0)
        assert stack.passes_at_once(stack.call())
        await soon(1.2)
        held = stack.call()
        await held.may_pass()

        assert stack.promised == [f"ollama:{LLAMA}"]
        held.over()


async def test_a_model_whose_last_call_kept_it_for_no_longer_than_that_is_asked_for_again(tmp_path: Path) -> None:
    async with gated(tmp_path) as stack:
        await stack.chat(keep_alive=300)
        await soon()
        # Ollama's list, which is up to a second old, still says that it stays.
        await stack.chat(keep_alive=0, options={"num_predict": 1})

        assert not stack.passes_at_once(stack.call())


async def test_an_embedding_model_is_made_room_for_like_any_other(tmp_path: Path) -> None:
    async with gated(tmp_path) as stack:
        answer = await stack.ollama.post("/api/embed", json={"model": "nomic-embed-text", "input": "hello"})
        answer.raise_for_status()
        given = [event.target for _, event in stack.events if event.type.value == "admitted"]

    assert given == ["worker:ollama:nomic-embed-text:latest"]


# ---- together


async def comfyui_in_the_way(stack: Gated) -> None:
    await stack.rendered()
    await soon(5.0)


async def test_all_who_ask_for_one_model_make_room_once_and_pass_in_the_order_in_which_they_came(
    tmp_path: Path,
) -> None:
    async with gated(tmp_path) as stack:
        await comfyui_in_the_way(stack)
        passed: list[int] = []

        async def ask(number: int) -> Held:
            held = stack.call()
            await held.may_pass()
            passed.append(number)
            return held

        asking = [asyncio.create_task(ask(number)) for number in range(8)]
        await soon(0.5)
        in_line, waiting = stack.line, stack.waiting
        calls = await asyncio.gather(*asking)
        promised = stack.promised
        for held in calls:
            held.over()

    assert in_line == [f"ollama:{LLAMA}"]
    assert waiting == [LLAMA] * 8
    assert passed == list(range(8))
    assert promised == [f"ollama:{LLAMA}"]
    assert stack.posts == 1


async def test_a_caller_that_leaves_takes_the_place_in_line_from_nobody(tmp_path: Path) -> None:
    async with gated(tmp_path) as stack:
        await comfyui_in_the_way(stack)
        calls = [stack.call() for _ in range(3)]
        asking = [asyncio.create_task(held.may_pass()) for held in calls]
        await soon(0.5)
        asking[0].cancel()
        await asyncio.wait({asking[0]})
        calls[0].over()
        await soon(0.1)
        assert stack.line == [f"ollama:{LLAMA}"]
        verdicts = await asyncio.gather(*asking[1:])

        assert all(isinstance(verdict, Passage) for verdict in verdicts)
        for held in calls[1:]:
            held.over()


async def test_when_the_last_caller_leaves_nobody_is_in_line_and_nothing_is_promised(tmp_path: Path) -> None:
    async with gated(tmp_path) as stack:
        await comfyui_in_the_way(stack)
        calls = [stack.call() for _ in range(3)]
        asking = [asyncio.create_task(held.may_pass()) for held in calls]
        await soon(0.5)
        for task, held in zip(asking, calls, strict=True):
            task.cancel()
            await asyncio.wait({task})
            held.over()
        await soon(0.1)

        assert stack.line == stack.promised == stack.waiting == []
        await soon(10)
        assert stack.line == stack.promised == []


@pytest.mark.parametrize("after", [*range(16), 25, 40])
async def test_a_client_that_leaves_while_it_is_promised_something_leaves_no_promise(
    tmp_path: Path, after: int
) -> None:
    async with gated(tmp_path) as stack:
        held = stack.call()
        asking = asyncio.create_task(held.may_pass())
        for _ in range(after):
            await asyncio.sleep(0)
        asking.cancel()
        await asyncio.wait({asking})
        held.over()
        await soon(12)

        assert stack.line == stack.promised == stack.waiting == []


async def test_who_wants_a_larger_context_does_not_pass_on_the_promise_of_who_wants_a_smaller_one(
    tmp_path: Path,
) -> None:
    async with gated(tmp_path) as stack:
        await stack.rendered(checkpoint="v1-5-pruned-emaonly-fp16.safetensors")
        await soon(20)
        small = asyncio.create_task(stack.chat(keep_alive=-1))
        await soon(0.2)
        large = asyncio.create_task(stack.chat(keep_alive=-1, options={"num_ctx": 32768}))
        await asyncio.gather(small, large)
        counters = stack.world.ollama.counters

        assert (counters.served_on_gpu, counters.served_partially, counters.served_on_cpu) == (2, 0, 0)
        await soon(7)
        assert stack.promised == []


async def test_a_context_beyond_what_the_model_can_do_is_asked_for_once(tmp_path: Path) -> None:
    async with gated(tmp_path, gib=24) as stack:
        await stack.chat("qwen3:14b", keep_alive=-1, options={"num_ctx": 65536})
        await soon(7)

        assert stack.passes_at_once(stack.call("qwen3:14b", options={"num_ctx": 65536}, **CHAT))
        assert stack.world.ollama.counters.loads == 1


async def test_callers_of_two_models_have_a_place_each(tmp_path: Path) -> None:
    async with gated(tmp_path) as stack:
        await comfyui_in_the_way(stack)
        calls = [stack.call(), stack.call("gemma3:4b"), stack.call("gemma3:4b")]
        asking = [asyncio.create_task(held.may_pass()) for held in calls]
        await soon(0.5)
        in_line = stack.line
        for task, held in zip(asking, calls, strict=True):
            task.cancel()
            await asyncio.wait({task})
            held.over()

    assert in_line == [f"ollama:{LLAMA}", "ollama:gemma3:4b"]


# ---- what is left behind


async def test_the_promise_ends_when_the_model_shows_on_the_gpu(tmp_path: Path) -> None:
    async with gated(tmp_path) as stack:
        chat = asyncio.create_task(stack.chat(keep_alive=-1, options={"num_predict": 6000}))
        await soon(1.0)
        assert stack.promised == [f"ollama:{LLAMA}"]
        await soon(4.0)
        assert not chat.done()
        assert stack.promised == []
        await chat


async def test_a_model_that_leaves_and_is_loaded_anew_does_not_count_as_loaded_before_that(tmp_path: Path) -> None:
    async with gated(tmp_path) as stack:
        await stack.chat(keep_alive=0, options={"num_predict": 200})
        held = stack.call()
        await held.may_pass()
        await soon(1.5)

        assert stack.promised == [f"ollama:{LLAMA}"]
        held.over()


async def test_the_promise_ends_when_nobody_asks_for_the_model_any_more(tmp_path: Path) -> None:
    async with gated(tmp_path) as stack:
        held = stack.call()
        await held.may_pass()
        assert stack.promised == [f"ollama:{LLAMA}"]
        held.over()
        await soon(7.0)

        assert stack.promised == []


async def test_while_somebody_still_loads_the_promise_stands(tmp_path: Path) -> None:
    async with gated(tmp_path) as stack:
        first, second = stack.call(), stack.call()
        await first.may_pass()
        await second.may_pass()
        first.over()
        await soon(10.0)
        assert stack.promised == [f"ollama:{LLAMA}"]
        second.over()
        await soon(7.0)

        assert stack.promised == []


async def test_who_never_calls_again_is_forgotten(tmp_path: Path) -> None:
    async with gated(tmp_path) as stack:
        for number in range(50):
            held = stack.call(f"no-such-model:{number}")
            await held.may_pass()
            held.over()
        await soon(60)

        assert stack.gate._models == {}


# ---- the wait is over


async def test_a_call_that_waited_too_long_goes_on(tmp_path: Path) -> None:
    async with gated(tmp_path, gateway_max_wait=20.0) as stack:
        await stack.fill()
        held = stack.call()
        verdict = await held.may_pass()

        assert isinstance(verdict, Passage)
        assert waited_seconds(verdict) == pytest.approx(20, abs=0.5)
        await soon(0.1)
        assert stack.line == stack.waiting == []
        held.over()


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("/api/chat", {"error": "WORDS"}),
        ("/v1/completions", {"error": {"message": "WORDS", "type": "api_error", "param": None, "code": None}}),
        (
            "/v1/messages",
            {"type": "error", "error": {"type": "overloaded_error", "message": "WORDS"}, "request_id": ""},
        ),
    ],
)
async def test_or_is_refused_in_the_words_of_its_api(tmp_path: Path, path: str, error: dict[str, Any]) -> None:
    async with gated(tmp_path, gateway_max_wait=20.0, gateway_on_timeout="refuse") as stack:
        await stack.fill()
        held = stack.call(path=path, prompt="hello")
        verdict = await held.may_pass()
        held.over()
        await soon(0.1)

        assert isinstance(verdict, Reply)
        assert verdict.status == 503
        assert int(dict(verdict.headers)[b"Retry-After"]) >= 1
        words = f"{LLAMA}: no room on the GPU within 20 s; ask again later"
        assert json.loads(verdict.body) == json.loads(json.dumps(error).replace("WORDS", words))
        assert stack.line == stack.promised == stack.waiting == []


@pytest.mark.parametrize(
    ("path", "kind"), [("/api/chat", None), ("/v1/chat/completions", "api_error"), ("/v1/messages", "api_error")]
)
async def test_an_ollama_out_of_reach_is_told_in_the_words_of_the_api(
    tmp_path: Path, path: str, kind: str | None
) -> None:
    async with gated(tmp_path) as stack:
        reply = stack.gate.unreachable(Head(method="POST", target=path, headers=()), "connection refused")

    assert reply.status == 502
    error = json.loads(reply.body)["error"]
    words = "Ollama cannot be reached: connection refused"
    assert error == words if kind is None else (error["message"], error["type"]) == (words, kind)


# ---- nothing can be said


async def test_where_the_gpu_cannot_be_read_a_call_passes_at_once(tmp_path: Path) -> None:
    async with gated(tmp_path) as stack:
        await stack.fill()
        stack.world.ledger.lost = True
        await soon(40.0)

        assert stack.passes_at_once(stack.call())


@pytest.mark.parametrize("changed", [{"enable_vram_monitoring": False}, {"vram_dry_run": True}])
async def test_a_daemon_that_only_watches_holds_nobody(tmp_path: Path, changed: dict[str, Any]) -> None:
    async with gated(tmp_path, **changed) as stack:
        await stack.fill()

        assert stack.passes_at_once(stack.call())


async def test_a_call_waits_for_the_first_look_of_a_daemon_that_has_just_started(tmp_path: Path) -> None:
    async with gated(tmp_path, settled=False) as stack:
        held = stack.call()
        asking = asyncio.create_task(held.may_pass())
        await asyncio.sleep(0)
        assert stack.waiting == [LLAMA]
        verdict = await asking
        held.over()

    assert isinstance(verdict, Passage)
    assert waited_seconds(verdict) < 6


async def test_a_daemon_that_stops_lets_all_go_on(tmp_path: Path) -> None:
    async with gated(tmp_path) as stack:
        await stack.fill()
        held = stack.call()
        asking = asyncio.create_task(held.may_pass())
        await soon(1.0)
        assert stack.waiting == [LLAMA]
        stack.daemon.admissions.hang_up()
        stack.daemon.gateways.stop()
        verdict = await asking
        held.over()

        assert isinstance(verdict, Passage)
        assert stack.passes_at_once(stack.call("gemma3:4b"))


async def test_a_model_that_was_asked_to_leave_is_waited_for_until_it_has(tmp_path: Path) -> None:
    async with gated(tmp_path) as stack:
        await stack.chat(keep_alive=-1)
        await soon(10.0)
        job = asyncio.create_task(stack.render())
        cycle = stack.daemon.cycle
        await until(lambda: cycle.watch.pending is not None)
        assert cycle.watch.pending is not None
        assert isinstance(cycle.watch.pending.action, UnloadModel)

        assert not stack.passes_at_once(stack.call())
        await job


async def test_what_is_held_is_shown_with_the_reason(tmp_path: Path) -> None:
    async with gated(tmp_path) as stack:
        await stack.fill()
        held = stack.call()
        asking = asyncio.create_task(held.may_pass())
        await soon(1.0)
        (waiter,) = stack.daemon.gateways.waiting()
        asking.cancel()
        await asyncio.wait({asking})
        held.over()

    assert (waiter.upstream, waiter.what) == ("ollama", LLAMA)
    assert waiter.why == f"{LLAMA} waits for room"
