"""NvmlSensor through the real nvidia-ml-py, on a library whose answers the test decides."""

import asyncio
import ctypes
import ctypes.util
import os
import time

import pynvml
import pytest

from vram_manager.domain.reading import Missing
from vram_manager.domain.snapshot import Gpu, GpuMemory, ProcessMemory
from vram_manager.errors import SensorError, TimedOut
from vram_manager.simulator.nvml_state import COMPUTE, GRAPHICS, MPS, NvmlState

MIB = 1024 * 1024
FOREVER_MS = 600_000

NOT_SUPPORTED, NO_PERMISSION, TIMEOUT, FUNCTION_NOT_FOUND, NO_DATA = 3, 4, 10, 13, 24
UNINITIALIZED, DRIVER_NOT_LOADED, GPU_IS_LOST, RESET_REQUIRED = 1, 9, 15, 16
OPERATING_SYSTEM, VERSION_MISMATCH, GPU_NOT_FOUND, UNKNOWN = 17, 18, 28, 999

HIDDEN = Missing("processes are not visible", "run the container with pid: host")


def only(gpus):
    (gpu,) = gpus.gpus
    return gpu


# What is read


def test_both_sides_lay_out_the_state_alike(library):
    assert ctypes.CDLL(str(library)).fake_nvml_sizeof() == ctypes.sizeof(NvmlState)


def test_every_gpu_tells_its_identity_memory_and_utilization(bench):
    bench.state.set_memory(1, total=24 * MIB, reserved=1 * MIB, used=20 * MIB, free=3 * MIB)
    bench.state.set_identity(1, name="RTX 9999", uuid="GPU-b")
    bench.state.gpus[1].utilization = 93

    gpus = bench.read()

    assert [gpu.index for gpu in gpus.gpus] == [0, 1]
    assert gpus.driver_version == "595.71.05"
    assert not gpus.second_hand
    assert gpus.gpus[1] == Gpu(
        uuid="GPU-b",
        index=1,
        name="RTX 9999",
        memory=GpuMemory(total_bytes=24 * MIB, used_bytes=20 * MIB, free_bytes=3 * MIB, reserved_bytes=1 * MIB),
        utilization_percent=93,
    )


def test_used_memory_does_not_include_the_drivers_reserve(bench):
    bench.state.set_memory(0, total=100, reserved=30, used=0, free=70)
    assert bench.read().gpus[0].memory.used_bytes == 0


def test_a_plain_read_asks_for_no_processes(bench):
    bench.read()
    assert bench.state.process_calls == 0


def test_a_read_with_processes_also_tells_temperature_and_power(bench):
    bench.state.gpus[0].temperature, bench.state.gpus[0].power = 67, 320_500
    gpu = bench.read(with_processes=True).gpus[0]
    assert (gpu.temperature_celsius, gpu.power_watts) == (67, 320.5)


def test_nvml_is_initialised_once_for_many_reads(bench):
    for _ in range(20):
        bench.read()
    assert (bench.state.inits, bench.state.shutdowns) == (1, 0)


def test_a_name_is_asked_once_for_each_gpu(bench):
    for _ in range(3):
        bench.read()
    assert bench.state.name_calls == 2


def test_another_card_at_an_index_has_its_own_name(bench):
    bench.read()
    bench.state.set_identity(0, name="the new one", uuid="GPU-new")
    gpu = bench.read().gpus[0]
    assert (gpu.uuid, gpu.name) == ("GPU-new", "the new one")


def test_a_name_that_is_no_text_is_unknown(bench):
    bench.state.gpus[0].name = b"\xf8\xf8"
    assert bench.read().gpus[0].name == "unknown GPU"


def test_a_driver_version_that_is_no_text_is_missing(bench):
    bench.state.driver_version = b"\xf8\xf8"
    assert bench.read().driver_version == Missing("NVML does not say")


# One card or one field is broken


