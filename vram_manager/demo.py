"""A story on a simulated GPU, with the real daemon: what it does, seen live, in under 40 seconds."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import httpx

from vram_manager.backends.comfyui import HttpComfyUI
from vram_manager.backends.http import JsonClient
from vram_manager.backends.ollama import HttpOllama
from vram_manager.clock import Clock
from vram_manager.config import (
    AdmissionSettings,
    ComfyUISettings,
    GpuSettings,
    OllamaSettings,
    PolicySettings,
    ServiceSettings,
    Settings,
)
from vram_manager.daemon import Daemon, build, log_to
from vram_manager.domain.event import EventType
from vram_manager.domain.size import gib
from vram_manager.journal import Entry
from vram_manager.report import bar
from vram_manager.simulator.serve import serving
from vram_manager.simulator.world import World, txt2img
from vram_manager.store import Store

GPU_GIB = 12.0
MODEL = "llama3.1:8b"
# Nothing in the story takes half as long; a demo that hangs is worse than one that says so.
SCENE_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Chat:
    """One chat as its user felt it."""

    gpu_percent: float
    tokens_per_second: float
    seconds: float


class _Stage:
    """Where the story is told: narration, the daemon's own log lines, and the card's memory as a bar."""

    def __init__(self) -> None:
        self._colour = sys.stdout.isatty()

    def say(self, words: str) -> None:
        click.echo("\n" + click.style(words, bold=True), color=self._colour)

    def write(self, line: str) -> None:
        """A line of the daemon's log, as `docker logs` would show it."""
        strong = "Freed" in line or "CPU fallback" in line
        words = line.rstrip()
        click.echo("   daemon | " + click.style(words, fg="green" if strong else None), color=self._colour)

    def bar(self, world: World) -> None:
        ledger = world.ledger
        usable = ledger.total_bytes - ledger.reserved_bytes
        holders = ledger.holders()
        ollama = sum(size for name, size in holders.items() if name.startswith("ollama"))
        comfyui = sum(size for name, size in holders.items() if name.startswith("comfyui"))
        share = 1 - ledger.free_bytes / usable
        words = f"   card   | [{bar(share, 24)}] {share * 100:3.0f} %  ComfyUI {gib(comfyui)}, Ollama {gib(ollama)}"
        click.echo(click.style(words, dim=True), color=self._colour)


def play(*, fast: bool) -> int:
    """Plays the story; 0 when it ended as it should."""
    try:
        return asyncio.run(_play(1.0 if fast else 2.0))
    except TimeoutError:
        click.echo("The demo took longer than it ever should: is this machine very busy?", err=True)
        return 1


def _settings(ollama_url: str, comfyui_url: str, directory: Path) -> Settings:
    """The defaults, whatever the environment says: a demo must not depend on somebody's settings."""
    return Settings.model_construct(
        ollama=OllamaSettings.model_construct(ollama_url=ollama_url),
        comfyui=ComfyUISettings.model_construct(comfyui_url=comfyui_url),
        policy=PolicySettings.model_construct(),
        gpu=GpuSettings.model_construct(),
        admission=AdmissionSettings.model_construct(),
        service=ServiceSettings.model_construct(vram_socket=directory / "vram.sock", vram_state_dir=directory),
    )


@contextlib.asynccontextmanager
async def _daemon_on(world: World, ollama_url: str, comfyui_url: str, directory: Path) -> AsyncIterator[Daemon]:
    """The real daemon: only the GPU's numbers come from the simulator, as there may be no GPU here."""
    settings = _settings(ollama_url, comfyui_url, directory)
    ollama = HttpOllama(JsonClient(ollama_url, headers={}, name="ollama"))
    comfyui = HttpComfyUI(JsonClient(comfyui_url, headers={}, name="comfyui"))
    store = Store.open(directory)
    daemon = build(settings, Clock.of_running_loop(), store, gpus=world.gpus, ollama=ollama, comfyui=comfyui)
    work = asyncio.create_task(daemon.run())
    try:
        async with daemon.listening():
            yield daemon
    finally:
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        await ollama.aclose()
        await comfyui.aclose()
        daemon.close()


