"""The gate in front of ComfyUI: a prompt waits while Ollama's idle models make room for what it will load.

Nothing announces a prompt earlier than its POST, and weights load within half a second of it. Prompts pass one after
the other, in the order in which they came: the next one once ComfyUI has answered the one before.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections import deque
from dataclasses import replace
from typing import Any

from loguru import logger

from vram_manager.admissions import NoSuchLease, OtherRequest, Stopping, TooMany
from vram_manager.domain.action import FreeComfyUI
from vram_manager.domain.lease import Priority, Request
from vram_manager.domain.reading import Missing, Seen
from vram_manager.domain.snapshot import Snapshot
from vram_manager.gateway.proxy import Head, Held, Passage, Reply
from vram_manager.gateway.waiting import Desk, Waiter, for_ever
from vram_manager.policy.accounting import gpus_seen

UPSTREAM = "comfyui"
OWNER = "comfyui"
# Workflows with everything a front end adds are some 100 kB; the largest that is read at all.
MOST_BYTES = 8 * 2**20
# ComfyUI's own promise lives as long as it works; this only bounds one that was forgotten.
TTL_SECONDS = 86_400.0


# A status that was on its way when the last prompt was accepted may still say that the queue is empty.
EMPTY_SECONDS = 0.5


class ComfyUIGate:
    """One for each daemon."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._rules = desk.cycle.rules
        self._line: deque[asyncio.Future[None]] = deque()
        self._leases: dict[str, str] = {}
        self._ran: set[str] = set()
        """Workflows that have run since ComfyUI was last freed: it may still hold their files."""
        self._accepted_at = float("-inf")
        self._in_front = 0

    # ---- the proxy's side

    def watch(self, head: Head) -> Held | None:
        if head.method == "POST" and head.path in ("/prompt", "/api/prompt"):
            return _HeldPrompt(self)
        self._desk.on_request(UPSTREAM, "passed", 0.0)
        return None

    def unreachable(self, head: Head, why: str) -> Reply:
        self._desk.on_request(UPSTREAM, "unreachable", 0.0)
        return Reply(status=502, body=_error("comfyui_unreachable", f"ComfyUI cannot be reached: {why}"))

    # ---- the cycle's side

    def seen(self, snapshot: Snapshot) -> None:
        """What was promised to ComfyUI is given back once its queue was seen to be empty after the last prompt."""
        pending = self._desk.cycle.watch.pending
        if pending is not None and isinstance(pending.action, FreeComfyUI):
            self._ran.clear()
        if not self._leases or self._in_front or not isinstance(snapshot.queue, Seen):
            return
        queue, read_at = snapshot.queue.value, snapshot.queue.at
        if queue.idle and read_at - max(self._accepted_at, queue.since) >= EMPTY_SECONDS:
            for subject in list(self._leases):
                self._give_back(subject, "its queue is empty")

    def with_prompts(self, snapshot: Snapshot) -> Snapshot:
        """ComfyUI is at work as soon as a prompt has passed, not only when its queue was seen to say so."""
        if not isinstance(snapshot.queue, Seen) or not snapshot.queue.value.idle:
            return snapshot
        if not self._in_front and snapshot.queue.at > self._accepted_at:
            return snapshot
        queue = replace(snapshot.queue.value, remaining=max(1, self._in_front))
        return replace(snapshot, queue=Seen(queue, snapshot.queue.at))

    def _give_back(self, subject: str, why: str) -> None:
        try:
            self._desk.admissions.release(self._leases.pop(subject), why)
        except NoSuchLease as gone:
            logger.debug("{}", gone)

    # ---- one prompt

    async def turn(self) -> asyncio.Future[None]:
        """It is this prompt's turn; whoever gets the future back must `pass_on` it."""
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        before = self._line[-1] if self._line else None
        self._line.append(mine)
        try:
            if before is not None:
                await asyncio.wait({before})
        except asyncio.CancelledError:
            # Whoever comes next waits for the one before this.
            if before is not None:
                before.add_done_callback(lambda _: self.pass_on(mine))
            raise
        return mine

    def pass_on(self, mine: asyncio.Future[None]) -> None:
        if not mine.done():
            mine.set_result(None)
            self._line.remove(mine)

    async def enter(self, held: _HeldPrompt, prompt: object | None) -> Passage | Reply:
        """The prompt may go on, or is refused: in its turn, once there is room. None is one that cannot be read."""
        desk = self._desk
        began = desk.clock.monotonic()
        key = object()
        desk.waiting[key] = Waiter(upstream=UPSTREAM, what="a prompt", since=began, why="waits for its turn")
        try:
            async with asyncio.timeout(desk.max_wait_seconds):
                held.turn = await self.turn()
                # A free that is settling was asked of an idle ComfyUI, and for somebody: what it loads now would be
                # dropped again, in memory that was made free for another.
                await self._settled()
                if prompt is not None:
                    await self._room_for(held, prompt, key)
                    await self._settled()
        except TimeoutError:
            waited = desk.clock.monotonic() - began
            if desk.refuses:
                words = f"no room on the GPU within {waited:.0f} s; try again later"
                return desk.refusal(UPSTREAM, waited, _error("no_room", words), None)
            logger.warning("A prompt waited {:.0f} s at the gateway and goes on without its room", waited)
            return desk.told(UPSTREAM, "timeout", waited)
        finally:
            desk.waiting.pop(key, None)
        waited = desk.clock.monotonic() - began
        return desk.told(UPSTREAM, "unread" if prompt is None else "held", waited)

    async def _room_for(self, held: _HeldPrompt, prompt: object, key: object) -> None:
        """Returns when there is room, or when nothing can be said about it."""
        desk = self._desk
        while not desk.ready and await desk.next_turn(float("inf")):
            pass
        snapshot = desk.observer.known()
        unread = isinstance(gpus_seen(snapshot), Missing) or not isinstance(snapshot.comfyui, Seen)
        if desk.stopped or not self._rules.enabled or self._rules.dry_run or unread:
            return
        estimate = await desk.estimates.of(required=None, model=None, context=None, workflow=prompt)
        if not estimate.names or estimate.subject is None:
            # It loads no file that anybody knows of.
            return
        request = Request(
            id=secrets.token_hex(8),
            owner=OWNER,
            # What ComfyUI takes is measured by run, not by promise.
            estimate=replace(estimate, subject=None),
            margin_bytes=self._rules.context_bytes,
            priority=Priority.INTERACTIVE,
            wait_seconds=desk.max_wait_seconds,
            ttl_seconds=TTL_SECONDS,
            for_comfyui=True,
            at_gateway=True,
            new_files=estimate.subject not in self._ran,
        )
        if estimate.subject in self._leases and not desk.admissions.would_overtake(request):
            return
        desk.waiting[key] = replace(desk.waiting[key], why=f"waits for {estimate.size}")
        try:
            answer = await desk.admissions.ask(request, for_ever)
        except (TooMany, OtherRequest, Stopping, LookupError) as problem:
            logger.debug("A prompt goes on without a promise: {}", problem)
            return
        except asyncio.CancelledError:
            desk.withdraw(request)
            raise
        if answer.lease is not None:
            if estimate.subject in self._leases:
                self._give_back(estimate.subject, "followed by the next prompt")
            self._leases[estimate.subject] = answer.lease.id
            self._ran.add(estimate.subject)
            # From here on its promise is in use, though it may have to wait once more.
            held.goes()
        elif not answer.verdict.admitted and not answer.verdict.hopeless:
            raise TimeoutError

    async def _settled(self) -> None:
        """No free of ComfyUI is under way, but for one that a person forced."""
        while (pending := self._desk.cycle.watch.pending) is not None and not self._desk.stopped:
            if not isinstance(pending.action, FreeComfyUI) or pending.action.forced:
                return
            await self._desk.next_turn(float("inf"))

    def began(self) -> None:
        self._in_front += 1

    def over(self) -> None:
        """ComfyUI has answered, or nobody waits for its answer: what its queue says from now on counts."""
        self._in_front -= 1
        self._accepted_at = self._desk.clock.monotonic()