@pytest.mark.parametrize("place", ["handle_error", "error"])
@pytest.mark.parametrize("code", [GPU_IS_LOST, RESET_REQUIRED, GPU_NOT_FOUND, UNKNOWN, OPERATING_SYSTEM, NO_DATA])
def test_a_broken_gpu_keeps_its_identity_and_harms_no_other(bench, place, code):
    before = bench.read()
    setattr(bench.state.gpus[0], place, code)

    broken, other = bench.read().gpus

    assert (broken.uuid, broken.index, broken.name) == (before.gpus[0].uuid, 0, before.gpus[0].name)
    assert isinstance(broken.memory, Missing)
    assert isinstance(broken.utilization_percent, Missing)
    assert other == before.gpus[1]


def test_a_lost_gpu_says_what_to_do(bench):
    bench.state.gpus[0].error = GPU_IS_LOST
    memory = bench.read().gpus[0].memory
    assert "lost" in memory.why
    assert "nvidia-smi --gpu-reset" in memory.remedy


def test_a_gpu_that_was_never_seen_is_named_by_its_index(bench):
    bench.state.gpus[1].handle_error = GPU_IS_LOST
    gpu = bench.read().gpus[1]
    assert (gpu.uuid, gpu.name) == ("index-1", "unknown GPU")


def test_a_gpu_whose_uuid_fails_keeps_the_last_known_one(bench):
    before = bench.read()
    bench.state.gpus[0].uuid_error = TIMEOUT
    assert bench.read() == before


def test_a_lost_gpu_that_is_back_reads_as_before(bench):
    before = bench.read()
    bench.state.gpus[1].error = GPU_IS_LOST
    bench.read()
    bench.state.gpus[1].error = 0
    assert bench.read() == before


@pytest.mark.parametrize("code", [GPU_IS_LOST, RESET_REQUIRED, GPU_NOT_FOUND, UNKNOWN])
def test_a_lost_gpu_brings_a_new_init_only_after_the_wait(bench, code):
    bench.state.gpus[1].error = code
    bench.read()
    bench.read()
    assert bench.state.inits == 1

    bench.put_clock_forward(1)
    bench.read()
    assert (bench.state.inits, bench.state.shutdowns) == (2, 1)


def test_a_gpu_that_stays_lost_brings_ever_rarer_inits(bench):
    bench.state.gpus[1].error = GPU_IS_LOST
    bench.read()
    for _ in range(300):
        bench.put_clock_forward(1)
        bench.read()
    # After 1, 2, 4, 8, 16 s and then every 30 s: 5 + 269 // 30, and the first.
    assert 13 <= bench.state.inits <= 15


def test_a_lost_gpu_that_is_back_cancels_the_new_init(bench):
    bench.state.gpus[1].error = GPU_IS_LOST
    bench.read()
    bench.state.gpus[1].error = 0
    bench.read()
    bench.put_clock_forward(60)
    bench.read()
    assert bench.state.inits == 1


def test_memory_that_is_not_supported_is_missing_and_not_zero(bench):
    bench.state.gpu_count = 1
    bench.state.gpus[0].memory_error = NOT_SUPPORTED

    gpu = only(bench.read())

    assert isinstance(gpu.memory, Missing)
    assert "unified memory" in gpu.memory.why
    assert gpu.utilization_percent == 7


def test_a_field_that_is_not_supported_is_missing_alone(bench):
    gpu = bench.state.gpus[0]
    gpu.utilization_error = gpu.temperature_error = gpu.power_error = gpu.compute_error = NOT_SUPPORTED

    seen = bench.read(with_processes=True).gpus[0]

    assert isinstance(seen.memory, GpuMemory)
    for field in (seen.utilization_percent, seen.temperature_celsius, seen.power_watts, seen.processes):
        assert "does not report it" in field.why


def test_a_field_that_is_not_supported_brings_no_new_init(bench):
    bench.state.gpus[0].memory_error = NOT_SUPPORTED
    bench.read()
    bench.put_clock_forward(60)
    bench.read()
    assert bench.state.inits == 1


