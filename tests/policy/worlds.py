"""Small worlds to judge: readings with defaults, and the policy with its memory, turn by turn.

The default world is one 24 GiB card at rest: nothing loaded in Ollama, an idle ComfyUI 0.3.64 (the last kind
without DynamicVRAM) that holds nothing. Every reading is as old as the snapshot unless a test says otherwise.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from vram_manager.domain.action import Action, FreeComfyUI, Stage
from vram_manager.domain.decision import Decision, ManualFree
from vram_manager.domain.event import Event, EventType
from vram_manager.domain.reading import Missing, Off, Reading, Seen
from vram_manager.domain.snapshot import (
    ComfyUIState,
    Gpu,
    GpuMemory,
    Gpus,
    LoadedModel,
    OllamaState,
    ProcessMemory,
    Queue,
    Snapshot,
    TorchDevice,
)
from vram_manager.domain.watch import Asked, Watch
from vram_manager.policy import Rules, asked, decide, decide_manual, reposted
from vram_manager.policy.accounting import gpus_seen

T = TypeVar("T")

MIB = 2**20
GIB = 2**30
CARD = "GPU-a"
SOFT = FreeComfyUI(stage=Stage.SOFT)
UNLOAD = FreeComfyUI(stage=Stage.UNLOAD)
CHAT = "llama3.1:8b"
DYNAMIC = "0.33.0"
CLASSIC = "0.3.64"
# No pressure, however long memory is short.
CALM = Rules(grace_seconds=1e9, empty_room_grace_seconds=1e9)
# Models stay where Ollama put them.
NO_REPAIR = replace(CALM, repair=False)


def gib(size: float) -> int:
    return round(size * GIB)


def process(used_gib: float | Missing, *command: str, pid: int = 1) -> ProcessMemory:
    used = used_gib if isinstance(used_gib, Missing) else gib(used_gib)
    return ProcessMemory(pid=pid, used_bytes=used, command=command or Missing("not visible"))


def gpu(
    *,
    free_gib: float | Missing = 24.0,
    total_gib: float = 24.0,
    uuid: str = CARD,
    index: int = 0,
    name: str = "NVIDIA GeForce RTX 3090",
    utilization: int | Missing = 0,
    processes: tuple[ProcessMemory, ...] | Missing = Missing("not asked"),
) -> Gpu:
    memory: GpuMemory | Missing
    if isinstance(free_gib, Missing):
        memory = free_gib
    else:
        free = gib(free_gib)
        memory = GpuMemory(
            total_bytes=gib(total_gib), used_bytes=gib(total_gib) - free, free_bytes=free, reserved_bytes=0
        )
    return Gpu(uuid=uuid, index=index, name=name, memory=memory, utilization_percent=utilization, processes=processes)


def second(*, free_gib: float | Missing = 24.0, name: str = "NVIDIA GeForce RTX 3090", **more: object) -> Gpu:
    """The other card of a box with two."""
    return gpu(free_gib=free_gib, uuid="GPU-b", index=1, name=name, **more)  # type: ignore[arg-type]


def gpus(*cards: Gpu) -> Gpus:
    return Gpus(gpus=cards, driver_version="580.0")


def model(name: str = CHAT, *, size_gib: float = 8.0, gpu_gib: float | None = None, digest: str = "") -> LoadedModel:
    """A model wholly on the GPU, unless `gpu_gib` says how much of it is."""
    return LoadedModel(
        name=name,
        digest=digest or f"sha-{name}",
        size_bytes=gib(size_gib),
        size_vram_bytes=gib(size_gib if gpu_gib is None else gpu_gib),
        context_length=4096,
        expires_at=None,
    )


def ollama(*models: LoadedModel, version: str | Missing = "0.32.15", active_at: float | None = 0.0) -> OllamaState:
    return OllamaState(version=version, models=models, active_at=active_at)


def device(
    *,
    torch_gib: float = 0.0,
    torch_free_gib: float = 0.0,
    free_gib: float = 24.0,
    total_gib: float = 24.0,
    name: str = "cuda:0 NVIDIA GeForce RTX 3090 : cudaMallocAsync",
    kind: str = "cuda",
) -> TorchDevice:
    """`free_gib` is what is free on the device for others; ComfyUI adds torch's cached blocks to it."""
    return TorchDevice(
        name=name,
        type=kind,
        index=0,
        vram_total_bytes=gib(total_gib),
        vram_free_bytes=gib(free_gib) + gib(torch_free_gib),
        torch_total_bytes=gib(torch_gib),
        torch_free_bytes=gib(torch_free_gib),
    )


