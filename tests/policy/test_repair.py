"""7. A model that fell to the CPU is taken off, loaded as it was, and looked at: seldom, and never in a loop."""

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
from vram_manager.domain.action import Action, LoadModel, UnloadModel
from vram_manager.domain.decision import ManualFree
from vram_manager.domain.demand import Demand, Kind
from vram_manager.domain.event import EventType
from vram_manager.domain.reading import Missing, Off, Seen
from vram_manager.domain.snapshot import LoadedModel, Snapshot
from vram_manager.domain.watch import Asked, Mending, Refused, Watch
from vram_manager.policy import Rules, asked, decide_manual, refused
from vram_manager.policy.repair import foreseen, reserved

RULES = replace(
    CALM,
    max_repairs_per_hour=3,
    repair_backoff_seconds=60,
    cooldown_seconds=30,
    unseen_idle_seconds=5,
    model_idle_seconds=2,
)
BYE = UnloadModel(model=CHAT)
LOAD = LoadModel(model=CHAT, context=4096, expires_at=None)
SPLIT = model(gpu_gib=6)
KEY = f"fallback:sha-{CHAT}:{6 * GIB}"
BUSY = queue(1, since=0)


def fell(at: float, chat: LoadedModel = SPLIT, *, free_gib: float = 10, **more: Any) -> Snapshot:
    """A chat of 8 GiB is a quarter on the CPU, and there is room for all of it beside an idle ComfyUI."""
    return fallen(at, free_gib=free_gib, torch_gib=0, chat=chat, **more)


def away(at: float, *, free_gib: float = 16, **more: Any) -> Snapshot:
    return snapshot(at, gpu(free_gib=free_gib), **more)


def back(at: float, chat: LoadedModel | None = None, *, free_gib: float = 8, **more: Any) -> Snapshot:
    return snapshot(at, gpu(free_gib=free_gib), ollama=ollama(chat or replace(model(), since=at)), **more)


def asks(**more: Any) -> Demand:
    values: dict[str, Any] = {"kind": Kind.WAITING, "need_free_bytes": gib(1), **more}
    return Demand(key="k", gpu=CARD, reason="somebody waits", since=0, last_seen_at=0, **values)


def live(policy: Policy, *looks: Snapshot) -> list[Action | None]:
    """What is asked at each look, with the room kept for a model that is away."""
    actions = []
    for look in looks:
        kept = reserved(policy.watch, policy.rules)
        actions.append(policy.acts(replace(look, leased_bytes={**look.leased_bytes, **kept}, reserved_bytes=kept)))
    return actions


def taken_off(rules: Rules = RULES, chat: LoadedModel = SPLIT) -> Policy:
    """The model was taken off at second 0, and is gone since second 1: it may be loaded from second 2 on."""
    policy = Policy(rules)
    assert live(policy, fell(0, chat), away(1, ollama=ollama() if chat.size_vram_bytes else Missing("slow"))) == [
        BYE,
        None,
    ]
    return policy


# -- as it should be


def test_a_model_on_the_cpu_with_room_is_taken_off_loaded_and_told() -> None:
    policy = taken_off()
    assert live(policy, away(2), back(3), back(4)) == [LOAD, None, None]
    (event,) = policy.of(EventType.REPAIRED)
    assert event.reason == f"{CHAT} was 25 % on CPU, now 100 % GPU (8.0 GiB)"
    assert (event.target, event.gpu, event.took_seconds, event.models) == (BYE.target, CARD, 3, (CHAT,))
    assert policy.watch.mending is None
    assert policy.watch.frees_at == (0,)
    assert [event.type for event in policy.told] == [
        EventType.CPU_FALLBACK,
        EventType.FREED,
        EventType.MODEL_DETECTED,
        EventType.REPAIRED,
    ]


def test_room_is_made_first_where_there_is_none() -> None:
    policy = Policy(RULES)
    looks = (fallen(0), fell(1, free_gib=17), fell(2, free_gib=17), away(3, free_gib=23), away(4, free_gib=23))
    assert live(policy, *looks) == [SOFT, None, BYE, None, LOAD]


