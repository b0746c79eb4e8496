"""How much will it need: the table, the formula of a model, the sum of a workflow's files, and what was measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vram_manager.backends.ollama import parse_show, parse_tags
from vram_manager.domain.model_facts import ModelFacts
from vram_manager.domain.size import GIB, MAX_BYTES, MIB
from vram_manager.policy import Rules
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

CONTRACTS = Path(__file__).parents[1] / "contracts" / "ollama"
RULES = Rules()
# Llama 3.1 8B: 32 layers, 8 of 32 heads keep keys and values of 128 each.
LLAMA = ModelFacts(architecture="llama", layers=32, embedding_length=4096, heads=32, kv_heads=8)
REST = 512 * MIB + RULES.context_bytes


def kv(facts: ModelFacts, context: int) -> int:
    """The KV cache alone: what is left without weights."""
    return model_bytes(facts, context, file_bytes=0, rules=RULES) - REST


def test_the_model_of_the_contract_needs_its_file_its_cache_and_a_gibibyte():
    facts = parse_show(json.loads((CONTRACTS / "show.json").read_text()))
    stored = parse_tags(json.loads((CONTRACTS / "tags.json").read_text()))["llama3.1:8b"]
    # 4920753328 of file (the reply lists 3 of 292 tensors, so they do not count)
    # + 32 layers x 8192 cells x 8 heads x (128 + 128) x 2 bytes + 0.5 GiB compute + 0.5 GiB context
    assert facts.asked_context == 8192
    assert model_bytes(facts, 8192, file_bytes=stored.file_bytes, rules=RULES) == (
        4_920_753_328 + 1_073_741_824 + 536_870_912 + 536_870_912
    )


def test_weights_that_are_told_exactly_count_for_the_file():
    facts = replace(LLAMA, weights_bytes=3 * GIB)
    assert model_bytes(facts, 4096, file_bytes=4 * GIB, rules=RULES) == 3 * GIB + 512 * MIB + REST


@pytest.mark.parametrize(("context", "cells"), [(4096, 4096), (4097, 4352), (1, 256)])
def test_the_cache_has_whole_steps_of_256_cells(context: int, cells: int):
    assert kv(LLAMA, context) == 32 * cells * 8 * 256 * 2


def test_keys_and_values_have_their_own_lengths_where_told():
    assert kv(replace(LLAMA, key_length=192, value_length=64), 4096) == 32 * 4096 * 8 * (192 + 64) * 2


def test_heads_that_differ_from_layer_to_layer_count_as_many_as_there_can_be():
    assert kv(replace(LLAMA, kv_heads=None), 4096) == 4 * kv(LLAMA, 4096)


def test_a_model_without_attention_keeps_no_cache():
    assert kv(ModelFacts(architecture="mamba", layers=64, embedding_length=2560), 262144) == 0


GEMMA = ModelFacts(
    architecture="gemma3", layers=34, heads=8, kv_heads=4, key_length=256, value_length=256, sliding_window=1024
)


def test_of_a_sliding_window_model_only_every_sixth_layer_keeps_the_whole_context():
    # 5 of 34 layers see it all; the others keep the window and one batch: 1536 cells.
    assert kv(GEMMA, 32768) == (5 * 32768 + 29 * 1536) * 4 * 512 * 2


def test_a_window_larger_than_the_context_saves_nothing():
    assert kv(GEMMA, 1024) == 34 * 1024 * 4 * 512 * 2


def test_a_pattern_that_the_model_tells_counts_before_the_known_one():
    assert kv(replace(GEMMA, layer_pattern=2), 32768) == (17 * 32768 + 17 * 1536) * 4 * 512 * 2


def test_a_window_without_a_known_pattern_saves_nothing():
    assert kv(replace(GEMMA, architecture="llama"), 32768) == 34 * 32768 * 4 * 512 * 2


def test_a_projector_needs_memory_to_compute_in():
    assert kv(replace(LLAMA, has_projector=True), 4096) - kv(LLAMA, 4096) == 250 * MIB


@pytest.mark.parametrize(
    ("facts", "hides"),
    [
        (LLAMA, False),
        (GEMMA, True),
        (replace(LLAMA, has_projector=True), True),
        (replace(LLAMA, sliding_window=0), False),
    ],
)
def test_windows_and_projectors_hide_memory_from_ollamas_own_sum(facts: ModelFacts, hides: bool):
    assert facts.hides_memory is hides


NUMBERS = st.none() | st.integers(0, 2**50)


@given(
    st.builds(
        ModelFacts,
        architecture=st.sampled_from(["llama", "gemma3", ""]),
        weights_bytes=NUMBERS,
        layers=NUMBERS,
        embedding_length=NUMBERS,
        heads=NUMBERS,
        kv_heads=NUMBERS,
        key_length=NUMBERS,
        value_length=NUMBERS,
        sliding_window=NUMBERS,
        layer_pattern=NUMBERS,
        has_projector=st.booleans(),
    ),
    st.integers(1, 2**40),
    st.integers(0, 2**50),
)
def test_whatever_a_model_tells_its_estimate_is_a_size(facts: ModelFacts, context: int, file_bytes: int):
    assert 0 < model_bytes(facts, context, file_bytes=file_bytes, rules=RULES) <= MAX_BYTES


@given(st.integers(1, 2**20), st.integers(1, 2**20))
def test_a_longer_context_never_needs_less(one: int, other: int):
    assert kv(GEMMA, min(one, other)) <= kv(GEMMA, max(one, other))


def test_a_workflow_needs_its_files_and_what_the_sampler_works_with():
    # Flux at 1024 x 1024: 128 x 128 cells x 2 prompts x 2 bytes x 0.01 x 3.1 = 2032 MiB.
    assert workflow_bytes(12 * GIB, 128 * 128) == 12 * GIB + int(128 * 128 * 4 * 0.01 * 3.1 * MIB)


def test_a_small_picture_needs_no_less_than_comfyui_keeps_free():
    assert workflow_bytes(12 * GIB, 64) == workflow_bytes(12 * GIB, 0) == 12 * GIB + 8 * GIB // 10


@given(st.integers(0, 2**60), st.integers(0, 2**70))
def test_whatever_a_workflow_tells_its_estimate_is_a_size(weights: int, cells: int):
    assert 0 < workflow_bytes(weights, cells) <= MAX_BYTES


@pytest.mark.parametrize(("size", "kept"), [(-5, 1), (0, 1), (7, 7), (MAX_BYTES + 1, MAX_BYTES)])
def test_a_size_is_kept_between_one_byte_and_the_largest_memory(size: int, kept: int):
    assert bounded(size) == kept


@pytest.mark.parametrize(
    ("samples", "p95"),
    [([7], 7), ([3, 1, 2], 3), (list(range(1, 21)), 19), (list(range(1, 101)), 95), ([5] * 99 + [900], 5)],
)
def test_the_95th_percentile_is_a_sample_that_95_of_100_do_not_exceed(samples: list[int], p95: int):
    assert percentile95(samples) == p95


SAMPLES = st.lists(st.integers(1, MAX_BYTES), min_size=1, max_size=60)


@given(SAMPLES, st.data())
def test_a_larger_sample_never_makes_the_95th_percentile_smaller(samples: list[int], data: st.DataObject):
    place = data.draw(st.integers(0, len(samples) - 1))
    more = list(samples)
    more[place] += data.draw(st.integers(0, MAX_BYTES))
    assert percentile95(more) >= percentile95(samples)
    assert sum(sample <= percentile95(samples) for sample in samples) >= 0.95 * len(samples)
    assert percentile95(samples) in samples


@pytest.mark.parametrize(
    ("table", "name", "fit"),
    [
        pytest.param({"LTX2": 5}, "ltx2-19b", ("LTX2", 5), id="part of the name, case does not count"),
        pytest.param({"ltx2": 5}, "my-LTX2-19B", ("ltx2", 5), id="case of the name does not count"),
        pytest.param({"ltx*": 5}, "ltx2-19b", ("ltx*", 5), id="star"),
        pytest.param({"ltx*": 5}, "my-ltx2-19b", None, id="a star must fit the whole name"),
        pytest.param({"ltx?": 5}, "ltx2", ("ltx?", 5), id="question mark"),
        pytest.param({"ltx?": 5}, "ltx2-19b", None, id="a question mark is one character"),
        pytest.param({"ltx": 9, "ltx2-19b": 5}, "ltx2-19b", ("ltx2-19b", 5), id="the longest wins"),
        pytest.param({"LTX": 5, "ltx": 9}, "ltx2", ("ltx", 9), id="of two as long the larger"),
        pytest.param({"default": 5}, "a-default-model", None, id="default is no pattern"),
        pytest.param({"": 5}, "anything", None, id="an empty pattern fits nothing"),
        pytest.param({"flux": 5}, "sdxl", None, id="another name"),
        pytest.param({}, "sdxl", None, id="empty table"),
    ],
)
def test_the_table_is_read_as_people_mean_it(table: dict[str, int], name: str, fit: tuple[str, int] | None):
    assert from_table([name], table) == fit


def test_of_several_names_the_one_that_needs_most_counts():
    assert from_table(["vae.safetensors", "flux-dev.gguf", "x"], {"vae": 1, "flux": 7}) == ("flux", 7)
    assert from_table([], {"flux": 7}) is None


WORDS = st.text("aB*?[]-!", max_size=6)


@given(st.lists(WORDS, max_size=5), st.dictionaries(WORDS, st.integers(1, MAX_BYTES), max_size=5))
def test_any_table_can_be_asked_for_any_names(names: list[str], table: dict[str, int]):
    found = from_table(names, table)
    assert found is None or table[found[0]] == found[1]


@pytest.mark.parametrize(
    ("estimates", "size"), [({}, 8 * GIB), ({"Default": 3 * GIB}, 3 * GIB), ({"default-model": 3 * GIB}, 8 * GIB)]
)
def test_the_default_of_the_table_replaces_the_default_estimate(estimates: dict[str, int], size: int):
    assert default_bytes(replace(RULES, estimates=estimates)) == size


@pytest.mark.parametrize(
    ("total", "context"),
    [(None, 4096), (0, 4096), (16 * GIB, 4096), (23 * GIB, 32768), (24 * GIB, 32768), (47 * GIB, 262144)],
)
def test_without_a_wish_the_context_follows_from_the_memory_of_all_gpus(total: int | None, context: int):
    assert default_context(total) == context


@pytest.mark.parametrize(
    ("name", "known_as"),
    [
        ("Llama3.1:8B", "llama3.1:8b"),
        ("gemma3", "gemma3:latest"),
        ("registry.ollama.ai/library/gemma3", "gemma3:latest"),
        ("hf.co/a/b:q4", "hf.co/a/b:q4"),
        ("host:5000/a/b", "host:5000/a/b:latest"),
        ("library/gemma3:4b", "gemma3:4b"),
        ("https://registry.ollama.ai/library/gemma3", "gemma3:latest"),
        ("http://host/a/b", "host/a/b:latest"),
    ],
)
def test_names_are_compared_as_ollama_compares_them(name: str, known_as: str):
    assert canonical(name) == known_as


def test_another_content_or_context_is_another_subject():
    assert model_subject("46e0", 4096) == "model:46e0:4096"


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_each_slot_keeps_a_cache_of_its_own(slots: int):
    rules = replace(RULES, ollama_parallel=slots)
    assert model_bytes(LLAMA, 4096, file_bytes=0, rules=rules) - REST == slots * kv(LLAMA, 4096)


def test_the_slots_share_one_cache_that_is_padded_once():
    rules = replace(RULES, ollama_parallel=3)
    assert model_bytes(LLAMA, 100, file_bytes=0, rules=rules) - REST == kv(LLAMA, 512)


@pytest.mark.parametrize(("value_bytes", "per_cell"), [(2.0, 4096), (1.0625, 2176), (0.5625, 1152)])
def test_a_quantized_cache_takes_what_its_values_take(value_bytes: float, per_cell: int):
    # 8 heads x (128 + 128) values: f16, q8_0 (34 bytes for 32), q4_0 (18 for 32).
    rules = replace(RULES, kv_value_bytes=value_bytes)
    assert model_bytes(LLAMA, 4096, file_bytes=0, rules=rules) - REST == 32 * 4096 * per_cell


def test_the_window_of_a_model_is_one_of_each_slot_together():
    facts = replace(GEMMA, sliding_window=1024)
    one, two = (model_bytes(facts, 8192, file_bytes=0, rules=replace(RULES, ollama_parallel=n)) for n in (1, 2))
    whole = (facts.layers or 0) // 6
    cell = kv(replace(facts, sliding_window=None, layers=1), 256) // 256
    assert two - one == whole * 8192 * cell


def test_a_large_picture_needs_most_when_it_is_decoded():
    # 2048 x 2048: 256 x 256 cells x 2178 x 64 x 2 bytes are 17 GiB, and sampling takes 8 GiB.
    decoding = 256 * 256 * 2178 * 64 * 2
    assert workflow_bytes(12 * GIB, 256 * 256, 256 * 256) == 12 * GIB + decoding
    assert workflow_bytes(12 * GIB, 256 * 256) < 12 * GIB + decoding
    # Sampling many at once can take more than decoding one.
    assert workflow_bytes(0, 64 * 256 * 256, 256 * 256) == workflow_bytes(0, 64 * 256 * 256)