def comfyui(
    *argv: str,
    torch_gib: float = 0.0,
    version: str | Missing = CLASSIC,
    free_gib: float = 24.0,
    devices: tuple[TorchDevice, ...] | None = None,
) -> ComfyUIState:
    return ComfyUIState(
        version=version,
        argv=argv,
        devices=(device(torch_gib=torch_gib, free_gib=free_gib),) if devices is None else devices,
    )


def queue(remaining: int = 0, *, since: float = -1000.0, moved_at: float | None = None, runs: int = 1) -> Queue:
    return Queue(remaining=remaining, since=since, moved_at=since if moved_at is None else moved_at, runs=runs)


def snapshot(
    at: float,
    card: Gpu | Gpus | Reading[Gpus] = gpu(),  # noqa: B008
    *,
    ollama: OllamaState | Reading[OllamaState] = ollama(),  # noqa: B008
    comfyui: ComfyUIState | Reading[ComfyUIState] = comfyui(),  # noqa: B008
    queue: Queue | Reading[Queue] = queue(),  # noqa: B008
) -> Snapshot:
    return Snapshot(
        taken_at=at,
        gpus=_read(gpus(card) if isinstance(card, Gpu) else card, at),
        ollama=_read(ollama, at),
        comfyui=_read(comfyui, at),
        queue=_read(queue, at),
    )


def fallen(
    at: float,
    *,
    free_gib: float = 1.0,
    torch_gib: float = 16.0,
    chat: LoadedModel = model(gpu_gib=6.0),  # noqa: B008
    queue: Queue | Reading[Queue] = queue(),  # noqa: B008
    **more: object,
) -> Snapshot:
    """A chat of 8 GiB is a quarter on the CPU beside an idle ComfyUI full of models: 3 GiB must be free for it."""
    return snapshot(
        at,
        gpu(free_gib=free_gib),
        ollama=ollama(chat),
        comfyui=comfyui(torch_gib=torch_gib),
        queue=queue,
        **more,  # type: ignore[arg-type]
    )


def crowded(at: float, *, free_gib: float = 1.0, torch_gib: float = 8.0, **more: object) -> Snapshot:
    """Memory is short, a chat is wholly on the GPU, and ComfyUI is idle: pressure with nobody waiting."""
    seen = {"ollama": ollama(model(size_gib=12.0)), "comfyui": comfyui(torch_gib=torch_gib), **more}
    return snapshot(at, gpu(free_gib=free_gib), **seen)  # type: ignore[arg-type]


def _read(value: T | Reading[T], at: float) -> Reading[T]:
    return value if isinstance(value, Seen | Missing | Off) else Seen(value, at)


class Policy:
    """The policy with its memory. `look` is one turn; `post` is what the actuator does right after it."""

    def __init__(self, rules: Rules | None = None, watch: Watch | None = None) -> None:
        self.rules = rules or Rules()
        self.watch = watch or Watch()
        self.told: list[Event] = []
        self.last: Snapshot | None = None

    def look(self, seen: Snapshot) -> Decision:
        decision = decide(seen, self.watch, self.rules)
        self.watch, self.last = decision.watch, seen
        self.told.extend(decision.events)
        return decision

    def wish(self, action: Action, seen: Snapshot, *, force: bool = False) -> Decision:
        forced = replace(action, forced=force)
        decision = decide_manual(seen, self.watch, ManualFree(action=forced, force=force), self.rules)
        self.watch, self.last = decision.watch, seen
        return decision

    def post(self, *, at: float | None = None) -> None:
        """The request goes out, on the numbers of the last look."""
        assert self.last is not None
        assert self.watch.pending is not None
        seen = gpus_seen(self.last)
        cards = () if isinstance(seen, Missing) else seen.gpus
        card = next((card for card in cards if card.uuid == self.watch.pending.gpu), None)
        memory = card.memory if card is not None and isinstance(card.memory, GpuMemory) else None
        when = self.last.taken_at if at is None else at
        self.watch = asked(self.watch, Asked(at=when, gpu_memory=memory), self.last, "free-0001")

    def post_again(self) -> None:
        assert self.last is not None
        self.watch = reposted(self.watch, self.last.taken_at)

    def acts(self, seen: Snapshot) -> Action | None:
        """What one look asks for; the request goes out at once."""
        decision = self.look(seen)
        if decision.action is not None:
            if decision.repost:
                self.post_again()
            else:
                self.post()
        return decision.action

    def kinds(self) -> list[EventType]:
        return [event.type for event in self.told]

    def of(self, kind: EventType) -> list[Event]:
        return [event for event in self.told if event.type is kind]
