"""Builds the parts of /sys and /proc that GPUs are read from."""

from __future__ import annotations

from pathlib import Path

GIB = 2**30
KIB = 1024


class Tree:
    """A machine's /sys and /proc under one folder."""

    def __init__(self, root: Path) -> None:
        self.sys = root / "sys"
        self.proc = root / "proc"
        self.bin = root / "bin"
        for folder in (self.sys, self.proc, self.bin):
            folder.mkdir(parents=True, exist_ok=True)
        self._cards = 0

    def device(self, slot: str, *, vendor: str, driver: str | None = None, **files: object) -> Path:
        """A display device on the bus. A file's name may hold "__" for "/"; the value None leaves it out."""
        directory = self.sys / "devices" / "pci0000:00" / slot
        (directory / "power").mkdir(parents=True)
        link(self.sys / "bus" / "pci" / "devices" / slot, directory)
        if driver is not None:
            bus = self.sys / "bus" / "pci" / "drivers" / driver
            bus.mkdir(parents=True, exist_ok=True)
            link(directory / "driver", bus)
        plain = {"vendor": vendor, "class": "0x030000", "device": "0x744c"}
        powers = {"power__control": "on", "power__runtime_status": "active"}
        write(directory, plain | powers | files)
        return directory

    def card(self, slot: str, *, vendor: str, driver: str, **files: object) -> Path:
        """A device with a kernel graphics driver, and a connector of it beside."""
        directory = self.device(slot, vendor=vendor, driver=driver, **files)
        card = self.sys / "class" / "drm" / f"card{self._cards}"
        link(card / "device", directory)
        link(self.sys / "class" / "drm" / f"card{self._cards}-DP-1" / "device", card)
        self._cards += 1
        return directory

    def nvidia(self, slot: str = "0000:01:00.0", *, control: str = "on", status: str = "active") -> Path:
        return self.device(slot, vendor="0x10de", power__control=control, power__runtime_status=status, device="0x2820")

    def amd(self, slot: str = "0000:03:00.0", **files: object) -> Path:
        """A Radeon RX 7900 XTX of which 2 GiB are used."""
        told = {
            "mem_info_vram_total": 24 * GIB,
            "mem_info_vram_used": 2 * GIB,
            "mem_info_vram_vendor": "samsung",
            "mem_info_gtt_total": 16 * GIB,
            "mem_info_gtt_used": 0,
            "gpu_busy_percent": 12,
            "unique_id": "53BB4C0C0BD43F0C",
            "hwmon__hwmon4__temp1_input": 61_000,
            "hwmon__hwmon4__power1_average": 212_000_000,
        }
        return self.card(slot, vendor="0x1002", driver="amdgpu", **(told | files))

    def apu(self, slot: str = "0000:c5:00.0", **files: object) -> Path:
        """A Strix Halo as it is sold: 512 MiB set aside, 96 GiB that models may have."""
        told = {
            "device": "0x1586",
            "mem_info_vram_total": GIB // 2,
            "mem_info_vram_used": GIB // 4,
            "mem_info_vram_vendor": None,
            "mem_info_gtt_total": 96 * GIB,
            "mem_info_gtt_used": 30 * GIB,
            "unique_id": None,
            "hwmon__hwmon4__power1_average": None,
            "hwmon__hwmon4__power1_input": 55_500_000,
        }
        return self.amd(slot, **(told | files))

    def arc(self, slot: str = "0000:04:00.0", **files: object) -> Path:
        """An Arc B580 under xe, which tells its size only."""
        told = {"device": "0xe20b", "tile0__physical_vram_size_bytes": 12 * GIB}
        return self.card(slot, vendor="0x8086", driver="xe", **(told | files))

    def intel_in_the_cpu(self) -> Path:
        return self.card("0000:00:02.0", vendor="0x8086", driver="i915", device="0x46a6")

    def meminfo(self, *, total: int, available: int) -> None:
        lines = f"MemTotal:       {total // KIB} kB\nMemFree:        1 kB\nMemAvailable:   {available // KIB} kB\n"
        (self.proc / "meminfo").write_text(lines)

    def kernel(self, version: str) -> None:
        (self.proc / "version").write_text(f"Linux version {version} (gcc 11.2.0) #1 SMP\n")

    def capabilities(self, mask: int) -> None:
        (self.proc / "self").mkdir(exist_ok=True)
        (self.proc / "self" / "status").write_text(f"Name:\tpython\nCapEff:\t{mask:016x}\n")

    def opens(self, pid: int, fd: int, text: str, *, target: str = "/dev/dri/renderD128") -> None:
        """The process has that file open, with this in its fdinfo."""
        process = self.proc / str(pid)
        for folder in ("fd", "fdinfo"):
            (process / folder).mkdir(parents=True, exist_ok=True)
        link(process / "fd" / str(fd), Path(target))
        (process / "fdinfo" / str(fd)).write_text(text)
        (process / "cmdline").write_bytes(b"ollama\0runner\0")

    def of_the_host(self) -> None:
        """Every process of the machine is visible, as with pid: host and the right to look."""
        write(self.proc / "2", {"comm": "kthreadd"})
        (self.proc / "1" / "fd").mkdir(parents=True)

    def program(self, name: str, prints: str, *, seconds: float = 0) -> None:
        """A program of that name on the PATH, which notes each call in `calls` beside it."""
        path = self.bin / name
        (self.bin / f"{name}.out").write_text(prints)
        path.write_text(f'#!/bin/sh\necho "$@" >> "$0.calls"\nsleep {seconds}\ncat "$0.out"\n')
        path.chmod(0o755)

    def calls(self, name: str) -> list[str]:
        noted = self.bin / f"{name}.calls"
        return noted.read_text().splitlines() if noted.exists() else []


def fdinfo(slot: str = "0000:03:00.0", client: int = 7, *lines: str) -> str:
    """The fdinfo of one DRM client."""
    head = ("pos:\t0", "flags:\t02100002", "drm-driver:\tamdgpu", f"drm-client-id:\t{client}", f"drm-pdev:\t{slot}")
    return "\n".join((*head, *lines)) + "\n"


def write(directory: Path, files: dict[str, object]) -> None:
    for name, value in files.items():
        path = directory / name.replace("__", "/")
        path.unlink(missing_ok=True)
        if value is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{value}\n")


def broken(path: Path) -> None:
    """Reading the file fails, though it is there: EISDIR stands for EBUSY and EOPNOTSUPP."""
    path.unlink(missing_ok=True)
    path.mkdir(parents=True)


def link(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)
