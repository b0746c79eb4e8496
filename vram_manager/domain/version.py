"""Versions as servers tell them."""

from __future__ import annotations

import re

from vram_manager.domain.reading import Missing


def release(version: str | Missing, parts: int = 3) -> tuple[int, ...] | None:
    """The first numbers of `version`, such as (0, 30, 11) of "v0.30.11-rc1"; None: not told, or not as many."""
    found = () if isinstance(version, Missing) else re.findall(r"\d+", version)[:parts]
    return tuple(map(int, found)) if len(found) == parts else None
