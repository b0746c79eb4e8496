"""What was seen: memory of the GPUs, Ollama's models, ComfyUI's hold and its queue."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum

from vram_manager.domain.demand import Demand
from vram_manager.domain.reading import Missing, Reading


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuMemory:
    """Memory of one device as NVML counts it (struct v2): total = reserved + used + free.

    With the older struct v1, `reserved_bytes` is Missing and `used_bytes` includes the reserve;
    `free_bytes` is the same in both, which is why everything here is arbitrated on it.
    """

    total_bytes: int
    used_bytes: int
    free_bytes: int
    reserved_bytes: int | Missing

    @property
    def usable_bytes(self) -> int:
        """What processes can have at most: the total without the driver's own reserve."""
        reserved = 0 if isinstance(self.reserved_bytes, Missing) else self.reserved_bytes
        return max(1, self.total_bytes - reserved)

    @property
    def taken_bytes(self) -> int:
        """What processes have of that. `used_bytes` would include the reserve with the older struct."""
        return self.usable_bytes - self.free_bytes

    @property
    def used_percent(self) -> float:
        """How much of the usable memory is taken, 0..100: the number thresholds are compared with."""
        return min(100.0, max(0.0, 100.0 * (1.0 - self.free_bytes / self.usable_bytes)))


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessMemory:
    """One process on one GPU. Under WSL2, MIG and vGPU its memory is Missing (N/A), not zero."""

    pid: int
    used_bytes: int | Missing
    command: tuple[str, ...] | Missing


