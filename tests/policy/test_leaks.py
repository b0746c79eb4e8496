"""A leak is what stays and grows; what comes back down is none."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.policy.worlds import GIB, MIB, gib, gpu, gpus, second
from vram_manager.domain.event import EventType
from vram_manager.domain.reading import Missing
from vram_manager.domain.snapshot import Gpus
from vram_manager.domain.worker import Generation, Generations, Held, Leak, Measure, Report, Trend
from vram_manager.policy import Rules
from vram_manager.policy.leaks import began, ended, grown, held, leak_event

RULES = Rules()
# The first 5 warm up, the next 5 are the baseline, 100 more and it is compared.
FIRST_LOOK = 110


def allocated(size: float) -> Held:
    return Held(bytes=round(size), measure=Measure.ALLOCATED)


def leaks_of(sizes: Iterable[float], rules: Rules = RULES) -> list[tuple[int, Leak]]:
    """The leaks that show, with the count of the generation at which they do."""
    trend, found = Trend(), []
    for count, size in enumerate(sizes, 1):
        trend, leak = grown(trend, allocated(size), rules)
        if leak is not None:
            found.append((count, leak))
            assert trend.leak is leak
    return found


# The scenarios of a pipeline with fixed budgets.


def test_a_hundred_generations_that_keep_less_than_100_mib_more_are_no_leak() -> None:
    assert leaks_of(gib(10.8) + 0.9 * MIB * n for n in range(1, FIRST_LOOK + 1)) == []


def test_a_hundred_generations_that_keep_more_are_a_leak() -> None:
    ((count, leak),) = leaks_of(gib(10.8) + 2 * MIB * n for n in range(1, FIRST_LOOK + 1))
    assert count == FIRST_LOOK
    assert leak == Leak(
        initial_bytes=gib(10.8) + 12 * MIB,
        current_bytes=gib(10.8) + 212 * MIB,
        delta_bytes=200 * MIB,
        generations=100,
        delta_per_generation_bytes=2 * MIB,
    )


def test_a_leak_is_told_in_numbers() -> None:
    leak = Leak(
        initial_bytes=gib(10.8),
        current_bytes=gib(11.0),
        delta_bytes=200 * MIB,
        generations=100,
        delta_per_generation_bytes=2 * MIB,
    )
    event = leak_event("worker-1", leak, Measure.ALLOCATED)
    assert (event.type, event.target) == (EventType.LEAK, "worker:worker-1")
    assert event.reason == "10.8 GiB -> 11.0 GiB kept after 100 generations: +200 MiB, 2.0 MiB each"
    assert leak_event("worker-1", leak, Measure.GPU).reason == (
        f"{event.reason} (measured on the whole GPU: it says nothing of its own memory)"
    )


def test_a_generation_answers_what_it_left_behind() -> None:
    known = began(Generations(), "slot-1", allocated(10.8 * GIB))
    known, answer = ended(known, "slot-1", allocated(11.3 * GIB), RULES)
    assert answer == Generation(delta_bytes=gib(11.3) - gib(10.8), generations=1)
    assert (known.count, known.last_delta_bytes) == (1, gib(11.3) - gib(10.8))


# When a leak shows.


@pytest.mark.parametrize(
    ("grows", "leaks"), [pytest.param(100, 0, id="at the threshold"), pytest.param(101, 1, id="over it")]
)
def test_only_growth_over_the_threshold_is_a_leak(grows: int, leaks: int) -> None:
    sizes = [GIB] * 50 + [GIB + grows * MIB] * (FIRST_LOOK - 50)
    assert len(leaks_of(sizes)) == leaks


@pytest.mark.parametrize(
    ("kept", "leaks"), [pytest.param(50, 0, id="half the threshold"), pytest.param(51, 1, id="more than half")]
)
def test_the_newest_half_must_have_kept_half_of_it_throughout(kept: int, leaks: int) -> None:
    sizes = [GIB] * 60 + [GIB + kept * MIB] * 45 + [GIB + 200 * MIB] * 5
    assert len(leaks_of(sizes)) == leaks


def test_a_leak_is_told_again_only_after_the_same_growth_again() -> None:
    found = leaks_of(GIB + 2 * MIB * n for n in range(1, 351))
    assert [count for count, _ in found] == [110, 210, 310]
    assert [leak.delta_bytes for _, leak in found[1:]] == [200 * MIB] * 2


def test_growth_that_stops_is_told_once() -> None:
    sizes = [GIB + min(2 * MIB * n, 220 * MIB) for n in range(1, 2000)]
    assert len(leaks_of(sizes)) == 1


def test_growth_in_the_warm_up_is_no_leak() -> None:
    assert leaks_of([0, GIB, 2 * GIB, 3 * GIB, 4 * GIB] + [5 * GIB] * 500) == []


def test_a_model_loaded_on_the_way_is_told_only_once_it_has_stayed() -> None:
    found = leaks_of([GIB] * (FIRST_LOOK - 5) + [2 * GIB] * 100)
    assert [count for count, _ in found] == [FIRST_LOOK + 50]


@pytest.mark.parametrize("generations", [10, 11, 33, 100, 101])
def test_the_first_comparison_is_after_as_many_generations_as_set(generations: int) -> None:
    rules = replace(RULES, leak_generations=generations)
    grows = 3 * RULES.leak_threshold_bytes / generations
    found = leaks_of((GIB + grows * n for n in range(1, 10 + generations + 1)), rules)
    assert [(count, leak.generations) for count, leak in found] == [(10 + generations, generations)]


def test_a_spike_after_one_generation_is_no_leak() -> None:
    sizes = [GIB] * 300
    for spike in (109, 110, 160):
        sizes[spike - 1] = 9 * GIB
    assert leaks_of(sizes) == []


def test_a_restarted_worker_warms_up_again() -> None:
    before = [6 * GIB] * 60
    after = [GIB, 2 * GIB, 3 * GIB, 4 * GIB, 5 * GIB] + [6 * GIB] * 300
    assert leaks_of(before + after) == []


def test_a_restarted_worker_that_leaks_is_found_again() -> None:
    leaking = [GIB + 2 * MIB * n for n in range(1, FIRST_LOOK + 1)]
    assert [count for count, _ in leaks_of(leaking + leaking)] == [FIRST_LOOK, 2 * FIRST_LOOK]


def test_a_restart_takes_the_leak_away() -> None:
    trend = Trend(measure=Measure.ALLOCATED, count=50, newest_bytes=(GIB,) * 5, baseline_bytes=GIB)
    trend = replace(trend, leak=Leak(initial_bytes=0, current_bytes=0, delta_bytes=0, generations=1,
                                     delta_per_generation_bytes=0))  # fmt: skip
    after, _ = grown(trend, allocated(GIB - 101 * MIB), RULES)
    assert (after.leak, after.baseline_bytes, after.count) == (None, None, 1)
    after, _ = grown(trend, allocated(GIB - 100 * MIB), RULES)
    assert (after.leak, after.baseline_bytes, after.count) == (trend.leak, GIB - 100 * MIB, 51)


def test_what_is_measured_otherwise_is_not_compared() -> None:
    trend = Trend()
    for _ in range(60):
        trend, _ = grown(trend, allocated(GIB), RULES)
    trend, _ = grown(trend, Held(bytes=GIB, measure=Measure.RESERVED), RULES)
    assert trend == Trend(measure=Measure.RESERVED, count=1)


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(0, RULES.leak_threshold_bytes), min_size=1, max_size=400),
    base=st.integers(0, 20 * GIB),
    generations=st.integers(10, 120),
)
def test_what_stays_within_the_threshold_is_never_a_leak(sizes: list[int], base: int, generations: int) -> None:
    rules = replace(RULES, leak_generations=generations)
    assert leaks_of([base + size for size in sizes], rules) == []


@settings(deadline=None)
@given(
    generations=st.integers(10, 120),
    share=st.floats(0, 1),
    shift=st.integers(0, 200),
    height=st.integers(0, 20 * GIB),
)
def test_a_sawtooth_is_never_a_leak_however_high(generations: int, share: float, shift: int, height: int) -> None:
    half = max(5, generations // 2)
    period = 1 + round(share * (half - 1))
    rules = replace(RULES, leak_generations=generations)
    teeth = [GIB + height * ((n + shift) % period) // period for n in range(6 * generations + 60)]
    assert leaks_of(teeth, rules) == []


@settings(deadline=None)
@given(
    generations=st.integers(10, 120),
    over=st.integers(1, 10 * MIB),
    base=st.integers(0, 20 * GIB),
)
def test_steady_growth_over_the_threshold_is_always_found_at_the_first_comparison(
    generations: int, over: int, base: int
) -> None:
    grows = RULES.leak_threshold_bytes // generations + over
    rules = replace(RULES, leak_generations=generations)
    found = leaks_of((base + grows * n for n in range(1, 10 + generations + 1)), rules)
    assert [count for count, _ in found] == [10 + generations]


@settings(deadline=None)
@given(slower=st.floats(1, 8), base=st.integers(0, 20 * GIB))
def test_steady_growth_that_is_slower_is_found_once_it_adds_up(slower: float, base: int) -> None:
    grows = 101 * MIB / 100 / slower
    found = leaks_of(base + grows * n for n in range(1, 10 + round(100 * slower) + 60))
    assert len(found) == 1


# What a worker holds.


@pytest.mark.parametrize(
    ("report", "seen", "found"),
    [
        pytest.param(
            Report(allocated_bytes=1, reserved_bytes=2),
            gpus(gpu()),
            Held(bytes=1, measure=Measure.ALLOCATED),
            id="allocated first",
        ),
        pytest.param(Report(reserved_bytes=2), gpus(gpu()), Held(bytes=2, measure=Measure.RESERVED), id="its pool"),
        pytest.param(Report(allocated_bytes=0), gpus(gpu()), Held(bytes=0, measure=Measure.ALLOCATED), id="nothing"),
        pytest.param(
            Report(), gpus(gpu(free_gib=14)), Held(bytes=10 * GIB, measure=Measure.GPU), id="else the only GPU"
        ),
        pytest.param(Report(), gpus(gpu(), second()), None, id="several GPUs tell nothing"),
        pytest.param(Report(), gpus(gpu(free_gib=Missing("lost"))), None, id="a GPU that cannot be read"),
        pytest.param(Report(), Missing("lost"), None, id="no GPU"),
    ],
)
def test_what_a_worker_holds_is_its_own_word_first(report: Report, seen: Gpus | Missing, found: Held | None) -> None:
    assert held(report, seen) == found


# Calls that come twice, late, or never.


def test_an_end_without_a_start_counts_and_has_no_delta() -> None:
    known, answer = ended(Generations(), "slot-1", allocated(GIB), RULES)
    assert answer == Generation(delta_bytes=None, generations=1)
    assert known.trend.count == 1


@pytest.mark.parametrize(
    ("start", "end"),
    [
        pytest.param(None, allocated(GIB), id="start not known"),
        pytest.param(allocated(GIB), None, id="end not known"),
        pytest.param(allocated(GIB), Held(bytes=2 * GIB, measure=Measure.RESERVED), id="measured otherwise"),
    ],
)
def test_a_delta_of_what_is_not_known_is_not_known(start: Held | None, end: Held | None) -> None:
    known, answer = ended(began(Generations(), "slot-1", start), "slot-1", end, RULES)
    assert answer == Generation(delta_bytes=None, generations=1)
    assert known.trend.count == (0 if end is None else 1)


def test_a_second_start_is_a_retry() -> None:
    known = began(Generations(), "slot-1", allocated(GIB))
    assert began(known, "slot-1", allocated(2 * GIB)) is known


def test_a_second_end_is_answered_like_the_first_and_changes_nothing() -> None:
    known = began(Generations(), "slot-1", allocated(GIB))
    known, first = ended(known, "slot-1", allocated(2 * GIB), RULES)
    again, second_answer = ended(known, "slot-1", allocated(5 * GIB), RULES)
    assert second_answer == first
    assert again is known


def test_a_leak_is_in_the_answer_of_a_retry_too() -> None:
    known = Generations()
    for n in range(1, FIRST_LOOK + 1):
        known, answer = ended(known, f"slot-{n}", allocated(GIB + 2 * MIB * n), RULES)
    assert answer.leak is not None
    assert ended(known, f"slot-{FIRST_LOOK}", None, RULES) == (known, answer)


def test_an_id_that_begins_again_is_a_new_generation() -> None:
    known = Generations()
    for size in (1, 3):
        known = began(known, "1", allocated(size * GIB))
        known, answer = ended(known, "1", allocated(2 * size * GIB), RULES)
    assert answer == Generation(delta_bytes=3 * GIB, generations=2)


def test_thousands_of_starts_without_an_end_forget_the_oldest() -> None:
    known = Generations()
    for n in range(5000):
        known = began(known, str(n), allocated(GIB))
    assert list(known.open) == [str(n) for n in range(5000 - 64, 5000)]
    known, answer = ended(known, "0", allocated(GIB), RULES)
    assert (answer.delta_bytes, answer.generations) == (None, 1)
    _, answer = ended(known, "4999", allocated(2 * GIB), RULES)
    assert answer.delta_bytes == GIB


def test_ended_generations_are_forgotten_too() -> None:
    known = Generations()
    for n in range(200):
        known, _ = ended(known, str(n), None, RULES)
    assert len(known.ended) == 64


calls = st.lists(st.tuples(st.booleans(), st.sampled_from("abc"), st.integers(0, 4).map(lambda n: n * GIB)))


@given(calls)
def test_a_call_that_is_sent_twice_is_a_call_that_is_sent_once(days: list[tuple[bool, str, int]]) -> None:
    once = twice = Generations()
    for starts, key, size in days:
        if starts:
            once = began(once, key, allocated(size))
            twice = began(began(twice, key, allocated(size)), key, allocated(size))
        else:
            once, answer = ended(once, key, allocated(size), RULES)
            twice, first = ended(twice, key, allocated(size), RULES)
            twice, again = ended(twice, key, allocated(size), RULES)
            assert answer == first == again
        assert once == twice
