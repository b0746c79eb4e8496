"""Each sensor in a task of its own: what hangs delays nobody, what is slow is not down, what is lost is said once."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator

import pytest

from tests.fakes import GIB, Card, FakeComfyUI, FakeGpus, FakeOllama, now, until
from vram_manager.clock import Clock
from vram_manager.domain.event import Event, EventType
from vram_manager.domain.reading import Missing, Off, Seen
from vram_manager.domain.snapshot import ProcessMemory, Queue, Snapshot
from vram_manager.errors import Rejected, SensorError, TimedOut
from vram_manager.observer import Observer

pytestmark = [pytest.mark.asyncio, pytest.mark.looptime]

REFUSED = SensorError("GET /api/ps: connection refused", "check that ollama runs")
LATE = TimedOut("GET /api/ps: no answer within 15 s")


class Watched:
    """An observer over fakes, and what it told."""

    def __init__(self, *, interval_seconds: float = 5.0, without: str = "") -> None:
        self.card = Card()
        self.gpus = FakeGpus(self.card)
        self.ollama = FakeOllama(self.card)
        self.comfyui = FakeComfyUI(self.card)
        self.events: list[Event] = []
        self.wakes: list[float] = []
        self.observer = Observer(
            Clock(asyncio.get_running_loop().time, None),  # type: ignore[arg-type]
            self.events.append,
            gpus=None if without == "nvml" else self.gpus,
            ollama=None if without == "ollama" else self.ollama,
            comfyui=None if without == "comfyui" else self.comfyui,
            interval_seconds=interval_seconds,
        )

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Reads inside the block; looks whenever a cycle would."""
        async with asyncio.TaskGroup() as tasks:
            work = [tasks.create_task(self.observer.run()), tasks.create_task(self._look_when_it_changes())]
            yield
            for task in work:
                task.cancel()

    async def _look_when_it_changes(self) -> None:
        while True:
            await self.observer.changed.wait()
            self.observer.changed.clear()
            self.wakes.append(now())
            self.observer.look()

    def look(self) -> Snapshot:
        return self.observer.look()

    @property
    def queue(self) -> Queue:
        reading = self.look().queue
        assert isinstance(reading, Seen)
        return reading.value

    def told(self, sensor: str) -> list[EventType]:
        return [event.type for event in self.events if event.target == sensor]


LOST, BACK = EventType.SENSOR_LOST, EventType.SENSOR_BACK


async def test_an_ollama_that_hangs_for_15_seconds_delays_nobody():
    watched = Watched()
    async with watched.running():
        await until(lambda: watched.observer.ready)
        watched.ollama.takes_seconds = 15
        await asyncio.sleep(2)
        gpu_reads, polls = len(watched.gpus.reads), len(watched.comfyui.polls)
        watched.card.holders["game"] = 5 * GIB
        await asyncio.sleep(10)
        seen = watched.look()
    assert len(watched.gpus.reads) - gpu_reads >= 9
    assert len(watched.comfyui.polls) - polls >= 4
    assert isinstance(seen.gpus, Seen)
    assert seen.gpus.value.gpus[0].memory == watched.card.memory()
    assert seen.taken_at - seen.gpus.at <= 1.1


@pytest.mark.parametrize("sensor", ["gpus", "ollama", "comfyui"])
async def test_a_sensor_that_hangs_at_the_start_keeps_the_others_waiting_for_seconds_only(sensor: str):
    watched = Watched()
    getattr(watched, sensor).takes_seconds = 1000
    async with watched.running():
        assert not watched.observer.ready
        await until(lambda: watched.observer.ready, within=5.1)
        await asyncio.sleep(60)
        assert watched.told("nvml" if sensor == "gpus" else sensor) == []


async def test_slow_is_not_down_a_timeout_keeps_the_last_reading_until_its_age_limit():
    watched = Watched()
    watched.ollama.load("llama3.1:8b", 5)
    async with watched.running():
        await until(lambda: watched.observer.ready)
        watched.ollama.takes_seconds, watched.ollama.error = 15, LATE
        await asyncio.sleep(19)
        kept = watched.look().ollama
        assert isinstance(kept, Seen)
        assert [model.name for model in kept.value.models] == ["llama3.1:8b"]
        await asyncio.sleep(3)
        lost = watched.look().ollama
        assert isinstance(lost, Missing)
        assert lost.last_seen_at == kept.at
        assert "last answered" in lost.why
        assert watched.told("ollama") == [BACK, LOST]
        watched.ollama.takes_seconds, watched.ollama.error = 0.01, None
        await until(lambda: watched.told("ollama") == [BACK, LOST, BACK], within=15)
        assert len(watched.ollama.looks) < 10


