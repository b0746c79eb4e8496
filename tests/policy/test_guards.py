"""5. Guards: why not now, and until when."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.policy.worlds import CALM, CHAT, SOFT, Policy, crowded, fallen, queue
from vram_manager.domain.action import Stage
from vram_manager.domain.demand import Demand, Kind
from vram_manager.domain.event import EventType
from vram_manager.domain.snapshot import Snapshot
from vram_manager.domain.watch import Watch
from vram_manager.policy import Rules, guards

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


# -- turns


def ask(*, since: float = 0.0, kind: Kind = Kind.WAITING, for_comfyui: bool = False) -> Demand:
    return Demand(
        kind=kind,
        key="k",
        gpu=None,
        need_free_bytes=1,
        reason="somebody waits",
        since=since,
        last_seen_at=since,
        for_comfyui=for_comfyui,
    )


TURNS = Rules(chat_turn_seconds=10, image_turn_seconds=20, cooldown_seconds=30, post_spacing_seconds=2)


@pytest.mark.parametrize(
    ("demand", "turn"),
    [
        pytest.param(ask(), 10, id="a chat or a worker"),
        pytest.param(ask(for_comfyui=True), 20, id="a prompt"),
        pytest.param(ask(kind=Kind.STARTING, for_comfyui=True), None, id="not in line"),
        pytest.param(None, None, id="nobody"),
    ],
)
def test_only_who_waits_in_line_has_a_turn(demand: Demand | None, turn: float | None) -> None:
    assert guards.turn_seconds(demand, TURNS) == turn
    if demand is not None:
        assert not guards.pressing(demand, 9.9, TURNS)
        assert guards.pressing(demand, 10.0, TURNS) is (turn == 10)
        assert guards.pressing(demand, 1e6, TURNS) is (turn is not None)


@pytest.mark.parametrize(
    ("demand", "left"),
    [
        pytest.param(None, 26.0, id="nobody waits: the whole pause"),
        pytest.param(ask(kind=Kind.FALLBACK), 26.0, id="nobody in line: the whole pause"),
        pytest.param(ask(since=99), 5.0, id="until its turn is over"),
        pytest.param(ask(since=99, for_comfyui=True), 15.0, id="a prompt has its own"),
        pytest.param(ask(since=10), None, id="its turn has come"),
        pytest.param(ask(since=130), 26.0, id="never more than the pause"),
    ],
)
def test_a_pause_keeps_nobody_in_line_beyond_their_turn(demand: Demand | None, left: float | None) -> None:
    held = guards.cooldown("comfyui", {"comfyui": 100.0}, demand, 104.0, TURNS)
    assert (None if held is None else held.again_seconds) == left
    assert held is None or held.branch == "5 cooldown"


def test_two_posts_keep_their_distance_whoever_waits() -> None:
    held = guards.cooldown("comfyui", {"comfyui": 100.0}, ask(), 101.5, TURNS)
    assert held is not None
    assert held.again_seconds == 0.5
    assert guards.cooldown("comfyui", {"comfyui": 100.0}, ask(), 102.0, TURNS) is None


def test_who_was_never_asked_is_not_held_back() -> None:
    assert guards.cooldown("comfyui", {"ollama:a": 100.0}, ask(since=100.0), 100.0, TURNS) is None


@given(
    last=st.floats(0, 100),
    after=st.floats(0, 200),
    demand=st.none() | st.builds(ask, since=st.floats(0, 300), kind=st.sampled_from(Kind), for_comfyui=st.booleans()),
    pause=st.floats(0, 90),
    turns=st.tuples(st.floats(0, 60), st.floats(0, 60)),
    spacing=st.floats(0, 5),
)
def test_a_pause_is_never_longer_than_it_was_set_and_ends_with_the_turn_of_who_waits(
    last: float, after: float, demand: Demand | None, pause: float, turns: tuple[float, float], spacing: float
) -> None:
    rules = Rules(
        cooldown_seconds=pause,
        chat_turn_seconds=turns[0],
        image_turn_seconds=turns[1],
        post_spacing_seconds=spacing,
    )
    now = last + after
    held = guards.cooldown("comfyui", {"comfyui": last}, demand, now, rules)
    if held is None:
        # Nobody is let through before the pause or the turn is over.
        turn = guards.turn_seconds(demand, rules)
        since_turn = -1.0 if demand is None or turn is None else now - demand.since - turn
        assert after >= min(pause, spacing) - 1e-6
        assert after >= pause - 1e-6 or since_turn >= -1e-6
        return
    assert held.again_seconds is not None
    until = now + held.again_seconds
    # Two posts keep their distance, however short the pause was set.
    assert until <= last + max(pause, spacing) + 1e-6
    turn = guards.turn_seconds(demand, rules)
    if demand is not None and turn is not None:
        assert until <= max(demand.since + turn, last + spacing) + 1e-6
