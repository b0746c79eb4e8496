"""The public door of the policy: a snapshot and what is remembered become a decision.

The tree, whose numbers are repeated below and in every decision's `branch`:

1. An action is settling -> wait for the proof, ask once more if the flag was lost, or conclude.
2. The GPU cannot be read -> ComfyUI's own numbers, marked second-hand; those missing too -> hold.
3. Collect demands, most urgent first: (a) somebody waits, (b) a model fell to the CPU, (c) a worker
   is at its hard limit, (d) pressure for longer than the grace period. Nobody -> nothing to do.
4. Plan the cheapest reclaim that covers the demand; nothing that would help -> hold.
5. Guards: switched off, busy, not idle for long enough, cooldown, budget, dry run -> hold, and say until when.
6. Act on one target. Soft first; once it has settled and was not enough, the unload stage, as part of
   the same episode.
"""

from __future__ import annotations

from dataclasses import replace

from vram_manager.domain.action import Action, FreeComfyUI, Stage, UnloadModel
from vram_manager.domain.decision import Decision, ManualFree
from vram_manager.domain.demand import Demand, Kind
from vram_manager.domain.event import Event, EventType
from vram_manager.domain.reading import Missing, Seen
from vram_manager.domain.size import gib
from vram_manager.domain.snapshot import GpuMemory, Gpus, Snapshot
from vram_manager.domain.watch import Episode, Lesson, Pending, Watch
from vram_manager.policy import guards
from vram_manager.policy.accounting import gpus_read_at, gpus_seen, named
from vram_manager.policy.demands import collect, dead_worker, disagreeing, fill_rates, met, notice
from vram_manager.policy.guards import Hold
from vram_manager.policy.inputs import inputs_of
from vram_manager.policy.plan import (
    Proposal,
    Target,
    comfyui_target,
    first_stage,
    harder,
    plan,
    why_not_now,
    would_not_fit,
)
from vram_manager.policy.pressure import limit_bytes, pressures
from vram_manager.policy.rules import Rules
from vram_manager.policy.settle import Repost, Settled, Waiting, settle


def decide(snapshot: Snapshot, watch: Watch, rules: Rules) -> Decision:
    """What follows from `snapshot`, given what `watch` remembers."""
    gpus = gpus_seen(snapshot)
    watch, events = _notice(snapshot, watch, gpus, rules)
    # 1. An action is settling.
    outcome = settle(watch.pending, snapshot, rules) if watch.pending is not None else None
    match outcome:
        case Waiting(pending=pending):
            reason = f"waiting for the proof of {_name(pending.action)}: {gib(pending.rose_bytes)} came back so far"
            decision = Decision(branch="1 settling", reason=reason, watch=replace(watch, pending=pending))
        case Repost(pending=pending):
            reason = f"nothing came back from an idle ComfyUI: the flag of {_name(pending.action)} was lost, once more"
            watch = replace(watch, pending=pending)
            decision = Decision(branch="1 once more", reason=reason, watch=watch, action=pending.action, repost=True)
        case Settled():
            watch, concluded = _conclude(outcome, snapshot, watch, gpus, rules)
            decision = _next(snapshot, watch, gpus, rules)
            events.append(replace(concluded, final=not decision.branch.startswith("6 escalate")))
        case _:
            decision = _next(snapshot, watch, gpus, rules)
    inputs = inputs_of(snapshot, gpus, decision.watch)
    return replace(decision, events=(*events, *decision.events), inputs=inputs)


def _notice(snapshot: Snapshot, watch: Watch, gpus: Gpus | Missing, rules: Rules) -> tuple[Watch, list[Event]]:
    """What is worth telling whether or not anything follows from it."""
    seen = gpus if isinstance(gpus, Gpus) else None
    watch = fill_rates(gpus, gpus_read_at(snapshot, gpus), watch)
    watch, models = notice(snapshot, watch)
    watch, dead = dead_worker(snapshot, seen, watch, rules)
    watch, disagree = disagreeing(snapshot, watch)
    state, pressure = pressures(dict(watch.pressure), snapshot, seen, rules)
    return replace(watch, pressure=state), [*models, *dead, *disagree, *pressure]


