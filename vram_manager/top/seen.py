"""What the daemon has said so far, as it came: JSON, and beside it how the memory went over the last minutes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from vram_manager.summary import completed
from vram_manager.top.look import letters

TRAIL_SECONDS = 600.0
MAX_EVENTS = 200

# (epoch seconds, bytes taken or None for a gap), oldest first, at most one a second.
Trail = tuple[tuple[float, int | None], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """One round of answers. `decisions` is None when nobody asked for them."""

    health: dict[str, Any]
    snapshot: dict[str, Any]
    events: list[dict[str, Any]]
    after: str | None = None
    decisions: list[dict[str, Any]] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """All that is shown. `silent_seconds` is how long the daemon has not answered, `why_silent` what was the matter."""

    health: dict[str, Any] = field(default_factory=dict)
    snapshot: dict[str, Any] = field(default_factory=dict)
    events: tuple[dict[str, Any], ...] = ()
    decisions: tuple[dict[str, Any], ...] = ()
    trails: Mapping[str, Trail] = field(default_factory=dict)
    letters: Mapping[str, str] = field(default_factory=dict)
    silent_seconds: float | None = None
    why_silent: str = ""

    @property
    def gpus(self) -> list[dict[str, Any]]:
        return self.snapshot.get("gpus") or []

    @property
    def newest_event(self) -> str | None:
        """What to ask for newer ones by."""
        return self.events[-1]["id"] if self.events else None

    def heard(self, heard: Heard) -> Seen:
        """With these answers, which are the newest."""
        snapshot = completed(heard.snapshot)
        gpus = snapshot["gpus"]
        return replace(
            self,
            health=heard.health,
            snapshot=snapshot,
            events=self._with_events(heard),
            decisions=self.decisions if heard.decisions is None else tuple(heard.decisions),
            trails=_longer(self.trails, snapshot),
            letters=letters(
                [(share["kind"], share["tenant"]) for gpu in gpus for share in gpu.get("tenants") or []], self.letters
            ),
            silent_seconds=None,
            why_silent="",
        )

    def silent(self, seconds: float, why: str) -> Seen:
        """The same picture, and how old it is."""
        return replace(self, silent_seconds=seconds, why_silent=why)

    def gap(self, at: float) -> Seen:
        """Nothing is known of the time from `at` on, in epoch seconds, until the next answer."""
        ended = {
            uuid: (*trail, (at, None)) for uuid, trail in self.trails.items() if trail and trail[-1][1] is not None
        }
        return replace(self, trails={**self.trails, **ended})

    def with_history(self, history: dict[str, Any]) -> Seen:
        """With what the daemon remembers from before we looked."""
        trails = dict(self.trails)
        for gpu in history.get("gpus") or []:
            own = trails.get(gpu["uuid"], ())
            first = own[0][0] if own else float("inf")
            older = zip(gpu["at"], gpu["taken_bytes"], strict=False)
            trails[gpu["uuid"]] = (*((at, taken) for at, taken in older if at < first), *own)
        return replace(self, trails=trails)

    def _with_events(self, heard: Heard) -> tuple[dict[str, Any], ...]:
        known = {event["id"]: event["at"] for event in self.events}
        # Two looks in a hurry may bring the same.
        new = [event for event in heard.events if known.get(event["id"]) != event["at"]]
        # A daemon that has lost its memory counts from the start again, and then gives all it has.
        anew = heard.after is None or any(event["id"] in known for event in new)
        return (tuple(heard.events) if anew else (*self.events, *new))[-MAX_EVENTS:]


def _longer(trails: Mapping[str, Trail], snapshot: dict[str, Any]) -> dict[str, Trail]:
    taken_at = snapshot.get("taken_at")
    if taken_at is None:
        return dict(trails)
    at = datetime.fromisoformat(taken_at).timestamp()
    longer = {uuid: trail for uuid, trail in trails.items() if trail and trail[-1][0] > at - TRAIL_SECONDS}
    for gpu in snapshot.get("gpus") or []:
        before = trails.get(gpu["uuid"], ())
        taken = gpu.get("taken_bytes")
        if before and int(before[-1][0]) == int(at):
            # The highest of a second is what counts: a short peak must not be lost.
            taken = max((part for part in (before[-1][1], taken) if part is not None), default=None)
            before = before[:-1]
        kept = tuple(point for point in before if at - TRAIL_SECONDS <= point[0] < at)
        longer[gpu["uuid"]] = (*kept, (at, taken))
    return longer
