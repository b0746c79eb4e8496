"""What asking costs: `check` and `limits` through `VramClient`, alone and with 64 workers at once.

    python benchmarks/admission.py [--rounds 3000] [--workers 64]

Beside the daemon the same run asks two others, each in a process of its own on a Unix socket, with a client as thin as
ours: `redis-server` (SET key NX, the usual way to reserve something; skipped, and said, where it is not installed) and
a bare asyncio server that answers one line with one line, which is the floor of what Python can do here. Figures are
of this machine and this moment; the ratios are what to compare, and the budgets beside them are the project's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.processes import daemon, percentile, process, simulated, until
from vram_manager.client import VramClient

BARE = """
import asyncio, json, sys
held = {}
async def serve(reader, writer):
    while line := await reader.readline():
        asked = json.loads(line)
        ok = held.get(asked["key"], 0) + asked["bytes"] <= 2**40
        writer.write(json.dumps({"admitted": ok}).encode() + b"\\n")
async def main():
    server = await asyncio.start_unix_server(serve, sys.argv[1])
    await server.serve_forever()
asyncio.run(main())
"""
Ask = Callable[[], object]


class Line:
    """A client of a server that answers with one line."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)
        self._count = 0

    def redis(self) -> bytes:
        self._count += 1
        key = f"gpu0:{os.getpid()}:{self._count % 1000}"
        self._socket.sendall(f"SET {key} 1073741824 NX PX 60000\r\n".encode())
        return self._answer()

    def bare(self) -> Any:
        self._socket.sendall(json.dumps({"key": "gpu0", "bytes": 1073741824}).encode() + b"\n")
        return json.loads(self._answer())

    def _answer(self) -> bytes:
        data = b""
        while not data.endswith(b"\n"):
            data += self._socket.recv(65536)
        return data


def askers(kind: str, path: str) -> Ask:
    """One question of that kind, on a connection of its own."""
    if kind in ("check", "limits"):
        client = VramClient(path, owner=f"bench-{os.getpid()}", fail_open=False)
        return (lambda: client.check("1GiB")) if kind == "check" else (lambda: client.limits(100))
    line = Line(path)
    return line.redis if kind == "redis" else line.bare


def timed(ask: Ask, rounds: int) -> list[float]:
    taken = []
    for _ in range(rounds):
        began = time.perf_counter()
        ask()
        taken.append(time.perf_counter() - began)
    return taken


def worker(kind: str, path: str, rounds: int, gate: Any, results: Any) -> None:
    """One of many: all ask at the same moment, again and again."""
    ask = askers(kind, path)
    ask()
    taken = []
    for _ in range(rounds):
        gate.wait()
        taken += timed(ask, 1)
    results.put(taken)


def at_once(kind: str, path: str, workers: int, rounds: int) -> list[float]:
    context = multiprocessing.get_context("fork")
    gate, results = context.Barrier(workers), context.Queue()
    crowd = [context.Process(target=worker, args=(kind, path, rounds, gate, results)) for _ in range(workers)]
    for one in crowd:
        one.start()
    taken = [seconds for _ in crowd for seconds in results.get()]
    for one in crowd:
        one.join()
    return taken


def row(what: str, taken: list[float], beside: dict[str, float], budget: str) -> None:
    half, most = percentile(taken, 0.5) * 1e3, percentile(taken, 0.99) * 1e3
    ratios = ", ".join(f"{half / other:.1f} x {name}" for name, other in beside.items())
    print(f"{what:<28} p50 {half:7.3f} ms   p99 {most:7.3f} ms   {ratios:<32} {budget}", flush=True)


def report(kinds: dict[str, str], measure: Callable[[str, str], list[float]], budget: str, crowd: str) -> None:
    """One row for each kind, ours last and against the others."""
    beside: dict[str, float] = {}
    for kind, path in kinds.items():
        taken = measure(kind, path)
        ours = kind in ("check", "limits")
        row(f"{kind}, {crowd}", taken, beside if ours else {}, budget if ours else "")
        if not ours:
            beside[kind] = percentile(taken, 0.5) * 1e3


def cpu_seconds_of(statement: str) -> float:
    """CPU of a new Python that does only this and ends: the least of nine."""
    taken = []
    for _ in range(9):
        before = os.times()
        subprocess.run([sys.executable, "-c", statement], check=True)
        after = os.times()
        taken.append(after.children_user + after.children_system - before.children_user - before.children_system)
    return min(taken)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=3000)
    arguments.add_argument("--workers", type=int, default=64)
    chosen = arguments.parse_args()
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        kinds = {"bare asyncio": str(directory / "bare.sock")}
        stack.enter_context(process(sys.executable, "-c", BARE, kinds["bare asyncio"]))
        redis = shutil.which("redis-server")
        if redis:
            kinds["redis"] = str(directory / "redis.sock")
            no_disk = ("--save", "", "--appendonly", "no", "--daemonize", "no", "--port", "0")
            stack.enter_context(process(redis, "--unixsocket", kinds["redis"], *no_disk, "--dir", name))
        else:
            print("redis-server is not installed: left out")
        settings = stack.enter_context(simulated(directory))
        stack.enter_context(daemon(settings))
        ours = settings["VRAM_SOCKET"]
        kinds |= {"check": ours, "limits": ours}
        until(lambda: all(Path(path).exists() for path in kinds.values()))
        time.sleep(1.0)
        rounds, workers = chosen.rounds, chosen.workers
        report(kinds, lambda kind, path: timed(askers(kind, path), rounds), "p50 <= 0.5 ms, p99 <= 1 ms", "alone")
        few = max(10, rounds // workers)
        crowd = f"{workers} at once"
        report(kinds, lambda kind, path: at_once(kind, path, workers, few), "p99 <= 20 ms", crowd)
    asked = "from vram_manager.client import VramClient, check_vram_sufficient"
    cost = (cpu_seconds_of(asked) - cpu_seconds_of("pass")) * 1e3
    print(f"import of vram_manager.client: {cost:.0f} ms of CPU over bare Python   <= 60 ms")


if __name__ == "__main__":
    main()
