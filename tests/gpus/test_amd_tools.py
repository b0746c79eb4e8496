"""amd-smi and rocm-smi, where the kernel's own files tell nothing: both shapes of the one, and the other's."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.gpus.trees import GIB
from vram_manager.domain.reading import Missing
from vram_manager.domain.snapshot import GpuMemory, Trust
from vram_manager.errors import SensorError
from vram_manager.gpus.amd_tools import AmdTools, parse_amd_smi, parse_rocm_smi

MIB = 2**20
DRIVER_NOT_LOADED = 9


def mib(value):
    return {"value": value, "unit": "MB"}


def usage(total=24560, used=27):
    return {"gpu": 0, "mem_usage": {"total_vram": mib(total), "used_vram": mib(used), "free_vram": mib("N/A")}}


ROCM_6 = json.dumps([usage(), usage(16368, 1024)])
ROCM_7 = json.dumps({"gpu_data": [usage(), usage(16368, 1024)]})
ROCM_SMI = json.dumps(
    {
        "card0": {"VRAM Total Memory (B)": "21458059264", "VRAM Total Used Memory (B)": "27856896"},
        "card10": {"VRAM Total Memory (B)": "2000", "VRAM Total Used Memory (B)": "1000"},
        "card2": {"VRAM Total Memory (B)": "4000", "VRAM Total Used Memory (B)": "1000"},
        "system": {"Driver version": "6.7.0"},
    }
)


@pytest.mark.parametrize("text", [ROCM_6, ROCM_7], ids=["ROCm 6", "ROCm 7"])
def test_both_shapes_of_amd_smi_tell_the_same(text):
    first, second = parse_amd_smi(text)
    assert (first.total_bytes, first.used_bytes, first.free_bytes) == (24560 * MIB, 27 * MIB, 24533 * MIB)
    assert second.total_bytes == 16368 * MIB


def test_rocm_smi_tells_text_for_numbers_and_cards_in_order():
    sizes = [(memory.total_bytes, memory.used_bytes) for memory in parse_rocm_smi(ROCM_SMI)]
    assert sizes == [(21458059264, 27856896), (4000, 1000), (2000, 1000)]


@pytest.mark.parametrize("parse", [parse_amd_smi, parse_rocm_smi])
@pytest.mark.parametrize(
    "before", ["WARNING: User is missing the following required groups: render\n", "[WARN] {old} driver\n", "{\n[1]\n"]
)
def test_warnings_before_the_answer_are_passed_over(parse, before):
    text = ROCM_7 if parse is parse_amd_smi else ROCM_SMI
    assert parse(before + text) == parse(text)


@pytest.mark.parametrize("parse", [parse_amd_smi, parse_rocm_smi])
@pytest.mark.parametrize(
    "text",
    ["", "WARNING: No JSON data to report", "[]", "{}", "null", '{"gpu_data": "N/A"}', "[" * 5000, '{"card": 1}'],
)
def test_an_answer_without_cards_tells_none(parse, text):
    assert parse(text) == []


@pytest.mark.parametrize("value", ["N/A", None, -1, 1.5, True, "", "-3", [], {}])
def test_a_value_that_is_no_size_is_missing_and_not_zero(value):
    assert parse_amd_smi(json.dumps([usage(used=value)])) == [Missing("amd-smi tells no memory")]
    assert parse_amd_smi(json.dumps([usage(total=value)])) == [Missing("amd-smi tells no memory")]
    told = {"card0": {"VRAM Total Memory (B)": "5", "VRAM Total Used Memory (B)": value}}
    assert parse_rocm_smi(json.dumps(told)) == [Missing("rocm-smi tells no memory")]


@pytest.mark.parametrize("entry", [{"gpu": 0}, {"mem_usage": "N/A"}, {"mem_usage": {}}])
def test_a_card_that_tells_no_memory_keeps_its_place(entry):
    memory, other = parse_amd_smi(json.dumps([entry, usage()]))
    assert memory == Missing("amd-smi tells no memory")
    assert isinstance(other, GpuMemory)


def test_more_used_than_there_is_is_missing():
    (memory,) = parse_amd_smi(json.dumps([usage(total=1, used=2)]))
    assert "contradicts itself" in memory.why


trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8) | st.just("N/A"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["gpu_data", "mem_usage", "total_vram", "used_vram", "value", "unit", "card0", "VRAM Total Memory (B)"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(trees.map(json.dumps) | st.text(), st.text(max_size=20))
def test_no_answer_makes_them_crash_or_tell_less_than_nothing(text, before):
    for memory in parse_amd_smi(before + text) + parse_rocm_smi(before + "\n" + text):
        assert isinstance(memory, Missing) or 0 <= memory.free_bytes <= memory.total_bytes


# As programs


def test_the_newer_program_is_asked_and_for_memory_only(tree):
    tree.program("amd-smi", ROCM_7)
    tree.program("rocm-smi", ROCM_SMI)
    assert len(AmdTools(str(tree.bin)).memories(0)) == 2
    assert tree.calls("amd-smi") == ["metric --mem-usage --json"]
    assert tree.calls("rocm-smi") == []


def test_the_older_program_is_asked_where_there_is_no_other(tree):
    tree.program("rocm-smi", ROCM_SMI)
    assert len(AmdTools(str(tree.bin)).memories(0)) == 3
    assert tree.calls("rocm-smi") == ["--showmeminfo vram --json"]


def test_an_answer_stands_for_ten_seconds_and_none_for_a_minute(tree):
    tree.program("amd-smi", ROCM_7)
    tools = AmdTools(str(tree.bin))
    for now in range(20):
        tools.memories(now)
    assert len(tree.calls("amd-smi")) == 2
    tree.program("amd-smi", "")
    for now in range(20, 100):
        tools.memories(now)
    assert len(tree.calls("amd-smi")) == 4


def test_a_program_that_does_not_answer_in_time_tells_nothing(tree):
    tree.program("amd-smi", ROCM_7, seconds=60)
    assert AmdTools(str(tree.bin), deadline_seconds=0.01).memories(0) == []


def test_without_a_program_nothing_is_told(tree):
    assert AmdTools(str(tree.bin)).memories(0) == []


def test_a_program_is_asked_again_and_again(amd, tree):
    tree.program("amd-smi", ROCM_7)
    before = amd.read()
    tree.program("amd-smi", ROCM_6)
    amd.put_clock_forward(11)
    assert amd.read() == before
    assert len(tree.calls("amd-smi")) == 2


def test_a_program_that_cannot_be_started_tells_nothing(tree):
    (tree.bin / "amd-smi").write_text("#!/nowhere\n")
    (tree.bin / "amd-smi").chmod(0o755)
    assert AmdTools(str(tree.bin)).memories(0) == []


# Through the sensor


@pytest.fixture
def amd(every):
    every.state.init_error = DRIVER_NOT_LOADED
    return every


def test_no_program_is_started_where_the_kernel_tells_the_memory(amd, tree):
    tree.amd()
    tree.program("amd-smi", ROCM_7)
    assert amd.read().gpus[0].trust is Trust.MEASURED
    assert tree.calls("amd-smi") == []


def test_a_card_whose_memory_the_kernel_does_not_tell_is_told_by_a_program(amd, tree):
    tree.amd(mem_info_vram_total=None)
    tree.program("amd-smi", json.dumps([usage()]))
    (gpu,) = amd.read().gpus
    assert (gpu.uuid, gpu.source, gpu.trust) == ("GPU-53bb4c0c0bd43f0c", "amd-smi", Trust.SECOND_HAND)
    assert gpu.memory.total_bytes == 24560 * MIB
    assert gpu.utilization_percent == 12


def test_cards_that_the_kernel_does_not_show_at_all_are_told_by_a_program(amd, tree):
    tree.program("rocm-smi", ROCM_SMI)
    gpus = amd.read().gpus
    assert [gpu.uuid for gpu in gpus] == ["amd-0", "amd-1", "amd-2"]
    assert {(gpu.vendor, gpu.source) for gpu in gpus} == {("amd", "rocm-smi")}


def test_a_program_that_finds_no_card_is_no_reading(amd, tree):
    tree.program("amd-smi", "WARNING: No JSON data to report")
    with pytest.raises(SensorError, match="driver is not loaded"):
        amd.read()


def test_a_card_that_sleeps_is_not_woken_by_a_program(amd, tree):
    tree.amd(power__control="auto", power__runtime_status="suspended")
    tree.program("amd-smi", ROCM_7)
    assert amd.read().gpus[0].asleep
    assert tree.calls("amd-smi") == []


def test_one_card_that_is_told_by_the_kernel_keeps_every_program_away(amd, tree):
    tree.amd()
    tree.amd("0000:04:00.0", unique_id=None, mem_info_vram_used=None)
    tree.program("amd-smi", ROCM_7)
    told, silent = amd.read().gpus
    assert told.memory.total_bytes == 24 * GIB
    assert isinstance(silent.memory, Missing)
    assert tree.calls("amd-smi") == []
