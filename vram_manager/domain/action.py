"""What can be asked of a backend. Asking is not freeing: the proof is a later snapshot."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import TypeAlias


class Stage(StrEnum):
    """How hard ComfyUI is asked: models off the GPU, or models and node outputs dropped altogether."""

    SOFT = "soft"
    UNLOAD = "unload"


@dataclass(frozen=True, slots=True, kw_only=True)
class FreeComfyUI:
    """Ask ComfyUI's `POST /free`. `forced` is a person's wish that outweighs a busy queue."""

    stage: Stage
    forced: bool = False

    @property
    def target(self) -> str:
        return "comfyui"


@dataclass(frozen=True, slots=True, kw_only=True)
class UnloadModel:
    """Ask Ollama to unload one model (`keep_alive: 0`); it never aborts a running request."""

    model: str
    forced: bool = False

    @property
    def target(self) -> str:
        return f"ollama:{self.model}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadModel:
    """Ask Ollama to load one model again as it was: `context` in tokens, None for the server's own default.

    It is kept until `expires_at`; None: for as long as the server keeps models by itself.
    """

    model: str
    context: int | None
    expires_at: datetime | None

    @property
    def target(self) -> str:
        return f"ollama:{self.model}"


Action: TypeAlias = FreeComfyUI | UnloadModel | LoadModel
