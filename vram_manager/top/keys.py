"""What a key does: the state of the screen before and after it, and what is to be asked of the daemon."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

# How often to look, in seconds: + and - go along these.
PACES = (0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)

_SEQUENCES = {
    b"\x1b[A": "up",
    b"\x1bOA": "up",
    b"\x1b[B": "down",
    b"\x1bOB": "down",
    b"\x1b[C": "right",
    b"\x1bOC": "right",
    b"\x1b[D": "left",
    b"\x1bOD": "left",
    b"\x1b[5~": "page up",
    b"\x1b[6~": "page down",
}
_PAGE = 10


class Panel(StrEnum):
    """What the screen shows below its head."""

    MAIN = "main"
    WHY = "why"
    EVENT = "event"
    HELP = "help"


class Wish(StrEnum):
    """What a key asks for beyond the screen."""

    QUIT = "quit"
    FREE_SOFT = "soft"
    FREE_UNLOAD = "unload"
    LOOK = "look"


@dataclass(frozen=True, slots=True, kw_only=True)
class Screen:
    """What a person has chosen. `answer` is what the daemon said to the last wish, `bad` when it was a no.

    `event` is the id of the chosen event, `asked` the id of the free that was asked for here; `awake` is False where
    nobody can press a key.
    """

    panel: Panel = Panel.MAIN
    asking: Wish | None = None
    answer: str = ""
    bad: bool = False
    asked: str | None = None
    gpu: int = 0
    event: str | None = None
    scroll: int = 0
    paused: bool = False
    seconds: float = 1.0
    awake: bool = True


def keys_in(data: bytes) -> list[str]:
    """The keys in what a terminal sent; sequences that mean nothing here are left out."""
    found: list[str] = []
    while data:
        name = next((sequence for sequence in _SEQUENCES if data.startswith(sequence)), None)
        if name is not None:
            found.append(_SEQUENCES[name])
            data = data[len(name) :]
        elif data[:2] in (b"\x1b[", b"\x1bO"):
            data = data[_length_of_sequence(data) :]
        else:
            found.append({0x1B: "escape", 0x0D: "enter", 0x0A: "enter"}.get(data[0], chr(data[0])))
            data = data[1:]
    return found


def _length_of_sequence(data: bytes) -> int:
    for number, byte in enumerate(data[2:], start=3):
        if 0x40 <= byte <= 0x7E:
            return number
    return len(data)


def pressed(screen: Screen, key: str, *, gpus: int, events: Sequence[str], furthest: int) -> tuple[Screen, Wish | None]:
    """The screen after `key`, and what it asks for.

    `events` are the ids that can be chosen, oldest first; `furthest` is how far a panel can be scrolled.
    """
    if screen.asking is not None:
        wish = screen.asking if key in ("y", "Y") else None
        return replace(screen, asking=None, answer="" if wish else "nothing was asked", bad=False), wish
    # An answer has been read by whoever goes on.
    screen = replace(screen, answer="", bad=False)
    match key:
        case "q" | "\x03":
            return screen, Wish.QUIT
        case "f" | "u":
            asking = Wish.FREE_SOFT if key == "f" else Wish.FREE_UNLOAD
            return replace(screen, asking=asking), None
        case "p" | " ":
            return replace(screen, paused=not screen.paused), Wish.LOOK
        case "+" | "=":
            faster = [pace for pace in PACES if pace < screen.seconds]
            return replace(screen, seconds=faster[-1] if faster else screen.seconds), Wish.LOOK
        case "-":
            slower = [pace for pace in PACES if pace > screen.seconds]
            return replace(screen, seconds=slower[0] if slower else screen.seconds), None
        case "w" | "?" | "h":
            panel = Panel.WHY if key == "w" else Panel.HELP
            return replace(screen, panel=Panel.MAIN if screen.panel is panel else panel, scroll=0), Wish.LOOK
        case "escape" | "\x7f":
            gone = screen.event if screen.panel is not Panel.MAIN else None
            return replace(screen, panel=Panel.MAIN, event=gone, scroll=0), None
    return _moved(screen, key, gpus, events, furthest)


def _moved(screen: Screen, key: str, gpus: int, events: Sequence[str], furthest: int) -> tuple[Screen, Wish | None]:
    step = {"up": -1, "k": -1, "down": 1, "j": 1, "page up": -_PAGE, "page down": _PAGE}.get(key)
    if key == "enter" and screen.panel is Panel.EVENT:
        return replace(screen, panel=Panel.MAIN, scroll=0), None
    if key == "enter" and screen.event in events:
        return replace(screen, panel=Panel.EVENT, scroll=0), Wish.LOOK
    if key in ("g", "right", "left") and gpus:
        return replace(screen, gpu=(screen.gpu + (-1 if key == "left" else 1)) % gpus), None
    if step is not None and screen.panel is not Panel.MAIN:
        return replace(screen, scroll=max(0, min(furthest, screen.scroll + step))), None
    if step is not None and events:
        # The newest stands on top, so down is to older ones.
        at = events.index(screen.event) - step if screen.event in events else len(events) - 1
        return replace(screen, event=events[max(0, min(len(events) - 1, at))]), None
    return screen, None
