"""What workers tell is remembered, answered, counted and told once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from loguru import logger

from tests.fakes import FakeStore
from tests.policy.worlds import GIB, MIB, gib, gpu, gpus, second, snapshot
from vram_manager.clock import Clock
from vram_manager.domain.event import Event, EventType
from vram_manager.domain.reading import Missing, Off
from vram_manager.domain.size import Size
from vram_manager.domain.snapshot import Gpu
from vram_manager.domain.worker import Generation, Level, Phase, Report
from vram_manager.journal import Journal
from vram_manager.policy import Rules
from vram_manager.workers import MAX_WORKERS, NoSuchGpu, Workers

NOON = datetime(2026, 7, 1, 12, tzinfo=UTC)
# The card of a pipeline with fixed budgets: 12 GiB, a warning above 11.0, a stop above 11.5; few generations a leak.
RULES = Rules(
    soft_limit=Size(bytes=11 * GIB), hard_limit=Size(bytes=gib(11.5)), soft_limit_seconds=0.0, leak_generations=10
)
LEAKY = range(1, 21)


class Bench:
    """Workers over GPUs, a clock and a lease book that a test sets."""

    def __init__(self, rules: Rules = RULES) -> None:
        self.now = 100.0
        clock = Clock(lambda: self.now, lambda: NOON + timedelta(seconds=self.now))
        self.journal = Journal(clock, FakeStore())  # type: ignore[arg-type]
        self.cards: tuple[Gpu, ...] | None = None
        self.leased: dict[str, int] = {}
        self.woken: list[float] = []
        self.use(5)
        self.workers = Workers(
            clock,
            self.journal,
            rules,
            snapshot=self.seen,
            leased_bytes=self.leased.get,
            on_demand=lambda: self.woken.append(self.now),
        )

    def use(self, used_gib: float | Missing) -> None:
        self.cards = (gpu(total_gib=12, free_gib=used_gib if isinstance(used_gib, Missing) else 12 - used_gib),)

    def seen(self) -> Any:
        if self.cards is None:
            return None
        return snapshot(self.now, gpus(*self.cards), comfyui=Off())

    def turn(self) -> None:
        self.workers.turned(self.seen())

    def told(self, kind: EventType) -> list[Event]:
        return [entry.event for entry in self.journal.events() if entry.event.type is kind]

    def generation(self, key: str, before: int, after: int) -> Generation:
        self.workers.generation("worker-1", Phase.START, key, Report(allocated_bytes=before))
        return self.workers.generation("worker-1", Phase.END, key, Report(allocated_bytes=after))


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.fixture
def records() -> Iterator[list[Any]]:
    """Every log record as it is written."""
    found: list[Any] = []
    sink = logger.add(lambda message: found.append(message.record), level=0)
    yield found
    logger.remove(sink)


@pytest.fixture
def lines(records: list[Any]) -> Any:
    return lambda: [f"{record['level'].name} {record['message']}" for record in records]


# Limits.


def test_normal_operation_logs_and_counts_nothing(bench: Bench, lines: Any):
    for used in (10.5, 10.8, 11.0):
        bench.use(used)
        bench.turn()
        assert bench.workers.check_limits("worker-1", Report()).level is Level.OK
    assert lines() == []
    assert (bench.workers.soft_violations, bench.workers.hard_violations, bench.workers.leaks) == (0, 0, 0)


def test_the_soft_limit_warns_in_the_log_counts_and_lets_the_worker_go_on(bench: Bench, lines: Any):
    bench.use(11.3)
    answer = bench.workers.check_limits("worker-1", Report(), context="before vae decode")
    assert (answer.level, answer.sustained) == (Level.SOFT, True)
    assert lines() == [
        (
            "WARNING VRAM soft limit exceeded by worker-1: 11.3 GiB used of 11.0 GiB soft limit on GPU 0 (+0.3 GiB), "
            "before vae decode [limit-0001]"
        )
    ]
    assert (bench.workers.soft_violations, bench.workers.hard_violations) == (1, 0)


def test_the_hard_limit_is_an_error_in_the_log_and_asks_for_room(bench: Bench, lines: Any):
    bench.use(11.2)
    answer = bench.workers.check_limits("worker-1", Report(), requested_bytes=gib(0.8))
    assert answer.level is Level.HARD
    assert lines()[-1] == (
        "ERROR VRAM hard limit exceeded by worker-1: 11.2 GiB used + 0.8 GiB requested > 11.5 GiB hard limit on GPU 0 "
        "[limit-0002]"
    )
    (demand,) = bench.workers.demands(bench.now)
    assert (demand.key, demand.need_free_bytes) == ("hard-limit:worker-1", 12 * GIB - gib(11.5) + gib(0.8))
    assert bench.workers.demands(bench.now + 31) == ()


def test_every_hard_answer_counts_and_one_is_told(bench: Bench):
    bench.use(11.4)
    for _ in range(50):
        bench.workers.check_limits("worker-1", Report(), requested_bytes=GIB)
    assert bench.workers.hard_violations == 50
    assert len(bench.told(EventType.HARD_LIMIT)) == 1


def test_a_new_demand_wakes_whoever_can_make_room_and_a_flood_does_not(bench: Bench):
    bench.use(11.3)
    bench.workers.check_limits("worker-1", Report())
    assert bench.woken == []
    for now in (100, 101, 131, 162):
        bench.now = now
        bench.workers.check_limits("worker-1", Report(), requested_bytes=GIB)
    assert bench.woken == [100, 162]


def test_a_gpu_over_its_soft_limit_is_told_at_a_turn(bench: Bench, lines: Any):
    bench.use(11.3)
    for _ in range(3):
        bench.turn()
    assert lines() == [
        (
            "WARNING VRAM soft limit exceeded by GPU 0: 11.3 GiB used of 11.0 GiB soft limit on GPU 0 (+0.3 GiB) "
            "[limit-0001]"
        )
    ]
    assert bench.workers.soft_violations == 1


def test_a_turn_and_a_check_are_one_excursion_until_it_ends(bench: Bench):
    for used in (11.3, 11.3, 10.0, 11.3):
        bench.use(used)
        bench.turn()
        bench.workers.check_limits("worker-1", Report())
    assert bench.workers.soft_violations == 2


def test_a_worker_is_at_its_hard_limit_anew_once_there_was_room(bench: Bench):
    for used in (11.4, 5.0, 11.4):
        bench.use(used)
        bench.turn()
        bench.workers.check_limits("worker-1", Report(), requested_bytes=GIB)
        bench.now += 40
    assert len(bench.told(EventType.HARD_LIMIT)) == 2


def test_before_the_first_look_the_level_is_unknown(bench: Bench):
    bench.cards = None
    answer = bench.workers.check_limits("worker-1", Report())
    assert (answer.level, answer.message) == (
        Level.UNKNOWN,
        "the memory of the GPU is not known: nothing was read yet",
    )


def test_a_gpu_that_is_lost_keeps_what_was_told_of_it(bench: Bench):
    for used in (11.3, Missing("lost"), 11.3):
        bench.use(used)
        bench.workers.check_limits("worker-1", Report())
    assert bench.workers.soft_violations == 1


def test_the_gpu_is_the_one_named(bench: Bench):
    bench.cards = gpu(total_gib=12, free_gib=1), second(total_gib=12, free_gib=10)
    found = [bench.workers.check_limits("worker-1", Report(gpu=name)).gpu for name in (None, "1", "GPU-b")]
    assert found == ["GPU-a", "GPU-b", "GPU-b"]


def test_a_gpu_that_is_not_there_is_an_error_and_nothing_is_remembered(bench: Bench):
    report = Report(gpu="7", allocated_bytes=GIB)
    calls = (
        lambda: bench.workers.check_limits("worker-1", report),
        lambda: bench.workers.generation("worker-1", Phase.START, "1", report),
        lambda: bench.workers.snapshot_of("worker-1", "startup", report),
    )
    for call in calls:
        with pytest.raises(NoSuchGpu, match="GPU 7 is none"):
            call()
    assert bench.workers.listing() == []


# Models and buffers.


def test_a_budget_that_is_not_given_is_what_the_owner_has_leased(bench: Bench):
    bench.leased["worker-1"] = 10 * GIB
    leased = bench.workers.models("worker-1", {"flux": 11 * GIB}, buffers={}, budgets={})
    given = bench.workers.models("worker-1", {"flux": 11 * GIB}, buffers={}, budgets={}, budget_bytes=12 * GIB)
    unknown = bench.workers.models("worker-2", {"flux": 11 * GIB}, buffers={}, budgets={})
    assert [found.budget_bytes for found in (leased, given, unknown)] == [10 * GIB, 12 * GIB, None]
    assert [found.shortfall_bytes for found in (leased, given, unknown)] == [GIB, 0, 0]


def test_a_budget_of_nothing_is_a_budget(bench: Bench):
    bench.leased["worker-1"] = 10 * GIB
    found = bench.workers.models("worker-1", {"flux": 1}, buffers={}, budgets={}, budget_bytes=0)
    assert (found.budget_bytes, found.fits) == (0, False)


def test_the_newest_models_replace_those_before(bench: Bench):
    bench.workers.models("worker-1", {"flux": GIB}, buffers={"video": 5}, budgets={})
    bench.workers.models("worker-1", {"kokoro": 7}, buffers={}, budgets={}, budget_bytes=9)
    (worker,) = bench.workers.listing()
    assert (worker["models"], worker["buffers"], worker["budget_bytes"]) == ({"kokoro": 7}, {}, 9)


# Generations.


def test_a_generation_leaves_its_delta(bench: Bench):
    assert bench.generation("1", 10 * GIB, gib(10.5)) == Generation(delta_bytes=gib(0.5), generations=1)
    assert bench.generation("2", 10 * GIB, 10 * GIB) == Generation(delta_bytes=0, generations=2)
    (worker,) = bench.workers.listing()
    assert (worker["generations"], worker["last_delta_bytes"], worker["leak"]) == (2, 0, None)


def test_a_leak_is_told_once_counted_and_stays_in_the_listing(bench: Bench, lines: Any):
    for n in LEAKY:
        answer = bench.generation(f"slot-{n}", GIB, GIB + 20 * MIB * n)
    retried = bench.workers.generation("worker-1", Phase.END, "slot-20", Report(allocated_bytes=0))
    assert answer.leak is not None
    assert retried == answer
    assert [line for line in lines() if "leak" in line] == [
        (
            "WARNING Potential memory leak of worker-1: 1.1 GiB -> 1.3 GiB kept after 10 generations: "
            "+200 MiB, 20.0 MiB each [leak-0001]"
        )
    ]
    assert bench.workers.leaks == 1
    assert bench.workers.listing()[0]["leak"] == asdict(answer.leak)


def test_a_leak_measured_on_the_whole_gpu_says_so(bench: Bench):
    for n in LEAKY:
        bench.use(5 + n / 10)
        bench.workers.generation("worker-1", Phase.END, str(n), Report())
    (event,) = bench.told(EventType.LEAK)
    assert event.reason.endswith("(measured on the whole GPU: it says nothing of its own memory)")


def test_with_several_gpus_and_no_word_of_the_worker_a_delta_is_not_known(bench: Bench):
    bench.cards = gpu(), second()
    bench.workers.generation("worker-1", Phase.START, "1", Report())
    assert bench.workers.generation("worker-1", Phase.END, "1", Report()).delta_bytes is None


# Named points.


def test_a_named_point_is_answered_in_its_structured_form(bench: Bench):
    sizes = {"flux": 6.0, "liveportrait": 3.5, "kokoro": 0.4, "clip_b": 0.3, "clip_l": 0.6}
    models = {name: round(size * 1e9) for name, size in sizes.items()}
    bench.workers.models("worker-1", models, buffers={}, budgets={})
    bench.use(10.95e9 / GIB)
    report = Report(allocated_bytes=round(10.85e9), reserved_bytes=round(11.2e9))
    assert asdict(bench.workers.snapshot_of("worker-1", "post_generation", report, slot=12345)) == {
        "timestamp": "2026-07-01T12:01:40.000Z",
        "event": "post_generation",
        "slot": 12345,
        "vram_usage_gb": 10.95,
        "vram_allocated_gb": 10.85,
        "vram_reserved_gb": 11.2,
        "models": sizes,
    }


@pytest.mark.parametrize("lost", [Missing("lost"), None], ids=["no memory", "no look"])
def test_what_is_not_known_at_a_point_is_null(bench: Bench, lost: Missing | None):
    if lost is None:
        bench.cards = None
    else:
        bench.use(lost)
    bench.workers.check_limits("worker-1", Report(allocated_bytes=GIB))
    point = bench.workers.snapshot_of("worker-1", "startup", Report())
    assert (point.vram_usage_gb, point.vram_allocated_gb, point.vram_reserved_gb) == (None, None, None)
    assert (point.slot, point.models) == (None, {})


def test_a_named_point_is_one_debug_line_with_its_structure(bench: Bench, records: list[Any], lines: Any):
    bench.workers.models("worker-1", {"flux": 6 * GIB, "kokoro": GIB}, buffers={}, budgets={})
    point = bench.workers.snapshot_of("worker-1", "{post} generation", Report(allocated_bytes=4 * GIB))
    assert lines() == [
        (
            "DEBUG VRAM snapshot {post} generation of worker-1: 5.0 GiB used, 4.0 GiB allocated, unknown reserved, "
            "7.0 GiB in 2 models"
        )
    ]
    assert records[0]["extra"]["snapshot"] == {"owner": "worker-1", **asdict(point)}


def test_a_generation_logs_the_points_before_and_after_it_once(bench: Bench, records: list[Any]):
    for phase in (Phase.START, Phase.START, Phase.END, Phase.END):
        bench.workers.generation("worker-1", phase, "1", Report(), slot="a")
    logged = [record["extra"]["snapshot"] for record in records]
    assert [point["event"] for point in logged] == ["pre_generation", "post_generation"]
    assert [point["slot"] for point in logged] == ["a", "a"]


# Who is remembered.


@pytest.mark.parametrize(
    ("report", "held"),
    [
        pytest.param(Report(allocated_bytes=1, reserved_bytes=2), {"worker-1": 2}, id="its pool"),
        pytest.param(Report(allocated_bytes=1), {"worker-1": 1}, id="else what is allocated"),
        pytest.param(Report(reserved_bytes=0), {"worker-1": 0}, id="nothing is a word too"),
        pytest.param(Report(gpu="0"), {}, id="no word"),
    ],
)
def test_what_a_worker_says_it_holds_is_remembered(bench: Bench, report: Report, held: dict[str, int]):
    bench.workers.check_limits("worker-1", report)
    bench.workers.generation("worker-1", Phase.START, "1", report)
    assert bench.workers.memory() == held


def test_a_call_that_says_nothing_of_its_memory_leaves_what_was_said_before(bench: Bench):
    bench.workers.check_limits("worker-1", Report(allocated_bytes=1, reserved_bytes=2))
    bench.workers.check_limits("worker-1", Report())
    (worker,) = bench.workers.listing()
    assert (worker["allocated_bytes"], worker["reserved_bytes"]) == (1, 2)
    bench.workers.check_limits("worker-1", Report(allocated_bytes=3))
    (worker,) = bench.workers.listing()
    assert (worker["allocated_bytes"], worker["reserved_bytes"]) == (3, None)


def test_the_listing_says_when_each_was_last_seen(bench: Bench):
    bench.workers.check_limits("early", Report())
    bench.now += 60
    bench.workers.check_limits("late", Report())
    assert [(worker["owner"], worker["seen_at"]) for worker in bench.workers.listing()] == [
        ("early", "2026-07-01T12:01:40.000Z"),
        ("late", "2026-07-01T12:02:40.000Z"),
    ]


def test_of_too_many_workers_the_least_recently_seen_is_forgotten(bench: Bench):
    for n in range(MAX_WORKERS):
        bench.workers.check_limits(f"worker-{n}", Report())
    bench.workers.check_limits("worker-0", Report())
    bench.workers.check_limits("one more", Report())
    owners = [worker["owner"] for worker in bench.workers.listing()]
    assert len(owners) == MAX_WORKERS
    assert owners[0] == "worker-2"
    assert owners[-2:] == ["worker-0", "one more"]


def test_a_flood_of_new_names_at_the_hard_limit_stays_bounded(bench: Bench):
    bench.use(11.4)
    for n in range(MAX_WORKERS + 50):
        bench.workers.check_limits(f"worker-{n}", Report(), requested_bytes=GIB)
    assert len(bench.workers.demands(bench.now)) == MAX_WORKERS


def test_the_default_rules_measure_shares_of_the_card():
    bench = Bench(replace(Rules(), soft_limit_seconds=0.0))
    bench.use(10.9)
    assert bench.workers.check_limits("worker-1", Report()).level is Level.SOFT
