"""AMD's cards and APUs, on a tree of files as the amdgpu driver lays them out."""

import pytest

from tests.gpus.trees import GIB, broken, fdinfo, write
from vram_manager.domain.reading import Missing
from vram_manager.domain.snapshot import Gpu, GpuMemory, ProcessMemory, Trust
from vram_manager.gpus.all import AllGpus
from vram_manager.gpus.amd import HIDDEN, NO_RESERVE

DRIVER_NOT_LOADED = 9


@pytest.fixture
def amd(every):
    """A machine without NVIDIA's driver."""
    every.state.init_error = DRIVER_NOT_LOADED
    return every


def only(gpus):
    (gpu,) = gpus.gpus
    return gpu


def test_a_card_tells_its_identity_memory_and_load(amd, tree):
    tree.amd()
    assert only(amd.read()) == Gpu(
        uuid="GPU-53bb4c0c0bd43f0c",
        index=0,
        name="AMD GPU 0x744c",
        memory=GpuMemory(total_bytes=24 * GIB, used_bytes=2 * GIB, free_bytes=22 * GIB, reserved_bytes=NO_RESERVE),
        utilization_percent=12,
        vendor="amd",
        source="amdgpu sysfs",
        trust=Trust.MEASURED,
    )


def test_temperature_and_power_are_read_with_the_processes(amd, tree):
    tree.amd()
    gpu = only(amd.read(with_processes=True))
    assert (gpu.temperature_celsius, gpu.power_watts) == (61, 212.0)


def test_power_of_the_moment_stands_in_for_the_average(amd, tree):
    tree.amd(hwmon__hwmon4__power1_average=None, hwmon__hwmon4__power1_input=33_000_000)
    assert only(amd.read(with_processes=True)).power_watts == 33.0


def test_a_card_has_the_name_that_its_maker_wrote_into_it(amd, tree):
    tree.amd(product_name="AMD Instinct MI300X OAM")
    assert only(amd.read()).name == "AMD Instinct MI300X OAM"


@pytest.mark.parametrize("serial", [None, "0", "0000000000000000"])
def test_a_card_without_a_serial_number_is_named_by_its_place(amd, tree, serial):
    tree.amd(unique_id=serial)
    assert only(amd.read()).uuid == "0000:03:00.0"


def test_cards_are_in_the_order_of_their_places_whatever_number_they_have(amd, tree):
    tree.amd("0000:83:00.0", unique_id=None)
    tree.amd("0000:03:00.0", unique_id=None)
    assert [(gpu.index, gpu.uuid) for gpu in amd.read().gpus] == [(0, "0000:03:00.0"), (1, "0000:83:00.0")]


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("gpu_busy_percent", "utilization_percent"),
        ("hwmon/hwmon4/temp1_input", "temperature_celsius"),
        ("hwmon/hwmon4/power1_average", "power_watts"),
    ],
)
def test_a_file_that_cannot_be_read_makes_that_field_missing_alone(amd, tree, name, field):
    broken(tree.amd() / name)
    gpu = only(amd.read(with_processes=True))
    assert isinstance(getattr(gpu, field), Missing)
    assert isinstance(gpu.memory, GpuMemory)


@pytest.mark.parametrize("name", ["mem_info_vram_total", "mem_info_vram_used"])
@pytest.mark.parametrize("text", [None, "", "-1", "N/A", "1e9"])
def test_memory_that_is_not_told_is_missing_and_not_zero(amd, tree, name, text):
    tree.amd(**{name: text})
    tree.amd("0000:04:00.0", unique_id=None)
    gpu, _ = amd.read().gpus
    assert isinstance(gpu.memory, Missing)
    assert name in gpu.memory.why


@pytest.mark.parametrize(("total", "used"), [(0, 0), (GIB, 2 * GIB)])
def test_memory_that_contradicts_itself_is_missing(amd, tree, total, used):
    tree.amd(mem_info_vram_total=total, mem_info_vram_used=used)
    assert "contradicts itself" in only(amd.read()).memory.why


def test_a_load_that_is_none_is_missing(amd, tree):
    tree.amd(gpu_busy_percent=65535)
    assert isinstance(only(amd.read()).utilization_percent, Missing)


# Sleep


def test_a_card_that_sleeps_is_not_read(amd, tree):
    directory = tree.amd(power__control="auto", power__runtime_status="suspended")
    broken(directory / "gpu_busy_percent")
    gpu = only(amd.read(with_processes=True))
    assert gpu.asleep
    assert gpu.uuid == "GPU-53bb4c0c0bd43f0c"
    for field in (gpu.memory, gpu.utilization_percent, gpu.temperature_celsius, gpu.power_watts, gpu.processes):
        assert "asleep" in field.why