@pytest.mark.parametrize(
    ("context", "asked_for"),
    [
        pytest.param(4096, 4096, id="another than the server's own"),
        pytest.param(32768, None, id="the server's own on 24 GiB"),
        pytest.param(0, None, id="an engine without one"),
        pytest.param(None, None, id="not told"),
    ],
)
def test_it_is_loaded_with_the_context_and_the_expiry_it_had(context: int | None, asked_for: int | None) -> None:
    until = datetime(2026, 7, 1, tzinfo=UTC)
    chat = replace(SPLIT, context_length=context, expires_at=until)
    (load,) = live(taken_off(chat=chat), away(2))
    assert load == LoadModel(model=CHAT, context=asked_for, expires_at=until)


@pytest.mark.parametrize(
    ("chat", "just_gib"),
    [
        pytest.param(SPLIT, 9.0, id="its context came back with the part that was on the GPU"),
        pytest.param(model(gpu_gib=0), 9.5, id="it had none on the GPU"),
    ],
)
def test_it_is_loaded_where_all_of_it_fits(chat: LoadedModel, just_gib: float) -> None:
    def loaded(free_gib: float) -> bool:
        policy = Policy(RULES)
        return LOAD in live(policy, fell(0, chat), away(1, free_gib=free_gib), away(12, free_gib=free_gib))

    assert loaded(just_gib)
    assert not loaded(just_gib - 0.01)


# -- when not


@pytest.mark.parametrize(
    ("world", "rules", "watch", "branch", "again"),
    [
        pytest.param({}, {"repair": False}, {}, "3 nobody", None, id="not wanted"),
        pytest.param({}, {"enabled": False}, {}, "5 off", None, id="monitoring only"),
        pytest.param({"queue": queue(1, since=90)}, {}, {}, "7 busy", None, id="ComfyUI is working"),
        pytest.param({"queue": queue(since=93)}, {}, {}, "5 idle", 3, id="ComfyUI has just finished"),
        pytest.param({"queue": Missing("?")}, {}, {}, "7 unseen", None, id="nobody knows what ComfyUI does"),
        pytest.param({"chat": replace(SPLIT, requests=1)}, {}, {}, "5 model in use", None, id="it answers"),
        pytest.param({"chat": replace(SPLIT, active_at=96.0)}, {}, {}, "5 model in use", 1, id="it was just used"),
        pytest.param(
            {"chat": replace(SPLIT, requests=0, active_at=96.0)}, {}, {}, "5 model in use", 1, id="at the gateway"
        ),
        pytest.param(
            {"chat": replace(SPLIT, active_at=92.0)}, {"model_idle_seconds": 10}, {}, "5 model in use", 2, id="setting"
        ),
        pytest.param({}, {}, {"posted_at": {BYE.target: 80.0}}, "5 cooldown", 10, id="it was just asked"),
        pytest.param({}, {"max_frees_per_hour": 1}, {"frees_at": (50.0,)}, "5 budget", 3550, id="budget"),
        pytest.param({}, {}, {"repairs_at": {f"sha-{CHAT}": (60.0,)}}, "7 backing off", 20, id="repaired 40 s ago"),
        pytest.param(
            {}, {}, {"repairs_at": {f"sha-{CHAT}": (-500.0, 0.0)}}, "7 backing off", 20, id="twice, 100 s ago"
        ),
        pytest.param(
            {}, {}, {"repairs_at": {f"sha-{CHAT}": (-900.0, -600.0, -300.0)}}, "7 given up", 2600, id="three times"
        ),
        pytest.param(
            {},
            {},
            {"meant": frozenset({KEY}), "fallbacks": {KEY: 0.0}},
            "7 meant",
            None,
            id="it is meant to be there",
        ),
    ],
)  # fmt: skip
def test_why_a_model_stays_on_the_cpu(
    world: dict[str, Any], rules: dict[str, Any], watch: dict[str, Any], branch: str, again: float | None
) -> None:
    decision = Policy(replace(RULES, **rules), Watch(**watch)).look(fell(100, **world))
    assert (decision.action, decision.branch) == (None, branch)
    assert decision.look_again_seconds == again


