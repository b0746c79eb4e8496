"""The daemon as a process: it starts whatever is missing, says so once, and ends in order."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import queue
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from loguru import logger

from tests.fakes import GIB, Card, FakeComfyUI, FakeGpus, FakeOllama
from vram_manager import client, config
from vram_manager.api.server import CONNECTIONS
from vram_manager.clock import Clock
from vram_manager.daemon import _until_stopped, build
from vram_manager.errors import Unreachable
from vram_manager.gpus.all import AllGpus
from vram_manager.store import FILE_NAME, Store

PATIENCE = 30.0


class Process:
    """A `vram-manager run` of our own, its lines as they come."""

    def __init__(self, environment: dict[str, str]) -> None:
        command = [sys.executable, "-m", "vram_manager", "run"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self._process = subprocess.Popen(command, env=environment, text=True, **pipes)
        self.lines: list[str] = []
        self._more: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reading = threading.Thread(target=self._read)
        self._reading.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._more.put(line.rstrip("\n"))
        self._more.put(None)

    def line(self, part: str) -> str:
        """The first line that has `part` in it, once it has come."""
        for line in self.lines:
            if part in line:
                return line
        while (line := self._more.get(timeout=PATIENCE)) is not None:
            self.lines.append(line)
            if part in line:
                return line
        raise AssertionError(f"it ended without saying {part!r}: {self.lines} {self._process.stderr.read()}")

    def listening(self) -> Process:
        self.line("Listening on ")
        return self

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def ended(self) -> tuple[int, str]:
        """The exit status and what went to stderr; all lines are there."""
        status = self._process.wait(PATIENCE)
        self._reading.join(PATIENCE)
        while (line := self._more.get(timeout=PATIENCE)) is not None:
            self.lines.append(line)
        return status, self._process.stderr.read()

    def stopped(self) -> tuple[int, str]:
        self.signal(signal.SIGTERM)
        return self.ended()

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._reading.join(PATIENCE)
        for pipe in (self._process.stdout, self._process.stderr):
            pipe.close()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_port: int) -> Iterator[Callable[..., Process]]:
    """Starts daemons that see nothing, unless they are told where something is."""
    monkeypatch.setenv("VRAM_SOCKET", str(tmp_path / "run" / "vram.sock"))
    started: list[Process] = []

    def start(**more: str) -> Process:
        ours = ("VRAM_", "OLLAMA_", "COMFYUI_", "GATEWAY_", "ENABLE_VRAM")
        bare = {name: value for name, value in os.environ.items() if not name.upper().startswith(ours)}
        bare.pop("PYTHONUNBUFFERED", None)
        nobody = f"http://127.0.0.1:{free_port}"
        settings = {
            "VRAM_SOCKET": str(tmp_path / "run" / "vram.sock"),
            "VRAM_STATE_DIR": str(tmp_path / "state"),
            "VRAM_CHECK_INTERVAL": "0.25",
            "OLLAMA_URL": nobody,
            "COMFYUI_URL": nobody,
        }
        started.append(Process(bare | settings | more))
        return started[-1]

    yield start
    for process in started:
        process.close()


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def turns() -> float:
    """How many turns the daemon's cycle has made."""
    text = client.call("GET", "/metrics").body
    return float(next(line for line in text.splitlines() if "cycle_duration_seconds_count" in line).split()[1])


