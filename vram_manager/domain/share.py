"""Who has how much of a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Certainty(StrEnum):
    """How we know: counted by somebody, learned from an earlier free, or only unaccounted for."""

    MEASURED = "measured"
    LEARNED = "learned"
    PERHAPS = "perhaps"


class ShareKind(StrEnum):
    """What sort of tenant; in this order they are drawn, from the bottom up.

    COMFYUI_UNSEEN is what ComfyUI has beside torch: weights under DynamicVRAM. OTHERS is what nobody accounts for.
    """

    OLLAMA = "ollama"
    COMFYUI_IN_USE = "comfyui_in_use"
    COMFYUI_CACHED = "comfyui_cached"
    COMFYUI_UNSEEN = "comfyui_unseen"
    WORKER = "worker"
    PROCESS = "process"
    OTHERS = "others"


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A tenant's part of the memory that is taken on one GPU.

    `tenant` is a name that stays the same over time: "ollama:llama3.1:8b", "comfyui in use", "worker:tts",
    "process:Xorg", "others".
    """

    kind: ShareKind
    tenant: str
    bytes: int
    certainty: Certainty = Certainty.MEASURED
