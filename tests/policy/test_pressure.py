"""3d. Pressure: use over the threshold for longer than the grace period, with nobody waiting."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.policy.worlds import (
    GIB,
    SOFT,
    Policy,
    comfyui,
    crowded,
    gpu,
    gpus,
    model,
    ollama,
    queue,
    second,
    snapshot,
)
from vram_manager.domain.demand import Kind
from vram_manager.domain.event import EventType
from vram_manager.domain.reading import Missing, Off
from vram_manager.domain.snapshot import GpuMemory, Snapshot
from vram_manager.policy import Rules
from vram_manager.policy.pressure import grace_seconds, limit_bytes

MARKS = (EventType.PRESSURE_BEGAN, EventType.PRESSURE_ENDED)


def marks(policy: Policy) -> list[EventType]:
    return [kind for kind in policy.kinds() if kind in MARKS]


def at_percent(at: float, percent: float) -> Snapshot:
    """A card of 100 GiB, so much of it used, with a chat loaded and nothing in ComfyUI."""
    return snapshot(at, gpu(total_gib=100, free_gib=100 - percent), ollama=ollama(model(), active_at=at))


def test_use_over_the_threshold_counts_once_the_grace_is_over() -> None:
    policy = Policy()
    for at in (0, 10, 29.9):
        policy.look(crowded(at))
        assert (marks(policy), policy.watch.demands) == ([], {})
    assert policy.acts(crowded(30)) == SOFT
    (event,) = policy.of(EventType.PRESSURE_BEGAN)
    assert event.reason == "96 % used for 30 s, threshold 75 %"
    assert (event.target, event.gpu) == ("GPU 0", "GPU-a")


@pytest.mark.parametrize(
    ("percent", "high"), [pytest.param(75.0, False, id="at the threshold"), pytest.param(75.1, True, id="over it")]
)
def test_only_use_over_the_threshold_is_high(percent: float, high: bool) -> None:
    policy = Policy()
    policy.look(at_percent(0, percent))
    assert bool(policy.watch.pressure) is high


@pytest.mark.parametrize(
    ("percent", "ended"),
    [
        pytest.param(75.0, False, id="at the threshold"),
        pytest.param(74.8, False, id="a little below"),
        pytest.param(74.7, True, id="min_reclaim below"),
    ],
)
def test_pressure_ends_only_min_reclaim_below_the_threshold(percent: float, ended: bool) -> None:
    policy = Policy(Rules(grace_seconds=5))
    for at, used in ((0, 80), (5, 80), (6, percent)):
        policy.look(at_percent(at, used))
    assert marks(policy) == ([*MARKS] if ended else [MARKS[0]])
    assert bool(policy.watch.demands) is not ended


def test_pressure_that_ended_needs_a_new_grace_to_begin() -> None:
    policy = Policy(Rules(grace_seconds=5))
    for at, used in ((0, 80), (5, 80), (6, 50), (7, 80), (11, 80)):
        policy.look(at_percent(at, used))
    assert marks(policy) == [*MARKS]
    policy.look(at_percent(12, 80))
    assert marks(policy) == [*MARKS, MARKS[0]]


def test_a_dip_below_the_threshold_restarts_the_grace() -> None:
    policy = Policy()
    for at, used in ((0, 80), (20, 74), (21, 80), (50, 80)):
        policy.look(at_percent(at, used))
    assert marks(policy) == []
    policy.look(at_percent(51, 80))
    assert marks(policy) == [EventType.PRESSURE_BEGAN]


@pytest.mark.parametrize(
    "lost",
    [
        pytest.param(snapshot(20, Missing("lost"), comfyui=Off()), id="NVML is gone"),
        pytest.param(
            snapshot(20, gpus(gpu(free_gib=Missing("lost")), second(free_gib=20)), comfyui=Off()), id="this GPU is gone"
        ),
    ],
)
def test_a_missing_reading_restarts_the_grace(lost: Snapshot) -> None:
    policy = Policy()
    policy.look(crowded(0))
    policy.look(lost)
    assert policy.acts(crowded(31)) is None
    assert policy.acts(crowded(60.9)) is None
    assert policy.acts(crowded(61)) == SOFT


def test_a_missing_reading_is_never_pressure() -> None:
    policy = Policy()
    for at in range(0, 3600, 60):
        policy.look(snapshot(at, gpus(gpu(free_gib=Missing("lost")), second(free_gib=20))))
    assert policy.told == []


@pytest.mark.parametrize(
    ("loaded", "grace"),
    [
        pytest.param(ollama(active_at=400), 30, id="traffic ten minutes ago"),
        pytest.param(ollama(active_at=399), 600, id="traffic longer ago than that"),
        pytest.param(ollama(active_at=None), 600, id="no traffic ever seen"),
        pytest.param(Missing("timed out"), 600, id="Ollama unread"),
        pytest.param(Off(), 600, id="no Ollama here"),
    ],
)
def test_the_grace_is_long_while_nobody_would_gain(loaded, grace: float) -> None:
    assert grace_seconds(snapshot(1000, ollama=loaded), Rules()) == grace


def test_an_artist_alone_is_left_alone_for_the_long_grace() -> None:
    policy = Policy()
    alone = {"ollama": ollama(active_at=None)}
    for at in range(0, 600, 10):
        assert policy.acts(crowded(at, **alone)) is None
    assert policy.acts(crowded(600, **alone)) == SOFT


def test_a_chat_that_comes_back_cuts_the_long_grace_short() -> None:
    policy = Policy()
    for at in range(0, 200, 10):
        assert policy.acts(crowded(at, ollama=ollama(active_at=None))) is None
    assert policy.acts(crowded(200, ollama=ollama(model(), active_at=200))) == SOFT


def test_pressure_waits_until_comfyui_has_been_idle_for_long() -> None:
    policy = Policy()
    for at in range(0, 69, 3):
        assert policy.acts(crowded(at, queue=queue(since=40))) is None
    assert policy.acts(crowded(70, queue=queue(since=40))) == SOFT


def test_each_gpu_has_its_own_pressure() -> None:
    policy = Policy(Rules(grace_seconds=5, comfyui_gpu="1", ollama_gpu="0"))
    for at in (0, 5):
        both = gpus(gpu(free_gib=20), second(free_gib=1))
        policy.look(snapshot(at, both, comfyui=comfyui(torch_gib=8)))
    (demand,) = policy.watch.demands.values()
    assert (demand.kind, demand.gpu, demand.need_free_bytes) == (Kind.PRESSURE, "GPU-b", 6 * GIB + 2**28)
    assert policy.watch.pending is not None


def test_pressure_on_another_gpu_than_comfyuis_is_not_its_to_relieve() -> None:
    policy = Policy(Rules(grace_seconds=5, comfyui_gpu="1"))
    for at in (0, 5):
        decision = policy.look(snapshot(at, gpus(gpu(free_gib=1), second(free_gib=20)), comfyui=comfyui(torch_gib=8)))
    assert decision.branch == "4 other GPU"
    assert decision.action is None


@pytest.mark.parametrize(
    ("total_gib", "free_gib", "percent"),
    [
        pytest.param(24, 24, 0.0, id="empty"),
        pytest.param(24, 0, 100.0, id="full"),
        pytest.param(24, 30, 0.0, id="more free than there is"),
        pytest.param(24, -1, 100.0, id="less than nothing free"),
        pytest.param(0, 0, 100.0, id="a card without memory"),
        pytest.param(0, 5, 0.0, id="free memory of a card without any"),
    ],
)
def test_used_percent_stays_between_0_and_100(total_gib: float, free_gib: float, percent: float) -> None:
    memory = gpu(total_gib=total_gib, free_gib=free_gib).memory
    assert isinstance(memory, GpuMemory)
    assert memory.used_percent == percent
    assert limit_bytes(memory, 75.0) >= 0


def test_the_drivers_reserve_is_not_memory_that_anybody_can_use() -> None:
    card = gpu(total_gib=24, free_gib=6)
    assert isinstance(card.memory, GpuMemory)
    assert replace(card.memory, reserved_bytes=2 * GIB).used_percent == pytest.approx(100 * 16 / 22)
