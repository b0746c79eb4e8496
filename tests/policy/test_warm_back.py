"""3e and 7. The last model that made room for ComfyUI comes back once ComfyUI has truly finished, and once only."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from tests.policy.worlds import (
    CALM,
    CARD,
    CHAT,
    SOFT,
    Policy,
    comfyui,
    gib,
    gpu,
    gpus,
    model,
    ollama,
    queue,
    second,
    snapshot,
)
from vram_manager.domain.action import Action, LoadModel, UnloadModel
from vram_manager.domain.demand import Demand, Kind
from vram_manager.domain.event import EventType
from vram_manager.domain.reading import Missing, Off
from vram_manager.domain.snapshot import LoadedModel, Snapshot
from vram_manager.domain.watch import Refused, Watch
from vram_manager.policy import Rules, refused
from vram_manager.policy.repair import reserved

RULES = replace(CALM, warm_back=True, comfyui_idle_seconds=30, unseen_idle_seconds=5, min_residency_seconds=5)
UNTIL = datetime(2026, 7, 1, tzinfo=UTC)
CHATTED = replace(model(), context_length=8192, expires_at=UNTIL, since=-100.0, active_at=-50.0)
BYE = UnloadModel(model=CHAT)
LOAD = LoadModel(model=CHAT, context=8192, expires_at=UNTIL)


def asks(**more: Any) -> Demand:
    values: dict[str, Any] = {"kind": Kind.STARTING, "for_comfyui": True, "need_free_bytes": gib(6), **more}
    return Demand(key="k", gpu=CARD, reason="ComfyUI has begun", since=0, last_seen_at=0, **values)


def renders(at: float, *models: LoadedModel, free_gib: float = 1, **more: Any) -> Snapshot:
    """ComfyUI has begun beside the chat and is short of room."""
    seen = snapshot(at, gpu(free_gib=free_gib), ollama=ollama(*models), queue=queue(1, since=at))
    return replace(seen, asks=(asks(**more),))


def done(at: float, *models: LoadedModel, since: float = 10, free_gib: float = 20, **more: Any) -> Snapshot:
    """ComfyUI has been idle since then."""
    world = {"queue": queue(since=since, runs=2), "ollama": ollama(*models), **more}
    return snapshot(at, world.pop("card", gpu(free_gib=free_gib)), **world)  # type: ignore[arg-type]


def live(policy: Policy, *looks: Snapshot) -> list[Action]:
    """What is asked in these looks, with the room kept for a model that is away."""
    actions = []
    for look in looks:
        kept = reserved(policy.watch, policy.rules)
        actions.append(policy.acts(replace(look, leased_bytes=kept, reserved_bytes=kept)))
    return [action for action in actions if action is not None]


def gone(rules: Rules = RULES, chat: LoadedModel = CHATTED, **more: Any) -> Policy:
    """The chat has made room at second 0, proven at second 2."""
    policy = Policy(rules)
    freed = {"free_gib": 9, **more}
    assert live(policy, renders(0, chat, **more), renders(1, **freed), renders(2, **freed)) == [BYE]
    assert policy.of(EventType.FREED)
    return policy


def test_it_comes_back_as_it_was_when_comfyui_has_finished() -> None:
    policy = gone()
    assert live(policy, *(done(at) for at in range(10, 40))) == []
    assert live(policy, done(40)) == [LOAD]
    live(policy, done(41, replace(CHATTED, since=41.0, active_at=41.0), free_gib=12))
    (event,) = policy.of(EventType.WARMED_BACK)
    assert event.reason == f"{CHAT} made room for ComfyUI, now 100 % GPU (8.0 GiB)"
    assert (policy.watch.made_room, policy.watch.mending) == (None, None)
    assert len(policy.watch.frees_at) == 1


@pytest.mark.parametrize(
    ("rules", "world"),
    [
        pytest.param({"warm_back": False}, {}, id="not wanted"),
        pytest.param({"enabled": False}, {}, id="monitoring only"),
        pytest.param({"dry_run": True}, {}, id="dry run"),
        pytest.param({}, {"queue": queue(1, since=10)}, id="ComfyUI works"),
        pytest.param({}, {"since": 20}, id="ComfyUI has not been idle for long enough"),
        pytest.param({}, {"queue": Missing("?")}, id="nobody knows what ComfyUI does"),
        pytest.param({}, {"queue": Off(), "comfyui": Off()}, id="there is no ComfyUI any more"),
        pytest.param({}, {"ollama": Missing("?")}, id="Ollama cannot be read"),
        pytest.param({}, {"card": Missing("lost"), "comfyui": comfyui(free_gib=20)}, id="NVML is gone"),
        pytest.param({}, {"card": gpus(gpu(), second())}, id="nobody knows which GPU is Ollama's"),
        pytest.param({}, {"free_gib": 9.4, "comfyui": comfyui(torch_gib=0)}, id="no room"),
    ],
)
def test_why_it_does_not_come_back(rules: dict[str, Any], world: dict[str, Any]) -> None:
    policy = Policy(replace(RULES, **rules), gone().watch)
    assert live(policy, done(40, **world)) == []
    assert policy.watch.mending is None


def test_room_for_all_of_it_with_its_context_and_margin_is_enough() -> None:
    assert live(gone(), done(40, free_gib=9.5)) == [LOAD]


def test_it_does_not_come_back_while_somebody_waits() -> None:
    policy = gone()
    waiting = asks(kind=Kind.WAITING, for_comfyui=False, need_free_bytes=gib(23))
    assert live(policy, *(replace(done(at), asks=(waiting,)) for at in range(40, 60))) == []
    assert live(policy, done(60)) == [LOAD]


@pytest.mark.parametrize(
    ("ask", "comes_back"), [({}, True), ({"for_comfyui": False}, False)], ids=["for ComfyUI", "for a worker"]
)
def test_only_what_made_room_for_comfyui_comes_back(ask: dict[str, Any], comes_back: bool) -> None:
    assert (live(gone(**ask), done(40)) == [LOAD]) is comes_back


def test_a_model_that_left_by_hand_does_not_come_back() -> None:
    policy = Policy(RULES)
    policy.wish(BYE, renders(0, CHATTED))
    policy.post()
    assert live(policy, done(1, free_gib=9), done(2, free_gib=9), done(40)) == []


def test_only_the_last_of_several_comes_back() -> None:
    policy = gone()
    other = replace(CHATTED, name="other", digest="sha-other")
    assert live(policy, renders(3, other)) == [UnloadModel(model="other")]
    assert live(policy, renders(4, free_gib=9), renders(5, free_gib=9)) == []
    assert live(policy, done(45), done(46, replace(other, since=46.0))) == [replace(LOAD, model="other")]
    assert live(policy, *(done(at, replace(other, since=46.0)) for at in range(50, 300, 10))) == []


def test_a_model_that_its_users_have_loaded_again_is_not_brought_back() -> None:
    policy = gone()
    live(policy, done(15, model("alias", digest=CHATTED.digest)))
    assert policy.watch.made_room is None
    assert live(policy, done(50)) == []


def test_an_idle_comfyui_is_freed_for_it_once() -> None:
    policy = gone()
    full = {"free_gib": 4, "comfyui": comfyui(torch_gib=16)}
    assert live(policy, *(done(at, **full) for at in range(10, 40))) == []
    assert live(policy, done(40, **full)) == [SOFT]
    assert live(policy, done(41), done(42)) == [LOAD]


def test_comfyui_is_not_freed_for_it_where_that_would_not_be_enough() -> None:
    assert live(gone(), *(done(at, free_gib=4, comfyui=comfyui(torch_gib=5)) for at in range(40, 100))) == []


def test_no_model_gives_way_for_one_that_comes_back() -> None:
    other = replace(model("other", size_gib=12), active_at=-500.0)
    assert live(gone(), *(done(at, other, free_gib=4) for at in range(40, 100))) == []


def test_a_model_on_the_cpu_that_has_room_goes_before() -> None:
    split = replace(model("split", gpu_gib=6), active_at=38.0)
    policy = gone()
    assert live(policy, *(done(at, split) for at in (40, 41, 42))) == []
    assert live(policy, done(43, split)) == [UnloadModel(model="split")]


def test_a_model_that_is_meant_for_the_cpu_does_not_keep_it_away() -> None:
    split = model("split", gpu_gib=6)
    policy = gone()
    policy.look(renders(3, split))
    policy.watch = replace(policy.watch, pending=None, meant=frozenset(policy.watch.fallbacks))
    assert live(policy, done(40, split)) == [LOAD]


def test_a_load_that_leaves_no_trace_is_not_tried_again() -> None:
    policy = gone()
    assert live(policy, *(done(at) for at in range(40, 200))) == [LOAD]
    assert policy.of(EventType.REPAIR_FAILED)


def test_a_model_whose_memory_did_not_come_back_is_not_brought_back() -> None:
    policy = Policy(RULES)
    live(policy, renders(0, CHATTED), *(renders(at) for at in range(1, 12)))
    assert policy.of(EventType.FREE_UNCONFIRMED)
    assert policy.watch.made_room is None


def test_a_load_that_is_refused_is_not_tried_again() -> None:
    policy = gone()
    policy.look(done(40))
    policy.watch = refused(policy.watch, Refused(at=40.1, why="the time it was to be kept is over", tried=False))
    assert live(policy, *(done(at) for at in range(41, 200))) == []


def test_a_model_that_was_not_used_since_it_came_back_makes_room_for_good() -> None:
    def comes_back_twice(active_at: float) -> bool:
        policy = gone()
        first = replace(CHATTED, since=41.0, active_at=41.0)
        live(policy, done(40), done(41, first, free_gib=12))
        assert policy.of(EventType.WARMED_BACK)
        again = replace(first, active_at=active_at)
        live(policy, done(50, again, free_gib=12), renders(100, again), *(renders(at, free_gib=9) for at in (101, 102)))
        return live(policy, done(150, since=110)) == [LOAD]

    assert not comes_back_twice(41.0)
    assert comes_back_twice(45.0)


def test_nothing_comes_back_after_a_restart_of_ours() -> None:
    assert live(Policy(RULES, Watch()), done(40)) == []
