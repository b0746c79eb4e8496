"""May I? The rule over what is seen, what is promised and who waits; and whose turn it is.

1. Nothing can be said: monitoring is off, or no GPU can be read -> admitted, and the answer says that it is blind.
2. More than the GPU has at all -> refused at once; no waiting would help.
3. It fits beside what is promised to others -> admitted, unless somebody who may not be overtaken waits for it.
4. Else refused, with what is missing, who holds it, when it might come, and what would fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import takewhile

from vram_manager.domain.demand import Demand, Kind
from vram_manager.domain.lease import Alternative, Book, Lease, Priority, Request, Source, Ticket, Verdict
from vram_manager.domain.reading import Missing, Seen
from vram_manager.domain.size import GIB, MIB, gib
from vram_manager.domain.snapshot import Gpu, GpuMemory, Gpus, LoadedModel, Snapshot
from vram_manager.policy.accounting import Hold, can_use, comfyui_gpu, comfyui_hold, gpus_seen, named, ollama_bytes
from vram_manager.policy.estimate import canonical
from vram_manager.policy.evict import in_use, ollama_gpu
from vram_manager.policy.leases import loaded
from vram_manager.policy.plan import first_stage
from vram_manager.policy.rules import Rules

# A minute in line counts as one class of priority: a batch job goes first after two.
AGEING_SECONDS = 60.0
# Smaller requests may pass a larger one this long; then what becomes free is kept for it.
OVERTAKING_SECONDS = 30.0
# A model that is kept for longer than this is not waited for.
FAR_SECONDS = 86_400.0
# What several tenants hold in sum is never known to the byte.
SLACK_BYTES = 256 * MIB
# From the request to the proof of a free of an idle ComfyUI, as a rule.
FREE_SECONDS = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Past durations, for an ETA: of the leases of each owner, and of ComfyUI's prompts (None: none seen yet)."""

    lease_seconds: Mapping[str, float] = field(default_factory=dict)
    prompt_seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Room:
    """One GPU a request may use: what it needs there and what it could have.

    `reach_bytes` is what could be had there in the end; None: not reckoned yet.
    """

    gpu: Gpu
    memory: GpuMemory
    required_bytes: int
    need_bytes: int
    available_bytes: int
    reclaimable_bytes: int
    reach_bytes: int | None = None

    @property
    def shortfall_bytes(self) -> int:
        return max(0, self.need_bytes - self.available_bytes)


def judge(
    request: Request,
    snapshot: Snapshot,
    book: Book,
    rules: Rules,
    *,
    kept: Mapping[str, str] | None = None,
    pace: Pace | None = None,
    utcnow: datetime | None = None,
) -> Verdict:
    """The answer to `request` now. `kept` are GPUs kept for somebody who waits, and for whom, in words."""
    # 1. Nothing can be said.
    if not rules.enabled:
        return _unseen(request, rules, "monitoring is off (ENABLE_VRAM_MONITORING=false): everybody is admitted")
    gpus = gpus_seen(snapshot)
    if isinstance(gpus, Missing):
        return _blind(request, rules, gpus.why)
    if not request.afresh and (name := loaded(request.estimate, snapshot)) is not None:
        return Verdict(admitted=True, reason=f"{name} is wholly on the GPU already", required_bytes=0)
    if (unknown := unknown_gpu(request, snapshot)) is not None:
        return _or_dry_run(request, rules, Verdict(admitted=False, hopeless=True, reason=unknown))
    rooms = _rooms(request, snapshot, gpus, book, rules)
    if isinstance(rooms, Missing):
        return _blind(request, rules, rooms.why)
    verdict = _judged(request, rooms, snapshot, gpus, book, rules, kept or {}, pace or Pace(), utcnow)
    # The name that ComfyUI's own numbers go by is nobody else's name for the card.
    return replace(verdict, gpu=None) if gpus.second_hand else verdict


