"""Has the memory come back? A 200 is not a free: two witnesses are asked, NVML and the holder itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

from vram_manager.domain.action import FreeComfyUI, LoadModel, Stage, UnloadModel
from vram_manager.domain.reading import Missing, Seen
from vram_manager.domain.snapshot import GpuMemory, Snapshot
from vram_manager.domain.watch import Asked, Pending, Refused, Watch
from vram_manager.policy.accounting import gpus_read_at, gpus_seen
from vram_manager.policy.demands import is_called, same
from vram_manager.policy.repair import counted
from vram_manager.policy.rules import Rules

# Of what was expected, this much is proof; Ollama waits for the same share (server/sched.go:waitForVRAMRecovery).
PROOF_SHARE = 0.75
# Memory comes back in steps; the sum is told once no step has followed for this long.
QUIET_SECONDS = 0.5
# Steps below this are noise: the page size in which DynamicVRAM gives back.
STEP_BYTES = 2**25
# Less than expected has come and nothing follows: the rest is held by something that cannot be freed.
QUIET_SHORT_SECONDS = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """Not yet; `pending` carries the best rise so far."""

    pending: Pending


@dataclass(frozen=True, slots=True, kw_only=True)
class Repost:
    """Nothing came back from an idle ComfyUI: the flag was probably lost. Ask once more."""

    pending: Pending


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """It is over: `freed_bytes` came back within `took_seconds`, or `why` says what is known instead.

    `listed` is whether Ollama still lists a model that was to leave; None: it could not be read since.
    """

    pending: Pending
    proven: bool
    freed_bytes: int
    took_seconds: float
    used_percent_after: float | None
    why: str
    listed: bool | None = False


Outcome: TypeAlias = Waiting | Repost | Settled


def settle(pending: Pending, snapshot: Snapshot, rules: Rules) -> Outcome:
    """What `snapshot` proves about `pending`."""
    asked_at, posted_at = pending.asked_at, pending.posted_at
    if asked_at is None or posted_at is None:
        return Waiting(pending=pending)
    if isinstance(pending.action, LoadModel):
        return _loaded(pending, pending.action.model, asked_at, snapshot, rules)
    now = snapshot.taken_at
    memory = _memory_since(asked_at, pending.gpu, snapshot)
    listed = _still_listed(pending, asked_at, snapshot)
    rose = _rise(pending, asked_at, snapshot, memory)
    if pending.gpu is None and listed is False:
        # Ollama does not say on which of several GPUs its model was: its word is all there is.
        rose = Seen(pending.expected_bytes or 0, now)
    if rose.value > pending.rose_bytes + STEP_BYTES:
        pending = replace(pending, rose_bytes=rose.value, rose_at=rose.at)
    used_after = memory.value.used_percent if memory else None
    quiet_for = now - pending.rose_at if pending.rose_at is not None else 0.0
    enough = pending.expected_bytes is not None and pending.rose_bytes >= PROOF_SHARE * pending.expected_bytes
    some = pending.rose_bytes >= min(rules.min_reclaim_bytes, pending.expected_bytes or rules.min_reclaim_bytes)
    waited = now - asked_at
    over = waited >= rules.settle_timeout_seconds
    quiet = quiet_for >= (QUIET_SECONDS if enough else QUIET_SHORT_SECONDS) and not _holder_unread(pending, snapshot)
    expected = pending.expected_bytes
    rested = memory is not None and isinstance(snapshot.comfyui, Seen) and _rested(pending, posted_at, snapshot)
    # ComfyUI tidies up by itself for 10 s after a prompt: some came back, and yet the flag may have been lost. After
    # a soft free that was not enough the unload stage follows anyway.
    last = isinstance(pending.action, FreeComfyUI) and pending.action.stage is Stage.UNLOAD
    short = expected is not None and not enough and expected - pending.rose_bytes >= rules.min_reclaim_bytes
    if last and some and short and quiet and pending.posts == 1 and rested and not over:
        return Repost(pending=pending)
    nothing_to_come = isinstance(pending.action, UnloadModel) and expected is not None and expected <= STEP_BYTES
    if listed is False and (nothing_to_come or (some and (quiet or over))):
        return Settled(
            pending=pending,
            proven=True,
            freed_bytes=pending.rose_bytes,
            took_seconds=(now if pending.rose_at is None else pending.rose_at) - asked_at,
            used_percent_after=used_after,
            why="",
        )
    if over:
        return Settled(
            pending=pending,
            proven=False,
            freed_bytes=pending.rose_bytes,
            took_seconds=waited,
            used_percent_after=used_after,
            why=_why_not(pending, snapshot, memory, listed),
            listed=listed,
        )
    lost = not some and pending.posts == 1 and now - posted_at >= rules.repost_after_seconds
    if lost and rested:
        return Repost(pending=pending)
    return Waiting(pending=pending)


def _loaded(pending: Pending, model: str, answered_at: float, snapshot: Snapshot, rules: Rules) -> Outcome:
    """A load is answered when it is over: what is left is to see where the model went, and what room that left."""
    waited = snapshot.taken_at - answered_at
    found, why = False, "loaded, and Ollama could not be read since"
    if isinstance(snapshot.ollama, Seen) and snapshot.ollama.at > answered_at:
        known = pending.model
        models = snapshot.ollama.value.models
        found = any(is_called(one, model) or (known is not None and same(one, known)) for one in models)
        why = "" if found else "loaded, and not listed any more"
    read = found and _memory_since(answered_at, pending.gpu, snapshot) is not None
    if not read and waited < rules.settle_timeout_seconds:
        return Waiting(pending=pending)
    return Settled(
        pending=pending,
        proven=found,
        freed_bytes=0,
        took_seconds=waited,
        used_percent_after=None,
        why=why,
    )


def _rested(pending: Pending, since: float, snapshot: Snapshot) -> bool:
    """ComfyUI is idle and has run nothing: a prompt takes the flag with it, and moves memory of its own."""
    match snapshot.queue:
        case Seen(value=queue, at=at) if isinstance(pending.action, FreeComfyUI):
            return at > since and queue.idle and queue.runs == pending.runs_before
    return False


def _holder_unread(pending: Pending, snapshot: Snapshot) -> bool:
    """ComfyUI's numbers are older than the rise: what they say it still holds would call for the unload stage."""
    stats = snapshot.comfyui
    return (
        isinstance(pending.action, FreeComfyUI)
        and isinstance(stats, Seen)
        and pending.rose_at is not None
        and stats.at < pending.rose_at
    )


