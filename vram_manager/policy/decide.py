"""The public door of the policy: a snapshot and what is remembered become a decision.

The tree, whose numbers are repeated below and in every decision's `branch`:

1. An action is settling -> wait for the proof, ask once more if the flag was lost, or conclude.
2. The GPU cannot be read -> ComfyUI's own numbers, marked second-hand; those missing too -> hold.
3. Collect demands, most urgent first: (a) somebody waits, (b) a model fell to the CPU, (c) ComfyUI has begun
   or a worker is at its hard limit, (d) pressure for longer than the grace period, (e) a model that made room may
   come back. Nobody -> nothing to do.
4. Plan the cheapest reclaim that covers the demand: ComfyUI, then Ollama's idle models; nothing that would help
   -> hold.
5. Guards: switched off, busy, not idle for long enough, just loaded, cooldown, budget, dry run -> hold, and say
   until when.
6. Act on one target. Soft first; once it has settled and was not enough, the unload stage, as part of
   the same episode.
7. Repair a model that fell to the CPU and has room now: (a) take it off, (b) load it as it was, (c) look where it
   went.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from vram_manager.domain.action import Action, FreeComfyUI, Stage
from vram_manager.domain.decision import Decision
from vram_manager.domain.demand import Demand, Kind
from vram_manager.domain.event import Event, EventType
from vram_manager.domain.reading import Missing, Seen
from vram_manager.domain.size import gib
from vram_manager.domain.snapshot import Gpu, GpuMemory, Gpus, LoadedModel, Snapshot
from vram_manager.domain.watch import Episode, Pending, Watch
from vram_manager.policy.accounting import gpus_read_at, gpus_seen
from vram_manager.policy.conclude import conclude, lowered, mended
from vram_manager.policy.demands import collect, dead_worker, disagreeing, fill_rates, met, notice
from vram_manager.policy.evict import Eviction, Leaving, evict, leaving, why_not_yet
from vram_manager.policy.guards import Hold
from vram_manager.policy.inputs import inputs_of
from vram_manager.policy.plan import (
    Proposal,
    comfyui_target,
    harder,
    plan,
    why_not_now,
    words,
    would_not_fit,
)
from vram_manager.policy.pressure import limit_bytes, pressures
from vram_manager.policy.repair import (
    Ended,
    Step,
    begun,
    bring_back,
    fallen,
    load,
    remembered,
    still_away,
    unreserved,
    warm_back,
)
from vram_manager.policy.rules import Rules
from vram_manager.policy.settle import Repost, Settled, Waiting, settle

# What ends by itself this soon is worth waiting for: it costs nobody a reload.
BRIEF_SECONDS = 2.5


def decide(snapshot: Snapshot, watch: Watch, rules: Rules) -> Decision:
    """What follows from `snapshot`, given what `watch` remembers."""
    gpus = gpus_seen(snapshot)
    watch, events = _notice(snapshot, watch, gpus, rules)
    # 1. An action is settling.
    outcome = settle(watch.pending, snapshot, rules) if watch.pending is not None else None
    match outcome:
        case Waiting(pending=pending):
            reason = f"waiting for the proof of {words(pending.action)}: {gib(pending.rose_bytes)} came back so far"
            decision = Decision(branch="1 settling", reason=reason, watch=replace(watch, pending=pending))
        case Repost(pending=pending):
            reason = f"nothing came back from an idle ComfyUI: the flag of {words(pending.action)} was lost, once more"
            watch = replace(watch, pending=pending)
            decision = Decision(branch="1 once more", reason=reason, watch=watch, action=pending.action, repost=True)
        case Settled():
            watch, concluded = conclude(outcome, snapshot, watch, gpus, rules)
            decision = _next(snapshot, watch, gpus, rules)
            if concluded is not None:
                events.append(replace(concluded, final=not decision.branch.startswith("6 escalate")))
        case _:
            decision = _next(snapshot, watch, gpus, rules)
    inputs = inputs_of(snapshot, gpus, decision.watch)
    return replace(decision, events=(*events, *decision.events), inputs=inputs)


def _notice(snapshot: Snapshot, watch: Watch, gpus: Gpus | Missing, rules: Rules) -> tuple[Watch, list[Event]]:
    """What is worth telling whether or not anything follows from it."""
    seen = gpus if isinstance(gpus, Gpus) else None
    watch = fill_rates(gpus, gpus_read_at(snapshot, gpus), watch)
    before = watch
    watch, models = notice(snapshot, watch)
    watch = remembered(snapshot, gpus, watch, before, rules)
    watch, dead = dead_worker(snapshot, seen, watch, rules)
    watch, disagree = disagreeing(snapshot, watch)
    state, pressure = pressures(dict(watch.pressure), snapshot, seen, rules)
    return replace(watch, pressure=state), [*models, *dead, *disagree, *pressure]


def _next(snapshot: Snapshot, watch: Watch, gpus: Gpus | Missing, rules: Rules) -> Decision:
    """Branches 2 to 7, with nothing under way."""
    # 7b. A model is away to be loaded again; while it waits for that, the others are served beside what is kept for it.
    step = bring_back(watch.mending, snapshot, gpus, watch, rules) if watch.mending is not None else None
    if isinstance(step, Step):
        return _mend("7 load", step, snapshot, watch)
    ended = step.event if isinstance(step, Ended) else None
    watch = mended(watch, step) if isinstance(step, Ended) else watch
    decision = _on_demand(snapshot, watch, gpus, rules)
    if isinstance(step, Hold) and watch.mending is not None and decision.action is None:
        reason = f"{watch.mending.reason}: to be loaded again, holding, {step.why}"
        decision = replace(decision, branch=step.branch, reason=reason, look_again_seconds=step.again_seconds)
    return replace(decision, events=(*([ended] if ended else []), *decision.events))


def _on_demand(snapshot: Snapshot, watch: Watch, gpus: Gpus | Missing, rules: Rules) -> Decision:
    # 2. The GPU cannot be read.
    if isinstance(gpus, Missing):
        watch = replace(watch, episode=None)
        return Decision(branch="2 blind", reason=f"no GPU reading, holding: {gpus.why}", watch=watch)
    watch = still_away(replace(watch, lesson=lowered(watch.lesson, snapshot, gpus, rules)), snapshot)
    snapshot = snapshot if watch.mending else unreserved(snapshot)
    # 3. Collect demands.
    alive = collect(snapshot, gpus, watch, rules)
    returning = warm_back(snapshot, gpus, watch, rules)
    if returning is not None:
        alive[returning[0].key] = returning[0]
    room = frozenset(key for key, demand in alive.items() if met(demand, snapshot, gpus, rules))
    repairs = fallen(alive, snapshot, gpus, watch, rules)
    mendable = frozenset(key for key, step in repairs.items() if isinstance(step, Step))
    watch = _answered(alive, room, snapshot, gpus, watch)
    demands = {key: demand for key, demand in alive.items() if key not in room | _settled(watch, mendable)}
    told = demands.keys() | {_repair_key(key) for key in room & repairs.keys()}
    watch = replace(
        watch,
        demands=demands,
        dry_run_told=frozenset(watch.dry_run_told & told),
        unreclaimable=watch.unreclaimable if alive.keys() - room else {},
    )
    if watch.episode is not None:
        further = _escalate(watch.episode, mendable, snapshot, watch, gpus, rules)
        if isinstance(further, Decision):
            return further
        watch = further
        demands = {key: demand for key, demand in demands.items() if key not in _settled(watch, mendable)}
        watch = replace(watch, demands=demands)
    held: Decision | None = None
    for demand in sorted(demands.values(), key=lambda demand: (demand.kind, demand.since, demand.key)):
        decision = _answer(demand, mendable, snapshot, watch, gpus, rules)
        if decision.action is not None or decision.events:
            return decision
        held = held or decision
    # 7a. What fell to the CPU and has room now.
    soon = False
    for key in [key for key in repairs if key in room]:
        decision = _repair(repairs[key], alive[key], snapshot, watch, rules)
        if decision.action is not None or decision.events:
            return decision
        held = held or decision
        soon = soon or decision.look_again_seconds is not None
    if returning is not None and returning[0].key in room and not soon:
        return _mend("7 load", load(returning[1], gpus), snapshot, watch)
    return held or Decision(branch="3 nobody", reason=f"{_use(gpus)}: nobody needs more", watch=watch)


def _answered(alive: Mapping[str, Demand], room: frozenset[str], snapshot: Snapshot, gpus: Gpus, watch: Watch) -> Watch:
    """The watch with the placements for which there has been room, and without those that are no more."""
    # Room beside an idle ComfyUI is there to stay, if it was seen after the model had taken its own.
    stays = isinstance(snapshot.queue, Seen) and snapshot.queue.value.idle
    read_at = gpus_read_at(snapshot, gpus)
    seen = {key for key in room if stays and read_at is not None and alive[key].since <= read_at}
    return replace(
        watch,
        answered=frozenset((watch.answered | watch.meant) & watch.fallbacks.keys()),
        had_room=frozenset((watch.had_room | seen) & watch.fallbacks.keys()),
    )


def _settled(watch: Watch, mendable: frozenset[str]) -> frozenset[str]:
    """Placements for which nothing more is freed."""
    return watch.answered | (watch.had_room - mendable)


def _mend(branch: str, step: Step, snapshot: Snapshot, watch: Watch) -> Decision:
    reason = f"{step.reason}: {words(step.action)}"
    return Decision(branch=branch, reason=reason, watch=begun(step, snapshot.taken_at, watch), action=step.action)


def _repair(step: Step | Hold, demand: Demand, snapshot: Snapshot, watch: Watch, rules: Rules) -> Decision:
    if isinstance(step, Hold):
        return _hold(step, demand, watch)
    if not rules.dry_run:
        return _mend("7 repair", step, snapshot, watch)
    reason = f"{words(step.action)} ({step.reason})"
    event = Event(type=EventType.DRY_RUN, target=step.action.target, gpu=step.gpu, reason=reason)
    key = _repair_key(demand.key)
    return Decision(
        branch="7 dry run",
        reason=f"dry run: would ask for {reason}",
        watch=replace(watch, dry_run_told=watch.dry_run_told | {key}),
        events=() if key in watch.dry_run_told else (event,),
    )


def _repair_key(key: str) -> str:
    return f"repair of {key}"


def _answer(
    demand: Demand, mendable: frozenset[str], snapshot: Snapshot, watch: Watch, gpus: Gpus, rules: Rules
) -> Decision:
    # 4. Plan: ComfyUI first, as a copy from RAM is cheaper than reading a model.
    can = _leaving(demand, mendable, snapshot, gpus, watch, rules)
    proposal = plan(demand, snapshot, gpus, watch, rules, _beside(can))
    if isinstance(proposal, Hold):
        return _evicting(demand, can, proposal, snapshot, watch, rules)
    # 5. Guards.
    idle = _idle_seconds(demand, rules)
    held = why_not_now(proposal, idle, snapshot.taken_at, watch, rules, first=True, demand=demand)
    if held is not None and held.again_seconds is not None and held.again_seconds <= BRIEF_SECONDS:
        return _hold(held, demand, watch)
    if held is not None:
        return _evicting(demand, can, held, snapshot, watch, rules)
    if rules.dry_run:
        return _dry_run(_freeing(proposal), demand, watch)
    # 6. Act.
    return _act("6 act", _freeing(proposal), demand, snapshot, watch)


def _leaving(
    demand: Demand, mendable: frozenset[str], snapshot: Snapshot, gpus: Gpus, watch: Watch, rules: Rules
) -> Leaving | Hold:
    """Ollama's models that may give way: for one on the CPU only where its repair would follow at once."""
    if demand.kind is Kind.FALLBACK and demand.key not in mendable:
        return Hold(branch="4 no repair", why=f"{demand.model} would not use the room at once")
    return leaving(demand, snapshot, gpus, watch, rules)


