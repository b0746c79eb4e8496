"""Who holds what on which GPU, and what of it could come back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from vram_manager.domain.action import Stage
from vram_manager.domain.reading import Missing, Seen
from vram_manager.domain.share import Certainty
from vram_manager.domain.snapshot import (
    ComfyUIState,
    Gpu,
    GpuMemory,
    Gpus,
    ProcessMemory,
    Queue,
    Snapshot,
    TorchDevice,
    Trust,
)
from vram_manager.domain.version import release
from vram_manager.domain.watch import Lesson
from vram_manager.policy.rules import Rules


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """What ComfyUI holds on its GPU. `unaccounted_bytes` is used memory that nobody reports (None: unknown).

    `unseen` is why ComfyUI may well hold more than `bytes`.
    """

    bytes: int
    certainty: Certainty
    torch_bytes: int
    unaccounted_bytes: int | None
    unseen: Missing | None = None

    @property
    def expected_bytes(self) -> int | None:
        """What a free should give back, or None where it can only be guessed."""
        return None if self.certainty is Certainty.PERHAPS else self.bytes


SECOND_HAND_UUID = "comfyui-"
"""How the name of a GPU begins that only ComfyUI tells of: it says no UUID."""


def gpus_seen(snapshot: Snapshot) -> Gpus | Missing:
    """The GPUs as their drivers tell them; failing that, second-hand from ComfyUI; failing that, why not."""
    first_hand: Gpus | Missing
    match snapshot.gpus:
        case Seen(value=gpus):
            if any(isinstance(gpu.memory, GpuMemory) for gpu in gpus.gpus):
                return gpus
            causes = {gpu.memory.why for gpu in gpus.gpus if isinstance(gpu.memory, Missing)}
            first_hand = Missing("; ".join(sorted(causes)) or "no GPU")
        case Missing() as missing:
            first_hand = missing
        case _:
            first_hand = Missing("GPU sensor is off")
    match snapshot.comfyui:
        case Seen(value=comfyui):
            devices = [device for device in comfyui.devices if device.type == "cuda" and device.vram_total_bytes]
            if devices:
                told = tuple(_second_hand(place, device) for place, device in enumerate(devices))
                return Gpus(gpus=told, driver_version=Missing("told by ComfyUI"), second_hand=True)
    return first_hand


def gpus_read_at(snapshot: Snapshot, gpus: Gpus | Missing) -> float | None:
    """When the reading behind `gpus` was taken."""
    reading = snapshot.comfyui if isinstance(gpus, Gpus) and gpus.second_hand else snapshot.gpus
    return reading.at if isinstance(reading, Seen) else None


def _second_hand(place: int, device: TorchDevice) -> Gpu:
    unknown = Missing("told by ComfyUI, not by the driver")
    free_bytes = min(device.device_free_bytes, device.vram_total_bytes)
    return Gpu(
        uuid=f"{SECOND_HAND_UUID}{place}",
        index=place,
        name=device.name,
        memory=GpuMemory(
            total_bytes=device.vram_total_bytes,
            used_bytes=device.vram_total_bytes - free_bytes,
            free_bytes=free_bytes,
            reserved_bytes=unknown,
        ),
        utilization_percent=unknown,
        source="ComfyUI",
        trust=Trust.SECOND_HAND,
    )


def named(gpus: Gpus, wanted: str) -> Gpu | None:
    """The GPU a setting names by UUID or index."""
    return next((gpu for gpu in gpus.gpus if wanted in (gpu.uuid, str(gpu.index))), None)


def comfyui_gpu(comfyui: ComfyUIState, gpus: Gpus, rules: Rules) -> Gpu | Missing:
    """The GPU ComfyUI computes on: by setting, as the only one, by its process, name or free memory."""
    if gpus.second_hand:
        return gpus.gpus[0]
    if rules.comfyui_gpu is not None:
        found = named(gpus, rules.comfyui_gpu)
        return found or Missing(f"COMFYUI_GPU={rules.comfyui_gpu} is none of the GPUs seen here")
    if not comfyui.devices:
        return Missing("ComfyUI runs without a GPU")
    if len(gpus.gpus) == 1:
        return gpus.gpus[0]
    by_process = [gpu for gpu in gpus.gpus if comfyui_process(comfyui, gpu) is not None]
    device = comfyui.devices[0]
    # "RTX 3090" is part of "RTX 3090 Ti": the longest name is the device's.
    name = max((gpu.name for gpu in gpus.gpus if gpu.name in device.name), key=len, default="")
    by_name = [gpu for gpu in gpus.gpus if name and gpu.name == name]
    by_free = [gpu for gpu in by_name if _about_equal_free(gpu, device)]
    for candidates in (by_process, by_name, by_free):
        if len(candidates) == 1:
            return candidates[0]
    return Missing("several GPUs and no way to tell which one is ComfyUI's", remedy="set COMFYUI_GPU")


def _about_equal_free(gpu: Gpu, device: TorchDevice) -> bool:
    # Both count the whole device; 256 MiB covers what moves between two looks at an idle card.
    return isinstance(gpu.memory, GpuMemory) and abs(gpu.memory.free_bytes - device.device_free_bytes) <= 2**28


def comfyui_process(comfyui: ComfyUIState, gpu: Gpu) -> ProcessMemory | None:
    """The one process on `gpu` whose command line ends with the arguments ComfyUI says it was started with."""
    if isinstance(gpu.processes, Missing) or not comfyui.argv:
        return None
    found = [
        process
        for process in gpu.processes
        if not isinstance(process.command, Missing) and process.command[-len(comfyui.argv) :] == comfyui.argv
    ]
    # `python main.py` is a common command line: two of them tell nothing.
    return found[0] if len(found) == 1 else None


def ollama_models(snapshot: Snapshot, gpus: Gpus, gpu: Gpu, rules: Rules) -> Mapping[str, int] | Missing:
    """Bytes on `gpu` by model of Ollama's; under "" what is Ollama's of several models that cannot be told apart.

    `/api/ps` sums over GPUs. With several and no OLLAMA_GPU the processes of its runners tell, where they can be seen.
    Else none of it can be told to be on this one, so it stays with the memory that nobody accounts for: perhaps
    ComfyUI's, and one free is a fair test.
    """
    match snapshot.ollama:
        case Seen(value=ollama):
            listed = {model.name: model.size_vram_bytes for model in ollama.models}
        case Missing() as missing:
            return missing
        case _:
            return {}
    total = sum(listed.values())
    if total == 0 or len(gpus.gpus) == 1:
        return listed
    if rules.ollama_gpu is not None:
        return listed if named(gpus, rules.ollama_gpu) is gpu else {}
    runners = 0 if isinstance(gpu.processes, Missing) else sum(map(_runner_bytes, gpu.processes))
    here = min(runners, total)
    return {next(iter(listed)) if len(listed) == 1 else "": here} if here else {}


def ollama_bytes(snapshot: Snapshot, gpus: Gpus, gpu: Gpu, rules: Rules) -> int | Missing:
    """What Ollama has on `gpu`, as far as that can be told."""
    models = ollama_models(snapshot, gpus, gpu, rules)
    return models if isinstance(models, Missing) else sum(models.values())


def is_ollama(process: ProcessMemory) -> bool:
    """Whether this is a runner of Ollama's, one process a loaded model: "ollama runner ...", since 0.30 also
    "/usr/lib/ollama/llama-server ...". A llama-server of somebody else's is not in a folder of Ollama's."""
    if isinstance(process.command, Missing) or not process.command:
        return False
    folder, _, program = process.command[0].rpartition("/")
    return (program == "ollama" and "runner" in process.command) or (program == "llama-server" and "ollama" in folder)


def _runner_bytes(process: ProcessMemory) -> int:
    return process.used_bytes if is_ollama(process) and isinstance(process.used_bytes, int) else 0


def can_use(gpu: Gpu, gpus: Gpus, rules: Rules) -> bool:
    """Whether Ollama may place a model on `gpu`: on any, unless OLLAMA_GPU says otherwise."""
    return rules.ollama_gpu is None or named(gpus, rules.ollama_gpu) is gpu


@lru_cache(maxsize=8)
def weights_may_hide(comfyui: ComfyUIState) -> bool:
    """Whether DynamicVRAM may be on, so that weights are in none of torch's numbers.

    Default on NVIDIA after 0.15.1 (ComfyUI PR 12658), off with the flags below (cli_args.py).
    """
    if comfyui.has_flag("--highvram", "--gpu-only", "--novram", "--cpu", "--disable-dynamic-vram"):
        return False
    numbers = release(comfyui.version, 2)
    return numbers is None or numbers >= (0, 15)


def comfyui_hold(
    snapshot: Snapshot, comfyui: ComfyUIState, gpus: Gpus, gpu: Gpu, lesson: Lesson | None, stage: Stage, rules: Rules
) -> Hold:
    """What ComfyUI holds on `gpu` and how sure that is."""
    torch_bytes = comfyui.devices[0].torch_total_bytes if comfyui.devices else 0
    held_by_ollama = ollama_bytes(snapshot, gpus, gpu, rules)
    unaccounted: int | None = None
    if isinstance(gpu.memory, GpuMemory) and not isinstance(held_by_ollama, Missing):
        by_workers = snapshot.workers_bytes.get(gpu.uuid, 0)
        unaccounted = max(0, gpu.memory.taken_bytes - held_by_ollama - torch_bytes - by_workers)
    process = comfyui_process(comfyui, gpu)
    if process is not None and isinstance(process.used_bytes, int):
        own = process.used_bytes - rules.context_bytes
        if unaccounted is not None:
            # The list of processes is up to a minute old: what has left the GPU since is no longer held.
            own = min(own, torch_bytes + unaccounted)
        own = max(torch_bytes, own)
        return Hold(bytes=own, certainty=Certainty.MEASURED, torch_bytes=torch_bytes, unaccounted_bytes=unaccounted)
    hides = weights_may_hide(comfyui)
    if not hides or unaccounted is None:
        return Hold(
            bytes=torch_bytes,
            certainty=Certainty.MEASURED,
            torch_bytes=torch_bytes,
            unaccounted_bytes=unaccounted,
            unseen=held_by_ollama if hides and isinstance(held_by_ollama, Missing) else None,
        )
    floors: Mapping[Stage, int] = lesson.floors if lesson else {}
    # The soft stage lets every hidden weight go: what stayed after it is no guess for the unload stage.
    floor = floors.get(stage, floors.get(Stage.SOFT))
    hidden = max(0, unaccounted - (rules.unseen_allowance_bytes if floor is None else floor))
    if hidden < rules.min_reclaim_bytes:
        certainty = Certainty.MEASURED
        hidden = 0
    else:
        certainty = Certainty.PERHAPS if floor is None else Certainty.LEARNED
    return Hold(bytes=torch_bytes + hidden, certainty=certainty, torch_bytes=torch_bytes, unaccounted_bytes=unaccounted)


def nothing_new(hold: Hold, lesson: Lesson | None, queue: Queue, stage: Stage, rules: Rules) -> bool:
    """ComfyUI has not run since it was last asked this (or harder), and its torch has not grown either."""
    if lesson is None or lesson.runs != queue.runs:
        return False
    grown = lesson.torch_bytes_after is not None and (
        hold.torch_bytes >= lesson.torch_bytes_after + rules.min_reclaim_bytes
    )
    return not grown and (stage in lesson.stages or Stage.UNLOAD in lesson.stages)
