"""What commonly stands between a container and its GPU, and is not said by the error that follows from it."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Final, NamedTuple

from vram_manager.domain.size import gib
from vram_manager.gpus._files import AMD, NVIDIA, driver_of, drm_gpus, is_wsl, on_the_bus, text_of
from vram_manager.gpus.amd import Sizes

_RESERVE: Final = (
    "reserve it in compose: deploy.resources.reservations.devices with driver nvidia and capabilities [gpu, utility];"
    " the host needs the NVIDIA Container Toolkit"
)
_LIBRARIES: Final = ("usr/lib/x86_64-linux-gnu", "usr/lib/aarch64-linux-gnu", "usr/lib64", "usr/lib")
_VERSION: Final = re.compile(r"\b(\d{3,4}\.\d+(?:\.\d+)?)\b")


class Trap(NamedTuple):
    """One finding. `grave`: the GPU cannot be read because of it; else it works, with something worth knowing."""

    grave: bool
    words: str
    remedy: str


def traps(
    root: Path = Path("/"),
    *,
    in_container: bool,
    environment: Mapping[str, str] = os.environ,
    uid: int | None = None,
    groups: Collection[int] | None = None,
) -> list[Trap]:
    """Every trap that can be seen from here. `uid` and `groups` are this process's own unless given."""
    uid = os.geteuid() if uid is None else uid
    groups = {os.getegid(), *os.getgroups()} if groups is None else groups
    return [
        *_image(root),
        *_environment(root, environment),
        *_devices(root, in_container=in_container, uid=uid, groups=groups),
        *_libraries(root),
        *_injection(root, in_container=in_container),
        *_drivers(root),
        *_apus(root),
        *_wsl(root),
    ]


def _image(root: Path) -> list[Trap]:
    if not any((root / "lib").glob("ld-musl-*.so.1")) or any((root / "lib64").glob("ld-linux-*")):
        return []
    words = "this image is built on musl (Alpine): NVIDIA's libraries need glibc and cannot be loaded"
    return [Trap(True, words, "use an image that is built on glibc, such as python:3.11-slim")]


def _environment(root: Path, environment: Mapping[str, str]) -> list[Trap]:
    """Only where there is a card of NVIDIA's: images set these for all."""
    if not _has_nvidia(root):
        return []
    found: list[Trap] = []
    able = environment.get("NVIDIA_DRIVER_CAPABILITIES")
    if able and not {"all", "utility"} & {one.strip() for one in able.split(",")}:
        words = f"NVIDIA_DRIVER_CAPABILITIES={able} leaves out utility, which NVML is part of"
        found.append(Trap(True, words, "add utility to it, or to the capabilities in compose"))
    visible = environment.get("NVIDIA_VISIBLE_DEVICES")
    if visible in ("void", "none"):
        words = f"NVIDIA_VISIBLE_DEVICES={visible} hides every GPU"
        found.append(Trap(True, words, "set it to all, or reserve the GPU in compose"))
    return found


def _devices(root: Path, *, in_container: bool, uid: int, groups: Collection[int]) -> list[Trap]:
    control = root / "dev" / "nvidiactl"
    if not _has_nvidia(root) or is_wsl(root / "proc"):  # under WSL2 it is /dev/dxg
        return []
    try:
        told = control.stat()
    except OSError:
        if in_container:
            return [
                Trap(True, "an NVIDIA GPU is in this machine, and not in this container: no /dev/nvidiactl", _RESERVE)
            ]
        words = "an NVIDIA GPU is in this machine, and its driver is not loaded: no /dev/nvidiactl"
        return [Trap(True, words, "install NVIDIA's driver, or load it: modprobe nvidia; then nvidia-smi must work")]
    mine = told.st_mode >> 6 if uid == told.st_uid else told.st_mode >> 3 if told.st_gid in groups else told.st_mode
    if uid == 0 or mine & (stat.S_IROTH | stat.S_IWOTH) == stat.S_IROTH | stat.S_IWOTH:
        return []
    words = f"/dev/nvidiactl is closed to this user (uid {uid}): the host's driver sets NVreg_DeviceFileMode"
    return [Trap(True, words, f'add its group to the service in compose: group_add: ["{told.st_gid}"]')]


