"""What one turn remembers for the next. Owned by the cycle's single task and replaced whole: no locks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vram_manager.domain.action import Action, Stage
from vram_manager.domain.demand import Demand
from vram_manager.domain.snapshot import GpuMemory


@dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
    """An action that was asked and is not yet proven.

    `asked_at` is None while the request itself is under way. The `*_before` numbers were read just before
    it; `expected_bytes` is None where the hold could only be guessed. `rose_bytes` is the best rise of free
    memory seen so far and `rose_at` when it last grew: a free is told when it has stopped growing.
    """

    action: Action
    gpu: str | None
    reason: str
    demand: Demand | None
    decided_at: float
    asked_at: float | None = None
    posted_at: float | None = None
    posts: int = 0
    action_id: str | None = None
    expected_bytes: int | None = None
    free_bytes_before: int | None = None
    used_percent_before: float | None = None
    holder_bytes_before: int | None = None
    runs_before: int | None = None
    rose_bytes: int = 0
    rose_at: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the actuator read just before it asked, and when it asked. `note` says what was odd about it."""

    at: float
    gpu_memory: GpuMemory | None
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """The actuator looked again and did not ask, or the backend said no. `tried` when a request went out."""

    at: float
    why: str
    tried: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """One answer to one demand: a soft free and, if that was not enough, the unload stage.

    It ends when ComfyUI runs again: what it holds then was loaded since, and somebody is using it.
    """

    demand: Demand
    gpu: str | None
    runs: int
    freed_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """What the last free of ComfyUI taught.

    `runs` is ComfyUI's run count at the time: while it stands still there is nothing new to free.
    `stages` are those tried since then, `freed_bytes` is what came back, `torch_bytes_after` what its torch
    still held. `floors` is, per stage, the memory nobody accounted for that stayed: never ComfyUI's to give.
    """

    runs: int
    stages: frozenset[Stage]
    freed_bytes: int
    torch_bytes_after: int | None = None
    floors: Mapping[Stage, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pressure:
    """One GPU's use over the threshold: since when, and whether the grace period is over."""

    high_since: float
    began: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """Everything remembered between turns. A fresh one starts cooled down: a restart never frees twice."""

    pending: Pending | None = None
    episode: Episode | None = None
    demands: Mapping[str, Demand] = field(default_factory=dict)
    answered: frozenset[str] = frozenset()
    models: frozenset[str] | None = None
    fallbacks: frozenset[str] = frozenset()
    pressure: Mapping[str, Pressure] = field(default_factory=dict)
    posted_at: Mapping[str, float] = field(default_factory=dict)
    frees_at: tuple[float, ...] = ()
    lesson: Lesson | None = None
    unreclaimable: Mapping[str, int] = field(default_factory=dict)
    gpu_worked_at: float | None = None
    worker_dead: bool = False
    disagrees_since: float | None = None
    disagreement_told: bool = False
    dry_run_told: frozenset[str] = frozenset()
    used_at: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    fill_rate_bytes_per_second: float = 0.0
