"""Every vendor's GPUs together, in one machine."""

import asyncio
import os
import subprocess
import sys
import threading
import time
from contextlib import suppress

from tests.gpus.conftest import ROOT
from tests.gpus.trees import GIB, write
from vram_manager.domain.reading import Missing
from vram_manager.domain.snapshot import GpuMemory
from vram_manager.errors import SensorError, TimedOut
from vram_manager.gpus.all import AllGpus

MIB = 2**20
FOREVER_MS = 600_000
DRIVER_NOT_LOADED, GPU_IS_LOST, TIMEOUT, UNKNOWN = 9, 15, 10, 999


def names(gpus):
    return [(gpu.index, gpu.vendor, gpu.name) for gpu in gpus.gpus]


def test_cards_of_every_vendor_are_listed_together_and_no_two_have_one_index(every, tree):
    tree.arc()
    tree.amd("0000:09:00.0", unique_id=None)
    tree.amd("0000:08:00.0")
    gpus = every.read()
    assert names(gpus) == [
        (0, "nvidia", "Fake GPU 0"),
        (1, "nvidia", "Fake GPU 1"),
        (2, "amd", "AMD GPU 0x744c"),
        (3, "amd", "AMD GPU 0x744c"),
        (4, "intel", "Intel GPU 0xe20b"),
    ]
    assert gpus.gpus[2].uuid == "GPU-53bb4c0c0bd43f0c"
    assert gpus.driver_version == "595.71.05"


def test_a_machine_with_nvidia_only_reads_as_before(every, bench):
    assert every.read(with_processes=True) == bench.read(with_processes=True)
    assert {thread.name for thread in threading.enumerate()} & {"amdgpu/i915/xe"} == set()


def test_without_nvidias_driver_an_amd_card_is_no_error(every, tree):
    every.state.init_error = DRIVER_NOT_LOADED
    tree.amd()
    gpus = every.read()
    assert names(gpus) == [(0, "amd", "AMD GPU 0x744c")]
    assert isinstance(gpus.driver_version, Missing)


def test_with_nothing_at_all_the_error_is_nvmls_and_says_what_else_was_looked_for(every):
    every.state.init_error = DRIVER_NOT_LOADED
    refusal = every.refusal()
    assert refusal.why == "the NVIDIA driver is not loaded; no GPU of AMD or Intel is here either"
    assert "nvidia-smi" in refusal.remedy


# GPUs in CPUs


def test_the_gpu_in_an_intel_cpu_is_left_out_and_said_so(every, tree):
    tree.intel_in_the_cpu()
    gpus = every.read()
    assert len(gpus.gpus) == 2
    assert gpus.left_out == ("Intel GPU 0x46a6 (0000:00:02.0) is part of the CPU and has no memory of its own",)


def test_the_gpu_in_an_intel_cpu_is_no_gpu_where_it_is_the_only_one(every, tree):
    every.state.init_error = DRIVER_NOT_LOADED
    tree.intel_in_the_cpu()
    refusal = every.refusal()
    assert refusal.why.startswith("the NVIDIA driver is not loaded; Intel GPU 0x46a6")


def test_an_apu_is_left_out_beside_a_card_and_said_so(every, tree):
    tree.apu()
    gpus = every.read()
    assert {gpu.vendor for gpu in gpus.gpus} == {"nvidia"}
    assert gpus.left_out == ("AMD GPU 0x1586 (0000:c5:00.0) is part of the CPU and has the machine's memory",)


def test_an_apu_is_left_out_beside_a_card_of_its_own_maker(every, tree):
    every.state.init_error = DRIVER_NOT_LOADED
    tree.apu()
    tree.amd()
    gpus = every.read()
    assert [gpu.uuid for gpu in gpus.gpus] == ["GPU-53bb4c0c0bd43f0c"]
    assert len(gpus.left_out) == 1


def test_an_apu_is_read_where_it_is_the_only_one(every, tree):
    every.state.init_error = DRIVER_NOT_LOADED
    tree.apu()
    tree.meminfo(total=124 * GIB, available=100 * GIB)
    (gpu,) = every.read().gpus
    assert gpu.unified
    assert gpu.memory.total_bytes == 96 * GIB


def test_an_apu_that_sleeps_is_no_card(every, tree):
    tree.apu(power__runtime_status="suspended")
    assert len(every.read().left_out) == 1


def test_an_apu_is_not_taken_for_the_card_whose_driver_fails(every, tree):
    every.state.init_error = DRIVER_NOT_LOADED
    tree.nvidia()
    tree.apu()
    assert "driver is not loaded" in every.refusal().why


# One vendor fails


