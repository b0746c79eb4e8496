"""What both clients have in common: each verb as a question, what its answer means, and what follows from it.

A `Question` says what to send, how to read the answer, and what stands in for one when the daemon is away. Sending
is the only thing the two clients do differently.
"""

from __future__ import annotations

import inspect
import json
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from vram_manager.client import answers, cuda
from vram_manager.client.answers import Admission, Generated, GpuTotals, LeaseInfo, Limits, ModelsReport
from vram_manager.client.door import socket_path, unreachable
from vram_manager.client.wire import Malformed, Reply, quoted
from vram_manager.errors import (
    InsufficientVram,
    InvalidRequest,
    ManagerAwayWarning,
    MemoryPressureError,
    MemoryPressureWarning,
    Unreachable,
)

T = TypeVar("T")
L = TypeVar("L", bound="Asking")
Priority = Literal["interactive", "normal", "batch"]

GIB = 2**30
GB = 10**9
MB = 10**6
_UNITS = {"KB": 10**3, "MB": MB, "GB": GB, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": GIB, "TIB": 2**40}
_ON = frozenset({"1", "true", "yes", "on", "t", "y"})
_OFF = frozenset({"0", "false", "no", "off", "f", "n"})
# Without a wait of its own an admission takes as long as making room does (some 15 s); four times that.
MAKING_ROOM_SECONDS = 60.0
# The daemon closes an idle connection after seconds; more than these few would only fill its table.
IDLE_CONNECTIONS = 8
# torch's next allocations pay for an emptied cache: over a soft limit that lasts, not again at every check.
CLEANUP_PAUSE_SECONDS = 30.0

logger = logging.getLogger("vram_manager")


@dataclass(frozen=True, slots=True)
class Question(Generic[T]):
    """One request; `read` makes its answer a value, `away` is the value when nobody answers, told why."""

    method: str
    path: str
    body: dict[str, Any] | None
    read: Callable[[Any], T]
    away: Callable[[str], T]


class Asking:
    """The settings of a client, and the part of its verbs that sends nothing; `Client` is its public face."""

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        owner: str | None = None,
        fail_open: bool | None = None,
        timeout_seconds: float = 5.0,
        emergency_cleanup: bool = True,
    ) -> None:
        self.path = os.fspath(path) if path is not None else socket_path()
        self.fail_open = env_flag("VRAM_FAIL_OPEN", default=True) if fail_open is None else fail_open
        self.timeout_seconds = timeout_seconds
        self.emergency_cleanup = emergency_cleanup
        self.on_pressure: Callable[[], object] | None = None
        self._owner = owner
        # Connections to use again, whatever thread or loop did so before.
        self._idle: list[Any] = []
        self._is_away = False
        self._cleaned_at = -math.inf

    @property
    def owner(self) -> str:
        return self._owner or f"{_program()}-{os.getpid()}"

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    def __del__(self) -> None:
        if hasattr(self, "_idle"):
            self.close()

    def keep(self, connection: Any) -> None:
        if connection.open and len(self._idle) < IDLE_CONNECTIONS:
            self._idle.append(connection)
        else:
            connection.close()

    # What follows from a reply.

    def value(self, question: Question[T], reply: Reply) -> T:
        """Raises Unreachable for what no vram-manager says, InvalidRequest for what it will not have.

        A line that is full is no daemon that is away: InsufficientVram, or a flood would be let through by it.
        """
        status = reply.status
        if status == 503 and reply.kind == "busy":
            raise InsufficientVram(_said(reply))
        # A route that it does not know is an older daemon's; a GPU that it does not know is the caller's mistake.
        if status >= 500 or (status in (404, 405) and reply.field is None):
            raise Unreachable(f"{self.path}: {question.method} {question.path}: {_said(reply)}")
        if status >= 400:
            raise InvalidRequest(_said(reply), reply.field)
        try:
            value = question.read(reply.body)
        except Malformed as error:
            raise unreachable(self.path, error) from error
        if self._is_away:
            self._is_away = False
            logger.info("vram-manager answers again on %s", self.path)
        return value

    def without(self, question: Question[T], error: Unreachable) -> T:
        """Fail open, said once per outage; raises `error` for a client that would not have that."""
        if not self.fail_open:
            raise error
        if self.begins_to_be_away():
            warn(f"{error}: going on without asking (VRAM_FAIL_OPEN)", ManagerAwayWarning)
        return question.away(str(error))

    def begins_to_be_away(self) -> bool:
        """Is this the first that is heard of it?"""
        before, self._is_away = self._is_away, True
        return not before

    # Admission.

    def wish(
        self,
        required: str | int | None,
        model: str | None,
        workflow: Mapping[str, Any] | None,
        context: int | None,
        gpu: str | int | None,
        margin_mb: int | None,
        priority: Priority | None,
    ) -> dict[str, Any]:
        return {
            "required" if isinstance(required, str) else "required_mb": required,
            "model": model,
            "workflow": workflow,
            "context": context,
            "gpu": gpu,
            "margin_mb": margin_mb,
            "priority": priority,
            "owner": self.owner,
        }

    def admission(self, wish: dict[str, Any]) -> Question[Admission]:
        return Question(
            "POST",
            "/v1/admissions",
            given(wish),
            answers.admission,
            lambda why: Admission(admitted=True, fail_open=True, reason=f"not asked, admitted all the same: {why}"),
        )

    # Leases.

    def renewal(
        self, lease_id: str, ttl_seconds: float, claimed_bytes: int | None, pid: int | None
    ) -> Question[LeaseInfo | None]:
        body = {"ttl_seconds": ttl_seconds, "pid": pid, "claimed_bytes": claimed_bytes}
        return _about_lease("POST", f"{lease_path(lease_id)}/renew", given(body))

    def claim(self, lease_id: str, claimed_bytes: int | None) -> Question[LeaseInfo | None]:
        return _about_lease("POST", f"{lease_path(lease_id)}/claimed", given({"bytes": claimed_bytes}))

    # Limits.

    def limits(
        self,
        requesting_mb: int | None,
        context: str,
        allocated_bytes: int | None,
        reserved_bytes: int | None,
        gpu: str | int | None,
    ) -> Question[Limits]:
        if allocated_bytes is None and reserved_bytes is None:
            allocated_bytes, reserved_bytes = cuda.memory(_uuid(gpu))
        body = {
            "owner": self.owner,
            "gpu": gpu,
            "context": context or None,
            "requesting_mb": requesting_mb,
            "allocated_bytes": allocated_bytes,
            "reserved_bytes": reserved_bytes,
        }
        return Question(
            "POST", "/v1/limits/check", given(body), answers.limits, lambda why: Limits(level="unknown", message=why)
        )

    def heed(self, limits: Limits) -> Limits:
        """1. hard: clean up and raise; 2. soft for some time: clean up, warn and go on; 3. else nothing."""
        if limits.level == "hard":
            self._clean_up()
            raise MemoryPressureError(limits.message, limits)
        if limits.level == "soft" and limits.sustained:
            if time.monotonic() - self._cleaned_at >= CLEANUP_PAUSE_SECONDS:
                self._clean_up()
            warn(limits.message, MemoryPressureWarning)
        return limits

    def _clean_up(self) -> None:
        if not self.emergency_cleanup:
            return
        self._cleaned_at = time.monotonic()
        before = cuda.memory().reserved_bytes
        if self.on_pressure is not None:
            try:
                self.on_pressure()
            except Exception:
                logger.exception("on_pressure failed")
        try:
            cuda.empty_cache()
        except Exception:
            logger.exception("torch could not empty its cache")
        after = cuda.memory().reserved_bytes
        if before is not None and after is not None:
            freed = f"{(before - after) / MB:.0f} MB ({before / GB:.2f} GB -> {after / GB:.2f} GB)"
            logger.warning("Emergency cleanup freed %s", freed)

    # A worker's models, generations and snapshots.

    def models(
        self,
        models: Mapping[str, int],
        buffers: Mapping[str, int] | None,
        budgets: Mapping[str, int] | None,
        budget_bytes: int | None,
    ) -> Question[ModelsReport]:
        held, coming = sum(models.values()), sum((buffers or {}).values())
        owner = self.owner
        body = {"models": models, "buffers": buffers, "budgets": budgets, "budget_bytes": budget_bytes}
        return Question(
            "POST",
            f"/v1/workers/{quoted(owner)}/models",
            given(body),
            answers.models_report,
            lambda why: ModelsReport(
                owner=owner,
                models_bytes=held,
                buffers_bytes=coming,
                total_bytes=held + coming,
                budget_bytes=budget_bytes,
                message=why,
            ),
        )

    def weigh(self, report: ModelsReport) -> ModelsReport:
        for one in report.over_budget:
            over = f"{(one.bytes - one.budget_bytes) / GB:.2f} GB over its budget of {one.budget_bytes / GB:.2f} GB"
            warn(f"{one.name} holds {one.bytes / GB:.2f} GB, {over}", MemoryPressureWarning)
        if report.buffers_bytes and not report.fits:
            raise InsufficientVram(report.message)
        return report

    def generation(self, phase: str, identity: str, slot: int | str | None) -> Question[Generated]:
        body = {"owner": self.owner, "phase": phase, "id": identity, "slot": slot, **cuda.memory()._asdict()}
        return Question("POST", "/v1/generations", given(body), answers.generated, lambda _: Generated())

    def snapshot(self, event: str, slot: int | str | None) -> Question[dict[str, Any]]:
        torch = cuda.memory()
        body = {"event": event, "slot": slot, **torch._asdict()}
        return Question(
            "POST",
            f"/v1/workers/{quoted(self.owner)}/snapshots",
            given(body),
            answers.as_object,
            lambda _: _own_snapshot(event, slot, torch),
        )

    # The whole of the memory.

    def gpus(self) -> Question[tuple[GpuTotals, ...]]:
        return Question("GET", "/health/vram", None, answers.gpus, lambda _: ())

    def status(self) -> Question[dict[str, int | None]]:
        unknown = GpuTotals()
        return Question("GET", "/health/vram", None, _used_and_total, lambda _: _heartbeat(unknown))

    def require(self, size: str | int, gpu: str | int | None, seen: tuple[GpuTotals, ...]) -> None:
        required = size_bytes(size)
        asked = [one for one in seen if gpu is None or str(gpu) in (str(one.index), one.uuid)]
        if seen and not asked:
            there = ", ".join(map(str, seen))
            raise InvalidRequest(f"gpu is {gpu!r}: must be the index or UUID of one of {there}", "gpu")
        totals = [(one.total_mb * 2**20, one) for one in asked if one.total_mb is not None]
        most, best = max(totals, key=lambda pair: pair[0], default=(0, None))
        if most >= required:
            return
        needed = f"{required / GIB:.1f} GiB required"
        if asked and len(totals) == len(asked):
            raise InsufficientVram(
                f"Insufficient VRAM: {most / GIB:.1f} GiB in all on {best}, {needed}: "
                f"use a GPU with at least {math.ceil(required / GIB)} GiB"
            )
        if not self.fail_open:
            raise InsufficientVram(f"Insufficient VRAM: {needed}, and how much there is in all is not known")
        logger.warning("%s, and how much there is in all is not known: going on (VRAM_FAIL_OPEN)", needed)


