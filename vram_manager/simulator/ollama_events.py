"""Ollama's two endpoints that stream named events: OpenAI's Responses and Anthropic's Messages."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from vram_manager.simulator.asgi import Chunks
from vram_manager.simulator.ollama_replies import Refused, body_of
from vram_manager.simulator.ollama_work import PROMPT_TOKENS, Job, Words, Work

ANTHROPIC_USAGE = {"input_tokens": PROMPT_TOKENS}


class EventsApi:
    """POST /v1/responses and POST /v1/messages."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def routes(self) -> list[Route]:
        return [
            Route("/v1/responses", self._responses, methods=["POST"]),
            Route("/v1/messages", self._messages, methods=["POST"]),
        ]

    def _job(self, request: Request, body: dict[str, Any], tokens: int) -> Job:
        request_id = self._work.arrived(request, body)
        model = self._work.model(body)
        if "completion" not in model.capabilities:
            raise Refused(400, f'"{model.name}" does not support chat')
        return Job(request_id=request_id, model=model, tokens=tokens)

    # -- OpenAI

    async def _responses(self, request: Request) -> Response:
        body = await body_of(request)
        job = self._job(request, body, int(body.get("max_output_tokens") or self._work.reply_tokens))
        if body.get("stream"):
            return Chunks(self._response_events(await self._work.words(request, job), job), "text/event-stream")
        text, _ = await self._work.all_words(request, job)
        return JSONResponse(self._response(job, text))

    def _response(self, job: Job, text: str | None) -> dict[str, Any]:
        """Complete with its text, or in progress without."""
        now = int(self._work.utcnow().timestamp())
        return {
            "id": "resp_1",
            "object": "response",
            "created_at": now,
            "completed_at": None if text is None else now,
            "status": "in_progress" if text is None else "completed",
            "model": job.model.name,
            "output": [] if text is None else [_message(text)],
            "error": None,
            "incomplete_details": None,
            "instructions": None,
            "metadata": {},
            "parallel_tool_calls": True,
            "temperature": 1.0,
            "tool_choice": "auto",
            "tools": [],
            "top_p": 1.0,
            "usage": None if text is None else _response_usage(job),
        }

    async def _response_events(self, words: Words, job: Job) -> AsyncGenerator[bytes, None]:
        number = -1

        def event(kind: str, **fields: Any) -> bytes:
            nonlocal number
            number += 1
            return _event(kind, {"type": kind, "sequence_number": number} | fields)

        place = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
        text = ""
        async with aclosing(words):
            yield event("response.created", response=self._response(job, None))
            yield event("response.in_progress", response=self._response(job, None))
            yield event("response.output_item.added", output_index=0, item=_message(None))
            yield event("response.content_part.added", **place, part=_part(""))
            async for word in words:
                if isinstance(word, str):
                    text += word
                    yield event("response.output_text.delta", **place, delta=word, logprobs=[])
        yield event("response.output_text.done", **place, text=text, logprobs=[])
        yield event("response.content_part.done", **place, part=_part(text))
        yield event("response.output_item.done", output_index=0, item=_message(text))
        yield event("response.completed", response=self._response(job, text))

    # -- Anthropic

    async def _messages(self, request: Request) -> Response:
        """`max_tokens` must be there, and people set it high: a reply has its usual length unless that is less."""
        body = await body_of(request)
        limit = int(body.get("max_tokens") or 0)
        job = self._job(request, body, min(limit, self._work.reply_tokens))
        if limit <= 0:
            raise Refused(400, "max_tokens is required and must be positive")
        if body.get("stream"):
            return Chunks(self._message_events(await self._work.words(request, job), job), "text/event-stream")
        text, numbers = await self._work.all_words(request, job)
        usage = ANTHROPIC_USAGE | {"output_tokens": numbers.tokens}
        content = [{"type": "text", "text": text}]
        return JSONResponse(_anthropic(job) | {"content": content, "stop_reason": "end_turn", "usage": usage})

    async def _message_events(self, words: Words, job: Job) -> AsyncGenerator[bytes, None]:
        def event(kind: str, **fields: Any) -> bytes:
            return _event(kind, {"type": kind} | fields)

        async with aclosing(words):
            yield event("message_start", message=_anthropic(job))
            yield event("content_block_start", index=0, content_block={"type": "text", "text": ""})
            async for word in words:
                if isinstance(word, str):
                    yield event("content_block_delta", index=0, delta={"type": "text_delta", "text": word})
        yield event("content_block_stop", index=0)
        usage = ANTHROPIC_USAGE | {"output_tokens": job.tokens}
        yield event("message_delta", delta={"stop_reason": "end_turn", "stop_sequence": None}, usage=usage)
        yield event("message_stop")


def _anthropic(job: Job) -> dict[str, Any]:
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": job.model.name,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": ANTHROPIC_USAGE | {"output_tokens": 0},
    }


def _message(text: str | None) -> dict[str, Any]:
    """The one output item of a response, still empty without a text."""
    status, content = ("in_progress", []) if text is None else ("completed", [_part(text)])
    return {"id": "msg_1", "type": "message", "status": status, "role": "assistant", "content": content}


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _response_usage(job: Job) -> dict[str, Any]:
    return {
        "input_tokens": PROMPT_TOKENS,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": job.tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": PROMPT_TOKENS + job.tokens,
    }


def _event(kind: str, fields: dict[str, Any]) -> bytes:
    return f"event: {kind}\ndata: {json.dumps(fields)}\n\n".encode()
