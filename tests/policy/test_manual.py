"""A person asks: the same rules, except that nobody else needs to need it."""

from __future__ import annotations

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
    fallen,
    gpu,
    gpus,
    model,
    ollama,
    queue,
    second,
    snapshot,
)
from vram_manager.domain.action import Action, UnloadModel
from vram_manager.domain.event import EventType
from vram_manager.domain.reading import Missing, Off
from vram_manager.domain.snapshot import Snapshot
from vram_manager.domain.watch import Watch
from vram_manager.policy import Rules

BYE = UnloadModel(model=CHAT)


def loaded(at: float = 0, **more: object) -> Snapshot:
    """A chat of 8 GiB and a ComfyUI with 8 GiB of models, both at rest."""
    seen = {"ollama": ollama(model()), "comfyui": comfyui(torch_gib=8), **more}
    return snapshot(at, gpu(free_gib=7), **seen)  # type: ignore[arg-type]


@pytest.mark.parametrize("action", [SOFT, UNLOAD, BYE], ids=["soft", "unload", "a model"])
def test_a_wish_is_granted_without_anybody_in_need(action: Action) -> None:
    policy = Policy()
    decision = policy.wish(action, loaded())
    assert (decision.branch, decision.action) == ("manual", action)
    pending = policy.watch.pending
    assert pending is not None
    assert (pending.gpu, pending.expected_bytes, pending.demand) == (CARD, 8 * GIB, None)
    assert decision.reason.startswith("asked by hand: ")
    assert decision.inputs["gpus"]


REFUSALS = [
    pytest.param(
        SOFT, Rules(enabled=False), Watch(), loaded(), "monitoring only", False, id="monitoring only, even with force"
    ),
    pytest.param(
        SOFT,
        Rules(dry_run=True),
        Watch(),
        loaded(),
        "dry run: would have asked for a soft free",
        False,
        id="dry run, even with force",
    ),
    pytest.param(
        BYE,
        Rules(dry_run=True),
        Watch(),
        loaded(),
        f"dry run: would have asked for unloading {CHAT}",
        False,
        id="dry run of an unload",
    ),
    pytest.param(
        SOFT,
        Rules(),
        Watch(),
        snapshot(0, Missing("lost"), comfyui=Off()),
        "no GPU reading, so nothing could be proven: lost",
        False,
        id="the GPU cannot be read, even with force",
    ),
    pytest.param(
        SOFT,
        Rules(),
        Watch(),
        loaded(comfyui=Missing("refused")),
        "ComfyUI cannot be read: refused",
        False,
        id="ComfyUI unread",
    ),
    pytest.param(
        SOFT,
        Rules(),
        Watch(),
        loaded(queue=Missing("?")),
        "ComfyUI's queue cannot be read: ?",
        False,
        id="queue unread",
    ),
    pytest.param(SOFT, Rules(), Watch(), loaded(comfyui=Off()), "no ComfyUI is configured", False, id="no ComfyUI"),
    pytest.param(
        BYE, Rules(), Watch(), loaded(ollama=Missing("?")), "Ollama cannot be read", False, id="Ollama unread"
    ),
    pytest.param(BYE, Rules(), Watch(), loaded(ollama=Off()), "no Ollama is configured", False, id="no Ollama"),
    pytest.param(
        BYE,
        Rules(),
        Watch(),
        loaded(ollama=ollama()),
        f"Ollama has no model {CHAT} loaded",
        False,
        id="model not loaded",
    ),
    pytest.param(
        SOFT,
        Rules(),
        Watch(posted_at={"comfyui": -1.5}),
        loaded(),
        "spacing: comfyui was asked 2 s ago",
        False,
        id="within two seconds of a post",
    ),
    pytest.param(
        SOFT, Rules(), Watch(), loaded(queue=queue(2)), "ComfyUI is busy (2 running or waiting)", True, id="busy"
    ),
    pytest.param(
        SOFT,
        Rules(),
        Watch(),
        loaded(queue=queue(since=-1)),
        "ComfyUI has been idle for 1.0 s of 2 s",
        True,
        id="not idle for long enough",
    ),
    pytest.param(
        SOFT,
        Rules(),
        Watch(posted_at={"comfyui": -20.0}),
        loaded(),
        "cooldown: comfyui was asked 20 s ago",
        True,
        id="cooldown",
    ),
    pytest.param(
        BYE,
        Rules(),
        Watch(posted_at={BYE.target: -20.0}),
        loaded(),
        f"cooldown: ollama:{CHAT} was asked 20 s ago",
        True,
        id="cooldown of a model",
    ),
    pytest.param(
        SOFT,
        Rules(max_frees_per_hour=1),
        Watch(frees_at=(-60.0,)),
        loaded(),
        "1 swaps within the hour, 1 at most",
        True,
        id="budget",
    ),
    pytest.param(
        SOFT,
        Rules(),
        Watch(),
        loaded(comfyui=comfyui(torch_gib=0.1)),
        "ComfyUI holds 0.1 GiB: nothing worth freeing",
        True,
        id="holds little",
    ),
    pytest.param(
        SOFT,
        Rules(),
        Watch(),
        loaded(comfyui=comfyui("main.py", "--highvram", torch_gib=8)),
        "a soft free gives nothing back under --highvram or --gpu-only: ask for the unload stage",
        True,
        id="soft under --highvram",
    ),
]


