"""Reads a multipart form as it comes: fields are kept, files are counted and hashed and forgotten."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request

KEPT_BYTES = 64 * 1024
"""How much of a part is kept; a field that matters is shorter."""

_BOUNDARY = re.compile(r'boundary=(?:"([^"]+)"|([^;\s]+))')
_PARAMETER = re.compile(r'\b(filename|name)="((?:[^"\\]|\\.)*)"')


@dataclass(slots=True)
class Part:
    """One part. `filename` is None for a field."""

    filename: str | None
    size_bytes: int = 0
    kept: bytearray = field(default_factory=bytearray)
    hash: Any = field(default_factory=hashlib.sha256)

    def feed(self, content: bytes) -> None:
        self.size_bytes += len(content)
        self.kept += content[: KEPT_BYTES - len(self.kept)]
        self.hash.update(content)

    @property
    def text(self) -> str:
        return self.kept.decode(errors="replace")

    @property
    def sha256(self) -> str:
        digest: str = self.hash.hexdigest()
        return digest


async def form_of(request: Request, limit_bytes: int | None = None) -> dict[str, Part]:
    """The parts by name. What is no form has none; beyond `limit_bytes` of body it is an OverflowError."""
    boundary = _BOUNDARY.search(request.headers.get("content-type", ""))
    delimiter = b"\r\n--" + (boundary[1] or boundary[2]).encode() if boundary else b""
    parts: dict[str, Part] = {}
    part = Part(None)  # what comes before the first delimiter belongs to nobody
    buffer = bytearray(b"\r\n")
    received = 0
    async for piece in request.stream():
        received += len(piece)
        if limit_bytes is not None and received > limit_bytes:
            raise OverflowError(f"{received} bytes")
        if not delimiter:
            continue
        buffer += piece
        while (at := buffer.find(delimiter)) >= 0 and (end := buffer.find(b"\r\n\r\n", at)) >= 0:
            part.feed(bytes(buffer[:at]))
            head = dict(_PARAMETER.findall(buffer[at:end].decode(errors="replace")))
            part = parts.setdefault(head.get("name", ""), Part(head.get("filename")))
            del buffer[: end + 4]
        if at < 0:  # the last bytes may be the beginning of a delimiter
            sure = max(0, len(buffer) - len(delimiter))
            part.feed(bytes(buffer[:sure]))
            del buffer[:sure]
    if delimiter and (at := buffer.find(delimiter + b"--")) >= 0:
        part.feed(bytes(buffer[:at]))
    return parts
