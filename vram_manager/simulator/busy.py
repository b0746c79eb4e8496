"""People at work on the simulated servers, so that there is something to look at: chats, images, workers, others.

What they do is drawn from a seed; when they do it depends on how fast they are served.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

import httpx

from vram_manager.client import AsyncVramClient
from vram_manager.errors import VramManagerError
from vram_manager.simulator.ledger import GIB, Ledger, OutOfMemory
from vram_manager.simulator.world import flux_txt2img, txt2img

CHATS = ("llama3.1:8b", "llama3.1:8b", "qwen3:14b", "gemma3:4b")
EMBEDDING = "nomic-embed-text:latest"
# A held call waits for a minute at most, an answer of the simulated Ollama takes some seconds more.
PATIENCE_SECONDS = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Doors:
    """Where everybody goes: the servers or the gateways in front of them, and the daemon's socket for workers."""

    ollama_url: str
    comfyui_url: str
    socket: str | None = None


async def busy(doors: Doors, ledgers: Sequence[Ledger], *, nodes: Sequence[str] = (), seed: int = 1) -> None:
    """Everybody works until cancelled. `nodes` are further Ollama servers with a visitor each."""
    async with httpx.AsyncClient(timeout=PATIENCE_SECONDS) as http, asyncio.TaskGroup() as tasks:
        for number in range(2):
            tasks.create_task(_chats(http, doors.ollama_url, random.Random(f"{seed} chat {number}")))
        for number, url in enumerate(nodes):
            tasks.create_task(_chats(http, url, random.Random(f"{seed} node {number}")))
        tasks.create_task(_paints(http, doors.comfyui_url, random.Random(f"{seed} artist")))
        tasks.create_task(_stranger(ledgers[0], random.Random(f"{seed} stranger")))
        for number, ledger in enumerate(ledgers[1:]):
            tasks.create_task(_trains(ledger, random.Random(f"{seed} training {number}")))
        if doors.socket is not None:
            tasks.create_task(_speaks(doors.socket, ledgers[0], random.Random(f"{seed} tts")))


async def _chats(http: httpx.AsyncClient, url: str, draw: random.Random) -> None:
    """Opens a chat with some model, asks a few things, thinks in between."""
    while True:
        await asyncio.sleep(draw.uniform(1, 15))
        model = draw.choice(CHATS)
        for _ in range(draw.randint(1, 4)):
            body = {
                "model": model,
                "messages": [{"role": "user", "content": "Tell me about lighthouses."}],
                "stream": False,
                "keep_alive": draw.choice(("20s", "2m", "5m")),
                "options": {"num_predict": draw.randint(40, 240), "num_ctx": 8192},
            }
            with contextlib.suppress(httpx.HTTPError):
                await http.post(f"{url}/api/chat", json=body)
            await asyncio.sleep(draw.uniform(2, 12))
        if draw.random() < 0.3:
            with contextlib.suppress(httpx.HTTPError):
                await http.post(f"{url}/api/embed", json={"model": EMBEDDING, "input": "a lighthouse"})


async def _paints(http: httpx.AsyncClient, url: str, draw: random.Random) -> None:
    """Renders a few images, then looks at them."""
    while True:
        await asyncio.sleep(draw.uniform(5, 40))
        workflow = flux_txt2img if draw.random() < 0.3 else txt2img
        for _ in range(draw.randint(1, 3)):
            prompt = workflow(steps=draw.randint(8, 20), seed=draw.randrange(2**32))
            with contextlib.suppress(httpx.HTTPError):
                await http.post(f"{url}/prompt", json={"prompt": prompt})


async def _stranger(ledger: Ledger, draw: random.Random) -> None:
    """A desktop that stays, and a program on it that comes and goes."""
    with contextlib.suppress(OutOfMemory):
        ledger.resize("desktop", int(0.4 * GIB))
    while True:
        await asyncio.sleep(draw.uniform(20, 90))
        with contextlib.suppress(OutOfMemory):
            ledger.resize("blender", int(draw.choice((0, 0.8, 1.6)) * GIB))


async def _trains(ledger: Ledger, draw: random.Random) -> None:
    """A job that grows to what it needs, works for a while and ends."""
    while True:
        whole = draw.uniform(0.2, 0.9) * ledger.usable_bytes
        for share in (0.3, 0.6, 0.9, 1.0):
            ledger.resize("training", int(whole * share))
            await asyncio.sleep(draw.uniform(1, 4))
        for _ in range(draw.randint(3, 30)):
            ledger.resize("training", int(whole * draw.uniform(0.93, 1.0)))
            with ledger.computing():
                await asyncio.sleep(draw.uniform(1, 4))
        ledger.release("training")
        await asyncio.sleep(draw.uniform(5, 40))


async def _speaks(path: str, ledger: Ledger, draw: random.Random) -> None:
    """A worker that asks before it loads, and waits in line if it must."""
    async with AsyncVramClient(path, owner="tts") as client:
        while True:
            await asyncio.sleep(draw.uniform(5, 30))
            need = draw.choice((1.5, 2.5, 4.0))
            with contextlib.suppress(VramManagerError, OutOfMemory):
                async with client.lease(f"{need}GiB", gpu=0, margin_mb=256, wait_seconds=60) as lease:
                    try:
                        ledger.resize("tts", int((need - 0.3) * GIB))
                        await lease.claimed(int((need - 0.3) * GIB))
                        with ledger.computing():
                            await asyncio.sleep(draw.uniform(4, 20))
                    finally:
                        ledger.release("tts")