def test_an_error_without_a_name_is_told_by_number_and_not_asked_of_the_driver(bench):
    bench.read()
    calls = bench.state.calls
    bench.read()
    calls_of_a_read = bench.state.calls - calls

    bench.state.gpus[0].memory_error = 4242
    calls = bench.state.calls
    assert bench.read().gpus[0].memory == Missing("NVML error 4242")
    assert bench.state.calls - calls == calls_of_a_read


@pytest.mark.parametrize(
    ("total", "used", "free"),
    [
        pytest.param(0, 0, 0, id="a card without memory"),
        pytest.param(100, 10, 101, id="more free than there is"),
        pytest.param(100, 2**64 - 1, 10, id="more used than there is"),
    ],
)
def test_absurd_memory_is_missing(bench, total, used, free):
    bench.state.set_memory(0, total=total, reserved=0, used=used, free=free)
    memory = bench.read().gpus[0].memory
    assert isinstance(memory, Missing)
    assert "contradicts itself" in memory.why


def test_a_gpu_that_we_may_not_open_is_left_out(bench):
    bench.state.gpus[0].handle_error = NO_PERMISSION
    assert only(bench.read()).index == 1


def test_it_is_an_error_when_no_gpu_may_be_opened(bench):
    bench.state.gpus[0].handle_error = bench.state.gpus[1].handle_error = NO_PERMISSION
    refusal = bench.refusal()
    assert "none of 2 GPUs can be opened" in refusal.why
    assert refusal.remedy


# Processes


def test_a_process_is_told_with_its_memory_and_command(bench, proc):
    (proc / "4711").mkdir()
    (proc / "4711" / "cmdline").write_bytes(b"python\0main.py\0--listen\0")
    bench.state.add_process(0, 4711, 3 * MIB)

    gpu = bench.read(with_processes=True).gpus[0]

    assert gpu.processes == (ProcessMemory(pid=4711, used_bytes=3 * MIB, command=("python", "main.py", "--listen")),)


def test_a_process_in_several_lists_is_one_process(bench):
    bench.state.add_process(0, 30, 3 * MIB, kinds=MPS)
    bench.state.add_process(0, 10, 1 * MIB, kinds=COMPUTE | GRAPHICS | MPS)
    bench.state.add_process(0, 20, 2 * MIB, kinds=GRAPHICS)

    processes = bench.read(with_processes=True).gpus[0].processes

    assert [(process.pid, process.used_bytes) for process in processes] == [
        (10, 1 * MIB),
        (20, 2 * MIB),
        (30, 3 * MIB),
    ]


def test_memory_of_a_process_that_is_not_available_is_missing(bench):
    bench.state.add_process(0, 10, None)
    (process,) = bench.read(with_processes=True).gpus[0].processes
    assert process.used_bytes == Missing("not available")


def test_memory_of_a_process_is_taken_from_the_list_that_knows_it(bench):
    bench.state.add_process(0, 10, None, kinds=GRAPHICS)
    bench.state.add_process(0, 10, 5 * MIB, kinds=COMPUTE)
    (process,) = bench.read(with_processes=True).gpus[0].processes
    assert process.used_bytes == 5 * MIB


def test_a_command_line_that_cannot_be_read_is_missing(bench):
    bench.state.add_process(0, 10, MIB)
    (process,) = bench.read(with_processes=True).gpus[0].processes
    assert isinstance(process.command, Missing)


def test_an_empty_command_line_is_missing(bench, proc):
    (proc / "10").mkdir()
    (proc / "10" / "cmdline").touch()
    bench.state.add_process(0, 10, MIB)
    (process,) = bench.read(with_processes=True).gpus[0].processes
    assert isinstance(process.command, Missing)


def test_an_empty_list_on_a_used_gpu_means_that_processes_are_not_visible(bench):
    assert bench.read(with_processes=True).gpus[0].processes == HIDDEN


def test_an_empty_list_on_an_unused_gpu_means_no_processes(bench):
    bench.state.set_memory(0, total=100, reserved=30, used=0, free=70)
    assert bench.read(with_processes=True).gpus[0].processes == ()


