"""Cards that are split into instances (MIG)."""

import pytest

from tests.gpus.trees import GIB
from vram_manager.domain.reading import Missing
from vram_manager.domain.snapshot import GpuMemory
from vram_manager.simulator.nvml_state import MAX_GPUS

NO_PERMISSION, GPU_IS_LOST, INVALID_ARGUMENT, FUNCTION_NOT_FOUND = 4, 15, 2, 13


@pytest.fixture
def split(bench):
    """Two cards; the first is split in two instances, in its second and fourth place."""
    for part, used in ((0, 3), (1, 0)):
        bench.state.set_identity(MAX_GPUS + part, name="NVIDIA H100 80GB HBM3 MIG 1g.10gb", uuid=f"MIG-{part}")
        bench.state.set_memory(MAX_GPUS + part, total=10 * GIB, reserved=0, used=used * GIB, free=(10 - used) * GIB)
    bench.state.split(0, None, 0, None, 1)
    return bench


def uuids(gpus):
    return [gpu.uuid for gpu in gpus.gpus]


def test_instances_stand_for_the_card_that_they_are_made_of(split):
    first, card, second = split.read().gpus
    assert card.uuid == "GPU-00000000-0000-0000-0000-000000000001"
    assert (first.uuid, first.name) == ("MIG-0", "NVIDIA H100 80GB HBM3 MIG 1g.10gb")
    assert (first.memory.total_bytes, first.memory.used_bytes) == (10 * GIB, 3 * GIB)
    assert second.uuid == "MIG-1"


def test_the_first_instance_has_its_cards_index_and_no_two_gpus_have_one(split):
    split.state.gpu_count = 3
    split.state.split(2, 2)
    split.state.set_identity(MAX_GPUS + 2, name="MIG", uuid="MIG-2")
    gpus = split.read().gpus
    assert [(gpu.index, gpu.uuid) for gpu in gpus if gpu.index != 1] == [(0, "MIG-0"), (2, "MIG-2"), (3, "MIG-1")]
    assert gpus[1].uuid == "GPU-00000000-0000-0000-0000-000000000001"


def test_an_instance_tells_its_own_processes_and_nothing_of_the_whole_card(split):
    split.state.add_process(MAX_GPUS, 10, None)
    instance = split.read(with_processes=True).gpus[0]
    assert [process.pid for process in instance.processes] == [10]
    assert isinstance(instance.processes[0].used_bytes, Missing)
    for field in (instance.utilization_percent, instance.temperature_celsius, instance.power_watts):
        assert "whole card" in field.why


def test_a_plain_read_asks_for_no_processes_of_an_instance(split):
    split.read()
    assert split.state.process_calls == 0


def test_instances_that_come_and_go_are_seen_in_the_next_read(split):
    split.read()
    split.state.split(0, 1)
    assert uuids(split.read())[0] == "MIG-1"
    split.state.gpus[0].mig_mode = 0
    assert [gpu.index for gpu in split.read().gpus] == [0, 1]


def test_an_instance_that_goes_away_while_it_is_looked_at_is_left_out(split):
    split.state.gpus[MAX_GPUS].error = INVALID_ARGUMENT
    first, card = split.read().gpus
    assert (first.uuid, first.index, card.index) == ("MIG-1", 0, 1)


def test_an_instance_without_a_name_is_named_after_its_card(split):
    split.state.gpus[MAX_GPUS].name_error = NO_PERMISSION
    assert split.read().gpus[0].name == "Fake GPU 0 MIG"


def test_instances_that_may_not_be_seen_say_what_to_do(split):
    split.state.gpus[0].mig_error = NO_PERMISSION
    card, whole = split.read().gpus
    assert card.index == 0
    assert "NVIDIA_MIG_MONITOR_DEVICES=all" in card.memory.remedy
    assert isinstance(whole.memory, GpuMemory)


def test_an_instance_whose_memory_may_not_be_seen_says_what_to_do(split):
    split.state.gpus[MAX_GPUS].memory_error = NO_PERMISSION
    assert "NVIDIA_MIG_MONITOR_DEVICES=all" in split.read().gpus[0].memory.remedy


def test_a_split_card_without_instances_says_so(split):
    split.state.split(0)
    memory = split.read().gpus[0].memory
    assert "has no instance" in memory.why
    assert "nvidia-smi mig -cgi" in memory.remedy


def test_a_split_card_that_is_lost_says_so(split):
    split.read()
    split.state.gpus[0].error = GPU_IS_LOST
    assert "lost" in split.read().gpus[0].memory.why


@pytest.mark.parametrize("code", [3, FUNCTION_NOT_FOUND])
def test_a_card_that_cannot_be_split_is_asked_once(bench, code):
    bench.state.gpu_count = 1
    bench.state.gpus[0].mig_mode_error = code
    bench.read()
    calls = bench.state.calls
    bench.read()
    assert bench.state.calls - calls == 5  # count, handle, UUID, memory, load


# WSL2


def test_under_wsl_the_memory_of_a_process_is_missing_for_that_reason(on_the_fake, tree):
    from vram_manager.gpus.nvml import NvmlSensor

    tree.kernel("5.15.153.1-microsoft-standard-WSL2")
    bench = on_the_fake(NvmlSensor(proc_root=tree.proc))
    assert bench.read(with_processes=True).gpus[0].processes == Missing("WSL2 tells no memory per process")
    bench.state.add_process(0, 10, None)
    (process,) = bench.read(with_processes=True).gpus[0].processes
    assert process.used_bytes == Missing("WSL2 tells no memory per process")


@pytest.mark.parametrize("version", ["6.8.0-45-generic", "6.5.0-1025-azure"])
def test_other_kernels_are_not_wsl(on_the_fake, tree, version):
    from vram_manager.gpus.nvml import NvmlSensor

    tree.kernel(version)
    bench = on_the_fake(NvmlSensor(proc_root=tree.proc))
    assert "pid: host" in bench.read(with_processes=True).gpus[0].processes.remedy
