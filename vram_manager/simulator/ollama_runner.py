"""One loaded model of Ollama: a llama-server process, what it holds and what it says it holds."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field
from datetime import datetime
from typing import NamedTuple

from vram_manager.simulator.ledger import GIB, MIB
from vram_manager.simulator.ollama_library import OllamaModel

MARGIN_BYTES = GIB
"""llama.cpp offloads everything only if this much stays free (common/common.h: fit_params_target)."""


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
    served_with_cpu_layers_that_would_have_fitted: int = 0
    """Served by a runner with layers on the CPU though at its load all would have fitted on the card, beside
    what could not have been moved. Never when the client or the model had set num_gpu."""
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
    would_have_fitted: bool = False
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
        return self.model.all_layers

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


class Split(NamedTuple):
    """Where a model goes."""

    gpu_layers: int
    projector_on_gpu: bool


def split(model: OllamaModel, num_ctx: int, num_gpu: int | None, free_bytes: int) -> Split:
    """All layers if the margin stays free beside them, else as many as fit; with `num_gpu` exactly that many.

    `free_bytes` is without the runner's own CUDA context, which is there before it looks.
    """
    if num_gpu == 0 or free_bytes < 0:
        return Split(0, projector_on_gpu=False)
    need_bytes = model.need_bytes(num_ctx)
    projector_on_gpu = 0 < model.projector_bytes <= free_bytes - MARGIN_BYTES
    margin_bytes = MARGIN_BYTES + (model.projector_bytes if projector_on_gpu else 0)
    if num_gpu is not None:  # set by the user: no fit, exactly that many or a failure
        layers = min(num_gpu, model.all_layers)
    elif free_bytes - need_bytes >= margin_bytes:
        layers = model.all_layers
    else:
        fitting = math.floor((free_bytes - margin_bytes) / (need_bytes / model.all_layers))
        layers = max(0, min(fitting, model.all_layers - 1))
    return Split(layers, projector_on_gpu=projector_on_gpu and layers > 0)


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
