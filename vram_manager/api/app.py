"""The routes of what is seen and of the manual free; those of admission and of workers stand in their own files."""

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
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from vram_manager.admissions import CHECK_LOOK_SECONDS
from vram_manager.api import fields, page, views, workers
from vram_manager.api.admissions import AdmissionRoutes
from vram_manager.api.fields import BadRequest, JSONResponse, error
from vram_manager.api.history import HistoryRoute
from vram_manager.api.openapi import DOCUMENT
from vram_manager.clock import Clock
from vram_manager.cycle import Cycle
from vram_manager.domain.action import Action, FreeComfyUI, Stage, UnloadModel
from vram_manager.domain.decision import ManualFree
from vram_manager.floors import Floors
from vram_manager.gateway.waiting import Waiter
from vram_manager.history import History
from vram_manager.journal import Entry, Journal, as_json
from vram_manager.nodes import Nodes
from vram_manager.observer import Observer
from vram_manager.tenants import Tenants
from vram_manager.workers import Workers

MAX_LIMIT = 1000
# A comment line now and then shows a proxy that the stream lives, and shows us that the reader is gone.
KEEP_ALIVE_SECONDS = 15.0

Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What the routes look at."""

    clock: Clock
    cycle: Cycle
    observer: Observer
    journal: Journal
    metrics: Callable[[], bytes]
    admissions: AdmissionRoutes
    workers: Workers
    held: Callable[[], tuple[Waiter, ...]]
    tenants: Tenants
    history: History
    floors: Floors
    nodes: Nodes


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
            # First what workers ask in every step of their work: routes are tried in this order.
            *workers.routes(parts.workers, guarded, parts.observer.look_again),
            *parts.admissions.routes(guarded),
            Route("/health", routes.health),
            Route("/ready", routes.ready),
            Route("/health/vram", routes.health_vram),
            Route("/v1/snapshot", routes.snapshot),
            Route("/v1/events", routes.events),
            Route("/v1/decisions", routes.decisions),
            Route("/v1/history", HistoryRoute(parts.clock, parts.history, parts.journal).get),
            Route("/v1/free", guarded(routes.free), methods=["POST"]),
            Route("/metrics", routes.metrics),
            Route("/openapi.json", routes.openapi),
            *page.routes(),
        ],
        exception_handlers={BadRequest: fields.bad_request, HTTPException: _http_error},
    )


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
        if self._parts.cycle.snapshot is None:
            return JSONResponse(views.health_vram(None))
        # Workers decide by it: the last turn may be as old as the slowest beat.
        await self._parts.observer.look_again(CHECK_LOOK_SECONDS)
        return JSONResponse(views.health_vram(self._parts.observer.known()))

    async def snapshot(self, request: Request) -> Response:
        leases = self._parts.admissions.views()
        now = self._parts.clock.monotonic()
        held = [views.waiter(one, now) for one in self._parts.held()]
        seen = views.snapshot(self._parts.clock, self._parts.cycle, self._parts.tenants.now())
        further = {
            "leases": leases,
            "line": self._parts.admissions.line(),
            "held": held,
            "nodes": self._parts.nodes.views(),
            "floors": self._parts.floors.views(),
        }
        return JSONResponse(seen | further)

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
        body = await fields.json_body(request)
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
    fields.no_others(body, ("target", "stage", "force", "model"))
    for name, value in body.items():
        if value is None:
            raise fields.wrong(name, value, "be left out, or have a value")
    force = fields.flag(body, "force")
    if fields.one_of(body, "target", ("comfyui", "ollama")) == "ollama":
        model = body.get("model")
        if not isinstance(model, str) or not model:
            raise fields.wrong("model", model, "name a loaded model")
        return UnloadModel(model=model, forced=force), force
    if "model" in body:
        raise BadRequest(422, "invalid", "model is for target ollama: ComfyUI is freed as a whole", "model")
    stage = fields.one_of(body, "stage", ("soft", "unload"))
    return FreeComfyUI(stage=Stage(stage or "soft"), forced=force), force


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
