"""A person asks: the same rules, except that nobody else needs to need it."""

from __future__ import annotations

from dataclasses import replace

from vram_manager.domain.action import LoadModel, Stage, UnloadModel
from vram_manager.domain.decision import Decision, ManualFree
from vram_manager.domain.reading import Missing, Seen
from vram_manager.domain.size import gib
from vram_manager.domain.snapshot import Snapshot
from vram_manager.domain.watch import Pending, Watch
from vram_manager.policy import guards
from vram_manager.policy.accounting import gpus_seen, named
from vram_manager.policy.guards import Hold
from vram_manager.policy.inputs import inputs_of
from vram_manager.policy.plan import Proposal, comfyui_target, first_stage, why_not_now, words
from vram_manager.policy.rules import Rules


def decide_manual(snapshot: Snapshot, watch: Watch, wish: ManualFree, rules: Rules) -> Decision:
    """A person asks: the same rules, except that nobody else needs to need it. Without an action: refused."""

    def no(why: str) -> Decision:
        return Decision(branch="manual refused", reason=why, watch=watch)

    gpus = gpus_seen(snapshot)
    if watch.pending is not None:
        return no(f"{words(watch.pending.action)} is still settling")
    if held := guards.switched_off(rules):
        return no(held.why)
    if isinstance(gpus, Missing):
        return no(f"no GPU reading, so nothing could be proven: {gpus.why}")
    action = wish.action
    now = snapshot.taken_at
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
    elif isinstance(action, LoadModel):
        return no("a model is loaded by asking Ollama")
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
        return no(f"dry run: would have asked for {words(action)}")
    mending = watch.mending
    # What a person wants gone is not brought back.
    unwanted = mending is not None and action.target == UnloadModel(model=mending.model.name).target
    pending = Pending(action=action, gpu=gpu, reason=wish.reason, demand=None, decided_at=now, expected_bytes=expected)
    return Decision(
        branch="manual",
        reason=f"{wish.reason}: {words(action)}",
        watch=replace(watch, pending=pending, episode=None, mending=None if unwanted else mending),
        action=action,
        inputs=inputs_of(snapshot, gpus, watch),
    )
