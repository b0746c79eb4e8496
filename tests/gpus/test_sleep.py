"""Laptops with two GPUs: the one that sleeps is not woken, and the one that could is not kept awake."""

import pytest

from tests.gpus.trees import write
from vram_manager.domain.reading import Missing
from vram_manager.domain.snapshot import GpuMemory
from vram_manager.gpus.nvml import NvmlSensor

MIB = 2**20
NOT_SUPPORTED = 3


@pytest.fixture
def laptop(hybrid, tree):
    """One NVIDIA GPU, awake, that the kernel may suspend; nobody uses it."""
    hybrid.device = tree.nvidia(control="auto")
    hybrid.state.gpu_count = 1
    unused(hybrid)
    return hybrid


def unused(bench, used=5 * MIB):
    for index in (0, 1):
        bench.state.set_memory(index, total=8192 * MIB, reserved=400 * MIB, used=used, free=7792 * MIB - used)
        bench.state.gpus[index].utilization = 0


def status(bench, words):
    write(bench.device, {"power__runtime_status": words})


def reads_for(bench, seconds, each=1):
    """A read each second or so; what the last one said."""
    for _ in range(0, seconds, each):
        bench.put_clock_forward(each)
        gpus = bench.read()
    return gpus


def is_open(bench):
    return bench.state.inits - bench.state.shutdowns == 1


def let_go(bench):
    """Read until NVML is let go of, but no longer than a minute."""
    bench.read()
    for _ in range(60):
        reads_for(bench, 1)
        if not is_open(bench):
            return
    pytest.fail("NVML was not let go of")


def asleep(bench):
    let_go(bench)
    status(bench, "suspended")
    return bench.read()


def test_a_gpu_that_sleeps_from_the_start_is_never_touched(laptop):
    status(laptop, "suspended")
    (gpu,) = reads_for(laptop, 100).gpus
    assert laptop.state.inits == 0
    assert (gpu.uuid, gpu.name, gpu.asleep) == ("0000:01:00.0", "NVIDIA GPU 0x2820", True)
    assert "asleep" in gpu.memory.why


def test_a_gpu_that_falls_asleep_keeps_its_name_and_number(laptop):
    before = laptop.read().gpus[0]
    (gpu,) = asleep(laptop).gpus
    assert (gpu.uuid, gpu.name, gpu.index) == (before.uuid, before.name, before.index)
    assert gpu.asleep
    for field in (gpu.memory, gpu.utilization_percent, gpu.temperature_celsius, gpu.power_watts, gpu.processes):
        assert "asleep" in field.why


def test_nvml_is_let_go_of_when_nobody_has_used_the_gpu_for_30_seconds(laptop):
    laptop.read()
    reads_for(laptop, 29)
    assert is_open(laptop)
    (gpu,) = reads_for(laptop, 2).gpus
    assert not is_open(laptop)
    assert not gpu.asleep
    assert "so that it can fall asleep" in gpu.memory.why


def test_while_it_is_let_go_of_nvml_stays_untouched(laptop):
    let_go(laptop)
    calls = laptop.state.calls
    reads_for(laptop, 15)
    assert laptop.state.calls == calls


@pytest.mark.parametrize("on_the_way", ["suspending", "resuming"])
def test_a_sleeping_gpu_that_is_on_its_way_is_not_touched(laptop, on_the_way):
    asleep(laptop)
    status(laptop, on_the_way)
    reads_for(laptop, 3)
    assert not is_open(laptop)


def test_a_gpu_that_somebody_woke_is_read_at_once(laptop):
    asleep(laptop)
    status(laptop, "active")
    (gpu,) = laptop.read().gpus
    assert isinstance(gpu.memory, GpuMemory)
    assert not gpu.asleep


def test_a_gpu_that_was_woken_is_let_go_of_again(laptop):
    asleep(laptop)
    status(laptop, "active")
    let_go(laptop)


@pytest.mark.parametrize(
    ("used", "utilization"), [(65 * MIB, 0), (5 * MIB, 1)], ids=["a context of somebody's", "somebody works"]
)
def test_a_gpu_that_is_used_is_not_let_go_of(laptop, used, utilization):
    unused(laptop, used)
    laptop.state.gpus[0].utilization = utilization
    reads_for(laptop, 100)
    assert is_open(laptop)
    assert laptop.state.inits == 1


def test_use_in_between_starts_the_30_seconds_anew(laptop):
    laptop.read()
    reads_for(laptop, 25)
    laptop.state.gpus[0].utilization = 50
    reads_for(laptop, 1)
    laptop.state.gpus[0].utilization = 0
    reads_for(laptop, 29)
    assert is_open(laptop)
    reads_for(laptop, 3)
    assert not is_open(laptop)


def test_a_gpu_that_tells_no_load_is_judged_by_its_memory(laptop):
    laptop.state.gpus[0].utilization_error = NOT_SUPPORTED
    let_go(laptop)


def test_a_gpu_of_unknown_memory_is_not_taken_for_unused(laptop):
    laptop.state.gpus[0].memory_error = NOT_SUPPORTED
    reads_for(laptop, 100)
    assert is_open(laptop)


