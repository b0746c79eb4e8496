"""What every test needs."""

from __future__ import annotations

import asyncio
import os

import pytest


def pytest_configure() -> None:
    """looptime asks for the current event loop before each test; where none was ever set, Python 3.11 makes one,
    and nobody closes it."""
    asyncio.set_event_loop(None)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Real servers are tested by one after the other: two frees at once would prove nothing."""
    return 1 if os.environ.get("OLLAMA_URL") or os.environ.get("COMFYUI_URL") else None