@pytest.mark.parametrize(
    ("world", "watch"),
    [
        pytest.param({"queue": Off()}, {}, id="there is no ComfyUI"),
        pytest.param({"queue": queue(since=90)}, {}, id="ComfyUI has finished ten seconds ago"),
        pytest.param(
            {"queue": queue(since=99), "chat": replace(SPLIT, requests=0, held=1, active_at=99.0)}, {}, id="held for it"
        ),
        pytest.param({"chat": replace(SPLIT, active_at=95.0)}, {}, id="five seconds of quiet"),
        pytest.param({}, {"repairs_at": {f"sha-{CHAT}": (40.0,)}}, id="a minute after a repair"),
        pytest.param({}, {"repairs_at": {f"sha-{CHAT}": (-100.0, -20.0)}}, id="two minutes after the second"),
        pytest.param({}, {"repairs_at": {f"sha-{CHAT}": (-3500.0, -3400.0, -3300.0)}}, id="two within the hour"),
        pytest.param({}, {"repairs_at": {"sha-other": (99.0,)}}, id="another was repaired just now"),
        pytest.param({}, {"posted_at": {BYE.target: 70.0}}, id="cooled down"),
    ],
)
def test_when_a_model_is_taken_off(world: dict[str, Any], watch: dict[str, Any]) -> None:
    assert Policy(RULES, Watch(**watch)).look(fell(100, **world)).action == BYE


@pytest.mark.parametrize(
    ("percent", "requests", "repaired"),
    [(25, None, False), (24, None, True), (100, 0, True), (Missing("not told"), None, True)],
)
def test_without_a_gateway_a_gpu_at_work_is_a_model_in_use(
    percent: int | Missing, requests: int | None, repaired: bool
) -> None:
    seen = fell(100, replace(SPLIT, requests=requests))
    decision = Policy(RULES).look(replace(seen, gpus=Seen(gpus(gpu(free_gib=10, utilization=percent)), 100)))
    assert (decision.action == BYE, decision.branch == "7 GPU at work") == (repaired, not repaired)


def test_nothing_is_repaired_while_somebody_waits() -> None:
    decision = Policy(RULES).look(replace(fell(0), asks=(asks(),)))
    assert (decision.action, decision.branch) == (None, "7 others wait")


@pytest.mark.parametrize(
    ("rules", "branch"), [({}, "7 which GPU"), ({"ollama_gpu": "9"}, "4 which GPU"), ({"ollama_gpu": "0"}, "7 repair")]
)
def test_on_several_gpus_a_model_is_repaired_where_its_gpu_is_known(rules: dict[str, Any], branch: str) -> None:
    seen = snapshot(0, gpus(gpu(free_gib=10), second(free_gib=10)), ollama=ollama(SPLIT))
    decision = Policy(replace(RULES, **rules)).look(seen)
    assert decision.branch == branch
    assert (decision.action == BYE) is (branch == "7 repair")


def test_without_nvml_nothing_is_repaired() -> None:
    seen = snapshot(0, Missing("lost"), ollama=ollama(SPLIT), comfyui=comfyui(free_gib=20))
    decision = Policy(RULES).look(seen)
    assert (decision.action, decision.branch) == (None, "7 blind")


def test_of_two_models_on_the_cpu_the_older_is_repaired_first_and_never_both_at_once() -> None:
    policy = Policy(RULES)
    old, new = model("z-old", gpu_gib=6), model("a-new", gpu_gib=6)
    policy.look(snapshot(0, gpu(free_gib=6), ollama=ollama(replace(old, requests=1))))

    def seen(at: float, *models: LoadedModel, free_gib: float) -> Snapshot:
        return snapshot(at, gpu(free_gib=free_gib), ollama=ollama(*models))

    whole = replace(model("z-old"), since=9)
    looks = live(
        policy,
        seen(5, old, new, free_gib=5),
        seen(6, new, free_gib=11),
        seen(7, new, free_gib=11),
        seen(8, new, free_gib=11),
        seen(9, new, whole, free_gib=3),
        seen(10, whole, free_gib=9),
        seen(11, whole, free_gib=9),
    )
    names = [(type(action), action.model) for action in looks if isinstance(action, LoadModel | UnloadModel)]
    assert names == [(UnloadModel, "z-old"), (LoadModel, "z-old"), (UnloadModel, "a-new"), (LoadModel, "a-new")]


# -- meant to be there


def watched(free_gib: float = 20, *, until: float = 70, **more: Any) -> Policy:
    """An empty Ollama beside so much free memory, watched for a minute and ten seconds."""
    policy = Policy(RULES)
    for at in range(0, int(until), 2):
        policy.look(snapshot(at, gpu(free_gib=more.get(str(at), free_gib))))
    return policy


