"""A story on a simulated GPU, with the real daemon: what it does, seen live, in under 40 seconds."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import httpx

from vram_manager import config
from vram_manager.backends.comfyui import HttpComfyUI
from vram_manager.backends.http import JsonClient
from vram_manager.backends.ollama import HttpOllama
from vram_manager.clock import Clock
from vram_manager.config import Settings
from vram_manager.daemon import Daemon, build, log_to
from vram_manager.domain.event import EventType
from vram_manager.domain.size import GIB, gib
from vram_manager.gateway.waiting import WAITED_HEADER
from vram_manager.journal import Entry
from vram_manager.simulator.comfyui_executor import ComfyUISettings as ComfyUIPace
from vram_manager.simulator.ollama_runner import OllamaSettings as OllamaPace
from vram_manager.simulator.serve import serving
from vram_manager.simulator.world import World, txt2img
from vram_manager.store import Store

GPU_GIB = 12.0
MODEL = "llama3.1:8b"
# By default half a minute, in which nobody would watch.
COOLDOWN_SECONDS = 5.0
# A fast disk, few steps, short answers: nobody watches a demo for minutes.
DISK_BYTES_PER_SECOND = 6.0 * GIB
STEPS, TOKENS = 4, 24
# Nothing in the story takes half as long; a demo that hangs is worse than one that says so.
SCENE_SECONDS = 30.0


def _bar(share: float, width: int) -> str:
    """A share of 0..1 as a bar."""
    filled = max(0, min(width, round(share * width)))
    return "#" * filled + "." * (width - filled)


@dataclass(frozen=True, slots=True)
class Chat:
    """One chat as its user felt it."""

    gpu_percent: float
    tokens_per_second: float
    waited_seconds: float


class _Stage:
    """Where the story is told: narration, the daemon's own log lines, and the card's memory as a bar."""

    def __init__(self) -> None:
        self._colour = sys.stdout.isatty()

    def say(self, words: str) -> None:
        click.echo("\n" + click.style(words, bold=True), color=self._colour)

    def write(self, line: str) -> None:
        """A line of the daemon's log, as `docker logs` would show it."""
        strong = any(word in line for word in ("Freed", "CPU fallback", "Repaired"))
        words = line.rstrip()
        click.echo("   daemon | " + click.style(words, fg="green" if strong else None), color=self._colour)

    def bar(self, world: World) -> None:
        ledger = world.ledger
        usable = ledger.total_bytes - ledger.reserved_bytes
        holders = ledger.holders()
        ollama = sum(size for name, size in holders.items() if name.startswith("ollama"))
        comfyui = sum(size for name, size in holders.items() if name.startswith("comfyui"))
        share = 1 - ledger.free_bytes / usable
        words = f"   card   | [{_bar(share, 24)}] {share * 100:3.0f} %  ComfyUI {gib(comfyui)}, Ollama {gib(ollama)}"
        click.echo(click.style(words, dim=True), color=self._colour)


def play(*, fast: bool) -> int:
    """Plays the story; 0 when it ended as it should."""
    try:
        return asyncio.run(_play(0.5 if fast else 1.0))
    except (TimeoutError, httpx.TimeoutException):
        click.echo("The demo took longer than it ever should: is this machine very busy?", err=True)
        return 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Urls:
    """Where everybody is: the two servers, and the gateways in front of them."""

    ollama: str
    comfyui: str
    ollama_gateway: str
    comfyui_gateway: str


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _settings(ollama_url: str, comfyui_url: str, directory: Path) -> Settings:
    """The defaults but for one, whatever the environment says: a demo must not depend on somebody's settings."""
    return config.defaults(
        ollama={"ollama_url": ollama_url},
        comfyui={"comfyui_url": comfyui_url},
        policy={"vram_free_cooldown": COOLDOWN_SECONDS},
        gateway={"gateway_ollama_port": _free_port(), "gateway_comfyui_port": _free_port()},
        service={"vram_socket": directory / "vram.sock", "vram_state_dir": directory},
    )


