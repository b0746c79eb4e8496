"""A libnvidia-ml.so.1 without a GPU behind it, steered through vram_manager.simulator.nvml_state."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

SONAME = "libnvidia-ml.so.1"


def compiler() -> str | None:
    """The C compiler of this machine, if it has one."""
    return shutil.which("cc") or shutil.which("gcc")


def build(directory: Path, old_driver: bool = False) -> Path:
    """The library, compiled into `directory` . `old_driver` lacks what came with driver 510."""
    cc = compiler()
    if cc is None:
        raise FileNotFoundError("no C compiler: neither cc nor gcc is on the PATH")
    library = directory / SONAME
    source = Path(__file__).with_name("fake_nvml.c")
    variant = ["-DNO_V2"] if old_driver else []
    warnings = ["-std=gnu11", "-Wall", "-Wextra", "-Werror"]
    # The soname is what nvidia-ml-py asks the loader for: once loaded by its path, the library answers to it.
    shared = ["-O2", "-fPIC", "-shared", "-fvisibility=hidden", f"-Wl,-soname,{SONAME}"]
    subprocess.run([cc, *warnings, *variant, *shared, "-o", str(library), str(source)], check=True)
    return library
