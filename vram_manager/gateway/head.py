"""Heads of messages: what they say, what of them belongs to one connection only, and how they are written again.

Pure: bytes and values in, bytes and values out.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from http import HTTPStatus
from typing import NamedTuple, TypeAlias
from urllib.parse import urlsplit

Headers: TypeAlias = tuple[tuple[bytes, bytes], ...]

# Longer ones are refused: 431 for a request, a broken upstream for an answer.
HEAD_BYTES = 256 << 10
LAST_CHUNK = b"0\r\n\r\n"

# RFC 9110 7.6.1, and the two of RFC 9110 11.7 that are for the next proxy only.
_PER_CONNECTION = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
# Whoever names these in Connection wants them gone between the two of us: where a body ends, and who is asked.
_NEVER_DROPPED = frozenset({b"content-length", b"host"})
_ABSOLUTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://(?:[^/?#@]*@)?([^/?#]*)(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The head of a request. `target` is path and query as sent, undecoded; `headers` are all, as sent, in order."""

    method: str
    target: str
    headers: Headers

    @property
    def path(self) -> str:
        """The target without query and fragment, undecoded."""
        return self.target.partition("#")[0].partition("?")[0]

    def header(self, name: bytes) -> bytes | None:
        """The first value of `name`, whatever its case."""
        wanted = name.lower()
        return next((value for key, value in self.headers if key.lower() == wanted), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """An answer that the gateway gives itself; its content type (JSON) and length are added when it is written."""

    status: int
    body: bytes
    headers: Headers = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """The request may go on; these headers are added to its answer."""

    headers: Headers = ()


def refusal(status: int, why: str) -> Reply:
    """`{"error": why}`, as both servers behind us would put it."""
    return Reply(status=status, body=json.dumps({"error": why}).encode())


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`, by its name or number."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where the upstream is. `prefix` goes before each target; a user and password in the URL are not used."""

    host: str
    port: int
    tls: bool
    prefix: str

    @classmethod
    def of(cls, url: str) -> Address:
        parts = urlsplit(url)
        tls = parts.scheme == "https"
        port = parts.port or (443 if tls else 80)
        return cls(host=parts.hostname or "", port=port, tls=tls, prefix=parts.path.rstrip("/"))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def authority(self) -> bytes:
        """As a client that asks it directly would put it in Host."""
        return str(self).removesuffix(":443" if self.tls else ":80").encode()

    def host_for(self, listener: str, *, rewrite: bool) -> bytes | None:
        """The Host that requests carry to the upstream; None: what the client sent.

        Ollama on loopback refuses foreign names (server/routes.go:allowedHostsMiddleware), which protects browsers on
        that machine from DNS rebinding. A listener on loopback must leave that to it; one that others can reach
        would otherwise reach nothing.
        """
        if self.tls:
            return self.authority
        if rewrite and is_loopback(self.host) and not is_loopback(listener):
            return b"localhost:%d" % self.port
        return None


class Sifted(NamedTuple):
    """Headers taken apart: `passed` go end to end, the rest was for this connection only."""

    passed: list[tuple[bytes, bytes]]
    named: set[bytes]
    coding: bytes
    upgrade: bytes
    length: int | None

    @property
    def chunked(self) -> bool:
        return self.coding == b"chunked"


def sift(headers: Iterable[tuple[bytes, bytes]]) -> Sifted:
    """The headers of one message, taken apart. Its parser has seen to it that a Content-Length is one number."""
    passed: list[tuple[bytes, bytes]] = []
    named: set[bytes] = set()
    coding = upgrade = b""
    length = None
    for header in headers:
        name = header[0].lower()
        if name not in _PER_CONNECTION:
            passed.append(header)
            if name == b"content-length":
                length = int(header[1])
        elif name == b"connection":
            named.update(token.strip().lower() for token in header[1].split(b","))
        elif name == b"transfer-encoding":
            coding += header[1].strip().lower()
        elif name == b"upgrade":
            upgrade += header[1].strip().lower()
    if dropped := named - _NEVER_DROPPED:
        passed = [header for header in passed if header[0].lower() not in dropped]
    return Sifted(passed, named, coding, upgrade, length)


def read_head(method: bytes, target: bytes, headers: Headers) -> Head:
    """The head of a request whose target is a path, also where the client sent a whole URL (RFC 9112 3.2.2)."""
    words = target.decode("latin-1")
    if whole := _ABSOLUTE.fullmatch(words):
        authority, rest = whole.groups()
        words = rest if rest.startswith("/") else f"/{rest}"
        others = (header for header in headers if header[0].lower() != b"host")
        headers = ((b"Host", authority.encode("latin-1")), *others)
    return Head(method=method.decode(), target=words, headers=headers)


def objection(head: Head, sifted: Sifted, version: str, size_bytes: int, *, websocket: bool) -> Reply | None:
    """Why a request that could be parsed is refused all the same: what the upstream might read in another way."""
    if size_bytes > HEAD_BYTES:
        return refusal(431, f"the head of the request is over {HEAD_BYTES >> 10} KiB")
    if version not in {"1.0", "1.1"}:
        return refusal(505, "HTTP/1.1 is spoken here")
    if head.method == "CONNECT":
        return refusal(405, "CONNECT is for forward proxies")
    if sifted.coding and (version == "1.0" or not sifted.chunked):
        return refusal(501, "the only transfer coding is chunked, and HTTP/1.0 has none")
    if websocket and (sifted.chunked or sifted.length):
        return refusal(400, "a request for a websocket has no body")
    if sum(name.lower() == b"host" for name, _ in head.headers) > 1:
        return refusal(400, "more than one Host")
    return None


def lines(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Headers as they are written."""
    return b"".join([b"%b: %b\r\n" % header for header in headers])


def safe_lines(headers: Headers) -> bytes:
    """As `lines`, for headers that no parser has seen. Raises ValueError where one would break the head."""
    written = lines(headers)
    if written.count(b"\r") + written.count(b"\n") != 2 * len(headers) or b"\0" in written:
        raise ValueError("a header with a line break in it")
    return written


def request_bytes(
    head: Head,
    sifted: Sifted,
    address: Address,
    host: bytes | None,
    *,
    raw: bool = False,
    websocket: bool = False,
    keep_alive: bool = True,
) -> bytes:
    """The head as the upstream gets it. `host` replaces the client's, see `Address.host_for`; `raw`: it is HTTP/1.0."""
    headers = sifted.passed
    original = head.header(b"host")
    if host is not None:
        headers = [
            (name, host) if name.lower() == b"host" else (name, value)
            for name, value in headers
            if not (name.lower() == b"origin" and _same_origin(value, original))
        ]
    if original is None and raw:
        # HTTP/1.0 needs none, HTTP/1.1 does.
        headers = [(b"Host", host or address.authority), *headers]
    prefix = "" if head.target == "*" else address.prefix
    end = b"\r\n"
    if sifted.chunked:
        end = b"Transfer-Encoding: chunked\r\n\r\n"
    if websocket:
        end = b"Upgrade: websocket\r\nConnection: Upgrade\r\n" + end
    elif not keep_alive:
        end = b"Connection: close\r\n" + end
    return f"{head.method} {prefix}{head.target} HTTP/1.1\r\n".encode("latin-1") + lines(headers) + end


def _same_origin(origin: bytes, host: bytes | None) -> bool:
    """As Ollama's CORS judges it: the authority alone, whatever the scheme."""
    return host is not None and origin.partition(b"://")[2].lower() == host.lower()


def answer_bytes(status: int, reason: bytes, written: bytes, *, chunked: bool = False, close: bool = False) -> bytes:
    """The head of an answer; `written` are its headers as `lines` gives them."""
    end = (b"Transfer-Encoding: chunked\r\n" if chunked else b"") + (b"Connection: close\r\n" if close else b"")
    return b"HTTP/1.1 %d %b\r\n%b%b\r\n" % (status, reason, written, end)


def reply_bytes(reply: Reply, *, bodyless: bool, close: bool) -> bytes:
    """A whole answer of our own. Raises ValueError where its headers would break the head."""
    kind = ((b"Content-Type", b"application/json"), (b"Content-Length", b"%d" % len(reply.body)))
    phrase = HTTPStatus(reply.status).phrase.encode()
    head = answer_bytes(reply.status, phrase, safe_lines(kind + reply.headers), close=close)
    return head if bodyless else head + reply.body
