"""One GPU for a terminal: its numbers, a bar of who has it, and its processes."""

from __future__ import annotations

from typing import Any, Final

from vram_manager.domain.size import gib
from vram_manager.report.terminal import Terminal, cells, columns, flowed, padded, table, wrapped

INDENT: Final = "   "
NOT_VISIBLE: Final = "not visible (needs pid: host)"
# From here on a card slows itself down soon.
HOT_CELSIUS: Final = 85
# More rows of a table than this are summed up in one.
MOST_ROWS: Final = 12
# Neighbours in a bar differ; what is only perhaps somebody's looks thinner.
_SURE, _PERHAPS, _PROMISED, _FREE = "█▓▒", "░▚", "─", "·"
_COLOURS: Final = {
    "ollama": "green",
    "comfyui_in_use": "blue",
    "comfyui_cached": "cyan",
    "comfyui_unseen": "cyan",
    "worker": "magenta",
    "process": "yellow",
}
_VENDORS: Final = {"nvidia": "NVIDIA", "amd": "AMD", "intel": "Intel"}


def gpu_block(gpu: dict[str, Any], width: int, terminal: Terminal) -> list[str]:
    """Everything about one GPU of a snapshot, in lines of at most `width` columns."""
    lines = _title(gpu, width, terminal)
    if gpu["total_bytes"] is None:
        lines += wrapped(f"memory unknown: {gpu['why']}", width, indent=INDENT, hanging=INDENT * 2)
    else:
        lines += [*_bar(gpu, width, terminal), *flowed(_sizes(gpu), width, indent=INDENT)]
    lines += flowed(_state(gpu), width, indent=INDENT)
    if gpu["total_bytes"] is not None:
        lines += _tenants(gpu, width, terminal)
    return lines + _processes(gpu, width)


def _title(gpu: dict[str, Any], width: int, terminal: Terminal) -> list[str]:
    vendor = _VENDORS.get(gpu["vendor"], gpu["vendor"])
    kind = "" if vendor.lower() in gpu["name"].lower() else f" ({vendor})"
    title = f"GPU {gpu['index']}: {gpu['name']}{kind}"
    beside = width - columns(title) - columns(gpu["uuid"]) >= 2
    if beside:
        uuid = padded(gpu["uuid"], width - columns(title), right=True)
        lines = [terminal.style(title, bold=True) + terminal.style(uuid, dim=True)]
    else:
        lines = [terminal.style(line, bold=True) for line in wrapped(title, width, hanging=INDENT)]
        lines += [terminal.style(line, dim=True) for line in wrapped(gpu["uuid"], width, indent=INDENT)]
    marks = []
    if gpu["trust"] != "measured":
        marks.append(f"{_trust(gpu['trust'])}: these numbers come from {gpu['source']}")
    if gpu["unified"]:
        marks.append("its memory is the CPU's too")
    if gpu["asleep"]:
        marks.append("asleep: the kernel has suspended it, and it is not woken to be read")
    return lines + [line for mark in marks for line in wrapped(f"({mark})", width, indent=INDENT)]


def _trust(trust: str) -> str:
    return {"derived": "worked out", "unverified": "read as documented, on no such card tried"}.get(trust, trust)


def _sizes(gpu: dict[str, Any]) -> list[str]:
    reserved = gpu["reserved_bytes"]
    return [
        f"total {gib(gpu['total_bytes'])}",
        f"used {gib(gpu['used_bytes'])}",
        f"free {gib(gpu['free_bytes'])}",
        "reserve unknown" if reserved is None else f"reserved {gib(reserved)}",
        f"promised {gib(gpu['leased_bytes'])}" if gpu["leased_bytes"] else "",
    ]


def _state(gpu: dict[str, Any]) -> list[str]:
    """Utilisation, temperature and power, or why one is not known."""
    why = gpu.get("unknown") or {}

    def known(field: str, name: str, words: str) -> str:
        if gpu[field] is not None:
            return f"{name} {words.format(gpu[field])}"
        return f"{name} unknown" + (f" ({why[field]})" if field in why else "")

    celsius = gpu["temperature_celsius"]
    hot = " (hot)" if celsius is not None and celsius >= HOT_CELSIUS else ""
    return [
        known("utilization_percent", "utilisation", "{} %"),
        known("temperature_celsius", "temperature", "{} °C") + hot,
        known("power_watts", "power", "{:.0f} W"),
    ]


def _usable(gpu: dict[str, Any]) -> int:
    return int(gpu["taken_bytes"] + gpu["free_bytes"])


def _signs(tenants: list[dict[str, Any]]) -> list[str]:
    sure = perhaps = 0
    signs = []
    for tenant in tenants:
        if tenant["certainty"] == "perhaps":
            signs.append(_PERHAPS[perhaps % len(_PERHAPS)])
            perhaps += 1
        else:
            signs.append(_SURE[sure % len(_SURE)])
            sure += 1
    return signs