def _memory_since(asked_at: float, uuid: str | None, snapshot: Snapshot) -> Seen[GpuMemory] | None:
    """The GPU's memory, if it was read after the request went out."""
    gpus = gpus_seen(snapshot)
    at = gpus_read_at(snapshot, gpus)
    if isinstance(gpus, Missing) or at is None or at <= asked_at:
        return None
    found = next((gpu.memory for gpu in gpus.gpus if gpu.uuid == uuid), None)
    return Seen(found, at) if isinstance(found, GpuMemory) else None


def _rise(pending: Pending, asked_at: float, snapshot: Snapshot, memory: Seen[GpuMemory] | None) -> Seen[int]:
    """What came back: NVML's rise, or what the holder let go where somebody took that room meanwhile.

    What Ollama lists in addition is no proof: it lists a model once it is loaded, long after the memory was taken.
    """
    rise = Seen(0, asked_at)
    if memory is not None and pending.free_bytes_before is not None:
        rise = Seen(memory.value.free_bytes - pending.free_bytes_before, memory.at)
    torch = _torch_held(snapshot)
    if torch is None or torch.at <= asked_at or not _rested(pending, asked_at, snapshot):
        return rise
    released = (pending.holder_bytes_before or 0) - torch.value
    return Seen(released, torch.at) if released > rise.value else rise


