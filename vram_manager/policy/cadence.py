"""How soon to look again: slowly when nothing happens, fast while something settles or runs short."""

from __future__ import annotations

from vram_manager.domain.decision import Decision
from vram_manager.domain.demand import Kind
from vram_manager.domain.reading import Missing
from vram_manager.domain.snapshot import GpuMemory, Gpus
from vram_manager.policy.rules import Rules

FAST_SECONDS = 0.25
# Below this a beat tells nothing new: NVML's own figures move in steps of about 10 ms, people do not notice 0.5 s.
SHORT_SECONDS = 0.5
# What must stay free whatever happens; the time until only this is left bounds the beat (earlyoom's idea).
HARD_RESERVE_SHARE = 0.05


def beat_seconds(decision: Decision, gpus: Gpus | Missing, rules: Rules) -> float:
    """Seconds until the next turn if nothing wakes the cycle before."""
    if decision.watch.pending is not None:
        return FAST_SECONDS
    beat = rules.interval_seconds
    if decision.watch.demands:
        waits = any(demand.kind is Kind.WAITING for demand in decision.watch.demands.values())
        beat = min(beat, FAST_SECONDS if waits else 1.0)
    if decision.look_again_seconds is not None:
        beat = min(beat, max(FAST_SECONDS, decision.look_again_seconds))
    fill_rate = decision.watch.fill_rate_bytes_per_second
    if isinstance(gpus, Gpus) and fill_rate > 0:
        for gpu in gpus.gpus:
            if isinstance(gpu.memory, GpuMemory):
                room = gpu.memory.free_bytes - HARD_RESERVE_SHARE * gpu.memory.usable_bytes
                beat = min(beat, max(SHORT_SECONDS, room / fill_rate))
    return beat
