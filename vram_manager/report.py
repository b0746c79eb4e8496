"""What the socket says, in words for a terminal of 80 columns."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from vram_manager.domain.size import gib

WIDTH = 78


def bar(share: float, width: int = 30) -> str:
    """A share of 0..1 as a bar."""
    filled = max(0, min(width, round(share * width)))
    return "#" * filled + "." * (width - filled)


def in_words(snapshot: dict[str, Any], events: list[dict[str, Any]]) -> str:
    """The whole report."""
    lines = [f"GPU memory at {_clock(snapshot['taken_at'])}", "=" * WIDTH]
    lines += [*_gpus(snapshot), "", *_ollama(snapshot["ollama"]), "", *_comfyui(snapshot["comfyui"])]
    if snapshot["leases"]:
        lines += ["", "Leases", *(f"   {_lease(lease)}" for lease in snapshot["leases"])]
    if snapshot["held"]:
        lines += ["", "Held at the gateways", *(f"  {_held(call)}" for call in snapshot["held"])]
    if snapshot["demands"]:
        lines += ["", "Who needs memory"]
        lines += [
            f"  {demand['reason']} (needs {gib(demand['need_free_bytes'])} free)" for demand in snapshot["demands"]
        ]
    for gpu, size in snapshot.get("unreclaimable_bytes", {}).items():
        lines.append(f"  {gib(size)} on {gpu} stay in use although everybody was asked")
    lines += ["", f"Now: {snapshot['now'] or 'starting'}"]
    if events:
        lines += ["", "Lately", *(f"  {event_line(event)}" for event in events)]
    return "\n".join(lines)


def _clock(at: str | None) -> str:
    if at is None:
        return "(nothing seen yet)"
    return datetime.fromisoformat(at).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _gpus(snapshot: dict[str, Any]) -> list[str]:
    if not snapshot["gpus"]:
        return [f"No GPU can be read: {snapshot.get('gpus_why') or 'nothing seen yet'}"]
    lines = []
    for gpu in snapshot["gpus"]:
        lines.append(f"GPU {gpu['index']}: {gpu['name']}  {gpu['uuid']}")
        if gpu["total_bytes"] is None:
            lines.append(f"   memory unknown: {gpu['why']}")
            continue
        lines.append(f"   [{bar(gpu['used_percent'] / 100)}] {gpu['used_percent']:.0f} % used")
        reserved = gpu["reserved_bytes"]
        lines.append(
            f"   total {gib(gpu['total_bytes'])}, used {gib(gpu['used_bytes'])}, free {gib(gpu['free_bytes'])}"
            + (f", reserved by the driver {gib(reserved)}" if reserved is not None else "")
        )
        extras = [
            f"utilisation {gpu['utilization_percent']} %" if gpu["utilization_percent"] is not None else None,
            f"{gpu['temperature_celsius']} degrees C" if gpu["temperature_celsius"] is not None else None,
            f"{gpu['power_watts']:.0f} W" if gpu["power_watts"] is not None else None,
        ]
        if any(extras):
            lines.append("   " + ", ".join(extra for extra in extras if extra))
        if gpu["processes"] is None:
            lines.append(f"   processes: {gpu['processes_why']}")
        for process in gpu["processes"] or ():
            command = (process["command"] or "command not visible")[:48]
            lines.append(f"   pid {process['pid']:>7}  {gib(process['used_bytes']):>10}  {command}")
    if snapshot.get("second_hand"):
        lines.append("   (second-hand: these numbers come from ComfyUI, NVML cannot be read)")
    return lines


def _ollama(ollama: dict[str, Any] | None) -> list[str]:
    if ollama is None:
        return ["Ollama: none configured, or not seen yet"]
    if ollama["models"] is None:
        return [f"Ollama cannot be read: {ollama['why']}"]
    lines = [f"Ollama {ollama['version'] or '(version unknown)'}"]
    for model in ollama["models"]:
        ratio = model["cpu_ratio"]
        place = "placement unknown" if ratio is None else "100 % GPU" if ratio == 0 else f"{ratio * 100:.0f} % CPU"
        context = f", context {model['context_length']}" if model["context_length"] else ""
        under_way = f", {model['requests']} request(s) under way" if model["requests"] else ""
        lines.append(f"   {model['name']:<28} {gib(model['size_bytes']):>10}  {place}{context}{under_way}")
    return lines if ollama["models"] else [*lines, "   no model loaded"]


def _held(call: dict[str, Any]) -> str:
    upstream = {"ollama": "Ollama", "comfyui": "ComfyUI"}[call["upstream"]]
    return f"{upstream}: {call['what']}, for {call['waited_seconds']:.0f} s: {call['why']}"


def leases_in_words(listed: dict[str, Any]) -> str:
    """Leases, oldest first, and the line in its order."""
    lines = [_lease(lease) for lease in listed["leases"]] or ["No lease is live."]
    lines += ["Waiting in line"] if listed["line"] else []
    for one in listed["line"]:
        when = "no ETA" if one["eta_seconds"] is None else f"ETA {one['eta_seconds']:.0f} s (estimate)"
        lines.append(
            f"  {one['position']}. {one['owner']}: {one['required']}, {one['priority']}, "
            f"for {one['waited_seconds']:.0f} s, {when}"
        )
    return "\n".join(lines)


def _lease(lease: dict[str, Any]) -> str:
    until = "held by its connection" if lease["expires_at"] is None else f"until {_clock(lease['expires_at'])}"
    over = f", {gib(lease['overclaimed_bytes'])} MORE THAN ASKED FOR" if lease["overclaimed_bytes"] else ""
    peak = "" if lease["peak_bytes"] is None else f", peak {gib(lease['peak_bytes'])}"
    return (
        f"{lease['id']}  {lease['owner']}: {gib(lease['bytes'])} ({lease['estimate_source']}), "
        f"{gib(lease['visible_bytes'])} taken{peak}{over}; {until}"
    )


def _comfyui(comfyui: dict[str, Any] | None) -> list[str]:
    if comfyui is None:
        return ["ComfyUI: none configured, or not seen yet"]
    if comfyui["state"] == "missing":
        return [f"ComfyUI cannot be read: {comfyui['why']}"]
    lines = [f"ComfyUI {comfyui['version'] or '(version unknown)'}"]
    remaining = comfyui["queue_remaining"]
    lines.append(
        f"   idle for {comfyui['idle_seconds']:.0f} s" if remaining == 0 else f"   {remaining} running or waiting"
    )
    for device in comfyui["devices"] or ():
        in_use = device["torch_total_bytes"] - device["torch_free_bytes"]
        lines.append(
            f"   torch holds {gib(in_use)} in use, {gib(device['torch_free_bytes'])} cached  ({device['name']})"
        )
    return lines if comfyui["devices"] else [*lines, "   runs without a GPU"]


def event_line(event: dict[str, Any]) -> str:
    """One event on one line."""
    parts = [_clock(event["at"]), event["type"]]
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
    times = f", {decision['count']} times until {_clock(decision['until'])}" if decision["count"] > 1 else ""
    lines = [f"{_clock(decision['at'])}  {decision['reason']}  [{decision['id']}: {decision['branch']}{times}]"]
    if inputs:
        lines += [f"    {name}: {value}" for name, value in decision["inputs"].items()]
    return "\n".join(lines)
