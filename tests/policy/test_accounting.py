"""Who holds what on which GPU, and how sure that is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.policy.worlds import (
    CLASSIC,
    DYNAMIC,
    GIB,
    UNLOAD,
    Policy,
    comfyui,
    device,
    gib,
    gpu,
    gpus,
    model,
    ollama,
    process,
    queue,
    second,
    snapshot,
)
from vram_manager.domain.action import Stage
from vram_manager.domain.event import EventType
from vram_manager.domain.reading import Missing, Off
from vram_manager.domain.snapshot import ComfyUIState, Gpu, OllamaState, Snapshot
from vram_manager.domain.watch import Lesson
from vram_manager.policy import Rules
from vram_manager.policy.accounting import (
    Certainty,
    Hold,
    comfyui_gpu,
    comfyui_hold,
    gpus_seen,
    nothing_new,
    ollama_bytes,
    weights_may_hide,
)

ARGV = ("main.py", "--listen", "--port", "8188")
TI = "NVIDIA GeForce RTX 3090 Ti"


# -- which GPU is ComfyUI's


def on(*cards: Gpu, stats: ComfyUIState, **rules: object) -> str:
    """The GPU ComfyUI is taken to be on, or why that is not known."""
    found = comfyui_gpu(stats, gpus(*cards), Rules(**rules))  # type: ignore[arg-type]
    return f"{found.why}; {found.remedy}" if isinstance(found, Missing) else found.uuid


UNKNOWN = "several GPUs and no way to tell which one is ComfyUI's; set COMFYUI_GPU"


@pytest.mark.parametrize(
    ("cards", "stats", "rules", "expected"),
    [
        pytest.param((gpu(),), comfyui(), {}, "GPU-a", id="the only one"),
        pytest.param((gpu(name="Tesla T4"),), comfyui(), {}, "GPU-a", id="the only one, by whatever name"),
        pytest.param((gpu(), second()), comfyui(), {"comfyui_gpu": "1"}, "GPU-b", id="by index"),
        pytest.param((gpu(), second()), comfyui(), {"comfyui_gpu": "GPU-b"}, "GPU-b", id="by UUID"),
        pytest.param(
            (gpu(),),
            comfyui(),
            {"comfyui_gpu": "7"},
            "COMFYUI_GPU=7 is none of the GPUs seen here; None",
            id="a setting that names none of them",
        ),
        pytest.param((gpu(),), comfyui(devices=()), {}, "ComfyUI runs without a GPU; None", id="started with --cpu"),
        pytest.param(
            (gpu(), second(processes=(process(9, "python", *ARGV),))), comfyui(*ARGV), {}, "GPU-b", id="by process"
        ),
        pytest.param((gpu(name="NVIDIA A2"), second()), comfyui(), {}, "GPU-b", id="by name"),
        pytest.param(
            (gpu(), second(name=TI)),
            comfyui(devices=(device(name=f"cuda:0 {TI} : native"),)),
            {},
            "GPU-b",
            id="a Ti is not the card whose name its own begins with",
        ),
        pytest.param((gpu(name=TI), second()), comfyui(), {}, "GPU-b", id="nor is that card the Ti"),
        pytest.param((gpu(free_gib=4), second(free_gib=20)), comfyui(free_gib=20.25), {}, "GPU-b", id="by free memory"),
        pytest.param((gpu(free_gib=4), second(free_gib=20)), comfyui(free_gib=20.3), {}, UNKNOWN, id="by neither's"),
        pytest.param((gpu(), second()), comfyui(), {}, UNKNOWN, id="twins at rest"),
        pytest.param(
            (gpu(free_gib=Missing("lost")), second(free_gib=4)), comfyui(free_gib=20), {}, UNKNOWN, id="neither fits"
        ),
        pytest.param((gpu(name=""), second(name="")), comfyui(), {}, UNKNOWN, id="cards without a name"),
        pytest.param(
            (
                gpu(processes=(process(1, "python", *ARGV),)),
                second(processes=(process(9, "python", *ARGV),)),
            ),
            comfyui(*ARGV),
            {},
            UNKNOWN,
            id="a process on both",
        ),
        pytest.param(
            (gpu(processes=()), second(processes=(process(9), process(9, "python", "app.py")))),
            comfyui(*ARGV),
            {},
            UNKNOWN,
            id="processes of others and without a name",
        ),
        pytest.param(
            (gpu(), second(processes=(process(9, "python"),))), comfyui(), {}, UNKNOWN, id="arguments unknown"
        ),
    ],
)
def test_comfyuis_gpu_is_told_by_setting_process_name_or_free_memory(cards, stats, rules, expected: str) -> None:
    assert on(*cards, stats=stats, **rules) == expected


def test_an_unknown_gpu_is_a_reason_to_hold_that_names_the_remedy() -> None:
    chat = ollama(model(gpu_gib=6))
    both = gpus(gpu(free_gib=1), second(free_gib=1))
    decision = Policy().look(snapshot(0, both, ollama=chat, comfyui=comfyui(torch_gib=16, free_gib=9)))
    assert (decision.branch, decision.action) == ("4 which GPU", None)
    assert decision.reason.endswith("no way to tell which one is ComfyUI's (set COMFYUI_GPU)")


def test_a_comfyui_on_the_cpu_is_never_freed() -> None:
    decision = Policy().look(snapshot(0, gpu(free_gib=1), ollama=ollama(model(gpu_gib=6)), comfyui=comfyui(devices=())))
    assert decision.reason.endswith("holding, ComfyUI runs without a GPU")


# -- what Ollama holds there


@pytest.mark.parametrize(
    ("cards", "loaded", "rules", "expected"),
    [
        pytest.param((gpu(),), ollama(model(), model("b", gpu_gib=2)), {}, 10 * GIB, id="one GPU holds all"),
        pytest.param((gpu(), second()), ollama(), {}, 0, id="nothing is nowhere"),
        pytest.param((gpu(), second()), ollama(model()), {"ollama_gpu": "0"}, 8 * GIB, id="the GPU of the setting"),
        pytest.param((gpu(), second()), ollama(model()), {"ollama_gpu": "1"}, 0, id="another one than the setting's"),
        pytest.param((gpu(), second()), ollama(model()), {}, 0, id="Ollama does not say which: nobody's"),
        pytest.param((gpu(),), Missing("timed out"), {}, None, id="unread"),
        pytest.param((gpu(),), Off(), {}, 0, id="no Ollama here"),
    ],
)
def test_what_ollama_holds_on_a_gpu(cards, loaded, rules, expected: int | None) -> None:
    held = ollama_bytes(snapshot(0, ollama=loaded), gpus(*cards), cards[0], Rules(**rules))
    assert (None if isinstance(held, Missing) else held) == expected


# -- what ComfyUI holds


def hold(
    used_gib: float,
    stats: ComfyUIState,
    *,
    lesson: Lesson | None = None,
    loaded: OllamaState | Missing | None = None,
    stage: Stage = Stage.SOFT,
    processes=(),
) -> Hold:
    seen = snapshot(0, gpu(free_gib=24 - used_gib, processes=processes), ollama=loaded or ollama(), comfyui=stats)
    cards = gpus_seen(seen)
    assert not isinstance(cards, Missing)
    return comfyui_hold(seen, stats, cards, cards.gpus[0], lesson, stage, Rules())


def taught(
    soft_gib: float, *, unload_gib: float | None = None, runs: int = 1, torch_after_gib: float | None = 0.0
) -> Lesson:
    """A soft free after which so much stayed that nobody accounts for; and perhaps an unload stage."""
    floors = {Stage.SOFT: gib(soft_gib)}
    if unload_gib is not None:
        floors[Stage.UNLOAD] = gib(unload_gib)
    torch_after = None if torch_after_gib is None else gib(torch_after_gib)
    return Lesson(
        runs=runs,
        stages=frozenset({Stage.SOFT}),
        freed_bytes=0,
        torch_bytes_after=torch_after,
        floors=floors,
    )


def hidden(*argv: str, torch_gib: float = 1.0) -> ComfyUIState:
    """A ComfyUI with DynamicVRAM: its weights are in none of torch's numbers."""
    return comfyui(*argv, torch_gib=torch_gib, version=DYNAMIC)


