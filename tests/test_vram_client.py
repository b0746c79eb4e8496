"""VramClient against somebody who speaks the daemon's contract on a socket, without a daemon."""

from __future__ import annotations

import contextlib
import gc
import io
import itertools
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vram_manager.client
import vram_manager.client.wire
from tests.fakes import InThread
from vram_manager.client import (
    Admission,
    InsufficientVram,
    MemoryPressureError,
    MemoryPressureWarning,
    VramClient,
    check_vram_sufficient,
    get_available_vram,
    get_vram_stats,
)
from vram_manager.client.questions import Question
from vram_manager.client.wire import Answer, HungUp, Malformed
from vram_manager.errors import InvalidRequest, ManagerAwayWarning, Unreachable, VramManagerError

ROOT = Path(__file__).parents[1]
PATIENCE = 20
MIB = 2**20
GIB = 2**30
GPU = "GPU-a"


class Asked:
    """One request as the daemon gets it."""

    def __init__(self, method: str, path: str, body: Any, connection: socket.socket) -> None:
        self.method, self.path, self.body, self.connection = method, path, body, connection

    @property
    def kind(self) -> str:
        path = re.sub(r"(leases|workers)/[^/]+", r"\1/ID", self.path)
        return f"{self.method} {path}"

    @property
    def id(self) -> str:
        return self.path.split("/")[3]

    def hung_up(self) -> None:
        """Returns once the client has."""
        with contextlib.suppress(OSError):
            while self.connection.recv(4096):
                pass

    def interrupted(self) -> None:
        """Returns once the client, in the main thread, has hung up because of an interrupt."""
        self.connection.settimeout(2)
        waiting = True
        while waiting:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            try:
                waiting = self.connection.recv(1) != b""
            except TimeoutError:
                # Python swallows one that comes while it collects garbage.
                continue


class FakeDaemon:
    """Speaks the contract on a Unix socket.

    `on[kind]` replaces one answer: a (status, body), bytes, or None to hang up.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.asked: list[Asked] = []
        self.leases: dict[str, dict[str, Any]] = {}
        self.by_request: dict[str, str] = {}
        self.held: list[str] = []
        self.hangups = 0
        self.connections = 0
        self.on: dict[str, Callable[[Asked], Any]] = {}
        self._changed = threading.Condition()
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen(64)
        self._spawn(self._accept, self._listener)

    def stop(self) -> None:
        """As the daemon does: the socket goes first, then every connection."""
        self.path.unlink(missing_ok=True)
        for one in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()
        self._threads.clear()
        self._listener.close()

    def restart(self) -> None:
        self.stop()
        self.start()

    def until(self, true: Callable[[], object]) -> None:
        with self._changed:
            assert self._changed.wait_for(true, PATIENCE)

    def change(self, what: Callable[[], object]) -> None:
        with self._changed:
            what()
            self._changed.notify_all()

    def of(self, kind: str) -> list[Asked]:
        return [one for one in self.asked if one.kind == kind]

    def _spawn(self, run: Callable[[socket.socket], None], connection: socket.socket) -> None:
        thread = threading.Thread(target=run, args=(connection,), name="fake-daemon")
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                self._open.add(connection)
                self.change(lambda: setattr(self, "connections", self.connections + 1))
                self._spawn(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection, connection.makefile("rb") as reader:
            while asked := self._request(reader, connection):
                self.change(lambda asked=asked: self.asked.append(asked))
                answer = self.on.get(asked.kind, self._answer)(asked)
                if answer is None:
                    break
                connection.sendall(answer if isinstance(answer, bytes) else http(*answer))
        self._open.discard(connection)
        self.change(lambda: setattr(self, "hangups", self.hangups + 1))

    def _request(self, reader: io.BufferedReader, connection: socket.socket) -> Asked | None:
        line = reader.readline()
        if not line:
            return None
        length = 0
        while (header := reader.readline().strip()) != b"":
            if header.lower().startswith(b"content-length:"):
                length = int(header.split(b":")[1])
        method, path, _ = line.decode().split()
        raw = reader.read(length)
        return Asked(method, path, json.loads(raw) if raw else None, connection)

    def _answer(self, asked: Asked) -> Any:
        match asked.kind:
            case "POST /v1/admissions":
                return 200, self.admit(asked.body)
            case "GET /v1/leases/ID/hold":
                return self._hold(asked)
            case "POST /v1/leases/ID/renew" | "POST /v1/leases/ID/claimed" if asked.id in self.leases:
                return 200, {"lease": self.leases[asked.id]}
            case "DELETE /v1/leases/ID" if asked.id in self.leases:
                self.change(lambda: self.leases.pop(asked.id))
                return 204, None
            case "POST /v1/limits/check":
                return 200, {"level": "ok", "sustained": False, "used_bytes": 10 * GIB, "message": "fine"}
            case "POST /v1/generations":
                return 200, {"delta_bytes": 5 if asked.body["phase"] == "end" else None, "generations": 1, "leak": None}
            case "GET /health/vram":
                card = {"index": 0, "uuid": GPU, "name": "RTX 3070", "total_mb": 8192, "used_mb": 2048, "free_mb": 6144}
                return 200, {"total_mb": 8192, "used_mb": 2048, "free_mb": 6144, "usage_percent": 25.0, "gpus": [card]}
        return 404, {"error": {"type": "not_found", "message": f"{asked.path}: no such thing"}}

    def admit(self, body: dict[str, Any]) -> dict[str, Any]:
        answer = ADMITTED | {"margin_bytes": (body.get("margin_mb") or 0) * MIB}
        if body.get("lease") is False:
            return answer
        lease_id = self.by_request.setdefault(body["request_id"], f"lease-{len(self.by_request)}")
        lease = {"id": lease_id, "owner": body["owner"], "gpu": GPU, "bytes": GIB, "ttl_seconds": body["ttl_seconds"]}
        self.change(lambda: self.leases.update({lease_id: lease}))
        return answer | {"lease": lease}

    def _hold(self, asked: Asked) -> Any:
        if asked.id not in self.leases:
            return 404, {"error": {"type": "not_found", "message": "no such lease"}}
        line = json.dumps({"lease": self.leases[asked.id]}).encode() + b"\n"
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"
        self.change(lambda: self.held.append(asked.id))
        try:
            asked.connection.sendall(head + b"%x\r\n%s\r\n" % (len(line), line))
            asked.hung_up()
        finally:
            self.change(lambda: self.held.remove(asked.id))


ADMITTED = {
    "admitted": True,
    "reason": "there is room",
    "gpu": GPU,
    "required_bytes": GIB,
    "margin_bytes": 0,
    "available_bytes": 15 * GIB,
    "shortfall_bytes": None,
    "reclaimable_bytes": 0,
    "estimate_source": "request",
    "estimate": "as asked",
    "lease": None,
    "fail_open": False,
    "dry_run": False,
    "monitoring": True,
    "waited_seconds": 0,
    "position": None,
    "retry_after_seconds": None,
    "alternatives": [],
}
REFUSED = ADMITTED | {
    "admitted": False,
    "reason": "Insufficient GPU memory: need 26.0 GiB",
    "shortfall_bytes": 11 * GIB,
    "retry_after_seconds": 40.5,
    "alternatives": [{"gpu": GPU, "required_bytes": GIB, "model": "small:1b", "words": "small:1b fits"}],
}


def http(status: int, body: object = None) -> bytes:
    raw = b"" if body is None else json.dumps(body).encode()
    length = b"" if status == 204 else b"Content-Type: application/json\r\nContent-Length: %d\r\n" % len(raw)
    return b"HTTP/1.1 %d Said\r\n%s\r\n%s" % (status, length, raw)


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    running = FakeDaemon(tmp_path / "vram.sock")
    monkeypatch.setenv("VRAM_SOCKET", str(running.path))
    running.start()
    yield running
    running.stop()


@pytest.fixture
def client(daemon: FakeDaemon) -> Iterator[VramClient]:
    with VramClient(daemon.path, owner="worker") as client:
        yield client


@pytest.fixture
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A socket that is not there."""
    monkeypatch.setenv("VRAM_SOCKET", str(tmp_path / "nobody.sock"))
    return tmp_path / "nobody.sock"


