"""Websockets: after the upgrade a tunnel in both directions, until either end closes."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
import websockets
from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, serve

from tests.gateway.test_proxy import end_to_end
from tests.gateway.upstream import Line, Message, Upstream, between, calling, gateway, soon, until

pytestmark = pytest.mark.asyncio

UPGRADE = (
    b"GET /ws?clientId=1 HTTP/1.1\r\nHost: box\r\nupgrade: WebSocket\r\nconnection: keep-alive, Upgrade\r\n"
    b"Sec-WebSocket-Key: x3JJHMbDL1EzLkh9GBhXDw==\r\nSec-WebSocket-Version: 13\r\nOrigin: http://box\r\n\r\n"
)
SWITCH = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: x\r\n\r\n"
)


async def test_frames_of_megabytes_and_close_codes_pass_both_ways() -> None:
    closed = asyncio.Event()

    async def echo(socket: ServerConnection) -> None:
        with contextlib.suppress(websockets.ConnectionClosedError):
            async for message in socket:
                await socket.send(message)
        assert socket.close_code == 4001
        assert socket.close_reason == "enough"
        closed.set()

    async with serve(echo, "127.0.0.1", 0, max_size=None) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        async with gateway(f"http://127.0.0.1:{port}") as proxy:
            async with connect(f"ws://127.0.0.1:{proxy.address[1]}/ws?a=b", max_size=None) as socket:
                for message in ("text", b"\x00" * 5_000_000, bytes(range(256)) * 20_000, b""):
                    await socket.send(message)
                    assert await soon(socket.recv()) == message
                assert proxy.open_exchanges == 1
                await socket.close(4001, "enough")
            await soon(closed.wait())
            await until(lambda: proxy.open_exchanges == 0)


async def test_a_server_that_closes_tells_the_client_its_code() -> None:
    async def once(socket: ServerConnection) -> None:
        await socket.send("bye")
        await socket.close(1012, "restart")

    async with serve(once, "127.0.0.1", 0) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        async with (
            gateway(f"http://127.0.0.1:{port}") as proxy,
            connect(f"ws://127.0.0.1:{proxy.address[1]}/") as socket,
        ):
            assert await soon(socket.recv()) == "bye"
            with pytest.raises(websockets.ConnectionClosedError) as closed:
                await soon(socket.recv())
            assert closed.value.rcvd is not None
            assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (1012, "restart")


async def test_a_refused_websocket_is_an_ordinary_answer_and_the_connection_goes_on() -> None:
    seen: list[Message] = []

    async def script(line: Line) -> None:
        for code in (b"403 Forbidden", b"200 OK"):
            seen.append(await line.request())
            line.send(b"HTTP/1.1 %b\r\nContent-Length: 2\r\n\r\nno" % code)
        await line.left()

    async with between(script) as (client, _):
        client.send(UPGRADE + b"GET /next HTTP/1.1\r\nHost: box\r\n\r\n")
        assert (await client.answer()).first == b"HTTP/1.1 403 Forbidden"
        assert (await client.answer()).first == b"HTTP/1.1 200 OK"

    assert seen[0].all(b"upgrade") == [b"websocket"]
    assert seen[0].all(b"connection") == [b"Upgrade"]
    assert end_to_end(seen[0]).headers[-1] == (b"Origin", b"http://box")
    assert seen[1].first == b"GET /next HTTP/1.1"


async def test_what_comes_with_the_upgrade_is_the_tunnels_first() -> None:
    async def script(line: Line) -> None:
        await line.request()
        line.send(SWITCH + b"server first")
        assert await line.exactly(12) == b"client first"
        line.send(b"heard")
        await line.left()

    async with between(script) as (client, _):
        client.send(UPGRADE + b"client ")
        client.send(b"first")
        head = await client.head()
        assert end_to_end(head).headers == ((b"Sec-WebSocket-Accept", b"x"),)
        assert head.all(b"upgrade") == [b"websocket"]
        assert head.all(b"connection") == [b"Upgrade"]
        assert await client.exactly(17) == b"server firstheard"


async def test_a_tunnel_may_be_closed_by_halves_from_either_end() -> None:
    async def script(line: Line) -> None:
        request = await line.request()
        line.send(SWITCH)
        if b"server" in request.first:
            line.writer.write_eof()
            got.append(await line.rest())
        else:
            got.append(await line.rest())
            line.send(b"last words of the server")

    got: list[bytes] = []
    async with Upstream(script) as upstream, gateway(upstream.url) as proxy:
        async with calling(proxy.address[1]) as client:
            client.send(UPGRADE)
            await client.head()
            client.send(b"last words of the client")
            client.writer.write_eof()
            assert await client.rest() == b"last words of the server"
        async with calling(proxy.address[1]) as client:
            client.send(UPGRADE.replace(b"/ws", b"/server"))
            await client.head()
            assert await client.rest() == b""
            client.send(b"last words of the client")
            client.writer.write_eof()
            await until(lambda: len(got) == 2)
        await until(lambda: proxy.open_exchanges == 0)

    assert got == [b"last words of the client"] * 2


@pytest.mark.parametrize("reset", [True, False])
async def test_a_client_that_leaves_a_tunnel_ends_it(reset: bool) -> None:
    left = asyncio.Event()

    async def script(line: Line) -> None:
        await line.request()
        line.send(SWITCH)
        await line.left()
        left.set()

    async with Upstream(script) as upstream, gateway(upstream.url) as proxy:
        async with calling(proxy.address[1]) as client:
            client.send(UPGRADE)
            await client.head()
            if reset:
                client.break_off()
        await soon(left.wait())
        await until(lambda: proxy.open_exchanges == 0)


async def test_a_tunnel_that_the_server_resets_is_reset() -> None:
    heard = asyncio.Event()

    async def script(line: Line) -> None:
        await line.request()
        line.send(SWITCH)
        await soon(heard.wait())
        line.break_off()

    async with between(script) as (client, _):
        client.send(UPGRADE)
        await client.head()
        heard.set()
        with pytest.raises(ConnectionResetError):
            await client.rest()


async def test_a_tunnel_holds_no_more_than_a_slow_reader_may_leave() -> None:
    size_bytes = 64 << 20

    async def script(line: Line) -> None:
        await line.request()
        line.send(SWITCH)
        line.send(bytes(size_bytes))
        await line.left()

    async with Upstream(script) as upstream, gateway(upstream.url) as proxy, calling(proxy.address[1]) as client:
        client.send(UPGRADE)
        await client.head()
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        side = next(side for side in proxy._common.connections if hasattr(side, "_queue"))
        await until(lambda: side._full)
        assert side._transport.get_write_buffer_size() < 1 << 20
        client.writer.transport.resume_reading()  # type: ignore[attr-defined]
        assert len(await client.exactly(size_bytes)) == size_bytes


async def test_closing_cuts_off_a_tunnel() -> None:
    async def script(line: Line) -> None:
        await line.request()
        line.send(SWITCH)
        await line.left()

    async with Upstream(script) as upstream:
        async with gateway(upstream.url) as proxy:
            client = Line(*await asyncio.open_connection(*proxy.address))
            client.send(UPGRADE)
            await client.head()
            assert proxy.open_exchanges == 1
        # The gateway was closed, without grace.
        await client.left()
        client.close()