def _libraries(root: Path) -> list[Trap]:
    """NVML must be of the driver's own version. The toolkit mounts the host's; a copy in the image is in its way."""
    module = text_of(root / "proc" / "driver" / "nvidia" / "version")
    versions = _VERSION.search(module) if isinstance(module, str) else None
    libraries = {
        path.name.removeprefix("libnvidia-ml.so.")
        for folder in _LIBRARIES
        for path in (root / folder).glob("libnvidia-ml.so.*.*")
    }
    wrong = sorted(libraries - {versions.group(1)}) if versions else []
    if not wrong or versions is None:
        return []
    words = f"libnvidia-ml is {', '.join(wrong)} here, and the loaded driver is {versions.group(1)}"
    remedy = (
        "restart the container (the host's driver was updated), and reboot the host if its own nvidia-smi fails too;"
        " never copy the library into an image"
    )
    return [Trap(len(wrong) == len(libraries), words, remedy)]


def _injection(root: Path, *, in_container: bool) -> list[Trap]:
    """Devices that NVIDIA's hook bind-mounts are unknown to the runtime, which then takes the right to them away."""
    mounts = text_of(root / "proc" / "self" / "mountinfo")
    if not in_container or not isinstance(mounts, str):
        return []
    if not any(line.split()[4:5] == ["/dev/nvidiactl"] for line in mounts.splitlines()):
        return []
    words = "Docker does not know of the GPU in this container: systemctl daemon-reload on the host may take it away"
    remedy = (
        "restart: unless-stopped brings it back by itself; to prevent it use CDI, or on the host:"
        " nvidia-ctk system create-dev-char-symlinks"
    )
    return [Trap(False, words, remedy)]


_AMDGPU: Final = "boot with radeon.si_support=0 radeon.cik_support=0 amdgpu.si_support=1 amdgpu.cik_support=1"
_STRANGE_DRIVERS: Final = {
    "nouveau": ("the nouveau driver has it, which tells no memory", "install NVIDIA's own driver on the host"),
    "radeon": ("the old radeon driver has it, which tells no memory", _AMDGPU),
    "vfio-pci": ("it is given to a virtual machine (vfio-pci)", "run vram-manager in that machine"),
}


def _drivers(root: Path) -> list[Trap]:
    found: list[Trap] = []
    for gpu in on_the_bus(root / "sys", NVIDIA, AMD):
        if (driver := driver_of(gpu)) in _STRANGE_DRIVERS:
            why, remedy = _STRANGE_DRIVERS[driver]
            found.append(Trap(False, f"the GPU at {gpu.slot} cannot be read: {why}", remedy))
    return found


def _apus(root: Path) -> list[Trap]:
    found: list[Trap] = []
    for gpu in drm_gpus(root / "sys"):
        sizes = Sizes.of(gpu)
        if gpu.vendor == AMD and sizes.is_apu and isinstance(sizes.vram_total, int) and sizes.vram_total >= 2**30:
            words = f"the BIOS sets {gib(sizes.vram_total)} aside for the GPU in the CPU, which models there do not use"
            remedy = "set the least in the BIOS (UMA frame buffer size): models live in the memory that is shared"
            found.append(Trap(False, words, remedy))
    return found


def _wsl(root: Path) -> list[Trap]:
    if not is_wsl(root / "proc"):
        return []
    words = "this is WSL2, which tells no memory per process: who holds what is worked out from the APIs"
    return [Trap(False, words, "nothing to do; totals are right")]


def _has_nvidia(root: Path) -> bool:
    return bool(on_the_bus(root / "sys", NVIDIA)) or (root / "proc" / "driver" / "nvidia" / "version").exists()
