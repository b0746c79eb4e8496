"""Drift: a floor that rises over the generations of ComfyUI and of Ollama. Workers' are in `policy.leaks`.

What is a floor, and why does it not lie?

ComfyUI keeps its models after a run, so what it holds when it is merely idle tells what ran, not what leaks. Two looks
do not depend on that:
 1. after a free that was proven, before anything runs again: nothing that it manages is left then. The two stages
    leave different things (the soft one keeps what nodes hold), so each has a floor of its own.
 2. idle, after the same files ran again and nothing else came between: no other workflow, no free, no model of
    Ollama's, no worker. The weaker one, for a ComfyUI that is never freed. Only what torch has in use counts there,
    as what it caches comes and goes. Not with --gpu-only, where it caches pictures on the GPU.
Ollama's runners are processes that end with their model, so what they hold once the list has been empty for a minute
should be nothing. One that stays is no drift but is told at once. Beside a model that stays loaded, the floor is what
its runner holds beyond the size that Ollama tells, looked at when it rests.
Where no process can be seen and there is one GPU, what nobody accounts for is looked at when ComfyUI has been freed
and Ollama is empty. It may be a desktop's or anybody's, so it is told of "others" and of no tenant.

A number is only compared with its own kind: the driver's process before torch's count, never one after the other,
nor across a restart, another version or another driver. What is missing or stale makes no mark at all, and what moves
makes none yet: two looks some seconds apart must agree, as Ollama lists a model long after it took its memory.

And when is it a leak? A new kind of work brings its kernels and libraries, which stay: one step, or two. A pool is
noise: up and down. A leak goes up and up. So four blocks of marks at equal distances must each lie wholly above the
one before, and each rise must be a sixth of all the growth at least: of noise alone that happens once in 369 600
times. Windows of 12 to 192 marks find fast leaks soon and slow ones at all. 100 marks, as for a worker, would take
weeks: a ComfyUI is freed some ten times a day, and each time stands for several runs. What was told is told again
once it has doubled. A mark that is too high now and then, as when a run was so short that no poll saw it, is noise too.
A run is a spell of work: prompts that follow at once upon each other are one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from vram_manager.domain.action import Stage
from vram_manager.domain.event import Event, EventType
from vram_manager.domain.floor import BLOCK, Floor, Growth, Kept, Mark, most_often, runs_between
from vram_manager.domain.reading import Missing, Off, Seen
from vram_manager.domain.size import MIB, gib
from vram_manager.domain.snapshot import (
    ComfyUIState,
    Gpu,
    GpuMemory,
    Gpus,
    LoadedModel,
    OllamaState,
    ProcessMemory,
    Snapshot,
)
from vram_manager.policy.accounting import comfyui_gpu, comfyui_process, is_ollama
from vram_manager.policy.plan import first_stage
from vram_manager.policy.rules import Rules
from vram_manager.policy.workflow import WorkflowFacts

MAX_MARKS = 192
WINDOWS = (12, 24, 48, 96, 192)
BLOCKS = 4
# The first run after a start compiles and loads what stays; the first free may come before all of it is there.
WARM_UP_MARKS = 2
# A free is told when memory has stopped coming back; torch's own tidying follows within a second.
RESTED_SECONDS = 2.0
# ComfyUI empties torch's cache up to 10 s after a prompt (main.py:prompt_worker).
IDLE_SECONDS = 12.0
# Ollama waits up to 5 s for a runner that it killed, and starts short-lived ones to look at the GPU.
EMPTY_SECONDS = 60.0
# A request that ended releases its slots at once; the list of models is read each second.
MODEL_IDLE_SECONDS = 5.0
# A list of processes counts while free memory is what it was when they were listed.
MOVED_BYTES = 32 * MIB

# Two looks this far apart: longer than the slowest poll of a queue (4 s), and than a model's load stands still.
STEADY_SECONDS = 10.0

PROCESS, TORCH, REMAINDER = "its process", "torch's memory in use", "what nobody accounts for"
IDLE, LINGERING, BEYOND = "torch's memory in use when idle", "its runners without a model", "its runner beyond its size"


@dataclass(frozen=True, slots=True, kw_only=True)
class Freed:
    """A free of ComfyUI that was proven at `at`, after its run number `runs`."""

    at: float
    stage: Stage
    runs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What was found at `at`. `rest` tells one rest of the tenant from the next, by what ran before."""

    at: float
    kept: Kept
    rest: object


