"""The client for code that runs on an event loop. Imported when it is first asked for: asyncio takes its time."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from types import TracebackType
from typing import Any, TypeVar

from vram_manager.client.answers import Admission, LeaseInfo, Limits, ModelsReport
from vram_manager.client.door import BACKLOG_SECONDS, RECEIVE_BYTES, WITHDRAW_SECONDS, new_socket, unreachable
from vram_manager.client.held import (
    REHOLD_SECONDS,
    RETRY_SECONDS,
    Attempt,
    GenerationState,
    LeaseState,
    granted_late,
    hold_request,
)
from vram_manager.client.questions import Asking, Client, Priority, Question, lease_path, logger, said_snapshot
from vram_manager.client.wire import Answer, HungUp, Reply, request
from vram_manager.errors import Unreachable, VramManagerError

T = TypeVar("T")


class AsyncConnection:
    """`door.Connection` on the running loop. An idle one belongs to no loop."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._socket: socket.socket | None = None
        self._answer = Answer()

    @property
    def open(self) -> bool:
        return self._socket is not None

    def fileno(self) -> int | None:
        number = -1 if self._socket is None else self._socket.fileno()
        return None if number < 0 else number

    async def ask(self, asked: bytes, timeout_seconds: float) -> Reply:
        async with _within(timeout_seconds):
            await self._put(asked, whole=True)
        if not self._answer.keeps_alive:
            self.close()
        return self._answer.reply()

    async def stream(self, asked: bytes, timeout_seconds: float) -> int:
        async with _within(timeout_seconds):
            await self._put(asked, whole=False)
        return self._answer.status

    async def read(self, timeout_seconds: float) -> bytes:
        async with _within(timeout_seconds):
            while not (taken := self._answer.take()) and not self._answer.done:
                await self._receive()
        return taken

    async def withdraw(self) -> Reply | None:
        try:
            if self._socket is None or self._answer.done:
                return None
            self._socket.shutdown(socket.SHUT_WR)
            async with _within(WITHDRAW_SECONDS):
                while not self._answer.done:
                    await self._receive()
            return self._answer.reply()
        except (OSError, ValueError):
            return None
        finally:
            self.close()

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    async def _put(self, asked: bytes, *, whole: bool) -> None:
        if self._socket is not None and self._socket.fileno() >= 0:
            try:
                await self._round(self._socket, asked, whole)
                return
            except HungUp as stale:
                self.close()
                if stale.begun:
                    raise
        self._socket = await _connected(self._path)
        await self._round(self._socket, asked, whole)

    async def _round(self, on: socket.socket, asked: bytes, whole: bool) -> None:
        answer = self._answer = Answer()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            await asyncio.get_running_loop().sock_sendall(on, asked)
        while not (answer.done if whole else answer.status):
            await self._receive()

    async def _receive(self) -> None:
        assert self._socket is not None
        try:
            received = await asyncio.get_running_loop().sock_recv(self._socket, RECEIVE_BYTES)
        except ConnectionResetError:
            received = b""
        self._answer.feed(received)


class AsyncLine(Asking):
    """Sends the questions."""

    async def ask(self, question: Question[T]) -> T:
        try:
            return self.value(question, await self.reply(question))
        except Unreachable as error:
            return self.without(question, error)

    async def reply(self, question: Question[Any]) -> Reply:
        """Raises Unreachable."""
        asked = request(question.method, question.path, question.body)
        connection: AsyncConnection = self._idle.pop() if self._idle else AsyncConnection(self.path)
        try:
            reply = await connection.ask(asked, self.timeout_seconds)
        except (OSError, ValueError) as error:
            connection.close()
            raise unreachable(self.path, error) from error
        except BaseException:
            connection.close()
            raise
        self.keep(connection)
        return reply

    async def give_back(self, lease_id: str | None) -> None:
        if lease_id is not None:
            with contextlib.suppress(VramManagerError):
                await self.reply(Question("DELETE", lease_path(lease_id), None, lambda _: None, lambda _: None))


