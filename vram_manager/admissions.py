"""The desk: takes requests, keeps the book of leases and the line, and promises no byte twice.

The book is a value and is replaced whole between two awaits, so that whoever asks at the same moment is served one
after the other without a lock. A promise is made on numbers read for it, written down before it is told, and taken
back when nobody is there to hear it.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from loguru import logger

from vram_manager.clock import Clock
from vram_manager.domain.event import Event, EventType
from vram_manager.domain.lease import Book, Lease, Request, Source, Ticket, Verdict
from vram_manager.domain.reading import Missing, Seen
from vram_manager.domain.size import gib
from vram_manager.domain.snapshot import Snapshot
from vram_manager.journal import Journal
from vram_manager.lease_records import LeaseRecords
from vram_manager.observer import Observer
from vram_manager.policy import Rules
from vram_manager.policy.admission import Pace, judge, lease_of, unknown_gpu
from vram_manager.policy.leases import Families, account, at_grant, ended, granted, outstanding, overdue, put, renewed
from vram_manager.policy.line import demands, in_order, kept_before, whose_turn
from vram_manager.policy.rooms import reachable
from vram_manager.processes import Processes
from vram_manager.store import Store

# A look at the GPUs that is older gates no promise: at 25 GB/s over PCIe it is already 1 GiB wrong.
LEASE_LOOK_SECONDS = 0.05
# An answer without a promise may be as old as the beat of a daemon that is at work.
CHECK_LOOK_SECONDS = 0.25
LINE_BEAT_SECONDS = 0.25
# What a card could give lately is looked at over one to two of these. A model is listed a second after its load, and
# an unload gives its memory back in 0.5-1.5 s (sched.go:waitForVRAMRecovery).
REACH_SECONDS = 3.0
MAX_LINE, MAX_LINE_PER_OWNER, MAX_LEASES, MAX_LEASES_PER_OWNER = 256, 16, 1024, 128
# The same refusal again within this time is counted and not told.
SAME_REFUSAL_SECONDS = 10.0
_OWNERS_REMEMBERED, _DURATIONS_REMEMBERED = 256, 10
_WHEN_UNKNOWN_SECONDS = 30.0
_STOPPING = "the daemon stops: ask again, with the same request_id"


class NoSuchLease(LookupError):
    """No live lease has that id."""


class TooMany(Exception):
    """The line, or the owner's share of it, is full."""


class OtherRequest(Exception):
    """The request's id is already that of another one."""


class Stopping(Exception):
    """The daemon ends, and whoever is in line may ask the next one."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a request: the verdict, the lease if there is one, and how long it waited in line."""

    verdict: Verdict
    lease: Lease | None
    waited_seconds: float


@dataclass(frozen=True, slots=True)
class Waiting:
    """One in line, for those who look: its place, and when it may be its turn (None: not to be foreseen)."""

    ticket: Ticket
    position: int
    eta_seconds: float | None


