"""A decision: what follows from a snapshot, and why, in one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vram_manager.domain.action import Action
from vram_manager.domain.event import Event
from vram_manager.domain.watch import Watch


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What one turn concluded.

    `branch` is the number in the tree of `policy.decide` ("5 cooldown"): equal neighbours are folded on it.
    `look_again_seconds` is when something could change by itself, e.g. when a cooldown ends.
    """

    branch: str
    reason: str
    watch: Watch
    action: Action | None = None
    repost: bool = False
    events: tuple[Event, ...] = ()
    inputs: Mapping[str, object] = field(default_factory=dict)
    look_again_seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ManualFree:
    """A wish for a free now, by a person unless `reason` says whose. `force` outweighs a busy queue, the cooldown and
    a small hold."""

    action: Action
    force: bool
    reason: str = "asked by hand"
