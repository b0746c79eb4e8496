"""Nothing is ever promised twice: workers of every kind on real ledgers, with the book kept as the daemon keeps it.

What is checked after every step is what an adversary could make of it: were every worker to load the rest of its
leases at once, and were those who take too much to take all that the safety margin allows, it would still fit.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import count

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from tests.policy.worlds import comfyui, device, gib, model, ollama, queue
from vram_manager.domain.lease import Book, Estimate, Lease, Priority, Request, Source, Ticket, Verdict
from vram_manager.domain.reading import Missing, Off, Seen
from vram_manager.domain.size import GIB, MIB, Size
from vram_manager.domain.snapshot import Gpu, GpuMemory, Gpus, ProcessMemory, Snapshot
from vram_manager.policy import Rules
from vram_manager.policy.admission import judge, lease_of
from vram_manager.policy.leases import account, at_grant, ended, granted, outstanding, overdue, put, renewed
from vram_manager.policy.line import AGEING_SECONDS, OVERTAKING_SECONDS, demands, in_order, kept_before, whose_turn
from vram_manager.simulator.ledger import Ledger

MARGIN = 2 * GIB


@dataclass
class Worker:
    """One process. `loaded` is what it has taken of each lease; `kept` is what it kept of leases that are over, and
    `extra` what it took beyond any promise, by GPU."""

    name: str
    pid: int | None = None
    claims: bool = False
    dead: bool = False
    loaded: dict[str, int] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    extra: dict[str, int] = field(default_factory=dict)


class Box:
    """The cards, the workers on them, and the book with its line; each method is one thing that happens.

    `lies` is what owners said they hold and had let go of: memory that was given away on their word and that they
    may take again. It counts as over-claimed for good, as those it was given to may stay.
    """

    def __init__(
        self,
        totals_gib: Iterable[float] = (24,),
        *,
        shows_processes: bool = True,
        comfyui_gib: float = 0,
        ollama_gib: float = 0,
        desktop_gib: float = 0,
    ) -> None:
        self.ledgers = {
            f"GPU-{place}": Ledger(
                int(total * GIB), reserved_bytes=450 * MIB, uuid=f"GPU-{place}", name=f"Card {place}"
            )
            for place, total in enumerate(totals_gib)
        }
        self.shows_processes = shows_processes
        self.comfyui_bytes, self.ollama_bytes = gib(comfyui_gib), gib(ollama_gib)
        first = self.ledgers["GPU-0"]
        first.resize("comfyui", self.comfyui_bytes)
        first.resize("ollama", self.ollama_bytes)
        first.resize("desktop", gib(desktop_gib))
        self.rules = Rules(comfyui_gpu="GPU-0", ollama_gpu="GPU-0")
        self.now = 0.0
        self.book = Book()
        self.workers: dict[str, Worker] = {}
        self.lies: dict[str, int] = dict.fromkeys(self.ledgers, 0)
        self.admitted = self.refused = 0
        self._numbers = count(1)

    # -- what the daemon does

    def snapshot(self) -> Snapshot:
        """What it sees now, with what is promised, as `Admissions.seen` makes it."""
        gpus = tuple(self._gpu(place, ledger) for place, ledger in enumerate(self.ledgers.values()))
        first = self.ledgers["GPU-0"]
        torch = device(
            torch_gib=self.comfyui_bytes / GIB, free_gib=first.free_bytes / GIB, total_gib=first.usable_bytes / GIB
        )
        chat = (model(size_gib=self.ollama_bytes / GIB),) if self.ollama_bytes else ()
        seen = Snapshot(
            taken_at=self.now,
            gpus=Seen(Gpus(gpus=gpus, driver_version="580.0"), self.now),
            ollama=Seen(ollama(*chat), self.now),
            comfyui=Seen(comfyui(devices=(torch,)), self.now) if self.comfyui_bytes else Off(),
            queue=Seen(queue(), self.now) if self.comfyui_bytes else Off(),
        )
        self.book = account(self.book, seen, {}, self.rules)
        shown: dict[str | None, int] = {}
        for lease in self.book.leases.values():
            shown[lease.gpu] = shown.get(lease.gpu, 0) + lease.visible_bytes
        seen = replace(seen, leased_bytes=outstanding(self.book), workers_bytes=shown)
        return replace(seen, asks=demands(self.book, seen, self.rules))

    def _gpu(self, place: int, ledger: Ledger) -> Gpu:
        pids = {worker.name: worker.pid for worker in self.workers.values() if worker.pid is not None}
        listed = tuple(
            ProcessMemory(pid=pids.get(holder, 9000 + number), used_bytes=held, command=(holder,))
            for number, (holder, held) in enumerate(ledger.holders().items())
        )
        return Gpu(
            uuid=ledger.uuid,
            index=place,
            name=ledger.name,
            memory=GpuMemory(
                total_bytes=ledger.total_bytes,
                used_bytes=ledger.used_bytes,
                free_bytes=ledger.free_bytes,
                reserved_bytes=ledger.reserved_bytes,
            ),
            utilization_percent=0,
            processes=listed if self.shows_processes else Missing("not visible"),
        )

    def request(self, worker: Worker, size: int, **more: object) -> Request:
        return Request(
            id=f"r{next(self._numbers)}",
            owner=worker.name,
            estimate=Estimate(size=Size(bytes=size), source=Source.REQUEST),
            margin_bytes=MARGIN,
            pid=worker.pid if self.shows_processes else None,
            **more,  # type: ignore[arg-type]
        )

    def ask(self, worker: Worker, size: int, **more: object) -> Lease | None:
        """May I? With the numbers of now; nobody in line who could go is passed over."""
        request = self.request(worker, size, **more)
        self.serve()
        snapshot = self.snapshot()
        kept = kept_before(request, self.book, snapshot, self.rules)
        verdict = judge(request, snapshot, self.book, self.rules, kept=kept)
        self.admitted += verdict.admitted
        self.refused += not verdict.admitted
        return self._promise(request, verdict, snapshot) if verdict.admitted else None

    def queue_up(self, worker: Worker, size: int, **more: object) -> Ticket:
        ticket = Ticket(request=self.request(worker, size, **more), since=self.now)
        self.book = replace(self.book, line=(*self.book.line, ticket))
        return ticket

    def serve(self) -> list[str]:
        """Everybody in line whose turn it is, each on what is left after the one before; the owners, in order."""
        served = []
        while (found := whose_turn(self.book, snapshot := self.snapshot(), self.rules)) is not None:
            ticket, verdict = found
            self.leave(ticket)
            served.append(ticket.request.owner)
            if verdict.admitted:
                self.admitted += 1
                self._promise(ticket.request, verdict, snapshot)
        return served

    def leave(self, ticket: Ticket) -> None:
        self.book = replace(self.book, line=tuple(one for one in self.book.line if one is not ticket))

    def _promise(self, request: Request, verdict: Verdict, snapshot: Snapshot) -> Lease:
        lease = lease_of(request, verdict, f"lease-{next(self._numbers)}", self.now)
        lease = at_grant(lease, self.book, snapshot, {}, self.rules)
        self.book = granted(self.book, lease)
        self.workers[request.owner].loaded[lease.id] = 0
        return lease

    def passes(self, seconds: float) -> None:
        self.now += seconds
        for lease in overdue(self.book, self.now):
            self.end(lease.id)

    def renew(self, lease_id: str) -> None:
        self.book = put(self.book, renewed(self.book.leases[lease_id], self.now))

    def end(self, lease_id: str) -> None:
        """Released, expired or its holder gone; what was loaded for it is kept, until somebody lets go of it."""
        lease = self.book.leases[lease_id]
        assert lease.gpu is not None
        worker = self.workers[lease.owner]
        kept = worker.loaded.pop(lease_id)
        worker.kept[lease.gpu] = worker.kept.get(lease.gpu, 0) + kept
        self.book = ended(self.book, lease_id)

    # -- what workers do

    def hire(self, *, seen: bool = False, claims: bool = False) -> Worker:
        number = len(self.workers)
        worker = Worker(f"w{number}", pid=100 + number if seen else None, claims=claims)
        self.workers[worker.name] = worker
        return worker

    def load(self, lease_id: str, size: int) -> None:
        """Takes `size` more of its lease. This is what must never fail."""
        lease, worker = self._of(lease_id)
        size = min(size, lease.bytes - worker.loaded[lease_id])
        self._card(lease).claim(worker.name, size)
        worker.loaded[lease_id] += size
        self._say(lease_id)

    def reuse(self, lease_id: str) -> None:
        """Loads into what the process has kept (torch's cache): the card sees nothing of it."""
        lease, worker = self._of(lease_id)
        assert lease.gpu is not None
        size = min(worker.kept.get(lease.gpu, 0), lease.bytes - worker.loaded[lease_id])
        worker.kept[lease.gpu] = worker.kept.get(lease.gpu, 0) - size
        worker.loaded[lease_id] += size
        self._say(lease_id)

    def let_go(self, lease_id: str, size: int, *, silently: bool = False) -> None:
        """Frees some of what it loaded and keeps the lease; an honest owner who had claimed it says so."""
        lease, worker = self._of(lease_id)
        size = min(size, worker.loaded[lease_id])
        if silently and lease.claimed_bytes is not None:
            size = min(size, self.margin_left(lease.gpu))
            self.lies[str(lease.gpu)] += size
        self._card(lease).claim(worker.name, -size)
        worker.loaded[lease_id] -= size
        if not silently:
            self._say(lease_id)

    def _say(self, lease_id: str) -> None:
        lease, worker = self._of(lease_id)
        if worker.claims:
            said = worker.loaded[lease_id]
            peak = max(lease.peak_bytes or 0, said)
            self.book = put(self.book, replace(lease, claimed_bytes=said, peak_bytes=peak))

    def drop_kept(self, worker: Worker, uuid: str) -> None:
        self.ledgers[uuid].claim(worker.name, -worker.kept.pop(uuid, 0))

    def take_extra(self, worker: Worker, uuid: str, size: int) -> None:
        """Takes what nobody promised, as far as all who do so stay within the safety margin."""
        size = min(size, self.margin_left(uuid))
        self.ledgers[uuid].claim(worker.name, size)
        worker.extra[uuid] = worker.extra.get(uuid, 0) + size

    def drop_extra(self, worker: Worker, uuid: str) -> None:
        self.ledgers[uuid].claim(worker.name, -worker.extra.pop(uuid, 0))

    def crash(self, worker: Worker) -> None:
        """All its memory is back at once. Its leases end with it where its process can be watched, else in time."""
        for uuid, ledger in self.ledgers.items():
            ledger.release(worker.name)
            worker.kept[uuid] = worker.extra[uuid] = 0
        worker.dead = True
        self.book = replace(self.book, line=tuple(one for one in self.book.line if one.request.owner != worker.name))
        for lease_id in list(worker.loaded):
            worker.loaded[lease_id] = 0
            if worker.pid is not None and self.shows_processes:
                self.end(lease_id)

    # -- what must hold

    def margin_left(self, uuid: str | None) -> int:
        """How much more the over-claimers may take of the safety margin of that card."""
        taken = sum(worker.extra.get(str(uuid), 0) for worker in self.workers.values())
        return MARGIN - taken - self.lies[str(uuid)]

    def rest(self, uuid: str) -> int:
        """What the living may still load there."""
        return sum(
            lease.bytes - self.workers[lease.owner].loaded[lease.id]
            for lease in self.book.leases.values()
            if lease.gpu == uuid and not self.workers[lease.owner].dead
        )

    def look(self) -> None:
        """A turn of the daemon: what it then believes to see is there."""
        self.snapshot()
        for uuid, ledger in self.ledgers.items():
            here = [lease for lease in self.book.leases.values() if lease.gpu == uuid]
            assert sum(lease.visible_bytes for lease in here) <= ledger.used_bytes

    def check(self) -> None:
        for uuid, ledger in self.ledgers.items():
            rest, left = self.rest(uuid), self.margin_left(uuid)
            assert rest + left <= ledger.free_bytes, (
                f"{uuid}: {rest / GIB:.2f} GiB may still be loaded and {left / GIB:.2f} GiB of the margin be taken, "
                f"{ledger.free_bytes / GIB:.2f} GiB are free: {self.book.leases}"
            )
        for lease in self.book.leases.values():
            assert 0 <= lease.visible_bytes <= lease.bytes
            for number in (lease.used_bytes, lease.peak_bytes, lease.baseline_bytes, lease.unaccounted_bytes):
                assert number is None or number >= 0
        assert all(size > 0 for size in outstanding(self.book).values())

    def check_nothing_is_lost(self) -> None:
        """Once all have gone, all that is free can be had."""
        for worker in list(self.workers.values()):
            for lease_id in list(worker.loaded):
                if lease_id in self.book.leases:
                    self.end(lease_id)
            for uuid in self.ledgers:
                self.drop_kept(worker, uuid)
                self.drop_extra(worker, uuid)
        self.book = replace(self.book, line=())
        assert self.book.leases == {}
        assert outstanding(self.book) == {}
        for uuid, ledger in self.ledgers.items():
            assert not any(holder.startswith("w") for holder in ledger.holders())
            last = self.hire()
            lease = self.ask(last, ledger.free_bytes - MARGIN, gpu=uuid)
            assert lease is not None
            self.load(lease.id, lease.bytes)
            self.end(lease.id)
            self.drop_kept(last, uuid)

    def _of(self, lease_id: str) -> tuple[Lease, Worker]:
        lease = self.book.leases[lease_id]
        return lease, self.workers[lease.owner]

    def _card(self, lease: Lease) -> Ledger:
        return self.ledgers[str(lease.gpu)]


# -- days of many workers

KINDS = (
    "hire",
    "hire",
    "ask",
    "ask",
    "ask",
    "queue",
    "serve",
    "load all",
    "load all",
    "load some",
    "look",
    "tick",
    "tick",
    "minute",
    "renew",
    "release",
    "release and keep",
    "reuse",
    "let go",
    "let go silently",
    "drop kept",
    "take extra",
    "drop extra",
    "crash",
)
SIZES = tuple(gib(size) for size in (0.5, 1, 2, 4, 8, 12))
# What happens, to whom of those it can happen to, and how much of it.
Step = tuple[str, int, int]


def act(box: Box, step: Step) -> None:
    """One step of a day; nothing where there is nobody it could happen to."""
    kind, pick, amount = step
    size = SIZES[amount % len(SIZES)]
    alive = [worker for worker in box.workers.values() if not worker.dead]
    leases = [lease for lease in box.book.leases.values() if not box.workers[lease.owner].dead]
    uuid = list(box.ledgers)[amount % len(box.ledgers)]
    match kind:
        case "hire":
            box.hire(seen=pick % 3 == 0, claims=pick % 3 == 1)
        case "tick" | "minute":
            box.passes((0.3, 1.0, 5.0, 15.0)[pick % 4] if kind == "tick" else 61.0)
        case "look":
            box.look()
        case "serve":
            box.serve()
    if alive:
        worker = alive[pick % len(alive)]
        priority = Priority(pick % 3)
        match kind:
            case "ask":
                box.ask(worker, size, priority=priority, ttl_seconds=(30.0, 600.0)[amount % 2])
            case "queue":
                box.queue_up(worker, size, priority=priority, ttl_seconds=600.0)
            case "drop kept":
                box.drop_kept(worker, uuid)
            case "take extra":
                box.take_extra(worker, uuid, size // 4)
            case "drop extra":
                box.drop_extra(worker, uuid)
            case "crash":
                box.crash(worker)
    if leases:
        lease = leases[pick % len(leases)]
        match kind:
            case "load all":
                box.load(lease.id, lease.bytes)
            case "load some":
                box.load(lease.id, size // 2)
            case "renew":
                box.renew(lease.id)
            case "release":
                box.let_go(lease.id, lease.bytes)
                box.end(lease.id)
            case "release and keep":
                box.end(lease.id)
            case "reuse":
                box.reuse(lease.id)
            case "let go" | "let go silently":
                box.let_go(lease.id, size, silently=kind == "let go silently")


days = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 11), st.integers(0, 11)), min_size=5, max_size=60)
boxes = st.builds(
    Box,
    st.sampled_from([(24,), (24, 16)]),
    shows_processes=st.booleans(),
    comfyui_gib=st.sampled_from([0.0, 4.0]),
    ollama_gib=st.sampled_from([0.0, 3.0]),
    desktop_gib=st.sampled_from([0.0, 4.0]),
)


