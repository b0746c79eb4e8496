"""Runs prompts node by node and keeps what nodes gave (execution.py:PromptExecutor)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from vram_manager.simulator.comfyui_files import (
    NODE_CLASSES,
    ModelFile,
    Part,
    Workflow,
    is_link,
    links,
    upstream,
)
from vram_manager.simulator.comfyui_memory import ComfyUIMemory, Weights
from vram_manager.simulator.comfyui_pictures import Picture, Pictures, png
from vram_manager.simulator.comfyui_queue import QueueItem
from vram_manager.simulator.comfyui_run import Run
from vram_manager.simulator.comfyui_sockets import Sockets
from vram_manager.simulator.ledger import GIB, MIB, OutOfMemory

UPLOAD_STEPS = 8
"""In how many pieces weights reach the GPU; enough for a watcher to see the rise."""

HALF_BYTES = 2


@dataclass(slots=True)
class ComfyUICounters:
    """What really happened, for a test to compare with what a watcher concluded."""

    prompts_run: int = 0
    loads_from_disk: int = 0
    loads_from_ram: int = 0
    partial_loads: int = 0
    frees_posted: int = 0
    frees_posted_while_busy: int = 0
    frees_acted_on: int = 0
    out_of_memory: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ComfyUISettings:
    """How fast things are and what is held besides models."""

    disk_bytes_per_second: float = 2.0 * GIB
    ram_bytes_per_second: float = 12.0 * GIB
    seconds_per_step: float = 0.15
    text_seconds: float = 0.2
    decode_seconds: float = 0.5
    gc_seconds: float = 0.4  # 0.27-0.7 s were seen without custom nodes
    empty_cache_seconds: float = 0.03
    offload_slowdown: float = 4.0  # a step with no weight on the GPU takes 1 + this times as long
    context_bytes: int = 600 * MIB  # "just started (600 MB)", ollama issue 9926
    custom_node_bytes: int = 0  # held by node instances once a sampler ran; free_memory drops it
    preview_pixels: int = 64  # side of the picture sent after each step (--preview-method); 0: none
    module_global_bytes: int = 0  # held in a module's global once a sampler ran; only a restart drops it


class Interrupted(Exception):
    """POST /interrupt, noticed at a node's start or a sampler's step."""


class Executor:
    """Works through prompts: the weights go to `memory`, what happens to `sockets`, what comes out to `pictures`."""

    def __init__(
        self,
        memory: ComfyUIMemory,
        files: Iterable[ModelFile],
        settings: ComfyUISettings,
        sockets: Sockets,
        pictures: Pictures,
        utcnow: Callable[[], datetime],
    ) -> None:
        self.memory = memory
        self.counters = ComfyUICounters()
        self.interrupted = False
        self._files = {(file.folder, file.name): file for file in files}
        self._settings = settings
        self._sockets = sockets
        self._pictures = pictures
        self._utcnow = utcnow
        self._outputs: dict[str, tuple[Any, ...]] = {}
        self._shown: dict[str, dict[str, Any]] = {}

    def reset(self) -> None:
        """All node outputs are dropped, and with them the last reference to every model."""
        self._outputs.clear()
        self._shown.clear()

    async def execute(self, item: QueueItem) -> dict[str, Any]:
        """Runs one prompt and returns its history entry; whatever goes wrong in a node ends up in there."""
        self.interrupted = False
        self.counters.prompts_run += 1
        run = Run(item, self._sockets.send, self._utcnow)
        order = [node_id for output in item.outputs for node_id in upstream(item.prompt, output)]
        order = list(dict.fromkeys(order))
        signatures = _signatures(item.prompt, order)
        cached = [node_id for node_id in order if signatures[node_id] in self._outputs]
        run.message("execution_start")
        run.message("execution_cached", nodes=cached)
        for node_id in cached:
            if shown := self._shown.get(signatures[node_id]):
                run.executed(node_id, shown)
                run.finish(node_id)
        node_id = ""
        try:
            for node_id in _to_run(item.prompt, item.outputs, cached, order):
                if self.interrupted:
                    raise Interrupted
                run.begin(node_id)
                await self._run_node(run, node_id, signatures)
            run.message("execution_success")
        except Interrupted:
            run.failed("execution_interrupted", node_id)
        except OutOfMemory as oom:
            self.counters.out_of_memory += 1
            run.raised(node_id, "torch.OutOfMemoryError", f"Allocation on device : {oom}")
            self.memory.unload_all()  # "Got an OOM, unloading all loaded models." (execution.py:execute)
            self.memory.empty_cache()
        except Exception as error:  # as in execution.py:execute, a node that raises never ends the worker
            run.raised(node_id, type(error).__name__, str(error))
        return run.history_entry()

    async def _run_node(self, run: Run, node_id: str, signatures: dict[str, str]) -> None:
        node = run.item.prompt[node_id]
        inputs = {
            name: self._outputs[signatures[value[0]]][value[1]] if is_link(value) else value
            for name, value in node["inputs"].items()
        }
        outputs = await self._compute(run, node_id, node["class_type"], inputs)
        self._outputs[signatures[node_id]] = outputs
        run.done.append(node_id)
        if NODE_CLASSES[node["class_type"]].output:
            kind = "temp" if node["class_type"] == "PreviewImage" else "output"
            name = f"ComfyUI_{kind}_{self.counters.prompts_run:05d}_.png"
            self._pictures.made.add(Picture(kind, "", name))
            self._shown[signatures[node_id]] = {"images": [{"filename": name, "subfolder": "", "type": kind}]}
            run.executed(node_id, self._shown[signatures[node_id]])
        run.finish(node_id)

    async def _compute(self, run: Run, node_id: str, kind: str, inputs: dict[str, Any]) -> tuple[Any, ...]:
        match kind:
            case "CheckpointLoaderSimple":
                return await self._read("checkpoints", inputs["ckpt_name"], Part.DIFFUSION)
            case "UNETLoader":
                return await self._read("diffusion_models", inputs["unet_name"], Part.DIFFUSION)
            case "VAELoader":
                return await self._read("vae", inputs["vae_name"], Part.VAE)
            case "CLIPLoader":
                return await self._read("text_encoders", inputs["clip_name"], Part.TEXT_ENCODER)
            case "DualCLIPLoader":
                (one,) = await self._read("text_encoders", inputs["clip_name1"], Part.TEXT_ENCODER)
                (two,) = await self._read("text_encoders", inputs["clip_name2"], Part.TEXT_ENCODER)
                both_bytes = one.size_bytes + two.size_bytes
                name = f"{one.name} + {two.name}"
                return (Weights(name, Part.TEXT_ENCODER, both_bytes, in_ram=one.in_ram),)
            case "LoraLoader" | "LoraLoaderModelOnly":
                return inputs["model"], inputs.get("clip")
            case "CLIPTextEncode":
                await self._use(inputs["clip"], 128 * MIB, self._settings.text_seconds)
                return ("conditioning",)
            case "EmptyLatentImage" | "EmptySD3LatentImage":
                return (int(inputs["width"]) // 8 * (int(inputs["height"]) // 8) * int(inputs["batch_size"]),)
            case "KSampler" | "KSamplerAdvanced":
                await self._sample(run, node_id, inputs)
                return (inputs["latent_image"],)
            case "VAEDecode":
                await self._decode(inputs["vae"], inputs["samples"])
                return ("image",)
            case _:
                return ("image",)

    async def _read(self, folder: str, name: str, part: Part) -> tuple[Weights, ...]:
        """A loader reads the whole file; with DynamicVRAM it maps it, and its first use pays the read."""
        file = self._files[folder, name]
        in_ram = self.memory.mode != "dynamic"
        if in_ram:
            self.counters.loads_from_disk += 1
            await asyncio.sleep(file.size_bytes / self._settings.disk_bytes_per_second)
        rest_bytes = file.size_bytes - file.text_encoder_bytes - file.vae_bytes
        weights = [Weights(name, part, rest_bytes, file.memory_factor, in_ram=in_ram)]
        if folder == "checkpoints":
            weights.append(Weights(name, Part.TEXT_ENCODER, file.text_encoder_bytes, in_ram=in_ram))
            weights.append(Weights(name, Part.VAE, file.vae_bytes, in_ram=in_ram))
        return tuple(weights)

    async def _bring(self, weights: Weights, working_bytes: int) -> None:
        """The weights are on the GPU, or as many as there is room for."""
        if self.memory.ledger.lost:
            raise RuntimeError("CUDA error: unspecified launch failure")
        target_bytes = self.memory.make_room(weights, working_bytes)
        missing_bytes = target_bytes - weights.gpu_bytes
        if missing_bytes > 0:
            if not weights.in_ram:
                self.counters.loads_from_disk += 1
            elif weights.was_on_gpu:
                self.counters.loads_from_ram += 1
            from_ram, from_disk = self._settings.ram_bytes_per_second, self._settings.disk_bytes_per_second
            seconds = missing_bytes / (from_ram if weights.in_ram else from_disk)
            weights.in_ram = True
            start_bytes = weights.gpu_bytes
            for step in range(1, UPLOAD_STEPS + 1):
                await asyncio.sleep(seconds / UPLOAD_STEPS)
                self.memory.place(weights, start_bytes + missing_bytes * step // UPLOAD_STEPS)
        self.counters.partial_loads += weights.missing_ratio > 0

    async def _use(self, weights: Weights, working_bytes: int, seconds: float) -> None:
        await self._bring(weights, working_bytes)
        self.memory.allocate(working_bytes)
        try:
            with self.memory.ledger.computing():
                await asyncio.sleep(self._slowed(seconds, weights))
        finally:
            self.memory.release(working_bytes)

    async def _sample(self, run: Run, node_id: str, inputs: dict[str, Any]) -> None:
        """Working memory as ComfyUI estimates it: area x bytes x 0.01 MiB x factor.

        (model_base.py:memory_required; two latents at once, for the positive and the negative prompt.)
        """
        weights, steps = inputs["model"], int(inputs["steps"])
        area = 2 * inputs["latent_image"]
        working_bytes = int(area * HALF_BYTES * 0.01 * weights.memory_factor * MIB)
        self.memory.hold(self._settings.custom_node_bytes, self._settings.module_global_bytes)
        await self._bring(weights, working_bytes)
        self.memory.allocate(working_bytes)
        try:
            with self.memory.ledger.computing():
                for step in range(1, steps + 1):
                    if self.interrupted:
                        raise Interrupted
                    self.memory.yield_pages()
                    await asyncio.sleep(self._slowed(self._settings.seconds_per_step, weights))
                    run.progress(node_id, step, steps)
                    if self._settings.preview_pixels:
                        picture = png(f"step {step}", self._settings.preview_pixels)
                        self._sockets.send_preview(picture, run.client_id)
        finally:
            self.memory.release(working_bytes)

    async def _decode(self, weights: Weights, latent_area: int) -> None:
        """2178 x area x 64 x bytes (sd.py:VAE); what does not fit is decoded in tiles.

        A tile is taken for a sixteenth of the picture, all tiles for twice its time.
        """
        working_bytes = 2178 * latent_area * 64 * HALF_BYTES
        try:
            await self._use(weights, working_bytes, self._settings.decode_seconds)
        except OutOfMemory:
            self.memory.empty_cache()
            await self._use(weights, working_bytes // 16, 2 * self._settings.decode_seconds)

    def _slowed(self, seconds: float, weights: Weights) -> float:
        return seconds * (1 + self._settings.offload_slowdown * weights.missing_ratio)


def _signatures(prompt: Workflow, order: list[str]) -> dict[str, str]:
    """Equal class, inputs and sources: the node need not run again (comfy_execution/caching.py)."""
    signatures: dict[str, str] = {}
    for node_id in order:
        inputs = {
            name: [signatures[value[0]], value[1]] if is_link(value) else value
            for name, value in sorted(prompt[node_id]["inputs"].items())
        }
        signatures[node_id] = json.dumps([prompt[node_id]["class_type"], inputs])
    return signatures


def _to_run(prompt: Workflow, outputs: list[str], cached: list[str], order: list[str]) -> list[str]:
    """Nodes whose result is missing and needed: behind a cached node nothing runs."""
    needed: set[str] = set()
    waiting = list(outputs)
    while waiting:
        node_id = waiting.pop()
        if node_id not in needed and node_id not in cached:
            needed.add(node_id)
            waiting += links(prompt[node_id])
    return [node_id for node_id in order if node_id in needed]