class Client(Generic[L]):
    """What both clients show besides their verbs; `L` is what sends for them."""

    _kind: type[L]

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        owner: str | None = None,
        fail_open: bool | None = None,
        timeout_seconds: float = 5.0,
        emergency_cleanup: bool = True,
    ) -> None:
        self._line: L = self._kind(
            path,
            owner=owner,
            fail_open=fail_open,
            timeout_seconds=timeout_seconds,
            emergency_cleanup=emergency_cleanup,
        )

    @property
    def path(self) -> str:
        """The daemon's socket."""
        return self._line.path

    @property
    def owner(self) -> str:
        """Who asks: as given, or the program's name and this process's pid (a forked child is another owner)."""
        return self._line.owner

    @property
    def fail_open(self) -> bool:
        """Is everything admitted while the daemon cannot be reached?"""
        return self._line.fail_open

    @property
    def on_pressure(self) -> Callable[[], object] | None:
        """Called at a limit, before torch's cache is emptied: for what the worker itself can let go of."""
        return self._line.on_pressure

    @on_pressure.setter
    def on_pressure(self, call: Callable[[], object] | None) -> None:
        self._line.on_pressure = call

    def clear_cuda_cache(self) -> int:
        """What torch keeps and does not use goes back to the driver; bytes, 0 where torch is not in use."""
        before = cuda.memory().reserved_bytes
        cuda.empty_cache()
        after = cuda.memory().reserved_bytes
        return 0 if before is None or after is None else before - after

    def close(self) -> None:
        """No connection is kept any more; the client can still be used."""
        self._line.close()