def test_an_empty_list_on_a_gpu_of_unknown_memory_proves_nothing(bench):
    bench.state.gpus[0].memory_error = NOT_SUPPORTED
    assert bench.read(with_processes=True).gpus[0].processes == HIDDEN


def test_a_list_that_grows_while_it_is_read_is_read_again(bench):
    bench.state.add_process(0, 10, MIB)
    bench.state.gpus[0].grows = 2
    (process,) = bench.read(with_processes=True).gpus[0].processes
    assert process.pid == 10


def test_a_list_that_never_stops_growing_is_missing(bench):
    bench.state.add_process(0, 10, MIB)
    bench.state.gpus[0].grows = 1000
    gpu = bench.read(with_processes=True).gpus[0]
    assert "kept growing" in gpu.processes.why
    assert isinstance(gpu.memory, GpuMemory)


@pytest.mark.parametrize("code", [NOT_SUPPORTED, FUNCTION_NOT_FOUND])
def test_a_kind_of_list_that_does_not_exist_hides_no_other(bench, code):
    bench.state.add_process(0, 10, MIB)
    bench.state.gpus[0].mps_error = bench.state.gpus[0].graphics_error = code
    (process,) = bench.read(with_processes=True).gpus[0].processes
    assert process.pid == 10


def test_a_list_that_fails_makes_the_processes_missing(bench):
    bench.state.add_process(0, 10, MIB)
    bench.state.gpus[0].graphics_error = NO_PERMISSION
    assert isinstance(bench.read(with_processes=True).gpus[0].processes, Missing)


@pytest.mark.parametrize("version", ["535.43.02", "535.54.03", "535.85.12"])
def test_a_driver_that_scrambles_processes_drops_them_and_says_so(bench, version):
    bench.state.driver_version = version.encode()
    bench.state.add_process(0, 10, MIB)

    gpu = bench.read(with_processes=True).gpus[0]

    assert version in gpu.processes.why
    assert gpu.processes.remedy
    assert isinstance(gpu.memory, GpuMemory)
    assert bench.state.process_calls == 0


@pytest.mark.parametrize("version", ["530.41.03", "535.86.10", "535.113.01", "an odd one"])
def test_other_drivers_tell_their_processes(bench, version):
    bench.state.driver_version = version.encode()
    bench.state.add_process(0, 10, MIB)
    assert bench.read(with_processes=True).gpus[0].processes[0].pid == 10


def test_calls_that_the_driver_lacks_are_replaced_by_older_ones(bench):
    bench.state.newest_error = FUNCTION_NOT_FOUND
    bench.state.add_process(0, 10, MIB)

    gpu = bench.read(with_processes=True).gpus[0]

    assert isinstance(gpu.memory.reserved_bytes, Missing)
    assert gpu.temperature_celsius == 41
    assert gpu.processes[0].pid == 10


def test_calls_that_the_driver_lacks_are_tried_once_for_each_init(bench):
    bench.state.newest_error = FUNCTION_NOT_FOUND
    for _ in range(5):
        bench.read()
    assert bench.state.newest_calls == 1

    bench.state.newest_error, bench.state.count_error = 0, UNINITIALIZED
    bench.refusal()
    bench.state.count_error = 0
    bench.put_clock_forward(1)
    assert isinstance(bench.read().gpus[0].memory.reserved_bytes, int)


# Older drivers, other packages, no library: each in its own process, for nvidia-ml-py loads a library once


def test_an_old_driver_tells_memory_without_the_reserve(old_library, state, read_in_a_new_process):
    state.set_memory(0, total=100, reserved=30, used=20, free=50)

    gpu = read_in_a_new_process(library=old_library).gpus[0]

    assert isinstance(gpu.memory.reserved_bytes, Missing)
    assert (gpu.memory.total_bytes, gpu.memory.used_bytes, gpu.memory.free_bytes) == (100, 50, 50)


