"""The desk over fakes, step by step: whom it passes over, what a leaver leaves, what a restart keeps, what is told."""

from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path

import pytest
from loguru import logger

from tests.fakes import GIB, until
from tests.policy.desk import request
from tests.test_admissions import FullDisk, at_work
from vram_manager.domain.event import EventType
from vram_manager.domain.lease import Lease
from vram_manager.domain.snapshot import ProcessMemory
from vram_manager.store import Store

pytestmark = [pytest.mark.asyncio, pytest.mark.looptime]

# No process has this number: it is above what Linux gives out.
NOBODY = 2**22


def given(lease: Lease | None) -> Lease:
    assert lease is not None
    return lease


def written(directory: Path) -> dict[str, str]:
    store = Store.open(directory)
    try:
        return store.leases()
    finally:
        store.close()


def sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen(["sleep", "1000"])


async def test_a_newcomer_does_not_take_what_became_free_for_somebody_in_line(tmp_path: Path):
    async with at_work(tmp_path, comfyui_gib=0) as desk:
        first = given((await desk.ask(request(20, owner="a"))).lease)
        waiting = asyncio.create_task(desk.ask(request(20, owner="b", wait_seconds=60.0)))
        await until(lambda: desk.line)
        desk.admissions.release(first.id)
        # Before the desk itself has looked again.
        assert (await desk.ask(request(20, owner="c", wait_seconds=0.0))).lease is None
        assert given((await waiting).lease).owner == "b"


async def test_a_process_that_is_not_there_does_not_end_the_lease_that_names_it(tmp_path: Path):
    async with at_work(tmp_path, comfyui_gib=0) as desk:
        lease = given((await desk.ask(request(4, pid=NOBODY))).lease)
        assert lease.pid is None
        await asyncio.sleep(5)
        assert lease.id in desk.admissions.book.leases


async def test_who_has_left_the_line_may_ask_the_same_again(tmp_path: Path):
    async with at_work(tmp_path) as desk:
        desk.comfyui.push(1)
        assert (await desk.ask(request(20, wait_seconds=5.0))).lease is None
        assert (await desk.ask(request(20, wait_seconds=5.0))).lease is None


async def test_nobody_listens_for_a_client_whose_answer_is_known(tmp_path: Path):
    listening: set[str] = set()

    async def gone() -> None:
        listening.add("client")
        try:
            await asyncio.Event().wait()
        finally:
            listening.discard("client")

    async with at_work(tmp_path) as desk:
        desk.comfyui.push(1)
        waiting = asyncio.create_task(desk.admissions.ask(request(20, wait_seconds=5.0), gone))
        await until(lambda: listening)
        await waiting
        await asyncio.sleep(1)
        assert listening == set()


async def test_the_second_of_two_in_line_is_told_that_it_is_the_second(tmp_path: Path):
    async with at_work(tmp_path) as desk:
        desk.comfyui.push(1)
        first = asyncio.create_task(desk.ask(request(20, owner="a", wait_seconds=60.0)))
        await until(lambda: desk.line)
        answer = await desk.ask(request(20, owner="b", wait_seconds=5.0))
        assert answer.verdict.position == 2
        assert "was number 2 in line" in answer.verdict.reason
        assert (await first).verdict.position == 1


async def test_when_the_first_in_line_leaves_the_next_is_served_at_once(tmp_path: Path):
    async with at_work(tmp_path, comfyui_gib=0) as desk:
        given((await desk.ask(request(10, owner="a", ttl_seconds=600.0))).lease)
        gone = asyncio.Event()
        # Long enough in line that what is free is kept for it.
        large = asyncio.create_task(desk.ask(request(20, owner="large", wait_seconds=600.0), gone))
        await asyncio.sleep(40)
        small = asyncio.create_task(desk.ask(request(4, owner="small", wait_seconds=600.0)))
        await asyncio.sleep(5)
        assert not small.done()
        gone.set()
        await large
        await asyncio.sleep(0.2)
        assert small.done()
        assert given(small.result().lease).owner == "small"


