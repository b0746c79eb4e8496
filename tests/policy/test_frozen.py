"""Which idle models keep Ollama from seeing the room that there is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.policy.worlds import CHAT, gib, gpu, gpus, model, ollama, second, snapshot
from vram_manager.domain.reading import Missing, Off
from vram_manager.domain.snapshot import Gpu, LoadedModel, OllamaState, Snapshot
from vram_manager.policy import Rules
from vram_manager.policy.frozen import CHANGED_BYTES, SPENT_SHARE, in_the_way

RULES = Rules()


def viewed(
    name: str = CHAT,
    *,
    size_gib: float = 4.0,
    free_after_gib: float | None = 5.0,
    since: float | None = 10.0,
    **more: Any,
) -> LoadedModel:
    """A model that was loaded while ComfyUI held the rest: so much was free beside it."""
    free_after = None if free_after_gib is None else gib(free_after_gib)
    return replace(model(name, size_gib=size_gib), free_after_bytes=free_after, since=since, **more)


def now(*models: LoadedModel, free_gib: float = 20.0, version: str | Missing = "0.30.0") -> Snapshot:
    """ComfyUI has given back what it had: on a card of 24 GiB 20 are free."""
    return snapshot(100, gpu(free_gib=free_gib), ollama=ollama(*models, version=version))


def names(seen: Snapshot, need_gib: float = 8.0, **rules: Any) -> tuple[str, ...]:
    return in_the_way(gib(need_gib), seen, replace(RULES, **rules))


def test_a_model_from_before_the_room_came_is_in_the_way() -> None:
    assert names(now(viewed())) == (CHAT,)


def test_all_that_are_loaded_are_as_ollama_looks_again_only_without_any() -> None:
    assert names(now(viewed("a"), viewed("b", since=20.0, free_after_gib=1.0))) == ("a", "b")


@pytest.mark.parametrize(
    ("need_gib", "found"), [pytest.param(4.0, (), id="four of five"), pytest.param(4.01, (CHAT,), id="more than that")]
)
def test_ollama_spends_four_fifths_of_what_it_believes_to_be_free(need_gib: float, found: tuple[str, ...]) -> None:
    assert SPENT_SHARE == 0.8
    assert names(now(viewed()), need_gib) == found


@pytest.mark.parametrize(
    ("free_gib", "found"), [pytest.param(5.99, (), id="hardly more"), pytest.param(6.0, (CHAT,), id="a gibibyte more")]
)
def test_a_view_that_is_hardly_wrong_costs_no_model(free_gib: float, found: tuple[str, ...]) -> None:
    assert gib(1) == CHANGED_BYTES
    assert names(now(viewed(), free_gib=free_gib)) == found


def test_memory_that_was_free_and_is_taken_since_is_no_reason() -> None:
    assert names(now(viewed(free_after_gib=19.0), free_gib=2.0), 16.0) == ()


@pytest.mark.parametrize(
    ("one", "other", "need_gib", "found"),
    [
        # 12 were free after `a`, 6 of them went to `b`: 6 are believed to be left, 4.8 may be spent.
        pytest.param({"free_after_gib": 12.0}, {"free_after_gib": 9.0}, 4.9, ("a", "b"), id="by the older one"),
        pytest.param({"free_after_gib": 12.0}, {"free_after_gib": 9.0}, 4.8, (), id="enough by the older one"),
        pytest.param({"free_after_gib": 18.0}, {"free_after_gib": 6.0}, 4.9, ("a", "b"), id="by the newer one"),
        pytest.param({"free_after_gib": 18.0}, {"free_after_gib": 6.0}, 4.8, (), id="enough by the newer one"),
        # Both were first seen at once: what was free then is what both had left.
        pytest.param(
            {"free_after_gib": 6.0, "since": 20.0}, {"free_after_gib": 6.0}, 4.8, (), id="loaded between two looks"
        ),
    ],
)
def test_what_is_believed_is_the_least_that_any_model_leaves(
    one: dict[str, Any], other: dict[str, Any], need_gib: float, found: tuple[str, ...]
) -> None:
    older, newer = viewed("a", **one), viewed("b", **{"size_gib": 6.0, "since": 20.0, **other})
    for models in ((older, newer), (newer, older)):
        assert sorted(names(now(*models), need_gib)) == sorted(found)


@pytest.mark.parametrize("change", [{"free_after_bytes": None}, {"since": None}])
def test_where_one_view_is_not_known_nobody_is_in_the_way(change: dict[str, Any]) -> None:
    assert names(now(viewed("a"), replace(viewed("b"), **change))) == ()


@pytest.mark.parametrize(
    ("change", "found"),
    [
        pytest.param({"requests": 1, "active_at": 0.0}, (), id="it answers"),
        pytest.param({"requests": 0, "active_at": 98.5}, (), id="it has just answered"),
        pytest.param({"requests": 0, "active_at": 98.0}, ("a", "b"), id="it has been idle for 2 s"),
    ],
)
def test_one_that_stays_leaves_ollama_as_blind_as_before(change: dict[str, Any], found: tuple[str, ...]) -> None:
    assert names(now(viewed("a"), viewed("b", free_after_gib=2.0, **change))) == found


def test_a_pinned_model_is_never_in_the_way_nor_are_those_beside_it() -> None:
    assert names(now(viewed("a"), viewed("Gemma3")), pinned=frozenset({"gemma3:latest"})) == ()


def test_where_models_are_left_alone_none_is_in_the_way() -> None:
    assert names(now(viewed()), evict=False) == ()


@pytest.mark.parametrize(
    ("version", "found"),
    [
        ("0.29.9", ()),
        ("0.24.0", ()),
        ("0.30.0-rc1", (CHAT,)),
        ("0.32.15", (CHAT,)),
        ("v1.0", (CHAT,)),
        ("a build of my own", ()),
        (Missing("not told"), ()),
    ],
)
def test_only_from_0_30_on_is_the_view_frozen(version: str | Missing, found: tuple[str, ...]) -> None:
    assert names(now(viewed(), version=version)) == found


def test_without_a_model_on_the_gpu_ollama_looks_for_itself() -> None:
    assert names(now()) == ()
    assert names(now(replace(viewed(), size_vram_bytes=0))) == ()
    assert names(now(replace(viewed("cpu"), size_vram_bytes=0), viewed("gpu"))) == ("gpu",)


UNTOLD = ollama(viewed())


@pytest.mark.parametrize(
    ("card", "state"),
    [
        pytest.param(gpu(free_gib=20.0), Missing("slow"), id="Ollama cannot be read"),
        pytest.param(gpu(free_gib=20.0), Off(), id="no Ollama"),
        pytest.param(Missing("driver gone"), UNTOLD, id="no GPU can be read"),
        pytest.param(gpus(gpu(free_gib=20.0), second()), UNTOLD, id="on which GPU?"),
    ],
)
def test_what_cannot_be_told_is_no_reason_to_unload(card: Gpu | Missing, state: OllamaState | Missing | Off) -> None:
    seen = snapshot(100, card, ollama=state, comfyui=Missing("down"))
    assert names(seen) == ()


def test_a_gpu_of_ollamas_that_is_lost_is_no_reason_to_unload() -> None:
    seen = snapshot(100, gpus(gpu(free_gib=Missing("lost")), second()), ollama=ollama(viewed()))
    assert names(seen, ollama_gpu="0") == ()
    assert names(replace_free(seen), ollama_gpu="0") == (CHAT,)


def replace_free(seen: Snapshot) -> Snapshot:
    """The same, with the card back."""
    return replace(seen, gpus=snapshot(100, gpus(gpu(free_gib=20.0), second())).gpus)
