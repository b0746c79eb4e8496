"""Where does an Ollama run its models? On request only: one short generation, or an embedding, and a look at it.

Nothing is evicted for that: what is loaded is used as it is, and stays for as long as after any other use; where
nothing is, the smallest model is loaded and leaves soon. Where the model is, Ollama itself says (`size_vram`); its
speed speaks only where that says nothing, and is put beside it where the two do not go together.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from vram_manager.backends.http import HttpStatus, JsonClient
from vram_manager.backends.ollama import parse_ps, parse_tags
from vram_manager.backends.shape import Amount, Shape, shaped
from vram_manager.domain.reading import Missing
from vram_manager.domain.size import gib
from vram_manager.errors import Rejected, TimedOut

# Loading the smallest model from a slow disk takes a minute.
DEADLINE_SECONDS: Final = 120.0
_LOOK_SECONDS: Final = 15.0
# What we load leaves so long after; until then it can be looked at.
KEEP_SECONDS: Final = 10
# 16: at the 2 tokens/s of a large model on a CPU that is 8 s.
TOKENS: Final = 16
# Fewer say nothing: a model may end its answer at once.
_FEWEST_TOKENS: Final = 4
# Every token reads all weights once, so tokens/s * bytes is how fast memory was read. Two channels of DDR5 give
# 90 GB/s, cards from 200 on, and no CPU's memory 450 but that of servers with 12 channels.
_CPU_BYTES_PER_SECOND, _GPU_BYTES_PER_SECOND = 60e9, 450e9
# An embedding is reckoned, not read: with 2 bytes and 2 operations a weight tokens/s * bytes are operations/s.
# A desktop CPU makes some 0.5e12 of them in such work, a small GPU 5e12.
_CPU_OPERATIONS, _GPU_OPERATIONS = 0.3e12, 5e12
# A small model is slowed down by all else; nothing below this many tokens/s is.
_SLOW_TOKENS_PER_SECOND: Final = 30.0
# As little memory as can be; the default of a large card would be 262144 tokens. Models that see need 2048.
LEAN_CONTEXT: Final = 2048
_PULL: Final = "pull a small one, such as llama3.2:1b"
_PROMPT: Final = "Count from one to one hundred in words."
_TEXT: Final = " ".join(f"The {number} small birds sat on a wire and sang." for number in range(40))


class _Shown(Shape):
    """api/types.go:ShowResponse. `capabilities` came with v0.6.4; experts make only a part of the weights be read."""

    capabilities: list[str] | None = None
    model_info: dict[str, object] | None = None


class _Generated(Shape):
    """api/types.go:Metrics, in nanoseconds; of an answer without a token both are left out."""

    eval_count: Amount = 0
    eval_duration: Amount = 0


class _Embedded(Shape):
    """api/types.go:EmbedResponse."""

    total_duration: Amount = 0
    load_duration: Amount = 0
    prompt_eval_count: Amount = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """What was measured with `model`, of which `size_bytes` were loaded and `size_vram_bytes` of them on a GPU.

    `verdict` is "gpu", "split", "cpu" or "unknown", by what is told or, where `by_speed`, by how fast it was.
    `doubt`: why what is told may be wrong.
    """

    model: str
    kind: str
    tokens_per_second: float | Missing
    size_bytes: int | Missing
    size_vram_bytes: int | Missing
    loaded_for_it: bool
    verdict: str
    by_speed: bool
    doubt: str | None = None

    @property
    def words(self) -> str:
        """All of it in one sentence."""
        if isinstance(self.tokens_per_second, Missing):
            fast = f"speed unknown ({self.tokens_per_second.why})"
        else:
            fast = f"about {self.tokens_per_second:.3g} tokens/s"
        size = "of unknown size" if isinstance(self.size_bytes, Missing) else gib(self.size_bytes)
        where = {"gpu": "on a GPU", "cpu": "on a CPU", "split": "on GPU and CPU"}.get(self.verdict)
        if where is None:
            place = "where it runs cannot be told"
        elif self.by_speed:
            place = f"as {where} (by its speed alone, so not sure)"
        else:
            place = where
        loaded = f"; it was loaded for that and leaves within {KEEP_SECONDS} s" if self.loaded_for_it else ""
        doubt = f"; {self.doubt}" if self.doubt else ""
        what = " of embedding" if self.kind == "embedding" else ""
        return f"{fast}{what} with {self.model} ({size}): {place}{doubt}{loaded}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chosen:
    """`context` is that of a model that is loaded: another one would load it anew (server/sched.go:needsReload)."""

    name: str
    embeds: bool
    experts: bool
    loaded: bool
    context: int | None


async def measured(client: JsonClient, *, deadline_seconds: float = DEADLINE_SECONDS) -> Speed:
    """How fast the Ollama behind `client` is, and where. Raises SensorError with why it cannot be told."""
    try:
        async with asyncio.timeout(deadline_seconds):
            return await _measured(client, deadline_seconds)
    except TimeoutError as error:
        raise TimedOut(f"no result within {deadline_seconds:g} s: it is busy, or loads slowly") from error


def as_json(speed: Speed) -> dict[str, Any]:
    """For machines; what is not known is null."""

    def known(value: float | Missing) -> float | None:
        return None if isinstance(value, Missing) else value

    speed_known = known(speed.tokens_per_second)
    return {
        "model": speed.model,
        "kind": speed.kind,
        "tokens_per_second": None if speed_known is None else round(speed_known, 2),
        "size_bytes": known(speed.size_bytes),
        "size_vram_bytes": known(speed.size_vram_bytes),
        "loaded_for_it": speed.loaded_for_it,
        "verdict": speed.verdict,
        "by": None if speed.verdict == "unknown" else "speed" if speed.by_speed else "size_vram",
        "words": speed.words,
    }


def not_measured(why: str) -> dict[str, Any]:
    """The same where it could not be done."""
    unknown = dict.fromkeys(("model", "kind", "tokens_per_second", "size_bytes", "size_vram_bytes", "loaded_for_it"))
    return {**unknown, "verdict": "unknown", "by": None, "words": f"not measured: {why}"}


async def _measured(client: JsonClient, deadline: float) -> Speed:
    chosen = await _choose(client)
    try:
        fast = await (_embed if chosen.embeds else _generate)(client, chosen, deadline)
    except HttpStatus as error:
        # Before v0.6.4 it did not tell beforehand what a model can do.
        if error.status != 400 or not error.why.endswith("does not support generate"):
            raise
        chosen = replace(chosen, embeds=True)
        fast = await _embed(client, chosen, deadline)
    models = await client.get("/api/ps", parse_ps, deadline=_LOOK_SECONDS)
    seen = next((model for model in models if model.name == chosen.name), None)
    ratio = Missing("it was gone before it could be looked at") if seen is None else seen.cpu_ratio
    guess = by_speed(fast, None if seen is None else seen.size_bytes, embeds=chosen.embeds, experts=chosen.experts)
    told = None if isinstance(ratio, Missing) else "gpu" if ratio == 0 else "cpu" if ratio == 1 else "split"
    doubt = None
    if told == "gpu" and guess == "cpu":
        doubt = "yet that is as slow as on a CPU: a share of the GPU, or it tells wrongly"
    elif told == "cpu" and guess == "gpu":
        doubt = "yet that is as fast as on a GPU: it tells wrongly"
    unknown = ratio if isinstance(ratio, Missing) else None
    return Speed(
        model=chosen.name,
        kind="embedding" if chosen.embeds else "generation",
        tokens_per_second=fast,
        size_bytes=Missing("not listed") if seen is None else seen.size_bytes or Missing("it says 0"),
        size_vram_bytes=unknown or (Missing("not listed") if seen is None else seen.size_vram_bytes),
        loaded_for_it=not chosen.loaded,
        verdict=told or guess,
        by_speed=told is None and guess != "unknown",
        doubt=doubt,
    )


def by_speed(fast: float | Missing, size_bytes: int | None, *, embeds: bool, experts: bool) -> str:
    """ "cpu", "gpu" or "unknown" from tokens/s alone: only where nothing else can be as slow, or as fast.

    With `experts` only a part of the weights is used for a token, so much speed is no proof.
    """
    if isinstance(fast, Missing) or not size_bytes:
        return "unknown"
    work = fast * size_bytes
    slow, quick = (_CPU_OPERATIONS, _GPU_OPERATIONS) if embeds else (_CPU_BYTES_PER_SECOND, _GPU_BYTES_PER_SECOND)
    if work < slow and (embeds or fast < _SLOW_TOKENS_PER_SECOND):
        return "cpu"
    return "gpu" if work > quick and not experts else "unknown"


# ---- which model


async def _choose(client: JsonClient) -> _Chosen:
    """The smallest of those that are loaded, one that generates first; only where none is, the smallest on disk."""
    loaded = {model.name: model for model in await client.get("/api/ps", parse_ps, deadline=_LOOK_SECONDS)}
    sizes = {name: model.size_bytes for name, model in loaded.items()} or await _library(client)
    fallback: _Chosen | None = None
    for name in sorted(sizes, key=lambda name: (sizes[name], name)):
        shown = await client.query("/api/show", {"model": name}, _parse_shown, deadline=_LOOK_SECONDS)
        able = set(shown.capabilities or ("completion", "embedding"))
        chosen = _Chosen(
            name=name,
            embeds="completion" not in able,
            experts=any(key.endswith(".expert_count") for key in shown.model_info or {}),
            loaded=name in loaded,
            context=loaded[name].context_length if name in loaded else LEAN_CONTEXT,
        )
        if "completion" in able or ("embedding" in able and not loaded):
            return chosen
        if "embedding" in able:
            fallback = fallback or chosen
    if fallback is None:
        raise Rejected("no model there generates or embeds", _PULL)
    return fallback


async def _library(client: JsonClient) -> dict[str, int]:
    """The sizes of what it has on disk, without what runs in a cloud and says nothing about this server."""
    stored = await client.get("/api/tags", parse_tags, deadline=_LOOK_SECONDS)
    if not stored:
        raise Rejected("it has no model of its own on disk", _PULL)
    return {name: one.file_bytes for name, one in stored.items()}


def _parse_shown(document: object) -> _Shown:
    return shaped(_Shown, document)


# ---- how fast


def _body(chosen: _Chosen, sampling: Mapping[str, object] | None = None) -> dict[str, object]:
    """Of a model that is loaded nothing is changed: a keep_alive would count for whoever uses it next, too."""
    options: dict[str, object] = {"num_ctx": chosen.context} if chosen.context else {}
    keep = {} if chosen.loaded else {"keep_alive": KEEP_SECONDS}
    return {"model": chosen.name, **keep, "options": {**options, **(sampling or {})}}


async def _generate(client: JsonClient, chosen: _Chosen, deadline: float) -> float | Missing:
    """Tokens/s of the answer alone: neither the load nor the prompt, which may be cached, counts."""
    body = _body(chosen, {"num_predict": TOKENS, "temperature": 0}) | {"prompt": _PROMPT, "stream": False}
    numbers = await client.query("/api/generate", body, _parse_generated, deadline=deadline)
    if numbers.eval_count < _FEWEST_TOKENS or not numbers.eval_duration:
        return Missing(f"it answered with {numbers.eval_count} tokens")
    return numbers.eval_count * 1e9 / numbers.eval_duration


async def _embed(client: JsonClient, chosen: _Chosen, deadline: float) -> float | Missing:
    """Tokens/s of the second of two embeddings: the first one may still load and warm up."""
    await client.query("/api/embed", _body(chosen) | {"input": "warm"}, _parse_embedded, deadline=deadline)
    numbers = await client.query("/api/embed", _body(chosen) | {"input": _TEXT}, _parse_embedded, deadline=deadline)
    took = numbers.total_duration - numbers.load_duration
    if numbers.prompt_eval_count < _FEWEST_TOKENS or took <= 0:
        return Missing("it does not tell how long an embedding took")
    return numbers.prompt_eval_count * 1e9 / took


def _parse_generated(document: object) -> _Generated:
    return shaped(_Generated, document)


def _parse_embedded(document: object) -> _Embedded:
    return shaped(_Embedded, document)
