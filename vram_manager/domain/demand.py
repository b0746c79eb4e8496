"""A demand: somebody needs bytes on a GPU, and until when that stays true."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Kind(IntEnum):
    """Who asks, most urgent first; the letters are those of the tree in `policy.decide`.

    WAITING (3a) is an admission or a gateway's request in line, STARTING (3c) a prompt that ComfyUI has begun or a
    worker's hard limit, WARM_BACK (3e) a model that made room and may come back.
    """

    WAITING = 1
    FALLBACK = 2
    STARTING = 3
    PRESSURE = 4
    WARM_BACK = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """`need_free_bytes` must be free on `gpu` (None: on any GPU the tenant may use) for it to be met.

    It lives until it is met, withdrawn, or `last_seen_at` is too long ago; a rate limit delays it and
    never loses it. `reason` is the clause that goes into the log line of the free it causes. `patient` is one
    that takes nothing from a ComfyUI that may only be pausing. `for_comfyui`: ComfyUI itself needs it, so only
    others can give way. `model` is the Ollama model that needs it: it is not asked to leave for itself.
    """

    kind: Kind
    key: str
    gpu: str | None
    need_free_bytes: int
    reason: str
    since: float
    last_seen_at: float
    patient: bool = False
    for_comfyui: bool = False
    model: str | None = None