def given(body: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that were given."""
    return {name: value for name, value in body.items() if value is not None}


def lease_path(lease_id: str) -> str:
    return f"/v1/leases/{quoted(lease_id)}"


def env_flag(name: str, *, default: bool) -> bool:
    """A setting that is on or off; what says neither is as if it were not there."""
    value = os.environ.get(name, "").strip().lower()
    return value in _ON or (default and value not in _OFF)


def size_bytes(size: str | int) -> int:
    """`11.8GB`, `12 GiB`; a number is MiB. Raises InvalidRequest."""
    if isinstance(size, int):
        return size * 2**20
    text = size.replace(" ", "").upper()
    number = text.rstrip("BIKMGT")
    try:
        return round(float(number) * _UNITS[text[len(number) :]])
    except (KeyError, ValueError, OverflowError) as error:
        raise InvalidRequest(
            f"size is {size!r}: must be a size with a unit, such as 12GiB or 11.8GB", "size"
        ) from error


def warn(words: str, category: type[Warning]) -> None:
    """Warns at the line outside of this package that called it."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").startswith("vram_manager.client"):
        level, frame = level + 1, frame.f_back
    warnings.warn(words, category, stacklevel=level)


def random_id() -> str:
    """128 bits: what uuid4 has, without its import."""
    return os.urandom(16).hex()