@pytest.mark.parametrize(("action", "rules", "watch", "seen", "why", "yields"), REFUSALS)
def test_a_refused_wish_says_why_and_changes_nothing(
    action: Action, rules: Rules, watch: Watch, seen: Snapshot, why: str, yields: bool
) -> None:
    policy = Policy(rules, watch)
    decision = policy.wish(action, seen)
    assert (decision.branch, decision.action) == ("manual refused", None)
    assert why in decision.reason
    assert policy.watch == watch


@pytest.mark.parametrize(("action", "rules", "watch", "seen", "why", "yields"), REFUSALS)
def test_force_outweighs_every_guard_of_comfort_and_none_of_safety(
    action: Action, rules: Rules, watch: Watch, seen: Snapshot, why: str, yields: bool
) -> None:
    decision = Policy(rules, watch).wish(action, seen, force=True)
    assert (decision.action is not None) is yields
    assert yields or why in decision.reason


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    ("first", "name"), [(SOFT, "a soft free"), (UNLOAD, "the unload stage"), (BYE, f"unloading {CHAT}")]
)
def test_a_wish_waits_for_what_is_settling(first: Action, name: str, force: bool) -> None:
    policy = Policy()
    policy.wish(first, loaded())
    decision = policy.wish(SOFT, loaded(), force=force)
    assert (decision.action, decision.reason) == (None, f"{name} is still settling")


def test_a_wish_is_proven_like_any_other_free() -> None:
    policy = Policy()
    policy.wish(SOFT, loaded(0))
    policy.post()
    for at in (1, 1.5):
        policy.look(snapshot(at, gpu(free_gib=15), ollama=ollama(model())))
    (event,) = policy.of(EventType.FREED)
    assert (event.reason, event.freed_bytes) == ("asked by hand", 8 * GIB)
    assert policy.watch.episode is None


def test_a_wish_that_gave_nothing_is_not_followed_by_the_unload_stage() -> None:
    policy = Policy(CALM)
    policy.wish(SOFT, loaded(0))
    policy.post()
    for at in (3, 10, 11, 12):
        policy.acts(loaded(at))
    (event,) = policy.of(EventType.FREE_UNCONFIRMED)
    assert event.final
    assert policy.watch.pending is None


def test_a_wish_for_what_can_only_be_guessed_expects_nothing_certain() -> None:
    policy = Policy()
    policy.wish(SOFT, loaded(comfyui=comfyui(torch_gib=1, version=DYNAMIC)))
    assert policy.watch.pending is not None
    assert policy.watch.pending.expected_bytes is None


def test_a_wish_is_granted_where_what_is_held_cannot_be_told() -> None:
    unknown = {"ollama": Missing("timed out"), "comfyui": comfyui(version=DYNAMIC)}
    assert Policy().wish(SOFT, loaded(**unknown)).action == SOFT


def test_a_wish_ends_the_episode_under_way() -> None:
    policy = Policy(CALM)
    need_ten = model(size_gib=16, gpu_gib=7)
    policy.acts(fallen(0, chat=need_ten, torch_gib=10))
    for at in (0.5, 1):
        policy.look(fallen(at, chat=need_ten, free_gib=9, torch_gib=2))
    assert policy.watch.episode is not None
    assert policy.wish(BYE, fallen(1.2, chat=need_ten, free_gib=9, torch_gib=2)).action == BYE
    assert policy.watch.episode is None


# -- a model on one of several GPUs


@pytest.mark.parametrize(
    ("setting", "uuid"),
    [
        pytest.param("1", "GPU-b", id="by index"),
        pytest.param("GPU-b", "GPU-b", id="by UUID"),
        pytest.param(None, None, id="not said"),
        pytest.param("7", None, id="a setting that names none"),
    ],
)
def test_the_gpu_of_a_model_is_told_by_the_setting(setting: str | None, uuid: str | None) -> None:
    policy = Policy(Rules(ollama_gpu=setting))
    seen = snapshot(0, gpus(gpu(free_gib=20), second(free_gib=15)), ollama=ollama(model()))
    assert policy.wish(BYE, seen).action == BYE
    assert policy.watch.pending is not None
    assert policy.watch.pending.gpu == uuid


def test_a_model_on_an_unknown_gpu_has_left_when_ollama_says_so() -> None:
    policy = Policy()
    cards = gpus(gpu(free_gib=20), second(free_gib=15))
    policy.wish(BYE, snapshot(0, cards, ollama=ollama(model())))
    policy.post()
    for at, listed in ((0.5, ollama(model())), (1.0, ollama()), (1.25, ollama())):
        policy.look(snapshot(at, cards, ollama=listed))
        assert policy.told == []
    policy.look(snapshot(1.5, cards))
    (event,) = policy.of(EventType.FREED)
    assert (event.freed_bytes, event.used_percent_before, event.gpu) == (8 * GIB, None, None)


def test_a_person_waits_two_seconds_of_idleness_in_every_profile() -> None:
    patient = Policy(Rules(waiting_idle_seconds=120))
    seen = snapshot(0, gpu(free_gib=4), comfyui=comfyui(torch_gib=8), queue=queue(since=-2.5))
    assert patient.wish(SOFT, seen).action == SOFT
