"""Everything on one screen: so many columns, so many rows, and no line wider than that."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

from rich.text import Text

from vram_manager.top import gpus, happened, tenants
from vram_manager.top.keys import Panel, Screen, Wish
from vram_manager.top.layout import Part, drawn, natural, ruled, stacked, wrapped
from vram_manager.top.look import BAD, BOLD, DIM, GOOD, WARN, Look, clean, cut, duration, heading, styled
from vram_manager.top.seen import Seen

# From here on two columns beside each other are easier to read than one.
TWO_COLUMNS = 116
GAP = 2
# A good many of them; beyond these the other parts may have gaps between them.
EVENTS_ROWS = 10
NO_KEYS = "keys need a terminal for input: docker exec -it"
HELP = (
    ("q", "quit"),
    ("f", "free ComfyUI softly: its models leave the GPU; asks first"),
    ("u", "free ComfyUI by the unload stage: its node cache too; asks first"),
    ("w", "why: the newest decisions in words"),
    ("up, down", "choose an event; Enter shows what is behind it, Esc goes back"),
    ("g, left, right", "choose a GPU: the table shows who has its memory"),
    ("p", "pause: the picture stands still"),
    ("+ -", "look more often, less often"),
    ("?", "this help"),
)


def frame(seen: Seen, screen: Screen, look: Look, *, width: int, height: int | None, now: float) -> list[Text]:
    """The screen, `height` lines of at most `width` cells; without a height as many as there are to show.

    `now` is in epoch seconds.
    """
    calm = replace(look, colour=look.colour and seen.silent_seconds is None)
    head = _head(seen, screen, calm, width, now)
    foot = [] if height is None else [_foot(seen, screen, calm)]
    room = None if height is None else max(0, height - len(head) - len(foot))
    if screen.panel is Panel.MAIN or height is None:
        body = _body(seen, screen, calm, width, room, now)
    else:
        body = _panel(seen, screen, calm, width, room or 0)
    body = body if room is None else [*body[:room], *[Text()] * (room - len(body))]
    if seen.silent_seconds is not None:
        for line in body:
            line.stylize(DIM)
    lines = [line if line.cell_len <= width else cut(line, width, calm) for line in (*head, *body, *foot)]
    return lines if height is None else lines[: height - 1] + lines[-1:] if height else []


def _head(seen: Seen, screen: Screen, look: Look, width: int, now: float) -> list[Text]:
    line = styled("vram-manager ", BOLD).append(clean(seen.health.get("version") or ""))
    if screen.paused:
        line.append("  PAUSED", BAD)
    status = seen.health.get("status")
    if status:
        line.append("  ").append(clean(status), {"ok": GOOD, "degraded": WARN}.get(status, BAD))
    missing = [name for name, sensor in (seen.health.get("sensors") or {}).items() if sensor["state"] == "missing"]
    if missing:
        line.append(f": {clean(', '.join(missing))} cannot be read", WARN)
    if seen.health.get("dry_run"):
        line.append("  DRY RUN", WARN)
    if seen.health.get("monitoring") is False:
        line.append("  NOT MONITORING", WARN)
    if seen.snapshot.get("second_hand"):
        line.append("  second-hand numbers", WARN)
    time = datetime.fromtimestamp(now).astimezone().strftime("%H:%M:%S")
    if line.cell_len > width - 10:
        line = cut(line, max(0, width - 10), look)
    line.append(time.rjust(width - line.cell_len))
    if seen.silent_seconds is not None:
        words = f"No answer for {duration(seen.silent_seconds)}, trying again: {clean(seen.why_silent)}"
        return [line, styled(words, BAD)]
    said = seen.snapshot.get("now")
    return [line, styled("Now: ", BOLD).append(clean(said) if said else "starting, nothing decided yet")]


def _foot(seen: Seen, screen: Screen, look: Look) -> Text:
    if screen.asking is not None:
        dry = " (dry run)" if seen.health.get("dry_run") else ""
        soft = screen.asking is Wish.FREE_SOFT
        what = "softly: its models leave the GPU" if soft else "by the unload stage: models and node cache go"
        return styled(" y/n ", BOLD).append(f" Free ComfyUI {what}?{dry}", WARN)
    if screen.answer:
        return styled(f" {clean(screen.answer)}", BAD if screen.bad else GOOD)
    if not screen.awake:
        return styled(f" every {screen.seconds:g} s; {NO_KEYS}", DIM)
    hints = [("q", "quit"), ("?", "help"), ("f", "free"), ("u", "unload"), ("w", "why"), ("p", "pause")]
    hints += [("g", "GPU")] if len(seen.gpus) > 1 else []
    arrows = "↑↓" if look.unicode else "up/down"
    hints += [(f"{arrows} Enter", "events"), ("+/-", f"{screen.seconds:g} s")]
    line = Text()
    for key, words in hints:
        line.append(f" {key}", BOLD).append(f" {words}", DIM)
    return line


def furthest(seen: Seen, screen: Screen, look: Look, *, width: int, height: int) -> int:
    """How far the panel can be scrolled; 0 where there is none."""
    if screen.panel is Panel.MAIN:
        return 0
    _, wrapped = _panel_lines(seen, screen, look, width)
    return max(0, len(wrapped) - (height - len(_head(seen, screen, look, width, 0.0)) - 2))


def _panel(seen: Seen, screen: Screen, look: Look, width: int, room: int) -> list[Text]:
    title, wrapped = _panel_lines(seen, screen, look, width)
    first = min(screen.scroll, max(0, len(wrapped) - (room - 1)))
    below = len(wrapped) - first - (room - 1)
    if below > 0:
        title = title.copy().append(f"  {below} lines below", DIM)
    return [ruled(title, width, look), *wrapped[first:]]


def _panel_lines(seen: Seen, screen: Screen, look: Look, width: int) -> tuple[Text, list[Text]]:
    if screen.panel is Panel.WHY:
        lines = happened.why(seen, look)
    elif screen.panel is Panel.EVENT:
        lines = happened.behind(seen, screen.event, look)
    else:
        lines = _help(look)
    title, *rest = lines
    return title, [piece for line in rest for piece in wrapped(line, width)]


def _help(look: Look) -> list[Text]:
    lines = [heading("Help", look, "Esc: back")]
    lines += [styled(f"  {key:<15}", BOLD).append(words, "") for key, words in HELP]
    lines += [
        Text(),
        Text("  A bar shows what is usable of a GPU. Letters are its tenants."),
        Text(f"  {look.leased} promised to a lease and not taken yet   {look.free} free")
        .append(f"   {look.threshold} threshold   {look.hard_limit} hard limit"),
        Text("  measured: counted   learned: as earlier frees showed   perhaps: unaccounted for"),
    ]  # fmt: skip
    return lines


def _body(seen: Seen, screen: Screen, look: Look, width: int, room: int | None, now: float) -> list[Text]:
    if not seen.gpus:
        why = clean(seen.snapshot.get("gpus_why") or "nothing seen yet")
        shown = [styled(f"No GPU can be read: {why}", WARN)]
    else:
        shown = _gpus(seen, screen, look, width, room, now)
    left_out = seen.snapshot.get("gpus_left_out") or []
    shown += [styled(f"Left out: {clean(words)}", DIM) for words in left_out]
    rest = None if room is None else room - len(shown)
    if width >= TWO_COLUMNS:
        return shown + _beside(seen, screen, look, width, rest, now)
    wanted = [
        Part(lines=tenants.tenants(seen, screen.gpu, width, look), least=4),
        Part(lines=tenants.ollama(seen, width, look, now), least=3),
        Part(lines=tenants.comfyui(seen, look), least=1),
        Part(lines=tenants.waiting(seen, look), urgent=True),
        Part(lines=tenants.leaks(seen, look)),
        Part(lines=tenants.leases(seen, look, now)),
        Part(lines=tenants.nodes(seen, look)),
    ]
    gap = rest is None or natural(wanted) + EVENTS_ROWS <= rest
    # Some events are always seen.
    most = None if rest is None else rest - min(4, rest // 3)
    above = [*[Text()] * gap, *stacked(wanted, width, most, look, gap=gap)]
    return [*shown, *above, *_events(seen, screen, look, width, None if rest is None else rest - len(above), gap=gap)]


def _gpus(seen: Seen, screen: Screen, look: Look, width: int, room: int | None, now: float) -> list[Text]:
    chosen = screen.gpu % len(seen.gpus)
    rows = 4 if room is None else gpus.rows_each(seen.gpus, width, room)
    most = len(seen.gpus) if room is None else max(1, int(room * 0.6) // rows)
    # With more than fit, those around the chosen one.
    first = max(0, min(chosen - most // 2, len(seen.gpus) - most))
    lines: list[Text] = []
    for number, gpu in list(enumerate(seen.gpus))[first : first + most]:
        lines += gpus.gpu_lines(
            gpu,
            seen.trails.get(gpu["uuid"], ()),
            seen.letters,
            width=width,
            rows=rows,
            chosen=number == chosen if len(seen.gpus) > 1 and screen.awake and room is not None else None,
            look=look,
            now=now,
        )
    if most < len(seen.gpus):
        lines.append(styled(f"  {most} of {len(seen.gpus)} GPUs: g shows the next", DIM))
    return lines


def _beside(seen: Seen, screen: Screen, look: Look, width: int, room: int | None, now: float) -> list[Text]:
    """Two columns, and the events below them over the whole width."""
    half = (width - GAP) // 2
    left = [
        Part(lines=tenants.tenants(seen, screen.gpu, half, look), least=4),
        Part(lines=tenants.leases(seen, look, now)),
        Part(lines=tenants.nodes(seen, look)),
    ]
    right = [
        Part(lines=tenants.ollama(seen, half, look, now), least=3),
        Part(lines=tenants.comfyui(seen, look), least=1),
        Part(lines=tenants.waiting(seen, look), urgent=True),
        Part(lines=tenants.leaks(seen, look)),
    ]
    needed = max(natural(left), natural(right))
    most = needed if room is None else max(room - EVENTS_ROWS, room * 6 // 10)
    gap = needed <= most
    height = min(needed, most) - gap
    a, b = (stacked(parts, half, height, look, gap=gap) for parts in (left, right))
    both = [Text()] * gap
    for number in range(max(len(a), len(b))):
        row = cut(a[number], half, look) if number < len(a) else Text(" " * half)
        both.append(row.append(" " * GAP).append(b[number] if number < len(b) else Text()))
    return [*both, *_events(seen, screen, look, width, None if room is None else room - len(both), gap=gap)]


def _events(seen: Seen, screen: Screen, look: Look, width: int, room: int | None, *, gap: bool) -> list[Text]:
    """They fill the rows that are left, and begin where the chosen one is seen."""
    rows = EVENTS_ROWS if room is None else room - gap
    lines = happened.happened(seen, screen.event, rows, look)[: max(0, rows)]
    return [*[Text()] * gap, *drawn(lines, len(lines), width, look)]
