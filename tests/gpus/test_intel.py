"""Intel's cards, on a tree of files as the i915 and xe drivers lay them out."""

import pytest

from tests.gpus.trees import GIB, fdinfo, write
from vram_manager.domain.reading import Missing
from vram_manager.domain.snapshot import GpuMemory, Trust
from vram_manager.gpus.fdinfo import HIDDEN
from vram_manager.gpus.intel import CAP_PERFMON, CAP_SYS_ADMIN

DRIVER_NOT_LOADED = 9
ARC = "0000:04:00.0"


@pytest.fixture
def intel(every):
    """A machine without NVIDIA's driver."""
    every.state.init_error = DRIVER_NOT_LOADED
    return every


def only(gpus):
    (gpu,) = gpus.gpus
    return gpu


def test_a_card_that_tells_its_size_only_has_unknown_memory_and_says_what_to_do(intel, tree):
    tree.arc()
    gpu = only(intel.read())
    assert (gpu.uuid, gpu.name, gpu.vendor, gpu.source) == (ARC, "Intel GPU 0xe20b", "intel", "xe sysfs and /proc")
    assert gpu.trust is Trust.UNVERIFIED
    assert gpu.memory.why == "its driver tells 12.0 GiB in total, and not what is used of it"
    assert "pid: host" in gpu.memory.remedy


def test_what_is_used_is_what_the_visible_processes_add_up_to(intel, tree):
    tree.arc()
    tree.opens(42, 9, fdinfo(ARC, 1, "drm-resident-vram0: 1024 MiB"))
    tree.opens(43, 9, fdinfo(ARC, 2, "drm-resident-vram0: 1 GiB", "drm-resident-gtt: 5 GiB"))
    gpu = only(intel.read())
    assert (gpu.memory.total_bytes, gpu.memory.used_bytes, gpu.memory.free_bytes) == (12 * GIB, 2 * GIB, 10 * GIB)
    assert gpu.processes == Missing("not asked")


def test_processes_and_temperature_are_read_when_asked_for(intel, tree):
    tree.arc(hwmon__hwmon3__temp2_input=48_500)
    tree.opens(42, 9, fdinfo(ARC, 1, "drm-resident-vram0: 1 GiB"))
    gpu = only(intel.read(with_processes=True))
    assert [process.used_bytes for process in gpu.processes] == [GIB]
    assert gpu.temperature_celsius == 48
    assert isinstance(gpu.power_watts, Missing)


def test_processes_that_cannot_be_seen_are_missing(intel, tree):
    tree.arc()
    assert only(intel.read(with_processes=True)).processes == HIDDEN


@pytest.mark.parametrize("driver_says", [{"mem_info_vram_used": 0}, {"tile0__vram0__used_bytes": 0}])
def test_nothing_used_is_no_answer_without_the_right_to_ask(intel, tree, driver_says):
    tree.arc(**driver_says)
    tree.capabilities(0)
    assert isinstance(only(intel.read()).memory, Missing)


@pytest.mark.parametrize("capability", [CAP_PERFMON, CAP_SYS_ADMIN])
def test_nothing_used_is_an_answer_with_the_right_to_ask(intel, tree, capability):
    tree.arc(mem_info_vram_used=0)
    tree.capabilities(1 << capability)
    assert only(intel.read()).memory.used_bytes == 0


def test_what_a_driver_says_is_used_counts_before_the_processes(intel, tree):
    tree.arc(mem_info_vram_used=3 * GIB)
    tree.opens(42, 9, fdinfo(ARC, 1, "drm-resident-vram0: 1 GiB"))
    assert only(intel.read()).memory.used_bytes == 3 * GIB


@pytest.mark.parametrize(
    ("files", "total"),
    [
        pytest.param({"tile1__physical_vram_size_bytes": 12 * GIB}, 24 * GIB, id="two tiles"),
        pytest.param({"tile0__physical_vram_size_bytes": None, "mem_info_vram_total": GIB}, GIB, id="as on AMD"),
        pytest.param({"tile0__physical_vram_size_bytes": None, "tile0__vram0__total_bytes": GIB}, GIB, id="a region"),
    ],
)
def test_the_size_is_found_wherever_a_driver_puts_it(intel, tree, files, total):
    tree.arc(mem_info_vram_used=5, **files)
    assert only(intel.read()).memory.total_bytes == total


def test_the_size_is_found_beside_the_device_where_intels_own_driver_puts_it(intel, tree):
    tree.arc(mem_info_vram_used=5, tile0__physical_vram_size_bytes=None)
    write(tree.sys / "class" / "drm" / "card0", {"lmem_total_bytes": 16 * GIB})
    assert only(intel.read()).memory.total_bytes == 16 * GIB


@pytest.mark.parametrize("size", [None, "", "0", "many"])
def test_a_size_that_is_not_told_is_missing_and_not_zero(intel, tree, size):
    tree.arc(mem_info_vram_used=5, tile0__physical_vram_size_bytes=size)
    assert "neither the size" in only(intel.read()).memory.why


def test_more_used_than_there_is_is_missing(intel, tree):
    tree.arc(mem_info_vram_used=13 * GIB)
    assert "contradicts itself" in only(intel.read()).memory.why


def test_a_card_that_sleeps_is_not_read(intel, tree):
    tree.arc(power__runtime_status="suspended", mem_info_vram_used=5)
    gpu = only(intel.read(with_processes=True))
    assert gpu.asleep
    assert "asleep" in gpu.memory.why


@pytest.mark.parametrize("status", ["", "CapEff:\n", "CapEff:\tmany\n", "Name:\tpython\n"])
def test_rights_that_are_not_told_are_none(intel, tree, status):
    tree.arc(mem_info_vram_used=0)
    (tree.proc / "self").mkdir()
    (tree.proc / "self" / "status").write_text(status)
    assert not isinstance(only(intel.read()).memory, GpuMemory)


def test_where_every_process_is_visible_and_none_has_it_open_nothing_is_used(intel, tree):
    tree.arc()
    tree.of_the_host()
    gpu = only(intel.read(with_processes=True))
    assert (gpu.memory.used_bytes, gpu.processes) == (0, ())


def test_a_process_that_does_not_tell_its_memory_leaves_that_of_the_card_unknown(intel, tree):
    tree.arc()
    tree.of_the_host()
    tree.opens(42, 9, fdinfo(ARC, 1))
    assert isinstance(only(intel.read()).memory, Missing)