@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(box=boxes, day=days)
def test_what_was_promised_can_always_be_loaded(box: Box, day: list[Step]) -> None:
    for step in day:
        note(f"{box.now:6.1f} {step}")
        act(box, step)
        box.check()
    box.check_nothing_is_lost()


# What these days have found, smallest first.


def test_memory_that_a_lease_leaves_behind_in_a_process_is_not_taken_for_what_its_other_lease_will_load() -> None:
    box = Box()
    worker = box.hire(seen=True)
    first, second = box.ask(worker, 8 * GIB), box.ask(worker, 8 * GIB)
    assert first is not None
    assert second is not None
    box.load(first.id, 8 * GIB)
    box.end(first.id)
    box.ask(box.hire(), 8 * GIB)
    box.check()


def test_memory_that_the_newer_of_two_leases_leaves_behind_is_not_taken_for_the_older_ones() -> None:
    box = Box()
    worker = box.hire(seen=True)
    older, newer = box.ask(worker, 8 * GIB), box.ask(worker, 8 * GIB)
    assert older is not None
    assert newer is not None
    box.load(newer.id, 8 * GIB)
    box.look()
    box.end(newer.id)
    box.ask(box.hire(), 8 * GIB)
    box.check()


@pytest.mark.parametrize("seen", [False, True])
def test_memory_that_a_lease_leaves_behind_is_not_taken_for_what_a_silent_worker_will_load(seen: bool) -> None:
    box = Box()
    box.ask(box.hire(), 8 * GIB, ttl_seconds=600.0)
    leaves = box.ask(box.hire(seen=seen), 8 * GIB)
    assert leaves is not None
    box.load(leaves.id, 8 * GIB)
    box.look()
    box.end(leaves.id)
    box.passes(61)
    box.ask(box.hire(), 8 * GIB)
    box.check()


