"""Who needs bytes: what is new in Ollama, what fell to the CPU, what is under pressure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from vram_manager.domain.demand import Demand, Kind
from vram_manager.domain.event import Event, EventType
from vram_manager.domain.reading import Missing, Seen
from vram_manager.domain.size import MIB, gib
from vram_manager.domain.snapshot import Gpu, GpuMemory, Gpus, LoadedModel, OllamaState, Queue, Snapshot
from vram_manager.domain.version import release
from vram_manager.domain.watch import Watch
from vram_manager.policy.accounting import can_use
from vram_manager.policy.estimate import canonical
from vram_manager.policy.pressure import limit_bytes
from vram_manager.policy.rules import Rules

# Ollama may load or drop a model between the two looks; only a contradiction that lasts is one.
DISAGREE_SECONDS = 15.0


def placement(model: LoadedModel) -> str:
    """`100 % GPU`, `38 % CPU` or why it is not known."""
    match model.cpu_ratio:
        case Missing():
            return "placement unknown"
        case ratio if ratio >= 0.995:
            return "100 % CPU"
        case ratio if ratio > 0:
            return f"{max(1, round(ratio * 100))} % CPU"
    return "100 % GPU"


def is_called(model: LoadedModel, wanted: str) -> bool:
    """Whether `wanted`, a name or a digest, is `model`."""
    return bool(wanted) and (wanted == model.digest or canonical(wanted) == canonical(model.name))


def same(one: LoadedModel, other: LoadedModel) -> bool:
    """The same model: Ollama lists it under the name it was loaded by, and answers to all of them."""
    return is_called(one, other.name) or is_called(one, other.digest)


def fallback_key(model: LoadedModel) -> str:
    """One placement of one model. Ollama never moves layers, so the same key is the same load."""
    return f"fallback:{model.digest or model.name}:{model.size_vram_bytes}"


def missing_bytes(model: LoadedModel, version: str | Missing) -> int:
    """The part of `model` that is not on the GPU.

    Ollama 0.30.0-0.30.10 counted memory-mapped weights twice on a partial offload, so up to twice as much
    is reported there as is missing (trimmed to the file size since 0.30.11).
    """
    off_gpu = max(0, model.size_bytes - model.size_vram_bytes)
    numbers = release(version)
    inflated = numbers is not None and (0, 30, 0) <= numbers <= (0, 30, 10)
    return off_gpu // 2 if inflated and model.size_vram_bytes else off_gpu


def notice(snapshot: Snapshot, watch: Watch) -> tuple[Watch, list[Event]]:
    """Models that are new in Ollama's list, and placements that touch the CPU, each told once."""
    if not isinstance(snapshot.ollama, Seen):
        return watch, []
    models = snapshot.ollama.value.models
    events: list[Event] = []
    names = frozenset(model.name for model in models)
    if watch.models is not None and (new := [model for model in models if model.name not in watch.models]):
        words = ", ".join(f"{model.name} ({gib(model.size_bytes)}, {placement(model)})" for model in new)
        events.append(
            Event(
                type=EventType.MODEL_DETECTED,
                target="ollama",
                reason=words,
                models=tuple(model.name for model in new),
            )
        )
    fallbacks = {fallback_key(model): model for model in models if on_cpu(model)}
    for key, model in fallbacks.items():
        if key not in watch.fallbacks:
            events.append(
                Event(
                    type=EventType.CPU_FALLBACK,
                    target="ollama",
                    reason=f"{model.name} is {placement(model).removesuffix(' CPU')} on CPU",
                    models=(model.name,),
                )
            )
    since = {key: watch.fallbacks.get(key, snapshot.taken_at) for key in fallbacks}
    return replace(watch, models=names, fallbacks=since), events


def on_cpu(model: LoadedModel) -> bool:
    ratio = model.cpu_ratio
    return not isinstance(ratio, Missing) and ratio > 0


