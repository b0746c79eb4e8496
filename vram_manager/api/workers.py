"""The routes of workers: limits, models, named points, generations."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from vram_manager.admissions import CHECK_LOOK_SECONDS
from vram_manager.api.fields import (
    BadRequest,
    JSONResponse,
    gpu_name,
    json_body,
    needed,
    no_others,
    one_of,
    printable,
    sizes,
    text,
    whole,
)
from vram_manager.domain.size import MAX_BYTES, MIB
from vram_manager.domain.worker import Check, Phase, Report
from vram_manager.workers import NoSuchGpu, Workers

# Who does not say a name shares one with all others that do not.
UNNAMED = "anonymous"
_REPORT = ("gpu", "allocated_bytes", "reserved_bytes")
MAX_SLOT = 2**63 - 1

_CHECK_FIELDS = tuple(Check.__dataclass_fields__)

Handler = Callable[[Request], Awaitable[Response]]


def routes(
    workers: Workers, guarded: Callable[[Handler], Handler], look: Callable[[float], Awaitable[None]]
) -> list[Route]:
    """The routes; `guarded` lets those that change something through only where that is allowed.

    `look` has the GPUs read again before something is judged by them, unless that was done less than so long ago.
    """
    own = _Routes(workers, look)
    return [
        Route("/v1/limits/check", guarded(own.check), methods=["POST"]),
        Route("/v1/generations", guarded(own.generation), methods=["POST"]),
        Route("/v1/workers", own.listing),
        # An owner's name may have slashes in it.
        Route("/v1/workers/{owner:path}/models", guarded(own.models), methods=["POST"]),
        Route("/v1/workers/{owner:path}/snapshots", guarded(own.snapshot), methods=["POST"]),
    ]


class _Routes:
    def __init__(self, workers: Workers, look: Callable[[float], Awaitable[None]]) -> None:
        self._workers = workers
        self._look = look

    async def check(self, request: Request) -> Response:
        body = await json_body(request)
        no_others(body, ("owner", "context", "requesting_mb", *_REPORT))
        owner, context = text(body, "owner") or UNNAMED, text(body, "context") or ""
        requested_bytes = (whole(body, "requesting_mb", most=MAX_BYTES // MIB) or 0) * MIB
        report = _report(body)
        await self._look(CHECK_LOOK_SECONDS)
        with _gpu_known():
            found = self._workers.check_limits(owner, report, requested_bytes=requested_bytes, context=context)
        # Nothing in it is nested, and asdict would copy as if there were: a fifth of the whole answer.
        return JSONResponse({name: getattr(found, name) for name in _CHECK_FIELDS})

    async def generation(self, request: Request) -> Response:
        body = await json_body(request)
        no_others(body, ("owner", "phase", "id", "slot", *_REPORT))
        owner, key = needed(text(body, "owner"), "owner"), needed(text(body, "id"), "id")
        phase = Phase(needed(one_of(body, "phase", tuple(Phase)), "phase"))
        slot, report = _slot(body), _report(body)
        if report.held_bytes is None:
            # It is measured by the GPU, and what it does between two looks would count for the next one.
            await self._look(0.0)
        with _gpu_known():
            found = self._workers.generation(owner, phase, key, report, slot=slot)
        return JSONResponse(asdict(found))

    async def listing(self, request: Request) -> Response:
        return JSONResponse({"workers": self._workers.listing()})

    async def models(self, request: Request) -> Response:
        owner, body = _owner(request), await json_body(request)
        no_others(body, ("models", "buffers", "budgets", "budget_bytes"))
        found = self._workers.models(
            owner,
            needed(sizes(body, "models"), "models"),
            buffers=sizes(body, "buffers") or {},
            budgets=sizes(body, "budgets") or {},
            budget_bytes=whole(body, "budget_bytes"),
        )
        return JSONResponse(asdict(found))

    async def snapshot(self, request: Request) -> Response:
        owner, body = _owner(request), await json_body(request)
        no_others(body, ("event", "slot", *_REPORT))
        event, slot, report = needed(text(body, "event"), "event"), _slot(body), _report(body)
        await self._look(0.0)
        with _gpu_known():
            found = self._workers.snapshot_of(owner, event, report, slot=slot)
        return JSONResponse(asdict(found))


@contextmanager
def _gpu_known() -> Iterator[None]:
    try:
        yield
    except NoSuchGpu as problem:
        raise BadRequest(404, "not_found", str(problem), "gpu") from problem


def _owner(request: Request) -> str:
    return printable(request.path_params["owner"], "owner")


def _slot(body: Mapping[str, Any]) -> int | str | None:
    """A slot's number, or its name."""
    return text(body, "slot") if isinstance(body.get("slot"), str) else whole(body, "slot", most=MAX_SLOT)


def _report(body: Mapping[str, Any]) -> Report:
    return Report(
        gpu=gpu_name(body),
        allocated_bytes=whole(body, "allocated_bytes"),
        reserved_bytes=whole(body, "reserved_bytes"),
    )
