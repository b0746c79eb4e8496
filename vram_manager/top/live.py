"""The verb: a frame, the keys, what the daemon says, and the next frame."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from dataclasses import replace
from queue import Empty

from rich.console import Console

from vram_manager.top.frame import frame, furthest
from vram_manager.top.keys import Panel, Screen, Wish, pressed
from vram_manager.top.look import Look, clean, size
from vram_manager.top.seen import Heard, Seen
from vram_manager.top.terminal import Painter, Terminal
from vram_manager.top.watch import Answered, Broken, Silent, Watch, history, look

# A second silent moment is a daemon that starts; what is older is said.
PATIENCE_SECONDS = 3.0
# The picture has a clock and counts seconds, so it is drawn again also when there is no news.
REDRAW_SECONDS = 1.5
WHY_DECISIONS, ALL_DECISIONS = 60, 500


def run(*, once: bool, seconds: float, ascii_only: bool) -> None:
    """Draws until somebody quits; one frame when `once`, or where nothing can be drawn again. Raises Unreachable."""
    first = look(None, 0)
    now = time.time()
    seen = Seen().heard(first).with_history(history(now))
    dumb = os.environ.get("TERM", "dumb") in ("dumb", "unknown", "")
    if once or dumb or not sys.stdout.isatty():
        _print(seen, ascii_only)
        return
    keys = sys.stdin is not None and sys.stdin.isatty()
    screen = Screen(seconds=seconds, awake=keys)
    with Terminal(keys=keys) as terminal, contextlib.suppress(KeyboardInterrupt):
        Live(terminal, seen, screen, ascii_only).run()


def _look(console: Console, ascii_only: bool) -> Look:
    colour = console.is_terminal and not console.no_color and console.color_system is not None
    return Look(unicode=not ascii_only and _can_draw(sys.stdout.encoding), colour=colour)


def _can_draw(encoding: str | None) -> bool:
    try:
        "▁█░┃┆▶…─°→↑".encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _print(seen: Seen, ascii_only: bool) -> None:
    """One frame as text, as long as it needs to be."""
    console = Console(file=sys.stdout)
    paint = Painter(console)
    width = shutil.get_terminal_size((100, 24)).columns
    lines = frame(seen, Screen(awake=False), _look(console, ascii_only), width=width, height=None, now=time.time())
    text = "".join(f"{paint(line).rstrip()}\n" for line in lines)
    sys.stdout.buffer.write(text.encode(sys.stdout.encoding, "replace"))
    sys.stdout.flush()


class Live:
    """What is seen and what is chosen, and the loop that keeps both on the screen."""

    def __init__(self, terminal: Terminal, seen: Seen, screen: Screen, ascii_only: bool) -> None:
        self._terminal = terminal
        self._seen = seen
        self._screen = screen
        self._look = _look(Console(file=sys.stdout), ascii_only)
        self._answered_at = time.monotonic()
        self._silent: Silent | None = None
        self._watch = Watch(terminal.wake, seconds=screen.seconds, after=seen.newest_event)

    def run(self) -> None:
        """Until somebody quits."""
        self._watch.start()
        while True:
            self._draw()
            for key in self._terminal.keys(REDRAW_SECONDS):
                if self._press(key):
                    return
            self._hear()

    def _draw(self) -> None:
        width, height = self._terminal.size()
        seen = self._seen
        quiet = time.monotonic() - self._answered_at
        if not self._screen.paused and (self._silent or quiet > self._screen.seconds + PATIENCE_SECONDS):
            seen = seen.silent(quiet, self._silent.why if self._silent else "it takes long")
        lines = frame(seen, self._screen, self._look, width=width, height=height, now=time.time())
        self._terminal.draw(lines, width)

    def _press(self, key: str) -> bool:
        """True to quit."""
        events = [event["id"] for event in self._seen.events]
        width, height = self._terminal.size()
        end = furthest(self._seen, self._screen, self._look, width=width, height=height)
        self._screen, wish = pressed(self._screen, key, gpus=len(self._seen.gpus), events=events, furthest=end)
        watch, screen = self._watch, self._screen
        watch.seconds, watch.paused, watch.decisions = screen.seconds, screen.paused, self._decisions()
        if wish in (Wish.FREE_SOFT, Wish.FREE_UNLOAD):
            self._screen = replace(screen, answer="asking ...", bad=False)
            watch.free(wish.value)
        elif wish is Wish.LOOK:
            watch.look_now()
        return wish is Wish.QUIT

    def _decisions(self) -> int:
        """How many are needed for what is shown. They are large, and mostly nobody looks at them."""
        if self._screen.panel is Panel.WHY:
            return WHY_DECISIONS
        if self._screen.panel is not Panel.EVENT:
            return 0
        wanted = next(
            (event.get("decision_id") for event in self._seen.events if event["id"] == self._screen.event), None
        )
        known = {decision["id"] for decision in self._seen.decisions}
        return 0 if wanted is None or wanted in known else ALL_DECISIONS

    def _hear(self) -> None:
        while True:
            try:
                news = self._watch.news.get_nowait()
            except Empty:
                return
            match news:
                case Heard(decisions=decisions) if self._screen.paused:
                    self._seen = replace(self._seen, decisions=tuple(decisions or self._seen.decisions))
                case Heard():
                    self._seen = self._seen.heard(news)
                    self._answered_at, self._silent = time.monotonic(), None
                    self._watch.after = self._seen.newest_event
                    self._watch.decisions = self._decisions()
                    self._follow_up()
                case Silent():
                    self._silent, self._seen = news, self._seen.gap(time.time())
                case Answered():
                    self._screen = _said(self._screen, news)
                case Broken(error=error):
                    raise error

    def _follow_up(self) -> None:
        """What came of the free that was asked for here."""
        asked = self._screen.asked
        for event in self._seen.events if asked else ():
            proven = event["type"] == "freed"
            if event.get("action_id") == asked and (proven or event["type"] == "free_unconfirmed"):
                words = "Freed" if proven else "Not confirmed:"
                took = f"in {event.get('took_seconds') or 0:.1f} s [{event['id']}]"
                answer = f"{words} {size(event.get('freed_bytes'))} {took}"
                self._screen = replace(self._screen, answer=answer, bad=not proven, asked=None)


def _said(screen: Screen, answer: Answered) -> Screen:
    if answer.event_id is None:
        return replace(screen, answer=f"Refused: {clean(answer.why)}", bad=True, asked=None)
    words = f"Asked [{answer.event_id}], waiting for the proof"
    return replace(screen, answer=words, bad=False, asked=answer.event_id)