async def test_an_owner_with_too_many_leases_is_refused_when_its_turn_comes(tmp_path: Path):
    async with at_work(tmp_path, comfyui_gib=0) as desk:
        first = given((await desk.ask(request(20, owner="b", ttl_seconds=600.0))).lease)
        waiting = asyncio.create_task(desk.ask(request(20, owner="a", wait_seconds=60.0)))
        await until(lambda: desk.line)
        for number in range(128):
            asked = request("1MiB", owner="a", id=f"small-{number}", margin_gib=0, ttl_seconds=600.0)
            given((await desk.ask(asked)).lease)
        desk.admissions.release(first.id)
        answer = await waiting
        assert (answer.lease, answer.verdict.admitted) == (None, False)
        assert "128 leases already" in answer.verdict.reason


async def test_a_lease_that_is_held_ends_with_the_last_of_its_connections(tmp_path: Path):
    async with at_work(tmp_path, comfyui_gib=0) as desk:
        lease = given((await desk.ask(request(4, ttl_seconds=5.0))).lease)
        async with desk.admissions.held(lease.id):
            async with desk.admissions.held(lease.id):
                await asyncio.sleep(20)
            await asyncio.sleep(20)
            assert desk.admissions.lease(lease.id).holds == 1
        assert desk.admissions.book.leases == {}


async def test_a_connection_that_closes_while_the_daemon_stops_ends_no_lease(tmp_path: Path):
    async with at_work(tmp_path, comfyui_gib=0) as desk:
        lease = given((await desk.ask(request(4, ttl_seconds=600.0))).lease)
        async with desk.admissions.held(lease.id) as over:
            desk.admissions.hang_up()
            assert over.is_set()
        assert lease.id in desk.admissions.book.leases
    assert list(written(tmp_path)) == [lease.id]


@pytest.mark.parametrize("orderly", [True, False])
async def test_what_an_owner_said_later_outlives_a_restart(tmp_path: Path, orderly: bool):
    async with at_work(tmp_path, comfyui_gib=0, orderly=orderly) as desk:
        lease = given((await desk.ask(request(8))).lease)
        await desk.admissions.renew(lease.id, ttl_seconds=600.0)
        await asyncio.sleep(3)
        desk.admissions.claimed(lease.id, 3 * GIB)
        await asyncio.sleep(3)
        await desk.admissions.renew(lease.id, pid=os.getpid())
        await asyncio.sleep(3)
    async with at_work(tmp_path) as desk:
        kept = desk.admissions.lease(lease.id)
        assert (kept.ttl_seconds, kept.claimed_bytes, kept.pid) == (600.0, 3 * GIB, os.getpid())
        await asyncio.sleep(500)
        assert lease.id in desk.admissions.book.leases


async def test_the_largest_claim_stays_the_peak(tmp_path: Path):
    async with at_work(tmp_path, comfyui_gib=0) as desk:
        lease = given((await desk.ask(request(8))).lease)
        desk.admissions.claimed(lease.id, 7 * GIB)
        desk.admissions.claimed(lease.id, 2 * GIB)
        assert desk.admissions.lease(lease.id).peak_bytes == 7 * GIB


async def test_a_lease_that_ended_while_the_disk_was_full_stays_ended(tmp_path: Path):
    async with at_work(tmp_path, comfyui_gib=0) as desk:
        desk.admissions._records._store = FullDisk(desk.store)
        lease = given((await desk.ask(request(4))).lease)
        desk.admissions.release(lease.id)
        await asyncio.sleep(5)
        desk.admissions._records._store = desk.store
        await asyncio.sleep(5)
        assert desk.store.leases() == {}


async def test_a_disk_that_has_room_again_is_written_without_another_request(tmp_path: Path):
    async with at_work(tmp_path, comfyui_gib=0) as desk:
        desk.admissions._records._store = FullDisk(desk.store)
        lease = given((await desk.ask(request(4, ttl_seconds=600.0))).lease)
        await asyncio.sleep(5)
        desk.admissions._records._store = desk.store
        await asyncio.sleep(5)
        assert list(desk.store.leases()) == [lease.id]


