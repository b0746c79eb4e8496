"""Which of Ollama's models gives way, or why none does.

Idle ones only, pinned ones never, those kept for ever last; then the smallest that is enough, and never more than
needed. `keep_alive: 0` aborts nobody's request, so a model that was idle only by our guess stays until it is.
"""

from __future__ import annotations

from dataclasses import dataclass

from vram_manager.domain.action import UnloadModel
from vram_manager.domain.demand import Demand, Kind
from vram_manager.domain.reading import Missing, Seen
from vram_manager.domain.size import gib
from vram_manager.domain.snapshot import Gpu, GpuMemory, Gpus, LoadedModel, Snapshot
from vram_manager.domain.watch import Watch
from vram_manager.policy import guards
from vram_manager.policy.accounting import named
from vram_manager.policy.demands import is_called
from vram_manager.policy.estimate import canonical
from vram_manager.policy.guards import Hold
from vram_manager.policy.rules import Rules

# A model that was asked to leave and stays has a request that may never end (Ollama issue 7606).
STAYS_SECONDS = 300.0
# `keep_alive: -1` is the longest time there is: the year 2318 (envconfig, time.Duration).
FOR_EVER_YEAR = 2200


@dataclass(frozen=True, slots=True, kw_only=True)
class Eviction:
    """Ask `model` to leave `gpu`."""

    action: UnloadModel
    model: LoadedModel
    gpu: Gpu
    memory: GpuMemory


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaving:
    """The models on `gpu` that could give way now, and why the others cannot, soonest first."""

    gpu: Gpu
    memory: GpuMemory
    models: tuple[LoadedModel, ...]
    stay: tuple[Hold, ...]

    @property
    def bytes(self) -> int:
        return sum(model.size_vram_bytes for model in self.models)


def ollama_gpu(gpus: Gpus, rules: Rules) -> Gpu | Missing:
    """The GPU that Ollama's models are on: `/api/ps` does not say, so the only one, or the one that was set."""
    if len(gpus.gpus) == 1:
        return gpus.gpus[0]
    if rules.ollama_gpu is None:
        return Missing("several GPUs, and Ollama does not say where its models are", remedy="set OLLAMA_GPU")
    found = named(gpus, rules.ollama_gpu)
    return found or Missing(f"OLLAMA_GPU={rules.ollama_gpu} is none of the GPUs seen here")


def leaving(demand: Demand, snapshot: Snapshot, gpus: Gpus, watch: Watch, rules: Rules) -> Leaving | Hold:
    """Whose memory could be had for `demand` from Ollama."""
    if not rules.evict:
        return Hold(branch="4 no eviction", why="Ollama's models are left alone (OLLAMA_EVICT=false)")
    if demand.kind in (Kind.PRESSURE, Kind.WARM_BACK):
        return Hold(branch="4 no eviction", why="nobody who waits would gain from unloading a model")
    if not isinstance(snapshot.ollama, Seen):
        why = f": {snapshot.ollama.why}" if isinstance(snapshot.ollama, Missing) else ""
        return Hold(branch="4 unseen", why=f"Ollama's models cannot be read{why}")
    gpu = ollama_gpu(gpus, rules)
    if isinstance(gpu, Missing):
        return Hold(branch="4 which GPU", why=f"{gpu.why}; {gpu.remedy}" if gpu.remedy else gpu.why)
    if isinstance(gpu.memory, Missing):
        return Hold(branch="2 blind", why=f"no memory reading of GPU {gpu.index}: {gpu.memory.why}")
    if demand.gpu not in (None, gpu.uuid):
        return Hold(branch="4 other GPU", why=f"Ollama is on GPU {gpu.index}, which would not help")
    models: list[LoadedModel] = []
    stay: list[Hold] = []
    for model in snapshot.ollama.value.models:
        if model.size_vram_bytes > 0 and not is_called(model, demand.model or ""):
            held = why_stays(model, demand, snapshot.taken_at, watch, rules)
            if held is None:
                models.append(model)
            else:
                stay.append(held)
    stay.sort(key=lambda hold: float("inf") if hold.again_seconds is None else hold.again_seconds)
    return Leaving(gpu=gpu, memory=gpu.memory, models=tuple(models), stay=tuple(stay))


