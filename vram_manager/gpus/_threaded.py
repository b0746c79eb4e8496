"""Blocking calls into drivers, made from one thread, so that a driver that hangs stalls nothing else."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread
from typing import Final, Protocol

from vram_manager.domain.snapshot import Gpus
from vram_manager.errors import SensorError, TimedOut

HANG_REMEDY: Final = (
    "look for the driver's lines (NVIDIA: Xid) in the host's kernel log; a wedged driver needs a GPU reset or a reboot"
)


class Calls(Protocol):
    """What the thread calls. Only it does."""

    def sweep(self, now: float, *, with_processes: bool) -> Gpus: ...

    def shutdown(self) -> None: ...


@dataclass(frozen=True, slots=True, eq=False)
class _Request:
    """One sweep asked for at `asked_at` (the loop's time)."""

    with_processes: bool
    asked_at: float
    answer: Future[Gpus]


class ThreadedSensor:
    """A GpuSensor over `calls`, whose thread begins with the first read and ends with `close`.

    A call into a driver that hangs cannot be ended from inside the process. The read that met it raises TimedOut
    at its deadline; while the thread stays stuck, later reads raise TimedOut at once and nothing queues up;
    when the call comes back its answer is old and dropped, and the next read works again.
    """

    def __init__(self, name: str, calls: Calls, *, deadline_seconds: float) -> None:
        self._name = name
        self._deadline_seconds = deadline_seconds
        self._calls = calls
        self._requests: SimpleQueue[_Request | None] = SimpleQueue()
        self._under_way: _Request | None = None
        self._overdue: _Request | None = None
        self._thread: Thread | None = None
        self._closed = False

    async def read(self, *, with_processes: bool = False) -> Gpus:
        """Every GPU now; temperature, power and processes only `with_processes`."""
        if self._closed:
            raise SensorError(f"the {self._name} sensor is closed")
        now = asyncio.get_running_loop().time()
        under_way = self._under_way
        if under_way is not None and under_way is self._overdue:
            hanging_seconds = now - under_way.asked_at
            raise TimedOut(f"an {self._name} call has been hanging for {hanging_seconds:.0f} s", HANG_REMEDY)
        request = _Request(with_processes, now, Future())
        self._ask(request)
        try:
            # Not wait_for: before Python 3.12 it loses a cancel that meets the answer, and its task goes on for ever.
            async with asyncio.timeout(self._deadline_seconds):
                return await asyncio.wrap_future(request.answer)
        except TimeoutError:
            # Whatever is on the thread now is what hangs, be it this request or one before it. A request that
            # has not begun is cancelled with the wait for it, and the thread passes over it.
            self._overdue = self._under_way
            raise TimedOut(f"{self._name} did not answer within {self._deadline_seconds:g} s", HANG_REMEDY) from None

    def close(self) -> None:
        """The driver is let go after the call under way; if that call hangs, its shutdown is never reached."""
        self._closed = True
        self._requests.put(None)

    def _ask(self, request: _Request) -> None:
        if self._thread is None:
            # A daemon thread: a stuck one must not keep the process from ending.
            self._thread = Thread(target=self._serve, name=self._name.lower(), daemon=True)
            self._thread.start()
        self._requests.put(request)

    def _serve(self) -> None:
        """Answers one request after the other. A bug travels to the reader too and ends the process there."""
        while (request := self._requests.get()) is not None:
            if not request.answer.set_running_or_notify_cancel():
                continue
            self._under_way = request
            try:
                gpus = self._calls.sweep(request.asked_at, with_processes=request.with_processes)
            except Exception as error:
                self._under_way = None
                request.answer.set_exception(error)
            else:
                self._under_way = None
                request.answer.set_result(gpus)
        self._calls.shutdown()
