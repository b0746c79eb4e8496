"""vram-manager in a process for which time goes faster: for benchmarks and pictures of a day that nobody waits for.

    FAST_SPEED=100 python benchmarks/fast.py run
    FAST_SPEED=100 python benchmarks/fast.py simulate OLLAMA_PORT COMFYUI_PORT NVML_STATE GPUS NODES

Every beat, deadline and pause is shorter by that factor, and what happens is dated as if it were so. With FAST_UNTIL
(seconds since 1970) the dates begin in the past, so that they are true from then on, when time goes as it does.
"""

from __future__ import annotations

import asyncio
import os
import selectors
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vram_manager.cli import main as cli
from vram_manager.clock import Clock
from vram_manager.simulator.serve import Extras, serve_world


class Hurry:
    """How late it is for whoever hurries: `speed` times as fast, until it is `until` (seconds since 1970) in truth."""

    def __init__(self, speed: float, until: float | None) -> None:
        self.speed = speed
        self._began = time.monotonic()
        self._lasts = float("inf") if until is None else max(0.0, until - time.time())
        self._utc = time.time() - (0.0 if until is None else self._lasts * (speed - 1))

    @property
    def seconds(self) -> float:
        """Since the start."""
        real = time.monotonic() - self._began
        return min(real, self._lasts) * self.speed + max(0.0, real - self._lasts)

    def truly(self, seconds: float) -> float:
        """How long to wait for so many of them. It may be too short where the hurry ends meanwhile."""
        return seconds / (self.speed if time.monotonic() - self._began < self._lasts else 1.0)

    def utcnow(self) -> datetime:
        return datetime.fromtimestamp(self._utc + self.seconds, UTC)


class _Selector(selectors.DefaultSelector):  # type: ignore[misc, valid-type]
    def __init__(self, hurry: Hurry) -> None:
        super().__init__()
        self._hurry = hurry

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        return super().select(timeout if timeout is None else self._hurry.truly(timeout))


class FastLoop(asyncio.SelectorEventLoop):
    """An event loop whose seconds are shorter."""

    def __init__(self, hurry: Hurry) -> None:
        super().__init__(_Selector(hurry))
        self._hurry = hurry

    def time(self) -> float:
        return self._hurry.seconds


def main() -> None:
    until = os.environ.get("FAST_UNTIL")
    hurry = Hurry(float(os.environ["FAST_SPEED"]), None if until is None else float(until))

    class Policy(asyncio.DefaultEventLoopPolicy):
        def new_event_loop(self) -> asyncio.AbstractEventLoop:
            return FastLoop(hurry)

    asyncio.set_event_loop_policy(Policy())
    Clock.of_running_loop = staticmethod(  # type: ignore[method-assign]
        lambda: Clock(asyncio.get_running_loop().time, hurry.utcnow)
    )
    if sys.argv[1] == "run":
        cli()
    ollama, comfyui, state, gpus, nodes = sys.argv[2:]
    extras = Extras(
        busy=True,
        gpus=int(gpus),
        nodes=int(nodes),
        through_ollama=os.environ.get("THROUGH_OLLAMA"),
        through_comfyui=os.environ.get("THROUGH_COMFYUI"),
        socket=os.environ.get("VRAM_SOCKET") if "THROUGH_OLLAMA" in os.environ else None,
    )
    asyncio.run(
        serve_world(
            ollama_port=int(ollama),
            comfyui_port=int(comfyui),
            nvml_state=Path(state),
            extras=extras,
            utcnow=hurry.utcnow,
        )
    )


if __name__ == "__main__":
    main()
