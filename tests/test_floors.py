"""Floors over a pretended day: what is marked, what is told, and what never is."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes import FakeStore, until
from tests.policy.worlds import GIB, MIB, comfyui, device, gpu, gpus, model, ollama, process, queue, snapshot
from vram_manager.clock import Clock
from vram_manager.domain.action import Stage
from vram_manager.domain.event import Event, EventType
from vram_manager.domain.floor import Work
from vram_manager.domain.reading import Missing, Off
from vram_manager.domain.snapshot import LoadedModel
from vram_manager.domain.worker import Generations, Leak, Measure, Trend, Worker
from vram_manager.floors import MAX_FLOORS, Floors
from vram_manager.journal import Journal
from vram_manager.policy import Rules

DAY = datetime(2026, 7, 1, tzinfo=UTC)
# What each kind of work leaves cached on the GPU.
CACHED = {"wan.safetensors": 9 * GIB, "sdxl.safetensors": 6 * GIB, "sd15.safetensors": 2 * GIB}
MODELS = {"llama3.1:8b": 5 * GIB, "gemma3:4b": 3 * GIB}
IDLE = "torch's memory in use when idle"
SOFT = "torch's memory in use after a soft free"
RUNNER = "/usr/lib/ollama/llama-server"


class Kept(dict[str, str]):
    """A store of floors."""

    def __init__(self) -> None:
        super().__init__()
        self.full = False

    def floors(self) -> dict[str, str]:
        return dict(self)

    def save_floors(self, bodies: Mapping[str, str | None]) -> None:
        if self.full:
            raise sqlite3.OperationalError("disk is full")
        for key, body in bodies.items():
            if body is None:
                self.pop(key, None)
            else:
                self[key] = body


class Box:
    """A box with one GPU: ComfyUI caches what ran until it is freed, Ollama has what was asked of it.

    `residue` is what ComfyUI keeps for ever; `pids`: the driver tells of Ollama's runners.
    """

    def __init__(self, kept: Kept | None = None, *, pids: bool = False) -> None:
        self.at = 1000.0
        self.kept = Kept() if kept is None else kept
        clock = Clock(lambda: self.at, lambda: DAY + timedelta(seconds=self.at))
        self.journal = Journal(clock, FakeStore())  # type: ignore[arg-type]
        self.workers: list[Worker] = []
        self.floors = Floors(clock, self.journal, Rules(), self.kept, workers=lambda: self.workers)
        self.journal.listen(self.floors.freed)
        self.pids = pids
        self.residue = GIB
        self.others = GIB // 2
        self.cached: set[str] = set()
        self.models: dict[str, LoadedModel] = {}
        self.zombies: list[int] = []
        self.version = "0.3.64"
        self.unread = False
        self.queue = queue(runs=0)
        self.wait(20)

    def turn(self) -> None:
        active = self.residue + sum(CACHED[name] for name in self.cached)
        sizes = [one.size_vram_bytes for one in self.models.values()] + self.zombies
        taken = active + self.others + sum(sizes)
        desktop = process(0.2, "/usr/bin/Xorg")
        listed = tuple(replace(process(0, RUNNER, pid=90 + n), used_bytes=size) for n, size in enumerate(sizes))
        card = gpu(free_gib=(64 * GIB - taken) / GIB, total_gib=64, processes=Missing("no pids"))
        card = replace(card, processes=(desktop, *listed)) if self.pids else card
        state = comfyui(version=self.version, devices=(device(torch_gib=active / GIB),))
        away = Missing("refused")
        self.floors.turned(
            snapshot(
                self.at,
                gpus(card),
                ollama=away if self.unread else ollama(*self.models.values()),
                comfyui=away if self.unread else state,
                queue=away if self.unread else self.queue,
            )
        )

    def wait(self, seconds: float) -> None:
        for _ in range(round(seconds / 5)):
            self.at += 5
            self.turn()

    def run(self, name: str = "wan.safetensors", *, leak: int = 0, known: bool = True) -> None:
        self.queue = self.queue.observed(1, self.at)
        self.cached.add(name)
        self.wait(10)
        self.residue += leak
        self.queue = self.queue.observed(0, self.at)
        if known:
            self.floors.worked(self.queue.runs, frozenset({Work(f"workflow:{name}", name)}))
        self.wait(30)

    def free(self, stage: Stage = Stage.SOFT) -> None:
        self.cached.clear()
        self.journal.record(Event(type=EventType.FREED, target="comfyui", stage=stage))
        self.wait(20)

    def chat(self, name: str = "llama3.1:8b") -> None:
        known = self.models.get(name)
        loaded = known or replace(model(name, size_gib=MODELS[name] / GIB), since=self.at)
        self.models[name] = replace(loaded, active_at=self.at)
        self.wait(20)

    def empty(self) -> None:
        self.models.clear()
        self.wait(90)

    def told(self) -> list[Event]:
        return [entry.event for entry in self.journal.events() if entry.event.type is EventType.LEAK]

    def of(self, tenant: str, measure: str = "") -> list[dict[str, object]]:
        return [view for view in self.floors.views() if view["tenant"] == tenant and measure in view["measure"]]


def test_a_comfyui_that_keeps_more_after_each_free_is_told_once_with_what_ran_most() -> None:
    box = Box()
    for n in range(14):
        box.run("wan.safetensors", leak=60 * MIB)
        box.run("sdxl.safetensors" if n % 2 else "wan.safetensors", leak=20 * MIB)
        box.free()

    (event,) = box.told()
    assert event.target == "comfyui"
    assert event.reason == (
        "1.2 GiB -> 1.9 GiB kept after 22 runs: +720 MiB, 32.7 MiB each; most often with wan.safetensors (16 runs) "
        f"(measured: {SOFT})"
    )
    assert box.floors.leaks == 1
    (view,) = box.of("comfyui", "soft")
    assert view["leak"] is True
    assert view["growth_bytes"] == 720 * MIB
    points = view["points"]
    assert isinstance(points, list)
    assert points[-1] == {
        "at": "2026-07-01T00:40:15.000Z",
        "bytes": GIB + 14 * 80 * MIB,
        "runs": 2,
        "ran": ["wan.safetensors", "sdxl.safetensors"],
    }


def test_one_that_is_never_freed_is_told_by_the_runs_of_the_same_files() -> None:
    box = Box()
    for _ in range(14):
        box.run(leak=20 * MIB)

    (event,) = box.told()
    assert event.reason.endswith(f"most often with wan.safetensors (11 runs) (measured: {IDLE})")


def test_files_that_take_turns_say_nothing_of_a_leak() -> None:
    box = Box()
    for _ in range(14):
        box.run("wan.safetensors", leak=20 * MIB)
        box.run("sdxl.safetensors", leak=20 * MIB)

    assert box.told() == []
    assert [len(view["points"]) for view in box.of("comfyui")] == [1]  # type: ignore[arg-type]


def test_a_run_of_unknown_files_comes_between() -> None:
    box = Box()
    for n in range(30):
        box.run(leak=20 * MIB, known=n % 5 > 0)

    assert box.told() == []


def test_a_model_of_ollamas_comes_between() -> None:
    box = Box()
    for n in range(30):
        box.run(leak=20 * MIB)
        if n % 5 == 0:
            box.chat()
            box.empty()

    assert box.told() == []


def test_the_same_growth_seen_twice_is_told_once() -> None:
    box = Box()
    for n in range(30):
        box.run(leak=60 * MIB)
        box.free(Stage.SOFT if n % 2 else Stage.UNLOAD)

    assert len(box.told()) == 1
    assert [view["leak"] for view in box.of("comfyui", "free")].count(True) <= 1


def test_a_restart_of_comfyui_starts_afresh() -> None:
    box = Box()
    for n in range(40):
        if n % 10 == 9:
            box.unread, box.cached = True, set()
            box.wait(30)
            box.unread = False
        box.run(leak=60 * MIB)
        box.free()

    assert box.told() == []


def test_an_update_of_comfyui_starts_afresh() -> None:
    box = Box()
    for n in range(40):
        box.version = f"0.3.{n // 10}"
        box.run(leak=60 * MIB)
        box.free()

    assert box.told() == []


def test_a_comfyui_that_cannot_be_read_makes_no_marks() -> None:
    box = Box()
    box.run()
    box.unread = True
    box.free()
    box.wait(600)

    assert box.of("comfyui") == []


def test_a_free_that_is_followed_by_a_run_at_once_makes_no_mark() -> None:
    box = Box()
    box.run()
    box.cached.clear()
    box.journal.record(Event(type=EventType.FREED, target="comfyui", stage=Stage.SOFT))
    box.run()

    assert box.of("comfyui", "soft") == []


def test_what_moves_makes_no_mark_until_it_stands_still() -> None:
    box = Box()
    box.run()
    box.journal.record(Event(type=EventType.FREED, target="comfyui", stage=Stage.SOFT))
    box.cached.clear()
    for _ in range(10):
        box.residue += 100 * MIB
        box.wait(5)
    assert box.of("comfyui", "soft") == []
    box.wait(15)
    (view,) = box.of("comfyui", "soft")
    assert view["floor_bytes"] == GIB + 1000 * MIB


def test_a_free_before_the_queue_was_ever_read_is_passed_over() -> None:
    box = Box()
    fresh = Floors(Clock(lambda: 0.0, lambda: DAY), box.journal, Rules(), Kept())
    entry = box.journal.record(Event(type=EventType.FREED, target="comfyui", stage=Stage.SOFT))
    fresh.freed(entry)
    fresh.turned(snapshot(20.0))

    assert fresh.views() == []


# Others, where no process can be seen.


def test_what_nobody_accounts_for_is_told_of_others() -> None:
    box = Box()
    for _ in range(14):
        box.chat()
        box.run()
        box.free()
        box.empty()
        box.others += 60 * MIB

    (event,) = box.told()
    assert event.target == "others"
    assert "nobody accounts for it" in event.reason


def test_where_processes_are_seen_nothing_is_told_of_others() -> None:
    box = Box(pids=True)
    for _ in range(14):
        box.run()
        box.free()
        box.empty()
        box.others += 60 * MIB

    assert box.told() == []
    assert box.of("others") == []


# Ollama.


def test_a_runner_that_stays_without_its_model_is_told_once() -> None:
    box = Box(pids=True)
    box.chat()
    box.empty()
    assert box.told() == []
    box.chat()
    box.zombies = [5 * GIB]
    box.empty()
    box.chat("gemma3:4b")
    box.empty()

    (event,) = box.told()
    assert event.target == "ollama"
    assert event.reason == (
        "0.0 GiB -> 5.0 GiB held by its runners though it lists no model for 60 s: +5120 MiB; last loaded: llama3.1:8b"
    )


def test_without_pids_no_runner_is_ever_said_to_hold_nothing() -> None:
    box = Box()
    box.chat()
    box.empty()

    assert box.of("ollama") == []


def test_a_runner_that_grows_beside_a_loaded_model_is_told_by_its_name() -> None:
    box = Box(pids=True)
    for n in range(14):
        loaded = replace(model(size_gib=5), since=0.0, active_at=box.at)
        card = gpu(processes=(process(5 + 0.06 * n, RUNNER, pid=9),))
        for _ in range(4):
            box.at += 5
            box.floors.turned(snapshot(box.at, gpus(card), ollama=ollama(loaded), comfyui=Off(), queue=Off()))

    (event,) = box.told()
    assert event.target == "ollama:llama3.1:8b"
    assert "kept after 11 times in use" in event.reason


# Workers, whose leaks are told elsewhere.


def worker(count: int, kept: int, leak: Leak | None = None) -> Worker:
    trend = Trend(measure=Measure.ALLOCATED, count=count, newest_bytes=(kept,) if count > 5 else (), leak=leak)
    return Worker(owner="tts", seen_at=0.0, generations=Generations(count=count, trend=trend))


def test_the_trend_of_a_worker_is_listed_beside_the_others() -> None:
    box = Box()
    leak = Leak(
        initial_bytes=0, current_bytes=1, delta_bytes=1, generations=1, delta_per_generation_bytes=1
    )  # as policy.leaks found it
    for n in range(10):
        box.workers = [worker(n * 3, GIB + n * 100 * MIB, leak if n == 9 else None)]
        box.wait(10)

    (view,) = box.of("worker:tts")
    assert view["measure"] == "after its generations"
    assert view["generations"] == 21
    assert view["growth_bytes"] == 300 * MIB
    assert view["leak"] is True
    assert box.told() == []


# What outlives the daemon.


def test_a_leak_over_a_restart_of_the_daemon_is_found() -> None:
    kept = Kept()
    for _ in range(2):
        box = Box(kept)
        box.residue = GIB + sum(json.loads(body)["count"] for body in kept.values() if "soft" in body) * 60 * MIB
        for _ in range(7):
            box.run(leak=60 * MIB)
            box.free()
        assert box.floors.flush() is None

    assert len(box.told()) == 1


def test_what_cannot_be_written_is_kept_and_what_cannot_be_read_is_passed_over() -> None:
    kept = Kept()
    box = Box(kept)
    box.run()
    box.free()
    box.wait(30)
    kept.full = True
    assert box.floors.flush() == "disk is full"
    kept.full = False
    assert box.floors.flush() is None
    assert {json.loads(body)["measure"] for body in kept.values()} == {SOFT, "what nobody accounts for"}
    kept["of another version"] = '{"marks": [[1]]}'
    kept["damaged"] = "{"
    again = Box(kept)
    assert {view["measure"] for view in again.floors.views()} == {SOFT, "what nobody accounts for"}


@pytest.mark.asyncio
@pytest.mark.looptime
async def test_marks_are_written_while_the_daemon_runs() -> None:
    box = Box()
    writing = asyncio.create_task(box.floors.write_behind())
    box.run()
    box.free()
    box.wait(60)
    await until(lambda: bool(box.kept))
    writing.cancel()
    assert SOFT in "".join(box.kept)


def test_what_is_forgotten_is_forgotten_for_good() -> None:
    box = Box()
    box.run()
    box.free()
    assert box.floors.flush() is None
    assert box.kept
    box.unread = True
    box.wait(10)
    assert box.floors.flush() is None
    assert box.kept == {}


def test_it_remembers_a_bounded_number_of_floors() -> None:
    box = Box()
    for n in range(MAX_FLOORS + 5):
        box.workers.append(replace(worker(10, GIB), owner=f"worker {n}"))
    box.wait(10)

    tenants = [floor.tenant for floor in box.floors.now()]
    assert len(tenants) == MAX_FLOORS
    assert tenants[0] == f"worker:worker {MAX_FLOORS + 4}"


# Any day without a leak.

step = st.one_of(
    st.tuples(st.just("run"), st.sampled_from(sorted(CACHED)), st.booleans()),
    st.tuples(st.just("free"), st.sampled_from(Stage)),
    st.tuples(st.just("chat"), st.sampled_from(sorted(MODELS))),
    st.tuples(st.just("empty")),
    st.tuples(st.just("away")),
    st.tuples(st.just("wait"), st.sampled_from([5, 40, 300])),
)


@settings(deadline=None, max_examples=40)
@given(st.lists(step, max_size=60), st.booleans())
def test_a_day_on_which_nothing_leaks_tells_of_none(day: list[tuple[object, ...]], pids: bool) -> None:
    box = Box(pids=pids)
    for what, *more in day:
        match what, *more:
            case "run", str(name), bool(known):
                box.run(name, known=known)
            case "free", Stage() as stage:
                box.free(stage)
            case "chat", str(name):
                box.chat(name)
            case "empty":
                box.empty()
            case "away":
                box.unread = True
                box.wait(10)
                box.unread = False
            case "wait", int(seconds):
                box.wait(seconds)
    assert box.told() == []


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.sampled_from(sorted(CACHED)), min_size=14, max_size=14), st.integers(40, 500), st.sampled_from(Stage)
)
def test_a_day_with_a_leak_in_each_run_tells_of_it_once_and_names_what_ran_most(
    names: list[str], leak: int, stage: Stage
) -> None:
    box = Box()
    for name in names:
        box.run(name, leak=leak * MIB)
        box.free(stage)

    (event,) = box.told()
    times = {name: names[3:].count(name) for name in names}
    assert any(f"most often with {name} ({count} runs)" in event.reason for name, count in times.items() if count)
    assert f"({max(times.values())} runs)" in event.reason
