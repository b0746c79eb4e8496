"""Looks at the GPUs again and again, on a thread of its own, until it is told that the command has ended."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Final

from vram_manager.errors import SensorError
from vram_manager.record.sources import Source
from vram_manager.record.timeline import Look, Sample, Series, Unread

# A command waits that long for the look before it. The first init of a driver takes up to 1.5 s.
FIRST_LOOK_SECONDS: Final = 5.0
# Who waits for a driver that hangs learns nothing more.
_LAST_LOOK_SECONDS: Final = 2.0
# Under the driver's global lock a list of processes takes some ms: it must not disturb what it looks at.
_PROCESSES_EVERY_SECONDS: Final = 1.0


class Recorder:
    """Asks the first of `sources` that answers; should it be lost, the next that knows the same GPUs (by UUID).

    The first look is over when `start` returns, the last one is made after `stop` was called. `write` gets every
    sample and `say` a sentence for a person, both on the recorder's thread. `gpu` is an index or UUID, None for all.
    Who failed is left alone for `ask_again_seconds`.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        interval_seconds: float,
        gpu: str | None,
        write: Callable[[Sample], None],
        say: Callable[[str], None],
        ask_again_seconds: float = 1.0,
    ) -> None:
        self.series: dict[str, Series] = {}
        self.not_read: list[str] = []
        self.not_there: str | None = None
        self.command_pid: int | None = None
        self._sources = sources
        self._interval_seconds = interval_seconds
        self._gpu = gpu
        self._ask_again_seconds = ask_again_seconds
        self._write, self._say = write, say
        self._thread = threading.Thread(target=self._work, name="recorder", daemon=True)
        self._looked = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        self.began_at = datetime.now(UTC)
        self._zero: float | None = None
        self._processes_at = 0.0
        self._ask_again_at: dict[int, float] = {}
        self._said_lost = False

    def start(self) -> None:
        """Everybody was asked once, or is taking too long. `not_there` says why `gpu` is none of the GPUs."""
        self._thread.start()
        self._looked.wait(FIRST_LOOK_SECONDS)
        self._begin()

    def stop(self) -> None:
        """The last look is made, or takes too long."""
        stopped = time.monotonic()
        if self._loop is not None:
            with suppress(RuntimeError):  # it has ended already
                self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(_LAST_LOOK_SECONDS)
        for series in self.series.values():
            series.end(stopped - self._begin())

    def _begin(self) -> float:
        """From here on the seconds count, once and for all."""
        if self._zero is None:
            self._zero, self.began_at = time.monotonic(), datetime.now(UTC)
        return self._zero

    def _work(self) -> None:
        try:
            with asyncio.Runner() as runner:
                self._loop = runner.get_loop()
                runner.run(self._record())
        finally:
            self._looked.set()

    async def _record(self) -> None:
        try:
            while True:
                last = self._stop.is_set()
                began = time.monotonic()  # the loop's own clock
                rest_seconds = await self._look(began)
                self._looked.set()
                if last or self.not_there is not None:
                    break
                # From beginning to beginning, so that the pace is what was asked for.
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(began + max(self._interval_seconds, rest_seconds)):
                        await self._stop.wait()
        finally:
            for source in self._sources:
                await source.close()

    async def _look(self, began: float) -> float:
        """Asks whoever can be asked now; how long that one is then left alone, seconds."""
        pid = self.command_pid if began - self._processes_at >= _PROCESSES_EVERY_SECONDS else None
        failed = []
        for place, source in enumerate(self._sources):
            if began < self._ask_again_at.get(place, began):
                continue
            try:
                found = self._same(await source.look(pid), source)
            except SensorError as error:
                failed.append(f"{source.name}: {error.why}")
                self._ask_again_at[place] = time.monotonic() + self._ask_again_seconds
                continue
            if pid is not None:
                self._processes_at = began
            self._note(found, began, time.monotonic())
            return source.rest_seconds
        if failed and not self.series:
            self.not_read = failed
        for series in self.series.values():
            self._lose(series, failed[0] if failed else "")
        return 0.0

    def _same(self, found: tuple[Look | Unread, ...], source: Source) -> tuple[Look | Unread, ...]:
        """Those that were asked for. Once there are samples, only GPUs that they are of: one series, one meaning."""
        wanted = tuple(one for one in found if self._gpu is None or self._gpu in (str(one.index), one.uuid))
        if found and not wanted and not self.series:
            there = ", ".join(str(one.index) + (f" ({one.name})" if isinstance(one, Look) else "") for one in found)
            self.not_there = f"--gpu {self._gpu}: {source.name} shows no such GPU; it has {there}"
            self.not_read = [self.not_there]
        if self.series:
            wanted = tuple(one for one in wanted if one.uuid in self.series)
        if found and self.not_there is None and not any(isinstance(one, Look) for one in wanted):
            unread = [one.why for one in wanted if isinstance(one, Unread)]
            raise SensorError(unread[0] if unread else "it does not tell of the same GPU")
        return wanted

    def _note(self, found: tuple[Look | Unread, ...], began: float, ended: float) -> None:
        zero = self._begin()
        at, seconds = datetime.now(UTC), max(0.0, ended - zero)
        for look in found:
            if isinstance(look, Unread):
                continue
            series = self.series.get(look.uuid)
            if series is None:
                series = self.series[look.uuid] = Series(look)
            series.add(look, began - look.age_seconds - zero, seconds)
            self._write(Sample(at=at, seconds=seconds, index=look.index, look=look))
        whys = {one.uuid: one.why if isinstance(one, Unread) else None for one in found}
        for uuid, series in self.series.items():
            if found and (why := whys.get(uuid, "it is not there any more")) is not None:
                self._lose(series, why)

    def _lose(self, series: Series, why: str) -> None:
        """A gap begins, unless it has begun already. Said once for the whole recording."""
        if not series.lose(why):
            return
        index, seconds = series.newest.index, time.monotonic() - self._begin()
        self._write(Sample(at=datetime.now(UTC), seconds=seconds, index=index, look=None))
        if not self._said_lost:
            self._said_lost = True
            self._say(f"the memory of GPU {index} cannot be read any more, the recording has a gap: {why}")
