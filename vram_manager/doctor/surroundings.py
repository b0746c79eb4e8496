"""Where the daemon lives: its state, its socket, its ports, the webhook that it tells."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from vram_manager.client import call
from vram_manager.config import Settings
from vram_manager.doctor.finding import Finding
from vram_manager.errors import Unreachable
from vram_manager.gateway.head import is_loopback


def in_container(root: Path = Path("/"), environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this runs in a container, as far as Docker, Podman and Kubernetes show it."""
    marks = (root / ".dockerenv", root / "run" / ".containerenv")
    return any(mark.exists() for mark in marks) or "KUBERNETES_SERVICE_HOST" in environment


def state(settings: Settings) -> Finding:
    directory = settings.service.vram_state_dir
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        words = f"{directory} cannot be written ({error.strerror}): history is kept in memory only"
        return Finding("state", "note", words, "mount a volume there that this user may write, or set VRAM_STATE_DIR")
    return Finding("state", "fine", f"{directory} can be written")


def daemon(settings: Settings) -> Finding:
    try:
        reply = call("GET", "/health", timeout_seconds=5.0)
    except Unreachable as error:
        return Finding("daemon", "note", str(error), "start it with: vram-manager run")
    words = f"version {reply.body['version']} answers on {settings.service.vram_socket}: {reply.body['status']}"
    if reply.status != 200:
        return Finding("daemon", "wrong", words, "its cycle has stalled: restart it, and report what its log says")
    return Finding("daemon", "fine", words)


def page(settings: Settings, *, in_container: bool) -> list[Finding]:
    """The page and the API over TCP: where, and who may look. A container's own network is not the outside."""
    service = settings.service
    host, port = service.vram_http_host, service.vram_http_port
    if port is None:
        return [Finding("page", "note", "VRAM_HTTP_PORT is empty: there is no page to look at", "set it, such as 8480")]
    shown = f"http://{f'[{host}]' if ':' in host else host}:{port}/"
    may = "changes need VRAM_API_TOKEN" if service.vram_api_token else "read-only, as VRAM_API_TOKEN is empty"
    findings = [Finding("page", "fine", f"{shown}: {may}")]
    if not is_loopback(host) and not in_container:
        words = "whoever can reach this machine can see what runs on it: no password is asked for looking"
        findings.append(Finding("page", "note", words, "VRAM_HTTP_HOST=127.0.0.1, unless that is meant"))
    return findings


async def webhook(settings: Settings) -> list[Finding]:
    """Whether somebody listens at the webhook's address. Nothing is sent; its path may be a secret and is not shown."""
    looking = settings.looking
    if not looking.vram_webhook_url:
        return []
    parts = urlsplit(looking.vram_webhook_url)
    secure = parts.scheme == "https"
    shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
    try:
        async with asyncio.timeout(5):
            port = parts.port or (443 if secure else 80)
            _, writer = await asyncio.open_connection(parts.hostname, port, ssl=True if secure else None)
    except (OSError, TimeoutError) as error:
        words = f"{shown}: cannot be reached ({error or 'no answer within 5 s'})"
        return [Finding("webhook", "wrong", words, "check VRAM_WEBHOOK_URL, and that this container may go out")]
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    findings = [
        Finding("webhook", "fine", f"{shown} can be reached; it is told {len(looking.vram_webhook_events)} events")
    ]
    if looking.vram_webhook_secret is None:
        words = "what it is told is not signed: the receiver cannot tell it from anybody else's"
        findings.append(Finding("webhook", "note", words, "set VRAM_WEBHOOK_SECRET, if the receiver can check it"))
    return findings