ON_CPU = model(gpu_gib=0)


@pytest.mark.parametrize(
    ("policy", "repaired"),
    [
        pytest.param(watched(), False, id="it had room all the time"),
        pytest.param(watched(9.5), False, id="just room"),
        pytest.param(watched(9.4), True, id="it had not"),
        pytest.param(watched(**{"30": 9.0}), True, id="not at one moment"),
        pytest.param(watched(**{"2": 9.0}), False, id="that was long ago"),
        pytest.param(watched(until=30), True, id="nobody knows for so long"),
        pytest.param(Policy(RULES), True, id="it was there before us"),
    ],
)
def test_a_model_that_had_room_when_it_was_loaded_is_left_alone(policy: Policy, repaired: bool) -> None:
    now = policy.last.taken_at + 1 if policy.last else 0
    policy = Policy(RULES, policy.watch)
    policy.look(fell(now, ON_CPU, free_gib=20))
    acts = [policy.look(fell(now + at, ON_CPU, free_gib=20)).action for at in range(1, 300, 10)]
    assert any(acts) is repaired or policy.watch.mending is not None
    assert (policy.watch.mending is not None) is repaired


def test_a_reading_from_before_the_load_says_nothing_of_the_room_beside_it() -> None:
    policy = Policy(RULES, watched(9).watch)
    stale = replace(fell(70), gpus=Seen(gpus(gpu(free_gib=9)), 69.0))
    policy.look(stale)
    assert policy.watch.meant == frozenset()
    sure = Policy(RULES, watched(20).watch)
    sure.look(replace(fell(70), gpus=Seen(gpus(gpu(free_gib=20)), 69.0)))
    assert sure.watch.meant


def test_a_model_of_which_a_part_was_meant_for_the_gpu_had_room_if_the_rest_would_fit_beside_it() -> None:
    half = model(size_gib=16, gpu_gib=8)
    for left_gib, meant in ((9.0, True), (8.9, False)):
        policy = Policy(RULES, watched(20).watch)
        policy.look(fell(70, half, free_gib=left_gib))
        assert bool(policy.watch.meant) is meant


def test_a_gpu_that_could_not_be_read_for_a_moment_leaves_it_open_whether_there_was_room() -> None:
    policy = Policy(RULES, watched().watch)
    policy.look(snapshot(70, Missing("blinks"), comfyui=Off()))
    policy.look(fell(71, ON_CPU, free_gib=20))
    assert policy.watch.meant == frozenset()


def test_a_model_meant_for_the_cpu_is_looked_at_anew_when_it_is_loaded_again() -> None:
    policy = Policy(RULES, watched().watch)
    policy.look(fell(70, ON_CPU, free_gib=20))
    assert policy.watch.meant
    policy.look(away(80, free_gib=3))
    assert policy.watch.meant == frozenset()


@pytest.mark.parametrize(
    ("chat", "words"),
    [
        pytest.param(SPLIT, "25 % CPU with 10.0 GiB to spare: as it was meant; it is left alone", id="part"),
        pytest.param(
            ON_CPU, "100 % CPU with 10.0 GiB to spare: has Ollama lost the GPU? Restart it; it is left alone", id="all"
        ),
    ],
)  # fmt: skip
def test_one_that_we_loaded_and_that_does_not_use_its_room_is_left_alone(chat: LoadedModel, words: str) -> None:
    policy = taken_off(chat=chat)
    assert live(policy, away(2)) == [LOAD]
    live(policy, back(3, chat, free_gib=10))
    (event,) = policy.of(EventType.REPAIR_FAILED)
    assert event.reason.endswith(words)
    assert live(policy, *(fell(at, chat) for at in range(10, 4000, 30))) == [None] * 133