def _next(snapshot: Snapshot, watch: Watch, gpus: Gpus | Missing, rules: Rules) -> Decision:
    """Branches 2 to 6, with nothing under way."""
    # 2. The GPU cannot be read.
    if isinstance(gpus, Missing):
        watch = replace(watch, episode=None)
        return Decision(branch="2 blind", reason=f"no GPU reading, holding: {gpus.why}", watch=watch)
    watch = replace(watch, lesson=_lowered(watch.lesson, snapshot, gpus, rules))
    # 3. Collect demands.
    alive = collect(snapshot, gpus, watch, rules)
    room = frozenset(key for key, demand in alive.items() if met(demand, snapshot, gpus, rules))
    # Room beside an idle ComfyUI is there to stay: a placement that does not use it was meant (num_gpu: 0).
    stays = isinstance(snapshot.queue, Seen) and snapshot.queue.value.idle
    answered = (watch.answered | (room if stays else frozenset())) & watch.fallbacks
    demands = {key: demand for key, demand in alive.items() if key not in room | answered}
    watch = replace(
        watch,
        demands=demands,
        answered=answered,
        dry_run_told=frozenset(watch.dry_run_told & demands.keys()),
        unreclaimable=watch.unreclaimable if alive.keys() - room else {},
    )
    if watch.episode is not None:
        further = _escalate(watch.episode, snapshot, watch, gpus, rules)
        if isinstance(further, Decision):
            return further
        watch = further
        demands = {key: demand for key, demand in demands.items() if key not in watch.answered}
        watch = replace(watch, demands=demands)
    held: Decision | None = None
    for demand in sorted(demands.values(), key=lambda demand: (demand.kind, demand.since, demand.key)):
        decision = _answer(demand, snapshot, watch, gpus, rules)
        if decision.action is not None or decision.events:
            return decision
        held = held or decision
    return held or Decision(branch="3 nobody", reason=f"{_use(gpus)}: nobody needs more", watch=watch)


def _answer(demand: Demand, snapshot: Snapshot, watch: Watch, gpus: Gpus, rules: Rules) -> Decision:
    # 4. Plan.
    proposal = plan(demand, snapshot, gpus, watch, rules)
    if isinstance(proposal, Hold):
        return _hold(proposal, demand, watch)
    # 5. Guards.
    suffering = demand.kind is not Kind.PRESSURE and not demand.patient
    idle = min(rules.comfyui_idle_seconds, rules.waiting_idle_seconds) if suffering else rules.comfyui_idle_seconds
    held = why_not_now(proposal, idle, snapshot.taken_at, watch, rules, first=True)
    if held is not None:
        return _hold(held, demand, watch)
    if rules.dry_run:
        return _dry_run(proposal, demand, watch)
    # 6. Act.
    return _act("6 act", proposal, demand, snapshot, watch)


def _escalate(episode: Episode, snapshot: Snapshot, watch: Watch, gpus: Gpus, rules: Rules) -> Decision | Watch:
    """6. The unload stage of an episode, a hold until it may go out, or the watch with the episode closed."""
    demand = watch.demands.get(episode.demand.key)
    target = comfyui_target(snapshot, gpus, rules)
    closed = replace(watch, episode=None)
    if episode.freed_bytes >= rules.min_reclaim_bytes and episode.demand.key in watch.fallbacks:
        closed = replace(closed, answered=watch.answered | {episode.demand.key})
    if isinstance(target, Hold) or target.gpu.uuid != episode.gpu or target.queue.runs != episode.runs:
        return closed
    over = target.memory.used_percent > rules.unload_threshold_percent
    unmet = demand is not None and demand.kind is not Kind.PRESSURE
    if not over and not unmet:
        return closed
    demand = demand or episode.demand
    if over:
        room_bytes = limit_bytes(target.memory, rules.unload_threshold_percent)
        demand = replace(demand, need_free_bytes=max(demand.need_free_bytes, room_bytes))
    proposal = harder(snapshot, target, watch.lesson, rules)
    if proposal is not None and not over and would_not_fit(demand, snapshot, proposal):
        proposal = None
    if proposal is None:
        left = target.held(snapshot, watch.lesson, Stage.UNLOAD, rules)
        stays = left.torch_bytes + (left.unaccounted_bytes or 0)
        return replace(closed, unreclaimable={**watch.unreclaimable, target.gpu.uuid: stays})
    why = f"{target.memory.used_percent:.0f} % still used after the soft free"
    demand = replace(demand, reason=f"{demand.reason}; {why}")
    held = why_not_now(proposal, 0.0, snapshot.taken_at, watch, rules, first=False)
    if held is not None:
        return replace(_hold(held, demand, watch), branch="6 escalate later")
    return _act("6 escalate", proposal, demand, snapshot, watch)


def _act(branch: str, proposal: Proposal, demand: Demand, snapshot: Snapshot, watch: Watch) -> Decision:
    pending = Pending(
        action=proposal.action,
        gpu=proposal.target.gpu.uuid,
        reason=demand.reason,
        demand=demand,
        decided_at=snapshot.taken_at,
        expected_bytes=proposal.held.expected_bytes,
    )
    return Decision(
        branch=branch,
        reason=f"{demand.reason}: ask ComfyUI for {_name(proposal.action)}, "
        f"it holds {gib(proposal.held.bytes)} ({proposal.held.certainty})",
        watch=replace(watch, pending=pending),
        action=proposal.action,
    )


def _hold(held: Hold, demand: Demand, watch: Watch) -> Decision:
    return Decision(
        branch=held.branch,
        reason=f"{demand.reason}: holding, {held.why}",
        watch=watch,
        look_again_seconds=held.again_seconds,
    )