def _torch_held(snapshot: Snapshot) -> Seen[int] | None:
    """What ComfyUI's torch holds on its first device."""
    match snapshot.comfyui:
        case Seen(value=comfyui, at=at) if comfyui.devices:
            return Seen(comfyui.devices[0].torch_total_bytes, at)
    return None


def _still_listed(pending: Pending, asked_at: float, snapshot: Snapshot) -> bool | None:
    """An unloaded model that Ollama still lists has not left, whatever free memory does. None: not read since."""
    if not isinstance(pending.action, UnloadModel):
        return False
    match snapshot.ollama:
        case Seen(value=ollama, at=at) if at > asked_at:
            return any(model.name == pending.action.model for model in ollama.models)
    return None


def _why_not(pending: Pending, snapshot: Snapshot, memory: Seen[GpuMemory] | None, listed: bool | None) -> str:
    if isinstance(pending.action, UnloadModel) and listed is not False:
        unread = "Ollama could not be read meanwhile"
        return unread if listed is None else f"{pending.action.model} is still listed: it leaves after its last request"
    if memory is None:
        return "the GPU could not be read meanwhile"
    if isinstance(pending.action, UnloadModel):
        return "the model is gone from the list, its memory did not come back"
    queue = snapshot.queue.value if isinstance(snapshot.queue, Seen) else None
    if queue is not None and (not queue.idle or queue.runs != pending.runs_before):
        return "ComfyUI started a prompt meanwhile: it acts after that"
    return "what is left is held outside ComfyUI's model management, or is not ComfyUI's"


def asked(watch: Watch, report: Asked, snapshot: Snapshot, action_id: str) -> Watch:
    """The watch once the request went out: `report` holds the numbers read just before it."""
    pending = watch.pending
    if pending is None:
        return watch
    memory = report.gpu_memory
    queue = snapshot.queue.value if isinstance(snapshot.queue, Seen) else None
    torch = _torch_held(snapshot)
    pending = replace(
        pending,
        asked_at=report.at,
        posted_at=report.at,
        posts=1,
        action_id=action_id,
        free_bytes_before=memory.free_bytes if memory else None,
        used_percent_before=memory.used_percent if memory else None,
        holder_bytes_before=torch.value if torch else None,
        runs_before=queue.runs if queue else None,
    )
    return replace(
        watch,
        pending=pending,
        posted_at={**watch.posted_at, pending.action.target: report.at},
        # A load gives nothing back: the swap it belongs to was counted with the free before it.
        frees_at=watch.frees_at
        if isinstance(pending.action, LoadModel)
        else (*(at for at in watch.frees_at if report.at - at < 3600), report.at),
    )


def reposted(watch: Watch, at: float) -> Watch:
    """The watch once the second and last post went out."""
    pending = watch.pending
    if pending is None:
        return watch
    return replace(
        watch,
        pending=replace(pending, posts=2, posted_at=at),
        posted_at={**watch.posted_at, pending.action.target: at},
    )


def refused(watch: Watch, report: Refused) -> Watch:
    """The watch once it is clear that nothing was asked. A request that failed still counts as a try."""
    pending = watch.pending
    if pending is None:
        return watch
    action, mending = pending.action, watch.mending
    mended = mending is not None and action.target == f"ollama:{mending.model.name}"
    if mending is not None and report.tried and mended and isinstance(action, UnloadModel):
        watch = counted(mending, report.at, watch)
    if report.tried or mended:
        watch = replace(watch, posted_at={**watch.posted_at, action.target: report.at})
    return replace(
        watch,
        pending=None,
        episode=None,
        # A model that was to be mended stays where it is, or is left to its next request.
        mending=None if mended else mending,
        made_room=None if isinstance(action, LoadModel) else watch.made_room,
    )
