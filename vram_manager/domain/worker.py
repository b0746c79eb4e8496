"""Workers: processes beside ours that tell what they hold, and what was answered them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Level(StrEnum):
    """How near to the limits of a GPU somebody is; UNKNOWN when its memory cannot be read."""

    OK = "ok"
    SOFT = "soft"
    HARD = "hard"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a worker says of itself in a call: the GPU it means (UUID or index) and what torch counts as its own."""

    gpu: str | None = None
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None

    @property
    def held_bytes(self) -> int | None:
        """What it says it holds: torch's pool where that is known, for all of the pool is taken from others."""
        return self.allocated_bytes if self.reserved_bytes is None else self.reserved_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Excursion:
    """Over the soft limit since `since`. `sustained` once that lasted long enough to count, and was told.

    `owner` is the worker that last asked about it, with its own words in `context`; None: nobody has.
    """

    since: float
    sustained: bool = False
    owner: str | None = None
    context: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class AtHardLimit:
    """A worker asked for more than the hard limit of a GPU leaves, last at `last_at`.

    `need_free_bytes` free there would be enough for what it asked; None: no free can make that fit.
    """

    gpu: str
    index: int
    since: float
    last_at: float
    requested_bytes: int
    need_free_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """The answer to "am I within the limits, also with what I am about to allocate?". None is not known."""

    level: Level
    sustained: bool
    used_bytes: int | None
    soft_limit_bytes: int | None
    hard_limit_bytes: int | None
    requested_bytes: int
    gpu: str | None
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OverBudget:
    """A model that is larger than was planned for it."""

    name: str
    bytes: int
    budget_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Whether a worker's models and buffers fit in its budget; without one (None) nothing is short."""

    owner: str
    models_bytes: int
    buffers_bytes: int
    total_bytes: int
    budget_bytes: int | None
    fits: bool
    shortfall_bytes: int
    over_budget: tuple[OverBudget, ...]
    message: str


class Phase(StrEnum):
    """Where in a generation a worker is."""

    START = "start"
    END = "end"


class Measure(StrEnum):
    """What a worker's memory was measured by, best first; two of a kind can be compared."""

    ALLOCATED = "allocated"
    RESERVED = "reserved"
    GPU = "gpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What a worker held at one moment. By `Measure.GPU` it is all that anybody has of the only GPU."""

    bytes: int
    measure: Measure


@dataclass(frozen=True, slots=True, kw_only=True)
class Leak:
    """What a worker keeps after a generation has grown from `initial_bytes`, over so many generations."""

    initial_bytes: int
    current_bytes: int
    delta_bytes: int
    generations: int
    delta_per_generation_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Trend:
    """What a worker keeps after its generations, as far as a leak needs it.

    `count` generations were measured by `measure`; `newest_bytes` are the newest of those after the warm-up,
    `baseline_bytes` is what it kept at `baseline_at` (a count), `low_bytes` the least since the last comparison.
    """

    measure: Measure | None = None
    count: int = 0
    newest_bytes: tuple[int, ...] = ()
    baseline_bytes: int | None = None
    baseline_at: int = 0
    low_bytes: int | None = None
    leak: Leak | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """The answer to one: what it left behind (None: not known), how many ended, and a leak found with it."""

    delta_bytes: int | None
    generations: int
    leak: Leak | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Generations:
    """A worker's generations: `count` that ended, those under way by id, and the newest that ended by id."""

    count: int = 0
    open: Mapping[str, Held | None] = field(default_factory=dict)
    ended: Mapping[str, Generation] = field(default_factory=dict)
    last_delta_bytes: int | None = None
    trend: Trend = field(default_factory=Trend)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Memory at a named point of a worker's work; gb are 10^9 bytes, None is not known.

    `vram_usage_gb` is all that is taken of the GPU, the next two are the worker's own words.
    """

    timestamp: str
    event: str
    slot: int | str | None
    vram_usage_gb: float | None
    vram_allocated_gb: float | None
    vram_reserved_gb: float | None
    models: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """All that is known of one owner. `excess` and `hard` are by the UUID of a GPU.

    `report` is the newest that said what it holds, at `reported_at`.
    """

    owner: str
    seen_at: float
    report: Report = field(default_factory=Report)
    reported_at: float | None = None
    models: Mapping[str, int] = field(default_factory=dict)
    buffers: Mapping[str, int] = field(default_factory=dict)
    budget_bytes: int | None = None
    generations: Generations = field(default_factory=Generations)
    excess: Mapping[str, Excursion] = field(default_factory=dict)
    hard: Mapping[str, AtHardLimit] = field(default_factory=dict)
