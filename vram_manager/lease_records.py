"""What of the leases is written down, so that a daemon that is killed keeps every promise it has told.

A lease is on the disk before its owner hears of it. What nobody waits for, such as an end, follows within a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from loguru import logger

from vram_manager.domain.lease import Estimate, Lease, Priority, Source
from vram_manager.domain.size import Size
from vram_manager.store import Store

SAVE_SECONDS = 1.0
# A lease that nobody renewed over this many starts of the daemon is nobody's any more.
MAX_RESTORES = 3


class LeaseRecords:
    """The leases in the store. Only `saved` and `write_behind` wait for the disk, in a worker thread."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._unsaved: dict[str, Lease | None] = {}
        self._to_save = asyncio.Event()
        self._saving = asyncio.Lock()
        self._failing = False

    def restored(self, now: float, lives: Callable[[Lease], bool]) -> Iterator[Lease]:
        """Leases of the last run, each with its whole time before it: their owners could not renew meanwhile.

        Those whose process no longer `lives`, and what cannot be read, are forgotten.
        """
        for lease_id, body in self._store.leases().items():
            lease = _from_json(body, now)
            if lease is None or lease.restores > MAX_RESTORES or not lives(lease):
                self.ended(lease_id)
            else:
                yield lease

    def changed(self, lease: Lease, before: Lease | None) -> None:
        """`lease` is to be written, if what must outlive the daemon is another than `before`."""
        if before is None or _lasting(before) != _lasting(lease):
            self._unsaved[lease.id] = lease
            self._to_save.set()

    def ended(self, lease_id: str) -> None:
        """The lease is to be forgotten."""
        self._unsaved[lease_id] = None
        self._to_save.set()

    async def saved(self) -> None:
        """What was told until now is on the disk, or the disk cannot be written, which is said once."""
        async with self._saving:
            batch, self._unsaved = self._unsaved, {}
            if not batch:
                return
            try:
                await asyncio.to_thread(self._store.save_leases, _rows(batch))
            except sqlite3.Error as error:
                self._unsaved = batch | self._unsaved
                self._to_save.set()
                if not self._failing:
                    logger.warning("Leases cannot be written ({}): a restart of the daemon will forget them", error)
                self._failing = True
            else:
                self._failing = False

    async def write_behind(self) -> None:
        """Writes what nobody waits for, until cancelled."""
        while True:
            await self._to_save.wait()
            self._to_save.clear()
            await asyncio.sleep(SAVE_SECONDS)
            await self.saved()

    def flush(self) -> None:
        """Writes the rest at the end. Blocks."""
        with contextlib.suppress(sqlite3.Error):
            self._store.save_leases(_rows(self._unsaved))


def _rows(leases: dict[str, Lease | None]) -> dict[str, str | None]:
    return {lease_id: None if lease is None else _as_json(lease) for lease_id, lease in leases.items()}


def _lasting(lease: Lease) -> tuple[object, ...]:
    """What of a lease must outlive the daemon; the rest is seen again."""
    return (
        lease.claimed_bytes,
        lease.pid,
        lease.gpu,
        lease.ttl_seconds,
        lease.restores,
        lease.baseline_bytes,
        lease.left_bytes,
    )


def _as_json(lease: Lease) -> str:
    body = asdict(lease)
    for seen_again in ("granted_at", "expires_at", "holds", "claimed_at", "visible_bytes", "used_bytes"):
        del body[seen_again]
    return json.dumps(body)


def _from_json(text: str, now: float) -> Lease | None:
    """A lease of an earlier run; None when another version wrote something this one cannot read."""
    try:
        body: dict[str, Any] = json.loads(text)
        estimate = body.pop("estimate")
        known = {name: body[name] for name in Lease.__dataclass_fields__ if name in body}
        estimate = Estimate(
            **{
                **estimate,
                "size": Size(**estimate["size"]),
                "source": Source(estimate["source"]),
                "names": tuple(estimate["names"]),
            }
        )
        ttl = float(body["ttl_seconds"])
        return Lease(
            **{
                **known,
                "estimate": estimate,
                "priority": Priority(body["priority"]),
                "granted_at": now,
                "expires_at": now + ttl,
                "restores": int(body["restores"]) + 1,
            }
        )
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