def test_one_that_came_back_without_room_is_tried_again_later_and_then_no_more() -> None:
    policy = Policy(RULES)
    moments = []
    for at in range(1000):
        pending = policy.watch.pending
        gone = policy.watch.mending is not None and not isinstance(pending and pending.action, LoadModel)
        look = (
            away(at) if gone and at - (policy.watch.mending.began_at if policy.watch.mending else 0) > 0 else fell(at)
        )
        if isinstance(pending and pending.action, LoadModel):
            look = back(at, SPLIT, free_gib=1)
        if live(policy, look) == [BYE]:
            moments.append(at)
    assert len(moments) == 3
    assert moments[1] - moments[0] >= 60
    assert moments[2] - moments[1] >= 120
    assert len(policy.of(EventType.REPAIR_FAILED)) == 3
    assert policy.watch.meant == frozenset()


def test_room_is_not_judged_by_a_reading_from_before_the_load() -> None:
    policy = taken_off()
    live(policy, away(2))
    stale = replace(back(3, SPLIT), gpus=Seen(gpus(gpu(free_gib=16)), 2.0))
    assert live(policy, stale) == [None]
    assert policy.watch.pending is not None
    live(policy, back(4, SPLIT, free_gib=1))
    (event,) = policy.of(EventType.REPAIR_FAILED)
    assert event.reason == f"{CHAT} was 25 % on CPU, and came back 25 % CPU"


def test_nothing_is_concluded_from_a_gpu_that_has_not_been_read_since_the_load() -> None:
    policy = taken_off()
    live(policy, away(2))
    for at in range(3, 13):
        live(policy, replace(back(at, SPLIT), gpus=Seen(gpus(gpu(free_gib=16)), 2.0)))
    assert policy.of(EventType.REPAIR_FAILED)
    assert policy.watch.meant == frozenset()


def test_a_load_of_a_model_that_is_there_by_another_name_is_a_success() -> None:
    policy = taken_off()
    assert live(policy, away(2)) == [LOAD]
    live(policy, back(3, model("alias", digest=SPLIT.digest)))
    assert policy.of(EventType.REPAIRED)


def test_sizes_that_contradict_each_other_are_no_success() -> None:
    policy = taken_off()
    live(policy, away(2), back(3, model(size_gib=4, gpu_gib=5)))
    (event,) = policy.of(EventType.REPAIR_FAILED)
    assert event.reason.endswith("and came back placement unknown")


# -- while it is away


WAITS = [
    pytest.param({"queue": queue(1, since=1)}, "ComfyUI has begun to work", id="ComfyUI works"),
    pytest.param({"free_gib": 7}, "2.0 GiB are missing", id="somebody took the room"),
    pytest.param({"ollama": Missing("restarts")}, "Ollama cannot be read", id="Ollama is not there"),
    pytest.param({"ollama": Off()}, "Ollama cannot be read", id="Ollama is off"),
    pytest.param({"gpus": Missing("lost"), "comfyui": Off()}, "the GPU cannot be read", id="no GPU reading"),
    pytest.param({"gpus": Missing("lost")}, "the GPU cannot be read", id="second-hand"),
    pytest.param({"gpus": gpus(second(), gpu(free_gib=Missing("?")))}, "9.0 GiB are missing", id="its GPU is unread"),
    pytest.param({"gpus": gpus(second())}, "9.0 GiB are missing", id="its GPU has left the bus"),
]


def without(at: float, world: dict[str, Any]) -> Snapshot:
    gpus = world.get("gpus")
    seen = away(at, **{key: value for key, value in world.items() if key != "gpus"})
    return seen if gpus is None else replace(seen, gpus=gpus if isinstance(gpus, Missing) else Seen(gpus, at))


@pytest.mark.parametrize(("world", "why"), WAITS)
def test_it_is_loaded_as_soon_as_it_may_be(world: dict[str, Any], why: str) -> None:
    policy = taken_off()
    live(policy, *(without(at, world) for at in range(2, 13)))
    decision = policy.look(without(20, world))
    assert decision.branch == "7 waiting to load"
    assert decision.reason == f"{CHAT} was 25 % on CPU: to be loaded again, holding, {why}"
    assert decision.look_again_seconds == 1
    assert live(policy, away(59)) == [LOAD]


@pytest.mark.parametrize(("world", "why"), WAITS)
def test_after_a_minute_it_is_left_to_its_next_request(world: dict[str, Any], why: str) -> None:
    policy = taken_off()
    live(policy, *(without(at, world) for at in range(2, 60)))
    assert policy.watch.mending is not None
    live(policy, without(60, world))
    assert policy.watch.mending is None
    (event,) = policy.of(EventType.REPAIR_FAILED)
    assert event.reason == f"{CHAT} was 25 % on CPU; {why}: its next request loads it"
    assert live(policy, *(away(at) for at in range(61, 300))) == [None] * 239


