"""Who has the memory and who wants it: tenants, Ollama's models, ComfyUI, leases, the line, other nodes.

Each part is a list of lines whose first is its heading; an empty list is a part that has nothing to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit

from rich.text import Text

from vram_manager.top.look import (
    BAD,
    BOLD,
    DIM,
    GOOD,
    PLAIN,
    WARN,
    Look,
    clean,
    cut,
    duration,
    heading,
    on_colour,
    size,
    styled,
)
from vram_manager.top.seen import Seen

# A keep_alive of for ever comes as a date in some hundred years.
_FOR_EVER_SECONDS = 365 * 86_400


def tenants(seen: Seen, chosen: int, width: int, look: Look) -> list[Text]:
    """The legend of the bars: who, how much, what part of that GPU, and how that is known."""
    if not seen.gpus:
        return []
    gpu = seen.gpus[min(chosen, len(seen.gpus) - 1)]
    which = f"Tenants of GPU {gpu['index']}" if len(seen.gpus) > 1 else "Tenants"
    shares = sorted(gpu.get("tenants") or [], key=lambda share: -share["bytes"])
    if gpu.get("taken_bytes") is None:
        return [heading(which, look), styled("  cannot be told while the memory is unknown", DIM)]
    lines = [heading(which, look)]
    usable = max(1, gpu["total_bytes"] - (gpu.get("reserved_bytes") or 0))
    for share in shares:
        letter = seen.letters.get(share["tenant"], "+")
        painted = on_colour(share["kind"], letter) if look.colour else BOLD
        line = Text(" ").append(f" {letter} ", painted).append(" ")
        line.append(cut(clean(_named(share)), max(8, width - 34), look))
        line.append(f"{size(share['bytes']):>11}{100 * share['bytes'] / usable:6.1f} %")
        known = share.get("certainty", "measured")
        lines.append(line.append(f"  {known}", WARN if known == "perhaps" else DIM))
    stuck = (seen.snapshot.get("unreclaimable_bytes") or {}).get(gpu["uuid"])
    if stuck:
        lines.append(styled(f"  {size(stuck)} stay in use although everybody was asked", WARN))
    return lines if len(lines) > 1 else [*lines, styled("  nobody has any of it", DIM)]


def _named(share: Mapping[str, Any]) -> str:
    tenant = str(share["tenant"])
    return {
        "comfyui_in_use": "ComfyUI, in use",
        "comfyui_cached": "ComfyUI, cached by torch",
        "comfyui_unseen": "ComfyUI, beside torch",
        "others": "others, unaccounted for",
    }.get(share["kind"], tenant.removeprefix("ollama:") if share["kind"] == "ollama" else tenant.replace(":", " ", 1))


def ollama(seen: Seen, width: int, look: Look, now: float) -> list[Text]:
    """Its models: size, place, context, until when they stay, requests under way."""
    told = seen.snapshot.get("ollama")
    if told is None:
        return [heading("Ollama", look, "none configured, or not seen yet")] if seen.snapshot.get("taken_at") else []
    if told.get("models") is None:
        return [heading("Ollama", look), styled(f"  cannot be read: {clean(told.get('why'))}", WARN)]
    lines = [heading("Ollama", look, told.get("version") or "version unknown")]
    lines += [_model(model, width, look, now) for model in told["models"]]
    if len(lines) == 1:
        lines[0].append("  no model loaded", style=DIM)
    return lines


def _model(model: Mapping[str, Any], width: int, look: Look, now: float) -> Text:
    ratio, requests, context = model.get("cpu_ratio"), model.get("requests"), model.get("context_length")
    place, style = ("place ?", WARN) if ratio is None else ("on GPU", GOOD)
    if ratio:
        place, style = f"{ratio * 100:.0f} % CPU", BAD
    facts = [
        (f"{size(model.get('size_bytes')):>9}  ", PLAIN),
        (f"{place:<10}", style),
        (f"ctx {context:<7}" if context else " " * 11, DIM),
        (f"{_until(model.get('expires_at'), now):<12}", DIM),
        (f"{requests:>2} req" if requests else " " * 6, BOLD),
    ]
    # What matters least goes first where it is narrow: the context, then until when it stays.
    while len(facts) > 3 and 3 + 16 + sum(len(words) for words, _ in facts) > width:
        del facts[2]
    line = Text("  ")
    line.append(cut(clean(model["name"]), max(8, width - 3 - sum(len(words) for words, _ in facts)), look)).append(" ")
    for words, fact_style in facts:
        line.append(words, fact_style)
    return line


def _until(expires_at: str | None, now: float) -> str:
    if expires_at is None:
        return ""
    left = datetime.fromisoformat(expires_at).timestamp() - now
    if left > _FOR_EVER_SECONDS:
        return "stays"
    return f"{duration(left, short=True)} left" if left > 0 else "goes now"


def comfyui(seen: Seen, look: Look) -> list[Text]:
    """Whether it works, how long it has been idle, what torch holds."""
    told = seen.snapshot.get("comfyui")
    if told is None:
        return [heading("ComfyUI", look, "none configured, or not seen yet")] if seen.snapshot.get("taken_at") else []
    lines = [heading("ComfyUI", look, told.get("version") or "")]
    remaining, idle = told.get("queue_remaining"), told.get("idle_seconds")
    if remaining:
        lines[0].append(f"  busy, {remaining} in the queue", style=BOLD)
    elif remaining is not None:
        lines[0].append(f"  idle for {duration(idle or 0)}", style=PLAIN)
    if told.get("state") == "missing":
        lines.append(styled(f"  cannot be read: {clean(told.get('why'))}", WARN))
    for device in told.get("devices") or []:
        used = device["torch_total_bytes"] - device["torch_free_bytes"]
        lines.append(
            Text(f"  torch: {size(used)} in use, {size(device['torch_free_bytes'])} cached")
            .append(f"  {clean(device['name'])}", style=DIM)
        )  # fmt: skip
    return lines


def waiting(seen: Seen, look: Look) -> list[Text]:
    """Who waits in line or is held at a gateway, and who needs memory: since when and why."""
    lines: list[Text] = []
    line, held = seen.snapshot.get("line") or [], seen.snapshot.get("held") or []
    for one in line:
        eta = "no ETA" if one.get("eta_seconds") is None else f"ETA {duration(one['eta_seconds'])}"
        text = Text(f"  {one['position']}. ").append(clean(one["owner"]), BOLD)
        lines.append(
            text.append(f": {one['required']}, {one['priority']}, for {duration(one['waited_seconds'])}, {eta}")
        )
    for call in held:
        upstream = {"ollama": "Ollama", "comfyui": "ComfyUI"}.get(call["upstream"], clean(call["upstream"]))
        text = Text(f"  {upstream}: ").append(clean(call["what"]), BOLD)
        lines.append(text.append(f", held for {duration(call['waited_seconds'])}: {clean(call['why'])}"))
    for demand in seen.snapshot.get("demands") or []:
        if demand["kind"] == "waiting" and line:
            # Those are the ones in line.
            continue
        needs = f" (needs {size(demand['need_free_bytes'])} free, for {duration(demand.get('age_seconds') or 0)})"
        lines.append(styled(f"  {clean(demand['reason'])}", WARN).append(needs, DIM))
    return [heading("Waiting", look), *lines] if lines else []


def leases(seen: Seen, look: Look, now: float) -> list[Text]:
    """What is promised to whom, and how much of it is taken."""
    lines = []
    for lease in seen.snapshot.get("leases") or []:
        line = Text("  ").append(clean(lease["owner"]), BOLD)
        line.append(f": {size(lease['bytes'])}, {size(lease['visible_bytes'])} taken")
        if lease.get("overclaimed_bytes"):
            line.append(f", {size(lease['overclaimed_bytes'])} MORE THAN ASKED FOR", BAD)
        until = "held by its connection" if lease.get("expires_at") is None else _until(lease["expires_at"], now)
        lines.append(line.append(f"; {until}  {clean(lease['id'])}", DIM))
    return [heading("Leases", look), *lines] if lines else []


def nodes(seen: Seen, look: Look) -> list[Text]:
    """Other machines with an Ollama."""
    lines = []
    for node in seen.snapshot.get("nodes") or []:
        line = Text("  ").append(clean(urlsplit(node["url"]).netloc or node["url"]), BOLD)
        if node.get("state") != "ok":
            lines.append(line.append(f": {clean(node.get('why') or 'not read yet')}", WARN))
            continue
        verdict = node.get("verdict") or "unknown"
        style = BAD if verdict == "cpu" else WARN if verdict in ("split", "unknown") else GOOD
        names = ", ".join(clean(model["name"]) for model in node.get("models") or [])
        line.append(": ").append(verdict, style)
        lines.append(line.append(f", {size(node.get('vram_bytes'))} in VRAM").append(f"  {names}", DIM))
    return [heading("Nodes", look), *lines] if lines else []


def leaks(seen: Seen, look: Look) -> list[Text]:
    """Whose memory grows and does not come back."""
    lines = [
        styled(f"  {clean(floor['tenant'])}: ", BOLD).append(
            f"{size(floor['growth_bytes'])} more than at first, after {floor['generations']} generations", WARN
        )
        for floor in seen.snapshot.get("floors") or []
        if floor.get("leak")
    ]
    return [heading("Leaks", look), *lines] if lines else []