def at_rest(freed: Freed | None, snapshot: Snapshot) -> bool:
    """ComfyUI has run nothing since it was freed, and all that is told of it was read since."""
    match snapshot.gpus, snapshot.comfyui, snapshot.queue:
        case Seen(at=gpus_at), Seen(at=stats_at), Seen(value=queue, at=queue_at) if freed is not None:
            read_at = min(gpus_at, stats_at, queue_at)
            return queue.idle and queue.runs == freed.runs and read_at >= freed.at + RESTED_SECONDS
    return False


def after_free(freed: Freed, snapshot: Snapshot, rules: Rules) -> Kept | None:
    """What ComfyUI keeps after a free; None: that cannot be told, or not yet."""
    gpus = _first_hand(snapshot)
    if gpus is None or not isinstance(snapshot.comfyui, Seen) or not at_rest(freed, snapshot):
        return None
    comfyui = snapshot.comfyui.value
    if freed.stage is Stage.SOFT and first_stage(comfyui) is not Stage.SOFT:
        return None  # its models stay on the GPU
    stage = f"after a {'soft free' if freed.stage is Stage.SOFT else 'full unload'}"
    gpu = comfyui_gpu(comfyui, gpus, rules)
    process = comfyui_process(comfyui, gpu) if isinstance(gpu, Gpu) else None
    if isinstance(gpu, Gpu) and process is not None and isinstance(process.used_bytes, int):
        life = _life(gpus, comfyui, str(process.pid))
        kept = Kept(bytes=process.used_bytes, measure=f"{PROCESS} {stage}", life=life)
        return kept if _list_is_true(gpu) else None
    in_use = _torch_in_use(comfyui)
    return None if in_use is None else Kept(bytes=in_use, measure=f"{TORCH} {stage}", life=_life(gpus, comfyui))


def when_idle(snapshot: Snapshot, streak: str) -> Kept | None:
    """What ComfyUI's torch has in use after its own tidying. `streak`: the same files have run since, nothing else."""
    gpus = _first_hand(snapshot)
    match snapshot.comfyui, snapshot.queue:
        case Seen(value=comfyui, at=stats_at), Seen(value=queue) if gpus is not None:
            in_use = _torch_in_use(comfyui)
            if not queue.idle or stats_at < queue.since + IDLE_SECONDS or comfyui.has_flag("--gpu-only"):
                return None
            return None if in_use is None else Kept(bytes=in_use, measure=IDLE, life=_life(gpus, comfyui, streak))
    return None


def sees_runners(snapshot: Snapshot) -> bool:
    """Whether a runner of Ollama's is listed: in a container of its own the driver tells of nobody's processes."""
    gpus = _first_hand(snapshot)
    return gpus is not None and bool(_runners(gpus))


def without_models(snapshot: Snapshot, empty_since: float) -> Kept | None:
    """What Ollama's runners hold though it lists no model since `empty_since`; None: that cannot be told."""
    gpus = _first_hand(snapshot)
    ollama = _empty(snapshot, empty_since)
    if gpus is None or ollama is None or not all(_list_is_true(gpu) for gpu in gpus.gpus):
        return None
    runners = _runners(gpus)
    sizes = [runner.used_bytes for runner in runners if isinstance(runner.used_bytes, int)]
    if len(sizes) < len(runners):
        return None
    return Kept(bytes=sum(sizes), measure=LINGERING, life=_life(gpus, ollama))


def beyond_size(snapshot: Snapshot) -> tuple[LoadedModel, Kept] | None:
    """The only loaded model, and what its runner holds beyond the size that Ollama tells; None: it is not known."""
    gpus = _first_hand(snapshot)
    match snapshot.ollama:
        case Seen(value=OllamaState(models=(model,)) as ollama, at=at) if gpus is not None and not model.requests:
            runners = _runners(gpus)
            rests = model.active_at is None or at - model.active_at >= MODEL_IDLE_SECONDS
            if len(runners) != 1 or not rests or not all(_list_is_true(gpu) for gpu in gpus.gpus):
                return None
            used = runners[0].used_bytes
            if isinstance(used, Missing):
                return None
            life = _life(gpus, ollama, str(runners[0].pid), str(model.size_vram_bytes))
            return model, Kept(bytes=max(0, used - model.size_vram_bytes), measure=BEYOND, life=life)
    return None


