"""How much will it need? From what was measured, from the table of the settings, or from what the files tell."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from math import ceil
from typing import Final

from vram_manager.domain.model_facts import ModelFacts
from vram_manager.domain.size import GIB, MAX_BYTES, MIB
from vram_manager.policy.rules import Rules

DEFAULT_KEY: Final = "default"
"""This key of the table is no pattern: its size replaces the default estimate."""

# 0.3-0.7 GiB at batch 512, 378 MiB in the log sample of llama.cpp's source: a first guess until it is measured.
_COMPUTE_BYTES: Final = GIB // 2
# A projector computes in 10-250 MiB of its own, depending on the size of the picture.
_PROJECTOR_COMPUTE_BYTES: Final = 250 * MIB
_CELLS_STEP: Final = 256  # llama.cpp pads the cells of a cache to this
_BATCH: Final = 512  # n_ubatch: a sliding window holds one batch beside the window

# Every n-th layer sees everything (llama.cpp: set_swa_pattern). Others that have a window are counted without it.
_LAYER_PATTERNS: Final = {"gemma2": 2, "gemma3": 6, "gemma3n": 5, "cohere2": 4, "gptoss": 2, "gpt-oss": 2}

# Ollama chooses by the total VRAM of all GPUs (server/routes.go:Serve, v0.15.5); 4096 also where that is unknown.
_CONTEXT_TIERS: Final = ((47 * GIB, 262144), (23 * GIB, 32768), (0, 4096))

# ComfyUI keeps this much free of weights whatever it computes (model_management.py: minimum_inference_memory).
_WORKING_FLOOR_BYTES: Final = 8 * GIB // 10
# MiB for each latent cell: 2 prompts x 2 bytes x 0.01 x factor (model_base.py:memory_required). The factor is of
# Flux (3.1), among the largest of comfy/supported_models.py.
_WORKING_BYTES_PER_CELL: Final = 2 * 2 * 0.01 * 3.1 * MIB
# Bytes for each cell of a picture that a VAE decodes in 16 bits (sd.py:VAE). In tiles it would do with less, but it
# takes all of this where it is free, also where somebody else is about to load.
_DECODING_BYTES_PER_CELL: Final = 2178 * 64 * 2


def bounded(size_bytes: float) -> int:
    """A size that can be asked for: more than nothing, and no more than any memory."""
    return int(min(max(size_bytes, 1), MAX_BYTES))


def percentile95(samples: Sequence[int]) -> int:
    """The smallest sample that 95 % of them do not exceed. Raises IndexError when there is none."""
    return sorted(samples)[ceil(len(samples) * 0.95) - 1]


def canonical(name: str) -> str:
    """A model's name as Ollama compares it: without case and scheme, tag `latest` by default, the registry left out."""
    name = name.lower().rpartition("://")[2].removeprefix("registry.ollama.ai/").removeprefix("library/")
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


def from_table(names: Iterable[str], estimates: Mapping[str, int]) -> tuple[str, int] | None:
    """The pattern that fits and its bytes; None when none does.

    A pattern with * or ? must match a whole name, one without any part of it; case does not count. For each name
    the longest pattern wins, and of several names the one that needs most.
    """
    found = [fit for name in names if (fit := _longest(name.lower(), estimates))]
    return max(found, key=lambda fit: fit[1], default=None)


def _longest(name: str, estimates: Mapping[str, int]) -> tuple[str, int] | None:
    fits = [(pattern, size) for pattern, size in estimates.items() if _fits(name, pattern.lower())]
    return max(fits, key=lambda fit: (len(fit[0]), fit[1]), default=None)


def _fits(name: str, pattern: str) -> bool:
    if pattern in ("", DEFAULT_KEY):
        return False
    return fnmatchcase(name, pattern) if "*" in pattern or "?" in pattern else pattern in name


def default_bytes(rules: Rules) -> int:
    """What counts when nothing is known."""
    own = next((size for key, size in rules.estimates.items() if key.lower() == DEFAULT_KEY), None)
    return bounded(rules.default_estimate_bytes if own is None else own)


def model_subject(digest: str, context: int) -> str:
    """What the peaks of a model of Ollama's are remembered under."""
    return f"model:{digest}:{context}"


def default_context(total_bytes: int | None) -> int:
    """The context that Ollama gives when nobody asks for one, with that much VRAM in all; None: unknown."""
    return next(context for least, context in _CONTEXT_TIERS if (total_bytes or 0) >= least)


def model_bytes(facts: ModelFacts, context: int, *, file_bytes: int, rules: Rules) -> int:
    """What a model will hold on one GPU, wholly offloaded: weights, the KV cache of every slot, and the rest.

    It is 5-10 % off for ordinary models. Recurrent layers count as attention, so a hybrid needs less than this.
    """
    weights = file_bytes if facts.weights_bytes is None else facts.weights_bytes
    rest = _COMPUTE_BYTES + rules.context_bytes + (_PROJECTOR_COMPUTE_BYTES if facts.has_projector else 0)
    return bounded(weights + _kv_bytes(facts, context * rules.ollama_parallel, rules.kv_value_bytes) + rest)


def _kv_bytes(facts: ModelFacts, context: int, value_bytes: float) -> int:
    """Keys and values of every layer; none for a model without attention, whose state is small and fixed."""
    heads = facts.heads or 0
    head_length = (facts.embedding_length or 0) // max(1, heads)
    length = (facts.key_length or head_length) + (facts.value_length or head_length)
    # Where layers differ in their heads, /api/show leaves them out: as many as there are queries is the most.
    cell_bytes = int((heads if facts.kv_heads is None else facts.kv_heads) * length * value_bytes)
    layers = facts.layers or 0
    cells = _padded(context)
    pattern = facts.layer_pattern or _LAYER_PATTERNS.get(facts.architecture)
    if not facts.sliding_window or not pattern:
        return layers * cells * cell_bytes
    whole = layers // pattern
    window_cells = min(cells, _padded(facts.sliding_window + _BATCH))
    return (whole * cells + (layers - whole) * window_cells) * cell_bytes


def _padded(cells: int) -> int:
    return -(-cells // _CELLS_STEP) * _CELLS_STEP


def workflow_bytes(weights_bytes: int, latent_cells: int, decoded_cells: int = 0) -> int:
    """What ComfyUI will hold for a workflow with room for all of it: its files, and what the sampler works with.

    With less room it loads in stages and works more slowly, so this is no least amount.
    """
    sampling, decoding = latent_cells * _WORKING_BYTES_PER_CELL, decoded_cells * _DECODING_BYTES_PER_CELL
    return bounded(weights_bytes + max(_WORKING_FLOOR_BYTES, sampling, decoding))
