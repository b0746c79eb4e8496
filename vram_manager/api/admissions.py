"""The routes of admission and leases."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import timedelta
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from vram_manager.admissions import Admissions, Answer, NoSuchLease, OtherRequest, Stopping, TooMany, Waiting
from vram_manager.api import fields
from vram_manager.api.fields import BadRequest, JSONResponse
from vram_manager.clock import Clock
from vram_manager.domain.lease import Lease, Priority, Request
from vram_manager.domain.size import MIB, Size
from vram_manager.estimates import Estimates
from vram_manager.journal import rfc3339
from vram_manager.policy import Rules
from vram_manager.processes import Processes

# A prompt in ComfyUI's API format has some 100 kB. Nobody else is answered while it is read: 20,000 loaders, which is
# as much as fits, take 0.2 s.
MAX_WORKFLOW_BYTES = 1 << 20
# A day: whoever needs longer renews. Years would be a leak.
MAX_TTL_SECONDS = 86_400.0
MAX_WAIT_SECONDS = 3_600.0
KEEP_ALIVE_SECONDS = 15.0
_PRIORITIES = {"interactive": Priority.INTERACTIVE, "normal": Priority.NORMAL, "batch": Priority.BATCH}
_FIELDS = (
    "required",
    "required_mb",
    "model",
    "context",
    "workflow",
    "margin_mb",
    "gpu",
    "owner",
    "pid",
    "priority",
    "wait_seconds",
    "ttl_seconds",
    "lease",
    "dry_run",
    "request_id",
)


class AdmissionRoutes:
    """`POST /v1/admissions` and everything about a lease."""

    def __init__(
        self, clock: Clock, admissions: Admissions, estimates: Estimates, rules: Rules, processes: Processes
    ) -> None:
        self._clock = clock
        self._admissions = admissions
        self._estimates = estimates
        self._rules = rules
        self._processes = processes

    def routes(self, guarded: Callable[[Any], Any]) -> list[Route]:
        """All of them; what changes something is `guarded`."""
        return [
            Route("/v1/admissions", guarded(self.ask), methods=["POST"]),
            Route("/v1/leases", self.leases),
            Route("/v1/leases/{id}", guarded(self.release), methods=["DELETE"]),
            Route("/v1/leases/{id}/renew", guarded(self.renew), methods=["POST"]),
            Route("/v1/leases/{id}/claimed", guarded(self.claimed), methods=["POST"]),
            Route("/v1/leases/{id}/hold", guarded(self.hold)),
        ]

    async def ask(self, http: HttpRequest) -> Response:
        body = await fields.json_body(http, MAX_WORKFLOW_BYTES)
        request = await self._request(body, http)

        async def gone() -> None:
            while (await http.receive())["type"] != "http.disconnect":
                pass

        try:
            answer = await self._admissions.ask(request, gone)
        except LookupError as error:
            raise BadRequest(404, "not_found", str(error.args[0]), "gpu") from error
        except TooMany as error:
            raise BadRequest(503, "busy", str(error)) from error
        except OtherRequest as error:
            raise BadRequest(409, "conflict", str(error), "request_id") from error
        except Stopping as error:
            raise BadRequest(503, "stopping", str(error)) from error
        if answer.lease is not None and await http.is_disconnected():
            # Nobody hears that it was granted.
            self._admissions.release(answer.lease.id, "the client went away before the answer")
        return JSONResponse(self._answer(request, answer))

    async def _request(self, body: Mapping[str, Any], http: HttpRequest) -> Request:
        fields.no_others(body, _FIELDS)
        peer_pid = _peer_pid(http)
        model, workflow = fields.text(body, "model"), fields.mapping(body, "workflow")
        if model is not None and workflow is not None:
            raise BadRequest(422, "invalid", "workflow and model are both given: give one", "workflow")
        required = _required(body)
        owner = fields.text(body, "owner") or (f"pid-{peer_pid}" if peer_pid else "anonymous")
        margin_mb = fields.whole(body, "margin_mb", most=2**20)
        named_pid = fields.whole(body, "pid", least=1, most=2**22)
        ttl = fields.number(body, "ttl_seconds", least=1.0, most=MAX_TTL_SECONDS)
        request_id = fields.text(body, "request_id")
        priority = fields.one_of(body, "priority", tuple(_PRIORITIES))
        wait = fields.number(body, "wait_seconds", most=MAX_WAIT_SECONDS)
        gpu, takes_lease = fields.gpu_name(body), fields.flag(body, "lease", default=True)
        dry_run, context = fields.flag(body, "dry_run"), fields.whole(body, "context", least=1, most=2**30)
        estimate = await self._estimates.of(required=required, model=model, context=context, workflow=workflow)
        return Request(
            id=request_id or secrets.token_hex(8),
            owner=owner,
            estimate=estimate,
            margin_bytes=self._rules.safety_margin_bytes if margin_mb is None else margin_mb * MIB,
            gpu=gpu,
            priority=_PRIORITIES[priority or "normal"],
            wait_seconds=wait,
            ttl_seconds=60.0 if ttl is None else ttl,
            takes_lease=takes_lease,
            dry_run=dry_run,
            for_comfyui=workflow is not None,
            pid=self._processes.seen_as(peer_pid, named_pid) if named_pid and takes_lease else None,
        )

    def _answer(self, request: Request, answer: Answer) -> dict[str, Any]:
        verdict = answer.verdict
        return {
            "admitted": verdict.admitted,
            "reason": verdict.reason,
            "gpu": verdict.gpu,
            "required_bytes": verdict.required_bytes,
            "margin_bytes": request.margin_bytes,
            "available_bytes": verdict.available_bytes,
            "shortfall_bytes": verdict.shortfall_bytes,
            "reclaimable_bytes": verdict.reclaimable_bytes,
            "estimate_source": request.estimate.source,
            "estimate": request.estimate.words,
            "lease": None if answer.lease is None else self._view(answer.lease),
            "fail_open": verdict.fail_open,
            "dry_run": verdict.dry_run,
            "monitoring": self._rules.enabled,
            "waited_seconds": round(answer.waited_seconds, 3),
            "position": verdict.position,
            "retry_after_seconds": _rounded(verdict.retry_after_seconds),
            "alternatives": [
                {"gpu": one.gpu, "required_bytes": one.bytes, "model": one.model, "words": one.words}
                for one in verdict.alternatives
            ],
        }

    async def leases(self, http: HttpRequest) -> Response:
        return JSONResponse({"leases": self.views(), "line": self.line()})

    def line(self) -> list[dict[str, Any]]:
        """Everybody who waits as JSON, in their order."""
        return [self._waiting(one) for one in self._admissions.line()]

    def views(self) -> list[dict[str, Any]]:
        """All leases as JSON, oldest first."""
        leases = sorted(self._admissions.book.leases.values(), key=lambda lease: lease.granted_at)
        return [self._view(lease) for lease in leases]

    def _view(self, lease: Lease) -> dict[str, Any]:
        return view(lease, self._clock)

    def _waiting(self, waiting: Waiting) -> dict[str, Any]:
        request = waiting.ticket.request
        return {
            "position": waiting.position,
            "owner": request.owner,
            "required": str(request.estimate.size),
            "required_bytes": request.estimate.size.bytes,
            "gpu": request.gpu,
            "priority": request.priority.name.lower(),
            "waited_seconds": round(self._clock.monotonic() - waiting.ticket.since, 1),
            "eta_seconds": _rounded(waiting.eta_seconds),
        }

    async def renew(self, http: HttpRequest) -> Response:
        body = await fields.json_body(http)
        fields.no_others(body, ("ttl_seconds", "pid", "claimed_bytes"))
        named_pid = fields.whole(body, "pid", least=1, most=2**22)
        ttl = fields.number(body, "ttl_seconds", least=1.0, most=MAX_TTL_SECONDS)
        claimed = fields.whole(body, "claimed_bytes")
        with _known():
            lease = await self._admissions.renew(
                http.path_params["id"],
                ttl_seconds=ttl,
                pid=self._processes.seen_as(_peer_pid(http), named_pid) if named_pid else None,
                claimed_bytes=claimed,
            )
        return JSONResponse({"lease": self._view(lease)})

    async def claimed(self, http: HttpRequest) -> Response:
        body = await fields.json_body(http)
        fields.no_others(body, ("bytes",))
        size = fields.whole(body, "bytes")
        with _known():
            lease = self._admissions.claimed(http.path_params["id"], size)
        return JSONResponse({"lease": self._view(lease)})

    async def release(self, http: HttpRequest) -> Response:
        with _known():
            self._admissions.release(http.path_params["id"])
        return Response(status_code=204)

    async def hold(self, http: HttpRequest) -> Response:
        if http.method == "HEAD":
            # Starlette answers it wherever it answers GET; a hold that ends at once would end the lease.
            raise BadRequest(405, "method_not_allowed", "HEAD holds nothing: use GET")
        with _known():
            self._admissions.lease(http.path_params["id"])
        return StreamingResponse(self._hold(http.path_params["id"]), media_type="application/x-ndjson")

    async def _hold(self, lease_id: str) -> AsyncIterator[str]:
        with contextlib.suppress(NoSuchLease):  # it may have ended since it was looked up
            async with self._admissions.held(lease_id) as over:
                yield json.dumps({"lease": self._view(self._admissions.lease(lease_id))}) + "\n"
                while not over.is_set():
                    try:
                        async with asyncio.timeout(KEEP_ALIVE_SECONDS):
                            await over.wait()
                    except TimeoutError:
                        yield "\n"


class _known:  # noqa: N801 - reads as a word of the with statement
    """A lease that is not there is a 404."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, problem: BaseException | None, trace: object) -> None:
        if isinstance(problem, NoSuchLease):
            raise BadRequest(404, "not_found", str(problem.args[0])) from problem


