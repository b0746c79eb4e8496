"""Soft and hard limits of a GPU's use, asked about by workers and watched at every turn.

Over the hard limit is answered before the allocation and asks for room; over the soft limit is told once it has
lasted. Use of a GPU is one excursion, whoever asks about it; what only a worker's wish, or its word, lifts over
the limit is that worker's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from vram_manager.domain.demand import Demand, Kind
from vram_manager.domain.event import Event, EventType
from vram_manager.domain.reading import Missing
from vram_manager.domain.size import gib
from vram_manager.domain.snapshot import Gpu, GpuMemory, Gpus
from vram_manager.domain.worker import AtHardLimit, Check, Excursion, Fit, Level, OverBudget, Worker
from vram_manager.policy.accounting import named
from vram_manager.policy.rules import Rules

# A worker that was refused tries again within seconds, or has given up.
HARD_LIMIT_SECONDS = 30.0
# How long a worker's word on its own memory counts beside a newer reading of the GPU.
REPORT_SECONDS = 30.0
# Who asks again after that long is news, though nothing has become free since.
HARD_LIMIT_QUIET_SECONDS = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One check: `requested_bytes` are about to be allocated, `reported_bytes` is what the worker says it holds."""

    owner: str
    requested_bytes: int
    reported_bytes: int | None = None
    context: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """A check's answer and what to remember of it: the worker, and the excursion of the GPU itself."""

    check: Check
    worker: Worker
    excursion: Excursion | None = None
    events: tuple[Event, ...] = ()


def chosen(gpus: Gpus | Missing, wanted: str | None) -> Gpu | Missing | None:
    """The GPU that is meant: the named one, else the only one, else the fullest; None: there is none of that name."""
    if isinstance(gpus, Missing):
        return gpus
    if wanted is None:
        return max(gpus.gpus, key=_used_percent, default=Missing("no GPU"))
    found = named(gpus, wanted)
    # Told by ComfyUI, GPUs have other names: the one that is meant may well be there.
    return Missing(f"nobody tells of GPU {wanted}") if found is None and gpus.second_hand else found


def _used_percent(gpu: Gpu) -> float:
    return gpu.memory.used_percent if isinstance(gpu.memory, GpuMemory) else -1.0


def check(
    ask: Ask,
    gpu: Gpu | Missing,
    worker: Worker,
    excursion: Excursion | None,
    foretold: Excursion | None,
    now: float,
    rules: Rules,
) -> Checked:
    """How near to the limits of `gpu` the worker is, with what it is about to allocate.

    `excursion` is the GPU's own, `foretold` the one of a worker that its use may now have followed.
    """
    if isinstance(gpu, Missing):
        return Checked(check=_unknown(ask, None, f"the GPU is not known: {gpu.why}", rules), worker=worker)
    if isinstance(gpu.memory, Missing):
        words = f"GPU {gpu.index} is not known: {gpu.memory.why}"
        return Checked(check=_unknown(ask, gpu.uuid, words, rules), worker=worker, excursion=excursion)
    use = _use(gpu.memory, rules, ask.requested_bytes, ask.reported_bytes)
    excess, hard = dict(worker.excess), dict(worker.hard)
    # What the GPU's own use explains is no excess of the worker.
    own = excess.pop(gpu.uuid, None)
    before, whole = _of_gpu(excursion, foretold, use, now, rules)
    after = whole
    if whole is None:
        before, after = own, step(own, use.lasting_bytes, use.used_bytes, use.soft_bytes, now, rules)
    if after is not None:
        after = replace(after, owner=ask.owner, context=ask.context)
        if whole is None:
            excess[gpu.uuid] = after
    words = _soft_words(use, gpu, after, now)
    events = [_soft_event(gpu, after, words)] if after is not None and _newly(before, after) else []
    if use.level is Level.HARD:
        words = _hard_words(use, gpu, ask.context)
        if gpu.uuid not in hard:
            target = f"worker:{ask.owner}"
            events.append(Event(type=EventType.HARD_LIMIT, target=target, gpu=gpu.uuid, reason=words))
        hard[gpu.uuid] = _at_hard_limit(use, ask, gpu, gpu.memory, hard.get(gpu.uuid), now)
    answer = Check(
        level=use.level,
        sustained=use.level is not Level.OK and after is not None and after.sustained,
        used_bytes=use.used_bytes,
        soft_limit_bytes=use.soft_bytes,
        hard_limit_bytes=use.hard_bytes,
        requested_bytes=use.requested_bytes,
        gpu=gpu.uuid,
        message=words,
    )
    worker = replace(worker, excess=excess, hard=hard)
    return Checked(check=answer, worker=worker, excursion=whole and after, events=tuple(events))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Use:
    """A GPU's use as one worker asked about it. `used_bytes` is what is taken, or what the worker says if more."""

    taken_bytes: int
    used_bytes: int
    requested_bytes: int
    soft_bytes: int
    hard_bytes: int

    @property
    def projected_bytes(self) -> int:
        return self.used_bytes + self.requested_bytes

    @property
    def level(self) -> Level:
        if self.projected_bytes > self.hard_bytes:
            return Level.HARD
        return Level.SOFT if self.projected_bytes > self.soft_bytes else Level.OK

    @property
    def lasting_bytes(self) -> int:
        """What can last: an allocation that is refused will not be made."""
        return self.used_bytes if self.level is Level.HARD else self.projected_bytes