def test_a_gpu_that_somebody_else_holds_awake_is_read_again_after_20_seconds(laptop):
    let_go(laptop)
    reads_for(laptop, 18)
    assert not is_open(laptop)
    (gpu,) = reads_for(laptop, 3).gpus
    assert isinstance(gpu.memory, GpuMemory)


def test_a_gpu_that_never_falls_asleep_is_let_go_of_ever_more_rarely(laptop):
    let_go(laptop)
    reads_for(laptop, 25)
    assert is_open(laptop)
    reads_for(laptop, 280)
    assert laptop.state.inits == 2
    reads_for(laptop, 6000, each=20)
    # After 5, 10, 20 and 40 minutes, each after 30 s without use and with 20 s of waiting; and the first.
    assert laptop.state.shutdowns == 5


def test_a_gpu_that_did_fall_asleep_is_let_go_of_at_once_the_next_time(laptop):
    let_go(laptop)
    reads_for(laptop, 25)
    status(laptop, "suspended")
    laptop.read()
    status(laptop, "active")
    let_go(laptop)


def test_somebody_who_is_about_to_use_it_has_it_read_though_it_sleeps(laptop):
    asleep(laptop)
    laptop.sensor.wake()
    (gpu,) = laptop.read().gpus
    assert isinstance(gpu.memory, GpuMemory)
    status(laptop, "active")
    reads_for(laptop, 20)
    assert is_open(laptop)


def test_a_wake_at_a_gpu_that_is_awake_changes_nothing(laptop):
    laptop.read()
    laptop.sensor.wake()
    laptop.read()
    assert laptop.state.inits == 1


def test_a_wake_starts_the_30_seconds_anew(laptop):
    laptop.read()
    reads_for(laptop, 25)
    laptop.sensor.wake()
    reads_for(laptop, 25)
    assert is_open(laptop)


def test_without_the_setting_a_sleeping_gpu_is_read(on_the_fake, tree):
    tree.nvidia(control="auto", status="suspended")
    bench = on_the_fake(NvmlSensor(proc_root=tree.proc, sys_root=tree.sys, gpu_sleep=False))
    bench.sensor.wake()
    assert isinstance(bench.read().gpus[0].memory, GpuMemory)


def test_a_server_is_held_for_ever(hybrid, tree):
    tree.nvidia(control="on")
    unused(hybrid)
    hybrid.state.gpu_count = 1
    reads_for(hybrid, 300)
    assert (hybrid.state.inits, hybrid.state.shutdowns) == (1, 0)


def test_one_gpu_that_never_sleeps_holds_all(hybrid, tree):
    tree.nvidia("0000:01:00.0", control="auto", status="suspended")
    tree.nvidia("0000:02:00.0", control="on")
    unused(hybrid)
    reads_for(hybrid, 100)
    assert (hybrid.state.inits, hybrid.state.shutdowns) == (1, 0)


def test_one_gpu_that_is_awake_has_all_read(hybrid, tree):
    tree.nvidia("0000:01:00.0", control="auto", status="suspended")
    tree.nvidia("0000:02:00.0", control="auto", status="active")
    assert isinstance(hybrid.read().gpus[0].memory, GpuMemory)


def test_the_sound_part_of_a_card_is_none_of_the_gpus(laptop, tree):
    tree.device("0000:01:00.1", vendor="0x10de", **{"class": "0x040300"})
    asleep(laptop)
    assert len(laptop.read().gpus) == 1


@pytest.mark.parametrize(
    ("told", "is_tried"),
    [
        ("Enabled (fine-grained)", True),
        ("Enabled (coarse-grained)", True),
        ("Disabled by default", False),
        ("Not supported", False),
        ("?", False),
    ],
)
def test_a_driver_that_says_it_never_suspends_is_not_let_go_of(laptop, tree, told, is_tried):
    lines = f"Runtime D3 status:          {told}\nVideo Memory:               Active\n"
    write(tree.proc / "driver" / "nvidia" / "gpus" / "0000:01:00.0", {"power": lines})
    reads_for(laptop, 40)
    assert is_open(laptop) is not is_tried


def test_a_gpu_that_is_plugged_in_is_known_within_a_minute(laptop, tree):
    asleep(laptop)
    tree.nvidia("0000:05:00.0", control="auto", status="suspended")
    gpus = reads_for(laptop, 61).gpus
    assert [gpu.uuid for gpu in gpus] == ["0000:01:00.0", "0000:05:00.0"]


def test_the_driver_version_is_remembered_through_sleep(laptop):
    laptop.read()
    assert asleep(laptop).driver_version == "595.71.05"


def test_a_sleeping_gpu_is_not_revoked(laptop):
    asleep(laptop)
    assert not laptop.sensor.revoked


def test_closing_a_sensor_that_let_go_shuts_nothing_down_twice(laptop):
    let_go(laptop)
    laptop.close()
    assert laptop.state.shutdowns == 1


def test_a_file_that_cannot_be_read_lets_a_gpu_be_read_as_ever(laptop):
    write(laptop.device, {"power__control": None})
    reads_for(laptop, 60)
    assert is_open(laptop)
    assert not isinstance(laptop.read().gpus[0].memory, Missing)
