"""Tells chosen events to a URL of the user's: one POST for each, in order, again for a while when it fails.

    {"id": "leak-0412", "at": ..., "type": "leak", and so on as in /v1/events, "text": ..., "content": ...}

`text` is the log line, which Slack and Mattermost show; `content` is the same for Discord. The receiver may get an
event twice, when its answer was lost, and knows it by X-Vram-Manager-Delivery. URLs of webhooks are secrets: only
scheme and host are ever told.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import ssl
from collections import deque
from collections.abc import Callable, Collection
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final, Literal, TypeAlias

import httpx
from loguru import logger
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    stop_after_attempt,
    wait_exponential,
    wait_random,
)

from vram_manager import __version__
from vram_manager.backends.http import HttpStatus, errors_of
from vram_manager.clock import Clock
from vram_manager.errors import SensorError
from vram_manager.journal import Entry, as_json, line

Outcome: TypeAlias = Literal["delivered", "failed", "dropped"]

QUEUE_EVENTS: Final = 256
DEADLINE_SECONDS: Final = 10.0
# Five tries of 10 s and four pauses of 60 s at most stay under five minutes; the usual pauses are 5, 15, 45, 55 s
# and up to 5 s more each: a receiver that is started anew is back by then.
TRIES: Final = 5
LONGEST_PAUSE_SECONDS: Final = 60.0
STOP_SECONDS: Final = 2.0
# What Discord takes; Slack and Mattermost take more.
TEXT_CHARACTERS: Final = 2000
_PAUSE: Final = wait_exponential(multiplier=5, exp_base=3, max=LONGEST_PAUSE_SECONDS - 5) + wait_random(0, 5)
_LATER: Final = frozenset({408, 425, 429})


class _Refused(HttpStatus):
    """The receiver said no; `after_seconds` is how long it wants to be left alone, None where it does not say."""

    def __init__(self, status: int, after_seconds: float | None) -> None:
        remedy = None
        if 300 <= status < 400:
            remedy = "set VRAM_WEBHOOK_URL to where it redirects: redirects are not followed"
        super().__init__(status, remedy=remedy)
        self.after_seconds = after_seconds


class Webhook:
    """Sends what `listen` was given while `run` runs.

    `events` are the types that are told, `secret` the key of the signature. `on_outcome` is called once for each event
    that left the queue: delivered; failed, when it was given up; dropped, when it was never tried to the end.
    """

    def __init__(
        self,
        clock: Clock,
        url: str,
        events: Collection[str],
        secret: str | None = None,
        *,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._clock = clock
        self._url = httpx.URL(url)
        self._events = frozenset(events)
        self._key = secret.encode() if secret else None
        self.on_outcome: Callable[[Outcome], None] = lambda outcome: None
        self._queue: deque[Entry] = deque()
        self._more = asyncio.Event()
        self._name = f"The webhook at {self._url.scheme}://{self._url.netloc.decode()}"
        self._failed = 0
        self._too_slow = False
        self._closed = False
        secure = self._url.scheme == "https"
        self._http = httpx.AsyncClient(
            # Loading the CA certificates costs megabytes; an empty context trusts nobody and costs nothing.
            verify=httpx.create_ssl_context() if secure else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
            follow_redirects=False,
            trust_env=False,
            timeout=None,  # one deadline over the whole call instead
            limits=httpx.Limits(max_keepalive_connections=0),  # events are rare: a kept connection would be stale
            transport=transport,
        )

    def listen(self, entry: Entry) -> None:
        """Queues an event of a chosen type. Immediate; when 256 wait, the oldest makes room."""
        if entry.event.type not in self._events or self._closed:
            return
        if len(self._queue) >= QUEUE_EVENTS:
            self._queue.popleft()
            self.on_outcome("dropped")
            if not self._too_slow:
                logger.warning(
                    "{} does not keep up: of more than {} events the oldest are dropped", self._name, QUEUE_EVENTS
                )
            self._too_slow = True
        self._queue.append(entry)
        self._more.set()

    async def run(self) -> None:
        """Sends until cancelled; an event that was under way then is the first in the queue again."""
        while True:
            while self._queue:
                entry = self._queue.popleft()
                try:
                    await self._deliver(entry, tries=TRIES)
                except asyncio.CancelledError:
                    self._queue.appendleft(entry)
                    raise
            self._too_slow = False
            self._more.clear()
            await self._more.wait()

    async def aclose(self) -> None:
        """What is queued gets one try each and two seconds in all; the rest is lost, and that is said."""
        self._closed = True
        with suppress(TimeoutError):
            async with asyncio.timeout(STOP_SECONDS):
                while self._queue:
                    await self._deliver(self._queue[0], tries=1)
                    self._queue.popleft()
        if self._queue:
            logger.warning("{} was not told {} events: there was no time left", self._name, len(self._queue))
        for _ in self._queue:
            self.on_outcome("dropped")
        self._queue.clear()
        await self._http.aclose()

    async def _deliver(self, entry: Entry, *, tries: int) -> None:
        again = AsyncRetrying(
            stop=stop_after_attempt(tries),
            wait=_pause,
            retry=retry_if_exception(_may_pass),
            sleep=asyncio.sleep,
            reraise=True,
        )
        try:
            await again(self._post, entry)
        except SensorError as error:
            self._tell_failure(error)
            self.on_outcome("failed")
        else:
            if self._failed:
                logger.info("{} can be told again, after {} events that it was not told", self._name, self._failed)
            self._failed = 0
            self.on_outcome("delivered")

    def _tell_failure(self, error: SensorError) -> None:
        """Once for all that fail in a row."""
        if not self._failed:
            remedy = f"; {error.remedy}" if isinstance(error, _Refused) and error.remedy else ""
            logger.warning("{} cannot be told: {}{}", self._name, error.why, remedy)
        self._failed += 1

    async def _post(self, entry: Entry) -> None:
        body = json.dumps(_message(entry), separators=(",", ":")).encode()
        headers = self._headers(entry, body)
        with errors_of("POST", server="the receiver", deadline=DEADLINE_SECONDS):
            async with (
                asyncio.timeout(DEADLINE_SECONDS),
                self._http.stream("POST", self._url, content=body, headers=headers) as reply,
            ):
                # What else it says is not read.
                if not reply.is_success:
                    raise _Refused(reply.status_code, _retry_after(reply.headers, self._clock.utcnow()))

    def _headers(self, entry: Entry, body: bytes) -> dict[str, str]:
        stamp = str(int(self._clock.utcnow().timestamp()))
        headers = {
            "Content-Type": "application/json",
            "User-Agent": f"vram-manager/{__version__}",
            "X-Vram-Manager-Event": str(entry.event.type),
            # The id alone would come again where no history is kept over a restart.
            "X-Vram-Manager-Delivery": f"{entry.id}.{int(entry.at.timestamp() * 1000)}",
            "X-Vram-Manager-Timestamp": stamp,
        }
        if self._key is not None:
            digest = hmac.new(self._key, stamp.encode() + b"." + body, hashlib.sha256).hexdigest()
            headers["X-Vram-Manager-Signature"] = f"sha256={digest}"
        return headers


def _message(entry: Entry) -> dict[str, object]:
    _, words = line(entry)
    # A model or a worker may be called "@everyone", or "<!channel>": nobody is called to by a name.
    shown = words[:TEXT_CHARACTERS].replace("@", "@\u200b").replace("<", "<\u200b")[:TEXT_CHARACTERS]
    return {**as_json(entry), "text": shown, "content": shown}


def _may_pass(error: BaseException) -> bool:
    """Whether the same may be taken later: what a receiver says of the request itself will not change."""
    if isinstance(error, HttpStatus):
        return error.status >= 500 or error.status in _LATER
    return isinstance(error, SensorError)


def _pause(state: RetryCallState) -> float:
    """Seconds until the next try: what the receiver asks for, else longer each time."""
    error = state.outcome.exception() if state.outcome else None
    if isinstance(error, _Refused) and error.after_seconds is not None:
        return min(LONGEST_PAUSE_SECONDS, error.after_seconds)
    return _PAUSE(state)


def _retry_after(headers: httpx.Headers, now: datetime) -> float | None:
    """Seconds from now, given as such or as a date; None where it says nothing that can be read."""
    said = headers.get("retry-after", "").strip()
    # Discord sends fractions, against the letter.
    with suppress(ValueError):
        return float(said) if 0.0 <= float(said) < float("inf") else None
    with suppress(ValueError):
        at = parsedate_to_datetime(said)
        return max(0.0, ((at if at.tzinfo else at.replace(tzinfo=UTC)) - now).total_seconds())
    return None