def why_stays(model: LoadedModel, demand: Demand, now: float, watch: Watch, rules: Rules) -> Hold | None:
    """Why `model` may not be asked to leave for `demand`; None: it may."""
    name = model.name
    if canonical(name) in rules.pinned:
        return Hold(branch="4 pinned", why=f"{name} is pinned (OLLAMA_PINNED)")
    asked_at = watch.in_vain.get(name)
    if asked_at is not None and now - asked_at < STAYS_SECONDS and (model.active_at or asked_at) <= asked_at:
        left = STAYS_SECONDS - (now - asked_at)
        return Hold(branch="4 stays", why=f"{name} was asked to leave and stays", again_seconds=left)
    if (busy := in_use(model, now, idle_seconds(model, demand, now, rules))) is not None:
        return busy
    resident = None if model.since is None else now - model.since
    if resident is not None and resident < rules.min_residency_seconds and not guards.pressing(demand, now, rules):
        left = rules.min_residency_seconds - resident
        why = f"{name} was loaded {resident:.0f} s ago and stays for at least {rules.min_residency_seconds:g} s"
        return Hold(branch="5 residency", why=why, again_seconds=left)
    return None


def idle_seconds(model: LoadedModel, demand: Demand, now: float, rules: Rules) -> float:
    """For how long `model` must have been idle before it is asked to leave for `demand`."""
    if demand.patient:
        return rules.comfyui_idle_seconds
    if model.requests is None:
        return rules.unseen_idle_seconds
    return 0.0 if guards.pressing(demand, now, rules) else rules.model_idle_seconds


def in_use(model: LoadedModel, now: float, idle_seconds: float) -> Hold | None:
    """Why `model` does not count as idle; None: it has been, for that long."""
    if model.requests:
        return Hold(branch="5 model in use", why=f"{model.name} is answering {model.requests} request(s)")
    quiet = None if model.active_at is None else now - model.active_at
    if quiet is not None and quiet < idle_seconds:
        why = f"{model.name} was used {quiet:.1f} s ago, {idle_seconds:g} s of quiet count as idle"
        return Hold(branch="5 model in use", why=why, again_seconds=idle_seconds - quiet)
    return None


def evict(demand: Demand, snapshot: Snapshot, can: Leaving, rules: Rules) -> Eviction | Hold:
    """The next model to ask, if all that may leave is enough for `demand`."""
    available = can.memory.free_bytes - snapshot.leased_on(can.gpu.uuid)
    shortfall = demand.need_free_bytes - available
    if can.bytes < shortfall or not can.models:
        if can.stay:
            return can.stay[0]
        why = f"Ollama's idle models hold {gib(can.bytes)}, {gib(max(0, shortfall))} are missing"
        return Hold(branch="4 would not fit", why=why)
    model = _cheapest(can.models, shortfall)
    return Eviction(action=UnloadModel(model=model.name), model=model, gpu=can.gpu, memory=can.memory)


def _cheapest(models: tuple[LoadedModel, ...], shortfall: int) -> LoadedModel:
    """The smallest that is enough by itself, else the largest; one that is kept for ever only where it must be."""
    ordinary = [model for model in models if not _for_ever(model)]
    if sum(model.size_vram_bytes for model in ordinary) < shortfall:
        ordinary = list(models)
    enough = [model for model in ordinary if model.size_vram_bytes >= shortfall]
    if enough:
        return min(enough, key=lambda model: (model.size_vram_bytes, model.name))
    return max(ordinary, key=lambda model: (not _for_ever(model), model.size_vram_bytes, model.name))


def _for_ever(model: LoadedModel) -> bool:
    return model.expires_at is not None and model.expires_at.year >= FOR_EVER_YEAR


def why_not_yet(eviction: Eviction, demand: Demand, now: float, watch: Watch, rules: Rules) -> Hold | None:
    """The first guard that holds `eviction` back."""
    return (
        guards.switched_off(rules)
        or guards.cooldown(eviction.action.target, watch.posted_at, demand, now, rules)
        or guards.budget(watch.frees_at, now, rules, waiting=demand.kind is Kind.WAITING)
    )
