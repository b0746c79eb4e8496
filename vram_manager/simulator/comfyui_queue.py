"""ComfyUI's prompt queue, with the wake-ups it loses (execution.py:PromptQueue).

`get` waits on a condition without looking at the flags first. A notification sent while the worker is
elsewhere reaches nobody, and its flag lies there until the next wake-up: a post, a prompt, or a timeout.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vram_manager.simulator.comfyui_files import Workflow

GC_INTERVAL_SECONDS = 10.0
IDLE_TIMEOUT_SECONDS = 1000.0
HISTORY_LIMIT = 10_000


@dataclass(frozen=True, slots=True)
class QueueItem:
    """One accepted prompt. Over HTTP it is an array of five."""

    number: float
    prompt_id: str
    prompt: Workflow
    extra_data: dict[str, Any]
    outputs: list[str]

    def __lt__(self, other: QueueItem) -> bool:
        return self.number < other.number

    def as_json(self) -> list[Any]:
        return [self.number, self.prompt_id, self.prompt, self.extra_data, self.outputs]


class PromptQueue:
    """Pending and running prompts, history, and the flags of POST /free."""

    def __init__(self, updated: Callable[[], None]) -> None:
        self.pending: list[QueueItem] = []
        self.running: QueueItem | None = None
        self.history: dict[str, Any] = {}
        self.flags: dict[str, bool] = {}
        self.dead = False
        self._updated = updated
        self._waiter: asyncio.Future[None] | None = None

    @property
    def remaining(self) -> int:
        return len(self.pending) + (self.running is not None)

    def put(self, item: QueueItem) -> None:
        heapq.heappush(self.pending, item)
        self._updated()
        self._notify()

    async def get(self, timeout_seconds: float) -> QueueItem | None:
        """The next prompt, or None when woken or timed out without one. Flags are not looked at here."""
        if self.dead or not self.pending:
            await self._wait(timeout_seconds)
        while self.dead:
            await self._wait(IDLE_TIMEOUT_SECONDS)
        if not self.pending:
            return None
        self.running = heapq.heappop(self.pending)
        self._updated()
        return self.running

    def task_done(self, item: QueueItem, entry: dict[str, Any]) -> None:
        self.running = None
        if len(self.history) >= HISTORY_LIMIT:
            del self.history[next(iter(self.history))]
        self.history[item.prompt_id] = {"prompt": item.as_json(), **entry}
        self._updated()

    def set_flag(self, name: str) -> None:
        self.flags[name] = True
        self._notify()

    def take_flags(self) -> dict[str, bool]:
        flags, self.flags = self.flags, {}
        return flags

    def delete(self, prompt_id: str) -> None:
        """A pending prompt is dropped; a running or unknown one is left alone without a word."""
        kept = [item for item in self.pending if item.prompt_id != prompt_id]
        if len(kept) < len(self.pending):
            self.pending = kept
            heapq.heapify(self.pending)
            self._updated()

    def clear(self) -> None:
        self.pending = []
        self._updated()

    async def _wait(self, timeout_seconds: float) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._waiter
        except TimeoutError:
            pass
        finally:
            self._waiter = None

    def _notify(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
