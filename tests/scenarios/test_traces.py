"""What was promised holds on random days, as counted by the simulator. More seeds: `tests/scenarios/traces.py`."""

from __future__ import annotations

import pytest

from tests.scenarios.traces import broken_alone, broken_promises, play


@pytest.mark.parametrize("seed", [11, 107, 205, 338, 488])
def test_through_the_gateways_all_are_served_by_the_gpu_in_order_and_nobody_runs_out_of_memory(seed: int) -> None:
    assert broken_promises(play(seed)) == []


@pytest.mark.parametrize("seed", [3, 18])
def test_without_gateways_what_fell_to_the_cpu_is_repaired_once_it_can_be_and_never_in_a_loop(seed: int) -> None:
    assert broken_alone(play(seed, gateways=False)) == []


@pytest.mark.parametrize("seed", [3, 7, 26])
def test_clients_that_hang_up_cost_the_others_nothing_and_leave_nothing_behind(seed: int) -> None:
    day = play(seed, leaving=True)

    assert day.hung_up != set()
    assert broken_promises(day) == []