async def _play(pause: float) -> int:
    stage = _Stage()
    log_to(stage, json_lines=False, debug=False)
    with tempfile.TemporaryDirectory(prefix="vram-manager-demo-") as directory:
        async with (
            World(GPU_GIB) as world,
            serving(world.ollama.app) as ollama_url,
            serving(world.comfyui.app) as comfyui_url,
            httpx.AsyncClient(timeout=SCENE_SECONDS, trust_env=False) as http,
        ):
            stage.say(
                f"One GPU of {GPU_GIB:.0f} GiB (simulated), an Ollama and a ComfyUI on it, and vram-manager beside."
            )
            async with _daemon_on(world, ollama_url, comfyui_url, Path(directory)) as daemon:
                fell = _first(daemon, EventType.CPU_FALLBACK)
                freed = _first(daemon, EventType.FREED)
                await asyncio.sleep(pause)

                stage.say("1. An artist renders an image in ComfyUI, then goes for a coffee.")
                await http.post(f"{comfyui_url}/prompt", json={"prompt": txt2img(steps=12)})
                await _until_idle(http, comfyui_url)
                stage.say("   The image is done. ComfyUI keeps its models on the card, for ever.")
                stage.bar(world)
                await asyncio.sleep(pause + 1.0)

                stage.say(f"2. Somebody opens a chat with {MODEL}. There is not enough room left for all of it.")
                chatting = asyncio.create_task(_chat(http, ollama_url))
                await asyncio.wait_for(asyncio.shield(fell), SCENE_SECONDS)
                stage.bar(world)

                stage.say("3. vram-manager looks again, frees the idle ComfyUI, and proves that the memory came back.")
                entry = await asyncio.wait_for(asyncio.shield(freed), SCENE_SECONDS)
                stage.bar(world)
                first = await chatting
                stage.say(
                    f"   The chat itself crawled on at {first.tokens_per_second:.0f} tokens/s with "
                    f"{first.gpu_percent:.0f} % of the model on the GPU: Ollama never moves a loaded model."
                )

                stage.say("4. The next load is the one that gains: the model is unloaded and asked again.")
                await http.post(f"{ollama_url}/api/generate", json={"model": MODEL, "keep_alive": 0})
                await _until_unloaded(http, ollama_url)
                second = await _chat(http, ollama_url)
                await asyncio.sleep(pause / 2)
                stage.bar(world)
    return _sum_up(stage, first, second, entry)


def _first(daemon: Daemon, kind: EventType) -> asyncio.Future[Entry]:
    """The first event of that kind from now on."""
    found: asyncio.Future[Entry] = asyncio.get_running_loop().create_future()

    def note(entry: Entry) -> None:
        if entry.event.type is kind and not found.done():
            found.set_result(entry)

    daemon.journal.listen(note)
    return found


async def _until_idle(http: httpx.AsyncClient, url: str) -> None:
    async with asyncio.timeout(SCENE_SECONDS):
        while (await http.get(f"{url}/prompt")).json()["exec_info"]["queue_remaining"]:
            await asyncio.sleep(0.2)


async def _until_unloaded(http: httpx.AsyncClient, url: str) -> None:
    async with asyncio.timeout(SCENE_SECONDS):
        while (await http.get(f"{url}/api/ps")).json()["models"]:
            await asyncio.sleep(0.2)


async def _chat(http: httpx.AsyncClient, url: str) -> Chat:
    body = {"model": MODEL, "prompt": "Tell me about lighthouses.", "stream": False}
    reply: dict[str, Any] = (await http.post(f"{url}/api/generate", json=body)).json()
    loaded = (await http.get(f"{url}/api/ps")).json()["models"][0]
    return Chat(
        gpu_percent=100 * loaded["size_vram"] / loaded["size"],
        tokens_per_second=reply["eval_count"] / (reply["eval_duration"] / 1e9),
        seconds=reply["total_duration"] / 1e9,
    )


def _sum_up(stage: _Stage, first: Chat, second: Chat, entry: Entry) -> int:
    event = entry.event
    stage.say("What happened")
    click.echo(f"   before   {first.gpu_percent:4.0f} % on the GPU  {first.tokens_per_second:6.1f} tokens/s")
    click.echo(
        f"   freed    {gib(event.freed_bytes)} of ComfyUI in {event.took_seconds:.1f} s, because {event.reason}"
        f" ({event.used_percent_before:.0f} % -> {event.used_percent_after:.0f} % used)"
    )
    click.echo(f"   after    {second.gpu_percent:4.0f} % on the GPU  {second.tokens_per_second:6.1f} tokens/s")
    click.echo("\n   The artist's next image copies its models back from RAM; no node runs twice.")
    if second.gpu_percent < 99.0 or first.gpu_percent > 99.0:
        click.echo("The story did not end as it should.", err=True)
        return 1
    click.echo("   For your own stack: docker compose up -d, then docker logs -f vram-manager")
    return 0
