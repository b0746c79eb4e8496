"""The cheapest reclaim that covers a demand, or why there is none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vram_manager.domain.action import Action, FreeComfyUI, Stage, UnloadModel
from vram_manager.domain.demand import Demand, Kind
from vram_manager.domain.reading import Missing, Off
from vram_manager.domain.size import gib
from vram_manager.domain.snapshot import ComfyUIState, Gpu, GpuMemory, Gpus, Queue, Snapshot
from vram_manager.domain.watch import Lesson, Watch
from vram_manager.policy import guards
from vram_manager.policy.accounting import Hold as Held
from vram_manager.policy.accounting import can_use, comfyui_gpu, comfyui_hold, named, nothing_new
from vram_manager.policy.guards import Hold
from vram_manager.policy.rules import Rules

_NOTHING: Mapping[str, int] = {}
# Who would not be helped by half of it.
_WAITED_FOR = (Kind.WAITING, Kind.FALLBACK, Kind.WARM_BACK)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """ComfyUI as it is now, once it is clear that it can be seen, and on which GPU."""

    comfyui: ComfyUIState
    queue: Queue
    gpu: Gpu
    memory: GpuMemory
    gpus: Gpus

    def held(self, snapshot: Snapshot, lesson: Lesson | None, stage: Stage, rules: Rules) -> Held:
        return comfyui_hold(snapshot, self.comfyui, self.gpus, self.gpu, lesson, stage, rules)


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """Ask ComfyUI for `action`; it should give back what `held` says."""

    action: FreeComfyUI
    target: Target
    held: Held


def comfyui_target(snapshot: Snapshot, gpus: Gpus, rules: Rules) -> Target | Hold:
    """ComfyUI, if everything needed to free it safely is known; never on a missing or stale reading."""
    if isinstance(snapshot.comfyui, Off) or isinstance(snapshot.queue, Off):
        return Hold(branch="4 nobody to ask", why="no ComfyUI is configured")
    if isinstance(snapshot.comfyui, Missing):
        return Hold(branch="4 unseen", why=f"ComfyUI cannot be read: {snapshot.comfyui.why}")
    if isinstance(snapshot.queue, Missing):
        return Hold(branch="4 unseen", why=f"ComfyUI's queue cannot be read: {snapshot.queue.why}")
    comfyui = snapshot.comfyui.value
    gpu = comfyui_gpu(comfyui, gpus, rules)
    if isinstance(gpu, Missing):
        remedy = f" ({gpu.remedy})" if gpu.remedy else ""
        return Hold(branch="4 which GPU", why=f"{gpu.why}{remedy}")
    if isinstance(gpu.memory, Missing):
        return Hold(branch="2 blind", why=f"no memory reading of GPU {gpu.index}: {gpu.memory.why}")
    return Target(comfyui=comfyui, queue=snapshot.queue.value, gpu=gpu, memory=gpu.memory, gpus=gpus)


def first_stage(comfyui: ComfyUIState) -> Stage:
    """Soft, unless its flags keep the weights on the GPU: there `unload_models` moves them GPU to GPU."""
    return Stage.UNLOAD if comfyui.has_flag("--highvram", "--gpu-only") else Stage.SOFT


def words(action: Action) -> str:
    """The action, as reasons name it."""
    if isinstance(action, FreeComfyUI):
        return "a soft free" if action.stage is Stage.SOFT else "the unload stage"
    return f"unloading {action.model}" if isinstance(action, UnloadModel) else f"loading {action.model}"


def plan(
    demand: Demand, snapshot: Snapshot, gpus: Gpus, watch: Watch, rules: Rules, more_bytes: Mapping[str, int] = _NOTHING
) -> Proposal | Hold:
    """What to ask of ComfyUI for `demand`; `more_bytes` could come from others on a GPU beside."""
    if demand.for_comfyui:
        return Hold(branch="4 itself", why="ComfyUI makes room in its own memory by itself")
    target = comfyui_target(snapshot, gpus, rules)
    if isinstance(target, Hold):
        return target
    if demand.gpu is not None and demand.gpu != target.gpu.uuid:
        return Hold(branch="4 other GPU", why=f"ComfyUI is on GPU {target.gpu.index}, which would not help")
    if (demand.kind is Kind.FALLBACK or demand.model) and not can_use(target.gpu, gpus, rules):
        why = f"ComfyUI is on GPU {target.gpu.index}, Ollama is not"
        if named(gpus, rules.ollama_gpu or "") is None:
            why = f"OLLAMA_GPU={rules.ollama_gpu} is none of the GPUs seen here"
        return Hold(branch="4 other GPU", why=why)
    stage = first_stage(target.comfyui)
    held = target.held(snapshot, watch.lesson, stage, rules)
    if nothing_new(held, watch.lesson, target.queue, stage, rules):
        return Hold(branch="4 unreclaimable", why="ComfyUI has not run since it was last freed: nothing more to give")
    proposal = Proposal(action=FreeComfyUI(stage=stage), target=target, held=held)
    too_little = held.bytes < rules.min_reclaim_bytes
    vain = demand.kind in _WAITED_FOR and would_not_fit(demand, snapshot, proposal, more_bytes)
    if held.unseen is not None and (too_little or vain):
        remedy = f" ({held.unseen.remedy})" if held.unseen.remedy else ""
        why = f"what ComfyUI holds beyond {gib(held.bytes)} cannot be told: Ollama cannot be read: {held.unseen.why}"
        return Hold(branch="4 unseen", why=f"{why}{remedy}")
    if too_little:
        return Hold(branch="4 nothing held", why=f"ComfyUI holds {gib(held.bytes)}: not worth a free")
    if vain:
        return Hold(
            branch="4 would not fit",
            why=f"would not fit even after a free: needs {gib(demand.need_free_bytes)} free, "
            f"{gib(_available(target, snapshot))} are and ComfyUI holds {gib(held.bytes)} ({held.certainty})",
        )
    return proposal


def would_not_fit(demand: Demand, snapshot: Snapshot, proposal: Proposal, more_bytes: Mapping[str, int]) -> bool:
    """Even if everything came back that `proposal` could give and others beside, without what is promised."""
    more = more_bytes.get(proposal.target.gpu.uuid, 0)
    return _available(proposal.target, snapshot) + proposal.held.bytes + more < demand.need_free_bytes


def _available(target: Target, snapshot: Snapshot) -> int:
    return target.memory.free_bytes - snapshot.leased_on(target.gpu.uuid)


def harder(snapshot: Snapshot, target: Target, lesson: Lesson | None, rules: Rules) -> Proposal | None:
    """The unload stage, if ComfyUI still seems to hold something that it could release."""
    held = target.held(snapshot, lesson, Stage.UNLOAD, rules)
    if held.bytes < rules.min_reclaim_bytes or nothing_new(held, lesson, target.queue, Stage.UNLOAD, rules):
        return None
    return Proposal(action=FreeComfyUI(stage=Stage.UNLOAD), target=target, held=held)


def why_not_now(
    proposal: Proposal,
    idle_seconds: float,
    now: float,
    watch: Watch,
    rules: Rules,
    *,
    first: bool,
    demand: Demand | None = None,
) -> Hold | None:
    """The first guard that holds `proposal` back from `demand`. The unload stage of an episode has no cooldown."""
    queue = proposal.target.queue
    name = proposal.action.target
    if held := guards.switched_off(rules) or guards.busy(queue):
        return held
    if not first:
        return guards.spacing(name, watch.posted_at, rules.post_spacing_seconds, now, "spacing")
    return (
        guards.not_idle_long_enough(queue, idle_seconds, now)
        or guards.spacing(name, watch.posted_at, rules.post_spacing_seconds, now, "spacing")
        or guards.cooldown(name, watch.posted_at, demand, now, rules)
        or guards.budget(watch.frees_at, now, rules, waiting=demand is not None and demand.kind is Kind.WAITING)
    )
