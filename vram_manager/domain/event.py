"""What happened, in the words outsiders read: the journal adds an id and the time."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from vram_manager.domain.action import Stage


class EventType(StrEnum):
    """The kinds of event; dashboards and scripts depend on these names."""

    FREE_ASKED = "free_asked"
    FREED = "freed"
    FREE_UNCONFIRMED = "free_unconfirmed"
    FREE_REFUSED = "free_refused"
    MODEL_DETECTED = "model_detected"
    CPU_FALLBACK = "cpu_fallback"
    REPAIRED = "repaired"
    REPAIR_FAILED = "repair_failed"
    WARMED_BACK = "warmed_back"
    OLLAMA_STUCK = "ollama_stuck"
    PRESSURE_BEGAN = "pressure_began"
    PRESSURE_ENDED = "pressure_ended"
    ADMITTED = "admitted"
    REFUSED = "refused"
    LEASE_ENDED = "lease_ended"
    LEASE_EXPIRED = "lease_expired"
    SOFT_LIMIT = "soft_limit"
    HARD_LIMIT = "hard_limit"
    LEAK = "leak"
    DRY_RUN = "dry_run"
    WORKER_DEAD = "worker_dead"
    READINGS_DISAGREE = "readings_disagree"
    SENSOR_LOST = "sensor_lost"
    SENSOR_BACK = "sensor_back"


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One thing that happened. Fields that do not apply are None.

    `gpu` is a UUID, `target` the tenant or sensor it is about, `action_id` the id of the `free_asked` event
    that every later event of the same free carries. `reason` is one clause that says why, with numbers.
    `lease` is the id of the lease it is about, `estimated_bytes` and `peak_bytes` what was asked for and taken.
    `final` is False for a soft free that gave nothing back and is followed by the unload stage at once.
    """

    type: EventType
    target: str | None = None
    reason: str = ""
    gpu: str | None = None
    stage: Stage | None = None
    freed_bytes: int | None = None
    took_seconds: float | None = None
    used_percent_before: float | None = None
    used_percent_after: float | None = None
    action_id: str | None = None
    models: tuple[str, ...] = ()
    lease: str | None = None
    estimated_bytes: int | None = None
    peak_bytes: int | None = None
    final: bool = True
