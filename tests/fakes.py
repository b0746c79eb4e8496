"""A rim without servers: recording fakes of the three protocols, and the spine wired over them.

Memory is one pretended card whose holders the tenants share. Every call takes `takes_seconds` (so that no test
can loop without time going by), then raises `error` if one is set, then answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from vram_manager import config
from vram_manager.actuator import Actuator
from vram_manager.clock import Clock
from vram_manager.config import SOFT_FREE_BODY
from vram_manager.cycle import Cycle
from vram_manager.daemon import Daemon, build
from vram_manager.domain.event import Event, EventType
from vram_manager.domain.model_facts import ModelFacts, StoredModel
from vram_manager.domain.reading import Missing
from vram_manager.domain.snapshot import (
    ComfyUIState,
    Gpu,
    GpuMemory,
    Gpus,
    LoadedModel,
    OllamaState,
    ProcessMemory,
    TorchDevice,
)
from vram_manager.errors import Rejected, SensorError
from vram_manager.journal import Entry, Journal
from vram_manager.observer import Observer
from vram_manager.policy import Rules
from vram_manager.store import Peak, Row, Store

MIB = 2**20
GIB = 2**30
# The version before weights could hide from torch's numbers: what ComfyUI holds is what it says.
LEGACY = "0.3.40"


class Card:
    """One GPU; whoever holds memory on it does so under a name."""

    def __init__(self, uuid: str = "GPU-a", total_gib: float = 24, **holders: int) -> None:
        self.uuid = uuid
        self.total_bytes = int(total_gib * GIB)
        self.holders = dict(holders)
        self.broken: Missing | None = None
        self.utilization_percent: int | Missing = 3

    @property
    def free_bytes(self) -> int:
        return max(0, self.total_bytes - sum(self.holders.values()))

    def memory(self) -> GpuMemory:
        free = self.free_bytes
        return GpuMemory(
            total_bytes=self.total_bytes, used_bytes=self.total_bytes - free, free_bytes=free, reserved_bytes=0
        )


class Faked:
    """What all fakes share: how long a call takes and how it fails."""

    def __init__(self) -> None:
        self.takes_seconds = 0.01
        self.error: Exception | None = None
        self.closed = False

    async def answer(self) -> None:
        """Takes its time, then fails as it is told to."""
        error = self.error
        await asyncio.sleep(self.takes_seconds)
        if error is not None:
            raise error


class FakeGpus(Faked):
    """A GpuSensor over some cards."""

    def __init__(self, *cards: Card) -> None:
        super().__init__()
        self.cards = list(cards)
        self.reads: list[tuple[float, bool]] = []
        self.processes: dict[str, tuple[ProcessMemory, ...]] = {}

    async def read(self, *, with_processes: bool = False) -> Gpus:
        self.reads.append((now(), with_processes))
        await self.answer()
        gpus = tuple(self._gpu(index, card, with_processes) for index, card in enumerate(self.cards))
        return Gpus(gpus=gpus, driver_version="580.95.05")

    def _gpu(self, index: int, card: Card, with_processes: bool) -> Gpu:
        gpu = Gpu(
            uuid=card.uuid,
            index=index,
            name=f"Fake card {index}",
            memory=card.broken or card.memory(),
            utilization_percent=card.utilization_percent,
        )
        if not with_processes:
            return gpu
        return Gpu(
            uuid=gpu.uuid,
            index=index,
            name=gpu.name,
            memory=gpu.memory,
            utilization_percent=gpu.utilization_percent,
            temperature_celsius=41,
            power_watts=17.5,
            processes=self.processes.get(card.uuid, ()),
        )

    def close(self) -> None:
        self.closed = True


class FakeOllama(Faked):
    """An Ollama whose models are set by the test."""

    def __init__(self, card: Card) -> None:
        super().__init__()
        self.card = card
        self.version: str | Missing = "0.33.1"
        self.listed: dict[str, LoadedModel] = {}
        self.looks: list[float] = []
        self.unloads: list[str] = []
        self.unload_error: Exception | None = None
        self.loads: list[tuple[str, int | None, float | None]] = []
        self.load_error: Exception | None = None
        self.gib: dict[str, float] = {}
        self.stored: dict[str, StoredModel] = {}
        self.facts: dict[str, ModelFacts] = {}
        self.questions: list[str] = []

    def load(
        self,
        model: str,
        gib: float | None = None,
        *,
        on_gpu: float = 1.0,
        context: int | None = None,
        keep_alive_seconds: float | None = None,
    ) -> Awaitable[None] | None:
        """With `gib` a test says that the model is loaded; without, it is asked to load it, as in the protocol."""
        if gib is None:
            return self._load(model, context, keep_alive_seconds)
        self.hold(model, gib, on_gpu=on_gpu)
        return None

    async def _load(self, model: str, context: int | None, keep_alive_seconds: float | None) -> None:
        """It then takes `gib[model]`, or 1 GiB, all of it on the card."""
        self.loads.append((model, context, keep_alive_seconds))
        await self.answer()
        if self.load_error is not None:
            raise self.load_error
        if model not in self.listed:
            self.hold(model, self.gib.get(model, 1))

    def hold(self, name: str, gib: float, *, on_gpu: float = 1.0) -> None:
        """`name` is loaded, the given share of it on the card."""
        size = int(gib * GIB)
        vram = int(size * on_gpu)
        self.listed[name] = LoadedModel(
            name=name,
            digest=f"sha256:{name}",
            size_bytes=size,
            size_vram_bytes=vram,
            context_length=4096,
            expires_at=datetime(2026, 1, 1, tzinfo=UTC),
        )
        self.card.holders[f"ollama:{name}"] = vram

    def drop(self, name: str) -> None:
        """`name` is gone, and its memory with it."""
        del self.listed[name]
        del self.card.holders[f"ollama:{name}"]

    async def models(self) -> OllamaState:
        self.looks.append(now())
        await self.answer()
        return OllamaState(version=self.version, models=tuple(self.listed.values()))

    async def library(self) -> Mapping[str, StoredModel]:
        self.questions.append("library")
        await self.answer()
        return dict(self.stored)

    async def show(self, model: str) -> ModelFacts:
        self.questions.append(f"show {model}")
        await self.answer()
        if model not in self.facts:
            raise Rejected(f"POST /api/show: HTTP 404: model '{model}' not found")
        return self.facts[model]

    async def unload(self, model: str) -> None:
        self.unloads.append(model)
        await self.answer()
        if self.unload_error is not None:
            raise self.unload_error
        if model in self.listed:
            self.drop(model)

    async def aclose(self) -> None:
        self.closed = True


class FakeComfyUI(Faked):
    """A ComfyUI that acts on a free `acts_after_seconds` after it came, if it acts at all."""

    def __init__(self, card: Card) -> None:
        super().__init__()
        self.card = card
        self.version: str | Missing = LEGACY
        self.argv: tuple[str, ...] = ("main.py", "--listen")
        self.remaining = 0
        self.looks: list[float] = []
        self.polls: list[float] = []
        self.posts: list[tuple[float, dict[str, bool]]] = []
        self.posting = 0
        self.most_posting_at_once = 0
        self.post_takes_seconds = 0.01
        self.post_error: Exception | None = None
        self.queue_error: Exception | None = None
        self.queue_takes_seconds = 0.0
        self.stats_takes_seconds = 0.0
        self.socket_error: SensorError | None = SensorError("GET /ws: connection refused")
        self.sockets: list[float] = []
        self.sockets_closed = 0
        self.acts_after_seconds: float | None = 1.0
        self.lost_flags = 0
        self.keeps_bytes = 0
        self.folders: dict[str, dict[str, int]] = {}
        self.workflows: list[object] = []
        self.questions: list[str] = []
        self._pushed: asyncio.Queue[int | SensorError] = asyncio.Queue()

    def hold(self, gib: float) -> None:
        """Its models take `gib` on the card."""
        self.card.holders["comfyui"] = int(gib * GIB)

    @property
    def held_bytes(self) -> int:
        return self.card.holders.get("comfyui", 0)

    async def stats(self) -> ComfyUIState:
        self.looks.append(now())
        await asyncio.sleep(self.stats_takes_seconds)
        await self.answer()
        device = TorchDevice(
            name="cuda:0 Fake card 0",
            type="cuda",
            index=0,
            vram_total_bytes=self.card.total_bytes,
            vram_free_bytes=self.card.free_bytes,
            torch_total_bytes=self.held_bytes,
            torch_free_bytes=0,
        )
        return ComfyUIState(version=self.version, argv=self.argv, devices=(device,))

    async def queue_remaining(self) -> int:
        self.polls.append(now())
        remaining = self.remaining
        await asyncio.sleep(self.queue_takes_seconds)
        await self.answer()
        if self.queue_error is not None:
            raise self.queue_error
        return remaining

    async def prompts(self) -> tuple[object, ...]:
        self.questions.append("prompts")
        await self.answer()
        if self.queue_error is not None:
            raise self.queue_error
        return tuple(self.workflows[:20])

    async def statuses(self) -> AsyncGenerator[int, None]:
        self.sockets.append(now())
        await asyncio.sleep(self.takes_seconds)
        if self.socket_error is not None:
            raise self.socket_error
        try:
            yield self.remaining
            while True:
                told = await self._pushed.get()
                if isinstance(told, SensorError):
                    raise told
                yield told
        finally:
            self.sockets_closed += 1

    def push(self, remaining: int) -> None:
        """The queue changes, and the websocket says so."""
        self.remaining = remaining
        self._pushed.put_nowait(remaining)

    def lose_socket(self) -> None:
        self._pushed.put_nowait(SensorError("connection lost"))

    async def model_sizes(self, folder: str) -> Mapping[str, int]:
        self.questions.append(folder)
        await self.answer()
        if folder not in self.folders:
            raise Rejected(f"GET /experiment/models/{folder}: HTTP 404")
        return dict(self.folders[folder])

    async def free(self, body: Mapping[str, bool]) -> None:
        self.posts.append((now(), dict(body)))
        self.posting += 1
        self.most_posting_at_once = max(self.most_posting_at_once, self.posting)
        try:
            if self.lost_flags:
                self.lost_flags -= 1
            elif self.acts_after_seconds is not None and not self._refuses():
                asyncio.get_running_loop().call_later(self.acts_after_seconds, self._let_go)
            await asyncio.sleep(self.post_takes_seconds)
            if self.post_error is not None:
                raise self.post_error
        finally:
            self.posting -= 1

    def _refuses(self) -> bool:
        """An error other than a late answer means that the flags were never set."""
        return self.post_error is not None and type(self.post_error).__name__ != "TimedOut"

    def _let_go(self) -> None:
        self.card.holders["comfyui"] = min(self.held_bytes, self.keeps_bytes)

    async def aclose(self) -> None:
        self.closed = True


class FakeStore:
    """A store in a list. `append` may be told to fail."""

    def __init__(self, *rows: Row) -> None:
        self.rows = list(rows)
        self.measured: list[Peak] = []
        self.closed = False

    def append(self, rows: list[Row]) -> None:
        self.rows += rows

    def newest(self, limit: int) -> list[Row]:
        return self.rows[-limit:]

    def add_peaks(self, peaks: list[Peak]) -> None:
        self.measured += peaks

    def peaks(self) -> list[Peak]:
        return list(self.measured)

    def close(self) -> None:
        self.closed = True


def now() -> float:
    return asyncio.get_running_loop().time()


@dataclass
class WallClock:
    """A wall clock that a test can set; it goes on with the loop."""

    zero: datetime = datetime(2026, 7, 1, 12, tzinfo=UTC)
    ahead: timedelta = field(default_factory=timedelta)

    def __call__(self) -> datetime:
        return self.zero + self.ahead + timedelta(seconds=now())


# Quick rules: a model on the CPU is answered after 2 s of an idle ComfyUI, pressure after 5 s.
QUICK = Rules(grace_seconds=5.0, empty_room_grace_seconds=5.0, comfyui_idle_seconds=3.0)


class Spine:
    """Observer, actuator, journal and cycle over fakes of one card (or of the parts given)."""

    def __init__(
        self,
        *,
        rules: Rules = QUICK,
        card: Card | None = None,
        gpus: FakeGpus | None = None,
        ollama: bool = True,
        comfyui: bool = True,
        store: FakeStore | None = None,
        wall: WallClock | None = None,
    ) -> None:
        self.card = card or Card()
        self.gpus = gpus or FakeGpus(self.card)
        self.ollama = FakeOllama(self.card)
        self.comfyui = FakeComfyUI(self.card)
        self.wall = wall or WallClock()
        self.clock = Clock(asyncio.get_running_loop().time, self.wall)
        self.store = store or FakeStore()
        self.journal = Journal(self.clock, self.store)  # type: ignore[arg-type]
        rim = {
            "gpus": self.gpus,
            "ollama": self.ollama if ollama else None,
            "comfyui": self.comfyui if comfyui else None,
        }
        self.observer = Observer(
            self.clock,
            self.journal.record,
            interval_seconds=rules.interval_seconds,
            **rim,  # type: ignore[arg-type]
        )
        actuator = Actuator(self.clock, soft_body=SOFT_FREE_BODY, **rim)  # type: ignore[arg-type]
        self.cycle = Cycle(self.clock, self.observer, actuator, self.journal, rules)
        self.turns: list[float] = []
        self.cycle.on_turn = lambda seconds: self.turns.append(now())

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Observer and cycle work inside the block; what kills them ends the block with it."""
        async with asyncio.TaskGroup() as tasks:
            work = [tasks.create_task(self.observer.run()), tasks.create_task(self.cycle.run())]
            yield
            for task in work:
                task.cancel()

    def entries(self, *types: EventType) -> list[Entry]:
        return [entry for entry in self.journal.events() if not types or entry.event.type in types]

    def told(self, *types: EventType) -> list[Event]:
        return [entry.event for entry in self.entries(*types)]

    async def event(self, *types: EventType, nth: int = 1, within: float = 120) -> Entry:
        """The nth event of these types, once it has happened."""
        await until(lambda: len(self.entries(*types)) >= nth, within=within)
        return self.entries(*types)[nth - 1]


