"""Checks every part for real, from where it is started, and says how to mend what is wrong.

Nothing is freed: ComfyUI's `/free` is asked with an empty object, which sets no flag and wakes no worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias
from urllib.parse import urlsplit

import click

from vram_manager import __version__, config
from vram_manager.backends.comfyui import HttpComfyUI
from vram_manager.backends.http import JsonClient
from vram_manager.backends.ollama import HttpOllama
from vram_manager.client import call
from vram_manager.config import Settings
from vram_manager.domain.reading import Missing
from vram_manager.domain.size import gib
from vram_manager.domain.snapshot import ComfyUIState, Gpu, Gpus
from vram_manager.domain.version import release
from vram_manager.errors import SensorError, Unreachable
from vram_manager.gateway.head import is_loopback
from vram_manager.gpus.nvml import NvmlSensor
from vram_manager.policy.accounting import comfyui_gpu, weights_may_hide
from vram_manager.policy.demands import on_cpu, placement

Verdict: TypeAlias = Literal["fine", "note", "wrong"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. A note works, with something worth knowing."""

    part: str
    verdict: Verdict
    words: str
    remedy: str | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def examine(settings: Settings) -> list[Finding]:
    """Looks at every part; what one part answers never hides another."""
    return asyncio.run(_examine(settings))


def in_words(findings: list[Finding], *, colour: bool) -> str:
    """The findings for people."""
    marks: dict[Verdict, tuple[str, str]] = {
        "fine": ("ok", "green"),
        "note": ("note", "yellow"),
        "wrong": ("WRONG", "red"),
    }
    lines = [f"vram-manager {__version__} doctor"]
    for finding in findings:
        mark, hue = marks[finding.verdict]
        shown = click.style(f"{mark:>5}", fg=hue) if colour else f"{mark:>5}"
        lines.append(f"{shown}  {finding.part:<9} {finding.words}")
        if finding.remedy:
            lines.append(f"       {'':<9} -> {finding.remedy}")
    wrong = sum(finding.verdict == "wrong" for finding in findings)
    lines.append(f"{wrong} of {len(findings)} checks found something wrong" if wrong else "Everything works.")
    return "\n".join(lines)


async def _examine(settings: Settings) -> list[Finding]:
    findings = [Finding("settings", "note", words) for words in config.unknown_names(os.environ)]
    if not findings:
        findings.append(Finding("settings", "fine", f"profile {settings.policy.vram_profile}, every name known"))
    gpus, about_gpus = await _gpus(settings)
    findings += about_gpus
    findings += await _ollama(settings)
    findings += await _comfyui(settings, gpus)
    findings.append(_state(settings))
    daemon = _daemon(settings)
    findings += await _gateways(settings, running=daemon.verdict == "fine")
    findings += about_gateway_host(settings, in_container=in_container())
    return [*findings, daemon]


async def _gpus(settings: Settings) -> tuple[Gpus | None, list[Finding]]:
    sensor = NvmlSensor(deadline_seconds=settings.gpu.vram_check_timeout_seconds)
    try:
        gpus = await sensor.read(with_processes=True)
    except SensorError as error:
        return None, [Finding("nvml", "wrong", error.why, error.remedy)]
    finally:
        sensor.close()
    driver = gpus.driver_version if isinstance(gpus.driver_version, str) else "version unknown"
    return gpus, [finding for gpu in gpus.gpus for finding in _gpu(gpu, driver)]


def _gpu(gpu: Gpu, driver: str) -> list[Finding]:
    part, name = f"gpu {gpu.index}", f"{gpu.name} ({gpu.uuid}, driver {driver})"
    if isinstance(gpu.memory, Missing):
        return [Finding(part, "wrong", f"{name}: {gpu.memory.why}", gpu.memory.remedy)]
    memory = gpu.memory
    words = f"{name}: {gib(memory.free_bytes)} of {gib(memory.total_bytes)} free, {memory.used_percent:.0f} % used"
    findings = [Finding(part, "fine", words)]
    if isinstance(gpu.processes, Missing):
        why = f"{gpu.processes.why}: who holds what is worked out from the APIs instead"
        findings.append(Finding(part, "note", why, gpu.processes.remedy))
    return findings


async def _ollama(settings: Settings) -> list[Finding]:
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


# Addresses that mean every one of this machine, and where such a listener is reached from here.
_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Door:
    """One gateway as it is set up: `variable` holds its port, `url` is what it stands in front of."""

    name: str
    variable: str
    port: int | None
    url: str
    ask: Callable[[str], Awaitable[str]]