class AsyncVramClient(Client[AsyncLine]):
    """`VramClient` for an event loop: the same questions, awaited.

    >>> async with AsyncVramClient() as client:
    ...     if await client.check("24GiB"):
    ...         print("there is room now")
    ...     async with client.lease("24GiB", wait_seconds=60) as lease:
    ...         await render()

    A task that is cancelled while it waits for a lease leaves the line; a lease granted in that very moment is
    given back.
    """

    _kind = AsyncLine

    async def __aenter__(self) -> AsyncVramClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    async def check(
        self,
        required: str | int | None = None,
        *,
        model: str | None = None,
        workflow: Mapping[str, Any] | None = None,
        context: int | None = None,
        gpu: str | int | None = None,
        margin_mb: int | None = None,
        priority: Priority | None = None,
    ) -> Admission:
        """See `VramClient.check`."""
        wish = self._line.wish(required, model, workflow, context, gpu, margin_mb, priority)
        return await self._line.ask(self._line.admission(wish | {"lease": False}))

    def lease(
        self,
        required: str | int | None = None,
        *,
        model: str | None = None,
        workflow: Mapping[str, Any] | None = None,
        context: int | None = None,
        gpu: str | int | None = None,
        margin_mb: int | None = None,
        priority: Priority | None = None,
        wait_seconds: float | None = None,
        ttl_seconds: float = 60.0,
    ) -> AsyncLease:
        """See `VramClient.lease`; for `async with`, or `await client.lease(...).acquire()`."""
        return AsyncLease(
            self._line,
            self._line.wish(required, model, workflow, context, gpu, margin_mb, priority),
            wait_seconds,
            ttl_seconds,
        )

    async def limits(
        self,
        requesting_mb: int | None = None,
        *,
        context: str = "",
        allocated_bytes: int | None = None,
        reserved_bytes: int | None = None,
        gpu: str | int | None = None,
    ) -> Limits:
        """See `VramClient.limits`."""
        return self._line.heed(
            await self._line.ask(self._line.limits(requesting_mb, context, allocated_bytes, reserved_bytes, gpu))
        )

    def generation(self, slot: int | str | None = None, id: str | None = None) -> AsyncGeneration:  # noqa: A002
        """See `VramClient.generation`; for `async with`."""
        return AsyncGeneration(self._line, slot, id)

    async def report_models(
        self,
        models: Mapping[str, int],
        buffers: Mapping[str, int] | None = None,
        budgets: Mapping[str, int] | None = None,
        budget_bytes: int | None = None,
    ) -> ModelsReport:
        """See `VramClient.report_models`."""
        return self._line.weigh(await self._line.ask(self._line.models(models, buffers, budgets, budget_bytes)))

    async def require_total(self, size: str | int, gpu: str | int | None = None) -> None:
        """See `VramClient.require_total`."""
        self._line.require(size, gpu, await self._line.ask(self._line.gpus()))

    async def snapshot(self, event: str, slot: int | str | None = None) -> dict[str, Any]:
        """See `VramClient.snapshot`."""
        return said_snapshot(await self._line.ask(self._line.snapshot(event, slot)))

    async def worker_status(self) -> dict[str, int | None]:
        """See `VramClient.worker_status`."""
        return await self._line.ask(self._line.status())


class AsyncLease(LeaseState):
    """A lease, to be used with `async with`, or with `acquire` and `release`; otherwise as `Lease`."""

    _line: AsyncLine
    _keeper: _Keeper | None = None

    async def __aenter__(self) -> AsyncLease:
        return await self.acquire()

    async def __aexit__(self, *_: object) -> None:
        await self.release()

    @property
    def hold_fd(self) -> int | None:
        """See `Lease.hold_fd`."""
        return self._keeper.fileno() if self._keeper else None

    async def acquire(self) -> AsyncLease:
        """See `Lease.acquire`."""
        if self._admitted:
            return self
        self._accept(await self._asked())
        if self.id is not None:
            self._keeper = _Keeper(self._line, self.id, self.ttl_seconds / 3, self._renewal, self._news)
            try:
                await self._keeper.start()
            except BaseException:
                await self.release()
                raise
        return self

    async def renew(self, pid: int | None = None) -> None:
        """See `Lease.renew`."""
        if self.id is not None:
            await self._tell(self._renewal(self.id, pid))

    async def claimed(self, bytes: int | None = None) -> None:  # noqa: A002 - as in JSON
        """See `Lease.claimed`."""
        self._claims_itself = False
        if self.id is not None:
            await self._tell(self._line.claim(self.id, bytes))

    async def release(self) -> None:
        """See `Lease.release`."""
        keeper, self._keeper = self._keeper, None
        if keeper is None or self.pid != os.getpid():
            self._ends()
            return
        try:
            await keeper.rest()
            await self._line.give_back(self._ends())
        finally:
            keeper.close()

    async def _tell(self, question: Question[Any]) -> None:
        try:
            self._news(question, await self._line.reply(question))
        except Unreachable as error:
            self._line.without(question, error)

    async def _asked(self) -> Admission:
        attempt = Attempt(self._line, self._wish, self._wait_seconds, self.ttl_seconds)
        try:
            while (reply := await self._put(attempt)) is None:  # noqa: ASYNC110 - the daemon cannot wake us
                await asyncio.sleep(RETRY_SECONDS)
            return self._line.value(attempt.question(), reply)
        except Unreachable as error:
            return self._line.without(attempt.question(), error)

    async def _put(self, attempt: Attempt) -> Reply | None:
        """The answer; None when the daemon hung up and may be back in a moment. Raises Unreachable."""
        connection = AsyncConnection(self._line.path)
        asked = attempt.request()
        try:
            return attempt.heard(await connection.ask(asked, attempt.timeout_seconds))
        except BaseException as error:
            await self._line.give_back(granted_late(await connection.withdraw()))
            if attempt.again_after(error):
                return None
            if isinstance(error, OSError | ValueError):
                raise unreachable(self._line.path, error) from error
            raise
        finally:
            connection.close()


