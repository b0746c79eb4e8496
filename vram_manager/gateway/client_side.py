"""The connection that a client made: its requests, one after the other, each over one upstream connection."""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
import struct
from collections import deque

import httptools

from vram_manager.gateway.exchange import Common, Exchange, keep_watch
from vram_manager.gateway.head import HEAD_BYTES, Reply, objection, read_head, refusal, reply_bytes, sift
from vram_manager.gateway.upstream_side import UpstreamSide

CONNECT_SECONDS = 10.0
# A connection that says nothing, or half of a head, is a file descriptor that a sensor cannot have.
HEAD_SECONDS = 60.0
# How long a client that was refused in the middle of its body may take to read why.
LINGER_SECONDS = 2.0
# Pipelined requests that wait; beyond that the client is not read from, and so not seen to leave.
AHEAD_BYTES = 64 << 10


class ClientSide(asyncio.Protocol):
    """One client connection.

    The parser puts what it reads into the newest exchange; only the oldest one, whose turn it is, is passed on.
    """

    _transport: asyncio.Transport
    _late: asyncio.TimerHandle | None = None

    def __init__(self, common: Common) -> None:
        self._common = common
        self._queue: deque[Exchange] = deque()
        self._upstream: UpstreamSide | None = None
        self._reaching: asyncio.Task[None] | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._target = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._head_bytes = self._partial_bytes = 0
        self._in_head = self._continued = False
        # Nothing more is read from this client: it said that it would close, or what it said makes no sense.
        self._deaf = False
        # What came behind a request for a websocket that has no answer yet.
        self._early: bytearray | None = None
        self._ahead_bytes = 0
        self._full = self._said_all = self._heard_all = False
        self.tunnel = False

    # asyncio's calls.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        keep_watch(transport)
        self._wait_for_head()
        self._common.connections.add(self)
        if self._common.crowded():
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._in_time()
        if self._upstream is not None and self.tunnel and exc is None:
            self._upstream.close()
            self._upstream = None
        self._drop_upstream()
        self._end_all()
        # It knows our methods: without this each connection waits for the garbage collector.
        del self._parser
        self._common.left(self)

    def pause_writing(self) -> None:
        self._full = True
        self.flow()

    def resume_writing(self) -> None:
        self._full = False
        self.flow()

    def data_received(self, data: bytes) -> None:
        if self.tunnel:
            if self._upstream is not None:
                self._upstream.write(data)
            return
        if self._deaf:
            return
        if self._early is not None or (self._queue and self._queue[-1].complete):
            self._ahead_bytes += len(data)
        self._parse(data)
        self._advance()
        self.flow()

    def eof_received(self) -> bool:
        if self.tunnel:
            self._said_all = True
            return not self._heard_all and self._upstream is not None and self._upstream.write_eof()
        if self._queue:
            # A client that closes cannot be told from one that only says no more, and a generation must not go on.
            self._transport.abort()
            self._drop_upstream()
            self._end_all()
        return False

    # What the upstream's side says.

    def write(self, data: bytes) -> None:
        self._transport.write(data)

    def flow(self) -> None:
        """Each side is read from as long as the other one takes it."""
        upstream = self._upstream
        if upstream is not None:
            upstream.read(not self._full)
        sending = self.tunnel or (bool(self._queue) and not self._queue[0].sent)
        if self._ahead_bytes > AHEAD_BYTES or (upstream is not None and upstream.full and sending):
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def answered(self, exchange: Exchange) -> None:
        """The whole answer has been passed on."""
        if not exchange.keep_alive:
            self._finish()
        elif exchange.sent:
            self._next()

    def open_tunnel(self, first: bytes) -> None:
        """From here on bytes are passed on as they are."""
        assert self._upstream is not None
        self.tunnel = True
        if first:
            self.write(first)
        if self._early:
            self._upstream.write(bytes(self._early))
        self._early, self._ahead_bytes = None, 0

    def upstream_said_all(self) -> bool:
        """In a tunnel. Whether its connection stays open for what this client still says."""
        self._heard_all = True
        if not self._said_all:
            self._transport.write_eof()
        return not self._said_all

    def upstream_ended(self, upstream: UpstreamSide, why: str, *, broken: bool) -> None:
        """There is none, it closed, or (`broken`) not as one closes a connection in order."""
        if upstream is not self._upstream:
            return
        self._upstream = self._reaching = None
        exchange = self._queue[0] if self._queue else None
        if exchange is None or exchange.whole or (self.tunnel and not broken):
            self._finish()
        elif exchange.status:
            self._break_off(exchange)
        elif not exchange.head_sent:
            # Held: it goes out on a new connection.
            self.flow()
        elif upstream.served and not upstream.heard:
            # The race that each client of a kept connection knows: asked in the moment it is closed.
            self._finish()
        else:
            self._answer(exchange, exchange.unreachable(f"{why} ({self._common.address})"))

    # Requests.

    def _parse(self, data: bytes) -> None:
        in_head = self._in_head
        while data and not self._deaf:
            if self._early is not None:
                self._early += data
                return
            size_bytes, data = len(data), self._fed(data)
            # What the parser has of a header is not told before its end.
            self._partial_bytes = self._partial_bytes + size_bytes if self._in_head and in_head else 0
            newest = self._queue[-1] if self._queue else None
            if newest is not None and newest.complete and not newest.keep_alive:
                self._deaf = True
        if self._partial_bytes > HEAD_BYTES:
            self._unreadable(refusal(431, f"the head of the request is over {HEAD_BYTES >> 10} KiB"))
        if self._in_head and self._late is None:
            self._wait_for_head()

    def _fed(self, data: bytes) -> bytes:
        """Parsed, but for what is returned."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            return self._upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            newest = self._queue[-1] if self._queue else None
            if newest is None or newest.keep_alive or not newest.complete:
                self._unreadable(refusal(400, f"this is no HTTP/1.1 request: {error}"))
            return b""
        return b""

    def _upgrade(self, rest: bytes) -> bytes:
        """Only to a websocket. Of any other offer the parser has skipped the body, which is read with a new one."""
        newest = self._queue[-1]
        if newest.refused is not None:
            self._deaf = True
            return b""
        self._parser = httptools.HttpRequestParser(self)
        if newest.websocket:
            newest.complete = True
            self._early = bytearray()
            return rest
        length = newest.length
        framing = b"Transfer-Encoding: chunked" if length is None else b"Content-Length: %d" % length
        self._continued = True
        return b"POST / HTTP/1.1\r\n%b\r\n\r\n%b" % (framing, rest)

    def _unreadable(self, reply: Reply) -> None:
        """From here on nothing can be read. It is answered when it is its turn."""
        self._deaf = True
        if self._queue and not self._queue[-1].complete:
            self._queue[-1].refused = reply
        else:
            self._queue.append(Exchange.unreadable(self._common, reply))

    def _advance(self) -> None:
        """Passes on what may be passed on of the request whose turn it is."""
        if not self._queue:
            return
        exchange = self._queue[0]
        if exchange.refused is not None:
            self._answer(exchange, exchange.refused)
            return
        if not exchange.begun:
            exchange.begin()
        self._send(exchange)
        if exchange.to_be_asked:
            exchange.ask(lambda refused: self._decided(exchange, refused))
        elif exchange.sent and exchange.whole:
            self._next()

    def _decided(self, exchange: Exchange, refused: Reply | None) -> None:
        if refused is None:
            self._send(exchange)
            if exchange.whole:
                self._next()
        else:
            self._answer(exchange, refused)
        self.flow()

    def _send(self, exchange: Exchange) -> None:
        begun = exchange.head_sent
        data = exchange.take()
        if not data:
            return
        if self._upstream is None:
            self._upstream = UpstreamSide(self, self._common)
            self._reaching = self._common.spawn(self._reach(self._upstream), "reach-upstream")
        if not begun:
            self._upstream.expect(exchange)
        self._upstream.write(data)

    async def _reach(self, upstream: UpstreamSide) -> None:
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await self._common.connect(upstream)
        except OSError as error:
            self.upstream_ended(upstream, _in_words(error), broken=True)

    # Ends.

    def _answer(self, exchange: Exchange, reply: Reply) -> None:
        """Instead of the upstream's."""
        if exchange.status:
            self._break_off(exchange)
            return
        if exchange.head_sent:
            self._drop_upstream()
        exchange.keep_alive &= exchange.complete and exchange.refused is None and not self._common.closing
        bodyless = exchange.head.method == "HEAD"
        self.write(reply_bytes(reply, bodyless=bodyless, close=not exchange.keep_alive))
        if exchange.keep_alive:
            self._next()
        else:
            self._finish()

    def _next(self) -> None:
        """The oldest exchange is over, and the connection is kept."""
        self._queue.popleft().end()
        if self._common.closing:
            self._finish()
            return
        if len(self._queue) < 2:
            self._ahead_bytes = 0
        if self._upstream is None and self._late is None:
            # With no upstream that could do it, this end is the one to close a connection that is not used.
            self._wait_for_head()
        if self._early is not None:
            early, self._early = bytes(self._early), None
            self._parse(early)
        self._advance()
        self.flow()

    def _finish(self) -> None:
        """Nothing more is said. A client in the middle of a body gets time to read what was said."""
        unread = bool(self._queue) and not self._queue[-1].complete
        self._deaf = True
        self._in_time()
        self._drop_upstream()
        self._end_all()
        self._ahead_bytes = 0
        self.flow()
        if unread and self._transport.can_write_eof():
            self._transport.write_eof()
            self._late = asyncio.get_running_loop().call_later(LINGER_SECONDS, self._linger)
        else:
            self._transport.close()

    def _linger(self) -> None:
        if self._transport.get_write_buffer_size():
            self._late = asyncio.get_running_loop().call_later(LINGER_SECONDS, self._linger)
        else:
            self._transport.abort()

    def _break_off(self, exchange: Exchange) -> None:
        """What came is delivered, and then there is no clean end."""
        if exchange.raw or self.tunnel:
            # Nothing in the bytes tells the end: a reset does.
            connection = self._transport.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._deaf = True
        self._drop_upstream()
        self._end_all()
        self._transport.close()

    def _drop_upstream(self) -> None:
        if self._reaching is not None:
            self._reaching.cancel()
        if self._upstream is not None:
            self._upstream.abort()
            self._upstream = None

    def _end_all(self) -> None:
        while self._queue:
            self._queue.popleft().end()

    def drain(self) -> None:
        """The daemon stops: a connection without an open exchange is closed."""
        if not self._queue:
            self._finish()

    def abort(self) -> None:
        """Now, whatever is still to be said."""
        self._drop_upstream()
        self._transport.abort()

    # A head that does not come.

    def _wait_for_head(self) -> None:
        self._late = asyncio.get_running_loop().call_later(HEAD_SECONDS, self._too_late)

    def _in_time(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _too_late(self) -> None:
        self._late = None
        if self._in_head:
            self._unreadable(refusal(408, f"the head of the request took over {HEAD_SECONDS:.0f} s"))
            self._in_head = False
            self._advance()
        elif not self._queue:
            self._finish()

    # httptools' calls: they only take note.

    def on_message_begin(self) -> None:
        if not self._continued:
            self._target, self._headers, self._head_bytes, self._in_head = b"", [], 0, True

    def on_url(self, target: bytes) -> None:
        self._target += target
        self._head_bytes += len(target)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name, value))
        self._head_bytes += len(name) + len(value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        if self._continued:
            self._continued, self._head_bytes = False, 0
            return
        self._in_time()
        parser = self._parser
        head, version = read_head(parser.get_method(), self._target, tuple(self._headers)), parser.get_http_version()
        sifted = sift(head.headers)
        exchange = Exchange(
            self._common,
            head,
            sifted,
            raw=version != "1.1",
            keep_alive=version == "1.1" and b"close" not in sifted.named,
            websocket=version == "1.1" and sifted.upgrade == b"websocket" and parser.should_upgrade(),
        )
        exchange.refused = objection(head, sifted, version, self._head_bytes, websocket=exchange.websocket)
        self._head_bytes = 0
        self._queue.append(exchange)

    def on_body(self, piece: bytes) -> None:
        self._queue[-1].arrived.append(piece)

    def on_message_complete(self) -> None:
        if not self._parser.should_upgrade():
            self._queue[-1].complete = True


def _in_words(error: OSError) -> str:
    """Why there is no connection, in two or three words."""
    if isinstance(error, TimeoutError):
        return f"no answer within {CONNECT_SECONDS:.0f} s"
    if isinstance(error, socket.gaierror):
        return "name not found"
    if isinstance(error, ssl.SSLError):
        return "no TLS"
    # Of several addresses asyncio tells only in words that each refused.
    if isinstance(error, ConnectionRefusedError) or f"[Errno {errno.ECONNREFUSED}]" in str(error):
        return "connection refused"
    return (error.strerror or "no connection").lower()
