"""What one turn remembers for the next. Owned by the cycle's single task and replaced whole: no locks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vram_manager.domain.action import Action, Stage
from vram_manager.domain.demand import Demand
from vram_manager.domain.snapshot import GpuMemory, LoadedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
    """An action that was asked and is not yet proven.

    `asked_at` is None while the request itself is under way. The `*_before` numbers were read just before
    it; `expected_bytes` is None where the hold could only be guessed. `rose_bytes` is the best rise of free
    memory seen so far and `rose_at` when it last grew: a free is told when it has stopped growing. `model` is the
    one that is asked to leave, as it was.
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
    model: LoadedModel | None = None
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
class Mending:
    """A model of Ollama's that is being brought back as `model` says it was, wholly on the GPU.

    `repair`: it was taken off for that. Else it had made room for somebody who no longer needs it.
    """

    model: LoadedModel
    gpu: str | None
    began_at: float
    repair: bool
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """Everything remembered between turns. A fresh one starts cooled down: a restart never frees twice."""

    pending: Pending | None = None
    episode: Episode | None = None
    demands: Mapping[str, Demand] = field(default_factory=dict)
    answered: frozenset[str] = frozenset()
    """Placements on the CPU for which all has been freed that there was."""
    had_room: frozenset[str] = frozenset()
    """Placements on the CPU that have had room: it is made again only where a repair would follow at once."""
    models: frozenset[str] | None = None
    fallbacks: Mapping[str, float] = field(default_factory=dict)
    """Placements on the CPU that are listed now, and since when."""
    pressure: Mapping[str, Pressure] = field(default_factory=dict)
    posted_at: Mapping[str, float] = field(default_factory=dict)
    frees_at: tuple[float, ...] = ()
    lesson: Lesson | None = None
    unreclaimable: Mapping[str, int] = field(default_factory=dict)
    mending: Mending | None = None
    repairs_at: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """When each model was taken off to be repaired, by digest."""
    meant: frozenset[str] = frozenset()
    """Placements on the CPU that had room when they were made: somebody wants them there."""
    made_room: LoadedModel | None = None
    """The last model that was unloaded for ComfyUI."""
    warmed_back: LoadedModel | None = None
    """It once it was back, as it was listed then: until it has been used it makes room for good."""
    in_vain: Mapping[str, float] = field(default_factory=dict)
    """Models that were asked to leave and stayed, and when: a request that never ends keeps them."""
    least_free: Mapping[str, tuple[tuple[float, int], ...]] = field(default_factory=dict)
    """The least that was free on each GPU lately, by spans of a few seconds, the latest last."""
    gpu_worked_at: float | None = None
    worker_dead: bool = False
    disagrees_since: float | None = None
    disagreement_told: bool = False
    dry_run_told: frozenset[str] = frozenset()
    used_at: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    fill_rate_bytes_per_second: float = 0.0
