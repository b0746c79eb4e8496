"""Ollama: `/api/ps` says what is loaded, `keep_alive: 0` unloads. Names of the sources are of v0.33."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from math import isinf, prod
from typing import Annotated, Final

from pydantic import BeforeValidator, Field

from vram_manager.backends.http import HttpStatus, JsonClient
from vram_manager.backends.shape import Amount, Name, Shape, shaped
from vram_manager.domain.model_facts import ModelFacts, StoredModel
from vram_manager.domain.reading import Missing
from vram_manager.domain.snapshot import LoadedModel, OllamaState
from vram_manager.errors import Rejected, SensorError

# 15 s: before v0.32.4 `ps` waits for the lock of a model that is being killed (5 s for VRAM to return) or
# pinged (10 s), see server/sched.go:waitForVRAMRecovery and needsReload. Slow is not down.
_PS_SECONDS: Final = 15.0
_UNLOAD_SECONDS: Final = 15.0  # it answers at once, except while the MLX runner loads and holds the same lock
_LIBRARY_SECONDS: Final = 5.0  # /api/tags and /api/show read files and take no lock
_VERSION_SECONDS: Final = 5.0  # a constant string: server/routes.go, no lock
_VERSION_AGE_SECONDS: Final = 600.0  # an upgrade is usually noticed sooner: the restart fails a reading
# 330 s: it gives up by itself when a load makes no progress for 5 min (OLLAMA_LOAD_TIMEOUT), and says why.
_LOAD_SECONDS: Final = 330.0

# Elements and bytes of a block of each tensor type (ggml.c: type_traits). A type that is not here is not counted.
_BLOCKS: Final = {
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "I32": (1, 4),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q2_K": (256, 84),
    "Q3_K": (256, 110),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
    "IQ1_S": (256, 50),
    "IQ1_M": (256, 56),
    "IQ2_XXS": (256, 66),
    "IQ2_XS": (256, 74),
    "IQ2_S": (256, 82),
    "IQ3_XXS": (256, 98),
    "IQ3_S": (256, 110),
    "IQ4_NL": (32, 18),
    "IQ4_XS": (256, 136),
    "MXFP4": (32, 17),
}
_PROJECTOR_VALUE_BYTES: Final = 2  # projectors come in f16
_NUM_CTX = re.compile(r"^num_ctx\s+([0-9]{1,9})$", re.MULTILINE)
_NUM_GPU = re.compile(r"^num_gpu\s+([0-9]{1,9})$", re.MULTILINE)  # negative: left to Ollama
# The first FROM is the model, a further one its projector (server/images.go:Model.String).
_FROM = re.compile(r"^FROM\s+(.+)$", re.MULTILINE)
_BLOB = re.compile(r"sha256[-:]([0-9a-f]{64})(?![0-9a-f])")


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


class _Tag(Shape):
    """api/types.go:ListModelResponse. `size` is the sum of all layers, projector included."""

    name: Name
    digest: str
    size: Amount
    remote_host: str | None = None


class _Tags(Shape):
    models: list[_Tag]


def _one_number(value: object) -> object:
    """Without `verbose` a number for each layer is null; should it be a list, it is no single number either."""
    return None if isinstance(value, list) else value


_Number = Annotated[Amount | None, BeforeValidator(_one_number)]


class _Architecture(Shape):
    """The keys of a GGUF below the name of its architecture."""

    block_count: _Number = None
    embedding_length: _Number = None
    context_length: _Number = None
    heads: _Number = Field(default=None, alias="attention.head_count")
    kv_heads: _Number = Field(default=None, alias="attention.head_count_kv")
    key_length: _Number = Field(default=None, alias="attention.key_length")
    value_length: _Number = Field(default=None, alias="attention.value_length")
    sliding_window: _Number = Field(default=None, alias="attention.sliding_window")
    layer_pattern: _Number = Field(default=None, alias="attention.sliding_window_pattern")


class _General(Shape):
    """The keys that every GGUF has."""

    architecture: Name = Field(default="unknown", alias="general.architecture")
    parameter_count: _Number = Field(default=None, alias="general.parameter_count")


class _Tensor(Shape):
    """`shape` has at most 4 sides (ggml.h: GGML_MAX_DIMS)."""

    name: str
    type: str
    shape: Annotated[list[Amount], Field(max_length=4)]


class _Shown(Shape):
    """api/types.go:ShowResponse. `tensors` came with v0.6.1; models that are no GGUF have little of this."""

    modelfile: str | None = None
    parameters: str | None = None
    model_info: dict[str, object] | None = None
    projector_info: dict[str, object] | None = None
    tensors: list[_Tensor] | None = None


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


def parse_tags(document: object) -> dict[str, StoredModel]:
    """The models of a `GET /api/tags` reply that are on this machine, by name."""
    return {
        model.name: StoredModel(digest=model.digest, file_bytes=model.size)
        for model in shaped(_Tags, document).models
        if not model.remote_host and not _is_cloud(model.name)
    }


def parse_show(document: object) -> ModelFacts:
    """What a `POST /api/show` reply tells of the memory that the model will take."""
    shown = shaped(_Shown, document)
    info = shown.model_info or {}
    general = shaped(_General, info)
    own = f"{general.architecture}."
    model = shaped(_Architecture, {key.removeprefix(own): info[key] for key in info if key.startswith(own)})
    num_ctx = _NUM_CTX.search(shown.parameters or "")
    num_gpu = _NUM_GPU.search(shown.parameters or "")
    source = _FROM.search(shown.modelfile or "")
    blob = _BLOB.search(source[1]) if source else None
    return ModelFacts(
        architecture=general.architecture,
        weights_bytes=_weights_bytes(shown, general.parameter_count),
        layers=model.block_count,
        embedding_length=model.embedding_length,
        heads=model.heads,
        kv_heads=model.kv_heads,
        key_length=model.key_length,
        value_length=model.value_length,
        sliding_window=model.sliding_window,
        layer_pattern=model.layer_pattern,
        trained_context=model.context_length or None,
        asked_context=(int(num_ctx[1]) or None) if num_ctx else None,
        asked_num_gpu=int(num_gpu[1]) if num_gpu else None,
        has_projector=bool(shown.projector_info),
        blob=blob[1] if blob else None,
    )


def _weights_bytes(shown: _Shown, parameters: int | None) -> int | None:
    """Bytes of all tensors and the projector on a GPU; None unless every one is listed and of a known type.

    The input embedding stays on the CPU, unless the model has no output of its own and uses it for that.
    """
    tensors = shown.tensors or []
    elements = {tensor.name: prod(tensor.shape) for tensor in tensors}
    projector = shaped(_General, shown.projector_info or {"general.parameter_count": 0}).parameter_count
    known = all(tensor.type in _BLOCKS for tensor in tensors)
    # 1 % less: whoever converted the model may have counted in another way.
    if projector is None or not known or sum(elements.values()) < (parameters or 1) * 0.99:
        return None
    taken = sum(
        elements[tensor.name] * _BLOCKS[tensor.type][1] // _BLOCKS[tensor.type][0]
        for tensor in tensors
        if tensor.name != "token_embd.weight" or "output.weight" not in elements
    )
    return taken + projector * _PROJECTOR_VALUE_BYTES


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

    async def library(self) -> Mapping[str, StoredModel]:
        """The models on the server's disk by name, without those that run in the cloud."""
        return await self._client.get("/api/tags", parse_tags, deadline=_LIBRARY_SECONDS)

    async def show(self, model: str) -> ModelFacts:
        """What `model` is made of. Rejected when there is none of that name."""
        return await self._client.query("/api/show", {"model": model}, parse_show, deadline=_LIBRARY_SECONDS)

    async def unload(self, model: str) -> None:
        """The model leaves when its running requests are done (server/sched.go:expireRunner).

        It must be listed: before v0.3.11 the same call loads a model that is not loaded, and on newer
        versions it answers 200 though there was nothing to do (server/routes.go:GenerateHandler).
        """
        if all(loaded.name != model for loaded in await self._loaded()):
            raise Rejected(f"{model}: not in GET /api/ps, so there is nothing to unload")
        await self._client.post("/api/generate", {"model": model, "keep_alive": 0}, deadline=_UNLOAD_SECONDS)

    async def load(self, model: str, *, context: int | None, keep_alive_seconds: float | None) -> None:
        """`model` is loaded, with `context` tokens and kept so long after its last use; None is left to Ollama.

        A request without a prompt only loads (server/routes.go:GenerateHandler); a model that only embeds
        refuses that, and loads for no input. A keep_alive of 0 is not sent: it would be an unload.
        """
        body: dict[str, object] = {"model": model}
        if keep_alive_seconds:
            body["keep_alive"] = -1 if isinf(keep_alive_seconds) else keep_alive_seconds
        if context is not None:
            body["options"] = {"num_ctx": context}
        try:
            await self._client.post("/api/generate", body, deadline=_LOAD_SECONDS)
        except HttpStatus as error:
            if error.status != 400 or not error.why.endswith("does not support generate"):
                raise
            await self._client.post("/api/embed", body, deadline=_LOAD_SECONDS)

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
