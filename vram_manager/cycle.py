"""One turn: look, decide, tell, act. The cycle's single task owns the `Watch` and replaces it whole: no locks.

An action runs beside the cycle; its report comes back through the same inbox as a person's wishes, so that a
ComfyUI which stalls for a second never stalls a turn.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from vram_manager.actuator import Actuator
from vram_manager.clock import Clock
from vram_manager.domain.action import FreeComfyUI, LoadModel
from vram_manager.domain.decision import Decision, ManualFree
from vram_manager.domain.event import Event, EventType
from vram_manager.domain.reading import Seen
from vram_manager.domain.snapshot import Snapshot
from vram_manager.domain.watch import Asked, Pending, Refused, Watch
from vram_manager.journal import Entry, Journal
from vram_manager.observer import Observer
from vram_manager.policy import Rules, asked, beat_seconds, decide, decide_manual, refused, reposted
from vram_manager.policy.accounting import gpus_seen
from vram_manager.policy.cadence import FAST_SECONDS
from vram_manager.policy.guards import HOUR_SECONDS

# How soon to look whether the sensors have had their first try.
FIRST_BEAT_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a wish: the id of the `free_asked` event, or why not."""

    accepted: bool
    event_id: str | None
    why: str


@dataclass(frozen=True, slots=True)
class _Wish:
    wish: ManualFree
    answer: asyncio.Future[Answer]


@dataclass(frozen=True, slots=True)
class _Request:
    """What is asked, at the first or the second post; `before` is the look it was decided on."""

    pending: Pending
    before: Snapshot
    decision_id: str
    again: bool
    answer: asyncio.Future[Answer] | None


@dataclass(frozen=True, slots=True)
class _Report:
    """How a request went."""

    request: _Request
    outcome: Asked | Refused


