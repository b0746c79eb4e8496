"""A tiny pure model of one card with an Ollama, a ComfyUI and others on it, and the daemon's turns around the policy.

Time passes in ticks of a quarter of a second. Sensors are read at their own pace, so that readings are of
different ages; `/free` sets flags that an idle ComfyUI acts on 0.7 s later, a busy one after its prompt, and a
lost one when it is woken next. Ollama places a model by what is free when it is loaded and never looks again; a model
that answers stays until it has, and what we load is listed a second later.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from tests.policy.worlds import GIB, comfyui, gib, gpu, gpus
from vram_manager.domain.action import Action, FreeComfyUI, LoadModel, Stage, UnloadModel
from vram_manager.domain.decision import Decision, ManualFree
from vram_manager.domain.demand import Demand, Kind
from vram_manager.domain.event import Event
from vram_manager.domain.reading import Missing, Seen
from vram_manager.domain.snapshot import LoadedModel, OllamaState, Queue, Snapshot
from vram_manager.domain.watch import Asked, Refused, Watch
from vram_manager.policy import Rules, asked, beat_seconds, decide, decide_manual, refused, reposted
from vram_manager.policy.accounting import gpus_seen
from vram_manager.policy.repair import reserved

TICK = 0.25
TOTAL_GIB = 24.0
CONTEXT_GIB = 0.5
LOAD_SECONDS = 1.0
# ComfyUI's websocket pushes its queue; the others are polled.
PERIODS = {"gpus": 0.5, "ollama": 1.0, "comfyui": 1.0, "queue": TICK}


@dataclass
class Prompt:
    """One run: it takes memory at once, and `cache_gib` of it belongs to node outputs."""

    ends_at: float
    models_gib: float
    cache_gib: float


@dataclass
class World:
    """What is really there. `released_gib` sums up all that anybody has ever given back.

    `busy` is until when each model answers, `going` who leaves after that, `short_gib` what the prompt that runs did
    not get. With `gateway` the requests are counted; with `lost_gpu` Ollama has lost the GPU.
    """

    dynamic: bool = False
    highvram: bool = False
    stubborn_gib: float = 0.0
    now: float = 0.0
    others_gib: float = 0.0
    models: dict[str, LoadedModel] = field(default_factory=dict)
    active_at: float | None = None
    busy: dict[str, float] = field(default_factory=dict)
    going: set[str] = field(default_factory=set)
    gateway: bool = False
    lost_gpu: bool = False
    short_gib: float = 0.0
    models_gib: float = 0.0
    cache_gib: float = 0.0
    prompts: list[Prompt] = field(default_factory=list)
    queue: Queue = Queue.first(0, 0.0)  # noqa: RUF009
    flags: set[Stage] = field(default_factory=set)
    act_at: float | None = None
    released_gib: float = 0.0

    @property
    def comfyui_gib(self) -> float:
        return self.models_gib + self.cache_gib + self.stubborn_gib

    @property
    def free_gib(self) -> float:
        taken = self.others_gib + self.comfyui_gib + CONTEXT_GIB
        return max(0.0, TOTAL_GIB - taken - sum(model.size_vram_bytes for model in self.models.values()) / GIB)

    def chat(self, name: str, size_gib: float, *, seconds: float = 0.0, num_gpu: int | None = None) -> None:
        """A request that takes `seconds`; it loads the model anew if other options are asked for."""
        model = self.models.get(name)
        gpu_wanted = num_gpu is None or model is None or model.size_vram_bytes == 0
        if model is None or model.size_bytes != gib(size_gib) or not gpu_wanted:
            self.place(name, size_gib, num_gpu=num_gpu)
        self.going.discard(name)
        self.busy[name] = max(self.busy.get(name, self.now), self.now + seconds)
        self.active_at = self.now

    def place(self, name: str, size_gib: float, *, num_gpu: int | None = None) -> None:
        """Ollama places a model by what is free now, and never looks again."""
        self.leave(name)
        room = 0.0 if self.lost_gpu or num_gpu == 0 else self.free_gib - 1
        on_gpu = size_gib if room >= size_gib else max(0.0, room)
        self.models[name] = LoadedModel(
            name=name,
            digest=name,
            size_bytes=gib(size_gib),
            size_vram_bytes=gib(on_gpu) if on_gpu >= 0.5 else 0,
            context_length=None,
            expires_at=None,
            since=self.now,
            active_at=self.now,
        )
        self.active_at = self.now

    def unload(self, name: str) -> None:
        """`keep_alive: 0`: it leaves once it has answered."""
        self.going.add(name)
        self._ollama()

    def leave(self, name: str) -> None:
        if (model := self.models.pop(name, None)) is not None:
            self.released_gib += model.size_vram_bytes / GIB
            self.active_at = self.now
        self.busy.pop(name, None)
        self.going.discard(name)

    def _ollama(self) -> None:
        for name in [name for name, until in self.busy.items() if until <= self.now]:
            del self.busy[name]
            self.models[name] = replace(self.models[name], active_at=self.now)
            self.active_at = self.now
        for name in [name for name in self.going if name not in self.busy]:
            self.leave(name)

    def others(self, size_gib: float) -> None:
        self.released_gib += max(0.0, self.others_gib - size_gib)
        self.others_gib = min(size_gib, self.others_gib + self.free_gib)

    def render(self, seconds: float, models_gib: float, cache_gib: float) -> None:
        after = self.prompts[-1].ends_at if self.prompts else self.now
        self.prompts.append(Prompt(after + seconds, models_gib, cache_gib))
        if len(self.prompts) == 1:
            self._start()
        self._queued()

    def post(self, stage: Stage, *, lost: bool) -> None:
        self.flags.add(stage)
        if not self.prompts and not lost:
            self.act_at = self.now + 0.7

    def tick(self) -> None:
        self.now += TICK
        self._ollama()
        if self.prompts and self.prompts[0].ends_at <= self.now:
            self.prompts.pop(0)
            self._act()
            if self.prompts:
                self._start()
            self._queued()
        if self.prompts and self.short_gib:
            more = min(self.short_gib, self.free_gib)
            self.models_gib += more
            self.short_gib -= more
        if self.act_at is not None and self.act_at <= self.now:
            self._act()

    def _start(self) -> None:
        prompt = self.prompts[0]
        self._act()
        wanted = max(self.models_gib, prompt.models_gib) + prompt.cache_gib
        grown = min(wanted, self.models_gib + self.cache_gib + self.free_gib)
        self.released_gib += max(0.0, self.models_gib + self.cache_gib - grown)
        self.short_gib = wanted - grown
        self.cache_gib = min(prompt.cache_gib, grown)
        self.models_gib = grown - self.cache_gib

    def _act(self) -> None:
        if self.flags and not (self.highvram and self.flags == {Stage.SOFT}):
            self.released_gib += self.models_gib
            self.models_gib = 0.0
        if Stage.UNLOAD in self.flags:
            self.released_gib += self.cache_gib
            self.cache_gib = 0.0
        self.flags, self.act_at = set(), None

    def _queued(self) -> None:
        self.queue = self.queue.observed(len(self.prompts), self.now)


@dataclass(frozen=True)
class Post:
    """One request that went out, what was known when it was decided on, and why it was."""

    at: float
    action: Action
    seen: Snapshot
    branch: str
    repost: bool
    by_hand: bool
    busy: bool


@dataclass
class Told:
    """An event, when it was told, how many runs ComfyUI had begun, and what everybody released since the ask."""

    at: float
    event: Event
    runs: int
    released_gib: float


class Daemon:
    """The cycle around the policy: reads, decides, looks again, posts."""

    def __init__(self, world: World, rules: Rules, lost_flags: Iterable[bool] = ()) -> None:
        self.world = world
        self.rules = rules
        self.watch = Watch()
        self.decision: Decision | None = None
        self.gone: set[str] = set()
        self.posts: list[Post] = []
        self.told: list[Told] = []
        self.turns: list[tuple[Snapshot, Decision]] = []
        self.remembered: list[Watch] = []
        """What each turn began with: what came of an earlier request is in it."""
        self.deleted: set[str] = set()
        self._loading: tuple[float, str, Snapshot] | None = None
        self._lost_flags = iter(lost_flags)
        self._readings: dict[str, Seen[object] | Missing] = {}
        self._next_turn = world.now
        self._released_before = 0.0

    def live(self, seconds: float) -> None:
        until = self.world.now + seconds
        while self.world.now < until:
            self.world.tick()
            self._loaded()
            self._read()
            if self.world.now >= self._next_turn:
                self.turn()

    def turn(self) -> None:
        seen = self.look()
        self.remembered.append(self.watch)
        decision = decide(seen, self.watch, self.rules)
        self.watch, self.decision = decision.watch, decision
        self.turns.append((seen, decision))
        for event in decision.events:
            released = self.world.released_gib - self._released_before
            self.told.append(Told(self.world.now, event, self.world.queue.runs, released))
        if decision.action is not None:
            self._act(decision, seen, by_hand=False)
        self._next_turn = self.world.now + beat_seconds(decision, gpus_seen(seen), self.rules)

    def wish(self, action: Action, *, force: bool) -> None:
        seen = self.look()
        wish = ManualFree(action=replace(action, forced=force), force=force)
        decision = decide_manual(seen, self.watch, wish, self.rules)
        self.watch = decision.watch
        if decision.action is not None:
            self._act(decision, seen, by_hand=True)

    def look(self) -> Snapshot:
        self._read()
        readings = {name: self._readings[name] for name in PERIODS}
        kept = reserved(self.watch, self.rules)
        return Snapshot(
            taken_at=self.world.now,
            asks=self._asks(),
            leased_bytes=kept,
            reserved_bytes=kept,
            **readings,  # type: ignore[arg-type]
        )

    def _asks(self) -> tuple[Demand, ...]:
        """ComfyUI has begun and is short of memory."""
        world = self.world
        if not world.prompts or world.short_gib < 0.1:
            return ()
        begun = Demand(
            kind=Kind.STARTING,
            key="comfyui",
            gpu="GPU-a",
            need_free_bytes=gib(world.free_gib + world.short_gib),
            reason="ComfyUI has begun",
            since=world.queue.since,
            last_seen_at=world.now,
            for_comfyui=True,
        )
        return (begun,)

    def _read(self) -> None:
        for name, period in PERIODS.items():
            reading = self._readings.get(name)
            if name in self.gone:
                self._readings[name] = Missing("gone")
            elif not isinstance(reading, Seen) or self.world.now - reading.at >= period:
                self._readings[name] = Seen(self._value(name), self.world.now)

    def _value(self, name: str) -> object:
        world = self.world
        if name == "gpus":
            return gpus(gpu(free_gib=world.free_gib, total_gib=TOTAL_GIB))
        if name == "ollama":
            models = (
                replace(model, requests=int(model.name in world.busy) if world.gateway else None)
                for model in world.models.values()
                if self._loading is None or model.name != self._loading[1]
            )
            return OllamaState(version="0.32.15", models=tuple(models), active_at=world.active_at)
        if name == "queue":
            return world.queue
        torch_gib = world.cache_gib + world.stubborn_gib + (0 if world.dynamic else world.models_gib)
        argv = ("main.py", "--highvram") if world.highvram else ("main.py",)
        version = "0.33.0" if world.dynamic else "0.3.64"
        return comfyui(*argv, torch_gib=torch_gib, version=version, free_gib=world.free_gib)

    def _act(self, decision: Decision, seen: Snapshot, *, by_hand: bool) -> None:
        """What the actuator does: a first request looks once more, a second one does not."""
        world, action = self.world, decision.action
        assert action is not None
        if decision.repost:
            self.watch = reposted(self.watch, world.now)
        else:
            why = self._second_thoughts(action)
            if why:
                tried = isinstance(action, LoadModel)
                self.watch = refused(self.watch, Refused(at=world.now, why=why, tried=tried))
                return
            if isinstance(action, LoadModel):
                self._load(action, decision, seen)
                return
            card = gpu(free_gib=world.free_gib, total_gib=TOTAL_GIB).memory
            report = Asked(at=world.now, gpu_memory=None if isinstance(card, Missing) else card)
            self.watch = asked(self.watch, report, seen, f"free-{len(self.posts)}")
            self._released_before = world.released_gib
        busy = bool(world.prompts)
        self.posts.append(Post(world.now, action, seen, decision.branch, decision.repost, by_hand, busy))
        if isinstance(action, FreeComfyUI):
            world.post(action.stage, lost=next(self._lost_flags, False))
        elif isinstance(action, UnloadModel):
            world.unload(action.model)

    def _load(self, action: LoadModel, decision: Decision, seen: Snapshot) -> None:
        world, mending = self.world, decision.watch.mending
        assert mending is not None
        self.posts.append(Post(world.now, action, seen, decision.branch, False, False, bool(world.prompts)))
        if action.model not in world.models:
            world.place(action.model, mending.model.size_bytes / GIB)
        self._loading = (world.now + LOAD_SECONDS, action.model, seen)

    def _loaded(self) -> None:
        """It is answered, and listed, once the model is loaded."""
        if self._loading is None or self._loading[0] > self.world.now:
            return
        seen = self._loading[2]
        self._loading = None
        self.watch = asked(self.watch, Asked(at=self.world.now, gpu_memory=None), seen, "")

    def _second_thoughts(self, action: Action) -> str:
        if isinstance(action, UnloadModel):
            return "" if action.model in self.world.models else "not loaded any more"
        if isinstance(action, LoadModel):
            return "not found" if action.model in self.deleted else ""
        if self.world.prompts and not action.forced:
            return "became busy"
        demand = self.watch.pending.demand if self.watch.pending else None
        room = demand is not None and gib(self.world.free_gib) >= demand.need_free_bytes
        return "room appeared" if room else ""
