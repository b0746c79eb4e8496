"""A floor is what stays when nothing is wanted; a leak is a floor that goes up and up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.policy.worlds import (
    CLASSIC,
    DYNAMIC,
    GIB,
    MIB,
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
from vram_manager.domain.floor import Floor, Growth, Kept, Mark
from vram_manager.domain.reading import Missing, Off, Seen
from vram_manager.domain.snapshot import ComfyUIState, Gpu, Gpus, Snapshot
from vram_manager.policy import Rules
from vram_manager.policy.drift import (
    BEYOND,
    IDLE,
    LINGERING,
    MAX_MARKS,
    REMAINDER,
    Freed,
    Look,
    after_free,
    agree,
    at_rest,
    beyond_size,
    known_as,
    leak_event,
    marked,
    sees_runners,
    shown,
    stayed,
    told,
    unaccounted,
    when_idle,
    without_models,
)
from vram_manager.policy.workflow import LoaderFile, WorkflowFacts

RULES = Rules()
AT = datetime(2026, 7, 1, tzinfo=UTC)
NOW = 1000.0
FREED = Freed(at=NOW - 10, stage=Stage.SOFT, runs=1)
BACK = gib(0.6)
MAIN = ("python", "main.py", "--listen")
RUNNER = ("/usr/lib/ollama/llama-server", "--model", "blob")
# Two marks warm up, and the blocks of the smallest window are full.
FIRST_LOOK = 14


def mark(size: float, *, runs: int = 2, ran: tuple[tuple[str, int], ...] = ()) -> Mark:
    return Mark(at=AT, bytes=round(size), runs=runs, ran=ran)


def kept(size: float = 0, *, measure: str = "a measure", life: str = "one life") -> Kept:
    return Kept(bytes=round(size), measure=measure, life=life)


def drift(sizes: Iterable[float], floor: Floor | None = None) -> tuple[Floor, list[tuple[int, Growth]]]:
    """The floor after all these, and the growths that show with the count of the mark at which they do."""
    found = []
    for count, size in enumerate(sizes, 1):
        floor, growth = marked(floor, "comfyui", kept(), mark(size), RULES)
        if growth is not None:
            found.append((count, growth))
    assert floor is not None
    return floor, found


def leaks_of(sizes: Iterable[float]) -> list[tuple[int, Growth]]:
    return drift(sizes)[1]


# When a floor is a leak.


def test_a_floor_that_rises_with_every_generation_is_a_leak_as_soon_as_it_can_be_told() -> None:
    floor, ((count, growth),) = drift(gib(1.1) + 50 * MIB * n for n in range(FIRST_LOOK))
    assert count == FIRST_LOOK
    assert growth == Growth(initial_bytes=gib(1.1) + 100 * MIB, current_bytes=gib(1.1) + 550 * MIB, generations=22)
    assert growth.delta_bytes == 450 * MIB
    assert (floor.leaks, floor.told_bytes, floor.growth_bytes) == (1, 450 * MIB, 450 * MIB)
    assert floor.generations == 2 * (FIRST_LOOK - 1)


def test_a_leak_names_what_ran_most_since_the_floor_it_began_with() -> None:
    floor, growth = None, None
    for n in range(FIRST_LOOK):
        # What ran before the window is not its doing.
        ran = (("sdxl.safetensors", 9),) if n < 3 else (("wan2.1.safetensors", 2), ("flux.safetensors", 1))
        floor, growth = marked(floor, "comfyui", kept(), mark(n * 50 * MIB, runs=3, ran=ran), RULES)
    assert growth is not None
    assert growth.most == ("wan2.1.safetensors", 22)
    assert growth.generations == 33


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param([GIB] * 300, id="the same"),
        pytest.param([GIB] * 50 + [3 * GIB] * 250, id="one step, such as a new kind of work"),
        pytest.param([GIB] * 50 + [2 * GIB] * 50 + [3 * GIB] * 200, id="two steps"),
        pytest.param([GIB + n % 2 * GIB for n in range(300)], id="up and down"),
        pytest.param([GIB + n % 9 * 300 * MIB for n in range(300)], id="a pool that fills and is emptied"),
        pytest.param([3 * GIB - n * 10 * MIB for n in range(200)], id="falling"),
        pytest.param([GIB, 3 * GIB] + [5 * GIB] * 100, id="the warm-up"),
        pytest.param([2 * GIB - GIB * 0.3**n for n in range(200)], id="filling up"),
        pytest.param([GIB + n * 0.4 * MIB for n in range(MAX_MARKS + 50)], id="less than the threshold in a window"),
    ],
)
def test_what_is_not_going_up_and_up_is_no_leak(sizes: Sequence[float]) -> None:
    assert leaks_of(sizes) == []


def test_a_slow_leak_is_found_in_a_longer_window() -> None:
    ((count, growth), *_) = leaks_of(GIB + n * 2 * MIB for n in range(MAX_MARKS))
    assert FIRST_LOOK < count <= 100
    assert growth.delta_bytes > 100 * MIB


def test_a_leak_that_begins_late_is_found_as_soon() -> None:
    ((count, _), *_) = leaks_of([GIB] * 150 + [GIB + n * 50 * MIB for n in range(20)])
    assert count <= 150 + FIRST_LOOK


def test_a_leak_of_some_runs_only_is_a_leak() -> None:
    assert len(leaks_of(GIB + n // 3 * 200 * MIB for n in range(48))) >= 1


def test_what_goes_on_is_told_again_each_time_it_has_doubled() -> None:
    floor, found = drift(GIB + 50 * MIB * n for n in range(150))
    grown = [growth.delta_bytes for _, growth in found]
    assert 2 <= len(grown) <= 4
    assert all(later >= sum(grown[:place]) for place, later in enumerate(grown) if place)
    assert floor.leaks == len(grown)


def test_growth_that_stops_is_told_once() -> None:
    assert len(leaks_of(GIB + 50 * MIB * min(n, FIRST_LOOK) for n in range(300))) == 1


def test_what_was_told_by_another_measure_is_not_told_again() -> None:
    floor, found = drift(GIB + 20 * MIB * n for n in range(FIRST_LOOK - 1))
    assert found == []
    floor = told(floor, Growth(initial_bytes=0, current_bytes=200 * MIB, generations=1))
    assert drift((GIB + 20 * MIB * n for n in range(FIRST_LOOK - 1, FIRST_LOOK + 5)), floor)[1] == []


def test_another_life_starts_afresh() -> None:
    floor, _ = drift(GIB + 50 * MIB * n for n in range(FIRST_LOOK - 1))
    floor, growth = marked(floor, "comfyui", kept(life="another life"), mark(3 * GIB), RULES)
    assert growth is None
    assert (floor.count, floor.judged, floor.marks) == (1, 0, (mark(3 * GIB),))


def test_a_fall_below_where_it_began_is_another_life() -> None:
    floor, _ = drift([2 * GIB] * 20)
    assert drift([2 * GIB - 100 * MIB], floor)[0].count == 21
    assert drift([2 * GIB - 101 * MIB], floor)[0].count == 1


def test_the_baseline_is_the_least_of_the_first_after_the_warm_up() -> None:
    floor, _ = drift([5 * GIB, 4.99 * GIB, 5.03 * GIB, 5.01 * GIB, 5.02 * GIB, 5 * GIB, 6 * GIB, 6 * GIB, 6 * GIB])
    assert (floor.baseline_bytes, floor.floor_bytes) == (round(5.01 * GIB), 6 * GIB)


def test_a_floor_without_marks_is_nothing() -> None:
    floor = Floor(tenant="comfyui", measure="", life="")
    assert (floor.floor_bytes, floor.growth_bytes, floor.generations) == (0, 0, 0)


def test_marks_are_forgotten_beyond_their_number() -> None:
    floor, _ = drift([GIB] * (MAX_MARKS + 10))
    assert (len(floor.marks), floor.judged, floor.count) == (MAX_MARKS, MAX_MARKS, MAX_MARKS + 10)


noise = st.integers(0, 40 * MIB)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.one_of(st.just(0), st.integers(0, 90 * MIB)), min_size=1, max_size=120), st.integers(0, 20 * GIB))
def test_a_floor_that_stays_within_the_threshold_is_never_a_leak(above: list[int], base: int) -> None:
    assert leaks_of(base + more for more in above) == []


@settings(deadline=None, max_examples=60)
@given(st.integers(50 * MIB, GIB), st.lists(noise, min_size=60, max_size=60), st.integers(0, 40))
def test_a_leak_larger_than_the_noise_is_always_found(each: int, above: list[int], before: int) -> None:
    flat = [GIB] * before
    sizes = flat + [GIB + each * n + more for n, more in enumerate(above)]
    ((count, growth), *_) = leaks_of(sizes)
    assert growth.delta_bytes > RULES.leak_threshold_bytes
    assert count <= before + 60


# What should be nothing.


def test_a_runner_that_stays_is_told_at_once_and_only_once() -> None:
    floor, growth = stayed(None, "ollama", kept(), mark(0), RULES)
    assert growth is None
    lost = mark(5 * GIB, runs=1, ran=(("llama3.1:8b", 1),))
    floor, growth = stayed(floor, "ollama", kept(), lost, RULES)
    assert growth == Growth(initial_bytes=0, current_bytes=5 * GIB, generations=1, most=("llama3.1:8b", 1))
    for _ in range(50):
        floor, growth = stayed(floor, "ollama", kept(), mark(5 * GIB), RULES)
        assert growth is None
    assert (floor.baseline_bytes, floor.floor_bytes, floor.leaks) == (0, 5 * GIB, 1)
    floor, growth = stayed(floor, "ollama", kept(), mark(10 * GIB), RULES)
    assert growth is not None
    assert growth.most is None


def test_one_that_was_there_before_us_is_told_too() -> None:
    assert stayed(None, "ollama", kept(), mark(5 * GIB), RULES)[1] is not None


def test_one_that_has_gone_can_come_again() -> None:
    floor: Floor | None = None
    found = []
    for size in (5, 0, 5):
        floor, growth = stayed(floor, "ollama", kept(), mark(gib(size)), RULES)
        found.append(growth is not None)
    assert found == [True, False, True]


def test_another_ollama_starts_afresh() -> None:
    floor, _ = stayed(None, "ollama", kept(), mark(5 * GIB), RULES)
    assert stayed(floor, "ollama", kept(life="0.33"), mark(5 * GIB), RULES)[0].count == 1


def test_what_others_judge_is_only_shown() -> None:
    floor: Floor | None = None
    for n in range(20):
        floor = shown(floor, "worker:tts", kept(), mark(GIB * n), leaks=int(n > 10))
    assert floor is not None
    assert (floor.count, floor.judged, floor.leaks) == (20, 0, 1)
    assert shown(floor, "worker:tts", kept(life="reserved"), mark(0), leaks=0).count == 1


# The look after a free.


def seen(card: Gpu | Gpus | None = None, **more: object) -> Snapshot:
    return snapshot(NOW, gpu(free_gib=20) if card is None else card, **more)  # type: ignore[arg-type]


def torch(active_gib: float, *argv: str, version: str = CLASSIC) -> ComfyUIState:
    return comfyui(*argv, version=version, devices=(device(torch_gib=active_gib + 1, torch_free_gib=1),))


def test_torch_tells_where_no_process_is_seen() -> None:
    found = after_free(FREED, seen(comfyui=torch(0.5)), RULES)
    assert found is not None
    assert (found.bytes, found.measure) == (gib(0.5), "torch's memory in use after a soft free")
    hard = after_free(replace(FREED, stage=Stage.UNLOAD), seen(comfyui=torch(0.5)), RULES)
    assert hard is not None
    assert hard.measure == "torch's memory in use after a full unload"


def a_process(listed_free_gib: float | None = None, used: float | Missing = 0.9, free: float = 20, pid: int = 7) -> Gpu:
    card = gpu(free_gib=free, processes=(process(used, "python", "main.py", "--listen", pid=pid),))
    return replace(card, listed_free_bytes=None if listed_free_gib is None else gib(listed_free_gib))


def test_the_driver_tells_first_if_its_list_is_of_now() -> None:
    state = torch(0.5, "main.py", "--listen")
    for listed in (None, 20, 20.01):
        found = after_free(FREED, seen(a_process(listed), comfyui=state), RULES)
        assert found is not None
        assert (found.bytes, found.measure) == (gib(0.9), "its process after a soft free")
    assert after_free(FREED, seen(a_process(12), comfyui=state), RULES) is None


def test_a_process_without_a_number_leaves_torch_to_tell() -> None:
    found = after_free(FREED, seen(a_process(used=Missing("WSL2")), comfyui=torch(0.5, "main.py", "--listen")), RULES)
    assert found is not None
    assert found.measure.startswith("torch")


def test_several_gpus_that_cannot_be_told_apart_leave_torch_to_tell() -> None:
    found = after_free(FREED, seen(gpus(gpu(), second()), comfyui=torch(0.5)), RULES)
    assert found is not None
    assert found.bytes == gib(0.5)


@pytest.mark.parametrize(
    "what",
    [
        pytest.param({"comfyui": Missing("down")}, id="comfyui unread"),
        pytest.param({"comfyui": Seen(torch(0.5), NOW - 9)}, id="comfyui read before it settled"),
        pytest.param({"comfyui": comfyui(devices=())}, id="no device"),
        pytest.param({"comfyui": comfyui(devices=(device(kind="cpu"),))}, id="on the cpu"),
        pytest.param({"comfyui": torch(0.5, "--highvram")}, id="the soft stage leaves its models"),
        pytest.param({"queue": Missing("down")}, id="queue unread"),
        pytest.param({"queue": Seen(queue(), NOW - 9)}, id="queue read before it settled"),
        pytest.param({"queue": queue(1)}, id="at work"),
        pytest.param({"queue": queue(runs=2)}, id="it has run since"),
        pytest.param({"card": Seen(gpus(gpu()), NOW - 9)}, id="gpu read before it settled"),
        pytest.param({"card": Missing("lost")}, id="gpu unread"),
        pytest.param({"card": replace(gpus(gpu()), second_hand=True)}, id="gpu at second hand"),
    ],
)
def test_what_is_not_known_for_sure_makes_no_mark(what: dict[str, object]) -> None:
    assert after_free(FREED, seen(**{"comfyui": torch(0.5), **what}), RULES) is None  # type: ignore[arg-type]


def test_nothing_rests_that_was_not_freed() -> None:
    assert not at_rest(None, seen())


def test_a_restart_an_update_and_another_driver_are_another_life() -> None:
    state = torch(0.5, "main.py", "--listen")
    cards = [gpus(a_process()), gpus(a_process(pid=8)), replace(gpus(a_process()), driver_version="590.1")]
    cards.append(replace(gpus(a_process()), driver_version=Missing("not told")))
    states = [replace(state, version=DYNAMIC), replace(state, version=Missing("?")), torch(0.5, "main.py")]
    lives = [after_free(FREED, seen(card, comfyui=state), RULES) for card in cards]
    lives += [after_free(FREED, seen(gpus(a_process()), comfyui=other), RULES) for other in states]
    assert len({life.life for life in lives if life}) == len(lives)


# The look at the same files again.


def test_torch_in_use_counts_once_it_has_tidied_up() -> None:
    idle = queue(since=NOW - 12)
    found = when_idle(seen(comfyui=torch(6.5), queue=idle), "streak 1")
    assert found is not None
    assert (found.bytes, found.measure) == (gib(6.5), IDLE)
    other = when_idle(seen(comfyui=torch(6.5), queue=idle), "streak 2")
    assert other is not None
    assert other.life != found.life


@pytest.mark.parametrize(
    "what",
    [
        pytest.param({"queue": queue(since=NOW - 11)}, id="too soon"),
        pytest.param({"queue": queue(1)}, id="at work"),
        pytest.param({"queue": Missing("down")}, id="queue unread"),
        pytest.param({"comfyui": Off()}, id="no comfyui"),
        pytest.param({"comfyui": comfyui(devices=())}, id="no device"),
        pytest.param({"comfyui": torch(6.5, "--gpu-only")}, id="pictures are cached on the gpu"),
        pytest.param({"card": Off()}, id="no gpu"),
    ],
)
def test_an_idle_comfyui_that_cannot_be_judged_makes_no_mark(what: dict[str, object]) -> None:
    assert when_idle(seen(**{"comfyui": torch(6.5), **what}), "streak") is None  # type: ignore[arg-type]


# Ollama's looks.


def runners(*sizes: float | Missing, listed_free_gib: float | None = None, free_gib: float | Missing = 18) -> Gpu:
    found = tuple(process(size, *RUNNER, pid=50 + place) for place, size in enumerate(sizes))
    desktop = process(0.3, "/usr/bin/Xorg", pid=1)
    listed = None if listed_free_gib is None else gib(listed_free_gib)
    return replace(gpu(free_gib=free_gib, processes=(desktop, *found)), listed_free_bytes=listed)


def test_runners_without_a_model_are_added_up() -> None:
    found = without_models(seen(gpus(runners(5.0), replace(second(), processes=(process(1.0, *RUNNER),)))), NOW - 60)
    assert found is not None
    assert (found.bytes, found.measure) == (gib(6.0), LINGERING)
    none = without_models(seen(runners()), NOW - 60)
    assert none is not None
    assert none.bytes == 0


@pytest.mark.parametrize(
    ("card", "more", "since"),
    [
        pytest.param(runners(5.0), {}, NOW - 59, id="too soon"),
        pytest.param(runners(5.0), {"ollama": ollama(model())}, NOW - 60, id="a model is listed"),
        pytest.param(runners(5.0), {"ollama": Missing("down")}, NOW - 60, id="ollama unread"),
        pytest.param(Missing("lost"), {}, NOW - 60, id="gpu unread"),
        pytest.param(runners(Missing("N/A")), {}, NOW - 60, id="no number"),
        pytest.param(runners(5.0, listed_free_gib=12), {}, NOW - 60, id="an old list"),
        pytest.param(runners(5.0, free_gib=Missing("?")), {}, NOW - 60, id="memory unread"),
        pytest.param(gpu(processes=Missing("no pids")), {}, NOW - 60, id="no processes"),
    ],
)
def test_runners_that_cannot_be_told_make_no_mark(card: Gpu, more: dict[str, object], since: float) -> None:
    assert without_models(seen(card, **more), since) is None  # type: ignore[arg-type]


def test_whether_runners_can_be_seen_at_all() -> None:
    assert sees_runners(seen(runners(5.0)))
    assert not sees_runners(seen(runners()))
    assert not sees_runners(seen(gpu(processes=Missing("no pids"))))
    assert not sees_runners(seen(Missing("lost")))


def test_a_runner_is_held_against_the_size_that_ollama_tells() -> None:
    loaded = replace(model(size_gib=5.0), active_at=NOW - 5)
    found = beyond_size(seen(runners(5.5), ollama=ollama(loaded)))
    assert found is not None
    assert found[0] == loaded
    assert (found[1].bytes, found[1].measure) == (gib(5.5) - gib(5.0), BEYOND)
    less = beyond_size(seen(runners(4.5), ollama=ollama(model(size_gib=5.0))))
    assert less is not None
    assert less[1].bytes == 0


@pytest.mark.parametrize(
    ("card", "models"),
    [
        pytest.param(runners(5.5), [], id="no model"),
        pytest.param(runners(5.5), [model(), model("gemma3:4b")], id="several models"),
        pytest.param(runners(5.5, 3.0), [model()], id="several runners"),
        pytest.param(runners(5.5), [replace(model(), requests=1)], id="at work"),
        pytest.param(runners(5.5), [replace(model(), active_at=NOW - 4)], id="just used"),
        pytest.param(runners(5.5, listed_free_gib=12), [model()], id="an old list"),
        pytest.param(runners(Missing("N/A")), [model()], id="no number"),
        pytest.param(Missing("lost"), [model()], id="gpu unread"),
    ],
)
def test_a_runner_that_cannot_be_judged_makes_no_mark(card: Gpu | Missing, models: list[object]) -> None:
    assert beyond_size(seen(card, ollama=ollama(*models))) is None  # type: ignore[arg-type]


# What nobody accounts for.


def test_the_rest_is_what_is_left_when_all_have_let_go() -> None:
    found = unaccounted(FREED, NOW - 60, seen(gpu(free_gib=20), comfyui=comfyui(torch_gib=1.5)))
    assert found is not None
    assert (found.bytes, found.measure) == (gib(2.5), REMAINDER)


@pytest.mark.parametrize("off", ["comfyui", "ollama"])
def test_who_is_not_there_need_not_let_go(off: str) -> None:
    found = unaccounted(
        None if off == "comfyui" else FREED, None if off == "ollama" else NOW - 60, seen(**{off: Off()})
    )
    assert found is not None
    assert found.bytes == gib(4)


@pytest.mark.parametrize(
    ("freed", "since", "what"),
    [
        pytest.param(None, NOW - 60, {}, id="comfyui was not freed"),
        pytest.param(FREED, NOW - 59, {}, id="ollama may still let go"),
        pytest.param(FREED, None, {}, id="ollama has a model"),
        pytest.param(FREED, NOW - 60, {"comfyui": Missing("down")}, id="comfyui unread"),
        pytest.param(FREED, NOW - 60, {"card": runners()}, id="processes are seen"),
        pytest.param(FREED, NOW - 60, {"card": gpus(gpu(), second())}, id="several gpus"),
        pytest.param(FREED, NOW - 60, {"card": Missing("lost")}, id="gpu unread"),
        pytest.param(FREED, NOW - 60, {"card": gpu(free_gib=Missing("?"))}, id="memory unread"),
        pytest.param(FREED, NOW - 60, {"card": replace(gpu(), unified=True)}, id="the cpu's memory too"),
    ],
)
def test_a_rest_that_may_be_somebodys_makes_no_mark(
    freed: Freed | None, since: float | None, what: dict[str, object]
) -> None:
    assert unaccounted(freed, since, seen(**what)) is None  # type: ignore[arg-type]


def test_nor_does_one_beside_a_worker() -> None:
    for busy in (replace(seen(), workers_bytes={"GPU-a": 1}), replace(seen(), leased_bytes={"GPU-a": 1})):
        assert unaccounted(FREED, NOW - 60, busy) is None


# Two looks.


def test_two_looks_agree_in_one_rest_of_one_life_about_the_same_bytes() -> None:
    first = Look(at=0.0, kept=kept(GIB), rest=1)
    assert agree(first, Look(at=10.0, kept=kept(GIB + 32 * MIB), rest=1))
    assert not agree(first, Look(at=10.0, kept=kept(GIB + 33 * MIB), rest=1))
    assert not agree(first, Look(at=10.0, kept=kept(GIB), rest=2))
    assert not agree(first, Look(at=10.0, kept=kept(GIB, life="other"), rest=1))


# Words.


def test_a_leak_is_told_in_numbers_and_names() -> None:
    growth = Growth(initial_bytes=gib(1.1), current_bytes=gib(2.4), generations=34, most=("wan2.1_t2v.safetensors", 21))
    event = leak_event("comfyui", "its process after a soft free", growth)
    assert (event.type, event.target) == (EventType.LEAK, "comfyui")
    assert event.reason == (
        "1.1 GiB -> 2.4 GiB kept after 34 runs: +1331 MiB, 39.2 MiB each; most often with wan2.1_t2v.safetensors "
        "(21 runs) (measured: its process after a soft free)"
    )
    assert leak_event("others", REMAINDER, growth).reason.endswith(
        "(21 runs); nobody accounts for it: ComfyUI and Ollama had let go, and no process can be seen"
    )
    assert leak_event("ollama:llama3.1:8b", BEYOND, growth).reason == (
        "1.1 GiB -> 2.4 GiB kept after 34 times in use: +1331 MiB, 39.2 MiB each (measured: its runner beyond its size)"
    )
    unknown = replace(growth, generations=0, most=None)
    assert leak_event("comfyui", IDLE, unknown).reason == (
        "1.1 GiB -> 2.4 GiB kept after 0 runs: +1331 MiB (measured: torch's memory in use when idle)"
    )


def test_a_runner_that_stayed_is_told_with_what_was_loaded_last() -> None:
    growth = Growth(initial_bytes=0, current_bytes=gib(5.2), generations=1, most=("llama3.1:8b", 1))
    assert leak_event("ollama", LINGERING, growth).reason == (
        "0.0 GiB -> 5.2 GiB held by its runners though it lists no model for 60 s: +5325 MiB; last loaded: llama3.1:8b"
    )
    assert leak_event("ollama", LINGERING, replace(growth, most=None)).reason.endswith("+5325 MiB")


@pytest.mark.parametrize(
    ("files", "name"),
    [
        ([], ""),
        ([("vae", "ae.safetensors"), ("diffusion_models", "video/wan2.1.safetensors")], "wan2.1.safetensors"),
        ([("loras", "a.safetensors"), ("checkpoints", "sd\\xl.safetensors")], "xl.safetensors"),
        ([("vae", "ae.safetensors"), (None, "flux.gguf")], "flux.gguf"),
        ([("upscale_models", "4x.pth")], "4x.pth"),
    ],
)
def test_a_workflow_is_known_by_what_makes_its_pictures(files: list[tuple[str | None, str]], name: str) -> None:
    facts = WorkflowFacts(files=frozenset(LoaderFile(folder=folder, name=file) for folder, file in files))
    assert known_as(facts) == name