class Cycle:
    """The daemon's heart. `snapshot`, `watch` and `decision` are those of the last turn, for whoever reads."""

    def __init__(self, clock: Clock, observer: Observer, actuator: Actuator, journal: Journal, rules: Rules) -> None:
        self._clock = clock
        self._observer = observer
        self._actuator = actuator
        self._journal = journal
        self._inbox: deque[_Wish | _Report] = deque()
        self._tasks: asyncio.TaskGroup | None = None
        self._second_post: asyncio.Task[None] | None = None
        self._refused_at = float("-inf")
        self._refused_by_ollama_at = float("-inf")
        self.rules = rules
        self.watch = _remembered(journal, clock)
        self.snapshot: Snapshot | None = None
        self.decision: Decision | None = None
        self.turned_at: float | None = None
        self.on_turn: Callable[[float], None] = lambda seconds: None
        self.see: Callable[[Snapshot], Snapshot] = lambda snapshot: snapshot
        """Adds to what was seen what is asked of the daemon itself and what it has promised."""

    async def run(self) -> None:
        """Turns until cancelled."""
        async with asyncio.TaskGroup() as self._tasks:
            while True:
                seconds = self.turn()
                self._observer.pace(seconds)
                try:
                    async with asyncio.timeout(seconds):
                        await self._observer.changed.wait()
                except TimeoutError:
                    pass
                self._observer.changed.clear()

    def turn(self) -> float:
        """One turn; how many seconds until the next one if nothing happens before."""
        began = self._clock.monotonic()
        snapshot = self.see(self._observer.look())
        while self._inbox:
            match self._inbox.popleft():
                case _Report() as report:
                    self._take_report(report)
                case _Wish() as wish:
                    self._take_wish(wish, snapshot)
        seconds = min(self.rules.interval_seconds, FIRST_BEAT_SECONDS)
        if self._observer.ready:
            self.snapshot = snapshot
            seconds = FAST_SECONDS if self._overtaken(snapshot) else self._decide(snapshot)
        self.turned_at = self._clock.monotonic()
        self.on_turn(self.turned_at - began)
        return seconds

    def _decide(self, snapshot: Snapshot) -> float:
        decision = decide(snapshot, self.watch, self.rules)
        self.watch = decision.watch
        self.decision = decision
        decision_id = self._journal.decided(decision).id
        for event in decision.events:
            self._journal.record(event)
        self._give_up_second_post()
        if decision.action is not None:
            self._act(decision, snapshot, decision_id, answer=None)
        return beat_seconds(decision, gpus_seen(snapshot), self.rules)

    def _overtaken(self, snapshot: Snapshot) -> bool:
        """The actuator looked later than the sensors and refused: nothing is decided until they have looked too."""
        readings = (snapshot.gpus, snapshot.queue)
        late = any(isinstance(reading, Seen) and reading.at < self._refused_at for reading in readings)
        ollama = snapshot.ollama
        return late or (isinstance(ollama, Seen) and ollama.at < self._refused_by_ollama_at)

    def _give_up_second_post(self) -> None:
        """A second post that still hangs when its free has settled must not run beside the next request."""
        pending = self.watch.pending
        if self._second_post is not None and (pending is None or pending.posts < 2):
            self._second_post.cancel()
            self._second_post = None

    async def free(self, wish: ManualFree) -> Answer:
        """A person's wish: decided in the next turn, answered once the request went out or was refused."""
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._put(_Wish(wish, answer))
        return await answer

    def _put(self, message: _Wish | _Report) -> None:
        self._inbox.append(message)
        self._observer.changed.set()

    def _take_wish(self, wish: _Wish, snapshot: Snapshot) -> None:
        decision = decide_manual(snapshot, self.watch, wish.wish, self.rules)
        self.watch = decision.watch
        decision_id = self._journal.decided(decision).id
        if decision.action is None:
            _answer(wish.answer, Answer(False, None, decision.reason))
        else:
            self._act(decision, snapshot, decision_id, wish.answer)

    def _act(
        self, decision: Decision, snapshot: Snapshot, decision_id: str, answer: asyncio.Future[Answer] | None
    ) -> None:
        pending = decision.watch.pending
        assert self._tasks is not None
        assert pending is not None
        request = _Request(pending, snapshot, decision_id, decision.repost, answer)
        task = self._tasks.create_task(self._ask(request), name=decision.branch)
        if decision.repost:
            # Marked at once: the next turn must not post a third time while this request is under way.
            self.watch = reposted(self.watch, snapshot.taken_at)
            self._second_post = task
            event = _event(request, EventType.FREE_ASKED)
            self._record(request, replace(event, reason=f"{event.reason}; asked again, the first flag was lost"))

    async def _ask(self, request: _Request) -> None:
        if request.again:
            outcome = await self._actuator.ask_again(request.pending.action)
        else:
            outcome = await self._actuator.ask(request.pending, request.before)
        self._put(_Report(request, outcome))

    def _take_report(self, report: _Report) -> None:
        request = report.request
        match report.outcome:
            case Refused(at=at, why=why) as outcome:
                loading = isinstance(request.pending.action, LoadModel)
                event = _event(request, EventType.REPAIR_FAILED if loading else EventType.FREE_REFUSED)
                entry_id = None
                # A model that made room may not come back for good reasons, such as that its time is over.
                if self.watch.mending is None or self.watch.mending.repair:
                    entry_id = self._record(request, replace(event, reason=f"{why} ({event.reason})")).id
                if not request.again:
                    self._refused_at = at
                    if not isinstance(request.pending.action, FreeComfyUI):
                        self._refused_by_ollama_at = at
                    self.watch = refused(self.watch, outcome)
                _answer(request.answer, Answer(False, entry_id, why))
            case Asked() as outcome if isinstance(request.pending.action, LoadModel):
                self.watch = asked(self.watch, outcome, request.before, "")
            case Asked() as outcome if not request.again:
                event = _event(request, EventType.FREE_ASKED)
                if outcome.gpu_memory is not None:
                    event = replace(event, used_percent_before=outcome.gpu_memory.used_percent)
                if outcome.note:
                    event = replace(event, reason=f"{event.reason}; {outcome.note}")
                entry = self._record(request, event)
                self.watch = asked(self.watch, outcome, request.before, entry.id)
                _answer(request.answer, Answer(True, entry.id, ""))

    def _record(self, request: _Request, event: Event) -> Entry:
        return self._journal.record(event, decision_id=request.decision_id)


def _event(request: _Request, kind: EventType) -> Event:
    pending = request.pending
    return Event(
        type=kind,
        target=pending.action.target,
        gpu=pending.gpu,
        stage=pending.action.stage if isinstance(pending.action, FreeComfyUI) else None,
        reason=pending.reason,
        action_id=pending.action_id,
    )


def _remembered(journal: Journal, clock: Clock) -> Watch:
    """A fresh watch that starts cooled down: what was asked within the hour before a restart still counts."""
    now, today = clock.monotonic(), clock.utcnow()
    asked_at: dict[str, float] = {}
    frees_at: list[float] = []
    for entry in journal.events():
        ago = (today - entry.at).total_seconds()
        first = entry.event.type is EventType.FREE_ASKED and entry.event.action_id is None
        if first and entry.event.target is not None and 0 <= ago < HOUR_SECONDS:
            asked_at[entry.event.target] = now - ago
            frees_at.append(now - ago)
    return Watch(posted_at=asked_at, frees_at=tuple(frees_at))


def _answer(future: asyncio.Future[Answer] | None, answer: Answer) -> None:
    if future is not None and not future.done():
        future.set_result(answer)
