"""What stands between a container and its GPU is seen from inside, with what to do about it."""

import pytest

from tests.gpus.trees import GIB, Tree, link, write
from vram_manager.gpus.traps import traps

MODULE = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22 01:44:30 UTC 2024\nGCC version: 13.2.0"
MOUNTED = "740 730 0:5 /nvidiactl /dev/nvidiactl ro,nosuid,noexec - devtmpfs devtmpfs rw,size=4096k"


@pytest.fixture
def box(tmp_path):
    """A container on a machine with one NVIDIA card that works."""
    tree = Tree(tmp_path)
    tree.root = tmp_path
    tree.nvidia()
    (tmp_path / "dev").mkdir()
    device(tree, 0o666)
    write(tree.proc / "driver" / "nvidia", {"version": MODULE})
    write(tmp_path / "usr" / "lib" / "x86_64-linux-gnu", {"libnvidia-ml.so.550.54.14": ""})
    return tree


def device(tree, mode):
    path = tree.root / "dev" / "nvidiactl"
    path.touch()
    path.chmod(mode)


def found(tree, *, in_container=True, uid=65534, groups=(), **environment):
    return traps(tree.root, in_container=in_container, environment=environment, uid=uid, groups=groups)


def only(traps_found):
    (trap,) = traps_found
    return trap


def test_a_container_that_has_its_gpu_has_no_trap(box):
    assert found(box, NVIDIA_VISIBLE_DEVICES="all", NVIDIA_DRIVER_CAPABILITIES="compute,utility") == []


def test_a_machine_without_any_gpu_has_no_trap(tmp_path):
    tree = Tree(tmp_path)
    tree.root = tmp_path
    assert found(tree, NVIDIA_VISIBLE_DEVICES="void") == []


def test_a_gpu_that_is_not_in_the_container_is_to_be_reserved(box):
    (box.root / "dev" / "nvidiactl").unlink()
    trap = only(found(box))
    assert trap.grave
    assert "not in this container" in trap.words
    assert "[gpu, utility]" in trap.remedy
    assert "NVIDIA Container Toolkit" in trap.remedy


def test_outside_a_container_the_driver_is_to_be_loaded(box):
    (box.root / "dev" / "nvidiactl").unlink()
    assert "modprobe nvidia" in only(found(box, in_container=False)).remedy


def test_device_files_that_are_closed_to_this_user_name_the_group_that_may(box):
    device(box, 0o660)
    trap = only(found(box, uid=1000))
    gid = (box.root / "dev" / "nvidiactl").stat().st_gid
    assert f'group_add: ["{gid}"]' in trap.remedy
    assert found(box, uid=1000, groups=[gid]) == []
    assert found(box, uid=0) == []


def test_an_image_on_musl_is_told(box):
    write(box.root / "lib", {"ld-musl-x86_64.so.1": ""})
    assert "glibc" in only(found(box)).words
    write(box.root / "lib64", {"ld-linux-x86-64.so.2": ""})
    assert found(box) == []


@pytest.mark.parametrize("value", ["compute", "gpu", "graphics,video"])
def test_capabilities_without_utility_are_told(box, value):
    assert "leaves out utility" in only(found(box, NVIDIA_DRIVER_CAPABILITIES=value)).words


@pytest.mark.parametrize("value", ["all", "utility", "compute, utility", ""])
def test_capabilities_with_utility_are_none(box, value):
    assert found(box, NVIDIA_DRIVER_CAPABILITIES=value) == []


def test_devices_that_are_hidden_are_told(box):
    assert "hides every GPU" in only(found(box, NVIDIA_VISIBLE_DEVICES="void")).words


def test_a_library_of_another_version_than_the_driver_is_told(box):
    folder = box.root / "usr" / "lib" / "x86_64-linux-gnu"
    write(folder, {"libnvidia-ml.so.535.104.05": ""})
    trap = only(found(box))
    assert trap.words == "libnvidia-ml is 535.104.05 here, and the loaded driver is 550.54.14"
    assert not trap.grave
    (folder / "libnvidia-ml.so.550.54.14").unlink()
    assert only(found(box)).grave


def test_an_open_drivers_version_is_read_too(box):
    words = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.14  Release Build"
    write(box.proc / "driver" / "nvidia", {"version": words})
    assert found(box) == []


def test_a_gpu_that_a_daemon_reload_may_take_away_is_told(box):
    write(box.proc / "self", {"mountinfo": MOUNTED})
    trap = only(found(box))
    assert "daemon-reload" in trap.words
    assert not trap.grave
    assert found(box, in_container=False) == []
    write(box.proc / "self", {"mountinfo": MOUNTED.replace("nvidiactl", "shm")})
    assert found(box) == []


@pytest.mark.parametrize("driver", ["nouveau", "radeon", "vfio-pci"])
def test_a_card_with_a_driver_that_tells_nothing_is_told(box, driver):
    box.device("0000:07:00.0", vendor="0x1002", driver=driver)
    trap = only(found(box))
    assert "0000:07:00.0" in trap.words
    assert not trap.grave


def test_an_apu_whose_bios_sets_much_aside_is_told(box):
    box.apu(mem_info_vram_total=4 * GIB)
    trap = only(found(box))
    assert "4.0 GiB" in trap.words
    assert "BIOS" in trap.remedy


def test_an_apu_whose_bios_sets_little_aside_is_none(box):
    box.apu()
    box.amd()
    assert found(box) == []


def test_wsl_is_told_and_needs_no_device_file(box):
    (box.root / "dev" / "nvidiactl").unlink()
    box.kernel("5.15.153.1-microsoft-standard-WSL2")
    assert "WSL2" in only(found(box)).words


def test_on_this_machine_every_trap_has_words_and_a_remedy():
    assert all(trap.words and trap.remedy for trap in traps(in_container=False))


def test_a_broken_link_is_no_crash(box):
    link(box.sys / "bus" / "pci" / "devices" / "0000:ff:00.0", box.root / "nowhere")
    assert found(box) == []