def _use(memory: GpuMemory, rules: Rules, requested_bytes: int = 0, reported_bytes: int | None = None) -> _Use:
    return _Use(
        taken_bytes=memory.taken_bytes,
        used_bytes=max(memory.taken_bytes, reported_bytes or 0),
        requested_bytes=requested_bytes,
        soft_bytes=rules.soft_limit.on(memory.usable_bytes),
        hard_bytes=rules.hard_limit.on(memory.usable_bytes),
    )


def _unknown(ask: Ask, gpu: str | None, words: str, rules: Rules) -> Check:
    return Check(
        level=Level.UNKNOWN,
        sustained=False,
        used_bytes=ask.reported_bytes,
        soft_limit_bytes=rules.soft_limit.bytes,
        hard_limit_bytes=rules.hard_limit.bytes,
        requested_bytes=ask.requested_bytes,
        gpu=gpu,
        message=f"the memory of {words}",
    )


def _of_gpu(
    own: Excursion | None, foretold: Excursion | None, use: _Use, now: float, rules: Rules
) -> tuple[Excursion | None, Excursion | None]:
    """A GPU's excursion before and after this reading; one that a worker foretold goes on as the GPU's."""
    before = own if own is not None or use.taken_bytes <= use.soft_bytes else foretold
    return before, step(before, use.taken_bytes, use.taken_bytes, use.soft_bytes, now, rules)


def _newly(before: Excursion | None, after: Excursion) -> bool:
    return after.sustained and not (before is not None and before.sustained)


def step(
    before: Excursion | None, over_bytes: int, used_bytes: int, soft_bytes: int, now: float, rules: Rules
) -> Excursion | None:
    """The excursion at `now`: begins over the limit, ends only when use falls `min_reclaim_bytes` below it."""
    if over_bytes > soft_bytes:
        begun = before or Excursion(since=now)
        return replace(begun, sustained=begun.sustained or now - begun.since >= rules.soft_limit_seconds)
    return None if used_bytes <= soft_bytes - rules.min_reclaim_bytes else before


def watched(
    before: Mapping[str, Excursion], foretold: Mapping[str, Excursion], gpus: Gpus | Missing, now: float, rules: Rules
) -> tuple[dict[str, Excursion], list[Event]]:
    """The use of every GPU one step on; `foretold` are the workers' own excursions, for one is not told twice.

    A GPU that cannot be read starts its time over, and what was told stays told.
    """
    after = {uuid: excursion for uuid, excursion in before.items() if excursion.sustained}
    events: list[Event] = []
    for gpu in () if isinstance(gpus, Missing) else gpus.gpus:
        if not isinstance(gpu.memory, GpuMemory):
            continue
        use = _use(gpu.memory, rules)
        was, excursion = _of_gpu(before.get(gpu.uuid), foretold.get(gpu.uuid), use, now, rules)
        after.pop(gpu.uuid, None)
        if excursion is not None:
            after[gpu.uuid] = excursion
            if _newly(was, excursion):
                events.append(_soft_event(gpu, excursion, _soft_words(use, gpu, excursion, now)))
    return after, events


def foretold(workers: Iterable[Worker]) -> dict[str, Excursion]:
    """Of each GPU the excursion that began first among the workers' own; one that was told comes before."""
    found: dict[str, Excursion] = {}
    for worker in workers:
        for uuid, excursion in worker.excess.items():
            known = found.get(uuid)
            if known is None or (not excursion.sustained, excursion.since) < (not known.sustained, known.since):
                found[uuid] = excursion
    return found


def relaxed(worker: Worker, gpus: Gpus | Missing, now: float, rules: Rules) -> Worker:
    """The worker without the excursions that are over by what the GPUs say now.

    It stays at its hard limit while it asks again now and then and what it asked last would not fit.
    """
    if isinstance(gpus, Missing) or not (worker.excess or worker.hard):
        return worker
    fresh = worker.reported_at is not None and now - worker.reported_at <= REPORT_SECONDS
    reported_bytes = (worker.report.held_bytes or 0) if fresh else 0
    excess, hard = dict(worker.excess), dict(worker.hard)
    for gpu in gpus.gpus:
        if not isinstance(gpu.memory, GpuMemory):
            continue
        use = _use(gpu.memory, rules, reported_bytes=reported_bytes)
        if use.used_bytes <= use.soft_bytes - rules.min_reclaim_bytes:
            excess.pop(gpu.uuid, None)
        at_limit = hard.get(gpu.uuid)
        if at_limit is not None and _gave_up(at_limit, use, now, rules):
            del hard[gpu.uuid]
    if len(excess) == len(worker.excess) and len(hard) == len(worker.hard):
        return worker
    return replace(worker, excess=excess, hard=hard)


