"""Who has how much, from what the kernel says of each open graphics device."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.gpus.trees import broken, fdinfo
from vram_manager.domain.reading import Missing
from vram_manager.gpus.fdinfo import Client, parse, processes

MIB = 2**20
SLOT = "0000:03:00.0"


def used(tree, slot=SLOT, shared=()):
    return {one.pid: one.used_bytes for one in processes(tree.proc, shared).get(slot, ())}


def test_a_client_is_told_by_its_gpu_and_number():
    assert parse(fdinfo(SLOT, 7, "drm-memory-vram: 12 KiB")) == Client(slot=SLOT, number="7", regions={"vram": 12288})


@pytest.mark.parametrize(
    ("line", "size"),
    [
        ("drm-resident-vram0:\t51200 KiB", 51200 * 1024),
        ("drm-resident-local0: 8 MiB", 8 * MIB),
        ("drm-memory-vram: 1 GiB", 2**30),
        ("drm-total-vram: 4096", 4096),
        ("drm-total-vram: 0", 0),
    ],
)
def test_every_unit_is_understood_and_a_bare_number_is_bytes(line, size):
    (told,) = parse(fdinfo(SLOT, 7, line)).regions.values()
    assert told == size


def test_what_is_resident_counts_before_the_older_word_and_the_total():
    lines = ["drm-total-vram: 9 MiB", "drm-memory-vram: 5 MiB", "drm-resident-vram: 3 MiB", "drm-shared-vram: 1 MiB"]
    assert parse(fdinfo(SLOT, 7, *lines)).regions == {"vram": 3 * MIB}
    assert parse(fdinfo(SLOT, 7, *lines[:2])).regions == {"vram": 5 * MIB}
    assert parse(fdinfo(SLOT, 7, *lines[:1])).regions == {"vram": 9 * MIB}


@pytest.mark.parametrize(
    "line", ["drm-memory-vram: -5 KiB", "drm-memory-vram: 5 kB", "drm-memory-vram: five", "drm-memory-vram:"]
)
def test_a_size_that_is_none_is_not_told(line):
    assert parse(fdinfo(SLOT, 7, line)).regions == {}


@pytest.mark.parametrize("text", ["", "pos:\t0\nflags:\t02\n", "drm-pdev:\t0000:03:00.0\n", "drm-client-id:\t4\n"])
def test_what_is_no_drm_client_is_none(text):
    assert parse(text) is None


def test_a_connection_that_is_open_several_times_is_counted_once(tree):
    tree.opens(42, 9, fdinfo(SLOT, 7, "drm-memory-vram: 5 MiB"))
    tree.opens(42, 10, fdinfo(SLOT, 7, "drm-memory-vram: 5 MiB"))
    tree.opens(43, 3, fdinfo(SLOT, 7, "drm-memory-vram: 5 MiB"))
    assert used(tree) == {42: 5 * MIB}


def test_several_connections_of_a_process_add_up(tree):
    tree.opens(42, 9, fdinfo(SLOT, 7, "drm-memory-vram: 5 MiB"))
    tree.opens(42, 10, fdinfo(SLOT, 8, "drm-memory-vram: 6 MiB"))
    assert used(tree) == {42: 11 * MIB}


def test_the_same_number_on_another_gpu_is_another_connection(tree):
    tree.opens(42, 9, fdinfo(SLOT, 7, "drm-memory-vram: 5 MiB"))
    tree.opens(42, 10, fdinfo("0000:04:00.0", 7, "drm-memory-vram: 6 MiB"))
    assert used(tree) == {42: 5 * MIB}
    assert used(tree, "0000:04:00.0") == {42: 6 * MIB}


def test_only_the_gpus_own_memory_counts_unless_it_has_none(tree):
    lines = ["drm-resident-vram0: 1 MiB", "drm-resident-local1: 2 MiB", "drm-resident-gtt: 4 MiB"]
    lines += ["drm-resident-system: 8 MiB", "drm-resident-stolen-local0: 16 MiB", "drm-memory-cpu: 32 MiB"]
    tree.opens(42, 9, fdinfo(SLOT, 7, *lines))
    assert used(tree) == {42: 3 * MIB}
    assert used(tree, shared={SLOT}) == {42: 7 * MIB}


def test_a_driver_that_tells_no_sizes_makes_a_processs_memory_missing_and_not_zero(tree):
    tree.opens(42, 9, fdinfo(SLOT, 7))
    assert used(tree) == {42: Missing("its driver does not tell")}


def test_files_that_are_no_graphics_device_are_not_read(tree):
    tree.opens(42, 9, fdinfo(SLOT, 7, "drm-memory-vram: 5 MiB"), target="/tmp/file")
    assert used(tree) == {}


def test_a_process_that_may_not_be_looked_at_hides_no_other(tree):
    broken(tree.proc / "41" / "fdinfo")
    (tree.proc / "41" / "fd").write_text("")
    tree.opens(42, 9, fdinfo(SLOT, 7, "drm-memory-vram: 5 MiB"))
    broken(tree.proc / "42" / "fdinfo" / "11")
    assert used(tree) == {42: 5 * MIB}


def test_without_proc_nothing_is_visible(tree):
    tree.proc.rmdir()
    assert processes(tree.proc) == {}


keys = st.sampled_from(
    ["drm-pdev", "drm-client-id", "drm-memory-vram", "drm-resident-vram", "drm-total-gtt", "drm-driver"]
)
lines = st.builds(
    "{}:{}".format, keys, st.text(max_size=30) | st.from_regex(r"\s*-?\d{1,25} ?([KMG]iB)?", fullmatch=True)
)


@given(st.lists(lines | st.text(max_size=30), max_size=12).map("\n".join))
def test_no_text_makes_it_crash_or_tell_less_than_nothing(text):
    client = parse(text)
    assert client is None or (client.slot and client.number and all(size >= 0 for size in client.regions.values()))
