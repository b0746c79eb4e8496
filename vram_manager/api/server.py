"""Listening: a Unix socket that only its group may use, and TCP when asked."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import socket
import stat
import struct
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import uvicorn
from loguru import logger
from starlette.applications import Starlette
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from vram_manager.errors import AlreadyRunning, SettingsError

SOCKET_MODE = 0o660
# asyncio tries so many accepts in a row, and says so for each, when no descriptor is left.
BACKLOG = 256
# Others stop at 64 KiB; ours is larger than what one read may bring of a body that follows at once (256 KiB).
HEAD_BYTES = 1 << 19
# Every open connection is a file descriptor that a sensor cannot have.
HEAD_SECONDS = 30.0
# For the whole body: the largest is a workflow of 1 MiB.
BODY_SECONDS = 30.0
# Half of what a process may usually open.
CONNECTIONS = 512


class _Told(logging.Handler):
    """uvicorn's words go where ours go: a bug in a route is an error, what a client did wrong is for debugging."""

    def emit(self, record: logging.LogRecord) -> None:
        problem = record.exc_info[1] if record.exc_info else None
        # A request that outlived its second at the end was cut off by us.
        if not isinstance(problem, asyncio.CancelledError):
            logger.opt(exception=problem).log("ERROR" if problem else "DEBUG", "{}", record.getMessage().strip())


class _Joined:
    """A transport that sends the head of an answer together with its body.

    uvicorn writes them apart: two system calls, and a client that is woken twice for one answer.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head = b""

    def write(self, data: bytes) -> None:
        # Only where a body follows at once; the head of a stream must not wait for its first event.
        if not self._head and data.startswith(b"HTTP/1.1 ") and b"\r\ncontent-length: " in data:
            self._head = data
            return
        self._transport.write(self._head + data)
        self._head = b""

    def flush(self) -> None:
        """What had no body after all."""
        if self._head:
            self.write(b"")

    def close(self) -> None:
        self.flush()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class _Protocol(HttpToolsProtocol):
    """One connection. The head of a request may neither grow nor be waited for without end."""

    _late: asyncio.TimerHandle | None = None
    _head_bytes = 0
    _in_head = True

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._joined = _Joined(transport)
        self._older: list[RequestResponseCycle] = []
        super().connection_made(self._joined)  # type: ignore[arg-type]
        self.client = _peer(transport) or self.client
        if len(self.connections) > CONNECTIONS:
            transport.abort()
        self._late = self.loop.call_later(HEAD_SECONDS, transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        self._in_time()
        super().connection_lost(exc)
        # uvicorn tells only the newest request. Behind one that stays open, such as a hold, there may be others.
        for cycle in self._older:
            cycle.disconnected = True
            cycle.message_event.set()

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._head_bytes += len(data)
        if self._head_bytes > HEAD_BYTES:
            self.send_400_response("The head of the request is too large.")
            return
        super().data_received(data)
        if self._in_head and self._head_bytes and self._late is None:
            self._late = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def on_headers_complete(self) -> None:
        self._in_time()
        self._in_head, self._head_bytes = False, 0
        # Until the body is there: a client that stopped in the middle would keep its descriptor for ever.
        self._late = self.loop.call_later(BODY_SECONDS, self.transport.close)
        if self.cycle is not None and not self.cycle.response_complete:
            self._older.append(self.cycle)
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        self._joined.flush()
        self._older = [cycle for cycle in self._older if not cycle.response_complete]
        super().on_response_complete()

    def on_message_complete(self) -> None:
        self._in_time()
        self._in_head = True
        super().on_message_complete()

    def _in_time(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


def _peer(transport: asyncio.Transport) -> tuple[str, int] | None:
    """Who connected to the Unix socket, as ("unix", pid): the pid in our own namespace, 0 where we cannot see it."""
    connection = transport.get_extra_info("socket")
    if connection is None or connection.family != socket.AF_UNIX:
        return None
    pid, _, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return "unix", pid


class _Server(uvicorn.Server):
    """Signals belong to the daemon; a server that would take them over could not be stopped in order."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()
        self.stopping = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    async def main_loop(self) -> None:
        # uvicorn's own loop wakes ten times a second to keep a Date header; that was a fifth of our idle cost.
        await self.stopping.wait()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def unix_socket(path: Path) -> socket.socket:
    """A bound socket at `path`, mode 0660. A stale file is replaced; a live daemon is AlreadyRunning."""
    try:
        with _alone_in(path.parent):
            if path.exists() or path.is_symlink():
                _clear(path)
            return _bound(path)
    except OSError as error:
        raise SettingsError(f"VRAM_SOCKET={path}: cannot be listened on ({error}); choose a writable path") from error


@contextlib.contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """Two daemons that start at once must not both take the other's new file for a stale one."""
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _clear(path: Path) -> None:
    """The file at `path` is gone, if it is a socket that nobody listens on any more."""
    if not stat.S_ISSOCK(path.lstat().st_mode):
        raise SettingsError(f"VRAM_SOCKET={path}: exists and is no socket; choose another path")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            path.unlink(missing_ok=True)
        except OSError as error:
            raise AlreadyRunning(f"{path} is taken ({error}): is another vram-manager running?") from error
        else:
            raise AlreadyRunning(f"another vram-manager answers on {path}: only one may act on a GPU")


def _bound(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(str(path))
        path.chmod(SOCKET_MODE)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def tcp_socket(host: str, port: int) -> socket.socket:
    """A bound TCP socket. Raises SettingsError naming the variables when the address cannot be had."""
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        # Accepted sockets inherit it; asyncio sets it only where the protocol is named, and here it is not.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except (OSError, UnicodeError) as error:
        raise SettingsError(f"VRAM_HTTP_HOST={host} VRAM_HTTP_PORT={port}: cannot be listened on ({error})") from error


@contextlib.asynccontextmanager
async def serving(app: Starlette, listener: socket.socket) -> AsyncIterator[None]:
    """`app` answers on `listener` inside the block; afterwards open requests get a second to finish."""
    uvicorns = logging.getLogger("uvicorn.error")
    uvicorns.handlers, uvicorns.propagate = [_Told()], False
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        backlog=BACKLOG,
        http=_Protocol,
        date_header=False,
        server_header=False,
        # A worker asks now and then on one connection; each costs a descriptor while it is kept.
        timeout_keep_alive=30,
        timeout_graceful_shutdown=1,
    )
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]), name="serve")
    try:
        await server.listening.wait()
        yield
    finally:
        server.should_exit = True
        server.stopping.set()
        await task
        listener.close()
