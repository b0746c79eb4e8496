"""An Ollama that answers as the real one does (era of llama-server, v0.30 and later), on a simulated GPU."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from vram_manager.simulator.asgi import Chunks
from vram_manager.simulator.ledger import Ledger
from vram_manager.simulator.ollama_library import OllamaModel, canonical, rfc3339
from vram_manager.simulator.ollama_replies import (
    Lines,
    Refused,
    body_of,
    joined,
    keep_alive_of,
    loaded,
    ndjson,
    not_routed,
    refusal,
    runner_options,
    unless_gone,
)
from vram_manager.simulator.ollama_runner import OllamaCounters, OllamaSettings, Runner, RunnerOptions
from vram_manager.simulator.ollama_scheduler import Scheduler

NANOSECONDS = 1_000_000_000
PROMPT_TOKENS = 26


def utcnow() -> datetime:
    return datetime.now(UTC)


class SimulatedOllama:
    """`app` is the server; `scheduler` and `counters` are the truth behind it.

    `version` decides what /api/ps shows: before 0.30 a model is listed from its spawn, later only when it is
    loaded; from 0.32.4 on the list waits for unloads in progress.
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
        utcnow: Callable[[], datetime] = utcnow,
    ) -> None:
        self.version = version
        self.models = {canonical(model.name): model for model in models}
        self.scheduler = Scheduler(ledger, settings, utcnow)
        self.gpu_tokens_per_second = gpu_tokens_per_second
        self.cpu_tokens_per_second = cpu_tokens_per_second
        self.reply_tokens = reply_tokens
        self._utcnow = utcnow
        self._started_at: datetime = utcnow()
        self._version = tuple(int(part) for part in version.partition("-")[0].split("."))
        self.app = Starlette(
            routes=[
                Route("/", self._root),
                Route("/api/version", self._get_version),
                Route("/api/ps", self._ps),
                Route("/api/tags", self._tags),
                Route("/api/show", self._show, methods=["POST"]),
                Route("/api/generate", self._generate, methods=["POST"]),
                Route("/api/chat", self._chat, methods=["POST"]),
                Route("/api/embed", self._embed, methods=["POST"]),
                Route("/v1/models", self._v1_models),
                Route("/v1/chat/completions", self._v1_chat, methods=["POST"]),
            ],
            exception_handlers={Refused: refusal, HTTPException: not_routed},
        )
        self.app.router.redirect_slashes = False

    @property
    def counters(self) -> OllamaCounters:
        return self.scheduler.counters

    async def close(self) -> None:
        await self.scheduler.close()

    # -- looking

    async def _root(self, request: Request) -> Response:
        return PlainTextResponse("Ollama is running")

    async def _get_version(self, request: Request) -> Response:
        return JSONResponse({"version": self.version})

    async def _tags(self, request: Request) -> Response:
        return JSONResponse({"models": [model.tag(self._started_at) for model in self.models.values()]})

    async def _show(self, request: Request) -> Response:
        body = await body_of(request)
        name = str(body.get("model") or body.get("name") or "")
        model = self.models.get(canonical(name))
        if model is None:
            raise Refused(404, f"model '{canonical(name)}' not found")  # show prints the full tag
        return JSONResponse(model.shown(self._started_at))

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

    async def _v1_models(self, request: Request) -> Response:
        created = int(self._started_at.timestamp())
        models = [
            {"id": model.name, "object": "model", "created": created, "owned_by": "library"}
            for model in self.models.values()
        ]
        return JSONResponse({"object": "list", "data": models})

    # -- working

    async def _generate(self, request: Request) -> Response:
        return await self._native(request, "generate", "prompt")

    async def _chat(self, request: Request) -> Response:
        return await self._native(request, "chat", "messages")

    async def _native(self, request: Request, verb: str, question: str) -> Response:
        body = await body_of(request)
        model = self._model(body)
        keep_alive = keep_alive_of(body)
        empty = not body.get(question)
        if empty and keep_alive == 0:
            await self.scheduler.unload(model)
            return JSONResponse(self._line(verb, model, "") | {"done": True, "done_reason": "unload"})
        if "completion" not in model.capabilities:
            raise Refused(400, f'"{model.name}" does not support {verb}')
        options = body.get("options") or {}
        wanted_tokens = 0 if empty else int(options.get("num_predict") or self.reply_tokens)
        lines = self._lines(verb, model, runner_options(options), keep_alive, wanted_tokens)
        await loaded(request, lines)
        if empty:
            await lines.aclose()
            return JSONResponse(self._line(verb, model, "") | {"done": True, "done_reason": "load"})
        if body.get("stream", True):
            return Chunks(ndjson(lines), "application/x-ndjson")
        reply = await unless_gone(request, joined(lines, verb))
        return JSONResponse(reply)

    async def _v1_chat(self, request: Request) -> Response:
        body = await body_of(request)
        model = self._model(body)
        tokens = int(body.get("max_tokens") or self.reply_tokens)
        lines = self._lines("chat", model, RunnerOptions(), None, tokens)
        await loaded(request, lines)
        if body.get("stream"):
            return Chunks(self._v1_events(lines, model), "text/event-stream")
        reply = await unless_gone(request, joined(lines, "chat"))
        choice = {"index": 0, "message": reply["message"], "finish_reason": "stop"}
        usage = {
            "prompt_tokens": PROMPT_TOKENS,
            "completion_tokens": tokens,
            "total_tokens": PROMPT_TOKENS + tokens,
        }
        return JSONResponse(self._v1_object(model, "chat.completion") | {"choices": [choice], "usage": usage})

    async def _v1_events(self, lines: Lines, model: OllamaModel) -> AsyncGenerator[bytes, None]:
        async with aclosing(lines):
            async for line in lines:
                choice = {
                    "index": 0,
                    "delta": {"role": "assistant", "content": line["message"]["content"]},
                    "finish_reason": "stop" if line["done"] else None,
                }
                event = self._v1_object(model, "chat.completion.chunk") | {"choices": [choice]}
                yield b"data: " + json.dumps(event).encode() + b"\n\n"
        yield b"data: [DONE]\n\n"

    def _v1_object(self, model: OllamaModel, kind: str) -> dict[str, Any]:
        created = int(self._utcnow().timestamp())
        return {"id": "chatcmpl-1", "object": kind, "created": created, "model": model.name}

    async def _embed(self, request: Request) -> Response:
        """No empty unload here: with keep_alive 0 it loads, runs, and then unloads."""
        body = await body_of(request)
        model = self._model(body, f'model "{body.get("model")}" not found, try pulling it first')
        texts = body.get("input") or []
        texts = [texts] if isinstance(texts, str) else texts
        lines = self._lines("embed", model, runner_options(body.get("options") or {}), keep_alive_of(body), len(texts))
        await loaded(request, lines)
        await unless_gone(request, joined(lines, "embed"))
        return JSONResponse({"model": model.name, "embeddings": [[0.6, 0.8] for _ in texts]})

    async def _lines(
        self, verb: str, model: OllamaModel, options: RunnerOptions, keep_alive: float | None, tokens: int
    ) -> Lines:
        """First an empty line when the model is loaded, then one a token, then the numbers."""
        loop = asyncio.get_running_loop()
        asked_at = loop.time()
        async with self.scheduler.running(model, options, keep_alive) as runner:
            loaded_at = loop.time()
            yield {}
            if not tokens:
                return
            self._count_served(runner)
            async with runner.slot:
                with self.scheduler.ledger.computing(runner.gpu_layers > 0):
                    for _ in range(tokens):
                        await asyncio.sleep(1 / self._tokens_per_second(runner))
                        self.counters.tokens += 1
                        yield self._line(verb, model, "word ") | {"done": False}
            now = loop.time()
            yield self._line(verb, model, "") | {
                "done": True,
                "done_reason": "stop",
                "total_duration": int((now - asked_at) * NANOSECONDS),
                "load_duration": int((loaded_at - asked_at) * NANOSECONDS),
                "prompt_eval_count": PROMPT_TOKENS,
                "prompt_eval_duration": 0,
                "eval_count": tokens,
                "eval_duration": int((now - loaded_at) * NANOSECONDS),
            }

    def _tokens_per_second(self, runner: Runner) -> float:
        """Layers take turns, so the times add up and the slow ones dominate."""
        on_gpu = runner.gpu_ratio
        return 1 / (on_gpu / self.gpu_tokens_per_second + (1 - on_gpu) / self.cpu_tokens_per_second)

    def _count_served(self, runner: Runner) -> None:
        if runner.gpu_layers == 0:
            self.counters.served_on_cpu += 1
        elif runner.gpu_layers < runner.all_layers:
            self.counters.served_partially += 1
        else:
            self.counters.served_on_gpu += 1

    def _line(self, verb: str, model: OllamaModel, text: str) -> dict[str, Any]:
        head = {"model": model.name, "created_at": rfc3339(self._utcnow())}
        if verb == "chat":
            return head | {"message": {"role": "assistant", "content": text}}
        return head | {"response": text}

    def _model(self, body: dict[str, Any], why: str | None = None) -> OllamaModel:
        name = str(body.get("model") or "")
        if not name:
            raise Refused(400, "model is required")
        model = self.models.get(canonical(name))
        if model is None:
            raise Refused(404, why or f"model '{name}' not found")
        return model
