"""Soft and hard limits: told once an excursion lasts, answered before the allocation, by numbers that are known."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.policy.worlds import GIB, MIB, gib, gpu, gpus, second
from vram_manager.domain.demand import Demand, Kind
from vram_manager.domain.event import Event, EventType
from vram_manager.domain.reading import Missing
from vram_manager.domain.size import Size
from vram_manager.domain.snapshot import Gpu, Gpus
from vram_manager.domain.worker import AtHardLimit, Check, Excursion, Fit, Level, Report, Worker
from vram_manager.policy import Rules
from vram_manager.policy.limits import Ask, check, chosen, demand, fit, foretold, relaxed, watched

# The card of a pipeline with fixed budgets: 12 GiB, a warning above 11.0 and a stop above 11.5.
RULES = Rules(soft_limit=Size(bytes=11 * GIB), hard_limit=Size(bytes=gib(11.5)))
AT_ONCE = replace(RULES, soft_limit_seconds=0.0)
LOST = Missing("the driver is gone")


def card(used_gib: float | Missing) -> Gpu:
    return gpu(total_gib=12, free_gib=used_gib if isinstance(used_gib, Missing) else 12 - used_gib)


class Desk:
    """The limits with their memory: workers ask, and the daemon looks."""

    def __init__(self, rules: Rules = RULES) -> None:
        self.rules = rules
        self.workers: dict[str, Worker] = {}
        self.excursions: dict[str, Excursion] = {}
        self.told: list[Event] = []

    def ask(
        self,
        at: float,
        used_gib: float,
        *,
        requested_gib: float = 0,
        reported_gib: float | None = None,
        owner: str = "worker-1",
        context: str = "",
    ) -> Check:
        place = card(used_gib)
        reported = None if reported_gib is None else gib(reported_gib)
        worker = self.workers.get(owner, Worker(owner=owner, seen_at=at))
        if reported is not None:
            worker = replace(worker, report=Report(reserved_bytes=reported), reported_at=at)
        ask = Ask(owner=owner, requested_bytes=gib(requested_gib), reported_bytes=reported, context=context)
        theirs = foretold(self.workers.values()).get(place.uuid)
        checked = check(ask, place, worker, self.excursions.pop(place.uuid, None), theirs, at, self.rules)
        self.workers[owner] = checked.worker
        if checked.excursion is not None:
            self.excursions[place.uuid] = checked.excursion
        self.told += checked.events
        return checked.check

    def look(self, at: float, used_gib: float | Missing) -> list[Event]:
        return self.look_at(at, gpus(card(used_gib)))

    def look_at(self, at: float, seen: Gpus | Missing) -> list[Event]:
        self.excursions, events = watched(self.excursions, foretold(self.workers.values()), seen, at, self.rules)
        self.workers = {owner: relaxed(worker, seen, at, self.rules) for owner, worker in self.workers.items()}
        self.told += events
        return events

    def demand(self, at: float, owner: str = "worker-1") -> Demand | None:
        return demand(self.workers[owner], at)

    @property
    def soft(self) -> list[Event]:
        return [event for event in self.told if event.type is EventType.SOFT_LIMIT]

    @property
    def hard(self) -> list[Event]:
        return [event for event in self.told if event.type is EventType.HARD_LIMIT]


# The scenarios of a pipeline with fixed budgets.


def test_normal_operation_within_the_limits_says_nothing() -> None:
    desk = Desk(AT_ONCE)
    for at, used in enumerate((10.5, 10.9, 11.0, 10.7)):
        desk.look(at, used)
        answer = desk.ask(at, used)
        assert (answer.level, answer.sustained) == (Level.OK, False)
    assert desk.told == []
    assert answer.message == "10.7 GiB used of 11.0 GiB soft limit on GPU 0"
    assert (answer.used_bytes, answer.soft_limit_bytes, answer.hard_limit_bytes) == (gib(10.7), 11 * GIB, gib(11.5))
    assert (answer.requested_bytes, answer.gpu) == (0, "GPU-a")


def test_an_allocation_that_passes_the_soft_limit_warns_and_goes_on() -> None:
    desk = Desk(AT_ONCE)
    assert desk.ask(0, 10.8).level is Level.OK
    answer = desk.ask(1, 11.3, context="before vae decode")
    assert (answer.level, answer.sustained) == (Level.SOFT, True)
    (event,) = desk.told
    assert (event.type, event.target, event.gpu) == (EventType.SOFT_LIMIT, "worker:worker-1", "GPU-a")
    assert event.reason == "11.3 GiB used of 11.0 GiB soft limit on GPU 0 (+0.3 GiB), before vae decode"
    assert answer.message == event.reason


def test_an_allocation_that_would_pass_the_hard_limit_is_answered_before_it_is_made() -> None:
    desk = Desk()
    answer = desk.ask(0, 11.2, requested_gib=0.8)
    assert (answer.level, answer.requested_bytes) == (Level.HARD, gib(0.8))
    assert answer.message == "11.2 GiB used + 0.8 GiB requested > 11.5 GiB hard limit on GPU 0"
    (event,) = desk.told
    assert (event.type, event.target, event.gpu) == (EventType.HARD_LIMIT, "worker:worker-1", "GPU-a")
    assert event.reason == answer.message


def test_models_and_buffers_within_the_budget_fit() -> None:
    found = fit("director", {"flux": 6 * GIB, "liveportrait": gib(3.5)}, {"video": GIB}, {}, gib(11.8))
    assert (found.models_bytes, found.buffers_bytes, found.total_bytes) == (gib(9.5), GIB, gib(10.5))
    assert (found.fits, found.shortfall_bytes, found.over_budget) == (True, 0, ())
    assert found.message == "9.5 GiB in models + 1.0 GiB in buffers, within the budget of 11.8 GiB"


def test_a_model_over_its_own_budget_is_named() -> None:
    budgets = {"flux": 6 * GIB, "kokoro": GIB, "unknown": GIB}
    found = fit("director", {"flux": gib(6.5), "kokoro": GIB, "clip": GIB}, {}, budgets, None)
    (over,) = found.over_budget
    assert (over.name, over.bytes, over.budget_bytes) == ("flux", gib(6.5), 6 * GIB)
    assert found.message.endswith("; flux is over its budget: 6.5 GiB of 6.0 GiB")


def test_buffers_that_do_not_fit_are_told_before_they_are_allocated() -> None:
    found = fit("director", {"flux": 11 * GIB}, {"actor": GIB, "audio": GIB}, {}, gib(11.8))
    assert (found.fits, found.shortfall_bytes) == (False, 13 * GIB - gib(11.8))
    assert found.message == "11.0 GiB in models + 2.0 GiB in buffers, 1.2 GiB over the budget of 11.8 GiB"


@pytest.mark.parametrize(
    ("buffers", "fits"), [pytest.param(GIB, True, id="to the byte"), pytest.param(GIB + 1, False, id="a byte more")]
)
def test_a_budget_is_kept_to_the_byte(buffers: int, fits: bool) -> None:
    found = fit("director", {"flux": GIB}, {"video": buffers}, {}, 2 * GIB)
    assert (found.fits, found.shortfall_bytes) == (fits, 0 if fits else 1)


def test_without_a_budget_nothing_is_short() -> None:
    assert fit("director", {"flux": 99 * GIB}, {}, {}, None) == Fit(
        owner="director",
        models_bytes=99 * GIB,
        buffers_bytes=0,
        total_bytes=99 * GIB,
        budget_bytes=None,
        fits=True,
        shortfall_bytes=0,
        over_budget=(),
        message="99.0 GiB in models + 0.0 GiB in buffers, no budget is known",
    )


# The levels.


@pytest.mark.parametrize(
    ("used", "requested", "level"),
    [
        pytest.param(11.0, 0, Level.OK, id="at the soft limit"),
        pytest.param(11.0, 1 / GIB, Level.SOFT, id="a byte over it"),
        pytest.param(10.0, 1.5, Level.SOFT, id="at the hard limit"),
        pytest.param(10.0, 1.5 + 1 / GIB, Level.HARD, id="a byte over that"),
        pytest.param(12.0, 0, Level.HARD, id="full"),
        pytest.param(0, 999, Level.HARD, id="absurd"),
    ],
)
def test_a_limit_is_passed_only_above_it(used: float, requested: float, level: Level) -> None:
    assert Desk().ask(0, used, requested_gib=requested).level is level


def test_limits_as_shares_are_of_the_usable_memory() -> None:
    answer = Desk(Rules()).ask(0, 6)
    assert (answer.soft_limit_bytes, answer.hard_limit_bytes) == (round(12 * GIB * 0.9), round(12 * GIB * 0.95))


@pytest.mark.parametrize(("reported", "used"), [(None, 10.0), (9.0, 10.0), (11.2, 11.2)])
def test_what_a_worker_says_it_holds_counts_where_it_is_more(reported: float | None, used: float) -> None:
    answer = Desk().ask(0, 10, reported_gib=reported)
    assert answer.used_bytes == gib(used)
    assert answer.level is (Level.SOFT if used > 11 else Level.OK)


@given(st.integers(0, 12 * GIB), st.integers(0, 12 * GIB), st.integers(0, 4 * GIB))
def test_more_use_never_means_a_lower_level(one: int, other: int, requested: int) -> None:
    order = [Level.OK, Level.SOFT, Level.HARD]
    few, many = sorted((one, other))
    levels = [Desk().ask(0, used / GIB, requested_gib=requested / GIB).level for used in (few, many)]
    assert order.index(levels[0]) <= order.index(levels[1])


# Which GPU.


@pytest.mark.parametrize(
    ("wanted", "uuid"),
    [("GPU-a", "GPU-a"), ("1", "GPU-b"), (None, "GPU-b")],
    ids=["by UUID", "by index", "the fullest"],
)
def test_the_gpu_is_the_one_named_or_else_the_fullest(wanted: str | None, uuid: str) -> None:
    found = chosen(gpus(gpu(free_gib=20), second(free_gib=4)), wanted)
    assert isinstance(found, Gpu)
    assert found.uuid == uuid


def test_a_gpu_that_cannot_be_read_is_never_the_fullest() -> None:
    found = chosen(gpus(gpu(free_gib=LOST), second(free_gib=24)), None)
    assert isinstance(found, Gpu)
    assert found.uuid == "GPU-b"


def test_a_name_that_no_gpu_has_is_no_gpu() -> None:
    assert chosen(gpus(gpu(), second()), "2") is None


def test_a_name_that_comfyui_cannot_know_is_not_a_wrong_name() -> None:
    told = replace(gpus(gpu(uuid="comfyui-0")), second_hand=True)
    assert chosen(told, "GPU-a") == Missing("nobody tells of GPU GPU-a")
    assert chosen(told, "0") is told.gpus[0]


def test_no_gpu_at_all_is_missing() -> None:
    assert chosen(LOST, "2") is LOST
    assert isinstance(chosen(gpus(), None), Missing)


# Nothing is guessed.


@pytest.mark.parametrize(
    ("place", "words"),
    [
        pytest.param(LOST, "the memory of the GPU is not known: the driver is gone", id="no GPU"),
        pytest.param(card(LOST), "the memory of GPU 0 is not known: the driver is gone", id="no memory"),
    ],
)
def test_without_a_reading_the_level_is_unknown_and_nothing_changes(place: Gpu | Missing, words: str) -> None:
    worker = Worker(owner="worker-1", seen_at=0)
    checked = check(Ask(owner="worker-1", requested_bytes=GIB), place, worker, None, None, 0, Rules())
    assert checked.check == Check(
        level=Level.UNKNOWN,
        sustained=False,
        used_bytes=None,
        soft_limit_bytes=None,
        hard_limit_bytes=None,
        requested_bytes=GIB,
        gpu=None if place is LOST else "GPU-a",
        message=words,
    )
    assert (checked.worker, checked.events) == (worker, ())


def test_without_a_reading_a_workers_own_word_is_repeated_and_proves_nothing() -> None:
    ask = Ask(owner="worker-1", requested_bytes=0, reported_bytes=gib(11.9))
    answer = check(ask, LOST, Worker(owner="worker-1", seen_at=0), None, None, 0, RULES).check
    assert (answer.level, answer.used_bytes) == (Level.UNKNOWN, gib(11.9))
    assert (answer.soft_limit_bytes, answer.hard_limit_bytes) == (11 * GIB, gib(11.5))


# Soft: only what lasts.


def test_a_spike_that_one_check_sees_is_soft_and_no_violation() -> None:
    desk = Desk()
    answer = desk.ask(0, 10.0, requested_gib=1.2)
    assert (answer.level, answer.sustained) == (Level.SOFT, False)
    assert answer.message == "10.0 GiB used + 1.2 GiB requested of 11.0 GiB soft limit on GPU 0 (+0.2 GiB)"
    for at in range(1, 120):
        desk.look(at, 10.0)
    assert desk.told == []


def test_an_excursion_counts_once_it_has_lasted() -> None:
    desk = Desk()
    for at in (0, 10, 29.9):
        assert not desk.ask(at, 11.3).sustained
    assert desk.told == []
    answer = desk.ask(31, 11.3, context="before vae decode")
    assert answer.sustained
    (event,) = desk.told
    assert event.reason == "11.3 GiB used of 11.0 GiB soft limit on GPU 0 (+0.3 GiB) for 31 s, before vae decode"


def test_an_excursion_is_timed_by_the_daemons_own_readings_too() -> None:
    desk = Desk()
    for at in range(29):
        assert desk.look(at, 11.3) == []
    assert desk.ask(31, 11.3).sustained
    assert len(desk.soft) == 1


def test_an_excursion_nobody_asked_about_is_told_of_the_gpu() -> None:
    desk = Desk()
    desk.look(0, 11.3)
    (event,) = desk.look(30, 11.3)
    assert (event.target, event.gpu) == ("GPU 0", "GPU-a")
    assert event.reason == "11.3 GiB used of 11.0 GiB soft limit on GPU 0 (+0.3 GiB) for 30 s"


def test_an_excursion_is_told_of_the_worker_that_asked_about_it() -> None:
    desk = Desk()
    desk.look(0, 11.3)
    desk.ask(5, 11.3, owner="tts", context="batch of 8")
    (event,) = desk.look(30, 11.3)
    assert event.target == "worker:tts"
    assert event.reason.endswith("for 30 s, batch of 8")


def test_an_excursion_is_told_once_however_many_ask_and_look() -> None:
    desk = Desk()
    for at in range(200):
        desk.look(at, 11.3)
        desk.ask(at, 11.3, owner="one")
        desk.ask(at, 11.3, owner="other", requested_gib=0.1)
    assert len(desk.soft) == 1


@pytest.mark.parametrize(
    ("between", "again"),
    [
        pytest.param(10.9, False, id="a little below"),
        pytest.param(10.75, True, id="min_reclaim below"),
        pytest.param(2.0, True, id="far below"),
    ],
)
def test_an_excursion_ends_only_min_reclaim_below_the_limit(between: float, again: bool) -> None:
    for see in (Desk.look, Desk.ask):
        desk = Desk(AT_ONCE)
        for at, used in enumerate((11.3, between, 11.3)):
            see(desk, at, used)
        assert len(desk.soft) == (2 if again else 1)


def test_within_the_band_below_the_limit_the_level_is_ok() -> None:
    desk = Desk(AT_ONCE)
    desk.ask(0, 11.3)
    answer = desk.ask(1, 10.9)
    assert (answer.level, answer.sustained) == (Level.OK, False)
    assert answer.message == "10.9 GiB used of 11.0 GiB soft limit on GPU 0"


def test_a_wish_that_is_then_made_true_is_one_excursion() -> None:
    for follow in (Desk.ask, Desk.look):
        desk = Desk(AT_ONCE)
        assert desk.ask(0, 10.8, requested_gib=0.5).sustained
        follow(desk, 1, 11.3)
        desk.look(2, 11.3)
        assert len(desk.soft) == 1


def test_a_wish_counts_towards_the_time_of_what_follows_it() -> None:
    desk = Desk()
    desk.ask(0, 10.9, requested_gib=0.4)
    desk.look(1, 11.3)
    assert len(desk.look(30, 11.3)) == 1


def test_the_first_of_several_wishes_is_the_one_that_counts() -> None:
    desk = Desk()
    desk.ask(0, 10.9, requested_gib=0.4, owner="early")
    desk.ask(20, 10.9, requested_gib=0.4, owner="late")
    desk.ask(10, 10.9, requested_gib=0.4, owner="between")
    assert foretold(desk.workers.values())["GPU-a"].since == 0
    assert foretold(reversed(desk.workers.values()))["GPU-a"].since == 0


def test_use_that_only_hovers_below_the_limit_does_not_turn_a_wish_into_use() -> None:
    desk = Desk(AT_ONCE)
    desk.ask(0, 10.9, requested_gib=0.4)
    desk.look(1, 10.9)
    assert desk.excursions == {}
    assert len(desk.soft) == 1


@pytest.mark.parametrize(("used", "over"), [(10.8, False), (10.75, True)])
def test_a_wish_is_over_once_use_is_seen_min_reclaim_below_the_limit(used: float, over: bool) -> None:
    desk = Desk()
    desk.ask(0, 10.9, requested_gib=0.4)
    desk.look(1, used)
    assert (not desk.workers["worker-1"].excess) is over


def test_a_wish_that_is_refused_does_not_last() -> None:
    desk = Desk(AT_ONCE)
    answer = desk.ask(0, 10.0, requested_gib=5)
    assert (answer.level, answer.sustained) == (Level.HARD, False)
    assert desk.soft == []


def test_what_a_worker_holds_by_its_own_word_lasts_while_it_says_so() -> None:
    desk = Desk()
    for at in range(0, 40, 5):
        desk.look(at, 9.0)
        desk.ask(at, 9.0, reported_gib=11.3)
    assert len(desk.soft) == 1


def test_the_word_of_a_worker_that_fell_silent_yields_to_the_reading() -> None:
    desk = Desk()
    desk.ask(0, 9.0, reported_gib=11.3)
    desk.look(30, 9.0)
    assert desk.workers["worker-1"].excess
    desk.look(30.1, 9.0)
    assert not desk.workers["worker-1"].excess
    assert not desk.ask(600, 9.0, reported_gib=11.3).sustained


@pytest.mark.parametrize("lost", [LOST, gpus(card(LOST))], ids=["no GPU", "no memory"])
def test_a_missing_reading_restarts_the_time_and_forgets_nothing_that_was_told(lost: Gpus | Missing) -> None:
    desk = Desk()
    desk.look(0, 11.3)
    desk.look_at(20, lost)
    assert desk.look(31, 11.3) == []
    assert len(desk.look(61, 11.3)) == 1
    desk.look_at(62, lost)
    assert desk.look(100, 11.3) == []


@pytest.mark.parametrize("lost", [LOST, gpus(card(LOST))], ids=["no GPU", "no memory"])
def test_a_missing_reading_ends_no_excursion_of_a_worker(lost: Gpus | Missing) -> None:
    desk = Desk()
    desk.ask(0, 10.9, requested_gib=5)
    desk.ask(0, 10.9, requested_gib=0.4)
    before = desk.workers
    desk.look_at(1000, lost)
    assert desk.workers == before


def test_every_gpu_has_its_own_excursion() -> None:
    desk = Desk(AT_ONCE)
    full = gpu(total_gib=12, free_gib=0.1), second(total_gib=12, free_gib=0.1)
    assert [event.target for event in desk.look_at(0, gpus(*full))] == ["GPU 0", "GPU 1"]


@given(
    st.lists(st.tuples(st.booleans(), st.sampled_from([2.0, 10.7, 10.8, 10.9, 11.1, 11.3]))),
    st.sampled_from([0.0, 3.0]),
)
def test_between_two_tellings_use_fell_well_below_the_limit(days: list[tuple[bool, float]], lasts: float) -> None:
    desk = Desk(replace(RULES, soft_limit_seconds=lasts))
    falls = 0
    for at, (asks, used) in enumerate(days):
        if asks:
            desk.ask(at, used)
        else:
            desk.look(at, used)
        falls += used <= 10.75
        assert len(desk.soft) <= falls + 1


# Hard: before the allocation, and room is asked for.


def test_a_worker_at_its_hard_limit_asks_for_the_room_it_needs() -> None:
    desk = Desk()
    desk.ask(5, 11.2, requested_gib=0.8)
    wanted = desk.demand(5)
    assert wanted is not None
    assert (wanted.kind, wanted.key, wanted.gpu) == (Kind.STARTING, "hard-limit:worker-1", "GPU-a")
    assert wanted.reason == "worker-1 is at its hard limit on GPU 0"
    assert (wanted.since, wanted.last_seen_at) == (5, 5)
    used_then = 12 * GIB - wanted.need_free_bytes
    assert Desk().ask(0, used_then / GIB, requested_gib=0.8).level is not Level.HARD
    assert Desk().ask(0, (used_then + 1) / GIB, requested_gib=0.8).level is Level.HARD


def test_the_room_lives_for_30_s_after_the_last_hard_answer() -> None:
    desk = Desk()
    desk.ask(0, 11.2, requested_gib=0.8)
    desk.ask(20, 11.2, requested_gib=0.8)
    wanted = desk.demand(50)
    assert wanted is not None
    assert (wanted.since, wanted.last_seen_at) == (0, 20)
    assert desk.demand(50.1) is None


def test_no_room_is_asked_for_what_could_never_fit() -> None:
    desk = Desk()
    assert desk.ask(0, 2, requested_gib=11.6).level is Level.HARD
    assert desk.demand(0) is None
    assert desk.ask(0, 9, reported_gib=9, requested_gib=2.6).level is Level.HARD
    assert desk.demand(0) is None


def test_room_is_asked_for_what_fits_when_everybody_else_is_gone() -> None:
    desk = Desk()
    desk.ask(0, 2, requested_gib=11.5)
    wanted = desk.demand(0)
    assert wanted is not None
    assert wanted.need_free_bytes == 12 * GIB


def test_a_worker_asks_for_room_where_it_was_refused_last() -> None:
    limits = [
        AtHardLimit(gpu=name, index=index, since=0, last_at=at, requested_bytes=1, need_free_bytes=GIB)
        for index, (name, at) in enumerate({"GPU-a": 1, "GPU-b": 3, "GPU-c": 2}.items())
    ]
    wanted = demand(Worker(owner="worker-1", seen_at=3, hard={one.gpu: one for one in limits}), 3)
    assert wanted is not None
    assert (wanted.gpu, wanted.reason) == ("GPU-b", "worker-1 is at its hard limit on GPU 1")


def test_a_worker_within_its_limits_asks_for_no_room() -> None:
    desk = Desk()
    desk.ask(0, 5)
    assert desk.demand(0) is None


def test_a_flood_at_the_hard_limit_is_told_once() -> None:
    desk = Desk()
    for at in range(500):
        desk.ask(at / 10, 11.2, requested_gib=0.8 if at % 2 else 0.1)
        desk.look(at / 10, 11.2)
    assert len(desk.hard) == 1
    desk.ask(50, 11.2, requested_gib=0.8, owner="other")
    assert [event.target for event in desk.hard] == ["worker:worker-1", "worker:other"]


@pytest.mark.parametrize(
    ("seen_at", "used", "times"),
    [
        pytest.param(30, 5.0, 1, id="there was room, but only seconds later"),
        pytest.param(31, 11.0, 1, id="it would still not have fit"),
        pytest.param(31, 10.6, 1, id="it would have fit by less than min_reclaim"),
        pytest.param(31, 10.5, 2, id="there was room"),
        pytest.param(600, 11.2, 1, id="it had not given up yet"),
        pytest.param(601, 11.2, 2, id="it had given up long ago"),
    ],
)
def test_a_worker_is_told_to_be_at_its_hard_limit_again_once_that_was_over(
    seen_at: float, used: float, times: int
) -> None:
    desk = Desk()
    desk.ask(1000, 11.2, requested_gib=0.75)
    desk.look(1000 + seen_at, used)
    desk.ask(1001 + seen_at, 11.2, requested_gib=0.75)
    assert len(desk.hard) == times


def test_over_both_limits_both_are_told() -> None:
    desk = Desk(AT_ONCE)
    answer = desk.ask(0, 11.8, context="vae decode")
    assert (answer.level, answer.sustained) == (Level.HARD, True)
    assert answer.message == "11.8 GiB used > 11.5 GiB hard limit on GPU 0, vae decode"
    assert [event.type for event in desk.told] == [EventType.SOFT_LIMIT, EventType.HARD_LIMIT]


def test_min_reclaim_is_256_mib() -> None:
    assert RULES.min_reclaim_bytes == 256 * MIB, "the numbers above count on it"
