"""The desk over fakes, in virtual time: line, leases, restarts, and a disk that fails."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from loguru import logger

from tests.fakes import GIB, Card, FakeComfyUI, FakeGpus, FakeOllama, WallClock, now, until
from tests.policy.desk import request
from tests.scenarios.stack import settings
from vram_manager.admissions import Answer, NoSuchLease, TooMany
from vram_manager.clock import Clock
from vram_manager.daemon import Daemon, build
from vram_manager.domain.event import EventType
from vram_manager.domain.lease import Priority, Request
from vram_manager.errors import SensorError, TimedOut
from vram_manager.store import Store

pytestmark = [pytest.mark.asyncio, pytest.mark.looptime]


class Desk:
    """A daemon at work over fakes: a card of 24 GiB, of which an idle ComfyUI holds 8."""

    def __init__(self, directory: Path, card: Card, **changed: Any) -> None:
        self.card = card
        self.gpus, self.ollama, self.comfyui = FakeGpus(card), FakeOllama(card), FakeComfyUI(card)
        self.store = Store.open(directory)
        clock = Clock(asyncio.get_running_loop().time, WallClock())
        self.daemon: Daemon = build(
            settings(**changed), clock, self.store, gpus=self.gpus, ollama=self.ollama, comfyui=self.comfyui
        )
        self.admissions = self.daemon.admissions

    async def ask(self, asked: Request, gone: asyncio.Event | None = None) -> Answer:
        left = gone or asyncio.Event()
        return await self.admissions.ask(asked, left.wait)  # type: ignore[arg-type]

    def told(self, kind: EventType) -> list[str]:
        return [entry.event.reason for entry in self.daemon.journal.events() if entry.event.type is kind]

    @property
    def line(self) -> list[str]:
        return [one.ticket.request.owner for one in self.admissions.line()]


@contextlib.asynccontextmanager
async def at_work(
    directory: Path, *, comfyui_gib: float = 8, orderly: bool = True, **changed: Any
) -> AsyncIterator[Desk]:
    """`orderly` False ends as kill -9 would: nothing is written at the end."""
    logger.remove()
    desk = Desk(directory, Card(), **changed)
    desk.comfyui.hold(comfyui_gib)
    work = asyncio.create_task(desk.daemon.run())
    try:
        await until(lambda: desk.daemon.cycle.snapshot is not None)
        yield desk
    finally:
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        if orderly:
            desk.daemon.close()
        else:
            desk.store.close()


async def test_a_prompt_that_runs_is_waited_for_and_then_made_room_of(tmp_path: Path):
    async with at_work(tmp_path) as desk:
        desk.comfyui.push(1)
        waiting = asyncio.create_task(desk.ask(request(20, wait_seconds=600.0)))
        await asyncio.sleep(100)
        assert not waiting.done()
        assert desk.comfyui.posts == []
        desk.comfyui.push(0)
        answer = await waiting
        assert answer.lease is not None
        assert answer.waited_seconds == pytest.approx(103, abs=4)
        assert len(desk.comfyui.posts) == 1


async def test_a_batch_job_takes_nothing_from_a_comfyui_that_may_only_be_pausing(tmp_path: Path):
    async with at_work(tmp_path) as desk:
        desk.comfyui.push(1)
        await asyncio.sleep(5)
        desk.comfyui.push(0)
        batch = asyncio.create_task(desk.ask(request(20, owner="b", wait_seconds=600.0, priority=Priority.BATCH)))
        await asyncio.sleep(20)
        assert desk.comfyui.posts == []
        assert (await batch).lease is not None
        # As long as with nobody waiting: COMFYUI_IDLE_SECONDS of the balanced profile.
        assert desk.comfyui.posts[0][0] >= 5 + 30


async def test_who_may_not_wait_is_refused_while_room_could_be_made(tmp_path: Path):
    async with at_work(tmp_path) as desk:
        answer = await desk.ask(request(20, wait_seconds=0.0))
        assert answer.lease is None
        assert answer.verdict.reclaimable_bytes == 8 * GIB
        await asyncio.sleep(60)
        assert desk.comfyui.posts == []


async def test_without_a_word_about_waiting_it_waits_only_where_room_can_be_made(tmp_path: Path):
    async with at_work(tmp_path) as desk:
        before = now()
        assert (await desk.ask(request(20, owner="a"))).lease is not None
        assert now() - before <= 15
        before = now()
        assert (await desk.ask(request(20, owner="b"))).lease is None
        assert now() - before < 1


async def test_comfyui_that_gives_nothing_back_is_waited_for_no_longer_than_making_room_takes(tmp_path: Path):
    async with at_work(tmp_path) as desk:
        desk.comfyui.acts_after_seconds = None
        answer = await desk.ask(request(20))
        assert answer.lease is None
        assert 10 <= answer.waited_seconds <= 16


async def test_a_request_leaves_the_line_with_its_client(tmp_path: Path):
    async with at_work(tmp_path) as desk:
        desk.comfyui.push(1)
        gone = asyncio.Event()
        waiting = asyncio.create_task(desk.ask(request(20, wait_seconds=600.0), gone))
        await until(lambda: desk.line)
        gone.set()
        answer = await waiting
        assert answer.verdict.reason.endswith("the client went away")
        assert desk.line == []
        assert desk.daemon.cycle.see(desk.daemon.observer.look()).asks == ()


async def test_a_request_that_is_cancelled_leaves_nothing_behind(tmp_path: Path):
    async with at_work(tmp_path) as desk:
        desk.comfyui.push(1)
        waiting = asyncio.create_task(desk.ask(request(20, wait_seconds=600.0)))
        await until(lambda: desk.line)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert (desk.line, desk.admissions.book.leases) == ([], {})


async def test_the_same_request_does_not_stand_in_line_twice(tmp_path: Path):
    async with at_work(tmp_path) as desk:
        desk.comfyui.push(1)
        waiting = asyncio.create_task(desk.ask(request(20, wait_seconds=60.0)))
        await until(lambda: desk.line)
        with pytest.raises(TooMany, match="in line already"):
            await desk.ask(request(20, wait_seconds=60.0))
        await waiting


async def test_a_line_that_is_full_is_told(tmp_path: Path):
    async with at_work(tmp_path) as desk:
        desk.comfyui.push(1)
        crowd = [
            asyncio.create_task(desk.ask(request(20, owner=f"w{number}", wait_seconds=50.0))) for number in range(256)
        ]
        await until(lambda: len(desk.admissions.book.line) == 256)
        with pytest.raises(TooMany, match="256 requests are in line already"):
            await desk.ask(request(20, owner="late", wait_seconds=50.0))
        answers = await asyncio.gather(*crowd)
        assert {answer.lease for answer in answers} == {None}
        assert all(answer.verdict.position for answer in answers)


async def test_the_eta_comes_from_how_long_prompts_take(tmp_path: Path):
    async with at_work(tmp_path) as desk:
        for _ in range(3):
            desk.comfyui.push(1)
            await asyncio.sleep(40)
            desk.comfyui.push(0)
            await asyncio.sleep(10)
        desk.comfyui.push(1)
        await asyncio.sleep(10)
        waiting = asyncio.create_task(desk.ask(request(20, wait_seconds=5.0)))
        await until(lambda: desk.line)
        (one,) = desk.admissions.line()
        assert one.eta_seconds == pytest.approx(35, abs=6)
        answer = await waiting
        assert ", ETA " in answer.verdict.reason
        assert answer.verdict.retry_after_seconds == pytest.approx(30, abs=6)


async def test_the_eta_comes_from_how_long_an_owner_keeps_its_leases(tmp_path: Path):
    async with at_work(tmp_path, comfyui_gib=0) as desk:
        for _ in range(3):
            held = (await desk.ask(request(20, owner="a", id=f"q{now()}", ttl_seconds=600.0))).lease
            assert held is not None
            await asyncio.sleep(50)
            desk.admissions.release(held.id)
        await desk.ask(request(20, owner="a", id="last", ttl_seconds=600.0))
        await asyncio.sleep(20)
        refused = (await desk.ask(request(20, owner="b", wait_seconds=0.0))).verdict
        assert refused.retry_after_seconds == pytest.approx(30, abs=2)
        assert "a has a lease of 20.0 GiB" in refused.reason


async def test_a_lease_ends_to_the_second_when_nobody_renews_it(tmp_path: Path):
    async with at_work(tmp_path) as desk:
        began = now()
        await desk.ask(request(4, ttl_seconds=30.0))
        await until(lambda: not desk.admissions.book.leases)
        assert now() - began == pytest.approx(30, abs=0.3)
        assert desk.told(EventType.LEASE_EXPIRED)


async def test_the_leases_of_an_owner_are_its_budget(tmp_path: Path):
    async with at_work(tmp_path) as desk:
        for number in range(2):
            await desk.ask(request(4, id=f"q{number}"))
        assert desk.admissions.leased_to("worker-1") == 8 * GIB
        assert desk.admissions.leased_to("nobody") is None


async def test_a_gpu_that_does_not_answer_in_time_is_as_old_as_it_was(tmp_path: Path):
    async with at_work(tmp_path) as desk:
        desk.gpus.takes_seconds = 3.0
        began = now()
        assert (await desk.ask(request(4))).lease is not None
        assert now() - began <= 0.6


async def test_without_a_reading_the_lease_belongs_to_no_gpu_until_there_is_one(tmp_path: Path):
    async with at_work(tmp_path) as desk:
        for fake in (desk.gpus, desk.comfyui):
            fake.error = SensorError("driver gone")
        await asyncio.sleep(60)
        answer = await desk.ask(request(4))
        assert answer.verdict.fail_open
        assert answer.lease is not None
        assert answer.lease.gpu is None
        for fake in (desk.gpus, desk.comfyui):
            fake.error = None
        await asyncio.sleep(10)
        assert desk.admissions.lease(answer.lease.id).gpu == "GPU-a"
        assert (await desk.ask(request(16, owner="b", wait_seconds=0.0))).lease is None


@pytest.mark.parametrize("orderly", [True, False])
async def test_every_live_lease_goes_on_after_a_restart(tmp_path: Path, orderly: bool):
    async with at_work(tmp_path, orderly=orderly) as desk:
        kept = [(await desk.ask(request(4, owner=owner, pid=os.getpid()))).lease for owner in ("a", "b")]
    async with at_work(tmp_path) as desk:
        assert sorted(desk.admissions.book.leases) == sorted(one.id for one in kept if one)
        assert (await desk.ask(request(4, owner="a"))).lease == desk.admissions.book.leases[kept[0].id]  # type: ignore[union-attr]
        await until(lambda: not desk.admissions.book.leases)


async def test_a_lease_whose_process_ended_meanwhile_does_not_go_on(tmp_path: Path):
    async with at_work(tmp_path) as desk:
        lease = (await desk.ask(request(4, pid=os.getpid()))).lease
        assert lease is not None
    store = Store.open(tmp_path)
    body = json.loads(store.leases()[lease.id])
    store.save_leases({lease.id: json.dumps(body | {"pid_started": "1"})})
    store.close()
    async with at_work(tmp_path) as desk:
        assert desk.admissions.book.leases == {}
    assert_forgotten(tmp_path)


def assert_forgotten(directory: Path) -> None:
    store = Store.open(directory)
    assert store.leases() == {}
    store.close()


async def test_a_lease_that_nobody_renews_does_not_outlive_many_restarts(tmp_path: Path):
    async with at_work(tmp_path) as desk:
        await desk.ask(request(4, ttl_seconds=600.0))
    counts = []
    for _ in range(5):
        async with at_work(tmp_path) as desk:
            counts.append(len(desk.admissions.book.leases))
    assert counts == [1, 1, 1, 0, 0]


async def test_a_renewed_lease_outlives_any_number_of_restarts(tmp_path: Path):
    async with at_work(tmp_path) as desk:
        lease = (await desk.ask(request(4, ttl_seconds=600.0))).lease
        assert lease is not None
    for _ in range(6):
        async with at_work(tmp_path) as desk:
            await desk.admissions.renew(lease.id)


@pytest.mark.parametrize("body", ["", "null", "[]", "{}", '{"estimate": 5}', '{"estimate": {"size": {}}}'])
async def test_a_lease_that_cannot_be_read_is_forgotten(tmp_path: Path, body: str):
    store = Store.open(tmp_path)
    store.save_leases({"lease-x": body})
    store.close()
    async with at_work(tmp_path) as desk:
        assert desk.admissions.book.leases == {}
    assert_forgotten(tmp_path)


async def test_a_disk_that_is_full_is_told_once_and_nobody_is_turned_away(tmp_path: Path):
    async with at_work(tmp_path) as desk:
        said: list[str] = []
        logger.add(said.append, format="{message}", level="WARNING")
        desk.admissions._records._store = FullDisk(desk.store)
        for number in range(3):
            assert (await desk.ask(request(1, id=f"q{number}"))).lease is not None
        await asyncio.sleep(5)
        assert [line.strip() for line in said] == [
            "Leases cannot be written (disk full): a restart of the daemon will forget them"
        ]
        desk.admissions._records._store = desk.store
        await asyncio.sleep(5)
    async with at_work(tmp_path) as desk:
        assert len(desk.admissions.book.leases) == 3


class FullDisk(Store):
    """A store whose disk has no room."""

    def __init__(self, store: Store) -> None:
        self.__dict__ |= store.__dict__

    def save_leases(self, bodies: object) -> None:
        raise sqlite3.OperationalError("disk full")


async def test_what_is_no_live_lease_is_said_to_be_none(tmp_path: Path):
    async with at_work(tmp_path) as desk:
        for act in (desk.admissions.release, desk.admissions.lease):
            with pytest.raises(NoSuchLease, match="lease-x is no live lease"):
                act("lease-x")
        with pytest.raises(NoSuchLease, match="lease-x is no live lease"):
            await desk.admissions.renew("lease-x")


async def test_a_slow_ollama_does_not_hold_up_an_answer(tmp_path: Path):
    async with at_work(tmp_path) as desk:
        desk.ollama.takes_seconds, desk.ollama.error = 15.0, TimedOut("no answer within 15 s")
        await asyncio.sleep(30)
        began = now()
        assert (await desk.ask(request(4))).lease is not None
        assert now() - began < 0.1


async def test_while_somebody_waits_the_gpu_is_looked_at_four_times_a_second(tmp_path: Path):
    async with at_work(tmp_path) as desk:
        desk.comfyui.push(1)
        waiting = asyncio.create_task(desk.ask(request(20, wait_seconds=20.0)))
        await until(lambda: desk.line)
        before = len(desk.gpus.reads)
        await asyncio.sleep(10)
        assert 35 <= len(desk.gpus.reads) - before <= 90
        await waiting


async def test_who_waits_for_a_gpu_that_drops_off_the_bus_is_told_and_nobody_else_suffers(tmp_path: Path):
    async with at_work(tmp_path) as desk:
        desk.gpus.cards.append(Card("GPU-b", total_gib=24, game=20 * GIB))
        await asyncio.sleep(5)
        waiting = asyncio.create_task(desk.ask(request(8, gpu="GPU-b", wait_seconds=600.0)))
        await until(lambda: desk.line)
        desk.gpus.cards.pop()
        answer = await waiting
        assert "gpu is GPU-b: must be the index or UUID of one of 0 (GPU-a)" in answer.verdict.reason
        assert (await desk.ask(request(4, owner="other"))).lease is not None


async def test_what_is_promised_while_nvml_is_gone_is_promised_once(tmp_path: Path):
    async with at_work(tmp_path, comfyui_gib=0) as desk:
        assert (await desk.ask(request(8, owner="a"))).lease is not None
        desk.gpus.error = SensorError("driver gone")
        await asyncio.sleep(20)
        second = await desk.ask(request(8, owner="b"))
        assert second.lease is not None
        assert second.verdict.gpu is None
        assert (await desk.ask(request(8, owner="c", wait_seconds=0.0))).lease is None
        desk.gpus.error = None
        await asyncio.sleep(5)
        assert (await desk.ask(request(8, owner="d", wait_seconds=0.0))).lease is None
        assert {lease.gpu for lease in desk.admissions.book.leases.values()} == {"GPU-a"}