def collect(snapshot: Snapshot, gpus: Gpus, watch: Watch, rules: Rules) -> dict[str, Demand]:
    """Every demand that is alive, by key, met or not.

    A demand whose model left stays for `fallback_ttl_seconds`: a cooldown delays a trigger, it never eats it.
    """
    now = snapshot.taken_at
    alive = {
        key: demand
        for key, demand in watch.demands.items()
        if demand.kind is Kind.FALLBACK and now - demand.last_seen_at <= rules.fallback_ttl_seconds
    }
    if isinstance(snapshot.ollama, Seen):
        ollama = snapshot.ollama.value
        back = {_load(fallback_key(model)) for model in ollama.models}
        alive = {key: demand for key, demand in alive.items() if _load(key) not in back}
        for model in ollama.models:
            if on_cpu(model) and not _gpu_may_be_lost(model, gpus):
                key = fallback_key(model)
                alive[key] = fallback(model, ollama, watch.fallbacks.get(key, now), now, rules)
    alive |= {demand.key: demand for demand in snapshot.asks}
    for gpu in gpus.gpus:
        state = watch.pressure.get(gpu.uuid)
        if state is not None and state.began and isinstance(gpu.memory, GpuMemory):
            key = f"pressure:{gpu.uuid}"
            alive[key] = Demand(
                kind=Kind.PRESSURE,
                key=key,
                gpu=gpu.uuid,
                need_free_bytes=limit_bytes(gpu.memory, rules.threshold_percent) + rules.min_reclaim_bytes,
                reason=f"GPU {gpu.index} over {rules.threshold_percent:.0f} % for {now - state.high_since:.0f} s",
                since=state.high_since,
                last_seen_at=now,
            )
    return alive


def _load(key: str) -> str:
    """The model a fallback's key is about, wherever it was placed."""
    return key.rpartition(":")[0]


def _gpu_may_be_lost(model: LoadedModel, gpus: Gpus) -> bool:
    # With NVML gone a model wholly on CPU more likely means that Ollama lost the GPU than that it is full.
    return gpus.second_hand and model.size_vram_bytes == 0


def fallback(model: LoadedModel, ollama: OllamaState, since: float, now: float, rules: Rules) -> Demand:
    """What `model`, which has been on the CPU in part `since` then, would need to be wholly on the GPU."""
    context_bytes = 0 if model.size_vram_bytes else rules.context_bytes
    return Demand(
        kind=Kind.FALLBACK,
        key=fallback_key(model),
        gpu=None,
        need_free_bytes=missing_bytes(model, ollama.version) + context_bytes + rules.fit_margin_bytes,
        reason=f"{model.name} is {placement(model).removesuffix(' CPU')} on CPU",
        since=since,
        last_seen_at=now,
        model=model.name,
    )


def met(demand: Demand, snapshot: Snapshot, gpus: Gpus, rules: Rules) -> bool:
    """Enough is free on the demand's GPU, or on one that its tenant may use, beside what is promised to others."""
    return any(
        isinstance(gpu.memory, GpuMemory)
        and gpu.memory.free_bytes - snapshot.leased_on(gpu.uuid) >= demand.need_free_bytes
        and (demand.gpu == gpu.uuid or (demand.gpu is None and may_use(demand, gpu, gpus, rules)))
        for gpu in gpus.gpus
    )


def may_use(demand: Demand, gpu: Gpu, gpus: Gpus, rules: Rules) -> bool:
    """Whether memory on `gpu` would help: Ollama's models go where Ollama may, a worker takes any."""
    of_ollama = demand.kind in (Kind.FALLBACK, Kind.WARM_BACK) or demand.model is not None
    return not of_ollama or can_use(gpu, gpus, rules)