def unaccounted(freed: Freed | None, empty_since: float | None, snapshot: Snapshot) -> Kept | None:
    """What nobody accounts for on the only GPU, when all who can be seen have let go."""
    gpus = _first_hand(snapshot)
    if gpus is None or len(gpus.gpus) != 1 or snapshot.workers_bytes or snapshot.leased_bytes:
        return None
    gpu, torch_bytes, lives = gpus.gpus[0], 0, ["", ""]
    # Where processes are seen, each has its own number, and a desktop is none of ours.
    if not isinstance(gpu.memory, GpuMemory) or gpu.unified or _sees_processes(gpu):
        return None
    if not isinstance(snapshot.comfyui, Off):
        if not isinstance(snapshot.comfyui, Seen) or not at_rest(freed, snapshot):
            return None
        torch_bytes = sum(device.torch_total_bytes for device in snapshot.comfyui.value.devices[:1])
        lives[0] = _life(gpus, snapshot.comfyui.value)
    if not isinstance(snapshot.ollama, Off):
        ollama = None if empty_since is None else _empty(snapshot, empty_since)
        if ollama is None:
            return None
        lives[1] = _life(gpus, ollama)
    left = max(0, gpu.memory.taken_bytes - torch_bytes)
    return Kept(bytes=left, measure=REMAINDER, life=" ".join(lives))


def marked(floor: Floor | None, tenant: str, kept: Kept, mark: Mark, rules: Rules) -> tuple[Floor, Growth | None]:
    """`floor` with one more mark, and the growth that it shows. In a new life, or after a fall, it starts afresh."""
    if floor is None or floor.life != kept.life or mark.bytes < floor.baseline_bytes - rules.leak_threshold_bytes:
        floor = Floor(tenant=tenant, measure=kept.measure, life=kept.life)
    floor = _with(floor, mark)
    floor = replace(floor, judged=min(floor.judged + 1, MAX_MARKS) if floor.count > WARM_UP_MARKS else 0)
    growth = _grown(floor.judged_marks, max(rules.leak_threshold_bytes, floor.told_bytes)) if floor.judged else None
    return (floor, None) if growth is None else (replace(told(floor, growth), leaks=floor.leaks + 1), growth)


def stayed(floor: Floor | None, tenant: str, kept: Kept, mark: Mark, rules: Rules) -> tuple[Floor, Growth | None]:
    """The same for what should be nothing: the first that stays is too much, and once told it is the new floor."""
    if floor is None or floor.life != kept.life:
        floor = Floor(tenant=tenant, measure=kept.measure, life=kept.life)
    before_bytes = min((known.bytes for known in floor.judged_marks), default=0)
    floor = replace(_with(floor, mark), baseline_bytes=0)
    if mark.bytes - before_bytes <= rules.leak_threshold_bytes:
        return replace(floor, judged=min(floor.judged + 1, MAX_MARKS)), None
    # Whatever it was, it was among what came since.
    most = max(mark.ran, key=lambda one: one[1], default=None)
    growth = Growth(initial_bytes=before_bytes, current_bytes=mark.bytes, generations=mark.runs, most=most)
    return replace(floor, judged=1, leaks=floor.leaks + 1), growth


def shown(floor: Floor | None, tenant: str, kept: Kept, mark: Mark, *, leaks: int) -> Floor:
    """The same for a floor that somebody else judges."""
    if floor is None or floor.life != kept.life:
        floor = Floor(tenant=tenant, measure=kept.measure, life=kept.life)
    return replace(_with(floor, mark), leaks=leaks)


def _with(floor: Floor, mark: Mark) -> Floor:
    """With one more mark; the first ones after the warm-up are what the others are compared with."""
    count, baseline_bytes = floor.count + 1, floor.baseline_bytes
    if count <= WARM_UP_MARKS + 1:
        baseline_bytes = mark.bytes
    elif count <= WARM_UP_MARKS + BLOCK:
        baseline_bytes = min(baseline_bytes, mark.bytes)
    marks = (*floor.marks, mark)[-MAX_MARKS:]
    return replace(floor, marks=marks, count=count, baseline_bytes=baseline_bytes)


def told(floor: Floor, growth: Growth) -> Floor:
    """`growth` of its tenant has been told, by whatever measure: the next one would begin with the newest marks."""
    return replace(floor, judged=min(floor.judged, BLOCK), told_bytes=floor.told_bytes + growth.delta_bytes)


def agree(first: Look, look: Look) -> bool:
    """Whether two looks found the same, in the same rest and life."""
    same = (first.rest, first.kept.life) == (look.rest, look.kept.life)
    return same and abs(first.kept.bytes - look.kept.bytes) <= MOVED_BYTES


def _grown(marks: tuple[Mark, ...], threshold_bytes: int) -> Growth | None:
    for length in WINDOWS:
        if length > len(marks):
            return None
        window = marks[-length:]
        floors = _rising([mark.bytes for mark in window], threshold_bytes)
        if floors is not None:
            return Growth(
                initial_bytes=floors[0],
                current_bytes=floors[1],
                generations=runs_between(window),
                most=most_often(window),
            )
    return None


