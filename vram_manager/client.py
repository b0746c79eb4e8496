"""The standard-library door to the daemon's socket: no dependency, nothing of the daemon's own parts.

>>> from vram_manager.client import call
>>> call("GET", "/health/vram").body["free_mb"]      # doctest: +SKIP
15000
"""

from __future__ import annotations

import http.client
import json
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vram_manager.errors import Unreachable

DEFAULT_SOCKET = "/run/vram-manager/vram.sock"


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer of the daemon: HTTP status and JSON body (text where it is no JSON)."""

    status: int
    body: Any

    @property
    def error(self) -> str | None:
        """What went wrong, in the daemon's words where it said them in JSON; None for an answer that is no error."""
        if self.status < 400 or self.status == 503:
            return None
        told = self.body.get("error") if isinstance(self.body, dict) else None
        return told["message"] if told else f"HTTP {self.status}: {self.body}"


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout_seconds: float | None) -> None:
        super().__init__("localhost", timeout=timeout_seconds)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def socket_path() -> str:
    """Where the daemon listens: VRAM_SOCKET, or the default."""
    return os.environ.get("VRAM_SOCKET") or DEFAULT_SOCKET


def call(method: str, path: str, body: object = None, *, timeout_seconds: float = 30.0) -> Reply:
    """One request. Raises Unreachable when nothing answers on the socket."""
    connection = _UnixConnection(socket_path(), timeout_seconds)
    try:
        payload = None if body is None else json.dumps(body)
        connection.request(method, path, payload, {"Content-Type": "application/json"} if payload else {})
        response = connection.getresponse()
        raw = response.read()
        is_json = "json" in (response.getheader("Content-Type") or "")
        return Reply(response.status, json.loads(raw) if is_json and raw else raw.decode())
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise Unreachable(_why(error)) from error
    finally:
        connection.close()


def follow(path: str) -> Iterator[Any]:
    """Each message of an event stream as it comes, until the daemon goes away."""
    connection = _UnixConnection(socket_path(), None)
    try:
        connection.request("GET", path, headers={"Accept": "text/event-stream"})
        for line in connection.getresponse():
            if line.startswith(b"data: "):
                yield json.loads(line[6:])
    except (OSError, http.client.HTTPException) as error:
        raise Unreachable(_why(error)) from error
    finally:
        connection.close()


def _why(error: Exception) -> str:
    path = socket_path()
    if isinstance(error, FileNotFoundError):
        return f"no daemon: {path} does not exist (is vram-manager running, is its socket's volume mounted?)"
    if isinstance(error, ConnectionRefusedError):
        return f"no daemon: nobody listens on {path} any more"
    if isinstance(error, PermissionError):
        return f"{path}: permission denied (it is mode 0660: use its group)"
    if isinstance(error, ValueError):
        return f"{path}: whoever answers there is no vram-manager ({error})"
    return f"{path}: {error}"