def _judged(
    request: Request,
    rooms: list[_Room],
    snapshot: Snapshot,
    gpus: Gpus,
    book: Book,
    rules: Rules,
    kept: Mapping[str, str],
    pace: Pace,
    utcnow: datetime | None,
) -> Verdict:
    """Branches 2 to 4: the memory of at least one GPU is known."""
    open_rooms = [room for room in rooms if room.gpu.uuid not in kept]
    best = min(open_rooms or rooms, key=lambda room: (room.shortfall_bytes, -room.available_bytes))
    # 2. More than there is at all.
    if all(room.need_bytes > room.memory.usable_bytes for room in rooms):
        largest = max(rooms, key=lambda room: room.memory.usable_bytes)
        return _refused(request, largest, rules, _too_large(request, largest), hopeless=True)
    # 3. It fits.
    if best.shortfall_bytes == 0 and best.gpu.uuid not in kept:
        words = f"{gib(best.required_bytes)} on {_name(best.gpu)}, {gib(best.available_bytes)} available"
        return _answer(best, admitted=True, reason=words)
    # 4. Why not.
    wait = eta_seconds(best.need_bytes, best.gpu, snapshot, book, rules, pace, utcnow)
    reason = _insufficient(request, best, snapshot, gpus, book, rules, kept.get(best.gpu.uuid), wait)
    verdict = _refused(request, best, rules, reason, alternatives=_alternatives(request, open_rooms, rules))
    return replace(verdict, retry_after_seconds=wait)


def unknown_gpu(request: Request, snapshot: Snapshot) -> str | None:
    """What is wrong with the GPU the request names: it is none of those seen, or no longer.

    While only ComfyUI tells of a card no name is wrong: it may be that one.
    """
    gpus = gpus_seen(snapshot)
    if request.gpu is None or isinstance(gpus, Missing) or gpus.second_hand or named(gpus, request.gpu) is not None:
        return None
    known = ", ".join(f"{one.index} ({one.uuid})" for one in gpus.gpus)
    return f"gpu is {request.gpu}: must be the index or UUID of one of {known}"


def _unseen(request: Request, rules: Rules, why: str) -> Verdict:
    size = request.estimate.size.bytes
    return Verdict(admitted=True, reason=why, required_bytes=size, dry_run=rules.dry_run or request.dry_run)


def _blind(request: Request, rules: Rules, why: str) -> Verdict:
    verdict = _unseen(request, rules, f"no GPU reading ({why}): admitted without looking (VRAM_FAIL_OPEN=true)")
    if rules.fail_open:
        return replace(verdict, fail_open=True)
    reason = f"no GPU reading ({why}) and VRAM_FAIL_OPEN=false: nobody is admitted"
    return _or_dry_run(request, rules, replace(verdict, admitted=False, reason=reason))