def _beside(can: Leaving | Hold) -> dict[str, int]:
    return {can.gpu.uuid: can.bytes} if isinstance(can, Leaving) else {}


def _idle_seconds(demand: Demand, rules: Rules) -> float:
    """For how long ComfyUI must have been idle for `demand`."""
    if demand.kind in (Kind.PRESSURE, Kind.WARM_BACK) or demand.patient:
        return rules.comfyui_idle_seconds
    idle = min(rules.comfyui_idle_seconds, rules.waiting_idle_seconds)
    # A chat at the gateway cannot wait for an artist's whole pause: its turn is what it gets.
    held_back = demand.kind is Kind.WAITING and demand.model is not None
    return min(idle, max(rules.chat_turn_seconds, rules.post_spacing_seconds)) if held_back else idle


def _evicting(
    demand: Demand, can: Leaving | Hold, instead_of: Hold, snapshot: Snapshot, watch: Watch, rules: Rules
) -> Decision:
    """4. One of Ollama's idle models, where ComfyUI has nothing to give or may not be asked."""
    if isinstance(can, Hold):
        return _hold(can if demand.for_comfyui else instead_of, demand, watch)
    eviction = evict(demand, snapshot, can, rules)
    if isinstance(eviction, Hold):
        told = eviction if demand.for_comfyui or (can.stay and instead_of.again_seconds is None) else instead_of
        return _hold(told, demand, watch)
    held = why_not_yet(eviction, demand, snapshot.taken_at, watch, rules)
    if held is not None:
        return _hold(held, demand, watch)
    if rules.dry_run:
        return _dry_run(_unloading(eviction), demand, watch)
    return _act("6 evict", _unloading(eviction), demand, snapshot, watch)


