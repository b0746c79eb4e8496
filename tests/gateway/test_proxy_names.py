"""An upstream that is known by name: looked up once for many connections, and anew when it is not there any more."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from tests.gateway.upstream import Line, Upstream, calling, gateway

pytestmark = pytest.mark.asyncio


class Names:
    """What `box` stands for, and how often that was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.address = "127.0.0.1"
        self.asked = 0
        loop = asyncio.get_running_loop()
        real = loop.getaddrinfo

        async def lookup(host: Any, *args: Any, **more: Any) -> Any:
            self.asked += host == "box"
            return await real(self.address if host == "box" else host, *args, **more)

        monkeypatch.setattr(loop, "getaddrinfo", lookup)


def says(words: bytes) -> Any:
    async def script(line: Line) -> None:
        await line.request()
        line.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(words), words))
        await line.left()

    return script


async def asked(port: int) -> bytes:
    async with calling(port) as client:
        client.send(b"GET / HTTP/1.1\r\nHost: box\r\n\r\n")
        return (await client.answer()).body


async def test_many_connections_share_one_lookup(monkeypatch: pytest.MonkeyPatch) -> None:
    names = Names(monkeypatch)
    async with Upstream(says(b"one")) as one, gateway(f"http://box:{one.port}") as proxy:
        assert [await asked(proxy.address[1]) for _ in range(3)] == [b"one"] * 3
    assert names.asked == 1


async def test_a_server_that_has_moved_is_looked_up_anew_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    names = Names(monkeypatch)
    async with Upstream(says(b"one")) as one, gateway(f"http://box:{one.port}") as proxy:
        assert await asked(proxy.address[1]) == b"one"
        await one.stop_listening()
        names.address = "127.0.0.2"
        moved = says(b"two")

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await moved(Line(reader, writer))
            writer.close()

        async with await asyncio.start_server(serve, "127.0.0.2", one.port, family=socket.AF_INET):
            assert await asked(proxy.address[1]) == b"two"
    assert names.asked == 2