async def test_a_reading_that_had_grown_too_old_wakes_the_cycle_when_it_is_fresh_again():
    watched = Watched()
    async with watched.running():
        await until(lambda: watched.observer.ready)
        watched.ollama.takes_seconds, watched.ollama.error = 15, LATE
        await asyncio.sleep(25)
        assert isinstance(watched.look().ollama, Missing)
        watched.ollama.error, watched.ollama.takes_seconds = None, 0.01
        watched.wakes.clear()
        await until(lambda: isinstance(watched.look().ollama, Seen), within=20)
        assert len(watched.wakes) == 1


async def test_a_sensor_that_stays_lost_is_said_once_and_once_when_it_is_back():
    watched = Watched()
    async with watched.running():
        await until(lambda: watched.observer.ready)
        watched.ollama.error = REFUSED
        for _ in range(100):
            await asyncio.sleep(1)
            watched.look()
        assert watched.told("ollama") == [BACK, LOST]
        watched.ollama.error = None
        await until(lambda: watched.told("ollama") == [BACK, LOST, BACK], within=2)
        await asyncio.sleep(60)
        watched.look()
    assert watched.told("ollama") == [BACK, LOST, BACK]
    lost = next(event for event in watched.events if event.type is LOST)
    assert lost.reason == "GET /api/ps: connection refused; check that ollama runs"


@pytest.mark.parametrize("error", [REFUSED, Rejected("GET /api/ps: HTTP 500")], ids=["refused", "500"])
async def test_a_refusal_is_missing_at_once(error: SensorError):
    watched = Watched()
    async with watched.running():
        await until(lambda: watched.observer.ready)
        watched.ollama.error = error
        await until(lambda: watched.told("ollama") == [BACK, LOST], within=1.2)
        reading = watched.look().ollama
    assert isinstance(reading, Missing)
    assert reading.why == error.why
    assert reading.last_seen_at is not None


async def test_a_sensor_that_never_answered_says_why_and_has_no_age():
    watched = Watched()
    watched.gpus.error = SensorError("libnvidia-ml.so.1 was not found", "run with --gpus all")
    async with watched.running():
        await until(lambda: watched.observer.ready)
        reading = watched.look().gpus
    assert reading == Missing("libnvidia-ml.so.1 was not found", "run with --gpus all", None)
    assert watched.told("nvml") == [LOST]


async def test_a_timeout_of_a_sensor_that_is_lost_already_is_its_new_reason():
    watched = Watched()
    watched.ollama.error = REFUSED
    async with watched.running():
        await until(lambda: watched.observer.ready)
        watched.ollama.error = LATE
        await asyncio.sleep(3)
        reading = watched.look().ollama
    assert isinstance(reading, Missing)
    assert reading.why == LATE.why
    assert watched.told("ollama") == [LOST]


@pytest.mark.parametrize("slower", ["stats", "queue"])
async def test_comfyui_is_not_called_lost_while_one_of_its_two_first_answers_is_still_to_come(slower: str):
    watched = Watched()
    if slower == "stats":
        watched.comfyui.stats_takes_seconds = 2
    else:
        watched.comfyui.queue_takes_seconds = 2
    async with watched.running():
        await until(lambda: watched.told("comfyui"))
        await asyncio.sleep(5)
    assert watched.told("comfyui") == [BACK]


async def test_comfyui_counts_as_lost_when_either_of_its_readings_is():
    watched = Watched()
    async with watched.running():
        await until(lambda: watched.observer.ready)
        watched.comfyui.queue_error = Rejected("GET /prompt: HTTP 500")
        await asyncio.sleep(5)
        assert isinstance(watched.look().comfyui, Seen)
        sensors = watched.observer.sensors()
    assert isinstance(sensors["comfyui"], Missing)
    assert watched.told("comfyui") == [BACK, LOST]


async def test_what_is_switched_off_is_off_and_never_lost():
    for sensor in ("nvml", "ollama", "comfyui"):
        watched = Watched(without=sensor)
        async with watched.running():
            await until(lambda watched=watched: watched.observer.ready)
            await asyncio.sleep(30)
            snapshot = watched.look()
        assert watched.observer.sensors()[sensor] == Off()
        assert watched.told(sensor) == []
        if sensor == "comfyui":
            assert (snapshot.comfyui, snapshot.queue) == (Off(), Off())


