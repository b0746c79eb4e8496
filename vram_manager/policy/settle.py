"""Has the memory come back? A 200 is not a free: two witnesses are asked, NVML and the holder itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

from vram_manager.domain.action import FreeComfyUI, UnloadModel
from vram_manager.domain.reading import Missing, Seen
from vram_manager.domain.snapshot import GpuMemory, Gpus, Snapshot
from vram_manager.domain.watch import Asked, Pending, Refused, Watch
from vram_manager.policy.accounting import gpus_seen
from vram_manager.policy.rules import Rules

# Of what was expected, this much is proof; Ollama waits for the same share (server/sched.go:waitForVRAMRecovery).
PROOF_SHARE = 0.75
# Memory comes back in steps; the sum is told once no step has followed for this long.
QUIET_SECONDS = 0.5
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
    """It is over: `freed_bytes` came back within `took_seconds`, or `why` says what is known instead."""

    pending: Pending
    proven: bool
    freed_bytes: int
    took_seconds: float
    used_percent_after: float | None
    why: str


Outcome: TypeAlias = Waiting | Repost | Settled


def settle(pending: Pending, snapshot: Snapshot, rules: Rules) -> Outcome:
    """What `snapshot` proves about `pending`."""
    asked_at, posted_at = pending.asked_at, pending.posted_at
    if asked_at is None or posted_at is None:
        return Waiting(pending=pending)
    now = snapshot.taken_at
    memory = _memory_since(pending, snapshot)
    rose = _rose_bytes(pending, snapshot, memory)
    if rose > pending.rose_bytes + 2**25:  # 32 MiB: the page size DynamicVRAM gives back in
        pending = replace(pending, rose_bytes=rose, rose_at=now)
    used_after = memory.used_percent if memory else None
    quiet_for = now - pending.rose_at if pending.rose_at is not None else 0.0
    enough = pending.expected_bytes is not None and pending.rose_bytes >= PROOF_SHARE * pending.expected_bytes
    some = pending.rose_bytes >= min(rules.min_reclaim_bytes, pending.expected_bytes or rules.min_reclaim_bytes)
    waited = now - asked_at
    over = waited >= rules.settle_timeout_seconds
    listed = _still_listed(pending, snapshot)
    if some and not listed:
        patience = QUIET_SECONDS if enough else QUIET_SHORT_SECONDS
        if quiet_for >= patience or over:
            took = (pending.rose_at or now) - asked_at
            return Settled(
                pending=pending,
                proven=True,
                freed_bytes=pending.rose_bytes,
                took_seconds=took,
                used_percent_after=used_after,
                why="",
            )
    if over:
        return Settled(
            pending=pending,
            proven=False,
            freed_bytes=max(0, pending.rose_bytes),
            took_seconds=waited,
            used_percent_after=used_after,
            why=_why_not(pending, snapshot, memory, listed),
        )
    idle = isinstance(snapshot.queue, Seen) and snapshot.queue.value.idle
    lost = not some and pending.posts == 1 and now - posted_at >= rules.repost_after_seconds
    if lost and idle and isinstance(pending.action, FreeComfyUI):
        return Repost(pending=pending)
    return Waiting(pending=pending)


def _memory_since(pending: Pending, snapshot: Snapshot) -> GpuMemory | None:
    """The GPU's memory, if it was read after the request went out."""
    at = snapshot.gpus.at if isinstance(snapshot.gpus, Seen) else None
    gpus = gpus_seen(snapshot)
    if isinstance(gpus, Gpus) and gpus.second_hand and isinstance(snapshot.comfyui, Seen):
        at = snapshot.comfyui.at
    if isinstance(gpus, Missing) or at is None or pending.asked_at is None or at <= pending.asked_at:
        return None
    found = next((gpu for gpu in gpus.gpus if gpu.uuid == pending.gpu), None)
    return found.memory if found and isinstance(found.memory, GpuMemory) else None


def _rose_bytes(pending: Pending, snapshot: Snapshot, memory: GpuMemory | None) -> int:
    """What came back: NVML's rise, corrected by what Ollama took meanwhile, or what the holder let go."""
    rose = 0
    if memory is not None and pending.free_bytes_before is not None:
        rose = memory.free_bytes - pending.free_bytes_before
        if isinstance(pending.action, FreeComfyUI) and pending.ollama_bytes_before is not None:
            # A model that loads into the room just made must not hide that the room was made.
            rose += max(0, ollama_held(snapshot) - pending.ollama_bytes_before)
    if pending.holder_bytes_before is not None and isinstance(pending.action, FreeComfyUI):
        stats = snapshot.comfyui
        if isinstance(stats, Seen) and pending.asked_at is not None and stats.at > pending.asked_at:
            rose = max(rose, pending.holder_bytes_before - torch_held(snapshot))
    return rose


def torch_held(snapshot: Snapshot) -> int:
    """What ComfyUI's torch holds on its first device."""
    match snapshot.comfyui:
        case Seen(value=comfyui) if comfyui.devices:
            return comfyui.devices[0].torch_total_bytes
    return 0


def ollama_held(snapshot: Snapshot) -> int:
    """What Ollama claims on all GPUs together."""
    match snapshot.ollama:
        case Seen(value=ollama):
            return sum(model.size_vram_bytes for model in ollama.models)
    return 0


def _still_listed(pending: Pending, snapshot: Snapshot) -> bool:
    """An unloaded model that Ollama still lists has not left, whatever free memory does."""
    if not isinstance(pending.action, UnloadModel):
        return False
    if not isinstance(snapshot.ollama, Seen) or pending.asked_at is None or snapshot.ollama.at <= pending.asked_at:
        return True
    return any(model.name == pending.action.model for model in snapshot.ollama.value.models)


def _why_not(pending: Pending, snapshot: Snapshot, memory: GpuMemory | None, listed: bool) -> str:
    if isinstance(pending.action, UnloadModel):
        if listed:
            return f"{pending.action.model} is still listed: it leaves after its last request"
        return "the model is gone from the list, its memory did not come back"
    if memory is None:
        return "the GPU could not be read meanwhile"
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
    has_devices = isinstance(snapshot.comfyui, Seen) and bool(snapshot.comfyui.value.devices)
    pending = replace(
        pending,
        asked_at=report.at,
        posted_at=report.at,
        posts=1,
        action_id=action_id,
        free_bytes_before=memory.free_bytes if memory else None,
        used_percent_before=memory.used_percent if memory else None,
        holder_bytes_before=torch_held(snapshot) if has_devices else None,
        ollama_bytes_before=ollama_held(snapshot) if isinstance(snapshot.ollama, Seen) else None,
        runs_before=queue.runs if queue else None,
    )
    return replace(
        watch,
        pending=pending,
        posted_at={**watch.posted_at, pending.action.target: report.at},
        frees_at=(*(at for at in watch.frees_at if report.at - at < 3600), report.at),
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
    posted_at = {**watch.posted_at, pending.action.target: report.at} if report.tried else watch.posted_at
    return replace(watch, pending=None, episode=None, posted_at=posted_at)
