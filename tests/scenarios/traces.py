"""Random days of chat and image clients over a simulated world, and what was promised of them.

`python -m tests.scenarios.traces 0 300 [--alone | --leaving]` plays the seeds from 0 to 299 and tells which broke a
promise; `--alone`: the daemon watches and repairs, and nobody uses its gateways; `--leaving`: some clients hang up.
"""

from __future__ import annotations

import asyncio
import random
import sys
import tempfile
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import looptime

from tests.scenarios.stack import Stack, a_world, running
from vram_manager.domain.event import EventType
from vram_manager.policy.guards import HOUR_SECONDS
from vram_manager.simulator.comfyui_files import Workflow
from vram_manager.simulator.comfyui_memory import Mode
from vram_manager.simulator.ollama_runner import Runner, split
from vram_manager.simulator.world import flux_txt2img, txt2img

GIB = 2**30
SD15 = "v1-5-pruned-emaonly-fp16.safetensors"
MODES: tuple[Mode, ...] = ("legacy", "dynamic", "highvram")
# GATEWAY_MAX_WAIT, and two beats of the loop: one to look, one to go.
LONGEST_WAIT_SECONDS = 60.0 + 1.0
# An idle ComfyUI that hides its memory is asked within its idle time and a cooldown, and settles; then come Ollama's
# own idle time, the cooldown of the model and a load.
REPAIRED_WITHIN_SECONDS = 30.0 + 30.0 + 15.0 + 5.0 + 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request of a client, as it was answered."""

    id: str
    client: int
    model: str | None
    sent_at: float
    answered_at: float
    status: int
    waited_seconds: float


@dataclass(slots=True)
class Day:
    """What happened: the stack as it was left, each call in the order of its answer, and what a witness saw."""

    seed: int
    stack: Stack
    calls: list[Call] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    left_on_cpu: list[str] = field(default_factory=list)
    hung_up: set[str] = field(default_factory=set)
    patience: random.Random | None = None
    """Decides who hangs up, and when."""

    def __str__(self) -> str:
        ollama, comfyui = self.stack.world.ollama.counters, self.stack.world.comfyui.counters
        longest = max((call.waited_seconds for call in self.calls), default=0.0)
        waited = sum(call.waited_seconds for call in self.calls)
        repaired = len(self.stack.told(EventType.REPAIRED)), len(self.stack.told(EventType.REPAIR_FAILED))
        return (
            f"seed {self.seed}: {len(self.calls)} calls, loads {ollama.loads}, on the GPU {ollama.served_on_gpu}, "
            f"in part {ollama.served_partially}, on the CPU {ollama.served_on_cpu}, frees {comfyui.frees_posted}, "
            f"evictions {ollama.evictions}, waited {waited:.0f} s, longest {longest:.0f} s, repaired {repaired}"
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """Who does what on one day; everything follows from the seed."""

    seed: int
    gib: int
    mode: Mode
    chatters: int
    artists: int

    @staticmethod
    def of(seed: int) -> Plan:
        dice = random.Random(seed)
        return Plan(seed, dice.choice([12, 16, 24]), dice.choice(MODES), dice.randint(1, 4), dice.randint(1, 3))

    @property
    def models(self) -> list[str]:
        return ["llama3.1:8b", "gemma3:4b", *(["qwen3:14b"] if self.gib > 12 else [])]

    @property
    def workflows(self) -> list[Callable[..., Workflow]]:
        small: Callable[..., Workflow] = lambda **more: txt2img(SD15, **more)  # noqa: E731
        return [txt2img, small, *([flux_txt2img] if self.gib >= 24 else [])]


def play(seed: int, *, gateways: bool = True, leaving: bool = False) -> Day:
    """The day of that seed; `leaving`: some clients do not wait for their answer."""

    async def main() -> Day:
        ports = {"gateway_ollama_port": 1, "gateway_comfyui_port": 2} if gateways else {}
        plan = Plan.of(seed)
        with tempfile.TemporaryDirectory() as directory:
            async with running(a_world(plan.gib, mode=plan.mode), Path(directory), **ports) as stack:
                day = Day(seed, stack, patience=random.Random(seed) if leaving else None)
                witness = asyncio.create_task(_witness(day))
                await _live(day, plan)
                witness.cancel()
        return day

    with asyncio.Runner(loop_factory=lambda: looptime.patch_event_loop(asyncio.new_event_loop())) as runner:
        return runner.run(main())


async def _live(day: Day, plan: Plan) -> None:
    dice = random.Random(plan.seed + 1)
    async with asyncio.TaskGroup() as people:
        people_in = [
            *(_chatter(day, number, plan, random.Random(dice.random())) for number in range(plan.chatters)),
            *(_artist(day, 100 + number, plan, random.Random(dice.random())) for number in range(plan.artists)),
        ]
        # Who is there first wins the ties.
        for person in people_in if plan.seed % 2 else reversed(people_in):
            people.create_task(person)
    while day.stack.world.comfyui.queue.remaining:
        await asyncio.sleep(1)
    await asyncio.sleep(REPAIRED_WITHIN_SECONDS + 30)


async def _chatter(day: Day, number: int, plan: Plan, dice: random.Random) -> None:
    await asyncio.sleep(dice.choice([0, 0, dice.uniform(0, 60)]))
    for turn in range(dice.randint(1, 6)):
        model = dice.choice(plan.models)
        call_id = f"chat {number}-{turn}"
        body = {"model": model, "prompt": "hello", "stream": False, "keep_alive": dice.choice([0, 2, 5, 30, 300, -1])}
        await _call(day, call_id, number, model, "/api/generate", body)
        await asyncio.sleep(dice.choice([0, dice.uniform(0, 5), dice.uniform(0, 120)]))


async def _artist(day: Day, number: int, plan: Plan, dice: random.Random) -> None:
    await asyncio.sleep(dice.choice([0, 0, dice.uniform(0, 60)]))
    workflow = dice.choice(plan.workflows)
    for turn in range(dice.randint(1, 6)):
        prompt_id = str(uuid.UUID(int=dice.getrandbits(128)))
        day.prompts.append(prompt_id)
        prompt = workflow(steps=dice.randint(1, 60), seed=number * 100 + turn)
        await _call(day, prompt_id, number, None, "/prompt", {"prompt": prompt, "prompt_id": prompt_id})
        if dice.random() < 0.7:
            while prompt_id not in {*day.stack.world.comfyui.queue.history, *day.hung_up}:
                await asyncio.sleep(0.5)
        await asyncio.sleep(dice.choice([0, dice.uniform(0, 5), dice.uniform(0, 90)]))


async def _call(day: Day, call_id: str, client: int, model: str | None, path: str, body: dict[str, Any]) -> None:
    loop = asyncio.get_running_loop()
    server = day.stack.comfyui if model is None else day.stack.ollama
    sent_at = loop.time()
    impatient = day.patience is not None and day.patience.random() < 0.3
    try:
        async with asyncio.timeout(day.patience.uniform(0, 25) if day.patience and impatient else None):
            response = await server.post(path, json=body, headers={"X-Request-Id": call_id})
    except TimeoutError:
        day.hung_up.add(call_id)
        return
    day.calls.append(
        Call(
            id=call_id,
            client=client,
            model=model,
            sent_at=sent_at,
            answered_at=loop.time(),
            status=response.status_code,
            waited_seconds=float(response.headers.get("x-vram-manager-waited-seconds", 0)),
        )
    )


async def _witness(day: Day) -> None:
    """Notes each model that stays on the CPU though nothing kept it there, as the simulator sees it."""
    could_since: dict[Runner, float] = {}
    while True:
        await asyncio.sleep(1)
        now = asyncio.get_running_loop().time()
        could_since = {
            runner: could_since.get(runner, now)
            for runner in day.stack.world.ollama.scheduler.runners.values()
            if _could_be_repaired(runner, day, now)
        }
        day.left_on_cpu += [
            f"{runner.model.name} could have been repaired for {now - since:.0f} s"
            for runner, since in could_since.items()
            if now - since >= REPAIRED_WITHIN_SECONDS
        ]


def _could_be_repaired(runner: Runner, day: Day, now: float) -> bool:
    """Idle, in part on the CPU, with room for all of it once an idle ComfyUI has made some, and tries left."""
    world = day.stack.world
    if runner.users or not runner.ready or runner.num_gpu is not None or runner.gpu_layers == runner.all_layers:
        return False
    if world.comfyui.queue.remaining:
        return False
    ledger = world.ledger
    free = ledger.free_bytes + ledger.held_bytes(runner.holder)
    free += max(0, ledger.held_bytes("comfyui") - world.comfyui.memory.lasting_bytes)
    best = split(runner.model, runner.num_ctx, None, free - world.ollama.scheduler.settings.cuda_context_bytes)
    # The daemon knows neither projectors nor contexts to the byte: what fits by a hair may not be tried.
    margin = GIB // 2
    if best.gpu_layers < runner.all_layers or free - runner.model.need_bytes(runner.num_ctx) < 2 * margin + GIB:
        return False
    return not any(True for _ in _tries(day, runner.model.name, now))


def _tries(day: Day, model: str, now: float) -> Iterator[float]:
    """When `model` was repaired, or was not, within the last hour."""
    kinds = (EventType.REPAIRED, EventType.REPAIR_FAILED)
    for at, event in day.stack.events:
        if event.type in kinds and event.target == f"ollama:{model}" and now - at < HOUR_SECONDS:
            yield at


def broken_promises(day: Day) -> list[str]:
    """What did not go as promised of the gateways; nothing, if all is well."""
    return [*_kept_anyway(day), *_kept_by_gateways(day)]


def _kept_anyway(day: Day) -> Iterator[str]:
    """What holds with and without gateways."""
    ollama, comfyui = day.stack.world.ollama, day.stack.world.comfyui
    if comfyui.counters.frees_posted_while_busy:
        yield f"{comfyui.counters.frees_posted_while_busy} frees were posted to a ComfyUI at work"
    answers = Counter(call.id for call in day.calls)
    yield from _differ("chats asked of Ollama", (asked.request_id for asked in ollama.asked), day)
    yield from (f"{call_id} was answered {times} times" for call_id, times in answers.items() if times != 1)
    accepted = [prompt_id for prompt_id in comfyui.accepted if prompt_id not in day.hung_up]
    prompts = [prompt_id for prompt_id in day.prompts if prompt_id not in day.hung_up]
    if accepted != prompts:
        yield f"prompts were accepted as {accepted}, sent as {prompts}"
    for prompt_id in prompts:
        entry = comfyui.queue.history.get(prompt_id)
        if entry is None:
            yield f"prompt {prompt_id} never ran"


def _kept_by_gateways(day: Day) -> Iterator[str]:
    ollama, comfyui = day.stack.world.ollama, day.stack.world.comfyui
    yield from (f"{call.id} was answered {call.status}" for call in day.calls if call.status != 200)
    yield from _differ("chats served by Ollama", (served.request_id for served in ollama.served), day)
    if count := ollama.counters.served_with_cpu_layers_that_would_have_fitted:
        yield f"{count} chats were served with layers on the CPU that would have fitted"
    if ollama.counters.load_failures or comfyui.counters.out_of_memory:
        yield f"{ollama.counters.load_failures} loads and {comfyui.counters.out_of_memory} prompts ran out of memory"
    for prompt_id, entry in comfyui.queue.history.items():
        if entry["status"]["status_str"] != "success":
            yield f"prompt {prompt_id} failed"
    asked_at = {asked.request_id: asked.at for asked in ollama.asked}
    for call in day.calls:
        held = asked_at.get(call.id, call.sent_at) - call.sent_at if call.model else call.waited_seconds
        if held > LONGEST_WAIT_SECONDS:
            yield f"{call.id} was held for {held:.1f} s"
    if day.stack.daemon.admissions.book.line or day.stack.daemon.gateways.waiting():
        yield "somebody still waits"
    yield from (f"the promise to {lease.owner} was never given back" for lease in _leases(day))


def _leases(day: Day) -> list[Any]:
    return list(day.stack.daemon.admissions.book.leases.values())


def broken_alone(day: Day) -> list[str]:
    """What did not go as promised of a daemon that nobody's calls go through."""
    return [*_kept_anyway(day), *day.left_on_cpu[:3], *_repairs(day)]