async def test_a_queue_that_starts_or_ends_is_seen_at_once_by_websocket():
    watched = Watched()
    watched.comfyui.socket_error = None
    async with watched.running():
        await asyncio.sleep(10)
        before = 0
        for remaining in (1, 2, 1, 0):
            watched.wakes.clear()
            at = now()
            watched.comfyui.push(remaining)
            await asyncio.sleep(0)
            await asyncio.sleep(0.001)
            assert watched.queue.remaining == remaining
            assert bool(watched.wakes) == (watched.queue.since == at) == (before * remaining == 0)
            before = remaining
            await asyncio.sleep(0.3)


async def test_what_the_websocket_pushed_outlives_a_poll_that_was_asked_before():
    watched = Watched()
    watched.comfyui.socket_error = None
    watched.comfyui.queue_takes_seconds = 1.5
    async with watched.running():
        await until(lambda: len(watched.comfyui.polls) == 3)
        await asyncio.sleep(0.5)
        at = now()
        watched.comfyui.push(1)
        await asyncio.sleep(1.2)
        assert len(watched.comfyui.polls) == 3
        assert (watched.queue.remaining, watched.queue.since, watched.queue.runs) == (1, at, 1)
        await asyncio.sleep(5)
        assert (watched.queue.remaining, watched.queue.since, watched.queue.runs) == (1, at, 1)


async def test_without_a_websocket_polls_see_the_queue_within_their_beat():
    watched = Watched()
    async with watched.running():
        await asyncio.sleep(10)
        watched.comfyui.remaining = 3
        await until(lambda: watched.queue.remaining == 3, within=2.1)


async def test_a_lost_websocket_is_tried_again_and_polls_go_on_meanwhile():
    watched = Watched()
    watched.comfyui.socket_error = None
    async with watched.running():
        await asyncio.sleep(10)
        watched.comfyui.socket_error = SensorError("GET /ws: connection refused")
        watched.comfyui.lose_socket()
        await asyncio.sleep(0.1)
        watched.comfyui.remaining = 1
        await until(lambda: watched.queue.remaining == 1, within=2.1)
        await asyncio.sleep(20)
        assert len(watched.comfyui.sockets) in {4, 5}
        assert watched.told("comfyui") == [BACK]
        watched.comfyui.socket_error = None
        await asyncio.sleep(6)
        at = now()
        watched.comfyui.push(0)
        await asyncio.sleep(0.01)
        assert watched.queue.since == at


async def test_a_comfyui_without_websocket_is_asked_for_one_no_more_than_every_few_seconds():
    watched = Watched()
    async with watched.running():
        await asyncio.sleep(200)
    gaps = [later - earlier for earlier, later in itertools.pairwise(watched.comfyui.sockets)]
    assert min(gaps) >= 5


async def test_runs_count_each_start_once():
    watched = Watched()
    watched.comfyui.socket_error = None
    async with watched.running():
        await asyncio.sleep(3)
        for remaining in (1, 2, 1, 0, 1, 0, 3, 0):
            watched.comfyui.push(remaining)
            await asyncio.sleep(7)
        assert watched.queue.runs == 3
        assert watched.queue.idle
        assert watched.queue.since == pytest.approx(now() - 7, abs=0.1)


async def test_a_comfyui_that_is_busy_at_the_first_look_has_one_run():
    watched = Watched()
    watched.comfyui.remaining = 2
    async with watched.running():
        await until(lambda: watched.observer.ready)
        assert watched.queue.runs == 1


async def test_idle_goes_on_counting_through_a_restart_of_comfyui_and_runs_stay():
    watched = Watched()
    async with watched.running():
        await asyncio.sleep(3)
        watched.comfyui.remaining = 1
        await asyncio.sleep(10)
        watched.comfyui.error = SensorError("GET /prompt: connection refused")
        await asyncio.sleep(20)
        assert isinstance(watched.look().queue, Missing)
        watched.comfyui.error, watched.comfyui.remaining = None, 0
        at = now()
        await until(lambda: isinstance(watched.look().queue, Seen))
        assert watched.queue.idle
        assert watched.queue.since >= at
        assert watched.queue.runs == 1
        await until(lambda: watched.told("comfyui") == [BACK, LOST, BACK], within=5.1)


