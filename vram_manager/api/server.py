"""Listening: a Unix socket that only its group may use, and TCP when asked."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import stat
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import uvicorn
from starlette.applications import Starlette

from vram_manager.errors import AlreadyRunning, SettingsError

SOCKET_MODE = 0o660


class _Server(uvicorn.Server):
    """Signals belong to the daemon; a server that would take them over could not be stopped in order."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()
        self.stopping = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    async def main_loop(self) -> None:
        # uvicorn's own loop wakes ten times a second to keep a Date header; that was a fifth of our idle cost.
        await self.stopping.wait()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def unix_socket(path: Path) -> socket.socket:
    """A bound socket at `path`, mode 0660. A stale file is replaced; a live daemon is AlreadyRunning."""
    if path.exists() or path.is_symlink():
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise SettingsError(f"VRAM_SOCKET={path}: exists and is no socket; choose another path")
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1.0)
            try:
                probe.connect(str(path))
            except (ConnectionRefusedError, FileNotFoundError):
                path.unlink(missing_ok=True)
            except OSError as error:
                raise AlreadyRunning(f"{path} is taken ({error}): is another vram-manager running?") from error
            else:
                raise AlreadyRunning(f"another vram-manager answers on {path}: only one may act on a GPU")
    listener = socket.socket(socket.AF_UNIX)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        listener.bind(str(path))
        path.chmod(SOCKET_MODE)
        listener.listen(256)
    except OSError as error:
        listener.close()
        raise SettingsError(f"VRAM_SOCKET={path}: cannot be listened on ({error}); choose a writable path") from error
    return listener


def tcp_socket(host: str, port: int) -> socket.socket:
    """A bound TCP socket. Raises SettingsError naming the variables when the address cannot be had."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise SettingsError(f"VRAM_HTTP_HOST={host} VRAM_HTTP_PORT={port}: cannot be listened on ({error})") from error


@contextlib.asynccontextmanager
async def serving(app: Starlette, listener: socket.socket) -> AsyncIterator[None]:
    """`app` answers on `listener` inside the block; afterwards open requests get a second to finish."""
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        http="httptools",
        date_header=False,
        server_header=False,
        timeout_graceful_shutdown=1,
    )
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]), name="serve")
    try:
        await server.listening.wait()
        yield
    finally:
        server.should_exit = True
        server.stopping.set()
        await task
        listener.close()