def test_what_one_worker_claims_is_not_taken_for_what_a_silent_one_will_load() -> None:
    box = Box(shows_processes=False, desktop_gib=8)
    box.ask(box.hire(), 6 * GIB, ttl_seconds=600.0)
    claims = box.ask(box.hire(claims=True), 6 * GIB, ttl_seconds=600.0)
    assert claims is not None
    box.load(claims.id, 6 * GIB)
    box.passes(61)
    box.ask(box.hire(), 6 * GIB)
    box.check()


def test_memory_claimed_and_given_back_without_a_word_is_not_promised_where_nobody_else_holds_any() -> None:
    box = Box(shows_processes=False)
    lease = box.ask(box.hire(claims=True), 20 * GIB)
    assert lease is not None
    box.load(lease.id, 20 * GIB)
    box.ledgers["GPU-0"].claim("w0", -20 * GIB)
    assert box.ask(box.hire(), 8 * GIB) is None


def test_hundreds_of_workers_on_two_cards_are_never_promised_the_same_byte_twice() -> None:
    for seed in range(6):
        chance = random.Random(seed)
        box = Box((80, 48), shows_processes=chance.random() < 0.5, comfyui_gib=4, desktop_gib=4)
        for number in range(200):
            box.hire(seen=number % 3 == 0, claims=number % 3 == 1)
        day = [(chance.choice(KINDS), chance.randrange(1000), chance.randrange(1000)) for _ in range(800)]
        for step in day:
            act(box, step)
            box.check()
        assert box.admitted > 20
        box.check_nothing_is_lost()