def _bar(gpu: dict[str, Any], width: int, terminal: Terminal) -> list[str]:
    percent = f"  {gpu['used_percent']:3.0f} % used"
    room = width - len(INDENT) - 2 - len(percent)
    tenants = gpu["tenants"] or [{"kind": "others", "bytes": gpu["taken_bytes"], "certainty": "measured"}]
    promised = min(gpu["leased_bytes"], gpu["free_bytes"])
    given = cells([*(tenant["bytes"] for tenant in tenants), promised], _usable(gpu), room)
    parts = [
        terminal.style(sign * number, fg=_COLOURS.get(tenant["kind"]))
        for tenant, sign, number in zip(tenants, _signs(tenants), given, strict=False)
    ]
    parts += [_PROMISED * given[-1], terminal.style(_FREE * (room - sum(given)), dim=True)]
    return [f"{INDENT}[{''.join(parts)}]{terminal.style(percent, fg=_warning(gpu))}"]


def _warning(gpu: dict[str, Any]) -> str | None:
    limits = gpu["limits"]
    if limits is None:
        return None
    if gpu["taken_bytes"] >= limits["hard_limit_bytes"]:
        return "red"
    return "yellow" if gpu["taken_bytes"] >= limits["threshold_bytes"] else "green"


def _tenants(gpu: dict[str, Any], width: int, terminal: Terminal) -> list[str]:
    tenants = gpu["tenants"]
    whole = max(1, _usable(gpu))

    def row(sign: str, name: str, size: int) -> tuple[str, str, str]:
        return (f"{sign * 2} {name}", gib(size), f"{100 * size / whole:.1f} %")

    rows = [
        row(
            sign,
            tenant["tenant"] + {"perhaps": " (perhaps)", "learned": " (learned)"}.get(tenant["certainty"], ""),
            size,
        )
        for tenant, sign, size in (
            (one, sign, one["bytes"]) for one, sign in zip(tenants, _signs(tenants), strict=True)
        )
    ]
    if len(rows) > MOST_ROWS:
        more = tenants[MOST_ROWS - 1 :]
        rows[MOST_ROWS - 1 :] = [row(" ", f"{len(more)} more", sum(tenant["bytes"] for tenant in more))]
    if gpu["leased_bytes"]:
        rows.append(row(_PROMISED, "promised, not yet taken", gpu["leased_bytes"]))
    return _coloured(table(rows, width, indent=INDENT, right=(1, 2)), [one["kind"] for one in tenants], rows, terminal)


def _coloured(lines: list[str], kinds: list[str], rows: list[tuple[str, str, str]], terminal: Terminal) -> list[str]:
    """The signs before the names in the colours of the bar."""
    left = [(kind, row[0][:2]) for kind, row in zip(kinds, rows, strict=False)]
    found = []
    for line in lines:
        if left and line.startswith(INDENT + left[0][1]):
            kind, sign = left.pop(0)
            found.append(INDENT + terminal.style(sign, fg=_COLOURS.get(kind)) + line[len(INDENT + sign) :])
        else:
            found.append(line)
    return found


def _processes(gpu: dict[str, Any], width: int) -> list[str]:
    if gpu["processes"] is None:
        why = gpu["processes_why"] or "not asked"
        return wrapped(f"processes: {_unseen(why)}", width, indent=INDENT, hanging=INDENT * 2)
    if not gpu["processes"]:
        return [f"{INDENT}processes: none"]
    shown = sorted(gpu["processes"], key=lambda process: -(process["used_bytes"] or 0))[:MOST_ROWS]
    lines = [f"{INDENT}processes:"]
    sizes = max(len(_process_size(process)) for process in shown)
    for process in shown:
        command = NOT_VISIBLE if process["command"] is None else process["command"]
        head = f"{INDENT * 2}pid {process['pid']:>7}  {_process_size(process):>{sizes}}  "
        room = width - len(head)
        # A command line may be long, and its end says least.
        lines.append(head + _cut(command, room))
    if len(gpu["processes"]) > len(shown):
        lines.append(f"{INDENT * 2}and {len(gpu['processes']) - len(shown)} more")
    return lines


def _process_size(process: dict[str, Any]) -> str:
    return "not told" if process["used_bytes"] is None else gib(process["used_bytes"])


def _unseen(why: str) -> str:
    return NOT_VISIBLE if "not visible" in why else f"unknown: {why}"


def _cut(text: str, width: int) -> str:
    if columns(text) <= width:
        return text
    kept = ""
    for sign in text:
        if columns(kept + sign) > width - 1:
            break
        kept += sign
    return kept + "…"
