"""GPUs that share the CPU's memory: what NVML does not tell, the kernel does."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.gpus.trees import GIB
from vram_manager.domain.reading import Missing
from vram_manager.domain.snapshot import GpuMemory, Trust
from vram_manager.gpus.unified import parse_meminfo

NOT_SUPPORTED = 3


@pytest.fixture
def spark(bench, tree):
    """One GB10 with 120 GiB, 50 of them free."""
    tree.meminfo(total=120 * GIB, available=50 * GIB)
    bench.state.gpu_count = 1
    bench.state.set_identity(0, name="NVIDIA GB10", uuid="GPU-spark")
    bench.state.gpus[0].memory_error = NOT_SUPPORTED
    return bench


def test_the_memory_of_a_gb10_is_the_machines(spark):
    (gpu,) = spark.read().gpus
    assert isinstance(gpu.memory, GpuMemory)
    assert (gpu.memory.total_bytes, gpu.memory.free_bytes, gpu.memory.taken_bytes) == (120 * GIB, 50 * GIB, 70 * GIB)
    assert (gpu.unified, gpu.trust, gpu.source) == (True, Trust.DERIVED, "/proc/meminfo (unified memory)")
    assert gpu.utilization_percent == 7


@pytest.mark.parametrize(
    "name", ["Orin (nvgpu)", "NVIDIA Thor", "NVIDIA Jetson AGX Orin", "NVIDIA Tegra X1", "Xavier", "NVIDIA GB10"]
)
def test_every_chip_with_a_cpu_beside_the_gpu_is_unified(spark, name):
    spark.state.set_identity(0, name=name, uuid="GPU-chip")
    assert spark.read().gpus[0].unified


def test_a_chip_is_known_by_its_board_where_its_gpu_has_no_telling_name(spark, tree):
    spark.state.set_identity(0, name="nvgpu", uuid="GPU-board")
    (tree.proc / "device-tree").mkdir()
    (tree.proc / "device-tree" / "model").write_bytes(b"NVIDIA Jetson AGX Orin Developer Kit\0")
    assert spark.read().gpus[0].unified


@pytest.mark.parametrize("name", ["NVIDIA A40-8Q", "GRID T4-16C", "NVIDIA GB100", "NVIDIA RTX 4090", "NVIDIA Thorium"])
def test_a_vgpu_that_tells_no_memory_is_not_unified(spark, name):
    spark.state.set_identity(0, name=name, uuid="GPU-v")
    (gpu,) = spark.read().gpus
    assert isinstance(gpu.memory, Missing)
    assert (gpu.unified, gpu.trust) == (False, Trust.MEASURED)


@pytest.mark.parametrize(("total", "is_pool"), [(0, True), (108, True), (120, True), (107, False), (24, False)])
def test_a_chip_that_tells_nothing_less_than_the_machines_memory_as_its_own_is_unified(spark, total, is_pool):
    spark.state.gpus[0].memory_error = 0
    spark.state.set_memory(0, total=total * GIB, reserved=0, used=0, free=total * GIB)
    (gpu,) = spark.read().gpus
    assert gpu.unified is is_pool
    assert gpu.memory.total_bytes == (120 if is_pool else total) * GIB


def test_a_card_with_as_much_memory_as_the_machine_is_no_pool(spark):
    spark.state.gpus[0].memory_error = 0
    spark.state.set_identity(0, name="NVIDIA H200", uuid="GPU-h200")
    spark.state.set_memory(0, total=141 * GIB, reserved=0, used=GIB, free=140 * GIB)
    (gpu,) = spark.read().gpus
    assert (gpu.unified, gpu.memory.total_bytes) == (False, 141 * GIB)


def test_processes_of_unified_memory_are_told_by_nvml(spark):
    spark.state.add_process(0, 10, 30 * GIB)
    (process,) = spark.read(with_processes=True).gpus[0].processes
    assert process.used_bytes == 30 * GIB


def test_an_empty_list_of_processes_proves_nothing_on_unified_memory(spark):
    assert "not visible" in spark.read(with_processes=True).gpus[0].processes.why


def test_unified_memory_that_the_kernel_does_not_tell_is_missing(spark, tree):
    (tree.proc / "meminfo").write_text("MemTotal: a lot\n")
    (gpu,) = spark.read().gpus
    assert "MemTotal" in gpu.memory.why
    (tree.proc / "meminfo").unlink()
    assert "meminfo cannot be read" in spark.read().gpus[0].memory.why


def test_what_is_used_of_a_gh200_is_nvmls_word_and_may_include_the_cache_of_files(bench):
    bench.state.set_identity(0, name="NVIDIA GH200 480GB", uuid="GPU-gh")
    gpu = bench.read().gpus[0]
    assert gpu.memory.used_bytes == 596 * 2**20
    assert gpu.source == "NVML, with the cache of files"


@given(st.text(alphabet=st.sampled_from("MemTotalAvailable: 0123456789kB\n\t-"), max_size=200) | st.text())
def test_no_text_makes_meminfo_crash_or_tell_less_than_nothing(text):
    memory = parse_meminfo(text)
    if isinstance(memory, GpuMemory):
        assert memory.total_bytes > 0
        assert 0 <= memory.free_bytes <= memory.total_bytes


@given(total=st.integers(1, 2**40), available=st.integers(0, 2**40))
def test_meminfo_is_read_exactly(total, available):
    memory = parse_meminfo(
        f"MemTotal:   {total} kB\nMemFree:  3 kB\nMemAvailable:\t{available} kB\nHugePages_Total: 0\n"
    )
    if available > total:
        assert isinstance(memory, Missing)
    else:
        assert (memory.total_bytes, memory.free_bytes) == (total * 1024, available * 1024)