async def test_the_process_list_is_asked_rarely_and_kept_between():
    watched = Watched()
    watched.gpus.processes = {"GPU-a": (ProcessMemory(pid=7, used_bytes=GIB, command=("python", "main.py")),)}
    async with watched.running():
        await asyncio.sleep(181)
        seen = watched.look().gpus
    asked = [with_processes for _, with_processes in watched.gpus.reads]
    assert asked.count(True) in {3, 4}
    assert isinstance(seen, Seen)
    assert seen.value.gpus[0].processes == watched.gpus.processes["GPU-a"]
    assert seen.value.gpus[0].temperature_celsius == 41


async def test_the_process_list_is_asked_again_when_memory_moved_while_somebody_waits():
    watched = Watched()
    async with watched.running():
        await asyncio.sleep(3.5)
        watched.observer.pace(0.25)
        await asyncio.sleep(2)
        assert [listed for _, listed in watched.gpus.reads].count(True) == 1
        watched.card.holders["comfyui"] = GIB
        watched.gpus.processes = {"GPU-a": (ProcessMemory(pid=7, used_bytes=GIB, command=("python",)),)}
        await asyncio.sleep(0.8)
        seen = watched.look().gpus
        await asyncio.sleep(2)
    assert isinstance(seen, Seen)
    assert seen.value.gpus[0].processes == watched.gpus.processes["GPU-a"]
    assert [listed for _, listed in watched.gpus.reads].count(True) == 2


async def test_processes_are_known_again_as_soon_as_a_lost_gpu_is_back():
    watched = Watched()
    watched.gpus.processes = {"GPU-a": (ProcessMemory(pid=7, used_bytes=GIB, command=("python",)),)}
    async with watched.running():
        await asyncio.sleep(3)
        watched.gpus.error = SensorError("GPU is lost")
        await asyncio.sleep(3)
        watched.gpus.error = None
        await until(lambda: isinstance(watched.look().gpus, Seen))
        seen = watched.look().gpus
    assert isinstance(seen, Seen)
    assert seen.value.gpus[0].processes == watched.gpus.processes["GPU-a"]


async def test_a_pace_that_quickens_wakes_sleeping_sensors():
    watched = Watched(interval_seconds=60.0)
    async with watched.running():
        await asyncio.sleep(70.5)
        looks, reads = len(watched.comfyui.looks), len(watched.gpus.reads)
        watched.observer.pace(0.25)
        await asyncio.sleep(0.1)
        assert len(watched.comfyui.looks) == looks + 1
        assert len(watched.gpus.reads) == reads + 1
        await asyncio.sleep(3)
        assert len(watched.gpus.reads) - reads >= 11
        assert 3 <= len(watched.comfyui.looks) - looks <= 5


async def test_a_pace_that_slows_down_lets_sensors_sleep_again():
    watched = Watched()
    async with watched.running():
        watched.observer.pace(0.25)
        await asyncio.sleep(5)
        watched.observer.pace(5.0)
        await asyncio.sleep(5)
        looks, reads = len(watched.comfyui.looks), len(watched.gpus.reads)
        await asyncio.sleep(50)
    assert len(watched.comfyui.looks) - looks in {9, 10, 11}
    assert len(watched.gpus.reads) - reads <= 51


async def test_no_sensor_is_asked_faster_than_its_fast_beat_however_the_pace_jitters():
    """Before v0.32.4 a faster poll of Ollama races with its own unloads."""
    watched = Watched()
    async with watched.running():
        await until(lambda: watched.observer.ready)
        for step in range(400):
            watched.observer.pace(4.0 - step * 0.009)
            await asyncio.sleep(0.05)
    for asked, least in (
        (watched.ollama.looks, 1.0),
        (watched.comfyui.polls, 1.0),
        (watched.comfyui.looks, 1.0),
        ([at for at, _ in watched.gpus.reads], 0.25),
    ):
        gaps = [later - earlier for earlier, later in itertools.pairwise(asked)]
        assert min(gaps) >= least


@pytest.mark.parametrize("sensor", ["nvml", "ollama", "comfyui"])
async def test_a_sensor_that_appears_later_works_as_soon_as_it_appears(sensor: str):
    watched = Watched()
    fake = {"nvml": watched.gpus, "ollama": watched.ollama, "comfyui": watched.comfyui}[sensor]
    fake.error = SensorError("not there")
    async with watched.running():
        await asyncio.sleep(200)
        assert watched.told(sensor) == [LOST]
        fake.error = None
        await until(lambda: watched.told(sensor) == [LOST, BACK], within=5.1)
        if sensor != "comfyui":
            assert now() - 200 < 1.2


