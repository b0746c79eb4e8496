"""Floors: what a tenant keeps when nothing of it is wanted, again and again over its life."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise

# A floor is the least of so many neighbours: one of them may have been looked at too early.
BLOCK = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What one look found. `measure` says in words how and when it was measured: only equal ones can be compared.

    `life` is what makes the tenant the same one still: its version, how it was started, its process, the driver.
    """

    bytes: int
    measure: str
    life: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """One point of a floor. `runs` generations came since the one before, `ran` is what they worked with, by name."""

    at: datetime
    bytes: int
    runs: int = 0
    ran: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """A floor that rose and rose: from what to what, over so many generations, `most` often with that file or model."""

    initial_bytes: int
    current_bytes: int
    generations: int
    most: tuple[str, int] | None = None

    @property
    def delta_bytes(self) -> int:
        return self.current_bytes - self.initial_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """What `tenant` kept, oldest first, in one life and by one measure.

    `count` marks were made in that life; the newest `judged` of them count: neither those of the warm-up, nor those
    that were told as a leak already, which happened `leaks` times, of `told_bytes` in all. `baseline_bytes` is the
    floor that life began with.
    """

    tenant: str
    measure: str
    life: str
    marks: tuple[Mark, ...] = ()
    count: int = 0
    judged: int = 0
    leaks: int = 0
    told_bytes: int = 0
    baseline_bytes: int = 0

    @property
    def judged_marks(self) -> tuple[Mark, ...]:
        """Those that count; all, while there are none."""
        return self.marks[-self.judged :]

    @property
    def floor_bytes(self) -> int:
        """The floor now; 0 without marks."""
        return min((mark.bytes for mark in self.judged_marks[-BLOCK:]), default=0)

    @property
    def growth_bytes(self) -> int:
        """How much it has risen in this life."""
        return max(0, self.floor_bytes - self.baseline_bytes)

    @property
    def generations(self) -> int:
        """How many came between the marks."""
        return runs_between(self.marks)


@dataclass(frozen=True, slots=True)
class Work:
    """What ComfyUI worked with: its files as `subject`, and the one that people know it by."""

    subject: str
    name: str


def runs_between(marks: tuple[Mark, ...]) -> int:
    """The generations from the first of `marks` to the last."""
    return sum(later.runs for _, later in pairwise(marks))


def most_often(marks: tuple[Mark, ...]) -> tuple[str, int] | None:
    """What ran most often between the first of `marks` and the last, with how often; None: nobody could tell."""
    ran: Counter[str] = Counter()
    for _, later in pairwise(marks):
        ran.update(dict(later.ran))
    return max(ran.items(), key=lambda one: (one[1], one[0]), default=None)
