"""What the daemon costs: memory, idle CPU, start-up, and a cycle over 10^5 of them.

    python benchmarks/daemon_cost.py [--idle-seconds 60] [--cycles 100000]

The first part runs `vram-manager run` at its defaults as a process of its own, beside the simulated stack and (where
a C compiler is there) the fake NVML library. The second part turns the cycle as fast as it can over parts that answer
at once. Figures are of this machine and this moment; the budgets beside them are the project's.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

from loguru import logger

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.processes import cpu_seconds, daemon, rss_mib, simulated
from tests.scenarios.stack import settings
from vram_manager import client
from vram_manager.clock import Clock
from vram_manager.daemon import build
from vram_manager.domain.model_facts import ModelFacts, StoredModel
from vram_manager.domain.snapshot import ComfyUIState, Gpus, OllamaState, TorchDevice
from vram_manager.simulator.ledger import GIB, Ledger, LedgerGpuSensor
from vram_manager.store import Store


def row(what: str, measured: str, budget: str) -> None:
    print(f"{what:<46} {measured:>16}   {budget}", flush=True)


def as_a_process(idle_seconds: float, directory: Path) -> None:
    with simulated(directory) as settings:
        with daemon(settings):
            pass
        began = time.monotonic()
        with daemon(settings) as pid:
            row("start to first snapshot", f"{time.monotonic() - began:.2f} s", "<= 1 s")
            time.sleep(5)
            cpu, at = cpu_seconds(pid), time.monotonic()
            time.sleep(idle_seconds)
            share = 100 * (cpu_seconds(pid) - cpu) / (time.monotonic() - at)
            row(f"CPU, stack idle, over {idle_seconds:.0f} s", f"{share:.2f} % of a core", "<= 0.5 %")
            row("RSS, stack idle", f"{rss_mib(pid):.1f} MiB", "<= 60 MiB, aiming at 50")
            for _ in range(200):
                client.call("GET", "/v1/snapshot")
                client.call("GET", "/metrics")
            row("RSS after 400 requests to the socket", f"{rss_mib(pid):.1f} MiB", "<= 60 MiB")


class _Ollama:
    async def models(self) -> OllamaState:
        return OllamaState(version="0.32.15", models=())

    async def unload(self, model: str) -> None: ...

    async def aclose(self) -> None: ...

    async def library(self) -> dict[str, StoredModel]:
        return {}

    async def show(self, model: str) -> ModelFacts:
        return ModelFacts(architecture="none")


class _ComfyUI:
    async def stats(self) -> ComfyUIState:
        device = TorchDevice(
            name="cuda:0 Simulated RTX 4090",
            type="cuda",
            index=0,
            vram_total_bytes=24 * GIB,
            vram_free_bytes=18 * GIB,
            torch_total_bytes=5 * GIB,
            torch_free_bytes=GIB,
        )
        return ComfyUIState(version="0.33.0", argv=("main.py", "--listen"), devices=(device,))

    async def queue_remaining(self) -> int:
        return 0

    async def statuses(self) -> AsyncIterator[int]:
        await asyncio.Event().wait()
        yield 0

    async def model_sizes(self, folder: str) -> dict[str, int]:
        return {}

    async def free(self, body: object) -> None: ...

    async def aclose(self) -> None: ...


class _Gpus:
    """The ledger's numbers, with memory that moves a little at every look, so that no two turns are alike."""

    def __init__(self) -> None:
        self._ledger = Ledger(24 * GIB)
        self._sensor = LedgerGpuSensor(self._ledger)
        self._looks = 0

    async def read(self, *, with_processes: bool = False) -> Gpus:
        self._looks += 1
        self._ledger.resize("somebody", 10 * GIB + self._looks % 7 * 2**20)
        return await self._sensor.read(with_processes=with_processes)

    def close(self) -> None: ...


async def cycles(count: int, directory: Path) -> None:
    logger.remove()
    clock = Clock.of_running_loop()
    gpus = _Gpus()
    daemon = build(settings(), clock, Store.open(directory), gpus=gpus, ollama=_Ollama(), comfyui=_ComfyUI())
    work = asyncio.create_task(daemon.observer.run())
    while not daemon.observer.ready:
        await asyncio.sleep(0.01)

    warm = count // 10
    for _ in range(warm):
        daemon.cycle.turn()
    gc.collect()
    before, began, cpu = rss_mib(os.getpid()), time.perf_counter(), time.process_time()
    for number in range(count - warm):
        daemon.cycle.turn()
        if number % 1000 == 0:
            await asyncio.sleep(0)
    wall, busy = time.perf_counter() - began, time.process_time() - cpu
    gc.collect()
    row(f"one turn of the cycle, mean of {count - warm}", f"{1e6 * busy / (count - warm):.0f} us CPU", "")
    row("turns a second", f"{(count - warm) / wall:.0f}", "0.2-4 are needed")
    row(f"RSS growth over {count - warm} turns", f"{rss_mib(os.getpid()) - before:+.2f} MiB", "no growth")
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)
    daemon.journal.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--idle-seconds", type=float, default=60.0)
    parser.add_argument("--cycles", type=int, default=100_000)
    options = parser.parse_args()
    print(f"{'what':<46} {'measured':>16}   budget")
    with tempfile.TemporaryDirectory() as directory:
        as_a_process(options.idle_seconds, Path(directory))
        asyncio.run(cycles(options.cycles, Path(directory) / "cycles"))


if __name__ == "__main__":
    main()
