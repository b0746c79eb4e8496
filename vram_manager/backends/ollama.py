"""Ollama: `/api/ps` says what is loaded, `keep_alive: 0` unloads. Names of the sources are of v0.33."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Annotated, Final

from pydantic import BeforeValidator

from vram_manager.backends.http import JsonClient
from vram_manager.backends.shape import Amount, Name, Shape, shaped
from vram_manager.domain.reading import Missing
from vram_manager.domain.snapshot import LoadedModel, OllamaState
from vram_manager.errors import Rejected, SensorError

# 15 s: before v0.32.4 `ps` waits for the lock of a model that is being killed (5 s for VRAM to return) or
# pinged (10 s), see server/sched.go:waitForVRAMRecovery and needsReload. Slow is not down.
_PS_SECONDS: Final = 15.0
_UNLOAD_SECONDS: Final = 15.0  # it answers at once, except while the MLX runner loads and holds the same lock
_VERSION_SECONDS: Final = 5.0  # a constant string: server/routes.go, no lock
_VERSION_AGE_SECONDS: Final = 600.0  # an upgrade is usually noticed sooner: the restart fails a reading


def _moment(text: object) -> datetime | None:
    """A time with its zone, in UTC; None for whatever else, as nothing hangs on it."""
    try:
        # Go writes up to nine decimals; fromisoformat cuts them to six.
        moment = datetime.fromisoformat(text) if isinstance(text, str) else None
        return moment.astimezone(UTC) if moment and moment.tzinfo else None
    except (ValueError, OverflowError):
        return None


class _Model(Shape):
    """api/types.go:ProcessModelResponse. `context_length` came with v0.10."""

    name: Name
    digest: str
    size: Amount
    size_vram: Amount
    context_length: Amount | None = None
    expires_at: Annotated[datetime | None, BeforeValidator(_moment)] = None


class _Ps(Shape):
    models: list[_Model]


class _Version(Shape):
    version: Name


def parse_ps(document: object) -> tuple[LoadedModel, ...]:
    """The models of a `GET /api/ps` reply that are on this machine, in its order."""
    return tuple(
        LoadedModel(
            name=model.name,
            digest=model.digest,
            size_bytes=model.size,
            size_vram_bytes=model.size_vram,
            context_length=model.context_length,
            expires_at=model.expires_at,
        )
        for model in shaped(_Ps, document).models
        if not _is_cloud(model.name)
    )


def parse_version(document: object) -> str:
    """The version in a `GET /api/version` reply; builds from source say 0.0.0."""
    return shaped(_Version, document).version


def _is_cloud(name: str) -> bool:
    """Cloud models run elsewhere and hold no VRAM here; names are not case-sensitive (internal/modelref)."""
    return name.lower().endswith((":cloud", "-cloud"))


class HttpOllama:
    """Ollama over HTTP."""

    def __init__(self, client: JsonClient) -> None:
        self._client = client
        self._version: str | Missing = Missing("GET /api/version: not asked yet")
        self._version_due = 0.0

    async def models(self) -> OllamaState:
        """What is loaded now, and by which version. Without a version it is still a reading."""
        try:
            models = await self._loaded()
        except SensorError:
            self._version = Missing("GET /api/version: not asked since the server failed to answer")
            raise
        return OllamaState(version=await self._known_version(), models=models)

    async def unload(self, model: str) -> None:
        """The model leaves when its running requests are done (server/sched.go:expireRunner).

        It must be listed: before v0.3.11 the same call loads a model that is not loaded, and on newer
        versions it answers 200 though there was nothing to do (server/routes.go:GenerateHandler).
        """
        if all(loaded.name != model for loaded in await self._loaded()):
            raise Rejected(f"{model}: not in GET /api/ps, so there is nothing to unload")
        await self._client.post("/api/generate", {"model": model, "keep_alive": 0}, deadline=_UNLOAD_SECONDS)

    async def aclose(self) -> None:
        """No connection is left open."""
        await self._client.aclose()

    async def _loaded(self) -> tuple[LoadedModel, ...]:
        return await self._client.get("/api/ps", parse_ps, deadline=_PS_SECONDS)

    async def _known_version(self) -> str | Missing:
        now = asyncio.get_running_loop().time()
        if isinstance(self._version, Missing) or now >= self._version_due:
            self._version_due = now + _VERSION_AGE_SECONDS
            ask = self._client.get("/api/version", parse_version, deadline=_VERSION_SECONDS)
            try:
                self._version = await ask
            except SensorError as error:
                self._version = Missing(error.why, error.remedy)
        return self._version
