"""Workers of every kind against the whole daemon in virtual time: what was promised can be loaded, whatever happens.

The numbers of the GPU are a little old when they arrive, models load at the speed of PCIe, workers crash, forget to
renew and ask again after a lost answer, and the daemon is restarted, also without any chance to say goodbye.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import looptime
import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from loguru import logger

from tests.scenarios.stack import settings as daemon_settings
from vram_manager.admissions import NoSuchLease, TooMany
from vram_manager.clock import Clock
from vram_manager.daemon import Daemon, build
from vram_manager.domain.lease import Estimate, Lease, Priority, Request, Source
from vram_manager.domain.reading import Missing
from vram_manager.domain.size import GIB, Size
from vram_manager.domain.snapshot import Gpu, Gpus, ProcessMemory
from vram_manager.policy.leases import outstanding
from vram_manager.simulator.ledger import Ledger, LedgerGpuSensor
from vram_manager.store import Store

T = TypeVar("T")

MARGIN = 2 * GIB
# 25 GB/s over PCIe, in steps.
CHUNK_BYTES, CHUNK_SECONDS = GIB // 2, 0.02


class Gone(Exception):
    """The daemon went away before it answered."""


class LateSensor:
    """The ledgers' numbers as the driver tells them: a moment after they were true, and with the workers' own pids."""

    def __init__(self, inner: LedgerGpuSensor, pids: Mapping[str, int]) -> None:
        self._inner = inner
        self._pids = pids

    async def read(self, *, with_processes: bool = False) -> Gpus:
        gpus = await self._inner.read(with_processes=with_processes)
        numbered = tuple(replace(gpu, processes=self._numbered(gpu)) for gpu in gpus.gpus)
        await asyncio.sleep(0.005 if with_processes else 0.001)
        return replace(gpus, gpus=numbered)

    def _numbered(self, gpu: Gpu) -> tuple[ProcessMemory, ...] | Missing:
        if isinstance(gpu.processes, Missing):
            return gpu.processes
        # A process of nobody here has a number that no process has.
        return tuple(
            replace(process, pid=self._pids.get(str(process.command[0]), 2**22 + place))
            for place, process in enumerate(gpu.processes)
            if not isinstance(process.command, Missing)
        )

    def close(self) -> None:
        """Nothing to let go."""


@dataclass
class Worker:
    """A process with a life of its own; `claims` says what it has loaded, `pid` is set where it can be seen."""

    site: Site
    name: str
    claims: bool = False
    process: subprocess.Popen[bytes] | None = None
    loaded: dict[str, int] = field(default_factory=dict)
    extra: int = 0
    dead: bool = False

    @property
    def pid(self) -> int | None:
        return None if self.process is None else self.process.pid

    async def ask(self, size: int, **more: Any) -> Lease | None:
        """Asks until it is answered: a question whose answer was lost is asked again, and is the same question."""
        request = self.site.request(self, size, **more)
        while True:
            with contextlib.suppress(Gone):
                answer = await self.site.call(lambda: self.site.daemon.admissions.ask(request, forever))
                if answer.lease is None:
                    return None
                self.loaded.setdefault(answer.lease.id, 0)
                self.site.leases[answer.lease.id] = (self, answer.lease)
                self.site.check()
                return answer.lease
            await self.site.up.wait()

    async def load(self, lease: Lease, size: int | None = None) -> None:
        """Takes its memory bit by bit while the lease lives. No claim here may ever fail."""
        size = lease.bytes - self.loaded[lease.id] if size is None else size
        while size > 0 and self.site.alive(lease.id):
            chunk = min(size, CHUNK_BYTES)
            self.site.card(lease).claim(self.name, chunk)
            self.loaded[lease.id] += chunk
            size -= chunk
            await asyncio.sleep(CHUNK_SECONDS)
        self.says(lease)

    def says(self, lease: Lease) -> None:
        if self.claims and self.site.alive(lease.id) and self.site.up.is_set():
            self.site.daemon.admissions.claimed(lease.id, self.loaded[lease.id])
        self.site.check()

    def frees(self, lease: Lease) -> None:
        """Lets go of what it loaded, and says so if it had claimed it. The lease stays."""
        self.site.card(lease).claim(self.name, -self.loaded[lease.id])
        self.loaded[lease.id] = 0
        self.says(lease)

    async def release(self, lease: Lease) -> None:
        self.site.over(lease.id)
        await self.site.up.wait()
        with contextlib.suppress(NoSuchLease):
            self.site.daemon.admissions.release(lease.id)

    async def keeps(self, lease: Lease, seconds: float) -> None:
        """Lives on with its lease, renewing it in time."""
        until = self.site.now() + seconds
        while self.site.now() < until:
            await asyncio.sleep(min(lease.ttl_seconds / 3, max(0.01, until - self.site.now())))
            if self.site.up.is_set():
                with contextlib.suppress(NoSuchLease):
                    await self.site.daemon.admissions.renew(lease.id)

    def dies(self) -> None:
        """All its memory is back at once, and nobody says anything."""
        self.dead = True
        for ledger in self.site.ledgers.values():
            ledger.release(self.name)
        self.loaded.clear()
        self.extra = 0
        if self.process is not None:
            self.site.bury(self.process)
            self.process = None


async def forever() -> None:
    """The client stays on the line."""
    await asyncio.Event().wait()


class Site:
    """Cards, a daemon over them that may go down and come up again, and the workers it serves."""

    def __init__(
        self, directory: Path, *, totals_gib: tuple[float, ...] = (24,), shows_processes: bool = False
    ) -> None:
        self.directory = directory
        self.ledgers = {f"GPU-{n}": Ledger(int(gib * GIB), uuid=f"GPU-{n}") for n, gib in enumerate(totals_gib)}
        self.shows_processes = shows_processes
        # As a real clock does, it moves between two looks: a rest of 1e-10 s would never be over in virtual time.
        ticks, virtual = count(), Clock.of_running_loop()
        self.clock = Clock(lambda: virtual.monotonic() + next(ticks) * 1e-9, virtual.utcnow)
        self.now = self.clock.monotonic
        self.up = asyncio.Event()
        self.workers: list[Worker] = []
        self.leases: dict[str, tuple[Worker, Lease]] = {}
        self.daemon: Daemon
        self._pids: dict[str, int] = {}
        self._processes: list[subprocess.Popen[bytes]] = []
        self._numbers = count()
        self._calls: set[asyncio.Task[Any]] = set()
        self._work: asyncio.Task[None] | None = None
        self._store: Store
        self._alive: frozenset[str] = frozenset()

    # -- the daemon

    def start(self) -> None:
        sensor = LateSensor(LedgerGpuSensor(*self.ledgers.values(), show_processes=self.shows_processes), self._pids)
        self._store = Store.open(self.directory)
        self.daemon = build(daemon_settings(), self.clock, self._store, gpus=sensor, ollama=None, comfyui=None)
        kept = self.daemon.admissions.book.leases
        missing = {key for key in self._alive if key not in kept and not self.leases[key][0].dead}
        assert missing == set(), f"lost in the restart: {missing}"
        self._work = asyncio.create_task(self.daemon.run())
        self.up.set()

    async def stop(self, *, orderly: bool) -> None:
        """The daemon ends; without order, nothing is written that was not yet written."""
        self._alive = frozenset(lease_id for lease_id in self.leases if self.alive(lease_id))
        self.up.clear()
        assert self._work is not None
        if orderly:
            self.daemon.admissions.hang_up()
        tasks = [self._work, *self._calls]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for lease_id in self.daemon.admissions.book.leases:
            self.daemon.processes.unwatch(lease_id)
        if orderly:
            self.daemon.close()
        else:
            self._store.close()

    async def restart(self, *, orderly: bool = True, seconds: float = 1.0) -> None:
        await self.stop(orderly=orderly)
        await asyncio.sleep(seconds)
        self.start()

    async def call(self, ask: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """What the daemon answers. Raises Gone when it ends before that."""
        await self.up.wait()
        task = asyncio.create_task(ask())
        self._calls.add(task)
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.wait({task})
            raise
        finally:
            self._calls.discard(task)
        if task.cancelled():
            raise Gone
        return task.result()

    # -- the workers

    def hire(self, *, seen: bool = False, claims: bool = False) -> Worker:
        worker = Worker(self, f"worker {next(self._numbers)}", claims=claims)
        if seen:
            worker.process = subprocess.Popen(["sleep", "1000"])
            self._processes.append(worker.process)
            self._pids[worker.name] = worker.process.pid
        self.workers.append(worker)
        return worker

    def bury(self, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait()
        self._processes.remove(process)

    def bury_all(self) -> None:
        for process in list(self._processes):
            self.bury(process)

    def request(self, worker: Worker, size: int, **more: Any) -> Request:
        values: dict[str, Any] = {"margin_bytes": MARGIN, "wait_seconds": 0.0, "pid": worker.pid, **more}
        estimate = Estimate(size=Size(bytes=size), source=Source.REQUEST)
        return Request(id=f"r{next(self._numbers)}", owner=worker.name, estimate=estimate, **values)

    def alive(self, lease_id: str) -> bool:
        """Whether that promise stands. While the daemon is down, those of its last moment do."""
        if lease_id not in self.leases:
            return False
        return lease_id in self.daemon.admissions.book.leases if self.up.is_set() else lease_id in self._alive

    def over(self, lease_id: str) -> None:
        """Its owner has said that it is over: whatever the daemon still believes, nothing is loaded for it."""
        self.leases.pop(lease_id, None)
        self._alive -= {lease_id}

    def card(self, lease: Lease) -> Ledger:
        return self.ledgers[str(lease.gpu)]

    # -- what must hold

    def check(self) -> None:
        """All that the living may still load fits, and so would all that the margin is there for."""
        extra = sum(worker.extra for worker in self.workers)
        for uuid, ledger in self.ledgers.items():
            rest = sum(
                lease.bytes - worker.loaded[lease_id]
                for lease_id, (worker, lease) in self.leases.items()
                if lease.gpu == uuid and not worker.dead and self.alive(lease_id)
            )
            assert rest + MARGIN - extra <= ledger.free_bytes, (
                f"{self.now():.3f}: on {uuid} {rest / GIB:.2f} GiB may still be loaded and "
                f"{ledger.free_bytes / GIB:.2f} GiB are free, {extra / GIB:.2f} of the margin is used: "
                f"{self.daemon.admissions.book.leases}"
            )
        for lease in self.daemon.admissions.book.leases.values():
            assert 0 <= lease.visible_bytes <= lease.bytes

    async def check_nothing_is_lost(self) -> None:
        """Every worker is gone and every time to live is over: all that is free can be had."""
        for worker in self.workers:
            worker.dies()
        await asyncio.sleep(200)
        book = self.daemon.admissions.book
        assert book.leases == {}
        assert book.line == ()
        assert outstanding(book) == {}
        assert _leased_bytes(self.daemon) == 0
        for uuid, ledger in self.ledgers.items():
            lease = await self.hire().ask(ledger.free_bytes - MARGIN, gpu=uuid, ttl_seconds=5.0)
            assert lease is not None
            assert lease.bytes == ledger.free_bytes - MARGIN


def _leased_bytes(daemon: Daemon) -> float:
    text = daemon.metrics.render()
    text = text.decode() if isinstance(text, bytes) else text
    told = re.findall(r"^\w*gpu_memory_leased_bytes(?:\{.*\})? (\S+)$", text, re.MULTILINE)
    return sum(float(number) for number in told)


@contextlib.asynccontextmanager
async def site(directory: Path, **more: Any) -> AsyncIterator[Site]:
    logger.remove()
    place = Site(directory, **more)
    place.start()
    try:
        await asyncio.sleep(1)
        yield place
    finally:
        await place.stop(orderly=True)
        place.bury_all()


# -- what can go wrong between two looks, and at the end of a daemon


def marked(test: Any) -> Any:
    """Not for the whole file: hypothesis runs its examples in loops of their own."""
    return pytest.mark.asyncio(pytest.mark.looptime(test))


@marked
@pytest.mark.parametrize("orderly", [True, False], ids=["in order", "killed"])
async def test_a_restart_does_not_forget_what_a_lease_left_behind_in_its_process(tmp_path: Path, orderly: bool) -> None:
    async with site(tmp_path, shows_processes=True) as place:
        worker = place.hire(seen=True)
        first, second = await worker.ask(8 * GIB), await worker.ask(8 * GIB)
        assert first is not None
        assert second is not None
        await worker.load(first)
        await worker.release(first)
        await asyncio.sleep(5)
        await place.restart(orderly=orderly)
        await asyncio.sleep(1)
        await place.hire().ask(6 * GIB)


@marked
@pytest.mark.parametrize("orderly", [True, False], ids=["in order", "killed"])
async def test_a_restart_does_not_forget_what_a_lease_left_behind_on_the_card(tmp_path: Path, orderly: bool) -> None:
    async with site(tmp_path) as place:
        silent, other = place.hire(), place.hire(claims=True)
        assert await silent.ask(8 * GIB, ttl_seconds=600.0)
        lease = await other.ask(8 * GIB)
        assert lease is not None
        await other.load(lease)
        await other.release(lease)
        await asyncio.sleep(5)
        await place.restart(orderly=orderly)
        await asyncio.sleep(61)
        await place.hire().ask(6 * GIB)


@marked
async def test_a_mere_question_promises_nothing_on_numbers_that_do_not_belong_together(tmp_path: Path) -> None:
    async with site(tmp_path, shows_processes=True) as place:
        holder, asker = place.hire(seen=True), place.hire()
        lease = await holder.ask(16 * GIB, ttl_seconds=3600.0)
        assert lease is not None
        await holder.load(lease)
        waits = asyncio.create_task(place.hire().ask(8 * GIB, wait_seconds=3600.0))
        for _ in range(150):
            await asyncio.sleep(0.107)
            holder.frees(lease)
            for _ in range(3):
                question = place.request(asker, GIB, takes_lease=False)
                await place.call(lambda question=question: place.daemon.admissions.ask(question, forever))
                await asyncio.sleep(0.01)
            await holder.load(lease)
        waits.cancel()
        assert (await asyncio.gather(waits, return_exceptions=True))[0] is not None
        assert len(place.leases) == 1


@marked
async def test_who_asks_beside_a_mere_question_is_told_what_the_processes_hold_now(tmp_path: Path) -> None:
    async with site(tmp_path, shows_processes=True) as place:
        holder, other = place.hire(seen=True), place.hire()
        lease = await holder.ask(16 * GIB, ttl_seconds=600.0)
        assert lease is not None
        await holder.load(lease)
        await asyncio.sleep(5.3)
        holder.frees(lease)
        question = place.request(other, GIB, takes_lease=False)
        asking = asyncio.create_task(place.call(lambda: place.daemon.admissions.ask(question, forever)))
        await asyncio.sleep(0)
        await asyncio.gather(asking, other.ask(8 * GIB))


@marked
@pytest.mark.parametrize("pause", [0.0, 0.04])
async def test_a_claim_is_not_set_against_a_look_from_before_it_was_true(tmp_path: Path, pause: float) -> None:
    async with site(tmp_path) as place:
        place.ledgers["GPU-0"].claim("desktop", 8 * GIB)
        await asyncio.sleep(2)
        worker = place.hire(claims=True)
        lease = await worker.ask(4 * GIB)
        assert lease is not None
        await place.hire().ask(GIB // 4)
        await asyncio.sleep(pause)
        place.card(lease).claim(worker.name, GIB)
        worker.loaded[lease.id] = GIB
        worker.says(lease)
        assert await place.hire().ask(round(10.2 * GIB)) is None


@marked
async def test_an_end_is_not_set_against_a_look_from_before_it(tmp_path: Path) -> None:
    async with site(tmp_path) as place:
        worker = place.hire()
        lease = await worker.ask(4 * GIB)
        assert lease is not None
        await asyncio.sleep(2.3)
        await place.daemon.observer.look_again(0.0)
        await worker.load(lease, GIB // 2)
        await worker.release(lease)
        assert await place.hire().ask(round(21.2 * GIB)) is None


@marked
async def test_who_names_its_process_later_may_not_count_what_that_had_before(tmp_path: Path) -> None:
    async with site(tmp_path, shows_processes=True) as place:
        worker = place.hire(seen=True)
        place.ledgers["GPU-0"].claim(worker.name, 8 * GIB)
        lease = await worker.ask(8 * GIB, pid=None)
        assert lease is not None
        await place.daemon.admissions.renew(lease.id, pid=worker.pid)
        assert await place.hire().ask(6 * GIB) is None


@marked
async def test_a_question_given_up_in_line_leaves_nothing_behind(tmp_path: Path) -> None:
    async with site(tmp_path) as place:
        lease = await place.hire().ask(16 * GIB)
        assert lease is not None
        waits = asyncio.create_task(place.hire().ask(8 * GIB, wait_seconds=600.0, ttl_seconds=30.0))
        await asyncio.sleep(1)
        place.daemon.admissions.release(lease.id)
        waits.cancel()
        await asyncio.gather(waits, return_exceptions=True)
        await asyncio.sleep(31)
        assert place.daemon.admissions.book.line == ()
        assert place.daemon.admissions.book.leases == {}


@marked
async def test_a_lost_answer_is_given_again_after_the_restart(tmp_path: Path) -> None:
    async with site(tmp_path) as place:
        worker = place.hire()
        request = place.request(worker, 8 * GIB)
        first = await place.call(lambda: place.daemon.admissions.ask(request, forever))
        await place.restart(orderly=False)
        again = await place.call(lambda: place.daemon.admissions.ask(request, forever))
        assert first.lease is not None
        assert again.lease is not None
        assert again.lease.id == first.lease.id
        assert len(place.daemon.admissions.book.leases) == 1


# -- whole days


@dataclass(frozen=True)
class Life:
    """What a worker does with its life, beginning `after` the one before it, in seconds."""

    after: float
    kind: str
    manner: str
    gib: int
    pause: float

    async def lived(self, place: Site) -> None:
        worker = place.hire(seen=self.kind == "seen", claims=self.kind == "claims")
        # A silent one is believed a minute after its grant at the earliest.
        ttl = 20.0 if self.manner == "forgets" else 60.0
        size, priority = self.gib * GIB, Priority(self.gib % 3)
        more: dict[str, Any] = {"wait_seconds": self.pause * 4, "ttl_seconds": ttl, "priority": priority}
        try:
            if self.manner == "leaves":
                await self._leaves(worker, size, more)
                return
            lease = await worker.ask(size, **more)
            if lease is None:
                return
            await asyncio.sleep(self.pause / 4)
            match self.manner:
                case "forgets":
                    await self._forgets(worker, lease)
                    return
                case "holds":
                    await self._holds(worker, lease)
                    return
            await worker.load(lease)
            await worker.keeps(lease, self.pause)
            match self.manner:
                case "again":
                    worker.frees(lease)
                    await worker.keeps(lease, self.pause)
                    await worker.load(lease)
                    await worker.keeps(lease, self.pause)
                case "twice":
                    second = await worker.ask(GIB, **more)
                    if second is not None:
                        await worker.load(second, GIB // 2)
                        await worker.release(lease)
                        await worker.keeps(second, self.pause)
                        await worker.load(second)
                        await worker.release(second)
                case "crashes":
                    return
            await worker.release(lease)
            # Torch's cache stays for a while.
            await asyncio.sleep(self.pause)
        except TooMany:
            pass
        finally:
            worker.dies()
            await asyncio.sleep(0.05)

    async def _leaves(self, worker: Worker, size: int, more: dict[str, Any]) -> None:
        """Its client goes away in the middle of the question."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.pause / 7):
                await worker.ask(size, **more)
        worker.dies()

    async def _forgets(self, worker: Worker, lease: Lease) -> None:
        """Never renews; goes on loading after its time, as far as the margin is there for it."""
        await worker.load(lease, lease.bytes // 2)
        await asyncio.sleep(25)
        site = worker.site
        if not site.alive(lease.id):
            worker.extra = min(GIB // 2, MARGIN - sum(one.extra for one in site.workers))
            site.card(lease).claim(worker.name, worker.extra)
            await asyncio.sleep(self.pause)

    async def _holds(self, worker: Worker, lease: Lease) -> None:
        """A connection keeps its lease alive, until it crashes with it."""
        site = worker.site

        async def stays() -> None:
            async with site.daemon.admissions.held(lease.id):
                await worker.load(lease)
                await asyncio.sleep(self.pause + 65)
                worker.dies()

        with contextlib.suppress(Gone, NoSuchLease):
            await site.call(stays)


lives = st.builds(
    Life,
    after=st.sampled_from([0.0, 0.01, 0.3, 1.0, 5.0, 20.0]),
    kind=st.sampled_from(["seen", "claims", "silent"]),
    manner=st.sampled_from(["works", "again", "twice", "crashes", "leaves", "forgets", "holds"]),
    gib=st.sampled_from([1, 2, 4, 8, 14]),
    pause=st.sampled_from([0.1, 1.3, 7.0, 30.0, 70.0]),
)
restarts = st.lists(
    st.tuples(st.sampled_from([0.0, 0.5, 3.0, 30.0, 70.0]), st.booleans(), st.sampled_from([0.0, 2.0])), max_size=3
)


async def _spend(place: Site, day: list[Life], ends: list[tuple[float, bool, float]]) -> None:
    async def restarted() -> None:
        for after, orderly, seconds in ends:
            await asyncio.sleep(after)
            await place.restart(orderly=orderly, seconds=seconds)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(restarted())
        for life in day:
            await asyncio.sleep(life.after)
            tasks.create_task(life.lived(place))
    await place.check_nothing_is_lost()


def _virtual_loop() -> asyncio.AbstractEventLoop:
    """A loop whose clock jumps. Its threads are joined without a deadline, which from 3.12 on would pass in a jump."""
    loop = looptime.patch_event_loop(asyncio.new_event_loop())
    threads = ThreadPoolExecutor()
    loop.set_default_executor(threads)

    async def joined(timeout: float | None = None) -> None:
        threads.shutdown()

    loop.shutdown_default_executor = joined  # type: ignore[method-assign]
    return loop


def _virtually(main: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=_virtual_loop) as runner:
        return runner.run(main)


@given(
    day=st.lists(lives, min_size=2, max_size=14),
    ends=restarts,
    shows=st.booleans(),
    cards=st.sampled_from([(24,), (24, 16)]),
    desktop_gib=st.sampled_from([0, 6]),
)
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
def test_whatever_workers_do_and_however_the_daemon_ends_what_was_promised_can_be_loaded(
    day: list[Life], ends: list[tuple[float, bool, float]], shows: bool, cards: tuple[float, ...], desktop_gib: int
) -> None:
    async def main() -> None:
        with tempfile.TemporaryDirectory() as directory:
            async with site(Path(directory), totals_gib=cards, shows_processes=shows) as place:
                place.ledgers["GPU-0"].claim("desktop", desktop_gib * GIB)
                await _spend(place, day, ends)

    note(f"{len(day)} lives, {len(ends)} restarts")
    _virtually(main())