def _rooms(request: Request, snapshot: Snapshot, gpus: Gpus, book: Book, rules: Rules) -> list[_Room] | Missing:
    candidates = list(gpus.gpus)
    comfyui = snapshot.comfyui.value if isinstance(snapshot.comfyui, Seen) else None
    theirs = comfyui_gpu(comfyui, gpus, rules) if comfyui is not None else Missing("ComfyUI cannot be read")
    if request.gpu is not None and not gpus.second_hand:
        gpu = named(gpus, request.gpu)
        if gpu is None:
            return Missing(f"GPU {request.gpu} is not there")
        candidates = [gpu]
    elif request.for_comfyui and isinstance(theirs, Gpu):
        candidates = [theirs]
    elif request.estimate.for_ollama:
        candidates = [gpu for gpu in candidates if can_use(gpu, gpus, rules)] or candidates
    rooms = []
    for gpu in candidates:
        if isinstance(gpu.memory, Missing):
            continue
        held = _comfyui_on(gpu, snapshot, gpus, rules)
        hold = 0 if held is None else held.bytes
        idle = isinstance(snapshot.queue, Seen) and snapshot.queue.value.idle
        leased = snapshot.leased_on(gpu.uuid)
        own = _own_bytes(request, held, gpu, gpu.memory, snapshot, gpus, book, rules)
        if request.for_comfyui:
            # What was promised to its last prompt is there for its next one already.
            leased -= _promised_to_comfyui(book, gpu)
            if request.at_gateway and request.new_files and leased > 0:
                # It lets go of other files only where free memory does not suffice, whomever that was promised to.
                own = 0
        # Promises beyond what is free come out of its own: what is in use may be theirs by now, and not seen as such.
        available = max(0, gpu.memory.free_bytes - leased + own)
        required = request.estimate.size.on(gpu.memory.usable_bytes)
        if request.for_comfyui and request.estimate.source is Source.FILES:
            # It loads its files in turns where they do not fit together: it never needs more than the card.
            required = min(required, max(0, gpu.memory.usable_bytes - request.margin_bytes))
        reach: int | None = None
        if request.at_gateway:
            # The most of the last seconds, as what is on its way from one to another is in nobody's numbers.
            now = _reach(gpu, gpu.memory, hold + _may_leave_bytes(request, gpu, snapshot, gpus, rules), book)
            reach = max(now, snapshot.reachable_bytes.get(gpu.uuid, 0))
        rooms.append(
            _Room(
                gpu=gpu,
                memory=gpu.memory,
                required_bytes=required,
                need_bytes=required + request.margin_bytes,
                available_bytes=available,
                reach_bytes=reach,
                reclaimable_bytes=(hold if idle and not request.for_comfyui else 0)
                + _idle_models_bytes(request, gpu, snapshot, gpus, rules),
            )
        )
    causes = [f"GPU {gpu.index}: {gpu.memory.why}" for gpu in candidates if isinstance(gpu.memory, Missing)]
    return _within_reach(rooms, request) or Missing("; ".join(causes))


def _within_reach(rooms: list[_Room], request: Request) -> list[_Room]:
    """A call at a gateway goes on in the end: with as much as can be had on any GPU, where all of it cannot."""
    most = max((room.reach_bytes for room in rooms if room.reach_bytes is not None), default=None)
    if most is None:
        return rooms
    needs = [max(0, min(room.need_bytes, most - SLACK_BYTES)) for room in rooms]
    return [
        replace(room, need_bytes=need, required_bytes=max(0, need - request.margin_bytes))
        for room, need in zip(rooms, needs, strict=True)
    ]


def _promised_to_comfyui(book: Book, gpu: Gpu) -> int:
    return sum(one.outstanding_bytes for one in book.leases.values() if one.for_comfyui and one.gpu == gpu.uuid)


def _own_bytes(
    request: Request,
    held: Hold | None,
    gpu: Gpu,
    memory: GpuMemory,
    snapshot: Snapshot,
    gpus: Gpus,
    book: Book,
    rules: Rules,
) -> int:
    """What is in use on `gpu` and is let go of for `request`.

    ComfyUI makes room for its own next prompt. What is only perhaps its is promised to nobody, but holds up no call
    at the gateway. Ollama lets go of a model that it loads anew.
    """
    sure = 0 if held is None else held.torch_bytes if held.expected_bytes is None else held.bytes
    if request.for_comfyui:
        own = held.bytes if held is not None and (held.expected_bytes is not None or request.at_gateway) else 0
        by_ollama = ollama_bytes(snapshot, gpus, gpu, rules)
        others = by_ollama if isinstance(by_ollama, int) else 0
    elif request.estimate.for_ollama:
        models = _models_on(gpu, snapshot, gpus, rules)
        own = sum(model.size_vram_bytes for model in models if model.digest == request.estimate.digest)
        others = sum(model.size_vram_bytes for model in models) - own + sure
    else:
        return 0
    # The holder's own numbers may be older than NVML's: what others have by now, or nobody, it has no more.
    return min(own, max(0, memory.taken_bytes - others - _shown_of_workers(book, gpu)))


def _shown_of_workers(book: Book, gpu: Gpu) -> int:
    leases = (one for one in book.leases.values() if one.gpu == gpu.uuid)
    return sum(one.visible_bytes for one in leases if not (one.for_comfyui or one.estimate.for_ollama))


