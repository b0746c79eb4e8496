"""Three processes as in real life: the simulated servers, a fake NVML library, and `vram-manager run`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import websockets

from tests.fake_nvml import build, compiler
from vram_manager.simulator.world import txt2img

pytestmark = pytest.mark.asyncio
needs_compiler = pytest.mark.skipif(compiler() is None, reason="no C compiler here to build the fake NVML library")

# Generous: the slowest step is a few seconds, and nothing is asserted on how long it took.
LINE_SECONDS = 60.0


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [listener.getsockname()[1] for listener in found]


class Process:
    """A child process whose output is read line by line."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[str] = []

    async def line(self, pattern: str) -> str:
        """The next line that matches; everything before it is kept in `lines`."""
        assert self.process.stdout is not None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINE_SECONDS):
                while raw := await self.process.stdout.readline():
                    self.lines.append(raw.decode().rstrip())
                    if re.search(pattern, self.lines[-1]):
                        return self.lines[-1]
        raise AssertionError(f"no line matched {pattern!r}:\n" + "\n".join(self.lines))

    async def stop(self) -> int:
        self.process.terminate()
        assert self.process.stdout is not None
        self.lines += (await self.process.stdout.read()).decode().splitlines()
        return await self.process.wait()


@contextlib.asynccontextmanager
async def started(*arguments: str, **environment: str) -> AsyncIterator[Process]:
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "vram_manager",
        *arguments,
        env={**os.environ, **environment},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    process = Process(child)
    try:
        yield process
    finally:
        if child.returncode is None:
            await process.stop()


@contextlib.asynccontextmanager
async def whole_stack(
    directory: Path, **settings: str
) -> AsyncIterator[tuple[Process, httpx.AsyncClient, dict[str, str]]]:
    ollama, comfyui, control = free_ports(3)
    urls = {
        name: f"http://127.0.0.1:{port}" for name, port in (("ollama", ollama), ("comfyui", comfyui), ("gpu", control))
    }
    state = directory / "gpu.state"
    ports = ["--ollama-port", str(ollama), "--comfyui-port", str(comfyui), "--control-port", str(control)]
    library = build(directory).parent
    environment = {
        "FAKE_NVML_STATE": str(state),
        "LD_LIBRARY_PATH": str(library),
        "OLLAMA_URL": urls["ollama"],
        "COMFYUI_URL": urls["comfyui"],
        "VRAM_SOCKET": str(directory / "vram.sock"),
        "VRAM_STATE_DIR": str(directory / "state"),
        **settings,
    }
    simulation = started("simulate", *ports, "--gpu-gib", "12", "--mode", "legacy", "--nvml-state", str(state))
    async with simulation as simulator:
        await simulator.line("Simulated Ollama")
        async with started("run", **environment) as daemon, httpx.AsyncClient(timeout=120, trust_env=False) as http:
            await daemon.line("can be read: GPU 0")
            yield daemon, http, urls


async def render(http: httpx.AsyncClient, urls: dict[str, str]) -> None:
    """One image from the post to the moment the queue is empty again."""
    address = urls["comfyui"].replace("http", "ws") + "/ws?clientId=artist"
    async with websockets.connect(address, proxy=None) as events:
        prompt = {"prompt": txt2img(steps=2), "client_id": "artist"}
        (await http.post(f"{urls['comfyui']}/prompt", json=prompt)).raise_for_status()
        async for message in events:
            if "execution_success" in str(message):
                return


FREED = r"Freed ComfyUI memory: \d+\.\d GiB in \d+\.\d s \(soft; .+\) used \d+ % -> \d+ % \[free-\d{4}\]"


@needs_compiler
async def test_an_idle_comfyui_is_freed_for_a_model_on_the_cpu(tmp_path: Path) -> None:
    async with whole_stack(tmp_path) as (daemon, http, urls):
        await render(http, urls)
        chat = {"model": "llama3.1:8b", "prompt": "hello", "stream": False}
        answer = asyncio.create_task(http.post(f"{urls['ollama']}/api/generate", json=chat))
        detected = await daemon.line("New Ollama model")
        fallback = await daemon.line("CPU fallback")
        freed = await daemon.line("Freed ComfyUI memory")
        truth = (await http.get(f"{urls['gpu']}/gpu")).json()
        status = await daemon.stop()
        answer.cancel()

    assert re.search(r"New Ollama model\(s\) detected: llama3\.1:8b \(\d+\.\d GiB, \d+ % CPU\)", detected)
    assert re.search(r"CPU fallback: llama3\.1:8b is \d+ % on CPU", fallback)
    assert re.search(FREED, freed)
    assert truth["holders"]["comfyui"] < 2**30
    assert status == 0


@needs_compiler
async def test_an_idle_comfyui_is_freed_when_use_stays_over_the_threshold(tmp_path: Path) -> None:
    quick = {"VRAM_GRACE_SECONDS": "1", "COMFYUI_IDLE_SECONDS": "2", "VRAM_THRESHOLD": "50", "OLLAMA_URL": ""}
    async with whole_stack(tmp_path, **quick) as (daemon, http, urls):
        await render(http, urls)
        freed = await daemon.line("Freed ComfyUI memory")
        truth = (await http.get(f"{urls['gpu']}/gpu")).json()
        status = await daemon.stop()

    assert re.search(FREED, freed)
    assert "GPU 0 over 50 %" in freed
    assert truth["holders"]["comfyui"] < 2**30
    assert status == 0


async def test_the_demo_tells_its_story_to_the_end() -> None:
    async with started("demo", "--fast") as demo:
        await demo.line("CPU fallback")
        freed = await demo.line("Freed ComfyUI memory")
        await demo.line("^What happened")
        before = await demo.line("before")
        after = await demo.line("after")
        await demo.line("docker compose up -d")
        status = await demo.process.wait()

    assert re.search(FREED, freed)
    assert "100 % on the GPU" not in before
    assert "100 % on the GPU" in after
    assert status == 0