class Admissions:
    """All leases and everybody in line. Only its own methods change the book, each between two awaits."""

    def __init__(
        self, clock: Clock, observer: Observer, journal: Journal, store: Store, rules: Rules, processes: Processes
    ) -> None:
        self._clock = clock
        self._observer = observer
        self._journal = journal
        self._rules = rules
        self._processes = processes
        self.book = Book()
        self._turn: dict[tuple[str, str], asyncio.Future[Verdict]] = {}
        self._ends: dict[str, set[asyncio.Event]] = {}
        self._poked = asyncio.Event()
        self._records = LeaseRecords(store)
        self._closing = False
        self._ended_at = float("-inf")
        self._nobody: tuple[object, ...] | None = None
        """The readings and the book at which it was nobody's turn: the same again need no second look."""
        self._accounted: tuple[object, object] = (None, None)
        self._durations: OrderedDict[str, deque[float]] = OrderedDict()
        self._prompts: deque[float] = deque(maxlen=_DURATIONS_REMEMBERED)
        self._moved: tuple[float, int] | None = None
        self._reach: dict[str, int] = {}
        self._reach_before: dict[str, int] = {}
        self._reach_since = float("-inf")
        self._refused: OrderedDict[tuple[str, str], float] = OrderedDict()
        self.on_answer: Callable[[str, float], None] = lambda outcome, waited: None
        self.on_end: Callable[[Lease], None] = lambda lease: None
        self.reserved: Callable[[], Mapping[str | None, int]] = dict
        """What the daemon keeps for itself on each GPU: the room of a model that is away to be loaded anew."""
        for lease in self._records.restored(clock.monotonic(), self._lives):
            self._keep(lease)
        if self.book.leases:
            logger.info("{} leases of the last run go on", len(self.book.leases))

    # ---- asking

    async def ask(self, request: Request, gone: Callable[[], Awaitable[None]]) -> Answer:
        """The answer to `request`, after its time in line if it wants to wait. `gone` ends when the client left.

        Raises LookupError for a GPU that is not there, TooMany when the line is full, OtherRequest for an id that
        was given to another question, Stopping when the daemon ends meanwhile.
        """
        if (known := self._same(request)) is not None:
            return Answer(self._as_granted(known), known, 0.0)
        began = self._clock.monotonic()
        await self._look(request)
        # Asked twice at once with the same id: the first has been served meanwhile.
        if (known := self._same(request)) is not None:
            return Answer(self._as_granted(known), known, 0.0)
        if (unknown := unknown_gpu(request, self._observer.known())) is not None:
            raise LookupError(unknown)
        verdict = self._admit(request)
        if not verdict.admitted and (wait := self._may_wait(request, verdict)):
            if self._closing:
                raise Stopping(_STOPPING)
            verdict = await self._in_line(request, verdict, wait, gone)
        waited = self._clock.monotonic() - began
        lease = self._same(request) if verdict.admitted else None
        if lease is not None:
            await self._records.saved()
        self._tell(request, verdict, lease, waited)
        return Answer(verdict, lease, waited)

    def _same(self, request: Request) -> Lease | None:
        """The lease this very request was given before: its answer was lost on the way. Raises OtherRequest."""
        leases = self.book.leases.values()
        known = next((one for one in leases if (one.owner, one.request_id) == (request.owner, request.id)), None)
        said = Source.REQUEST
        if known is not None and known.estimate.source is said and request.estimate.source is said:
            before, now = known.estimate.size, request.estimate.size
            if before != now:
                raise OtherRequest(f"request_id {request.id} asked for {before} before and asks for {now} now")
        return known

    def _as_granted(self, lease: Lease) -> Verdict:
        words = f"{gib(lease.bytes)} were granted to this request before"
        return Verdict(admitted=True, reason=words, gpu=lease.gpu, required_bytes=lease.bytes)

    async def _look(self, request: Request) -> None:
        """Fresh numbers: for a promise those of now, and of the holders' processes where they are told apart."""
        if not request.takes_lease:
            await self._observer.look_again(CHECK_LOOK_SECONDS)
            return
        await self._look_for_a_promise(request.pid is not None)

    async def _look_for_a_promise(self, by_process: bool = False) -> None:
        """Numbers on which something may be promised: of now, with the processes, and from after the last end.

        A lease that has ended no longer holds back what its owner may still have taken a moment before.
        """
        by_process = by_process or self._observer.follow_processes
        await self._observer.look_again(
            LEASE_LOOK_SECONDS, after=self._ended_at, with_processes=by_process, about_to_use=True
        )

    def _admit(self, request: Request) -> Verdict:
        """The verdict now, and the lease in the book if it is one. Nobody in line who could go is passed over."""
        if request.takes_lease:
            self._serve_line()
        snapshot = self.snapshot()
        kept = kept_before(request, self.book, snapshot, self._rules)
        verdict = judge(
            request,
            snapshot,
            self.book,
            self._rules,
            kept=kept,
            pace=self._pace(),
            utcnow=self._clock.utcnow(),
        )
        if verdict.admitted:
            return self._promised(request, verdict, snapshot)
        return verdict

    def _promised(self, request: Request, verdict: Verdict, snapshot: Snapshot) -> Verdict:
        """Writes the lease of an admitted request into the book; a dry run that would have refused gets none."""
        if not request.takes_lease or verdict.dry_run:
            return verdict
        own = sum(lease.owner == request.owner for lease in self.book.leases.values())
        if len(self.book.leases) >= MAX_LEASES or own >= MAX_LEASES_PER_OWNER:
            most = f"{own} leases" if own >= MAX_LEASES_PER_OWNER else f"{MAX_LEASES} leases in all"
            raise TooMany(f"{request.owner}: there are {most} already; release some")
        lease = lease_of(request, verdict, f"lease-{secrets.token_hex(6)}", self._clock.monotonic())
        if lease.pid is not None:
            started = self._processes.started(lease.pid)
            lease = replace(lease, pid=lease.pid if started else None, pid_started=started)
        families = self._families(snapshot, lease.pid)
        self._keep(at_grant(lease, self.book, snapshot, families, self._rules), new=True)
        return verdict

    def _may_wait(self, request: Request, verdict: Verdict) -> float:
        """How long the request may stand in line, seconds; 0: not at all."""
        if verdict.hopeless or not request.takes_lease or verdict.required_bytes is None:
            return 0.0
        if request.wait_seconds is not None:
            return request.wait_seconds
        makes_room = verdict.reclaimable_bytes >= (verdict.shortfall_bytes or 0) > 0
        rules = self._rules
        return rules.waiting_idle_seconds + rules.settle_timeout_seconds + 3.0 if makes_room else 0.0

    async def _in_line(
        self, request: Request, refused: Verdict, wait: float, gone: Callable[[], Awaitable[None]]
    ) -> Verdict:
        own = sum(ticket.request.owner == request.owner for ticket in self.book.line)
        if len(self.book.line) >= MAX_LINE or own >= MAX_LINE_PER_OWNER:
            count, whose = (own, f" of {request.owner}") if own >= MAX_LINE_PER_OWNER else (MAX_LINE, "")
            raise TooMany(f"{count} requests{whose} are in line already; ask again later")
        key = (request.owner, request.id)
        if key in self._turn:
            raise TooMany(f"the request {request.id} of {request.owner} is in line already")
        turn: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()
        self._turn[key] = turn
        ticket = Ticket(request=request, since=self._clock.monotonic())
        self.book = replace(self.book, line=(*self.book.line, ticket))
        self._poke()
        left: asyncio.Future[None] = asyncio.ensure_future(gone())
        try:
            waits: set[asyncio.Future[Any]] = {turn, left}
            await asyncio.wait(waits, timeout=wait, return_when=asyncio.FIRST_COMPLETED)
            if turn.done():
                return turn.result()
            place = self._place(ticket)
            return self._at_the_end(ticket, refused, place, client_left=left.done())
        finally:
            left.cancel()
            if turn.done():
                # Whoever was cancelled at the same moment does not ask how it ended.
                turn.exception()
            del self._turn[key]
            self._leave(ticket)

    def _at_the_end(self, ticket: Ticket, refused: Verdict, place: int, *, client_left: bool) -> Verdict:
        """The refusal of one whose time in line is over, with the numbers of now."""
        snapshot = self.snapshot()
        request = ticket.request
        verdict = judge(request, snapshot, self.book, self._rules, pace=self._pace(), utcnow=self._clock.utcnow())
        if verdict.admitted:
            # It would fit, and somebody who may not be overtaken goes first.
            verdict = refused
        waited = snapshot.taken_at - ticket.since
        why = "the client went away" if client_left else f"waited {waited:.0f} s, was number {place} in line"
        retry = verdict.retry_after_seconds or _WHEN_UNKNOWN_SECONDS
        return replace(verdict, reason=f"{verdict.reason}; {why}", position=place, retry_after_seconds=retry)

    def _leave(self, ticket: Ticket) -> None:
        if any(one is ticket for one in self.book.line):
            self.book = replace(self.book, line=tuple(one for one in self.book.line if one is not ticket))
            self._poke()

    def _place(self, ticket: Ticket) -> int:
        order = in_order(self.book, self._clock.monotonic())
        return next((place for place, one in enumerate(order, 1) if one is ticket), len(order))

    def _serve_line(self) -> None:
        """Everybody in line whose turn it is, in order, each on what is left after the one before."""
        while self.book.line:
            snapshot = self.snapshot()
            state = (_moment(snapshot), self.book.leases, self.book.line)
            if self._nobody == state:
                return
            found = whose_turn(self.book, snapshot, self._rules)
            if found is None:
                self._nobody = state
                return
            ticket, verdict = found
            try:
                verdict = self._promised(ticket.request, verdict, snapshot) if verdict.admitted else verdict
            except TooMany as error:
                verdict = replace(verdict, admitted=False, reason=str(error))
            self.book = replace(self.book, line=tuple(one for one in self.book.line if one is not ticket))
            # The room may be the proof of a free: the cycle must see it before it is taken.
            self._observer.changed.set()
            turn = self._turn.get((ticket.request.owner, ticket.request.id))
            if turn is not None and not turn.done():
                turn.set_result(verdict)

    def would_overtake(self, request: Request) -> bool:
        """Whether somebody waits who may not be passed by `request`, were it to go on now."""
        return bool(self.book.line) and bool(kept_before(request, self.book, self.snapshot(), self._rules))

    # ---- leases

    def lease(self, lease_id: str) -> Lease:
        """Raises NoSuchLease."""
        try:
            return self.book.leases[lease_id]
        except KeyError:
            raise NoSuchLease(f"{lease_id} is no live lease: it was released, has expired, or never was") from None

    async def renew(
        self,
        lease_id: str,
        *,
        ttl_seconds: float | None = None,
        pid: int | None = None,
        claimed_bytes: int | None = None,
    ) -> Lease:
        """The lease with its time before it again. `pid` names the process that holds the memory from now on."""
        if pid is not None:
            # What it holds already is not this lease's.
            await self._look_for_a_promise(by_process=True)
        lease = renewed(self.lease(lease_id), self._clock.monotonic(), ttl_seconds)
        if claimed_bytes is not None:
            lease = _claimed(lease, claimed_bytes, self._clock.monotonic())
        if pid is not None and pid != lease.pid:
            self._processes.unwatch(lease_id)
            lease = replace(lease, pid=pid, pid_started=self._processes.started(pid), baseline_bytes=None)
            snapshot = self.snapshot()
            lease = at_grant(lease, ended(self.book, lease_id), snapshot, self._families(snapshot, pid), self._rules)
        self._keep(lease)
        return lease

    def claimed(self, lease_id: str, size_bytes: int | None) -> Lease:
        """The owner has taken so much of its lease, all of it where it does not say."""
        lease = self.lease(lease_id)
        lease = _claimed(lease, lease.bytes if size_bytes is None else size_bytes, self._clock.monotonic())
        self._keep(lease)
        return lease

    def release(self, lease_id: str, why: str = "released") -> None:
        """The lease is over. Raises NoSuchLease."""
        self._end(self.lease(lease_id), EventType.LEASE_ENDED, why)

    @contextlib.asynccontextmanager
    async def held(self, lease_id: str) -> AsyncIterator[asyncio.Event]:
        """The lease does not expire inside the block and ends with it; the event is set when it ended before."""
        over = asyncio.Event()
        self._hold(lease_id, +1)
        self._ends.setdefault(lease_id, set()).add(over)
        try:
            yield over
        finally:
            self._ends.get(lease_id, set()).discard(over)
            if lease_id in self.book.leases:
                self._hold(lease_id, -1)
                if not self.book.leases[lease_id].holds and not self._closing:
                    self.release(lease_id, "its connection closed")

    def hang_up(self) -> None:
        """The daemon stops: connections that close now end no lease, as the next daemon will know them."""
        self._closing = True
        for lease_id in list(self._ends):
            self._over(lease_id)
        for turn in self._turn.values():
            if not turn.done():
                turn.set_exception(Stopping(_STOPPING))

    def close(self) -> None:
        """Writes the rest. Blocks."""
        for lease_id in self.book.leases:
            self._processes.unwatch(lease_id)
        self._records.flush()

    def _hold(self, lease_id: str, more: int) -> None:
        lease = self.lease(lease_id)
        lease = renewed(lease, self._clock.monotonic())
        self._keep(replace(lease, holds=max(0, lease.holds + more)))

    def _keep(self, lease: Lease, *, new: bool = False) -> None:
        """`lease` in the book, on its way to the disk, and watched."""
        before = self.book.leases.get(lease.id)
        self.book = granted(self.book, lease) if new else put(self.book, lease)
        if not lease.at_gateway:
            self._records.changed(lease, before)
        if lease.pid is not None and (before is None or before.pid != lease.pid):
            self._processes.watch(lease.id, lease.pid, lambda: self._holder_gone(lease.id))
        self._observer.follow_processes = any(one.baseline_bytes is not None for one in self.book.leases.values())
        self._poke()

    def _lives(self, lease: Lease) -> bool:
        """Its process is still the one it was granted to, as far as it was told."""
        return lease.pid is None or self._processes.started(lease.pid) == lease.pid_started

    def _holder_gone(self, lease_id: str) -> None:
        lease = self.book.leases.get(lease_id)
        if lease is not None:
            self._end(lease, EventType.LEASE_ENDED, f"its process {lease.pid} is gone")

    def _end(self, lease: Lease, kind: EventType, why: str) -> None:
        now = self._clock.monotonic()
        self._processes.unwatch(lease.id)
        self._ended_at = now
        before, self.book = self.book, ended(self.book, lease.id)
        if not lease.at_gateway:
            self._records.ended(lease.id)
        for other in self.book.leases.values():
            # What the ended one may have left behind must not pass for theirs after a restart either.
            if other is not before.leases[other.id] and not other.at_gateway:
                self._records.changed(other, before.leases[other.id])
        self._over(lease.id)
        self._observer.follow_processes = any(one.baseline_bytes is not None for one in self.book.leases.values())
        durations = self._durations.setdefault(lease.owner, deque(maxlen=_DURATIONS_REMEMBERED))
        self._durations.move_to_end(lease.owner)
        durations.append(now - lease.granted_at)
        while len(self._durations) > _OWNERS_REMEMBERED:
            self._durations.popitem(last=False)
        peak = "peak not seen" if lease.peak_bytes is None else f"peak {gib(lease.peak_bytes)}"
        words = f"{why} after {now - lease.granted_at:.0f} s; estimated {gib(lease.bytes)}, {peak}"
        self._journal.record(
            Event(
                type=kind,
                target=f"worker:{lease.owner}",
                gpu=lease.gpu,
                reason=words,
                lease=lease.id,
                estimated_bytes=lease.bytes,
                peak_bytes=lease.peak_bytes,
                took_seconds=now - lease.granted_at,
            )
        )
        self.on_end(lease)
        self._poke()

    def _over(self, lease_id: str) -> None:
        for over in self._ends.pop(lease_id, ()):
            over.set()

    # ---- what is seen

    def seen(self, snapshot: Snapshot) -> Snapshot:
        """`snapshot` with what is promised on each GPU and who waits for room; the book follows what it shows.

        For the cycle: a new look may be somebody's turn.
        """
        self._note_prompts(snapshot)
        self._note_reach(snapshot)
        if self.book.line:
            self._poked.set()
        return self._with_promises(snapshot)

    def _with_promises(self, snapshot: Snapshot) -> Snapshot:
        reserved = self.reserved()
        if not self.book.leases and not self.book.line and not reserved:
            return replace(snapshot, reachable_bytes=self._reachable())
        self._account(snapshot)
        leased = outstanding(self.book, snapshot)
        for gpu, size in reserved.items():
            leased[gpu] = leased.get(gpu, 0) + size
        shown: dict[str | None, int] = {}
        for lease in self.book.leases.values():
            if not lease.for_comfyui and lease.visible_bytes:
                shown[lease.gpu] = shown.get(lease.gpu, 0) + lease.visible_bytes
        snapshot = replace(
            snapshot,
            leased_bytes=leased,
            workers_bytes=shown,
            reserved_bytes=reserved,
            reachable_bytes=self._reachable(),
        )
        if self.book.line:
            snapshot = replace(snapshot, asks=demands(self.book, snapshot, self._rules))
        return snapshot

    def snapshot(self) -> Snapshot:
        """What is known now, with what is promised and who waits."""
        return self._with_promises(self._observer.known())

    def _account(self, snapshot: Snapshot) -> None:
        """Once for each set of readings and each state of the book."""
        moment = _moment(snapshot)
        if not self.book.leases or (self._accounted[0] == moment and self._accounted[1] is self.book.leases):
            return
        self.book = account(self.book, snapshot, self._families(snapshot), self._rules)
        self._accounted = (moment, self.book.leases)

    def _families(self, snapshot: Snapshot, *more: int | None) -> Families:
        roots = [lease.pid for lease in self.book.leases.values() if lease.pid is not None]
        roots += [pid for pid in more if pid is not None]
        if not roots or not isinstance(snapshot.gpus, Seen):
            return {}
        pids = {
            process.pid
            for gpu in snapshot.gpus.value.gpus
            if not isinstance(gpu.processes, Missing)
            for process in gpu.processes
        }
        return self._processes.families(roots, pids)

    def _note_prompts(self, snapshot: Snapshot) -> None:
        """How long ComfyUI's prompts take: from one move of its queue to the next while it works."""
        if not isinstance(snapshot.queue, Seen):
            return
        queue = snapshot.queue.value
        before, self._moved = self._moved, (queue.moved_at, queue.remaining)
        if before is not None and before[1] > queue.remaining and queue.moved_at > before[0]:
            self._prompts.append(queue.moved_at - before[0])

    def _note_reach(self, snapshot: Snapshot) -> None:
        """The most that each GPU could have given, in two spans: the latest, and the one before it."""
        now = snapshot.taken_at
        if now - self._reach_since >= REACH_SECONDS:
            self._reach_before, self._reach, self._reach_since = self._reach, {}, now
        for gpu, size in reachable(snapshot, self.book, self._rules).items():
            self._reach[gpu] = max(size, self._reach.get(gpu, 0))

    def _reachable(self) -> dict[str, int]:
        both = (self._reach_before, self._reach)
        return {gpu: max(span.get(gpu, 0) for span in both) for gpu in {*self._reach_before, *self._reach}}

    def _pace(self) -> Pace:
        return Pace(
            lease_seconds={owner: _usual(past) for owner, past in self._durations.items()},
            prompt_seconds=_usual(self._prompts) if self._prompts else None,
        )

    def line(self) -> list[Waiting]:
        """Everybody in line, in order."""
        if not self.book.line:
            return []
        snapshot = self.snapshot()
        return [
            Waiting(ticket, place, self._eta(ticket.request, snapshot))
            for place, ticket in enumerate(in_order(self.book, snapshot.taken_at), 1)
        ]

    def _eta(self, request: Request, snapshot: Snapshot) -> float | None:
        verdict = judge(request, snapshot, self.book, self._rules, pace=self._pace(), utcnow=self._clock.utcnow())
        return 0.0 if verdict.admitted else verdict.retry_after_seconds

    def leased_to(self, owner: str) -> int | None:
        """The sum of an owner's leases, bytes; None without any."""
        own = [lease.bytes for lease in self.book.leases.values() if lease.owner == owner]
        return sum(own) if own else None

    # ---- time

    async def run(self) -> None:
        """Ends what is overdue and serves the line, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._records.write_behind(), name="write leases")
            while True:
                self._poked.clear()
                now = self._clock.monotonic()
                for lease in overdue(self.book, now):
                    self._end(lease, EventType.LEASE_EXPIRED, f"not renewed for {lease.ttl_seconds:g} s")
                if self.book.line:
                    await self._look_for_a_promise()
                    self._serve_line()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._until_next(now)):
                        await self._poked.wait()

    def _until_next(self, now: float) -> float:
        ends = [lease.expires_at - now for lease in self.book.leases.values() if not lease.holds]
        beat = LINE_BEAT_SECONDS if self.book.line else 60.0
        # Never so little that the clock might stand still meanwhile.
        return max(0.001, min([beat, *ends]))

    def _poke(self) -> None:
        self._poked.set()
        # The cycle sees who waits, and beats faster while somebody does.
        if self.book.line:
            self._observer.changed.set()

    # ---- telling

    def _tell(self, request: Request, verdict: Verdict, lease: Lease | None, waited: float) -> None:
        outcome = _outcome(verdict)
        self.on_answer(outcome, waited)
        if lease is not None:
            after = f" after {waited:.1f} s in line" if waited >= 1.0 else ""
            source = f"{request.estimate.source}: {request.estimate.words}".removesuffix(": ")
            self._journal.record(
                Event(
                    type=EventType.ADMITTED,
                    target=f"worker:{request.owner}",
                    gpu=lease.gpu,
                    reason=f"{verdict.reason}{after} ({source}; {lease.id})",
                    lease=lease.id,
                    estimated_bytes=lease.bytes,
                    took_seconds=waited,
                )
            )
        if verdict.admitted and not verdict.dry_run:
            if verdict.fail_open and self._worth_telling(request, outcome):
                logger.warning("Admitted {} blindly: {}", request.owner, verdict.reason)
            elif lease is None:
                logger.debug("{} may have {}", request.owner, verdict.reason)
        elif self._worth_telling(request, outcome):
            kind = EventType.DRY_RUN if verdict.dry_run else EventType.REFUSED
            self._journal.record(
                Event(
                    type=kind,
                    target=f"worker:{request.owner}",
                    gpu=verdict.gpu,
                    reason=verdict.reason.removeprefix("DRY RUN: would refuse: "),
                    estimated_bytes=verdict.required_bytes,
                    took_seconds=waited,
                )
            )

    def _worth_telling(self, request: Request, outcome: str) -> bool:
        """The first of equal refusals in a row: a client that asks in a loop must not fill the log."""
        now = self._clock.monotonic()
        key = (request.owner, outcome)
        told = self._refused.get(key)
        if told is not None and now - told < SAME_REFUSAL_SECONDS:
            return False
        self._refused[key] = now
        self._refused.move_to_end(key)
        while len(self._refused) > _OWNERS_REMEMBERED:
            self._refused.popitem(last=False)
        return True


def _usual(past: Collection[float]) -> float:
    """The middle one: a single long one does not change what is usual. (`statistics` costs 2 MiB and 20 ms.)"""
    return sorted(past)[len(past) // 2]


def _outcome(verdict: Verdict) -> str:
    if verdict.fail_open:
        return "fail_open"
    if verdict.dry_run:
        return "dry_run"
    return "admitted" if verdict.admitted else "refused"


def _moment(snapshot: Snapshot) -> tuple[object, ...]:
    readings = (snapshot.gpus, snapshot.ollama, snapshot.comfyui, snapshot.queue)
    return tuple(reading.at if isinstance(reading, Seen) else None for reading in readings)


def _claimed(lease: Lease, size_bytes: int, now: float) -> Lease:
    peak = max(lease.peak_bytes or 0, size_bytes)
    return replace(lease, claimed_bytes=size_bytes, claimed_at=now, peak_bytes=peak)
