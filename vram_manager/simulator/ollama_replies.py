"""How Ollama reads requests and words refusals (server/routes.go:handleScheduleError)."""

from __future__ import annotations

import importlib
import json
from collections.abc import Awaitable
from typing import Any, TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from vram_manager.simulator.asgi import Disconnected, unless_disconnected
from vram_manager.simulator.ollama_library import keep_alive_seconds
from vram_manager.simulator.ollama_runner import RunnerOptions

T = TypeVar("T")
UNPACKED_LIMIT_BYTES = 20 * 1024 * 1024
"""What a zstd body under /v1 may become."""

_V1_ERROR_TYPES = {400: "invalid_request_error", 404: "not_found_error"}
_ANTHROPIC_ERROR_TYPES = _V1_ERROR_TYPES | {503: "overloaded_error"}


class Refused(Exception):
    """An error reply: a status and the text of its `error`."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status
        self.why = why


def runner_options(body: dict[str, Any]) -> RunnerOptions:
    options = body.get("options") or {}
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
    if request.headers.get("content-encoding") == "zstd" and request.url.path.startswith("/v1/"):
        raw = _unpacked(raw)
    try:
        body = json.loads(raw)
    except ValueError as error:
        raise Refused(400, f"invalid JSON: {error}") from error
    if not isinstance(body, dict):
        raise Refused(400, "json: cannot unmarshal into Go value")
    return body


def _unpacked(packed: bytes) -> bytes:
    """The content of a zstd body; a 400 when it is none, too large, or this Python has no zstandard."""
    try:
        zstandard = importlib.import_module("zstandard")
    except ImportError as error:
        raise Refused(400, "zstd is not installed in this simulator") from error
    try:
        content: bytes = zstandard.ZstdDecompressor().decompressobj().decompress(packed)
    except zstandard.ZstdError as error:
        raise Refused(400, f"invalid zstd body: {error}") from error
    if len(content) > UNPACKED_LIMIT_BYTES:
        raise Refused(400, "http: request body too large")
    return content


def text_of(body: dict[str, Any]) -> str:
    """The beginning of the last text a body carries, wherever its endpoint has it."""
    said = body.get("prompt") or body.get("input") or body.get("messages") or ""
    while not isinstance(said, str):
        if isinstance(said, list):
            said = said[-1] if said else ""
        elif isinstance(said, dict):
            said = said.get("content") or said.get("text") or ""
        else:
            said = ""
    return said[:200]


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    async def working() -> T:
        return await work

    try:
        return await unless_disconnected(request.receive, working())
    except Disconnected:
        raise Refused(499, "request canceled") from None


async def refusal(request: Request, error: Exception) -> Response:
    """In the shape of the endpoint's family: Ollama's own, OpenAI's or Anthropic's."""
    assert isinstance(error, Refused)
    if request.url.path.startswith("/v1/messages"):
        kind = _ANTHROPIC_ERROR_TYPES.get(error.status, "api_error")
        said = {"type": kind, "message": error.why}
        return JSONResponse({"type": "error", "error": said, "request_id": "req_1"}, error.status)
    if request.url.path.startswith("/v1/"):
        kind = _V1_ERROR_TYPES.get(error.status, "api_error")
        v1 = {"message": error.why, "type": kind, "param": None, "code": None}
        return JSONResponse({"error": v1}, error.status)
    return JSONResponse({"error": error.why}, error.status)


async def not_routed(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text = "405 method not allowed" if error.status_code == 405 else "404 page not found"
    return PlainTextResponse(text, error.status_code)
