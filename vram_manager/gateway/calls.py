"""Which requests make Ollama load a model, and what they ask for."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import inf
from typing import Final
from urllib.parse import unquote

from vram_manager.gateway.peek import FormField, JsonFields, Reader, Scalar, Unzstd, parameters

# server/routes.go:GenerateRoutes. Only the native ones read keep_alive and options; of those, generate and chat
# unload a model where keep_alive is 0 and this key is empty.
_NATIVE: Final = {"/api/generate": "prompt", "/api/chat": "messages", "/api/embed": None, "/api/embeddings": None}
_COMPATIBLE: Final = frozenset(
    {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/embeddings",
        "/v1/messages",
        "/v1/images/generations",  # v0.14.3 to v0.32.5
        "/v1/images/edits",  # v0.15.0 to v0.32.5
    }
)
_FORM: Final = "/v1/audio/transcriptions"
_EMBEDDING: Final = frozenset({"/api/embed", "/api/embeddings", "/v1/embeddings"})

# server/cloud_proxy.go: what it unpacks at most, and the window that it allows a frame.
_ZSTD_BYTES: Final = 20 << 20
_ZSTD_WINDOW_BYTES: Final = 8 << 20

_AUTHORITY: Final = re.compile(r"\A[A-Za-z][A-Za-z0-9+.-]*://[^/]*")
_UNIT_NANOSECONDS: Final = {"ns": 1, "us": 10**3, "µs": 10**3, "μs": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9}
_UNIT_NANOSECONDS["h"] = 60 * _UNIT_NANOSECONDS["m"]
_NUMBER_AND_UNIT: Final = r"([0-9]++(?:\.[0-9]*+)?|\.[0-9]++)(ns|us|µs|μs|ms|s|m|h)"
_PART: Final = re.compile(_NUMBER_AND_UNIT)
_DURATION: Final = re.compile(rf"[-+]?(?:0|(?:{_NUMBER_AND_UNIT})+)")
_MAX_INT64: Final = 2**63 - 1
_MAX_SECONDS: Final = _MAX_INT64 / 1e9  # the longest time.Duration; what more becomes depends on the processor

_MODEL: Final = ("model",)
_KEEP_ALIVE: Final = ("keep_alive",)
_CONTEXT: Final = ("options", "num_ctx")
_GPU_LAYERS: Final = ("options", "num_gpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A request that loads a model, or asks for its unload."""

    model: str
    """As the client wrote it, without spaces around it and without `:local`."""
    context: int | None = None
    """`options.num_ctx` in tokens; None: not asked for."""
    num_gpu: int | None = None
    """`options.num_gpu`, layers; None: not asked for. A negative one leaves it to Ollama."""
    keep_alive_seconds: float | None = None
    """How long the model stays afterwards; inf: for good; None: not said, or not to be understood."""
    unloads: bool = False
    """Nothing is loaded (since Ollama v0.3.11): the model is given up when its requests are through."""
    embeds: bool = False


def look_at(method: str, path: str, headers: Iterable[tuple[bytes, bytes]]) -> Looked | None:
    """What reads the body of a request that may load a model; None: this one loads nothing.

    `path` is the target without its query, as sent (`http://host/path` is one too). It is compared as gin does
    it: decoded, then exactly. With a slash at its end or a double one Ollama answers with a redirect or a 404, so
    such a request loads nothing.
    """
    route = unquote(_AUTHORITY.sub("", path)) if method == "POST" else ""
    if route in _NATIVE:
        return _Json(route, native=True)
    if route in _COMPATIBLE:
        return _Json(route, native=False, packed=_header(headers, b"content-encoding") == "zstd")
    if route == _FORM:
        content_type = _header(headers, b"content-type")
        boundary = parameters(content_type).get("boundary")
        is_form = content_type.partition(";")[0].strip().lower() == "multipart/form-data"
        return _Form(boundary) if is_form and boundary else None
    return None


def _header(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> str:
    return next((value.decode("latin-1").strip() for key, value in headers if key.lower() == name), "")


class Looked:
    """Reads one request; is fed with the pieces of its body."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def feed(self, piece: bytes) -> None:
        """Take the next piece of the body, as it is sent (without chunk framing)."""
        self._reader.feed(piece)

    def call(self) -> Call | None:
        """What is asked for, once the body is complete; None: it loads nothing here, or cannot be read."""
        raise NotImplementedError


class _Form(Looked):
    def __init__(self, boundary: str) -> None:
        self._field = FormField(boundary, "model")
        super().__init__(self._field)

    def call(self) -> Call | None:
        model = local_name(self._field.value or "")
        return Call(model=model) if model else None


class _Json(Looked):
    def __init__(self, route: str, *, native: bool, packed: bool = False) -> None:
        self._route = route
        self._asked = _NATIVE.get(route)
        native_paths = [_KEEP_ALIVE, _CONTEXT, _GPU_LAYERS, *([(self._asked,)] if self._asked else [])]
        self._fields = JsonFields([_MODEL, *(native_paths if native else [])])
        self._unpacked = (
            Unzstd(self._fields, limit_bytes=_ZSTD_BYTES, window_bytes=_ZSTD_WINDOW_BYTES) if packed else None
        )
        super().__init__(self._unpacked or self._fields)

    def call(self) -> Call | None:
        found = self._fields.values
        name = found.get(_MODEL)
        model = local_name(name) if isinstance(name, str) else None
        # Ollama refuses a body that it cannot read to its end.
        if not model or not self._fields.complete or (self._unpacked and self._unpacked.broken):
            return None
        keep_alive = keep_alive_seconds(found.get(_KEEP_ALIVE))
        return Call(
            model=model,
            context=_whole(found.get(_CONTEXT)),
            num_gpu=_whole(found.get(_GPU_LAYERS)),
            keep_alive_seconds=keep_alive,
            unloads=keep_alive == 0 and self._asked is not None and self._fields.empty(self._asked) is not False,
            embeds=self._route in _EMBEDDING,
        )


def local_name(raw: str) -> str | None:
    """The model that is meant, without `:local`; None where it runs elsewhere or is none (internal/modelref)."""
    raw = raw.strip()
    base, colon, tag = raw.rpartition(":")
    tag = tag.strip().lower()
    if not colon:
        return raw or None
    if tag == "cloud" or (tag.endswith("-cloud") and "/" not in tag):
        return None
    if tag == "local":
        # A second such suffix is refused.
        return base.strip() if local_name(base) == base.strip() else None
    return raw


def _whole(value: Scalar) -> int | None:
    """A number of `options`: a fraction is cut off (api/types.go:FromMap), what is no number is refused there."""
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) >= _MAX_INT64:
        return None
    return int(value)


def keep_alive_seconds(value: Scalar) -> float | None:
    """Seconds of a keep_alive: a number, or a duration of Go's (api/types.go:Duration); inf for a negative one."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, str):
        return _duration_seconds(value)
    if value < 0:
        return inf
    return int(value * 1e9) / 1e9 if value < _MAX_SECONDS else None


def _duration_seconds(text: str) -> float | None:
    """`1h30m`, `-1s`, `0`: time.ParseDuration; None where it refuses it."""
    if not _DURATION.fullmatch(text):
        return None
    parts = [float(number) * _UNIT_NANOSECONDS[unit] for number, unit in _PART.findall(text)]
    if sum(parts) > _MAX_INT64:
        return None
    nanoseconds = sum(map(int, parts))
    return inf if nanoseconds and text[0] == "-" else nanoseconds / 1e9
