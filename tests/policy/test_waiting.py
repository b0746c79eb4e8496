"""3a and 3c: who waits in line and who is at a hard limit is made room for, under the same rules as everybody."""

from __future__ import annotations

from dataclasses import replace

from tests.policy.worlds import (
    CALM,
    CARD,
    DYNAMIC,
    GIB,
    SOFT,
    UNLOAD,
    Policy,
    comfyui,
    gib,
    gpu,
    gpus,
    model,
    ollama,
    queue,
    second,
    snapshot,
)
from vram_manager.domain.demand import Demand, Kind
from vram_manager.domain.snapshot import Snapshot
from vram_manager.policy import Rules


def waits(need_gib: float = 10.0, *, on: str | None = CARD, **more: object) -> Demand:
    values = {
        "kind": Kind.WAITING,
        "key": "admission:worker-1:q",
        "gpu": on,
        "need_free_bytes": gib(need_gib),
        "reason": "worker-1 waits for 8.0 GiB",
        "since": 0.0,
        "last_seen_at": 0.0,
        **more,
    }
    return Demand(**values)  # type: ignore[arg-type]


def asked(seen: Snapshot, *asks: Demand, leased_gib: float = 0.0) -> Snapshot:
    return replace(seen, asks=asks, leased_bytes={CARD: gib(leased_gib)} if leased_gib else {})


def full(at: float = 0.0, *, free_gib: float = 4.0, torch_gib: float = 16.0, **more: object) -> Snapshot:
    return snapshot(at, gpu(free_gib=free_gib), comfyui=comfyui(torch_gib=torch_gib), **more)  # type: ignore[arg-type]


def test_an_idle_comfyui_makes_room_for_who_waits() -> None:
    decision = Policy(CALM).look(asked(full(), waits()))
    assert decision.action == SOFT
    assert decision.reason.startswith("worker-1 waits for 8.0 GiB: ask ComfyUI for a soft free")


def test_nobody_is_asked_where_there_is_room() -> None:
    assert Policy(CALM).look(asked(full(free_gib=10, torch_gib=10), waits())).branch == "3 nobody"


def test_what_is_promised_to_others_is_no_room() -> None:
    seen = full(free_gib=10, torch_gib=10)
    assert Policy(CALM).look(asked(seen, waits(), leased_gib=1)).action == SOFT


def test_a_free_that_would_not_be_enough_beside_the_promises_is_not_asked_for() -> None:
    assert Policy(CALM).look(asked(full(), waits(20))).action == SOFT
    decision = Policy(CALM).look(asked(full(), waits(20), leased_gib=1))
    assert (decision.action, decision.branch) == (None, "4 would not fit")


def test_never_while_a_prompt_runs() -> None:
    assert Policy(CALM).look(asked(full(queue=queue(1)), waits())).branch == "5 busy"


def test_a_pause_of_two_seconds_is_enough_for_who_waits_and_not_for_who_is_patient() -> None:
    paused = full(queue=queue(since=-3.0))
    assert Policy(CALM).look(asked(paused, waits())).action == SOFT
    assert Policy(CALM).look(asked(paused, waits(patient=True))).branch == "5 idle"
    assert Policy(CALM).look(asked(full(queue=queue(since=-30.0)), waits(patient=True))).action == SOFT


def test_who_waits_goes_before_a_model_on_the_cpu() -> None:
    seen = asked(full(ollama=ollama(model(size_gib=3, gpu_gib=1))), waits(since=5.0))
    assert Policy(CALM).look(seen).reason.startswith("worker-1 waits")


def test_a_soft_free_that_was_not_enough_is_followed_by_the_unload_stage() -> None:
    policy = Policy(CALM)
    assert policy.acts(asked(full(), waits(20))) == SOFT
    posted = [policy.acts(asked(full(at / 4, free_gib=12, torch_gib=8), waits(20))) for at in range(1, 30)]
    assert {action for action in posted if action is not None} == {UNLOAD}


def test_who_has_left_the_line_needs_nothing() -> None:
    policy = Policy(Rules(cooldown_seconds=0))
    policy.look(asked(full(queue=queue(1)), waits()))
    assert policy.look(asked(full(at=1.0))).branch == "3 nobody"


def test_any_gpu_will_do_for_who_named_none() -> None:
    two = gpus(gpu(free_gib=4), second(free_gib=12))
    seen = snapshot(0, two, comfyui=comfyui(torch_gib=16))
    rules = replace(CALM, comfyui_gpu="0", ollama_gpu="0")
    assert Policy(rules).look(asked(seen, waits(on=None))).branch == "3 nobody"
    assert Policy(rules).look(asked(seen, waits(14, on=None))).action == SOFT
    assert Policy(rules).look(asked(seen, waits(14, on="GPU-b"))).branch == "4 other GPU"


def test_a_worker_at_its_hard_limit_is_made_room_for() -> None:
    limit = waits(6, kind=Kind.STARTING, key="hard-limit:worker-1", reason="worker-1 is at its hard limit on GPU 0")
    paused = full(queue=queue(since=-3.0))
    decision = Policy(CALM).look(asked(paused, limit))
    assert decision.action == SOFT
    assert decision.reason.startswith("worker-1 is at its hard limit on GPU 0")


def test_what_workers_hold_is_not_taken_for_hidden_weights() -> None:
    seen = snapshot(0, gpu(free_gib=4), comfyui=comfyui(version=DYNAMIC))
    assert Policy(CALM).look(asked(seen, waits())).action == SOFT
    held = replace(asked(seen, waits()), workers_bytes={CARD: 20 * GIB})
    assert Policy(CALM).look(held).branch == "4 nothing held"