def test_an_old_driver_tells_temperature_and_processes_by_its_older_calls(old_library, state, read_in_a_new_process):
    state.add_process(0, 10, MIB)

    with_a_process, idle = read_in_a_new_process(library=old_library).gpus

    assert with_a_process.temperature_celsius == 41
    assert [process.pid for process in with_a_process.processes] == [10]
    assert idle.processes == ()


def test_without_the_library_the_remedy_is_to_reserve_the_gpu(read_in_a_new_process):
    if ctypes.util.find_library("nvidia-ml"):
        pytest.skip("this machine has the real NVML library")
    refusal = read_in_a_new_process()
    assert isinstance(refusal, SensorError)
    assert "libnvidia-ml.so.1 cannot be loaded" in refusal.why
    assert "[gpu, utility]" in refusal.remedy
    assert "never Alpine" in refusal.remedy


def test_another_package_of_the_same_name_is_refused(tmp_path, read_in_a_new_process):
    (tmp_path / "pynvml.py").write_text("def nvmlInit(): ...\n")
    refusal = read_in_a_new_process(modules=tmp_path)
    assert isinstance(refusal, SensorError)
    assert "not a current nvidia-ml-py" in refusal.why
    assert "pip uninstall pynvml" in refusal.remedy


def test_a_package_that_cannot_be_imported_is_told(tmp_path, read_in_a_new_process):
    (tmp_path / "pynvml.py").write_text("raise ImportError('no such thing')\n")
    refusal = read_in_a_new_process(modules=tmp_path)
    assert isinstance(refusal, SensorError)
    assert "no such thing" in refusal.why
    assert refusal.remedy == "pip install nvidia-ml-py"


# NVML as a whole is broken


@pytest.mark.parametrize(
    ("code", "why", "remedy"),
    [
        pytest.param(DRIVER_NOT_LOADED, "driver is not loaded", "nvidia-smi work on the host", id="no driver"),
        pytest.param(VERSION_MISMATCH, "different versions", "docker restart", id="driver updated"),
        pytest.param(UNKNOWN, "lost the GPU device", "create-dev-char-symlinks", id="cgroup lost: 999"),
        pytest.param(OPERATING_SYSTEM, "lost the GPU device", "docker restart", id="cgroup lost: 17"),
    ],
)
def test_an_init_that_fails_says_why_and_what_to_do(bench, code, why, remedy):
    bench.state.init_error = code
    refusal = bench.refusal()
    assert why in refusal.why
    assert remedy in refusal.remedy


def test_an_init_that_fails_is_tried_again_after_1_2_4_and_at_most_30_seconds(bench):
    bench.state.init_error = DRIVER_NOT_LOADED
    first = bench.refusal()
    for tries, wait in enumerate([1, 2, 4, 8, 16, 30, 30], start=1):
        bench.put_clock_forward(wait - 0.5)
        assert bench.refusal().why == first.why
        assert bench.state.inits == tries
        bench.put_clock_forward(0.5)
        bench.refusal()
        assert bench.state.inits == tries + 1


def test_a_driver_that_is_loaded_later_is_found(bench):
    bench.state.init_error = DRIVER_NOT_LOADED
    bench.refusal()
    bench.state.init_error = 0
    bench.put_clock_forward(1)
    assert len(bench.read().gpus) == 2


def test_a_good_read_makes_the_next_wait_short_again(bench):
    bench.state.init_error = DRIVER_NOT_LOADED
    for _ in range(4):
        bench.refusal()
        bench.put_clock_forward(30)
    bench.state.init_error = 0
    bench.read()

    bench.state.count_error = GPU_IS_LOST
    bench.refusal()
    bench.state.count_error = 0
    bench.put_clock_forward(1)
    bench.read()


@pytest.mark.parametrize(
    "code",
    [UNINITIALIZED, DRIVER_NOT_LOADED, GPU_IS_LOST, OPERATING_SYSTEM, VERSION_MISMATCH, GPU_NOT_FOUND, UNKNOWN],
)
def test_a_count_that_ends_the_life_of_nvml_brings_a_new_init(bench, code):
    before = bench.read()
    bench.state.count_error = code
    bench.refusal()
    assert (bench.state.inits, bench.state.shutdowns) == (1, 1)

    bench.state.count_error = 0
    bench.refusal()
    bench.put_clock_forward(1)
    assert bench.read() == before
    assert bench.state.inits == 2


