"""4. Plan the cheapest reclaim that covers the demand; nothing that would help: hold."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.policy.worlds import (
    CALM,
    CHAT,
    CLASSIC,
    DYNAMIC,
    SOFT,
    UNLOAD,
    Policy,
    comfyui,
    fallen,
    gpu,
    gpus,
    model,
    ollama,
    queue,
    second,
    snapshot,
)
from vram_manager.domain.event import EventType
from vram_manager.domain.reading import Missing, Seen
from vram_manager.domain.snapshot import ComfyUIState
from vram_manager.policy import Rules


@pytest.mark.parametrize(
    ("argv", "action"),
    [
        pytest.param((), SOFT, id="arguments unknown"),
        pytest.param(("main.py", "--listen"), SOFT, id="usual"),
        pytest.param(("main.py", "--lowvram"), SOFT, id="--lowvram"),
        pytest.param(("main.py", "--highvram"), UNLOAD, id="--highvram"),
        pytest.param(("main.py", "--gpu-only"), UNLOAD, id="--gpu-only"),
        pytest.param(("main.py", "--gpu-only=1"), UNLOAD, id="a flag with a value"),
        pytest.param(("main.py", "--highvram-not"), SOFT, id="another flag that begins like it"),
    ],
)
def test_soft_comes_first_unless_the_flags_keep_weights_on_the_gpu(argv: tuple[str, ...], action) -> None:
    stats = comfyui(*argv, torch_gib=16)
    decision = Policy().look(snapshot(0, gpu(free_gib=1), ollama=ollama(model(gpu_gib=6)), comfyui=stats))
    assert decision.action == action
    assert decision.branch == "6 act"


def test_under_highvram_nothing_follows_the_unload_stage() -> None:
    policy = Policy()
    stats: ComfyUIState = comfyui("main.py", "--highvram", torch_gib=16)
    chat = ollama(model(gpu_gib=6))
    posts = [
        at for at in range(100) if policy.acts(snapshot(at, gpu(free_gib=1), ollama=chat, comfyui=stats)) is not None
    ]
    assert posts == [0, 3]
    assert len(policy.of(EventType.FREE_UNCONFIRMED)) == 1


def test_a_free_says_who_needs_it_what_is_asked_and_what_it_should_give() -> None:
    decision = Policy().look(fallen(0))
    assert decision.reason == f"{CHAT} is 25 % on CPU: ask ComfyUI for a soft free, it holds 16.0 GiB (measured)"


def test_nothing_is_asked_of_a_comfyui_that_holds_nothing() -> None:
    decision = Policy().look(fallen(0, free_gib=2.9, torch_gib=0.1))
    assert (decision.branch, decision.action) == ("4 nothing held", None)
    assert decision.reason.endswith("holding, ComfyUI holds 0.1 GiB: not worth a free")


@pytest.mark.parametrize(
    ("free_gib", "torch_gib", "fits"),
    [
        pytest.param(1.0, 2.0, True, id="just"),
        pytest.param(1.0, 1.9, False, id="not quite"),
    ],
)
def test_comfyui_is_not_freed_for_a_model_that_would_not_fit_even_then(
    free_gib: float, torch_gib: float, fits: bool
) -> None:
    decision = Policy().look(fallen(0, free_gib=free_gib, torch_gib=torch_gib))
    assert (decision.action == SOFT) is fits
    if not fits:
        assert decision.reason.endswith(
            "would not fit even after a free: needs 3.0 GiB free, 1.0 GiB are and ComfyUI holds 1.9 GiB (measured)"
        )


@pytest.mark.parametrize(
    ("version", "torch_gib", "unread", "branch", "why"),
    [
        pytest.param(
            DYNAMIC,
            0.1,
            Missing("refused"),
            "4 unseen",
            "what ComfyUI holds beyond 0.1 GiB cannot be told: Ollama cannot be read: refused",
            id="too little is known",
        ),
        pytest.param(
            DYNAMIC,
            0.9,
            Missing("refused", "start it"),
            "4 unseen",
            "what ComfyUI holds beyond 0.9 GiB cannot be told: Ollama cannot be read: refused (start it)",
            id="what is known would not fit",
        ),
        pytest.param(
            CLASSIC,
            0.1,
            Missing("refused"),
            "4 nothing held",
            "ComfyUI holds 0.1 GiB: not worth a free",
            id="nothing hides without DynamicVRAM",
        ),
    ],
)
def test_weights_that_may_hide_are_said_to_be_unknown_not_to_be_none(
    version: str, torch_gib: float, unread: Missing, branch: str, why: str
) -> None:
    policy = Policy(CALM)
    policy.look(fallen(0, queue=queue(1, since=0)))
    stats = Seen(comfyui(torch_gib=torch_gib, version=version), 10)
    decision = policy.look(replace(fallen(10, queue=queue(since=5)), comfyui=stats, ollama=unread))
    assert (decision.branch, decision.action) == (branch, None)
    assert decision.reason.endswith(f"holding, {why}")


@pytest.mark.parametrize(
    ("ollama_gpu", "why"),
    [
        pytest.param("1", "ComfyUI is on GPU 0, Ollama is not", id="another GPU"),
        pytest.param("GPU-typo", "OLLAMA_GPU=GPU-typo is none of the GPUs seen here", id="a setting that names none"),
    ],
)
def test_comfyui_is_not_freed_for_a_model_on_another_gpu(ollama_gpu: str, why: str) -> None:
    policy = Policy(Rules(comfyui_gpu="0", ollama_gpu=ollama_gpu))
    both = gpus(gpu(free_gib=1), second(free_gib=1))
    decision = policy.look(snapshot(0, both, ollama=ollama(model(gpu_gib=6)), comfyui=comfyui(torch_gib=16)))
    assert (decision.branch, decision.action) == ("4 other GPU", None)
    assert decision.reason.endswith(f"holding, {why}")


@pytest.mark.parametrize("ollama_gpu", [None, "0", "GPU-a"])
def test_comfyui_is_freed_for_a_model_that_may_use_its_gpu(ollama_gpu: str | None) -> None:
    policy = Policy(Rules(comfyui_gpu="0", ollama_gpu=ollama_gpu))
    both = gpus(gpu(free_gib=1), second(free_gib=1))
    seen = snapshot(0, both, ollama=ollama(model(gpu_gib=6)), comfyui=comfyui(torch_gib=16))
    assert policy.look(seen).action == SOFT


def test_nothing_more_is_asked_of_a_comfyui_that_has_not_run_since() -> None:
    policy = Policy()
    policy.acts(fallen(0))
    for at in (5, 10):
        policy.acts(fallen(at))
    for at in range(20, 600, 10):
        decision = policy.look(fallen(at, torch_gib=16))
        policy.acts(fallen(at, torch_gib=16))
    assert decision.branch == "4 unreclaimable"
    assert decision.reason.endswith("ComfyUI has not run since it was last freed: nothing more to give")
