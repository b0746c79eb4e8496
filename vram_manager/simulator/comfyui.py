"""A ComfyUI that answers as the real one does, on a simulated GPU."""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp
from starlette.websockets import WebSocket

from vram_manager.simulator.comfyui_executor import ComfyUICounters, ComfyUISettings, Executor
from vram_manager.simulator.comfyui_files import Invalid, ModelFile, error, object_info, validate
from vram_manager.simulator.comfyui_gate import Gate, Trouble, not_routed, object_of, trouble
from vram_manager.simulator.comfyui_memory import ComfyUIMemory, Mode
from vram_manager.simulator.comfyui_pictures import Pictures
from vram_manager.simulator.comfyui_queue import PromptQueue, QueueItem
from vram_manager.simulator.comfyui_sockets import Sockets
from vram_manager.simulator.comfyui_worker import Worker
from vram_manager.simulator.ledger import GIB, Ledger

RAM_BYTES = 64 * GIB
REMEMBERED = 100_000
"""Prompts of which a record is kept."""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>ComfyUI</title></head><body>A simulated ComfyUI</body></html>
"""

_ARGV: dict[Mode, list[str]] = {
    "legacy": ["main.py", "--listen", "--disable-dynamic-vram"],
    "highvram": ["main.py", "--listen", "--highvram"],
    "dynamic": ["main.py", "--listen"],
}
_FEATURES_2026 = {
    "supports_preview_metadata": True,
    "supports_model_type_tags": True,
    "max_upload_size": 104857600,
    "extension": {"manager": {"supports_v4": True}},
    "node_replacements": True,
    "assets": False,
}


class SimulatedComfyUI:
    """`app` is the server; `memory`, `queue`, `pictures` and `counters` are the truth behind it.

    `accepted` has the id of every accepted prompt, in the order in which they were accepted.
    `dead_worker = True` leaves HTTP alive while nothing runs any more (ComfyUI issue 16312).
    Replies differ between the two versions they were checked against, 0.3.64 and 0.33.0; a version from
    0.20 on gets the latter's.
    """

    def __init__(
        self,
        ledger: Ledger,
        files: Iterable[ModelFile],
        *,
        version: str = "0.33.0",
        mode: Mode = "legacy",
        argv: Sequence[str] | None = None,
        settings: ComfyUISettings = ComfyUISettings(),  # noqa: B008 - frozen
        utcnow: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.version = version
        self.argv = list(_ARGV[mode] if argv is None else argv)
        self.files = list(files)
        self.memory = ComfyUIMemory(ledger, mode, settings.context_bytes)
        self.queue = PromptQueue(self._queue_updated)
        self.pictures = Pictures()
        self.accepted: deque[str] = deque(maxlen=REMEMBERED)
        self._sockets = Sockets(self._status, self._feature_flags)
        self.executor = Executor(self.memory, self.files, settings, self._sockets, self.pictures, utcnow)
        self._utcnow = utcnow
        self._is_2026 = tuple(int(part) for part in version.split(".")[:2]) >= (0, 20)
        self._posted = 0
        self.worker = Worker(self.queue, self.executor, settings, self._sockets.send)
        routes: list[tuple[str, Any, str]] = [
            ("/system_stats", self._system_stats, "GET"),
            ("/queue", self._get_queue, "GET"),
            ("/queue", self._post_queue, "POST"),
            ("/prompt", self._get_prompt, "GET"),
            ("/prompt", self._post_prompt, "POST"),
            ("/free", self._free, "POST"),
            ("/interrupt", self._interrupt, "POST"),
            ("/history", self._history, "GET"),
            ("/history/{prompt_id}", self._history, "GET"),
            ("/features", self._features, "GET"),
            ("/experiment/models/{folder}", self._models, "GET"),
            ("/object_info", self._object_info, "GET"),
            ("/object_info/{node}", self._object_info, "GET"),
            ("/upload/image", self.pictures.upload, "POST"),
            ("/view", self.pictures.view, "GET"),
        ]
        starlette = Starlette(
            routes=[
                Route(prefix + path, handler, methods=[method])
                for prefix in ("", "/api")
                for path, handler, method in routes
            ]
            + [Route("/", self._page, methods=["GET"])]
            + [WebSocketRoute(prefix + "/ws", self._websocket) for prefix in ("", "/api")],
            exception_handlers={Trouble: trouble, HTTPException: not_routed},
        )
        starlette.router.redirect_slashes = False
        self.app: ASGIApp = Gate(starlette, self.worker, checks_fetch_site=self._is_2026)

    @property
    def counters(self) -> ComfyUICounters:
        return self.executor.counters

    @property
    def dead_worker(self) -> bool:
        return self.queue.dead

    @dead_worker.setter
    def dead_worker(self, dead: bool) -> None:
        self.queue.dead = dead

    async def close(self) -> None:
        await self.worker.close()

    # -- sockets

    def _queue_updated(self) -> None:
        self._sockets.send("status", self._status(), None)

    def _status(self) -> dict[str, Any]:
        return {"status": {"exec_info": {"queue_remaining": self.queue.remaining}}}

    async def _websocket(self, websocket: WebSocket) -> None:
        await self._sockets.serve(websocket, self.worker.unstalled)

    # -- routes

    async def _system_stats(self, request: Request) -> Response:
        """devices[]: torch's numbers and cudaMemGetInfo, free being device-wide plus torch's own cache."""
        memory = self.memory
        if memory.ledger.lost:
            raise Trouble  # cudaMemGetInfo raises
        system: dict[str, Any] = {
            "os": "linux" if self._is_2026 else "posix",
            "ram_total": RAM_BYTES,
            "ram_free": RAM_BYTES * 3 // 4,
            "comfyui_version": self.version,
            "required_frontend_version": "1.49.6",
            "installed_templates_version": "0.11.44",
            "required_templates_version": "0.11.44",
        }
        if self._is_2026:
            aimdo = {"name": "comfy-aimdo", "installed": "0.4.13", "required": "0.4.13"}
            system["comfy_package_versions"] = [aimdo]
        system |= {
            "python_version": "3.11.7 (main)",
            "pytorch_version": "2.9.0+cu128",
            "embedded_python": False,
        }
        if self._is_2026:
            system["deploy_environment"] = "local-git"
        device = {
            "name": f"cuda:0 {memory.ledger.name} : cudaMallocAsync",
            "type": "cuda",
            "index": 0,
            "vram_total": memory.ledger.usable_bytes,
            "vram_free": memory.ledger.free_bytes + memory.cached_bytes,
            "torch_vram_total": memory.torch_total_bytes,
            "torch_vram_free": memory.cached_bytes,
        }
        return JSONResponse({"system": system | {"argv": self.argv}, "devices": [device]})

    async def _get_queue(self, request: Request) -> Response:
        running = [] if self.queue.running is None else [self.queue.running.as_json()]
        pending = [item.as_json() for item in self.queue.pending]
        return JSONResponse({"queue_running": running, "queue_pending": pending})

    async def _post_queue(self, request: Request) -> Response:
        body = await object_of(request)
        if body.get("clear"):
            self.queue.clear()
        for prompt_id in body.get("delete", ()):
            self.queue.delete(prompt_id)
        return Response()

    async def _get_prompt(self, request: Request) -> Response:
        return JSONResponse({"exec_info": {"queue_remaining": self.queue.remaining}})

    async def _post_prompt(self, request: Request) -> Response:
        body = await object_of(request)
        if "prompt" not in body:
            return _invalid(Invalid(error("no_prompt", "No prompt provided", "No prompt provided"), {}))
        prompt_id = str(body.get("prompt_id") or uuid.uuid4())
        if self._is_2026 and not _is_uuid(prompt_id):
            details = "prompt_id must be a UUID string in canonical lowercase hyphenated form"
            return _invalid(Invalid(error("invalid_prompt_id", "prompt_id must be a valid UUID", details), {}))
        outputs = validate(body["prompt"], self.files, names_missing_nodes=self._is_2026)
        if isinstance(outputs, Invalid):
            return _invalid(outputs)
        number = float(body["number"]) if "number" in body else self._posted
        self._posted += "number" not in body
        extra_data = dict(body.get("extra_data") or {})
        if "client_id" in body:
            extra_data["client_id"] = body["client_id"]
        extra_data["create_time"] = int(self._utcnow().timestamp() * 1000)
        if body.get("front"):
            number = -number
        self.accepted.append(prompt_id)
        self.queue.put(QueueItem(number, prompt_id, body["prompt"], extra_data, outputs))
        return JSONResponse({"prompt_id": prompt_id, "number": number, "node_errors": {}})

    async def _free(self, request: Request) -> Response:
        """server.py:post_free. Only truthy keys are kept, so `unload_models: false` cannot veto anything."""
        body = await object_of(request)
        self.counters.frees_posted += 1
        self.counters.frees_posted_while_busy += self.queue.remaining > 0
        for name in ("unload_models", "free_memory"):
            if body.get(name, False):
                self.queue.set_flag(name)
        return Response()

    async def _interrupt(self, request: Request) -> Response:
        try:
            body = await object_of(request)
        except Trouble:
            body = {}
        running = self.queue.running
        wanted = body.get("prompt_id")
        if wanted is None or (running is not None and running.prompt_id == wanted):
            self.executor.interrupted = True
        return Response()

    async def _history(self, request: Request) -> Response:
        prompt_id = request.path_params.get("prompt_id")
        history = self.queue.history
        if prompt_id is not None:
            return JSONResponse({prompt_id: history[prompt_id]} if prompt_id in history else {})
        newest = int(request.query_params.get("max_items", len(history)))
        return JSONResponse(dict(list(history.items())[-newest:] if newest else ()))

    async def _features(self, request: Request) -> Response:
        return JSONResponse(self._feature_flags())

    def _feature_flags(self) -> dict[str, Any]:
        if self._is_2026:
            return _FEATURES_2026
        return {"supports_preview_metadata": True, "max_upload_size": 104857600}

    async def _page(self, request: Request) -> Response:
        return HTMLResponse(PAGE)

    async def _object_info(self, request: Request) -> Response:
        return JSONResponse(object_info(self.files, request.path_params.get("node")))

    async def _models(self, request: Request) -> Response:
        folder = request.path_params["folder"]
        changed_at = 1795252167.6068637
        return JSONResponse(
            [
                {
                    "name": file.name,
                    "pathIndex": 0,
                    "modified": changed_at,
                    "created": changed_at,
                    "size": file.size_bytes,
                }
                for file in self.files
                if file.folder == folder
            ]
        )


def _invalid(invalid: Invalid) -> Response:
    return JSONResponse(invalid.reply(), 400)


def _is_uuid(text: str) -> bool:
    try:
        return str(uuid.UUID(text)) == text
    except ValueError:
        return False
