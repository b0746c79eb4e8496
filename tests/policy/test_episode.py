"""6. Two stages: soft first, and the unload stage as part of the same episode when that was not enough."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.policy.worlds import (
    CALM,
    CARD,
    CHAT,
    DYNAMIC,
    GIB,
    SOFT,
    UNLOAD,
    Policy,
    comfyui,
    crowded,
    fallen,
    gib,
    gpu,
    model,
    ollama,
    queue,
    snapshot,
)
from vram_manager.domain.action import Action, Stage
from vram_manager.domain.event import EventType
from vram_manager.domain.reading import Missing, Off
from vram_manager.domain.snapshot import Snapshot
from vram_manager.policy import Rules

QUICK = Rules(grace_seconds=5)


def under_pressure(rules: Rules = QUICK) -> Policy:
    """A soft free of 8 GiB under pressure went out at 5 s, with 1 GiB free."""
    policy = Policy(rules)
    assert [policy.acts(crowded(at)) for at in (0, 5)] == [None, SOFT]
    return policy


def then(policy: Policy, *turns: Snapshot) -> list[Action | None]:
    return [policy.acts(seen) for seen in turns]


def stages(policy: Policy) -> list[Stage | None]:
    return [event.stage for event in policy.told if event.type in (EventType.FREED, EventType.FREE_UNCONFIRMED)]


# -- when the unload stage follows


def test_use_still_over_the_unload_threshold_calls_for_the_unload_stage_without_a_cooldown() -> None:
    policy = under_pressure()
    left = {"free_gib": 2.0, "torch_gib": 7.0}
    assert then(policy, *(crowded(at, **left) for at in (6, 8.9, 9))) == [None, None, UNLOAD]
    assert policy.of(EventType.FREED)[0].freed_bytes == GIB
    assert policy.watch.pending is not None
    assert policy.watch.pending.reason == "GPU 0 over 75 % for 9 s; 92 % still used after the soft free"


def test_the_unload_stage_is_asked_of_a_demand_that_is_still_unmet() -> None:
    policy = Policy(CALM)
    taken = {"free_gib": 6.0, "torch_gib": 7.0}  # 75 % used: under the unload threshold
    need_ten = model(size_gib=16, gpu_gib=7)
    assert policy.acts(fallen(0, chat=need_ten)) == SOFT
    assert then(policy, *(fallen(at, chat=need_ten, **taken) for at in (1, 4))) == [None, UNLOAD]


@pytest.mark.parametrize(
    ("free_gib", "escalates"),
    [
        pytest.param(3.5, True, id="85.4 % used"),
        pytest.param(3.61, False, id="just under 85 % used"),
        pytest.param(5.0, False, id="79 % used, still under pressure"),
    ],
)
def test_pressure_between_the_two_thresholds_leaves_the_node_cache_alone(free_gib: float, escalates: bool) -> None:
    policy = under_pressure()
    turns = [crowded(at, free_gib=free_gib, torch_gib=9 - free_gib) for at in (6, 9, 10, 60)]
    assert (UNLOAD in then(policy, *turns)) is escalates
    assert policy.watch.pressure[CARD].began


def test_exactly_at_the_unload_threshold_is_not_over_it() -> None:
    policy = under_pressure()
    at_85 = [replace(crowded(at), gpus=snapshot(at, gpu(free_gib=3, total_gib=20)).gpus) for at in (6, 9, 10)]
    assert then(policy, *at_85) == [None] * 3


def test_an_unconfirmed_soft_free_of_measured_memory_is_followed_by_the_unload_stage() -> None:
    policy = under_pressure()
    turns = then(policy, *(crowded(at) for at in (8, 11, 15)))
    assert turns == [SOFT, None, UNLOAD]
    event = policy.of(EventType.FREE_UNCONFIRMED)[0]
    assert not event.final


def test_the_end_of_an_episode_is_final() -> None:
    policy = under_pressure()
    then(policy, *(crowded(at) for at in (15, 18, 25)))
    assert [event.final for event in policy.of(EventType.FREE_UNCONFIRMED)] == [False, True]


def test_a_guess_that_gave_nothing_is_not_followed_by_the_unload_stage() -> None:
    policy = Policy(QUICK)
    stats = comfyui(version=DYNAMIC)
    turns = [snapshot(at, gpu(free_gib=1), comfyui=stats) for at in (0, 5, 8, 15, 16, 60)]
    assert then(policy, *turns) == [None, SOFT, SOFT, None, None, None]
    assert policy.of(EventType.FREE_UNCONFIRMED)[0].final


def test_the_unload_stage_comes_at_least_two_seconds_after_the_soft_post() -> None:
    policy = Policy(CALM)
    need_ten = model(size_gib=16, gpu_gib=7)
    assert policy.acts(fallen(0, chat=need_ten, torch_gib=10)) == SOFT
    left = {"chat": need_ten, "free_gib": 9.0, "torch_gib": 2.0}  # 8 of 10 came back, and 10 are needed
    policy.look(fallen(0.5, **left))
    decision = policy.look(fallen(1, **left))
    assert (decision.branch, decision.action) == ("6 escalate later", None)
    assert decision.look_again_seconds == 1
    assert then(policy, fallen(1.9, **left), fallen(2, **left)) == [None, UNLOAD]


def test_the_unload_stage_ignores_the_idle_time_and_the_budget() -> None:
    policy = under_pressure(replace(QUICK, max_frees_per_hour=1))
    assert UNLOAD in then(policy, *(crowded(at, free_gib=2, torch_gib=7) for at in (6, 9)))


# -- when it does not


@pytest.mark.parametrize(
    "end",
    [
        pytest.param({"queue": queue(1, since=8, runs=2)}, id="ComfyUI is busy"),
        pytest.param({"queue": queue(since=8.9, runs=2)}, id="ComfyUI has just run: it is somebody's again"),
        pytest.param({"queue": Missing("timed out")}, id="its queue cannot be read"),
        pytest.param({"comfyui": Missing("refused")}, id="ComfyUI cannot be read"),
        pytest.param({"comfyui": comfyui(devices=())}, id="ComfyUI came back without a GPU"),
        pytest.param({"torch_gib": 0.2}, id="it holds nothing any more"),
        pytest.param({"free_gib": 20.0, "torch_gib": 0.0}, id="enough came back"),
    ],
)
def test_the_unload_stage_is_not_asked_when(end: dict[str, object]) -> None:
    policy = under_pressure()
    half = {"free_gib": 2.0, "torch_gib": 7.0}
    policy.look(crowded(6, **half))
    turns = then(policy, *(crowded(at, **{**half, **end}) for at in (9, 10, 11, 12)))
    assert turns == [None] * 4
    assert policy.watch.episode is None


def test_a_blind_turn_ends_the_episode() -> None:
    policy = under_pressure()
    policy.look(crowded(6, free_gib=2, torch_gib=7))
    blind = snapshot(15, Missing("lost"), comfyui=Off())
    assert policy.look(blind).branch == "2 blind"
    assert then(policy, *(crowded(at, free_gib=2, torch_gib=7) for at in (16, 17))) == [None, None]


def test_an_episode_ends_when_comfyui_turns_out_to_be_on_another_gpu() -> None:
    policy = under_pressure()
    moved = replace(gpu(free_gib=1), uuid="GPU-z")
    decision = policy.look(snapshot(15, moved, ollama=ollama(model()), comfyui=comfyui(torch_gib=8)))
    assert decision.action is None
    assert policy.watch.episode is None


def test_the_unload_stage_is_not_asked_for_a_model_that_would_not_fit_even_then() -> None:
    policy = Policy(CALM)
    assert policy.acts(fallen(0, torch_gib=2.5)) == SOFT
    left = {"free_gib": 1.5, "torch_gib": 1.0}  # 2.5 of the 3 GiB that are needed, and the card is not full
    roomy = [replace(fallen(at, **left), gpus=snapshot(at, gpu(free_gib=1.5, total_gib=9)).gpus) for at in (1, 4, 10)]
    assert then(policy, *roomy) == [None] * 3
    assert policy.watch.unreclaimable == {CARD: gib(1.0) + gib(0.5)}


def test_an_unload_stage_over_the_threshold_is_worth_it_for_whatever_there_is() -> None:
    policy = Policy(CALM)
    assert policy.acts(fallen(0, torch_gib=2.5)) == SOFT
    left = {"free_gib": 1.5, "torch_gib": 1.0}
    assert then(policy, *(fallen(at, **left) for at in (1, 4))) == [None, UNLOAD]


def test_an_unload_stage_for_use_over_the_threshold_asks_for_room_below_it() -> None:
    # The actuator looks once more: the chat's own need is met, what is asked now is room below 85 %.
    policy = Policy(CALM)
    small = model(size_gib=3, gpu_gib=2.5)
    policy.acts(fallen(0, chat=small, torch_gib=16))
    turns = then(policy, *(fallen(at, chat=small, free_gib=3, torch_gib=14) for at in (1, 4)))
    assert turns == [None, UNLOAD]
    assert policy.watch.pending is not None
    assert policy.watch.pending.demand is not None
    assert policy.watch.pending.demand.need_free_bytes == gib(24 * 0.15)


def test_nothing_follows_the_unload_stage() -> None:
    policy = under_pressure()
    assert [a for a in then(policy, *(crowded(float(at)) for at in range(6, 900))) if a] == [SOFT, UNLOAD, UNLOAD]


# -- what is told and remembered of an episode


def test_both_stages_of_an_episode_are_told() -> None:
    policy = under_pressure()
    then(policy, *(crowded(at, free_gib=2, torch_gib=7) for at in (6, 9)))
    then(policy, *(crowded(at, free_gib=9, torch_gib=0) for at in (10, 10.5)))
    assert [(event.stage, event.freed_bytes) for event in policy.of(EventType.FREED)] == [
        (Stage.SOFT, GIB),
        (Stage.UNLOAD, 7 * GIB),
    ]


def dynamic(at: float, free_gib: float, *, chat=None, runs: int = 1) -> Snapshot:
    """A ComfyUI with DynamicVRAM, whose torch holds 1 GiB, beside a chat that needs 7 GiB free."""
    return snapshot(
        at,
        gpu(free_gib=free_gib),
        ollama=chat or ollama(model(size_gib=12, gpu_gib=6)),
        comfyui=comfyui(version=DYNAMIC, torch_gib=0.1),
        queue=queue(since=at - 5, runs=runs),
    )


def test_each_run_of_comfyui_gets_both_stages_again() -> None:
    policy = under_pressure()
    then(policy, *(crowded(at, free_gib=2, torch_gib=7) for at in (6, 9, 12, 19)))
    again = [crowded(at, queue=queue(since=20, runs=2)) for at in (60, 63, 70)]
    assert then(policy, *again) == [SOFT, SOFT, UNLOAD]


def test_an_episode_that_freed_something_in_its_first_stage_answers_its_fallback() -> None:
    policy = Policy(CALM)
    left = {"free_gib": 2.0, "torch_gib": 15.0}
    assert then(policy, fallen(0), fallen(1, **left), fallen(4, **left)) == [SOFT, None, UNLOAD]
    then(policy, fallen(7, **left))
    decision = policy.look(fallen(14, **left))
    assert stages(policy) == [Stage.SOFT, Stage.UNLOAD]
    assert decision.branch == "3 nobody"
    assert then(policy, *(fallen(at, queue=queue(since=at - 9, runs=at)) for at in range(100, 500, 40))) == [None] * 10


def test_what_stayed_after_a_soft_free_is_not_guessed_to_be_comfyuis_once_more() -> None:
    policy = Policy(CALM)
    assert then(policy, *(dynamic(at, 6 if at else 1) for at in (0, 1, 4, 5, 10))) == [SOFT, None, None, None, None]
    assert stages(policy) == [Stage.SOFT]
    assert policy.watch.unreclaimable == {CARD: gib(24 - 6 - 6)}


def test_what_nobody_gives_back_is_unreclaimable() -> None:
    policy = under_pressure()
    then(policy, *(crowded(at) for at in (15, 18, 25)))
    # 8 GiB stay in torch, and 3 GiB belong to nobody.
    assert policy.watch.unreclaimable == {CARD: 11 * GIB}
    for at in range(30, 60):
        policy.look(crowded(at))
        assert policy.watch.unreclaimable == {CARD: 11 * GIB}


def test_unreclaimable_memory_is_forgotten_when_nobody_needs_it_any_more() -> None:
    policy = under_pressure()
    then(policy, *(crowded(at) for at in (15, 18, 25)))
    policy.look(crowded(30, free_gib=20, torch_gib=0))
    assert policy.watch.unreclaimable == {}


def test_the_unreclaimable_rest_of_dynamic_vram_is_what_nobody_accounts_for_where_that_is_known() -> None:
    policy = under_pressure()
    unread = {"ollama": Missing("timed out")}
    then(policy, *(crowded(at, **unread) for at in (15, 18, 25)))
    assert policy.watch.unreclaimable == {CARD: 8 * GIB}


def test_an_episode_is_over_once_its_free_was_enough() -> None:
    policy = Policy(CALM)
    policy.acts(fallen(0))
    then(policy, *(fallen(at, free_gib=17, torch_gib=0) for at in (1, 1.5)))
    assert policy.watch.episode is None
    assert policy.watch.demands == {}
    assert policy.of(EventType.FREED)[0].reason == f"{CHAT} is 25 % on CPU"
