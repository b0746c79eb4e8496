"""Text for a terminal: no wider than it is, in signs that it can show, and nothing in a name can steer it."""

from __future__ import annotations

import os
import re
import shutil
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import click

# Below 60 columns tables fall apart; more than 120 a line are hard to follow with the eye.
NARROWEST, WIDEST_LINE = 60, 120
# From here on two blocks stand side by side.
TWO_BLOCKS = 148
_GAP: Final = "   "
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
_SIGNS: Final = "█▓▒░▚─·°"
_IN_ASCII: Final = str.maketrans({**dict(zip("█▓▒░▚─·…", "#=+?~-..", strict=True)), "°": ""})
# A selector of how the sign before it looks has no width of its own, and some terminals give it one.
_SELECTORS = range(0xFE00, 0xFE10)


@dataclass(frozen=True, slots=True, kw_only=True)
class Terminal:
    """`signs`: it can show the blocks that bars are drawn with. Its `encoding` says all else."""

    width: int = 80
    signs: bool = True
    colour: bool = False
    encoding: str = "utf-8"

    @staticmethod
    def of(stream: Any, environment: Mapping[str, str] = os.environ) -> Terminal:
        """What `stream` can show; COLUMNS is obeyed, and NO_COLOR (no-color.org)."""
        encoding = getattr(stream, "encoding", None) or "utf-8"
        return Terminal(
            width=max(NARROWEST, shutil.get_terminal_size().columns),
            signs=_can_say(_SIGNS, encoding),
            colour=stream.isatty() and not environment.get("NO_COLOR"),
            encoding=encoding,
        )

    def style(self, text: str, **how: Any) -> str:
        """`text` in a colour, where there are any (the arguments are click's)."""
        return click.style(text, **how) if self.colour and text else text

    def said(self, text: str) -> str:
        """`text` from outside as it can be shown: clean, and in signs that the encoding has."""
        return clean(text).encode(self.encoding, "replace").decode(self.encoding)

    def drawn(self, text: str) -> str:
        """`text` of ours with its blocks as the encoding has them."""
        return text if self.signs else text.translate(_IN_ASCII)


