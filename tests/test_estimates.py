"""How much will it need: the best source counts, an outside failure only costs the next best, and runs teach."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loguru import logger

from tests.fakes import GIB, MIB, Card, FakeComfyUI, FakeGpus, FakeOllama, FakeStore, Flight, now
from vram_manager.clock import Clock
from vram_manager.domain.lease import Estimate, Source
from vram_manager.domain.model_facts import ModelFacts, StoredModel
from vram_manager.domain.reading import Missing, Off, Seen
from vram_manager.domain.size import MAX_BYTES, Size, gib
from vram_manager.domain.snapshot import LoadedModel, OllamaState, Snapshot
from vram_manager.errors import SensorError
from vram_manager.estimates import MAX_REPLIES, MAX_SAMPLES, MAX_SUBJECTS, MAX_UNWRITTEN, Estimates
from vram_manager.policy import Rules
from vram_manager.store import Peak, Store

pytestmark = [pytest.mark.asyncio, pytest.mark.looptime]

LLAMA = "llama3.1:8b"
REFUSED = SensorError("GET /api/tags: connection refused")
# 5 GiB of file, 32 layers x 4096 cells x 8 heads x 256 values x 2 bytes of cache, compute and context of 0.5 GiB each.
LLAMA_BYTES = 5 * GIB + 512 * MIB + GIB
FACTS = ModelFacts(architecture="llama", layers=32, embedding_length=4096, heads=32, kv_heads=8, trained_context=131072)


def at() -> datetime:
    return datetime(2026, 7, 1, 12, tzinfo=UTC)


class Asked:
    """Estimates over fakes: an Ollama with one model, a ComfyUI with some files."""

    def __init__(
        self, *, store: Any = None, without: str = "", ollama_gpu: str | None = None, **estimates: int
    ) -> None:
        card = Card()
        self.ollama, self.comfyui = FakeOllama(card), FakeComfyUI(card)
        self.ollama.stored[LLAMA] = StoredModel(digest="46e0", file_bytes=5 * GIB)
        self.ollama.facts[LLAMA] = FACTS
        self.comfyui.folders = {
            "checkpoints": {"sdxl.safetensors": 6 * GIB, "sub/other.ckpt": 2 * GIB},
            "diffusion_models": {"flux.safetensors": 12 * GIB},
            "vae": {"vae.safetensors": GIB, "twice.pt": 2 * GIB},
            "loras": {"twice.pt": 3 * GIB},
        }
        self.store = FakeStore() if store is None else store
        self.sut = Estimates(
            Clock(asyncio.get_running_loop().time, at),
            self.store,
            Rules(estimates=estimates, ollama_gpu=ollama_gpu),
            ollama=None if without == "ollama" else self.ollama,
            comfyui=None if without == "comfyui" else self.comfyui,
        )

    async def of(
        self,
        model: str | None = None,
        *,
        required: Size | None = None,
        context: int | None = None,
        workflow: object | None = None,
    ) -> Estimate:
        return await self.sut.of(required=required, model=model, context=context, workflow=workflow)

    def learn(self, subject: str, *gibs: float) -> None:
        for size in gibs:
            self.sut.learn(subject, peak_bytes=int(size * GIB))

    @property
    def questions(self) -> list[str]:
        return self.ollama.questions + self.comfyui.questions


def workflow(*files: tuple[str, str, str], side: int = 8) -> dict[str, Any]:
    """A workflow whose nodes of these classes load these files, and that makes a square picture."""
    nodes: dict[str, Any] = {
        str(number): {"class_type": kind, "inputs": {name: text}} for number, (kind, name, text) in enumerate(files)
    }
    latent = {"width": side, "height": side, "batch_size": 1}
    return nodes | {
        "latent": {"class_type": "EmptyLatentImage", "inputs": latent},
        "out": {"class_type": "SaveImage", "inputs": {f"a{key}": [key, 0] for key in [*nodes, "latent"]}},
    }


SDXL = ("CheckpointLoaderSimple", "ckpt_name", "sdxl.safetensors")
VAE = ("VAELoader", "vae_name", "vae.safetensors")
LOST = ("LoraLoader", "lora_name", "lost.safetensors")
FLOOR = 8 * GIB // 10


async def test_of_what_is_known_the_best_source_counts():
    """Each source is taken away in turn, and the next one answers."""
    asked = Asked(llama=3 * GIB)
    asked.learn("model:46e0:4096", 4, 4, 4)
    found = [
        await asked.of(LLAMA, required=Size(percent=90.0)),
        await asked.of(LLAMA),
        await Asked(llama=3 * GIB).of(LLAMA),
        await Asked().of(LLAMA),
        await Asked(without="ollama").of(LLAMA),
    ]
    assert {entry.subject for entry in found[:4]} == {"model:46e0:4096"}
    assert [(entry.source, entry.size, entry.words) for entry in found] == [
        (Source.REQUEST, Size(percent=90.0), "as asked for"),
        (Source.LEARNED, Size(bytes=4 * GIB), "p95 of 3 runs with a context of 4096"),
        (Source.TABLE, Size(bytes=3 * GIB), "llama in VRAM_ESTIMATES"),
        (Source.FILES, Size(bytes=LLAMA_BYTES), "6.5 GiB from its files, with a context of 4096"),
        (Source.DEFAULT, Size(bytes=8 * GIB), "Ollama cannot be read: it is switched off"),
    ]


async def test_a_comfyui_that_is_switched_off_costs_the_sizes_of_the_files():
    estimate = await Asked(without="comfyui").of(workflow=workflow(SDXL))
    assert estimate.words == "ComfyUI cannot tell: it is switched off"


async def test_a_request_that_names_nothing_gets_the_default_and_teaches_nothing():
    estimate = await Asked().of()
    assert (estimate.source, estimate.subject, estimate.names) == (Source.DEFAULT, None, ())
    assert estimate.words == "the request names no model and no workflow"


async def test_the_default_of_the_table_counts_for_the_default_estimate():
    assert (await Asked(default=5 * GIB).of("who")).size == Size(bytes=5 * GIB)


async def test_a_size_that_is_given_still_has_the_subject_to_learn_from():
    given_size = Size(bytes=GIB)
    assert (await Asked().of("My-Worker", required=given_size)).subject == "model:my-worker"
    asked = Asked()
    estimate = await asked.of(required=given_size, workflow=workflow(SDXL))
    assert str(estimate.subject).startswith("workflow:")
    assert estimate.names == ("sdxl.safetensors",)
    assert asked.questions == []


@pytest.mark.parametrize("name", ["LLAMA3.1:8B", "registry.ollama.ai/library/llama3.1:8b"])
async def test_a_model_has_one_subject_whatever_way_its_name_is_written(name: str):
    assert (await Asked().of(name)).subject == "model:46e0:4096"


async def test_a_model_that_is_stored_in_capitals_is_found_by_any():
    asked = Asked()
    asked.ollama.stored = {"hf.co/A/B:Q4": StoredModel(digest="77", file_bytes=1)}
    assert (await asked.of("hf.co/a/B:q4")).subject == "model:77:4096"


async def test_a_model_of_nobodys_is_known_by_its_name_and_may_be_in_the_table():
    asked = Asked(**{"ltx2*": 24 * GIB})
    estimate = await asked.of("LTX2-19b")
    assert (estimate.subject, estimate.source, estimate.size) == ("model:ltx2-19b", Source.TABLE, Size(bytes=24 * GIB))
    assert (await asked.of("other")).words == "other is no model of Ollama's"
    asked.learn("model:ltx2-19b", 20, 21, 22)
    assert (await asked.of("ltx2-19B")).source is Source.LEARNED


@pytest.mark.parametrize(
    ("asked_for", "own", "seen", "context"),
    [
        pytest.param(8192, 2048, 1024, 8192, id="the request's"),
        pytest.param(10**6, None, None, 131072, id="no more than it was trained for"),
        pytest.param(None, 2048, 16384, 16384, id="what it was last seen with"),
        pytest.param(None, 2048, None, 2048, id="its own"),
        pytest.param(None, None, None, 4096, id="Ollama's"),
    ],
)
async def test_the_context_is_the_one_that_it_will_be_loaded_with(
    asked_for: int | None, own: int | None, seen: int | None, context: int
):
    asked = Asked()
    asked.ollama.facts[LLAMA] = replace(FACTS, asked_context=own)
    if seen:
        asked.learn("model:46e0:512", 4)
        asked.learn(f"model:46e0:{seen}", 4)
    estimate = await asked.of(LLAMA, context=asked_for)
    assert estimate.subject == f"model:46e0:{context}"
    assert estimate.words.endswith(f"with a context of {context}")


async def test_ollamas_own_context_follows_from_the_memory_of_all_gpus():
    asked = Asked()
    asked.sut.notice(await seen_on(Card(total_gib=12), Card("GPU-b", total_gib=12)))
    assert (await asked.of(LLAMA)).subject == "model:46e0:32768"


async def test_a_gpu_that_ollama_does_not_use_makes_its_own_context_no_longer():
    asked = Asked(ollama_gpu="0")
    asked.sut.notice(await seen_on(Card(total_gib=12), Card("GPU-b", total_gib=12)))
    assert (await asked.of(LLAMA)).subject == "model:46e0:4096"


async def test_what_a_model_needs_at_least_counts_where_ollama_reports_only_a_part():
    asked = Asked()
    asked.ollama.facts[LLAMA] = replace(FACTS, has_projector=True)
    needs = LLAMA_BYTES + 250 * MIB
    asked.learn("model:46e0:4096", 4, 4, 4)
    estimate = await asked.of(LLAMA)
    assert (estimate.source, estimate.size) == (Source.FILES, Size(bytes=needs))
    assert estimate.words == f"{gib(needs)} from its files, with a context of 4096; of which 4.0 GiB were seen"
    asked.learn("model:46e0:4096", 9, 9, 9)
    assert (await asked.of(LLAMA)).size == Size(bytes=9 * GIB)


async def test_a_workflow_needs_its_files_and_working_memory():
    asked = Asked()
    estimate = await asked.of(workflow=workflow(SDXL, VAE))
    assert (estimate.source, estimate.size) == (Source.FILES, Size(bytes=7 * GIB + FLOOR))
    assert estimate.names == ("sdxl.safetensors", "vae.safetensors")
    assert estimate.words == "7.8 GiB from 2 file(s) and working memory"
    assert asked.questions == ["checkpoints", "vae"]


async def test_a_larger_picture_needs_more():
    estimate = await Asked().of(workflow=workflow(SDXL, side=1024))
    assert estimate.size == Size(bytes=6 * GIB + int(128 * 128 * 4 * 0.01 * 3.1 * MIB))


async def test_weights_that_are_cast_to_8_bits_count_half():
    body = workflow(("UNETLoader", "unet_name", "flux.safetensors"))
    body["0"]["inputs"]["weight_dtype"] = "fp8_e4m3fn"
    assert (await Asked().of(workflow=body)).size == Size(bytes=6 * GIB + FLOOR)


async def test_a_file_that_only_its_node_can_place_is_looked_for_and_the_largest_counts():
    asked = Asked()
    estimate = await asked.of(workflow=workflow(("Custom", "x", "twice.pt"), ("Custom", "x", "sub/other.ckpt")))
    assert (estimate.source, estimate.size) == (Source.FILES, Size(bytes=5 * GIB + FLOOR))
    assert len(asked.questions) == 8


async def test_a_file_of_unknown_size_makes_the_default_the_least():
    estimate = await Asked().of(workflow=workflow(VAE, LOST))
    assert (estimate.source, estimate.size) == (Source.FILES, Size(bytes=8 * GIB))
    assert estimate.words == "8.0 GiB, though the size of lost.safetensors is not known (1 of 2 files)"


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ([LOST], "ComfyUI cannot tell: no size of lost.safetensors"),
        ([], "the workflow names no model file"),
        ([("UpscaleModelLoader", "model_name", "x.pt")], "GET /experiment/models/upscale_models: HTTP 404"),
    ],
)
async def test_a_workflow_without_any_size_gets_the_default(files: list[tuple[str, str, str]], why: str):
    estimate = await Asked().of(workflow=workflow(*files))
    assert (estimate.source, estimate.size) == (Source.DEFAULT, Size(bytes=8 * GIB))
    assert estimate.words.endswith(why)


async def test_the_table_knows_files_of_a_workflow_and_comfyui_is_not_asked():
    asked = Asked(sdxl=9 * GIB, vae=GIB)
    estimate = await asked.of(workflow=workflow(SDXL, VAE))
    assert (estimate.source, estimate.size, asked.questions) == (Source.TABLE, Size(bytes=9 * GIB), [])


async def test_a_workflow_that_ran_before_is_known_without_asking():
    asked = Asked()
    first = await asked.of(workflow=workflow(SDXL))
    asked.learn(str(first.subject), 7, 8, 9)
    asked.comfyui.questions.clear()
    again = await asked.of(workflow=workflow(SDXL))
    assert (again.source, again.size, asked.questions) == (Source.LEARNED, Size(bytes=9 * GIB), [])


async def test_a_workflow_counts_before_a_model_and_the_models_name_is_looked_up_too():
    asked = Asked(ltx2=24 * GIB)
    estimate = await asked.of("LTX2", workflow=workflow(SDXL))
    assert (estimate.source, estimate.names) == (Source.TABLE, ("sdxl.safetensors", "LTX2"))
    assert str(estimate.subject).startswith("workflow:")


@pytest.mark.parametrize("nonsense", [7, "x", [], {}, {"1": None}, {"prompt": []}])
async def test_a_workflow_that_is_none_gets_the_default(nonsense: object):
    estimate = await Asked().of(workflow=nonsense)
    assert (estimate.source, estimate.subject) == (Source.DEFAULT, None)


# -- failures outside


async def test_a_server_that_refuses_costs_the_next_best_source_and_the_words_say_so():
    asked = Asked()
    asked.ollama.error = asked.comfyui.error = REFUSED
    estimate = await asked.of(LLAMA)
    assert (estimate.source, estimate.subject) == (Source.DEFAULT, f"model:{LLAMA}")
    assert estimate.words == "Ollama cannot be read: GET /api/tags: connection refused"
    estimate = await asked.of(workflow=workflow(SDXL))
    assert estimate.words == "ComfyUI cannot tell: GET /api/tags: connection refused"


async def test_a_model_that_is_listed_and_cannot_be_shown_keeps_its_subject():
    asked = Asked(default=5 * GIB)
    asked.ollama.facts.clear()
    estimate = await asked.of(LLAMA, context=8192)
    assert (estimate.source, estimate.subject) == (Source.DEFAULT, "model:46e0:8192")
    assert "HTTP 404" in estimate.words


@pytest.mark.parametrize("asked_for", [{"model": LLAMA}, {"workflow": workflow(SDXL)}])
async def test_a_server_that_hangs_costs_two_and_a_half_seconds_once(asked_for: dict[str, Any]):
    asked = Asked()
    asked.ollama.takes_seconds = asked.comfyui.takes_seconds = 600.0
    estimate = await asked.of(**asked_for)
    assert estimate.source is Source.DEFAULT
    assert estimate.words.endswith("no answer within 2.5 s")
    assert now() == pytest.approx(2.5)
    await asked.of(**asked_for)
    assert now() == pytest.approx(2.5)
    asked.ollama.takes_seconds = asked.comfyui.takes_seconds = 0.01
    await asyncio.sleep(10)
    assert (await asked.of(**asked_for)).source is Source.FILES


async def test_two_slow_answers_share_one_deadline_and_count_for_the_next_request():
    asked = Asked()
    asked.ollama.takes_seconds = 2.0
    estimate = await asked.of(LLAMA)
    assert now() == pytest.approx(2.5)
    assert (estimate.source, estimate.subject) == (Source.DEFAULT, "model:46e0:4096")
    assert (await asked.of(LLAMA)).source is Source.FILES
    assert now() == pytest.approx(4.0)
    assert asked.questions == ["library", f"show {LLAMA}"]


async def test_who_asks_again_within_a_minute_costs_no_call():
    asked = Asked()
    await asked.of(LLAMA)
    await asked.of(workflow=workflow(SDXL))
    before = list(asked.questions)
    await asyncio.sleep(59)
    await asked.of(LLAMA)
    await asked.of(workflow=workflow(SDXL))
    assert asked.questions == before
    await asyncio.sleep(2)
    await asked.of(LLAMA)
    await asked.of(workflow=workflow(SDXL))
    assert len(asked.questions) == 2 * len(before)


async def test_those_who_ask_at_once_share_one_question():
    asked = Asked()
    found = await asyncio.gather(*(asked.of(LLAMA) for _ in range(64)))
    assert set(found) == {found[0]}
    assert asked.questions == ["library", f"show {LLAMA}"]


async def test_who_hangs_up_does_not_take_the_answer_from_the_others():
    asked = Asked()
    first, second = (asyncio.create_task(asked.of(LLAMA)) for _ in range(2))
    await asyncio.sleep(0.001)
    first.cancel()
    assert (await second).source is Source.FILES
    assert first.cancelled()
    assert asked.questions == ["library", f"show {LLAMA}"]


async def test_answers_are_kept_up_to_a_limit():
    asked = Asked()
    asked.ollama.stored = {f"m{number}:latest": StoredModel(digest=str(number), file_bytes=1) for number in range(300)}
    asked.ollama.takes_seconds = 0.0
    for number in range(300):
        await asked.of(f"m{number}")
    assert len(asked.sut._shown._replies) == MAX_REPLIES


@settings(deadline=None, max_examples=30)
@given(
    model=st.none() | st.text(max_size=20) | st.just(LLAMA),
    context=st.none() | st.integers(1, 2**40),
    body=st.none() | st.dictionaries(st.text(max_size=2), st.text(max_size=8)) | st.just(workflow(SDXL, VAE)),
    table=st.dictionaries(st.sampled_from(["l", "vae", "default", "*"]), st.integers(-5, 2**60)),
    peaks=st.lists(st.integers(-5, 2**60), max_size=5),
)
async def test_every_estimate_is_a_size(
    model: str | None, context: int | None, body: object, table: dict[str, int], peaks: list[int]
):
    asked = Asked(**table)
    for peak in peaks:
        asked.sut.learn(f"model:46e0:{context or 4096}", peak_bytes=peak)
    size = (await asked.of(model, context=context, workflow=body)).size.bytes
    assert size is not None
    assert 0 < size <= MAX_BYTES


# -- learning


async def test_three_runs_are_the_least_to_learn_from():
    asked = Asked()
    asked.learn("model:worker", 4, 5)
    assert (await asked.of("worker")).source is Source.DEFAULT
    asked.learn("model:worker", 6)
    estimate = await asked.of("worker")
    assert (estimate.size, estimate.words) == (Size(bytes=6 * GIB), "p95 of 3 runs")


async def test_only_the_newest_fifty_runs_count():
    asked = Asked()
    asked.learn("model:worker", 20, 20, 20, *[5] * MAX_SAMPLES)
    estimate = await asked.of("worker")
    assert (estimate.size, estimate.words) == (Size(bytes=5 * GIB), "p95 of 50 runs")


async def test_the_subject_that_was_not_used_for_longest_is_forgotten_first():
    asked = Asked()
    for name in "abc":
        asked.learn(f"model:{name}", 1, 1, 1)
    await asked.of("a")
    asked.learn("model:b", 1)
    for number in range(MAX_SUBJECTS - 2):
        asked.learn(f"x{number}", 1)
    assert [(await asked.of(name)).source for name in "abc"] == [Source.LEARNED, Source.LEARNED, Source.DEFAULT]


async def test_with_its_subject_a_models_context_is_forgotten():
    asked = Asked()
    asked.learn("model:46e0:16384", 4)
    for number in range(MAX_SUBJECTS):
        asked.learn(f"x{number}", 1)
    assert (await asked.of(LLAMA)).subject == "model:46e0:4096"
    assert len(asked.sut._samples) == MAX_SUBJECTS


@pytest.mark.parametrize("odd", [0, -1, MAX_BYTES + 1])
async def test_what_cannot_be_a_peak_teaches_nothing(odd: int):
    asked = Asked()
    for _ in range(3):
        asked.sut.learn("model:worker", peak_bytes=odd)
    assert (await asked.of("worker")).source is Source.DEFAULT
    assert asked.sut.flush() is None
    assert asked.store.measured == []


async def seen_on(*cards: Card, models: tuple[LoadedModel, ...] = ()) -> Snapshot:
    gpus = await FakeGpus(*cards).read()
    return Snapshot(
        taken_at=now(),
        gpus=Seen(gpus, now()),
        ollama=Seen(OllamaState(version="0.33.1", models=models), now()),
        comfyui=Off(),
        queue=Off(),
    )


def loaded(gpu_gib: float = 6.0, *, cpu_gib: float = 0.0, context: int | None = 4096) -> LoadedModel:
    return LoadedModel(
        name=LLAMA,
        digest="46e0",
        size_bytes=int((gpu_gib + cpu_gib) * GIB),
        size_vram_bytes=int(gpu_gib * GIB),
        context_length=context,
        expires_at=at(),
    )


async def test_a_model_that_is_loaded_wholly_on_the_gpu_teaches_what_it_holds_and_its_context():
    asked = Asked()
    for _ in range(3):
        asked.sut.notice(await seen_on(models=(loaded(6.0),)))
        asked.sut.notice(await seen_on())
    estimate = await asked.of(LLAMA)
    assert (estimate.source, estimate.size) == (Source.LEARNED, Size(bytes=6 * GIB + 512 * MIB))


async def peaks_after(*turns: tuple[LoadedModel, ...] | Missing) -> list[int]:
    """What was learned from these lists of loaded models, in turn."""
    asked = Asked()
    for turn in turns:
        snapshot = await seen_on(models=() if isinstance(turn, Missing) else turn)
        asked.sut.notice(replace(snapshot, ollama=turn) if isinstance(turn, Missing) else snapshot)
    assert asked.sut.flush() is None
    return [peak.peak_bytes for peak in asked.store.measured]


async def test_a_load_teaches_once_however_often_it_is_seen_and_however_its_expiry_moves():
    later = replace(loaded(6.0), expires_at=datetime(2027, 1, 1, tzinfo=UTC))
    assert len(await peaks_after((loaded(6.0),), (loaded(6.0),), (later,))) == 1


async def test_a_load_that_ollama_could_not_be_asked_about_for_a_while_is_no_new_one():
    assert len(await peaks_after((loaded(6.0),), Missing("lost"), (loaded(6.0),))) == 1


async def test_a_load_after_absence_or_with_another_context_teaches_again():
    assert len(await peaks_after((loaded(6.0),), (), (loaded(6.0),), (loaded(7.0, context=8192),))) == 3


async def test_a_model_in_part_on_the_cpu_teaches_nothing():
    assert await peaks_after((loaded(3.0, cpu_gib=3.0),)) == []


async def test_sizes_that_contradict_each_other_or_a_context_that_is_not_told_teach_nothing():
    assert await peaks_after((loaded(0.0),), (loaded(6.0, context=None),), (loaded(6.0, context=0),)) == []


async def test_a_gpu_that_cannot_be_read_does_not_keep_a_model_from_teaching():
    asked = Asked()
    asked.sut.notice(replace(await seen_on(models=(loaded(),)), gpus=Missing("lost")))
    asked.sut.flush()
    assert len(asked.store.measured) == 1


# -- on disk


async def test_what_was_learned_is_known_after_a_restart(tmp_path: Path):
    asked = Asked(store=Store.open(tmp_path))
    asked.learn("model:worker", 4, 5, 6)
    assert asked.sut.flush() is None
    asked.store.close()
    restarted = Asked(store=Store.open(tmp_path))
    estimate = await restarted.of("worker")
    assert (estimate.source, estimate.size) == (Source.LEARNED, Size(bytes=6 * GIB))
    assert restarted.sut.flush() is None
    assert [peak.at for peak in restarted.store.peaks()] == ["2026-07-01T12:00:00.000Z"] * 3
    restarted.store.close()


async def test_the_context_that_was_usual_is_known_after_a_restart():
    store = FakeStore()
    store.add_peaks([Peak("model:46e0:16384", "2026-07-01T12:00:00.000Z", GIB)])
    assert (await Asked(store=store).of(LLAMA)).subject == "model:46e0:16384"


@pytest.mark.parametrize("odd", ["many", None, -1, 0, 2**60])
async def test_a_row_that_makes_no_sense_is_passed_over(odd: Any):
    store = FakeStore()
    store.add_peaks([Peak("model:worker", "x", odd)] * 3)
    store.add_peaks([Peak(f"model:46e0:{context}", "x", GIB) for context in ("many", "", "0", "9" * 5000)])
    asked = Asked(store=store)
    assert (await asked.of("worker")).source is Source.DEFAULT
    assert (await asked.of(LLAMA)).subject == "model:46e0:4096"


class FullStore(FakeStore):
    """A disk that is full until it is not."""

    def __init__(self) -> None:
        super().__init__()
        self.full = True
        self.tried = threading.Semaphore(0)

    def add_peaks(self, peaks: list[Peak]) -> None:
        self.tried.release()
        if self.full:
            raise sqlite3.OperationalError("database or disk is full")
        super().add_peaks(peaks)


async def test_a_full_disk_loses_nothing_until_there_is_too_much():
    asked = Asked(store=FullStore())
    asked.learn("model:worker", *[1] * (MAX_UNWRITTEN + 5), 2)
    assert asked.sut.flush() == "database or disk is full"
    asked.store.full = False
    assert asked.sut.flush() is None
    assert [peak.peak_bytes for peak in asked.store.measured] == [GIB] * (MAX_UNWRITTEN - 1) + [2 * GIB]
    assert asked.sut.flush() is None
    assert len(asked.store.measured) == MAX_UNWRITTEN


class BusyStore(FakeStore):
    """A disk that is so slow that more is learned meanwhile."""

    meanwhile: Callable[[], None] | None = None

    def add_peaks(self, peaks: list[Peak]) -> None:
        super().add_peaks(peaks)
        if self.meanwhile is not None:
            self.meanwhile()


async def test_what_is_learned_during_a_write_is_written_by_the_next_one_and_nothing_twice():
    asked = Asked(store=BusyStore())
    asked.store.meanwhile = lambda: asked.learn("model:worker", *[2] * 5)
    asked.learn("model:worker", *[1] * MAX_UNWRITTEN)
    assert asked.sut.flush() is None
    asked.store.meanwhile = None
    assert asked.sut.flush() is None
    assert [peak.peak_bytes for peak in asked.store.measured] == [GIB] * MAX_UNWRITTEN + [2 * GIB] * 5


@pytest.mark.looptime(False)
async def test_what_is_learned_is_written_behind_and_a_failure_is_said_once():
    lines: list[str] = []
    again = asyncio.Event()

    def hear(line: str) -> None:
        lines.append(line.strip())
        if "again" in line:
            again.set()

    sink = logger.add(hear, level=0, format="{level} {message}")
    asked = Asked(store=FullStore())
    writing = asyncio.create_task(asked.sut.write_behind())
    flight = Flight()
    try:
        asked.learn("model:worker", 4)
        flight.begin()
        for _ in range(3):
            assert await asyncio.to_thread(asked.store.tried.acquire, timeout=60)
        asked.store.full = False
        await again.wait()
    finally:
        await flight.end()
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        logger.remove(sink)
    assert [peak.peak_bytes for peak in asked.store.measured] == [4 * GIB]
    assert lines == [
        "WARNING Measured peaks cannot be written (database or disk is full): kept in memory until they can",
        "INFO Measured peaks are written again",
    ]
