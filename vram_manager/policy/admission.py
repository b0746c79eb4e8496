"""May I? The rule over what is seen, what is promised and who waits.

1. Nothing can be said: monitoring is off, or no GPU can be read -> admitted, and the answer says that it is blind.
2. More than the GPU has at all -> refused at once; no waiting would help.
3. It fits beside what is promised to others -> admitted, unless somebody who may not be overtaken waits for it.
4. Else refused, with what is missing, who holds it, when it might come, and what would fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime

from vram_manager.domain.lease import Alternative, Book, Lease, Request, Verdict
from vram_manager.domain.reading import Missing, Seen
from vram_manager.domain.size import GIB, gib
from vram_manager.domain.snapshot import Gpu, Gpus, Snapshot
from vram_manager.policy.accounting import can_use, gpus_seen, named
from vram_manager.policy.leases import loaded
from vram_manager.policy.rooms import Room, comfyui_on, rooms_for
from vram_manager.policy.rules import Rules

# A model that is kept for longer than this is not waited for.
FAR_SECONDS = 86_400.0
# From the request to the proof of a free of an idle ComfyUI, as a rule.
FREE_SECONDS = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Past durations, for an ETA: of the leases of each owner, and of ComfyUI's prompts (None: none seen yet)."""

    lease_seconds: Mapping[str, float] = field(default_factory=dict)
    prompt_seconds: float | None = None


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
    rooms = rooms_for(request, snapshot, gpus, book, rules)
    if isinstance(rooms, Missing):
        return _blind(request, rules, rooms.why)
    verdict = _judged(request, rooms, snapshot, gpus, book, rules, kept or {}, pace or Pace(), utcnow)
    # The name that ComfyUI's own numbers go by is nobody else's name for the card.
    return replace(verdict, gpu=None) if gpus.second_hand else verdict


def _judged(
    request: Request,
    rooms: list[Room],
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


def _answer(room: Room, *, admitted: bool, reason: str) -> Verdict:
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
    room: Room,
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


def _need(room: Room) -> str:
    margin = room.need_bytes - room.required_bytes
    if not margin:
        return f"need {gib(room.need_bytes)}"
    parts = f"{room.required_bytes / GIB:.1f} + {margin / GIB:.1f} safety margin"
    return f"need {gib(room.need_bytes)} ({parts})"


def _name(gpu: Gpu) -> str:
    return f"GPU {gpu.index} ({gpu.name})"


def _too_large(request: Request, room: Room) -> str:
    total = f"{_name(room.gpu)} has {gib(room.memory.usable_bytes)} in all"
    remedy = "use a larger GPU, a smaller model" + (" or a smaller margin" if request.margin_bytes else "")
    return f"Insufficient GPU memory: {_need(room)}, {total}: no waiting helps; {remedy}"


def _insufficient(
    request: Request,
    room: Room,
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
        words += f", ETA {in_words(eta)}"
    fits = room.available_bytes - request.margin_bytes
    remedies = [f"ask for at most {gib(fits)}"] if fits >= rules.min_reclaim_bytes and kept_for is None else []
    remedies += ["wait for it with wait_seconds"] if eta is not None and not request.wait_seconds else []
    return f"{words}; {' or '.join(remedies)}" if remedies else words


def in_words(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{max(1.0, seconds):.0f} s"


def _holder(room: Room, snapshot: Snapshot, gpus: Gpus, book: Book, rules: Rules) -> str:
    """Who holds most of what is in use or promised there, and what they are doing."""
    gpu = room.gpu
    holders: list[tuple[int, str]] = []
    held = comfyui_on(gpu, snapshot, gpus, rules)
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


def _alternatives(request: Request, rooms: list[Room], rules: Rules) -> tuple[Alternative, ...]:
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
    held = comfyui_on(gpu, snapshot, gpus, rules)
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
