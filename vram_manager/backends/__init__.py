"""One file per server, which both sees and frees it: both change with that server's releases.

Servers never import each other; `http.py` and `shape.py` are what they have in common (ComfyUI's replies
have grown into `comfyui_replies.py`). They ask with a deadline, parse strictly and raise nothing but
`SensorError`. They decide nothing, remember no reading and log nothing. The rest of the daemon knows only
the two protocols below.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Protocol

from vram_manager.domain.model_facts import ModelFacts, StoredModel
from vram_manager.domain.snapshot import ComfyUIState, OllamaState


class Ollama(Protocol):
    """Lists, loads and unloads models. Every call may raise SensorError."""

    async def models(self) -> OllamaState:
        """The loaded models and the server's version; `active_at` is left for the observer to fill."""
        ...

    async def library(self) -> Mapping[str, StoredModel]:
        """The models on its disk by name, without those that run elsewhere."""
        ...

    async def show(self, model: str) -> ModelFacts:
        """What it tells about one of them. Rejected: there is none of that name."""
        ...

    async def unload(self, model: str) -> None:
        """Ollama has agreed to unload `model` after its running requests. The memory is not free yet."""
        ...

    async def load(self, model: str, *, context: int | None, keep_alive_seconds: float | None) -> None:
        """`model` is loaded; that may take minutes. None leaves context (tokens) or keep_alive (inf: forever) to it."""
        ...

    async def aclose(self) -> None:
        """No connection is left open."""
        ...


class ComfyUI(Protocol):
    """Tells its devices and its queue, and takes a request to free. Every call may raise SensorError."""

    async def stats(self) -> ComfyUIState:
        """Version, launch arguments and the devices that have memory of their own."""
        ...

    async def queue_remaining(self) -> int:
        """How many prompts are running or pending."""
        ...

    async def prompts(self) -> tuple[object, ...]:
        """The workflows of running, then pending prompts in the order of their turn, at most the first 20."""
        ...

    def statuses(self) -> AsyncIterator[int]:
        """Each number of remaining prompts that ComfyUI pushes, beginning with the present one.

        Never ends quietly: a SensorError says that the connection is gone, and the caller connects again.
        """
        ...

    async def model_sizes(self, folder: str) -> Mapping[str, int]:
        """Bytes of each file in a models folder, by its name below it. Rejected: there is no such folder."""
        ...

    async def free(self, body: Mapping[str, bool]) -> None:
        """The flags in `body` are set. Whether and when memory comes back only a later snapshot shows."""
        ...

    async def aclose(self) -> None:
        """No connection is left open. An iterator of `statuses` is closed by whoever iterates it."""
        ...