class _HeldPrompt:
    """One prompt on its way through the gate."""

    def __init__(self, gate: ComfyUIGate) -> None:
        self._gate = gate
        self._pieces: list[bytes] | None = []
        self._bytes = 0
        self.turn: asyncio.Future[None] | None = None
        self._sent = False

    def look(self, piece: bytes) -> None:
        self._bytes += len(piece)
        if self._bytes > MOST_BYTES:
            self._pieces = None
        if self._pieces is not None:
            self._pieces.append(piece)

    async def may_pass(self) -> Passage | Reply:
        body, self._pieces = self._pieces, None
        prompt = None if body is None else _prompt(b"".join(body))
        verdict = await self._gate.enter(self, prompt)
        if isinstance(verdict, Passage):
            self.goes()
        return verdict

    def goes(self) -> None:
        """It is on its way to ComfyUI."""
        if not self._sent:
            self._sent = True
            self._gate.began()

    def answered(self, status: int) -> None:
        self._done()

    def over(self) -> None:
        self._done()

    def _done(self) -> None:
        """Only now may the next prompt pass: ComfyUI has this one."""
        if self._sent:
            self._gate.over()
            self._sent = False
        if self.turn is not None:
            self._gate.pass_on(self.turn)
            self.turn = None


def _prompt(body: bytes) -> object | None:
    """The workflow in the body of a prompt; None: ComfyUI will say what is wrong with it."""
    try:
        document: Any = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return document.get("prompt") if isinstance(document, dict) else None


def _error(kind: str, words: str) -> bytes:
    """An error in the shape of ComfyUI's own (server.py:post_prompt)."""
    body = {"error": {"type": kind, "message": words, "details": words, "extra_info": {}}, "node_errors": {}}
    return json.dumps(body).encode()
