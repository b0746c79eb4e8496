"""What every endpoint of the simulated Ollama that runs a model has in common: find it, load it, count words."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeAlias

from starlette.requests import Request

from vram_manager.simulator.ollama_library import OllamaModel, canonical
from vram_manager.simulator.ollama_replies import Refused, text_of, unless_gone
from vram_manager.simulator.ollama_runner import LoadFailed, OllamaCounters, QueueFull, Runner, RunnerOptions
from vram_manager.simulator.ollama_scheduler import Scheduler

NANOSECONDS = 1_000_000_000
PROMPT_TOKENS = 26
REMEMBERED = 100_000
"""Requests of which a record is kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request for a model, whole, when it arrived. `request_id`: its X-Request-Id, else its last text."""

    request_id: str
    path: str
    model: str
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A request that got words. `model` is the tag that was loaded, `gpu_ratio` the part of its layers on the GPU.

    `would_have_fitted`: at the runner's load, all its layers would have, beside what could not be moved.
    """

    request_id: str
    model: str
    at: float
    gpu_ratio: float
    would_have_fitted: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What one request wants: `tokens` words, or only the model loaded."""

    request_id: str
    model: OllamaModel
    tokens: int
    options: RunnerOptions = field(default_factory=RunnerOptions)
    keep_alive_seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """How long a finished job took, in Ollama's words and nanoseconds."""

    total_duration: int
    load_duration: int
    eval_duration: int
    tokens: int


Words: TypeAlias = AsyncGenerator[str | Numbers, None]
"""First an empty word when the model is loaded, then each word, then the numbers (of a job with words)."""


class Work:
    """The models on disk, the scheduler that runs them, and the record of who asked and who was served."""

    def __init__(
        self,
        scheduler: Scheduler,
        models: Iterable[OllamaModel],
        *,
        gpu_tokens_per_second: float,
        cpu_tokens_per_second: float,
        reply_tokens: int,
        utcnow: Callable[[], datetime],
    ) -> None:
        self.scheduler = scheduler
        self.models = {canonical(model.name): model for model in models}
        self.gpu_tokens_per_second = gpu_tokens_per_second
        self.cpu_tokens_per_second = cpu_tokens_per_second
        self.reply_tokens = reply_tokens
        self.utcnow = utcnow
        self.started_at: datetime = utcnow()
        self.asked: deque[Asked] = deque(maxlen=REMEMBERED)
        self.served: deque[Served] = deque(maxlen=REMEMBERED)

    @property
    def counters(self) -> OllamaCounters:
        return self.scheduler.counters

    def model(self, body: dict[str, Any], why: str | None = None) -> OllamaModel:
        """The model a body names, or Refused with `why` it cannot be had."""
        name = str(body.get("model") or "")
        if not name:
            raise Refused(400, "model is required")
        model = self.models.get(canonical(name))
        if model is None:
            raise Refused(404, why or f"model '{name}' not found")
        return model

    def embedder(self, body: dict[str, Any]) -> OllamaModel:
        """The same in the words of the endpoints that embed."""
        return self.model(body, f'model "{body.get("model")}" not found, try pulling it first')

    def arrived(self, request: Request, body: dict[str, Any]) -> str:
        """Records a request, refused or not, and returns its id."""
        request_id = request.headers.get("x-request-id") or text_of(body)
        at = asyncio.get_running_loop().time()
        model = str(body.get("model") or "")
        self.asked.append(Asked(request_id=request_id, path=request.url.path, model=model, at=at))
        return request_id

    async def words(self, request: Request, job: Job) -> Words:
        """The words of a job whose model is loaded; otherwise the reply says why not.

        A client that hangs up while the model loads aborts the load.
        """
        words = self._words(job)
        try:
            await unless_gone(request, anext(words))
        except QueueFull:
            raise Refused(503, "server busy, please try again.  maximum pending requests exceeded") from None
        except LoadFailed as error:
            raise Refused(500, str(error)) from error
        except BaseException:
            await words.aclose()
            raise
        return words

    async def all_words(self, request: Request, job: Job) -> tuple[str, Numbers]:
        """All words of a job as one text, and its numbers."""
        words = await self.words(request, job)

        async def gather() -> tuple[str, Numbers]:
            text, numbers = "", Numbers(total_duration=0, load_duration=0, eval_duration=0, tokens=0)
            async for word in words:
                if isinstance(word, Numbers):
                    numbers = word
                else:
                    text += word
            return text, numbers

        try:
            return await unless_gone(request, gather())
        finally:
            await words.aclose()

    async def _words(self, job: Job) -> Words:
        loop = asyncio.get_running_loop()
        asked_at = loop.time()
        async with self.scheduler.running(job.model, job.options, job.keep_alive_seconds) as runner:
            loaded_at = loop.time()
            yield ""
            if not job.tokens:
                return
            self._count_served(runner, job)
            async with runner.slot:
                with self.scheduler.ledger.computing(runner.gpu_layers > 0):
                    for _ in range(job.tokens):
                        await asyncio.sleep(1 / self._tokens_per_second(runner))
                        self.counters.tokens += 1
                        yield "word "
            now = loop.time()
            yield Numbers(
                total_duration=int((now - asked_at) * NANOSECONDS),
                load_duration=int((loaded_at - asked_at) * NANOSECONDS),
                eval_duration=int((now - loaded_at) * NANOSECONDS),
                tokens=job.tokens,
            )

    def _tokens_per_second(self, runner: Runner) -> float:
        """Layers take turns, so the times add up and the slow ones dominate."""
        on_gpu = runner.gpu_ratio
        return 1 / (on_gpu / self.gpu_tokens_per_second + (1 - on_gpu) / self.cpu_tokens_per_second)

    def _count_served(self, runner: Runner, job: Job) -> None:
        if runner.gpu_layers == 0:
            self.counters.served_on_cpu += 1
        elif runner.gpu_layers < runner.all_layers:
            self.counters.served_partially += 1
        else:
            self.counters.served_on_gpu += 1
        if runner.gpu_layers < runner.all_layers and runner.would_have_fitted:
            self.counters.served_with_cpu_layers_that_would_have_fitted += 1
        self.served.append(
            Served(
                request_id=job.request_id,
                model=runner.model.name,
                at=asyncio.get_running_loop().time(),
                gpu_ratio=runner.gpu_ratio,
                would_have_fitted=runner.would_have_fitted,
            )
        )
