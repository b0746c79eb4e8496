"""A busy day at a hundred times its speed: does looking stay quick, the history small and the daemon within its budget?

    python benchmarks/day.py [--hours 2] [--speed 100] [--history-mb 8]

The simulated stack (8 GPUs, 6 further Ollama servers, people at work) and `vram-manager run` are two processes whose
loops believe that time goes so much faster: every beat, deadline and pause is shorter by that factor, and the samples
are dated as if it were so. Requests come from outside, at their own speed. Figures are of this machine and this moment;
the budgets beside them are the project's.
"""

from __future__ import annotations

import argparse
import json
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.processes import OWN, answers, cpu_seconds, free_ports, percentile, process, rss_mib, until
from tests.fake_nvml import build, compiler
from vram_manager.client import call

GPUS, NODES = 8, 6
FAST = (sys.executable, str(Path(__file__).with_name("fast.py")))


def taken(ask: Callable[[], object]) -> float:
    began = time.perf_counter()
    ask()
    return 1000 * (time.perf_counter() - began)


def row(what: str, measured: str, budget: str = "") -> None:
    print(f"{what:<54} {measured:>24}   {budget}".rstrip(), flush=True)


def fetch(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=30) as reply:
        body: bytes = reply.read()
        return body


def day(hours: float, speed: float, history_mb: int, directory: Path) -> None:
    settings, ports = setup(directory, history_mb, speed)
    port = settings["VRAM_HTTP_PORT"]
    simulate = (*FAST, "simulate", *map(str, ports), settings["FAKE_NVML_STATE"], str(GPUS), str(NODES))
    history = f"http://127.0.0.1:{port}/v1/history?from=-{hours * 60:.0f}m"
    asks: dict[str, Callable[[], object]] = {
        "GET /v1/snapshot": lambda: fetch(f"http://127.0.0.1:{port}/v1/snapshot"),
        f"GET /v1/history, {hours:g} h": lambda: fetch(history),
        f"GET /v1/history, {hours:g} h, one GPU": lambda: fetch(f"{history}&gpu=0"),
        "GET /metrics": lambda: fetch(f"http://127.0.0.1:{port}/metrics"),
        "GET /": lambda: fetch(f"http://127.0.0.1:{port}/"),
        "vram-manager report, the whole process": lambda: report(settings),
    }
    times: dict[str, list[float]] = {what: [] for what in asks}
    bare = [taken(lambda: subprocess.run([*OWN, "version"], check=True, capture_output=True)) for _ in range(5)]
    most_rss = 0.0
    with process(*simulate, **settings):
        until(lambda: answers(ports[1]))
        with process(*FAST, "run", **settings) as pid:
            os.environ["VRAM_SOCKET"] = settings["VRAM_SOCKET"]
            until(lambda: call("GET", "/ready").status == 200)
            began, cpu = time.monotonic(), cpu_seconds(pid)
            while time.monotonic() - began < hours * 3600 / speed:
                for what, ask in asks.items():
                    times[what].append(taken(ask))
                most_rss = max(most_rss, rss_mib(pid))
                time.sleep(1.0)
            spent, lasted = cpu_seconds(pid) - cpu, time.monotonic() - began
            document = json.loads(fetch(history))
            nodes = json.loads(fetch(f"http://127.0.0.1:{port}/v1/snapshot"))["nodes"]
            listed = json.loads(fetch(f"http://127.0.0.1:{port}/v1/events?limit=1000"))["events"]
    points = sum(len(gpu["at"]) for gpu in document["gpus"])
    row("GPUs, nodes, events, points of the window", f"{len(document['gpus'])}, {len(nodes)}, {len(listed)}, {points}")
    for what, found in times.items():
        row(what, f"p50 {percentile(found, 0.5):.0f} max {max(found):.0f} ms", "< 200 ms")
    row("(of which a process that says its version)", f"p50 {percentile(bare, 0.5):.0f} ms")
    row("largest RSS", f"{most_rss:.1f} MiB", "<= 60 MiB")
    share = 100 * spent / (lasted * speed)
    row(f"CPU over {lasted * speed / 3600:.1f} h, requests included", f"{share:.2f} % of a core", "<= 0.5 % when idle")
    row(*size_of(Path(settings["VRAM_STATE_DIR"]), history_mb))


def setup(directory: Path, history_mb: int, speed: float) -> tuple[dict[str, str], list[int]]:
    # The ports after Ollama's are the nodes'.
    first = next(port for port in free_ports(20) if all(_free(port + number) for number in range(1, NODES + 1)))
    comfyui, http = free_ports(2)
    nodes = ",".join(f"http://127.0.0.1:{first + number}" for number in range(1, NODES + 1))
    settings = {
        "FAST_SPEED": str(speed),
        "OLLAMA_URL": f"http://127.0.0.1:{first}",
        "COMFYUI_URL": f"http://127.0.0.1:{comfyui}",
        "OLLAMA_GPU": "0",
        "COMFYUI_GPU": "0",
        "OLLAMA_NODES": nodes,
        "VRAM_HTTP_PORT": str(http),
        "VRAM_HISTORY_MB": str(history_mb),
        "VRAM_SOCKET": str(directory / "vram.sock"),
        "VRAM_STATE_DIR": str(directory / "state"),
        "FAKE_NVML_STATE": str(directory / "gpu.state"),
        "LD_LIBRARY_PATH": str(build(directory).parent) if compiler() else "",
    }
    return settings, [first, comfyui]


def _free(port: int) -> bool:
    try:
        answers(port)
    except OSError:
        return True
    return False


def report(settings: dict[str, str]) -> None:
    subprocess.run([*OWN, "report"], check=True, capture_output=True, env={**os.environ, **settings})


def size_of(state: Path, history_mb: int) -> tuple[str, str, str]:
    size = sum(path.stat().st_size for path in state.iterdir()) / 2**20
    with closing(sqlite3.connect(state / "history.sqlite3")) as database:
        counts = {
            name: database.execute(f"SELECT count(*) FROM samples_{name}").fetchone()[0]
            for name in ("raw", "minute", "hour")
        }
    rows = [f"{count} {name}" for name, count in counts.items()]
    return f"history on disk ({', '.join(rows)})", f"{size:.1f} MiB", f"<= {history_mb} MiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--speed", type=float, default=100.0)
    parser.add_argument("--history-mb", type=int, default=8)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        day(options.hours, options.speed, options.history_mb, Path(directory))


if __name__ == "__main__":
    main()