async def until(true: Callable[[], object], *, within: float = 120) -> None:
    """For virtual time: goes on once `true()` is."""
    deadline = now() + within
    while not true():
        assert now() < deadline, f"not within {within} s"
        await asyncio.sleep(0.05)


class Flight:
    """Once begun, the clock of this loop runs some twenty times as fast: a server's pauses at its end cost little."""

    def __init__(self) -> None:
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        self._task = asyncio.create_task(self._fly())

    async def end(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _fly(self) -> None:
        loop = asyncio.get_running_loop()
        time, ahead = loop.time, 0.0
        loop.time = lambda: time() + ahead  # type: ignore[method-assign]
        while True:
            ahead += 0.02
            await asyncio.sleep(0.001)


class InThread:
    """A whole daemon over fakes on its socket, in a thread and a loop of its own, for clients that block."""

    def __init__(self, *, wait_for_first_look: bool = True) -> None:
        self._wait_for_first_look = wait_for_first_look
        self.card = Card()
        self.gpus = FakeGpus(self.card)
        self.ollama = FakeOllama(self.card)
        self.comfyui = FakeComfyUI(self.card)
        self.comfyui.acts_after_seconds = 0.0
        self.comfyui.hold(8)
        self.daemon: Daemon | None = None
        self.path = Path()
        self.ahead = 0.0
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="daemon")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._turned = threading.Condition()
        self._turns = 0

    def __enter__(self) -> InThread:
        self._thread.start()
        assert self._ready.wait(20)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._thread.join(20)
        assert not self._thread.is_alive()

    def stop(self) -> None:
        """Ends the daemon as SIGTERM would; its socket goes."""
        if self._loop is not None and self._stop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._stop.set)

    def do(self, what: Callable[[], object]) -> None:
        """Does `what` on the daemon's loop."""
        assert self._loop is not None
        done = threading.Event()
        self._loop.call_soon_threadsafe(lambda: (what(), done.set()))
        assert done.wait(20)

    def until(self, true: Callable[[], object]) -> None:
        """Goes on once `true()` holds after some turn; each look asks for another turn."""
        assert self.daemon is not None
        for _ in range(20_000):
            before = self._turns
            self.do(self.daemon.observer.changed.set)
            with self._turned:
                assert self._turned.wait_for(lambda: self._turns > before, 20)  # noqa: B023 - called at once
            if true():
                return
        raise AssertionError("the daemon has not seen it in time")

    def _note_turns(self, daemon: Daemon, looked: asyncio.Event) -> None:
        before = daemon.cycle.on_turn

        def note(seconds: float) -> None:
            before(seconds)
            if daemon.cycle.snapshot is not None:
                looked.set()
            with self._turned:
                self._turns += 1
                self._turned.notify_all()

        daemon.cycle.on_turn = note

    def _run(self) -> None:
        try:
            asyncio.run(self._work())
        finally:
            self._ready.set()

    async def _work(self) -> None:
        settings = config.load()
        self.path = settings.service.vram_socket
        self._loop, self._stop = loop, _ = asyncio.get_running_loop(), asyncio.Event()
        clock = Clock(lambda: loop.time() + self.ahead, lambda: datetime.now(UTC))
        store = Store.open(settings.service.vram_state_dir)
        self.daemon = build(settings, clock, store, gpus=self.gpus, ollama=self.ollama, comfyui=self.comfyui)
        looked = asyncio.Event()
        self._note_turns(self.daemon, looked)
        flight = Flight()
        try:
            async with self.daemon.listening():
                work = asyncio.create_task(self.daemon.run())
                if self._wait_for_first_look:
                    await looked.wait()
                self._ready.set()
                await self._stop.wait()
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)
                flight.begin()
        finally:
            await flight.end()
            self.daemon.close()