async def test_gpus_may_come_and_go():
    watched = Watched()
    watched.gpus.processes = {"GPU-b": (ProcessMemory(pid=9, used_bytes=GIB, command=("x",)),)}
    other = Card("GPU-b", total_gib=48)
    async with watched.running():
        await asyncio.sleep(3)
        watched.gpus.cards.append(other)
        await asyncio.sleep(1.2)
        both = watched.look().gpus
        watched.gpus.cards.remove(watched.card)
        await asyncio.sleep(1.2)
        one = watched.look().gpus
        await asyncio.sleep(61)
        later = watched.look().gpus
    assert isinstance(both, Seen)
    assert isinstance(one, Seen)
    assert isinstance(later, Seen)
    assert [gpu.uuid for gpu in both.value.gpus] == ["GPU-a", "GPU-b"]
    assert [(gpu.index, gpu.uuid) for gpu in one.value.gpus] == [(0, "GPU-b")]
    assert later.value.gpus[0].processes == watched.gpus.processes["GPU-b"]


async def test_one_broken_card_is_missing_memory_and_no_lost_sensor():
    watched = Watched()
    watched.card.broken = Missing("GPU is lost")
    watched.gpus.cards.append(Card("GPU-b"))
    async with watched.running():
        await until(lambda: watched.observer.ready)
        seen = watched.look().gpus
    assert isinstance(seen, Seen)
    assert seen.value.gpus[0].memory == Missing("GPU is lost")
    assert watched.told("nvml") == [BACK]


async def test_models_that_come_go_or_get_a_new_expiry_are_traffic():
    watched = Watched()

    def active_at() -> float | None:
        reading = watched.look().ollama
        assert isinstance(reading, Seen)
        return reading.value.active_at

    async with watched.running():
        await asyncio.sleep(3)
        assert active_at() is None
        watched.ollama.load("llama3.1:8b", 5)
        await asyncio.sleep(2)
        came = active_at()
        assert came == pytest.approx(now() - 1.5, abs=1)
        await asyncio.sleep(100)
        assert active_at() == came
        watched.ollama.drop("llama3.1:8b")
        await asyncio.sleep(2)
        assert active_at() == pytest.approx(now() - 1.5, abs=1)


async def test_a_blink_of_ollama_does_not_make_its_traffic_forgotten():
    watched = Watched()
    watched.ollama.load("llama3.1:8b", 5)
    async with watched.running():
        await asyncio.sleep(10)
        before = watched.look().ollama
        watched.ollama.error = REFUSED
        await asyncio.sleep(3)
        watched.ollama.error = None
        watched.ollama.drop("llama3.1:8b")
        await asyncio.sleep(3)
        after = watched.look().ollama
    assert isinstance(before, Seen)
    assert isinstance(after, Seen)
    assert before.value.active_at is not None
    assert after.value.active_at is not None
    assert after.value.active_at >= before.value.active_at


async def test_another_model_or_placement_wakes_the_cycle_and_the_same_ones_do_not():
    watched = Watched()
    async with watched.running():
        await asyncio.sleep(5.5)
        watched.wakes.clear()
        await asyncio.sleep(20)
        assert watched.wakes == []
        watched.ollama.load("llama3.1:8b", 5)
        await asyncio.sleep(1.2)
        assert len(watched.wakes) == 1
        watched.ollama.load("llama3.1:8b", 5, on_gpu=0.5)
        await asyncio.sleep(1.2)
        assert len(watched.wakes) == 2


async def test_a_bug_in_a_sensor_ends_the_observer_with_it():
    watched = Watched()
    watched.ollama.error = KeyError("a bug")
    with pytest.raises(BaseExceptionGroup) as caught:
        async with watched.running():
            await asyncio.sleep(10)
    assert caught.value.subgroup(KeyError) is not None


async def test_stopping_closes_the_websocket_that_was_followed():
    watched = Watched()
    watched.comfyui.socket_error = None
    async with watched.running():
        await asyncio.sleep(5)
        assert watched.comfyui.sockets_closed == 0
    assert watched.comfyui.sockets_closed == 1
