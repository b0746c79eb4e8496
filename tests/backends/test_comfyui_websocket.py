"""ComfyUI's websocket against a real server on loopback."""

from __future__ import annotations

import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from http import HTTPStatus
from typing import Never

import pytest
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import InvalidMessage
from websockets.http11 import Request, Response

from vram_manager.backends.comfyui import HttpComfyUI
from vram_manager.backends.http import HttpStatus, JsonClient
from vram_manager.errors import Rejected, SensorError, TimedOut

from .samples import names, websocket_lines

Handler = Callable[[ServerConnection], Awaitable[None]]


def status(remaining: int) -> str:
    return json.dumps({"type": "status", "data": {"status": {"exec_info": {"queue_remaining": remaining}}}})


def sends(*messages: str | bytes) -> Handler:
    async def handler(connection: ServerConnection) -> None:
        for message in messages:
            await connection.send(message)

    return handler


def address(server: Server) -> str:
    return f"http://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}"


@asynccontextmanager
async def comfyui_at(
    handler: Handler, *, path: str = "", headers: dict[str, str] | None = None
) -> AsyncIterator[HttpComfyUI]:
    """A ComfyUI whose websocket is `handler`, and our side of it."""
    async with serve(handler, "127.0.0.1", 0) as server:
        backend = HttpComfyUI(JsonClient(address(server) + path, name="ComfyUI", headers=headers))
        yield backend
        await backend.aclose()


async def until_the_end(backend: HttpComfyUI) -> tuple[list[int], SensorError]:
    """All numbers that came, and the error with which it ended."""
    numbers: list[int] = []

    async def collect() -> None:
        async for remaining in backend.statuses():
            numbers.append(remaining)  # noqa: PERF401 - what came before the error must be kept

    with pytest.raises(SensorError) as caught:
        await collect()
    return numbers, caught.value


@pytest.mark.asyncio
@pytest.mark.parametrize("name", names("comfyui", "ws.events*observer*.jsonl"))
async def test_each_recorded_status_comes_through_in_order(name: str) -> None:
    lines = websocket_lines(name)
    expected = [
        message["data"]["status"]["exec_info"]["queue_remaining"]
        for message in map(json.loads, lines)
        if message["type"] == "status"
    ]
    async with comfyui_at(sends(*lines)) as backend:
        numbers, _ = await until_the_end(backend)
    assert numbers == expected


@pytest.mark.asyncio
async def test_garbage_and_pictures_are_ignored() -> None:
    picture = b"\x00\x00\x00\x01" + bytes(2 * 1024 * 1024)
    async with comfyui_at(sends(status(1), "{", picture, "[]", status(-1), status(0))) as backend:
        numbers, _ = await until_the_end(backend)
    assert numbers == [1, 0]


@pytest.mark.asyncio
async def test_a_status_arrives_while_the_connection_stays_open() -> None:
    async def handler(connection: ServerConnection) -> None:
        await connection.send(status(2))
        await connection.wait_closed()

    async with comfyui_at(handler) as backend, aclosing(backend.statuses()) as numbers:
        assert await anext(numbers) == 2


@pytest.mark.asyncio
async def test_a_server_that_says_goodbye_is_a_sensor_error() -> None:
    async with comfyui_at(sends(status(0))) as backend:
        _, error = await until_the_end(backend)
    assert type(error) is SensorError
    assert error.why == "GET /ws: connection closed by the server"


@pytest.mark.asyncio
async def test_a_connection_that_drops_without_goodbye_is_a_sensor_error() -> None:
    async def handler(connection: ServerConnection) -> None:
        await connection.send(status(1))
        await connection.ping()
        connection.transport.abort()

    async with comfyui_at(handler) as backend:
        _, error = await until_the_end(backend)
    assert type(error) is SensorError
    assert error.why.startswith("GET /ws: connection lost (")


@pytest.mark.asyncio
async def test_a_message_without_bounds_ends_the_connection() -> None:
    async with comfyui_at(sends(status(1), bytes(17 * 1024 * 1024))) as backend:
        numbers, error = await until_the_end(backend)
    assert numbers == [1]
    assert "1009" in error.why


