"""The standard-library door: what it says when nobody answers, and what it gives when somebody does."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes import InThread
from tests.test_store import nobody
from vram_manager import client
from vram_manager.client import DEFAULT_SOCKET, Reply, call, follow, socket_path
from vram_manager.domain.event import Event, EventType
from vram_manager.errors import Unreachable

BACK = Event(type=EventType.SENSOR_BACK, target="ollama", reason="version 0.33.1")


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InThread]:
    """One daemon for all tests that only look; VRAM_SOCKET names it."""
    directory = tmp_path_factory.mktemp("vram")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("VRAM_SOCKET", str(directory / "vram.sock"))
        environment.setenv("VRAM_STATE_DIR", str(directory))
        environment.setenv("VRAM_CHECK_INTERVAL", "0.25")
        with InThread() as running:
            yield running


@pytest.fixture
def sock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the client looks; nothing is there yet."""
    path = tmp_path / "vram.sock"
    monkeypatch.setenv("VRAM_SOCKET", str(path))
    return path


@contextlib.contextmanager
def answering(path: Path, *answers: bytes, keep_open: bool = False) -> Iterator[None]:
    """Somebody who says these bytes to whoever connects, one after the other, whatever he is asked."""
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as stack:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            for answer in answers:
                with contextlib.suppress(OSError):
                    connection, _ = listener.accept()
                    stack.callback(connection.close)
                    connection.recv(65536)
                    connection.sendall(answer)
                    if not keep_open:
                        connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        thread.join(20)


def json_reply(body: bytes, status: bytes = b"200 OK") -> bytes:
    return b"HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)


def test_the_socket_is_the_one_in_the_environment_or_the_usual_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VRAM_SOCKET", "/somewhere/else.sock")
    assert socket_path() == "/somewhere/else.sock"
    for unset in (lambda: monkeypatch.setenv("VRAM_SOCKET", ""), lambda: monkeypatch.delenv("VRAM_SOCKET")):
        unset()
        assert socket_path() == DEFAULT_SOCKET == "/run/vram-manager/vram.sock"


def test_an_answer_has_its_status_and_its_json(daemon: InThread):
    reply = call("GET", "/health/vram")
    assert reply.status == 200
    assert reply.body["total_mb"] == 24 * 1024


def test_an_answer_that_is_no_json_is_text(daemon: InThread):
    reply = call("GET", "/metrics")
    assert reply.status == 200
    assert "vram_manager_build_info" in reply.body


def test_an_error_is_an_answer_and_no_exception(daemon: InThread):
    assert call("GET", "/nowhere").status == 404
    reply = call("POST", "/v1/free", {"stage": "hard"})
    assert (reply.status, reply.body["error"]["field"]) == (422, "stage")


def test_a_body_that_is_too_large_is_an_answer_too(daemon: InThread):
    assert call("POST", "/v1/free", {"stage": "x" * 2**21}).status == 413


def test_an_answer_without_a_body_is_empty(sock: Path):
    with answering(sock, b"HTTP/1.1 204 No Content\r\n\r\n"):
        assert call("DELETE", "/v1/leases/1") == Reply(204, "")


def test_a_socket_that_is_not_there_is_said_with_what_to_look_at(sock: Path):
    with pytest.raises(Unreachable) as caught:
        call("GET", "/health")
    assert str(caught.value) == (
        f"no daemon: {sock} does not exist (is vram-manager running, is its socket's volume mounted?)"
    )


def test_a_socket_that_a_daemon_left_behind_is_said(sock: Path):
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(sock))
    with pytest.raises(Unreachable, match=f"^no daemon: nobody listens on {sock} any more$"):
        call("GET", "/health")


def test_a_socket_of_another_group_is_said_with_what_to_do(monkeypatch: pytest.MonkeyPatch):
    with tempfile.TemporaryDirectory() as name, socket.socket(socket.AF_UNIX) as listener:
        path = Path(name) / "vram.sock"
        listener.bind(str(path))
        listener.listen()
        path.chmod(0o600 if os.geteuid() == 0 else 0o000)
        Path(name).chmod(0o755)
        monkeypatch.setenv("VRAM_SOCKET", str(path))
        with nobody(), pytest.raises(Unreachable) as caught:
            call("GET", "/health")
    assert str(caught.value) == f"{path}: permission denied (it is mode 0660: use its group)"


