"""The two times: the loop's monotonic clock decides, the wall clock only dates what is told.

A wall clock that jumps (NTP, suspend, a person) therefore changes no decision.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime


@dataclass(frozen=True, slots=True)
class Clock:
    """Handed in by `daemon`; nobody else asks what time it is."""

    monotonic: Callable[[], float]
    utcnow: Callable[[], datetime]

    @staticmethod
    def of_running_loop() -> Clock:
        return Clock(asyncio.get_running_loop().time, lambda: datetime.now(UTC))
