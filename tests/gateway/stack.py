"""A real daemon with both gateways before simulated servers, all on real sockets; the servers live in the test."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import mmap
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from tests.fake_nvml import build
from tests.test_end_to_end import Process, free_ports, started
from vram_manager.simulator.comfyui_executor import ComfyUISettings
from vram_manager.simulator.nvml_state import NvmlState
from vram_manager.simulator.ollama_runner import OllamaSettings, Runner
from vram_manager.simulator.serve import mirrored, serving
from vram_manager.simulator.world import World

MODEL = "llama3.1:8b"
# Generous: nothing is asserted on how long it took.
PATIENCE_SECONDS = 20.0
# What takes seconds in real life takes next to none.
SWIFT_OLLAMA = OllamaSettings(load_bytes_per_second=1e12, start_seconds=0, unload_seconds=0.01)
SWIFT_COMFYUI = ComfyUISettings(
    disk_bytes_per_second=1e12,
    ram_bytes_per_second=1e12,
    seconds_per_step=0.01,
    text_seconds=0.01,
    decode_seconds=0.01,
    gc_seconds=0.01,
)


class Watched:
    """Around the app of a simulated server: whose requests (by X-Request-Id) it works on at this moment."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.active: set[str] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        who = Headers(scope=scope).get("x-request-id", "")
        self.active.add(who)
        try:
            await self._app(scope, receive, send)
        finally:
            self.active.discard(who)


@dataclass(slots=True, kw_only=True)
class Stack:
    """The truth (`world`), the way to it (`ollama`, `comfyui`: URLs of the gateways), and daemons that come and go."""

    world: World
    ollama: str
    comfyui: str
    environment: dict[str, str]
    direct: dict[str, str] = field(default_factory=dict)

    @contextlib.asynccontextmanager
    async def daemon(self, **more: str) -> AsyncIterator[Process]:
        async with started("run", **self.environment | more) as process:
            await process.line("Listening on")
            yield process

    async def told(self, path: str, true: Callable[[Any], object]) -> Any:
        """What the daemon says at `path`, once it is as wished."""
        transport = httpx.AsyncHTTPTransport(uds=self.environment["VRAM_SOCKET"])
        async with httpx.AsyncClient(transport=transport, base_url="http://vram") as http:
            async with asyncio.timeout(PATIENCE_SECONDS):
                while not true(found := (await http.get(path)).json()):
                    pass
        return found

    def nvml(self) -> NvmlState:
        """The fake library's state as the daemon sees it."""
        with Path(self.environment["FAKE_NVML_STATE"]).open("r+b") as file:
            return NvmlState.from_buffer(mmap.mmap(file.fileno(), ctypes.sizeof(NvmlState)))

    def runner(self, model: str = MODEL) -> Runner | None:
        """The loaded model behind that name."""
        return self.world.ollama.scheduler.runners.get(self.world.ollama.models[model].blob_digest)


@contextlib.asynccontextmanager
async def stack_in(
    directory: Path,
    *,
    gpu_gib: float = 12,
    ollama: Callable[[ASGIApp], ASGIApp] = lambda app: app,
    comfyui: Callable[[ASGIApp], ASGIApp] = lambda app: app,
    before_ollama: Callable[[str], contextlib.AbstractAsyncContextManager[str]] | None = None,
    before_comfyui: Callable[[str], contextlib.AbstractAsyncContextManager[str]] | None = None,
    **settings: str,
) -> AsyncIterator[Stack]:
    """`ollama` and `comfyui` may wrap the simulated apps; `before_ollama` and `before_comfyui` make URLs of URLs."""
    state = directory / "gpu.state"
    ports = free_ports(2)
    async with contextlib.AsyncExitStack() as stack:
        world = World(gpu_gib, ollama_settings=SWIFT_OLLAMA, comfyui_settings=SWIFT_COMFYUI, loopback=True)
        world.ollama.work.gpu_tokens_per_second = 1e6
        await stack.enter_async_context(world)
        stack.enter_context(mirrored(state, world.ledger))
        apps = ollama(world.ollama.app), comfyui(world.comfyui.app)
        urls = [await stack.enter_async_context(serving(app)) for app in apps]
        for number, before in enumerate((before_ollama, before_comfyui)):
            if before is not None:
                urls[number] = await stack.enter_async_context(before(urls[number]))
        environment = {
            "FAKE_NVML_STATE": str(state),
            "LD_LIBRARY_PATH": str(build(directory).parent),
            "OLLAMA_URL": urls[0],
            "COMFYUI_URL": urls[1],
            "GATEWAY_OLLAMA_PORT": str(ports[0]),
            "GATEWAY_COMFYUI_PORT": str(ports[1]),
            "VRAM_SOCKET": str(directory / "vram.sock"),
            "VRAM_STATE_DIR": str(directory / "state"),
            "VRAM_CHECK_INTERVAL": "0.25",
            **settings,
        }
        gateways = [f"http://127.0.0.1:{port}" for port in ports]
        direct = {"ollama": urls[0], "comfyui": urls[1]}
        yield Stack(world=world, ollama=gateways[0], comfyui=gateways[1], environment=environment, direct=direct)


async def stopped(daemon: Process) -> int:
    """Its exit status after SIGTERM. One that does not end is killed, so that the test fails and does not hang."""
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            return await daemon.stop()
    except TimeoutError:
        daemon.process.kill()
        raise


def http_client(url: str) -> httpx.AsyncClient:
    """A client that waits long and asks no proxy of the environment."""
    return httpx.AsyncClient(base_url=url, timeout=PATIENCE_SECONDS, trust_env=False)


async def until(condition: Callable[[], object]) -> None:
    """Returns when `condition` holds; TimeoutError where it never does."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