@pytest.mark.parametrize("what", ["a file", "a directory"])
def test_what_is_no_socket_is_unreachable(sock: Path, what: str):
    sock.touch() if what == "a file" else sock.mkdir()
    with pytest.raises(Unreachable, match=str(sock)):
        call("GET", "/health")


def test_a_path_longer_than_a_socket_may_have_is_unreachable(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VRAM_SOCKET", "/tmp/" + "x" * 200)
    with pytest.raises(Unreachable, match="too long"):
        call("GET", "/health")


def test_a_daemon_that_does_not_answer_in_time_is_unreachable(sock: Path):
    begun = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"
    with answering(sock, begun, keep_open=True), pytest.raises(Unreachable, match="timed out"):
        call("GET", "/health", timeout_seconds=0.1)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        json_reply(b"not json"),
        json_reply(b"\xff\xfe"),
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n\xff\xfe",
    ],
    ids=["hangs up", "breaks off", "no http", "no json", "no text in json", "no text"],
)
def test_somebody_else_who_answers_there_is_no_daemon(sock: Path, answer: bytes):
    with answering(sock, answer), pytest.raises(Unreachable, match=str(sock)):
        call("GET", "/health")


def test_a_stream_gives_each_event_as_it_comes(daemon: InThread):
    journal = daemon.daemon.journal
    entries = []
    daemon.do(lambda: entries.append(journal.record(BACK)))
    events = follow(f"/v1/events?after={entries[0].id}")
    for _ in range(3):
        daemon.do(lambda: entries.append(journal.record(BACK)))
        assert next(events)["id"] == entries[-1].id
    events.close()


def test_a_stream_ends_with_the_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VRAM_SOCKET", str(tmp_path / "vram.sock"))
    monkeypatch.setenv("VRAM_STATE_DIR", str(tmp_path))
    with InThread() as running:
        events = follow("/v1/events?after=1")
        next(events)
        running.stop()
        with contextlib.suppress(Unreachable):
            for _ in events:
                pass
        with pytest.raises(StopIteration):
            next(events)


def test_a_stream_that_breaks_off_is_unreachable(sock: Path):
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    with answering(sock, head + b'10\r\ndata: {"id": 1}\n\r\n' + b"40\r\ndata: "):
        events = follow("/v1/events")
        assert next(events) == {"id": 1}
        with pytest.raises(Unreachable, match=str(sock)):
            next(events)


def test_a_stream_of_nobody_is_unreachable(sock: Path):
    with pytest.raises(Unreachable, match="does not exist"):
        next(follow("/v1/events"))


def test_the_client_needs_nothing_but_the_standard_library():
    """A worker imports it; an HTTP library alone would cost more than the whole round trip."""
    code = "import sys, vram_manager.client; print(*{name.partition('.')[0] for name in sys.modules})"
    command = [sys.executable, "-I", "-c", code]
    modules = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    heavy = {"asyncio", "httpx", "loguru", "pydantic", "starlette", "uvicorn", "sqlite3", "click", "prometheus_client"}
    assert heavy.isdisjoint(modules)
    assert client.__doc__


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        pytest.param(200, {"events": []}, None, id="no error"),
        pytest.param(503, {"status": "stalled"}, None, id="a state, told with 503"),
        pytest.param(
            409, {"error": {"type": "not_now", "message": "cooldown"}}, "cooldown", id="in the daemon's words"
        ),
        pytest.param(500, "Internal Server Error", "HTTP 500: Internal Server Error", id="plain text"),
        pytest.param(404, {}, "HTTP 404: {}", id="JSON of somebody else"),
    ],
)
def test_an_error_is_told_whatever_its_form(status: int, body: object, words: str | None):
    assert client.Reply(status, body).error == words
