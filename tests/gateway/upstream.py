"""A server that does what a script says, byte by byte, and a client that sees each byte that comes back."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from vram_manager.gateway.proxy import Gate, PlainGate, Proxy

PATIENCE_SECONDS = 20.0
T = TypeVar("T")


async def until(condition: Callable[[], object]) -> None:
    """Returns when `condition` holds; TimeoutError where it never does."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def soon(what: Awaitable[T]) -> T:
    """`what`, or TimeoutError: a test that waits in vain fails instead of standing still."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        return await what


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """A request or an answer as it was read: the first line, the headers as sent, the body without framing."""

    first: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes = b""

    def all(self, name: bytes) -> list[bytes]:
        return [value for key, value in self.headers if key.lower() == name]


def _parted(line: bytes) -> tuple[bytes, bytes]:
    name, _, value = line.partition(b":")
    return name, value.removeprefix(b" ")


@dataclass(slots=True)
class Line:
    """One end of a connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def head(self) -> Message:
        async with asyncio.timeout(PATIENCE_SECONDS):
            raw = await self.reader.readuntil(b"\r\n\r\n")
        first, *rest = raw[:-4].split(b"\r\n")
        return Message(first=first, headers=tuple(_parted(line) for line in rest))

    async def exactly(self, size_bytes: int) -> bytes:
        async with asyncio.timeout(PATIENCE_SECONDS):
            return await self.reader.readexactly(size_bytes)

    async def line(self) -> bytes:
        async with asyncio.timeout(PATIENCE_SECONDS):
            return await self.reader.readline()

    async def chunk(self) -> bytes:
        """The next chunk; b"" is the last one. IncompleteReadError where the stream ends instead."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            size_bytes = int((await self.reader.readuntil(b"\r\n"))[:-2].split(b";")[0], 16)
            if size_bytes:
                return (await self.reader.readexactly(size_bytes + 2))[:-2]
            while await self.reader.readuntil(b"\r\n") != b"\r\n":
                pass
            return b""

    async def rest(self) -> bytes:
        """All that comes until the other end closes; ConnectionError where it breaks off."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            return await self.reader.read()

    async def body(self, head: Message, *, answer_to: str | None = None) -> bytes:
        """What belongs to `head`, without framing; `answer_to` is the method where it is an answer."""
        status = int(head.first.split(b" ")[1]) if answer_to else 0
        if answer_to == "HEAD" or status in {204, 304} or 0 < status < 200:
            return b""
        if head.all(b"transfer-encoding"):
            pieces = []
            while piece := await self.chunk():
                pieces.append(piece)
            return b"".join(pieces)
        if lengths := head.all(b"content-length"):
            return await self.exactly(int(lengths[0]))
        return await self.rest() if answer_to else b""

    async def request(self) -> Message:
        head = await self.head()
        return Message(first=head.first, headers=head.headers, body=await self.body(head))

    async def answer(self, method: str = "GET") -> Message:
        """The next answer; a 1xx is one too."""
        head = await self.head()
        return Message(first=head.first, headers=head.headers, body=await self.body(head, answer_to=method))

    async def left(self) -> None:
        """Returns when the other end is gone, in order or not."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            with contextlib.suppress(ConnectionError):
                while await self.reader.read(1 << 16):
                    pass

    def break_off(self) -> None:
        """A reset instead of an end."""
        connection = self.writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    def close(self) -> None:
        self.writer.close()


Script = Callable[[Line], Awaitable[None]]


class Upstream:
    """Runs `script` for each connection and closes it then. What a script raised is raised at the end."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self._tasks: list[asyncio.Task[None]] = []
        self.lines: list[Line] = []

    async def __aenter__(self) -> Upstream:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 20)
        self.port: int = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = Line(reader, writer)
        self.lines.append(line)
        task = asyncio.current_task()
        assert task is not None
        self._tasks.append(task)
        try:
            await self._script(line)
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def stop_listening(self) -> None:
        self._server.close()

    async def __aexit__(self, *args: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        for ended in await asyncio.gather(*self._tasks, return_exceptions=True):
            # A connection that ends before a request, or in the middle of one, is what many tests are about.
            if isinstance(ended, Exception) and not isinstance(ended, (EOFError, ConnectionError)):
                raise ended


@contextlib.asynccontextmanager
async def gateway(
    url: str, gate: Gate | None = None, *, host: str = "127.0.0.1", rewrite_host: bool = True
) -> AsyncIterator[Proxy]:
    """A proxy in front of `url`; at the end nothing of it may be left."""
    proxy = Proxy(url, gate or PlainGate(), rewrite_host=rewrite_host)
    await proxy.listen(host, 0)
    try:
        yield proxy
    finally:
        await proxy.close(0.0)
    assert proxy.open_exchanges == 0


@contextlib.asynccontextmanager
async def calling(port: int) -> AsyncIterator[Line]:
    """A client's connection to `port` of this machine."""
    line = Line(*await asyncio.open_connection("127.0.0.1", port, limit=1 << 20))
    try:
        yield line
    finally:
        line.close()
        with contextlib.suppress(ConnectionError):
            await line.writer.wait_closed()


@contextlib.asynccontextmanager
async def between(
    script: Script, gate: Gate | None = None, *, host: str = "127.0.0.1", rewrite_host: bool = True
) -> AsyncIterator[tuple[Line, Upstream]]:
    """A client that is connected to a gateway in front of a server that does what `script` says."""
    async with (
        Upstream(script) as upstream,
        gateway(upstream.url, gate, host=host, rewrite_host=rewrite_host) as proxy,
        calling(proxy.address[1]) as client,
    ):
        yield client, upstream
