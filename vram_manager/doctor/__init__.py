"""Checks every part for real, from where it is started, and says how to mend what is wrong.

Nothing is freed: ComfyUI's `/free` is asked with an empty object, which sets no flag and wakes no worker.
"""

from __future__ import annotations

import asyncio
import os

from vram_manager import config
from vram_manager.config import Settings
from vram_manager.doctor import gateways, gpus, servers, surroundings
from vram_manager.doctor.finding import Finding, in_words

__all__ = ["Finding", "examine", "in_words"]


def examine(settings: Settings) -> list[Finding]:
    """Looks at every part; what one part answers never hides another."""
    return asyncio.run(_examine(settings))


async def _examine(settings: Settings) -> list[Finding]:
    findings = [Finding("settings", "note", words) for words in config.unknown_names(os.environ)]
    if not findings:
        findings.append(Finding("settings", "fine", f"profile {settings.policy.vram_profile}, every name known"))
    seen, about_gpus = await gpus.gpus(settings)
    findings += about_gpus
    findings += await servers.ollama(settings)
    findings += await servers.comfyui(settings, seen)
    findings += await servers.nodes(settings)
    findings.append(surroundings.state(settings))
    findings += surroundings.page(settings, in_container=surroundings.in_container())
    findings += await surroundings.webhook(settings)
    daemon = surroundings.daemon(settings)
    findings += await gateways.gateways(settings, running=daemon.verdict == "fine")
    findings += gateways.about_gateway_host(settings, in_container=surroundings.in_container())
    return [*findings, daemon]