def disagreement(snapshot: Snapshot) -> str | None:
    """Ollama claims GPU memory that NVML does not see: a crashed runner, or a GPU that Ollama lost.

    https://github.com/ollama/ollama/issues/12323 has `ollama ps` at "100 % GPU" on a CPU.
    """
    if not isinstance(snapshot.ollama, Seen):
        return None
    claimed = sum(model.size_vram_bytes for model in snapshot.ollama.value.models)
    match snapshot.gpus:
        case Seen(value=gpus):
            memories = [gpu.memory for gpu in gpus.gpus if isinstance(gpu.memory, GpuMemory)]
            used = sum(max(0, memory.taken_bytes) for memory in memories)
            if memories and len(memories) == len(gpus.gpus) and claimed > used + 512 * MIB:
                return f"Ollama claims {gib(claimed)} on the GPU, NVML counts {gib(used)} used in all"
        case Missing() if claimed:
            return f"Ollama claims {gib(claimed)} on the GPU while NVML is gone"
    return None


def disagreeing(snapshot: Snapshot, watch: Watch) -> tuple[Watch, list[Event]]:
    """A contradiction between readings that lasts is told once."""
    words = disagreement(snapshot)
    if words is None:
        return replace(watch, disagrees_since=None, disagreement_told=False), []
    since = snapshot.taken_at if watch.disagrees_since is None else watch.disagrees_since
    tell = not watch.disagreement_told and snapshot.taken_at - since >= DISAGREE_SECONDS
    events = [Event(type=EventType.READINGS_DISAGREE, target="ollama", reason=words)] if tell else []
    return replace(watch, disagrees_since=since, disagreement_told=watch.disagreement_told or tell), events


def dead_worker(snapshot: Snapshot, gpus: Gpus | None, watch: Watch, rules: Rules) -> tuple[Watch, list[Event]]:
    """A queue that never moves while no GPU works is a dead worker thread: only a restart helps.

    HTTP keeps answering 200 then, and prompts are accepted and never run (ComfyUI issue 16312).
    """
    now = snapshot.taken_at
    worked: Mapping[int, int | Missing] = {gpu.index: gpu.utilization_percent for gpu in gpus.gpus} if gpus else {}
    unknown = not worked or any(isinstance(percent, Missing) for percent in worked.values())
    working = any(isinstance(percent, int) and percent >= 5 for percent in worked.values())
    worked_at = now if unknown or working or watch.gpu_worked_at is None else watch.gpu_worked_at
    watch = replace(watch, gpu_worked_at=worked_at)
    queue: Queue | None = snapshot.queue.value if isinstance(snapshot.queue, Seen) else None
    if queue is None:
        return watch, []
    if queue.idle:
        return replace(watch, worker_dead=False), []
    still_for = now - max(queue.moved_at, worked_at)
    if still_for < rules.dead_worker_seconds:
        return replace(watch, worker_dead=False), []
    if watch.worker_dead:
        return watch, []
    reason = (
        f"its queue of {queue.remaining} has not moved for {still_for / 60:.0f} min while the GPU is idle: "
        "the worker is probably dead; restart ComfyUI"
    )
    return replace(watch, worker_dead=True), [Event(type=EventType.WORKER_DEAD, target="comfyui", reason=reason)]


def fill_rates(gpus: Gpus | Missing, read_at: float | None, watch: Watch) -> Watch:
    """The fastest fill rate measured so far, between two readings: it bounds how soon the headroom can be gone."""
    if isinstance(gpus, Missing) or read_at is None:
        return watch
    used_at = dict(watch.used_at)
    fastest = watch.fill_rate_bytes_per_second
    for gpu in gpus.gpus:
        if not isinstance(gpu.memory, GpuMemory):
            continue
        used = gpu.memory.taken_bytes
        before = used_at.get(gpu.uuid)
        if before is not None and read_at > before[0]:
            fastest = max(fastest, (used - before[1]) / (read_at - before[0]))
        used_at[gpu.uuid] = (read_at, used)
    return replace(watch, used_at=used_at, fill_rate_bytes_per_second=fastest)
