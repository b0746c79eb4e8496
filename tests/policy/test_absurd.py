"""Whatever the sensors say, in whatever order: the policy answers, calmly, and the same way twice."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.policy.worlds import DYNAMIC, SOFT, UNLOAD, Policy
from vram_manager.domain.action import FreeComfyUI, UnloadModel
from vram_manager.domain.decision import Decision
from vram_manager.domain.demand import Demand, Kind
from vram_manager.domain.reading import Missing, Off, Seen
from vram_manager.domain.snapshot import (
    ComfyUIState,
    Gpu,
    GpuMemory,
    Gpus,
    LoadedModel,
    OllamaState,
    ProcessMemory,
    Queue,
    Snapshot,
    TorchDevice,
)
from vram_manager.domain.watch import Refused, Watch
from vram_manager.policy import Rules, beat_seconds, decide, refused
from vram_manager.policy.accounting import gpus_seen
from vram_manager.policy.plan import Target, comfyui_target

sizes = st.one_of(st.sampled_from([0, 1, 2**28, 2**33, 2**34, 2**35]), st.integers(0, 2**70))
missing = st.builds(Missing, st.sampled_from(["lost", "N/A"]), st.sampled_from([None, "restart"]))
texts = st.sampled_from(["", "a", "b", "NVIDIA A", "NVIDIA A B"])
versions = st.one_of(missing, st.sampled_from(["", "0.30.5", "0.32.15", "nightly", "0.3.64", DYNAMIC]))
words = st.lists(st.sampled_from(["main.py", "--highvram", "--cpu"]), max_size=2).map(tuple)
moments = st.floats(-1e6, 1e6)


def maybe(some: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(some, some, some, missing)


cards = st.builds(
    Gpu,
    uuid=st.sampled_from(["GPU-a", "GPU-b", "comfyui-0"]),
    index=st.integers(0, 2),
    name=texts,
    memory=maybe(
        st.builds(GpuMemory, total_bytes=sizes, used_bytes=sizes, free_bytes=sizes, reserved_bytes=maybe(sizes))
    ),
    utilization_percent=maybe(st.integers(0, 100)),
    processes=maybe(
        st.lists(
            st.builds(ProcessMemory, pid=st.integers(1, 3), used_bytes=maybe(sizes), command=maybe(words)), max_size=3
        ).map(tuple)
    ),
)
models = st.builds(
    LoadedModel,
    name=texts,
    digest=texts,
    size_bytes=st.one_of(sizes, st.just(-5)),
    size_vram_bytes=st.one_of(sizes, st.sampled_from([0, -5])),
    context_length=st.sampled_from([None, 0, -1, 4096]),
    expires_at=st.sampled_from([None, datetime.max.replace(tzinfo=UTC), datetime.min.replace(tzinfo=UTC)]),
    since=st.one_of(st.none(), moments),
    active_at=st.one_of(st.none(), moments),
    requests=st.sampled_from([None, None, 0, 1]),
)
asks = st.builds(
    Demand,
    kind=st.sampled_from([Kind.WAITING, Kind.STARTING]),
    key=texts,
    gpu=st.sampled_from([None, "GPU-a", "GPU-b", "gone"]),
    need_free_bytes=sizes,
    reason=texts,
    since=moments,
    last_seen_at=moments,
    patient=st.booleans(),
    for_comfyui=st.booleans(),
    model=st.one_of(st.none(), texts),
)
promised = st.dictionaries(st.sampled_from([None, "GPU-a", "comfyui-0"]), st.integers(0, 2**36), max_size=2)
devices = st.builds(
    TorchDevice,
    name=texts,
    type=st.sampled_from(["cuda", "cuda", "xpu"]),
    index=st.none(),
    vram_total_bytes=sizes,
    vram_free_bytes=sizes,
    torch_total_bytes=sizes,
    torch_free_bytes=sizes,
)
values = {
    "gpus": st.builds(Gpus, gpus=st.lists(cards, max_size=3).map(tuple), driver_version=missing),
    "ollama": st.builds(
        OllamaState,
        version=versions,
        models=st.lists(models, max_size=3).map(tuple),
        active_at=st.one_of(st.none(), moments),
    ),
    "comfyui": st.builds(ComfyUIState, version=versions, argv=words, devices=st.lists(devices, max_size=2).map(tuple)),
    "queue": st.builds(
        Queue, remaining=st.sampled_from([0, 0, 0, 1, 99]), since=moments, moved_at=moments, runs=st.integers(0, 3)
    ),
}


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    at = draw(moments)
    readings = {
        name: draw(st.one_of(*[st.builds(Seen, value, st.floats(at - 30, at))] * 4, missing, st.just(Off())))
        for name, value in values.items()
    }
    asked = tuple(draw(st.lists(asks, max_size=2))) if draw(st.booleans()) else ()
    return Snapshot(taken_at=at, asks=asked, leased_bytes=draw(promised), reserved_bytes=draw(promised), **readings)


rules = st.builds(
    Rules,
    grace_seconds=st.sampled_from([0.0, 30.0]),
    empty_room_grace_seconds=st.sampled_from([0.0, 600.0]),
    cooldown_seconds=st.sampled_from([0.0, 30.0]),
    comfyui_idle_seconds=st.sampled_from([0.0, 30.0]),
    threshold_percent=st.sampled_from([0.1, 75.0, 100.0]),
    min_reclaim_bytes=st.sampled_from([1, 2**28, 2**40]),
    max_frees_per_hour=st.sampled_from([0, 40]),
    comfyui_gpu=st.sampled_from([None, None, "0", "GPU-b", "x"]),
    ollama_gpu=st.sampled_from([None, None, "1", "GPU-a", "x"]),
    dry_run=st.sampled_from([False, False, True]),
    repair=st.booleans(),
    warm_back=st.booleans(),
    evict=st.sampled_from([True, True, False]),
)
actions = st.sampled_from([SOFT, UNLOAD, UnloadModel(model="a")])
calm = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))


def drive(policy: Policy, seen: list[Snapshot], data: st.DataObject) -> list[tuple[Snapshot, Decision]]:
    """A few turns, with requests that go out, are refused, or are a person's wish."""
    turns = []
    for snapshot in sorted(seen, key=lambda snapshot: snapshot.taken_at):
        if data.draw(st.integers(0, 5)) == 0:
            decision = policy.wish(data.draw(actions), snapshot, force=data.draw(st.booleans()))
        else:
            decision = policy.look(snapshot)
        turns.append((snapshot, decision))
        if decision.repost:
            policy.post_again()
        elif decision.action is not None and data.draw(st.integers(0, 3)):
            policy.post()
        elif decision.action is not None:
            tried = data.draw(st.booleans())
            policy.watch = refused(policy.watch, Refused(at=snapshot.taken_at, why="no", tried=tried))
    return turns


