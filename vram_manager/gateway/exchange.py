"""One request and its answer: what of the request may go on by now, and the gate's part in it."""

from __future__ import annotations

import asyncio
import contextlib
import math
import resource
import socket
import ssl
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Protocol

from loguru import logger

from vram_manager.gateway.head import (
    LAST_CHUNK,
    Address,
    Head,
    Passage,
    Reply,
    Sifted,
    refusal,
    reply_bytes,
    request_bytes,
    safe_lines,
    sift,
)

# A gate that fails does so for each request; one line a minute tells it as well.
_TOLD_SECONDS = 60.0
# So long a name stands for the address where it was reached. To ask again takes a thread, half of what a new connection
# costs; a container that was made anew may have another address.
_NAME_SECONDS = 5.0
# What the rest of the process may need of the file descriptors it is allowed.
DESCRIPTORS_KEPT = 128
# After a minute of silence a peer is asked by the kernel whether it is still there: a tunnel may be silent for ever.
_ALIVE = ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4))
_NO_HEAD = Head(method="", target="", headers=())


def keep_watch(transport: asyncio.Transport) -> None:
    """A peer that lost its power is noticed, and no token waits until the one before it was acknowledged."""
    connection = transport.get_extra_info("socket")
    # asyncio does this too, but not for what a listener of socket.create_server accepts.
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _ALIVE:
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


class Held(Protocol):
    """One request that is looked at."""

    def look(self, piece: bytes) -> None:
        """A piece of the request's body as it flows past, without the framing of chunks."""

    async def may_pass(self) -> Passage | Reply:
        """Awaited once the body is complete; cancelled when the client leaves."""

    def answered(self, status: int) -> None:
        """The head of the upstream's answer came: once, and of the 1xx only for 101."""

    def over(self) -> None:
        """Exactly once, whatever the way: the exchange is over, and `may_pass` has ended."""


class Gate(Protocol):
    """Who decides which requests are looked at, and how a missing upstream is told."""

    def watch(self, head: Head) -> Held | None:
        """None: it passes, and nothing of it is looked at."""

    def unreachable(self, head: Head, why: str) -> Reply:
        """The 502 in the shape that the upstream's own errors have."""


