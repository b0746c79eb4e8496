"""Pressure: one GPU over the threshold for longer than the grace period."""

from __future__ import annotations

from dataclasses import replace

from vram_manager.domain.event import Event, EventType
from vram_manager.domain.reading import Seen
from vram_manager.domain.snapshot import Gpu, GpuMemory, Gpus, Snapshot
from vram_manager.domain.watch import Pressure
from vram_manager.policy.rules import Rules


def somebody_would_gain(snapshot: Snapshot, rules: Rules) -> bool:
    """Ollama saw traffic not long ago. Else an artist between two renders would pay for an empty room."""
    match snapshot.ollama:
        case Seen(value=ollama):
            active_at = ollama.active_at
            return active_at is not None and snapshot.taken_at - active_at <= rules.empty_room_after_seconds
    return False


def grace_seconds(snapshot: Snapshot, rules: Rules) -> float:
    """How long use must stay high before it counts, given who would gain from a free now."""
    return rules.grace_seconds if somebody_would_gain(snapshot, rules) else rules.empty_room_grace_seconds


def limit_bytes(memory: GpuMemory, percent: float) -> int:
    """The free bytes that correspond to `percent` of the usable memory being used."""
    return round(memory.usable_bytes * (1.0 - percent / 100.0))


def step(
    before: Pressure | None, gpu: Gpu, memory: GpuMemory, grace: float, now: float, rules: Rules
) -> tuple[Pressure | None, Event | None]:
    """Low for at least the grace period? Once begun it ends only `min_reclaim_bytes` below the threshold."""
    percent = memory.used_percent
    high = percent > rules.threshold_percent
    if before is None:
        before = Pressure(high_since=now) if high else None
    if before is None:
        return None, None
    if not before.began:
        if not high:
            return None, None
        if now - before.high_since < grace:
            return before, None
        reason = f"{percent:.0f} % used for {now - before.high_since:.0f} s, threshold {rules.threshold_percent:.0f} %"
        return replace(before, began=True), _event(EventType.PRESSURE_BEGAN, gpu, percent, reason)
    if memory.free_bytes < limit_bytes(memory, rules.threshold_percent) + rules.min_reclaim_bytes:
        return before, None
    reason = f"{percent:.0f} % used, threshold {rules.threshold_percent:.0f} %"
    return None, _event(EventType.PRESSURE_ENDED, gpu, percent, reason)


def _event(kind: EventType, gpu: Gpu, percent: float, reason: str) -> Event:
    return Event(type=kind, target=f"GPU {gpu.index}", gpu=gpu.uuid, used_percent_after=percent, reason=reason)


def pressures(
    before: dict[str, Pressure], snapshot: Snapshot, gpus: Gpus | None, rules: Rules
) -> tuple[dict[str, Pressure], list[Event]]:
    """Every GPU one step on. A GPU that cannot be read restarts its grace: a missing reading never triggers."""
    after: dict[str, Pressure] = {}
    events: list[Event] = []
    grace = grace_seconds(snapshot, rules)
    for gpu in gpus.gpus if gpus else ():
        if isinstance(gpu.memory, GpuMemory):
            state, event = step(before.get(gpu.uuid), gpu, gpu.memory, grace, snapshot.taken_at, rules)
            if state is not None:
                after[gpu.uuid] = state
            if event is not None:
                events.append(event)
    return after, events