@pytest.mark.parametrize(
    ("chat", "told", "words"),
    [
        pytest.param(model(), EventType.REPAIRED, "100 % GPU (8.0 GiB)", id="on the GPU"),
        pytest.param(
            model("alias", digest=f"sha-{CHAT}"), EventType.REPAIRED, "alias is 100 % GPU", id="by another name"
        ),
        pytest.param(model(CHAT.upper(), digest="new"), EventType.REPAIRED, "100 % GPU", id="pulled anew"),
        pytest.param(model(gpu_gib=2), EventType.REPAIR_FAILED, "and came back 75 % CPU", id="on the CPU"),
    ],
)
def test_where_somebody_else_loads_it_meanwhile_that_is_the_outcome(
    chat: LoadedModel, told: EventType, words: str
) -> None:
    policy = taken_off()
    assert live(policy, away(2, queue=BUSY), back(3, replace(chat, since=3), queue=BUSY)) == [None, None]
    (event,) = policy.of(told)
    assert words in event.reason
    assert "left alone" not in event.reason
    assert policy.watch.mending is None


@pytest.mark.parametrize("wanted", [CHAT, f"sha-{CHAT}"])
def test_where_somebody_asks_for_it_meanwhile_it_is_left_to_them(wanted: str) -> None:
    policy = taken_off()
    live(policy, replace(away(2), asks=(asks(model=wanted),)))
    assert policy.watch.mending is None
    assert policy.of(EventType.REPAIR_FAILED) == []


def test_others_are_served_while_it_waits_for_room() -> None:
    policy = taken_off()
    other = model("idle", size_gib=4)
    begun = asks(kind=Kind.STARTING, for_comfyui=True, need_free_bytes=gib(5))
    seen = replace(away(2, free_gib=10, queue=BUSY, ollama=ollama(other)), asks=(begun,))
    assert live(policy, seen) == [UnloadModel(model="idle")]
    gone = {"free_gib": 14, "queue": queue()}
    assert live(policy, away(3, **gone), away(4, **gone)) == [None, LOAD]
    assert policy.watch.mending is not None


def test_the_room_of_a_model_that_is_away_is_kept_from_others_and_only_until_it_is_back() -> None:
    policy = taken_off()
    assert reserved(policy.watch, RULES) == {CARD: gib(8.5)}
    other = model("other", gpu_gib=2)
    assert live(policy, away(2)) == [LOAD]
    full = comfyui(torch_gib=6)
    # 9 GiB are free now, the other needs 7: with 8.5 GiB kept ComfyUI would be asked.
    last = replace(back(3, free_gib=9, comfyui=full), ollama=Seen(ollama(replace(model(), since=3), other), 3))
    assert live(policy, last) == [UnloadModel(model="other")]
    assert reserved(Watch(), RULES) == {}


@pytest.mark.parametrize(
    ("others", "made_room"),
    [
        pytest.param((model("other", gpu_gib=7.5),), None, id="another on the CPU"),
        pytest.param((), model("gone", size_gib=1), id="another that made room"),
    ],
)
def test_while_one_model_is_away_no_other_is_taken_off_or_brought_back(
    others: tuple[LoadedModel, ...], made_room: LoadedModel | None
) -> None:
    policy = Policy(replace(RULES, warm_back=True), Watch(made_room=made_room))
    old = Seen(ollama(SPLIT, *others), -1.0)
    assert live(policy, replace(fell(0, free_gib=14), ollama=Seen(ollama(SPLIT), 0))) == [BYE]
    assert live(policy, *(replace(away(at, free_gib=20), ollama=old) for at in range(1, 50))) == [None] * 49
    assert policy.watch.mending is not None


# -- what goes wrong


def test_a_model_that_does_not_leave_stays_where_it_is() -> None:
    policy = Policy(RULES)
    bye = [at for at in range(3000) if live(policy, fell(at)) == [BYE]]
    assert bye == [0, 70, 200]
    assert policy.of(EventType.REPAIR_FAILED) == []
    assert len(policy.of(EventType.FREE_UNCONFIRMED)) == 3


