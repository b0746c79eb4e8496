"""4-6. Which of Ollama's idle models gives way, to whom, and which never does."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from tests.policy.worlds import (
    CALM,
    CARD,
    CHAT,
    GIB,
    SOFT,
    UNLOAD,
    Policy,
    comfyui,
    crowded,
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
from vram_manager.domain.action import UnloadModel
from vram_manager.domain.demand import Demand, Kind
from vram_manager.domain.event import EventType
from vram_manager.domain.reading import Missing, Off, Seen
from vram_manager.domain.snapshot import LoadedModel, Snapshot
from vram_manager.domain.watch import Watch
from vram_manager.policy import Rules

BYE = UnloadModel(model=CHAT)
BUSY = queue(1, since=0)
TURNS = replace(
    CALM,
    min_residency_seconds=10,
    chat_turn_seconds=10,
    image_turn_seconds=10,
    model_idle_seconds=2,
    unseen_idle_seconds=5,
    comfyui_idle_seconds=30,
)


def needs(size_gib: float, *, since: float = 0, **more: Any) -> Demand:
    """ComfyUI has begun and needs so much free on the card."""
    values: dict[str, Any] = {"kind": Kind.STARTING, "gpu": CARD, "for_comfyui": True, **more}
    return Demand(
        key="somebody",
        need_free_bytes=gib(size_gib),
        reason="ComfyUI has begun",
        since=since,
        last_seen_at=since,
        **values,
    )


def worker(size_gib: float, **more: Any) -> Demand:
    """Somebody who is not ComfyUI waits for so much."""
    return needs(size_gib, **{"kind": Kind.WAITING, "for_comfyui": False, **more})


def seen(at: float, *models: LoadedModel, ask: Demand | None = None, free_gib: float = 1, **more: Any) -> Snapshot:
    """A chat of 8 GiB, unless other models are given, and ComfyUI that has begun and needs 6 GiB: it has 1."""
    world = {"ollama": ollama(*(models or (model(),))), "queue": BUSY, **more}
    card = world.pop("card", gpu(free_gib=free_gib))
    return replace(snapshot(at, card, **world), asks=(ask or needs(6),))  # type: ignore[arg-type]


def kept(name: str, size_gib: float) -> LoadedModel:
    """Loaded with `keep_alive: -1`."""
    return replace(model(name, size_gib=size_gib), expires_at=datetime(2318, 12, 2, tzinfo=UTC))


# -- who gives way


@pytest.mark.parametrize(
    ("models", "need_gib", "goes"),
    [
        pytest.param((model("s", size_gib=4), model("m", size_gib=8), model("l", size_gib=12)), 7, "m", id="enough"),
        pytest.param(
            (model("s", size_gib=4), model("m", size_gib=6), model("l", size_gib=9)), 7, "m", id="just enough"
        ),
        pytest.param((model("s", size_gib=3), model("m", size_gib=4), model("l", size_gib=5)), 9, "l", id="none alone"),
        pytest.param((model("b", size_gib=8), model("a", size_gib=8)), 7, "a", id="equal"),
        pytest.param((kept("ever", 8), model("big", size_gib=12)), 7, "big", id="one kept for ever comes last"),
        pytest.param((kept("ever", 12), model("small", size_gib=4)), 16, "small", id="also where both must go"),
        pytest.param((kept("ever", 12), model("small", size_gib=4)), 7, "ever", id="alone where it alone is enough"),
        pytest.param((kept("b", 12), kept("a", 8)), 7, "a", id="all kept for ever"),
        pytest.param((model(size_gib=5.9),), 7, None, id="all of them would not be enough"),
        pytest.param((model("cpu", size_gib=9, gpu_gib=0),), 7, None, id="one that holds nothing on the GPU"),
        pytest.param((model("a", size_gib=3), model("p", size_gib=9)), 7, None, id="enough only with a pinned one"),
        pytest.param((model("p", size_gib=8), model("big", size_gib=12)), 7, "big", id="a pinned one is not counted"),
    ],
)
def test_the_smallest_model_that_is_enough_gives_way(
    models: tuple[LoadedModel, ...], need_gib: float, goes: str | None
) -> None:
    decision = Policy(replace(CALM, pinned=frozenset({"p:latest"}))).look(seen(0, *models, ask=needs(need_gib)))
    assert decision.action == (UnloadModel(model=goes) if goes else None)


def test_no_more_models_are_unloaded_than_are_needed() -> None:
    policy = Policy(CALM)
    models = {name: model(name, size_gib=size) for name, size in (("a", 3), ("b", 4), ("c", 5), ("d", 6))}
    free, gone = 1.0, []
    for at in range(200):
        if isinstance(bye := policy.acts(seen(at, *models.values(), ask=needs(11), free_gib=free)), UnloadModel):
            gone.append(bye.model)
            free += models.pop(bye.model).size_vram_bytes / GIB
    assert gone == ["d", "b"]


def test_an_unloaded_model_is_told_with_what_came_back_and_for_whom() -> None:
    policy = Policy(CALM)
    decision = policy.look(seen(0))
    assert (decision.branch, decision.action) == ("6 evict", BYE)
    assert decision.reason == f"ComfyUI has begun: ask Ollama to unload {CHAT}, which holds 8.0 GiB"
    policy.post()
    for at in (1, 2):
        policy.look(snapshot(at, gpu(free_gib=9), queue=BUSY))
    (event,) = policy.of(EventType.FREED)
    assert (event.target, event.freed_bytes, event.reason) == (BYE.target, 8 * GIB, "ComfyUI has begun")


# -- who does not


@pytest.mark.parametrize(
    ("world", "rules", "watch", "branch", "again"),
    [
        pytest.param({}, {"evict": False}, {}, "4 no eviction", None, id="switched off for models"),
        pytest.param({}, {"enabled": False}, {}, "5 off", None, id="monitoring only"),
        pytest.param({"ollama": Missing("slow")}, {}, {}, "4 unseen", None, id="Ollama unread"),
        pytest.param({"ollama": Off()}, {}, {}, "4 unseen", None, id="no Ollama"),
        pytest.param({"card": gpus(gpu(free_gib=1), second())}, {}, {}, "4 which GPU", None, id="on which GPU?"),
        pytest.param(
            {"card": gpus(gpu(free_gib=1), second())}, {"ollama_gpu": "7"}, {}, "4 which GPU", None, id="on none"
        ),
        pytest.param(
            {"card": gpus(gpu(free_gib=1), second())}, {"ollama_gpu": "1"}, {}, "4 other GPU", None, id="on the other"
        ),
        pytest.param(
            {"card": gpus(gpu(free_gib=Missing("?")), second())},
            {"ollama_gpu": "0"},
            {},
            "2 blind",
            None,
            id="its GPU cannot be read",
        ),
        pytest.param({}, {"pinned": frozenset({CHAT})}, {}, "4 pinned", None, id="pinned"),
        pytest.param({}, {}, {"posted_at": {BYE.target: -10.0}}, "5 cooldown", 20, id="just asked"),
        pytest.param({}, {"max_frees_per_hour": 2}, {"frees_at": (-600.0, -60.0)}, "5 budget", 3000, id="budget"),
        pytest.param(
            {"ask": worker(6)}, {"max_waited_frees_per_hour": 1}, {"frees_at": (-600.0, -60.0)}, "5 budget", 3540,
            id="budget of those who wait",
        ),
        pytest.param({}, {}, {"in_vain": {CHAT: -60.0}}, "4 stays", 240, id="asked in vain"),
        pytest.param({"ask": worker(6, model=CHAT)}, {}, {}, "4 nothing held", None, id="for itself"),
        pytest.param({"ask": worker(6, model=f"sha-{CHAT}")}, {}, {}, "4 nothing held", None, id="by its digest"),
    ],
)  # fmt: skip
def test_why_no_model_is_unloaded(
    world: dict[str, Any], rules: dict[str, Any], watch: dict[str, Any], branch: str, again: float | None
) -> None:
    decision = Policy(replace(CALM, **rules), Watch(**watch)).look(seen(0, **world))
    assert (decision.action, decision.branch) == (None, branch)
    assert decision.look_again_seconds == again


@pytest.mark.parametrize(
    ("change", "ask", "again"),
    [
        pytest.param({"requests": 1}, needs(6), None, id="it answers"),
        pytest.param({"active_at": 96.0}, needs(6), 1, id="used 4 s ago, as far as can be seen"),
        pytest.param({"requests": 0, "active_at": 98.5}, needs(6), 0.5, id="used 1.5 s ago through the gateway"),
        pytest.param({"active_at": 71.0}, worker(6, patient=True, since=50), 1, id="a patient one waits for quiet"),
        pytest.param({"active_at": 96.0}, worker(6, since=0), 1, id="unseen requests count for a pressing one too"),
        pytest.param({"requests": 2}, worker(6, since=0), None, id="no request is cut off for a pressing one"),
        pytest.param(
            {"requests": 0, "active_at": 99.5}, worker(6, since=95), 1.5, id="one that waits is not pressing at once"
        ),
        pytest.param({"requests": 0, "active_at": 99.5}, needs(6, since=0), 1.5, id="a beginning is never pressing"),
    ],
)
def test_a_model_in_use_stays(change: dict[str, Any], ask: Demand, again: float | None) -> None:
    decision = Policy(TURNS).look(seen(100, replace(model(), **change), ask=ask))
    assert (decision.action, decision.branch) == (None, "5 model in use")
    assert decision.look_again_seconds == again


@pytest.mark.parametrize(
    ("change", "ask", "goes"),
    [
        pytest.param({"since": 91.0}, needs(6), False, id="loaded 9 s ago"),
        pytest.param({"since": 90.0}, needs(6), True, id="loaded 10 s ago"),
        pytest.param({"since": 91.0}, worker(6, since=89), True, id="for one who has waited for 11 s"),
        pytest.param({"since": 91.0}, worker(6, since=91), False, id="not for one who has waited for 9 s"),
        pytest.param({"since": None}, needs(6), True, id="loaded before we looked"),
        pytest.param({"requests": 0, "active_at": 100.0}, worker(6, since=89), True, id="pressing: at its next pause"),
        pytest.param({"active_at": 95.0}, needs(6), True, id="5 s of quiet"),
        pytest.param({"requests": 0, "active_at": 98.0}, needs(6), True, id="2 s of quiet where requests are seen"),
    ],
)
def test_how_long_a_model_has_the_memory_to_itself(change: dict[str, Any], ask: Demand, goes: bool) -> None:
    decision = Policy(TURNS).look(seen(100, replace(model(), **change), ask=ask))
    assert (decision.action == BYE) is goes
    assert goes or decision.branch in ("5 residency", "5 model in use")


@pytest.mark.parametrize(
    ("turn", "ask"),
    [
        pytest.param({"image_turn_seconds": 60.0}, worker(6, since=50, for_comfyui=True), id="ComfyUI's turn"),
        pytest.param({"chat_turn_seconds": 60.0}, worker(6, since=50), id="everybody else's"),
    ],
)
def test_whoever_waits_is_let_in_after_a_turn(turn: dict[str, float], ask: Demand) -> None:
    young = replace(model(), since=95.0)
    assert Policy(TURNS).look(seen(100, young, ask=ask)).action == BYE
    assert Policy(replace(TURNS, **turn)).look(seen(100, young, ask=ask)).action is None  # type: ignore[arg-type]


def test_pressure_never_costs_a_model() -> None:
    policy = Policy(Rules(grace_seconds=5))
    for at in range(0, 300, 5):
        assert policy.acts(crowded(at, torch_gib=0)) is None
    assert policy.of(EventType.PRESSURE_BEGAN)


# -- asked in vain


def test_a_model_that_stays_is_not_asked_again_for_five_minutes() -> None:
    policy = Policy(CALM)
    asked = [at for at in range(700) if policy.acts(seen(at)) is not None]
    assert asked == [0, 310, 620]
    first = policy.of(EventType.FREE_UNCONFIRMED)[0]
    assert first.reason.endswith(f"{CHAT} is still listed: it leaves after its last request")


def test_a_model_that_stayed_is_asked_again_once_it_has_been_used_anew() -> None:
    policy = Policy(CALM)
    stays = replace(model(), active_at=-50.0)
    asked = []
    for at in range(100):
        now = stays if at < 40 else replace(stays, active_at=40.0)
        if policy.acts(seen(at, now)) is not None:
            asked.append(at)
    assert asked == [0, 45]


def test_a_model_that_left_leaves_no_grudge() -> None:
    policy = Policy(CALM)
    policy.acts(seen(0))
    for at in (1, 2):
        policy.acts(seen(at, free_gib=9, ollama=ollama()))
    assert policy.watch.in_vain == {}


# -- ComfyUI and the models together


def both(at: float, *, ask: Demand, free_gib: float = 1, torch_gib: float = 8, **more: Any) -> Snapshot:
    """An idle ComfyUI with 8 GiB, and a chat of 8 GiB."""
    world = {"queue": queue(), "comfyui": comfyui(torch_gib=torch_gib), **more}
    return seen(at, ask=ask, free_gib=free_gib, **world)


@pytest.mark.parametrize(
    ("ask", "world", "watch", "action"),
    [
        pytest.param(worker(6), {}, {}, SOFT, id="ComfyUI is asked first"),
        pytest.param(worker(16), {}, {}, SOFT, id="where both are needed, too"),
        pytest.param(worker(18), {}, {}, None, id="nobody, where both are not enough"),
        pytest.param(worker(6), {"queue": BUSY}, {}, BYE, id="ComfyUI is busy"),
        pytest.param(worker(16), {"queue": BUSY}, {}, None, id="no half measures beside a busy ComfyUI"),
        pytest.param(worker(6), {"queue": queue(since=-0.1)}, {}, None, id="two seconds are worth waiting for"),
        pytest.param(worker(6), {}, {"posted_at": {"comfyui": -10.0}}, BYE, id="ComfyUI was asked not long ago"),
        pytest.param(worker(6), {"torch_gib": 0}, {}, BYE, id="ComfyUI holds nothing"),
        pytest.param(worker(6), {"comfyui": Missing("?")}, {}, BYE, id="ComfyUI cannot be read"),
        pytest.param(worker(6), {"comfyui": Off()}, {}, BYE, id="there is no ComfyUI"),
        pytest.param(needs(6), {}, {}, BYE, id="ComfyUI makes room in itself by itself"),
        pytest.param(worker(16, kind=Kind.STARTING), {}, {}, SOFT, id="a worker at its hard limit"),
    ],
)
def test_who_is_asked_first(ask: Demand, world: dict[str, Any], watch: dict[str, Any], action: Any) -> None:
    assert Policy(CALM, Watch(**watch)).look(both(0, ask=ask, **world)).action == action


def test_what_only_both_can_give_is_had_from_one_after_the_other() -> None:
    policy = Policy(CALM)
    ask = worker(16)
    assert policy.acts(both(0, ask=ask)) == SOFT
    looks = [policy.acts(both(at, ask=ask, free_gib=9, torch_gib=0)) for at in (1, 2)]
    assert looks == [None, BYE]
    for at in (3, 4):
        policy.acts(both(at, ask=ask, free_gib=17, torch_gib=0, ollama=ollama()))
    assert [event.target for event in policy.of(EventType.FREED)] == ["comfyui", BYE.target]
    assert policy.watch.demands == {}


def test_the_unload_stage_is_worth_it_where_a_model_gives_the_rest() -> None:
    policy = Policy(CALM)
    assert policy.acts(both(0, ask=worker(17))) == SOFT
    looks = [policy.acts(both(at, ask=worker(17), free_gib=6, torch_gib=3)) for at in (1, 5)]
    assert looks == [None, UNLOAD]


def test_what_models_hold_on_another_gpu_does_not_add_up() -> None:
    rules = replace(CALM, comfyui_gpu="0", ollama_gpu="1")
    two = gpus(gpu(free_gib=1), second(free_gib=1))
    assert Policy(rules).look(both(0, ask=worker(16, gpu=None), card=two)).action is None
    assert Policy(rules).look(both(0, ask=worker(9, gpu=None), card=two)).action == SOFT
    alone = both(0, ask=worker(9, gpu=None), card=two, torch_gib=0)
    policy = Policy(rules)
    assert policy.look(alone).action == BYE
    assert policy.watch.pending is not None
    assert policy.watch.pending.gpu == "GPU-b"


def test_what_is_promised_to_others_is_not_had_twice() -> None:
    asked = seen(0, free_gib=5)
    assert Policy(CALM).look(asked).action == BYE
    assert Policy(CALM).look(replace(asked, leased_bytes={CARD: gib(8)})).branch == "4 would not fit"


def test_what_is_promised_to_others_is_not_freed_for_in_vain() -> None:
    seen = both(0, ask=worker(6))
    assert Policy(CALM).look(replace(seen, leased_bytes={CARD: gib(3)})).action == SOFT
    assert Policy(CALM).look(replace(seen, leased_bytes={CARD: gib(12)})).action is None


def test_a_model_without_memory_on_the_gpu_is_not_named_as_the_one_that_stays() -> None:
    decision = Policy(CALM).look(seen(0, replace(model(gpu_gib=0), requests=1), ask=worker(6)))
    assert decision.branch == "4 nothing held"


def test_the_reason_says_who_stays_where_comfyui_has_nothing_to_give() -> None:
    decision = Policy(CALM).look(both(0, ask=worker(6), torch_gib=0, ollama=ollama(replace(model(), requests=1))))
    assert decision.reason == f"ComfyUI has begun: holding, {CHAT} is answering 1 request(s)"


def test_of_several_that_stay_the_one_that_may_go_soonest_is_named() -> None:
    models = (replace(model("b"), requests=1), replace(model("a"), active_at=98.0), replace(model("c"), active_at=96.0))
    decision = Policy(TURNS).look(seen(100, *models))
    assert decision.reason.endswith("c was used 4.0 s ago, 5 s of quiet count as idle")


# -- for a model that fell to the CPU


def beside(at: float, *, split: LoadedModel | None = None, **more: Any) -> Snapshot:
    """A model of 8 GiB is a quarter on the CPU beside another that is idle, and ComfyUI holds nothing."""
    fell = split or model(gpu_gib=6)
    world = {"torch_gib": 0.0, **more}
    return replace(fallen(at, chat=fell, **world), ollama=Seen(ollama(fell, model("idle", size_gib=5)), at))


def test_an_idle_model_gives_way_to_one_that_fell_to_the_cpu() -> None:
    assert Policy(CALM).look(beside(0)).action == UnloadModel(model="idle")


@pytest.mark.parametrize(
    ("world", "rules", "watch"),
    [
        pytest.param({}, {"repair": False}, {}, id="models are not repaired"),
        pytest.param({"split": replace(model(gpu_gib=6), requests=1)}, {}, {}, id="it answers"),
        pytest.param({"queue": BUSY}, {}, {}, id="ComfyUI would take the room"),
        pytest.param({}, {}, {"repairs_at": {f"sha-{CHAT}": (-3000.0, -2000.0, -1000.0)}}, id="repaired often"),
    ],
)
def test_no_model_gives_way_for_room_that_would_not_be_used_at_once(
    world: dict[str, Any], rules: dict[str, Any], watch: dict[str, Any]
) -> None:
    decision = Policy(replace(CALM, **rules), Watch(**watch)).look(beside(0, **world))
    assert (decision.action, decision.branch[:1]) == (None, "4")


# -- only said


def test_a_dry_run_says_once_what_would_be_unloaded() -> None:
    policy = Policy(replace(CALM, dry_run=True))
    for at in range(60):
        assert policy.acts(seen(at)) is None
    (event,) = policy.of(EventType.DRY_RUN)
    assert (event.target, event.stage) == (BYE.target, None)
    assert event.reason == f"unloading {CHAT}, which holds 8.0 GiB (ComfyUI has begun)"
