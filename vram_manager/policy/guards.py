"""Why not now: what holds an action back, and until when."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vram_manager.domain.demand import Demand, Kind
from vram_manager.domain.snapshot import Queue
from vram_manager.policy.rules import Rules

HOUR_SECONDS = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """Not now: the branch it is held at, why, and when it could change by itself (None: not by itself)."""

    branch: str
    why: str
    again_seconds: float | None = None


def switched_off(rules: Rules) -> Hold | None:
    if rules.enabled:
        return None
    return Hold(branch="5 off", why="monitoring only (ENABLE_VRAM_MONITORING=false): nothing is freed")


def busy(queue: Queue) -> Hold | None:
    """Never under a running or waiting prompt: the flags would act between two prompts and cost a reload."""
    if queue.idle:
        return None
    return Hold(branch="5 busy", why=f"ComfyUI is busy ({queue.remaining} running or waiting)")


def not_idle_long_enough(queue: Queue, idle_seconds: float, now: float) -> Hold | None:
    idle_for = now - queue.since
    if idle_for >= idle_seconds:
        return None
    return Hold(
        branch="5 idle",
        why=f"ComfyUI has been idle for {idle_for:.1f} s of {round(idle_seconds, 1):g} s",
        again_seconds=idle_seconds - idle_for,
    )


def spacing(target: str, posted_at: Mapping[str, float], seconds: float, now: float, word: str) -> Hold | None:
    """`seconds` must lie between two posts to one target; `word` says which rule this is."""
    last = posted_at.get(target)
    if last is None or now - last >= seconds:
        return None
    return Hold(
        branch=f"5 {word}",
        why=f"{word}: {target} was asked {now - last:.0f} s ago, {round(seconds, 1):g} s must pass",
        again_seconds=seconds - (now - last),
    )


def turn_seconds(demand: Demand | None, rules: Rules) -> float | None:
    """How long one who waits in line leaves the GPU to those who have it; None: nobody waits in line."""
    if demand is None or demand.kind is not Kind.WAITING:
        return None
    return rules.image_turn_seconds if demand.for_comfyui else rules.chat_turn_seconds


def pressing(demand: Demand, now: float, rules: Rules) -> bool:
    """Somebody has waited so long that the side in possession must let them in at its next pause."""
    turn = turn_seconds(demand, rules)
    return turn is not None and now - demand.since >= turn


def cooldown(
    target: str, posted_at: Mapping[str, float], demand: Demand | None, now: float, rules: Rules
) -> Hold | None:
    """The pause between two asks of one target. It keeps nobody in line waiting beyond their turn."""
    seconds, last = rules.cooldown_seconds, posted_at.get(target)
    turn = turn_seconds(demand, rules)
    if demand is not None and turn is not None and last is not None:
        seconds = min(seconds, max(rules.post_spacing_seconds, demand.since + turn - last))
    return spacing(target, posted_at, seconds, now, "cooldown")


def budget(frees_at: tuple[float, ...], now: float, rules: Rules, *, waiting: bool) -> Hold | None:
    """The swaps of an hour. Where somebody waits in line each swap serves them, so there is more to spend."""
    most = rules.max_waited_frees_per_hour if waiting else rules.max_frees_per_hour
    recent = [at for at in frees_at if now - at < HOUR_SECONDS]
    if len(recent) < most:
        return None
    return Hold(
        branch="5 budget",
        why=f"{len(recent)} swaps within the hour, {most} at most: more would be ping-pong",
        again_seconds=HOUR_SECONDS - (now - recent[-most]) if most > 0 else None,
    )
