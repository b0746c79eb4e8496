"""Ollama's endpoints that look at or change what is on disk: tags, show, blobs, create, copy, pull, delete."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from vram_manager.simulator.asgi import Chunks
from vram_manager.simulator.ollama_library import OllamaModel, canonical
from vram_manager.simulator.ollama_replies import Refused, body_of
from vram_manager.simulator.ollama_work import Work

PULL_STEPS = 5
STEP_SECONDS = 0.02

_DIGEST = re.compile(r"sha256[-:][0-9a-f]{64}")


class StoreApi:
    """`blobs` has the size of every uploaded blob by its digest (64 hex digits); their bytes are not kept."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self.blobs: dict[str, int] = {}

    def routes(self) -> list[Route]:
        return [
            Route("/api/tags", self._tags),
            Route("/api/show", self._show, methods=["POST"]),
            Route("/api/blobs/{digest}", self._has_blob, methods=["HEAD"]),
            Route("/api/blobs/{digest}", self._put_blob, methods=["POST"]),
            Route("/api/create", self._create, methods=["POST"]),
            Route("/api/pull", self._pull, methods=["POST"]),
            Route("/api/copy", self._copy, methods=["POST"]),
            Route("/api/delete", self._delete, methods=["DELETE"]),
        ]

    async def _tags(self, request: Request) -> Response:
        started_at = self._work.started_at
        return JSONResponse({"models": [model.tag(started_at) for model in self._work.models.values()]})

    async def _show(self, request: Request) -> Response:
        name = canonical(_name(await body_of(request)))
        model = self._work.models.get(name)
        if model is None:
            raise Refused(404, f"model '{name}' not found")  # show prints the full tag
        return JSONResponse(model.shown(self._work.started_at))

    # -- blobs

    async def _has_blob(self, request: Request) -> Response:
        return Response(status_code=200 if _digest(request) in self._known_blobs() else 404)

    async def _put_blob(self, request: Request) -> Response:
        told = _digest(request)
        if told in self._known_blobs():
            return Response(status_code=200)
        size_bytes, hashed = 0, hashlib.sha256()
        async for piece in request.stream():
            size_bytes += len(piece)
            hashed.update(piece)
        if hashed.hexdigest() != told:
            raise Refused(400, f'digest mismatch, expected "sha256:{told}", got "sha256:{hashed.hexdigest()}"')
        self.blobs[told] = size_bytes
        return Response(status_code=201)

    def _known_blobs(self) -> set[str]:
        return {*self.blobs, *(model.blob_digest for model in self._work.models.values())}

    # -- models

    async def _create(self, request: Request) -> Response:
        """FROM a model that is here, or from an uploaded file; `parameters` may set num_ctx and num_gpu."""
        body = await body_of(request)
        name, parameters = canonical(_name(body)), body.get("parameters") or {}
        steps: list[dict[str, Any]] = [{"status": "reading model metadata"}, {"status": "creating system layer"}]
        source = self._work.models.get(canonical(str(body.get("from") or "")))
        files = [str(digest).removeprefix("sha256:") for digest in (body.get("files") or {}).values()]
        if source is None and files and files[0] in self.blobs:
            source = OllamaModel(name=name, file_bytes=self.blobs[files[0]], layers=32, blob=files[0])
        if source is None:
            return self._progress([*steps, {"error": "pull model manifest: file does not exist"}], body)
        self._work.models[name] = source.derived(name, parameters.get("num_ctx"), parameters.get("num_gpu"))
        return self._progress([*steps, {"status": "writing manifest"}, {"status": "success"}], body)

    async def _pull(self, request: Request) -> Response:
        """What is here can be pulled again, all of it; the rest of the world's models cannot."""
        body = await body_of(request)
        steps: list[dict[str, Any]] = [{"status": "pulling manifest"}]
        model = self._work.models.get(canonical(_name(body)))
        if model is None:
            return self._progress([*steps, {"error": "pull model manifest: file does not exist"}], body)
        digest, total = model.blob_digest, model.file_bytes
        steps += [
            {
                "status": f"pulling {digest[:12]}",
                "digest": f"sha256:{digest}",
                "total": total,
                "completed": total * step // PULL_STEPS,
            }
            for step in range(1, PULL_STEPS + 1)
        ]
        ends = ("verifying sha256 digest", "writing manifest", "success")
        return self._progress([*steps, *({"status": end} for end in ends)], body)

    async def _copy(self, request: Request) -> Response:
        body = await body_of(request)
        source, destination = str(body.get("source") or ""), str(body.get("destination") or "")
        model = self._work.models.get(canonical(source))
        if model is None:
            raise Refused(404, f'model "{source}" not found')
        self._work.models[canonical(destination)] = model.copied(canonical(destination))
        return Response()

    async def _delete(self, request: Request) -> Response:
        """A loaded model stays loaded."""
        name = _name(await body_of(request))
        if self._work.models.pop(canonical(name), None) is None:
            raise Refused(404, f"model '{name}' not found")
        return Response()

    def _progress(self, steps: list[dict[str, Any]], body: dict[str, Any]) -> Response:
        """Lines of JSON, or with `stream: false` the last one; an error is a line like any other."""
        if body.get("stream", True):
            return Chunks(_slowly(steps), "application/x-ndjson")
        last = steps[-1]
        return JSONResponse(last, 500 if "error" in last else 200)


async def _slowly(steps: list[dict[str, Any]]) -> AsyncGenerator[bytes, None]:
    for step in steps:
        await asyncio.sleep(STEP_SECONDS)
        yield json.dumps(step).encode() + b"\n"


def _name(body: dict[str, Any]) -> str:
    return str(body.get("model") or body.get("name") or "")


def _digest(request: Request) -> str:
    told: str = request.path_params["digest"]
    if not _DIGEST.fullmatch(told):
        raise Refused(400, "invalid digest format")
    return told[len("sha256:") :]
