"""Ollama's endpoints in OpenAI's shapes (openai/openai.go): no keep_alive and no num_ctx, server defaults."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from vram_manager.simulator.asgi import Chunks
from vram_manager.simulator.multipart import form_of
from vram_manager.simulator.ollama_library import OllamaModel, canonical
from vram_manager.simulator.ollama_native import VECTOR
from vram_manager.simulator.ollama_replies import Refused, body_of
from vram_manager.simulator.ollama_work import PROMPT_TOKENS, Job, Numbers, Words, Work

AUDIO_LIMIT_BYTES = 25 * 1024 * 1024


class OpenAiApi:
    """Streams are server-sent events, and only `stream: true` gets one."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def routes(self) -> list[Route]:
        return [
            Route("/v1/models", self._models),
            Route("/v1/models/{model}", self._model),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._completions, methods=["POST"]),
            Route("/v1/embeddings", self._embeddings, methods=["POST"]),
            Route("/v1/audio/transcriptions", self._transcriptions, methods=["POST"]),
        ]

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._listed(model) for model in self._work.models.values()]})

    async def _model(self, request: Request) -> Response:
        return JSONResponse(self._listed(self._work.model(request.path_params)))

    def _listed(self, model: OllamaModel) -> dict[str, Any]:
        created = int(self._work.started_at.timestamp())
        return {"id": canonical(model.name), "object": "model", "created": created, "owned_by": "library"}

    # -- words

    async def _chat(self, request: Request) -> Response:
        body = await body_of(request)
        job = self._job(request, body, "max_tokens", "max_completion_tokens")
        if body.get("stream"):
            words = await self._work.words(request, job)
            return Chunks(self._events(words, job, body, "chat.completion.chunk"), "text/event-stream")
        text, _ = await self._work.all_words(request, job)
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        return JSONResponse(self._head(job, "chat.completion") | {"choices": [choice], "usage": _usage(job)})

    async def _completions(self, request: Request) -> Response:
        body = await body_of(request)
        job = self._job(request, body, "max_tokens")
        if body.get("stream"):
            words = await self._work.words(request, job)
            return Chunks(self._events(words, job, body, "text_completion"), "text/event-stream")
        text, _ = await self._work.all_words(request, job)
        choice = {"text": text, "index": 0, "finish_reason": "stop"}
        return JSONResponse(self._head(job, "text_completion") | {"choices": [choice], "usage": _usage(job)})

    def _job(self, request: Request, body: dict[str, Any], *limits: str) -> Job:
        request_id = self._work.arrived(request, body)
        model = self._work.model(body)
        if "completion" not in model.capabilities:
            raise Refused(400, f'"{model.name}" does not support chat')
        given = [int(body[limit]) for limit in limits if body.get(limit)]
        return Job(request_id=request_id, model=model, tokens=(given or [self._work.reply_tokens])[0])

    async def _events(self, words: Words, job: Job, body: dict[str, Any], kind: str) -> AsyncGenerator[bytes, None]:
        async with aclosing(words):
            async for word in words:
                text, reason = ("", "stop") if isinstance(word, Numbers) else (word, None)
                choice: dict[str, Any] = {"index": 0, "finish_reason": reason}
                if kind == "text_completion":
                    choice["text"] = text
                else:
                    choice["delta"] = {"role": "assistant", "content": text}
                yield _data(self._head(job, kind) | {"choices": [choice]})
        if (body.get("stream_options") or {}).get("include_usage"):
            yield _data(self._head(job, kind) | {"choices": [], "usage": _usage(job)})
        yield b"data: [DONE]\n\n"

    def _head(self, job: Job, kind: str) -> dict[str, Any]:
        prefix = "cmpl" if kind == "text_completion" else "chatcmpl"
        created = int(self._work.utcnow().timestamp())
        return {
            "id": f"{prefix}-1",
            "object": kind,
            "created": created,
            "model": job.model.name,
            "system_fingerprint": "fp_ollama",
        }

    # -- others

    async def _embeddings(self, request: Request) -> Response:
        body = await body_of(request)
        request_id = self._work.arrived(request, body)
        model = self._work.embedder(body)
        texts = body.get("input") or []
        texts = [texts] if isinstance(texts, str) else texts
        if not texts:
            raise Refused(400, "invalid input")
        await self._work.all_words(request, Job(request_id=request_id, model=model, tokens=len(texts)))
        packed = base64.b64encode(struct.pack(f"<{len(VECTOR)}f", *VECTOR)).decode()
        vector = packed if body.get("encoding_format") == "base64" else VECTOR
        data = [{"object": "embedding", "embedding": vector, "index": index} for index in range(len(texts))]
        usage = {"prompt_tokens": len(texts), "total_tokens": len(texts)}
        return JSONResponse({"object": "list", "data": data, "model": model.name, "usage": usage})

    async def _transcriptions(self, request: Request) -> Response:
        """Any model that completes takes for one that hears."""
        form = await form_of(request)
        if sum(part.size_bytes for part in form.values()) > AUDIO_LIMIT_BYTES:
            raise Refused(400, "http: request body too large")
        if "file" not in form:
            raise Refused(400, "file is required")
        fields = {name: part.text for name, part in form.items() if part.filename is None}
        text, _ = await self._work.all_words(request, self._job(request, fields))
        if fields.get("response_format") == "text":
            return PlainTextResponse(text)
        return JSONResponse({"text": text})


def _usage(job: Job) -> dict[str, int]:
    return {
        "prompt_tokens": PROMPT_TOKENS,
        "completion_tokens": job.tokens,
        "total_tokens": PROMPT_TOKENS + job.tokens,
    }


def _data(event: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(event).encode() + b"\n\n"
