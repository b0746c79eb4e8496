"""What a recording is made of: looks at a GPU, and what follows from all of them. Pure: times are handed in."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Final

# Twice the dots that a wide plot has, so that a long recording costs no more memory than a short one.
_MOST_COLUMNS: Final = 4096
_FIRST_WIDTH_SECONDS: Final = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """One GPU as one source saw it. `taken_bytes` is what processes have: the driver's own reserve is not in it.

    taken + free + reserved = total; None is unknown. `command_bytes` is what the recorded command and its descendants
    have of it, known only of the looks that list processes. It was so at some moment of the last `age_seconds`.
    """

    uuid: str
    index: int
    name: str
    source: str
    taken_bytes: int
    free_bytes: int | None = None
    reserved_bytes: int | None = None
    total_bytes: int | None = None
    command_bytes: int | None = None
    age_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Unread:
    """A GPU that is there and whose memory cannot be read now."""

    uuid: str
    index: int
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A look with its time, or None where nobody could look any more: a gap begins. `seconds` count from the first."""

    at: datetime
    seconds: float
    index: int
    look: Look | None


@dataclass(frozen=True, slots=True)
class Column:
    """Neighbouring samples, from `start` to `end` (seconds): all lay between `low` and `high` (bytes)."""

    start: float
    end: float
    low: int
    high: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """From the last look before it to the first after it, seconds; and why nobody could look."""

    start: float
    end: float
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """What all looks at one GPU amount to, in bytes and seconds.

    `average_bytes` weighs each value by the time it lasted, gaps left out. `longest_unseen_seconds` is the longest time
    between the beginning of a look and the end of the next: what lasted longer was seen.
    """

    samples: int
    peak_bytes: int
    peak_seconds: float
    average_bytes: float
    minimum_bytes: int
    first_bytes: int
    last_bytes: int
    longest_unseen_seconds: float
    command_peak_bytes: int | None
    command_looks: int


class Series:
    """All looks at one GPU, in order."""

    def __init__(self, first: Look) -> None:
        self.newest = first
        self.sources: list[str] = []
        self.gaps: list[Gap] = []
        self.total_bytes = first.total_bytes
        self._samples = 0
        self._peak = self._first = self._minimum = first.taken_bytes
        self._peak_seconds = 0.0
        self._area = self._lasted = self._longest_unseen = 0.0
        self._began = self._ended = 0.0
        self._lost: str | None = None
        self._command_peak: int | None = None
        self._command_looks = 0
        self._width = _FIRST_WIDTH_SECONDS
        self._runs: list[list[Column]] = [[]]

    def add(self, look: Look, began: float, ended: float) -> None:
        """A look from `began` to `ended`, seconds since the recording began."""
        taken = look.taken_bytes
        # Nobody saw the time before the first look, either.
        self._longest_unseen = max(self._longest_unseen, ended - self._began)
        if self._lost is not None:
            self.gaps.append(Gap(start=self._ended, end=ended, why=self._lost))
            self._lost = None
            self._runs.append([])
        elif self._samples:
            self._area += (ended - self._ended) * (taken + self.newest.taken_bytes) / 2
            self._lasted += ended - self._ended
        if not self._samples or taken > self._peak:
            self._peak, self._peak_seconds = taken, ended
        self._minimum = min(self._minimum, taken)
        if look.command_bytes is not None:
            self._command_looks += 1
            self._command_peak = max(self._command_peak or 0, look.command_bytes)
        if look.source not in self.sources:
            self.sources.append(look.source)
        self.total_bytes = look.total_bytes or self.total_bytes
        self._samples += 1
        self.newest, self._began, self._ended = look, began, ended
        self._draw(Column(ended, ended, taken, taken))

    def lose(self, why: str) -> bool:
        """Nobody can look any more. False where that was known already."""
        known, self._lost = self._lost, self._lost or why
        return known is None

    def end(self, seconds: float) -> None:
        """The recording ends there."""
        self._longest_unseen = max(self._longest_unseen, seconds - self._began)
        if self._lost is not None:
            self.gaps.append(Gap(start=self._ended, end=max(seconds, self._ended), why=self._lost))
            self._lost = None

    def statistics(self) -> Statistics:
        """Of everything so far; at least one look was added."""
        middle = self._area / self._lasted if self._lasted else (self._first + self.newest.taken_bytes) / 2
        return Statistics(
            samples=self._samples,
            peak_bytes=self._peak,
            peak_seconds=self._peak_seconds,
            average_bytes=min(max(middle, self._minimum), self._peak),  # a float sum may be off by its last digit
            minimum_bytes=self._minimum,
            first_bytes=self._first,
            last_bytes=self.newest.taken_bytes,
            longest_unseen_seconds=self._longest_unseen,
            command_peak_bytes=self._command_peak,
            command_looks=self._command_looks,
        )

    def runs(self) -> tuple[tuple[Column, ...], ...]:
        """The course of it, cut where there are gaps; coarser the longer it is, but no peak and no low is lost."""
        return tuple(tuple(run) for run in self._runs if run)

    def _draw(self, column: Column) -> None:
        _join(self._runs[-1], column, self._width)
        while sum(map(len, self._runs)) > _MOST_COLUMNS + len(self._runs):
            self._width *= 2
            for run in self._runs:
                whole = run[:]
                run.clear()
                for part in whole:
                    _join(run, part, self._width)


def _join(run: list[Column], new: Column, width: float) -> None:
    """Puts `new` at the end of the run: into its last column where both begin in the same stretch of time."""
    if run and int(run[-1].start / width) == int(new.start / width):
        last = run[-1]
        run[-1] = Column(last.start, new.end, min(last.low, new.low), max(last.high, new.high))
    else:
        run.append(new)


def heights(series: Series, width: int) -> list[int | None]:
    """The highest value in each of `width` equal stretches of the whole time; None where nobody looked."""
    runs = series.runs()
    start, end = runs[0][0].start, runs[-1][-1].end
    step = (end - start) / width or 1.0
    found: list[int | None] = [None] * width

    def note(seconds: float, high: int) -> None:
        place = min(width - 1, int((seconds - start) / step))
        found[place] = max(high, found[place] or 0)

    for run in runs:
        for column in run:
            note(column.start, column.high)
            note(column.end, column.high)
        for one, other in pairwise(run):
            # Looks may be rarer than the stretches: what lies between two is as high as the first was.
            for place in range(int((one.end - start) / step) + 1, min(width, int((other.start - start) / step))):
                found[place] = max(one.high, found[place] or 0)
    return found
