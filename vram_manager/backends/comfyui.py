"""ComfyUI: it is polled, it pushes changes of its queue over a websocket, and `/free` asks it to let go."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Final
from urllib.parse import quote
from uuid import uuid4

from vram_manager.backends.comfyui_replies import (
    parse_model_sizes,
    parse_prompt,
    parse_prompts,
    parse_queue,
    parse_status,
    parse_system_stats,
)
from vram_manager.backends.http import HttpStatus, JsonClient, errors_of
from vram_manager.domain.snapshot import ComfyUIState
from vram_manager.errors import Rejected, SensorError

if TYPE_CHECKING:
    from websockets.asyncio.client import ClientConnection

# 10 s: after a free the whole server stands still while gc.collect holds the GIL, 0.3-0.7 s as recorded
# without custom nodes and longer with them. Slow is not down.
_DEADLINE_SECONDS: Final = 10.0
# 20 s: ComfyUI sends no heartbeat, so ours finds a dead peer, within twice this.
_PING_SECONDS: Final = 20.0

# 16 MiB: when a prompt has no client_id its previews and SaveImageWebsocket's full-size pictures go to every
# socket. A larger one costs us a reconnect, which brings the present number anyway.
_MESSAGE_LIMIT_BYTES: Final = 16 * 1024 * 1024


class HttpComfyUI:
    """ComfyUI over HTTP and its websocket."""

    def __init__(
        self, client: JsonClient, *, connect: Callable[..., Awaitable[ClientConnection]] | None = None
    ) -> None:
        self._client = client
        self._connect = connect

    async def stats(self) -> ComfyUIState:
        """What `GET /system_stats` says now. Under XPU `vram_free` does not see other processes."""
        return await self._client.get("/system_stats", parse_system_stats, deadline=_DEADLINE_SECONDS)

    async def queue_remaining(self) -> int:
        """Running + pending prompts; `/queue` is asked where `/prompt` is not to be had."""
        try:
            return await self._client.get("/prompt", parse_prompt, deadline=_DEADLINE_SECONDS)
        except HttpStatus as error:
            if error.status not in (404, 405):
                raise
        return await self._client.get("/queue", parse_queue, deadline=_DEADLINE_SECONDS)

    async def prompts(self) -> tuple[object, ...]:
        """The workflows that `GET /queue` carries, as they are: whoever reads them checks what they hold."""
        return await self._client.get("/queue", parse_prompts, deadline=_DEADLINE_SECONDS)

    async def statuses(self) -> AsyncGenerator[int, None]:
        """Each `queue_remaining` that is pushed, the first on connecting (server.py:websocket_handler).

        `status` goes to every socket. The client id is new for each connection: a second socket with the
        same id takes over the first one's messages, and the end of the first cuts the second off.
        """
        # Here, because the library costs 2 MiB that a daemon without ComfyUI need not have.
        from websockets.asyncio.client import connect  # noqa: PLC0415
        from websockets.exceptions import InvalidStatus, WebSocketException  # noqa: PLC0415

        with errors_of("GET /ws", server=self._client.name, deadline=_DEADLINE_SECONDS):
            address = self._client.address("/ws").copy_with(scheme="wss" if self._client.tls else "ws")
            try:
                socket = await (self._connect or connect)(
                    str(address.copy_merge_params({"clientId": uuid4().hex})),
                    # Named once more, as that keeps the library from following a redirect to another server.
                    host=address.host,
                    port=address.port or (443 if self._client.tls else 80),
                    ssl=self._client.tls,
                    additional_headers=self._client.headers,
                    origin=None,
                    proxy=None,
                    compression=None,  # its windows cost memory, and the messages are 100 bytes
                    open_timeout=_DEADLINE_SECONDS,
                    close_timeout=1,
                    ping_interval=_PING_SECONDS,
                    ping_timeout=_PING_SECONDS,
                    max_size=_MESSAGE_LIMIT_BYTES,
                    max_queue=2,
                )
            except InvalidStatus as error:
                raise HttpStatus(error.response.status_code) from error
            except OSError:
                raise  # a certificate error is a ValueError as well, and errors_of has better words for it
            except (WebSocketException, ValueError) as error:
                raise Rejected(f"no websocket ({error})") from error
            try:
                async with socket:
                    async for message in socket:
                        remaining = parse_status(message)
                        if remaining is not None:
                            yield remaining
            except WebSocketException as error:
                raise SensorError(f"connection lost ({error})") from error
            raise SensorError("connection closed by the server")

    async def model_sizes(self, folder: str) -> Mapping[str, int]:
        """Bytes of each file in `folder`, by its name with subfolders, as loaders name it."""
        path = f"/experiment/models/{quote(folder, safe='')}"
        return await self._client.get(path, parse_model_sizes, deadline=_DEADLINE_SECONDS)

    async def free(self, body: Mapping[str, bool]) -> None:
        """The flags are set (server.py:post_free); main.py:prompt_worker acts on them between prompts."""
        await self._client.post("/free", dict(body), deadline=_DEADLINE_SECONDS)

    async def aclose(self) -> None:
        """No connection is left open; an iterator of `statuses` is closed by whoever iterates it."""
        await self._client.aclose()
