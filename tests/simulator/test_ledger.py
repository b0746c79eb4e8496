"""The ledger is the truth: it adds up, it refuses, it tells."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vram_manager.domain.reading import Missing
from vram_manager.errors import SensorError
from vram_manager.simulator.ledger import GIB, Ledger, LedgerGpuSensor, OutOfMemory


def test_a_claim_that_does_not_fit_changes_nothing():
    ledger = Ledger(10 * GIB, reserved_bytes=0)
    ledger.claim("a", 8 * GIB)
    with pytest.raises(OutOfMemory):
        ledger.claim("b", 3 * GIB)
    assert ledger.holders() == {"a": 8 * GIB}
    assert ledger.ooms == 1


def test_the_peak_stays_when_the_holder_has_gone():
    ledger = Ledger(10 * GIB, reserved_bytes=0)
    ledger.claim("a", 8 * GIB)
    assert ledger.release("a") == 8 * GIB
    assert ledger.peak_used_bytes == 8 * GIB
    assert ledger.free_bytes == 10 * GIB


def test_every_change_is_told_and_nothing_else():
    ledger, told = Ledger(10 * GIB, reserved_bytes=0), []
    ledger.on_change.append(lambda: told.append(ledger.used_bytes))
    ledger.resize("a", GIB)
    ledger.resize("a", GIB)
    ledger.release("a")
    assert told == [GIB, 0]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 12 * GIB)), max_size=30))
def test_free_is_never_negative_and_everything_adds_up(changes):
    ledger = Ledger(10 * GIB)
    for holder, held_bytes in changes:
        with suppress(OutOfMemory):
            ledger.resize(holder, held_bytes)
        assert ledger.free_bytes >= 0
        assert ledger.reserved_bytes + ledger.used_bytes + ledger.free_bytes == ledger.total_bytes


@pytest.mark.asyncio
async def test_the_sensor_reads_every_ledger_as_a_gpu():
    one, two = Ledger(24 * GIB, uuid="GPU-1"), Ledger(12 * GIB, uuid="GPU-2")
    two.claim("desktop", GIB)
    gpus = await LedgerGpuSensor(one, two).read()
    assert [(gpu.uuid, gpu.index, gpu.memory.used_bytes) for gpu in gpus.gpus] == [
        ("GPU-1", 0, 0),
        ("GPU-2", 1, GIB),
    ]


@pytest.mark.asyncio
async def test_processes_are_missing_unless_the_pid_namespace_is_shared():
    ledger = Ledger(24 * GIB)
    ledger.claim("comfyui", GIB)
    hidden = (await LedgerGpuSensor(ledger).read(with_processes=True)).gpus[0].processes
    shown = (await LedgerGpuSensor(ledger, show_processes=True).read(with_processes=True)).gpus[0].processes
    assert isinstance(hidden, Missing)
    assert [(process.command, process.used_bytes) for process in shown] == [(("comfyui",), GIB)]


@pytest.mark.asyncio
async def test_a_lost_gpu_is_an_error_and_not_an_empty_one():
    ledger = Ledger(24 * GIB)
    ledger.lost = True
    with pytest.raises(SensorError, match="lost"):
        await LedgerGpuSensor(ledger).read()
