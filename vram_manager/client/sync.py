"""The client for code that blocks."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, TypeVar

from vram_manager.client.answers import Admission, LeaseInfo, Limits, ModelsReport
from vram_manager.client.door import Connection, unreachable
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
from vram_manager.client.wire import Reply, request
from vram_manager.errors import Unreachable, VramManagerError

T = TypeVar("T")


class Line(Asking):
    """Sends the questions."""

    def ask(self, question: Question[T]) -> T:
        try:
            return self.value(question, self.reply(question))
        except Unreachable as error:
            return self.without(question, error)

    def reply(self, question: Question[Any]) -> Reply:
        """Raises Unreachable."""
        asked = request(question.method, question.path, question.body)
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = Connection(self.path)
        try:
            reply: Reply = connection.ask(asked, self.timeout_seconds)
        except (OSError, ValueError) as error:
            connection.close()
            raise unreachable(self.path, error) from error
        except BaseException:
            connection.close()
            raise
        self.keep(connection)
        return reply

    def give_back(self, lease_id: str | None) -> None:
        """A daemon that is away ends the lease by itself."""
        if lease_id is not None:
            with contextlib.suppress(VramManagerError):
                self.reply(Question("DELETE", lease_path(lease_id), None, lambda _: None, lambda _: None))


class VramClient(Client[Line]):
    """Asks the daemon before memory is taken.

    >>> client = VramClient()
    >>> if client.check("24GiB"):
    ...     print("there is room now")
    >>> with client.lease("24GiB", wait_seconds=60) as lease:    # raises InsufficientVram
    ...     model = load()

    `path` is the daemon's socket (VRAM_SOCKET), `owner` who asks (program and pid). While the daemon cannot be
    reached everything is admitted, said once per outage with ManagerAwayWarning; with `fail_open=False`
    (VRAM_FAIL_OPEN) that raises Unreachable. A question the daemon cannot use always raises InvalidRequest.
    `timeout_seconds` bounds each answer but that of a waiting lease. At a limit `emergency_cleanup` calls
    `on_pressure`, if the worker has set it, and empties torch's cache.

    A `required` in whole numbers is MiB. Safe to share among threads and after a fork.
    """

    _kind = Line

    def __enter__(self) -> VramClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check(
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
        """Is there room now? Nothing is reserved, nobody is asked to give way.

        >>> VramClient().check(model="llama3.1:8b", context=8192).reason
        '...'

        What is needed is said (`"24GiB"`, `"90%"`, a number of MiB) or estimated, for an Ollama model with so many
        tokens of context or for a ComfyUI workflow in API form.
        """
        wish = self._line.wish(required, model, workflow, context, gpu, margin_mb, priority)
        return self._line.ask(self._line.admission(wish | {"lease": False}))

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
    ) -> Lease:
        """Memory promised to this process until it gives it back, or dies.

        >>> with VramClient().lease("12GiB", priority="batch", wait_seconds=600) as lease:
        ...     model = load()
        ...     lease.claimed()      # all of it is taken

        Asked for on entry: raises InsufficientVram, with the whole answer as `.admission`, when it is refused.
        Without `wait_seconds` it waits only as long as making room takes. The lease is renewed by a thread; should
        that stop, it ends `ttl_seconds` later.
        """
        return Lease(
            self._line,
            self._line.wish(required, model, workflow, context, gpu, margin_mb, priority),
            wait_seconds,
            ttl_seconds,
        )

    def limits(
        self,
        requesting_mb: int | None = None,
        *,
        context: str = "",
        allocated_bytes: int | None = None,
        reserved_bytes: int | None = None,
        gpu: str | int | None = None,
    ) -> Limits:
        """Where the GPU stands, with `requesting_mb` MiB more; `context` names the place in the caller's work.

        >>> VramClient().limits(500, context="upscale").level
        'ok'

        At the hard limit raises MemoryPressureError, before anything is allocated; over the soft one for some time
        warns MemoryPressureWarning. Both clean up first. What torch holds is filled in where torch is in use.
        """
        return self._line.heed(
            self._line.ask(self._line.limits(requesting_mb, context, allocated_bytes, reserved_bytes, gpu))
        )

    def generation(self, slot: int | str | None = None, id: str | None = None) -> Generation:  # noqa: A002 - as in JSON
        """Marks one unit of work, so that what it leaves behind is seen.

        >>> with VramClient().generation(slot=12345) as generation:
        ...     render()
        >>> generation.delta_bytes, generation.leak
        (0, None)
        """
        return Generation(self._line, slot, id)

    def report_models(
        self,
        models: Mapping[str, int],
        buffers: Mapping[str, int] | None = None,
        budgets: Mapping[str, int] | None = None,
        budget_bytes: int | None = None,
    ) -> ModelsReport:
        """Tells what this worker holds, in bytes by name, and whether its `buffers` still fit before it allocates them.

        >>> models, buffers = {"flux": 6_000_000_000}, {"video": 500_000_000}
        >>> VramClient().report_models(models, buffers, budget_bytes=11_800_000_000).fits
        True

        Raises InsufficientVram when the buffers do not fit; warns MemoryPressureWarning for each model over its own
        of `budgets`.
        """
        return self._line.weigh(self._line.ask(self._line.models(models, buffers, budgets, budget_bytes)))

    def require_total(self, size: str | int, gpu: str | int | None = None) -> None:
        """Passes where a GPU (or `gpu`, an index or UUID) has `size` in all, used or not; else InsufficientVram.

        >>> VramClient().require_total("11.8GB")
        """
        self._line.require(size, gpu, self._line.ask(self._line.gpus()))

    def snapshot(self, event: str, slot: int | str | None = None) -> dict[str, Any]:
        """The worker's memory at a point of its work, noted by the daemon and logged for debugging; GB are 10^9.

        >>> VramClient().snapshot("post_generation", slot=12345)["vram_usage_gb"]
        10.95
        """
        return said_snapshot(self._line.ask(self._line.snapshot(event, slot)))

    def worker_status(self) -> dict[str, int | None]:
        """What a queue manager's heartbeat wants, in MiB over all GPUs; None is not known.

        >>> VramClient().worker_status()
        {'gpu_memory_used': 8192, 'gpu_memory_total': 81920}
        """
        return self._line.ask(self._line.status())


class Lease(LeaseState):
    """A lease, to be used with `with`, or with `acquire` and `release`.

    >>> lease = VramClient().lease("12GiB").acquire()
    >>> subprocess.Popen(command, pass_fds=[lease.hold_fd])     # lives as long as one of the two processes
    >>> lease.release()
    """

    _line: Line
    _keeper: _Keeper | None = None

    def __enter__(self) -> Lease:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    @property
    def hold_fd(self) -> int | None:
        """The connection that keeps it alive: while any process has it open the lease lives. None: not open now."""
        return self._keeper.fileno() if self._keeper else None

    def acquire(self) -> Lease:
        """Granted, or not needed because nobody could be asked. Raises InsufficientVram, InvalidRequest."""
        if self._admitted:
            return self
        self._accept(self._asked())
        if self.id is not None:
            try:
                self._keeper = _Keeper(self._line, self.id, self.ttl_seconds / 3, self._renewal, self._news)
                self._keeper.start()
            except BaseException:
                self.release()
                raise
        return self

    def renew(self, pid: int | None = None) -> None:
        """Lives for another `ttl_seconds`; done by itself while it is held.

        `pid` is the process that takes the memory from now on, where it is not this one.
        """
        if self.id is not None:
            self._tell(self._renewal(self.id, pid))

    def claimed(self, bytes: int | None = None) -> None:  # noqa: A002 - as in JSON
        """So much of it, in all, has been taken by now (None: all of it): no more is kept free for it.

        Where this is never called, what torch has reserved since the grant is told with each renewal.
        """
        self._claims_itself = False
        if self.id is not None:
            self._tell(self._line.claim(self.id, bytes))

    def release(self) -> None:
        """Given back; nothing happens the second time, in a forked child, or while the daemon is away."""
        keeper, self._keeper = self._keeper, None
        if keeper is None or self.pid != os.getpid():
            self._ends()
            return
        # First the word, then the connection: a holder that only hangs up has died.
        keeper.over.set()
        try:
            self._line.give_back(self._ends())
        finally:
            keeper.stop()

    def _tell(self, question: Question[Any]) -> None:
        try:
            self._news(question, self._line.reply(question))
        except Unreachable as error:
            self._line.without(question, error)

    def _asked(self) -> Admission:
        attempt = Attempt(self._line, self._wish, self._wait_seconds, self.ttl_seconds)
        try:
            while (reply := self._put(attempt)) is None:
                time.sleep(RETRY_SECONDS)
            return self._line.value(attempt.question(), reply)
        except Unreachable as error:
            return self._line.without(attempt.question(), error)

    def _put(self, attempt: Attempt) -> Reply | None:
        """The answer; None when the daemon hung up and may be back in a moment. Raises Unreachable."""
        connection = Connection(self._line.path)
        asked = attempt.request()
        try:
            return attempt.heard(connection.ask(asked, attempt.timeout_seconds))
        except BaseException as error:
            self._line.give_back(granted_late(connection.withdraw()))
            if attempt.again_after(error):
                return None
            if isinstance(error, OSError | ValueError):
                raise unreachable(self._line.path, error) from error
            raise
        finally:
            connection.close()


class _Keeper(threading.Thread):
    """Keeps one lease alive: renews it, and holds it by an open connection, anew when the daemon was restarted."""

    def __init__(
        self,
        line: Line,
        lease_id: str,
        pause_seconds: float,
        renewal: Callable[[str], Question[LeaseInfo | None]],
        news: Callable[[Question[LeaseInfo | None], Reply], bool],
    ) -> None:
        super().__init__(name=f"vram-lease-{lease_id}", daemon=True)
        self.over = threading.Event()
        self._line = line
        self._lease_id = lease_id
        self._pause_seconds = pause_seconds
        self._renewal = renewal
        self._news = news
        # Only the thread closes, so that `stop` never shuts down a descriptor that is somebody else's by now.
        self._closing = threading.Lock()
        self._hold: Connection | None = None
        self._open_hold()

    def fileno(self) -> int | None:
        hold = self._hold
        return hold.fileno() if hold else None

    def stop(self) -> None:
        """Ends, and its hold with it. Without `start` too."""
        self.over.set()
        with self._closing:
            if self._hold is not None:
                self._hold.shutdown()
        if self.ident is None:
            self._close_hold()

    def run(self) -> None:
        renew_at = time.monotonic() + self._pause_seconds
        while not self.over.is_set():
            hold = self._hold
            if hold is not None:
                self._listen(hold, renew_at)
            if self._hold is None:
                self.over.wait(min(self._pause_seconds, REHOLD_SECONDS))
            if self.over.is_set() or not self._renew():
                break
            renew_at = time.monotonic() + self._pause_seconds
        self._close_hold()

    def _listen(self, hold: Connection, until: float) -> None:
        """Until the time has come, or the hold has ended."""
        try:
            while (left := until - time.monotonic()) > 0:
                if not hold.read(left):
                    break
            else:
                return
        except TimeoutError:
            return
        except (OSError, ValueError):
            pass
        self._close_hold()

    def _renew(self) -> bool:
        """False: it is lost."""
        question = self._renewal(self._lease_id)
        try:
            reply = self._line.reply(question)
            if self.over.is_set() or not self._news(question, reply):
                return False
        except VramManagerError as error:
            if self._line.begins_to_be_away():
                logger.warning("lease %s cannot be renewed: %s", self._lease_id, error)
            return True
        if self._hold is None:
            self._open_hold()
        return True

    def _open_hold(self) -> None:
        """Held from now on, or the next renewal tries again."""
        hold = Connection(self._line.path)
        try:
            status = hold.stream(hold_request(self._lease_id), self._line.timeout_seconds)
            held = status == 200 and hold.read(self._line.timeout_seconds) != b""
        except (OSError, ValueError):
            held = False
        if held:
            self._hold = hold
        if not held or self.over.is_set():
            hold.close()

    def _close_hold(self) -> None:
        with self._closing:
            if self._hold is not None:
                self._hold.close()
                self._hold = None


class Generation(GenerationState):
    """One unit of work, between the two ends of a `with`."""

    _line: Line

    def __enter__(self) -> Generation:
        self._line.ask(self._phase("start"))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self._done(self._line.ask(self._phase("end")))
        except VramManagerError:
            # What went wrong inside is what the caller must hear of.
            if error is None:
                raise
