"""Where the daemon listens: a file that only its group may use, one daemon at a time, and clients of every kind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from loguru import logger

from tests.api.conftest import Served
from tests.api.test_errors import MALFORMED
from tests.test_store import nobody
from vram_manager.api import server
from vram_manager.api.server import tcp_socket, unix_socket
from vram_manager.errors import AlreadyRunning, SettingsError

Serve = Callable[..., Any]
FOLLOW = b"GET /v1/events HTTP/1.1\r\nHost: vram\r\nAccept: text/event-stream\r\n\r\n"
HEALTH = b"GET /health HTTP/1.1\r\nHost: vram\r\n\r\n"


def stale(path: Path) -> None:
    """A socket file as a daemon that was killed leaves it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(path))


# The file.


def test_the_socket_is_for_its_user_and_group_only(tmp_path: Path):
    before = os.umask(0)
    try:
        with unix_socket(tmp_path / "run" / "vram.sock"):
            mode = (tmp_path / "run" / "vram.sock").lstat().st_mode
    finally:
        os.umask(before)
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o660


def test_a_stale_socket_file_is_replaced(tmp_path: Path):
    path = tmp_path / "vram.sock"
    stale(path)
    with unix_socket(path), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


@pytest.mark.parametrize("what", ["a file", "a directory", "a link to a socket", "a link to nothing"])
def test_what_is_no_socket_is_left_alone_with_a_clear_error(tmp_path: Path, what: str):
    path = tmp_path / "vram.sock"
    if what == "a file":
        path.write_text("precious")
    elif what == "a directory":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "other")
        if what == "a link to a socket":
            stale(tmp_path / "other")
    before = path.lstat()
    with pytest.raises(SettingsError, match=f"^VRAM_SOCKET={path}: exists and is no socket; choose another path$"):
        unix_socket(path)
    assert path.lstat() == before


def test_a_socket_on_which_somebody_answers_is_never_taken_over(tmp_path: Path):
    path = tmp_path / "vram.sock"
    with unix_socket(path) as first:
        with pytest.raises(AlreadyRunning, match=f"another vram-manager answers on {path}"):
            unix_socket(path)
        assert path.exists()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            first.accept()[0].close()


def test_a_daemon_that_is_too_busy_to_accept_is_still_another_daemon(tmp_path: Path):
    path = tmp_path / "vram.sock"
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(path))
        listener.listen(0)
        for _ in range(3):
            waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
            waiting.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                waiting.connect(str(path))
        with pytest.raises(AlreadyRunning):
            unix_socket(path)
        assert path.exists()


def test_of_two_daemons_that_start_at_once_over_a_stale_file_one_wins(tmp_path: Path):
    for number in range(30):
        path = tmp_path / f"{number}.sock"
        stale(path)
        won: list[socket.socket] = []
        refused: list[Exception] = []
        together = threading.Barrier(4)

        def start(path: Path = path, together: threading.Barrier = together) -> None:
            together.wait()
            try:
                won.append(unix_socket(path))  # noqa: B023
            except AlreadyRunning as error:
                refused.append(error)  # noqa: B023

        starting = [threading.Thread(target=start) for _ in range(4)]
        for thread in starting:
            thread.start()
        for thread in starting:
            thread.join()
        for listener in won:
            listener.close()
        assert (len(won), len(refused)) == (1, 3), f"in round {number}"


@pytest.mark.parametrize(
    "path",
    ["/proc/vram/vram.sock", "/dev/null/vram.sock", f"/tmp/{'x' * 120}.sock", f"/tmp/{'x' * 300}.sock"],
    ids=[
        "no directory can be made",
        "a file is in the way",
        "longer than a socket's name may be",
        "no file name at all",
    ],
)
def test_a_path_that_cannot_be_had_is_a_wrong_setting(path: str):
    with pytest.raises(SettingsError, match=f"^VRAM_SOCKET={path}: cannot be listened on "):
        unix_socket(Path(path))


@pytest.fixture
def foreign() -> Iterator[Path]:
    """A directory that is root's alone, below one that everybody may enter."""
    with tempfile.TemporaryDirectory() as name:
        outer = Path(name)
        outer.chmod(0o755)
        (outer / "mine").mkdir(mode=0o700)
        if os.geteuid() != 0:
            (outer / "mine").chmod(0o000)
        yield outer / "mine"
        (outer / "mine").chmod(0o700)


def test_a_directory_that_may_not_be_entered_is_a_wrong_setting_and_no_crash(foreign: Path):
    with nobody(), pytest.raises(SettingsError, match=r"VRAM_SOCKET=.*ermission denied"):
        unix_socket(foreign / "vram.sock")


@pytest.mark.parametrize(("host", "port"), [("192.0.2.1", 8000), ("no..host", 8000)])
def test_an_address_that_cannot_be_had_is_a_wrong_setting(host: str, port: int):
    with pytest.raises(SettingsError, match=f"^VRAM_HTTP_HOST={host} VRAM_HTTP_PORT={port}: cannot be listened on "):
        tcp_socket(host, port)


def test_a_port_that_is_taken_is_a_wrong_setting(free_port: int):
    with tcp_socket("127.0.0.1", free_port), pytest.raises(SettingsError, match="VRAM_HTTP_PORT"):
        tcp_socket("127.0.0.1", free_port)


@pytest.mark.asyncio
async def test_the_socket_file_is_there_while_the_daemon_listens_and_gone_after(serve: Serve):
    async with serve() as served:
        assert stat.S_IMODE(served.path.lstat().st_mode) == 0o660
        path = served.path
    assert not path.exists()


