"""The same API on TCP: everybody may read, and only who has the token may change anything."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
import pytest_asyncio

from tests.api.conftest import Served, error_of

pytestmark = pytest.mark.asyncio

READS = ["/health", "/ready", "/health/vram", "/v1/snapshot", "/v1/events", "/v1/decisions", "/metrics", "/openapi.json"]


@pytest_asyncio.fixture
async def tcp(free_port: int) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{free_port}", trust_env=False, timeout=20) as client:
        yield client


Serve = Callable[..., Any]


async def test_without_a_port_nothing_listens_on_tcp(served: Served, tcp: httpx.AsyncClient):
    with pytest.raises(httpx.ConnectError):
        await tcp.get("/health")


@pytest.mark.parametrize("token", ["", "s3cret"], ids=["no token is set", "a token is set"])
async def test_everybody_may_read(serve: Serve, tcp: httpx.AsyncClient, free_port: int, token: str):
    async with serve(VRAM_HTTP_PORT=str(free_port), VRAM_API_TOKEN=token):
        assert {(await tcp.get(path)).status_code for path in READS} == {200}


@pytest.mark.parametrize("header", [None, "Bearer", "Bearer None", "Bearer s3cret"])
async def test_without_a_token_nobody_may_change_anything(
    serve: Serve, tcp: httpx.AsyncClient, free_port: int, header: str | None
):
    async with serve(VRAM_HTTP_PORT=str(free_port)) as served:
        reply = await tcp.post("/v1/free", json={}, headers={"Authorization": header} if header else {})
        assert reply.status_code == 403
        assert error_of(reply)["type"] == "read_only"
        assert "VRAM_API_TOKEN" in error_of(reply)["message"]
        assert served.comfyui.posts == []


@pytest.mark.parametrize(
    "header",
    [None, "", "s3cret", "Bearer", "Bearer wrong", "Bearer s3cret2", "Bearer s3cre", "Basic s3cret", "Bearer S3CRET"],
)
async def test_a_wrong_token_is_401_and_changes_nothing(
    serve: Serve, tcp: httpx.AsyncClient, free_port: int, header: str | None
):
    async with serve(VRAM_HTTP_PORT=str(free_port), VRAM_API_TOKEN="s3cret") as served:
        reply = await tcp.post("/v1/free", json={}, headers={} if header is None else {"Authorization": header})
        assert reply.status_code == 401
        assert error_of(reply)["type"] == "unauthorized"
        assert "s3cret" not in reply.text
        assert served.comfyui.posts == []


@pytest.mark.parametrize("token", ["s3cret", "with spaces", "ümläut€"])
async def test_the_right_token_is_202(serve: Serve, tcp: httpx.AsyncClient, free_port: int, token: str):
    async with serve(VRAM_HTTP_PORT=str(free_port), VRAM_API_TOKEN=token) as served:
        reply = await tcp.post("/v1/free", json={}, headers={"Authorization": f"Bearer {token}".encode()})
        assert reply.status_code == 202
        assert len(served.comfyui.posts) == 1


async def test_the_token_is_asked_before_the_body_is_looked_at(serve: Serve, tcp: httpx.AsyncClient, free_port: int):
    async with serve(VRAM_HTTP_PORT=str(free_port), VRAM_API_TOKEN="s3cret"):
        assert (await tcp.post("/v1/free", content=b"{")).status_code == 401


async def test_the_socket_needs_no_token(serve: Serve, free_port: int):
    async with serve(VRAM_HTTP_PORT=str(free_port), VRAM_API_TOKEN="s3cret") as served:
        assert (await served.http.post("/v1/free", json={})).status_code == 202


async def test_it_listens_on_loopback_unless_it_is_told_otherwise(serve: Serve, free_port: int):
    async with serve(VRAM_HTTP_PORT=str(free_port)) as served:
        assert served.settings.service.vram_http_host == "127.0.0.1"
        assert (await served.http.get("/health")).status_code == 200


async def test_it_listens_on_ipv6_when_it_is_told_so(serve: Serve, free_port: int):
    async with serve(VRAM_HTTP_PORT=str(free_port), VRAM_HTTP_HOST="::1"):
        async with httpx.AsyncClient(base_url=f"http://[::1]:{free_port}", trust_env=False) as client:
            assert (await client.get("/health")).status_code == 200
