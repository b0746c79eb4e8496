"""How soon to look again."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.policy.worlds import GIB, Policy, fallen, gpu, gpus, queue, second, snapshot
from vram_manager.domain.reading import Missing
from vram_manager.domain.snapshot import Snapshot
from vram_manager.domain.watch import Watch
from vram_manager.policy import Rules, beat_seconds
from vram_manager.policy.accounting import gpus_seen


def beat(policy: Policy, seen: Snapshot) -> float:
    return beat_seconds(policy.look(seen), gpus_seen(seen), policy.rules)


def filling(gib_per_second: float) -> Watch:
    return Watch(fill_rate_bytes_per_second=gib_per_second * GIB)


def test_at_rest_the_beat_is_the_check_interval() -> None:
    assert beat(Policy(Rules(interval_seconds=7)), snapshot(0)) == 7


def test_while_something_settles_the_beat_is_a_quarter_of_a_second() -> None:
    policy = Policy()
    policy.acts(fallen(0))
    assert beat(policy, fallen(1)) == 0.25


def test_with_a_demand_the_beat_is_a_second_at_most() -> None:
    assert beat(Policy(), fallen(0, queue=queue(1, since=0))) == 1.0


@pytest.mark.parametrize(
    ("asked_ago", "seconds"),
    [
        pytest.param(10, 1.0, id="the cooldown is long"),
        pytest.param(29.4, 0.6, id="the cooldown ends soon"),
        pytest.param(29.9, 0.25, id="the cooldown ends at once"),
    ],
)
def test_the_end_of_a_cooldown_is_not_overslept(asked_ago: float, seconds: float) -> None:
    policy = Policy(watch=Watch(posted_at={"comfyui": -asked_ago}))
    assert beat(policy, fallen(0)) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("free_gib", "rate", "seconds"),
    [
        pytest.param(24, 1, 5, id="plenty of room"),
        pytest.param(5.2, 2, 2, id="until only the hard reserve is left"),
        pytest.param(1.2, 2, 0.5, id="no faster than people notice"),
        pytest.param(0, 2, 0.5, id="no room at all"),
        pytest.param(1, 0, 5, id="nothing has ever filled"),
    ],
)
def test_the_beat_is_bound_by_how_soon_the_room_can_be_gone(free_gib: float, rate: float, seconds: float) -> None:
    assert beat(Policy(watch=filling(rate)), snapshot(0, gpu(free_gib=free_gib))) == pytest.approx(seconds)


def test_the_gpu_with_the_least_room_sets_the_beat_and_an_unread_one_does_not() -> None:
    policy = Policy(watch=filling(2))
    cards = gpus(gpu(free_gib=Missing("lost")), second(free_gib=5.2), replace(second(), uuid="GPU-c", index=2))
    assert beat(policy, snapshot(0, cards)) == pytest.approx(2)


def test_a_blind_policy_keeps_the_check_interval() -> None:
    policy = Policy(watch=filling(2))
    assert beat(policy, snapshot(0, Missing("lost"), comfyui=Missing("refused"))) == 5
