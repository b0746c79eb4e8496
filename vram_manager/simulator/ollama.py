"""An Ollama that answers as the real one does (era of llama-server, v0.30 and later), on a simulated GPU."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from vram_manager.simulator.ledger import Ledger
from vram_manager.simulator.ollama_events import EventsApi
from vram_manager.simulator.ollama_gate import Gate
from vram_manager.simulator.ollama_library import OllamaModel, rfc3339
from vram_manager.simulator.ollama_native import NativeApi
from vram_manager.simulator.ollama_replies import Refused, not_routed, refusal
from vram_manager.simulator.ollama_runner import OllamaCounters, OllamaSettings, Runner
from vram_manager.simulator.ollama_scheduler import Scheduler
from vram_manager.simulator.ollama_store import StoreApi
from vram_manager.simulator.ollama_v1 import OpenAiApi
from vram_manager.simulator.ollama_work import Asked, Served, Work


def utcnow() -> datetime:
    return datetime.now(UTC)


class SimulatedOllama:
    """`app` is the server; `scheduler`, `counters`, `asked` and `served` are the truth behind it.

    `version` decides what /api/ps shows: before 0.30 a model is listed from its spawn, later only when it is
    loaded; from 0.32.4 on the list waits for unloads in progress. `loopback`: it refuses foreign Host names,
    as one that listens on loopback only.
    """

    def __init__(
        self,
        ledger: Ledger,
        models: Iterable[OllamaModel],
        *,
        version: str = "0.32.15",
        settings: OllamaSettings = OllamaSettings(),  # noqa: B008 - frozen
        gpu_tokens_per_second: float = 60.0,
        cpu_tokens_per_second: float = 4.0,
        reply_tokens: int = 48,
        loopback: bool = False,
        utcnow: Callable[[], datetime] = utcnow,
    ) -> None:
        self.version = version
        self.scheduler = Scheduler(ledger, settings, utcnow)
        self.work = Work(
            self.scheduler,
            models,
            gpu_tokens_per_second=gpu_tokens_per_second,
            cpu_tokens_per_second=cpu_tokens_per_second,
            reply_tokens=reply_tokens,
            utcnow=utcnow,
        )
        self.store = StoreApi(self.work)
        self._version = tuple(int(part) for part in version.partition("-")[0].split("."))
        starlette = Starlette(
            routes=[
                Route("/", self._root),
                Route("/api/version", self._get_version),
                Route("/api/status", self._status),
                Route("/api/ps", self._ps),
                *self.store.routes(),
                *NativeApi(self.work).routes(),
                *OpenAiApi(self.work).routes(),
                *EventsApi(self.work).routes(),
            ],
            exception_handlers={Refused: refusal, HTTPException: not_routed},
        )
        starlette.router.redirect_slashes = False
        self.app: ASGIApp = Gate(starlette, loopback=loopback)

    @property
    def counters(self) -> OllamaCounters:
        return self.scheduler.counters

    @property
    def models(self) -> dict[str, OllamaModel]:
        """By full tag; `/api/create`, `/api/copy` and `/api/delete` change it."""
        return self.work.models

    @property
    def asked(self) -> deque[Asked]:
        """Every request for a model, in the order in which they arrived."""
        return self.work.asked

    @property
    def served(self) -> deque[Served]:
        """Every request that got words, in the order in which it was given a loaded model."""
        return self.work.served

    async def close(self) -> None:
        await self.scheduler.close()

    async def _root(self, request: Request) -> Response:
        return PlainTextResponse("Ollama is running")

    async def _get_version(self, request: Request) -> Response:
        return JSONResponse({"version": self.version})

    async def _status(self, request: Request) -> Response:
        return JSONResponse({"cloud": {"disabled": False, "source": "none"}})

    async def _ps(self, request: Request) -> Response:
        """GET /api/ps takes every runner's lock (ollama PR 17376), so an unload in progress holds it up."""
        models: list[tuple[datetime, dict[str, Any]]] = []
        for runner in list(self.scheduler.runners.values()):
            if self._version >= (0, 32, 4):
                async with runner.lock:
                    pass
            if runner.gone.is_set() or not (runner.ready or self._version < (0, 30)):
                continue
            models.append((self.scheduler.expires_at(runner), self._listed(runner)))
        models.sort(key=lambda entry: entry[0].replace(microsecond=0), reverse=True)
        return JSONResponse({"models": [entry for _, entry in models]})

    def _listed(self, runner: Runner) -> dict[str, Any]:
        """With the tag that loaded first, though another tag of the same weights may be in use."""
        return {
            "name": runner.model.name,
            "model": runner.model.name,
            "size": runner.size_bytes,
            "digest": runner.model.digest,
            "details": runner.model.details(),
            "expires_at": rfc3339(self.scheduler.expires_at(runner)),
            "size_vram": runner.size_vram_bytes,
            "context_length": runner.num_ctx,
        }
