"""The processes that the benchmarks start and look at."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.fake_nvml import build, compiler
from vram_manager.client import call
from vram_manager.errors import Unreachable

OWN = (sys.executable, "-m", "vram_manager")
AS_IN_THE_IMAGE = {"MALLOC_ARENA_MAX": "2", "MALLOC_TRIM_THRESHOLD_": "131072"}
_TICKS = os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def process(*command: str, **environment: str) -> Iterator[int]:
    """The id of a process that runs inside the block."""
    # As in the image, modules come compiled: compiling them at the start leaves some 15 MiB of garbage behind.
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    child = subprocess.Popen(command, env={**AS_IN_THE_IMAGE, **inherited, **environment}, stdout=subprocess.DEVNULL)
    try:
        yield child.pid
    finally:
        child.terminate()
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


@contextlib.contextmanager
def simulated(directory: Path, *options: str) -> Iterator[dict[str, str]]:
    """The simulated stack over the fake NVML library, where a compiler is there: the settings of a daemon beside it."""
    ollama, comfyui = free_ports(2)
    settings = {
        "OLLAMA_URL": f"http://127.0.0.1:{ollama}",
        "COMFYUI_URL": f"http://127.0.0.1:{comfyui}",
        "VRAM_SOCKET": str(directory / "vram.sock"),
        "VRAM_STATE_DIR": str(directory / "state"),
        "FAKE_NVML_STATE": str(directory / "gpu.state"),
        "LD_LIBRARY_PATH": str(build(directory).parent) if compiler() else "",
    }
    ports = ("--ollama-port", str(ollama), "--comfyui-port", str(comfyui))
    with process(*OWN, "simulate", *ports, "--nvml-state", settings["FAKE_NVML_STATE"], *options):
        until(lambda: answers(comfyui))
        # The first start on a machine compiles the modules.
        subprocess.run([*OWN, "--help"], check=True, stdout=subprocess.DEVNULL)
        yield settings


@contextlib.contextmanager
def daemon(settings: dict[str, str]) -> Iterator[int]:
    """The id of `vram-manager run`, ready; `call` reaches it."""
    with process(*OWN, "run", **settings) as pid:
        os.environ["VRAM_SOCKET"] = settings["VRAM_SOCKET"]
        until(lambda: call("GET", "/ready").status == 200)
        yield pid


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [listener.getsockname()[1] for listener in found]


def until(ready: Callable[[], object]) -> None:
    """Returns once it is; a minute at most."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with contextlib.suppress(OSError, Unreachable):
            if ready():
                return
        time.sleep(0.005)
    raise SystemExit("a server did not come up")


def answers(port: int) -> bool:
    socket.create_connection(("127.0.0.1", port)).close()
    return True


def rss_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) / 1024


def cpu_seconds(pid: int) -> float:
    """Of all its threads, in hundredths."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def percentile(taken: list[float], share: float) -> float:
    return sorted(taken)[min(len(taken) - 1, int(len(taken) * share))]