async def test_the_same_refusal_is_told_again_once_some_time_has_passed(tmp_path: Path):
    async with at_work(tmp_path, comfyui_gib=0) as desk:
        for _ in range(3):
            await desk.ask(request(30))
        assert len(desk.told(EventType.REFUSED)) == 1
        await asyncio.sleep(11)
        await desk.ask(request(30))
        assert len(desk.told(EventType.REFUSED)) == 2


async def test_two_owners_may_use_the_same_id(tmp_path: Path):
    async with at_work(tmp_path, comfyui_gib=0) as desk:
        one = given((await desk.ask(request(2, owner="a", id="job-1"))).lease)
        other = given((await desk.ask(request(2, owner="b", id="job-1"))).lease)
        assert (one.owner, other.owner) == ("a", "b")


async def test_the_end_of_a_lease_is_told_with_how_long_it_was_and_what_it_took(tmp_path: Path):
    async with at_work(tmp_path, comfyui_gib=0) as desk:
        logger.remove()
        lease = given((await desk.ask(request(4, ttl_seconds=600.0))).lease)
        desk.admissions.claimed(lease.id, 3 * GIB)
        await asyncio.sleep(100)
        desk.admissions.release(lease.id)
        assert desk.told(EventType.LEASE_ENDED) == ["released after 100 s; estimated 4.0 GiB, peak 3.0 GiB"]


async def test_who_may_not_overtake_is_still_refused_when_its_time_is_over(tmp_path: Path):
    async with at_work(tmp_path, comfyui_gib=0) as desk:
        given((await desk.ask(request(10, owner="a", ttl_seconds=600.0))).lease)
        large = asyncio.create_task(desk.ask(request(20, owner="large", wait_seconds=50.0)))
        await asyncio.sleep(40)
        small = await desk.ask(request(4, owner="small", wait_seconds=5.0))
        assert (small.lease, small.verdict.admitted) == (None, False)
        assert "kept for large" in small.verdict.reason
        await large


async def test_a_lease_that_was_handed_on_outlives_the_process_that_asked_for_it(tmp_path: Path):
    async with at_work(tmp_path, comfyui_gib=0) as desk:
        with sleeper() as asker:
            lease = given((await desk.ask(request(4, pid=asker.pid))).lease)
            await desk.admissions.renew(lease.id, pid=os.getpid())
            asker.kill()
            asker.wait()
        await asyncio.sleep(5)
        assert desk.admissions.lease(lease.id).pid == os.getpid()
        with sleeper() as heir:
            await desk.admissions.renew(lease.id, pid=heir.pid)
            heir.kill()
            heir.wait()
        await asyncio.sleep(5)
        assert desk.admissions.book.leases == {}


async def test_a_lease_that_is_held_after_each_start_outlives_any_number_of_them(tmp_path: Path):
    async with at_work(tmp_path, comfyui_gib=0) as desk:
        lease = given((await desk.ask(request(4, ttl_seconds=600.0))).lease)
    for _ in range(6):
        async with at_work(tmp_path, comfyui_gib=0) as desk, desk.admissions.held(lease.id):
            await asyncio.sleep(1)
            desk.admissions.hang_up()


async def test_what_a_process_loads_after_it_was_named_shows_as_its_leases(tmp_path: Path):
    async with at_work(tmp_path, comfyui_gib=0) as desk:

        def holds(size_bytes: int) -> None:
            desk.card.holders["worker"] = size_bytes
            desk.gpus.processes["GPU-a"] = (ProcessMemory(pid=os.getpid(), used_bytes=size_bytes, command=("python",)),)

        holds(2 * GIB)
        await asyncio.sleep(1)
        lease = given((await desk.ask(request(8))).lease)
        await desk.admissions.renew(lease.id, pid=os.getpid())
        holds(7 * GIB)
        await asyncio.sleep(1)
        await desk.ask(request(1, owner="b"))
        assert desk.admissions.lease(lease.id).visible_bytes == 5 * GIB