class _Keeper:
    """Keeps one lease alive: renews it, and holds it by an open connection, anew when the daemon was restarted."""

    def __init__(
        self,
        line: AsyncLine,
        lease_id: str,
        pause_seconds: float,
        renewal: Callable[[str], Question[LeaseInfo | None]],
        news: Callable[[Question[LeaseInfo | None], Reply], bool],
    ) -> None:
        self._line = line
        self._lease_id = lease_id
        self._pause_seconds = pause_seconds
        self._renewal = renewal
        self._news = news
        self._hold: AsyncConnection | None = None
        self._task: asyncio.Task[None] | None = None

    def fileno(self) -> int | None:
        return self._hold.fileno() if self._hold else None

    async def start(self) -> None:
        await self._open_hold()
        self._task = asyncio.create_task(self._run(), name=f"vram-lease-{self._lease_id}")

    async def rest(self) -> None:
        """No more renewals; the hold stays."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def close(self) -> None:
        """It ends, and its hold with it."""
        if self._task is not None:
            self._task.cancel()
        self._drop_hold()

    def _drop_hold(self) -> None:
        if self._hold is not None:
            self._hold.close()
            self._hold = None

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        renew_at = loop.time() + self._pause_seconds
        while True:
            if self._hold is not None:
                await self._listen(self._hold, renew_at)
            if self._hold is None:
                await asyncio.sleep(min(self._pause_seconds, REHOLD_SECONDS))
            if not await self._renew():
                break
            renew_at = loop.time() + self._pause_seconds
        self._drop_hold()

    async def _listen(self, hold: AsyncConnection, until: float) -> None:
        """Until the time has come, or the hold has ended."""
        loop = asyncio.get_running_loop()
        try:
            while (left := until - loop.time()) > 0:
                if not await hold.read(left):
                    break
            else:
                return
        except TimeoutError:
            return
        except (OSError, ValueError):
            pass
        self._drop_hold()

    async def _renew(self) -> bool:
        """False: it is lost."""
        question = self._renewal(self._lease_id)
        try:
            if not self._news(question, await self._line.reply(question)):
                return False
        except VramManagerError as error:
            if self._line.begins_to_be_away():
                logger.warning("lease %s cannot be renewed: %s", self._lease_id, error)
            return True
        if self._hold is None:
            await self._open_hold()
        return True

    async def _open_hold(self) -> None:
        """Held from now on, or the next renewal tries again."""
        hold = AsyncConnection(self._line.path)
        try:
            status = await hold.stream(hold_request(self._lease_id), self._line.timeout_seconds)
            if status == 200 and await hold.read(self._line.timeout_seconds):
                self._hold = hold
        except (OSError, ValueError):
            pass
        finally:
            if self._hold is not hold:
                hold.close()


class AsyncGeneration(GenerationState):
    """One unit of work, between the two ends of an `async with`."""

    _line: AsyncLine

    async def __aenter__(self) -> AsyncGeneration:
        await self._line.ask(self._phase("start"))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        try:
            self._done(await self._line.ask(self._phase("end")))
        except VramManagerError:
            if error is None:
                raise


async def _connected(path: str) -> socket.socket:
    connecting = new_socket()
    try:
        connecting.setblocking(False)
        while True:
            try:
                await asyncio.get_running_loop().sock_connect(connecting, path)
                return connecting
            except BlockingIOError:
                await asyncio.sleep(BACKLOG_SECONDS)
    except BaseException:
        connecting.close()
        raise


@contextlib.asynccontextmanager
async def _within(seconds: float) -> AsyncIterator[None]:
    """The block, or TimeoutError with words."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise TimeoutError("timed out") from error