# -- the answer itself


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(box=boxes, day=days, size=st.sampled_from(SIZES), pinned=st.booleans())
def test_who_is_admitted_fits_beside_all_promises_and_who_is_refused_does_not(
    box: Box, day: list[Step], size: int, pinned: bool
) -> None:
    for step in day:
        act(box, step)
    asker = box.hire()
    request = box.request(asker, size, gpu="0" if pinned else None)
    snapshot = box.snapshot()
    verdict = judge(request, snapshot, box.book, box.rules)
    promised = {
        uuid: sum(lease.bytes - lease.visible_bytes for lease in box.book.leases.values() if lease.gpu == uuid)
        for uuid in box.ledgers
    }
    fits = {
        uuid
        for uuid, ledger in box.ledgers.items()
        if size + MARGIN <= ledger.free_bytes - promised[uuid] and (uuid == "GPU-0" or not pinned)
    }
    note(f"promised {promised}, fits on {fits}: {verdict}")
    assert verdict.admitted == bool(fits)
    assert not verdict.admitted or verdict.gpu in fits
    assert verdict.required_bytes == size
    assert (verdict.shortfall_bytes == 0) == verdict.admitted
    for number in (verdict.available_bytes, verdict.shortfall_bytes, verdict.reclaimable_bytes):
        assert number is not None
        assert number >= 0
    assert all(0 < one.bytes < size for one in verdict.alternatives)
    assert verdict.retry_after_seconds is None or verdict.retry_after_seconds > 0


