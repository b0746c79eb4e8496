"""A frame as a picture, for documents."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from vram_manager.top.frame import frame
from vram_manager.top.keys import Screen
from vram_manager.top.look import Look
from vram_manager.top.seen import Heard, Seen


def picture(
    snapshot: Mapping[str, Any],
    *,
    health: Mapping[str, Any],
    events: Sequence[Mapping[str, Any]] = (),
    history: Mapping[str, Any] | None = None,
    now: float,
    width: int = 100,
    height: int = 30,
) -> str:
    """What `top` shows of these answers of the daemon, as SVG of `width` x `height` cells. `now` in epoch seconds."""
    heard = Heard(health=dict(health), snapshot=dict(snapshot), events=[dict(event) for event in events])
    seen = Seen().heard(heard)
    if history is not None:
        seen = seen.with_history(dict(history))
    console = Console(
        record=True,
        file=io.StringIO(),
        force_terminal=True,
        color_system="truecolor",
        width=width,
        legacy_windows=False,
    )
    for line in frame(seen, Screen(), Look(), width=width, height=height, now=now):
        console.print(line, no_wrap=True, overflow="crop", highlight=False, markup=False)
    drawn = console.export_svg(title="vram-manager top", unique_id="vram-top")
    # No font from somebody else's server: a document is to look the same without a network.
    return re.sub(r"@font-face\s*\{.*?\}\s*", "", drawn, flags=re.DOTALL)
