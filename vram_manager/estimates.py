"""How much will it need? The best answer there is: given > learned > table > files > default.

Ollama and ComfyUI are asked what they know of a model or a file, for a short time only: without their answer
the next source counts, and the words say why. What was measured is kept in memory and, through a queue, in SQLite.
"""

from __future__ import annotations

import asyncio
import math
import sqlite3
import threading
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, Generic, NoReturn, TypeVar

from loguru import logger

from vram_manager.backends import ComfyUI, Ollama
from vram_manager.clock import Clock
from vram_manager.domain.lease import Estimate, Source
from vram_manager.domain.model_facts import ModelFacts, StoredModel
from vram_manager.domain.reading import Missing, Seen
from vram_manager.domain.size import MAX_BYTES, Size, gib
from vram_manager.domain.snapshot import Snapshot
from vram_manager.errors import SensorError, TimedOut
from vram_manager.journal import rfc3339
from vram_manager.policy import Rules
from vram_manager.policy.accounting import can_use
from vram_manager.policy.estimate import (
    bounded,
    canonical,
    default_bytes,
    default_context,
    from_table,
    model_bytes,
    model_subject,
    percentile95,
    workflow_bytes,
)
from vram_manager.policy.workflow import LoaderFile, WorkflowFacts, workflow_facts, workflow_subject
from vram_manager.store import Peak, Store, write_behind

T = TypeVar("T")

# Whoever asks for admission waits for this; both servers answer within milliseconds when they are well.
DEADLINE_SECONDS: Final = 2.5
# What is on disk seldom changes; a server that did not answer is asked again soon, not by every request.
REPLY_SECONDS: Final = 60.0
FAILURE_SECONDS: Final = 10.0
MAX_REPLIES: Final = 256

MAX_SUBJECTS: Final = 1000
MAX_SAMPLES: Final = 50
LEAST_SAMPLES: Final = 3  # fewer say little: the first run of a workflow may load nothing
MAX_UNWRITTEN: Final = 1000