@calm
@given(seen=st.lists(snapshots(), min_size=1, max_size=8), rules=rules, data=st.data())
def test_it_never_raises_and_its_numbers_stay_within_bounds(seen, rules, data) -> None:
    policy = Policy(rules)
    for snapshot, decision in drive(policy, seen, data):
        gpus = gpus_seen(snapshot)
        assert beat_seconds(decision, gpus, rules) >= 0.25
        assert decision.look_again_seconds is None or decision.look_again_seconds >= 0
        for event in decision.events:
            assert (event.freed_bytes or 0) >= 0
            for percent in (event.used_percent_before, event.used_percent_after):
                assert percent is None or 0 <= percent <= 100
        assert all(demand.need_free_bytes >= 0 for demand in decision.watch.demands.values())
        assert all(stays >= 0 for stays in decision.watch.unreclaimable.values())
        lesson = decision.watch.lesson
        assert all(floor >= 0 for floor in (lesson.floors if lesson else {}).values())
        if isinstance(gpus, Gpus):
            target = comfyui_target(snapshot, gpus, rules)
            for stage in (SOFT.stage, UNLOAD.stage):
                if isinstance(target, Target):
                    held = target.held(snapshot, lesson, stage, rules)
                    assert 0 <= held.torch_bytes <= held.bytes
                    assert (held.unaccounted_bytes or 0) >= 0


@calm
@given(seen=st.lists(snapshots(), min_size=1, max_size=8), rules=rules, data=st.data())
def test_it_never_acts_on_what_it_cannot_see_or_on_a_busy_comfyui(seen, rules, data) -> None:
    for snapshot, decision in drive(Policy(rules), seen, data):
        if isinstance(decision.action, FreeComfyUI):
            assert not rules.dry_run
            assert not isinstance(gpus_seen(snapshot), Missing)
            assert isinstance(snapshot.comfyui, Seen)
            assert isinstance(snapshot.queue, Seen)
            assert snapshot.queue.value.idle or decision.action.forced


@calm
@given(seen=st.lists(snapshots(), min_size=1, max_size=8), rules=rules)
def test_the_same_look_always_leads_to_the_same_decision(seen, rules) -> None:
    watch = Watch()
    for snapshot in sorted(seen, key=lambda snapshot: snapshot.taken_at):
        decision = decide(snapshot, watch, rules)
        assert decision == decide(snapshot, watch, rules)
        watch = decision.watch


@pytest.mark.parametrize("free", [0, 2**40])
@pytest.mark.parametrize("total", [0, 1, 2**34])
def test_a_card_whose_numbers_contradict_each_other_breaks_nothing(total: int, free: int) -> None:
    memory = GpuMemory(total_bytes=total, used_bytes=2**41, free_bytes=free, reserved_bytes=2**50)
    card = Gpu(uuid="GPU-a", index=0, name="", memory=memory, utilization_percent=0)
    seen = Snapshot(
        taken_at=0,
        gpus=Seen(Gpus(gpus=(card,), driver_version="1"), 0),
        ollama=Off(),
        comfyui=Off(),
        queue=Off(),
    )
    policy = Policy()
    for at in range(0, 700, 100):
        assert policy.look(replace(seen, taken_at=at)).action is None