def _doors(settings: Settings) -> list[_Door]:
    ollama, comfyui, gateway = settings.ollama, settings.comfyui, settings.gateway

    async def version(url: str) -> str:
        server = HttpOllama(JsonClient(url, headers=ollama.ollama_headers, name="ollama"))
        async with contextlib.aclosing(server):
            state = await server.models()
        return state.version if isinstance(state.version, str) else "version unknown"

    async def remaining(url: str) -> str:
        server = HttpComfyUI(JsonClient(url, headers=comfyui.comfyui_headers, name="comfyui"))
        async with contextlib.aclosing(server):
            return f"{await server.queue_remaining()} running or waiting"

    return [
        _Door(
            name="Ollama",
            variable="GATEWAY_OLLAMA_PORT",
            port=gateway.gateway_ollama_port,
            url=ollama.ollama_url,
            ask=version,
        ),
        _Door(
            name="ComfyUI",
            variable="GATEWAY_COMFYUI_PORT",
            port=gateway.gateway_comfyui_port,
            url=comfyui.comfyui_url,
            ask=remaining,
        ),
    ]


async def _gateways(settings: Settings, *, running: bool) -> list[Finding]:
    findings = [
        await _gateway(door, settings.gateway.gateway_host, running=running)
        for door in _doors(settings)
        if door.port is not None
    ]
    if settings.ollama.ollama_url and settings.gateway.gateway_ollama_port is None:
        words = "no gateway: a model may fall to the CPU before anybody can make room for it"
        findings.append(Finding("gateway", "note", words, "set GATEWAY_OLLAMA_PORT and let clients use that port"))
    return findings


async def _gateway(door: _Door, host: str, *, running: bool) -> Finding:
    """Whether it listens, and whether what it stands in front of answers through it."""
    if not door.url:
        words = f"{door.variable} is set, but there is no {door.name} here: nothing listens"
        return Finding("gateway", "note", words, f"set {door.name.upper()}_URL, or leave {door.variable} empty")
    shown = f"[{host}]" if ":" in host else host
    reached = _ANY.get(host, host)
    try:
        async with asyncio.timeout(5):
            _, writer = await asyncio.open_connection(reached, door.port)
    except OSError as error:
        why = (
            "connection refused" if isinstance(error, ConnectionRefusedError) else str(error) or "no answer within 5 s"
        )
        words = f"{door.name}'s on {shown}:{door.port}: cannot be reached ({why})"
        if not running:
            return Finding("gateway", "note", words, "it opens when the daemon starts")
        remedy = "the daemon runs without it: has it been started with this environment?"
        return Finding("gateway", "wrong", words, remedy)
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    try:
        said = await door.ask(f"http://{f'[{reached}]' if ':' in reached else reached}:{door.port}")
    except SensorError as error:
        return Finding("gateway", "wrong", f"{door.name}'s on {shown}:{door.port}: {error.why}", error.remedy)
    url = config.without_secrets(door.url)
    return Finding("gateway", "fine", f"{door.name}'s on {shown}:{door.port}: {url} answers behind it, {said}")


def about_gateway_host(settings: Settings, *, in_container: bool) -> list[Finding]:
    """Who can use the gateways, which ask nobody for a password. A container's own network is not the outside."""
    doors = [door for door in _doors(settings) if door.port is not None and door.url]
    host = settings.gateway.gateway_host
    if not doors or is_loopback(host):
        return []
    remedy = "GATEWAY_HOST=127.0.0.1, unless that is meant"
    inside = " and ".join(door.name for door in doors if is_loopback(urlsplit(door.url).hostname or ""))
    if inside:
        words = f"{inside} can be used from this machine only, but through the gateway on {host} from any other"
        return [Finding("gateway", "note", words, remedy)]
    if in_container:
        return []
    return [Finding("gateway", "note", f"on {host} whoever can reach this machine is let in: no password", remedy)]


def in_container(root: Path = Path("/"), environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this runs in a container, as far as Docker, Podman and Kubernetes show it."""
    marks = (root / ".dockerenv", root / "run" / ".containerenv")
    return any(mark.exists() for mark in marks) or "KUBERNETES_SERVICE_HOST" in environment


async def _comfyui(settings: Settings, gpus: Gpus | None) -> list[Finding]:
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


def _state(settings: Settings) -> Finding:
    directory = settings.service.vram_state_dir
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        words = f"{directory} cannot be written ({error.strerror}): history is kept in memory only"
        return Finding("state", "note", words, "mount a volume there that this user may write, or set VRAM_STATE_DIR")
    return Finding("state", "fine", f"{directory} can be written")


def _daemon(settings: Settings) -> Finding:
    try:
        reply = call("GET", "/health", timeout_seconds=5.0)
    except Unreachable as error:
        return Finding("daemon", "note", str(error), "start it with: vram-manager run")
    words = f"version {reply.body['version']} answers on {settings.service.vram_socket}: {reply.body['status']}"
    if reply.status != 200:
        return Finding("daemon", "wrong", words, "its cycle has stalled: restart it, and report what its log says")
    return Finding("daemon", "fine", words)
