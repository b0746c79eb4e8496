"""The line: whose turn it is, who may not be passed, for whom room is made, and who gives way to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import takewhile

from vram_manager.domain.demand import Demand, Kind
from vram_manager.domain.lease import Book, Priority, Request, Ticket, Verdict
from vram_manager.domain.reading import Missing
from vram_manager.domain.size import gib
from vram_manager.domain.snapshot import Gpus, LoadedModel, Snapshot
from vram_manager.policy.accounting import gpus_seen
from vram_manager.policy.admission import in_words, judge
from vram_manager.policy.estimate import canonical
from vram_manager.policy.evict import ollama_gpu
from vram_manager.policy.leases import loaded
from vram_manager.policy.rooms import Room, in_reach, may_be_asked, rooms_for
from vram_manager.policy.rules import Rules

# A minute in line counts as one class of priority: a batch job goes first after two.
AGEING_SECONDS = 60.0
# Smaller requests may pass a larger one this long; then what becomes free is kept for it.
OVERTAKING_SECONDS = 30.0


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
    rooms = rooms_for(request, snapshot, gpus, book, rules)
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
    rooms = rooms_for(request, snapshot, gpus, book, rules)
    kept = {}
    for room in () if isinstance(rooms, Missing) else rooms:
        if room.need_bytes <= in_reach(room, snapshot, gpus, book, rules):
            words = f"{request.owner}, who has waited {in_words(waited)} for {gib(room.required_bytes)}"
            kept[room.gpu.uuid] = words
    return kept


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
        rooms = rooms_for(request, snapshot, gpus, book, rules)
        if isinstance(rooms, Missing):
            continue
        gpu = rooms[0].gpu.uuid if len(rooms) == 1 else None
        # What is free beside all promises must grow by what is missing: its own is there for it without that.
        need = min(_free(room, snapshot) + room.shortfall_bytes for room in rooms)
        helps = any(room.need_bytes <= in_reach(room, snapshot, gpus, book, rules) for room in rooms)
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


def _free(room: Room, snapshot: Snapshot) -> int:
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
    busy = [one for one in may_be_asked(gpu, snapshot, gpus, rules) if one.requests]
    for ticket in in_order(book, snapshot.taken_at):
        request, waited = ticket.request, snapshot.taken_at - ticket.since
        if waited < overtaking_seconds(request, rules) or request.estimate.digest == model.digest:
            continue
        rooms = rooms_for(request, snapshot, gpus, book, rules)
        room = None if isinstance(rooms, Missing) else next((one for one in rooms if one.gpu is gpu), None)
        # While even all models together are not enough, somebody else has to move first.
        more = sum(one.size_vram_bytes for one in busy if one.digest != request.estimate.digest)
        if room is None or not 0 < room.shortfall_bytes <= room.reclaimable_bytes + more:
            continue
        others = room.reclaimable_bytes - (0 if model.requests else model.size_vram_bytes)
        if others < room.shortfall_bytes:
            return f"{request.owner} has waited {in_words(waited)} for the room of {model.name}"
    return None