@pytest.mark.asyncio
async def test_a_second_daemon_is_refused_and_the_first_goes_on(serve: Serve):
    async with serve() as first:
        with pytest.raises(AlreadyRunning):
            async with serve():
                pass
        assert (await first.http.get("/health")).status_code == 200


@pytest.mark.asyncio
async def test_a_port_that_is_taken_leaves_no_socket_file_behind(serve: Serve, free_port: int, tmp_path: Path):
    with tcp_socket("127.0.0.1", free_port), pytest.raises(SettingsError):
        async with serve(VRAM_HTTP_PORT=str(free_port)):
            pass
    assert not (tmp_path / "run" / "vram.sock").exists()


# The clients.


@pytest.mark.asyncio
async def test_malformed_requests_are_no_line_in_the_log(served: Served, capfd: pytest.CaptureFixture[str]):
    lines: list[str] = []
    sink = logger.add(lines.append, level="INFO")
    for sent in MALFORMED:
        await served.raw(sent)
    logger.remove(sink)
    assert lines == []
    said = capfd.readouterr().err.splitlines()
    assert [line for line in said if "Invalid HTTP" in line and "| DEBUG " not in line] == []


@pytest.mark.asyncio
async def test_connections_that_never_finish_their_head_stop_neither_others_nor_the_end(serve: Serve):
    async with contextlib.AsyncExitStack() as stack:

        async def half(sent: bytes) -> asyncio.StreamReader:
            reader, writer = await served.connect(sent)

            async def close() -> None:
                writer.close()
                with contextlib.suppress(ConnectionError):
                    await writer.wait_closed()

            stack.push_async_callback(close)
            return reader

        async with serve() as served:
            readers = [await half(sent) for sent in (b"", b"GET", HEALTH[:-2]) for _ in range(60)]
            readers.append(await half(b"POST /v1/free HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{"))
            replies = await asyncio.gather(*(served.http.get("/health") for _ in range(20)))
            assert {reply.status_code for reply in replies} == {200}
        assert not served.path.exists()
        for reader in readers[:-1]:
            with contextlib.suppress(ConnectionError):
                assert await asyncio.wait_for(reader.read(), 20) == b""


@pytest.mark.asyncio
async def test_a_connection_that_never_finishes_its_head_is_hung_up_on(served: Served):
    loop = asyncio.get_running_loop()
    time = loop.time
    reader, writer = await served.connect(HEALTH[:-2])
    quick, kept = await served.connect(HEALTH)
    await quick.readuntil(b"\r\n\r\n")
    loop.time = lambda: time() + server.HEAD_SECONDS + 1  # type: ignore[method-assign]
    assert await asyncio.wait_for(reader.read(), 20) == b""
    for open_one in (writer, kept):
        open_one.close()
        await open_one.wait_closed()


@pytest.mark.asyncio
async def test_a_stream_outlives_the_time_that_a_head_may_take(served: Served):
    loop = asyncio.get_running_loop()
    time = loop.time
    reader, writer = await served.connect(FOLLOW)
    await reader.readuntil(b"\r\n\r\n")
    loop.time = lambda: time() + 10 * server.HEAD_SECONDS  # type: ignore[method-assign]
    await served.http.get("/ready")
    (event,) = served.record()
    assert await asyncio.wait_for(reader.readuntil(f"id: {event}\n".encode()), 20)
    writer.close()
    await writer.wait_closed()


@pytest.mark.asyncio
async def test_a_head_without_end_is_cut_off(served: Served):
    reader, writer = await served.connect(b"GET /health HTTP/1.1\r\n")
    sent = 0
    with contextlib.suppress(ConnectionError):
        while sent < 50 * 2**20:
            writer.write(b"X-More: " + b"y" * 65_000 + b"\r\n")
            await writer.drain()
            sent += 65_010
            if reader.at_eof():
                break
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
    assert sent < 10 * 2**20
    assert (await served.http.get("/health")).status_code == 200


@pytest.mark.asyncio
async def test_a_large_body_is_no_large_head(served: Served):
    body = b" " * (2**20 - 2) + b"{}"
    head = b"POST /v1/free HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    assert (await served.raw(head + body)).startswith(b"HTTP/1.1 202")


@pytest.mark.asyncio
async def test_several_requests_on_one_connection_are_answered_in_order(served: Served):
    last = b"GET /nowhere HTTP/1.1\r\nHost: vram\r\nConnection: close\r\n\r\n"
    came = await served.raw(HEALTH + HEALTH + last)
    assert [part[:3] for part in came.split(b"HTTP/1.1 ")[1:]] == [b"200", b"200", b"404"]


@pytest.mark.asyncio
async def test_a_client_that_leaves_in_the_middle_hurts_nobody(served: Served):
    for sent in (HEALTH, b"POST /v1/free HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{"):
        _, writer = await served.connect(sent)
        writer.transport.abort()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
    assert (await served.http.get("/health")).status_code == 200


@pytest.mark.asyncio
async def test_many_clients_at_once_are_all_answered(served: Served):
    replies = await asyncio.gather(
        *(served.raw(HEALTH.replace(b"Host", b"Connection: close\r\nHost")) for _ in range(200))
    )
    assert all(reply.startswith(b"HTTP/1.1 200") for reply in replies)


@pytest.mark.asyncio
async def test_a_connection_that_never_finishes_its_body_is_hung_up_on(served: Served):
    loop = asyncio.get_running_loop()
    time = loop.time
    reader, writer = await served.connect(b"POST /v1/free HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{")
    await served.http.get("/ready")
    loop.time = lambda: time() + server.BODY_SECONDS + 1  # type: ignore[method-assign]
    with contextlib.suppress(ConnectionError):
        assert b"200 OK" not in await asyncio.wait_for(reader.read(), 20)
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