@pytest.mark.parametrize(
    ("held", "held_gib", "certainty"),
    [
        pytest.param(hold(20, comfyui(torch_gib=6)), 6, Certainty.MEASURED, id="without DynamicVRAM: torch's number"),
        pytest.param(hold(20, hidden()), 19, Certainty.PERHAPS, id="with it: what nobody accounts for, but 1 GiB"),
        pytest.param(
            hold(20, hidden(), loaded=ollama(model())), 11, Certainty.PERHAPS, id="Ollama accounts for its own"
        ),
        pytest.param(hold(2.2, hidden()), 1, Certainty.MEASURED, id="a context and a desktop are not worth a free"),
        pytest.param(hold(20, hidden(), lesson=taught(9)), 11, Certainty.LEARNED, id="the floor of an earlier free"),
        pytest.param(
            hold(20, hidden(), lesson=taught(9), stage=Stage.UNLOAD),
            11,
            Certainty.LEARNED,
            id="what stayed after a soft free is no guess for the unload stage",
        ),
        pytest.param(
            hold(20, hidden(), lesson=taught(9, unload_gib=7), stage=Stage.UNLOAD),
            13,
            Certainty.LEARNED,
            id="each stage its own floor",
        ),
        pytest.param(hold(10.1, hidden(), lesson=taught(9)), 1, Certainty.MEASURED, id="nothing beyond the floor"),
        pytest.param(hold(20, hidden(), loaded=Missing("?")), 1, Certainty.MEASURED, id="Ollama unread: torch alone"),
        pytest.param(hold(0.5, hidden()), 1, Certainty.MEASURED, id="torch claims more than is used"),
        pytest.param(hold(20, comfyui(devices=(), version=DYNAMIC)), 19, Certainty.PERHAPS, id="no devices told"),
    ],
)
def test_what_comfyui_holds(held: Hold, held_gib: float, certainty: Certainty) -> None:
    assert (held.bytes, held.certainty) == (gib(held_gib), certainty)
    assert held.expected_bytes == (None if certainty is Certainty.PERHAPS else gib(held_gib))