# -- the line

owners = st.sampled_from(["a", "b", "c", "d"])
tickets = st.builds(
    lambda owner, priority, since, size, number: Ticket(
        request=Request(
            id=f"r{number}",
            owner=owner,
            estimate=Estimate(size=Size(bytes=size), source=Source.REQUEST),
            margin_bytes=MARGIN,
            priority=priority,
        ),
        since=since,
    ),
    owners,
    st.sampled_from(Priority),
    st.floats(0, 400),
    st.sampled_from(SIZES),
    st.integers(0, 10**6),
)
lines = st.builds(
    lambda line, served_at: Book(line=tuple(line), served_at=served_at),
    st.lists(tickets, max_size=12),
    st.dictionaries(owners, st.floats(0, 400)),
)


@settings(max_examples=200, deadline=None)
@given(book=lines)
def test_putting_the_line_in_order_loses_nobody_and_adds_nobody(book: Book) -> None:
    order = in_order(book, 400.0)
    assert sorted(map(id, order)) == sorted(map(id, book.line))


@settings(max_examples=200, deadline=None)
@given(book=lines)
def test_nobody_goes_before_a_higher_priority_without_having_waited_for_it(book: Book) -> None:
    order = in_order(book, 400.0)
    for place, first in enumerate(order):
        for later in order[place + 1 :]:
            classes = first.request.priority - later.request.priority
            assert 400.0 - first.since >= classes * AGEING_SECONDS


