"""How things look: colours, letters and glyphs. Every tenant has a letter, so that nothing is told by colour alone."""

from __future__ import annotations

import string
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rich.cells import cell_len
from rich.style import Style
from rich.text import Text

PLAIN = Style.null()
BOLD = Style(bold=True)
DIM = Style(dim=True)
GOOD, WARN, BAD = Style(color="green"), Style(color="yellow"), Style(color="red", bold=True)
TITLE = Style(color="cyan", bold=True)
CHOSEN = Style(reverse=True)

# Apart from each other also for people who cannot tell red from green (after Okabe and Ito).
_COLOURS = {
    "ollama": ("#56b4e9", "#0072b2", "#8fd0f5", "#3f7fbf"),
    "comfyui_in_use": ("#e69f00",),
    "comfyui_cached": ("#f0e442",),
    "comfyui_unseen": ("#d55e00",),
    "worker": ("#009e73", "#66cdaa"),
    "process": ("#cc79a7", "#b39ddb"),
    "others": ("#999999",),
}
_OWN_LETTERS = {"comfyui_in_use": "C", "comfyui_cached": "c", "comfyui_unseen": "u", "others": "?"}
_LETTERS = [letter for letter in string.ascii_uppercase + string.ascii_lowercase + string.digits if letter not in "Ccu"]
# For whoever comes when there is no letter left.
NO_LETTER = "+"


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What the terminal can show: `unicode` glyphs or ASCII only; colours or none."""

    unicode: bool = True
    colour: bool = True

    @property
    def sparks(self) -> str:
        """From a little to full, in equal steps."""
        return "▁▂▃▄▅▆▇█" if self.unicode else ".:-=+*#@"

    @property
    def free(self) -> str:
        return "·" if self.unicode else "."

    @property
    def leased(self) -> str:
        """Promised and not taken yet."""
        return "░" if self.unicode else "="

    @property
    def threshold(self) -> str:
        return "┆" if self.unicode else "|"

    @property
    def hard_limit(self) -> str:
        return "┃" if self.unicode else "!"

    @property
    def more(self) -> str:
        """Stands for what was cut off."""
        return "…" if self.unicode else "~"

    @property
    def rule(self) -> str:
        return "─" if self.unicode else "-"

    @property
    def chosen(self) -> str:
        return "▶" if self.unicode else ">"

    @property
    def degrees(self) -> str:
        return "°C" if self.unicode else " C"

    @property
    def becomes(self) -> str:
        return "→" if self.unicode else "->"


def clean(text: object) -> str:
    """Text from outside as what a terminal can be given: one line, no control or direction characters, nothing that
    has no width of its own."""
    return "".join(
        character if character.isprintable() else "?"
        for character in unicodedata.normalize("NFC", str(text))
        if not character.isprintable() or cell_len(character) > 0
    )


def letters(tenants: Iterable[tuple[str, str]], before: Mapping[str, str]) -> dict[str, str]:
    """A letter for each of these (kind, tenant); who had one `before` keeps it, those who are gone give theirs back."""
    present = dict.fromkeys(tenants)
    kept = {tenant: before[tenant] for _, tenant in present if before.get(tenant, NO_LETTER) != NO_LETTER}
    left = iter([letter for letter in _LETTERS if letter not in set(kept.values())])
    return {tenant: _OWN_LETTERS.get(kind) or kept.get(tenant) or next(left, NO_LETTER) for kind, tenant in present}


def colour(kind: str, letter: str) -> str:
    """The colour of a tenant: a family for its kind, one of it by its letter."""
    family = _COLOURS.get(kind, _COLOURS["others"])
    return family[ord(letter) % len(family)]


def styled(words: str, style: Style | str) -> Text:
    """Words that alone have this style: what is appended to them does not."""
    return Text().append(words, style)


def on_colour(kind: str, letter: str) -> Style:
    """How a tenant is painted, with letters that can be read on it."""
    painted = colour(kind, letter)
    red, green, blue = (int(painted[at : at + 2], 16) for at in (1, 3, 5))
    light = 0.299 * red + 0.587 * green + 0.114 * blue > 110
    return Style(color="#000000" if light else "#ffffff", bgcolor=painted, bold=True)


def cut(text: Text | str, width: int, look: Look, *, right: bool = False) -> Text:
    """Exactly so many cells: cut with a sign that it was, or filled with spaces, on the left for numbers (`right`)."""
    line = Text(text) if isinstance(text, str) else text.copy()
    if width <= 0:
        return Text()
    if line.cell_len > width:
        line.truncate(width - 1, overflow="crop")
        line.append(look.more)
    missing = width - line.cell_len
    (line.pad_left if right else line.pad_right)(missing)
    return line


def heading(title: str, look: Look, note: str = "") -> Text:
    """The first line of a part. It is drawn to the end of the line by whoever knows how wide that is."""
    line = styled(clean(title), TITLE)
    if note:
        line.append(f"  {clean(note)}", style=DIM)
    return line


def size(size_bytes: float | None) -> str:
    """5.8 GiB; a question mark for what is not known."""
    return "?" if size_bytes is None else f"{size_bytes / 2**30:.1f} GiB"


def duration(seconds: float, *, short: bool = False) -> str:
    """How long, in the two largest units: 32 s, 4 min 05 s, 3 h 12 min, 2 d 4 h; `short` for tables: 4m05s."""
    whole = max(0, int(seconds))
    if whole < 60:
        words = f"{whole} s"
    elif whole < 3600:
        words = f"{whole // 60} min {whole % 60:02} s"
    elif whole < 86_400:
        words = f"{whole // 3600} h {whole % 3600 // 60:02} min"
    else:
        words = f"{whole // 86_400} d {whole % 86_400 // 3600} h"
    return words.replace("min", "m").replace(" ", "") if short else words
