"""Ollama's scheduler (server/sched.go): which models are loaded, where their layers go, when they leave.

A request for a loaded, compatible model attaches to it at once. Every other request waits in one queue:

1. a loaded but incompatible runner of the same model is expired and waited for;
2. too many models loaded -> one is evicted;
3. no model loaded -> load, whatever fits;
4. others loaded -> predicted need <= 80 % of what was free *when they were loaded*, else one is evicted;
5. the split is decided by the memory that is free now, and never again.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import datetime, timedelta

from vram_manager.simulator.ledger import Ledger, OutOfMemory
from vram_manager.simulator.ollama_library import FOREVER, OllamaModel
from vram_manager.simulator.ollama_runner import (
    LoadFailed,
    OllamaCounters,
    OllamaSettings,
    QueueFull,
    Runner,
    RunnerOptions,
    split,
)

PREFLIGHT_SHARE = 0.8
"""Part of the free memory a further model may be predicted to need (server/sched.go)."""

LOAD_STEPS = 10
"""In how many pieces the weights arrive; enough for a watcher to see a load in progress."""


class Scheduler:
    """Owns the runners. `hang` makes every new load wait while loaded models keep answering (issue 17408)."""

    def __init__(self, ledger: Ledger, settings: OllamaSettings, utcnow: Callable[[], datetime]) -> None:
        self.ledger = ledger
        self.settings = settings
        self.counters = OllamaCounters()
        self.immovable_bytes: Callable[[], int] = self._others_bytes
        """What others hold and could not have been made to let go; a world with a ComfyUI knows better."""
        self._may_schedule = asyncio.Event()
        self._may_schedule.set()
        self.runners: dict[str, Runner] = {}
        self._utcnow = utcnow
        self._one_load = asyncio.Lock()
        self._one_unload = asyncio.Lock()
        self._waiting = 0
        self._unloads: set[asyncio.Task[None]] = set()

    @property
    def hang(self) -> bool:
        return not self._may_schedule.is_set()

    @hang.setter
    def hang(self, hang: bool) -> None:
        if hang:
            self._may_schedule.clear()
        else:
            self._may_schedule.set()

    @asynccontextmanager
    async def running(
        self, model: OllamaModel, options: RunnerOptions, keep_alive_seconds: float | None
    ) -> AsyncIterator[Runner]:
        """The loaded runner, held in use for the length of the block."""
        runner = self._attachable(model, options)
        if runner is None:
            if self._waiting >= self.settings.max_queue:
                raise QueueFull
            self._waiting += 1
            try:
                async with self._one_load:
                    runner = self._attachable(model, options)
                    if runner is None:
                        runner = await self._schedule(model, options, keep_alive_seconds)
            finally:
                self._waiting -= 1
        if keep_alive_seconds is not None:
            runner.keep_alive_seconds = keep_alive_seconds
            runner.expire_asked = False  # useLoadedRunner: a fresh keep_alive takes back a pending unload
        if runner.timer is not None:
            runner.timer.cancel()
        runner.users += 1
        try:
            yield runner
        finally:
            runner.users -= 1
            if runner.users == 0:
                self._became_idle(runner)

    async def unload(self, model: OllamaModel) -> None:
        """Asks the runner to leave once its requests are done; nothing when the model is not loaded."""
        runner = self.runners.get(model.blob_digest)
        if runner is not None and runner.ready:
            self._expire(runner)
            await asyncio.sleep(0)  # an idle runner is locked by now: whoever asks next waits for its end

    def expires_at(self, runner: Runner) -> datetime:
        """As /api/ps says: fixed when last idle, so it may lie in the past; drifts until first idle."""
        return runner.expires_at or self._expiry(runner)

    async def close(self) -> None:
        """Every runner's timer and pending unload is cancelled."""
        for runner in self.runners.values():
            if runner.timer is not None:
                runner.timer.cancel()
        for task in self._unloads:
            task.cancel()
        await asyncio.gather(*self._unloads, return_exceptions=True)

    # -- loading

    def _attachable(self, model: OllamaModel, options: RunnerOptions) -> Runner | None:
        runner = self.runners.get(model.blob_digest)
        if runner is None or not runner.ready or runner.lock.locked():
            return None
        if self._num_ctx(model, options) != runner.num_ctx:
            return None
        num_gpu = _num_gpu(model, options)
        if num_gpu is not None and num_gpu != runner.num_gpu:
            return None
        return runner

    def _num_ctx(self, model: OllamaModel, options: RunnerOptions) -> int:
        return min(options.num_ctx or model.num_ctx or self.settings.context_length, model.trained_context)

    async def _schedule(self, model: OllamaModel, options: RunnerOptions, keep_alive_seconds: float | None) -> Runner:
        await self._may_schedule.wait()
        same = self.runners.get(model.blob_digest)
        if same is not None:  # 1
            await self._expire_and_wait(same)
        while self.runners and not self._may_load_beside(model, self._num_ctx(model, options)):  # 2, 4
            self.counters.evictions += 1
            await self._expire_and_wait(self._victim())
        try:
            return await self._load(model, options, keep_alive_seconds)  # 3, 5
        except OutOfMemory:
            if self.runners:
                for other in list(self.runners.values()):
                    self.counters.evictions += 1
                    await self._expire_and_wait(other)
                try:
                    return await self._load(model, options, keep_alive_seconds)
                except OutOfMemory:
                    pass
            self.counters.load_failures += 1
            raise LoadFailed("llama-server process has terminated: cudaMalloc failed: out of memory") from None

    def _may_load_beside(self, model: OllamaModel, num_ctx: int) -> bool:
        if len(self.runners) >= self.settings.max_loaded:
            return False
        predicted_bytes = model.file_bytes + model.kv_bytes(num_ctx)
        return predicted_bytes <= PREFLIGHT_SHARE * self._believed_free_bytes()

    def _believed_free_bytes(self) -> int:
        """Free memory as the scheduler sees it: live without a model on the GPU, else frozen at their loads.

        GetDeviceInfos answers min(total - own, free_at_load - own) for a loaded runner, and updateFreeSpace
        takes at most total - the sum of all own.
        """
        on_gpu = [runner for runner in self.runners.values() if runner.gpu_layers]
        if not on_gpu:
            return self._live_free_bytes()
        total_bytes = self.ledger.usable_bytes
        views = [min(total_bytes, runner.free_at_load_bytes) - runner.size_vram_bytes for runner in on_gpu]
        return max(0, min(*views, total_bytes - sum(runner.size_vram_bytes for runner in on_gpu)))

    def _live_free_bytes(self) -> int:
        return 0 if self.ledger.lost else self.ledger.free_bytes

    def _victim(self) -> Runner:
        """Idle before busy, then the shortest keep_alive (findRunnerToUnload)."""
        return min(self.runners.values(), key=lambda runner: (runner.users > 0, runner.keep_alive_seconds))

    async def _load(self, model: OllamaModel, options: RunnerOptions, keep_alive_seconds: float | None) -> Runner:
        runner = Runner(
            model=model,
            num_ctx=self._num_ctx(model, options),
            num_gpu=_num_gpu(model, options),
            keep_alive_seconds=self.settings.keep_alive_seconds if keep_alive_seconds is None else keep_alive_seconds,
            free_at_load_bytes=self._live_free_bytes(),
        )
        self.runners[model.blob_digest] = runner
        try:
            self._place(runner)
            await self._fill(runner)
        except BaseException:  # also a client that hung up: its load is aborted
            self.ledger.release(runner.holder)
            del self.runners[model.blob_digest]
            runner.gone.set()
            raise
        runner.ready = True
        self.counters.loads += 1
        self.counters.loads_with_cpu_layers += runner.gpu_layers < runner.all_layers
        return runner

    def _place(self, runner: Runner) -> None:
        """The split, from the memory that is free now. Without a GPU all goes to the CPU, and nothing says so."""
        if self.ledger.lost:
            return
        model, num_ctx, num_gpu = runner.model, runner.num_ctx, runner.num_gpu
        context_bytes = self.settings.cuda_context_bytes
        runner.gpu_layers, runner.projector_on_gpu = split(
            model, num_ctx, num_gpu, self._live_free_bytes() - context_bytes
        )
        if num_gpu is None:
            best = split(model, num_ctx, None, self._movable_bytes() - context_bytes)
            runner.would_have_fitted = best.gpu_layers == model.all_layers

    def _movable_bytes(self) -> int:
        """What would be free if everything that can be moved were: idle models here, and what others let go."""
        busy = sum(self.ledger.held_bytes(runner.holder) for runner in self.runners.values() if runner.users)
        return self.ledger.usable_bytes - busy - self.immovable_bytes()

    def _others_bytes(self) -> int:
        own = sum(self.ledger.held_bytes(runner.holder) for runner in self.runners.values())
        return self.ledger.used_bytes - own

    async def _fill(self, runner: Runner) -> None:
        """Weights arrive piece by piece; cache, compute buffer and projector are allocated last."""
        await asyncio.sleep(self.settings.start_seconds)
        weights_bytes = int(runner.model.weights_bytes * runner.gpu_ratio)
        on_gpu_bytes = self.settings.cuda_context_bytes if runner.gpu_layers else 0
        self.ledger.resize(runner.holder, on_gpu_bytes)
        load_seconds = runner.model.file_bytes / self.settings.load_bytes_per_second
        for step in range(1, LOAD_STEPS + 1):
            await asyncio.sleep(load_seconds / LOAD_STEPS)
            self.ledger.resize(runner.holder, on_gpu_bytes + weights_bytes * step // LOAD_STEPS)
        on_gpu_bytes += runner.real_gpu_bytes
        if runner.projector_on_gpu:
            on_gpu_bytes += runner.model.projector_bytes
        self.ledger.resize(runner.holder, on_gpu_bytes)

    # -- leaving

    def _expiry(self, runner: Runner) -> datetime:
        lasting = math.isinf(runner.keep_alive_seconds)
        return self._utcnow() + (FOREVER if lasting else timedelta(seconds=runner.keep_alive_seconds))

    def _became_idle(self, runner: Runner) -> None:
        if runner.gone.is_set():
            return
        runner.expires_at = self._expiry(runner)
        if runner.expire_asked or runner.keep_alive_seconds == 0:
            self._expire(runner)
        elif not math.isinf(runner.keep_alive_seconds):
            loop = asyncio.get_running_loop()
            runner.timer = loop.call_later(runner.keep_alive_seconds, self._expire, runner)

    def _expire(self, runner: Runner) -> None:
        """Marks the runner; it leaves now if idle, else with its last request."""
        runner.expire_asked = True
        runner.expires_at = self._utcnow()
        if runner.timer is not None:
            runner.timer.cancel()
        if runner.users == 0 and not runner.lock.locked() and not runner.gone.is_set():
            task = asyncio.ensure_future(self._leave(runner))
            self._unloads.add(task)
            task.add_done_callback(self._unloads.discard)

    async def _expire_and_wait(self, runner: Runner) -> None:
        self._expire(runner)
        await runner.gone.wait()

    async def _leave(self, runner: Runner) -> None:
        """The process is killed and reaped under the runner's lock, one runner after another."""
        async with runner.lock, self._one_unload:
            if runner.users or runner.gone.is_set():  # someone attached meanwhile
                return
            await asyncio.sleep(self.settings.unload_seconds)
            self.ledger.release(runner.holder)
            del self.runners[runner.model.blob_digest]
            self.counters.unloads += 1
            runner.gone.set()


def _num_gpu(model: OllamaModel, options: RunnerOptions) -> int | None:
    """Layers that the request or the model itself wants on the GPU; None is left to the fit."""
    wanted = model.num_gpu if options.num_gpu is None else options.num_gpu
    return None if wanted is None or wanted < 0 else wanted
