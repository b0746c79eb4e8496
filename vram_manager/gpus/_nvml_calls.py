"""The life of NVML in this process, as plain blocking code for one thread: opened once and held.

It is opened anew, ever more rarely, after errors that need it, and let go of while the GPUs may sleep.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final

from vram_manager.domain.reading import Missing
from vram_manager.domain.snapshot import Gpu, GpuMemory, Gpus
from vram_manager.errors import SensorError
from vram_manager.gpus._files import PciGpu, device_id
from vram_manager.gpus._nvml_asks import Asks
from vram_manager.gpus._nvml_cards import Cards
from vram_manager.gpus._nvml_codes import BLOCKED, RENEWING, RESTART, Code, meaning
from vram_manager.gpus.sleep import ASLEEP, Sleep

FIRST_WAIT_SECONDS: Final = 1.0
LONGEST_WAIT_SECONDS: Final = 30.0  # an init can be a full bring-up: 1.5 s (system76-power issue 492)


class NvmlCalls:
    """NVML, initialised once and held; initialised anew, ever more rarely, after errors that need it."""

    def __init__(self, proc_root: Path, sys_root: Path, *, gpu_sleep: bool) -> None:
        self.revoked = False
        self.known: tuple[Gpu, ...] = ()
        self._asks = Asks()
        self._cards = Cards(self._asks, proc_root)
        self._sleep = Sleep(sys_root, proc_root) if gpu_sleep else None
        self._worked = False
        self._retry_at: float | None = None
        self._wait = FIRST_WAIT_SECONDS
        self._refusal = Missing("NVML was not asked yet")

    def wake(self) -> None:
        """The next sweep touches the GPUs even where they sleep."""
        if self._sleep is not None:
            self._sleep.wake()

    def sweep(self, now: float, *, with_processes: bool) -> Gpus:
        """Every GPU at `now`. Raises SensorError when NVML cannot be opened or shows none."""
        if self._sleep is not None and (why := self._sleep.before(now)) is not None:
            self._asks.shutdown()
            return self._at_rest(why, self._sleep.devices)
        self._ensure_open(now)
        nvml = self._asks.nvml
        self._asks.renew = False
        try:
            count = int(nvml.nvmlDeviceGetCount())
        except nvml.NVMLError as error:
            if error.value in RENEWING:
                raise self._refuse(meaning(error.value), now) from error
            said = meaning(error.value)
            raise SensorError(f"NVML does not count its GPUs: {said.why}", said.remedy) from error
        if count == 0:
            raise self._refuse(Missing("NVML counts 0 GPUs", RESTART), now)
        gpus = self._cards.read(count, with_processes=with_processes)
        if not gpus:
            said = meaning(Code.NO_PERMISSION)
            raise SensorError(f"none of {count} GPUs can be opened: {said.why}", said.remedy)
        blocked = [gpu.memory for gpu in gpus if isinstance(gpu.memory, Missing) and gpu.memory in BLOCKED]
        if len(blocked) == len(gpus):
            raise self._refuse(blocked[0], now)
        self._settle(now, read_something=any(isinstance(gpu.memory, GpuMemory) for gpu in gpus))
        self.known = gpus
        if self._sleep is not None:
            self._sleep.after(now, gpus)
        return Gpus(gpus=gpus, driver_version=self._cards.driver_version)

    def shutdown(self) -> None:
        """Lets the driver go."""
        self._asks.shutdown()

    def _at_rest(self, why: Missing, devices: list[PciGpu]) -> Gpus:
        """The GPUs that are not read, as they were known; by their PCI address where they never were."""
        gpus = self.known if len(self.known) == len(devices) else unread(devices)
        asleep = why is ASLEEP
        return Gpus(
            gpus=tuple(without_reading(gpu, why, asleep=asleep) for gpu in gpus),
            driver_version=self._cards.driver_version,
        )

    def _ensure_open(self, now: float) -> None:
        """NVML is initialised; a new init that is due has been done, one that is not due is refused."""
        self._asks.load()
        if self._retry_at is not None:
            if now >= self._retry_at:
                self._asks.shutdown()
            elif not self._asks.is_open:
                raise SensorError(self._refusal.why, self._refusal.remedy)
        if self._asks.is_open:
            return
        try:
            self._asks.init()
        except self._asks.nvml.NVMLError as error:
            raise self._refuse(meaning(error.value), now) from error
        self._retry_at = None
        self._cards.begin()

    def _refuse(self, said: Missing, now: float) -> SensorError:
        """NVML is let go until the wait is over, and until then every read gets this same answer."""
        self._asks.shutdown()
        self._renew_later(now)
        self._refusal = said
        self.revoked = self._worked and said in BLOCKED
        return SensorError(said.why, said.remedy)

    def _settle(self, now: float, *, read_something: bool) -> None:
        """A lost card leaves NVML open for the others, with a new init due; a clean sweep cancels it."""
        self.revoked = False
        self._worked = self._worked or read_something
        if self._asks.renew:
            self._renew_later(now)
        else:
            self._retry_at = None
            self._wait = FIRST_WAIT_SECONDS

    def _renew_later(self, now: float) -> None:
        if self._retry_at is None or self._retry_at <= now:
            self._retry_at = now + self._wait
            self._wait = min(LONGEST_WAIT_SECONDS, 2 * self._wait)


def unread(devices: list[PciGpu]) -> tuple[Gpu, ...]:
    """NVIDIA's GPUs of which nothing is known but that they are there."""
    unknown = Missing("not read yet")
    return tuple(
        Gpu(
            uuid=device.slot,
            index=place,
            name=f"NVIDIA GPU {device_id(device)}",
            memory=unknown,
            utilization_percent=unknown,
            source="PCI",
        )
        for place, device in enumerate(devices)
    )


def without_reading(gpu: Gpu, why: Missing, *, asleep: bool = False) -> Gpu:
    """The same GPU, of which nothing is known just now."""
    return replace(
        gpu,
        memory=why,
        utilization_percent=why,
        temperature_celsius=why,
        power_watts=why,
        processes=why,
        listed_free_bytes=None,
        asleep=asleep,
    )