@pytest.mark.asyncio
async def test_nobody_there_is_connection_refused() -> None:
    async with serve(sends(), "127.0.0.1", 0) as server:
        base = address(server)
    _, error = await until_the_end(HttpComfyUI(JsonClient(base, name="ComfyUI")))
    assert type(error) is SensorError
    assert error.why == "GET /ws: connection refused"
    assert "check that ComfyUI runs" in str(error.remedy)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("failure", "kind", "why"),
    [
        (TimeoutError("opening handshake"), TimedOut, "GET /ws: no answer within 10 s"),
        (ConnectionResetError(104, "reset"), SensorError, "GET /ws: connection reset"),
        (ssl.SSLCertVerificationError(1, "self-signed"), SensorError, "GET /ws: certificate not trusted"),
        (InvalidMessage("no HTTP"), Rejected, "GET /ws: no websocket (no HTTP)"),
    ],
)
async def test_a_connection_that_cannot_be_made_says_why(failure: Exception, kind: type[SensorError], why: str) -> None:
    async def connect(*_: object, **__: object) -> Never:
        raise failure

    _, error = await until_the_end(HttpComfyUI(JsonClient("http://c.test", name="ComfyUI"), connect=connect))
    assert type(error) is kind
    assert error.why == why


@pytest.mark.asyncio
async def test_a_handshake_that_is_refused_says_the_status() -> None:
    def forbid(connection: ServerConnection, request: Request) -> Response:
        return connection.respond(HTTPStatus.FORBIDDEN, "")

    async with serve(sends(), "127.0.0.1", 0, process_request=forbid) as server:
        _, error = await until_the_end(HttpComfyUI(JsonClient(address(server), name="ComfyUI")))
    assert isinstance(error, HttpStatus)
    assert error.why == "GET /ws: HTTP 403"


@pytest.mark.asyncio
@pytest.mark.parametrize("scheme", ["http", "ws"])
async def test_a_redirect_to_another_server_is_not_followed(scheme: str) -> None:
    reached: list[str] = []

    async def elsewhere(connection: ServerConnection) -> None:
        reached.append("elsewhere")

    async with serve(elsewhere, "127.0.0.1", 0) as other:

        def redirect(connection: ServerConnection, request: Request) -> Response:
            location = address(other).replace("http", scheme, 1) + "/ws"
            return Response(302, "Found", Headers(Location=location))

        async with serve(sends(), "127.0.0.1", 0, process_request=redirect) as server:
            _, error = await until_the_end(HttpComfyUI(JsonClient(address(server), name="ComfyUI")))
    assert isinstance(error, Rejected)
    assert reached == []


@pytest.mark.asyncio
async def test_the_handshake_has_the_prefix_the_extra_headers_and_no_origin() -> None:
    seen: list[Request] = []

    async def handler(connection: ServerConnection) -> None:
        assert connection.request is not None
        seen.append(connection.request)

    headers = {"Authorization": "Bearer t", "Origin": "http://evil.example"}
    async with comfyui_at(handler, path="/comfy/", headers=headers) as backend:
        await until_the_end(backend)
    (request,) = seen
    assert request.path.startswith("/comfy/ws?clientId=")
    assert request.headers["Authorization"] == "Bearer t"
    assert "Origin" not in request.headers


@pytest.mark.asyncio
async def test_each_connection_has_a_client_id_of_its_own() -> None:
    paths: list[str] = []

    async def handler(connection: ServerConnection) -> None:
        assert connection.request is not None
        paths.append(connection.request.path)

    async with comfyui_at(handler) as backend:
        await until_the_end(backend)
        await until_the_end(backend)
    first, second = (path.removeprefix("/ws?clientId=") for path in paths)
    assert first != second
    assert len(first) == len(second) == 32


@pytest.mark.asyncio
async def test_proxy_variables_are_not_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    async with comfyui_at(sends(status(5))) as backend:
        numbers, _ = await until_the_end(backend)
    assert numbers == [5]
