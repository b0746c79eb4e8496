"""AMD's memory as amd-smi or rocm-smi tell it: asked only where the kernel's own files tell nothing.

Both are slow (an interpreter each time), so an answer stands for some seconds, and each has a deadline.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from typing import Any, Final

from vram_manager.domain.reading import Missing
from vram_manager.domain.snapshot import GpuMemory
from vram_manager.gpus.amd import NO_RESERVE

DEADLINE_SECONDS: Final = 3.0
STANDS_SECONDS, NOTHING_STANDS_SECONDS = 10.0, 60.0

_COMMANDS: Final = {
    "amd-smi": ("metric", "--mem-usage", "--json"),
    "rocm-smi": ("--showmeminfo", "vram", "--json"),  # deprecated for the other, and still what older ROCm has
}
_CARD: Final = re.compile(r"card\d{1,3}", re.ASCII)
# amd-smi's "MB" is 2^20: it shifts bytes by 20 bits (amdsmi_commands.py).
_UNITS: Final = {"B": 1, "KB": 2**10, "MB": 2**20, "GB": 2**30}


class AmdTools:
    """Asks the first of the tools that is on the PATH."""

    def __init__(self, path: str | None = None, *, deadline_seconds: float = DEADLINE_SECONDS) -> None:
        self._deadline_seconds = deadline_seconds
        self.name = "amd-smi"
        self._path = path
        self._asked_at: float | None = None
        self._answer: list[GpuMemory | Missing] = []

    def memories(self, now: float) -> list[GpuMemory | Missing]:
        """The memory of each card in the tool's order, some seconds old; [] where no tool answers."""
        stands = STANDS_SECONDS if self._answer else NOTHING_STANDS_SECONDS
        if self._asked_at is None or now - self._asked_at >= stands:
            self._asked_at = now
            self._answer = self._ask()
        return self._answer

    def _program(self) -> tuple[str, str] | None:
        found = ((name, shutil.which(name, path=self._path)) for name in _COMMANDS)
        return next(((name, program) for name, program in found if program is not None), None)

    def _ask(self) -> list[GpuMemory | Missing]:
        tool = self._program()
        if tool is None:
            return []
        self.name, program = tool
        try:
            done = subprocess.run(
                [program, *_COMMANDS[self.name]],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=self._deadline_seconds,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return []
        text = done.stdout.decode(errors="replace")
        return parse_amd_smi(text) if self.name == "amd-smi" else parse_rocm_smi(text)


def parse_amd_smi(text: str) -> list[GpuMemory | Missing]:
    """ROCm 6 gives a list, ROCm 7 {"gpu_data": [...]}; any value may be "N/A", and warnings may come first."""
    body = _json(text)
    entries = body.get("gpu_data") if isinstance(body, dict) else body
    usages = [
        entry.get("mem_usage") if isinstance(entry, dict) else None
        for entry in (entries if isinstance(entries, list) else ())
    ]
    return [
        _memory(_size(usage.get("total_vram")), _size(usage.get("used_vram")), "amd-smi")
        if isinstance(usage, dict)
        else Missing("amd-smi tells no memory")
        for usage in usages
    ]


def parse_rocm_smi(text: str) -> list[GpuMemory | Missing]:
    """{"card0": {"VRAM Total Memory (B)": "21458059264", ...}}: values are strings; "system" may stand beside."""
    body = _json(text)
    if not isinstance(body, dict):
        return []
    cards = (
        (int(name.removeprefix("card")), card)
        for name, card in body.items()
        if _CARD.fullmatch(name) and isinstance(card, dict)
    )
    return [
        _memory(_whole(card.get("VRAM Total Memory (B)")), _whole(card.get("VRAM Total Used Memory (B)")), "rocm-smi")
        for _, card in sorted(cards, key=lambda one: one[0])
    ]


def _memory(total: int | None, used: int | None, tool: str) -> GpuMemory | Missing:
    if not total or used is None:
        return Missing(f"{tool} tells no memory")
    if used > total:
        return Missing(f"{tool} contradicts itself: {total} bytes in total, {used} used")
    return GpuMemory(total_bytes=total, used_bytes=used, free_bytes=total - used, reserved_bytes=NO_RESERVE)


def _size(told: Any) -> int | None:
    """{"value": 24560, "unit": "MB"} in bytes."""
    if not isinstance(told, dict):
        return None
    value, unit = _whole(told.get("value")), _UNITS.get(str(told.get("unit")))
    return None if value is None or unit is None else value * unit


def _whole(told: Any) -> int | None:
    """A number of bytes, as a number or as text; None for "N/A", a fraction or less than nothing."""
    if isinstance(told, str):
        return int(told) if told.isascii() and told.isdigit() and len(told) < 20 else None
    return told if isinstance(told, int) and not isinstance(told, bool) and told >= 0 else None


def _json(text: str) -> Any:
    """The first JSON object, or list of such, that begins a line of `text`: warnings come before it."""
    decoder = json.JSONDecoder()
    for place, character in enumerate(text):
        if character in "[{" and (place == 0 or text[place - 1] == "\n"):
            try:
                body, _ = decoder.raw_decode(text, place)
            except (ValueError, RecursionError):
                continue
            if isinstance(body, dict) or (isinstance(body, list) and all(isinstance(one, dict) for one in body)):
                return body
    return None
