"""Further Ollama servers: what each has loaded, and whether on its GPU or its CPU.

Each is asked in a task of its own, so none delays another, and a lost one makes nothing else worse: no decision
hangs on them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

from vram_manager.backends import Ollama
from vram_manager.clock import Clock
from vram_manager.config import LookingSettings, without_secrets
from vram_manager.domain.event import Event, EventType
from vram_manager.domain.reading import Missing, Seen
from vram_manager.domain.snapshot import LoadedModel, OllamaState
from vram_manager.errors import SensorError, TimedOut
from vram_manager.summary import placed, verdict

NODE_SECONDS: Final = 15.0
# A node that is gone is looked for less and less often, but not for longer than a coffee.
NODE_SLOWEST_SECONDS: Final = 120.0
# 25 s: the longest that the calls behind one look may take (backends/ollama.py: 15 s for ps, 5 s for version).
NODE_DEADLINE_SECONDS: Final = 25.0
# Four looks: a node that is slow at times is no lost one.
NODE_LIMIT_SECONDS: Final = 60.0


def checked(url: str) -> str:
    """The base URL of a server without a slash at its end. Raises ValueError with what is allowed."""
    stripped = url.strip().rstrip("/")
    try:
        parts = urlsplit(stripped)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        good = good and stripped.isprintable() and not set(stripped) & set(" ?#")
    except ValueError:
        good = False
    if not good:
        raise ValueError(f"{without_secrets(url)!r}: must be an http:// or https:// URL, such as http://box:11434")
    return stripped


@dataclass(slots=True)
class _Node:
    """`url` is as it may be shown. `lost`: that was told."""

    url: str
    server: Ollama
    reading: Seen[OllamaState] | Missing = Missing("not asked yet")
    tried: bool = False
    lost: bool = False
    pause_seconds: float = NODE_SECONDS


class Nodes:
    """What was last seen of each further Ollama."""

    def __init__(self, clock: Clock, servers: Mapping[str, Ollama], tell: Callable[[Event], object]) -> None:
        self._clock = clock
        self._nodes = [_Node(without_secrets(url), server) for url, server in servers.items()]
        self._tell = tell

    async def run(self) -> None:
        """Asks all of them until cancelled. An error that is no SensorError is a bug and ends the process."""
        async with asyncio.TaskGroup() as tasks:
            for node in self._nodes:
                tasks.create_task(self._follow(node), name=f"read {node.url}")

    def views(self) -> list[dict[str, Any]]:
        """Every node for the API, in the order of the setting."""
        now = self._clock.monotonic()
        return [view(node.url, node.reading if node.tried else None, now) for node in self._nodes]

    async def aclose(self) -> None:
        """No connection is left open."""
        for node in self._nodes:
            await node.server.aclose()

    async def _follow(self, node: _Node) -> None:
        while True:
            node.reading = await looked(node.server, node.reading, self._clock)
            node.tried = True
            missing = isinstance(node.reading, Missing)
            node.pause_seconds = min(NODE_SLOWEST_SECONDS, node.pause_seconds * 2) if missing else NODE_SECONDS
            self._announce(node)
            await asyncio.sleep(node.pause_seconds)

    def _announce(self, node: _Node) -> None:
        """Once when it is lost, once when it is back. One that is there from the start is not worth a word."""
        match node.reading:
            case Missing(why=why, remedy=remedy) if not node.lost:
                node.lost = True
                words = f"{why}; {remedy}" if remedy else why
                self._tell(Event(type=EventType.SENSOR_LOST, target=f"node:{node.url}", reason=words))
            case Seen(value=value) if node.lost:
                node.lost = False
                words = f"version {value.version}" if isinstance(value.version, str) else "version unknown"
                self._tell(Event(type=EventType.SENSOR_BACK, target=f"node:{node.url}", reason=words))


async def looked(server: Ollama, before: Seen[OllamaState] | Missing, clock: Clock) -> Seen[OllamaState] | Missing:
    """One look. Slow is not down: for a while the reading `before` outlives a look that ran out of time."""
    last = before.at if isinstance(before, Seen) else before.last_seen_at
    try:
        async with asyncio.timeout(NODE_DEADLINE_SECONDS):
            return Seen(await server.models(), clock.monotonic())
    except (TimeoutError, TimedOut) as error:
        if isinstance(before, Seen) and clock.monotonic() - before.at <= NODE_LIMIT_SECONDS:
            return before
        why = error.why if isinstance(error, TimedOut) else f"no answer within {NODE_DEADLINE_SECONDS:g} s"
        return Missing(why, None, last)
    except SensorError as error:
        return Missing(error.why, error.remedy, last)


def view(url: str, reading: Seen[OllamaState] | Missing | None, now: float) -> dict[str, Any]:
    """One node for the API; None was not tried yet. What is not known is null."""
    told: dict[str, Any] = {
        "url": url,
        "state": "unread" if reading is None else "missing",
        "why": "not asked yet" if reading is None else None,
        "remedy": None,
        "age_seconds": None,
        "version": None,
        "models": None,
    }
    match reading:
        case Missing(why=why, remedy=remedy, last_seen_at=last):
            told |= {"why": why, "remedy": remedy, "age_seconds": None if last is None else round(now - last, 3)}
        case Seen(value=value, at=at):
            told |= {
                "state": "ok",
                "age_seconds": round(now - at, 3),
                "version": value.version if isinstance(value.version, str) else None,
                "models": [model_view(model) for model in value.models],
            }
    vram, ram = placed(told["models"])
    return told | {"verdict": verdict(told["models"]), "vram_bytes": vram, "ram_bytes": ram}


def model_view(model: LoadedModel) -> dict[str, Any]:
    """One loaded model for the API."""
    return {
        "name": model.name,
        "digest": model.digest,
        "size_bytes": model.size_bytes,
        "size_vram_bytes": model.size_vram_bytes,
        "cpu_ratio": None if isinstance(model.cpu_ratio, Missing) else round(model.cpu_ratio, 4),
        "context_length": model.context_length,
        "expires_at": model.expires_at.isoformat() if model.expires_at else None,
        "requests": model.requests,
    }


def look(urls: Sequence[str], known: Sequence[dict[str, Any]] = (), *, measure: bool = False) -> list[dict[str, Any]]:
    """The servers at `urls` as they answer now, asked from here; with `measure` they are measured. Blocks.

    Without `urls` those of `known` are measured that tell nothing of where they run: what is loaded would.
    """
    if not urls:
        real = {without_secrets(url): url for url in LookingSettings().ollama_nodes}
        urls = [real.get(node["url"], node["url"]) for node in known if node["verdict"] in ("idle", "unknown")]
    return asyncio.run(_look(urls, measure=measure))


async def _look(urls: Sequence[str], *, measure: bool) -> list[dict[str, Any]]:
    clock = Clock.of_running_loop()
    return list(await asyncio.gather(*(_asked(url, clock, measure=measure) for url in dict.fromkeys(urls))))


async def _asked(url: str, clock: Clock, *, measure: bool) -> dict[str, Any]:
    # In the daemon they are there already; where only a snapshot is read they are not worth their time.
    from vram_manager.backends.http import JsonClient  # noqa: PLC0415
    from vram_manager.backends.ollama import HttpOllama  # noqa: PLC0415
    from vram_manager.measure import as_json, measured, not_measured  # noqa: PLC0415

    client = JsonClient(url, name=without_secrets(url))
    server = HttpOllama(client)
    unread = Missing("not asked yet")

    async def now() -> dict[str, Any]:
        return view(without_secrets(url), await looked(server, unread, clock), clock.monotonic())

    try:
        told = await now()
        if measure and told["state"] == "ok":
            try:
                speed = as_json(await measured(client))
            except SensorError as error:
                speed = not_measured(f"{error.why}; {error.remedy}" if error.remedy else error.why)
            # What it was measured with may still be loaded, and shows where.
            after = await now()
            told = {**(after if after["state"] == "ok" else told), "measured": speed}
        return {**told, "asked_at": clock.utcnow().isoformat()}
    finally:
        await server.aclose()
