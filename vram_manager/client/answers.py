"""What the daemon answers, as values. None is not known; an answer that lacks what it must have is Malformed."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, TypeVar

from vram_manager.client.wire import Malformed

T = TypeVar("T")
Level = Literal["ok", "soft", "hard", "unknown"]

_SHOWN = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseInfo:
    """A lease as the daemon knows it. Times are RFC 3339 in UTC; `expires_at` is None while it is held.

    `visible_bytes` of it show in the GPU's own numbers already, `outstanding_bytes` are still kept free for it.
    """

    id: str
    owner: str
    gpu: str | None = None
    bytes: int = 0
    visible_bytes: int = 0
    outstanding_bytes: int = 0
    claimed_bytes: int | None = None
    used_bytes: int | None = None
    peak_bytes: int | None = None
    overclaimed_bytes: int = 0
    priority: str = "normal"
    held: bool = False
    granted_at: str | None = None
    expires_at: str | None = None
    ttl_seconds: float = 60.0
    pid: int | None = None
    estimate_source: str = "request"


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """Something that would be admitted now: so much on that GPU, or that model."""

    gpu: str | None = None
    required_bytes: int | None = None
    model: str | None = None
    words: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """May it be allocated, and why (not)? True where it may.

    `fail_open` says that nobody could know, `dry_run` that it would have been refused, `monitoring` whether the
    daemon looks at all. `retry_after_seconds` is when asking again makes sense.
    """

    admitted: bool
    reason: str
    gpu: str | None = None
    required_bytes: int | None = None
    margin_bytes: int = 0
    available_bytes: int | None = None
    shortfall_bytes: int | None = None
    reclaimable_bytes: int = 0
    estimate_source: str | None = None
    estimate: str = ""
    lease: LeaseInfo | None = None
    fail_open: bool = False
    dry_run: bool = False
    monitoring: bool = True
    waited_seconds: float = 0.0
    position: int | None = None
    retry_after_seconds: float | None = None
    alternatives: tuple[Alternative, ...] = ()

    def __bool__(self) -> bool:
        return self.admitted


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Where a GPU stands against its two limits, what is about to be allocated included.

    `sustained` is a soft limit passed for longer than its grace period.
    """

    level: Level
    sustained: bool = False
    used_bytes: int | None = None
    soft_limit_bytes: int | None = None
    hard_limit_bytes: int | None = None
    requested_bytes: int | None = None
    gpu: str | None = None
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leak:
    """Memory that grew from generation to generation and did not come back."""

    initial_bytes: int
    current_bytes: int
    delta_bytes: int
    generations: int
    delta_per_generation_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """One unit of work is over: what its memory grew by, how many there were, and what they leak."""

    delta_bytes: int | None = None
    generations: int = 0
    leak: Leak | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OverBudget:
    """A model that holds more than it may."""

    name: str
    bytes: int
    budget_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelsReport:
    """What a worker holds and is about to pre-allocate, against its budget."""

    owner: str
    models_bytes: int
    buffers_bytes: int
    total_bytes: int
    budget_bytes: int | None = None
    fits: bool = True
    shortfall_bytes: int = 0
    over_budget: tuple[OverBudget, ...] = ()
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuTotals:
    """One GPU in `GET /health/vram`; MB are MiB."""

    index: int | None = None
    uuid: str | None = None
    name: str = ""
    total_mb: int | None = None
    used_mb: int | None = None
    free_mb: int | None = None
    usage_percent: float | None = None

    def __str__(self) -> str:
        return f"GPU {self.uuid if self.index is None else self.index}" + (f" ({self.name})" if self.name else "")


def admission(body: Any) -> Admission:
    """POST /v1/admissions."""
    return read(Admission, body, lease=_optional(LeaseInfo), alternatives=_each(Alternative))


def lease_info(body: Any) -> LeaseInfo:
    """What renew, claimed and hold answer."""
    return read(LeaseInfo, body.get("lease") if isinstance(body, dict) else body)


def limits(body: Any) -> Limits:
    """POST /v1/limits/check."""
    told = read(Limits, body)
    if told.level not in ("ok", "soft", "hard", "unknown"):
        raise Malformed(f"level is {told.level[:_SHOWN]!r}")
    return told


def generated(body: Any) -> Generated:
    """POST /v1/generations."""
    return read(Generated, body, leak=_optional(Leak))


def models_report(body: Any) -> ModelsReport:
    """POST /v1/workers/{owner}/models."""
    return read(ModelsReport, body, over_budget=_each(OverBudget))


def gpus(body: Any) -> tuple[GpuTotals, ...]:
    """The GPUs of GET /health/vram."""
    return tuple(_each(GpuTotals)(as_object(body).get("gpus")))


def as_object(body: Any) -> dict[str, Any]:
    """A JSON object, whatever is in it."""
    if not isinstance(body, dict):
        raise Malformed(f"no JSON object: {str(body)[:_SHOWN]!r}")
    return body


_TYPES: dict[str, tuple[type, ...]] = {
    "bool": (bool,),
    "int": (int,),
    "str": (str,),
    "Level": (str,),
    "float": (float, int),
    "int | None": (int, type(None)),
    "str | None": (str, type(None)),
    "float | None": (float, int, type(None)),
}
_FIELDS: dict[type, list[tuple[str, tuple[type, ...] | None, bool]]] = {}


def read(kind: type[T], body: Any, **nested: Any) -> T:
    """A `kind` of the fields of a JSON object that it knows; what has a default may be absent or null."""
    told = as_object(body)
    known = _FIELDS.get(kind)
    if known is None:
        listed = fields(kind)  # type: ignore[arg-type]
        known = [(one.name, _TYPES.get(str(one.type)), one.default is MISSING) for one in listed]
        _FIELDS[kind] = known
    values = {}
    for name, types, needed in known:
        value = told.get(name)
        if value is None and not needed:
            continue
        if types is None:
            values[name] = nested[name](value)
        # Exactly: to isinstance, true is a number.
        elif type(value) in types:
            values[name] = value
        else:
            raise Malformed(f"{name} is {str(value)[:_SHOWN]!r}")
    return kind(**values)


def _optional(kind: type[T]) -> Any:
    return lambda value: read(kind, value)


def _each(kind: type[T]) -> Any:
    def listed(value: Any) -> tuple[T, ...]:
        if not isinstance(value, list):
            raise Malformed(f"no list: {str(value)[:_SHOWN]!r}")
        return tuple(read(kind, one) for one in value)

    return listed
