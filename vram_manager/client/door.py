"""The daemon's socket for code that blocks: one kept connection, one call, one stream."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from typing import Any
from weakref import WeakSet

from vram_manager.client.wire import BODY_BYTES, Answer, HungUp, Malformed, Reply, request
from vram_manager.errors import Unreachable

DEFAULT_SOCKET = "/run/vram-manager/vram.sock"
# How long an answer that was already on its way when we hung up is looked for.
WITHDRAW_SECONDS = 1.0
# A full backlog refuses at once instead of waiting; 1 ms is some ten turns of the daemon's loop.
BACKLOG_SECONDS = 0.001
RECEIVE_BYTES = 1 << 16

_sockets: WeakSet[socket.socket] = WeakSet()


def _close_inherited() -> None:
    """A forked child's copies would keep its parent's leases alive, and mix up the answers of both."""
    for inherited in list(_sockets):
        inherited.close()


os.register_at_fork(after_in_child=_close_inherited)


def socket_path() -> str:
    """Where the daemon listens: VRAM_SOCKET, or the default."""
    return os.environ.get("VRAM_SOCKET") or DEFAULT_SOCKET


def new_socket() -> socket.socket:
    """A Unix socket that a forked child closes."""
    created = socket.socket(socket.AF_UNIX)
    _sockets.add(created)
    return created


def unreachable(path: str, error: Exception) -> Unreachable:
    """What to tell a person whose question on the socket `path` ended in `error`."""
    return Unreachable(_why(path, error))


def _why(path: str, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return f"no daemon: {path} does not exist (is vram-manager running, is its socket's volume mounted?)"
    if isinstance(error, ConnectionRefusedError):
        return f"no daemon: nobody listens on {path} any more"
    if isinstance(error, PermissionError):
        return f"{path}: permission denied (it is mode 0660: use its group)"
    if isinstance(error, ValueError):
        return f"{path}: whoever answers there is no vram-manager ({error})"
    return f"{path}: {error}"


class Connection:
    """One connection to the daemon, opened when it is first used. One question at a time.

    Raises OSError and ValueError as they come; `unreachable` has the words. After an error: `close`, or `withdraw`.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._socket: socket.socket | None = None
        self._answer = Answer()

    @property
    def open(self) -> bool:
        """Can it be used again?"""
        return self._socket is not None

    def fileno(self) -> int | None:
        """The file descriptor, None when it is closed."""
        number = -1 if self._socket is None else self._socket.fileno()
        return None if number < 0 else number

    def ask(self, asked: bytes, timeout_seconds: float | None) -> Reply:
        """The answer, all of it within the deadline."""
        answer = self._put(asked, timeout_seconds, whole=True)
        if not answer.keeps_alive:
            self.close()
        return answer.reply()

    def stream(self, asked: bytes, timeout_seconds: float | None) -> int:
        """The status of an answer whose body is `read` as it comes."""
        return self._put(asked, timeout_seconds, whole=False).status

    def read(self, timeout_seconds: float | None) -> bytes:
        """What has come of the body; nothing when it is complete. Raises TimeoutError, HungUp, Malformed."""
        deadline = _deadline(timeout_seconds)
        while not (taken := self._answer.take()) and not self._answer.done:
            self._receive(deadline)
        return taken

    def shutdown(self) -> None:
        """Wakes whoever reads, in another thread; that one closes."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def withdraw(self) -> Reply | None:
        """Hangs up on a question that is still open; gives the answer that had been sent all the same."""
        try:
            if self._socket is None or self._answer.done:
                return None
            self._socket.shutdown(socket.SHUT_WR)
            deadline = _deadline(WITHDRAW_SECONDS)
            while not self._answer.done:
                self._receive(deadline)
            return self._answer.reply()
        except (OSError, ValueError):
            return None
        finally:
            self.close()

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _put(self, asked: bytes, timeout_seconds: float | None, *, whole: bool) -> Answer:
        deadline = _deadline(timeout_seconds)
        if self._socket is not None and self._socket.fileno() >= 0:
            try:
                return self._round(self._socket, asked, deadline, whole)
            except HungUp as stale:
                # Kept too long, or the daemon was restarted meanwhile: it never saw the question.
                self.close()
                if stale.begun:
                    raise
        self._socket = _connected(self._path, deadline)
        return self._round(self._socket, asked, deadline, whole)

    def _round(self, on: socket.socket, asked: bytes, deadline: float | None, whole: bool) -> Answer:
        answer = self._answer = Answer()
        on.settimeout(_left(deadline))
        # Who refuses a question may hang up before it has read it all: what it said is still to be read.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            on.sendall(asked)
        while not (answer.done if whole else answer.status):
            self._receive(deadline)
        return answer

    def _receive(self, deadline: float | None) -> None:
        assert self._socket is not None
        self._socket.settimeout(_left(deadline))
        try:
            received = self._socket.recv(RECEIVE_BYTES)
        except ConnectionResetError:
            received = b""
        self._answer.feed(received)


def call(method: str, path: str, body: object = None, *, timeout_seconds: float = 30.0) -> Reply:
    """One request on a connection of its own. Raises Unreachable when nothing answers on the socket."""
    connection = Connection(socket_path())
    try:
        return connection.ask(request(method, path, body), timeout_seconds)
    except (OSError, ValueError) as error:
        raise unreachable(socket_path(), error) from error
    finally:
        connection.close()


def follow(path: str) -> Iterator[Any]:
    """Each message of an event stream as it comes, until the daemon goes away."""
    connection = Connection(socket_path())
    try:
        connection.stream(request("GET", path, accept="text/event-stream"), None)
        unread = b""
        while received := connection.read(None):
            *lines, unread = (unread + received).split(b"\n")
            if len(unread) > BODY_BYTES:
                raise Malformed("a line without end")
            for line in lines:
                if line.startswith(b"data: "):
                    yield json.loads(line[6:])
    except (OSError, ValueError) as error:
        raise unreachable(socket_path(), error) from error
    finally:
        connection.close()


def _connected(path: str, deadline: float | None) -> socket.socket:
    connecting = new_socket()
    try:
        while True:
            connecting.settimeout(_left(deadline))
            try:
                connecting.connect(path)
                return connecting
            except BlockingIOError:
                time.sleep(BACKLOG_SECONDS)
    except BaseException:
        connecting.close()
        raise


def _deadline(timeout_seconds: float | None) -> float | None:
    return None if timeout_seconds is None else time.monotonic() + timeout_seconds


def _left(deadline: float | None) -> float | None:
    if deadline is None:
        return None
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    return left