def _rising(sizes: Sequence[int], threshold_bytes: int) -> tuple[int, int] | None:
    """The first and the last floor, if each block lies above the one before and has its part in the growth."""
    apart = (len(sizes) - BLOCK) / (BLOCKS - 1)
    blocks = [sizes[(start := round(place * apart)) : start + BLOCK] for place in range(BLOCKS)]
    lows = [min(block) for block in blocks]
    delta = lows[-1] - lows[0]
    above = all(max(lower) < min(upper) for lower, upper in pairwise(blocks))
    even = all(2 * (BLOCKS - 1) * (high - low) >= delta for low, high in pairwise(lows))
    return (lows[0], lows[-1]) if delta > threshold_bytes and above and even else None


def leak_event(tenant: str, measure: str, growth: Growth) -> Event:
    """A leak in the words outsiders read."""
    said = f"{gib(growth.initial_bytes)} -> {gib(growth.current_bytes)}"
    added = f"+{growth.delta_bytes / MIB:.0f} MiB"
    if measure == LINGERING:
        name = f"; last loaded: {growth.most[0]}" if growth.most else ""
        words = f"{said} held by its runners though it lists no model for {EMPTY_SECONDS:.0f} s: {added}{name}"
        return Event(type=EventType.LEAK, target=tenant, reason=words)
    runs = "times in use" if measure == BEYOND else "runs"
    words = f"{said} kept after {growth.generations} {runs}: {added}"
    if growth.generations:
        words += f", {growth.delta_bytes / MIB / growth.generations:.1f} MiB each"
    if growth.most and measure != BEYOND:
        words += f"; most often with {growth.most[0]} ({growth.most[1]} runs)"
    if measure == REMAINDER:
        words += "; nobody accounts for it: ComfyUI and Ollama had let go, and no process can be seen"
    else:
        words += f" (measured: {measure})"
    return Event(type=EventType.LEAK, target=tenant, reason=words)


def known_as(workflow: WorkflowFacts) -> str:
    """The file that people know a workflow by: what makes its pictures, rather than what helps with that."""
    rank = {"checkpoints": 0, "diffusion_models": 1, None: 2}
    main = min(workflow.files, key=lambda file: (rank.get(file.folder, 3), file.name), default=None)
    return "" if main is None else main.name.replace("\\", "/").rpartition("/")[2]


def _first_hand(snapshot: Snapshot) -> Gpus | None:
    return snapshot.gpus.value if isinstance(snapshot.gpus, Seen) and not snapshot.gpus.value.second_hand else None


def _empty(snapshot: Snapshot, since: float) -> OllamaState | None:
    """Ollama, if it has listed no model for long enough since then."""
    match snapshot.ollama, snapshot.gpus:
        case Seen(value=OllamaState(models=()) as ollama), Seen(at=read_at) if read_at - since >= EMPTY_SECONDS:
            return ollama
    return None


def _torch_in_use(comfyui: ComfyUIState) -> int | None:
    """None without a device, as for a ComfyUI on the CPU, whose numbers are those of the RAM."""
    device = comfyui.devices[0] if comfyui.devices else None
    return None if device is None or device.type == "cpu" else device.torch_total_bytes - device.torch_free_bytes


def _sees_processes(gpu: Gpu) -> bool:
    """Not Missing and not empty: without the host's pid namespace the driver lists nobody."""
    return not isinstance(gpu.processes, Missing) and bool(gpu.processes)


def _list_is_true(gpu: Gpu) -> bool:
    """Whether the processes of `gpu` are those of now, as far as its free memory tells."""
    if isinstance(gpu.processes, Missing) or not isinstance(gpu.memory, GpuMemory):
        return False
    return gpu.listed_free_bytes is None or abs(gpu.listed_free_bytes - gpu.memory.free_bytes) <= MOVED_BYTES


def _runners(gpus: Gpus) -> list[ProcessMemory]:
    lists = (() if isinstance(gpu.processes, Missing) else gpu.processes for gpu in gpus.gpus)
    return [process for processes in lists for process in processes if is_ollama(process)]


def _life(gpus: Gpus, tenant: ComfyUIState | OllamaState, *more: str) -> str:
    """What makes it the same one still, as one text."""
    driver = "" if isinstance(gpus.driver_version, Missing) else gpus.driver_version
    version = "" if isinstance(tenant.version, Missing) else tenant.version
    arguments = tenant.argv if isinstance(tenant, ComfyUIState) else ()
    return " ".join((driver, version, *arguments, *more))