@settings(max_examples=100, deadline=None)
@given(book=lines)
def test_whose_turn_it_is_leaves_nobody_before_it_who_would_have_fitted(book: Book) -> None:
    box = Box()
    box.now, box.book = 400.0, book
    snapshot = box.snapshot()
    found = whose_turn(book, snapshot, box.rules)
    alone = [ticket for ticket in in_order(book, 400.0) if judge(ticket.request, snapshot, book, box.rules).admitted]
    assert (found and found[0]) is (alone[0] if alone else None)


@dataclass
class Crowd:
    """Small jobs that keep coming, `each` so large and `run` seconds long; who is refused waits in line.

    `owners` is how many take turns, 0: a new one each time.
    """

    box: Box
    each: int
    run: float
    every: float
    owners: int
    priority: Priority = Priority.NORMAL
    begun: dict[str, float] = field(default_factory=dict)
    served: list[str] = field(default_factory=list)

    def live(self, seconds: float, until: Worker | None = None) -> float | None:
        """Time goes by; when `until` got its lease, the time of that."""
        box, end = self.box, self.box.now + seconds
        arrives = box.now
        while box.now < end:
            box.now += 1.0
            for lease_id, at in list(self.begun.items()):
                if box.now - at >= self.run:
                    box.let_go(lease_id, self.each)
                    box.end(lease_id)
                    del self.begun[lease_id]
            self._serve()
            if until is not None and until.loaded:
                return box.now
            if box.now >= arrives:
                arrives += self.every
                self._arrives()
        return None

    def _arrives(self) -> None:
        box = self.box
        crowd = [worker for worker in box.workers.values() if worker.name.startswith("small")]
        if not self.owners or len(crowd) < self.owners:
            worker = Worker(f"small{len(crowd)}", claims=True)
            box.workers[worker.name] = worker
        else:
            worker = crowd[len(self.served) % self.owners]
        # Some always wait; the API lets no more than 16 of one owner do so.
        if len(box.book.line) < 10:
            box.queue_up(worker, self.each, priority=self.priority, ttl_seconds=10_000.0)
            self._serve()

    def _serve(self) -> None:
        self.served += self.box.serve()
        for lease in self.box.book.leases.values():
            if lease.id not in self.begun and lease.owner.startswith("small"):
                self.box.load(lease.id, lease.bytes)
                self.begun[lease.id] = self.box.now


