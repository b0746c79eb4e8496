"""What Ollama tells about a model on its disk: what is needed to foresee how much memory it takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredModel:
    """A model of Ollama's library. `digest` names its content, `file_bytes` is all of its layers on disk."""

    digest: str
    file_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """One model as `/api/show` tells it; None is not told, or differs from layer to layer.

    `weights_bytes` is what its tensors and its projector take on a GPU, where that can be told exactly.
    Lengths of keys and values are per head, windows and contexts in tokens, `asked_context` is the model's own
    num_ctx. `layer_pattern`: every so many layers one sees the whole context, the others only the window.
    `blob` is the digest (64 hex digits) of the file with its weights: names that share it share one runner.
    `asked_num_gpu` is how many layers the model itself wants on the GPU; None also where that is left to Ollama.
    """

    architecture: str
    weights_bytes: int | None = None
    layers: int | None = None
    embedding_length: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    key_length: int | None = None
    value_length: int | None = None
    sliding_window: int | None = None
    layer_pattern: int | None = None
    trained_context: int | None = None
    asked_context: int | None = None
    asked_num_gpu: int | None = None
    has_projector: bool = False
    blob: str | None = None

    @property
    def hides_memory(self) -> bool:
        """Is more taken than `/api/ps` says?

        Of two KV caches it counts the smaller one, of a projector nothing (llm/llama_server.go, v0.30+).
        """
        return self.has_projector or bool(self.sliding_window)
