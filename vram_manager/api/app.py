"""The routes. Each answers from the last turn; only `POST /v1/free` asks for something."""

from __future__ import annotations

import asyncio
import hmac
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from vram_manager.api import views
from vram_manager.api.openapi import DOCUMENT
from vram_manager.clock import Clock
from vram_manager.cycle import Cycle
from vram_manager.domain.action import Action, FreeComfyUI, Stage, UnloadModel
from vram_manager.domain.decision import ManualFree
from vram_manager.journal import Entry, Journal, as_json
from vram_manager.observer import Observer

MAX_BODY_BYTES = 1 << 20
MAX_LIMIT = 1000
# A comment line now and then shows a proxy that the stream lives, and shows us that the reader is gone.
KEEP_ALIVE_SECONDS = 15.0

Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Parts:
    """What the routes look at."""

    clock: Clock
    cycle: Cycle
    observer: Observer
    journal: Journal
    metrics: Callable[[], bytes]


class JSONResponse(Response):
    """JSON in ASCII: a name from outside that UTF-8 cannot say must not turn an answer into a 500."""

    media_type = "application/json"

    def render(self, content: object) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


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


def app(parts: Parts, *, token: str | None, trusted: bool) -> Starlette:
    """The application. On the socket the file's mode is the lock (`trusted`); over TCP changes need the token."""
    routes = _Routes(parts)

    def guarded(handler: Handler) -> Handler:
        async def checked(request: Request) -> Response:
            if not trusted:
                given = request.headers.get("authorization", "")
                if token is None:
                    return error(403, "read_only", "this port is read-only: set VRAM_API_TOKEN, or use the socket")
                # Starlette reads headers as Latin-1, whatever they were written in.
                if not hmac.compare_digest(given.encode("latin-1"), f"Bearer {token}".encode()):
                    return error(401, "unauthorized", "needs the header Authorization: Bearer <VRAM_API_TOKEN>")
            return await handler(request)

        return checked

    return Starlette(
        routes=[
            Route("/health", routes.health),
            Route("/ready", routes.ready),
            Route("/health/vram", routes.health_vram),
            Route("/v1/snapshot", routes.snapshot),
            Route("/v1/events", routes.events),
            Route("/v1/decisions", routes.decisions),
            Route("/v1/free", guarded(routes.free), methods=["POST"]),
            Route("/metrics", routes.metrics),
            Route("/openapi.json", routes.openapi),
        ],
        exception_handlers={BadRequest: _bad_request, HTTPException: _http_error},
    )


async def _bad_request(request: Request, problem: Exception) -> Response:
    assert isinstance(problem, BadRequest)
    return error(problem.status, problem.kind, problem.message, problem.field)


async def _http_error(request: Request, problem: Exception) -> Response:
    assert isinstance(problem, HTTPException)
    kind = {404: "not_found", 405: "method_not_allowed"}.get(problem.status_code, "bad_request")
    answer = error(problem.status_code, kind, f"{request.method} {request.url.path}: {problem.detail}")
    answer.headers.update(problem.headers or {})
    return answer