def test_with_several_gpus_hidden_weights_get_their_fair_test_though_ollama_does_not_say_where_it_is() -> None:
    cards = gpus(gpu(free_gib=4), second())
    seen = snapshot(0, cards, ollama=ollama(model(size_gib=8)))
    held = comfyui_hold(seen, hidden(), cards, cards.gpus[0], None, Stage.SOFT, Rules())
    assert (held.bytes, held.certainty) == (19 * GIB, Certainty.PERHAPS)


@pytest.mark.parametrize(
    ("used_gib", "own", "held_gib"),
    [
        pytest.param(20, process(12.5, "python", *ARGV), 12, id="what it uses, without its context"),
        pytest.param(20, process(0.2, "python", *ARGV), 1, id="never less than torch's number"),
        pytest.param(
            6, process(12.5, "python", *ARGV), 6, id="never more than is used: the list is older than the GPU"
        ),
    ],
)
def test_the_memory_of_its_process_is_used_where_it_is_visible(used_gib: float, own, held_gib: float) -> None:
    held = hold(used_gib, hidden(*ARGV), processes=(process(3, "python", "app.py"), own))
    assert (held.bytes, held.certainty) == (gib(held_gib), Certainty.MEASURED)


@pytest.mark.parametrize(
    "processes",
    [
        pytest.param((process(Missing("N/A"), "python", *ARGV),), id="its memory is N/A (WSL2)"),
        pytest.param(
            (process(2, "python", *ARGV), process(9, "python", *ARGV, pid=2)), id="two processes go by that name"
        ),
        pytest.param(Missing("no permission"), id="no process list"),
    ],
)
def test_where_its_process_tells_nothing_the_rest_of_the_card_is_perhaps_its(processes) -> None:
    held = hold(20, hidden(*ARGV), processes=processes)
    assert (held.bytes, held.certainty) == (19 * GIB, Certainty.PERHAPS)