def test_without_the_setting_a_card_that_sleeps_is_read(on_the_fake, tree):
    tree.amd(power__control="auto", power__runtime_status="suspended", mem_info_vram_used=0)
    bench = on_the_fake(AllGpus(gpu_sleep=False, proc_root=tree.proc, sys_root=tree.sys, tools_path=str(tree.bin)))
    gpu = bench.read().gpus[-1]
    assert (gpu.asleep, gpu.memory.used_bytes, gpu.utilization_percent) == (False, 0, 12)


def test_a_card_that_may_sleep_is_not_kept_awake_while_nobody_uses_it(amd, tree):
    directory = tree.amd(power__control="auto", mem_info_vram_used=30 * 2**20)
    gpu = only(amd.read(with_processes=True))
    assert isinstance(gpu.memory, GpuMemory)
    for field in (gpu.utilization_percent, gpu.temperature_celsius, gpu.power_watts):
        assert "so that it can fall asleep" in field.why
    write(directory, {"mem_info_vram_used": GIB})
    assert only(amd.read()).utilization_percent == 12


# APUs


def test_an_apu_has_what_the_machine_gives_it_and_not_what_its_bios_set_aside(amd, tree):
    tree.apu()
    tree.meminfo(total=124 * GIB, available=90 * GIB)
    gpu = only(amd.read())
    assert (gpu.memory.total_bytes, gpu.memory.free_bytes) == (96 * GIB, 66 * GIB)
    assert (gpu.unified, gpu.trust, gpu.source) == (True, Trust.DERIVED, "amdgpu sysfs (unified memory)")


def test_no_more_of_an_apus_memory_is_free_than_the_machine_has_left(amd, tree):
    tree.apu()
    tree.meminfo(total=124 * GIB, available=20 * GIB)
    memory = only(amd.read()).memory
    assert (memory.free_bytes, memory.taken_bytes) == (20 * GIB, 76 * GIB)


def test_an_apu_whose_share_of_the_machines_memory_is_not_told_has_unknown_memory(amd, tree):
    tree.apu(mem_info_gtt_used=None)
    assert "mem_info_gtt_used" in only(amd.read()).memory.why


def test_an_apus_memory_is_its_drivers_word_where_the_machine_tells_nothing(amd, tree):
    tree.apu()
    assert only(amd.read()).memory.free_bytes == 66 * GIB


@pytest.mark.parametrize("chips", [None, "unknown", "0"])
def test_memory_of_chips_that_nobody_made_is_an_apus(amd, tree, chips):
    tree.apu(mem_info_vram_vendor=chips)
    assert only(amd.read()).unified


@pytest.mark.parametrize(
    "files",
    [
        pytest.param({"mem_info_vram_vendor": "hynix"}, id="chips of somebody's"),
        pytest.param({"mem_info_vram_total": 9 * GIB}, id="more than a BIOS sets aside"),
        pytest.param({"mem_info_vram_total": 8 * GIB, "mem_info_gtt_total": 16 * GIB}, id="little else"),
        pytest.param({"mem_info_gtt_total": None}, id="nothing else told"),
    ],
)
def test_whatever_is_not_surely_an_apu_is_a_card(amd, tree, files):
    tree.apu(**files)
    assert not only(amd.read()).unified


def test_what_an_apu_has_of_the_machines_memory_counts_for_its_processes(amd, tree):
    tree.apu()
    tree.meminfo(total=124 * GIB, available=90 * GIB)
    tree.opens(42, 9, fdinfo("0000:c5:00.0", 1, "drm-memory-vram:\t1024 KiB", "drm-memory-gtt:\t2048 KiB"))
    (process,) = only(amd.read(with_processes=True)).processes
    assert process.used_bytes == 3 * 2**20


# Processes


def test_a_process_is_told_with_its_memory_and_command(amd, tree):
    tree.amd()
    tree.opens(42, 9, fdinfo("0000:03:00.0", 7, "drm-memory-vram:\t1048576 KiB", "drm-memory-gtt:\t4096 KiB"))
    (process,) = only(amd.read(with_processes=True)).processes
    assert process == ProcessMemory(pid=42, used_bytes=GIB, command=("ollama", "runner"))


def test_processes_that_cannot_be_seen_are_missing_and_not_none(amd, tree):
    tree.amd()
    gpu = only(amd.read(with_processes=True))
    assert gpu.processes == HIDDEN
    assert "pid: host" in gpu.processes.remedy


def test_a_card_of_which_nothing_is_used_has_no_processes(amd, tree):
    tree.amd(mem_info_vram_used=0)
    assert only(amd.read(with_processes=True)).processes == ()


def test_a_plain_read_looks_at_no_process(amd, tree):
    tree.amd()
    tree.opens(42, 9, fdinfo())
    assert only(amd.read()).processes == Missing("not asked")


def test_where_every_process_is_visible_and_none_has_it_open_there_is_none(amd, tree):
    tree.amd()
    tree.of_the_host()
    assert only(amd.read(with_processes=True)).processes == ()
    write(tree.proc / "2", {"comm": "sh"})
    assert only(amd.read(with_processes=True)).processes == HIDDEN
