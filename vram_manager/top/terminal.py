"""The real terminal: a screen of our own on it, keys as they come, and everything as it was when we are gone."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import termios
import tty
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

from rich.color import ColorSystem
from rich.console import Console
from rich.segment import Segment
from rich.text import Text

from vram_manager.top.keys import keys_in

# The other screen, no cursor, no wrapping: a terminal that counts a character wider than we do spoils one line only.
_ENTER = "\x1b[?1049h\x1b[?25l\x1b[?7l\x1b[2J"
_LEAVE = "\x1b[0m\x1b[?7h\x1b[?25h\x1b[?1049l"
# Terminals that know it show the lines between these at once; the others ignore it.
_BEGIN, _END = "\x1b[?2026h", "\x1b[?2026l"
# How long the rest of a sequence may take that began with Esc.
_ESCAPE_SECONDS = 0.03
_ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class Terminal:
    """A context: inside it the screen is ours. Signals that end the program raise SystemExit, in it."""

    def __init__(self, *, keys: bool) -> None:
        self._out = sys.stdout.fileno()
        self._in = sys.stdin.fileno() if keys else None
        self._encoding = sys.stdout.encoding
        self._paint = Painter(Console(file=sys.stdout))
        self._before: list[Any] | None = None
        self._handlers: dict[int, Any] = {}
        self._shown: list[str] = []
        self._stale = False
        self._woken, self._wake = os.pipe()
        for end in (self._woken, self._wake):
            os.set_blocking(end, False)

    def __enter__(self) -> Terminal:
        for number, handler in (
            *((int(number), self._end) for number in _ENDING),
            (int(signal.SIGINT), signal.default_int_handler),
            (int(signal.SIGWINCH), self._resized),
            (int(signal.SIGTSTP), self._pause),
        ):
            self._handlers[number] = signal.signal(number, handler)
        try:
            self._take()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for number in (*_ENDING, signal.SIGINT):
            # A second one must not come between the person and their terminal.
            signal.signal(number, signal.SIG_IGN)
        self._give_back()
        for handled, handler in self._handlers.items():
            signal.signal(handled, handler)
        for end in (self._woken, self._wake):
            os.close(end)

    def size(self) -> tuple[int, int]:
        """Columns and rows; 80 x 24 where the terminal does not tell."""
        columns, rows = os.get_terminal_size(self._out)
        return columns or 80, rows or 24

    def wake(self) -> None:
        """Ends a `keys` that waits; from any thread."""
        with contextlib.suppress(OSError):
            os.write(self._wake, b"!")

    def keys(self, seconds: float) -> list[str]:
        """What is pressed until something is, somebody wakes us or the time is over."""
        sources = [self._woken] if self._in is None else [self._woken, self._in]
        ready, _, _ = select.select(sources, [], [], max(0.0, seconds))
        if self._woken in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(self._woken, 4096)
        return self._pressed() if self._in in ready else []

    def draw(self, lines: Iterable[Text], width: int) -> None:
        """Shows these lines from the top; what has not changed is not written."""
        # At the end of a full line the cursor stands on its last cell, and would erase that.
        painted = [self._paint(line) + ("\x1b[K" if line.cell_len < width else "") for line in lines]
        if self._stale:
            # Everything is drawn over what is there: to clear it first would flicker.
            self._stale, self._shown = False, []
        changed = [
            f"\x1b[{number};1H{line}"
            for number, line in enumerate(painted, start=1)
            if number > len(self._shown) or self._shown[number - 1] != line
        ]
        self._shown = painted
        if changed:
            self._write(f"{_BEGIN}{''.join(changed)}{_END}")

    def _pressed(self) -> list[str]:
        assert self._in is not None
        data = b""
        with contextlib.suppress(OSError):
            data = os.read(self._in, 1024)
        if not data:
            # The terminal was closed.
            raise SystemExit(0)
        if data.endswith((b"\x1b", b"\x1b[", b"\x1bO")) and select.select([self._in], [], [], _ESCAPE_SECONDS)[0]:
            data += os.read(self._in, 1024)
        return keys_in(data)

    def _take(self) -> None:
        if self._in is not None:
            self._before = termios.tcgetattr(self._in)
            tty.setcbreak(self._in, termios.TCSANOW)
        self._stale = True
        self._write(_ENTER)

    def _give_back(self) -> None:
        # Who has closed the terminal needs nothing back.
        with contextlib.suppress(OSError):
            self._write(_LEAVE)
        with contextlib.suppress(termios.error):
            if self._in is not None and self._before is not None:
                termios.tcsetattr(self._in, termios.TCSANOW, self._before)

    def _write(self, text: str) -> None:
        data = text.encode(self._encoding, "replace")
        while data:
            data = data[os.write(self._out, data) :]

    def _end(self, number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    def _resized(self, _number: int, _frame: FrameType | None) -> None:
        self._stale = True
        self.wake()

    def _pause(self, _number: int, _frame: FrameType | None) -> None:
        """Ctrl-Z: the shell gets its terminal as it was, and `fg` brings the screen back."""
        self._give_back()
        os.kill(os.getpid(), signal.SIGSTOP)
        self._take()
        self.wake()


class Painter:
    """A line as what a terminal of this kind is sent."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._system: ColorSystem | None = None
        if console.color_system is not None:
            names = {"standard": ColorSystem.STANDARD, "256": ColorSystem.EIGHT_BIT, "truecolor": ColorSystem.TRUECOLOR}
            self._system = names.get(console.color_system, ColorSystem.STANDARD)

    def __call__(self, line: Text) -> str:
        segments: Iterable[Segment] = line.render(self._console)
        if self._console.no_color:
            segments = Segment.remove_color(segments)
        return "".join(self._painted(segments))

    def _painted(self, segments: Iterable[Segment]) -> Iterator[str]:
        for segment in segments:
            if segment.style is None:
                yield segment.text
            else:
                yield segment.style.render(segment.text, color_system=self._system)
