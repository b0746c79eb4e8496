"""What an action that is over has taught, and the event that tells it."""

from __future__ import annotations

from dataclasses import replace

from vram_manager.domain.action import FreeComfyUI, LoadModel, Stage, UnloadModel
from vram_manager.domain.event import Event, EventType
from vram_manager.domain.reading import Missing
from vram_manager.domain.snapshot import Gpus, Snapshot
from vram_manager.domain.watch import Episode, Lesson, Pending, Watch
from vram_manager.policy.demands import fallback_key, same
from vram_manager.policy.guards import HOUR_SECONDS
from vram_manager.policy.plan import Target, comfyui_target
from vram_manager.policy.repair import Ended, counted, landed
from vram_manager.policy.rules import Rules
from vram_manager.policy.settle import Settled


def conclude(
    settled: Settled, snapshot: Snapshot, watch: Watch, gpus: Gpus | Missing, rules: Rules
) -> tuple[Watch, Event | None]:
    """The action is over: what it taught, and the event that tells it."""
    pending = settled.pending
    if isinstance(pending.action, LoadModel):
        return _loaded(settled, snapshot, watch, gpus, rules)
    stage = pending.action.stage if isinstance(pending.action, FreeComfyUI) else None
    event = Event(
        type=EventType.FREED if settled.proven else EventType.FREE_UNCONFIRMED,
        target=pending.action.target,
        gpu=pending.gpu,
        stage=stage,
        reason=pending.reason if settled.proven else f"{pending.reason}; {settled.why}",
        freed_bytes=settled.freed_bytes,
        took_seconds=settled.took_seconds,
        used_percent_before=pending.used_percent_before,
        used_percent_after=settled.used_percent_after,
        action_id=pending.action_id,
    )
    watch = replace(watch, pending=None)
    if isinstance(pending.action, UnloadModel):
        return _unloaded(settled, pending.action.model, snapshot, watch), event
    assert stage is not None
    lesson = _lesson(pending, stage, settled, snapshot, watch, gpus, rules)
    watch = replace(watch, lesson=lesson)
    # A guess that gave nothing back is answered: the memory is not ComfyUI's. What is measured is worth more.
    if pending.demand is None or not (settled.proven or pending.expected_bytes is not None):
        return replace(watch, episode=None), event
    earlier = watch.episode.freed_bytes if watch.episode else 0
    episode = Episode(
        demand=pending.demand,
        gpu=pending.gpu,
        runs=lesson.runs,
        freed_bytes=earlier + settled.freed_bytes,
    )
    return replace(watch, episode=episode), event


def _unloaded(settled: Settled, name: str, snapshot: Snapshot, watch: Watch) -> Watch:
    """What an unload leaves behind: who may come back, who is away to be mended, and who did not leave."""
    now, demand, model = snapshot.taken_at, settled.pending.demand, settled.pending.model
    mending = watch.mending
    if mending is not None and mending.model.name == name:
        watch = counted(mending, now, watch)
        watch = replace(watch, mending=None) if settled.listed else watch
    if settled.listed is not False:
        in_vain = {other: at for other, at in watch.in_vain.items() if now - at < HOUR_SECONDS}
        return replace(watch, in_vain={**in_vain, name: now})
    if settled.proven and demand is not None and demand.for_comfyui and model is not None:
        before = watch.warmed_back
        unused = before is not None and same(before, model) and before.active_at == model.active_at
        return watch if unused else replace(watch, made_room=model)
    return watch


def _loaded(
    settled: Settled, snapshot: Snapshot, watch: Watch, gpus: Gpus | Missing, rules: Rules
) -> tuple[Watch, Event | None]:
    """7c. A load is over."""
    watch = replace(watch, pending=None)
    if watch.mending is None:
        return watch, None
    ended = landed(watch.mending, settled.pending.asked_at, settled.why, snapshot, gpus, rules)
    return mended(watch, ended), ended.event


def mended(watch: Watch, ended: Ended) -> Watch:
    """The watch once a mending is over."""
    back, warmed = ended.model, watch.mending is not None and not watch.mending.repair
    watch = replace(watch, mending=None)
    if back is not None and ended.meant:
        watch = replace(watch, meant=watch.meant | {fallback_key(back)})
    return replace(watch, made_room=None, warmed_back=back) if warmed else watch


def _lesson(
    pending: Pending,
    stage: Stage,
    settled: Settled,
    snapshot: Snapshot,
    watch: Watch,
    gpus: Gpus | Missing,
    rules: Rules,
) -> Lesson:
    before = watch.lesson
    runs = pending.runs_before or 0
    same_run = before is not None and before.runs == runs
    stages = before.stages if before is not None and same_run else frozenset()
    floors = dict(before.floors) if before else {}
    torch_after: int | None = None
    target = comfyui_target(snapshot, gpus, rules) if isinstance(gpus, Gpus) else None
    if isinstance(target, Target):
        left = target.held(snapshot, before, stage, rules)
        torch_after = left.torch_bytes
        if left.unaccounted_bytes is not None and target.queue.runs == runs:
            floors[stage] = left.unaccounted_bytes
    return Lesson(
        runs=runs,
        stages=stages | {stage},
        freed_bytes=settled.freed_bytes,
        torch_bytes_after=torch_after,
        floors=floors,
    )


def lowered(lesson: Lesson | None, snapshot: Snapshot, gpus: Gpus, rules: Rules) -> Lesson | None:
    """A floor was held by somebody else; when they leave, it sinks, or it would hide what ComfyUI takes next."""
    target = comfyui_target(snapshot, gpus, rules) if lesson else None
    if lesson is None or not isinstance(target, Target):
        return lesson
    now = target.held(snapshot, lesson, Stage.SOFT, rules).unaccounted_bytes
    if now is None:
        return lesson
    # Readings of different age can account for more than is used: below the allowance that is noise.
    most = max(now, rules.unseen_allowance_bytes)
    return replace(lesson, floors={stage: min(floor, most) for stage, floor in lesson.floors.items()})
