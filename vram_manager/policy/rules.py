"""The numbers the rules go by. `config` builds this from the environment; defaults are the balanced profile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vram_manager.domain.size import GIB, MIB, Size


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Every number of the policy, with its reason where it is not simply a setting."""

    threshold_percent: float = 75.0
    unload_threshold_percent: float = 85.0
    grace_seconds: float = 30.0
    empty_room_grace_seconds: float = 600.0
    """Grace when nobody would gain: no traffic at Ollama for `empty_room_after_seconds`."""
    empty_room_after_seconds: float = 600.0
    cooldown_seconds: float = 30.0
    settle_timeout_seconds: float = 10.0
    min_reclaim_bytes: int = 256 * MIB
    comfyui_idle_seconds: float = 30.0
    waiting_idle_seconds: float = 2.0
    """Idle time when somebody suffers. 2 s: a flag posted as a prompt ends can be lost until the next
    wake-up (1 of 12 right at the end, 0 of 12 from 1 s on; ComfyUI execution.py:PromptQueue.set_flag)."""
    post_spacing_seconds: float = 2.0
    """Two posts closer than this lost a flag in 7 of 12 runs at 0.05-0.3 s and in none of 4 at 1.5 s."""
    repost_after_seconds: float = 3.0
    """An idle ComfyUI acts within 0.7 s and returns the memory within about a second of that."""
    max_frees_per_hour: int = 40
    """A budget against ping-pong: at the default cooldown it bites only when every free is undone at once."""
    max_waited_frees_per_hour: int = 240
    """The same where somebody waits in line: one for each 15 s, what the cooldowns of two sides leave."""
    evict: bool = True
    """Ollama's idle models give way to ComfyUI, to workers and to each other."""
    pinned: frozenset[str] = frozenset()
    """Models that never do, by the name that Ollama compares (`estimate.canonical`)."""
    min_residency_seconds: float = 5.0
    """A model that was just loaded stays this long, so that a pause between two chats does not cost a reload."""
    model_idle_seconds: float = 2.0
    """Without a request through the gateway for this long a model is idle; who asks in a loop is back sooner."""
    unseen_idle_seconds: float = 5.0
    """The same without a gateway, where only the end of a request can be seen."""
    chat_turn_seconds: float = 10.0
    """A chat that has waited this long is let in before further prompts."""
    image_turn_seconds: float = 10.0
    """A prompt that has waited this long is let in before further chats with the models in its way."""
    repair: bool = True
    """Models that fell to the CPU are loaded again once there is room."""
    max_repairs_per_hour: int = 3
    """Of one model: each costs its users a reload."""
    repair_backoff_seconds: float = 60.0
    """After a repair that failed; doubled with each."""
    warm_back: bool = False
    """The last model that made room for ComfyUI comes back when ComfyUI's queue has drained."""
    fallback_ttl_seconds: float = 60.0
    """A model that left before room could be made is likely to come back: its demand lives on this long."""
    fit_margin_bytes: int = GIB
    """llama.cpp puts every layer on the GPU only with this much to spare (common.h: fit_params_target)."""
    context_bytes: int = GIB // 2
    """A CUDA context with its libraries takes 0.3-0.6 GiB that no API reports."""
    unseen_allowance_bytes: int = GIB
    """Contexts, desktop and driver that nobody accounts for on an idle card: 1.1-1.3 GB in public samples."""
    dead_worker_seconds: float = 600.0
    """Nodes that call remote services keep the GPU idle for minutes; ten of them without a move is dead."""
    interval_seconds: float = 5.0
    comfyui_gpu: str | None = None
    ollama_gpu: str | None = None
    fail_open: bool = True
    """Admit when the GPU cannot be read."""
    safety_margin_bytes: int = 2 * GIB
    default_estimate_bytes: int = 8 * GIB
    estimates: Mapping[str, int] = field(default_factory=dict)
    """Bytes by pattern of a model's name or file."""
    soft_limit: Size = Size(percent=90.0)
    hard_limit: Size = Size(percent=95.0)
    soft_limit_seconds: float = 30.0
    leak_threshold_bytes: int = 100 * MIB
    leak_generations: int = 100
    ollama_parallel: int = 1
    """Slots of each model, OLLAMA_NUM_PARALLEL: each has a KV cache of its own. In no reply of Ollama's."""
    kv_value_bytes: float = 2.0
    """Bytes of one value in that cache: f16, unless OLLAMA_KV_CACHE_TYPE says otherwise. In no reply either."""
    enabled: bool = True
    dry_run: bool = False