def test_a_count_that_fails_for_once_brings_no_new_init(bench):
    bench.read()
    bench.state.count_error = TIMEOUT
    assert "NVML error 10" in bench.refusal().why
    bench.state.count_error = 0
    bench.read()
    assert bench.state.inits == 1


def test_nvml_that_somebody_else_shut_down_is_initialised_again(bench):
    bench.read()
    pynvml.nvmlShutdown()
    assert "shut down" in bench.refusal().why
    bench.put_clock_forward(1)
    assert len(bench.read().gpus) == 2


def test_no_gpus_is_a_failed_reading_and_not_an_idle_machine(bench):
    bench.state.gpu_count = 0
    refusal = bench.refusal()
    assert refusal.why == "NVML counts 0 GPUs"
    assert refusal.remedy

    bench.state.gpu_count = 2
    bench.put_clock_forward(1)
    assert len(bench.read().gpus) == 2
    assert bench.state.inits == 2


def test_the_number_of_gpus_may_change(bench):
    seen = []
    for count in (2, 3, 1):
        bench.state.gpu_count = count
        seen.append(len(bench.read().gpus))
    assert seen == [2, 3, 1]
    assert bench.state.inits == 1


def test_a_lost_gpu_bears_no_name_of_another_after_the_count_changed(bench):
    bench.read()
    bench.state.gpu_count = 1
    bench.state.gpus[0].handle_error = GPU_IS_LOST
    assert only(bench.read()).uuid == "index-0"


# The container lost its GPU


@pytest.mark.parametrize("code", [UNKNOWN, OPERATING_SYSTEM])
def test_it_is_revoked_when_it_worked_and_then_every_gpu_is_blocked(bench, code):
    bench.read()
    assert not bench.sensor.revoked

    bench.state.gpus[0].memory_error = bench.state.gpus[1].handle_error = code
    refusal = bench.refusal()

    assert "docker restart this container" in refusal.remedy
    assert bench.sensor.revoked


def test_it_is_revoked_when_it_worked_and_a_new_init_is_blocked(bench):
    bench.read()
    bench.state.count_error, bench.state.init_error = GPU_IS_LOST, UNKNOWN
    bench.refusal()
    assert not bench.sensor.revoked
    bench.put_clock_forward(1)
    bench.refusal()
    assert bench.sensor.revoked


def test_it_is_not_revoked_when_it_never_worked(bench):
    bench.state.init_error = UNKNOWN
    bench.refusal()
    assert not bench.sensor.revoked


def test_it_is_not_revoked_when_one_of_two_gpus_is_blocked(bench):
    bench.read()
    bench.state.gpus[0].error = UNKNOWN
    bench.read()
    assert not bench.sensor.revoked


def test_it_is_no_longer_revoked_once_it_works_again(bench):
    bench.read()
    bench.state.count_error = UNKNOWN
    bench.refusal()
    assert bench.sensor.revoked

    bench.state.count_error = 0
    bench.put_clock_forward(1)
    bench.read()
    assert not bench.sensor.revoked


# A call hangs


def end_hang(state):
    state.hang_ms = 0


def hang_past_the_deadline(bench):
    """A read that met a hang and gave up; the call is still inside the library."""
    bench.state.hang_ms = FOREVER_MS
    bench.when_a_call_hangs(lambda: bench.put_clock_forward(5))
    return bench.refusal()


def read_as_soon_as_possible(bench):
    """The first read that works, once the call that hung has come back; no more than 10 s are given to it."""
    latest = time.monotonic() + 10
    while True:
        try:
            return bench.read()
        except TimedOut:
            assert time.monotonic() < latest
            os.sched_yield()


