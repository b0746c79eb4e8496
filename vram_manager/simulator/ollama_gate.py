"""Whom Ollama answers (server/routes.go:allowedHostsMiddleware and gin-contrib/cors): Host and Origin."""

from __future__ import annotations

import ipaddress
import re
import socket
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# envconfig/config.go:AllowedOrigins, and browser extensions.
_ALLOWED_ORIGIN = re.compile(
    r"https?://(localhost|127\.0\.0\.1|0\.0\.0\.0)(:.*)?"
    r"|(app|file|tauri|vscode-webview|vscode-file)://.*"
    r"|(chrome|safari|moz|ms-browser)-extension://.*"
)


class Gate:
    """In front of every route. The Host is only checked by a server that listens on loopback."""

    def __init__(self, inner: ASGIApp, *, loopback: bool) -> None:
        self._inner = inner
        self._loopback = loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin", "")
        foreign = bool(origin) and origin not in {f"http://{host}", f"https://{host}"}
        if (foreign and not _ALLOWED_ORIGIN.fullmatch(origin)) or (self._loopback and not _is_ours(host)):
            await Response(status_code=403)(scope, receive, send)
            return

        async def send_allowed(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["access-control-allow-origin"] = origin
            await send(message)

        sending = send_allowed if foreign else send
        if foreign and scope.get("method") == "OPTIONS":
            allowed = {"access-control-allow-methods": "GET,POST,PUT,PATCH,DELETE,HEAD,OPTIONS"}
            await Response(status_code=204, headers=allowed)(scope, receive, sending)
        else:
            await self._inner(scope, receive, sending)


def _is_ours(host: str) -> bool:
    """An address that cannot be a stranger's, or a name that only this network resolves."""
    name = (urlsplit(f"//{host}").hostname or "").lower()
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        own = {"", "localhost", socket.gethostname().lower()}
        return name in own or name.endswith((".localhost", ".local", ".internal"))
    return address.is_loopback or address.is_private or address.is_unspecified