class _Routes:
    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    async def health(self, request: Request) -> Response:
        body, stalled = views.health(self._parts.clock, self._parts.cycle, self._parts.observer)
        return JSONResponse(body, status_code=503 if stalled else 200)

    async def ready(self, request: Request) -> Response:
        ready = self._parts.cycle.snapshot is not None
        return JSONResponse({"ready": ready}, status_code=200 if ready else 503)

    async def health_vram(self, request: Request) -> Response:
        return JSONResponse(views.health_vram(self._parts.cycle.snapshot))

    async def snapshot(self, request: Request) -> Response:
        return JSONResponse(views.snapshot(self._parts.clock, self._parts.cycle))

    async def decisions(self, request: Request) -> Response:
        limit = _number(request, "limit", default=50)
        return JSONResponse({"decisions": [views.decision(entry) for entry in self._parts.journal.decisions(limit)]})

    async def events(self, request: Request) -> Response:
        after, limit = _event_number(request), _number(request, "limit", default=100)
        journal = self._parts.journal
        if "text/event-stream" in request.headers.get("accept", ""):
            return StreamingResponse(self._follow(after), media_type="text/event-stream")
        return JSONResponse({"events": [as_json(entry) for entry in journal.events(after or 0, limit)]})

    async def _follow(self, after: int | None) -> AsyncIterator[str]:
        journal = self._parts.journal
        async with journal.following() as queue:
            # Taken at the moment from which the queue has everything: nothing is missed, nothing comes twice.
            for entry in [] if after is None else journal.events(after):
                yield _message(entry)
            while True:
                try:
                    async with asyncio.timeout(KEEP_ALIVE_SECONDS):
                        newer = await queue.get()
                except TimeoutError:
                    yield ": still here\n\n"
                    continue
                if newer is None:
                    return
                yield _message(newer)

    async def free(self, request: Request) -> Response:
        body = await _json_body(request)
        action, force = _wish(body)
        answer = await self._parts.cycle.free(ManualFree(action=action, force=force))
        if not answer.accepted:
            return error(409, "not_now", answer.why)
        return JSONResponse({"accepted": True, "event_id": answer.event_id}, status_code=202)

    async def metrics(self, request: Request) -> Response:
        return Response(self._parts.metrics(), media_type="text/plain; version=0.0.4")

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(DOCUMENT)


def _message(entry: Entry) -> str:
    return f"id: {entry.id}\ndata: {json.dumps(as_json(entry))}\n\n"


def _wish(body: dict[str, Any]) -> tuple[Action, bool]:
    target, stage, force = body.get("target", "comfyui"), body.get("stage", "soft"), body.get("force", False)
    unknown = sorted(body.keys() - {"target", "stage", "force", "model"})
    if unknown:
        raise BadRequest(422, "invalid", f"{unknown[0]} is not a field of this request", unknown[0])
    if not isinstance(force, bool):
        raise BadRequest(422, "invalid", f"force is {json.dumps(force)}: must be true or false", "force")
    if target == "ollama":
        model = body.get("model")
        if not isinstance(model, str) or not model:
            raise BadRequest(422, "invalid", f"model is {json.dumps(model)}: must name a loaded model", "model")
        return UnloadModel(model=model, forced=force), force
    if target != "comfyui":
        raise BadRequest(422, "invalid", f"target is {json.dumps(target)}: must be comfyui or ollama", "target")
    if "model" in body:
        raise BadRequest(422, "invalid", "model is for target ollama: ComfyUI is freed as a whole", "model")
    if stage not in ("soft", "unload"):
        raise BadRequest(422, "invalid", f"stage is {json.dumps(stage)}: must be soft or unload", "stage")
    return FreeComfyUI(stage=Stage(stage), forced=force), force


async def _json_body(request: Request) -> dict[str, Any]:
    raw = bytearray()
    try:
        async for chunk in request.stream():
            raw += chunk
            if len(raw) > MAX_BODY_BYTES:
                raise BadRequest(413, "too_large", f"the body is larger than {MAX_BODY_BYTES} bytes")
    except ClientDisconnect as gone:
        raise BadRequest(400, "disconnected", "the client went away") from gone
    try:
        body = json.loads(raw or b"{}")
    except (ValueError, RecursionError) as problem:
        raise BadRequest(400, "bad_json", f"the body is not JSON: {problem}") from problem
    if not isinstance(body, dict):
        raise BadRequest(422, "invalid", "the body must be a JSON object")
    return body


def _number(request: Request, name: str, *, default: int) -> int:
    text = request.query_params.get(name)
    if text is None:
        return default
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < 1:
        raise BadRequest(422, "invalid", f"{name} is {text!r}: must be a number from 1 to {MAX_LIMIT}", name)
    return min(int(text), MAX_LIMIT)


def _event_number(request: Request) -> int | None:
    """`after` is an event's id, or the number in it; a browser that comes back says in a header how far it got."""
    text = request.headers.get("last-event-id") or request.query_params.get("after")
    if not text:
        return None
    found = re.fullmatch(r"(?:[a-z]+-)?([0-9]{1,15})", text)
    if found is None:
        raise BadRequest(422, "invalid", f"after is {text!r}: must be the id of an event, such as free-0412", "after")
    return int(found[1])
