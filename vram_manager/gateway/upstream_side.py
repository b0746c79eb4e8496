"""The connection to the server behind the gateway: answers on their way back."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import httptools

from vram_manager.gateway.exchange import Common, Exchange, keep_watch
from vram_manager.gateway.head import HEAD_BYTES, LAST_CHUNK, answer_bytes, lines, sift

if TYPE_CHECKING:
    from vram_manager.gateway.client_side import ClientSide

# What waits for a connection that is not there yet; more than that, and the client is not read from.
BACKLOG_BYTES = 64 << 10


class UpstreamSide(asyncio.Protocol):
    """One connection, for one client connection. What is written before it is there waits."""

    def __init__(self, client: ClientSide, common: Common) -> None:
        self._client = client
        self._common = common
        self._transport: asyncio.Transport | None = None
        self._backlog: list[bytes] = []
        self._backlog_bytes = 0
        self._paused = self._gone = False
        self._exchange: Exchange | None = None
        self._out: list[bytes] = []
        self._parser: httptools.HttpResponseParser | None = None
        self._reason = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._head_bytes = 0
        self._chunking = False
        # Answers that were passed on whole, and whether the present one has begun to come.
        self.served = 0
        self.heard = False

    # The client's side of it.

    @property
    def full(self) -> bool:
        """What is written is not taken at the moment."""
        return self._paused or self._backlog_bytes > BACKLOG_BYTES

    def expect(self, exchange: Exchange) -> None:
        """The next answer is for `exchange`."""
        self._exchange = exchange
        self._parser = httptools.HttpResponseParser(self)
        self._head_bytes = 0
        self.heard = False

    def write(self, data: bytes) -> None:
        if self._transport is None:
            self._backlog.append(data)
            self._backlog_bytes += len(data)
        else:
            self._transport.write(data)

    def write_eof(self) -> bool:
        """The client will say no more, but listens. False: this connection cannot be closed by halves."""
        if self._transport is None or not self._transport.can_write_eof():
            return False
        self._transport.write_eof()
        return True

    def read(self, go_on: bool) -> None:
        """Whether the client takes what comes."""
        if self._transport is None:
            return
        if go_on:
            self._transport.resume_reading()
        else:
            self._transport.pause_reading()

    def close(self) -> None:
        """After what is still to be written."""
        self._gone = True
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        self._gone = True
        if self._transport is not None:
            self._transport.abort()

    # asyncio's calls.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        self._common.connections.add(self)
        keep_watch(transport)
        if self._gone:
            transport.abort()
            return
        transport.write(b"".join(self._backlog))
        self._backlog.clear()
        self._backlog_bytes = 0
        self._client.flow()

    def pause_writing(self) -> None:
        self._paused = True
        self._client.flow()

    def resume_writing(self) -> None:
        self._paused = False
        self._client.flow()

    def data_received(self, data: bytes) -> None:
        if self._gone:
            return
        if self._client.tunnel:
            self._client.write(data)
            return
        exchange = self._exchange
        if exchange is None or self._parser is None:
            # Nobody asked: a last word before it closes, as some servers send.
            self._end(broken=True)
            return
        self.heard = True
        rest, broken = b"", False
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            rest = data[upgrade.args[0] :]
        except httptools.HttpParserError:
            broken = True
        if not exchange.status:
            self._head_bytes += len(data)
            broken |= self._head_bytes > HEAD_BYTES
        if self._out:
            out, self._out = self._out, []
            self._client.write(b"".join(out))
        if exchange.status == 101 and not broken:
            self._client.open_tunnel(rest)
        elif exchange.whole:
            self._exchange = None
            self.served += 1
            exchange.keep_alive &= not broken
            self._client.answered(exchange)
        elif broken:
            self._end(broken=True, why="no HTTP")

    def eof_received(self) -> bool:
        if self._client.tunnel and not self._gone:
            return self._client.upstream_said_all()
        self._end(broken=False)
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(broken=exc is not None)
        # It knows our methods: without this each connection waits for the garbage collector.
        self._parser = None
        self._common.left(self)

    def _end(self, *, broken: bool, why: str = "closed without an answer") -> None:
        if self._gone:
            return
        self.abort()
        exchange = self._exchange
        if exchange is not None and exchange.status and exchange.until_close and not broken:
            exchange.whole = True
            if self._chunking:
                self._client.write(LAST_CHUNK)
            self._client.answered(exchange)
        else:
            self._client.upstream_ended(self, why, broken=broken)

    # httptools' calls: they only take note, and what is to be written goes out together.

    def on_message_begin(self) -> None:
        self._nothing_more()
        self._reason, self._headers = b"", []

    def on_status(self, reason: bytes) -> None:
        self._reason += reason

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        exchange, parser = self._exchange, self._parser
        assert exchange is not None
        assert parser is not None
        status = parser.get_status_code()
        if status == 101:
            if not exchange.websocket:
                raise ValueError("nobody asked for another protocol")
            written = lines(self._headers) + exchange.extra
            self._out.append(answer_bytes(status, self._reason, written))
            exchange.answered(status)
        elif status < 200:
            if not exchange.raw:
                self._out.append(answer_bytes(status, self._reason, lines(sift(self._headers).passed)))
        else:
            self._final_head(exchange, status, parser.get_http_version())

    def _final_head(self, exchange: Exchange, status: int, version: str) -> None:
        sifted = sift(self._headers)
        if sifted.coding and not sifted.chunked:
            raise ValueError("a transfer coding other than chunked")
        bodyless = exchange.head.method == "HEAD" or status in {204, 304}
        exchange.until_close = not bodyless and not sifted.chunked and sifted.length is None
        self._chunking = not bodyless and not exchange.raw and sifted.length is None
        stays = b"close" not in sifted.named and version == "1.1" and not exchange.until_close
        exchange.keep_alive &= stays and not self._common.closing
        written = lines(sifted.passed) + exchange.extra
        close = not exchange.keep_alive
        self._out.append(answer_bytes(status, self._reason, written, chunked=self._chunking, close=close))
        exchange.answered(status)
        # The parser does not know the method: it would wait for a body.
        exchange.whole = bodyless

    def on_body(self, piece: bytes) -> None:
        self._nothing_more()
        self._out.append(b"%x\r\n%b\r\n" % (len(piece), piece) if self._chunking else piece)

    def on_message_complete(self) -> None:
        exchange = self._exchange
        if exchange is not None and exchange.status >= 200 and not exchange.whole:
            exchange.whole = True
            if self._chunking:
                self._out.append(LAST_CHUNK)

    def _nothing_more(self) -> None:
        if self._exchange is None or self._exchange.whole:
            raise ValueError("more than was asked for")