@contextlib.asynccontextmanager
async def _daemon_on(world: World, settings: Settings) -> AsyncIterator[Daemon]:
    """The real daemon: only the GPU's numbers come from the simulator, as there may be no GPU here."""
    ollama = HttpOllama(JsonClient(settings.ollama.ollama_url, headers={}, name="ollama"))
    comfyui = HttpComfyUI(JsonClient(settings.comfyui.comfyui_url, headers={}, name="comfyui"))
    store = Store.open(settings.service.vram_state_dir)
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
    world = World(
        GPU_GIB,
        ollama_settings=OllamaPace(load_bytes_per_second=DISK_BYTES_PER_SECOND),
        comfyui_settings=ComfyUIPace(disk_bytes_per_second=DISK_BYTES_PER_SECOND),
    )
    with tempfile.TemporaryDirectory(prefix="vram-manager-demo-") as directory:
        async with (
            world,
            serving(world.ollama.app) as ollama_url,
            serving(world.comfyui.app) as comfyui_url,
            httpx.AsyncClient(timeout=SCENE_SECONDS, trust_env=False) as http,
        ):
            stage.say(
                f"One GPU of {GPU_GIB:.0f} GiB (simulated), an Ollama and a ComfyUI on it, and vram-manager beside\n"
                f"(VRAM_FREE_COOLDOWN={COOLDOWN_SECONDS:g}, to keep the story short)."
            )
            settings = _settings(ollama_url, comfyui_url, Path(directory))
            async with _daemon_on(world, settings) as daemon:
                gateway = settings.gateway
                urls = _Urls(
                    ollama=ollama_url,
                    comfyui=comfyui_url,
                    ollama_gateway=f"http://127.0.0.1:{gateway.gateway_ollama_port}",
                    comfyui_gateway=f"http://127.0.0.1:{gateway.gateway_comfyui_port}",
                )
                await asyncio.sleep(pause)
                show = _Show(stage, world, daemon, http, urls, pause)
                before, freed = await show.fallback()
                after = await show.repair()
                through = await show.gateways()
    return _sum_up(stage, before, freed, after, through)


@dataclass(frozen=True, slots=True)
class _Show:
    """The scenes, in their order."""

    stage: _Stage
    world: World
    daemon: Daemon
    http: httpx.AsyncClient
    urls: _Urls
    pause: float

    async def fallback(self) -> tuple[Chat, Entry]:
        """Scenes 1 to 3: past the gateways, a chat falls to the CPU, and ComfyUI is freed."""
        stage, urls = self.stage, self.urls
        fell = _first(self.daemon, EventType.CPU_FALLBACK)
        freed = _first(self.daemon, EventType.FREED)
        stage.say("1. An artist renders an image in ComfyUI, then goes for a coffee.")
        await self._image(urls.comfyui, seed=1)
        stage.say("   The image is done. ComfyUI keeps its models on the card, for ever.")
        stage.bar(self.world)
        await asyncio.sleep(self.pause)

        stage.say(f"2. Somebody opens a chat with {MODEL}. There is not enough room left for all of it.")
        chatting = asyncio.create_task(_chat(self.http, urls.ollama, urls.ollama))
        await asyncio.wait_for(fell, SCENE_SECONDS)
        stage.bar(self.world)

        stage.say("3. vram-manager looks again, frees the idle ComfyUI, and proves that the memory came back.")
        entry = await asyncio.wait_for(freed, SCENE_SECONDS)
        stage.bar(self.world)
        chat = await chatting
        stage.say(
            f"   The chat itself crawled on at {chat.tokens_per_second:.0f} tokens/s with "
            f"{chat.gpu_percent:.0f} % of the model on the GPU: Ollama never moves a loaded model."
        )
        return chat, entry

    async def repair(self) -> Chat:
        """Scene 4: the model is loaded anew without anybody's doing."""
        repaired = _first(self.daemon, EventType.REPAIRED)
        self.stage.say("4. While nobody uses it, vram-manager has the model loaded again, all of it on the GPU.")
        await asyncio.wait_for(repaired, SCENE_SECONDS)
        self.stage.bar(self.world)
        chat = await _chat(self.http, self.urls.ollama, self.urls.ollama)
        self.stage.say(f"   The next question is answered at {chat.tokens_per_second:.0f} tokens/s.")
        await asyncio.sleep(self.pause)
        return chat

    async def gateways(self) -> Chat:
        """Scene 5: the same two through the gateways."""
        stage, urls = self.stage, self.urls
        stage.say("5. Now both come through the gateways: the next image, and right after it the next chat.")
        image_waited = await self._image(urls.comfyui_gateway, seed=2)
        stage.bar(self.world)
        chat = await _chat(self.http, urls.ollama_gateway, urls.ollama)
        stage.bar(self.world)
        stage.say(
            f"   The image waited {image_waited:.1f} s for the idle model to leave, "
            f"the chat {chat.waited_seconds:.1f} s for ComfyUI to be freed."
        )
        return chat

    async def _image(self, url: str, *, seed: int) -> float:
        """Renders an image, asked for at `url`; how long its prompt was held there, seconds."""
        reply = await self.http.post(f"{url}/prompt", json={"prompt": txt2img(steps=STEPS, seed=seed)})
        reply.raise_for_status()
        async with asyncio.timeout(SCENE_SECONDS):
            while (await self.http.get(f"{self.urls.comfyui}/prompt")).json()["exec_info"]["queue_remaining"]:
                await asyncio.sleep(0.2)
        return _waited_seconds(reply)


