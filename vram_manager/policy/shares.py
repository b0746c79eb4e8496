"""Who has how much of a GPU: every byte that is taken belongs to one tenant, and none to two.

In order, each gets what it says or is counted with, as far as that is left of what the GPU says is taken: Ollama's
models, ComfyUI, workers, other processes. The rest is nobody's that we know of.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from vram_manager.domain.action import Stage
from vram_manager.domain.lease import Lease
from vram_manager.domain.reading import Missing, Seen
from vram_manager.domain.share import Certainty, Share, ShareKind
from vram_manager.domain.snapshot import ComfyUIState, Gpu, GpuMemory, Gpus, ProcessMemory, Snapshot
from vram_manager.domain.watch import Lesson
from vram_manager.policy.accounting import comfyui_gpu, comfyui_hold, comfyui_process, is_ollama, ollama_models
from vram_manager.policy.rules import Rules

# A program may call itself anything.
MOST_LETTERS = 64


def shares(
    snapshot: Snapshot,
    gpus: Gpus,
    gpu: Gpu,
    *,
    leases: Iterable[Lease] = (),
    reported: Mapping[str, int] = {},
    lesson: Lesson | None = None,
    rules: Rules,
) -> tuple[Share, ...]:
    """The shares of `gpu`, which add up to what is taken of it; none where its memory is not known.

    `reported` is what each worker says it has on this GPU.
    """
    if not isinstance(gpu.memory, GpuMemory):
        return ()
    left = max(0, gpu.memory.taken_bytes)
    found: list[Share] = []
    claims = [
        *_of_ollama(snapshot, gpus, gpu, rules),
        *_of_comfyui(snapshot, gpus, gpu, lesson, rules),
        *_of_workers(gpu, leases, reported),
    ]
    known = {lease.pid for lease in leases if lease.pid is not None}
    claims += _of_processes(_comfyui_on(snapshot, gpus, gpu, rules), gpu, known)
    for kind, tenant, claimed, certainty in claims:
        size = min(claimed, left)
        if size > 0:
            found.append(Share(kind=kind, tenant=tenant, bytes=size, certainty=certainty))
            left -= size
    if left > 0:
        found.append(Share(kind=ShareKind.OTHERS, tenant="others", bytes=left, certainty=Certainty.PERHAPS))
    return tuple(found)


_Claim = tuple[ShareKind, str, int, Certainty]


def _of_ollama(snapshot: Snapshot, gpus: Gpus, gpu: Gpu, rules: Rules) -> Iterator[_Claim]:
    models = ollama_models(snapshot, gpus, gpu, rules)
    for name, size in () if isinstance(models, Missing) else models.items():
        yield ShareKind.OLLAMA, f"ollama:{name}" if name else "ollama", size, Certainty.MEASURED


def _comfyui_on(snapshot: Snapshot, gpus: Gpus, gpu: Gpu, rules: Rules) -> ComfyUIState | None:
    """ComfyUI, if this is the GPU it computes on."""
    if not isinstance(snapshot.comfyui, Seen):
        return None
    comfyui = snapshot.comfyui.value
    return comfyui if comfyui.devices and comfyui_gpu(comfyui, gpus, rules) is gpu else None


def _of_comfyui(snapshot: Snapshot, gpus: Gpus, gpu: Gpu, lesson: Lesson | None, rules: Rules) -> Iterator[_Claim]:
    comfyui = _comfyui_on(snapshot, gpus, gpu, rules)
    if comfyui is None:
        return
    torch = comfyui.devices[0]
    yield (
        ShareKind.COMFYUI_IN_USE,
        "comfyui in use",
        torch.torch_total_bytes - torch.torch_free_bytes,
        Certainty.MEASURED,
    )
    yield ShareKind.COMFYUI_CACHED, "comfyui cached", torch.torch_free_bytes, Certainty.MEASURED
    hold = comfyui_hold(snapshot, comfyui, gpus, gpu, lesson, Stage.SOFT, rules)
    # Every program of the CPU has its part of unified memory: what nobody accounts for there hints at nobody.
    if not gpu.unified or hold.certainty is not Certainty.PERHAPS:
        yield ShareKind.COMFYUI_UNSEEN, "comfyui unseen", hold.bytes - hold.torch_bytes, hold.certainty


def _of_workers(gpu: Gpu, leases: Iterable[Lease], reported: Mapping[str, int]) -> Iterator[_Claim]:
    """By lease or by its own word, whichever is more. Leases of ComfyUI and of Ollama's calls are theirs already."""
    held = dict(reported)
    leased: dict[str, int] = {}
    for lease in leases:
        if not lease.for_comfyui and not lease.at_gateway and lease.gpu == gpu.uuid:
            leased[lease.owner] = leased.get(lease.owner, 0) + max(lease.visible_bytes, lease.used_bytes or 0)
    for owner in sorted({*held, *leased}):
        yield ShareKind.WORKER, f"worker:{owner}", max(held.get(owner, 0), leased.get(owner, 0)), Certainty.MEASURED


def _of_processes(comfyui: ComfyUIState | None, gpu: Gpu, known: set[int]) -> list[_Claim]:
    """Whoever else the driver lists, by program, the largest first."""
    if isinstance(gpu.processes, Missing):
        return []
    mine = None if comfyui is None else comfyui_process(comfyui, gpu)
    sizes: dict[str, int] = {}
    for process in gpu.processes:
        ours = process is mine or process.pid in known or is_ollama(process)
        if not ours and isinstance(process.used_bytes, int):
            name = _program(process)
            sizes[name] = sizes.get(name, 0) + process.used_bytes
    largest = sorted(sizes.items(), key=lambda one: (-one[1], one[0]))
    return [(ShareKind.PROCESS, f"process:{name}", size, Certainty.MEASURED) for name, size in largest]


def _program(process: ProcessMemory) -> str:
    """Its name; all whose command is hidden are one, as their numbers would make a new tenant of each run."""
    if isinstance(process.command, Missing):
        return "hidden"
    return process.command[0].rpartition("/")[2][:MOST_LETTERS] or "unnamed"