def _escalate(
    episode: Episode, mendable: frozenset[str], snapshot: Snapshot, watch: Watch, gpus: Gpus, rules: Rules
) -> Decision | Watch:
    """6. The unload stage of an episode, a hold until it may go out, or the watch with the episode closed."""
    demand = watch.demands.get(episode.demand.key)
    target = comfyui_target(snapshot, gpus, rules)
    gave = episode.freed_bytes >= rules.min_reclaim_bytes and episode.demand.key in watch.fallbacks
    freed_for = {episode.demand.key} if gave else set()
    closed = replace(watch, episode=None, had_room=watch.had_room | freed_for)
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
    can = _leaving(demand, mendable, snapshot, gpus, watch, rules)
    if proposal is not None and not over and would_not_fit(demand, snapshot, proposal, _beside(can)):
        proposal = None
    if proposal is None:
        left = target.held(snapshot, watch.lesson, Stage.UNLOAD, rules)
        stays = left.torch_bytes + (left.unaccounted_bytes or 0)
        answered = watch.answered | (freed_for if unmet else set())
        return replace(closed, answered=answered, unreclaimable={**watch.unreclaimable, target.gpu.uuid: stays})
    why = f"{target.memory.used_percent:.0f} % still used after the soft free"
    demand = replace(demand, reason=f"{demand.reason}; {why}")
    held = why_not_now(proposal, 0.0, snapshot.taken_at, watch, rules, first=False)
    if held is not None:
        return replace(_hold(held, demand, watch), branch="6 escalate later")
    return _act("6 escalate", _freeing(proposal), demand, snapshot, watch)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ask:
    """What is to be asked, in words too, of which GPU's memory, what it should give back, and how that is known."""

    action: Action
    gpu: Gpu
    memory: GpuMemory
    expected_bytes: int | None
    words: str
    held: str
    model: LoadedModel | None = None


