"""One event, decision or lease in words."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from vram_manager.domain.size import gib


def clock(at: str | None) -> str:
    """A time of the API as the clock on the wall here shows it."""
    if at is None:
        return "(nothing seen yet)"
    return datetime.fromisoformat(at).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def event_line(event: dict[str, Any]) -> str:
    """One event on one line."""
    parts = [clock(event["at"]), event["type"]]
    if event["target"]:
        parts.append(event["target"])
    if event["stage"]:
        parts.append(event["stage"])
    if event["type"] in ("freed", "free_unconfirmed"):
        parts.append(f"{gib(event['freed_bytes'])} in {event['took_seconds']:.1f} s")
    before, after = event["used_percent_before"], event["used_percent_after"]
    if before is not None and after is not None:
        parts.append(f"used {before:.0f} % -> {after:.0f} %")
    return f"{'  '.join(parts)}  ({event['reason']}) [{event['id']}]"


def decision_in_words(decision: dict[str, Any], *, inputs: bool) -> str:
    """A decision, and the numbers it was made on."""
    times = f", {decision['count']} times until {clock(decision['until'])}" if decision["count"] > 1 else ""
    lines = [f"{clock(decision['at'])}  {decision['reason']}  [{decision['id']}: {decision['branch']}{times}]"]
    if inputs:
        lines += [f"    {name}: {value}" for name, value in decision["inputs"].items()]
    return "\n".join(lines)


def leases_in_words(listed: dict[str, Any]) -> str:
    """Leases, oldest first, and the line in its order."""
    lines = [lease_line(lease) for lease in listed["leases"]] or ["No lease is live."]
    lines += ["Waiting in line"] if listed["line"] else []
    lines += [f"  {waiting_line(one)}" for one in listed["line"]]
    return "\n".join(lines)


def waiting_line(one: dict[str, Any]) -> str:
    """Who waits in line, at which place."""
    when = "no ETA" if one["eta_seconds"] is None else f"ETA {one['eta_seconds']:.0f} s (estimate)"
    return (
        f"{one['position']}. {one['owner']}: {one['required']}, {one['priority']}, "
        f"for {one['waited_seconds']:.0f} s, {when}"
    )


def lease_line(lease: dict[str, Any]) -> str:
    """Who was promised how much, and how much of it shows."""
    until = "held by its connection" if lease["expires_at"] is None else f"until {clock(lease['expires_at'])}"
    over = f", {gib(lease['overclaimed_bytes'])} MORE THAN ASKED FOR" if lease["overclaimed_bytes"] else ""
    peak = "" if lease["peak_bytes"] is None else f", peak {gib(lease['peak_bytes'])}"
    return (
        f"{lease['id']}  {lease['owner']}: {gib(lease['bytes'])} ({lease['estimate_source']}), "
        f"{gib(lease['visible_bytes'])} taken{peak}{over}; {until}"
    )
