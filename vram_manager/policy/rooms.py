"""What a request could have on each GPU it may use: now, after others have given way, and in the end."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vram_manager.domain.lease import Book, Request, Source
from vram_manager.domain.reading import Missing, Seen
from vram_manager.domain.size import MIB
from vram_manager.domain.snapshot import Gpu, GpuMemory, Gpus, LoadedModel, Snapshot
from vram_manager.policy.accounting import Hold, can_use, comfyui_gpu, comfyui_hold, gpus_seen, named, ollama_bytes
from vram_manager.policy.estimate import canonical
from vram_manager.policy.evict import in_use, ollama_gpu
from vram_manager.policy.plan import first_stage
from vram_manager.policy.rules import Rules

# What several tenants hold in sum is never known to the byte.
SLACK_BYTES = 256 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
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


def rooms_for(request: Request, snapshot: Snapshot, gpus: Gpus, book: Book, rules: Rules) -> list[Room] | Missing:
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
        held = comfyui_on(gpu, snapshot, gpus, rules)
        hold = 0 if held is None else held.bytes
        idle = isinstance(snapshot.queue, Seen) and snapshot.queue.value.idle
        leased = snapshot.leased_on(gpu.uuid)
        own = _own_bytes(request, held, gpu, gpu.memory, snapshot, gpus, book, rules)
        if request.for_comfyui:
            # What was promised to its last prompt is there for its next one already.
            leased -= _promised_to_comfyui(book, gpu)
            if request.at_gateway and (_model_loads(book, gpu) or (request.new_files and leased > 0)):
                # It lets go of what it holds only where free memory does not suffice, whomever that was promised to:
                # a model that loads has it in seconds, and for other files it needs more than to work with.
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
            Room(
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


def _within_reach(rooms: list[Room], request: Request) -> list[Room]:
    """A call at a gateway goes on in the end: with as much as can be had on any GPU, where all of it cannot."""
    most = max((room.reach_bytes for room in rooms if room.reach_bytes is not None), default=None)
    if most is None:
        return rooms
    needs = [max(0, min(room.need_bytes, most - SLACK_BYTES)) for room in rooms]
    return [
        replace(room, need_bytes=need, required_bytes=max(0, need - request.margin_bytes))
        for room, need in zip(rooms, needs, strict=True)
    ]


def _model_loads(book: Book, gpu: Gpu) -> bool:
    leases = (one for one in book.leases.values() if one.gpu == gpu.uuid and one.estimate.for_ollama)
    return any(one.outstanding_bytes for one in leases)


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


def may_be_asked(gpu: Gpu, snapshot: Snapshot, gpus: Gpus, rules: Rules) -> list[LoadedModel]:
    """The models on `gpu` that we ask to leave once they are idle."""
    models = _models_on(gpu, snapshot, gpus, rules) if rules.evict else ()
    return [model for model in models if canonical(model.name) not in rules.pinned]


def _idle_models_bytes(request: Request, gpu: Gpu, snapshot: Snapshot, gpus: Gpus, rules: Rules) -> int:
    """What Ollama's idle models on `gpu` would give back if they were asked to leave."""
    return sum(
        model.size_vram_bytes
        for model in may_be_asked(gpu, snapshot, gpus, rules)
        if model.digest != request.estimate.digest and in_use(model, snapshot.taken_at, 0.0) is None
    )


def _may_leave_bytes(request: Request | None, gpu: Gpu, snapshot: Snapshot, gpus: Gpus, rules: Rules) -> int:
    """What Ollama's models on `gpu` would give back in time: those that may be asked, and the one to be loaded anew."""
    names = {model.name for model in may_be_asked(gpu, snapshot, gpus, rules)}
    anew = request.estimate.digest if request is not None else None
    models = _models_on(gpu, snapshot, gpus, rules)
    return sum(model.size_vram_bytes for model in models if model.name in names or model.digest == anew)


def comfyui_on(gpu: Gpu, snapshot: Snapshot, gpus: Gpus, rules: Rules) -> Hold | None:
    """What ComfyUI holds on `gpu`; None where it is not there or cannot be seen."""
    if not isinstance(snapshot.comfyui, Seen):
        return None
    comfyui = snapshot.comfyui.value
    if comfyui_gpu(comfyui, gpus, rules) is not gpu:
        return None
    return comfyui_hold(snapshot, comfyui, gpus, gpu, None, first_stage(comfyui), rules)


def in_reach(room: Room, snapshot: Snapshot, gpus: Gpus, book: Book, rules: Rules) -> int:
    """What could become available there once leases end and tenants give way; what nobody accounts for stays."""
    if room.reach_bytes is not None:
        return room.reach_bytes
    held = comfyui_on(room.gpu, snapshot, gpus, rules)
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
            held = comfyui_on(gpu, snapshot, gpus, rules)
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