def test_the_process_is_believed_where_ollama_is_unread() -> None:
    held = hold(6, hidden(*ARGV), processes=(process(12.5, "python", *ARGV),), loaded=Missing("timed out"))
    assert held.bytes == 12 * GIB


@pytest.mark.parametrize(
    ("version", "argv", "may"),
    [
        pytest.param("0.3.64", (), False, id="0.3.64"),
        pytest.param("0.14.9", (), False, id="0.14.9"),
        pytest.param("0.15.1", (), True, id="0.15.1"),
        pytest.param("v0.33.0", (), True, id="v0.33.0"),
        pytest.param("1.0", (), True, id="1.0"),
        pytest.param("783545f6", (), True, id="a commit"),
        pytest.param("nightly", (), True, id="a name"),
        pytest.param(Missing("too old to say"), (), True, id="unknown"),
        pytest.param(DYNAMIC, ("main.py", "--highvram"), False, id="--highvram"),
        pytest.param(DYNAMIC, ("main.py", "--gpu-only"), False, id="--gpu-only"),
        pytest.param(DYNAMIC, ("main.py", "--novram"), False, id="--novram"),
        pytest.param(DYNAMIC, ("main.py", "--disable-dynamic-vram"), False, id="--disable-dynamic-vram"),
        pytest.param(DYNAMIC, ("main.py", "--reserve-vram=2"), True, id="another flag"),
    ],
)
def test_whether_weights_may_hide_from_torchs_numbers(version, argv: tuple[str, ...], may: bool) -> None:
    assert weights_may_hide(comfyui(*argv, version=version)) is may


# -- what an earlier free taught


@pytest.mark.parametrize(
    ("lesson", "runs", "torch_gib", "stage", "expected"),
    [
        pytest.param(None, 1, 0, Stage.SOFT, False, id="never asked"),
        pytest.param(taught(0), 1, 0, Stage.SOFT, True, id="asked, and nothing ran since"),
        pytest.param(taught(0), 2, 0, Stage.SOFT, False, id="a prompt ran since"),
        pytest.param(taught(0), 1, 0.2, Stage.SOFT, True, id="torch grew a little"),
        pytest.param(taught(0), 1, 0.25, Stage.SOFT, False, id="torch grew: it ran unseen"),
        pytest.param(taught(0, torch_after_gib=None), 1, 9, Stage.SOFT, True, id="torch was not seen after it"),
        pytest.param(taught(0), 1, 0, Stage.UNLOAD, False, id="the harder stage was not tried"),
    ],
)
def test_the_same_is_not_asked_twice_of_a_comfyui_that_has_not_run(
    lesson: Lesson | None, runs: int, torch_gib: float, stage: Stage, expected: bool
) -> None:
    held = hold(20, comfyui(torch_gib=torch_gib, version=CLASSIC))
    assert nothing_new(held, lesson, queue(runs=runs), stage, Rules()) is expected


def test_after_the_unload_stage_the_soft_one_has_nothing_to_add() -> None:
    lesson = Lesson(runs=1, stages=frozenset({Stage.UNLOAD}), freed_bytes=0)
    assert nothing_new(hold(20, comfyui()), lesson, queue(runs=1), Stage.SOFT, Rules())


# -- DynamicVRAM from the first test to the floor that is remembered

QUICK = Rules(grace_seconds=5, settle_timeout_seconds=5)


def shadow(at: float, free_gib: float, *, runs: int = 1, loaded=None) -> Snapshot:
    """A card whose used memory nobody accounts for, beside an idle ComfyUI with DynamicVRAM."""
    stats = comfyui(version=DYNAMIC)
    return snapshot(at, gpu(free_gib=free_gib), ollama=loaded or ollama(), comfyui=stats, queue=queue(runs=runs))


def after_the_test(policy: Policy, free_gib: float) -> None:
    """The fair test: one free under pressure, and what is free after it."""
    assert [policy.acts(shadow(at, 4)) is not None for at in (0, 5)] == [False, True]
    for at in (6, 7, 8, 9, 10):
        policy.acts(shadow(at, free_gib))
    assert policy.watch.pending is None