def _repairs(day: Day) -> Iterator[str]:
    most = day.stack.daemon.cycle.rules.max_repairs_per_hour
    times: dict[str, list[float]] = {}
    for at, event in day.stack.events:
        if event.type in (EventType.REPAIRED, EventType.REPAIR_FAILED) and event.target:
            times.setdefault(event.target, []).append(at)
    for target, tries in times.items():
        if any(late - early < HOUR_SECONDS for early, late in zip(tries, tries[most:], strict=False)):
            yield f"{target} was repaired more than {most} times within the hour"


def _differ(what: str, ids: Iterable[str], day: Day) -> Iterator[str]:
    seen = Counter(ids)
    told = Counter(call.id for call in day.calls if call.model is not None)
    # The daemon's own calls have no name.
    for name in sorted((seen.keys() | told.keys()) - day.hung_up - {""}):
        if seen[name] != told[name]:
            yield f"{what}: {name} {seen[name]} times, answered {told[name]} times"


def main() -> None:
    first, last = (int(word) for word in sys.argv[1:3])
    alone = "--alone" in sys.argv
    failed = 0
    for seed in range(first, last):
        day = play(seed, gateways=not alone, leaving="--leaving" in sys.argv)
        wrong = broken_alone(day) if alone else broken_promises(day)
        failed += bool(wrong)
        print(day, *wrong, sep="\n    ", flush=True)
    print(f"{last - first} days, {failed} with a broken promise")


if __name__ == "__main__":
    main()
