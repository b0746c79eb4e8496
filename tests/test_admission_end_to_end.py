"""Leases among real processes: workers take memory on the simulated GPU, and they or the daemon are killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import sqlite3
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.fake_nvml import build
from tests.test_end_to_end import Process, free_ports, needs_compiler, started
from vram_manager.store import FILE_NAME

pytestmark = [pytest.mark.asyncio, needs_compiler]

ROOT = Path(__file__).parents[1]
MIB = 2**20
PATIENCE = 60.0
WORKERS = 64

# One parent that forks all workers, so that each costs a few milliseconds. Each says what it has come to; one that
# is to die says so and stops there.
NURSERY = """
import os, random, signal, socket, sys
from vram_manager.client import VramClient
from vram_manager.client.wire import Answer, request

port, count = map(int, sys.argv[1:])
DEATHS = ("in line", "promised", "loaded", "claimed")

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def hold(name, size):
    with socket.create_connection(("127.0.0.1", port)) as control:
        control.sendall(request("POST", "/gpu/hold", {"holder": name, "bytes": size}))
        answer = Answer()
        while not answer.done:
            answer.feed(control.recv(65536))
    if answer.status != 200:
        say("OUT OF MEMORY", name, answer.reply().body)

def work(number, size_mb):
    name = f"worker-{number}"
    death = DEATHS[number // 4 % 4] if number % 4 == 0 else None

    def come_to(stage):
        if death == stage:
            say("dies", name, os.getpid(), stage)
        # Who dies in line may be granted before that.
        if stage != "in line" and death in (stage, "in line"):
            signal.pause()

    client = VramClient(owner=name, fail_open=False, timeout_seconds=120)
    come_to("in line")
    with client.lease(size_mb, wait_seconds=600) as lease:
        come_to("promised")
        hold(name, size_mb << 20)
        come_to("loaded")
        if number % 3:
            lease.claimed()
        come_to("claimed")
        hold(name, 0)

numbers = {}
for number in range(count):
    size_mb = random.Random(number).randint(256, 4096)
    pid = os.fork()
    if pid == 0:
        try:
            work(number, size_mb)
        except BaseException as error:
            say("FAILED", number, repr(error))
        os._exit(0)
    numbers[pid] = number
while numbers:
    pid, status = os.wait()
    say("gone", f"worker-{numbers.pop(pid)}", os.waitstatus_to_exitcode(status))
say("all gone")
"""

# A worker as the README has it: it ends when it is told to.
WORKER = """
import sys
from vram_manager.client import VramClient
owner, size = sys.argv[1:]
client = VramClient(owner=owner, fail_open=False, timeout_seconds=120)
with client.lease(size, wait_seconds=600) as lease:
    print("granted", lease.id, flush=True)
    sys.stdin.readline()
print("given back", flush=True)
"""

# Without the client's comforts: nothing but an open connection keeps this lease, or nothing but a living process.
HELD_BY_CONNECTION = """
import sys
from vram_manager.client import call
from vram_manager.client.door import Connection, socket_path
wish = {"required": sys.argv[2], "owner": sys.argv[1], "ttl_seconds": 3600}
lease = call("POST", "/v1/admissions", wish).body["lease"]
hold = Connection(socket_path())
assert hold.stream(b"GET /v1/leases/" + lease["id"].encode() + b"/hold HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n", 60) == 200
hold.read(60)
print("granted", lease["id"], flush=True)
sys.stdin.readline()
"""
HELD_BY_PROCESS = """
import os, sys
from vram_manager.client import call
wish = {"required": sys.argv[2], "owner": sys.argv[1], "ttl_seconds": 3600, "pid": os.getpid()}
print("granted", call("POST", "/v1/admissions", wish).body["lease"]["id"], flush=True)
sys.stdin.readline()
"""


class Stack:
    """The simulated servers and the GPU they share; daemons come and go over one state directory."""

    def __init__(self, directory: Path, environment: dict[str, str], control_url: str) -> None:
        self.environment = environment
        self.socket = environment["VRAM_SOCKET"]
        self.history = directory / "state" / FILE_NAME
        self.control_url = control_url

    @contextlib.asynccontextmanager
    async def daemon(self) -> AsyncIterator[Process]:
        async with started("run", **self.environment) as daemon:
            await daemon.line("can be read: GPU 0")
            yield daemon

    @contextlib.asynccontextmanager
    async def run(self, *command: str) -> AsyncIterator[Process]:
        """A child beside the daemon; what is left of it and its own children at the end is killed."""
        child = await asyncio.create_subprocess_exec(
            *command,
            env={**os.environ, **self.environment, "PYTHONPATH": str(ROOT)},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield Process(child)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            await killed(child)

    @contextlib.asynccontextmanager
    async def worker(self, owner: str, size: str, script: str = WORKER) -> AsyncIterator[tuple[Process, str]]:
        """A worker and its lease's id, once it was granted."""
        async with self.run(sys.executable, "-S", "-c", script, owner, size) as child:
            yield child, (await child.line("granted")).split()[1]

    async def gpu(self, holder: str | None = None, size: int = 0) -> Any:
        """The truth about the card; first `holder` has so much of it, if one is named."""
        async with httpx.AsyncClient(timeout=PATIENCE, trust_env=False) as http:
            if holder is not None:
                body = {"holder": holder, "bytes": size}
                return (await http.post(f"{self.control_url}/gpu/hold", json=body)).raise_for_status().json()
            return (await http.get(f"{self.control_url}/gpu")).json()

    async def call(self, method: str, path: str, **body: Any) -> httpx.Response:
        transport = httpx.AsyncHTTPTransport(uds=self.socket)
        async with httpx.AsyncClient(transport=transport, base_url="http://vram", timeout=120) as http:
            return await http.request(method, path, json=body or None)

    async def ask(self, owner: str, required: str, **more: Any) -> Any:
        reply = await self.call("POST", "/v1/admissions", owner=owner, required=required, **more)
        assert reply.status_code == 200, reply.text
        return reply.json()

    async def leases(self, true: Callable[[list[Any]], object] = lambda _: True) -> dict[str, Any]:
        """All of them by id, in the first reply in which they are as wished."""
        async with asyncio.timeout(PATIENCE):
            while not true(found := (await self.call("GET", "/v1/leases")).json()["leases"]):
                pass
        return {lease["id"]: lease for lease in found}


@contextlib.asynccontextmanager
async def stack_in(directory: Path, **settings: str) -> AsyncIterator[Stack]:
    ollama, comfyui, control = map(str, free_ports(3))
    state = str(directory / "gpu.state")
    environment = {
        "FAKE_NVML_STATE": state,
        "LD_LIBRARY_PATH": str(build(directory).parent),
        "OLLAMA_URL": f"http://127.0.0.1:{ollama}",
        "COMFYUI_URL": f"http://127.0.0.1:{comfyui}",
        "VRAM_SOCKET": str(directory / "vram.sock"),
        "VRAM_STATE_DIR": str(directory / "state"),
        # Nothing to spare: a byte promised twice is an allocation that fails.
        "VRAM_SAFETY_MARGIN_MB": "0",
        "VRAM_FAIL_OPEN": "false",
        **settings,
    }
    ports = ["--ollama-port", ollama, "--comfyui-port", comfyui, "--control-port", control]
    async with started("simulate", *ports, "--gpu-gib", "12", "--mode", "legacy", "--nvml-state", state) as simulator:
        await simulator.line("Simulated Ollama")
        yield Stack(directory, environment, f"http://127.0.0.1:{control}")


async def killed(child: asyncio.subprocess.Process) -> None:
    """Ended as `kill -9` does, without a word of farewell."""
    if child.returncode is None:
        child.kill()
    async with asyncio.timeout(PATIENCE):
        await child.wait()
    if child.stdin is not None:
        child.stdin.close()


async def finished(worker: Process) -> None:
    """The worker is told to end, and gives its lease back."""
    assert worker.process.stdin is not None
    worker.process.stdin.write(b"\n")
    await worker.line("given back")
    await worker.process.wait()


def stored(stack: Stack) -> list[str]:
    """The leases on the disk."""
    with contextlib.closing(sqlite3.connect(stack.history)) as history:
        return [row[0] for row in history.execute("SELECT id FROM leases")]


async def test_no_worker_of_64_runs_out_of_memory_though_some_are_killed(tmp_path: Path) -> None:
    async with stack_in(tmp_path) as stack, stack.daemon() as daemon:
        port = stack.control_url.rpartition(":")[2]
        before = await stack.gpu()
        async with stack.run(sys.executable, "-S", "-c", NURSERY, port, str(WORKERS)) as nursery:
            while (said := await nursery.line("^(dies|gone|all gone)")) != "all gone":
                what, name, number, *_ = said.split()
                if what == "dies":
                    os.kill(int(number), signal.SIGKILL)
                elif number == str(-signal.SIGKILL):
                    # As the driver does when a process ends.
                    await stack.gpu(name, 0)
            said = nursery.lines
        # Granted only when nobody else is promised anything any more.
        whole = await stack.ask("last", f"{before['free_bytes'] // MIB - 64}MiB", wait_seconds=PATIENCE)
        left = await stack.leases()
        after = await stack.gpu()
        await stack.call("DELETE", f"/v1/leases/{whole['lease']['id']}")
        status = await daemon.stop()

    assert [line for line in said if not re.match("dies|gone|all gone", line)] == []
    assert sum(line.startswith("gone") for line in said) == WORKERS
    assert sum(line.endswith(f" {-signal.SIGKILL}") for line in said) == WORKERS // 4
    assert after["out_of_memory"] == 0
    assert after["holders"] == before["holders"]
    assert whole["admitted"], whole["reason"]
    assert list(left) == [whole["lease"]["id"]]
    assert sum("Admitted worker-" in line for line in daemon.lines) >= WORKERS * 3 // 4
    assert status == 0
    assert stored(stack) == []


async def test_the_lease_of_a_killed_worker_ends_at_once(tmp_path: Path) -> None:
    ways = {
        "connection": (HELD_BY_CONNECTION, "its connection closed"),
        "process": (HELD_BY_PROCESS, r"its process \d+ is gone"),
        "client": (WORKER, r"its (connection closed|process \d+ is gone)"),
    }
    async with stack_in(tmp_path) as stack, stack.daemon() as daemon:
        for owner, (script, why) in ways.items():
            async with stack.worker(owner, "8GiB", script=script) as (worker, lease_id):
                assert list(await stack.leases()) == [lease_id]
                assert not (await stack.ask("other", "8GiB", wait_seconds=0))["admitted"]
                await killed(worker.process)
                await daemon.line(f"Lease of {owner} ended: {why} after")
                assert await stack.leases() == {}
                events = (await stack.call("GET", "/v1/events")).json()["events"]
                assert (events[-1]["type"], events[-1]["lease"]) == ("lease_ended", lease_id)


async def test_a_lease_that_nobody_holds_expires(tmp_path: Path) -> None:
    async with stack_in(tmp_path) as stack, stack.daemon() as daemon:
        lease = (await stack.ask("forgetful", "8GiB", ttl_seconds=1))["lease"]
        await daemon.line("Lease of forgetful expired: not renewed for 1 s")
        assert await stack.leases() == {}
        events = (await stack.call("GET", "/v1/events")).json()["events"]
        assert (events[-1]["type"], events[-1]["lease"]) == ("lease_expired", lease["id"])
        assert (await stack.ask("next", "8GiB", wait_seconds=0))["admitted"]


async def test_a_command_whose_guardian_was_killed_keeps_its_lease(tmp_path: Path) -> None:
    guarded = (
        "exec",
        "--owner",
        "tts",
        "--need",
        "4GiB",
        "--",
        "sh",
        "-c",
        "echo $$ runs; exec sleep 1000 <&- >&- 2>&-",
    )
    async with (
        stack_in(tmp_path) as stack,
        stack.daemon() as daemon,
        stack.run(sys.executable, "-m", "vram_manager", *guarded) as guardian,
    ):
        command = int((await guardian.line("runs")).split()[0])
        own = await stack.leases(lambda leases: [lease["pid"] for lease in leases] == [command])
        await killed(guardian.process)
        assert list(await stack.leases()) == list(own)
        assert not (await stack.ask("other", "8GiB", wait_seconds=0))["admitted"]
        os.kill(command, signal.SIGKILL)
        await daemon.line("Lease of tts ended")
        assert await stack.leases() == {}


async def test_a_daemon_that_was_killed_keeps_the_leases_of_the_living_and_only_those(tmp_path: Path) -> None:
    async with stack_in(tmp_path) as stack, contextlib.AsyncExitStack() as workers:
        async with stack.daemon() as first:
            one, one_id = await workers.enter_async_context(stack.worker("one", "2GiB"))
            two, two_id = await workers.enter_async_context(stack.worker("two", "3GiB"))
            dies, _ = await workers.enter_async_context(stack.worker("dies", "1GiB"))
            alone = (await stack.ask("alone", "1GiB", ttl_seconds=3600))["lease"]["id"]
            await killed(first.process)
        await killed(dies.process)
        async with stack.daemon() as second:
            assert any("3 leases of the last run go on" in line for line in second.lines)
            assert set(await stack.leases()) == {one_id, two_id, alone}
            assert not (await stack.ask("other", "8GiB", wait_seconds=0))["admitted"]
            again = await stack.leases(lambda leases: sum(lease["held"] for lease in leases) == 2)
            assert {lease["owner"]: lease["held"] for lease in again.values()} == {
                "one": True,
                "two": True,
                "alone": False,
            }
            await finished(one)
            await second.line("Lease of one ended: released")
            await killed(two.process)
            await second.line("Lease of two ended")
            await stack.call("DELETE", f"/v1/leases/{alone}")
            assert await stack.leases() == {}
            assert (await stack.ask("other", "8GiB", wait_seconds=0, ttl_seconds=1))["admitted"]
            await second.line("Lease of other expired")
            await second.stop()
        assert stored(stack) == []


WISH = {"owner": "raw", "required": "4GiB", "request_id": "job-17", "wait_seconds": 0}


async def asked(stack: Stack) -> asyncio.StreamWriter:
    """The question is put, and its answer not yet read."""
    body = json.dumps(WISH).encode()
    _, writer = await asyncio.open_unix_connection(stack.socket)
    writer.write(f"POST /v1/admissions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    return writer


async def test_a_grant_whose_answer_was_lost_with_the_daemon_is_given_again_and_not_twice(tmp_path: Path) -> None:
    async with stack_in(tmp_path) as stack:
        async with stack.daemon() as first:
            writer = await asked(stack)
            admitted = await first.line("Admitted raw")
            await killed(first.process)
        writer.close()
        granted = stored(stack)
        assert len(granted) == 1
        assert granted[0] in admitted
        async with stack.daemon():
            again = await stack.ask(**WISH)
            assert again["lease"]["id"] == granted[0]
            assert again["reason"] == "4.0 GiB were granted to this request before"
            assert list(await stack.leases()) == granted
            assert (await stack.ask(**WISH | {"request_id": "job-18"}))["lease"]["id"] != granted[0]


async def test_a_grant_that_died_with_the_daemon_before_it_was_written_is_none(tmp_path: Path) -> None:
    async with stack_in(tmp_path) as stack:
        async with stack.daemon() as first:
            with contextlib.closing(sqlite3.connect(stack.history, isolation_level=None)) as history:
                # Nobody else writes meanwhile.
                history.execute("BEGIN IMMEDIATE")
                writer = await asked(stack)
                (lost,) = await stack.leases(bool)
                await killed(first.process)
        writer.close()
        assert stored(stack) == []
        async with stack.daemon():
            assert await stack.leases() == {}
            again = await stack.ask(**WISH)
            assert again["lease"]["id"] != lost
            assert list(await stack.leases()) == [again["lease"]["id"]]


async def test_who_waits_in_line_is_served_by_the_daemon_that_comes_after(tmp_path: Path) -> None:
    async with stack_in(tmp_path) as stack, contextlib.AsyncExitStack() as workers:
        async with stack.daemon() as first:
            here, here_id = await workers.enter_async_context(stack.worker("here", "8GiB"))
            waiting = await workers.enter_async_context(
                stack.run(sys.executable, "-S", "-c", WORKER, "waiting", "8GiB")
            )
            async with asyncio.timeout(PATIENCE):
                while not (await stack.call("GET", "/v1/leases")).json()["line"]:
                    pass
            await killed(first.process)
        async with stack.daemon() as second:
            assert list(await stack.leases()) == [here_id]
            await finished(here)
            granted = (await waiting.line("granted")).split()[1]
            assert list(await stack.leases()) == [granted]
            await finished(waiting)
            await second.line("Lease of waiting ended: released")
            assert await stack.leases() == {}


@pytest.mark.parametrize(
    ("shared", "times", "words"),
    [
        ("socket", 1, r"another vram-manager answers on \S+/vram\.sock: only one may act on a GPU"),
        # More often than a lease that nobody renews outlives a restart.
        ("state", 4, r"VRAM_STATE_DIR=\S+ is in use by another vram-manager: only one may act on a GPU"),
    ],
    ids=["one socket", "one state"],
)
async def test_a_second_daemon_says_so_and_the_first_keeps_its_leases(
    tmp_path: Path, shared: str, times: int, words: str
) -> None:
    async with stack_in(tmp_path) as stack, contextlib.AsyncExitStack() as workers:
        other = {"VRAM_STATE_DIR": str(tmp_path / "other")} if shared == "socket" else {}
        async with stack.daemon() as first:
            _, lease_id = await workers.enter_async_context(stack.worker("one", "2GiB"))
            for _ in range(times):
                async with started("run", **stack.environment | other) as second:
                    await second.line(words)
                    assert await second.process.wait() == 1
            assert list(await stack.leases(lambda leases: leases[0]["held"])) == [lease_id]
            await killed(first.process)
        async with stack.daemon():
            assert list(await stack.leases(lambda leases: leases[0]["held"])) == [lease_id]
