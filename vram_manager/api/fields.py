"""What requests are read with and errors are told in. A field that is absent or null was not given: None.

Each reader takes the body and the name of one field, and raises `BadRequest` (422, that name) for a value it
cannot use. `needed` makes a field one that must be given.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from vram_manager.domain.size import MAX_BYTES, Size, parse_size

T = TypeVar("T")

MAX_BODY_BYTES = 1 << 20
MAX_NAME = 200
MAX_ENTRIES, MAX_ENTRY_NAME = 256, 256
# An answer repeats of a wrong value only what a person needs to find it.
_SHOWN = 80


_ENCODER = json.JSONEncoder(allow_nan=False, separators=(",", ":"))


class JSONResponse(Response):
    """JSON in ASCII: a name from outside that UTF-8 cannot say must not turn an answer into a 500."""

    media_type = "application/json"

    def render(self, content: object) -> bytes:
        return _ENCODER.encode(content).encode()


class BadRequest(Exception):
    """A request that cannot be served; names the field where there is one."""

    def __init__(self, status: int, kind: str, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.message, self.field = status, kind, message, field


def error(status: int, kind: str, message: str, field: str | None = None) -> JSONResponse:
    """The one shape every error has."""
    body: dict[str, Any] = {"type": kind, "message": message}
    if field is not None:
        body["field"] = field
    return JSONResponse({"error": body}, status_code=status)


async def bad_request(request: Request, problem: Exception) -> Response:
    """The application's handler of `BadRequest`."""
    assert isinstance(problem, BadRequest)
    return error(problem.status, problem.kind, problem.message, problem.field)


async def json_body(request: Request, limit_bytes: int = MAX_BODY_BYTES) -> dict[str, Any]:
    """The body as a JSON object; no body is an empty one. Raises BadRequest (400, 413, 422)."""
    raw = bytearray()
    try:
        async for chunk in request.stream():
            raw += chunk
            if len(raw) > limit_bytes:
                raise BadRequest(413, "too_large", f"the body is larger than {limit_bytes} bytes")
    except ClientDisconnect as gone:
        raise BadRequest(400, "disconnected", "the client went away") from gone
    try:
        body = json.loads(raw or b"{}")
    except (ValueError, RecursionError) as problem:
        raise BadRequest(400, "bad_json", f"the body is not JSON: {problem}") from problem
    if not isinstance(body, dict):
        raise BadRequest(422, "invalid", "the body must be a JSON object")
    return body


def wrong(name: str, value: object, must: str) -> BadRequest:
    """The 422 for one field: `wrong("stage", "hard", "be soft or unload")`."""
    try:
        said = json.dumps(value)
    except RecursionError:
        said = "nested too deeply to be repeated"
    said = said if len(said) <= _SHOWN else f"{said[:_SHOWN]}..."
    return BadRequest(422, "invalid", f"{name[:_SHOWN]} is {said}: must {must}", name)


def no_others(body: Mapping[str, Any], known: Iterable[str]) -> None:
    """A misspelt field is told, never ignored."""
    unknown = sorted(body.keys() - set(known))
    if unknown:
        raise BadRequest(422, "invalid", f"{unknown[0][:_SHOWN]} is not a field of this request", unknown[0])


def needed(value: T | None, name: str) -> T:
    """The value of a field that must be given."""
    if value is None:
        raise BadRequest(422, "invalid", f"{name} is missing: must be given", name)
    return value


def printable(value: object, name: str, most: int = MAX_NAME) -> str:
    """A name that came from outside: something to see, on one line, and not a novel."""
    if not isinstance(value, str) or not value.strip() or len(value) > most or not value.isprintable():
        raise wrong(name, value, f"be 1 to {most} printable characters")
    return value


def text(body: Mapping[str, Any], name: str, *, most: int = MAX_NAME) -> str | None:
    """1 to `most` printable characters."""
    value = body.get(name)
    return None if value is None else printable(value, name, most)


def number(body: Mapping[str, Any], name: str, *, least: float = 0.0, most: float = 1e9) -> float | None:
    """A number from `least` to `most`; NaN is none."""
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise wrong(name, value, f"be a number from {least:g} to {most:g}")
    return float(value)


def whole(body: Mapping[str, Any], name: str, *, least: int = 0, most: int = MAX_BYTES) -> int | None:
    """A whole number from `least` to `most`; without them, of bytes."""
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise wrong(name, value, f"be a whole number from {least} to {most}")
    return value


def flag(body: Mapping[str, Any], name: str, *, default: bool = False) -> bool:
    """true or false."""
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise wrong(name, value, "be true or false")
    return value


def one_of(body: Mapping[str, Any], name: str, choices: tuple[str, ...]) -> str | None:
    """One of these words."""
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, str) or value not in choices:
        raise wrong(name, value, f"be {', '.join(choices[:-1])} or {choices[-1]}")
    return value


def size(body: Mapping[str, Any], name: str) -> Size | None:
    """A size with its unit, such as 24GiB or 90%."""
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        raise wrong(name, value, "be a size with a unit, such as 24GiB, 11.5GB, 512MiB or 90% of the GPU")
    try:
        return parse_size(value)
    except ValueError as problem:
        raise wrong(name, value, str(problem).removeprefix("must ")) from problem


def gpu_name(body: Mapping[str, Any], name: str = "gpu") -> str | None:
    """The UUID or the index of a GPU, as text; whether there is one, the caller knows."""
    value = body.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(whole(body, name, most=10_000))
    return text(body, name)


def mapping(body: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """A JSON object, whatever is in it."""
    value = body.get(name)
    if value is not None and not isinstance(value, dict):
        raise wrong(name, value, "be a JSON object")
    return value


def sizes(body: Mapping[str, Any], name: str) -> dict[str, int] | None:
    """Bytes by name, at most 256 of them, as {"flux": 6442450944}."""
    value = mapping(body, name)
    if value is None:
        return None
    if len(value) > MAX_ENTRIES:
        raise BadRequest(422, "invalid", f"{name} has {len(value)} entries: must have at most {MAX_ENTRIES}", name)
    for key, entry in value.items():
        if not key.strip() or len(key) > MAX_ENTRY_NAME or not key.isprintable():
            raise wrong(name, key, f"have names of 1 to {MAX_ENTRY_NAME} printable characters")
        if isinstance(entry, bool) or not isinstance(entry, int) or not 0 <= entry <= MAX_BYTES:
            said = wrong(key, entry, f"be a whole number of bytes from 0 to {MAX_BYTES}").message
            raise BadRequest(422, "invalid", f"{name}: {said}", name)
    return value
