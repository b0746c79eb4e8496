"""One file per vendor, joined in `all`. A vendor gives our own value type and wears nobody else's names."""

from __future__ import annotations

from typing import Protocol

from vram_manager.domain.snapshot import Gpus


class GpuSensor(Protocol):
    """Reads every GPU of this node."""

    async def read(self, *, with_processes: bool = False) -> Gpus:
        """Every GPU now. One broken card is a `Missing` inside its `Gpu`, not an error.

        `with_processes` also lists processes (about 4.5 ms a GPU under the driver's global lock,
        telemetry of an RTX 4090 laptop, MangoHud PR 2104), so it is asked rarely.
        Raises SensorError when no GPU can be read at all.
        """
        ...

    def close(self) -> None:
        """Lets the driver go. Never blocks, even when a call into the driver hangs."""
        ...
