"""From moments to means: what is worth remembering, and how a window of it becomes columns.

A moment is true until the next one, but not for longer than `hold_seconds`: after that nothing is known. Means are
weighted by time; the highest and the lowest value of all are never lost on the way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, pairwise
from math import ceil
from typing import TypeVar

from vram_manager.domain.sample import Device, GpuSeries, GpuUse, Level, Sample, TenantSeries

# A smaller change is noise: a desktop's windows come and go by as much.
MOVED_BYTES = 16 * 2**20
GOOD_POINTS, MOST_POINTS = 375, 1500
# How often there is a moment while it moves, and how many of them, times the GPUs in each, are read in some 60 ms.
MOMENT_SECONDS, MOST_MOMENTS = 5.0, 6000
# More are not told apart in a picture; the smallest are shown among the others.
MOST_TENANTS = 32
OTHERS = "others others"
COLUMNS = (
    "taken_bytes",
    "taken_max_bytes",
    "free_bytes",
    "free_min_bytes",
    "leased_bytes",
    "utilization_percent",
    "temperature_celsius",
    "power_watts",
)
# From ten minutes straight to an hour: the minutes of a week take too long to read, its hours are there in no time.
_STEPS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 3600, 7200, 10800, 21600, 43200, 86400)
# So that the highest value counts even of a moment that was over at once.
_LEAST_SECONDS = 0.001

T = TypeVar("T")
Piece = tuple[float, Sample, float | None]
"""From when, what, and for how many seconds; None: for each GPU as many as its use says."""


def moved(before: Sample, now: Sample) -> bool:
    """Something worth a moment of its own: memory, the queue, a GPU that came or went."""
    if before.queue != now.queue or before.gpus.keys() != now.gpus.keys():
        return True
    return any(_differs(use, now.gpus[number]) for number, use in before.gpus.items())


def _differs(before: GpuUse, now: GpuUse) -> bool:
    if before.taken_bytes is None or now.taken_bytes is None or now.taken_max_bytes is None:
        return before.taken_bytes is not now.taken_bytes
    if max(abs(now.taken_bytes - before.taken_bytes), now.taken_max_bytes - before.taken_bytes) >= MOVED_BYTES:
        return True
    if abs(now.leased_bytes - before.leased_bytes) >= MOVED_BYTES:
        return True
    had, has = before.tenants, now.tenants
    return any(abs(has.get(name, 0) - had.get(name, 0)) >= MOVED_BYTES for name in had.keys() | has.keys())


def with_peaks(before: Sample, now: Sample) -> Sample:
    """`now`, with the extremes of `before` where those are further out."""
    return now._replace(
        gpus={number: _with_peaks(before.gpus.get(number), use) for number, use in now.gpus.items()},
    )


def _with_peaks(before: GpuUse | None, now: GpuUse) -> GpuUse:
    if before is None or now.taken_bytes is None:
        return now
    peaks = {
        name: peak
        for name, peak in chain(before.tenants.items(), before.peaks.items())
        if peak > now.tenants.get(name, 0)
    }
    return now._replace(
        taken_max_bytes=_most(before.taken_max_bytes, now.taken_max_bytes),
        free_min_bytes=_least(before.free_min_bytes, now.free_min_bytes),
        peaks=peaks,
    )


def _most(one: int | None, other: int | None) -> int | None:
    return other if one is None or (other is not None and other > one) else one


def _least(one: int | None, other: int | None) -> int | None:
    return other if one is None or (other is not None and other < one) else one


def without_peaks(sample: Sample) -> Sample:
    """As it was at the moment itself."""
    return sample._replace(
        gpus={
            number: use._replace(taken_max_bytes=use.taken_bytes, free_min_bytes=use.free_bytes, peaks={})
            for number, use in sample.gpus.items()
        }
    )


def pieces(moments: Iterable[Sample], until: float, step_seconds: int, hold_seconds: float) -> Iterator[Piece]:
    """Each moment for as long as it was true, cut where a step ends; the last one `until`. They come in order."""
    for moment, after in pairwise(chain(moments, (None,))):
        assert moment is not None
        end = min(moment.at + hold_seconds, until if after is None else after.at)
        begin, edge = moment.at, (moment.at // step_seconds + 1) * step_seconds
        yield begin, moment, max(min(end, edge) - begin, _LEAST_SECONDS)
        if edge < end:
            calm = without_peaks(moment)
            while edge < end:
                begin, edge = edge, edge + step_seconds
                yield begin, calm, min(end, edge) - begin


def folded(parts: Iterable[Piece], step_seconds: int) -> list[Sample]:
    """One sample for each step of which anything is known, in order."""
    steps: dict[int, tuple[list[int], dict[int, _Sum]]] = {}
    for at, sample, seconds in parts:
        if sample.queue is None and not sample.gpus:
            continue
        begin = int(at // step_seconds) * step_seconds
        queue, sums = steps.setdefault(begin, ([], {}))
        if sample.queue is not None:
            queue.append(sample.queue)
        for number, use in sample.gpus.items():
            total = sums.get(number)
            if total is None:
                total = sums[number] = _Sum()
            total.add(use, use.seconds if seconds is None else seconds)
    return [
        Sample(begin, max(queue, default=None), {number: total.use() for number, total in sums.items()})
        for begin, (queue, sums) in sorted(steps.items())
    ]


class _Sum:
    """The use of one GPU in one step, as far as it was added. Written out, as a window adds tens of thousands."""

    __slots__ = ("free", "free_min", "gauges", "known", "leased", "seconds", "taken", "taken_max", "tenants")

    def __init__(self) -> None:
        self.seconds = self.leased = 0.0
        # Memory: for how long it is known, and bytes times seconds.
        self.known = self.taken = self.free = 0.0
        self.taken_max: int | None = None
        self.free_min: int | None = None
        # Of each gauge: value times seconds, and for how long it is known.
        self.gauges = [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
        # Of each tenant: bytes times seconds, and the most.
        self.tenants: dict[str, list[float]] = {}

    def add(self, use: GpuUse, seconds: float) -> None:
        _, taken, taken_max, free, free_min, leased, utilization, temperature, power, tenants, peaks = use
        self.seconds += seconds
        self.leased += leased * seconds
        gauges = self.gauges
        if utilization is not None:
            gauges[0] += utilization * seconds
            gauges[1] += seconds
        if temperature is not None:
            gauges[2] += temperature * seconds
            gauges[3] += seconds
        if power is not None:
            gauges[4] += power * seconds
            gauges[5] += seconds
        if taken is None or free is None or taken_max is None or free_min is None:
            return
        self.known += seconds
        self.taken += taken * seconds
        self.free += free * seconds
        if self.taken_max is None or taken_max > self.taken_max:
            self.taken_max = taken_max
        if self.free_min is None or free_min < self.free_min:
            self.free_min = free_min
        totals = self.tenants
        for name, size in tenants.items():
            total = totals.get(name)
            if total is None:
                totals[name] = [size * seconds, size]
            else:
                total[0] += size * seconds
                if size > total[1]:  # noqa: PLR1730 - max() would take as long as all the rest
                    total[1] = size
        for name, peak in peaks.items():
            total = totals.setdefault(name, [0.0, 0])
            total[1] = max(total[1], peak)

    def use(self) -> GpuUse:
        known, gauges = self.known, self.gauges
        tenants: dict[str, int] = {}
        peaks: dict[str, int] = {}
        for name, (total, most) in self.tenants.items():
            mean = tenants[name] = round(total / known)
            if most > mean:
                peaks[name] = int(most)
        return GpuUse(
            known or self.seconds,
            round(self.taken / known) if known else None,
            self.taken_max,
            round(self.free / known) if known else None,
            self.free_min,
            round(self.leased / self.seconds),
            round(gauges[0] / gauges[1], 1) if gauges[1] else None,
            round(gauges[2] / gauges[3], 1) if gauges[3] else None,
            round(gauges[4] / gauges[5], 1) if gauges[5] else None,
            tenants,
            peaks,
        )


def plan(
    begin: float, end: float, asked_seconds: int | None, oldest: Mapping[Level, float], gpus: int = 1
) -> tuple[Level, int]:
    """From which level a window is told, and in steps of how many seconds: at most 1500 of them.

    `oldest` is how far back each level that has anything reaches. Where the finer one has forgotten, the next counts.
    With many GPUs nobody looks at moments of hours: unless they are asked for, minutes do, which are read in no time.
    """
    wanted = _nice((end - begin) / GOOD_POINTS) if asked_seconds is None else asked_seconds
    if asked_seconds is None and (end - begin) / MOMENT_SECONDS * gpus > MOST_MOMENTS:
        wanted = max(wanted, Level.MINUTE.seconds)
    # One less, as the first and the last step may lie half outside.
    step = max(wanted, _nice((end - begin) / (MOST_POINTS - 1)))
    fitting = [level for level in Level if level.seconds <= step][-1]
    level = next(level for level in Level if level.seconds >= fitting.seconds and _remembers(level, begin, end, oldest))
    return level, ceil(step / level.seconds) * level.seconds


def _remembers(level: Level, begin: float, end: float, oldest: Mapping[Level, float]) -> bool:
    """Back to `begin`, or no coarser level does so any better."""
    reach = oldest.get(level, end)
    further = (oldest.get(other, end) + other.seconds for other in Level if other.seconds > level.seconds)
    return reach <= begin or all(other >= min(reach, end) for other in further)


def _nice(seconds: float) -> int:
    """The next step that people count in."""
    return next((step for step in _STEPS if step >= seconds), ceil(seconds / 86400) * 86400)


def in_columns(samples: Sequence[Sample], number: int, device: Device, step_seconds: int) -> GpuSeries:
    """What `samples`, one a step, say of the GPU with that number."""
    rows = list(_with_gaps(((int(one.at), one.gpus.get(number)) for one in samples), step_seconds))
    uses = [use for _, use in rows]
    known = [None if use is None or use.taken_bytes is None else use for use in uses]
    shown, rest = _shown(use for use in known if use is not None)
    sizes = [None if use is None else _told_as(use.tenants, rest) for use in known]
    peaks = [None if use is None else _told_as(_highest(use), rest) for use in known]
    return GpuSeries(
        device=device,
        at=[at for at, _ in rows],
        columns={name: [None if use is None else getattr(use, name) for use in uses] for name in COLUMNS},
        tenants=tuple(
            TenantSeries(
                kind=name.partition(" ")[0],
                tenant=name.partition(" ")[2],
                bytes=[None if one is None else one.get(name, 0) for one in sizes],
                max_bytes=[None if one is None else one.get(name, 0) for one in peaks],
            )
            for name in shown
        ),
    )


def queue_in_columns(samples: Sequence[Sample], step_seconds: int) -> tuple[list[int], list[int | None]]:
    """When, and how many prompts were left at most."""
    rows = list(_with_gaps(((int(one.at), one.queue) for one in samples), step_seconds))
    return [at for at, _ in rows], [queue for _, queue in rows]


def _with_gaps(rows: Iterable[tuple[int, T | None]], step_seconds: int) -> Iterator[tuple[int, T | None]]:
    """The rows with something in them; where steps are missing between two, one with nothing."""
    due: int | None = None
    for at, value in rows:
        if value is None:
            continue
        if due is not None and at > due:
            yield due, None
        yield at, value
        due = at + step_seconds


def _shown(uses: Iterable[GpuUse]) -> tuple[list[str], set[str]]:
    """The tenants that are told by name, in the order of their names; and the rest."""
    most: dict[str, int] = {}
    for use in uses:
        for name, peak in chain(use.tenants.items(), use.peaks.items()):
            if peak > most.get(name, -1):
                most[name] = peak
    if len(most) <= MOST_TENANTS:
        return sorted(most), set()
    largest = sorted(most.keys() - {OTHERS}, key=lambda name: (-most[name], name))[: MOST_TENANTS - 1]
    shown = sorted([*largest, OTHERS])
    return shown, most.keys() - set(shown)


def _highest(use: GpuUse) -> Mapping[str, int]:
    return {**use.tenants, **use.peaks} if use.peaks else use.tenants


def _told_as(sizes: Mapping[str, int], rest: set[str]) -> Mapping[str, int]:
    """Bytes by tenant; what the rest has is the others'."""
    if not rest:
        return sizes
    return {**sizes, OTHERS: sizes.get(OTHERS, 0) + sum(sizes.get(name, 0) for name in rest)}
