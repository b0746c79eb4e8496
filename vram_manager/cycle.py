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
from vram_manager.domain.action import FreeComfyUI
from vram_manager.domain.decision import Decision, ManualFree
from vram_manager.domain.event import Event, EventType
from vram_manager.domain.snapshot import Snapshot
from vram_manager.domain.watch import Asked, Pending, Refused, Watch
from vram_manager.journal import Entry, Journal
from vram_manager.observer import Observer
from vram_manager.policy import Rules, asked, beat_seconds, decide, decide_manual, refused, reposted
from vram_manager.policy.accounting import gpus_seen


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a person's wish: the id of the `free_asked` event, or why not."""

    accepted: bool
    event_id: str | None
    why: str


@dataclass(frozen=True, slots=True)
class _Wish:
    wish: ManualFree
    answer: asyncio.Future[Answer]


@dataclass(frozen=True, slots=True)
class _Report:
    """How the request for `pending` went, at the first or the second post."""

    pending: Pending
    outcome: Asked | Refused
    again: bool
    answer: asyncio.Future[Answer] | None


class Cycle:
    """The daemon's heart. `snapshot`, `watch` and `decision` are those of the last turn, for whoever reads."""

    def __init__(self, clock: Clock, observer: Observer, actuator: Actuator, journal: Journal, rules: Rules) -> None:
        self._clock = clock
        self._observer = observer
        self._actuator = actuator
        self._journal = journal
        self._inbox: deque[_Wish | _Report] = deque()
        self._tasks: asyncio.TaskGroup | None = None
        self.rules = rules
        self.watch = Watch()
        self.snapshot: Snapshot | None = None
        self.decision: Decision | None = None
        self.turned_at: float | None = None
        self.on_turn: Callable[[float], None] = lambda seconds: None

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
        snapshot = self._observer.look()
        while self._inbox:
            match self._inbox.popleft():
                case _Report() as report:
                    self._take_report(report, snapshot)
                case _Wish() as wish:
                    self._take_wish(wish, snapshot)
        seconds = self.rules.interval_seconds
        if self._observer.ready:
            decision = decide(snapshot, self.watch, self.rules)
            self.watch = decision.watch
            self._journal.decided(decision)
            for event in decision.events:
                self._journal.record(event)
            if decision.action is not None:
                self._act(decision, snapshot, answer=None)
            self.snapshot, self.decision = snapshot, decision
            seconds = beat_seconds(decision, gpus_seen(snapshot), self.rules)
        self.turned_at = self._clock.monotonic()
        self.on_turn(self.turned_at - began)
        return seconds

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
        self._journal.decided(decision)
        if decision.action is None:
            _answer(wish.answer, Answer(False, None, decision.reason))
        else:
            self._act(decision, snapshot, wish.answer)

    def _act(self, decision: Decision, snapshot: Snapshot, answer: asyncio.Future[Answer] | None) -> None:
        pending = decision.watch.pending
        assert self._tasks is not None
        assert pending is not None
        if decision.repost:
            # Marked at once: the next turn must not post a third time while this request is under way.
            self.watch = reposted(self.watch, snapshot.taken_at)
        self._tasks.create_task(self._ask(pending, snapshot, decision.repost, answer), name=decision.branch)

    async def _ask(
        self, pending: Pending, snapshot: Snapshot, again: bool, answer: asyncio.Future[Answer] | None
    ) -> None:
        if again:
            outcome = await self._actuator.post(pending.action, None)
        else:
            outcome = await self._actuator.ask(pending, snapshot)
        self._put(_Report(pending, outcome, again, answer))

    def _take_report(self, report: _Report, snapshot: Snapshot) -> None:
        event = Event(
            type=EventType.FREE_ASKED,
            target=report.pending.action.target,
            gpu=report.pending.gpu,
            stage=report.pending.action.stage if isinstance(report.pending.action, FreeComfyUI) else None,
            reason=report.pending.reason,
            action_id=report.pending.action_id,
        )
        match report.outcome:
            case Asked() as outcome:
                if outcome.gpu_memory is not None:
                    event = replace(event, used_percent_before=outcome.gpu_memory.used_percent)
                if report.again:
                    event = replace(event, reason=f"{event.reason}; asked again, the first flag was lost")
                entry = self._journal.record(event)
                if not report.again:
                    self.watch = asked(self.watch, outcome, snapshot, entry.id)
                _answer(report.answer, Answer(True, entry.id, ""))
            case Refused(why=why) as outcome:
                entry = self._refused(event, why)
                if not report.again:
                    self.watch = refused(self.watch, outcome)
                _answer(report.answer, Answer(False, entry.id, why))

    def _refused(self, event: Event, why: str) -> Entry:
        return self._journal.record(replace(event, type=EventType.FREE_REFUSED, reason=f"{why} ({event.reason})"))


def _answer(future: asyncio.Future[Answer] | None, answer: Answer) -> None:
    if future is not None and not future.done():
        future.set_result(answer)