def eventually(true: Callable[[], Any]) -> Any:
    """What `true()` gives once it is no longer false."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        with contextlib.suppress(Unreachable):
            if found := true():
                return found
    raise AssertionError("not in time")


# Alone in the world.


def test_with_nothing_there_it_starts_says_once_what_is_missing_and_ends_in_order(run, tmp_path: Path):
    daemon = run().listening()
    before = eventually(turns)
    eventually(lambda: turns() >= before + 6)
    health = client.call("GET", "/health")
    assert (health.status, health.body["status"]) == (200, "degraded")
    assert {sensor["state"] for sensor in health.body["sensors"].values()} == {"missing"}
    assert all(sensor["why"] for sensor in health.body["sensors"].values())
    assert client.call("GET", "/ready").status == 200
    assert daemon.stopped() == (0, "")
    warnings = [line for line in daemon.lines if "WARNING" in line]
    for who in ("GPU", "Ollama", "ComfyUI"):
        assert len([line for line in warnings if f"{who} cannot be read" in line]) == 1
    assert len(warnings) == 3
    assert daemon.lines[-1].endswith("Stopped")
    assert not (tmp_path / "run" / "vram.sock").exists()


def test_an_interrupt_ends_it_like_a_termination_and_one_more_signal_does_not_hurt(run):
    daemon = run().listening()
    daemon.signal(signal.SIGINT)
    daemon.signal(signal.SIGTERM)
    assert daemon.ended() == (0, "")


def test_followers_and_half_requests_neither_delay_the_end_nor_make_noise(run, tmp_path: Path):
    daemon = run().listening()
    events = client.follow("/v1/events?after=1")
    next(events)
    with contextlib.ExitStack() as stack:

        def say(words: bytes) -> socket.socket:
            connection = stack.enter_context(socket.socket(socket.AF_UNIX))
            connection.connect(str(tmp_path / "run" / "vram.sock"))
            connection.sendall(words)
            return connection

        say(b"GET /health HTTP/1.1\r\nHo")
        say(b"POST /v1/free HTTP/1.1\r\nHost: vram\r\nContent-Length: 10\r\n\r\n{")
        assert say(b"\x00\r\n\r\n").recv(100).startswith(b"HTTP/1.1 400")
        assert daemon.stopped() == (0, "")
    events.close()
    assert [line for line in daemon.lines if "ERROR" in line or "CRITICAL" in line] == []


def test_connections_without_end_leave_the_sensors_their_file_descriptors(run, tmp_path: Path):
    daemon = run().listening()
    with contextlib.ExitStack() as stack:
        for _ in range(CONNECTIONS + 50):
            leaked = stack.enter_context(socket.socket(socket.AF_UNIX))
            leaked.connect(str(tmp_path / "run" / "vram.sock"))
        leaked.settimeout(PATIENCE)
        with contextlib.suppress(ConnectionError):
            assert leaked.recv(1) == b""
    health = eventually(lambda: client.call("GET", "/health"))
    assert health.status == 200
    assert daemon.stopped() == (0, "")


# Machines that read the log.


def test_json_lines_come_as_they_happen_and_every_one_parses(run):
    daemon = run(VRAM_LOG_FORMAT="json")
    daemon.line("Listening on ")
    lost = json.loads(daemon.line("sensor_lost"))
    assert daemon.stopped() == (0, "")
    assert lost["event"]["type"] == "sensor_lost"
    assert all({"at", "level", "message"} <= json.loads(line).keys() for line in daemon.lines)


# Wrong settings.


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("VRAM_THRESHOLD", "110", "less than or equal to 100"),
        ("VRAM_SOCKET", "/dev/null", "exists and is no socket; choose another path"),
        ("VRAM_SOCKET", "/proc/vram/vram.sock", "choose a writable path"),
    ],
)
def test_a_wrong_setting_is_2_and_one_line_that_says_what_is_allowed(run, name: str, value: str, allowed: str):
    daemon = run(**{name: value})
    status, said = daemon.ended()
    assert status == 2
    assert said.count("\n") == 1
    assert said.startswith(f"vram-manager: {name}={value}: ")
    assert allowed in said


def test_a_taken_port_is_2_and_leaves_no_socket_behind(run, tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        status, said = run(VRAM_HTTP_PORT=port).ended()
    assert (status, said.count("\n")) == (2, 1)
    assert f"VRAM_HTTP_PORT={port}" in said
    assert not (tmp_path / "run" / "vram.sock").exists()


def test_it_begins_with_its_effective_settings_and_a_warning_for_each_name_it_does_not_know(run):
    daemon = run(VRAM_PROFILE="chat", OLLAMA_URL="", VRAM_TRESHOLD="80", OLLAMA_KEEP_ALIVE="5m").listening()
    assert "Profile chat: no Ollama and ComfyUI at http://127.0.0.1:" in daemon.line("Profile")
    assert "WARNING VRAM_TRESHOLD is not a setting; did you mean VRAM_THRESHOLD?" in daemon.line("VRAM_TRESHOLD")
    assert daemon.stopped() == (0, "")
    assert not any("OLLAMA_KEEP_ALIVE" in line for line in daemon.lines)


# One at a time.


@pytest.mark.parametrize(
    ("directory", "words"),
    [("elsewhere", "another vram-manager answers on"), ("state", "is in use by another vram-manager")],
    ids=["on its socket", "in its state directory"],
)
def test_a_second_daemon_is_1_and_one_line_and_the_first_goes_on(run, tmp_path: Path, directory: str, words: str):
    first = run().listening()
    status, said = run(VRAM_STATE_DIR=str(tmp_path / directory)).ended()
    assert (status, said.count("\n")) == (1, 1)
    assert words in said
    assert client.call("GET", "/health").status == 200
    assert first.stopped() == (0, "")
    assert not (tmp_path / "run" / "vram.sock").exists()


def test_a_daemon_that_was_killed_is_followed_by_one_that_takes_its_place(run):
    killed = run().listening()
    killed.line("ComfyUI cannot be read")
    ids = [event["id"] for event in client.call("GET", "/v1/events").body["events"]]
    eventually(lambda: stored(killed) >= len(ids))
    killed.signal(signal.SIGKILL)
    assert killed.ended()[0] == -signal.SIGKILL
    again = run().listening()
    events = client.call("GET", "/v1/events").body["events"]
    assert [event["id"] for event in events][: len(ids)] == ids
    assert again.stopped() == (0, "")


def stored(_: Process) -> int:
    path = Path(os.environ["VRAM_SOCKET"]).parent.parent / "state" / FILE_NAME
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return int(connection.execute("SELECT count(*) FROM events").fetchone()[0])


# Its state.


def test_where_its_state_cannot_be_written_it_says_so_once_and_goes_on(run, tmp_path: Path):
    (tmp_path / "file").touch()
    daemon = run(VRAM_STATE_DIR=str(tmp_path / "file" / "state")).listening()
    before = eventually(turns)
    eventually(lambda: turns() >= before + 3)
    assert client.call("GET", "/v1/events").body["events"]
    assert daemon.stopped() == (0, "")
    assert len([line for line in daemon.lines if "kept in memory" in line]) == 1


def test_a_damaged_history_is_set_aside_with_one_warning(run, tmp_path: Path):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / FILE_NAME).write_bytes(b"garbage" * 1000)
    daemon = run().listening()
    assert daemon.stopped() == (0, "")
    assert len([line for line in daemon.lines if "was damaged" in line]) == 1
    assert (tmp_path / "state" / f"{FILE_NAME}.damaged-1").exists()


# With a ComfyUI that never gives anything back.


class Stubborn(BaseHTTPRequestHandler):
    """20 of 24 GiB are ComfyUI's, and they stay."""

    def do_GET(self) -> None:
        device = {
            "name": "cuda:0 NVIDIA GeForce RTX 4090",
            "type": "cuda",
            "index": 0,
            "vram_total": 24 * GIB,
            "vram_free": 4 * GIB,
            "torch_vram_total": 20 * GIB,
            "torch_vram_free": 0,
        }
        answers = {
            "/system_stats": {"system": {"comfyui_version": "0.3.40", "argv": ["main.py"]}, "devices": [device]},
            "/prompt": {"exec_info": {"queue_remaining": 0}},
        }
        self._say(200 if self.path in answers else 404, json.dumps(answers.get(self.path, {})).encode())

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._say(200, b"")

    def _say(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def stubborn() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Stubborn) as server:
        serving = threading.Thread(target=server.serve_forever, args=(0.01,))
        serving.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        serving.join()


