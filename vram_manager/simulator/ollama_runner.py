"""One loaded model of Ollama: a llama-server process, what it holds and what it says it holds."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from datetime import datetime

from vram_manager.simulator.ledger import GIB, MIB
from vram_manager.simulator.ollama_library import OllamaModel


class QueueFull(Exception):
    """503: too many requests wait for a load."""


class LoadFailed(Exception):
    """500: the runner could not start."""


@dataclass(slots=True)
class OllamaCounters:
    """What really happened, for a test to compare with what a watcher concluded."""

    loads: int = 0
    loads_with_cpu_layers: int = 0
    load_failures: int = 0
    unloads: int = 0
    evictions: int = 0
    served_on_gpu: int = 0
    served_partially: int = 0
    served_on_cpu: int = 0
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class RunnerOptions:
    """The options a difference in which reloads a model (needsReload). None: not in the request."""

    num_ctx: int | None = None
    num_gpu: int | None = None


@dataclass(slots=True, eq=False)
class Runner:
    """One llama-server process."""

    model: OllamaModel
    num_ctx: int
    num_gpu: int | None
    keep_alive_seconds: float
    free_at_load_bytes: int
    gpu_layers: int = 0
    projector_on_gpu: bool = False
    ready: bool = False
    users: int = 0
    expire_asked: bool = False
    expires_at: datetime | None = None
    timer: asyncio.TimerHandle | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    slot: asyncio.Lock = field(default_factory=asyncio.Lock)
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def holder(self) -> str:
        return f"ollama:{self.model.name}"

    @property
    def all_layers(self) -> int:
        return self.model.layers + 1  # the output layer is offloaded like one more

    @property
    def gpu_ratio(self) -> float:
        return self.gpu_layers / self.all_layers

    @property
    def real_gpu_bytes(self) -> int:
        """Weights, cache and buffers that are on the GPU, without context and projector."""
        return int(self.model.need_bytes(self.num_ctx) * self.gpu_ratio)

    @property
    def size_vram_bytes(self) -> int:
        return self.real_gpu_bytes - int(self.model.swa_undercount_bytes * self.gpu_ratio)

    @property
    def size_bytes(self) -> int:
        return self.model.need_bytes(self.num_ctx) - self.model.swa_undercount_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class OllamaSettings:
    """How fast things are and how many at a time; rates as on a desktop with an NVMe disk."""

    load_bytes_per_second: float = 2.0 * GIB
    start_seconds: float = 0.5
    unload_seconds: float = 0.8  # a killed runner's memory is back after 0.5-1.5 s (sched.go:waitForVRAMRecovery)
    keep_alive_seconds: float = 300.0  # OLLAMA_KEEP_ALIVE
    max_loaded: int = 3  # OLLAMA_MAX_LOADED_MODELS on one GPU
    max_queue: int = 512  # OLLAMA_MAX_QUEUE
    context_length: int = 4096  # OLLAMA_CONTEXT_LENGTH
    cuda_context_bytes: int = 400 * MIB
