"""ComfyUI's websockets: who is told what (server.py:websocket_handler, send_sync)."""

from __future__ import annotations

import asyncio
import json
import struct
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

PREVIEW_IMAGE = 1
"""Type of a binary message (protocol.py:BinaryEventTypes)."""
PNG = 2
"""Format of its image; 1 would be JPEG."""


class Sockets:
    """One outbox for each client id. Binary messages are pictures of a sampling step."""

    def __init__(self, status: Callable[[], dict[str, Any]], features: Callable[[], dict[str, Any]]) -> None:
        self._status = status
        self._features = features
        self._outboxes: dict[str, asyncio.Queue[str | bytes]] = {}

    def send(self, event: str, data: dict[str, Any], client_id: str | None) -> None:
        """To one client's newest socket, or to every socket when the client is None."""
        self._put(json.dumps({"type": event, "data": data}), client_id)

    def send_preview(self, picture: bytes, client_id: str | None) -> None:
        self._put(struct.pack(">II", PREVIEW_IMAGE, PNG) + picture, client_id)

    def _put(self, message: str | bytes, client_id: str | None) -> None:
        if client_id is None:
            for outbox in self._outboxes.values():
                outbox.put_nowait(message)
        elif client_id in self._outboxes:
            self._outboxes[client_id].put_nowait(message)

    async def serve(self, websocket: WebSocket, unstalled: Callable[[], Awaitable[None]]) -> None:
        """Every socket gets `status`, the newest one of a prompt's client the rest; there is no heartbeat."""
        await websocket.accept()
        sid = websocket.query_params.get("clientId") or uuid.uuid4().hex
        outbox: asyncio.Queue[str | bytes] = asyncio.Queue()
        self._outboxes[sid] = outbox
        outbox.put_nowait(json.dumps({"type": "status", "data": self._status() | {"sid": sid}}))
        sender = asyncio.ensure_future(_deliver(websocket, outbox, unstalled))
        try:
            while True:
                hello = json.loads(await websocket.receive_text())
                if hello.get("type") == "feature_flags":
                    outbox.put_nowait(json.dumps({"type": "feature_flags", "data": self._features()}))
        except (WebSocketDisconnect, ValueError):
            pass
        finally:
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)
            self._outboxes.pop(sid, None)  # also when a namesake has taken over: that one falls silent


async def _deliver(
    websocket: WebSocket, outbox: asyncio.Queue[str | bytes], unstalled: Callable[[], Awaitable[None]]
) -> None:
    while True:
        message = await outbox.get()
        await unstalled()
        if isinstance(message, bytes):
            await websocket.send_bytes(message)
        else:
            await websocket.send_text(message)