def view(lease: Lease, clock: Clock) -> dict[str, Any]:
    """One lease as JSON."""
    now, today = clock.monotonic(), clock.utcnow()
    ends = None if lease.holds else rfc3339(today + timedelta(seconds=lease.expires_at - now))
    return {
        "id": lease.id,
        "owner": lease.owner,
        "gpu": lease.gpu,
        "bytes": lease.bytes,
        "visible_bytes": lease.visible_bytes,
        "outstanding_bytes": lease.outstanding_bytes,
        "claimed_bytes": lease.claimed_bytes,
        "used_bytes": lease.used_bytes,
        "peak_bytes": lease.peak_bytes,
        "overclaimed_bytes": lease.overclaimed_bytes,
        "priority": lease.priority.name.lower(),
        "held": lease.holds > 0,
        "granted_at": rfc3339(today - timedelta(seconds=now - lease.granted_at)),
        "expires_at": ends,
        "ttl_seconds": lease.ttl_seconds,
        "pid": lease.pid,
        "estimate_source": lease.estimate.source,
        "estimate": lease.estimate.words,
    }


def _peer_pid(http: HttpRequest) -> int | None:
    """The process at the other end of the Unix socket, as this one sees it; None over TCP, 0 where it cannot."""
    return http.client.port if http.client is not None and http.client.host == "unix" else None


def _required(body: Mapping[str, Any]) -> Size | None:
    required, required_mb = fields.size(body, "required"), fields.whole(body, "required_mb", least=1, most=2**30)
    if required is not None and required_mb is not None:
        raise BadRequest(422, "invalid", "required_mb and required are both given: give one", "required_mb")
    return required if required_mb is None else Size(bytes=required_mb * MIB)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)