def _about_lease(method: str, path: str, body: dict[str, Any]) -> Question[LeaseInfo | None]:
    return Question(method, path, body, answers.lease_info, lambda _: None)


def _said(reply: Reply) -> str:
    return reply.words or f"HTTP {reply.status}: {str(reply.body)[:200]}"


def _uuid(gpu: str | int | None) -> str | None:
    return gpu if isinstance(gpu, str) and not gpu.isdigit() else None


def _program() -> str:
    name = sys.argv[0] if sys.argv else ""
    directory, _, file = name.rpartition("/")
    # python -m package
    file = directory.rpartition("/")[2] if file == "__main__.py" else file.removesuffix(".py")
    return file if file.strip("-") not in ("", "c", "m") else "python"


def _used_and_total(body: Any) -> dict[str, int | None]:
    return _heartbeat(answers.read(GpuTotals, body))


def _heartbeat(told: GpuTotals) -> dict[str, int | None]:
    return {"gpu_memory_used": told.used_mb, "gpu_memory_total": told.total_mb}


def _own_snapshot(event: str, slot: int | str | None, torch: cuda.TorchMemory) -> dict[str, Any]:
    """What this process knows by itself, in the daemon's form."""
    return {
        "timestamp": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "event": event,
        "slot": slot,
        "vram_usage_gb": None,
        "vram_allocated_gb": _gb(torch.allocated_bytes),
        "vram_reserved_gb": _gb(torch.reserved_bytes),
        "models": {},
    }


def _gb(size: int | None) -> float | None:
    return None if size is None else round(size / GB, 2)


def said_snapshot(snapshot: dict[str, Any]) -> dict[str, Any]:
    """The snapshot, logged for debugging."""
    if logger.isEnabledFor(logging.DEBUG):
        logger.debug("VRAM snapshot %s", json.dumps(snapshot))
    return snapshot
