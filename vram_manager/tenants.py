"""Who has how much of each GPU at the last turn: put together once, for all who show it."""

from __future__ import annotations

from vram_manager.admissions import Admissions
from vram_manager.cycle import Cycle
from vram_manager.domain.reading import Missing
from vram_manager.domain.share import Share
from vram_manager.domain.snapshot import Snapshot
from vram_manager.policy.accounting import gpus_seen
from vram_manager.policy.shares import shares
from vram_manager.workers import Workers


class Tenants:
    """The shares of each GPU, by its UUID."""

    def __init__(self, cycle: Cycle, admissions: Admissions, workers: Workers) -> None:
        self._cycle = cycle
        self._admissions = admissions
        self._workers = workers
        self._of: tuple[Snapshot | None, dict[str, tuple[Share, ...]]] = (None, {})

    def now(self) -> dict[str, tuple[Share, ...]]:
        """Of the last turn; empty before the first."""
        snapshot = self._cycle.snapshot
        if self._of[0] is not snapshot:
            self._of = (snapshot, {} if snapshot is None else self._shares(snapshot))
        return self._of[1]

    def _shares(self, snapshot: Snapshot) -> dict[str, tuple[Share, ...]]:
        gpus = gpus_seen(snapshot)
        if isinstance(gpus, Missing):
            return {}
        leases = tuple(self._admissions.book.leases.values())
        return {
            gpu.uuid: shares(
                snapshot,
                gpus,
                gpu,
                leases=leases,
                reported=self._workers.memory_on(gpu, alone=len(gpus.gpus) == 1),
                lesson=self._cycle.watch.lesson,
                rules=self._cycle.rules,
            )
            for gpu in gpus.gpus
        }
