"""The real daemon over a simulated world, without sockets, so that hours pass in virtual time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from loguru import logger

from tests.fakes import WallClock
from tests.scenarios.through import Through
from vram_manager import config
from vram_manager.backends.comfyui import HttpComfyUI
from vram_manager.backends.http import JsonClient
from vram_manager.backends.ollama import HttpOllama
from vram_manager.clock import Clock
from vram_manager.daemon import Daemon, build
from vram_manager.domain.event import Event, EventType
from vram_manager.gateway.proxy import Gate
from vram_manager.simulator.world import World, txt2img
from vram_manager.store import Store

# In virtual time Ollama's timers and the times it tells of them must agree.
WALL = WallClock()


def a_world(gpu_gib: float = 24, **more: Any) -> World:
    """A world whose wall clock goes with the loop's time."""
    return World(gpu_gib, utcnow=WALL, **more)


def settings(**policy: Any) -> config.Settings:
    """The defaults, with some of the policy's, ComfyUI's and the gateways' settings changed."""
    comfyui = {name: policy.pop(name) for name in list(policy) if name.startswith("comfyui_")}
    own = config.GatewaySettings.model_fields
    gateway = {name: policy.pop(name) for name in list(policy) if name in own}
    return config.defaults(comfyui=comfyui, policy=policy, gateway=gateway)


@dataclass
class Stack:
    """A running daemon and its world; `events` is everything it told, with the virtual time of each."""

    world: World
    daemon: Daemon
    ollama: httpx.AsyncClient
    comfyui: httpx.AsyncClient
    events: list[tuple[float, Event]] = field(default_factory=list)

    def told(self, *types: EventType) -> list[Event]:
        return [event for _, event in self.events if event.type in types]

    async def until(self, kind: EventType, seconds: float = 120.0) -> Event:
        """The next event of that kind that is told, or has been told already."""
        async with asyncio.timeout(seconds):
            while not (found := self.told(kind)):
                await asyncio.sleep(0.1)
        return found[-1]

    async def render(self, **workflow: Any) -> None:
        (await self.comfyui.post("/prompt", json={"prompt": txt2img(**workflow)})).raise_for_status()

    async def rendered(self, **workflow: Any) -> None:
        await self.render(**workflow)
        while (await self.comfyui.get("/prompt")).json()["exec_info"]["queue_remaining"]:
            await asyncio.sleep(0.1)

    async def chat(self, model: str = "llama3.1:8b", **extra: Any) -> httpx.Response:
        body = {"model": model, "prompt": "hello", "stream": False, **extra}
        return await self.ollama.post("/api/generate", json=body)

    async def unload(self, model: str = "llama3.1:8b") -> None:
        await self.ollama.post("/api/generate", json={"model": model, "keep_alive": 0})
        while model in {entry["name"] for entry in (await self.ollama.get("/api/ps")).json()["models"]}:
            await asyncio.sleep(0.1)

    @property
    def posts(self) -> int:
        return self.world.comfyui.counters.frees_posted


@contextlib.asynccontextmanager
async def running(world: World, directory: Path, **changed: Any) -> AsyncIterator[Stack]:
    """A daemon at work over a world from above. ComfyUI's websocket is out of reach here: its queue is polled."""

    async def no_websocket(*args: Any, **kwargs: Any) -> Any:
        raise OSError("no websocket without sockets")

    def client(app: Any) -> httpx.ASGITransport:
        return httpx.ASGITransport(app=app)

    def through(gate: Gate | None, upstream: httpx.ASGITransport) -> httpx.AsyncBaseTransport:
        return upstream if gate is None else Through(gate, upstream)

    logger.remove()
    clock = Clock(asyncio.get_running_loop().time, WALL)
    ollama = HttpOllama(JsonClient("http://ollama", name="ollama", transport=client(world.ollama.app)))
    comfyui = HttpComfyUI(
        JsonClient("http://comfyui", name="comfyui", transport=client(world.comfyui.app)), connect=no_websocket
    )
    store = Store.open(directory)
    daemon = build(settings(**changed), clock, store, gpus=world.gpus, ollama=ollama, comfyui=comfyui)
    async with (
        world,
        httpx.AsyncClient(
            transport=through(daemon.gateways.ollama, client(world.ollama.app)), base_url="http://ollama", timeout=6000
        ) as chat,
        httpx.AsyncClient(
            transport=through(daemon.gateways.comfyui, client(world.comfyui.app)),
            base_url="http://comfyui",
            timeout=6000,
        ) as render,
    ):
        stack = Stack(world, daemon, chat, render)
        daemon.journal.listen(lambda entry: stack.events.append((clock.monotonic(), entry.event)))
        async with asyncio.TaskGroup() as tasks:
            work = [
                tasks.create_task(daemon.observer.run()),
                tasks.create_task(daemon.cycle.run()),
                tasks.create_task(daemon.admissions.run()),
                tasks.create_task(daemon.runs.run()),
            ]
            try:
                yield stack
            finally:
                for task in work:
                    task.cancel()
        await ollama.aclose()
        await comfyui.aclose()
        daemon.close()