class Trust(StrEnum):
    """How sure the numbers of a GPU are.

    MEASURED: its driver counts all of it. DERIVED: worked out from what the system tells, such as memory that is shared
    with the CPU. SECOND_HAND: another program said so. UNVERIFIED: read as documented, seen on no such card by us.
    """

    MEASURED = "measured"
    DERIVED = "derived"
    SECOND_HAND = "second-hand"
    UNVERIFIED = "unverified"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU, or one instance of a GPU that is split (MIG). `uuid` is its name everywhere; `index` may change between
    boots.

    `unified`: its memory is the CPU's too. `asleep`: the kernel has suspended it, and it is not woken to be read.
    `source` names where its memory is read from. `listed_free_bytes` was free when `processes` were listed, where that
    was before the memory was read.
    """

    uuid: str
    index: int
    name: str
    memory: GpuMemory | Missing
    utilization_percent: int | Missing
    temperature_celsius: int | Missing = Missing("not asked")
    power_watts: float | Missing = Missing("not asked")
    processes: tuple[ProcessMemory, ...] | Missing = Missing("not asked")
    listed_free_bytes: int | None = None
    vendor: str = "nvidia"
    source: str = "NVML"
    trust: Trust = Trust.MEASURED
    unified: bool = False
    asleep: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpus:
    """Every GPU of this node that work can be placed on.

    `second_hand` marks numbers that ComfyUI told because nothing else does. `left_out` says of each further GPU why it
    is none of them, such as the one in the CPU beside a card.
    """

    gpus: tuple[Gpu, ...]
    driver_version: str | Missing
    second_hand: bool = False
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """One entry of Ollama's `/api/ps`. Its split between GPU and CPU is final: Ollama never re-balances.

    `since` is when this load was first seen (None: it was there before us), `active_at` when it was last seen to
    be used: its expiry moved, or a request through the gateway ended. `requests` is how many the gateway has under
    way with it, None without a gateway: Ollama itself never tells whether a model is busy. `held` is how many wait
    there for it. `free_after_bytes` was free on the only GPU when this load was first seen.
    """

    name: str
    digest: str
    size_bytes: int
    size_vram_bytes: int
    context_length: int | None
    expires_at: datetime | None
    since: float | None = None
    active_at: float | None = None
    requests: int | None = None
    held: int = 0
    free_after_bytes: int | None = None

    @property
    def cpu_ratio(self) -> float | Missing:
        """The part that sits on the CPU, 0..1; below 1 % is rounding in Ollama's own sums, hence 0."""
        if self.size_bytes <= 0 or self.size_vram_bytes > self.size_bytes:
            return Missing("Ollama reports sizes that contradict each other")
        ratio = (self.size_bytes - self.size_vram_bytes) / self.size_bytes
        return ratio if ratio > 0.01 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class OllamaState:
    """What Ollama holds. `active_at` is when its list last changed: the only traffic a bystander can see."""

    version: str | Missing
    models: tuple[LoadedModel, ...]
    active_at: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchDevice:
    """One entry of ComfyUI's `/system_stats` devices, in bytes.

    `vram_free_bytes` counts torch's cached blocks as free; what other processes can have is
    `device_free_bytes`. Weights under DynamicVRAM are in none of the torch numbers.
    """

    name: str
    type: str
    index: int | None
    vram_total_bytes: int
    vram_free_bytes: int
    torch_total_bytes: int
    torch_free_bytes: int

    @property
    def device_free_bytes(self) -> int:
        """Free as the driver and all other processes see it."""
        return max(0, self.vram_free_bytes - self.torch_free_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class ComfyUIState:
    """ComfyUI's version, launch arguments and devices (`GET /system_stats`)."""

    version: str | Missing
    argv: tuple[str, ...]
    devices: tuple[TorchDevice, ...]

    def has_flag(self, *names: str) -> bool:
        return any(argument.split("=", 1)[0] in names for argument in self.argv)


@dataclass(frozen=True, slots=True, kw_only=True)
class Queue:
    """ComfyUI's queue: `remaining` = running + pending prompts.

    `since` is when it became idle or busy, `moved_at` when a prompt last began or left, `runs` how many
    times it was seen to start working: a free that gave nothing is not repeated while `runs` stands still.
    """

    remaining: int
    since: float
    moved_at: float
    runs: int

    @property
    def idle(self) -> bool:
        return self.remaining == 0

    def observed(self, remaining: int, at: float) -> Queue:
        """The queue after it was seen to hold `remaining` prompts at `at`."""
        started = remaining > 0 and self.remaining == 0
        return replace(
            self,
            remaining=remaining,
            since=at if (remaining == 0) != (self.remaining == 0) else self.since,
            moved_at=at if started or remaining < self.remaining else self.moved_at,
            runs=self.runs + (1 if started else 0),
        )

    @staticmethod
    def first(remaining: int, at: float) -> Queue:
        return Queue(remaining=remaining, since=at, moved_at=at, runs=1 if remaining else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Everything the daemon knows at `taken_at` (monotonic seconds). Readings past their age limit are Missing.

    `asks` are demands made of the daemon itself: admissions in line, hard limits. `leased_bytes` is what was
    promised on each GPU and is not yet visible there; under None, what was promised when no GPU could be told.
    `workers_bytes` is what of those promises does show, `reserved_bytes` the part of `leased_bytes` that is kept for
    a model that is away to be loaded anew. `reachable_bytes` is the most that could be had on each GPU just now, were
    every tenant to give way.
    """

    taken_at: float
    gpus: Reading[Gpus]
    ollama: Reading[OllamaState]
    comfyui: Reading[ComfyUIState]
    queue: Reading[Queue]
    asks: tuple[Demand, ...] = ()
    leased_bytes: Mapping[str | None, int] = field(default_factory=dict)
    workers_bytes: Mapping[str | None, int] = field(default_factory=dict)
    reserved_bytes: Mapping[str | None, int] = field(default_factory=dict)
    reachable_bytes: Mapping[str, int] = field(default_factory=dict)

    def leased_on(self, uuid: str) -> int:
        """What of the GPU's free memory is promised already."""
        return self.leased_bytes.get(uuid, 0) + self.leased_bytes.get(None, 0)
