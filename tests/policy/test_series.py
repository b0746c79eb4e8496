"""From moments to means: nothing that was high is lost, and what was not known is never drawn."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vram_manager.domain.sample import Device, GpuSeries, GpuUse, Level, Sample
from vram_manager.policy.series import (
    COLUMNS,
    MOST_POINTS,
    MOST_TENANTS,
    MOVED_BYTES,
    folded,
    in_columns,
    moved,
    pieces,
    plan,
    queue_in_columns,
    with_peaks,
    without_peaks,
)

MIB, GIB = 2**20, 2**30
TOTAL = 24 * GIB
CARD = Device(uuid="GPU-a", index=0, name="Card", total_bytes=TOTAL, reserved_bytes=0)
HOLD = 90.0
DAY, HOUR = 86400, 3600


def use(
    *,
    leased: int = 0,
    utilization: float | None = None,
    celsius: float | None = None,
    power: float | None = None,
    peak: int | None = None,
    **has: int,
) -> GpuUse:
    """A moment of a card where these have their bytes; `peak` is the most since the one before."""
    taken = sum(has.values())
    most = taken if peak is None else max(taken, peak)
    tenants = {f"worker worker:{name}": size for name, size in has.items()}
    return GpuUse(0.0, taken, most, TOTAL - taken, TOTAL - most, leased, utilization, celsius, power, tenants, {})


UNREADABLE = GpuUse(0.0, None, None, None, None, 0, 50.0, None, None, {}, {})
NOTHING = Sample(0, None, {})


def sample(at: float, one: GpuUse | None = None, *, queue: int | None = None) -> Sample:
    return Sample(at, queue, {} if one is None else {1: one})


def steps(step: int, *moments: Sample, until: float | None = None) -> list[Sample]:
    return folded(pieces(moments, moments[-1].at if until is None else until, step, HOLD), step)


def columns(step: int, *moments: Sample, until: float | None = None) -> GpuSeries:
    return in_columns(steps(step, *moments, until=until), 1, CARD, step)


sizes = st.integers(0, 4 * GIB)
uses = st.builds(
    use,
    peak=st.one_of(st.none(), st.integers(0, TOTAL)),
    leased=sizes,
    utilization=st.one_of(st.none(), st.floats(0, 100)),
    power=st.one_of(st.none(), st.floats(0, 600)),
    a=sizes,
    b=sizes,
    c=sizes,
)


@st.composite
def days(draw: st.DrawFn) -> list[Sample]:
    """Moments of one card in order, some with nothing known, some long after the one before."""
    at, found = draw(st.floats(0, 3600)), []
    for waited in draw(st.lists(st.sampled_from((0.001, 0.5, 1.0, 7.3, 60.0, 89.9, 90.0, 91.0, 700.0)), max_size=30)):
        at += waited
        one = draw(st.one_of(uses, uses, uses, st.sampled_from((None, UNREADABLE))))
        found.append(sample(at, one, queue=draw(st.one_of(st.none(), st.integers(0, 9)))))
    return found


def test_a_mean_is_weighted_by_how_long_each_moment_was_true() -> None:
    (minute,) = steps(60, sample(0, use(a=8 * GIB, leased=40)), sample(15, use(a=4 * GIB)), until=60)

    found = minute.gpus[1]
    assert found.taken_bytes == 5 * GIB
    assert found.taken_max_bytes == 8 * GIB
    assert found.free_bytes == TOTAL - 5 * GIB
    assert found.free_min_bytes == TOTAL - 8 * GIB
    assert found.leased_bytes == 10
    assert found.tenants == {"worker worker:a": 5 * GIB}
    assert found.peaks == {"worker worker:a": 8 * GIB}
    assert found.seconds == 60


def test_a_tenant_that_was_there_for_half_the_time_has_half_in_the_mean() -> None:
    (minute,) = steps(60, sample(0, use(a=2 * GIB)), sample(30, use(a=2 * GIB, b=4 * GIB)), until=60)

    assert minute.gpus[1].tenants == {"worker worker:a": 2 * GIB, "worker worker:b": 2 * GIB}


def test_a_moment_is_true_for_ninety_seconds_and_then_nothing_is_known() -> None:
    found = columns(30, sample(0, use(a=GIB)), sample(300, use(a=2 * GIB)), until=330)

    assert found.at == [0, 30, 60, 90, 300]
    assert found.columns["taken_bytes"] == [GIB, GIB, GIB, None, 2 * GIB]
    assert found.tenants[0].bytes == [GIB, GIB, GIB, None, 2 * GIB]


def test_a_gap_is_one_step_in_which_nothing_at_all_is_known() -> None:
    found = columns(10, sample(0, use(a=GIB, leased=1)), sample(10), sample(700, use(b=GIB)), until=710)

    assert found.at == [0, 10, 700]
    assert {name: values[1] for name, values in found.columns.items()} == dict.fromkeys(COLUMNS)
    assert [(one.tenant, one.bytes, one.max_bytes) for one in found.tenants] == [
        ("worker:a", [GIB, None, 0], [GIB, None, 0]),
        ("worker:b", [0, None, GIB], [0, None, GIB]),
    ]


def test_where_only_the_memory_cannot_be_read_the_rest_is_told() -> None:
    found = columns(10, sample(0, use(a=GIB, utilization=10)), sample(10, UNREADABLE), until=20)

    assert found.columns["taken_bytes"] == [GIB, None]
    assert found.columns["utilization_percent"] == [10, 50]
    assert found.tenants[0].bytes == [GIB, None]


def test_a_gauge_that_was_known_for_a_while_has_the_mean_of_that_while() -> None:
    (minute,) = steps(
        60, sample(0, use(a=1, utilization=80, power=100)), sample(15, use(a=1, power=20, celsius=70)), until=60
    )

    assert minute.gpus[1].utilization_percent == 80
    assert minute.gpus[1].power_watts == 40
    assert minute.gpus[1].temperature_celsius == 70


def test_the_peak_since_the_moment_before_counts_where_that_moment_was_seen_and_not_again() -> None:
    found = columns(10, sample(5, use(a=GIB, peak=20 * GIB)), until=25)

    assert found.columns["taken_max_bytes"] == [20 * GIB, GIB, GIB]
    assert found.columns["free_min_bytes"] == [4 * GIB, 23 * GIB, 23 * GIB]


def test_a_moment_that_was_over_at_once_is_not_lost() -> None:
    found = columns(10, sample(5, use(a=9 * GIB)), sample(5, use(a=GIB)), until=10)

    assert found.columns["taken_max_bytes"] == [9 * GIB]
    assert found.columns["taken_bytes"][0] == pytest.approx(GIB, rel=0.01)


def test_a_wall_clock_that_was_put_back_gives_no_negative_time() -> None:
    (minute,) = steps(60, sample(10, use(a=GIB)), until=-500)

    assert minute.gpus[1].taken_bytes == GIB
    assert minute.gpus[1].seconds > 0


def test_the_queue_of_a_step_is_its_longest() -> None:
    found = steps(10, sample(0, queue=1), sample(3, queue=4), sample(5, queue=2), sample(10), sample(40, queue=0))

    assert queue_in_columns(found, 10) == ([0, 10, 40], [4, None, 0])


def test_of_many_tenants_the_largest_are_told_by_name_and_the_rest_are_others() -> None:
    many = {f"t{number:03}": number * MIB for number in range(1, MOST_TENANTS + 10)}
    tenants = {"others others": MIB} | {f"process process:{name}": size for name, size in many.items()}
    taken = sum(tenants.values())
    crowd = GpuUse(0.0, taken, taken, TOTAL - taken, TOTAL - taken, 0, None, None, None, tenants, {})

    found = columns(10, sample(0, crowd), until=10)

    assert len(found.tenants) == MOST_TENANTS
    assert sum(one.bytes[0] or 0 for one in found.tenants) == taken
    assert min(one.bytes[0] or 0 for one in found.tenants if one.kind == "process") == 11 * MIB


@settings(max_examples=50, deadline=None)
@given(days(), st.sampled_from((1, 5, 60, 3600)))
def test_a_mean_is_never_outside_of_what_was_seen_and_tenants_add_up(moments: list[Sample], step: int) -> None:
    for one in folded(pieces(moments, math.inf, step, HOLD), step):
        for found in one.gpus.values():
            if found.taken_bytes is None:
                assert found.taken_max_bytes is found.free_bytes is found.free_min_bytes is None
                assert found.tenants == {}
                continue
            assert found.taken_max_bytes is not None
            assert found.free_bytes is not None
            assert found.free_min_bytes is not None
            assert 0 <= found.taken_bytes <= found.taken_max_bytes
            assert found.free_min_bytes <= found.free_bytes <= TOTAL
            assert abs(sum(found.tenants.values()) - found.taken_bytes) <= 2 + len(found.tenants)
            assert all(peak > found.tenants[name] for name, peak in found.peaks.items())


@settings(max_examples=50, deadline=None)
@given(days())
def test_the_highest_and_the_lowest_of_an_hour_are_those_of_its_moments_through_all_levels(
    moments: list[Sample],
) -> None:
    minutes = folded(pieces(moments, math.inf, 60, HOLD), 60)
    hours = folded(((one.at, one, None) for one in minutes), 3600)

    for hour in hours:
        within = [one.gpus[1] for one in moments if one.at // 3600 * 3600 == hour.at and 1 in one.gpus]
        # What was true when the hour began counts too.
        before = [one for one in moments if one.at < hour.at][-1:]
        within += [one.gpus[1] for one in map(without_peaks, before) if 1 in one.gpus and one.at + HOLD > hour.at]
        highest = [one.taken_max_bytes for one in within if one.taken_max_bytes is not None]
        if 1 in hour.gpus and highest:
            assert hour.gpus[1].taken_max_bytes == max(highest)
            assert hour.gpus[1].free_min_bytes == TOTAL - max(highest)


@settings(max_examples=50, deadline=None)
@given(days())
def test_an_hour_made_of_minutes_is_the_hour_made_of_moments(moments: list[Sample]) -> None:
    minutes = folded(pieces(moments, math.inf, 60, HOLD), 60)
    made = folded(((one.at, one, None) for one in minutes), 3600)

    for one, other in zip(made, folded(pieces(moments, math.inf, 3600, HOLD), 3600), strict=True):
        assert (one.at, one.queue) == (other.at, other.queue)
        for number, found in one.gpus.items():
            expected = other.gpus[number]
            if found.taken_bytes is not None and expected.taken_bytes is not None:
                assert found.taken_bytes == pytest.approx(expected.taken_bytes, abs=2, rel=1e-6)
                assert found.taken_max_bytes == expected.taken_max_bytes


@settings(max_examples=50, deadline=None)
@given(days(), st.sampled_from((1, 10, 60)))
def test_no_value_is_ever_told_for_a_time_of_which_nothing_is_known(moments: list[Sample], step: int) -> None:
    found = in_columns(folded(pieces(moments, math.inf, step, HOLD), step), 1, CARD, step)
    true = [
        (one.at, min(one.at + HOLD, math.inf if after is None else after.at))
        for one, after in pairwise((*moments, None))
        if one is not None and 1 in one.gpus
    ]

    assert found.at == sorted(set(found.at))
    for at, *values in zip(found.at, *found.columns.values(), strict=True):
        known = any(begin < at + step and (end > at or begin >= at) for begin, end in true)
        assert known == any(value is not None for value in values)
    for at, after in pairwise(found.at):
        gap = found.columns["leased_bytes"][found.at.index(at)] is None
        assert after - at == step or gap


def test_sixteen_mebibytes_are_worth_a_moment_and_less_is_not() -> None:
    before = sample(0, use(a=8 * GIB, b=8 * GIB), queue=0)

    def differs(one: GpuUse, queue: int = 0) -> bool:
        return moved(before, sample(1, one, queue=queue))

    assert not differs(use(a=8 * GIB + MOVED_BYTES - 1, b=8 * GIB, utilization=100))
    assert differs(use(a=8 * GIB + MOVED_BYTES, b=8 * GIB))
    assert differs(use(a=8 * GIB + MOVED_BYTES, b=8 * GIB - MOVED_BYTES))
    assert differs(use(a=8 * GIB, b=8 * GIB, c=MOVED_BYTES))
    assert differs(use(a=16 * GIB))
    assert differs(use(a=8 * GIB, b=8 * GIB, leased=MOVED_BYTES))
    assert differs(use(a=8 * GIB, b=8 * GIB, peak=16 * GIB + MOVED_BYTES))
    assert differs(use(a=8 * GIB, b=8 * GIB), queue=1)


def test_a_card_that_comes_goes_or_falls_silent_is_worth_a_moment() -> None:
    seen = sample(0, use(a=GIB))

    assert moved(seen, sample(1))
    assert moved(sample(1), seen)
    assert moved(seen, sample(1, UNREADABLE))
    assert moved(sample(0, UNREADABLE), seen)
    assert not moved(sample(0, UNREADABLE), sample(1, UNREADABLE))


def test_what_went_up_and_down_between_two_moments_is_in_the_extremes_of_the_second() -> None:
    now = sample(2, use(a=GIB))
    for between in (use(a=4 * GIB), use(a=GIB, b=2 * GIB), use(a=GIB // 2)):
        now = with_peaks(sample(0, between), now)

    found = now.gpus[1]
    assert (found.taken_bytes, found.taken_max_bytes, found.free_min_bytes) == (GIB, 4 * GIB, 20 * GIB)
    (minute,) = steps(60, now, until=60)
    assert minute.gpus[1].taken_bytes == GIB


def test_the_extremes_of_each_tenant_are_kept_too() -> None:
    now = with_peaks(sample(0, use(a=4 * GIB, b=2 * GIB)), sample(1, use(a=GIB)))

    again = with_peaks(now, sample(2, use(a=3 * GIB, b=3 * GIB)))
    assert now.gpus[1].peaks == {"worker worker:a": 4 * GIB, "worker worker:b": 2 * GIB}
    assert again.gpus[1].peaks == {"worker worker:a": 4 * GIB}
    (minute,) = steps(60, now, until=60)
    assert minute.gpus[1].tenants == {"worker worker:a": GIB, "worker worker:b": 0}
    assert minute.gpus[1].peaks == {"worker worker:a": 4 * GIB, "worker worker:b": 2 * GIB}


def test_a_card_that_was_not_there_or_silent_before_has_only_the_extremes_of_now() -> None:
    now = sample(1, use(a=GIB))

    assert with_peaks(NOTHING, now) == now
    assert with_peaks(sample(0, UNREADABLE), now) == now
    assert with_peaks(now, sample(2, UNREADABLE)) == sample(2, UNREADABLE)


EVERYTHING = {Level.RAW: 0.0, Level.MINUTE: 0.0, Level.HOUR: 0.0}


@pytest.mark.parametrize(
    ("seconds", "asked", "planned"),
    [
        (HOUR, None, (Level.RAW, 10)),
        (2 * HOUR, None, (Level.RAW, 30)),
        (2 * HOUR, 5, (Level.RAW, 5)),
        (3 * HOUR, None, (Level.RAW, 30)),
        (5 * HOUR, None, (Level.MINUTE, 60)),
        (6 * HOUR, None, (Level.MINUTE, 60)),
        (DAY, None, (Level.MINUTE, 300)),
        (7 * DAY, None, (Level.HOUR, 3600)),
        (31 * DAY, None, (Level.HOUR, 7200)),
        (7 * DAY, 900, (Level.MINUTE, 900)),
        (HOUR, 1, (Level.RAW, 5)),
        (HOUR, 90, (Level.MINUTE, 120)),
        (DAY, 4000, (Level.HOUR, 7200)),
        (0.001, None, (Level.RAW, 1)),
    ],
)
def test_the_step_and_the_level_follow_from_the_window(
    seconds: float, asked: int | None, planned: tuple[Level, int]
) -> None:
    assert plan(1e6, 1e6 + seconds, asked, EVERYTHING) == planned


@settings(deadline=None)
@given(st.floats(-1e10, 1e10), st.floats(0.001, 1e11), st.one_of(st.none(), st.integers(1, 31 * DAY)))
def test_an_answer_never_has_more_than_1500_points(begin: float, seconds: float, asked: int | None) -> None:
    end = begin + seconds
    level, step = plan(begin, end, asked, EVERYTHING)

    assert step % level.seconds == 0
    assert math.ceil(end / step) - math.floor(begin / step) <= MOST_POINTS
    assert asked is None or step >= asked


def test_what_the_finer_level_has_forgotten_the_coarser_one_tells() -> None:
    now = 100.0 * DAY
    reach = {Level.RAW: now - DAY, Level.MINUTE: now - 10 * DAY, Level.HOUR: now - 31 * DAY}

    assert plan(now - HOUR, now, None, reach) == (Level.RAW, 10)
    assert plan(now - 3 * DAY, now - 3 * DAY + HOUR, None, reach) == (Level.MINUTE, 60)
    assert plan(now - 20 * DAY, now - 20 * DAY + HOUR, None, reach) == (Level.HOUR, 3600)
    assert plan(now - 90 * DAY, now - 90 * DAY + HOUR, None, reach)[0] is Level.RAW


def test_a_history_that_has_just_begun_is_told_in_moments() -> None:
    now = 100.0 * DAY
    reach = {Level.RAW: now - 500, Level.MINUTE: now - 559, Level.HOUR: now - 3600}

    assert plan(now - HOUR, now, None, reach) == (Level.RAW, 10)
    assert plan(now - HOUR, now, None, {}) == (Level.RAW, 10)


@pytest.mark.parametrize(
    ("hours", "gpus", "asked", "planned"),
    [
        pytest.param(2, 1, None, (Level.RAW, 30), id="one GPU"),
        pytest.param(1, 8, None, (Level.RAW, 10), id="an hour of eight"),
        pytest.param(2, 8, None, (Level.MINUTE, 60), id="two hours of eight"),
        pytest.param(2, 8, 15, (Level.RAW, 15), id="as asked for"),
        pytest.param(24, 8, None, (Level.MINUTE, 300), id="minutes do anyway"),
    ],
)
def test_moments_of_many_gpus_are_told_by_the_minute_unless_they_are_asked_for(
    hours: float, gpus: int, asked: int | None, planned: tuple[Level, int]
) -> None:
    assert plan(1e6, 1e6 + hours * HOUR, asked, EVERYTHING, gpus) == planned
