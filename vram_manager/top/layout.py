"""Parts of a screen below each other: who gets how many rows, headings drawn out, long lines wrapped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text

from vram_manager.top.look import DIM, Look, cut


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Lines of which `least` should be seen. What comes first in a list of parts is cut last, and `urgent` ones later
    still: they come and go, and must not move those above them."""

    lines: Sequence[Text]
    least: int = 2
    urgent: bool = False


def natural(parts: Sequence[Part]) -> int:
    """Rows for all of it, with a gap before each part."""
    return sum(len(part.lines) + 1 for part in parts if part.lines)


def stacked(parts: Sequence[Part], width: int, room: int | None, look: Look, *, gap: bool) -> list[Text]:
    """The parts below each other with their headings drawn out; shortened where there is no room for all."""
    shown = [part for part in parts if part.lines]
    gaps = max(0, len(shown) - 1) * gap
    ranked = sorted(shown, key=lambda part: not part.urgent)
    wanted = [(len(part.lines), part.least) for part in ranked]
    rows = [most for most, _ in wanted] if room is None else shares(wanted, room - gaps)
    granted = {id(part): row for part, row in zip(ranked, rows, strict=True)}
    lines: list[Text] = []
    for part in shown:
        lines += [Text()] if gap and lines else []
        lines += drawn(part.lines, granted[id(part)], width, look)
    return lines


def shares(wanted: Sequence[tuple[int, int]], room: int) -> list[int]:
    """How many rows each gets of those it wants: first, in order, the least it is of use with, then one by one."""
    rows: list[int] = []
    for lines, least in wanted:
        first = min(lines, least)
        rows.append(first if first <= room - sum(rows) else 0)
    while sum(rows) < room:
        hungry = [number for number, (lines, _) in enumerate(wanted) if 0 < rows[number] < lines]
        if not hungry:
            break
        for number in hungry[: room - sum(rows)]:
            rows[number] += 1
    return rows


def drawn(lines: Sequence[Text], rows: int, width: int, look: Look) -> list[Text]:
    """The first `rows` of a part; its heading says how many there are beside them."""
    if not lines or rows <= 0:
        return []
    title, missing = lines[0].copy(), len(lines) - rows
    if missing > 0:
        title.append(f"  {missing} more", DIM)
    shown = [ruled(title, width, look), *lines[1:rows]]
    return [cut(line, width, look) if line.cell_len > width else line for line in shown]


def ruled(title: Text, width: int, look: Look) -> Text:
    """The heading with a rule to the end of the line."""
    left = width - title.cell_len - 1
    return title.copy().append(" " + look.rule * left, DIM) if left > 0 else cut(title, width, look)


def wrapped(line: Text, width: int) -> list[Text]:
    """The line on as many as it needs, what follows moved in as the first is."""
    plain = line.plain
    indent = min(len(plain) - len(plain.lstrip(" ")) + 2, width // 2)
    pieces: list[Text] = []
    while line.cell_len > width:
        # At the last space that fits, or anywhere.
        end = len(cut(line, width, Look(unicode=False)).plain) - 1
        at = line.plain.rfind(" ", indent + 1, end)
        at = end if at <= indent else at
        pieces.append(line[:at])
        rest = line[at:]
        rest = rest[len(rest.plain) - len(rest.plain.lstrip(" ")) :]
        line = Text(" " * indent).append(rest)
        if at <= indent:
            break
    return [*pieces, line]