def test_unaccounted_memory_gets_one_fair_test_until_comfyui_runs_again() -> None:
    policy = Policy(QUICK)
    after_the_test(policy, free_gib=4)
    assert policy.of(EventType.FREE_UNCONFIRMED)
    for at in range(50, 2000, 50):
        assert policy.acts(shadow(at, 4)) is None


def test_what_stayed_after_the_test_is_somebody_elses_even_when_comfyui_ran_again() -> None:
    policy = Policy(QUICK)
    after_the_test(policy, free_gib=4)
    decision = policy.look(shadow(50, 4, runs=2))
    assert (decision.branch, decision.action) == ("4 nothing held", None)


def test_what_comfyui_takes_beyond_the_floor_is_learned_to_be_its_own() -> None:
    policy = Policy(QUICK)
    after_the_test(policy, free_gib=4)
    decision = policy.look(shadow(50, 1, runs=2))
    assert decision.reason.endswith("it holds 3.0 GiB (learned)")
    assert policy.watch.pending is not None
    assert policy.watch.pending.expected_bytes == 3 * GIB


def test_the_floor_sinks_when_somebody_else_leaves() -> None:
    policy = Policy(QUICK)
    after_the_test(policy, free_gib=4)
    policy.look(shadow(50, 14, runs=1))
    assert policy.look(shadow(60, 4, runs=2)).branch == "3 nobody"  # a new grace
    assert policy.look(shadow(66, 4, runs=2)).reason.endswith("it holds 10.0 GiB (learned)")


def test_readings_of_different_age_do_not_sink_the_floor_to_nothing() -> None:
    # A model has left the card while Ollama's list, a second older, still has it.
    policy = Policy(QUICK)
    after_the_test(policy, free_gib=22)
    policy.look(shadow(50, 22, loaded=ollama(model(size_gib=8))))
    assert policy.watch.lesson is not None
    assert policy.watch.lesson.floors[Stage.SOFT] >= GIB


def test_a_floor_is_not_learned_from_a_comfyui_that_ran_meanwhile() -> None:
    policy = Policy(QUICK)
    for at in (0, 5):
        policy.acts(shadow(at, 4))
    policy.look(shadow(10, 4, runs=2))
    assert policy.watch.lesson is not None
    assert policy.watch.lesson.floors == {}


def test_a_floor_is_not_learned_from_a_gpu_that_cannot_be_read() -> None:
    policy = Policy(QUICK)
    for at in (0, 5):
        policy.acts(shadow(at, 4))
    policy.look(snapshot(10, Missing("lost"), comfyui=Off()))
    assert policy.watch.lesson is not None
    assert (policy.watch.lesson.floors, policy.watch.lesson.torch_bytes_after) == ({}, None)


def test_a_floor_is_not_learned_while_ollama_is_unread() -> None:
    policy = Policy(QUICK)
    for at in (0, 5):
        policy.acts(shadow(at, 4))
    policy.look(shadow(10, 4, loaded=Missing("timed out")))
    assert policy.watch.lesson is not None
    assert policy.watch.lesson.floors == {}


def test_each_stage_keeps_the_floor_it_taught() -> None:
    policy = Policy(QUICK)
    after_the_test(policy, free_gib=6)
    policy.watch = replace(policy.watch, posted_at={})
    policy.wish(UNLOAD, shadow(50, 6), force=True)
    policy.post()
    policy.look(shadow(60, 7))
    assert policy.watch.lesson is not None
    assert policy.watch.lesson.floors == {Stage.SOFT: 17 * GIB, Stage.UNLOAD: 17 * GIB}
    policy.look(shadow(70, 5))
    assert policy.watch.lesson.stages == {Stage.SOFT, Stage.UNLOAD}


def test_a_remembered_floor_outlives_looks_without_comfyui() -> None:
    policy = Policy(QUICK)
    after_the_test(policy, free_gib=4)
    before = policy.watch.lesson
    policy.look(snapshot(50, gpu(free_gib=24), comfyui=Missing("refused")))
    policy.look(shadow(51, 24, loaded=Missing("timed out")))
    assert policy.watch.lesson == before
