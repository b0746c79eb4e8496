"""What a lease and a generation are, whoever sends for them."""

from __future__ import annotations

import os
import time
from typing import Any

from vram_manager.client import cuda
from vram_manager.client.answers import Admission, Generated, Leak, LeaseInfo
from vram_manager.client.questions import MAKING_ROOM_SECONDS, Asking, Question, lease_path, logger, random_id
from vram_manager.client.wire import HungUp, Reply, request
from vram_manager.errors import InsufficientVram

# A daemon that is being restarted is asked again this often; a hold is opened again as soon.
RETRY_SECONDS = 0.1
REHOLD_SECONDS = 1.0

# Those of this process that are not over.
_living: set[LeaseState] = set()


class Attempt:
    """One question for a lease, however often it must be put: the same `request_id` each time."""

    def __init__(self, line: Asking, wish: dict[str, Any], wait_seconds: float | None, ttl_seconds: float) -> None:
        self._line = line
        self._wish = wish | {"request_id": random_id(), "ttl_seconds": ttl_seconds, "pid": os.getpid()}
        self._wait_seconds = wait_seconds
        self._began = time.monotonic()
        patience = MAKING_ROOM_SECONDS if wait_seconds is None else wait_seconds + line.timeout_seconds
        self._deadline = self._began + patience
        self._give_up_at: float | None = None

    def question(self) -> Question[Admission]:
        """What to ask now: the time that was waited already is not waited again."""
        wait = self._wait_seconds
        if wait is not None:
            wait = max(0.0, wait - (time.monotonic() - self._began))
        return self._line.admission(self._wish | {"wait_seconds": wait})

    def request(self) -> bytes:
        """The bytes of `question`."""
        question = self.question()
        return request(question.method, question.path, question.body)

    @property
    def timeout_seconds(self) -> float:
        """How long to wait for the answer."""
        return max(RETRY_SECONDS, self._deadline - time.monotonic())

    def heard(self, reply: Reply) -> Reply:
        """The answer, unless it is that of a daemon that stops: the next one will have another. Raises HungUp."""
        if reply.status == 503 and reply.kind == "stopping":
            raise HungUp(begun=False)
        return reply

    def again_after(self, error: BaseException) -> bool:
        """Is it worth asking again? A daemon that hung up may be back in a moment."""
        now = time.monotonic()
        if isinstance(error, HungUp) and self._give_up_at is None:
            self._give_up_at = min(self._deadline, now + self._line.timeout_seconds)
        restarting = isinstance(error, HungUp | ConnectionRefusedError | FileNotFoundError)
        return restarting and self._give_up_at is not None and now < self._give_up_at


class LeaseState:
    """What is known of one lease.

    `id` is None before it is granted, after it was given back, and where nobody could be asked (fail open).
    `admission` is the whole answer, `info` the newest the daemon said about the lease. `lost` says that the daemon
    has ended it: the memory may be promised to others. `pid` is the process it belongs to.
    """

    def __init__(self, line: Asking, wish: dict[str, Any], wait_seconds: float | None, ttl_seconds: float) -> None:
        self.id: str | None = None
        self.admission: Admission | None = None
        self.info: LeaseInfo | None = None
        self.lost = False
        self.ttl_seconds = ttl_seconds
        self._line: Asking = line
        self._wish = wish
        self._wait_seconds = wait_seconds
        self.pid = os.getpid()
        self._reserved_before = 0
        self._claims_itself = True
        self._admitted = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id or 'none'}{' lost' if self.lost else ''}>"

    def _accept(self, admission: Admission) -> None:
        """Raises InsufficientVram for a refusal."""
        self.admission, self.info, self.lost = admission, admission.lease, False
        if not admission.admitted:
            raise InsufficientVram(admission.reason, admission)
        self._admitted = True
        if admission.lease is None:
            return
        self.id = admission.lease.id
        self.pid = os.getpid()
        self._reserved_before = cuda.memory(admission.lease.gpu).reserved_bytes or 0
        self._claims_itself = True
        _living.add(self)

    def _ends(self) -> str | None:
        """It is over for this process; the id to give back, None where it is not ours (any more)."""
        ended, self.id = self.id, None
        self._admitted = False
        _living.discard(self)
        return None if self.lost or self.pid != os.getpid() else ended

    def _news(self, question: Question[LeaseInfo | None], reply: Reply) -> bool:
        """Is it still ours, after a reply about it? Raises Unreachable and InvalidRequest."""
        if reply.status != 404:
            self.info = self._line.value(question, reply)
        elif self.id is not None and not self.lost:
            self.lost = True
            _living.discard(self)
            said = reply.words or "the daemon does not know it"
            logger.warning("lease %s is lost, its memory may be promised to others: %s", self.id, said)
        return not self.lost

    def _renewal(self, lease_id: str, pid: int | None = None) -> Question[LeaseInfo | None]:
        return self._line.renewal(lease_id, self.ttl_seconds, self._claimed_bytes(), pid)

    def _claimed_bytes(self) -> int | None:
        """What torch has taken since the grant; None where it cannot be told, or not apart from another lease's."""
        gpu = self.info.gpu if self.info else None
        here = [one for one in tuple(_living) if one.pid == self.pid and (one.info is None or one.info.gpu == gpu)]
        reserved = cuda.memory(gpu).reserved_bytes
        if reserved is None or not self._claims_itself or len(here) > 1:
            return None
        # Nothing yet may also mean that somebody else than torch allocates here: the daemon's own eyes are better.
        return max(0, reserved - self._reserved_before) or None


class GenerationState:
    """One unit of work. After its end: `delta_bytes` it grew by, `generations` so far, `leak` if they leak."""

    def __init__(self, line: Asking, slot: int | str | None, identity: str | None) -> None:
        self.id = identity or random_id()
        self.slot = slot
        self.delta_bytes: int | None = None
        self.generations = 0
        self.leak: Leak | None = None
        self._line: Asking = line

    def _phase(self, phase: str) -> Question[Generated]:
        return self._line.generation(phase, self.id, self.slot)

    def _done(self, told: Generated) -> None:
        self.delta_bytes, self.generations, self.leak = told.delta_bytes, told.generations, told.leak
        if told.leak is not None:
            logger.warning(
                "memory leak: %.2f GB -> %.2f GB in %d generations",
                told.leak.initial_bytes / 1e9,
                told.leak.current_bytes / 1e9,
                told.leak.generations,
            )


def hold_request(lease_id: str) -> bytes:
    """The question whose answer has no end while the lease lives."""
    return request("GET", f"{lease_path(lease_id)}/hold")


def granted_late(reply: Reply | None) -> str | None:
    """The lease in an answer that nobody waits for any more."""
    body = reply.body if reply is not None else None
    lease = body.get("lease") if isinstance(body, dict) else None
    lease_id = lease.get("id") if isinstance(lease, dict) else None
    return lease_id if isinstance(lease_id, str) else None
