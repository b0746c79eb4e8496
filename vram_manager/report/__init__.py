"""The report: every GPU and who has it, Ollama's models, ComfyUI, promises, further nodes, and a summary."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any, Final

from vram_manager.domain.size import gib
from vram_manager.report.gpu import gpu_block
from vram_manager.report.terminal import TWO_BLOCKS, WIDEST_LINE, Terminal, beside, flowed, half, table, wrapped
from vram_manager.words import clock, lease_line, waiting_line

INDENT: Final = "   "
# No name says more in more letters, and a report of them would be books long.
LONGEST_TEXT: Final = 1000
# Ollama's own "forever" is the year 2318; its CLI says Forever from 20 years on.
_FOREVER_SECONDS: Final = 20 * 365 * 86_400
# A node is asked every 15 s: what is older than two of them is worth a word.
OLD_SECONDS: Final = 30
_VERDICTS: Final = {"gpu": "GPU", "cpu": "CPU", "split": "GPU + CPU", "idle": "idle", "unknown": "unknown"}
_COLOURS: Final = {"gpu": "green", "cpu": "red", "split": "yellow"}
_ACCELERATED: Final = {
    "yes": "yes, wholly",
    "partly": "partly",
    "no": "no: all of it is on the CPU",
    "idle": "nothing is loaded",
    "unknown": "unknown: its list cannot be used",
    "none": "no Ollama configured, or not seen yet",
}


def text(document: dict[str, Any], terminal: Terminal) -> str:
    """The document of `summary.document` as text for that terminal; no line is wider."""
    document = _shown(document, terminal)
    if document["problem"]:
        seen = _nodes(document["nodes"], None, min(terminal.width, WIDEST_LINE), terminal)
        return terminal.drawn("\n".join(seen))
    whole = terminal.width if terminal.width >= TWO_BLOCKS else min(terminal.width, WIDEST_LINE)
    wide = half(terminal.width) if whole >= TWO_BLOCKS else whole
    whole = 2 * wide + len(INDENT) if whole >= TWO_BLOCKS else whole
    seen_at = document["taken_at"]
    gpus = [gpu_block(gpu, wide, terminal) for gpu in document["gpus"]]
    blocks = [
        *(gpus or [_no_gpu(document, wide, terminal)]),
        _ollama(document["ollama"], seen_at, wide, terminal),
        _comfyui(document["comfyui"], wide, terminal),
        *_promises(document, wide, terminal),
    ]
    lines = [terminal.style(f"GPU memory at {clock(seen_at)}", bold=True), "─" * whole]
    if whole >= TWO_BLOCKS:
        lines += beside(blocks, wide, wide)
    else:
        lines += [line for block in blocks for line in (*block, "")][:-1]
    rest = [
        _notes(document, whole),
        _events(document["events"], whole, terminal),
        _nodes(document["nodes"], seen_at, whole, terminal),
        _summary(document["summary"], document, whole, terminal),
    ]
    lines += [line for block in rest if block for line in ("", *block)]
    return terminal.drawn("\n".join(lines))


def _shown(value: Any, terminal: Terminal) -> Any:
    """The document with every text as the terminal can show it."""
    match value:
        case str():
            return terminal.said(value if len(value) <= LONGEST_TEXT else f"{value[:LONGEST_TEXT]}...")
        case list() | tuple():
            return [_shown(one, terminal) for one in value]
        case dict():
            return {terminal.said(key): _shown(one, terminal) for key, one in value.items()}
    return value


def _no_gpu(document: dict[str, Any], width: int, terminal: Terminal) -> list[str]:
    why = f"No GPU can be read: {document['gpus_why'] or 'nothing seen yet'}"
    return [terminal.style(line, fg="red") for line in wrapped(why, width, hanging=INDENT)]


# Ollama and its nodes.


def place_words(model: dict[str, Any]) -> str:
    """Where a model is: on the GPU, the CPU, or how much of it on which."""
    ratio = model["cpu_ratio"]
    if ratio is None:
        return "unknown (its sizes contradict)"
    if ratio in (0, 1):
        return "CPU (RAM)" if ratio else "GPU (VRAM)"
    on_cpu = min(99, max(1, round(ratio * 100)))
    return f"{100 - on_cpu} % GPU / {on_cpu} % CPU"


def expiry_words(model: dict[str, Any], seen_at: str | None) -> str:
    """When Ollama unloads it, unless it is used before; `seen_at` is when it was listed."""
    if model["requests"]:
        return f"in use ({model['requests']} under way)"
    if model["expires_at"] is None or seen_at is None:
        return "expiry unknown"
    left = (datetime.fromisoformat(model["expires_at"]) - datetime.fromisoformat(seen_at)).total_seconds()
    if left <= 0:
        return "stopping"
    return "never" if left > _FOREVER_SECONDS else f"in {duration(left)}"


def _listed_at(server: dict[str, Any], seen_at: str | None) -> str | None:
    """When the list was read: what is still in an old one is not therefore late."""
    if (at := server.get("asked_at") or seen_at) is None:
        return None
    return (datetime.fromisoformat(at) - timedelta(seconds=server["age_seconds"] or 0)).isoformat()


def duration(seconds: float) -> str:
    """4 min, in one unit."""
    for unit, name in ((86_400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit or (unit == 60 and seconds >= 60):
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds:.0f} s"


def _models(models: list[dict[str, Any]], seen_at: str | None, width: int, indent: str) -> list[str]:
    rows = [
        (
            model["name"],
            gib(model["size_bytes"]),
            place_words(model),
            expiry_words(model, seen_at),
            f"context {model['context_length']}" if model["context_length"] else "context unknown",
        )
        for model in models
    ]
    return table(rows, width, indent=indent, right=(1,))


def _ollama(ollama: dict[str, Any] | None, seen_at: str | None, width: int, terminal: Terminal) -> list[str]:
    if ollama is None:
        return ["Ollama: none configured, or not seen yet"]
    if ollama["models"] is None:
        return wrapped(f"Ollama cannot be read: {ollama['why']}", width, hanging=INDENT)
    head = _head(f"Ollama {ollama['version'] or '(version unknown)'}", width, terminal)
    return [
        *head,
        *(_models(ollama["models"], _listed_at(ollama, seen_at), width, INDENT) or [f"{INDENT}no model loaded"]),
    ]


def _nodes(nodes: list[dict[str, Any]], seen_at: str | None, width: int, terminal: Terminal) -> list[str]:
    if not nodes:
        return []
    lines = [terminal.style("Further Ollama servers", bold=True)]
    for node in nodes:
        verdict = "missing" if node["state"] == "missing" else _VERDICTS[node["verdict"]]
        words = (f"{verdict:<9}  {node['url']}", *_node_words(node))
        first, *more = flowed(words, width, indent=INDENT, hanging=INDENT + " " * 11, gap="  ")
        colour = "red" if node["state"] == "missing" else _COLOURS.get(node["verdict"])
        lines += [first.replace(verdict, terminal.style(verdict, fg=colour), 1) if colour else first, *more]
        lines += _models(node["models"] or [], _listed_at(node, seen_at), width, INDENT + " " * 11)
        if measured := node.get("measured"):
            label = "measured: " if measured["model"] else ""
            lines += wrapped(label + measured["words"], width, indent=INDENT + " " * 11)
    return lines


def _node_words(node: dict[str, Any]) -> tuple[str, ...]:
    if node["models"] is None:
        remedy = f"; {node['remedy']}" if node["remedy"] else ""
        failed = "not read yet" if node["state"] == "unread" else "cannot be read"
        age = node["age_seconds"]
        last = "" if age is None else f"; last read {duration(age)} ago"
        return (f"{failed}: {node['why']}{remedy}{last}",)
    vram, ram = node["vram_bytes"], node["ram_bytes"]
    holds = {
        "gpu": f"VRAM {gib(vram)}",
        "cpu": f"RAM {gib(ram)} (CPU fallback)",
        "split": f"VRAM {gib(vram)}, RAM {gib(ram)} (CPU fallback)",
        "idle": "nothing loaded: GPU or CPU shows when a model is",
        "unknown": "VRAM unknown: the sizes that it tells contradict each other",
    }[node["verdict"]]
    seen = f", seen {duration(node['age_seconds'])} ago" if node["age_seconds"] > OLD_SECONDS else ""
    return holds, f"(Ollama {node['version'] or 'of unknown version'}{seen})"


# ComfyUI, promises, events.


def _comfyui(comfyui: dict[str, Any] | None, width: int, terminal: Terminal) -> list[str]:
    if comfyui is None:
        return ["ComfyUI: none configured, or not seen yet"]
    if comfyui["state"] == "missing":
        lines = wrapped(f"ComfyUI cannot be read: {comfyui['why']}", width, hanging=INDENT)
    else:
        lines = _head(f"ComfyUI {comfyui['version'] or '(version unknown)'}", width, terminal)
    remaining = comfyui["queue_remaining"]
    if remaining is None:
        lines.append(f"{INDENT}queue: unknown")
    elif remaining:
        lines.append(f"{INDENT}queue: {remaining} running or waiting")
    else:
        lines.append(f"{INDENT}queue: empty, idle for {duration(comfyui['idle_seconds'])}")
    if comfyui["devices"] is None:
        return [*lines, f"{INDENT}torch: unknown"]
    for device in comfyui["devices"]:
        in_use = device["torch_total_bytes"] - device["torch_free_bytes"]
        words = f"torch: {gib(in_use)} in use, {gib(device['torch_free_bytes'])} cached  ({device['name']})"
        lines += wrapped(words, width, indent=INDENT, hanging=INDENT * 2)
    return lines if comfyui["devices"] else [*lines, f"{INDENT}runs without a GPU"]


def _promises(document: dict[str, Any], width: int, terminal: Terminal) -> list[list[str]]:
    """Who was promised memory, who waits for it, and who needs it."""
    parts = (
        ("Leases", [lease_line(lease) for lease in document["leases"]]),
        ("Waiting in line", [waiting_line(one) for one in document["line"]]),
        ("Held at the gateways", [_held(call) for call in document["held"]]),
        (
            "Who needs memory",
            [f"{one['reason']} (needs {gib(one['need_free_bytes'])} free)" for one in document["demands"]],
        ),
    )
    return [
        [
            terminal.style(title, bold=True),
            *(line for said in saying for line in wrapped(said, width, indent=INDENT, hanging=INDENT * 2)),
        ]
        for title, saying in parts
        if saying
    ]


def _held(call: dict[str, Any]) -> str:
    upstream = {"ollama": "Ollama", "comfyui": "ComfyUI"}.get(call["upstream"], call["upstream"])
    return f"{upstream}: {call['what']}, for {call['waited_seconds']:.0f} s: {call['why']}"


def _notes(document: dict[str, Any], width: int) -> list[str]:
    notes = [f"Not counted: {words}" for words in document["gpus_left_out"]]
    notes += [
        f"{gib(size)} on {gpu} stay in use although everybody was asked"
        for gpu, size in document["unreclaimable_bytes"].items()
    ]
    if document["settling"]:
        notes.append(f"Waiting for proof of a free: {document['settling']}")
    notes.append(f"Now: {document['now'] or 'starting'}")
    return [line for note in notes for line in wrapped(note, width, hanging=INDENT)]


def _events(events: list[dict[str, Any]], width: int, terminal: Terminal) -> list[str]:
    if not events:
        return []
    lines = [terminal.style("Lately", bold=True)]
    for event in events:
        parts = [clock(event["at"])[-8:], event["type"], event["target"] or "", event["stage"] or ""]
        if event["freed_bytes"] is not None and event["took_seconds"] is not None:
            parts.append(f"{gib(event['freed_bytes'])} in {event['took_seconds']:.1f} s")
        if event["used_percent_before"] is not None and event["used_percent_after"] is not None:
            parts.append(f"used {event['used_percent_before']:.0f} % -> {event['used_percent_after']:.0f} %")
        words = f"{'  '.join(filter(None, parts))}  ({event['reason']}) [{event['id']}]"
        lines += wrapped(words, width, indent=INDENT, hanging=INDENT + " " * 10)
    return lines


def _head(words: str, width: int, terminal: Terminal) -> list[str]:
    return [terminal.style(line, bold=True) for line in wrapped(words, width, hanging=INDENT)]


# The summary.


def _summary(summary: dict[str, Any], document: dict[str, Any], width: int, terminal: Terminal) -> list[str]:
    why = f"unknown: {document['gpus_why'] or 'the memory of no GPU can be read'}"
    left_out = "".join(f"; GPU {index} unknown" for index in summary["unknown_gpus"])
    number = summary["gpus"] - len(summary["unknown_gpus"])
    percent = summary["used_percent"]
    rows = [
        ("GPU vendor", ", ".join(vendor.upper() for vendor in summary["vendors"]) or why),
        (
            "Total VRAM",
            why if percent is None else f"{gib(summary['total_bytes'])} on {number} GPU{'s'[: number > 1]}{left_out}",
        ),
        ("VRAM utilisation", why if percent is None else f"{percent:.1f} % ({gib(summary['used_bytes'])})"),
        ("Free VRAM", why if percent is None else f"{gib(summary['free_bytes'])}{_leased(summary)}"),
        ("Ollama GPU-accelerated", _ACCELERATED[summary["ollama_accelerated"]]),
        ("Ollama VRAM usage", _ollama_usage(summary)),
        ("Fits now", why if percent is None else _fits(summary, document)),
    ]
    label = max(len(name) for name, _ in rows) + 2
    return [
        terminal.style("Summary", bold=True),
        *(
            line
            for name, words in rows
            for line in wrapped(f"{name:<{label}}{words}", width, indent=INDENT, hanging=INDENT + " " * label)
        ),
    ]


def _leased(summary: dict[str, Any]) -> str:
    return f", {gib(summary['leased_bytes'])} of it promised" if summary["leased_bytes"] else ""


def _ollama_usage(summary: dict[str, Any]) -> str:
    vram, ram = summary["ollama_vram_bytes"], summary["ollama_ram_bytes"]
    if vram is None:
        return "none" if summary["ollama_accelerated"] == "none" else "unknown"
    return gib(vram) + (f" of {gib(vram + ram)}, {gib(ram)} in RAM" if ram else "")


def _fits(summary: dict[str, Any], document: dict[str, Any]) -> str:
    fits, margin = summary["fits_bytes"], summary["margin_bytes"]
    if fits is None or margin is None:
        return "unknown: the daemon does not say"
    waiting = len(document["line"])
    after = f"; {waiting} in line before" if waiting else ""
    if fits == 0:
        return f"nothing more: what is free is promised, or the margin of {gib(margin)}{after}"
    return f"up to {gib(fits)} on GPU {summary['fits_gpu']} (free, less promises and a margin of {gib(margin)}){after}"
