"""A reading is what a sensor last said, with its age, or why there is none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True, slots=True)
class Seen(Generic[T_co]):
    """A value that was read at `at` (monotonic seconds)."""

    value: T_co
    at: float


@dataclass(frozen=True, slots=True)
class Missing:
    """Not known, and why. `remedy` says what a person can do about it, where that is known."""

    why: str
    remedy: str | None = None
    last_seen_at: float | None = None


@dataclass(frozen=True, slots=True)
class Off:
    """Switched off by configuration: nothing is expected here, so nothing is missing."""


Reading: TypeAlias = Seen[T] | Missing | Off
