"""Asks the daemon, in threads, so that a slow answer keeps no key waiting."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from queue import SimpleQueue
from typing import Any
from urllib.parse import quote

from vram_manager.client import Reply, call
from vram_manager.errors import Unreachable
from vram_manager.top.seen import TRAIL_SECONDS, Heard

# A turn of the daemon takes milliseconds: who is silent for so long is away.
TIMEOUT_SECONDS = 5.0
FIRST_EVENTS = 60
HISTORY_STEP_SECONDS = 5


@dataclass(frozen=True, slots=True)
class Silent:
    """No answer, and why."""

    why: str


@dataclass(frozen=True, slots=True)
class Answered:
    """What the daemon said to a free by hand: the id of its event, or why not."""

    event_id: str | None
    why: str


@dataclass(frozen=True, slots=True)
class Broken:
    """A bug, to be raised where it ends the program."""

    error: BaseException


News = Heard | Silent | Answered | Broken


def look(after: str | None, decisions: int) -> Heard:
    """One round of questions: events newer than `after`, and so many decisions. Raises Unreachable."""
    newer = f"after={quote(after)}&limit=1000" if after else f"limit={FIRST_EVENTS}"
    return Heard(
        # A stalled daemon says so with 503 and all the rest.
        health=_body("/health"),
        snapshot=_body("/v1/snapshot"),
        events=_body(f"/v1/events?{newer}")["events"],
        after=after,
        decisions=_body(f"/v1/decisions?limit={decisions}")["decisions"] if decisions else None,
    )


def history(now: float) -> dict[str, Any]:
    """The last minutes as the daemon remembers them; nothing when it keeps none. `now` in epoch seconds."""
    begin = datetime.fromtimestamp(now - TRAIL_SECONDS, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    try:
        reply = call("GET", f"/v1/history?from={begin}&step={HISTORY_STEP_SECONDS}", timeout_seconds=TIMEOUT_SECONDS)
    except Unreachable:
        return {}
    return reply.body if reply.status == 200 and isinstance(reply.body, dict) else {}


def _body(path: str) -> Any:
    reply = call("GET", path, timeout_seconds=TIMEOUT_SECONDS)
    if reply.error is not None or not isinstance(reply.body, dict):
        raise Unreachable(f"{path}: {reply.error or 'whoever answers there is no vram-manager'}")
    return reply.body


class Watch:
    """Looks every `seconds`; while `paused` only when told to, and only for decisions.

    What is heard is in `news`; `tell` is called whenever there is some. `after` and `decisions` are what the next look
    asks for.
    """

    def __init__(self, tell: Callable[[], None], *, seconds: float, after: str | None) -> None:
        self.news: SimpleQueue[News] = SimpleQueue()
        self.seconds = seconds
        self.paused = False
        self.after = after
        self.decisions = 0
        self._tell = tell
        self._again = threading.Event()

    def start(self) -> None:
        self._in_thread(self._looking)

    def look_now(self) -> None:
        self._again.set()

    def free(self, stage: str) -> None:
        """Asks for a free of ComfyUI; the answer comes as news."""

        def ask() -> None:
            try:
                reply = call("POST", "/v1/free", {"stage": stage}, timeout_seconds=6 * TIMEOUT_SECONDS)
                answer = _answered(reply)
            except Unreachable as error:
                answer = Answered(None, str(error))
            self._put(answer)
            self._again.set()

        self._in_thread(ask)

    def _looking(self) -> None:
        left = 0.0
        while True:
            if not self.paused or self.decisions:
                begun = time.monotonic()
                try:
                    self._put(look(self.after, self.decisions))
                except Unreachable as error:
                    self._put(Silent(str(error)))
                left = self.seconds - (time.monotonic() - begun)
            self._again.wait(None if self.paused else max(0.05, left))
            self._again.clear()

    def _put(self, news: News) -> None:
        self.news.put(news)
        self._tell()

    def _in_thread(self, work: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                work()
            except Exception as error:
                self._put(Broken(error))

        # The program ends when its person says so, whatever is still to be answered.
        threading.Thread(target=guarded, name="vram-top", daemon=True).start()


def _answered(reply: Reply) -> Answered:
    if reply.error is not None:
        return Answered(None, reply.error)
    return Answered(reply.body["event_id"], "")