def _models_on(gpu: Gpu, snapshot: Snapshot, gpus: Gpus, rules: Rules) -> tuple[LoadedModel, ...]:
    """Ollama's models, if it is known that they are on `gpu`."""
    if not isinstance(snapshot.ollama, Seen) or ollama_gpu(gpus, rules) is not gpu:
        return ()
    return snapshot.ollama.value.models


def _may_be_asked(gpu: Gpu, snapshot: Snapshot, gpus: Gpus, rules: Rules) -> list[LoadedModel]:
    """The models on `gpu` that we ask to leave once they are idle."""
    models = _models_on(gpu, snapshot, gpus, rules) if rules.evict else ()
    return [model for model in models if canonical(model.name) not in rules.pinned]


def _idle_models_bytes(request: Request, gpu: Gpu, snapshot: Snapshot, gpus: Gpus, rules: Rules) -> int:
    """What Ollama's idle models on `gpu` would give back if they were asked to leave."""
    return sum(
        model.size_vram_bytes
        for model in _may_be_asked(gpu, snapshot, gpus, rules)
        if model.digest != request.estimate.digest and in_use(model, snapshot.taken_at, 0.0) is None
    )


def _may_leave_bytes(request: Request | None, gpu: Gpu, snapshot: Snapshot, gpus: Gpus, rules: Rules) -> int:
    """What Ollama's models on `gpu` would give back in time: those that may be asked, and the one to be loaded anew."""
    names = {model.name for model in _may_be_asked(gpu, snapshot, gpus, rules)}
    anew = request.estimate.digest if request is not None else None
    models = _models_on(gpu, snapshot, gpus, rules)
    return sum(model.size_vram_bytes for model in models if model.name in names or model.digest == anew)


def _comfyui_on(gpu: Gpu, snapshot: Snapshot, gpus: Gpus, rules: Rules) -> Hold | None:
    """What ComfyUI holds on `gpu`; None where it is not there or cannot be seen."""
    if not isinstance(snapshot.comfyui, Seen):
        return None
    comfyui = snapshot.comfyui.value
    if comfyui_gpu(comfyui, gpus, rules) is not gpu:
        return None
    return comfyui_hold(snapshot, comfyui, gpus, gpu, None, first_stage(comfyui), rules)


def _answer(room: _Room, *, admitted: bool, reason: str) -> Verdict:
    return Verdict(
        admitted=admitted,
        reason=reason,
        gpu=room.gpu.uuid,
        required_bytes=room.required_bytes,
        available_bytes=room.available_bytes,
        shortfall_bytes=room.shortfall_bytes,
        reclaimable_bytes=room.reclaimable_bytes,
    )


def _refused(
    request: Request,
    room: _Room,
    rules: Rules,
    reason: str,
    *,
    hopeless: bool = False,
    alternatives: tuple[Alternative, ...] = (),
) -> Verdict:
    verdict = replace(_answer(room, admitted=False, reason=reason), hopeless=hopeless, alternatives=alternatives)
    return _or_dry_run(request, rules, verdict)


def _or_dry_run(request: Request, rules: Rules, verdict: Verdict) -> Verdict:
    """In a dry run nobody is refused, and the answer says who would have been."""
    if not (rules.dry_run or request.dry_run):
        return verdict
    return replace(verdict, admitted=True, dry_run=True, reason=f"DRY RUN: would refuse: {verdict.reason}")


def _need(room: _Room) -> str:
    margin = room.need_bytes - room.required_bytes
    if not margin:
        return f"need {gib(room.need_bytes)}"
    parts = f"{room.required_bytes / GIB:.1f} + {margin / GIB:.1f} safety margin"
    return f"need {gib(room.need_bytes)} ({parts})"


def _name(gpu: Gpu) -> str:
    return f"GPU {gpu.index} ({gpu.name})"


def _too_large(request: Request, room: _Room) -> str:
    total = f"{_name(room.gpu)} has {gib(room.memory.usable_bytes)} in all"
    remedy = "use a larger GPU, a smaller model" + (" or a smaller margin" if request.margin_bytes else "")
    return f"Insufficient GPU memory: {_need(room)}, {total}: no waiting helps; {remedy}"


