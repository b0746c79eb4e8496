"""Both gateways of one daemon: built from the settings, fed by the cycle, open while the daemon listens."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from vram_manager.config import Settings
from vram_manager.domain.snapshot import OllamaState, Snapshot
from vram_manager.errors import SettingsError
from vram_manager.gateway.waiting import Desk, Waiter

if TYPE_CHECKING:
    from vram_manager.gateway.comfyui import ComfyUIGate
    from vram_manager.gateway.ollama import OllamaGate
    from vram_manager.gateway.proxy import Gate, Proxy

# Docker sends SIGKILL 10 s after SIGTERM.
STOP_GRACE_SECONDS = 5.0
# A part of the daemon died: whatever streams may end before the restart cuts it off.
CRASH_GRACE_SECONDS = 60.0
MOST_DESCRIPTORS = 65536


class Gateways:
    """`ollama` and `comfyui` are the gates, None where the port is not set."""

    def __init__(self, desk: Desk, settings: Settings) -> None:
        gateway = settings.gateway
        self._desk = desk
        self._host = gateway.gateway_host
        self._grace_seconds = STOP_GRACE_SECONDS
        self.ollama: OllamaGate | None = None
        self.comfyui: ComfyUIGate | None = None
        self._doors: list[tuple[str, int, Gate, bool]] = []
        # Here, because together they cost 1 MiB that a daemon without gateways need not have.
        if gateway.gateway_ollama_port and settings.ollama.ollama_url:
            from vram_manager.gateway.ollama import OllamaGate  # noqa: PLC0415

            self.ollama = OllamaGate(desk)
            self._doors.append((settings.ollama.ollama_url, gateway.gateway_ollama_port, self.ollama, True))
        if gateway.gateway_comfyui_port and settings.comfyui.comfyui_url:
            from vram_manager.gateway.comfyui import ComfyUIGate  # noqa: PLC0415

            self.comfyui = ComfyUIGate(desk)
            self._doors.append((settings.comfyui.comfyui_url, gateway.gateway_comfyui_port, self.comfyui, False))

    def served(self, ollama: OllamaState) -> OllamaState:
        """Ollama's models with what goes through the gateway, if there is one."""
        return ollama if self.ollama is None else self.ollama.served(ollama)

    def with_prompts(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot with prompts that ComfyUI has not been seen to have yet."""
        return snapshot if self.comfyui is None else self.comfyui.with_prompts(snapshot)

    def seen(self, snapshot: Snapshot) -> None:
        """A turn of the cycle: promises that are kept by now end, and whoever waits looks again."""
        if self.ollama is not None:
            self.ollama.seen(snapshot)
        if self.comfyui is not None:
            self.comfyui.seen(snapshot)
        self._desk.turned()

    def waiting(self) -> tuple[Waiter, ...]:
        """Every call that is held now, the first to come first."""
        return tuple(sorted(self._desk.waiting.values(), key=lambda waiter: waiter.since))

    def crashed(self) -> None:
        """Nobody decides any more: from here on these are plain proxies, for as long as somebody streams."""
        self._grace_seconds = CRASH_GRACE_SECONDS
        self.stop()

    def stop(self) -> None:
        """Whoever waits goes on at once."""
        self._desk.stop()

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        """The ports are open inside the block; what is under way at its end has some seconds to finish."""
        if not self._doors:
            yield
            return
        from vram_manager.gateway.proxy import Proxy  # noqa: PLC0415

        proxies: list[Proxy] = []
        _more_descriptors()
        try:
            for url, port, gate, rewrite_host in self._doors:
                proxy = Proxy(url, gate, rewrite_host=rewrite_host)
                proxies.append(proxy)
                try:
                    await proxy.listen(self._host, port)
                except SettingsError as error:
                    name = "GATEWAY_COMFYUI_PORT" if gate is self.comfyui else "GATEWAY_OLLAMA_PORT"
                    raise SettingsError(f"GATEWAY_HOST={self._host} {name}={port}: {error}") from error
            yield
        finally:
            self.stop()
            for proxy in proxies:
                await proxy.close(self._grace_seconds)


def _more_descriptors() -> None:
    """Each stream takes two; 1024, the usual soft limit, is for programs that use select()."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
