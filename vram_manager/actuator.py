"""The only door to a backend: looks again, then asks. Asking is not freeing; the proof is a later snapshot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import inf

from vram_manager.backends import ComfyUI, Ollama
from vram_manager.clock import Clock
from vram_manager.domain.action import Action, FreeComfyUI, LoadModel, Stage, UnloadModel
from vram_manager.domain.reading import Missing, Off, Reading, Seen
from vram_manager.domain.snapshot import ComfyUIState, GpuMemory, Gpus, Snapshot
from vram_manager.domain.watch import Asked, Pending, Refused
from vram_manager.errors import SensorError, TimedOut
from vram_manager.gpus import GpuSensor
from vram_manager.policy.accounting import gpus_seen

# `keep_alive: -1` is 292 years; the server calls more than 20 of them "Forever" (cmd/cmd.go:ListRunningHandler).
FOR_EVER_SECONDS = 20 * 365.0 * 86_400
UNLOAD_BODY = {"unload_models": True, "free_memory": True}


class Actuator:
    """Asks ComfyUI to free and Ollama to unload, one request at a time, never on an old look."""

    def __init__(
        self,
        clock: Clock,
        *,
        gpus: GpuSensor | None,
        ollama: Ollama | None,
        comfyui: ComfyUI | None,
        soft_body: Mapping[str, bool],
    ) -> None:
        self._clock = clock
        self._gpus = gpus
        self._ollama = ollama
        self._comfyui = comfyui
        self._bodies = {Stage.SOFT: soft_body, Stage.UNLOAD: UNLOAD_BODY}

    async def ask(self, pending: Pending, snapshot: Snapshot) -> Asked | Refused:
        """Looks once more and asks for `pending`, or says why it did not. The world may have moved since."""
        try:
            memory = await self._memory_now(pending, snapshot)
            await self._still_right(pending.action)
        except SensorError as error:
            return self._refused(error.why)
        if memory is None and pending.gpu is not None:
            return self._refused("the GPU cannot be read any more")
        leased = 0 if pending.gpu is None else snapshot.leased_on(pending.gpu)
        need = None if pending.demand is None else pending.demand.need_free_bytes + leased
        if need is not None and memory is not None and memory.free_bytes >= need:
            return self._refused("room appeared while looking: nothing to do")
        return await self._post(pending.action, memory)

    async def ask_again(self, action: Action) -> Asked | Refused:
        """The second post of a free whose flag was lost, unless its target became busy meanwhile."""
        try:
            await self._still_right(action)
        except SensorError as error:
            return self._refused(error.why)
        return await self._post(action, None)

    async def _post(self, action: Action, memory: GpuMemory | None) -> Asked | Refused:
        """Sends the request for `action`. A request that got no answer in time may still have arrived."""
        at = self._clock.monotonic()
        try:
            if isinstance(action, FreeComfyUI) and self._comfyui is not None:
                await self._comfyui.free(self._bodies[action.stage])
            elif isinstance(action, UnloadModel) and self._ollama is not None:
                await self._ollama.unload(action.model)
            elif isinstance(action, LoadModel) and self._ollama is not None:
                await self._ollama.load(action.model, context=action.context, keep_alive_seconds=self._left(action))
                # It is answered once the model is loaded: what is seen before tells nothing of where it went.
                at = self._clock.monotonic()
            else:
                return self._refused(f"there is no {action.target} here")
        except TimedOut as error:
            if isinstance(action, LoadModel):
                # Ollama gives a load up that stands still; one that it does not even begin hangs in its scheduler.
                return self._refused(f"{action.model} has not been loaded: {error.why}; does Ollama hang?", tried=True)
            # The wait for the proof begins now: a server that stood still until here has not acted yet.
            return Asked(at=self._clock.monotonic(), gpu_memory=memory, note=error.why)
        except SensorError as error:
            return self._refused(error.why, tried=True)
        return Asked(at=at, gpu_memory=memory)

    def _left(self, action: LoadModel) -> float | None:
        """For how long the model is still to be kept; None: as long as the server keeps models by itself."""
        if action.expires_at is None:
            return None
        left = (action.expires_at - self._clock.utcnow()).total_seconds()
        return inf if left > FOR_EVER_SECONDS else left

    def _refused(self, why: str, *, tried: bool = False) -> Refused:
        return Refused(at=self._clock.monotonic(), why=why, tried=tried)

    async def _still_right(self, action: Action) -> None:
        """Raises SensorError when the target is busy, gone, or cannot be seen."""
        if isinstance(action, FreeComfyUI) and self._comfyui is not None:
            remaining = await self._comfyui.queue_remaining()
            if remaining and not action.forced:
                raise SensorError(f"ComfyUI became busy ({remaining} running or waiting)")
        if isinstance(action, LoadModel) and (left := self._left(action)) is not None and left <= 0:
            raise SensorError(f"the time {action.model} was to be kept is over")
        if isinstance(action, UnloadModel) and self._ollama is not None:
            state = await self._ollama.models()
            if not any(model.name == action.model for model in state.models):
                raise SensorError(f"{action.model} is not loaded any more")

    async def _memory_now(self, pending: Pending, snapshot: Snapshot) -> GpuMemory | None:
        """The memory of the action's GPU, read this moment: first-hand, else from ComfyUI."""
        gpus: Reading[Gpus] = Off()
        comfyui: Reading[ComfyUIState] = Off()
        if self._gpus is not None:
            try:
                gpus = Seen(await self._gpus.read(), self._clock.monotonic())
            except SensorError as error:
                gpus = Missing(error.why)
        seen = gpus_seen(replace(snapshot, gpus=gpus, comfyui=comfyui))
        if isinstance(seen, Missing) and self._comfyui is not None:
            comfyui = Seen(await self._comfyui.stats(), self._clock.monotonic())
            seen = gpus_seen(replace(snapshot, gpus=gpus, comfyui=comfyui))
        if isinstance(seen, Missing):
            return None
        found = next((gpu for gpu in seen.gpus if gpu.uuid == pending.gpu), None)
        return found.memory if found is not None and isinstance(found.memory, GpuMemory) else None
