"""3. Collect demands: what is new in Ollama, what fell to the CPU, and how long that stays true."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.policy.worlds import (
    CALM,
    CHAT,
    GIB,
    MIB,
    NO_REPAIR,
    SOFT,
    Policy,
    comfyui,
    fallen,
    gib,
    gpu,
    gpus,
    model,
    ollama,
    queue,
    second,
    snapshot,
)
from vram_manager.domain.demand import Demand, Kind
from vram_manager.domain.event import EventType
from vram_manager.domain.reading import Missing, Seen
from vram_manager.domain.snapshot import LoadedModel
from vram_manager.domain.watch import Watch
from vram_manager.policy import Rules
from vram_manager.policy.demands import missing_bytes, placement

BUSY = queue(1, since=0)


def only(policy: Policy) -> Demand:
    (demand,) = policy.watch.demands.values()
    return demand


# -- what is new


def test_a_model_is_detected_once() -> None:
    policy = Policy()
    policy.look(snapshot(0))
    for at in (1, 2, 3):
        policy.look(snapshot(at, ollama=ollama(model(), model("qwen3:4b", size_gib=3))))
    (event,) = policy.of(EventType.MODEL_DETECTED)
    assert event.reason == f"{CHAT} (8.0 GiB, 100 % GPU), qwen3:4b (3.0 GiB, 100 % GPU)"
    assert event.models == (CHAT, "qwen3:4b")


def test_what_is_loaded_at_the_very_first_look_is_not_new() -> None:
    policy = Policy()
    policy.look(snapshot(0, ollama=ollama(model())))
    assert policy.told == []


def test_a_model_that_came_back_is_new_again() -> None:
    policy = Policy()
    for at, loaded in enumerate([ollama(), ollama(model()), ollama(), ollama(model())]):
        policy.look(snapshot(at, ollama=loaded))
    assert len(policy.of(EventType.MODEL_DETECTED)) == 2


def test_an_ollama_that_could_not_be_read_for_a_while_brings_no_news() -> None:
    policy = Policy()
    for at, seen in enumerate([ollama(model(gpu_gib=6)), Missing("timed out"), ollama(model(gpu_gib=6))]):
        policy.look(snapshot(at, ollama=seen))
    assert policy.kinds() == [EventType.CPU_FALLBACK]


@pytest.mark.parametrize(
    ("loaded", "words"),
    [
        pytest.param(model(), "100 % GPU", id="all on the GPU"),
        pytest.param(model(gpu_gib=0), "100 % CPU", id="none on the GPU"),
        pytest.param(model(gpu_gib=0.08), "99 % CPU", id="almost none on the GPU"),
        pytest.param(model(gpu_gib=5), "38 % CPU", id="split"),
        pytest.param(model(gpu_gib=7.9), "1 % CPU", id="a little on the CPU"),
        pytest.param(model(gpu_gib=7.95), "100 % GPU", id="rounding in Ollama's sums"),
        pytest.param(model(size_gib=0), "placement unknown", id="no size"),
        pytest.param(model(size_gib=4, gpu_gib=5), "placement unknown", id="more on the GPU than there is"),
    ],
)
def test_a_placement_is_said_in_percent(loaded: LoadedModel, words: str) -> None:
    assert placement(loaded) == words


# -- fallbacks


def test_a_fallback_is_detected_once_per_placement() -> None:
    policy = Policy()
    half, quarter = model(gpu_gib=4), model(gpu_gib=6)
    for at, chat in enumerate([half, half, quarter, quarter, half]):
        policy.look(snapshot(at, ollama=ollama(chat)))
    assert [event.reason for event in policy.of(EventType.CPU_FALLBACK)] == [
        f"{CHAT} is 50 % on CPU",
        f"{CHAT} is 25 % on CPU",
        f"{CHAT} is 50 % on CPU",
    ]


def test_sizes_that_contradict_each_other_are_no_fallback() -> None:
    policy = Policy()
    policy.look(fallen(0, chat=model(size_gib=4, gpu_gib=5)))
    assert (policy.told, policy.watch.demands) == ([], {})


@pytest.mark.parametrize(
    ("chat", "version", "need_gib"),
    [
        pytest.param(model(gpu_gib=6), "0.32.15", 2 + 1, id="what is missing, and llama.cpp's margin"),
        pytest.param(model(gpu_gib=0), "0.32.15", 8 + 0.5 + 1, id="wholly on the CPU: its CUDA context comes on top"),
        pytest.param(model(gpu_gib=6), "0.30.0", 1 + 1, id="0.30.0 counts mapped weights twice"),
        pytest.param(model(gpu_gib=6), "0.30.10", 1 + 1, id="0.30.10 still does"),
        pytest.param(model(gpu_gib=6), "v0.30.7-rc1", 1 + 1, id="a release candidate too"),
        pytest.param(model(gpu_gib=0), "0.30.5", 8 + 0.5 + 1, id="not when nothing was offloaded"),
        pytest.param(model(gpu_gib=6), "0.30.11", 2 + 1, id="0.30.11 does not"),
        pytest.param(model(gpu_gib=6), "0.3.10", 2 + 1, id="0.3.10 is another release"),
        pytest.param(model(gpu_gib=6), "0.30", 2 + 1, id="too short a version to tell"),
        pytest.param(model(gpu_gib=6), Missing("no answer"), 2 + 1, id="version unknown"),
    ],
)
def test_a_fallback_needs_what_is_missing_on_the_gpu(chat: LoadedModel, version, need_gib: float) -> None:
    policy = Policy()
    seen = ollama(chat, version=version)
    policy.look(snapshot(0, gpu(free_gib=0.5), ollama=seen, comfyui=comfyui(torch_gib=16), queue=BUSY))
    assert only(policy).need_free_bytes == gib(need_gib)


def test_what_is_missing_is_never_negative() -> None:
    assert missing_bytes(model(size_gib=4, gpu_gib=5), "0.30.5") == 0


def test_a_demand_survives_a_cooldown() -> None:
    policy = Policy(watch=Watch(posted_at={"comfyui": -1.0}))
    for at in range(29):
        assert policy.acts(fallen(at)) is None
    assert policy.acts(fallen(29)) == SOFT


def test_a_demand_survives_being_busy_for_any_length() -> None:
    policy = Policy(CALM)
    for at in range(0, 7200, 10):
        assert policy.acts(fallen(at, queue=BUSY)) is None
    assert only(policy).since == 0
    assert policy.acts(fallen(7202, queue=queue(since=7200))) == SOFT


@pytest.mark.parametrize(
    ("left_for", "acts"), [pytest.param(60, True, id="a minute later"), pytest.param(61, False, id="longer than that")]
)
def test_a_demand_outlives_its_model_by_a_minute(left_for: float, acts: bool) -> None:
    policy = Policy(CALM)
    policy.look(fallen(0, queue=BUSY))
    other = ollama(model("qwen3:4b", size_gib=3))
    gone = snapshot(left_for, gpu(free_gib=1), ollama=other, comfyui=comfyui(torch_gib=16))
    assert (policy.acts(gone) == SOFT) is acts


def test_a_demand_outlives_an_ollama_that_cannot_be_read() -> None:
    policy = Policy()
    policy.look(fallen(0, queue=BUSY))
    assert policy.acts(replace(fallen(20), ollama=Missing("timed out"))) == SOFT


@pytest.mark.parametrize(
    ("chat", "left"),
    [
        pytest.param(model(gpu_gib=8), [], id="wholly on the GPU"),
        pytest.param(model(gpu_gib=7), ["12 % on CPU"], id="split otherwise"),
        pytest.param(model("llama3.1:latest", digest=f"sha-{CHAT}", gpu_gib=8), [], id="on the GPU by another name"),
    ],
)
def test_a_model_that_came_back_leaves_no_demand_of_its_old_placement(chat: LoadedModel, left: list[str]) -> None:
    policy = Policy()
    policy.look(fallen(0, queue=BUSY))
    policy.look(snapshot(5, gpu(free_gib=1), comfyui=comfyui(torch_gib=16), queue=BUSY))
    policy.look(fallen(10, chat=chat, queue=BUSY))
    assert [demand.reason.partition(" is ")[2] for demand in policy.watch.demands.values()] == left


def test_a_demand_is_over_when_there_is_room() -> None:
    policy = Policy(NO_REPAIR)
    policy.look(fallen(0, queue=BUSY))
    assert policy.look(fallen(1, free_gib=3, queue=BUSY)).branch == "3 nobody"
    assert policy.watch.demands == {}


def test_room_on_any_gpu_that_ollama_may_use_is_room() -> None:
    seen = snapshot(0, gpus(gpu(free_gib=1), second(free_gib=20)), ollama=ollama(model(gpu_gib=6)))
    assert Policy(NO_REPAIR).look(seen).branch == "3 nobody"
    assert Policy(Rules(ollama_gpu="0", repair=False)).look(seen).branch != "3 nobody"


def test_a_model_on_the_cpu_with_room_to_spare_is_meant_to_be_there() -> None:
    # num_gpu: 0, for example. Later renders change nothing about that placement.
    policy = Policy(NO_REPAIR)
    policy.look(fallen(0, free_gib=20, torch_gib=0))
    for at in range(10, 600, 10):
        assert policy.acts(fallen(at)) is None
    assert policy.watch.demands == {}


def test_a_model_that_was_meant_to_be_on_the_cpu_is_looked_at_anew_when_it_is_loaded_again() -> None:
    policy = Policy(NO_REPAIR)
    policy.look(fallen(0, free_gib=20, torch_gib=0))
    policy.look(snapshot(300))
    assert policy.acts(fallen(600)) == SOFT


@pytest.mark.parametrize(
    "seen",
    [
        pytest.param(lambda: fallen(5, free_gib=20, torch_gib=0, queue=queue(1, since=3)), id="busy"),
        pytest.param(lambda: fallen(5, free_gib=20, torch_gib=0, queue=Missing("timed out")), id="queue unread"),
    ],
)
def test_room_that_a_working_comfyui_leaves_for_a_moment_does_not_end_the_matter(seen) -> None:
    policy = Policy(NO_REPAIR)
    policy.look(fallen(0, queue=BUSY))
    policy.look(seen())
    assert policy.acts(fallen(60, queue=queue(since=50, runs=2))) == SOFT


def test_an_answered_placement_is_not_freed_for_again() -> None:
    policy = Policy(NO_REPAIR)
    freed_for(policy, at=0)
    for at in range(100, 700, 20):
        assert policy.acts(fallen(at, queue=queue(since=at - 10, runs=at))) is None


def test_a_placement_whose_room_was_taken_by_somebody_else_is_not_freed_for_again() -> None:
    policy = Policy(CALM)
    freed_for(policy, at=0, left_gib=2)
    for at in range(100, 700, 20):
        assert policy.acts(fallen(at, queue=queue(since=at - 10, runs=at))) is None


def test_a_placement_for_which_nothing_came_back_is_tried_again_after_the_next_run() -> None:
    policy = Policy(CALM)
    for at in (0, 3, 10, 13, 20):
        policy.acts(fallen(at))
    assert policy.watch.answered == frozenset()
    assert policy.acts(fallen(100, queue=queue(since=90, runs=2))) == SOFT


def test_a_new_placement_of_an_answered_model_is_a_new_demand() -> None:
    policy = Policy(NO_REPAIR)
    freed_for(policy, at=0)
    policy.look(snapshot(50))
    assert policy.acts(fallen(100, queue=queue(runs=2))) == SOFT


def test_room_read_before_a_model_was_seen_on_the_cpu_does_not_end_the_matter() -> None:
    # Ollama lists a model once it is loaded: the memory was read before it was taken.
    policy = Policy(NO_REPAIR)
    policy.look(replace(fallen(10, free_gib=20, torch_gib=0), gpus=Seen(gpus(gpu(free_gib=20)), 9.0)))
    assert policy.acts(fallen(60)) == SOFT


def test_what_was_freed_for_a_placement_and_taken_by_comfyui_at_once_is_not_freed_again() -> None:
    policy = Policy(NO_REPAIR)
    assert policy.acts(fallen(0)) == SOFT
    for at in (1, 1.5):
        policy.look(fallen(at, free_gib=17, torch_gib=0, queue=queue(1, since=1, runs=2)))
    assert policy.of(EventType.FREED)
    assert policy.acts(fallen(100, queue=queue(since=50, runs=2))) is None


def freed_for(policy: Policy, at: float, left_gib: float = 17) -> None:
    """A soft free for the chat that fell, proven and over."""
    assert policy.acts(fallen(at)) == SOFT
    for later, free_gib in ((1, 17), (1.5, left_gib)):
        policy.look(fallen(at + later, free_gib=free_gib, torch_gib=0))
    assert policy.of(EventType.FREED)
    assert policy.watch.pending is None


def test_a_fallback_is_answered_before_pressure() -> None:
    policy = Policy(Rules(grace_seconds=5))
    for at in (0, 6):
        policy.look(fallen(at, queue=BUSY))
    assert {demand.kind for demand in policy.watch.demands.values()} == {Kind.FALLBACK, Kind.PRESSURE}
    policy.look(fallen(9, queue=queue(since=7)))
    assert policy.watch.pending is not None
    assert policy.watch.pending.reason == f"{CHAT} is 25 % on CPU"


def test_of_two_fallbacks_the_older_is_answered_first() -> None:
    policy = Policy()
    old, new = model("z-old", gpu_gib=6), model("a-new", gpu_gib=6)
    cards, stats = gpu(free_gib=1), comfyui(torch_gib=16)
    policy.look(snapshot(0, cards, ollama=ollama(old), comfyui=stats, queue=BUSY))
    policy.look(snapshot(5, cards, ollama=ollama(old, new), comfyui=stats, queue=BUSY))
    policy.look(snapshot(20, cards, ollama=ollama(old, new), comfyui=stats, queue=queue(since=10)))
    assert policy.watch.pending is not None
    assert policy.watch.pending.reason == "z-old is 25 % on CPU"


def test_a_demand_that_cannot_be_helped_does_not_block_the_next() -> None:
    policy = Policy(Rules(grace_seconds=5))
    huge = model(size_gib=80, gpu_gib=6)
    for at in (0, 6, 40):
        policy.acts(fallen(at, chat=huge))
    assert policy.watch.pending is not None
    assert "over 75 %" in policy.watch.pending.reason


def test_a_quarter_of_a_gib_is_the_least_worth_a_free() -> None:
    assert Policy().acts(fallen(0, free_gib=2.9, torch_gib=255 * MIB / GIB)) is None