def test_a_termination_while_a_free_settles_is_0_and_the_free_is_remembered(run, stubborn: str):
    settings = {"COMFYUI_URL": stubborn, "COMFYUI_IDLE_SECONDS": "0", "OLLAMA_URL": "", "VRAM_SETTLE_TIMEOUT": "600"}
    daemon = run(**settings).listening()

    def asked() -> Any:
        reply = client.call("POST", "/v1/free", {"stage": "unload"})
        return reply.body["event_id"] if reply.status == 202 else None

    event_id = eventually(asked)
    assert daemon.stopped() == (0, "")
    assert any("Stopping while a free is settling (asked by hand)" in line for line in daemon.lines)
    again = run(**settings).listening()
    events = client.call("GET", "/v1/events").body["events"]
    assert [event["type"] for event in events if event["id"] == event_id] == ["free_asked"]
    # It starts cooled down: what was asked before the restart is not asked again at once.
    reply = eventually(lambda: (r := client.call("POST", "/v1/free")).body["error"]["message"] and r)
    eventually(lambda: "cooldown" in client.call("POST", "/v1/free").body["error"]["message"])
    assert reply.status == 409
    assert again.stopped() == (0, "")


# A bug.


@pytest.mark.asyncio
async def test_the_death_of_a_part_ends_everything_with_1_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VRAM_SOCKET", str(tmp_path / "vram.sock"))
    card = Card()
    ollama = FakeOllama(card)
    ollama.error = ZeroDivisionError("a bug in a part")
    daemon = build(
        config.load(),
        Clock.of_running_loop(),
        Store.open(tmp_path),
        gpus=FakeGpus(card),
        ollama=ollama,
        comfyui=FakeComfyUI(card),
    )
    said: list[str] = []
    sink = logger.add(said.append, level="CRITICAL", format="{message}")
    nvml = AllGpus()
    try:
        status = await asyncio.wait_for(_until_stopped(daemon, nvml, asyncio.Event()), PATIENCE)
    finally:
        logger.remove(sink)
        nvml.close()
        daemon.journal.close()
    assert status == 1
    assert said[0].startswith("A part of the daemon died")
    assert "ZeroDivisionError: a bug in a part" in said[0]


