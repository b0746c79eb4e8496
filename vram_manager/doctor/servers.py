"""Ollama, ComfyUI, further nodes: asked as the daemon asks them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from vram_manager import config
from vram_manager.backends.comfyui import HttpComfyUI
from vram_manager.backends.http import JsonClient
from vram_manager.backends.ollama import HttpOllama
from vram_manager.config import Settings
from vram_manager.doctor.finding import Finding
from vram_manager.domain.reading import Missing
from vram_manager.domain.snapshot import ComfyUIState, Gpus
from vram_manager.domain.version import release
from vram_manager.errors import Rejected, SensorError
from vram_manager.policy.accounting import comfyui_gpu, weights_may_hide
from vram_manager.policy.demands import on_cpu, placement


async def ollama(settings: Settings) -> list[Finding]:
    url = config.without_secrets(settings.ollama.ollama_url)
    if not url:
        return [Finding("ollama", "note", "OLLAMA_URL is empty: no Ollama here")]
    server = HttpOllama(JsonClient(settings.ollama.ollama_url, headers=settings.ollama.ollama_headers, name="ollama"))
    async with contextlib.aclosing(server):
        try:
            state = await server.models()
        except SensorError as error:
            return [Finding("ollama", "wrong", f"{url}: {error.why}", error.remedy)]
    version = state.version if isinstance(state.version, str) else "version unknown"
    loaded = ", ".join(f"{model.name} {placement(model)}" for model in state.models) or "no model loaded"
    findings = [Finding("ollama", "fine", f"{url}: {version}, {loaded}")]
    findings += about_version(state.version)
    findings += [
        Finding(
            "ollama",
            "note",
            f"{model.name} is partly or wholly on the CPU",
            "it moves only when it is loaded again: see VRAM_REPAIR_FALLBACK and the gateway",
        )
        for model in state.models
        if on_cpu(model)
    ]
    return findings


def about_version(version: str | Missing) -> list[Finding]:
    """What this version of Ollama does not tell, or tells wrongly; builds from source say 0.0.0."""
    numbers = release(version)
    if numbers is None or numbers == (0, 0, 0):
        return []
    if numbers < (0, 10, 0):
        words = f"{version} tells no context length: a repaired model comes back with the default one"
        return [Finding("ollama", "note", words, "update Ollama to 0.10 or newer")]
    if (0, 30, 0) <= numbers <= (0, 30, 10):
        words = f"{version} counts a model that is partly on the CPU up to twice: what it needs is a guess"
        return [Finding("ollama", "note", words, "update Ollama to 0.30.11 or newer")]
    return []


async def comfyui(settings: Settings, gpus: Gpus | None) -> list[Finding]:
    url = config.without_secrets(settings.comfyui.comfyui_url)
    if not url:
        return [Finding("comfyui", "note", "COMFYUI_URL is empty: no ComfyUI here")]
    server = HttpComfyUI(
        JsonClient(settings.comfyui.comfyui_url, headers=settings.comfyui.comfyui_headers, name="comfyui")
    )
    async with contextlib.aclosing(server):
        try:
            state = await server.stats()
            remaining = await server.queue_remaining()
        except SensorError as error:
            return [Finding("comfyui", "wrong", f"{url}: {error.why}", error.remedy)]
        version = state.version if isinstance(state.version, str) else "version unknown"
        findings = [Finding("comfyui", "fine", f"{url}: {version}, {remaining} running or waiting")]
        findings += _about_devices(settings, state, gpus)
        findings.append(
            await _tried("POST /free is allowed (asked with {}, which frees nothing)", lambda: server.free({}))
        )
        findings.append(await _tried("its websocket tells queue changes", lambda: _first_status(server)))
    return findings


def _about_devices(settings: Settings, state: ComfyUIState, gpus: Gpus | None) -> list[Finding]:
    if not state.devices:
        return [Finding("comfyui", "note", "it runs without a GPU: there is nothing to free")]
    findings = []
    if state.has_flag("--highvram", "--gpu-only"):
        words = "its flags keep weights on the GPU: the unload stage is used at once, the soft stage frees nothing"
        findings.append(Finding("comfyui", "note", words))
    elif weights_may_hide(state):
        words = "DynamicVRAM may be on: weights are in none of its numbers, what a free gives is learned"
        findings.append(Finding("comfyui", "note", words))
    if gpus is not None:
        gpu = comfyui_gpu(state, gpus, settings.rules())
        if isinstance(gpu, Missing):
            # One that was chosen and is not there is told of with the GPUs.
            if settings.comfyui.comfyui_gpu is None:
                findings.append(Finding("comfyui", "wrong", gpu.why, gpu.remedy))
        else:
            findings.append(Finding("comfyui", "fine", f"it computes on GPU {gpu.index} ({gpu.name})"))
        if len(gpus.gpus) > 1 and settings.ollama.ollama_url and settings.ollama.ollama_gpu is None:
            words = "Ollama does not say which of the GPUs its models are on"
            findings.append(Finding("ollama", "note", words, "set OLLAMA_GPU if it uses only one of them"))
    return findings


async def _first_status(server: HttpComfyUI) -> None:
    async with contextlib.aclosing(server.statuses()) as statuses:
        async with asyncio.timeout(10):
            await anext(statuses)


async def _tried(words: str, attempt: Callable[[], Awaitable[None]]) -> Finding:
    try:
        await attempt()
    except TimeoutError:
        return Finding("comfyui", "note", f"not so: {words} (nothing came within 10 s)", "the queue is polled instead")
    except SensorError as error:
        return Finding("comfyui", "note", f"not so: {words} ({error.why})", error.remedy)
    return Finding("comfyui", "fine", words)


async def nodes(settings: Settings) -> list[Finding]:
    """Further Ollama servers, all at once: a node that is down keeps no other waiting."""
    return list(await asyncio.gather(*(_node(url) for url in dict.fromkeys(settings.looking.ollama_nodes))))


async def _node(url: str) -> Finding:
    shown = config.without_secrets(url)
    server = HttpOllama(JsonClient(url, name=shown))
    async with contextlib.aclosing(server):
        try:
            state = await server.models()
        except SensorError as error:
            # Only where nobody answered: who refuses was reached.
            listens = error.remedy and not isinstance(error, Rejected)
            remedy = f"{error.remedy}; OLLAMA_HOST=0.0.0.0 there lets others ask" if listens else error.remedy
            return Finding("node", "wrong", f"{shown}: {error.why}", remedy)
    version = state.version if isinstance(state.version, str) else "version unknown"
    loaded = ", ".join(f"{model.name} {placement(model)}" for model in state.models) or "no model loaded"
    return Finding("node", "fine", f"{shown}: {version}, {loaded}")
