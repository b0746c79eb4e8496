"""A world for each test, its servers without sockets, and what recorded replies look like."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from vram_manager.simulator.world import World

DATA = Path(__file__).parent / "data"


class Tenants:
    """One world and a client of each of its servers."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.ledger = world.ledger
        self.ollama = httpx.AsyncClient(transport=httpx.ASGITransport(world.ollama.app), base_url="http://ollama")
        self.comfyui = httpx.AsyncClient(transport=httpx.ASGITransport(world.comfyui.app), base_url="http://comfyui")

    async def generate(self, model: str = "llama3.1:8b", **more: Any) -> dict[str, Any]:
        body = {"model": model, "prompt": "why?", "stream": False, **more}
        return (await self.ollama.post("/api/generate", json=body)).json()

    async def preload(self, model: str = "llama3.1:8b", **more: Any) -> dict[str, Any]:
        return (await self.ollama.post("/api/generate", json={"model": model, **more})).json()

    async def listed(self) -> dict[str, dict[str, Any]]:
        return {model["name"]: model for model in (await self.ollama.get("/api/ps")).json()["models"]}

    async def render(self, prompt: dict[str, Any], **more: Any) -> str:
        """Posts a prompt and returns its id once its history is there."""
        prompt_id = await self.post(prompt, **more)
        await self.ended(prompt_id)
        return prompt_id

    async def ended(self, prompt_id: str) -> dict[str, Any]:
        """The history entry, once it is there."""
        while not (entry := await self.history(prompt_id)):  # noqa: ASYNC110 - HTTP has no event to wait for
            await asyncio.sleep(0.05)
        return entry

    async def post(self, prompt: dict[str, Any], **more: Any) -> str:
        reply = await self.comfyui.post("/prompt", json={"prompt": prompt, **more})
        assert reply.status_code == 200, reply.text
        return reply.json()["prompt_id"]

    async def history(self, prompt_id: str) -> dict[str, Any]:
        return (await self.comfyui.get(f"/history/{prompt_id}")).json().get(prompt_id, {})

    async def free(self, **body: Any) -> None:
        assert (await self.comfyui.post("/free", json=body)).status_code == 200

    async def close(self) -> None:
        await self.ollama.aclose()
        await self.comfyui.aclose()
        await self.world.close()


@pytest_asyncio.fixture
async def settle() -> AsyncIterator[Callable[..., Tenants]]:
    """Makes worlds and closes them: `settle(gpu_gib=12, mode="dynamic")`."""
    made: list[Tenants] = []

    def make(**how: Any) -> Tenants:
        made.append(Tenants(World(**how)))
        return made[-1]

    yield make
    for tenants in made:
        await tenants.close()


@pytest.fixture
def recorded() -> Callable[[str], Any]:
    return lambda name: json.loads((DATA / name).read_text())


@pytest.fixture
def shape() -> Callable[[Any], Any]:
    return shape_of


def shape_of(value: Any) -> Any:
    """The same keys and the same kinds of values, of a list its first element."""
    match value:
        case dict():
            return {key: shape_of(inner) for key, inner in value.items()}
        case list():
            return [shape_of(inner) for inner in value[:1]]
        case bool():
            return "bool"
        case int() | float():
            return "number"
        case _:
            return type(value).__name__