def _insufficient(
    request: Request,
    room: _Room,
    snapshot: Snapshot,
    gpus: Gpus,
    book: Book,
    rules: Rules,
    kept_for: str | None,
    eta: float | None,
) -> str:
    where = f"{gib(room.available_bytes)} available on {_name(room.gpu)}"
    if kept_for is not None and room.shortfall_bytes == 0:
        why = f"kept for {kept_for}"
    else:
        why = _holder(room, snapshot, gpus, book, rules)
    words = f"Insufficient GPU memory: {_need(room)}, {where}; {why}"
    if eta is not None:
        words += f", ETA {_seconds(eta)}"
    fits = room.available_bytes - request.margin_bytes
    remedies = [f"ask for at most {gib(fits)}"] if fits >= rules.min_reclaim_bytes and kept_for is None else []
    remedies += ["wait for it with wait_seconds"] if eta is not None and not request.wait_seconds else []
    return f"{words}; {' or '.join(remedies)}" if remedies else words


def _seconds(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{max(1.0, seconds):.0f} s"


def _holder(room: _Room, snapshot: Snapshot, gpus: Gpus, book: Book, rules: Rules) -> str:
    """Who holds most of what is in use or promised there, and what they are doing."""
    gpu = room.gpu
    holders: list[tuple[int, str]] = []
    held = _comfyui_on(gpu, snapshot, gpus, rules)
    if held is not None:
        queue = snapshot.queue.value if isinstance(snapshot.queue, Seen) else None
        doing = "" if queue is None else " and is idle" if queue.idle else " and is rendering"
        perhaps = "perhaps " if held.expected_bytes is None else ""
        holders.append((held.bytes, f"ComfyUI holds {perhaps}{gib(held.bytes)}{doing}"))
    if isinstance(snapshot.ollama, Seen) and can_use(gpu, gpus, rules):
        for model in snapshot.ollama.value.models:
            size = model.size_vram_bytes
            holders.append((size, f"Ollama holds {gib(size)} for {model.name}"))
    holders += [
        (lease.bytes, f"{lease.owner} has a lease of {gib(lease.bytes)}")
        for lease in book.leases.values()
        if lease.gpu in (gpu.uuid, None) or gpus.second_hand
    ]
    others = room.memory.taken_bytes - sum(size for size, _ in holders)
    holders.append((others, f"others hold {gib(max(0, others))}"))
    return max(holders)[1]


def _alternatives(request: Request, rooms: list[_Room], rules: Rules) -> tuple[Alternative, ...]:
    """What would be admitted now, largest first: so much on each GPU, or a model of the table that fits."""
    found: list[Alternative] = []
    for room in sorted(rooms, key=lambda room: -room.available_bytes):
        fits = room.available_bytes - request.margin_bytes
        if fits >= rules.min_reclaim_bytes:
            found.append(Alternative(gpu=room.gpu.uuid, bytes=fits, words=f"up to {gib(fits)} on {_name(room.gpu)}"))
    if found and request.estimate.names:
        most = found[0]
        smaller = [(size, name) for name, size in rules.estimates.items() if size <= most.bytes and name != "default"]
        for size, name in sorted(smaller, reverse=True)[:3]:
            words = f"{name} ({gib(size)}) on {most.words.rpartition(' on ')[2]}"
            found.append(Alternative(gpu=most.gpu, bytes=size, model=name, words=words))
    return tuple(found)


def eta_seconds(
    need_bytes: int,
    gpu: Gpu,
    snapshot: Snapshot,
    book: Book,
    rules: Rules,
    pace: Pace,
    utcnow: datetime | None,
) -> float | None:
    """When so much may be available on `gpu`, in seconds from now; an estimate. None: nothing that can be foreseen.

    From what Ollama said it keeps its models for, ComfyUI's queue at its usual pace, and how long the holders of
    leases usually keep them.
    """
    gpus = gpus_seen(snapshot)
    if isinstance(gpus, Missing) or isinstance(gpu.memory, Missing):
        return None
    coming = sorted(
        [
            *_from_ollama(gpu, gpus, snapshot, rules, utcnow),
            *_from_comfyui(gpu, gpus, snapshot, rules, pace),
            *_from_leases(gpu, snapshot, book, pace),
        ]
    )
    available = gpu.memory.free_bytes - snapshot.leased_on(gpu.uuid)
    for seconds, size in coming:
        available += size
        if available >= need_bytes:
            return max(1.0, seconds)
    return None


def _from_ollama(
    gpu: Gpu, gpus: Gpus, snapshot: Snapshot, rules: Rules, utcnow: datetime | None
) -> list[tuple[float, int]]:
    if utcnow is None or not isinstance(snapshot.ollama, Seen) or not can_use(gpu, gpus, rules):
        return []
    return [
        (left, model.size_vram_bytes)
        for model in snapshot.ollama.value.models
        if model.expires_at is not None and 0 < (left := (model.expires_at - utcnow).total_seconds()) < FAR_SECONDS
    ]


def _from_comfyui(gpu: Gpu, gpus: Gpus, snapshot: Snapshot, rules: Rules, pace: Pace) -> list[tuple[float, int]]:
    held = _comfyui_on(gpu, snapshot, gpus, rules)
    if held is None or held.bytes < rules.min_reclaim_bytes or not isinstance(snapshot.queue, Seen):
        return []
    queue = snapshot.queue.value
    if queue.idle:
        rest = max(0.0, rules.waiting_idle_seconds - (snapshot.taken_at - queue.since))
        return [(rest + FREE_SECONDS, held.bytes)]
    if pace.prompt_seconds is None:
        return []
    running = max(0.0, pace.prompt_seconds - (snapshot.taken_at - queue.moved_at))
    rest = running + (queue.remaining - 1) * pace.prompt_seconds
    return [(rest + rules.waiting_idle_seconds + FREE_SECONDS, held.bytes)]


def _from_leases(gpu: Gpu, snapshot: Snapshot, book: Book, pace: Pace) -> list[tuple[float, int]]:
    now = snapshot.taken_at
    coming: list[tuple[float, int]] = []
    for lease in book.leases.values():
        if lease.gpu not in (gpu.uuid, None):
            continue
        usual = pace.lease_seconds.get(lease.owner)
        if usual is not None:
            coming.append((max(0.0, lease.granted_at + usual - now), lease.bytes))
        elif not lease.holds:
            coming.append((max(0.0, lease.expires_at - now), lease.bytes))
    return coming


def in_order(book: Book, now: float) -> list[Ticket]:
    """The line: by class of priority (which rises with the wait), then by age.

    An owner that was served goes to the back with all it asks for: one who floods the line gets every other turn,
    and nobody who waits can be passed by newcomers without end.
    """

    def rank(ticket: Ticket) -> tuple[int, float, float]:
        risen = int((now - ticket.since) / AGEING_SECONDS)
        turn = max(ticket.since, book.served_at.get(ticket.request.owner, ticket.since))
        return max(0, ticket.request.priority - risen), turn, ticket.since

    return sorted(book.line, key=rank)


def whose_turn(book: Book, snapshot: Snapshot, rules: Rules) -> tuple[Ticket, Verdict] | None:
    """The first in line who can be admitted now, without overtaking who may not be overtaken."""
    kept: dict[str, str] = {}
    gpus = gpus_seen(snapshot)
    for ticket in in_order(book, snapshot.taken_at):
        if not _stays(ticket.request, snapshot, gpus, kept, book, rules):
            verdict = judge(ticket.request, snapshot, book, rules, kept=kept)
            if verdict.admitted or verdict.hopeless:
                return ticket, verdict
        kept |= _kept_for(ticket, snapshot, book, rules)
    return None


def _stays(
    request: Request, snapshot: Snapshot, gpus: Gpus | Missing, kept: Mapping[str, str], book: Book, rules: Rules
) -> bool:
    """Nothing but room could help it, and there is none: the short way to a verdict whose words nobody will read."""
    if not rules.enabled or rules.dry_run or request.dry_run or isinstance(gpus, Missing):
        return False
    rooms = _rooms(request, snapshot, gpus, book, rules)
    if isinstance(rooms, Missing) or loaded(request.estimate, snapshot) is not None:
        return False
    possible = any(room.need_bytes <= room.memory.usable_bytes for room in rooms)
    return possible and all(room.shortfall_bytes > 0 or room.gpu.uuid in kept for room in rooms)


def kept_before(request: Request, book: Book, snapshot: Snapshot, rules: Rules) -> dict[str, str]:
    """The GPUs that a newcomer may not have, as somebody before it waits for them; and who."""
    if not book.line:
        return {}
    now = snapshot.taken_at
    newcomer = Ticket(request=request, since=now)
    kept: dict[str, str] = {}
    order = in_order(replace(book, line=(*book.line, newcomer)), now)
    for ticket in takewhile(lambda one: one is not newcomer, order):
        kept |= _kept_for(ticket, snapshot, book, rules)
    return kept


def _kept_for(ticket: Ticket, snapshot: Snapshot, book: Book, rules: Rules) -> dict[str, str]:
    """The GPUs whose free memory is kept for this one: it has waited long, and waiting will help it."""
    request, waited = ticket.request, snapshot.taken_at - ticket.since
    gpus = gpus_seen(snapshot)
    if waited < overtaking_seconds(request, rules) or isinstance(gpus, Missing):
        return {}
    rooms = _rooms(request, snapshot, gpus, book, rules)
    kept = {}
    for room in () if isinstance(rooms, Missing) else rooms:
        if room.need_bytes <= _in_reach(room, snapshot, gpus, book, rules):
            words = f"{request.owner}, who has waited {_seconds(waited)} for {gib(room.required_bytes)}"
            kept[room.gpu.uuid] = words
    return kept


def _in_reach(room: _Room, snapshot: Snapshot, gpus: Gpus, book: Book, rules: Rules) -> int:
    """What could become available there once leases end and tenants give way; what nobody accounts for stays."""
    if room.reach_bytes is not None:
        return room.reach_bytes
    held = _comfyui_on(room.gpu, snapshot, gpus, rules)
    tenants = 0 if held is None else held.bytes
    if isinstance(snapshot.ollama, Seen) and can_use(room.gpu, gpus, rules):
        tenants += sum(model.size_vram_bytes for model in snapshot.ollama.value.models)
    return _reach(room.gpu, room.memory, tenants, book)


def reachable(snapshot: Snapshot, book: Book, rules: Rules) -> dict[str, int]:
    """What could be had on each GPU by now, were every tenant to give way that can be asked to."""
    gpus = gpus_seen(snapshot)
    found: dict[str, int] = {}
    if isinstance(gpus, Missing):
        return found
    for gpu in gpus.gpus:
        if isinstance(gpu.memory, GpuMemory):
            held = _comfyui_on(gpu, snapshot, gpus, rules)
            hold = 0 if held is None else held.bytes
            tenants = hold + _may_leave_bytes(None, gpu, snapshot, gpus, rules)
            found[gpu.uuid] = _reach(gpu, gpu.memory, tenants, book)
    return found


def _reach(gpu: Gpu, memory: GpuMemory, tenants_bytes: int, book: Book) -> int:
    """What is free, and what the tenants and the holders of leases have."""
    own = tenants_bytes
    for lease in book.leases.values():
        if lease.gpu == gpu.uuid:
            # While a model or a prompt loads, only its promise tells whose memory that is.
            tenants = lease.for_comfyui or lease.estimate.for_ollama
            own += lease.outstanding_bytes if tenants else lease.visible_bytes
    return memory.free_bytes + min(own, memory.taken_bytes)


def demands(book: Book, snapshot: Snapshot, rules: Rules) -> tuple[Demand, ...]:
    """What the daemon should make room for: the first in line on each GPU whom that could help, else the first."""
    asks: dict[str | None, Demand] = {}
    in_vain: dict[str | None, Demand] = {}
    gpus = gpus_seen(snapshot)
    if isinstance(gpus, Missing):
        return ()
    for ticket in in_order(book, snapshot.taken_at):
        if len(asks) == len(gpus.gpus):
            break
        request = ticket.request
        rooms = _rooms(request, snapshot, gpus, book, rules)
        if isinstance(rooms, Missing):
            continue
        gpu = rooms[0].gpu.uuid if len(rooms) == 1 else None
        # What is free beside all promises must grow by what is missing: its own is there for it without that.
        need = min(_free(room, snapshot) + room.shortfall_bytes for room in rooms)
        helps = any(room.need_bytes <= _in_reach(room, snapshot, gpus, book, rules) for room in rooms)
        (asks if helps else in_vain).setdefault(
            gpu,
            Demand(
                kind=Kind.WAITING,
                key=f"admission:{request.owner}:{request.id}",
                gpu=gpu,
                need_free_bytes=need,
                reason=f"{request.owner} waits for {gib(rooms[0].required_bytes)}",
                since=ticket.since,
                last_seen_at=snapshot.taken_at,
                patient=request.priority is Priority.BATCH,
                for_comfyui=request.for_comfyui,
                model=request.estimate.digest if request.estimate.for_ollama else None,
            ),
        )
    return tuple((in_vain | asks).values())


def _free(room: _Room, snapshot: Snapshot) -> int:
    return room.memory.free_bytes - snapshot.leased_on(room.gpu.uuid)


def overtaking_seconds(request: Request, rules: Rules) -> float:
    """For how long others may go before this one while it waits: Ollama and ComfyUI take turns, workers share."""
    if not request.at_gateway:
        return OVERTAKING_SECONDS
    return rules.image_turn_seconds if request.for_comfyui else rules.chat_turn_seconds


def gives_way(model: LoadedModel, book: Book, snapshot: Snapshot, rules: Rules) -> str | None:
    """Who has waited so long for what `model` holds that it should serve nobody new before they had it; None: nobody.

    Else a stream of chats would keep it in use for ever.
    """
    gpus = gpus_seen(snapshot)
    if not rules.evict or canonical(model.name) in rules.pinned or isinstance(gpus, Missing):
        return None
    gpu = ollama_gpu(gpus, rules)
    if isinstance(gpu, Missing) or not model.size_vram_bytes:
        return None
    busy = [one for one in _may_be_asked(gpu, snapshot, gpus, rules) if one.requests]
    for ticket in in_order(book, snapshot.taken_at):
        request, waited = ticket.request, snapshot.taken_at - ticket.since
        if waited < overtaking_seconds(request, rules) or request.estimate.digest == model.digest:
            continue
        rooms = _rooms(request, snapshot, gpus, book, rules)
        room = None if isinstance(rooms, Missing) else next((one for one in rooms if one.gpu is gpu), None)
        # While even all models together are not enough, somebody else has to move first.
        more = sum(one.size_vram_bytes for one in busy if one.digest != request.estimate.digest)
        if room is None or not 0 < room.shortfall_bytes <= room.reclaimable_bytes + more:
            continue
        others = room.reclaimable_bytes - (0 if model.requests else model.size_vram_bytes)
        if others < room.shortfall_bytes:
            return f"{request.owner} has waited {_seconds(waited)} for the room of {model.name}"
    return None


def lease_of(request: Request, verdict: Verdict, lease_id: str, now: float) -> Lease:
    """The lease that an admitted request gets."""
    size = verdict.required_bytes
    return Lease(
        id=lease_id,
        request_id=request.id,
        owner=request.owner,
        gpu=verdict.gpu,
        bytes=request.estimate.size.bytes or 0 if size is None else size,
        priority=request.priority,
        estimate=request.estimate,
        ttl_seconds=request.ttl_seconds,
        granted_at=now,
        expires_at=now + request.ttl_seconds,
        for_comfyui=request.for_comfyui,
        pid=request.pid,
        at_gateway=request.at_gateway,
        new_files=request.new_files,
    )