# Somebody is told.


class Told(BaseHTTPRequestHandler):
    """A receiver that notes what it is told."""

    said: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def do_POST(self) -> None:
        self.said.put(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *words: object) -> None:
        pass


def test_a_webhook_is_told_what_cannot_be_read_and_the_metrics_count_it(run):
    with ThreadingHTTPServer(("127.0.0.1", 0), Told) as receiver:
        serving = threading.Thread(target=receiver.serve_forever)
        serving.start()
        daemon = run(VRAM_WEBHOOK_URL=f"http://127.0.0.1:{receiver.server_port}/hook").listening()
        told = [Told.said.get(timeout=PATIENCE) for _ in range(3)]
        delivered = 'webhook_deliveries_total{outcome="delivered"} 3.0'
        eventually(lambda: delivered in client.call("GET", "/metrics").body)
        assert daemon.stopped() == (0, "")
        receiver.shutdown()
        serving.join()
    assert {one["target"] for one in told} == {"nvml", "ollama", "comfyui"}
    assert all("cannot be read" in one["text"] and one["type"] == "sensor_lost" for one in told)


def test_a_webhook_that_hangs_does_not_keep_the_daemon(run):
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        daemon = run(VRAM_WEBHOOK_URL=f"http://127.0.0.1:{deaf.getsockname()[1]}/secret-path").listening()
        deaf.accept()[0].close()
        # The GPU, Ollama and ComfyUI are not there, and each is told of once.
        eventually(lambda: len(client.call("GET", "/v1/events").body["events"]) >= 3)
        assert daemon.stopped() == (0, "")
    assert any("was not told 3 events" in line for line in daemon.lines)
    assert not any("secret-path" in line for line in daemon.lines)
