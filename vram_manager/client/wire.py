"""HTTP/1.1 as the daemon speaks it, without any I/O: bytes to send, and an answer that is fed as bytes come.

By hand, because the standard library's HTTP client alone takes longer to import than a worker's whole round trip.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

HEAD_BYTES = 1 << 16
# Far above the largest answer there is (a thousand events), far below what would hurt a worker.
BODY_BYTES = 1 << 26
_LINE_BYTES = 1 << 12
_UNRESERVED = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")


class Malformed(ValueError):
    """What came is not what a vram-manager says."""


class HungUp(OSError):
    """The other side closed the connection; `begun` says whether some of the answer had come."""

    def __init__(self, *, begun: bool) -> None:
        super().__init__("the answer broke off" if begun else "it hung up without an answer")
        self.begun = begun


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
        return self.words or f"HTTP {self.status}: {self.body}"

    @property
    def words(self) -> str | None:
        """The daemon's own words for an error, if it said any."""
        return self._told("message")

    @property
    def kind(self) -> str | None:
        """What kind of error it is, if it said so."""
        return self._told("type")

    @property
    def field(self) -> str | None:
        """The field of the request that an error is about, if it named one."""
        return self._told("field")

    def _told(self, name: str) -> str | None:
        told = self.body.get("error") if isinstance(self.body, dict) else None
        value = told.get(name) if isinstance(told, dict) else None
        return value if isinstance(value, str) else None


def request(method: str, path: str, body: object = None, *, accept: str = "application/json") -> bytes:
    """The bytes of one request. Raises ValueError for a path that cannot stand in one."""
    if " " in path or not (path.isascii() and path.isprintable()):
        raise ValueError(f"{path!r} is no path of a request: quote it")
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: {accept}\r\n"
    if body is None:
        return f"{head}Content-Length: 0\r\n\r\n".encode() if method == "POST" else f"{head}\r\n".encode()
    payload = json.dumps(body)
    return f"{head}Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n{payload}".encode()


def quoted(name: str) -> str:
    """`name` as one segment of a path."""
    raw = name.encode(errors="replace")
    return "".join(chr(byte) if byte in _UNRESERVED else f"%{byte:02X}" for byte in raw)


class Answer:
    """One answer as it comes in. `status` is 0 until its head is there; `done` once it is complete.

    Whatever breaks the rules of HTTP or is larger than the limits raises Malformed, an end too early HungUp.
    """

    __slots__ = ("_body", "_left", "_raw", "_step", "begun", "done", "headers", "keeps_alive", "status")

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.begun = self.done = self.keeps_alive = False
        self._raw = bytearray()
        self._body = bytearray()
        # How many bytes of the body, or of this chunk of it, are still to come.
        self._left = 0
        self._step = self._head

    def feed(self, data: bytes) -> None:
        """What was received; nothing is the end of the connection."""
        if not data:
            self._end()
            return
        self.begun = True
        self._raw += data
        while not self.done and self._step():
            pass
        if len(self._body) > BODY_BYTES:
            raise Malformed(f"an answer of more than {BODY_BYTES >> 20} MiB")
        # Bytes that nobody asked for would be taken for the next answer.
        self.keeps_alive = self.keeps_alive and not (self.done and self._raw)

    def take(self) -> bytes:
        """What has come of the body since the last time, for one that has no end."""
        taken = bytes(self._body)
        self._body.clear()
        return taken

    def reply(self) -> Reply:
        """The complete answer. Raises ValueError for a body that is not what its head says."""
        raw = self.take()
        if not raw or "json" not in self.headers.get("content-type", ""):
            return Reply(self.status, raw.decode())
        try:
            return Reply(self.status, json.loads(raw))
        except RecursionError as error:
            raise Malformed("JSON without end") from error

    def _end(self) -> None:
        if self._step != self._until_the_end:
            raise HungUp(begun=self.begun)
        self.done = True

    # Each step takes what it can of the raw bytes, and says whether there may be more to take.

    def _head(self) -> bool:
        end = self._raw.find(b"\r\n\r\n")
        if not self._raw.startswith(b"HTTP/1."[: len(self._raw)]):
            raise Malformed(f"no HTTP: {bytes(self._raw[:40])!r}")
        if max(end, len(self._raw) if end < 0 else 0) > HEAD_BYTES:
            raise Malformed("a head without end")
        if end < 0:
            return False
        first, *lines = self._raw[:end].decode("latin-1").split("\r\n")
        del self._raw[: end + 4]
        version, _, rest = first.partition(" ")
        status = rest[:3]
        if version not in ("HTTP/1.1", "HTTP/1.0") or not _is_number(status, 3) or rest[3:4].strip() or status < "200":
            raise Malformed(f"no status line: {first[:80]!r}")
        for line in lines:
            name, colon, value = line.partition(":")
            name = name.lower()
            if not colon or (name == "content-length" and name in self.headers):
                raise Malformed(f"no header: {line[:80]!r}")
            self.headers[name] = value.strip()
        self.status = int(status)
        self.keeps_alive = version == "HTTP/1.1" and self.headers.get("connection", "").lower() != "close"
        return self._choose_body()

    def _choose_body(self) -> bool:
        length = self.headers.get("content-length")
        coding = self.headers.get("transfer-encoding")
        if coding is not None:
            if coding.lower() != "chunked":
                raise Malformed(f"Transfer-Encoding {coding!r}")
            self._step = self._chunk_size
        elif self.status in (204, 304):
            self.done = True
        elif length is None:
            self.keeps_alive = False
            self._step = self._until_the_end
        elif not _is_number(length, 12):
            raise Malformed(f"Content-Length {length[:80]!r}")
        else:
            self._left = int(length)
            if self._left > BODY_BYTES:
                raise Malformed(f"an answer of more than {BODY_BYTES >> 20} MiB")
            self._step = self._counted
        return True

    def _counted(self) -> bool:
        self._move()
        self.done = not self._left
        return False

    def _until_the_end(self) -> bool:
        self._body += self._raw
        self._raw.clear()
        return False

    def _chunk_size(self) -> bool:
        line = self._line()
        if line is None:
            return False
        size = line.partition(b";")[0].strip()
        if not 0 < len(size) <= 8 or size.strip(b"0123456789abcdefABCDEF"):
            raise Malformed(f"no size of a chunk: {line[:40]!r}")
        self._left = int(size, 16)
        self._step = self._chunk if self._left else self._trailers
        return True

    def _chunk(self) -> bool:
        self._move()
        if self._left or len(self._raw) < 2:
            return False
        if not self._raw.startswith(b"\r\n"):
            raise Malformed("a chunk longer than its size")
        del self._raw[:2]
        self._step = self._chunk_size
        return True

    def _trailers(self) -> bool:
        line = self._line()
        self.done = line == b""
        return line is not None

    def _line(self) -> bytes | None:
        """The next line, or None while it is not complete."""
        end = self._raw.find(b"\r\n")
        if max(end, len(self._raw) if end < 0 else 0) > _LINE_BYTES:
            raise Malformed("a line without end")
        if end < 0:
            return None
        line = bytes(self._raw[:end])
        del self._raw[: end + 2]
        return line

    def _move(self) -> None:
        taken = min(self._left, len(self._raw))
        self._body += self._raw[:taken]
        del self._raw[:taken]
        self._left -= taken


def _is_number(text: str, most_digits: int) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= most_digits
