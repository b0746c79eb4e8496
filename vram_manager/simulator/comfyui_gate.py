"""What stands before and around ComfyUI's routes: the stall, the origin check, and its ways to say no."""

from __future__ import annotations

import ipaddress
import json
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

from vram_manager.simulator.comfyui_worker import Worker


class Trouble(Exception):
    """A handler raised: aiohttp answers 500 in plain text."""


class Gate:
    """In front of every route: the worker runs, a garbage collection stalls, a foreign origin gets a 403."""

    def __init__(self, inner: ASGIApp, worker: Worker, *, checks_fetch_site: bool) -> None:
        self._inner = inner
        self._worker = worker
        self._checks_fetch_site = checks_fetch_site

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._worker.start()
        await self._worker.unstalled()
        forbidden = self._forbids(Headers(scope=scope))
        if forbidden and scope["type"] == "websocket":
            await WebSocket(scope, receive, send).close()  # before it is accepted: HTTP 403
        elif forbidden:
            await Response(status_code=403)(scope, receive, send)
        elif scope["type"] == "http" and scope["method"] == "OPTIONS":
            await Response()(scope, receive, send)
        else:
            await self._inner(scope, receive, send)

    def _forbids(self, headers: Headers) -> bool:
        """server.py:create_origin_only_middleware: a foreign page must not drive a ComfyUI on loopback.

        Sec-Fetch-Site counts since ComfyUI pull 13261 (April 2026).
        """
        if self._checks_fetch_site and headers.get("sec-fetch-site") == "cross-site":
            return True
        host, origin = headers.get("host", ""), urlsplit(headers.get("origin", "")).netloc
        return bool(origin) and _is_loopback(host) and host.lower() != origin.lower()


def _is_loopback(host: str) -> bool:
    name = urlsplit(f"//{host}").hostname or ""
    try:
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


async def object_of(request: Request) -> dict[str, Any]:
    """The body as a JSON object, whatever its content type; anything else raises in the real handlers."""
    try:
        body = json.loads(await request.body())
    except ValueError as wrong:
        raise Trouble from wrong
    if not isinstance(body, dict):
        raise Trouble
    return body


async def trouble(request: Request, error: Exception) -> Response:
    return PlainTextResponse("500 Internal Server Error\n\nServer got itself in trouble", 500)


async def not_routed(request: Request, error: Exception) -> Response:
    """A static route at / takes every GET, so an unknown path is a 404 to GET and a 405 to anything else."""
    if request.method in {"GET", "HEAD"}:
        return Response(status_code=404)
    return PlainTextResponse("405: Method Not Allowed", 405)