def _first(daemon: Daemon, kind: EventType) -> asyncio.Future[Entry]:
    """The first event of that kind from now on."""
    found: asyncio.Future[Entry] = asyncio.get_running_loop().create_future()

    def note(entry: Entry) -> None:
        if entry.event.type is kind and not found.done():
            found.set_result(entry)

    daemon.journal.listen(note)
    return found


async def _chat(http: httpx.AsyncClient, url: str, ollama_url: str) -> Chat:
    """A question asked at `url`; where the model was is asked of Ollama itself."""
    body = {"model": MODEL, "prompt": "Tell me about lighthouses.", "stream": False, "options": {"num_predict": TOKENS}}
    reply = await http.post(f"{url}/api/generate", json=body)
    answer: dict[str, Any] = reply.raise_for_status().json()
    loaded = (await http.get(f"{ollama_url}/api/ps")).json()["models"][0]
    return Chat(
        gpu_percent=100 * loaded["size_vram"] / loaded["size"],
        tokens_per_second=answer["eval_count"] / (answer["eval_duration"] / 1e9),
        waited_seconds=_waited_seconds(reply),
    )


def _waited_seconds(reply: httpx.Response) -> float:
    return float(reply.headers.get(WAITED_HEADER.decode(), 0.0))


def _sum_up(stage: _Stage, before: Chat, freed: Entry, after: Chat, through: Chat) -> int:
    event = freed.event
    stage.say("What happened")
    click.echo(f"   before   {before.gpu_percent:4.0f} % on the GPU  {before.tokens_per_second:6.1f} tokens/s")
    click.echo(
        f"   freed    {gib(event.freed_bytes)} of ComfyUI in {event.took_seconds:.1f} s, because {event.reason}"
        f" ({event.used_percent_before:.0f} % -> {event.used_percent_after:.0f} % used)"
    )
    click.echo(f"   after    {after.gpu_percent:4.0f} % on the GPU  {after.tokens_per_second:6.1f} tokens/s")
    click.echo(
        f"   gateway  {through.gpu_percent:4.0f} % on the GPU  {through.tokens_per_second:6.1f} tokens/s, "
        f"after a wait of {through.waited_seconds:.1f} s"
    )
    click.echo("\n   The artist's next image copies its models back from RAM; no node runs twice.")
    if after.gpu_percent < 99.0 or through.gpu_percent < 99.0 or before.gpu_percent > 99.0:
        click.echo("The story did not end as it should.", err=True)
        return 1
    click.echo("   For your own stack: docker compose up -d, then docker logs -f vram-manager")
    return 0