# Where custom nodes keep what they load, when only they know (the last two are ComfyUI-GGUF's).
_SEARCHED: Final = (
    "checkpoints",
    "diffusion_models",
    "text_encoders",
    "vae",
    "loras",
    "controlnet",
    "unet_gguf",
    "clip_gguf",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """What a request is about, and what the files say it needs; None: nothing, and `words` say why.

    `least_bytes` is what it needs whatever was measured.
    """

    subject: str | None = None
    names: tuple[str, ...] = ()
    digest: str | None = None
    context: int | None = None
    files_bytes: int | None = None
    least_bytes: int = 0
    words: str = ""


class Estimates:
    """Answers how much is needed, and learns how much it was. Everything but `of` and `write_behind` is immediate."""

    def __init__(
        self, clock: Clock, store: Store, rules: Rules, *, ollama: Ollama | None, comfyui: ComfyUI | None
    ) -> None:
        self._clock = clock
        self._store = store
        self._rules = rules
        self._libraries = _Replies[Mapping[str, StoredModel]](clock, partial(_library, ollama))
        self._shown = _Replies[ModelFacts](clock, ollama.show if ollama else _switched_off)
        self._folders = _Replies[Mapping[str, int]](clock, comfyui.model_sizes if comfyui else _switched_off)
        self._samples: OrderedDict[str, deque[int]] = OrderedDict()
        # The context that each model was last seen with, as nobody says which one a request will have.
        self._contexts: dict[str, int] = {}
        # Several names may be of one blob, which Ollama loads once (server/sched.go:schedulerModelKey).
        self._blobs: dict[str, str] = {}
        self._listed: frozenset[tuple[str, str, int | None]] = frozenset()
        self._total_bytes: int | None = None
        self._unwritten: deque[Peak] = deque(maxlen=MAX_UNWRITTEN)
        self._writing = threading.Lock()
        self._something_to_write = asyncio.Event()
        for peak in store.peaks():
            self._remember(peak.subject, peak.peak_bytes)

    async def of(
        self, *, required: Size | None, model: str | None, context: int | None, workflow: object | None
    ) -> Estimate:
        """The estimate for a request. A workflow counts before a model. Takes 2.5 s at most, and never fails."""
        until = self._clock.monotonic() + DEADLINE_SECONDS
        asked = _Asked(names=(model,) if model else (), words="the request names no model and no workflow")
        if workflow is not None:
            facts = workflow_facts(workflow)
            files = tuple(sorted(file.name for file in facts.files))
            asked = replace(asked, subject=workflow_subject(facts), names=files + asked.names)
            if required is None and self._known(asked) is None:
                asked = await self._with_sizes(asked, facts, until)
        elif model:
            asked = await self._with_facts(replace(asked, subject=f"model:{model.lower()}"), model, context, until)
        size, source, words = (required, Source.REQUEST, "as asked for") if required is not None else self._best(asked)
        return Estimate(
            size=size,
            source=source,
            subject=asked.subject,
            words=words,
            names=asked.names,
            digest=asked.digest,
            context=asked.context,
        )

    def blob(self, name: str) -> str | None:
        """What the model of that canonical name is made of, as far as Ollama was asked; None: it was not."""
        return self._blobs.get(name)

    async def learn_blobs(self, names: Iterable[str]) -> None:
        """Asks Ollama what these canonical names are made of, where that is not known yet."""
        until = self._clock.monotonic() + DEADLINE_SECONDS
        unknown = [name for name in names if name not in self._blobs]
        await asyncio.gather(*(self._with_facts(_Asked(), name, None, until) for name in unknown))

    def learn(self, subject: str, *, peak_bytes: int) -> None:
        """One run of `subject` held `peak_bytes` at most. What cannot be a peak is passed over."""
        if self._remember(subject, peak_bytes):
            self._unwritten.append(Peak(subject, rfc3339(self._clock.utcnow()), peak_bytes))
            self._something_to_write.set()

    def notice(self, snapshot: Snapshot) -> None:
        """Learns from each model that Ollama has newly loaded wholly onto the GPU; call it every turn.

        Ollama counts no CUDA context. Before v0.10 it tells no context length: nothing is learned then.
        """
        if isinstance(snapshot.gpus, Seen):
            gpus = snapshot.gpus.value
            memories = [gpu.memory for gpu in gpus.gpus if can_use(gpu, gpus, self._rules)]
            self._total_bytes = sum(memory.total_bytes for memory in memories if not isinstance(memory, Missing))
        if not isinstance(snapshot.ollama, Seen):
            return
        # A split is final, so whatever is in part on the CPU stays out until it is loaded anew.
        whole = [model for model in snapshot.ollama.value.models if model.cpu_ratio == 0.0]
        for model in whole:
            if model.context_length and (model.name, model.digest, model.context_length) not in self._listed:
                subject = model_subject(model.digest, model.context_length)
                self.learn(subject, peak_bytes=model.size_vram_bytes + self._rules.context_bytes)
        self._listed = frozenset((model.name, model.digest, model.context_length) for model in whole)

    async def write_behind(self) -> None:
        """Writes what was learned to the store, in a worker thread, until cancelled."""
        await write_behind(
            self._something_to_write,
            self.flush,
            lambda problem: logger.warning(
                "Measured peaks cannot be written ({}): kept in memory until they can", problem
            ),
            lambda: logger.info("Measured peaks are written again"),
        )

    def flush(self) -> str | None:
        """Writes what is not yet written; what went wrong, or None. Blocks."""
        with self._writing:
            batch = list(self._unwritten)
            try:
                self._store.add_peaks(batch)
            except sqlite3.Error as error:
                return str(error)
            for peak in batch:
                if self._unwritten and self._unwritten[0] is peak:
                    self._unwritten.popleft()
            return None

    def _remember(self, subject: str, peak_bytes: object) -> bool:
        if not isinstance(peak_bytes, int) or not 0 < peak_bytes <= MAX_BYTES:
            return False
        self._samples.setdefault(subject, deque(maxlen=MAX_SAMPLES)).append(peak_bytes)
        self._samples.move_to_end(subject)
        of, _, context = subject.rpartition(":")
        if context.isdecimal() and len(context) < 10:
            self._contexts[of] = int(context)
        if len(self._samples) > MAX_SUBJECTS:
            forgotten, _ = self._samples.popitem(last=False)
            self._contexts.pop(forgotten.rpartition(":")[0], None)
        return True

    def _best(self, asked: _Asked) -> tuple[Size, Source, str]:
        known = self._known(asked)
        if known is None and asked.files_bytes is not None:
            known = asked.files_bytes, Source.FILES, asked.words
        size, source, words = known or (default_bytes(self._rules), Source.DEFAULT, asked.words)
        return Size(bytes=bounded(size)), source, words

    def _known(self, asked: _Asked) -> tuple[int, Source, str] | None:
        """What was measured or listed."""
        samples = self._samples.get(asked.subject or "", ())
        # What Ollama says of a loaded model is exact at once.
        least = 1 if asked.digest else LEAST_SAMPLES
        if asked.subject and len(samples) >= least:
            self._samples.move_to_end(asked.subject)
            learned = percentile95(samples)
            if learned >= asked.least_bytes:
                of = f" with a context of {asked.subject.rpartition(':')[2]}" if asked.digest else ""
                return learned, Source.LEARNED, f"p95 of {len(samples)} run{'s' * (len(samples) > 1)}{of}"
            return asked.least_bytes, Source.FILES, f"{asked.words}; of which {gib(learned)} were seen"
        listed = from_table(asked.names, self._rules.estimates)
        return listed and (listed[1], Source.TABLE, f"{listed[0]} in VRAM_ESTIMATES")

    async def _with_facts(self, asked: _Asked, name: str, context: int | None, until: float) -> _Asked:
        """With what Ollama knows of the model."""
        library = await self._libraries.get("", until)
        if isinstance(library, SensorError):
            return replace(asked, words=f"Ollama cannot be read: {library.why}")
        stored = library.get(canonical(name))
        if stored is None:
            return replace(asked, words=f"{name} is no model of Ollama's")
        facts = await self._shown.get(canonical(name), until)
        known = facts if isinstance(facts, ModelFacts) else ModelFacts(architecture="unknown")
        if len(self._blobs) < MAX_SUBJECTS or canonical(name) in self._blobs:
            self._blobs[canonical(name)] = known.blob or stored.digest
        explicit = context
        wanted = context or self._contexts.get(f"model:{stored.digest}") or known.asked_context
        wanted = wanted or default_context(self._total_bytes)
        context = min(wanted, known.trained_context or wanted)
        subject = model_subject(stored.digest, context)
        asked = replace(asked, subject=subject, digest=stored.digest, context=context if explicit else None)
        if isinstance(facts, SensorError):
            return replace(asked, words=f"Ollama cannot be read: {facts.why}")
        size = model_bytes(facts, context, file_bytes=stored.file_bytes, rules=self._rules)
        words = f"{gib(size)} from its files, with a context of {context}"
        return replace(asked, files_bytes=size, least_bytes=size if facts.hides_memory else 0, words=words)

    async def _with_sizes(self, asked: _Asked, workflow: WorkflowFacts, until: float) -> _Asked:
        """With the sizes of the files that ComfyUI has."""
        files = workflow.files
        if not files:
            return replace(asked, words="the workflow names no model file")
        folders = sorted({name for file in files for name in ((file.folder,) if file.folder else _SEARCHED)})
        replies = await asyncio.gather(*(self._folders.get(folder, until) for folder in folders))
        told = {name: sizes for name, sizes in zip(folders, replies, strict=True) if not isinstance(sizes, SensorError)}
        sizes = {file: _size_of(file, told) for file in files}
        unknown = sorted(file.name for file, size in sizes.items() if size is None)
        if len(unknown) == len(files):
            errors = [reply.why for reply in replies if isinstance(reply, SensorError)]
            return replace(asked, words=f"ComfyUI cannot tell: {errors[0] if not told else f'no size of {unknown[0]}'}")
        size = workflow_bytes(sum(size or 0 for size in sizes.values()), workflow.latent_cells, workflow.decoded_cells)
        if not unknown:
            words = f"{gib(size)} from {len(files)} file(s) and working memory"
            return replace(asked, files_bytes=size, words=words)
        size = max(size, default_bytes(self._rules))
        words = f"{gib(size)}, though the size of {unknown[0]} is not known ({len(unknown)} of {len(files)} files)"
        return replace(asked, files_bytes=size, words=words)


async def _switched_off(_: str) -> NoReturn:
    raise SensorError("it is switched off")


async def _library(ollama: Ollama | None, _: str) -> Mapping[str, StoredModel]:
    """Ollama's models by the name that it compares."""
    models = await ollama.library() if ollama else await _switched_off("")
    return {canonical(name): model for name, model in models.items()}


def _size_of(file: LoaderFile, folders: Mapping[str, Mapping[str, int]]) -> int | None:
    """What the file takes: of several with its name the largest, None when no folder has it."""
    searched = folders.values() if file.folder is None else (folders.get(file.folder, {}),)
    found = [sizes[file.name] for sizes in searched if file.name in sizes]
    return int(max(found) * file.share) if found else None


@dataclass(slots=True)
class _Reply(Generic[T]):
    """An answer, or the question under way; it is asked again from `due` on."""

    task: asyncio.Task[T | SensorError]
    due: float = math.inf


class _Replies(Generic[T]):
    """What a server says of one thing, kept for a while. All who ask at once share one question."""

    def __init__(self, clock: Clock, ask: Callable[[str], Awaitable[T]]) -> None:
        self._clock = clock
        self._ask = ask
        self._replies: OrderedDict[str, _Reply[T]] = OrderedDict()

    async def get(self, about: str, until: float) -> T | SensorError:
        """The reply, or why there is none by then. Whoever goes away leaves the question to the others."""
        reply = self._replies.get(about)
        if reply is None or reply.due <= self._clock.monotonic():
            reply = self._replies[about] = _Reply(asyncio.create_task(self._answer(about)))
            reply.task.add_done_callback(partial(self._keep, reply))
            self._replies.move_to_end(about)
            if len(self._replies) > MAX_REPLIES:
                self._replies.popitem(last=False)
        await asyncio.wait({reply.task}, timeout=max(0.0, until - self._clock.monotonic()))
        return reply.task.result() if reply.task.done() else _LATE

    async def _answer(self, about: str) -> T | SensorError:
        try:
            async with asyncio.timeout(DEADLINE_SECONDS):
                return await self._ask(about)
        except TimeoutError:
            return _LATE
        except SensorError as error:
            return error

    def _keep(self, reply: _Reply[T], task: asyncio.Task[T | SensorError]) -> None:
        failed = task.cancelled() or task.exception() is not None or isinstance(task.result(), SensorError)
        reply.due = self._clock.monotonic() + (FAILURE_SECONDS if failed else REPLY_SECONDS)


_LATE: Final = TimedOut(f"no answer within {DEADLINE_SECONDS:g} s")
