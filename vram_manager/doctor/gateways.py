"""The gateways: whether they listen, what answers behind them, and who is let in."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from vram_manager import config
from vram_manager.backends.comfyui import HttpComfyUI
from vram_manager.backends.http import JsonClient
from vram_manager.backends.ollama import HttpOllama
from vram_manager.config import Settings
from vram_manager.doctor.finding import Finding
from vram_manager.errors import SensorError
from vram_manager.gateway.head import is_loopback

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


async def gateways(settings: Settings, *, running: bool) -> list[Finding]:
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