def _freeing(proposal: Proposal) -> _Ask:
    held, target = proposal.held, proposal.target
    return _Ask(
        action=proposal.action,
        gpu=target.gpu,
        memory=target.memory,
        expected_bytes=held.expected_bytes,
        words=f"ask ComfyUI for {words(proposal.action)}, it holds {gib(held.bytes)} ({held.certainty})",
        held=f"{words(proposal.action)} of ComfyUI, which holds {gib(held.bytes)}",
    )


def _unloading(eviction: Eviction) -> _Ask:
    name, size = eviction.model.name, gib(eviction.model.size_vram_bytes)
    return _Ask(
        action=eviction.action,
        gpu=eviction.gpu,
        memory=eviction.memory,
        expected_bytes=eviction.model.size_vram_bytes,
        words=f"ask Ollama to unload {name}, which holds {size}",
        held=f"{words(eviction.action)}, which holds {size}",
        model=eviction.model,
    )


def _act(branch: str, ask: _Ask, demand: Demand, snapshot: Snapshot, watch: Watch) -> Decision:
    pending = Pending(
        action=ask.action,
        gpu=ask.gpu.uuid,
        reason=demand.reason,
        demand=demand,
        decided_at=snapshot.taken_at,
        expected_bytes=ask.expected_bytes,
        model=ask.model,
    )
    return Decision(
        branch=branch,
        reason=f"{demand.reason}: {ask.words}",
        watch=replace(watch, pending=pending),
        action=ask.action,
    )


def _hold(held: Hold, demand: Demand, watch: Watch) -> Decision:
    return Decision(
        branch=held.branch,
        reason=f"{demand.reason}: holding, {held.why}",
        watch=watch,
        look_again_seconds=held.again_seconds,
    )


def _dry_run(ask: _Ask, demand: Demand, watch: Watch) -> Decision:
    """Says once per demand what would have been done."""
    words = f"{ask.held} ({demand.reason})"
    event = Event(
        type=EventType.DRY_RUN,
        target=ask.action.target,
        gpu=ask.gpu.uuid,
        stage=ask.action.stage if isinstance(ask.action, FreeComfyUI) else None,
        reason=words,
        used_percent_before=ask.memory.used_percent,
    )
    return Decision(
        branch="5 dry run",
        reason=f"dry run: would ask for {words}",
        watch=replace(watch, dry_run_told=watch.dry_run_told | {demand.key}),
        events=() if demand.key in watch.dry_run_told else (event,),
    )


def _use(gpus: Gpus) -> str:
    return ", ".join(
        f"GPU {gpu.index} {gpu.memory.used_percent:.0f} % used"
        if isinstance(gpu.memory, GpuMemory)
        else f"GPU {gpu.index} unknown"
        for gpu in gpus.gpus
    )
