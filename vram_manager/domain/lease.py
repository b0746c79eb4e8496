"""Admission: who asks for memory, who was promised some, and who waits in line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum

from vram_manager.domain.size import Size


class Priority(IntEnum):
    """Who goes first. A batch job makes nobody give way who is only pausing."""

    INTERACTIVE = 0
    NORMAL = 1
    BATCH = 2


class Source(StrEnum):
    """Where an estimate comes from, best first."""

    REQUEST = "request"
    LEARNED = "learned"
    TABLE = "table"
    FILES = "files"
    DEFAULT = "default"


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """How much memory something will need.

    `subject` is what the peak is remembered under afterwards (None: nothing to learn), `words` says where the
    number comes from, `names` are the models or files it is about. `digest` is that of an Ollama model, `context`
    what its user asks for (None: the server's own).
    """

    size: Size
    source: Source
    subject: str | None = None
    words: str = ""
    names: tuple[str, ...] = ()
    digest: str | None = None
    context: int | None = None

    @property
    def for_ollama(self) -> bool:
        """Ollama itself will take the memory; who names both a size and a model means memory of its own."""
        return self.digest is not None and self.source is not Source.REQUEST


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One "may I?". `id` is the caller's own: the same id again is the same question, not a second one.

    `gpu` is a UUID or an index, None for the best. `wait_seconds` None waits only as long as making room takes.
    `for_comfyui` is memory that ComfyUI's process will take, not the owner's. `pid` is the process that will
    hold the memory, as this process sees it; None where it cannot be seen. `at_gateway`: a call that a gateway keeps
    back for a while; Ollama and ComfyUI take turns in these, and in the end they go on whatever the answer.
    `afresh`: its model may be gone before it is used, so that it is loaded by now does not count. `new_files`:
    ComfyUI holds nothing of this prompt's files yet.
    """

    id: str
    owner: str
    estimate: Estimate
    margin_bytes: int
    gpu: str | None = None
    priority: Priority = Priority.NORMAL
    wait_seconds: float | None = None
    ttl_seconds: float = 60.0
    takes_lease: bool = True
    dry_run: bool = False
    for_comfyui: bool = False
    pid: int | None = None
    at_gateway: bool = False
    afresh: bool = False
    new_files: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """Memory promised to one owner until it is released, expires, or its holder is gone.

    `visible_bytes` of it already show in the GPU's own numbers: only the rest is held back from others.
    `used_bytes` is what the owner was last seen to hold, or said so; None: neither. `baseline_bytes` is what
    its process held before, `unaccounted_bytes` what nobody accounted for on the GPU at the grant,
    `left_bytes` what leases that ended since may have left behind.
    `holds` counts the open connections that keep it alive. `restores` counts restarts without a renewal. One of a
    call `at_gateway` ends with the daemon, as the call does.
    """

    id: str
    request_id: str
    owner: str
    gpu: str | None
    bytes: int
    priority: Priority
    estimate: Estimate
    ttl_seconds: float
    granted_at: float
    expires_at: float
    for_comfyui: bool = False
    pid: int | None = None
    pid_started: str | None = None
    holds: int = 0
    claimed_bytes: int | None = None
    claimed_at: float | None = None
    visible_bytes: int = 0
    used_bytes: int | None = None
    peak_bytes: int | None = None
    baseline_bytes: int | None = None
    unaccounted_bytes: int | None = None
    left_bytes: int = 0
    runs_before: int | None = None
    restores: int = 0
    at_gateway: bool = False
    new_files: bool = False

    @property
    def outstanding_bytes(self) -> int:
        """Promised and not yet visible: what nobody else may have."""
        return max(0, self.bytes - self.visible_bytes)

    @property
    def overclaimed_bytes(self) -> int:
        """Taken beyond what was asked for."""
        return max(0, (self.used_bytes or 0) - self.bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """A place in line, since `since`."""

    request: Request
    since: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Book:
    """All that was promised and everybody who waits. Replaced whole, between two awaits: no locks.

    `served_at` is when each owner was last granted something, for fairness among owners.
    """

    leases: Mapping[str, Lease] = field(default_factory=dict)
    line: tuple[Ticket, ...] = ()
    served_at: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """Something that would be admitted now: so much on that GPU, or that model of the table."""

    gpu: str | None
    bytes: int
    words: str
    model: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The answer to a request, with the numbers it was made on; None is not known.

    `hopeless` is a request that no waiting can help. `reclaimable_bytes` is what asking the tenants to give way
    could bring on that GPU.
    """

    admitted: bool
    reason: str
    gpu: str | None = None
    required_bytes: int | None = None
    available_bytes: int | None = None
    shortfall_bytes: int | None = None
    reclaimable_bytes: int = 0
    hopeless: bool = False
    fail_open: bool = False
    dry_run: bool = False
    position: int | None = None
    retry_after_seconds: float | None = None
    alternatives: tuple[Alternative, ...] = ()