def waits_for(large: Priority, crowd: Crowd, *, share: float, served_before: bool) -> float | None:
    """How long a request for so much of the card waits in that crowd, at most ten minutes."""
    box = crowd.box
    worker = Worker("large", claims=True)
    box.workers[worker.name] = worker
    if served_before:
        first = box.ask(worker, GIB)
        assert first is not None
        box.end(first.id)
        worker.loaded.clear()
    crowd.live(30)
    began = box.now
    box.queue_up(worker, round((box.ledgers["GPU-0"].usable_bytes - MARGIN) * share), priority=large)
    got = crowd.live(300, until=worker)
    return None if got is None else got - began


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    each=st.sampled_from(SIZES[1:4]),
    run=st.sampled_from([3.0, 20.0, 40.0]),
    owners=st.sampled_from([0, 1, 3]),
    small=st.sampled_from(Priority),
    large=st.sampled_from(Priority),
    served_before=st.booleans(),
    share=st.sampled_from([0.5, 1.0]),
)
def test_a_large_request_is_not_starved_by_small_ones(
    each: int, run: float, owners: int, small: Priority, large: Priority, served_before: bool, share: float
) -> None:
    waited = waits_for(large, Crowd(Box(), each, run, 1.0, owners, small), share=share, served_before=served_before)
    # Two classes to rise, the time in which it may be overtaken, one job's run for the room, and then its turn.
    bound = 2 * AGEING_SECONDS + OVERTAKING_SECONDS + run + 30
    note(f"waited {waited} s, at most {bound}")
    assert waited is not None
    assert waited <= bound


@pytest.mark.parametrize(
    ("small", "run", "large", "share"),
    [(Priority.INTERACTIVE, 3.0, Priority.NORMAL, 1.0), (Priority.NORMAL, 40.0, Priority.INTERACTIVE, 0.5)],
    ids=["while interactive ones come", "while others wait long enough to rise"],
)
def test_a_large_request_is_not_starved_by_ones_of_ever_new_owners(
    small: Priority, run: float, large: Priority, share: float
) -> None:
    crowd = Crowd(Box(), gib(4), run, every=1.0, owners=0, priority=small)
    assert waits_for(large, crowd, share=share, served_before=True) is not None


@settings(max_examples=25, deadline=None)
@given(
    each=st.sampled_from(SIZES[2:5]), run=st.sampled_from([3.0, 20.0]), flood=st.integers(2, 16), after=st.floats(0, 20)
)
def test_one_who_floods_the_line_delays_another_by_one_job_once_both_have_risen(
    each: int, run: float, flood: int, after: float
) -> None:
    box = Box((18,))
    crowd = Crowd(box, each, run, every=1.0, owners=1)
    crowd.live(run + flood)
    other = Worker("small other", claims=True)
    box.workers[other.name] = other
    crowd.live(after)
    box.queue_up(other, each)
    began, before = box.now, len(crowd.served)
    got = crowd.live(AGEING_SECONDS + 3 * run, until=other)
    note(f"served before it: {len(crowd.served) - before}")
    assert got is not None
    # What the other has asked for longer ago may have risen a class already.
    assert got - began <= AGEING_SECONDS + 2 * run + 2