def _dry_run(proposal: Proposal, demand: Demand, watch: Watch) -> Decision:
    """Says once per demand what would have been done."""
    words = f"{_name(proposal.action)} of ComfyUI, which holds {gib(proposal.held.bytes)} ({demand.reason})"
    event = Event(
        type=EventType.DRY_RUN,
        target="comfyui",
        gpu=proposal.target.gpu.uuid,
        stage=proposal.action.stage,
        reason=words,
        used_percent_before=proposal.target.memory.used_percent,
    )
    return Decision(
        branch="5 dry run",
        reason=f"dry run: would ask for {words}",
        watch=replace(watch, dry_run_told=watch.dry_run_told | {demand.key}),
        events=() if demand.key in watch.dry_run_told else (event,),
    )


def _conclude(
    settled: Settled, snapshot: Snapshot, watch: Watch, gpus: Gpus | Missing, rules: Rules
) -> tuple[Watch, Event]:
    """The action is over: what it taught, and the event that tells it."""
    pending = settled.pending
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
    if stage is None:
        return watch, event
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


def _lowered(lesson: Lesson | None, snapshot: Snapshot, gpus: Gpus, rules: Rules) -> Lesson | None:
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


def decide_manual(snapshot: Snapshot, watch: Watch, wish: ManualFree, rules: Rules) -> Decision:
    """A person asks: the same rules, except that nobody else needs to need it. Without an action: refused."""

    def no(why: str) -> Decision:
        return Decision(branch="manual refused", reason=why, watch=watch)

    gpus = gpus_seen(snapshot)
    if watch.pending is not None:
        return no(f"{_name(watch.pending.action)} is still settling")
    if held := guards.switched_off(rules):
        return no(held.why)
    if isinstance(gpus, Missing):
        return no(f"no GPU reading, so nothing could be proven: {gpus.why}")
    action = wish.action
    now = snapshot.taken_at
    words = "asked by hand"
    expected: int | None
    if isinstance(action, UnloadModel):
        if not isinstance(snapshot.ollama, Seen):
            return no("Ollama cannot be read" if isinstance(snapshot.ollama, Missing) else "no Ollama is configured")
        model = next((model for model in snapshot.ollama.value.models if model.name == action.model), None)
        if model is None:
            return no(f"Ollama has no model {action.model} loaded")
        late = guards.spacing(action.target, watch.posted_at, rules.cooldown_seconds, now, "cooldown")
        if late is not None and not wish.force:
            return no(late.why)
        card = gpus.gpus[0] if len(gpus.gpus) == 1 else named(gpus, rules.ollama_gpu or "")
        gpu = card.uuid if card else None
        expected = model.size_vram_bytes
    else:
        target = comfyui_target(snapshot, gpus, rules)
        if isinstance(target, Hold):
            return no(target.why)
        held_bytes = target.held(snapshot, watch.lesson, action.stage, rules)
        proposal = Proposal(action=action, target=target, held=held_bytes)
        # A person is not an artist's rival: only as long as a flag posted at a prompt's end can be lost.
        idle = min(rules.waiting_idle_seconds, rules.post_spacing_seconds)
        if not wish.force:
            if late := why_not_now(proposal, idle, now, watch, rules, first=True):
                return no(late.why)
            if action.stage is not Stage.UNLOAD and first_stage(target.comfyui) is Stage.UNLOAD:
                return no("a soft free gives nothing back under --highvram or --gpu-only: ask for the unload stage")
            if held_bytes.bytes < rules.min_reclaim_bytes and held_bytes.unseen is None:
                return no(f"ComfyUI holds {gib(held_bytes.bytes)}: nothing worth freeing")
        elif late := guards.spacing(action.target, watch.posted_at, rules.post_spacing_seconds, now, "spacing"):
            return no(late.why)
        gpu = target.gpu.uuid
        expected = held_bytes.expected_bytes
    if rules.dry_run:
        return no(f"dry run: would have asked for {_name(action)}")
    pending = Pending(action=action, gpu=gpu, reason=words, demand=None, decided_at=now, expected_bytes=expected)
    return Decision(
        branch="manual",
        reason=f"{words}: {_name(action)}",
        watch=replace(watch, pending=pending, episode=None),
        action=action,
        inputs=inputs_of(snapshot, gpus, watch),
    )


def _name(action: Action) -> str:
    if isinstance(action, FreeComfyUI):
        return "a soft free" if action.stage is Stage.SOFT else "the unload stage"
    return f"unloading {action.model}"


def _use(gpus: Gpus) -> str:
    return ", ".join(
        f"GPU {gpu.index} {gpu.memory.used_percent:.0f} % used"
        if isinstance(gpu.memory, GpuMemory)
        else f"GPU {gpu.index} unknown"
        for gpu in gpus.gpus
    )
