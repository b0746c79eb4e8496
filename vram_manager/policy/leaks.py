"""Leaks: what a worker keeps after its generations grows, and goes on growing.

Measured after a generation, never within it: what it needs while it works is no leak. And measured on the floor:
a pool that fills and is emptied again comes back down to where it was, a leak does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

from vram_manager.domain.event import Event, EventType
from vram_manager.domain.reading import Missing
from vram_manager.domain.size import MIB, gib
from vram_manager.domain.snapshot import GpuMemory, Gpus
from vram_manager.domain.worker import Generation, Generations, Held, Leak, Measure, Report, Trend
from vram_manager.policy.rules import Rules

T = TypeVar("T")

# Kernels, autotuning and lazily loaded parts settle within the first few runs.
WARM_UP_GENERATIONS = 5
FLOOR_GENERATIONS = 5
# Generations that are under way, or ended not long ago, per worker: a worker that never ends any costs no more.
MAX_REMEMBERED = 64


def held(report: Report, gpus: Gpus | Missing) -> Held | None:
    """What a worker holds: by its own word, else by the only GPU there is, else not known.

    Allocated before reserved: a pool that grew is torch's cache at work, not memory that is lost.
    """
    if report.allocated_bytes is not None:
        return Held(bytes=report.allocated_bytes, measure=Measure.ALLOCATED)
    if report.reserved_bytes is not None:
        return Held(bytes=report.reserved_bytes, measure=Measure.RESERVED)
    if isinstance(gpus, Gpus) and len(gpus.gpus) == 1 and isinstance(memory := gpus.gpus[0].memory, GpuMemory):
        return Held(bytes=memory.taken_bytes, measure=Measure.GPU)
    return None


def began(generations: Generations, key: str, holds: Held | None) -> Generations:
    """One more generation is under way; said twice, the first one counts."""
    if key in generations.open:
        return generations
    # An id that ended and begins again is a worker that counts from one again.
    others = {known: value for known, value in generations.ended.items() if known != key}
    return replace(generations, open=_with(generations.open, key, holds), ended=others)


def ended(generations: Generations, key: str, holds: Held | None, rules: Rules) -> tuple[Generations, Generation]:
    """A generation has ended. Said twice, the answer is that of the first time; its start need not be known."""
    if key not in generations.open and (known := generations.ended.get(key)) is not None:
        return generations, known
    before = generations.open.get(key)
    delta_bytes = holds.bytes - before.bytes if holds and before and holds.measure is before.measure else None
    trend, leak = (generations.trend, None) if holds is None else grown(generations.trend, holds, rules)
    result = Generation(delta_bytes=delta_bytes, generations=generations.count + 1, leak=leak)
    return replace(
        generations,
        count=result.generations,
        open={known: value for known, value in generations.open.items() if known != key},
        ended=_with(generations.ended, key, result),
        last_delta_bytes=delta_bytes,
        trend=trend,
    ), result


def _with(entries: Mapping[str, T], key: str, value: T) -> dict[str, T]:
    """With one more entry, without the oldest beyond the limit."""
    return dict([*entries.items(), (key, value)][-MAX_REMEMBERED:])


def grown(trend: Trend, holds: Held, rules: Rules) -> tuple[Trend, Leak | None]:
    """The trend after one more generation, and a leak when one has shown."""
    fell = trend.baseline_bytes is not None and holds.bytes < trend.baseline_bytes - rules.leak_threshold_bytes
    if fell or trend.measure is not holds.measure:
        # A worker that restarted, or let a model go, warms up again: what it loads next is no leak.
        trend = Trend(measure=holds.measure)
    trend = replace(trend, count=trend.count + 1)
    if trend.count <= WARM_UP_GENERATIONS:
        return trend, None
    trend = replace(trend, newest_bytes=(*trend.newest_bytes, holds.bytes)[-FLOOR_GENERATIONS:])
    if trend.baseline_bytes is not None:
        return _compared(trend, trend.baseline_bytes, rules)
    if len(trend.newest_bytes) == FLOOR_GENERATIONS:
        trend = replace(trend, baseline_bytes=min(trend.newest_bytes), baseline_at=trend.count)
    return trend, None


def _compared(trend: Trend, baseline_bytes: int, rules: Rules) -> tuple[Trend, Leak | None]:
    """The floor against the baseline, once `leak_generations` have passed, then at every half of that.

    Steady growth was half way up during the newest half; what fell back in it is a cache that is emptied now and
    then, however much it takes in between.
    """
    newest = trend.newest_bytes[-1]
    baseline_bytes = min(baseline_bytes, newest)
    low_bytes = newest if trend.low_bytes is None else min(trend.low_bytes, newest)
    generations = trend.count - trend.baseline_at
    half = max(FLOOR_GENERATIONS, rules.leak_generations // 2)
    if (generations - rules.leak_generations) % half:
        return replace(trend, baseline_bytes=baseline_bytes, low_bytes=low_bytes), None
    floor_bytes = min(trend.newest_bytes)
    delta_bytes = floor_bytes - baseline_bytes
    lasts = 2 * (low_bytes - baseline_bytes) > rules.leak_threshold_bytes
    if generations < rules.leak_generations or delta_bytes <= rules.leak_threshold_bytes or not lasts:
        return replace(trend, baseline_bytes=baseline_bytes, low_bytes=None), None
    leak = Leak(
        initial_bytes=baseline_bytes,
        current_bytes=floor_bytes,
        delta_bytes=delta_bytes,
        generations=generations,
        delta_per_generation_bytes=delta_bytes // generations,
    )
    trend = replace(trend, baseline_bytes=floor_bytes, baseline_at=trend.count, low_bytes=None, leak=leak)
    return trend, leak


def leak_event(owner: str, leak: Leak, measure: Measure) -> Event:
    """A leak in the words outsiders read."""
    reason = (
        f"{gib(leak.initial_bytes)} -> {gib(leak.current_bytes)} kept after {leak.generations} generations: "
        f"+{leak.delta_bytes / MIB:.0f} MiB, {leak.delta_per_generation_bytes / MIB:.1f} MiB each"
    )
    if measure is Measure.GPU:
        reason += " (measured on the whole GPU: it says nothing of its own memory)"
    return Event(type=EventType.LEAK, target=f"worker:{owner}", reason=reason)
