"""Ollama's own endpoints that run a model: generate, chat, embed and embeddings."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from vram_manager.simulator.asgi import Chunks
from vram_manager.simulator.ollama_library import OllamaModel, rfc3339
from vram_manager.simulator.ollama_replies import Refused, body_of, keep_alive_of, runner_options
from vram_manager.simulator.ollama_work import PROMPT_TOKENS, Job, Numbers, Words, Work

VECTOR = [0.6, 0.8]


class NativeApi:
    """Streams are lines of JSON, and streaming is the default."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def routes(self) -> list[Route]:
        return [
            Route("/api/generate", self._generate, methods=["POST"]),
            Route("/api/chat", self._chat, methods=["POST"]),
            Route("/api/embed", self._embed, methods=["POST"]),
            Route("/api/embeddings", self._embeddings, methods=["POST"]),
        ]

    async def _generate(self, request: Request) -> Response:
        return await self._answer(request, "generate", "prompt")

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, "chat", "messages")

    async def _answer(self, request: Request, verb: str, question: str) -> Response:
        body = await body_of(request)
        request_id = self._work.arrived(request, body)
        model = self._work.model(body)
        keep_alive = keep_alive_of(body)
        empty = not body.get(question)
        if empty and keep_alive == 0:
            await self._work.scheduler.unload(model)
            return JSONResponse(self._line(verb, model, "") | {"done": True, "done_reason": "unload"})
        if "completion" not in model.capabilities:
            raise Refused(400, f'"{model.name}" does not support {verb}')
        wanted = int((body.get("options") or {}).get("num_predict") or self._work.reply_tokens)
        job = Job(
            request_id=request_id,
            model=model,
            tokens=0 if empty else wanted,
            options=runner_options(body),
            keep_alive_seconds=keep_alive,
        )
        if empty:
            await self._work.all_words(request, job)
            return JSONResponse(self._line(verb, model, "") | {"done": True, "done_reason": "load"})
        if body.get("stream", True):
            return Chunks(self._lines(verb, model, await self._work.words(request, job)), "application/x-ndjson")
        text, numbers = await self._work.all_words(request, job)
        return JSONResponse(self._line(verb, model, text) | _end(numbers))

    async def _lines(self, verb: str, model: OllamaModel, words: Words) -> AsyncGenerator[bytes, None]:
        async with aclosing(words):
            async for word in words:
                if isinstance(word, Numbers):
                    line = self._line(verb, model, "") | _end(word)
                else:
                    line = self._line(verb, model, word) | {"done": False}
                yield json.dumps(line).encode() + b"\n"

    def _line(self, verb: str, model: OllamaModel, text: str) -> dict[str, Any]:
        head = {"model": model.name, "created_at": rfc3339(self._work.utcnow())}
        if verb == "chat":
            return head | {"message": {"role": "assistant", "content": text}}
        return head | {"response": text}

    async def _embed(self, request: Request) -> Response:
        """No empty unload here: with keep_alive 0 it loads, runs, and then unloads."""
        body = await body_of(request)
        texts = body.get("input") or []
        texts = [texts] if isinstance(texts, str) else texts
        model, numbers = await self._run_embedder(request, body, len(texts))
        reply: dict[str, Any] = {"model": model.name, "embeddings": [VECTOR for _ in texts]}
        if texts:
            reply |= {"total_duration": numbers.total_duration, "load_duration": numbers.load_duration}
            reply |= {"prompt_eval_count": len(texts)}
        return JSONResponse(reply)

    async def _embeddings(self, request: Request) -> Response:
        body = await body_of(request)
        asked = bool(body.get("prompt"))
        await self._run_embedder(request, body, int(asked))
        return JSONResponse({"embedding": VECTOR if asked else []})

    async def _run_embedder(self, request: Request, body: dict[str, Any], texts: int) -> tuple[OllamaModel, Numbers]:
        request_id = self._work.arrived(request, body)
        model = self._work.embedder(body)
        job = Job(
            request_id=request_id,
            model=model,
            tokens=texts,
            options=runner_options(body),
            keep_alive_seconds=keep_alive_of(body),
        )
        _, numbers = await self._work.all_words(request, job)
        return model, numbers


def _end(numbers: Numbers) -> dict[str, Any]:
    return {
        "done": True,
        "done_reason": "stop",
        "total_duration": numbers.total_duration,
        "load_duration": numbers.load_duration,
        "prompt_eval_count": PROMPT_TOKENS,
        "prompt_eval_duration": 0,
        "eval_count": numbers.tokens,
        "eval_duration": numbers.eval_duration,
    }
