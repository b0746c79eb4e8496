"""What ComfyUI runs: what its prompts will need, from its own queue, and what they took.

Whoever posts to ComfyUI directly tells nobody before. Its queue, though, has every workflow in it, and what is in
Ollama's idle models' hands can still leave while ComfyUI reads its files.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from vram_manager.backends import ComfyUI
from vram_manager.clock import Clock
from vram_manager.domain.demand import Demand, Kind
from vram_manager.domain.floor import Work
from vram_manager.domain.reading import Missing, Seen
from vram_manager.domain.snapshot import Gpu, GpuMemory, Queue, Snapshot
from vram_manager.errors import SensorError
from vram_manager.estimates import Estimates
from vram_manager.policy import Rules
from vram_manager.policy.accounting import Hold, comfyui_gpu, comfyui_hold, gpus_seen
from vram_manager.policy.drift import known_as
from vram_manager.policy.plan import first_stage
from vram_manager.policy.workflow import workflow_facts

# The queue is asked again while it works, as prompts are added: a reply may be some 100 kB.
ASK_SECONDS = 5.0


class Runs:
    """The demand of what ComfyUI runs now, and the peaks of what it ran."""

    def __init__(self, clock: Clock, comfyui: ComfyUI | None, estimates: Estimates, rules: Rules) -> None:
        self._clock = clock
        self._comfyui = comfyui
        self._estimates = estimates
        self._rules = rules
        self._began = asyncio.Event()
        self._run: int | None = None
        self._since = 0.0
        self._need_bytes: int | None = None
        self._works: set[Work] = set()
        self._peak_bytes = 0
        self.on_need: Callable[[], object] = lambda: None
        """Called when it is known what ComfyUI needs: the next turn need not wait for its beat."""
        self.on_over: Callable[[int, frozenset[Work]], object] = lambda run, works: None
        """Called when a run is over, with what it is known to have worked with."""

    def turned(self, snapshot: Snapshot) -> tuple[Demand, ...]:
        """What ComfyUI is short of now. Call it every turn."""
        if not isinstance(snapshot.queue, Seen):
            return ()
        queue = snapshot.queue.value
        if queue.idle or queue.runs != self._run:
            self._over()
        if queue.idle:
            return ()
        if self._run is None:
            self._run, self._since = queue.runs, snapshot.taken_at
            self._began.set()
        found = self._held(snapshot)
        if found is None:
            return ()
        gpu, held = found
        if held.expected_bytes is not None:
            self._peak_bytes = max(self._peak_bytes, held.bytes)
        return self._demand(gpu, held, queue, snapshot)

    async def run(self) -> None:
        """Asks what is in the queue as soon as ComfyUI begins, and while it works, until cancelled."""
        while self._comfyui is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if self._run is None else ASK_SECONDS):
                    await self._began.wait()
            self._began.clear()
            if self._run is not None:
                await self._ask(self._comfyui)

    async def _ask(self, comfyui: ComfyUI) -> None:
        run = self._run
        try:
            workflows = await comfyui.prompts()
        except SensorError:
            return
        need, works = 0, set()
        for workflow in workflows:
            estimate = await self._estimates.of(required=None, model=None, context=None, workflow=workflow)
            if estimate.names and estimate.subject is not None:
                need = max(need, estimate.size.bytes or 0)
                works.add(Work(estimate.subject, known_as(workflow_facts(workflow))))
        if run is not None and run == self._run:
            self._works |= works
            self._need_bytes = need or None
            self.on_need()

    def _over(self) -> None:
        """A run has ended. Of several workflows nobody can tell which one took how much."""
        if self._run is not None:
            subjects = {work.subject for work in self._works}
            if len(subjects) == 1 and self._peak_bytes:
                self._estimates.learn(subjects.pop(), peak_bytes=self._peak_bytes)
            self.on_over(self._run, frozenset(self._works))
        self._run, self._need_bytes, self._peak_bytes = None, None, 0
        self._works = set()

    def _held(self, snapshot: Snapshot) -> tuple[Gpu, Hold] | None:
        gpus = gpus_seen(snapshot)
        if isinstance(gpus, Missing) or not isinstance(snapshot.comfyui, Seen):
            return None
        comfyui = snapshot.comfyui.value
        gpu = comfyui_gpu(comfyui, gpus, self._rules)
        if isinstance(gpu, Missing) or not isinstance(gpu.memory, GpuMemory):
            return None
        return gpu, comfyui_hold(snapshot, comfyui, gpus, gpu, None, first_stage(comfyui), self._rules)

    def _demand(self, gpu: Gpu, held: Hold, queue: Queue, snapshot: Snapshot) -> tuple[Demand, ...]:
        if self._need_bytes is None or not isinstance(gpu.memory, GpuMemory):
            return ()
        # It loads in stages where it must: no prompt needs more than the card, and whatever can be had helps it.
        need = min(self._need_bytes, gpu.memory.usable_bytes - self._rules.context_bytes) - held.bytes
        need = min(need, gpu.memory.free_bytes + _idle_bytes(snapshot))
        if need <= gpu.memory.free_bytes:
            return ()
        return (
            Demand(
                kind=Kind.STARTING,
                key=f"comfyui:{queue.runs}",
                gpu=gpu.uuid,
                need_free_bytes=need,
                reason="ComfyUI has begun to work",
                since=self._since,
                last_seen_at=snapshot.taken_at,
                for_comfyui=True,
            ),
        )


def _idle_bytes(snapshot: Snapshot) -> int:
    """What Ollama's models hold that nobody is known to use."""
    models = snapshot.ollama.value.models if isinstance(snapshot.ollama, Seen) else ()
    return sum(model.size_vram_bytes for model in models if not model.requests)