class FakeCuda:
    """What we use of torch.cuda."""

    def __init__(self, allocated: int, reserved: int, freed: int = 0) -> None:
        self.allocated, self.reserved, self.freed = allocated, reserved, freed
        self.initialized = True
        self.emptied = 0

    def is_initialized(self) -> bool:
        return self.initialized

    def device_count(self) -> int:
        return 1

    def memory_allocated(self) -> int:
        return self.allocated

    def memory_reserved(self) -> int:
        return self.reserved

    def empty_cache(self) -> None:
        self.emptied += 1
        self.reserved -= self.freed
        self.freed = 0


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    torch = types.ModuleType("torch")
    torch.cuda = FakeCuda(allocated=10_850_000_000, reserved=11_100_000_000, freed=150_000_000)
    monkeypatch.setitem(sys.modules, "torch", torch)
    return torch.cuda


def run_python(
    code: str, *, path: Path | None = None, flags: tuple[str, ...] = ("-I",)
) -> subprocess.CompletedProcess[str]:
    environment = {"VRAM_SOCKET": str(path)} if path else {}
    return subprocess.run(
        [sys.executable, *flags, "-c", code], capture_output=True, text=True, check=True, timeout=60, env=environment
    )


# What it needs


def test_the_client_needs_no_other_package_and_neither_asyncio_nor_an_http_library():
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from vram_manager.client import VramClient, check_vram_sufficient, call\n"
        "VramClient().close()\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    roots = set(run_python(code, flags=("-I", "-S")).stdout.split())
    assert roots - set(sys.stdlib_module_names) - {"vram_manager"} <= {"__main__"}
    assert not roots & {"asyncio", "http", "ssl", "email", "urllib", "uuid", "subprocess"}


def test_the_asynchronous_client_needs_no_other_package_either():
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from vram_manager.client import AsyncVramClient\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    roots = set(run_python(code, flags=("-I", "-S")).stdout.split())
    assert roots - set(sys.stdlib_module_names) - {"vram_manager"} <= {"__main__"}


def test_all_that_is_exported_is_there_and_sorted():
    names = vram_manager.client.__all__
    assert [name for name in names if not hasattr(vram_manager.client, name)] == []
    assert set(vram_manager.client._HOMES) <= set(names)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = vram_manager.client.Nothing


# check


def test_a_check_reserves_nothing_and_its_answer_has_every_field(daemon: FakeDaemon, client: VramClient):
    admission = client.check("24GiB", context=8192, gpu=0, margin_mb=512, priority="batch")
    assert admission == Admission(
        admitted=True,
        reason="there is room",
        gpu=GPU,
        required_bytes=GIB,
        margin_bytes=512 * MIB,
        available_bytes=15 * GIB,
        estimate_source="request",
        estimate="as asked",
    )
    assert admission
    assert daemon.asked[0].body == {
        "required": "24GiB",
        "context": 8192,
        "gpu": 0,
        "margin_mb": 512,
        "priority": "batch",
        "owner": "worker",
        "lease": False,
    }


def test_a_required_in_whole_numbers_is_mib(daemon: FakeDaemon, client: VramClient):
    client.check(24576)
    client.check(model="llama3.1:8b", workflow={"1": {"class_type": "KSampler"}})
    first, second = (one.body for one in daemon.asked)
    assert first["required_mb"] == 24576
    assert second["model"] == "llama3.1:8b"
    assert second["workflow"] == {"1": {"class_type": "KSampler"}}
    assert not second.keys() & {"required", "required_mb"}


def test_a_refused_check_is_false_and_says_why(daemon: FakeDaemon, client: VramClient):
    daemon.on["POST /v1/admissions"] = lambda _: (200, REFUSED)
    admission = client.check("24GiB")
    assert not admission
    assert admission.reason == "Insufficient GPU memory: need 26.0 GiB"
    assert (admission.shortfall_bytes, admission.retry_after_seconds) == (11 * GIB, 40.5)
    assert admission.alternatives[0].model == "small:1b"


def test_the_owner_is_the_program_and_its_process_unless_it_is_given(daemon: FakeDaemon):
    code = "from vram_manager.client import VramClient; import os; c = VramClient(); c.check(1); print(os.getpid())"
    pid = run_python(code, path=daemon.path).stdout.strip()
    assert daemon.asked[0].body["owner"] == f"python-{pid}"


def test_one_connection_serves_many_questions(daemon: FakeDaemon, client: VramClient):
    for _ in range(5):
        client.check(1)
        client.limits()
    assert daemon.connections == 1


def test_a_connection_that_the_daemon_has_closed_meanwhile_is_replaced_without_a_word(
    daemon: FakeDaemon, client: VramClient
):
    client.check(1)
    daemon.restart()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert client.check(1).fail_open is False
    assert daemon.connections == 2


