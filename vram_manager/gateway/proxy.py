"""A plain streaming reverse proxy for HTTP/1.1, with a gate that may hold requests. It knows nothing of models.

One upstream connection for each client connection, opened with its first request: a tunnel with eyes. There is no
pool, so a connection that is closed in the moment it is used is the same race as without us.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable

from vram_manager.errors import SettingsError
from vram_manager.gateway.client_side import ClientSide
from vram_manager.gateway.exchange import Common, Gate, Held
from vram_manager.gateway.head import Address, Head, Passage, Reply, refusal

__all__ = ["Gate", "Head", "Held", "Passage", "PlainGate", "Proxy", "Reply"]

# asyncio tries so many accepts in a row, and says so for each, when no descriptor is left.
BACKLOG = 256
# So many may wait to be accepted (the kernel allows net.core.somaxconn, 4096): whoever finds no place there asks again
# a second later.
QUEUE = 4096
# After the grace: how long a gate may take to notice that it was cancelled.
_CANCELLED_SECONDS = 1.0


class PlainGate:
    """Looks at nothing."""

    def watch(self, head: Head) -> None:
        """All pass."""

    def unreachable(self, head: Head, why: str) -> Reply:
        """With the reason, as JSON."""
        return refusal(502, why)


class Proxy:
    """`upstream` is a URL, its path goes before each target. `rewrite_host`: see `head.Address.host_for`."""

    def __init__(self, upstream: str, gate: Gate, *, rewrite_host: bool) -> None:
        self._common = Common(Address.of(upstream), gate)
        self._rewrite_host = rewrite_host
        self._server: asyncio.Server | None = None
        self._address = ("", 0)

    async def listen(self, host: str, port: int) -> None:
        """From here on clients are served. Raises SettingsError naming the address when it cannot be had."""
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
        except (OSError, UnicodeError) as error:
            raise SettingsError(f"{host}:{port} cannot be listened on ({error})") from error
        self._address = listener.getsockname()[:2]
        common = self._common
        common.host = common.address.host_for(self._address[0], rewrite=self._rewrite_host)
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: ClientSide(common), sock=listener, backlog=BACKLOG)
        listener.listen(QUEUE)

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens, with the port that was really had."""
        return self._address

    @property
    def open_exchanges(self) -> int:
        """Requests that were begun and are not over, tunnels included."""
        return self._common.open_exchanges

    async def close(self, grace_seconds: float) -> None:
        """No new connection; open exchanges get `grace_seconds` to end, then they are cut off."""
        common = self._common
        common.closing = True
        if self._server is not None:
            self._server.close()
        self._each(ClientSide.drain)
        common.alone.clear()
        if common.connections:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_seconds):
                    await common.alone.wait()
        self._each(ClientSide.abort)
        if common.connections:
            await common.alone.wait()
        if common.tasks:
            await asyncio.wait(common.tasks, timeout=_CANCELLED_SECONDS)

    def _each(self, do: Callable[[ClientSide], None]) -> None:
        for connection in list(self._common.connections):
            if isinstance(connection, ClientSide):
                do(connection)
