"""A model that fell to the CPU is loaded again once there is room, and one that made room comes back.

Ollama never moves a loaded model, so it has to leave and to come again: take it off (7a), load it as it was (7b),
look where it went (7c). Whoever uses it meanwhile waits for a load; so only an idle one, seldom, and never one
that had room and did not use it: somebody wants it on the CPU (`num_gpu: 0`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from vram_manager.domain.action import LoadModel, UnloadModel
from vram_manager.domain.demand import Demand, Kind
from vram_manager.domain.event import Event, EventType
from vram_manager.domain.reading import Missing, Seen
from vram_manager.domain.size import gib
from vram_manager.domain.snapshot import GpuMemory, Gpus, LoadedModel, Snapshot
from vram_manager.domain.watch import Mending, Pending, Watch
from vram_manager.policy import guards
from vram_manager.policy.accounting import gpus_read_at
from vram_manager.policy.demands import (
    fallback,
    fallback_key,
    is_called,
    missing_bytes,
    on_cpu,
    placement,
    same,
)
from vram_manager.policy.estimate import default_context
from vram_manager.policy.evict import in_use, ollama_gpu
from vram_manager.policy.guards import HOUR_SECONDS, Hold
from vram_manager.policy.rules import Rules

# Room is told in spans of this length, and for this long back: a load takes less.
SPAN_SECONDS = 5.0
LOOKED_BACK_SECONDS = 60.0
# A desktop keeps a GPU busy to some per cent; a model that is in part on it to more.
BUSY_PERCENT = 25
# Whoever comes first may have the room: after this long without it the model is left to its next request.
BRING_BACK_SECONDS = 60.0
# How soon to look again whether a model that is away can be loaded.
LOOK_AGAIN_SECONDS = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What is to be asked next of Ollama for a model that is being mended."""

    action: UnloadModel | LoadModel
    mending: Mending
    gpu: str | None
    expected_bytes: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A mending is over, and what there is to tell of it: nothing where the model is left to who asks for it.

    `model` is the model as it came back; `meant` where it did not use the room that it had.
    """

    event: Event | None = None
    model: LoadedModel | None = None
    meant: bool = False


def remembered(snapshot: Snapshot, gpus: Gpus | Missing, watch: Watch, before: Watch, rules: Rules) -> Watch:
    """With the least that was free lately, and with new placements on the CPU that had room all the time."""
    if isinstance(gpus, Missing):
        return replace(watch, least_free={})
    meant = frozenset(watch.meant & watch.fallbacks.keys())
    if isinstance(snapshot.ollama, Seen):
        for model in snapshot.ollama.value.models:
            key = fallback_key(model)
            if (
                key in watch.fallbacks
                and key not in before.fallbacks
                and _had_room(model, snapshot, gpus, watch, rules)
            ):
                meant |= {key}
    return replace(watch, meant=meant, least_free=_least_free(snapshot.taken_at, gpus, watch))


def _least_free(now: float, gpus: Gpus, watch: Watch) -> Mapping[str, tuple[tuple[float, int], ...]]:
    least: dict[str, tuple[tuple[float, int], ...]] = {}
    for gpu in gpus.gpus:
        if not isinstance(gpu.memory, GpuMemory):
            continue
        spans = list(watch.least_free.get(gpu.uuid, ()))
        if spans and now - spans[-1][0] < SPAN_SECONDS:
            spans[-1] = (spans[-1][0], min(spans[-1][1], gpu.memory.free_bytes))
        else:
            spans.append((now, gpu.memory.free_bytes))
        first = next((place for place, (at, _) in enumerate(spans) if at > now - LOOKED_BACK_SECONDS), len(spans))
        least[gpu.uuid] = tuple(spans[max(0, first - 1) :])
    return least


def _had_room(model: LoadedModel, snapshot: Snapshot, gpus: Gpus, watch: Watch, rules: Rules) -> bool:
    """Whether the whole model would have fitted at any moment of the last minute. Not watched for so long: no."""
    gpu = ollama_gpu(gpus, rules)
    if isinstance(gpu, Missing) or not isinstance(gpu.memory, GpuMemory) or not isinstance(snapshot.ollama, Seen):
        return False
    spans = watch.least_free.get(gpu.uuid, ())
    if not spans or spans[0][0] > snapshot.taken_at - LOOKED_BACK_SECONDS:
        return False
    read_at = gpus_read_at(snapshot, gpus)
    if read_at is None or read_at < snapshot.ollama.at:
        # Read before it was listed, perhaps before it was loaded: then there was room only if all of it fits now.
        need = need_bytes(model, snapshot, rules, anew=True)
    else:
        now = snapshot.taken_at
        need = fallback(model, snapshot.ollama.value, now, now, rules).need_free_bytes
    return min(gpu.memory.free_bytes, *(free for _, free in spans)) >= need


def fallen(
    alive: Mapping[str, Demand], snapshot: Snapshot, gpus: Gpus, watch: Watch, rules: Rules
) -> dict[str, Step | Hold]:
    """How each model that is on the CPU would be repaired if it has room, the one that has waited longest first."""
    if not rules.repair or watch.mending is not None or not isinstance(snapshot.ollama, Seen):
        return {}
    models = {fallback_key(model): model for model in snapshot.ollama.value.models if on_cpu(model)}
    found = sorted((alive[key].since, key) for key in models if key in alive)
    return {key: take_off(models[key], alive[key], snapshot, gpus, watch, rules) for _, key in found}


def take_off(
    model: LoadedModel, demand: Demand, snapshot: Snapshot, gpus: Gpus, watch: Watch, rules: Rules
) -> Step | Hold:
    """7a. Unload `model`, so that it can be loaded anew; or why not now."""
    now = snapshot.taken_at
    if demand.key in watch.meant:
        why = "there was room when it was loaded, so it is meant to be there (num_gpu), or Ollama does not use the GPU"
        return Hold(branch="7 meant", why=why)
    if (off := guards.switched_off(rules)) is not None:
        return off
    gpu = ollama_gpu(gpus, rules)
    if isinstance(gpu, Missing):
        return Hold(branch="7 which GPU", why=f"{gpu.why}; {gpu.remedy}" if gpu.remedy else gpu.why)
    if gpus.second_hand:
        return Hold(branch="7 blind", why="NVML is gone, so nobody can tell a full GPU from a lost one")
    if (late := _too_often(model, now, watch, rules)) is not None:
        return late
    if isinstance(snapshot.queue, Missing):
        return Hold(branch="7 unseen", why=f"ComfyUI's queue cannot be read: {snapshot.queue.why}")
    if isinstance(snapshot.queue, Seen) and not snapshot.queue.value.idle:
        return Hold(branch="7 busy", why="ComfyUI is working and would take the room while the model is away")
    if isinstance(snapshot.queue, Seen) and not model.held:
        # Somebody who renders again and again would meet the load half-way.
        pause = guards.not_idle_long_enough(snapshot.queue.value, rules.chat_turn_seconds, now)
        if pause is not None:
            return pause
    if snapshot.asks:
        return Hold(branch="7 others wait", why="somebody else waits for room")
    if model.requests is None and isinstance(gpu.utilization_percent, int) and gpu.utilization_percent >= BUSY_PERCENT:
        # Without a gateway nobody tells that a model is answering; while ComfyUI is idle the GPU's work is a sign.
        return Hold(
            branch="7 GPU at work", why=f"GPU {gpu.index} is {gpu.utilization_percent} % busy: it may be in use"
        )
    # Whoever is held at the gateway for it waits for this very step.
    quiet = 0.0 if model.held else max(rules.model_idle_seconds, rules.unseen_idle_seconds)
    if (busy := in_use(model, now, quiet)) is not None:
        return busy
    target = UnloadModel(model=model.name).target
    held = guards.spacing(target, watch.posted_at, rules.cooldown_seconds, now, "cooldown")
    if (held := held or guards.budget(watch.frees_at, now, rules, waiting=False)) is not None:
        return held
    reason = f"{model.name} was {placement(model).removesuffix(' CPU')} on CPU"
    mending = Mending(model=model, gpu=gpu.uuid, began_at=now, repair=True, reason=reason)
    return Step(
        action=UnloadModel(model=model.name),
        mending=mending,
        gpu=gpu.uuid,
        expected_bytes=model.size_vram_bytes,
        reason=f"{demand.reason}, and there is room for all of it: to be loaded again",
    )


def foreseen(model: LoadedModel, snapshot: Snapshot, watch: Watch, rules: Rules) -> bool:
    """Whether `model`, which is on the CPU, will be loaded anew as soon as there is room and nobody uses it."""
    if not (rules.repair and rules.enabled) or rules.dry_run or fallback_key(model) in watch.meant:
        return False
    return _too_often(model, snapshot.taken_at, watch, rules) is None


def _too_often(model: LoadedModel, now: float, watch: Watch, rules: Rules) -> Hold | None:
    recent = [at for at in watch.repairs_at.get(model.digest or model.name, ()) if now - at < HOUR_SECONDS]
    if not recent:
        return None
    if len(recent) >= rules.max_repairs_per_hour:
        why = f"{model.name} was repaired {len(recent)} times within the hour and is on the CPU again"
        return Hold(branch="7 given up", why=why, again_seconds=HOUR_SECONDS - (now - recent[0]))
    pause = rules.repair_backoff_seconds * 2 ** (len(recent) - 1)
    since = now - recent[-1]
    if since >= pause:
        return None
    why = f"{model.name} was repaired {since:.0f} s ago, {pause:g} s must pass"
    return Hold(branch="7 backing off", why=why, again_seconds=pause - since)


def begun(step: Step, now: float, watch: Watch) -> Watch:
    """The watch once `step` has been decided."""
    pending = Pending(
        action=step.action,
        gpu=step.gpu,
        reason=step.reason,
        demand=None,
        decided_at=now,
        expected_bytes=step.expected_bytes,
        model=step.mending.model,
    )
    return replace(watch, pending=pending, mending=step.mending)


def counted(mending: Mending, now: float, watch: Watch) -> Watch:
    """The watch once a model has been taken off."""
    key = mending.model.digest or mending.model.name
    recent = [at for at in watch.repairs_at.get(key, ()) if now - at < HOUR_SECONDS]
    others = {name: times for name, times in watch.repairs_at.items() if name != key and now - times[-1] < HOUR_SECONDS}
    return replace(watch, repairs_at={**others, key: (*recent, now)})


def bring_back(
    mending: Mending, snapshot: Snapshot, gpus: Gpus | Missing, watch: Watch, rules: Rules
) -> Step | Hold | Ended:
    """7b. Load the model again; why not yet; or how it ended without us."""
    now, model = snapshot.taken_at, mending.model
    if not isinstance(snapshot.ollama, Seen):
        return _later(mending, now, "Ollama cannot be read")
    if snapshot.ollama.at < watch.posted_at.get(UnloadModel(model=model.name).target, snapshot.ollama.at):
        return _later(mending, now, "Ollama has not been read since it was asked")
    if (back := _listed(model, snapshot.ollama.value.models)) is not None:
        if (back.since, fallback_key(back)) == (model.since, fallback_key(model)):
            return Ended(event=_failed(mending, now, "it has not left: a request may still run"))
        return _outcome(mending, back, snapshot, gpus, None, rules)
    if any(is_called(model, demand.model or "") for demand in snapshot.asks):
        return Ended()
    if isinstance(gpus, Missing) or gpus.second_hand:
        return _later(mending, now, "the GPU cannot be read")
    if isinstance(snapshot.queue, Seen) and not snapshot.queue.value.idle:
        return _later(mending, now, "ComfyUI has begun to work")
    # A part of it was on the GPU: its context came back with it, however large that was.
    need = need_bytes(model, snapshot, rules, anew=model.size_vram_bytes <= 0)
    if (short := need - _free_bytes(mending, snapshot, gpus)) > 0:
        return _later(mending, now, f"{gib(short)} are missing")
    return load(mending, gpus)


def load(mending: Mending, gpus: Gpus) -> Step:
    """Load the model as it was."""
    model = mending.model
    total = sum(gpu.memory.total_bytes for gpu in gpus.gpus if isinstance(gpu.memory, GpuMemory))
    # A context that the server gives by itself is not asked for: the next request without one would load it anew.
    own = model.context_length and model.context_length != default_context(total)
    return Step(
        action=LoadModel(model=model.name, context=model.context_length if own else None, expires_at=model.expires_at),
        mending=mending,
        gpu=mending.gpu,
        expected_bytes=0,
        reason=mending.reason,
    )


def need_bytes(model: LoadedModel, snapshot: Snapshot, rules: Rules, *, anew: bool) -> int:
    """What must be free for all of `model`, none of which is loaded; `anew`: with a context of its own."""
    version = snapshot.ollama.value.version if isinstance(snapshot.ollama, Seen) else Missing("not read")
    whole = model.size_vram_bytes + missing_bytes(model, version)
    return whole + (rules.context_bytes if anew else 0) + rules.fit_margin_bytes


def reserved(watch: Watch, rules: Rules) -> dict[str | None, int]:
    """What nobody else may be promised while a model is away, by GPU."""
    mending = watch.mending
    if mending is None:
        return {}
    return {mending.gpu: max(0, mending.model.size_bytes) + rules.context_bytes}


def _free_bytes(mending: Mending, snapshot: Snapshot, gpus: Gpus) -> int:
    """What is free for the model: beside what is promised to others, its own room not counted among that."""
    gpu = next((gpu for gpu in gpus.gpus if gpu.uuid == mending.gpu), None)
    if gpu is None or not isinstance(gpu.memory, GpuMemory):
        return 0
    own = snapshot.reserved_bytes.get(mending.gpu, 0)
    return gpu.memory.free_bytes - (snapshot.leased_on(gpu.uuid) - own)


def unreserved(snapshot: Snapshot) -> Snapshot:
    """What was seen, once no model is away any more: nothing is kept for one."""
    kept = snapshot.reserved_bytes
    leased = {gpu: size - kept.get(gpu, 0) for gpu, size in snapshot.leased_bytes.items()}
    return replace(snapshot, leased_bytes=leased, reserved_bytes={}) if kept else snapshot


def _later(mending: Mending, now: float, why: str) -> Hold | Ended:
    left = BRING_BACK_SECONDS - (now - mending.began_at)
    if left > 0:
        return Hold(branch="7 waiting to load", why=why, again_seconds=min(left, LOOK_AGAIN_SECONDS))
    return Ended(event=_failed(mending, now, f"{why}: its next request loads it"))


def _failed(mending: Mending, now: float, why: str) -> Event:
    return _event(mending, now, EventType.REPAIR_FAILED, f"{mending.reason}; {why}")


def _listed(model: LoadedModel, models: tuple[LoadedModel, ...]) -> LoadedModel | None:
    return next((one for one in models if same(one, model)), None)


def landed(
    mending: Mending, loaded_at: float | None, why: str, snapshot: Snapshot, gpus: Gpus | Missing, rules: Rules
) -> Ended:
    """7c. Where the model went that we have loaded at `loaded_at`; `why` it is not known."""
    models = snapshot.ollama.value.models if isinstance(snapshot.ollama, Seen) else ()
    if (back := _listed(mending.model, models)) is None:
        return Ended(event=_failed(mending, snapshot.taken_at, why or "it cannot be told where it went"))
    return _outcome(mending, back, snapshot, gpus, loaded_at, rules)


def _outcome(
    mending: Mending,
    back: LoadedModel,
    snapshot: Snapshot,
    gpus: Gpus | Missing,
    loaded_at: float | None,
    rules: Rules,
) -> Ended:
    """7c. Where the model went, told as an event; `loaded_at` if it was us who loaded it."""
    now = snapshot.taken_at
    if back.cpu_ratio == 0:
        kind = EventType.REPAIRED if mending.repair else EventType.WARMED_BACK
        name = "" if back.name == mending.model.name else f"{back.name} is "
        words = f"{mending.reason}, now {name}{placement(back)} ({gib(back.size_vram_bytes)})"
        return Ended(event=_event(mending, now, kind, words), model=back)
    words = f"{mending.reason}, and came back {placement(back)}"
    spare = None if loaded_at is None else _to_spare(back, mending, loaded_at, snapshot, gpus, rules)
    if spare is not None:
        lost = "as it was meant" if back.size_vram_bytes else "has Ollama lost the GPU? Restart it"
        words += f" with {gib(spare)} to spare: {lost}; it is left alone"
    return Ended(event=_event(mending, now, EventType.REPAIR_FAILED, words), model=back, meant=spare is not None)


def _to_spare(
    back: LoadedModel, mending: Mending, loaded_at: float, snapshot: Snapshot, gpus: Gpus | Missing, rules: Rules
) -> int | None:
    """What is free beside a model that is on the CPU though all of it would fit. None: it would not, or not known."""
    read_at = gpus_read_at(snapshot, gpus)
    if isinstance(gpus, Missing) or read_at is None or read_at <= loaded_at or not isinstance(snapshot.ollama, Seen):
        return None
    free = _free_bytes(mending, snapshot, gpus)
    now = snapshot.taken_at
    need = fallback(back, snapshot.ollama.value, now, now, rules).need_free_bytes
    return free if on_cpu(back) and free >= need else None


def _event(mending: Mending, now: float, kind: EventType, words: str) -> Event:
    return Event(
        type=kind,
        target=f"ollama:{mending.model.name}",
        gpu=mending.gpu,
        reason=words,
        took_seconds=now - mending.began_at,
        models=(mending.model.name,),
    )


def still_away(watch: Watch, snapshot: Snapshot) -> Watch:
    """Nobody needs to bring back a model that its own users have loaded again."""
    gone = watch.made_room
    if gone is None or not isinstance(snapshot.ollama, Seen):
        return watch
    listed = _listed(gone, snapshot.ollama.value.models) is not None
    return replace(watch, made_room=None) if listed else watch


def warm_back(snapshot: Snapshot, gpus: Gpus, watch: Watch, rules: Rules) -> tuple[Demand, Mending] | None:
    """The demand of the last model that made room for ComfyUI, once ComfyUI's queue has truly drained."""
    model, now = watch.made_room, snapshot.taken_at
    if not rules.warm_back or not rules.enabled or rules.dry_run or model is None or watch.mending is not None:
        return None
    if snapshot.asks or gpus.second_hand or not isinstance(snapshot.ollama, Seen):
        return None
    if not isinstance(snapshot.queue, Seen):
        return None
    queue = snapshot.queue.value
    if not queue.idle or now - queue.since < rules.comfyui_idle_seconds:
        return None
    gpu = ollama_gpu(gpus, rules)
    if isinstance(gpu, Missing):
        return None
    reason = f"{model.name} made room for ComfyUI"
    demand = Demand(
        kind=Kind.WARM_BACK,
        key=f"warm back:{model.digest or model.name}",
        gpu=gpu.uuid,
        need_free_bytes=need_bytes(model, snapshot, rules, anew=True),
        reason=reason,
        since=queue.since + rules.comfyui_idle_seconds,
        last_seen_at=now,
        model=model.name,
    )
    return demand, Mending(model=model, gpu=gpu.uuid, began_at=now, repair=False, reason=reason)