class Common:
    """What the connections of one proxy share."""

    def __init__(self, address: Address, gate: Gate) -> None:
        self.address = address
        self.gate = gate
        self.tls = ssl.create_default_context() if address.tls else None
        self.host: bytes | None = None
        self.closing = False
        self.open_exchanges = 0
        # Of either side.
        self.connections: set[asyncio.BaseProtocol] = set()
        descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self.most_connections = math.inf if descriptors < 0 else descriptors - DESCRIPTORS_KEPT
        self.alone = asyncio.Event()
        self.tasks: set[asyncio.Task[Any]] = set()
        self._told_at = -math.inf
        self._known_host = address.host
        self._known_until = -math.inf

    async def connect(self, upstream: asyncio.Protocol) -> None:
        """`upstream` has a connection. Raises OSError where none can be had."""
        loop = asyncio.get_running_loop()
        if loop.time() < self._known_until:
            with contextlib.suppress(OSError):
                await self._open(upstream, self._known_host)
                return
        transport = await self._open(upstream, self.address.host)
        if peer := transport.get_extra_info("peername"):
            self._known_host, self._known_until = peer[0], loop.time() + _NAME_SECONDS

    async def _open(self, upstream: asyncio.Protocol, host: str) -> asyncio.Transport:
        name = self.address.host if self.tls else None
        transport, _ = await asyncio.get_running_loop().create_connection(
            lambda: upstream, host, self.address.port, ssl=self.tls, server_hostname=name
        )
        return transport

    def crowded(self) -> bool:
        """More connections than the process has file descriptors to spare for them."""
        return len(self.connections) > self.most_connections

    def left(self, connection: asyncio.BaseProtocol) -> None:
        """It is lost."""
        self.connections.discard(connection)
        if not self.connections:
            self.alone.set()

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """A task that lives until it is done; the loop alone would forget it."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    def gate_failed(self) -> None:
        """Told from within `except`: the request goes on as if nothing were watched."""
        now = asyncio.get_running_loop().time()
        if now - self._told_at >= _TOLD_SECONDS:
            self._told_at = now
            logger.opt(exception=True).error("The gateway to {} failed and lets requests pass", self.address)


class Exchange:
    """One request, from its head to the end of its answer.

    The client's side puts in what arrives (`arrived`, `complete`) and takes out what may go on (`take`). Of a request
    that is watched the newest piece stays here, and the head with it, until the gate has said yes.
    """

    __slots__ = (
        "_asked",
        "_common",
        "_held",
        "_kept",
        "_over",
        "_sifted",
        "_verdict",
        "arrived",
        "begun",
        "complete",
        "extra",
        "head",
        "head_sent",
        "keep_alive",
        "passed",
        "raw",
        "refused",
        "sent",
        "status",
        "until_close",
        "websocket",
        "whole",
    )

    def __init__(
        self, common: Common, head: Head, sifted: Sifted, *, raw: bool, keep_alive: bool, websocket: bool
    ) -> None:
        self._common = common
        self._sifted = sifted
        self._held: Held | None = None
        self._verdict: asyncio.Task[Reply | bytes] | None = None
        self._asked = False
        self._kept = b""
        self._over = False
        self.head = head
        # The client may ask again on this connection.
        self.keep_alive = keep_alive
        # HTTP/1.0: the answer is neither chunked nor preceded by 1xx.
        self.raw = raw
        self.websocket = websocket
        self.refused: Reply | None = None
        # Lines that the gate adds to the head of the answer.
        self.extra = b""
        self.arrived: list[bytes] = []
        self.complete = self.begun = self.passed = self.head_sent = self.sent = False
        # The answer: 0 until its head has been passed on, then how far it is.
        self.status = 0
        self.whole = self.until_close = False

    @classmethod
    def unreadable(cls, common: Common, reply: Reply) -> Exchange:
        """In place of a request that could not be parsed."""
        exchange = cls(common, _NO_HEAD, sift(()), raw=True, keep_alive=False, websocket=False)
        exchange.refused = reply
        return exchange

    @property
    def length(self) -> int | None:
        """The body's bytes; None: chunked."""
        return None if self._sifted.chunked else self._sifted.length or 0

    def begin(self) -> None:
        """It is this request's turn."""
        self.begun = True
        self._common.open_exchanges += 1
        try:
            self._held = self._common.gate.watch(self.head)
        except Exception:
            self._common.gate_failed()
        self.passed = self._held is None

    def take(self) -> bytes:
        """What may go to the upstream by now."""
        pieces, self.arrived = self.arrived, []
        out = []
        for piece in pieces:
            self._look(piece)
            out.append(self._kept)
            self._kept = piece
        if self.passed:
            out.append(self._kept)
            self._kept = b""
        out = [self._framed(piece) for piece in out if piece]
        if not self.head_sent and (out or self.passed or self.head.header(b"expect")):
            self.head_sent = True
            out.insert(0, self._head_bytes())
        if self.passed and self.complete and not self.sent:
            self.sent = True
            if self._sifted.chunked:
                out.append(LAST_CHUNK)
        return b"".join(out)

    def _head_bytes(self) -> bytes:
        common = self._common
        return request_bytes(
            self.head,
            self._sifted,
            common.address,
            common.host,
            raw=self.raw,
            websocket=self.websocket,
            keep_alive=self.keep_alive,
        )

    def _framed(self, piece: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(piece), piece) if self._sifted.chunked else piece

    def _look(self, piece: bytes) -> None:
        if self._held is None or self.passed:
            return
        try:
            self._held.look(piece)
        except Exception:
            self._common.gate_failed()
            self.passed = True

    @property
    def to_be_asked(self) -> bool:
        """Complete and watched, and the gate has not been asked yet."""
        return self.complete and not self.passed and not self._asked

    def ask(self, decided: Callable[[Reply | None], None]) -> None:
        """May it pass? `decided` is called with the gate's refusal or None, unless the exchange is over by then."""
        assert self._held is not None
        self._asked = True
        self._verdict = self._common.spawn(self._judged(self._held), "may-pass")
        self._verdict.add_done_callback(partial(self._told, decided))

    async def _judged(self, held: Held) -> Reply | bytes:
        try:
            verdict = await held.may_pass()
            if isinstance(verdict, Reply):
                reply_bytes(verdict, bodyless=True, close=True)
                return verdict
            return safe_lines(verdict.headers)
        except Exception:
            self._common.gate_failed()
            return b""

    def _told(self, decided: Callable[[Reply | None], None], task: asyncio.Task[Reply | bytes]) -> None:
        self._verdict = None
        if self._over:
            self._tell_over()
            return
        verdict = b"" if task.cancelled() else task.result()
        if isinstance(verdict, Reply):
            decided(verdict)
        else:
            self.passed, self.extra = True, verdict
            decided(None)

    def answered(self, status: int) -> None:
        """The head of the answer came."""
        self.status = status
        if self._held is not None:
            try:
                self._held.answered(status)
            except Exception:
                self._common.gate_failed()

    def unreachable(self, why: str) -> Reply:
        """The 502 as the gate words it."""
        try:
            reply = self._common.gate.unreachable(self.head, why)
            reply_bytes(reply, bodyless=True, close=True)
        except Exception:
            self._common.gate_failed()
            return refusal(502, why)
        return reply

    def end(self) -> None:
        """It is over, whatever the way; more than one call is one."""
        if self._over or not self.begun:
            return
        self._over = True
        self._common.open_exchanges -= 1
        if self._verdict is not None:
            self._verdict.cancel()
        else:
            self._tell_over()

    def _tell_over(self) -> None:
        if self._held is not None:
            try:
                self._held.over()
            except Exception:
                self._common.gate_failed()
