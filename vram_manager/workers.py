"""What workers tell of themselves, remembered, and the answers they get. The rules are in `policy.limits` and `.leaks`.

Every method is immediate: a worker is replaced whole and nothing is awaited in between, so there are no locks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from datetime import timedelta
from typing import Any

from loguru import logger

from vram_manager.clock import Clock
from vram_manager.domain.demand import Demand
from vram_manager.domain.event import Event, EventType
from vram_manager.domain.reading import Missing
from vram_manager.domain.size import gib
from vram_manager.domain.snapshot import Gpu, GpuMemory, Gpus, Snapshot
from vram_manager.domain.worker import Check, Excursion, Fit, Generation, Level, Phase, Point, Report, Worker
from vram_manager.journal import Journal, rfc3339
from vram_manager.policy import Rules
from vram_manager.policy.accounting import gpus_seen
from vram_manager.policy.leaks import began, ended, held, leak_event
from vram_manager.policy.limits import Ask, check, chosen, demand, fit, foretold, relaxed, watched

MAX_WORKERS = 1000


class NoSuchGpu(LookupError):
    """The GPU that was named is none of those seen here."""


class Workers:
    """All workers that spoke within memory: the least recently seen of more than 1000 is forgotten.

    `soft_violations`, `hard_violations` and `leaks` count since the start. `on_demand` is called when there is a
    demand that was not there before; `leased_bytes` gives what is promised to an owner, None for nothing.
    """

    def __init__(
        self,
        clock: Clock,
        journal: Journal,
        rules: Rules,
        *,
        snapshot: Callable[[], Snapshot | None],
        leased_bytes: Callable[[str], int | None],
        on_demand: Callable[[], object] = lambda: None,
    ) -> None:
        self._clock = clock
        self._journal = journal
        self._rules = rules
        self._snapshot = snapshot
        self._leased_bytes = leased_bytes
        self._on_demand = on_demand
        self._workers: dict[str, Worker] = {}
        self._excursions: dict[str, Excursion] = {}
        self.soft_violations = 0
        self.hard_violations = 0
        self.leaks = 0

    def check_limits(
        self,
        owner: str,
        report: Report,
        *,
        requested_bytes: int = 0,
        context: str = "",
    ) -> Check:
        """How near to its limits a GPU is with what `owner` is about to allocate. Raises NoSuchGpu."""
        place = self._place(report.gpu)
        worker = self._reported(owner, report)
        ask = Ask(owner=owner, requested_bytes=requested_bytes, reported_bytes=report.held_bytes, context=context)
        uuid = "" if isinstance(place, Missing) else place.uuid
        others = foretold(self._workers.values()).get(uuid)
        now = self._clock.monotonic()
        checked = check(ask, place, worker, self._excursions.get(uuid), others, now, self._rules)
        self._workers[owner] = checked.worker
        self._excursions.pop(uuid, None)
        if checked.excursion is not None:
            self._excursions[uuid] = checked.excursion
        self.hard_violations += checked.check.level is Level.HARD
        if demand(checked.worker, now) is not None and demand(worker, now) is None:
            self._on_demand()
        for event in checked.events:
            self._tell(event)
        return checked.check

    def generation(
        self,
        owner: str,
        phase: Phase,
        key: str,
        report: Report,
        *,
        slot: int | str | None = None,
    ) -> Generation:
        """What generation `key` left behind once it has ended; the same call again is no second. Raises NoSuchGpu."""
        place = self._place(report.gpu)
        worker = self._reported(owner, report)
        holds, known = held(report, self._gpus()), worker.generations
        if phase is Phase.START:
            after = began(known, key, holds)
            answer = Generation(delta_bytes=None, generations=after.count)
        else:
            after, answer = ended(known, key, holds, self._rules)
        self._workers[owner] = worker = replace(worker, generations=after)
        if after is not known:
            event = "pre_generation" if phase is Phase.START else "post_generation"
            self._log_point(worker, place, event, slot, report)
            if answer.leak is not None and holds is not None:
                self._tell(leak_event(owner, answer.leak, holds.measure))
        return answer

    def models(
        self,
        owner: str,
        models: Mapping[str, int],
        *,
        buffers: Mapping[str, int],
        budgets: Mapping[str, int],
        budget_bytes: int | None = None,
    ) -> Fit:
        """`owner` has these models, and wants these buffers; do they fit in its budget, or else in its leases?"""
        worker = self._seen(owner)
        budget_bytes = self._leased_bytes(owner) if budget_bytes is None else budget_bytes
        self._workers[owner] = replace(worker, models=dict(models), buffers=dict(buffers), budget_bytes=budget_bytes)
        return fit(owner, models, buffers, budgets, budget_bytes)

    def snapshot_of(
        self,
        owner: str,
        event: str,
        report: Report,
        *,
        slot: int | str | None = None,
    ) -> Point:
        """Memory at the point that `event` names, also in the log at DEBUG. Raises NoSuchGpu."""
        place = self._place(report.gpu)
        worker = self._reported(owner, report)
        return self._log_point(worker, place, event, slot, report)

    def listing(self) -> list[dict[str, Any]]:
        """Every worker as JSON, least recently seen first."""
        now, today = self._clock.monotonic(), self._clock.utcnow()
        return [
            {
                "owner": worker.owner,
                "models": dict(worker.models),
                "buffers": dict(worker.buffers),
                "budget_bytes": worker.budget_bytes,
                "allocated_bytes": worker.report.allocated_bytes,
                "reserved_bytes": worker.report.reserved_bytes,
                "generations": worker.generations.count,
                "last_delta_bytes": worker.generations.last_delta_bytes,
                "leak": None if (leak := worker.generations.trend.leak) is None else asdict(leak),
                "seen_at": rfc3339(today - timedelta(seconds=now - worker.seen_at)),
            }
            for worker in self._workers.values()
        ]

    def all(self) -> tuple[Worker, ...]:
        """Every worker that is known."""
        return tuple(self._workers.values())

    def memory(self) -> dict[str, int]:
        """What each worker last said it holds; who never said so is left out."""
        said = {owner: worker.report.held_bytes for owner, worker in self._workers.items()}
        return {owner: size for owner, size in said.items() if size is not None}

    def memory_on(self, gpu: Gpu, *, alone: bool) -> dict[str, int]:
        """The same on `gpu`; `alone`: there is no other, so that a worker need not have named it."""
        wanted = (gpu.uuid, str(gpu.index), *((None,) if alone else ()))
        return {owner: size for owner, size in self.memory().items() if self._workers[owner].report.gpu in wanted}

    def turned(self, snapshot: Snapshot) -> None:
        """One turn of the cycle: excursions grow older, and end by what was read."""
        gpus, now = gpus_seen(snapshot), snapshot.taken_at
        before, theirs = self._excursions, foretold(self._workers.values())
        self._excursions, events = watched(before, theirs, gpus, now, self._rules)
        self._workers = {owner: relaxed(worker, gpus, now, self._rules) for owner, worker in self._workers.items()}
        for event in events:
            self._tell(event)

    def demands(self, now: float) -> tuple[Demand, ...]:
        """The room that workers at their hard limit wait for."""
        found = (demand(worker, now) for worker in self._workers.values())
        return tuple(one for one in found if one is not None)

    def _gpus(self) -> Gpus | Missing:
        snapshot = self._snapshot()
        return Missing("nothing was read yet") if snapshot is None else gpus_seen(snapshot)

    def _place(self, wanted: str | None) -> Gpu | Missing:
        found = chosen(self._gpus(), wanted)
        if found is None:
            raise NoSuchGpu(f"GPU {wanted} is none of the GPUs seen here")
        return found

    def _seen(self, owner: str) -> Worker:
        """The worker, moved to the end of the line of those to be forgotten."""
        now = self._clock.monotonic()
        known = self._workers.pop(owner, None)
        worker = Worker(owner=owner, seen_at=now) if known is None else replace(known, seen_at=now)
        self._workers[owner] = worker
        if len(self._workers) > MAX_WORKERS:
            del self._workers[next(iter(self._workers))]
        return worker

    def _reported(self, owner: str, report: Report) -> Worker:
        """The worker with what it now says it holds, if it says so."""
        worker = self._seen(owner)
        if report.held_bytes is None:
            return worker
        self._workers[owner] = worker = replace(worker, report=report, reported_at=worker.seen_at)
        return worker

    def _log_point(
        self, worker: Worker, place: Gpu | Missing, event: str, slot: int | str | None, report: Report
    ) -> Point:
        memory = place if isinstance(place, Missing) else place.memory
        taken_bytes = memory.taken_bytes if isinstance(memory, GpuMemory) else None
        point = Point(
            timestamp=rfc3339(self._clock.utcnow()),
            event=event,
            slot=slot,
            vram_usage_gb=_gb(taken_bytes),
            vram_allocated_gb=_gb(report.allocated_bytes),
            vram_reserved_gb=_gb(report.reserved_bytes),
            models={name: round(size / 1e9, 2) for name, size in worker.models.items()},
        )
        logger.bind(snapshot={"owner": worker.owner, **asdict(point)}).debug(
            "VRAM snapshot {} of {}: {} used, {} allocated, {} reserved, {} in {} models",
            event,
            worker.owner,
            gib(taken_bytes),
            gib(report.allocated_bytes),
            gib(report.reserved_bytes),
            gib(sum(worker.models.values())),
            len(worker.models),
        )
        return point

    def _tell(self, event: Event) -> None:
        self.soft_violations += event.type is EventType.SOFT_LIMIT
        self.leaks += event.type is EventType.LEAK
        self._journal.record(event)


def _gb(size_bytes: int | None) -> float | None:
    return None if size_bytes is None else round(size_bytes / 1e9, 2)
