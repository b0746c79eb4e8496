"""ComfyUI's only worker: takes prompts and flags in turn (main.py:prompt_worker)."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any

from vram_manager.simulator.comfyui_executor import ComfyUISettings, Executor
from vram_manager.simulator.comfyui_queue import GC_INTERVAL_SECONDS, IDLE_TIMEOUT_SECONDS, PromptQueue

FINISH_SECONDS = 0.002
"""From a prompt's last status message to the worker's look at the flags."""


class Worker:
    """A thread in the real one, a task here; `unstalled` is what its interpreter lock does to others."""

    def __init__(
        self,
        queue: PromptQueue,
        executor: Executor,
        settings: ComfyUISettings,
        send: Callable[[str, dict[str, Any], str | None], None],
    ) -> None:
        self._queue = queue
        self._executor = executor
        self._memory = executor.memory
        self._settings = settings
        self._send = send
        self._stalled_until = -math.inf
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """The worker runs. Every request asks for it: an app without a socket has no start of its own."""
        if self._task is None:
            self._task = asyncio.ensure_future(self._work())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def unstalled(self) -> None:
        """Returns when no garbage collection holds the interpreter."""
        await asyncio.sleep(max(0.0, self._stalled_until - asyncio.get_running_loop().time()))

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        now, last_gc_at, need_gc = loop.time(), -math.inf, False
        while True:
            timeout_seconds = IDLE_TIMEOUT_SECONDS
            if need_gc:
                timeout_seconds = max(GC_INTERVAL_SECONDS - (now - last_gc_at), 0.0)
            item = await self._queue.get(timeout_seconds)
            if item is not None:
                entry = await self._executor.execute(item)
                need_gc = True
                self._queue.task_done(item, entry)
                if client_id := item.extra_data.get("client_id"):
                    self._send("executing", {"node": None, "prompt_id": item.prompt_id}, client_id)
                now = loop.time()
                await asyncio.sleep(FINISH_SECONDS)
            flags = self._queue.take_flags()
            free_memory = flags.get("free_memory", False)
            if flags.get("unload_models", free_memory):
                self._executor.counters.frees_acted_on += 1
                await self._unload_all()
                need_gc, last_gc_at = True, -math.inf
            if free_memory:
                self._executor.reset()
            if need_gc:
                now = loop.time()
                # The real test is `> 10`; a clock that stands exactly on 10 would spin here.
                if now - last_gc_at >= GC_INTERVAL_SECONDS - 0.001:
                    await self._collect(forget=free_memory)
                    last_gc_at, need_gc = now, False

    async def _unload_all(self) -> None:
        """Legacy copies every model to RAM first; DynamicVRAM only unmaps."""
        if self._memory.mode == "legacy":
            await asyncio.sleep(self._memory.weights_bytes / self._settings.ram_bytes_per_second)
        self._memory.unload_all()
        self._memory.empty_cache()

    async def _collect(self, *, forget: bool) -> None:
        """gc.collect holds the interpreter, so nothing is answered meanwhile; then the cache is emptied.

        Requests that piled up are served while the worker still empties the cache: their flags are lost.
        """
        self._stalled_until = asyncio.get_running_loop().time() + self._settings.gc_seconds
        await asyncio.sleep(self._settings.gc_seconds)
        if forget:
            self._memory.forget_all()
        self._memory.empty_cache()
        await asyncio.sleep(self._settings.empty_cache_seconds)