def _can_say(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def clean(text: object) -> str:
    """`text` on one line, without what could steer a terminal: controls, marks of direction, half characters."""
    kept = []
    for sign in unicodedata.normalize("NFC", str(text)):
        kind = unicodedata.category(sign)
        if kind in ("Cc", "Zl", "Zp"):
            kept.append(" ")
        elif kind in ("Cs", "Co", "Cn"):
            kept.append("?")
        elif kind != "Cf" and ord(sign) not in _SELECTORS:
            kept.append(sign)
    return " ".join("".join(kept).split())


def columns(text: str) -> int:
    """How many columns `text` takes; colours take none."""
    plain = _ESCAPES.sub("", text)
    return len(plain) if plain.isascii() else sum(map(_width, plain))


def _width(sign: str) -> int:
    if unicodedata.category(sign) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(sign) in "WF" else 1


def padded(text: str, width: int, *, right: bool = False) -> str:
    """`text` and as many blanks as it lacks; `right`: the blanks come first."""
    blanks = " " * max(0, width - columns(text))
    return blanks + text if right else text + blanks


def wrapped(text: str, width: int, *, indent: str = "", hanging: str | None = None) -> list[str]:
    """`text` in lines of at most `width` columns, the first after `indent`, the others after `hanging`.

    A word that is longer than a line is broken. Blanks inside a line stay as they are. For text without colours.
    """
    hanging = indent if hanging is None else hanging
    lines: list[str] = []
    line = indent
    begin = len(indent)
    for blanks, word in re.findall(r"( *)([^ ]+)", text):
        gap = blanks if len(line) > begin else ""
        if columns(line) + len(gap) + columns(word) > width and len(line) > begin:
            lines.append(line)
            line, gap = hanging, ""
            begin = len(hanging)
        line += gap
        for sign in word:
            if columns(line) + _width(sign) > width:
                lines.append(line)
                line = hanging
                begin = len(hanging)
            line += sign
    return [*lines, line] if len(line) > begin or not lines else lines


def flowed(parts: Iterable[str], width: int, *, indent: str, hanging: str | None = None, gap: str = _GAP) -> list[str]:
    """Parts with a gap between, broken between two of them; one that is too long for a line is wrapped."""
    hanging = indent if hanging is None else hanging
    lines: list[str] = []
    line = ""
    for part in filter(None, parts):
        begin = hanging if lines else indent
        if line and columns(begin) + columns(line) + columns(gap) + columns(part) <= width:
            line += gap + part
            continue
        if line:
            lines += wrapped(line, width, indent=begin, hanging=hanging)
        line = part
    return lines + wrapped(line, width, indent=hanging if lines else indent, hanging=hanging)


def table(rows: Iterable[Sequence[str]], width: int, *, indent: str, right: Sequence[int] = ()) -> list[str]:
    """Rows in columns that line up; those in `right` to the right.

    The first column gives way: what is too long for it stands on lines of its own. Where the others alone are too
    wide for a line, the cells of each row follow each other.
    """
    rows = [tuple(row) for row in rows]
    if not rows:
        return []
    widths = [max(columns(row[place]) for row in rows) for place in range(len(rows[0]))]
    others = sum(cell + 2 for cell in widths[1:] if cell)
    room = width - len(indent) - others
    if room < 4:
        return [line for row in rows for line in flowed(row, width, indent=indent, hanging=indent + "  ", gap="  ")]
    # A name that is too long does not push the numbers of the others to the edge.
    first = max((size for row in rows if (size := columns(row[0])) <= room), default=0)
    lines = []
    for row in rows:
        name = row[0]
        if columns(name) > first:
            lines += wrapped(name, width, indent=indent, hanging=indent + "  ")
            name = ""
        cells = [padded(name, first)]
        cells += [
            padded(cell, widths[place], right=place in right) for place, cell in enumerate(row[1:], 1) if widths[place]
        ]
        lines.append((indent + "  ".join(cells)).rstrip())
    return lines


def beside(blocks: list[list[str]], left: int, right: int) -> list[str]:
    """Blocks in two columns of lines, in their order, cut where both are about as long."""
    lines = [[line for block in part for line in (*block, "")][:-1] for part in _halves(blocks)]
    height = max(map(len, lines))
    first, second = ([*part, *[""] * (height - len(part))] for part in lines)
    return [f"{padded(one, left)}{_GAP}{two}".rstrip() for one, two in zip(first, second, strict=True)]


def _halves(blocks: list[list[str]]) -> tuple[list[list[str]], list[list[str]]]:
    sizes = [len(block) + 1 for block in blocks]
    cut = min(range(1, len(blocks) + 1), key=lambda at: max(sum(sizes[:at]), sum(sizes[at:])))
    return blocks[:cut], blocks[cut:]


def half(width: int) -> int:
    """How wide each of two blocks beside each other may be."""
    return min(WIDEST_LINE, (width - len(_GAP)) // 2)


def cells(sizes: Sequence[int], whole: int, width: int) -> list[int]:
    """How many of `width` cells of a bar each size gets: in proportion, at least one, together no more than there are.

    A size of 0 gets none.
    """
    if whole <= 0:
        return [0 for _ in sizes]
    exact = [max(0, size) * width / whole for size in sizes]
    given = [max(1, int(one)) if size > 0 else 0 for one, size in zip(exact, sizes, strict=True)]
    spare = min(width, round(sum(exact))) - sum(given)
    for place in sorted(range(len(sizes)), key=lambda at: int(exact[at]) - exact[at]):
        if spare > 0 and exact[place] > given[place]:
            given[place] += 1
            spare -= 1
    while sum(given) > width:
        given[given.index(max(given))] -= 1
    return given
