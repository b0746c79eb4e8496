"""A container that lost its GPU device ends, so that its restart brings the device back."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest

from vram_manager.daemon import device_revoked

pytestmark = [pytest.mark.asyncio, pytest.mark.looptime]


@dataclass
class Sensor:
    revoked: bool


async def test_the_first_process_of_a_container_leaves_half_a_minute_after_its_device_was_revoked(looptime) -> None:
    await device_revoked(Sensor(revoked=True), pid=1)

    assert looptime == 30


@pytest.mark.parametrize(
    ("revoked", "pid"),
    [
        pytest.param(True, 4711, id="not the first process: nobody starts it again"),
        pytest.param(False, 1, id="the device is there, or never was"),
    ],
)
async def test_otherwise_it_stays(revoked: bool, pid: int) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(3600):
            await device_revoked(Sensor(revoked=revoked), pid)


async def test_a_device_that_is_back_at_the_second_look_keeps_it_alive() -> None:
    sensor = Sensor(revoked=True)
    waiting = asyncio.create_task(device_revoked(sensor, pid=1))
    await asyncio.sleep(20)
    sensor.revoked = False
    await asyncio.sleep(3600)

    assert not waiting.done()
    waiting.cancel()
