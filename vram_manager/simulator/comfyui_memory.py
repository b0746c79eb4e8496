"""What ComfyUI's process holds on the GPU, in the three ways it manages weights.

legacy    weights are torch allocations; a model moves out when another needs room
          (comfy/model_management.py:load_models_gpu)
highvram  like legacy, but diffusion weights never leave the GPU by an unload: their offload device *is*
          the GPU (unet_offload_device, ComfyUI issue 3257)
dynamic   weights are pages outside torch (comfy-aimdo); they give way, but only while ComfyUI itself
          allocates (ModelPatcherDynamic; default on NVIDIA since ComfyUI pull 12658)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from vram_manager.simulator.comfyui_files import Part
from vram_manager.simulator.ledger import GIB, MIB, Ledger, OutOfMemory

Mode: TypeAlias = Literal["legacy", "highvram", "dynamic"]

MIN_INFERENCE_BYTES = int(1.2 * GIB)
"""Room every run keeps beside the weights: 0.8 GiB plus the 0.4 GiB default reserve on Linux
(model_management.py:minimum_inference_memory)."""

HEADROOM_BYTES = 256 * MIB
"""What DynamicVRAM leaves free when it takes pages (comfy-aimdo's default headroom)."""

WEIGHTS_SLACK = 1.1
"""load_models_gpu makes room for a tenth more than the weights."""


@dataclass(slots=True, eq=False)
class Weights:
    """The weights of one part of one file, as a loader node hands them on."""

    name: str
    part: Part
    size_bytes: int
    memory_factor: float = 1.0
    gpu_bytes: int = 0
    in_ram: bool = False
    was_on_gpu: bool = False

    @property
    def missing_ratio(self) -> float:
        """The part that has to be streamed in for every step."""
        return 1 - self.gpu_bytes / self.size_bytes if self.size_bytes else 0.0


class ComfyUIMemory:
    """Keeps the ledger's claim of `holder` equal to what the process holds."""

    def __init__(self, ledger: Ledger, mode: Mode, context_bytes: int, holder: str = "comfyui") -> None:
        self.ledger = ledger
        self.mode = mode
        self.holder = holder
        self.active_bytes = 0
        self.cached_bytes = 0
        self.node_held_bytes = 0
        self.global_held_bytes = 0
        self.leak_bytes_per_run = 0  # a module's global keeps this much more each time a sampler runs
        self.leaked_bytes = 0
        self.resident: list[Weights] = []  # least recently used first
        self._context_bytes = context_bytes
        self._book()

    @property
    def lasting_bytes(self) -> int:
        """What no free gives back: the CUDA context and what custom nodes keep in module globals."""
        return self._context_bytes + self.global_held_bytes

    @property
    def weights_bytes(self) -> int:
        return sum(weights.gpu_bytes for weights in self.resident)

    @property
    def torch_total_bytes(self) -> int:
        """memory_stats()["reserved_bytes.all.current"]: DynamicVRAM's pages are not in it."""
        held_bytes = self.active_bytes + self.cached_bytes + self.node_held_bytes + self.global_held_bytes
        return held_bytes if self.mode == "dynamic" else held_bytes + self.weights_bytes

    def make_room(self, weights: Weights, working_bytes: int) -> int:
        """Moves other models out as far as needed; returns how much of `weights` should be on the GPU."""
        if weights in self.resident:
            self.resident.remove(weights)
        self.resident.append(weights)
        missing_bytes = weights.size_bytes - weights.gpu_bytes
        if self.mode == "dynamic":
            spare_bytes = working_bytes + HEADROOM_BYTES
            wanted_bytes = missing_bytes + spare_bytes
        else:
            spare_bytes = max(MIN_INFERENCE_BYTES, working_bytes)
            wanted_bytes = int(missing_bytes * WEIGHTS_SLACK) + spare_bytes
        for other in self.resident[:-1]:
            if self._reachable_bytes() >= wanted_bytes:
                break
            if not self._stays(other):
                self._take_off(other, wanted_bytes - self._reachable_bytes())
        if self.mode == "highvram":
            return weights.size_bytes
        fitting_bytes = self._reachable_bytes() - spare_bytes
        return min(weights.size_bytes, max(0, weights.gpu_bytes + fitting_bytes))

    def place(self, weights: Weights, gpu_bytes: int) -> None:
        """`gpu_bytes` of these weights are on the GPU; a dynamic model takes fewer if they do not fit."""
        growth_bytes = gpu_bytes - weights.gpu_bytes
        if self.mode == "dynamic":
            growth_bytes = min(growth_bytes, max(0, self._reachable_bytes() - HEADROOM_BYTES))
        self._reuse_cache(growth_bytes)
        weights.gpu_bytes += growth_bytes
        weights.was_on_gpu = weights.was_on_gpu or weights.gpu_bytes > 0
        try:
            self._book()
        except OutOfMemory:
            weights.gpu_bytes -= growth_bytes
            self._book()
            raise

    def yield_pages(self) -> None:
        """Under pressure from anybody a *running* dynamic ComfyUI shrinks to keep its headroom."""
        if self.mode == "dynamic":
            self._shrink(HEADROOM_BYTES - self.ledger.free_bytes)

    def allocate(self, working_bytes: int) -> None:
        """Working memory of a node: torch's cache, then the device; dynamic models give up pages for it."""
        shortage_bytes = working_bytes - self._reachable_bytes()
        if self.mode == "dynamic":
            self._shrink(shortage_bytes + HEADROOM_BYTES)
        self._reuse_cache(working_bytes)
        self.active_bytes += working_bytes
        try:
            self._book()
        except OutOfMemory:
            self.active_bytes -= working_bytes
            self._book()
            raise

    def release(self, working_bytes: int) -> None:
        """The node is done: its blocks stay in torch's cache (aimdo trims them after every node)."""
        self.active_bytes -= working_bytes
        self.cached_bytes += working_bytes
        if self.mode == "dynamic":
            self.cached_bytes = 0
        self._book()

    def hold(self, node_bytes: int, global_bytes: int) -> None:
        """Custom nodes keep this much, on their instance and in a module global."""
        self.leaked_bytes += self.leak_bytes_per_run
        self.node_held_bytes, self.global_held_bytes = node_bytes, global_bytes + self.leaked_bytes
        self._book()

    def empty_cache(self) -> None:
        """model_management.py:soft_empty_cache: unused blocks go back to the driver."""
        self.cached_bytes = 0
        self._book()

    def unload_all(self) -> None:
        """model_management.py:unload_all_models. Copies in RAM stay; blocks are cached until emptied."""
        for weights in list(self.resident):
            if not self._stays(weights):
                self._take_off(weights, weights.gpu_bytes)
                self.resident.remove(weights)
        self._book()

    def forget_all(self) -> None:
        """executor.reset and a garbage collection: the Python objects are gone, nothing keeps weights."""
        for weights in self.resident:
            weights.gpu_bytes = 0
        self.resident.clear()
        self.node_held_bytes = 0
        self._book()

    def _stays(self, weights: Weights) -> bool:
        return self.mode == "highvram" and weights.part is Part.DIFFUSION

    def _take_off(self, weights: Weights, wanted_bytes: int) -> None:
        """Only what is needed leaves (LoadedModel.model_unload); blocks of torch stay cached."""
        taken_bytes = min(weights.gpu_bytes, max(0, wanted_bytes))
        if self.mode != "dynamic":
            self.cached_bytes += taken_bytes
        weights.gpu_bytes -= taken_bytes
        self._book()

    def _shrink(self, wanted_bytes: int) -> None:
        for weights in self.resident:
            if wanted_bytes <= 0:
                return
            taken_bytes = min(wanted_bytes, weights.gpu_bytes)
            self._take_off(weights, taken_bytes)
            wanted_bytes -= taken_bytes

    def _reachable_bytes(self) -> int:
        """Free for this process: the device's free memory and its own cached blocks."""
        return self.ledger.free_bytes + self.cached_bytes

    def _reuse_cache(self, wanted_bytes: int) -> None:
        """Cached blocks are used first; if the device would not do for the rest, torch empties its cache."""
        reused_bytes = min(self.cached_bytes, max(0, wanted_bytes))
        self.cached_bytes -= reused_bytes
        if wanted_bytes - reused_bytes > self.ledger.free_bytes:
            self.cached_bytes = 0

    def _book(self) -> None:
        held_bytes = self.torch_total_bytes + self._context_bytes
        if self.mode == "dynamic":
            held_bytes += self.weights_bytes
        self.ledger.resize(self.holder, held_bytes)
