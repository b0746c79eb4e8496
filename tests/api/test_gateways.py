"""What the gateways hold and let through, as those see it who look at the snapshot."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
import pytest_asyncio

from tests.api.conftest import Served
from tests.api.schema import complaints
from tests.api.test_routes import described
from vram_manager.domain.model_facts import StoredModel

pytestmark = pytest.mark.asyncio

MODEL = "llama3.1:8b"
Serve = Callable[..., Any]


@pytest_asyncio.fixture
async def silent() -> AsyncIterator[str]:
    """The URL of an Ollama that takes every request and answers none."""
    writers: list[asyncio.StreamWriter] = []

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        await reader.read()

    server = await asyncio.start_server(take, "127.0.0.1")
    async with server:
        host, port = server.sockets[0].getsockname()[:2]
        yield f"http://{host}:{port}"
        for writer in writers:
            writer.close()


@contextlib.asynccontextmanager
async def called(port: int) -> AsyncIterator[None]:
    """Somebody asks the gateway for a chat, and leaves at the end of the block."""
    url, body = f"http://127.0.0.1:{port}/api/generate", {"model": MODEL, "prompt": "Why?"}
    async with httpx.AsyncClient(timeout=60, trust_env=False) as client:
        call = asyncio.create_task(client.post(url, json=body))
        try:
            yield
        finally:
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)


def model_of(snapshot: dict[str, Any]) -> dict[str, Any]:
    return next(iter((snapshot["ollama"] or {}).get("models") or ()), {})


async def test_a_call_under_way_is_counted_at_its_model(serve: Serve, silent: str, free_port: int):
    async with serve(OLLAMA_URL=silent, GATEWAY_OLLAMA_PORT=str(free_port)) as served:
        served.ollama.hold(MODEL, 5)
        await served.got("/v1/snapshot", lambda body: model_of(body).get("requests") == 0)
        async with called(free_port):
            body = (await served.got("/v1/snapshot", lambda body: model_of(body)["requests"])).json()
            assert (model_of(body)["requests"], body["held"]) == (1, [])
        await served.got("/v1/snapshot", lambda body: model_of(body)["requests"] == 0)


async def test_a_call_that_is_held_is_shown_with_why_until_its_client_leaves(serve: Serve, silent: str, free_port: int):
    async with serve(OLLAMA_URL=silent, GATEWAY_OLLAMA_PORT=str(free_port)) as served:
        served.ollama.stored[MODEL] = StoredModel(digest="a" * 64, file_bytes=5 * 2**30)
        served.comfyui.hold(23)
        served.comfyui.remaining = 1
        await served.got("/v1/snapshot", lambda body: body["comfyui"]["queue_remaining"])
        async with called(free_port):
            body = (await served.got("/v1/snapshot", lambda body: body["held"])).json()
            (held,) = body["held"]
            assert (held["upstream"], held["what"]) == ("ollama", MODEL)
            assert MODEL in held["why"]
            assert held["waited_seconds"] >= 0
            assert complaints(body, described("/v1/snapshot", "get", 200)) == []
        await served.got("/v1/snapshot", lambda body: body["held"] == [])


async def test_without_a_gateway_nobody_knows_whether_a_model_is_busy(served: Served):
    served.ollama.hold(MODEL, 5)
    body = (await served.got("/v1/snapshot", model_of)).json()
    assert model_of(body)["requests"] is None
    assert body["held"] == []
