"""What the history remembers: how each GPU was used at a moment, or over a minute or an hour.

Tuples, as one answer is made of tens of thousands of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Which GPU it was, also when it is long gone. `reserved_bytes` None: its driver does not say."""

    uuid: str
    index: int
    name: str
    total_bytes: int
    reserved_bytes: int | None


class GpuUse(NamedTuple):
    """The use of one GPU: a moment's, or the mean over `seconds` of known use. None: not known.

    `taken_max_bytes`, `free_min_bytes` and `peaks` are the extremes: of a moment, those since the moment before.
    `tenants` has bytes by `kind tenant`, as in "ollama ollama:llama3.1:8b"; `peaks` only those that had more.
    """

    seconds: float
    taken_bytes: int | None
    taken_max_bytes: int | None
    free_bytes: int | None
    free_min_bytes: int | None
    leased_bytes: int
    utilization_percent: float | None
    temperature_celsius: float | None
    power_watts: float | None
    tenants: Mapping[str, int]
    peaks: Mapping[str, int]


class Sample(NamedTuple):
    """All GPUs, by their number in the history, at or from `at` (seconds of the wall clock since 1970, UTC).

    A GPU that is not in it is not known from then on; with none, nothing is. `queue` is how many prompts ComfyUI had
    left: of a span, the most.
    """

    at: float
    queue: int | None
    gpus: Mapping[int, GpuUse]


class Level(StrEnum):
    """How fine the history is: moments are kept for a day, minutes and hours for a month."""

    RAW = "raw"
    MINUTE = "minute"
    HOUR = "hour"

    @property
    def seconds(self) -> int:
        """The span of one sample, and the least step that is made of them."""
        return {Level.RAW: 1, Level.MINUTE: 60, Level.HOUR: 3600}[self]


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """What of the history is asked for: from `begin` until before `end`, in seconds since 1970.

    `step_seconds` None: whatever gives a good picture. `gpu` is a UUID, None: all.
    """

    begin: float
    end: float
    step_seconds: int | None = None
    gpu: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantSeries:
    """The mean and the most that one tenant had in each step."""

    kind: str
    tenant: str
    bytes: list[int | None]
    max_bytes: list[int | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSeries:
    """One GPU in columns of equal length; `at` is when each step begins. A gap is one step where all is None."""

    device: Device
    at: list[int]
    columns: Mapping[str, list[float | None]]
    tenants: tuple[TenantSeries, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """The answer to a `Window`."""

    window: Window
    step_seconds: int
    level: Level
    gpus: tuple[GpuSeries, ...]
    queue_at: list[int]
    queue_remaining: list[int | None]
