"""How Ollama reads requests and words refusals (server/routes.go:handleScheduleError)."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from typing import Any, TypeAlias, TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from vram_manager.simulator.asgi import Disconnected, unless_disconnected
from vram_manager.simulator.ollama_library import keep_alive_seconds
from vram_manager.simulator.ollama_runner import LoadFailed, QueueFull, RunnerOptions

T = TypeVar("T")
Lines: TypeAlias = AsyncGenerator[dict[str, Any], None]
_V1_ERROR_TYPES = {400: "invalid_request_error", 404: "not_found_error"}


class Refused(Exception):
    """An error reply: a status and the text of its `error`."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status
        self.why = why


def runner_options(options: dict[str, Any]) -> RunnerOptions:
    return RunnerOptions(num_ctx=options.get("num_ctx"), num_gpu=options.get("num_gpu"))


def keep_alive_of(body: dict[str, Any]) -> float | None:
    try:
        return keep_alive_seconds(body.get("keep_alive"))
    except ValueError as error:
        raise Refused(400, str(error)) from error


async def body_of(request: Request) -> dict[str, Any]:
    raw = await request.body()
    if not raw:
        raise Refused(400, "missing request body")
    try:
        body = json.loads(raw)
    except ValueError as error:
        raise Refused(400, f"invalid JSON: {error}") from error
    if not isinstance(body, dict):
        raise Refused(400, "json: cannot unmarshal into Go value")
    return body


async def loaded(request: Request, lines: Lines) -> None:
    """The model is loaded, or the reply says why not; a client that hangs up meanwhile aborts the load."""
    try:
        await unless_gone(request, anext(lines))
    except QueueFull:
        raise Refused(503, "server busy, please try again.  maximum pending requests exceeded") from None
    except LoadFailed as error:
        raise Refused(500, str(error)) from error
    except BaseException:
        await lines.aclose()
        raise


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    async def working() -> T:
        return await work

    try:
        return await unless_disconnected(request.receive, working())
    except Disconnected:
        raise Refused(499, "request canceled") from None


async def ndjson(lines: Lines) -> AsyncGenerator[bytes, None]:
    async with aclosing(lines):
        async for line in lines:
            yield json.dumps(line).encode() + b"\n"


async def joined(lines: Lines, verb: str) -> dict[str, Any]:
    """All lines as one reply: the text of every line, the numbers of the last."""
    text, last = "", dict[str, Any]()
    async for last in lines:
        text += last["message"]["content"] if verb == "chat" else last["response"]
    if verb == "chat":
        last["message"]["content"] = text
    else:
        last["response"] = text
    return last


async def refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    if request.url.path.startswith("/v1/"):
        kind = _V1_ERROR_TYPES.get(error.status, "api_error")
        v1 = {"message": error.why, "type": kind, "param": None, "code": None}
        return JSONResponse({"error": v1}, error.status)
    return JSONResponse({"error": error.why}, error.status)


async def not_routed(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text = "405 method not allowed" if error.status_code == 405 else "404 page not found"
    return PlainTextResponse(text, error.status_code)
