"""Floors as they are stored, so that a slow leak is still one after a restart of the daemon."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from datetime import datetime

from vram_manager.domain.floor import Floor, Mark
from vram_manager.journal import rfc3339

_STORED = ("tenant", "measure", "life", "count", "judged", "leaks", "told_bytes", "baseline_bytes")


def as_text(floor: Floor) -> str:
    """As it is stored."""
    fields = {name: getattr(floor, name) for name in _STORED}
    marks = [[rfc3339(mark.at), mark.bytes, mark.runs, mark.ran] for mark in floor.marks]
    return json.dumps({**fields, "marks": marks}, separators=(",", ":"))


def restored(bodies: Iterable[str]) -> Iterator[Floor]:
    """Floors of an earlier run, without those that another version wrote and this one cannot read."""
    for body in bodies:
        with contextlib.suppress(ValueError, TypeError, KeyError):
            said = json.loads(body)
            marks = tuple(
                Mark(
                    at=datetime.fromisoformat(at),
                    bytes=int(size),
                    runs=int(runs),
                    ran=tuple((str(name), int(count)) for name, count in ran),
                )
                for at, size, runs, ran in said["marks"]
            )
            numbers = {name: int(said[name]) for name in _STORED[3:]}
            yield Floor(tenant=said["tenant"], measure=said["measure"], life=said["life"], marks=marks, **numbers)
