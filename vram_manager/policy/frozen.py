"""Ollama's own idea of what is free, which is as old as what it has loaded.

With a model on the GPU it does not look again (since v0.30, server/sched.go:GetDeviceInfos): a further model is
judged by what was free when the first was loaded. Memory that ComfyUI gave back since is not there for it, so it
would throw out models that could have stayed, and not those that we would choose. Once no model is left it looks.
"""

from __future__ import annotations

from vram_manager.domain.reading import Missing, Seen
from vram_manager.domain.size import GIB
from vram_manager.domain.snapshot import GpuMemory, LoadedModel, OllamaState, Snapshot
from vram_manager.domain.version import release
from vram_manager.policy.accounting import gpus_seen
from vram_manager.policy.estimate import canonical
from vram_manager.policy.evict import in_use, ollama_gpu
from vram_manager.policy.rules import Rules

# Of what it believes to be free it spends this much on a further model (server/sched.go:processPending).
SPENT_SHARE = 0.8
# ComfyUI with one model more or less; below that the two views are as good as the same.
CHANGED_BYTES = GIB


def in_the_way(need_bytes: int, snapshot: Snapshot, rules: Rules) -> tuple[str, ...]:
    """The idle models that keep Ollama from seeing the room for one that needs so much; none where that is not so."""
    gpus = gpus_seen(snapshot)
    if not rules.evict or isinstance(gpus, Missing) or not isinstance(snapshot.ollama, Seen):
        return ()
    gpu, ollama = ollama_gpu(gpus, rules), snapshot.ollama.value
    if isinstance(gpu, Missing) or not isinstance(gpu.memory, GpuMemory) or not _freezes(ollama):
        return ()
    loaded = [model for model in ollama.models if model.size_vram_bytes]
    believed = _believed_bytes(loaded)
    if believed is None or gpu.memory.free_bytes - believed < CHANGED_BYTES or need_bytes <= SPENT_SHARE * believed:
        return ()
    now = snapshot.taken_at
    # If only one of them stays, Ollama looks no further than before.
    if any(canonical(one.name) in rules.pinned or in_use(one, now, rules.model_idle_seconds) for one in loaded):
        return ()
    return tuple(one.name for one in loaded)


def _believed_bytes(loaded: list[LoadedModel]) -> int | None:
    """What Ollama takes to be free beside these: the least that any of them leaves; None: not known."""
    views = []
    for model in loaded:
        if model.free_after_bytes is None or model.since is None:
            return None
        later = sum(one.size_vram_bytes for one in loaded if one.since is not None and one.since > model.since)
        views.append(model.free_after_bytes - later)
    return min(views, default=None)


def _freezes(ollama: OllamaState) -> bool:
    numbers = release(ollama.version, 2)
    return numbers is not None and numbers >= (0, 30)
