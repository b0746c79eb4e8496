"""Small reads of /sys and /proc. Each file may fail on its own, so each read says why it gave nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vram_manager.domain.reading import Missing

NVIDIA, AMD, INTEL = "0x10de", "0x1002", "0x8086"

_DISPLAY_CLASS: Final = "0x03"  # VGA, XGA, 3D and other display controllers (pci.ids, class 03)
_CARD: Final = re.compile(r"card\d+")  # "card0-DP-1" is a connector


@dataclass(frozen=True, slots=True, kw_only=True)
class PciGpu:
    """One graphics device. `slot` is its PCI address ("0000:01:00.0"), which stays the same from boot to boot."""

    slot: str
    vendor: str
    directory: Path


def text_of(path: Path) -> str | Missing:
    """The file's text without the blanks around it. EBUSY of a device that sleeps is like any other failure."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError as error:
        return Missing(f"{path.name} cannot be read: {error.strerror}")


def whole_of(path: Path) -> int | Missing:
    """The decimal number in the file, which is never negative where a size or a share is told."""
    text = text_of(path)
    if isinstance(text, Missing):
        return text
    return int(text) if text.isascii() and text.isdigit() else Missing(f"{path.name} holds no number: {text[:40]!r}")


def drm_gpus(sys_root: Path) -> list[PciGpu]:
    """The GPUs with a kernel graphics driver, in PCI order, whatever number their card has this time."""
    found: dict[str, PciGpu] = {}
    for card in _entries(sys_root / "class" / "drm"):
        device = card / "device"
        if _CARD.fullmatch(card.name) and isinstance(vendor := text_of(device / "vendor"), str):
            slot = device.resolve().name
            found.setdefault(slot, PciGpu(slot=slot, vendor=vendor, directory=device))
    return [found[slot] for slot in sorted(found)]


def on_the_bus(sys_root: Path, *vendors: str) -> list[PciGpu]:
    """The vendors' display devices, in PCI order, with or without a driver. Their sound and USB parts are left out."""
    found: list[PciGpu] = []
    for device in sorted(_entries(sys_root / "bus" / "pci" / "devices"), key=lambda one: one.name):
        vendor = text_of(device / "vendor")
        if vendor in vendors and str(text_of(device / "class")).startswith(_DISPLAY_CLASS):
            found.append(PciGpu(slot=device.name, vendor=str(vendor), directory=device))
    return found


def device_id(gpu: PciGpu) -> str:
    """Its PCI device id ("0x744c"), or "of unknown model"."""
    told = text_of(gpu.directory / "device")
    return told if isinstance(told, str) else "of unknown model"


def driver_of(gpu: PciGpu) -> str:
    """The kernel driver that is bound to it ("amdgpu", "xe", "vfio-pci"), "" where none is."""
    link = gpu.directory / "driver"
    return link.resolve().name if link.exists() else ""


def is_in_an_intel_cpu(gpu: PciGpu) -> bool:
    """The GPU of an Intel CPU has had this address in every generation, and no card can have it."""
    return gpu.vendor == INTEL and gpu.slot.endswith(":00:02.0")


def power_of(gpu: PciGpu) -> tuple[str, str]:
    """`power/control` and `power/runtime_status`, "" where not told. Reading them wakes nothing."""
    control, status = (text_of(gpu.directory / "power" / name) for name in ("control", "runtime_status"))
    return control if isinstance(control, str) else "", status if isinstance(status, str) else ""


def is_wsl(proc_root: Path) -> bool:
    """Whether this kernel is the one of WSL2 ("5.15.153.1-microsoft-standard-WSL2"), also in a container there."""
    return re.search(r"microsoft-standard|WSL2", str(text_of(proc_root / "version"))) is not None


def command_line(proc_root: Path, pid: int) -> tuple[str, ...] | Missing:
    """The command line of the process, which a zombie and the kernel's own do not have."""
    try:
        line = (proc_root / str(pid) / "cmdline").read_bytes().decode(errors="replace")
    except OSError as error:
        return Missing(f"its command line cannot be read: {error.strerror}")
    return tuple(line.removesuffix("\0").split("\0")) if line else Missing("it has no command line")


def _entries(directory: Path) -> list[Path]:
    try:
        return list(directory.iterdir())
    except OSError:
        return []
