"""What every test needs."""

from __future__ import annotations

import asyncio


def pytest_configure() -> None:
    """looptime asks for the current event loop before each test; where none was ever set, Python 3.11 makes one,
    and nobody closes it."""
    asyncio.set_event_loop(None)