def test_the_loop_runs_on_while_a_call_hangs(bench):
    bench.read()
    bench.state.hang_ms = FOREVER_MS
    bench.when_a_call_hangs(lambda: end_hang(bench.state))  # a loop that stood still could not end the hang
    assert len(bench.read().gpus) == 2


def test_a_call_that_hangs_ends_the_read_at_its_deadline(bench):
    bench.read()
    refusal = hang_past_the_deadline(bench)
    assert isinstance(refusal, TimedOut)
    assert refusal.why == "NVML did not answer within 5 s"


def test_while_a_call_hangs_reads_fail_at_once_and_nothing_queues_up(bench):
    bench.read()
    hang_past_the_deadline(bench)
    bench.put_clock_forward(7)
    calls = bench.state.calls

    began = bench.loop.time()
    refusals = [bench.refusal() for _ in range(50)]

    assert {type(refusal) for refusal in refusals} == {TimedOut}
    assert refusals[0].why == "an NVML call has been hanging for 12 s"
    assert bench.loop.time() - began < 5
    assert bench.state.calls == calls
    bench.state.hang_ms = 0
    read_as_soon_as_possible(bench)


def test_work_goes_on_when_the_hanging_call_comes_back(bench):
    before = bench.read()
    hang_past_the_deadline(bench)
    bench.state.hang_ms = 0
    assert read_as_soon_as_possible(bench) == before
    assert bench.state.inits == 1


def test_an_answer_that_comes_too_late_is_not_given_to_a_later_read(bench):
    bench.read()
    hang_past_the_deadline(bench)
    bench.state.set_memory(0, total=100, reserved=0, used=1, free=99)
    bench.state.hang_ms = 0
    assert read_as_soon_as_possible(bench).gpus[0].memory.total_bytes == 100


def test_an_init_that_hangs_is_like_any_call(bench):
    assert isinstance(hang_past_the_deadline(bench), TimedOut)
    bench.state.hang_ms = 0
    assert len(read_as_soon_as_possible(bench).gpus) == 2


def test_a_hang_that_a_cancelled_read_left_behind_is_noticed_by_the_next(bench):
    async def read_and_cancel():
        reading = asyncio.ensure_future(bench.sensor.read())
        bench.when_a_call_hangs(reading.cancel)
        with pytest.raises(asyncio.CancelledError):
            await reading

    async def read_to_the_deadline():
        reading = asyncio.ensure_future(bench.sensor.read())
        bench.loop.call_soon(bench.put_clock_forward, 5)  # runs once the read has begun to wait
        with pytest.raises(TimedOut, match="did not answer"):
            await reading

    bench.read()
    bench.state.hang_ms = FOREVER_MS
    bench.loop.run_until_complete(read_and_cancel())
    bench.loop.run_until_complete(read_to_the_deadline())
    assert "has been hanging for" in bench.refusal().why
    bench.state.hang_ms = 0
    assert len(read_as_soon_as_possible(bench).gpus) == 2


def test_two_reads_at_once_are_both_answered(bench):
    async def both():
        return await asyncio.gather(bench.sensor.read(), bench.sensor.read(with_processes=True))

    plain, full = bench.loop.run_until_complete(both())
    assert plain.gpus[0].memory == full.gpus[0].memory


# The end


def test_closing_shuts_nvml_down(bench):
    bench.read()
    bench.close()
    assert bench.state.shutdowns == 1


def test_closing_twice_shuts_down_once(bench):
    bench.read()
    bench.sensor.close()
    bench.close()
    assert bench.state.shutdowns == 1


def test_closing_does_not_wait_for_a_call_that_hangs(bench):
    bench.read()
    hang_past_the_deadline(bench)
    bench.sensor.close()
    assert bench.state.hanging == 1
    assert bench.state.shutdowns == 0


def test_a_closed_sensor_reads_nothing(bench):
    bench.read()
    bench.close()
    assert "closed" in bench.refusal().why
    assert bench.state.inits == 1


def test_a_sensor_that_never_read_closes_without_touching_nvml(bench):
    bench.close()
    assert bench.state.inits == 0
