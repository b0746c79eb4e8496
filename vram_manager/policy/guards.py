"""Why not now: what holds an action back, and until when."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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
        why=f"ComfyUI has been idle for {idle_for:.1f} s of {idle_seconds:g} s",
        again_seconds=idle_seconds - idle_for,
    )


def spacing(target: str, posted_at: Mapping[str, float], seconds: float, now: float, word: str) -> Hold | None:
    """`seconds` must lie between two posts to one target; `word` says which rule this is."""
    last = posted_at.get(target)
    if last is None or now - last >= seconds:
        return None
    return Hold(
        branch=f"5 {word}",
        why=f"{word}: {target} was asked {now - last:.0f} s ago, {seconds:g} s must pass",
        again_seconds=seconds - (now - last),
    )


def budget(frees_at: tuple[float, ...], now: float, rules: Rules) -> Hold | None:
    recent = [at for at in frees_at if now - at < HOUR_SECONDS]
    if len(recent) < rules.max_frees_per_hour:
        return None
    return Hold(
        branch="5 budget",
        why=f"{len(recent)} frees within the hour: more would be ping-pong",
        again_seconds=HOUR_SECONDS - (now - recent[0]) if recent else None,
    )