def test_an_ollama_that_cannot_be_read_while_the_model_leaves_is_waited_for() -> None:
    policy = Policy(RULES)
    live(policy, fell(0), *(away(at, ollama=Missing("slow")) for at in range(1, 30)))
    assert policy.watch.mending is not None
    assert live(policy, away(30)) == [LOAD]


def test_a_list_from_before_the_unload_is_not_taken_for_the_model_being_back() -> None:
    policy = Policy(RULES)
    old = Seen(ollama(SPLIT), -1.0)
    live(policy, fell(0), *(replace(away(at), ollama=old) for at in range(1, 30)))
    assert policy.look(replace(away(30), ollama=old)).reason.endswith("Ollama has not been read since it was asked")
    assert live(policy, away(31)) == [LOAD]


def test_a_model_that_has_not_left_at_all_is_not_taken_for_one_that_came_back() -> None:
    policy = Policy(RULES)
    live(policy, fell(0), *(away(at, ollama=Missing("slow")) for at in range(1, 30)), fell(30))
    (event,) = policy.of(EventType.REPAIR_FAILED)
    assert event.reason == f"{CHAT} was 25 % on CPU; it has not left: a request may still run"
    assert policy.watch.meant == frozenset()


@pytest.mark.parametrize("tried", [True, False])
def test_a_refused_unload_ends_the_mending_and_is_not_tried_again_at_once(tried: bool) -> None:
    policy = Policy(RULES)
    policy.look(fell(0))
    policy.watch = refused(policy.watch, Refused(at=0.1, why="HTTP 500", tried=tried))
    assert policy.watch.mending is None
    again = next(at for at in range(1, 200) if live(policy, fell(at)) == [BYE])
    assert again == (61 if tried else 31)


def test_a_refused_load_leaves_the_model_to_its_next_request() -> None:
    policy = taken_off()
    policy.look(away(2))
    policy.watch = refused(policy.watch, Refused(at=2.1, why="HTTP 404: model not found", tried=True))
    assert (policy.watch.mending, policy.watch.pending) == (None, None)
    assert len(policy.watch.repairs_at[SPLIT.digest]) == 1
    assert live(policy, *(away(at) for at in range(3, 100))) == [None] * 97


def test_a_refused_free_for_somebody_else_leaves_the_mending_alone() -> None:
    policy = taken_off()
    policy.look(replace(away(2, queue=BUSY), asks=(asks(),)))
    other = UnloadModel(model="other")
    assert policy.watch.mending is not None
    pending = replace(taken_off().watch, pending=None)
    policy = Policy(RULES, pending)
    busy = away(2, queue=BUSY, ollama=ollama(model("other", size_gib=4)), free_gib=10)
    need = asks(kind=Kind.STARTING, for_comfyui=True, need_free_bytes=gib(5))
    kept = reserved(policy.watch, RULES)
    assert policy.look(replace(busy, asks=(need,), leased_bytes=kept, reserved_bytes=kept)).action == other
    policy.watch = refused(policy.watch, Refused(at=2.1, why="gone", tried=False))
    assert policy.watch.mending is not None


@pytest.mark.parametrize(
    ("look", "why"),
    [
        pytest.param(away, "loaded, and not listed any more", id="not listed"),
        pytest.param(lambda at: away(at, ollama=Missing("?")), "Ollama could not be read since", id="unread"),
        pytest.param(
            lambda at: replace(away(at), ollama=Seen(ollama(), 1.5)),
            "loaded, and Ollama could not be read since",
            id="not read since",
        ),
    ],
)  # fmt: skip
def test_a_load_that_leaves_no_trace_is_told_as_failed(look: Any, why: str) -> None:
    policy = taken_off()
    live(policy, away(2), *(look(at) for at in range(3, 13)))
    (event,) = policy.of(EventType.REPAIR_FAILED)
    assert event.reason.endswith(why)
    assert policy.watch.mending is None


def test_a_load_is_told_also_where_the_gpu_is_gone_meanwhile() -> None:
    policy = taken_off()
    live(policy, away(2))
    for at in range(3, 13):
        live(policy, replace(back(at, SPLIT), gpus=Missing("lost"), comfyui=Off()))
    (event,) = policy.of(EventType.REPAIR_FAILED)
    assert event.reason.endswith("and came back 25 % CPU")


