"""What happened and why: events, decisions, and one event with the decision and the numbers behind it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from rich.style import Style
from rich.text import Text

from vram_manager.top.look import BAD, BOLD, CHOSEN, DIM, GOOD, PLAIN, WARN, Look, clean, heading, size, styled
from vram_manager.top.seen import Seen

_SEVERITY = {
    "freed": GOOD,
    "repaired": GOOD,
    "warmed_back": GOOD,
    "sensor_back": GOOD,
    "pressure_ended": GOOD,
    "hard_limit": BAD,
    "leak": BAD,
    "worker_dead": BAD,
    "ollama_stuck": BAD,
    "sensor_lost": BAD,
    "repair_failed": BAD,
    "cpu_fallback": BAD,
    "free_unconfirmed": WARN,
    "free_refused": WARN,
    "refused": WARN,
    "lease_expired": WARN,
    "soft_limit": WARN,
    "pressure_began": WARN,
    "readings_disagree": WARN,
    "dry_run": WARN,
}


def clock(at: str) -> str:
    """The time of day here."""
    return datetime.fromisoformat(at).astimezone().strftime("%H:%M:%S")


def happened(seen: Seen, chosen: str | None, rows: int, look: Look) -> list[Text]:
    """The newest events, the newest first; the list moves so that the chosen one is on it."""
    if not seen.events:
        return [heading("Events", look), styled("  nothing has happened yet", DIM)] if seen.snapshot else []
    newest = list(reversed(seen.events))
    at = next((number for number, event in enumerate(newest) if event["id"] == chosen), 0)
    first = max(0, at - max(0, rows - 2))
    note = f"{first} newer above" if first else ""
    return [heading("Events", look, note), *(_event(event, look, event["id"] == chosen) for event in newest[first:])]


def _event(event: Mapping[str, Any], look: Look, chosen: bool) -> Text:
    line = styled(f"{look.chosen if chosen else ' '} ", BOLD)
    line.append(f"{clock(event['at'])} ", style=DIM).append(
        f"{clean(event['type']).replace('_', ' '):<14} ", _style(event)
    )
    line.append(f"{facts(event, look)}  ").append(f"{clean(event.get('reason') or '')} [{clean(event['id'])}]", DIM)
    return styled(line.plain, CHOSEN) if chosen else line


def facts(event: Mapping[str, Any], look: Look) -> str:
    """Who and how much."""
    parts = [clean(event["target"])] if event.get("target") else []
    if event.get("stage"):
        parts.append(clean(event["stage"]))
    if event.get("freed_bytes") is not None:
        parts.append(f"{size(event['freed_bytes'])} in {event.get('took_seconds') or 0:.1f} s")
    before, after = event.get("used_percent_before"), event.get("used_percent_after")
    if before is not None and after is not None:
        parts.append(f"used {before:.0f} % {look.becomes} {after:.0f} %")
    return "  ".join(parts)


def _style(event: Mapping[str, Any]) -> Style:
    return _SEVERITY.get(event["type"], PLAIN)


def why(seen: Seen, look: Look) -> list[Text]:
    """The newest decisions in words, the newest first."""
    lines = [heading("Why", look, "the newest decisions; the newest first")]
    for decision in seen.decisions:
        line = styled(f"  {clock(decision['at'])}  ", DIM)
        line.append(clean(decision["reason"]), GOOD if decision.get("action") else PLAIN)
        count = decision.get("count") or 1
        again = f", {count} times until {clock(decision['until'])}" if count > 1 else ""
        lines.append(line.append(f"  [{clean(decision['id'])}: {clean(decision['branch'])}{again}]", DIM))
    return lines if len(lines) > 1 else [*lines, styled("  nothing has been decided yet", DIM)]


def behind(seen: Seen, chosen: str | None, look: Look) -> list[Text]:
    """One event, what else belongs to the same free, and the decision with the numbers it was made on."""
    event = next((one for one in seen.events if one["id"] == chosen), None)
    if event is None:
        return [heading("Event", look), styled("  it is too old to be shown", DIM)]
    free = event.get("action_id") or event["id"]
    related = [one for one in seen.events if free in (one["id"], one.get("action_id"))] or [event]
    lines = [heading(f"Event {event['id']}", look, "Esc: back")]
    lines += [_event(one, look, chosen=False) for one in related]
    wanted = {one.get("decision_id") for one in related} - {None}
    decisions = [one for one in reversed(seen.decisions) if one["id"] in wanted]
    for decision in decisions:
        lines += [Text(), styled(f"  {clean(decision['reason'])}", BOLD)]
        lines.append(styled(f"  decided at {clock(decision['at'])}: {clean(decision['branch'])}", DIM))
        lines += _numbers(decision.get("inputs") or {}, "    ")
    if not decisions:
        known = (
            "the decision behind it is no longer remembered"
            if wanted
            else "no decision is behind it: its reason is all"
        )
        lines += [Text(), styled(f"  {known}", DIM)]
    return lines


def _numbers(value: object, indent: str) -> list[Text]:
    """JSON as indented lines, sizes in GiB."""
    lines: list[Text] = []
    pairs = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for name, part in pairs:
        words = clean(name) if isinstance(name, str) else "-"
        if isinstance(part, Mapping | list) and part:
            lines += [styled(f"{indent}{words}", DIM), *_numbers(part, f"{indent}  ")]
            continue
        is_size = words.endswith("_bytes") and isinstance(part, int | float)
        shown = size(part) if is_size and isinstance(part, int | float) else "none" if part in ([], {}) else clean(part)
        lines.append(styled(f"{indent}{words}: ", DIM).append(shown, PLAIN))
    return lines