def _gave_up(at_limit: AtHardLimit, use: _Use, now: float, rules: Rules) -> bool:
    quiet_seconds = now - at_limit.last_at
    fits = use.taken_bytes + at_limit.requested_bytes <= use.hard_bytes - rules.min_reclaim_bytes
    return quiet_seconds > (HARD_LIMIT_SECONDS if fits else HARD_LIMIT_QUIET_SECONDS)


def demand(worker: Worker, now: float) -> Demand | None:
    """The room a worker at its hard limit needs: one demand, for it makes one allocation at a time."""
    newest = max(worker.hard.values(), key=lambda at_limit: at_limit.last_at, default=None)
    if newest is None or newest.need_free_bytes is None or now - newest.last_at > HARD_LIMIT_SECONDS:
        return None
    return Demand(
        kind=Kind.STARTING,
        key=f"hard-limit:{worker.owner}",
        gpu=newest.gpu,
        need_free_bytes=newest.need_free_bytes,
        reason=f"{worker.owner} is at its hard limit on GPU {newest.index}",
        since=newest.since,
        last_seen_at=newest.last_at,
    )


def _at_hard_limit(
    use: _Use, ask: Ask, gpu: Gpu, memory: GpuMemory, before: AtHardLimit | None, now: float
) -> AtHardLimit:
    # What is over the limit by the worker's own memory alone, nobody else can make room for.
    hopeless = (ask.reported_bytes or 0) + ask.requested_bytes > use.hard_bytes
    return AtHardLimit(
        gpu=gpu.uuid,
        index=gpu.index,
        since=before.since if before else now,
        last_at=now,
        requested_bytes=ask.requested_bytes,
        need_free_bytes=None if hopeless else memory.free_bytes + use.projected_bytes - use.hard_bytes,
    )


def _soft_event(gpu: Gpu, excursion: Excursion, words: str) -> Event:
    target = f"GPU {gpu.index}" if excursion.owner is None else f"worker:{excursion.owner}"
    return Event(type=EventType.SOFT_LIMIT, target=target, gpu=gpu.uuid, reason=words)


def _soft_words(use: _Use, gpu: Gpu, excursion: Excursion | None, now: float) -> str:
    """11.3 GiB used of 11.0 GiB soft limit on GPU 0 (+0.3 GiB) for 31 s, before vae decode."""
    requested_bytes = use.lasting_bytes - use.used_bytes
    requested = f" + {gib(requested_bytes)} requested" if requested_bytes else ""
    words = f"{gib(use.used_bytes)} used{requested} of {gib(use.soft_bytes)} soft limit on GPU {gpu.index}"
    over_bytes = use.lasting_bytes - use.soft_bytes
    if excursion is None or over_bytes <= 0:
        return words
    lasted = f" for {now - excursion.since:.0f} s" if now - excursion.since >= 1 else ""
    return f"{words} (+{gib(over_bytes)}){lasted}" + (f", {excursion.context}" if excursion.context else "")


def _hard_words(use: _Use, gpu: Gpu, context: str) -> str:
    """11.2 GiB used + 0.8 GiB requested > 11.5 GiB hard limit on GPU 0, vae decode."""
    requested = f" + {gib(use.requested_bytes)} requested" if use.requested_bytes else ""
    words = f"{gib(use.used_bytes)} used{requested} > {gib(use.hard_bytes)} hard limit on GPU {gpu.index}"
    return f"{words}, {context}" if context else words


def fit(
    owner: str,
    models: Mapping[str, int],
    buffers: Mapping[str, int],
    budgets: Mapping[str, int],
    budget_bytes: int | None,
) -> Fit:
    """Whether models and the buffers still to be allocated fit in the budget, and which model outgrew its own."""
    models_bytes, buffers_bytes = sum(models.values()), sum(buffers.values())
    total_bytes = models_bytes + buffers_bytes
    shortfall_bytes = 0 if budget_bytes is None else max(0, total_bytes - budget_bytes)
    over = tuple(
        OverBudget(name=name, bytes=size, budget_bytes=budgets[name])
        for name, size in models.items()
        if name in budgets and size > budgets[name]
    )
    words = [f"{gib(models_bytes)} in models + {gib(buffers_bytes)} in buffers"]
    if budget_bytes is None:
        words.append("no budget is known")
    else:
        verdict = f"{gib(shortfall_bytes)} over" if shortfall_bytes else "within"
        words.append(f"{verdict} the budget of {gib(budget_bytes)}")
    words += [f"{one.name} is over its budget: {gib(one.bytes)} of {gib(one.budget_bytes)}" for one in over]
    return Fit(
        owner=owner,
        models_bytes=models_bytes,
        buffers_bytes=buffers_bytes,
        total_bytes=total_bytes,
        budget_bytes=budget_bytes,
        fits=shortfall_bytes == 0,
        shortfall_bytes=shortfall_bytes,
        over_budget=over,
        message=", ".join(words[:2]) + "".join(f"; {word}" for word in words[2:]),
    )
