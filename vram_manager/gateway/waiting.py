"""What both gates have in common: the parts they ask, how long they hold a call, and what became of each."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil, isinf
from typing import Literal, TypeAlias

from vram_manager.admissions import Admissions
from vram_manager.clock import Clock
from vram_manager.cycle import Cycle
from vram_manager.domain.event import Event
from vram_manager.domain.lease import Request
from vram_manager.estimates import Estimates
from vram_manager.gateway.head import Passage, Reply
from vram_manager.observer import Observer

# Let through at once; after a wait; with the wait over and no room; answered with 503; not understood; no upstream.
Outcome: TypeAlias = Literal["passed", "held", "timeout", "refused", "unread", "unreachable"]

WAITED_HEADER = b"X-Vram-Manager-Waited-Seconds"
# Below this nobody waited: it is what asking for an estimate takes.
LEAST_WAIT_SECONDS = 0.05


async def for_ever() -> None:
    """A client that never leaves: one that does has its call cancelled."""
    await asyncio.Event().wait()


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiter:
    """One call that is held, for those who look."""

    upstream: str
    what: str
    since: float
    why: str


@dataclass(slots=True, kw_only=True)
class Desk:
    """What a gate asks, and the two settings of both: how long a call is held, and what happens after that."""

    clock: Clock
    observer: Observer
    cycle: Cycle
    admissions: Admissions
    estimates: Estimates
    max_wait_seconds: float
    refuses: bool
    tell: Callable[[Event], object]
    on_request: Callable[[str, Outcome, float], None] = lambda upstream, outcome, waited: None
    waiting: dict[object, Waiter] = field(default_factory=dict)
    stopped: bool = False
    _turned: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def ready(self) -> bool:
        """Everything was looked at once, or has had its time for that; also when nobody looks any more."""
        return self.stopped or self.observer.ready

    def turned(self) -> None:
        """A turn of the cycle is over: whoever waits looks again."""
        turned, self._turned = self._turned, asyncio.Event()
        turned.set()

    def stop(self) -> None:
        """Nobody decides any more: every call passes."""
        self.stopped = True
        self.turned()

    async def next_turn(self, until: float) -> bool:
        """The next turn has come; False: `until` has."""
        try:
            async with asyncio.timeout(None if isinf(until) else max(0.0, until - self.clock.monotonic())):
                await self._turned.wait()
        except TimeoutError:
            return False
        return True

    def withdraw(self, request: Request) -> None:
        """Nobody waits for the answer any more: what was promised meanwhile is given back."""
        promised = [lease.id for lease in self.admissions.book.leases.values() if lease.request_id == request.id]
        for lease_id in promised:
            self.admissions.release(lease_id, "nobody asks for it any more")

    def told(self, upstream: str, outcome: Outcome, waited_seconds: float) -> Passage:
        """Counts a call that goes on, and tells its client how long it waited, if it did."""
        if waited_seconds < LEAST_WAIT_SECONDS:
            self.on_request(upstream, "passed" if outcome == "held" else outcome, waited_seconds)
            return Passage()
        self.on_request(upstream, outcome, waited_seconds)
        return Passage(headers=((WAITED_HEADER, f"{waited_seconds:.2f}".encode()),))

    def refusal(self, upstream: str, waited_seconds: float, body: bytes, retry_after_seconds: float | None) -> Reply:
        """503: the wait is over and GATEWAY_ON_TIMEOUT says `refuse`."""
        self.on_request(upstream, "refused", waited_seconds)
        retry = ceil(max(1.0, retry_after_seconds or self.max_wait_seconds / 2))
        return Reply(status=503, body=body, headers=((b"Retry-After", str(retry).encode()),))
