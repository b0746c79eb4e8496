"""AsyncVramClient against the same fake daemon: what differs from the blocking one is cancellation and the loop."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import InThread
from tests.test_vram_client import (
    ADMITTED,
    GIB,
    LIMITS,
    REFUSED,
    Asked,
    FakeCuda,
    FakeDaemon,
    http,
)
from vram_manager.client import (
    AsyncLease,
    AsyncVramClient,
    InsufficientVram,
    MemoryPressureError,
    MemoryPressureWarning,
    call,
)
from vram_manager.errors import InvalidRequest, ManagerAwayWarning, Unreachable


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    running = FakeDaemon(tmp_path / "vram.sock")
    monkeypatch.setenv("VRAM_SOCKET", str(running.path))
    running.start()
    yield running
    running.stop()


async def until(daemon: FakeDaemon, true: Any) -> None:
    """The fake lives in threads: its changes are waited for in another one."""
    await asyncio.to_thread(daemon.until, true)


@pytest.mark.asyncio
async def test_every_verb_asks_what_the_blocking_one_asks(daemon: FakeDaemon):
    daemon.on["POST /v1/workers/ID/models"] = lambda _: (
        200,
        {"owner": "worker", "models_bytes": 6, "buffers_bytes": 0, "total_bytes": 6},
    )
    daemon.on["POST /v1/workers/ID/snapshots"] = lambda asked: (200, asked.body)
    async with AsyncVramClient(owner="worker") as client:
        assert (await client.check("24GiB", margin_mb=512)).margin_bytes == 512 * 2**20
        assert (await client.limits(500)).level == "ok"
        assert (await client.report_models({"flux": 6})).total_bytes == 6
        assert (await client.snapshot("startup", slot=1)) == {"event": "startup", "slot": 1}
        assert (await client.worker_status()) == {"gpu_memory_used": 2048, "gpu_memory_total": 8192}
        await client.require_total("8GiB")
        async with client.generation(slot=7) as generation:
            pass
    assert (generation.delta_bytes, generation.generations) == (5, 1)
    assert daemon.connections == 1
    assert daemon.asked[0].body == {
        "required": "24GiB",
        "margin_mb": 512,
        "owner": "worker",
        "lease": False,
    }
    assert [one.body["phase"] for one in daemon.of("POST /v1/generations")] == ["start", "end"]


@pytest.mark.asyncio
async def test_a_lease_is_held_while_it_lives_and_given_back_at_the_end(daemon: FakeDaemon):
    async with AsyncVramClient() as client:
        async with client.lease("1GiB", wait_seconds=60) as lease:
            assert lease.id == "lease-0"
            assert daemon.held == ["lease-0"]
            assert os.fstat(lease.hold_fd)
            await lease.claimed(5)
            await lease.renew()
        assert (lease.id, lease.hold_fd) == (None, None)
        await until(daemon, lambda: not daemon.held and not daemon.leases)
        await lease.release()
        await lease.renew()
    assert [one.kind for one in daemon.asked] == [
        "POST /v1/admissions",
        "GET /v1/leases/ID/hold",
        "POST /v1/leases/ID/claimed",
        "POST /v1/leases/ID/renew",
        "DELETE /v1/leases/ID",
    ]


@pytest.mark.asyncio
async def test_a_refused_lease_raises_with_the_whole_answer(daemon: FakeDaemon):
    daemon.on["POST /v1/admissions"] = lambda _: (200, REFUSED)
    async with AsyncVramClient() as client:
        with pytest.raises(InsufficientVram) as caught:
            await client.lease("24GiB").acquire()
    assert caught.value.admission.retry_after_seconds == 40.5


@pytest.mark.asyncio
async def test_a_question_that_cannot_be_used_is_the_callers_mistake(daemon: FakeDaemon):
    daemon.on["POST /v1/admissions"] = lambda _: (422, {"error": {"type": "invalid", "message": "no", "field": "gpu"}})
    async with AsyncVramClient() as client:
        with pytest.raises(InvalidRequest) as caught:
            await client.check(1, gpu=9)
    assert caught.value.field == "gpu"


@pytest.mark.asyncio
async def test_without_a_daemon_everything_goes_on_and_that_is_said_once(tmp_path: Path):
    async with AsyncVramClient(tmp_path / "nobody.sock") as client:
        with pytest.warns(ManagerAwayWarning) as told:
            assert (await client.check("24GiB")).fail_open
        assert told[0].filename == __file__
        async with client.lease("24GiB") as lease, client.generation():
            assert lease.id is None
        assert (await client.limits()).level == "unknown"
    async with AsyncVramClient(tmp_path / "nobody.sock", fail_open=False) as client:
        with pytest.raises(Unreachable, match="does not exist"):
            await client.check(1)


@pytest.mark.parametrize(
    "answer", [b"SSH-2.0-OpenSSH_9.6\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{", http(200, {}), None]
)
@pytest.mark.asyncio
async def test_an_answer_that_is_none_counts_as_no_daemon(daemon: FakeDaemon, answer: bytes | None):
    def once(asked: Asked) -> None:
        if answer:
            asked.connection.sendall(answer)

    daemon.on["POST /v1/admissions"] = once
    async with AsyncVramClient(fail_open=False) as client:
        with pytest.raises(Unreachable, match=str(daemon.path)):
            await client.check(1)


@pytest.mark.asyncio
async def test_an_answer_that_does_not_come_in_time_counts_as_no_daemon(daemon: FakeDaemon):
    daemon.on["POST /v1/admissions"] = lambda asked: asked.hung_up()
    async with AsyncVramClient(timeout_seconds=0.05, fail_open=False) as client:
        with pytest.raises(Unreachable, match="timed out"):
            await client.check(1)


@pytest.mark.asyncio
async def test_a_connection_that_the_daemon_has_closed_meanwhile_is_replaced(daemon: FakeDaemon):
    async with AsyncVramClient(fail_open=False) as client:
        await client.check(1)
        await asyncio.to_thread(daemon.restart)
        assert await client.check(1)
    assert daemon.connections == 2


@pytest.mark.asyncio
async def test_many_questions_at_once_have_a_connection_each(daemon: FakeDaemon):
    meeting = threading.Barrier(4)
    daemon.on["POST /v1/admissions"] = lambda asked: (meeting.wait(20), (200, daemon.admit(asked.body)))[1]
    async with AsyncVramClient(fail_open=False) as client:
        answers = await asyncio.gather(*(client.check(1, margin_mb=mb) for mb in range(1, 5)))
    assert [one.margin_bytes for one in answers] == [mb * 2**20 for mb in range(1, 5)]


def test_one_client_serves_one_loop_after_the_other(daemon: FakeDaemon):
    client = AsyncVramClient(fail_open=False)
    for _ in range(3):
        assert asyncio.run(client.check(1))
    client.close()
    assert daemon.connections == 1


@pytest.mark.asyncio
async def test_a_task_that_is_cancelled_while_it_waits_leaves_the_line(daemon: FakeDaemon):
    daemon.on["POST /v1/admissions"] = lambda asked: asked.hung_up()
    async with AsyncVramClient() as client:
        waiting = asyncio.create_task(client.lease("24GiB", wait_seconds=600).acquire())
        await until(daemon, lambda: daemon.asked)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await until(daemon, lambda: daemon.hangups == 1)
    assert [one.kind for one in daemon.asked] == ["POST /v1/admissions"]


@pytest.mark.asyncio
async def test_a_lease_granted_in_the_moment_of_cancellation_is_given_back(daemon: FakeDaemon):
    daemon.on["POST /v1/admissions"] = lambda asked: (asked.hung_up(), (200, daemon.admit(asked.body)))[1]
    async with AsyncVramClient() as client:
        waiting = asyncio.create_task(client.lease("24GiB", wait_seconds=600).acquire())
        await until(daemon, lambda: daemon.asked)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    assert daemon.by_request
    assert daemon.leases == {}


@pytest.mark.asyncio
async def test_a_task_that_is_cancelled_while_its_hold_is_opened_gives_the_lease_back(daemon: FakeDaemon):
    daemon.on["GET /v1/leases/ID/hold"] = lambda asked: asked.hung_up()
    async with AsyncVramClient() as client:
        waiting = asyncio.create_task(client.lease("24GiB").acquire())
        await until(daemon, lambda: len(daemon.asked) == 2)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await until(daemon, lambda: daemon.hangups == 2)
    assert daemon.leases == {}


@pytest.mark.asyncio
async def test_a_task_that_is_cancelled_while_it_works_gives_the_lease_back(daemon: FakeDaemon):
    async def work() -> None:
        async with client.lease("24GiB"):
            await asyncio.Event().wait()

    async with AsyncVramClient() as client:
        working = asyncio.create_task(work())
        await until(daemon, lambda: daemon.held)
        working.cancel()
        with pytest.raises(asyncio.CancelledError):
            await working
        await until(daemon, lambda: not daemon.held)
    assert daemon.leases == {}


@pytest.mark.asyncio
async def test_a_daemon_that_hangs_up_while_it_waits_is_asked_the_same_question_again(daemon: FakeDaemon):
    daemon.on["POST /v1/admissions"] = lambda asked: None if len(daemon.asked) == 1 else (200, daemon.admit(asked.body))
    async with AsyncVramClient() as client, client.lease(1, wait_seconds=600):
        first, second = (one.body for one in daemon.of("POST /v1/admissions"))
    assert first["request_id"] == second["request_id"]
    assert first["wait_seconds"] > second["wait_seconds"] > 590


@pytest.mark.asyncio
async def test_a_lease_is_renewed_and_held_again_by_a_daemon_that_was_restarted(daemon: FakeDaemon):
    async with AsyncVramClient() as client, client.lease(1, ttl_seconds=0.3) as lease:
        await until(daemon, lambda: daemon.of("POST /v1/leases/ID/renew"))
        await asyncio.to_thread(daemon.restart)
        await until(daemon, lambda: daemon.held)
        assert not lease.lost
    assert daemon.leases == {}


@pytest.mark.asyncio
async def test_a_lease_that_the_daemon_does_not_know_any_more_is_lost_and_that_is_said_once(
    daemon: FakeDaemon, caplog: pytest.LogCaptureFixture
):
    async with AsyncVramClient() as client, client.lease(1, ttl_seconds=0.06) as lease:
        daemon.leases.clear()
        await until(daemon, lambda: daemon.of("POST /v1/leases/ID/renew") and not daemon.held)
        await lease.renew()
        assert lease.lost
    assert len([record for record in caplog.records if "is lost" in record.message]) == 1


@pytest.mark.asyncio
async def test_a_daemon_that_is_away_while_a_lease_is_renewed_is_said_once(
    daemon: FakeDaemon, caplog: pytest.LogCaptureFixture
):
    daemon.on["POST /v1/leases/ID/renew"] = lambda _: None
    async with AsyncVramClient() as client, client.lease(1, ttl_seconds=0.06):
        await until(daemon, lambda: len(daemon.of("POST /v1/leases/ID/renew")) > 4)
    assert len([record for record in caplog.records if "cannot be renewed" in record.message]) == 1


@pytest.mark.asyncio
async def test_a_daemon_that_does_not_watch_grants_without_a_lease(daemon: FakeDaemon):
    daemon.on["POST /v1/admissions"] = lambda _: (200, ADMITTED | {"fail_open": True})
    async with AsyncVramClient() as client, client.lease(1) as lease:
        assert lease.id is None
    assert len(daemon.asked) == 1


@pytest.mark.asyncio
async def test_the_limits_are_heeded_as_by_the_blocking_client(daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch):
    torch = types.ModuleType("torch")
    torch.cuda = FakeCuda(allocated=GIB, reserved=2 * GIB, freed=GIB)
    monkeypatch.setitem(sys.modules, "torch", torch)
    daemon.on["POST /v1/limits/check"] = lambda _: (200, LIMITS | {"level": "soft", "sustained": True})
    async with AsyncVramClient() as client:
        with pytest.warns(MemoryPressureWarning):
            await client.limits()
        daemon.on["POST /v1/limits/check"] = lambda _: (200, LIMITS | {"level": "hard"})
        with pytest.raises(MemoryPressureError):
            await client.limits()
    assert torch.cuda.emptied == 2


@pytest.mark.asyncio
async def test_a_generation_that_fails_ends_too(daemon: FakeDaemon):
    daemon.on["POST /v1/generations"] = lambda asked: (
        None if asked.body["phase"] == "end" else (200, {"generations": 1})
    )
    async with AsyncVramClient(fail_open=False) as client:
        with pytest.raises(ZeroDivisionError):
            async with client.generation():
                _ = 1 / 0
        with pytest.raises(Unreachable):
            async with client.generation():
                pass


@pytest.mark.asyncio
async def test_a_daemon_that_is_not_ready_or_hangs_up_is_told_as_away(daemon: FakeDaemon):
    daemon.on["POST /v1/admissions"] = lambda _: (503, {"error": {"type": "not_ready", "message": "starting"}})
    async with AsyncVramClient() as client:
        with pytest.warns(ManagerAwayWarning, match="starting"):
            assert (await client.lease(1).acquire()).id is None
        daemon.on.clear()
        async with client.lease(1) as lease:
            daemon.on["POST /v1/leases/ID/renew"] = lambda _: None
            with pytest.warns(ManagerAwayWarning, match="hung up"):
                await lease.renew()
            assert not lease.lost


@pytest.fixture
def real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[InThread]:
    """A whole daemon over one pretended card of 24 GiB, of which ComfyUI holds 8."""
    monkeypatch.setenv("VRAM_SOCKET", str(tmp_path / "real.sock"))
    monkeypatch.setenv("VRAM_STATE_DIR", str(tmp_path))
    monkeypatch.setenv("VRAM_CHECK_INTERVAL", "0.25")
    with InThread() as running:
        yield running


@pytest.mark.asyncio
async def test_the_daemon_drops_who_is_cancelled_in_its_line(real: InThread):
    assert real.daemon is not None

    def told(what: str) -> list[Any]:
        return call("GET", "/v1/leases").body[what]

    async with AsyncVramClient(real.path, fail_open=False) as client, client.lease("12GiB") as lease:
        assert lease.info is not None
        assert lease.info.gpu
        waiting = asyncio.create_task(client.lease("18GiB", wait_seconds=600).acquire())
        await asyncio.to_thread(real.until, lambda: told("line"))
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await asyncio.to_thread(real.until, lambda: not told("line"))
        assert [one["id"] for one in await asyncio.to_thread(told, "leases")] == [lease.id]
    assert await asyncio.to_thread(told, "leases") == []


@pytest.mark.asyncio
async def test_the_daemon_grants_no_more_than_there_is_to_many_who_ask_at_once(real: InThread):
    async with AsyncVramClient(real.path, fail_open=False) as client:
        asked = (client.lease("3GiB", margin_mb=0, wait_seconds=0).acquire() for _ in range(16))
        answers = await asyncio.gather(*asked, return_exceptions=True)
        granted = [one for one in answers if isinstance(one, AsyncLease)]
        assert all(isinstance(one, AsyncLease | InsufficientVram) for one in answers)
        assert 1 <= len(granted) <= 8
        for one in granted:
            await one.release()
