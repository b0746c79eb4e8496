"""GPUs: a bar stacked by tenant with its limits marked, the numbers, and how it went over the last minutes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.style import Style
from rich.text import Text

from vram_manager.top.look import BAD, BOLD, CHOSEN, DIM, GOOD, WARN, Look, clean, cut, on_colour, size, styled
from vram_manager.top.seen import TRAIL_SECONDS, Trail

# What was seen holds until the next look, which at the slowest pace is a minute away.
LOOK_SECONDS = 65.0
_VENDORS = ("NVIDIA GeForce ", "NVIDIA ", "AMD Radeon ", "AMD ", "Intel ", "Simulated ")


def bar(gpu: Mapping[str, Any], letters: Mapping[str, str], width: int, look: Look) -> Text:
    """All that is usable on so many cells: tenants from the left, what is promised to leases, free; limits on top."""
    usable = _usable(gpu)
    if usable is None or width <= 0:
        return styled(look.rule * max(0, width), DIM)
    cells: list[tuple[str, Style]] = []
    reached = 0

    def fill(size_bytes: int, first: str, rest: str, style: Style) -> None:
        nonlocal reached
        reached += max(0, size_bytes)
        upto = min(width, round(width * reached / usable))
        new = upto - len(cells)
        cells.extend([(first, style)] * (new > 0) + [(rest, style)] * (new - 1))

    for share in gpu.get("tenants") or []:
        letter = letters.get(share["tenant"], "+")
        painted = on_colour(share["kind"], letter) if look.colour else Style()
        fill(share["bytes"], letter, " " if look.colour else letter, painted)
    fill((gpu["taken_bytes"] or 0) - reached, "+", "+", DIM)
    fill(gpu.get("leased_bytes") or 0, look.leased, look.leased, WARN)
    cells.extend([(look.free, DIM)] * (width - len(cells)))
    limits = gpu.get("limits") or {}
    for name, mark, style in (("threshold_bytes", look.threshold, WARN), ("hard_limit_bytes", look.hard_limit, BAD)):
        if name in limits:
            at = min(width - 1, int(width * limits[name] / usable))
            # On a tenant's colour its own: a mark in yellow on yellow is none.
            cells[at] = (mark, cells[at][1] if cells[at][1].bgcolor else style)
    line = Text()
    for glyph, style in cells:
        line.append(glyph, style)
    return line


def chart(
    trail: Trail, usable: int | None, width: int, rows: int, look: Look, now: float, seconds: float = TRAIL_SECONDS
) -> list[Text]:
    """The memory taken over the last `seconds` as columns of `rows` cells, the newest on the right; a gap is empty."""
    levels = _levels(trail, usable or 0, width, rows * len(look.sparks), now, seconds)
    lines = []
    for row in reversed(range(rows)):
        glyphs = []
        for level in levels:
            part = min(len(look.sparks), level - row * len(look.sparks))
            glyphs.append(look.sparks[part - 1] if part > 0 else " ")
        lines.append(styled("".join(glyphs), GOOD))
    return lines


def _levels(trail: Trail, usable: int, width: int, steps: int, now: float, seconds: float) -> list[int]:
    """For each column how many of the steps are filled: 0 where nothing is known, else at least one."""
    if width <= 0 or not usable:
        return [0] * max(0, width)
    step = seconds / width
    # Columns begin at whole multiples, so that the picture moves by columns and does not shimmer.
    first = int(now // step) - width + 1
    highest: dict[int, int] = {}
    latest: dict[int, tuple[float, int]] = {}
    for at, taken in trail:
        column = int(at // step) - first
        level = 0 if taken is None else min(steps, max(1, round(steps * taken / usable)))
        highest[column] = max(highest.get(column, 0), level)
        latest[column] = (at, level)
    levels = []
    known = max((column for column in latest if column < 0), default=-1)
    last_at, last_level = latest.get(known, (0.0, 0))
    for column in range(width):
        begins = (first + column) * step
        levels.append(highest.get(column, last_level if begins - last_at < LOOK_SECONDS else 0))
        last_at, last_level = latest.get(column, (last_at, last_level))
    return levels


def gpu_lines(
    gpu: Mapping[str, Any],
    trail: Trail,
    letters: Mapping[str, str],
    *,
    width: int,
    rows: int,
    chosen: bool | None,
    look: Look,
    now: float,
) -> list[Text]:
    """One GPU on so many rows: 1, 2, or 3 and more of which all from the fourth on are the chart.

    `chosen` is None where there is nothing to choose among.
    """
    if rows == 1:
        return [_one_row(gpu, trail, letters, width, chosen, look, now)]
    if _usable(gpu) is None:
        return [_title(gpu, width, chosen, look, short=True)]
    used = f" {_percent(gpu)}"
    if rows == 2:
        spark = min(30, width // 5)
        main = bar(gpu, letters, width - len(used) - spark - 1, look)
        main.append(used, _severity(gpu)).append(" ").append(chart(trail, _usable(gpu), spark, 1, look, now)[0])
        return [_title(gpu, width, chosen, look, short=True), main]
    main = bar(gpu, letters, width - len(used), look)
    main.append(used, _severity(gpu))
    lines = [_title(gpu, width, chosen, look, short=False), main, _numbers(gpu, width, look)]
    if rows > 3:
        caption = f"last {TRAIL_SECONDS / 60:.0f} min "
        drawn = chart(trail, _usable(gpu), width - len(caption), rows - 3, look, now)
        lines += [
            styled(caption if number == len(drawn) - 1 else " " * len(caption), DIM).append(part)
            for number, part in enumerate(drawn)
        ]
    return lines


def _usable(gpu: Mapping[str, Any]) -> int | None:
    total = gpu.get("total_bytes")
    return None if total is None or gpu.get("taken_bytes") is None else max(1, total - (gpu.get("reserved_bytes") or 0))


def _unknown(gpu: Mapping[str, Any]) -> str:
    state, why = "asleep" if gpu.get("asleep") else "memory unknown", clean(gpu.get("why") or "not told")
    return why if why.startswith(state) else f"{state}: {why}"


def _percent(gpu: Mapping[str, Any]) -> str:
    percent = gpu.get("used_percent")
    return "  ? %" if percent is None else f"{percent:3.0f} %"


def _severity(gpu: Mapping[str, Any]) -> Style:
    taken, limits = gpu.get("taken_bytes"), gpu.get("limits")
    if taken is None or not limits:
        return BOLD
    return BAD if taken >= limits["hard_limit_bytes"] else WARN if taken >= limits["threshold_bytes"] else GOOD


def _title(gpu: Mapping[str, Any], width: int, chosen: bool | None, look: Look, *, short: bool) -> Text:
    """Which GPU and how it is, in words; the numbers of its load stand on the right."""
    left = styled(_marker(chosen, look) + f"GPU {gpu['index']}  {clean(gpu['name'])}", _marked(chosen))
    notes = [
        "memory shared with the CPU" if gpu.get("unified") else "",
        "" if gpu.get("trust", "measured") == "measured" else f"{gpu['trust']}, from {gpu.get('source')}",
    ]
    for note in filter(None, notes):
        left.append(f"  {clean(note)}", style=DIM)
    if _usable(gpu) is None:
        return left.append(f"  {_unknown(gpu)}", style=WARN)
    right = "  ".join(filter(None, [_free(gpu) if short else "", *_load(gpu, look)]))
    if left.cell_len + 2 + len(right) > width:
        left = cut(left, max(12, width - 2 - len(right)), look)
    return left.append(right.rjust(width - left.cell_len))


def _load(gpu: Mapping[str, Any], look: Look) -> list[str]:
    load, heat, power = (gpu.get(name) for name in ("utilization_percent", "temperature_celsius", "power_watts"))
    return [
        f"util {load} %" if load is not None else "",
        f"{heat} {look.degrees.strip()}" if heat is not None else "",
        f"{power:.0f} W" if power is not None else "",
    ]


def _free(gpu: Mapping[str, Any]) -> str:
    leased = gpu.get("leased_bytes")
    return f"free {size(gpu['free_bytes'])}" + (f"  leased {size(leased)}" if leased else "")


def _numbers(gpu: Mapping[str, Any], width: int, look: Look) -> Text:
    usable = _usable(gpu) or 1
    line = Text(f"taken {size(gpu['taken_bytes']).removesuffix(' GiB')} of {size(usable)}  {_free(gpu)}")
    limits = gpu.get("limits") or {}
    notes = [
        styled(f"  {mark}", style).append(f" {words} {100 * limits[name] / usable:.0f} %", DIM)
        for name, mark, words, style in (
            ("hard_limit_bytes", look.hard_limit, "hard limit", BAD),
            ("threshold_bytes", look.threshold, "threshold", WARN),
        )
        if name in limits
    ]
    notes += [styled(f"  {look.leased}", WARN).append(" promised", DIM)] if gpu.get("leased_bytes") else []
    room = width - line.cell_len
    fitting: list[Text] = []
    for note in notes:
        if note.cell_len <= room:
            fitting.append(note)
            room -= note.cell_len
    return line.append(" " * room).append(Text().join(reversed(fitting)))


def _one_row(
    gpu: Mapping[str, Any],
    trail: Trail,
    letters: Mapping[str, str],
    width: int,
    chosen: bool | None,
    look: Look,
    now: float,
) -> Text:
    load, heat, power = (gpu.get(name) for name in ("utilization_percent", "temperature_celsius", "power_watts"))
    name_width = max(6, min(28, width // 7))
    label = styled(f"{_marker(chosen, look) or ' '}{gpu['index']:>2} ", _marked(chosen))
    label.append(cut(_short_name(gpu), name_width, look)).append(" ")
    if _usable(gpu) is None:
        return label.append(_unknown(gpu), style=WARN)
    tail = styled(_percent(gpu).rjust(7), _severity(gpu))
    tail.append(size(gpu["free_bytes"]).removesuffix(" GiB").rjust(5) + " free", style="")
    if width >= 76:
        tail.append(("" if load is None else f"{load} %").rjust(6))
        tail.append(("" if heat is None else f"{heat}{look.degrees[:1]}").rjust(5))
    if width >= 84:
        tail.append(("" if power is None else f"{power:.0f} W").rjust(7))
    if width >= 110:
        spark = min(40, width // 6)
        tail.append("  ").append(chart(trail, _usable(gpu), spark, 1, look, now)[0])
    return label.append(bar(gpu, letters, width - label.cell_len - tail.cell_len, look)).append(tail)


def _short_name(gpu: Mapping[str, Any]) -> str:
    name = clean(gpu["name"])
    vendor = next((vendor for vendor in _VENDORS if name.startswith(vendor)), "")
    return name[len(vendor) :] or name


def _marker(chosen: bool | None, look: Look) -> str:
    return "" if chosen is None else f"{look.chosen} " if chosen else "  "


def _marked(chosen: bool | None) -> Style:
    return CHOSEN if chosen else BOLD


def rows_each(gpus: Sequence[object], width: int, height: int) -> int:
    """How many rows each GPU may have, so that the rest keeps more than half of the screen."""
    count = max(1, len(gpus))
    allowed = int(height * 0.42) // count
    most = (8 if height >= 45 else 6 if height >= 36 else 4) if count <= 2 else 4
    return max(1, min(most, allowed)) if allowed != 3 else 2
