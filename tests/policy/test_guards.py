"""5. Guards: why not now, and until when."""

from __future__ import annotations

import pytest

from tests.policy.worlds import CALM, CHAT, SOFT, Policy, crowded, fallen, queue
from vram_manager.domain.action import Stage
from vram_manager.domain.event import EventType
from vram_manager.domain.snapshot import Snapshot
from vram_manager.domain.watch import Watch
from vram_manager.policy import Rules

HOUR = tuple(float(at) for at in range(-40, 0))


@pytest.mark.parametrize(
    ("rules", "watch", "seen", "branch", "why", "again"),
    [
        pytest.param(
            Rules(enabled=False),
            Watch(),
            fallen(0),
            "5 off",
            "monitoring only (ENABLE_VRAM_MONITORING=false): nothing is freed",
            None,
            id="switched off",
        ),
        pytest.param(
            Rules(),
            Watch(),
            fallen(10, queue=queue(3, since=4)),
            "5 busy",
            "ComfyUI is busy (3 running or waiting)",
            None,
            id="busy",
        ),
        pytest.param(
            Rules(),
            Watch(),
            fallen(10, queue=queue(since=8.5)),
            "5 idle",
            "ComfyUI has been idle for 1.5 s of 2 s",
            0.5,
            id="not idle for long enough",
        ),
        pytest.param(
            Rules(cooldown_seconds=30),
            Watch(posted_at={"comfyui": -20.0}),
            fallen(0),
            "5 cooldown",
            "cooldown: comfyui was asked 20 s ago, 30 s must pass",
            10,
            id="cooldown",
        ),
        pytest.param(
            Rules(cooldown_seconds=0),
            Watch(posted_at={"comfyui": -0.5}),
            fallen(0),
            "5 spacing",
            "spacing: comfyui was asked 0 s ago, 2 s must pass",
            1.5,
            id="two posts need two seconds even without a cooldown",
        ),
        pytest.param(
            Rules(max_frees_per_hour=40),
            Watch(frees_at=HOUR),
            fallen(0),
            "5 budget",
            "40 swaps within the hour, 40 at most: more would be ping-pong",
            3560,
            id="budget",
        ),
    ],
)
def test_a_guard_holds_the_free_and_says_why_and_until_when(
    rules: Rules, watch: Watch, seen: Snapshot, branch: str, why: str, again: float | None
) -> None:
    decision = Policy(rules, watch).look(seen)
    assert decision.action is None
    assert decision.branch == branch
    assert decision.reason == f"{CHAT} is 25 % on CPU: holding, {why}"
    assert decision.look_again_seconds == again


def test_a_budget_of_nothing_frees_nothing() -> None:
    decision = Policy(Rules(max_frees_per_hour=0)).look(fallen(0))
    assert (decision.branch, decision.look_again_seconds) == ("5 budget", None)


@pytest.mark.parametrize(
    ("watch", "seen"),
    [
        pytest.param(Watch(), fallen(10, queue=queue(since=8)), id="idle for just long enough"),
        pytest.param(Watch(posted_at={"comfyui": -30.0}), fallen(0), id="cooled down"),
        pytest.param(Watch(posted_at={"ollama:other": -1.0}), fallen(0), id="another target's cooldown"),
        pytest.param(Watch(frees_at=HOUR[1:]), fallen(0), id="one free left in the budget"),
        pytest.param(Watch(frees_at=HOUR), fallen(3560), id="a free of the budget is an hour ago"),
    ],
)
def test_what_a_guard_lets_through(watch: Watch, seen: Snapshot) -> None:
    assert Policy(CALM, watch).look(seen).action == SOFT


@pytest.mark.parametrize(
    ("rules", "seconds"),
    [
        pytest.param(Rules(), 2, id="two seconds when somebody suffers"),
        pytest.param(Rules(comfyui_idle_seconds=1), 1, id="never longer than for pressure"),
        pytest.param(Rules(waiting_idle_seconds=20), 20, id="as the profile says"),
    ],
)
def test_how_long_comfyui_must_be_idle_for_a_model_on_the_cpu(rules: Rules, seconds: float) -> None:
    assert Policy(rules).look(fallen(100, queue=queue(since=100.1 - seconds))).branch == "5 idle"
    assert Policy(rules).look(fallen(100, queue=queue(since=100 - seconds))).action == SOFT


def test_a_cooldown_ends_exactly_when_it_was_said_to_end() -> None:
    policy = Policy(watch=Watch(posted_at={"comfyui": 0.0}))
    again = policy.look(fallen(12.3)).look_again_seconds
    assert again is not None
    assert policy.acts(fallen(12.3 + again)) == SOFT


def test_while_monitoring_only_everything_is_still_noticed() -> None:
    policy = Policy(Rules(enabled=False, grace_seconds=5))
    for at in range(0, 120, 5):
        assert policy.acts(fallen(at)) is None
    assert policy.kinds() == [EventType.CPU_FALLBACK, EventType.PRESSURE_BEGAN]


# -- dry run


def test_a_dry_run_says_once_per_demand_what_would_have_been_done() -> None:
    policy = Policy(Rules(dry_run=True, grace_seconds=5))
    for at in range(0, 600, 5):
        assert policy.acts(fallen(at)) is None
    fallback, pressure = policy.of(EventType.DRY_RUN)
    assert fallback.reason == f"a soft free of ComfyUI, which holds 16.0 GiB ({CHAT} is 25 % on CPU)"
    assert fallback.stage is Stage.SOFT
    assert "over 75 %" in pressure.reason


def test_a_dry_run_is_bound_by_the_guards_it_would_have_been_bound_by() -> None:
    policy = Policy(Rules(dry_run=True))
    policy.look(fallen(0, queue=queue(1, since=0)))
    assert policy.of(EventType.DRY_RUN) == []
    assert policy.look(fallen(5, queue=queue(since=1))).branch == "5 dry run"


def test_a_demand_that_came_back_is_told_again_in_a_dry_run() -> None:
    policy = Policy(Rules(dry_run=True, grace_seconds=5))
    for at in (0, 5, 6):
        policy.look(crowded(at))
    for at in (10,):
        policy.look(crowded(at, free_gib=20))
    for at in (20, 25, 30):
        policy.look(crowded(at))
    assert len(policy.of(EventType.DRY_RUN)) == 2
