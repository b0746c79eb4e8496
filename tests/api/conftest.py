"""A daemon over fakes, on a real Unix socket in the test's own directory."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from tests.fakes import Card, FakeComfyUI, FakeGpus, FakeOllama, Flight
from vram_manager import config
from vram_manager.clock import Clock
from vram_manager.daemon import Daemon, build
from vram_manager.domain.event import Event, EventType
from vram_manager.store import Store

BACK = Event(type=EventType.SENSOR_BACK, target="ollama", reason="version 0.33.1")


class Served:
    """One daemon that listens, and a client of it. `ahead` puts the daemon's monotonic clock forward."""

    def __init__(self, state: Path) -> None:
        self.card = Card()
        self.gpus = FakeGpus(self.card)
        self.ollama = FakeOllama(self.card)
        self.comfyui = FakeComfyUI(self.card)
        for fake in (self.gpus, self.ollama, self.comfyui):
            fake.takes_seconds = 0.0
        self.comfyui.post_takes_seconds = 0.0
        self.comfyui.acts_after_seconds = 0.0
        self.comfyui.hold(8)
        self.ahead = 0.0
        loop = asyncio.get_running_loop()
        self.clock = Clock(lambda: loop.time() + self.ahead, lambda: datetime.now(UTC))
        self.settings = config.load()
        self.path = self.settings.service.vram_socket
        self.store = Store.open(state)
        self.daemon: Daemon = build(
            self.settings, self.clock, self.store, gpus=self.gpus, ollama=self.ollama, comfyui=self.comfyui
        )
        transport = httpx.AsyncHTTPTransport(uds=str(self.path))
        self.http = httpx.AsyncClient(transport=transport, base_url="http://vram", timeout=20)

    async def turned(self) -> None:
        """A first look has been had."""
        turned, before = asyncio.Event(), self.daemon.cycle.on_turn
        self.daemon.cycle.on_turn = lambda seconds: (before(seconds), turned.set())
        while self.daemon.cycle.snapshot is None:
            turned.clear()
            await turned.wait()
        self.daemon.cycle.on_turn = before

    async def got(self, path: str, true: Callable[[Any], object]) -> httpx.Response:
        """The first reply of `path` whose JSON is as wished."""
        deadline = asyncio.get_running_loop().time() + 20
        while not true((reply := await self.http.get(path)).json()):
            assert asyncio.get_running_loop().time() < deadline, reply.text
        return reply

    def record(self, times: int = 1) -> list[str]:
        return [self.daemon.journal.record(BACK).id for _ in range(times)]

    async def raw(self, sent: bytes) -> bytes:
        """Everything that comes back for these bytes, until the daemon hangs up."""
        reader, writer = await self.connect(sent)
        try:
            return await asyncio.wait_for(reader.read(), 20)
        finally:
            writer.close()
            await writer.wait_closed()

    async def connect(self, sent: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_unix_connection(str(self.path))
        writer.write(sent)
        await writer.drain()
        return reader, writer


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets our variables, and only those given: quick rules, the socket and the state in `tmp_path`."""

    def put(**more: str) -> None:
        quick = {
            "VRAM_SOCKET": str(tmp_path / "run" / "vram.sock"),
            "VRAM_STATE_DIR": str(tmp_path / "state"),
            "VRAM_CHECK_INTERVAL": "0.25",
            "VRAM_FREE_COOLDOWN": "0",
            "COMFYUI_IDLE_SECONDS": "0",
            "VRAM_GRACE_SECONDS": "3600",
        }
        for name, value in (quick | more).items():
            monkeypatch.setenv(name, value)

    return put


@pytest.fixture
def serve(environment: Callable[..., None], tmp_path: Path) -> Callable[..., Any]:
    @contextlib.asynccontextmanager
    async def served(*, working: bool = True, **more: str) -> AsyncIterator[Served]:
        """A daemon that answers inside the block; its cycle turns only while `working`."""
        environment(**more)
        daemon = Served(tmp_path / "state")
        flight = Flight()
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(flight.end)
            stack.callback(daemon.daemon.close)
            stack.push_async_callback(daemon.http.aclose)
            await stack.enter_async_context(daemon.daemon.listening())
            if working:
                work = asyncio.create_task(daemon.daemon.run())
                stack.push_async_callback(asyncio.gather, work, return_exceptions=True)
                stack.callback(work.cancel)
                await daemon.turned()
            yield daemon
            flight.begin()

    return served


@pytest_asyncio.fixture
async def served(serve: Callable[..., Any]) -> AsyncIterator[Served]:
    """A daemon at work."""
    async with serve() as daemon:
        yield daemon


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def error_of(reply: httpx.Response) -> dict[str, Any]:
    """The error of a reply, once it is clear that it has the one shape that errors have."""
    body = json.loads(reply.content)
    assert body.keys() == {"error"}
    assert {"type", "message"} <= body["error"].keys() <= {"type", "message", "field"}
    return dict(body["error"])
