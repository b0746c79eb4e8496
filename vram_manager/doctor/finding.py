"""What was looked at, and how it is told."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

import click

from vram_manager import __version__

Verdict: TypeAlias = Literal["fine", "note", "wrong"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. A note works, with something worth knowing."""

    part: str
    verdict: Verdict
    words: str
    remedy: str | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def in_words(findings: list[Finding], *, colour: bool) -> str:
    """The findings for people."""
    marks: dict[Verdict, tuple[str, str]] = {
        "fine": ("ok", "green"),
        "note": ("note", "yellow"),
        "wrong": ("WRONG", "red"),
    }
    lines = [f"vram-manager {__version__} doctor"]
    for finding in findings:
        mark, hue = marks[finding.verdict]
        shown = click.style(f"{mark:>5}", fg=hue) if colour else f"{mark:>5}"
        lines.append(f"{shown}  {finding.part:<9} {finding.words}")
        if finding.remedy:
            lines.append(f"       {'':<9} -> {finding.remedy}")
    wrong = sum(finding.verdict == "wrong" for finding in findings)
    lines.append(f"{wrong} of {len(findings)} checks found something wrong" if wrong else "Everything works.")
    return "\n".join(lines)