def test_while_a_load_is_under_way_nothing_else_is_asked() -> None:
    policy = taken_off()
    policy.look(away(2))
    for at in range(3, 300):
        assert policy.look(away(at)).branch == "1 settling"
    assert policy.last is not None
    policy.watch = asked(policy.watch, Asked(at=300.0, gpu_memory=None), policy.last, "")
    live(policy, back(301))
    assert policy.of(EventType.REPAIRED)


def test_a_load_of_nobodys_leaves_nothing_behind() -> None:
    policy = taken_off()
    policy.acts(away(2))
    policy.watch = replace(policy.watch, mending=None)
    live(policy, back(3))
    assert policy.watch.pending is None
    assert policy.of(EventType.REPAIRED) == []


def test_a_model_that_left_almost_nothing_behind_needs_no_proof_from_the_gpu() -> None:
    chat = model(gpu_gib=0.02)
    policy = Policy(RULES)
    assert live(policy, fell(0, chat), away(1, free_gib=10)) == [BYE, LOAD]


# -- room that was there and went


def test_room_is_made_again_for_a_model_that_could_not_be_repaired_then_once_it_can_be() -> None:
    def day(rules: Rules, *, requests: int) -> list[Action]:
        policy = Policy(rules)
        chat = replace(SPLIT, requests=1)
        live(policy, fallen(0, chat=chat), fell(1, chat, free_gib=17), fell(2, chat, free_gib=17))
        later = replace(SPLIT, requests=requests)
        looks = (fallen(at, chat=later, queue=queue(since=at - 10, runs=2)) for at in range(100, 400, 50))
        return [action for action in live(policy, *looks) if action]

    assert day(RULES, requests=0)[0] == SOFT
    assert day(RULES, requests=1) == []
    assert day(NO_REPAIR, requests=0) == []


# -- only said


def test_a_dry_run_says_once_of_each_model_that_it_would_be_repaired() -> None:
    policy = Policy(replace(RULES, dry_run=True))
    other = model("other", gpu_gib=2)
    for at in range(100):
        seen = replace(fell(at, free_gib=20), ollama=Seen(ollama(SPLIT, other), at))
        assert live(policy, seen) == [None]
    first, then = policy.of(EventType.DRY_RUN)
    assert first.reason == (
        f"unloading {CHAT} ({CHAT} is 25 % on CPU, and there is room for all of it: to be loaded again)"
    )
    assert then.target == "ollama:other"


# -- a person


def test_what_a_person_wants_gone_is_not_brought_back() -> None:
    policy = taken_off()
    live(policy, away(2, queue=BUSY))
    listed = back(3)
    assert policy.watch.mending is not None
    policy.wish(BYE, listed, force=True)
    assert policy.watch.mending is None


def test_a_free_by_hand_leaves_the_mending_alone() -> None:
    policy = taken_off()
    live(policy, away(2, free_gib=3, comfyui=comfyui(torch_gib=10)))
    assert policy.wish(SOFT, away(12, free_gib=3, comfyui=comfyui(torch_gib=10))).action == SOFT
    assert isinstance(policy.watch.mending, Mending)


def test_nobody_loads_a_model_by_hand() -> None:
    wish = ManualFree(action=LOAD, force=True)
    assert decide_manual(away(0), Watch(), wish, RULES).reason == "a model is loaded by asking Ollama"


# -- who may count on it


@pytest.mark.parametrize(
    ("rules", "watch", "expected"),
    [
        pytest.param({}, {}, True, id="it will be"),
        pytest.param({"repair": False}, {}, False, id="not wanted"),
        pytest.param({"enabled": False}, {}, False, id="monitoring only"),
        pytest.param({"dry_run": True}, {}, False, id="dry run"),
        pytest.param({}, {"meant": frozenset({KEY})}, False, id="meant to be there"),
        pytest.param({}, {"repairs_at": {f"sha-{CHAT}": (90.0,)}}, False, id="repaired ten seconds ago"),
    ],
)
def test_whether_a_repair_can_be_foreseen(rules: dict[str, Any], watch: dict[str, Any], expected: bool) -> None:
    assert foreseen(SPLIT, fell(100), Watch(**watch), replace(RULES, **rules)) is expected