def test_when_nvidias_driver_fails_an_amd_card_is_read_and_nvidias_are_known(every, tree):
    tree.amd()
    before = every.read()
    every.state.count_error = GPU_IS_LOST
    gpus = every.read()
    assert names(gpus) == names(before)
    assert "lost" in gpus.gpus[0].memory.why
    assert isinstance(gpus.gpus[2].memory, GpuMemory)


def test_nvidias_cards_that_never_were_read_are_known_from_the_bus(every, tree):
    every.state.init_error = DRIVER_NOT_LOADED
    tree.nvidia()
    tree.amd()
    nvidia, amd = every.read().gpus
    assert (nvidia.uuid, nvidia.name, nvidia.source) == ("0000:01:00.0", "NVIDIA GPU 0x2820", "PCI")
    assert "driver is not loaded" in nvidia.memory.why
    assert nvidia.memory.remedy
    assert (amd.index, amd.vendor) == (1, "amd")


def test_when_a_call_to_nvidias_driver_hangs_an_amd_card_is_read(every, tree):
    tree.amd()
    every.read()
    every.state.hang_ms = FOREVER_MS
    every.when_a_call_hangs(lambda: every.put_clock_forward(5))
    with suppress(SensorError):  # the clock may have jumped over the other answer too
        every.read()
    gpus = within_10_seconds(every, lambda gpus: isinstance(gpus.gpus[2].memory, GpuMemory))
    assert "has been hanging for" in gpus.gpus[0].memory.why


def within_10_seconds(bench, true):
    """The first reading that is as wished."""
    latest = time.monotonic() + 10
    while True:
        with suppress(SensorError):
            if true(gpus := bench.read()):
                return gpus
        assert time.monotonic() < latest
        os.sched_yield()


def test_when_a_call_to_the_only_driver_hangs_slow_is_not_down(every, tree):
    tree.intel_in_the_cpu()
    every.read()
    every.state.hang_ms = FOREVER_MS
    every.when_a_call_hangs(lambda: every.put_clock_forward(5))
    assert isinstance(every.refusal(), TimedOut)


def test_a_card_without_a_reading_is_no_error_of_another_vendor(every, tree):
    every.state.init_error = DRIVER_NOT_LOADED
    tree.arc()
    (gpu,) = every.read().gpus
    assert "12.0 GiB in total" in gpu.memory.why


def test_when_no_card_of_any_vendor_can_be_read_the_error_names_all(every, tree):
    every.state.init_error = DRIVER_NOT_LOADED
    tree.nvidia()
    tree.arc()
    why = every.refusal().why
    assert "driver is not loaded" in why
    assert "Intel GPU 0xe20b: its driver tells 12.0 GiB in total" in why


def test_it_is_revoked_as_nvml_is(every, tree):
    tree.amd()
    every.read()
    assert not every.sensor.revoked
    every.state.count_error = UNKNOWN
    every.read()
    assert every.sensor.revoked


# What it costs


def test_cards_are_looked_for_once_a_minute(every, tree):
    every.read()
    tree.amd()
    every.put_clock_forward(59)
    assert len(every.read().gpus) == 2
    every.put_clock_forward(2)
    assert len(every.read().gpus) == 3


def test_a_card_that_is_unplugged_is_gone_within_a_minute(every, tree):
    directory = tree.amd()
    every.read()
    write(directory, {"mem_info_vram_used": None})
    (tree.sys / "class" / "drm" / "card0" / "device").unlink()
    assert isinstance(every.read().gpus[2].memory, Missing)
    every.put_clock_forward(61)
    assert len(every.read().gpus) == 2


def test_a_machine_with_nvidia_only_loads_no_other_vendors_code():
    code = (
        "import sys; import vram_manager.gpus.all;"
        "print([name for name in sys.modules if name.endswith(('.amd', '.intel', '.fdinfo', '.amd_tools'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Sleep, and the end


def test_a_laptops_sleeping_gpu_is_listed_and_nothing_is_woken(every, tree):
    tree.nvidia(control="auto", status="suspended")
    tree.apu()
    gpus = every.read()
    assert [(gpu.uuid, gpu.asleep) for gpu in gpus.gpus] == [("0000:01:00.0", True)]
    assert every.state.inits == 0
    every.sensor.wake()
    assert isinstance(every.read().gpus[0].memory, GpuMemory)


def test_a_closed_sensor_reads_nothing(every, tree):
    tree.amd()
    every.read()
    every.close()
    assert "closed" in every.refusal().why


def test_a_sensor_that_never_read_closes_without_touching_anything(every):
    every.close()
    assert every.state.inits == 0


def test_by_itself_it_reads_this_machine():
    async def said():
        sensor = AllGpus()
        try:
            return await sensor.read(with_processes=True)
        except SensorError as error:
            return error
        finally:
            sensor.close()

    answer = asyncio.run(said())
    assert answer.remedy if isinstance(answer, SensorError) else answer.gpus