def test_threads_share_a_client_without_sharing_a_connection(daemon: FakeDaemon, client: VramClient):
    meeting = threading.Barrier(4)
    daemon.on["POST /v1/admissions"] = lambda asked: (meeting.wait(PATIENCE), (200, daemon.admit(asked.body)))[1]
    answers: list[int] = []
    threads = [
        threading.Thread(target=lambda mb=mb: answers.append(client.check(1, margin_mb=mb).margin_bytes == mb * MIB))
        for mb in range(1, 5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert answers == [True] * 4


# Nobody there


def test_without_a_daemon_everything_goes_on(nobody: Path):
    with warnings.catch_warnings(record=True, action="always") as told, VramClient() as client:
        admission = client.check("24GiB")
        with client.lease("24GiB") as lease, client.generation(slot=1) as generation:
            limits = client.limits(500)
            report = client.report_models({"flux": 6}, buffers={"video": 5}, budget_bytes=4)
            snapshot = client.snapshot("startup", slot=3)
            status = client.worker_status()
        client.require_total("12GiB")
    assert (admission.admitted, admission.fail_open) == (True, True)
    assert "does not exist" in admission.reason
    assert (lease.id, lease.hold_fd) == (None, None)
    assert (generation.delta_bytes, generation.leak) == (None, None)
    assert limits.level == "unknown"
    assert (report.total_bytes, report.fits) == (11, True)
    assert (snapshot["event"], snapshot["slot"], snapshot["vram_usage_gb"]) == ("startup", 3, None)
    assert status == {"gpu_memory_used": None, "gpu_memory_total": None}
    assert [(one.category, one.filename) for one in told] == [(ManagerAwayWarning, __file__)]


def test_a_daemon_that_goes_away_is_said_once_per_outage(nobody: Path):
    daemon = FakeDaemon(nobody)
    with VramClient() as client:
        for _ in range(2):
            with pytest.warns(ManagerAwayWarning, match="does not exist"):
                client.check(1)
            client.check(1)
            daemon.start()
            assert client.check(1).fail_open is False
            daemon.stop()


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_a_client_that_would_not_fail_open_raises(nobody: Path, monkeypatch: pytest.MonkeyPatch, how: str):
    if how == "environment":
        monkeypatch.setenv("VRAM_FAIL_OPEN", "false")
    client = VramClient(fail_open=False if how == "argument" else None)
    for ask in (
        lambda: client.check(1),
        lambda: client.lease(1).acquire(),
        client.limits,
        lambda: client.generation().__enter__(),
        lambda: client.report_models({}),
        lambda: client.snapshot("x"),
        client.worker_status,
        lambda: client.require_total("1GiB"),
    ):
        with pytest.raises(Unreachable, match="does not exist"):
            ask()


@pytest.mark.parametrize("status", [400, 404, 409, 413, 422])
def test_what_the_daemon_cannot_use_is_the_callers_mistake_and_never_failed_open(
    daemon: FakeDaemon, client: VramClient, status: int
):
    error = {"type": "invalid", "message": "required is 'much': must be a size", "field": "required"}
    daemon.on["POST /v1/admissions"] = lambda _: (status, {"error": error})
    for ask in (lambda: client.check("much"), lambda: client.lease("much").acquire()):
        with pytest.raises(InvalidRequest, match="must be a size") as caught:
            ask()
        assert caught.value.field == "required"
        assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(None, id="hangs up"),
        pytest.param(b"SSH-2.0-OpenSSH_9.6\r\n", id="another protocol"),
        pytest.param(http(200, [1]), id="no object"),
        pytest.param(http(200, {}), id="nothing in it"),
        pytest.param(http(200, ADMITTED | {"admitted": "yes"}), id="a word for a truth"),
        pytest.param(http(200, ADMITTED | {"margin_bytes": True}), id="a truth for a number"),
        pytest.param(http(200, ADMITTED | {"alternatives": "none"}), id="a word for a list"),
        pytest.param(http(200, ADMITTED | {"lease": {"id": 7}}), id="a lease without a name"),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\nContent-Type: application/json\r\n\r\nnot json!", id="no JSON"
        ),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{", id="half of it"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n{", id="a length below nothing"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n{", id="no end in sight"),
        pytest.param(http(500, {"error": {"type": "bug", "message": "oh"}}), id="a bug"),
        pytest.param(http(503, {"error": {"type": "not_ready", "message": "starting"}}), id="not ready"),
        pytest.param(http(404, {"error": {"type": "not_found", "message": "no such route"}}), id="an older daemon"),
    ],
)
def test_an_answer_that_is_none_counts_as_no_daemon(daemon: FakeDaemon, answer: bytes | None):
    def once(asked: Asked) -> bytes | None:
        if answer:
            asked.connection.sendall(answer)
        # What breaks off must not be waited for.
        asked.connection.shutdown(socket.SHUT_WR)
        return None

    daemon.on["POST /v1/admissions"] = once
    with VramClient(fail_open=True) as client, pytest.warns(ManagerAwayWarning, match=str(daemon.path)):
        assert client.check(1).fail_open
    with VramClient(fail_open=False) as client, pytest.raises(Unreachable, match=str(daemon.path)):
        client.check(1)


def test_an_answer_that_does_not_come_in_time_counts_as_no_daemon(daemon: FakeDaemon):
    daemon.on["POST /v1/admissions"] = lambda asked: asked.hung_up()
    with VramClient(timeout_seconds=0.05, fail_open=False) as client, pytest.raises(Unreachable, match="timed out"):
        client.check(1)


def test_a_kept_connection_has_its_deadline_too(daemon: FakeDaemon):
    daemon.on["POST /v1/limits/check"] = lambda asked: asked.hung_up()
    with VramClient(timeout_seconds=0.5, fail_open=False) as client:
        client.check(1)
        with pytest.raises(Unreachable, match="timed out"):
            client.limits()
    assert daemon.connections == 1


def test_a_drip_of_bytes_does_not_stretch_the_deadline(daemon: FakeDaemon):
    over = threading.Event()

    def drip(asked: Asked) -> None:
        with contextlib.suppress(OSError):
            asked.connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
            while not over.wait(0.01):
                asked.connection.sendall(b"x")

    daemon.on["POST /v1/admissions"] = drip
    with VramClient(timeout_seconds=0.1, fail_open=False) as client, pytest.raises(Unreachable, match="timed out"):
        client.check(1)
    over.set()


def test_a_daemon_that_accepts_nobody_is_not_waited_for_without_end(nobody: Path):
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as others:
        listener.bind(str(nobody))
        listener.listen(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                other = others.enter_context(socket.socket(socket.AF_UNIX))
                other.setblocking(False)
                other.connect(str(nobody))
        with VramClient(timeout_seconds=0.05, fail_open=False) as client, pytest.raises(Unreachable, match="timed out"):
            client.check(1)


# Leases


def test_a_lease_is_held_while_it_lives_and_given_back_at_the_end(daemon: FakeDaemon, client: VramClient):
    with client.lease("1GiB", wait_seconds=60, ttl_seconds=600, priority="interactive") as lease:
        assert lease.id == "lease-0"
        assert lease.info.gpu == GPU
        assert lease.admission.admitted
        assert daemon.held == ["lease-0"]
        assert os.fstat(lease.hold_fd)
    assert lease.id is None
    assert lease.hold_fd is None
    daemon.until(lambda: not daemon.held and not daemon.leases)
    body = daemon.asked[0].body
    assert re.fullmatch("[0-9a-f]{32}", body["request_id"])
    assert (body["pid"], body["ttl_seconds"], body["priority"]) == (os.getpid(), 600, "interactive")
    assert 59 < body["wait_seconds"] <= 60
    assert "lease" not in body
    assert [one.kind for one in daemon.asked[1:]] == ["GET /v1/leases/ID/hold", "DELETE /v1/leases/ID"]


def test_a_lease_can_be_used_without_with_and_released_twice(daemon: FakeDaemon, client: VramClient):
    lease = client.lease(1).acquire()
    assert lease.acquire() is lease
    lease.renew()
    lease.renew(pid=7)
    lease.claimed(7)
    lease.claimed()
    lease.release()
    lease.release()
    lease.renew()
    assert len(daemon.of("POST /v1/admissions")) == 1
    assert len(daemon.of("DELETE /v1/leases/ID")) == 1
    assert [one.body for one in daemon.of("POST /v1/leases/ID/claimed")] == [{"bytes": 7}, {}]
    assert [one.body for one in daemon.of("POST /v1/leases/ID/renew")] == [
        {"ttl_seconds": 60.0},
        {"ttl_seconds": 60.0, "pid": 7},
    ]
    first = daemon.asked[0].body["request_id"]
    with lease:
        assert lease.id == "lease-1"
    assert daemon.of("POST /v1/admissions")[1].body["request_id"] != first


def test_a_refused_lease_raises_with_the_whole_answer(daemon: FakeDaemon, client: VramClient):
    daemon.on["POST /v1/admissions"] = lambda _: (200, REFUSED)
    with pytest.raises(InsufficientVram, match=r"need 26.0 GiB") as caught, client.lease("24GiB"):
        raise AssertionError("it was refused")
    assert caught.value.admission.shortfall_bytes == 11 * GIB
    assert isinstance(caught.value, VramManagerError)
    assert daemon.held == []


def test_a_daemon_that_does_not_watch_grants_without_a_lease(daemon: FakeDaemon, client: VramClient):
    daemon.on["POST /v1/admissions"] = lambda _: (200, ADMITTED | {"fail_open": True})
    with client.lease(1) as lease:
        assert lease.id is None
        assert lease.admission.fail_open
    assert len(daemon.asked) == 1


def test_an_exception_inside_gives_the_lease_back(daemon: FakeDaemon, client: VramClient):
    with pytest.raises(ZeroDivisionError), client.lease(1):
        _ = 1 / 0
    assert daemon.leases == {}


def test_the_end_of_a_lease_never_raises_because_the_daemon_is_away(daemon: FakeDaemon):
    with VramClient(fail_open=False, timeout_seconds=0.5) as client, client.lease(1):
        daemon.stop()
    daemon.start()


def test_a_daemon_that_hangs_up_while_it_waits_is_asked_the_same_question_again(daemon: FakeDaemon, client: VramClient):
    def break_once(asked: Asked) -> Any:
        return None if len(daemon.of("POST /v1/admissions")) < 3 else (200, daemon.admit(asked.body))

    daemon.on["POST /v1/admissions"] = break_once
    with client.lease(1, wait_seconds=600):
        first, second, third = (one.body for one in daemon.of("POST /v1/admissions"))
    assert first["request_id"] == second["request_id"] == third["request_id"]
    assert first["wait_seconds"] > second["wait_seconds"] > third["wait_seconds"] > 590


def test_a_daemon_that_restarts_while_it_waits_is_asked_again(daemon: FakeDaemon, client: VramClient):
    daemon.on["POST /v1/admissions"] = lambda asked: asked.hung_up()
    lease = client.lease(1, wait_seconds=600)
    thread = threading.Thread(target=lease.acquire)
    thread.start()
    daemon.until(lambda: daemon.asked)
    daemon.stop()
    daemon.on.clear()
    daemon.start()
    thread.join(PATIENCE)
    assert lease.id == "lease-0"
    lease.release()


def test_a_lease_that_is_not_answered_in_time_leaves_the_line_and_fails_open(daemon: FakeDaemon):
    daemon.on["POST /v1/admissions"] = lambda asked: asked.hung_up()
    with VramClient(timeout_seconds=0.05) as client, pytest.warns(ManagerAwayWarning, match="timed out"):
        assert client.lease(1, wait_seconds=0.05).acquire().id is None
    daemon.until(lambda: daemon.hangups == 1)


def test_a_lease_that_is_granted_too_late_is_given_back(daemon: FakeDaemon):
    daemon.on["POST /v1/admissions"] = lambda asked: (asked.hung_up(), (200, daemon.admit(asked.body)))[1]
    with VramClient(timeout_seconds=0.1, fail_open=False) as client, pytest.raises(Unreachable, match="timed out"):
        client.lease(1, wait_seconds=0.0).acquire()
    assert len(daemon.by_request) == 1
    assert daemon.leases == {}


@pytest.mark.parametrize("late", [False, True], ids=["waiting", "granted meanwhile"])
def test_an_interrupt_while_it_waits_leaves_the_line(daemon: FakeDaemon, client: VramClient, late: bool):
    def interrupt(asked: Asked) -> Any:
        asked.interrupted()
        return (200, daemon.admit(asked.body)) if late else None

    daemon.on["POST /v1/admissions"] = interrupt
    with pytest.raises(KeyboardInterrupt):
        client.lease(1, wait_seconds=600).acquire()
    daemon.until(lambda: daemon.hangups)
    assert (len(daemon.by_request), daemon.leases) == (late, {})


def test_an_interrupted_question_does_not_answer_the_next_one(daemon: FakeDaemon, client: VramClient):
    client.check(1)
    daemon.on["POST /v1/limits/check"] = lambda asked: asked.interrupted()
    with pytest.raises(KeyboardInterrupt):
        client.limits()
    assert client.check(1).available_bytes == 15 * GIB


def test_a_lease_is_renewed_with_what_torch_has_taken_since_the_grant(
    daemon: FakeDaemon, client: VramClient, cuda: FakeCuda
):
    with client.lease(1, ttl_seconds=0.06):
        daemon.until(lambda: daemon.of("POST /v1/leases/ID/renew"))
        assert daemon.of("POST /v1/leases/ID/renew")[0].body == {"ttl_seconds": 0.06}
        cuda.reserved += 3 * GIB
        daemon.until(lambda: daemon.asked[-1].body == {"ttl_seconds": 0.06, "claimed_bytes": 3 * GIB})


def test_what_cannot_be_told_apart_or_was_told_by_hand_is_not_told_again(
    daemon: FakeDaemon, client: VramClient, cuda: FakeCuda
):
    with client.lease(1) as first:
        with client.lease(1) as second:
            cuda.reserved += GIB
            first.renew()
            second.renew()
        first.renew()
        first.claimed(5)
        first.renew()
    told = [one.body.get("claimed_bytes") for one in daemon.of("POST /v1/leases/ID/renew")]
    assert told == [None, None, GIB, None]


def test_the_device_of_the_lease_is_the_one_that_is_looked_at(
    daemon: FakeDaemon, client: VramClient, monkeypatch: pytest.MonkeyPatch
):
    reserved = [GIB, GIB]
    torch = types.ModuleType("torch")
    torch.cuda = types.SimpleNamespace(
        is_initialized=lambda: True,
        device_count=lambda: 2,
        get_device_properties=lambda index: types.SimpleNamespace(uuid="ba"[index]),
        memory_allocated=lambda index: 0,
        memory_reserved=lambda index: reserved[index],
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    with client.lease(1) as lease:
        reserved[:] = [9 * GIB, 3 * GIB]
        lease.renew()
    assert daemon.of("POST /v1/leases/ID/renew")[0].body["claimed_bytes"] == 2 * GIB


def test_a_torch_that_cannot_say_is_as_good_as_none(
    daemon: FakeDaemon, client: VramClient, monkeypatch: pytest.MonkeyPatch
):
    torch = types.ModuleType("torch")
    torch.cuda = types.SimpleNamespace(is_initialized=lambda: True, memory_allocated=lambda: 1 / 0)
    monkeypatch.setitem(sys.modules, "torch", torch)
    client.limits()
    assert daemon.asked[0].body == {"owner": "worker"}


def test_torch_is_left_alone_until_it_uses_the_gpu(daemon: FakeDaemon, client: VramClient, cuda: FakeCuda):
    cuda.initialized = False
    client.limits()
    assert daemon.asked[0].body == {"owner": "worker"}
    assert client.clear_cuda_cache() == 0
    assert cuda.emptied == 0


def test_a_lease_is_held_again_by_a_daemon_that_was_restarted(daemon: FakeDaemon, client: VramClient):
    with client.lease(1, ttl_seconds=0.3) as lease:
        before = lease.hold_fd
        assert before is not None
        daemon.restart()
        daemon.until(lambda: daemon.held)
        assert not lease.lost
        assert len(daemon.of("GET /v1/leases/ID/hold")) == 2
    assert daemon.leases == {}


def test_a_lease_that_cannot_be_held_lives_by_its_renewals(daemon: FakeDaemon, client: VramClient):
    daemon.on["GET /v1/leases/ID/hold"] = lambda _: (404, {"error": {"type": "not_found", "message": "no such route"}})
    with client.lease(1, ttl_seconds=0.06) as lease:
        daemon.until(lambda: len(daemon.of("POST /v1/leases/ID/renew")) > 2)
        assert (lease.hold_fd, lease.lost) == (None, False)
    assert daemon.leases == {}


def test_a_daemon_that_is_not_ready_or_hangs_up_is_told_as_away(daemon: FakeDaemon, client: VramClient):
    daemon.on["POST /v1/admissions"] = lambda _: (503, {"error": {"type": "not_ready", "message": "starting"}})
    with pytest.warns(ManagerAwayWarning, match="starting"):
        assert client.lease(1).acquire().id is None
    daemon.on.clear()
    with client.lease(1) as lease:
        daemon.on["POST /v1/leases/ID/renew"] = lambda _: None
        with pytest.warns(ManagerAwayWarning, match="hung up"):
            lease.renew()
        assert not lease.lost


def test_a_line_that_is_full_is_a_refusal_and_lets_no_flood_through(daemon: FakeDaemon, client: VramClient):
    busy = {"error": {"type": "busy", "message": "16 requests of f are in line already"}}
    daemon.on["POST /v1/admissions"] = lambda _: (503, busy)
    with pytest.raises(InsufficientVram, match="16 requests of f are in line already"):
        client.lease(1).acquire()


def test_an_admission_without_a_lease_is_asked_for_once(nobody: Path):
    lease = VramClient().lease(1)
    with pytest.warns(ManagerAwayWarning):
        lease.acquire()
    daemon = FakeDaemon(nobody)
    daemon.start()
    with lease:
        assert lease.id is None
    assert daemon.asked == []
    daemon.stop()


def test_a_lease_that_the_daemon_does_not_know_any_more_is_lost_and_that_is_said_once(
    daemon: FakeDaemon, client: VramClient, caplog: pytest.LogCaptureFixture
):
    with client.lease(1, ttl_seconds=0.06) as lease:
        assert not lease.lost
        daemon.leases.clear()
        daemon.until(lambda: daemon.of("POST /v1/leases/ID/renew")[-1:] and not daemon.held)
        lease.renew()
        assert lease.lost
    lost = [record for record in caplog.records if "is lost" in record.message]
    assert [record.name for record in lost] == ["vram_manager"]
    assert daemon.of("DELETE /v1/leases/ID") == []


def test_a_daemon_that_is_away_while_a_lease_is_renewed_is_said_once(
    daemon: FakeDaemon, client: VramClient, caplog: pytest.LogCaptureFixture
):
    daemon.on["POST /v1/leases/ID/renew"] = lambda _: None
    with client.lease(1, ttl_seconds=0.06) as lease:
        daemon.until(lambda: len(daemon.of("POST /v1/leases/ID/renew")) > 4)
        assert not lease.lost
    assert len([record for record in caplog.records if "cannot be renewed" in record.message]) == 1


HOLDER = """
import os, sys
from vram_manager.client import VramClient
lease = VramClient().lease(1).acquire()
print(lease.id, flush=True)
if sys.argv[1:] == ["exit"]:
    os._exit(3)
sys.stdin.read()
"""


@pytest.mark.parametrize("end", ["exit", "kill"])
def test_a_process_that_dies_lets_go_at_once(daemon: FakeDaemon, end: str):
    arguments = [sys.executable, "-c", HOLDER, end]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout.readline() == b"lease-0\n"
        if end == "kill":
            assert daemon.held == ["lease-0"]
            process.send_signal(signal.SIGKILL)
        daemon.until(lambda: len(daemon.of("GET /v1/leases/ID/hold")) == 1 and not daemon.held)
    assert daemon.of("DELETE /v1/leases/ID") == []


FORKING = """
import os, sys
from vram_manager.client import VramClient
client = VramClient()
client.check(1)
lease = client.lease(1).acquire()
if os.fork() == 0:
    assert lease.hold_fd is None
    lease.release()
    client.check(1)
    print("child", flush=True)
    os.read(0, 1)
    os._exit(0)
os.read(0, 1)
os._exit(0)
"""


def test_a_forked_child_neither_keeps_nor_gives_back_its_parents_lease(daemon: FakeDaemon):
    with subprocess.Popen(
        [sys.executable, "-c", FORKING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    ) as parent:
        assert parent.stdout.readline() == b"child\n"
        assert daemon.held == ["lease-0"]
        assert daemon.of("DELETE /v1/leases/ID") == []
        parent.kill()
        daemon.until(lambda: not daemon.held)
        parent.stdin.write(b"x")
        parent.stdin.flush()


def test_a_command_that_inherits_the_hold_keeps_the_lease(daemon: FakeDaemon, client: VramClient):
    code = (
        "from vram_manager.client import VramClient; import subprocess, sys, os\n"
        "lease = VramClient().lease(1).acquire()\n"
        "subprocess.Popen([sys.executable, '-c', 'print(flush=True); input()'], pass_fds=[lease.hold_fd])\n"
        "os._exit(0)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as one:
        assert one.stdout.readline() == b"\n"
        assert one.wait(PATIENCE) == 0
        assert daemon.held == ["lease-0"]
        one.stdin.write(b"\n")
        one.stdin.flush()
        daemon.until(lambda: not daemon.held)


# Limits


LIMITS = {
    "level": "ok",
    "sustained": False,
    "used_bytes": 11_300_000_000,
    "soft_limit_bytes": 11_000_000_000,
    "hard_limit_bytes": 11_500_000_000,
    "requested_bytes": 500_000_000,
    "gpu": GPU,
    "message": "11.3 GB used",
}


def test_within_the_limits_nothing_happens(daemon: FakeDaemon, client: VramClient, cuda: FakeCuda):
    daemon.on["POST /v1/limits/check"] = lambda _: (200, LIMITS)
    limits = client.limits(500, context="upscale")
    assert (limits.level, limits.used_bytes, limits.requested_bytes) == ("ok", 11_300_000_000, 500_000_000)
    assert daemon.asked[0].body == {
        "owner": "worker",
        "context": "upscale",
        "requesting_mb": 500,
        "allocated_bytes": 10_850_000_000,
        "reserved_bytes": 11_100_000_000,
    }
    assert cuda.emptied == 0


def test_the_callers_own_numbers_go_before_torchs(daemon: FakeDaemon, client: VramClient, cuda: FakeCuda):
    client.limits(allocated_bytes=1, reserved_bytes=2)
    assert (daemon.asked[0].body["allocated_bytes"], daemon.asked[0].body["reserved_bytes"]) == (1, 2)


def test_at_the_hard_limit_it_cleans_up_and_raises(
    daemon: FakeDaemon, client: VramClient, cuda: FakeCuda, caplog: pytest.LogCaptureFixture
):
    daemon.on["POST /v1/limits/check"] = lambda _: (200, LIMITS | {"level": "hard"})
    with pytest.raises(MemoryPressureError, match=r"11\.3 GB used") as caught:
        client.limits(800)
    assert isinstance(caught.value, RuntimeError)
    assert caught.value.limits.hard_limit_bytes == 11_500_000_000
    assert cuda.emptied == 1
    assert "Emergency cleanup freed 150 MB (11.10 GB -> 10.95 GB)" in caplog.messages


def test_over_the_soft_limit_for_some_time_it_cleans_up_once_and_warns_each_time(
    daemon: FakeDaemon, client: VramClient, cuda: FakeCuda
):
    freed: list[str] = []
    client.on_pressure = lambda: freed.append("previews")
    daemon.on["POST /v1/limits/check"] = lambda _: (200, LIMITS | {"level": "soft"})
    assert client.limits().level == "soft"
    assert cuda.emptied == 0
    daemon.on["POST /v1/limits/check"] = lambda _: (200, LIMITS | {"level": "soft", "sustained": True})
    for _ in range(2):
        with pytest.warns(MemoryPressureWarning, match=r"11\.3 GB used") as told:
            assert client.limits().level == "soft"
        assert told[0].filename == __file__
    assert (cuda.emptied, freed) == (1, ["previews"])


def test_a_hook_that_fails_is_logged_and_hides_nothing(
    daemon: FakeDaemon, client: VramClient, cuda: FakeCuda, caplog: pytest.LogCaptureFixture
):
    client.on_pressure = lambda: 1 / 0
    daemon.on["POST /v1/limits/check"] = lambda _: (200, LIMITS | {"level": "hard"})
    with pytest.raises(MemoryPressureError):
        client.limits()
    assert "on_pressure failed" in caplog.messages
    assert cuda.emptied == 1


def test_without_emergency_cleanup_nothing_is_emptied(daemon: FakeDaemon, cuda: FakeCuda):
    daemon.on["POST /v1/limits/check"] = lambda _: (200, LIMITS | {"level": "hard"})
    with VramClient(emergency_cleanup=False) as client:
        client.on_pressure = lambda: pytest.fail("not wanted")
        with pytest.raises(MemoryPressureError):
            client.limits()
        assert cuda.emptied == 0
        assert client.clear_cuda_cache() == 150_000_000
        assert cuda.emptied == 1


def test_a_level_that_nobody_knows_is_no_answer(daemon: FakeDaemon):
    daemon.on["POST /v1/limits/check"] = lambda _: (200, LIMITS | {"level": "purple"})
    with VramClient(fail_open=False) as client, pytest.raises(Unreachable, match="purple"):
        client.limits()


# Generations, models, snapshots


def test_a_generation_marks_both_ends_with_torchs_numbers(daemon: FakeDaemon, client: VramClient, cuda: FakeCuda):
    with client.generation(slot=12345) as generation:
        cuda.allocated += 7
    assert (generation.delta_bytes, generation.generations, generation.leak) == (5, 1, None)
    start, end = (one.body for one in daemon.asked)
    assert start == {
        "owner": "worker",
        "phase": "start",
        "id": generation.id,
        "slot": 12345,
        "allocated_bytes": 10_850_000_000,
        "reserved_bytes": 11_100_000_000,
    }
    assert end == start | {"phase": "end", "allocated_bytes": 10_850_000_007}


def test_a_generation_that_fails_ends_too_and_its_error_is_the_one_that_is_seen(daemon: FakeDaemon):
    with VramClient(fail_open=False) as client:
        with pytest.raises(ZeroDivisionError), client.generation(id="g-1"):
            _ = 1 / 0
        assert [(one.body["phase"], one.body["id"]) for one in daemon.asked] == [("start", "g-1"), ("end", "g-1")]
        daemon.on["POST /v1/generations"] = lambda asked: (
            None if asked.body["phase"] == "end" else (200, {"generations": 1})
        )
        with pytest.raises(ZeroDivisionError), client.generation():
            _ = 1 / 0
        with pytest.raises(Unreachable), client.generation():
            pass


def test_a_leak_is_told_and_logged(daemon: FakeDaemon, client: VramClient, caplog: pytest.LogCaptureFixture):
    leak = {
        "initial_bytes": 10_800_000_000,
        "current_bytes": 11_000_000_000,
        "delta_bytes": 200_000_000,
        "generations": 100,
        "delta_per_generation_bytes": 2_000_000.5,
    }
    daemon.on["POST /v1/generations"] = lambda _: (200, {"delta_bytes": 1, "generations": 100, "leak": leak})
    with client.generation() as generation:
        pass
    assert generation.leak.delta_bytes == 200_000_000
    assert "memory leak: 10.80 GB -> 11.00 GB in 100 generations" in caplog.messages


REPORT = {
    "owner": "worker",
    "models_bytes": 6_500_000_000,
    "buffers_bytes": 0,
    "total_bytes": 6_500_000_000,
    "budget_bytes": 11_800_000_000,
    "fits": True,
    "shortfall_bytes": 0,
    "over_budget": [],
    "message": "within the budget",
}


def test_models_over_their_budget_are_named(daemon: FakeDaemon):
    over = [{"name": "flux", "bytes": 6_500_000_000, "budget_bytes": 6_000_000_000}]
    daemon.on["POST /v1/workers/ID/models"] = lambda _: (200, REPORT | {"over_budget": over})
    words = r"^flux holds 6.50 GB, 0.50 GB over its budget of 6.00 GB$"
    with VramClient(owner="a worker/ü") as client, pytest.warns(MemoryPressureWarning, match=words):
        report = client.report_models({"flux": 6_500_000_000}, budgets={"flux": 6_000_000_000})
    assert report.over_budget[0].name == "flux"
    assert daemon.asked[0].path == "/v1/workers/a%20worker%2F%C3%BC/models"
    assert daemon.asked[0].body == {"models": {"flux": 6_500_000_000}, "budgets": {"flux": 6_000_000_000}}


def test_buffers_that_do_not_fit_are_refused_before_they_are_allocated(daemon: FakeDaemon, client: VramClient):
    over = {"fits": False, "shortfall_bytes": 1, "message": "0.2 GB short"}
    daemon.on["POST /v1/workers/ID/models"] = lambda asked: (
        200,
        REPORT | over | {"buffers_bytes": sum((asked.body.get("buffers") or {}).values())},
    )
    with pytest.raises(InsufficientVram, match=r"0\.2 GB short"):
        client.report_models({"flux": 1}, buffers={"video": 5})
    assert client.report_models({"flux": 1}).fits is False


def test_a_snapshot_is_the_daemons_and_is_logged_for_debugging(
    daemon: FakeDaemon, client: VramClient, cuda: FakeCuda, caplog: pytest.LogCaptureFixture
):
    said = {"timestamp": "2026-01-01T00:00:00Z", "event": "post_generation", "slot": 7, "vram_usage_gb": 10.95}
    daemon.on["POST /v1/workers/ID/snapshots"] = lambda _: (200, said)
    with caplog.at_level(logging.DEBUG, "vram_manager"):
        assert client.snapshot("post_generation", slot=7) == said
    assert daemon.asked[0].body == {
        "event": "post_generation",
        "slot": 7,
        "allocated_bytes": 10_850_000_000,
        "reserved_bytes": 11_100_000_000,
    }
    assert f"VRAM snapshot {json.dumps(said)}" in caplog.messages


def test_a_heartbeat_has_used_and_total(daemon: FakeDaemon, client: VramClient):
    assert client.worker_status() == {"gpu_memory_used": 2048, "gpu_memory_total": 8192}


# In all


def test_a_gpu_that_is_large_enough_passes(daemon: FakeDaemon, client: VramClient):
    client.require_total("8GiB")
    client.require_total(8192, gpu=0)
    client.require_total("8.5 GB", gpu=GPU)


def test_a_gpu_that_is_too_small_is_refused_with_what_to_use(daemon: FakeDaemon, client: VramClient):
    with pytest.raises(InsufficientVram) as caught:
        client.require_total("11.8GiB")
    assert str(caught.value) == (
        "Insufficient VRAM: 8.0 GiB in all on GPU 0 (RTX 3070), 11.8 GiB required: use a GPU with at least 12 GiB"
    )


def test_a_gpu_that_is_not_there_and_a_size_that_is_none_are_the_callers_mistakes(
    daemon: FakeDaemon, client: VramClient
):
    with pytest.raises(InvalidRequest, match=r"one of GPU 0 \(RTX 3070\)") as caught:
        client.require_total("1GiB", gpu=7)
    assert caught.value.field == "gpu"
    for size in ("12", "much", "90%", "1e400GB", ""):
        with pytest.raises(InvalidRequest, match="size"):
            client.require_total(size)


@pytest.mark.parametrize("gpus", [[], [{"index": 0, "uuid": GPU, "name": "x", "total_mb": None}]])
def test_a_total_that_is_not_known_follows_the_rule(
    daemon: FakeDaemon, gpus: list[object], caplog: pytest.LogCaptureFixture
):
    daemon.on["GET /health/vram"] = lambda _: (200, {"total_mb": None, "gpus": gpus})
    with VramClient(fail_open=True) as client:
        client.require_total("12GiB")
    assert "how much there is in all is not known" in caplog.messages[-1]
    with VramClient(fail_open=False) as client, pytest.raises(InsufficientVram, match="not known"):
        client.require_total("12GiB")


# The three functions


def test_the_free_memory_and_the_stats_are_those_of_the_daemon(daemon: FakeDaemon):
    assert get_available_vram() == 6144
    stats = get_vram_stats()
    assert (stats["total_mb"], stats["used_mb"], stats["free_mb"], stats["usage_percent"]) == (8192, 2048, 6144, 25.0)
    assert stats["gpus"][0]["uuid"] == GPU


def test_without_a_daemon_nothing_is_known_and_every_job_is_admitted(nobody: Path, caplog: pytest.LogCaptureFixture):
    assert get_available_vram() is None
    assert get_vram_stats() is None
    assert check_vram_sufficient(8192) is True
    assert "8192 MB required + 2048 MB margin admitted unseen" in caplog.messages[-1]


def test_a_check_adds_the_margin_and_says_what_it_decided(
    daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, "vram_manager")
    assert check_vram_sufficient(8192) is True
    monkeypatch.setenv("VRAM_SAFETY_MARGIN_MB", "1024")
    assert check_vram_sufficient(8192) is True
    assert check_vram_sufficient(8192, 0) is True
    assert [one.body["margin_mb"] for one in daemon.asked] == [2048, 1024, 0]
    assert daemon.asked[0].body["required_mb"] == 8192
    assert caplog.messages[0] == "VRAM check: 8192 MB required + 2048 MB margin, 15360 MB available: sufficient"


def test_a_job_that_does_not_fit_is_rejected_or_only_said_to_be(
    daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    daemon.on["POST /v1/admissions"] = lambda _: (200, REFUSED)
    assert check_vram_sufficient(24576) is False
    assert "rejected: Insufficient GPU memory" in caplog.messages[-1]
    for name in ("VRAM_CHECK_DRY_RUN", "VRAM_DRY_RUN"):
        with monkeypatch.context() as context:
            context.setenv(name, "true")
            assert check_vram_sufficient(24576) is True
        assert caplog.records[-1].levelno == logging.WARNING
        assert caplog.messages[-1].startswith("DRY RUN: would reject 24576 MB required + 2048 MB margin, 15360 MB")
    daemon.on["POST /v1/admissions"] = lambda _: (200, REFUSED | {"admitted": True, "dry_run": True})
    assert check_vram_sufficient(24576) is True
    assert caplog.messages[-1].startswith("DRY RUN: would reject")


def test_switched_off_nobody_is_asked(daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ENABLE_VRAM_MONITORING", "false")
    assert check_vram_sufficient(10**6) is True
    assert daemon.asked == []


@pytest.mark.parametrize("value", ["soon", "-1", "nan", "inf"])
def test_a_setting_that_is_no_number_is_said_and_replaced(
    daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, value: str
):
    monkeypatch.setenv("VRAM_SAFETY_MARGIN_MB", value)
    monkeypatch.setenv("VRAM_CHECK_TIMEOUT_SECONDS", value)
    assert check_vram_sufficient(8192) is True
    assert daemon.asked[0].body["margin_mb"] == 2048
    assert f"VRAM_SAFETY_MARGIN_MB={value}: must be a number; 2048 is used" in caplog.messages


def test_a_check_never_raises_and_can_be_told_to_refuse_unseen(
    daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    daemon.on["POST /v1/admissions"] = lambda _: (422, {"error": {"type": "invalid", "message": "no", "field": "x"}})
    assert check_vram_sufficient(-1) is True
    monkeypatch.setenv("VRAM_FAIL_OPEN", "false")
    assert check_vram_sufficient(-1) is False
    assert "refused unseen: no" in caplog.messages[-1]


# Bytes


def fed(pieces: list[bytes]) -> Answer:
    answer = Answer()
    for piece in pieces:
        answer.feed(piece)
    return answer


def cut(raw: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted({place % len(raw) for place in places}), len(raw)]
    return [raw[start:end] for start, end in itertools.pairwise(edges) if start < end]


@given(
    body=st.binary(max_size=300),
    chunks=st.lists(st.integers(1, 40), min_size=1, max_size=20),
    places=st.lists(st.integers(0, 2000), max_size=12),
    chunked=st.booleans(),
)
def test_an_answer_is_the_same_however_it_comes(body: bytes, chunks: list[int], places: list[int], chunked: bool):
    if chunked:
        parts, rest = [], body
        while rest:
            size = chunks[len(parts) % len(chunks)]
            parts.append(b"%X;x=y\r\n%s\r\n" % (len(rest[:size]), rest[:size]))
            rest = rest[size:]
        raw = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n" + b"".join(parts) + b"0\r\nA: b\r\n\r\n"
    else:
        raw = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)
    answer = fed(cut(raw, places))
    assert (answer.status, answer.done, answer.keeps_alive, answer.take()) == (200, True, True, body)


@given(st.lists(st.binary(min_size=1, max_size=60), max_size=8))
def test_no_bytes_do_anything_but_break_the_rules(pieces: list[bytes]):
    for head in (b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"):
        with contextlib.suppress(Malformed):
            fed([head, *pieces] if head else pieces)


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/2 200 OK\r\n\r\n",
        b"HTTP/1.1 20 OK\r\n\r\n",
        b"HTTP/1.1 2000 OK\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: +1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: \xb2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0x1\r\na\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nab\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1" * 9 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1" * 5000,
        b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 20_000,
    ],
)
def test_what_breaks_the_rules_is_said(raw: bytes):
    with pytest.raises(Malformed):
        fed([raw])


def test_a_body_may_not_grow_without_end():
    answer = fed([b"HTTP/1.1 200 OK\r\n\r\n"])
    megabyte = bytes(2**20)
    for _ in range(64):
        answer.feed(megabyte)
    with pytest.raises(Malformed, match="64 MiB"):
        answer.feed(megabyte)


def test_an_end_is_an_end_only_where_one_may_be():
    answer = fed([b"HTTP/1.0 200 OK\r\n\r\nall", b" of it", b""])
    assert (answer.done, answer.keeps_alive, answer.take()) == (True, False, b"all of it")
    with pytest.raises(HungUp, match="hung up without"):
        fed([b""])
    with pytest.raises(HungUp, match="broke off"):
        fed([b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhalf", b""])


@pytest.mark.parametrize("more", [b"HTTP/1.1 200", b"\r\n"])
def test_a_connection_with_bytes_that_nobody_asked_for_is_not_used_again(more: bytes):
    assert not fed([http(200, {}) + more]).keeps_alive
    assert not fed([b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n"]).keeps_alive


@settings(max_examples=50)
@given(st.text(max_size=30))
def test_any_name_of_an_owner_is_one_segment_of_a_path(name: str):
    segment = vram_manager.client.wire.quoted(name)
    assert re.fullmatch(r"[A-Za-z0-9._~%-]*", segment)


def test_a_client_that_is_dropped_closes_its_connection(daemon: FakeDaemon):
    VramClient().check(1)
    gc.collect()
    daemon.until(lambda: daemon.hangups == 1)


# The daemon itself


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InThread]:
    """A whole daemon over one pretended card of 24 GiB, of which ComfyUI holds 8."""
    directory = tmp_path_factory.mktemp("vram")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("VRAM_SOCKET", str(directory / "vram.sock"))
        environment.setenv("VRAM_STATE_DIR", str(directory))
        environment.setenv("VRAM_CHECK_INTERVAL", "0.25")
        with InThread() as running:
            yield running


def leases(real: InThread) -> list[dict[str, Any]]:
    return call_real(real, "GET", "/v1/leases")["leases"]


def call_real(real: InThread, method: str, path: str) -> Any:
    return VramClient(real.path)._line.reply(Question(method, path, None, dict, dict)).body


def test_the_daemon_answers_every_verb_in_the_form_we_read(real: InThread, cuda: FakeCuda):
    with VramClient(real.path, owner="a/b c", fail_open=False) as client:
        admission = client.check("1GiB", margin_mb=1024)
        assert (admission.admitted, admission.required_bytes, admission.margin_bytes) == (True, GIB, GIB)
        refused = client.check("90GiB")
        assert not refused
        assert refused.shortfall_bytes > 0
        assert client.limits(1, context="test").level in ("ok", "soft")
        with client.generation(slot=7) as generation:
            cuda.allocated += 5
        assert generation.delta_bytes is not None
        report = client.report_models({"flux": 5}, buffers={"video": 6}, budgets={"flux": 5}, budget_bytes=20)
        assert (report.total_bytes, report.fits) == (11, True)
        with pytest.raises(InsufficientVram), pytest.warns(MemoryPressureWarning, match="flux"):
            client.report_models({"flux": 5}, buffers={"video": 6}, budgets={"flux": 4}, budget_bytes=10)
        assert client.snapshot("startup", slot="s")["models"]
        assert client.worker_status()["gpu_memory_total"] == 24 * 1024
        client.require_total("20GiB", gpu=0)
        with pytest.raises(InvalidRequest):
            client.check("much")
        with pytest.raises(InvalidRequest):
            client.check("1GiB", gpu=9)


def test_the_daemon_keeps_a_lease_while_it_is_held(real: InThread):
    with VramClient(real.path, fail_open=False) as client:
        with client.lease("2GiB", priority="batch") as lease:
            (seen,) = leases(real)
            assert (seen["id"], seen["bytes"], seen["held"]) == (lease.id, 2 * GIB, True)
            lease.claimed(GIB)
            lease.renew()
            assert lease.info.held
        assert leases(real) == []
        with pytest.raises(InsufficientVram):
            client.lease("90GiB", wait_seconds=0).acquire()


def test_the_daemon_drops_the_lease_of_a_process_that_dies(real: InThread):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "VRAM_SOCKET": str(real.path)},
    ) as process:
        assert process.stdout.readline().strip().decode() == leases(real)[0]["id"]
        process.kill()
        real.until(lambda: real.daemon is not None and not leases(real))


def test_the_three_functions_agree_with_the_daemon(real: InThread, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VRAM_SOCKET", str(real.path))
    assert get_available_vram() == 16 * 1024
    assert get_vram_stats()["total_mb"] == 24 * 1024
    assert check_vram_sufficient(8192) is True
    assert check_vram_sufficient(80_000) is False


def test_a_daemon_that_stops_is_asked_again_until_the_next_one_is_there(daemon: FakeDaemon, client: VramClient):
    def stops(_: Asked) -> Any:
        if len(daemon.of("POST /v1/admissions")) == 2:
            daemon.on.clear()
        return 503, {"error": {"type": "stopping", "message": "ask again"}}

    daemon.on["POST /v1/admissions"] = stops
    with client.lease(1) as lease:
        assert lease.id is not None
    asked = daemon.of("POST /v1/admissions")
    assert len(asked) == 3
    assert len({one.body["request_id"] for one in asked}) == 1
