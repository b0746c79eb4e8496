"""2. The GPU cannot be read: ComfyUI's own numbers, marked second-hand; those missing too: hold."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.policy.worlds import (
    CHAT,
    DYNAMIC,
    GIB,
    MIB,
    SOFT,
    Policy,
    comfyui,
    device,
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
from vram_manager.domain.reading import Missing, Off
from vram_manager.domain.snapshot import Gpus
from vram_manager.policy import Rules
from vram_manager.policy.accounting import gpus_read_at, gpus_seen

LOST = Missing("NVML: driver/library version mismatch")


def told_by_comfyui(at: float, *, chat=None, free_gib: float = 1.0, torch_gib: float = 16.0):
    """NVML is gone; ComfyUI says how much of the device is free."""
    loaded = ollama(chat or model(gpu_gib=6.0))
    return snapshot(at, LOST, ollama=loaded, comfyui=comfyui(torch_gib=torch_gib, free_gib=free_gib))


def test_first_hand_readings_are_taken_as_they_are() -> None:
    seen = gpus_seen(snapshot(0, gpu(free_gib=5)))
    assert isinstance(seen, Gpus)
    assert not seen.second_hand
    assert gpus_read_at(snapshot(0, gpu()), seen) == 0


@pytest.mark.parametrize(
    "nvml",
    [
        pytest.param(LOST, id="NVML is missing"),
        pytest.param(Off(), id="the GPU sensor is off"),
        pytest.param(gpus(), id="NVML shows no GPU"),
        pytest.param(gpus(gpu(free_gib=Missing("GPU is lost"))), id="the only GPU is lost"),
        pytest.param(gpus(gpu(free_gib=LOST), second(free_gib=LOST)), id="all GPUs are lost"),
    ],
)
def test_without_nvml_comfyuis_device_numbers_are_used_and_marked_second_hand(nvml) -> None:
    stats = comfyui(devices=(device(free_gib=3, torch_gib=9, torch_free_gib=2),))
    seen = gpus_seen(snapshot(7, nvml, comfyui=stats))
    assert isinstance(seen, Gpus)
    assert seen.second_hand
    assert [(card.uuid, card.memory.free_bytes) for card in seen.gpus] == [("comfyui-0", 3 * GIB)]  # type: ignore[union-attr]
    assert gpus_read_at(snapshot(7, nvml, comfyui=stats), seen) == 7


def test_second_hand_numbers_that_contradict_each_other_never_go_below_zero() -> None:
    stats = comfyui(devices=(device(free_gib=30, total_gib=24),))
    seen = gpus_seen(snapshot(0, LOST, comfyui=stats))
    assert isinstance(seen, Gpus)
    memory = seen.gpus[0].memory
    assert (memory.used_bytes, memory.used_percent) == (0, 0.0)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("nvml", "stats", "why"),
    [
        pytest.param(LOST, Missing("refused"), LOST.why, id="both missing"),
        pytest.param(LOST, Off(), LOST.why, id="no ComfyUI here"),
        pytest.param(LOST, comfyui(devices=()), LOST.why, id="ComfyUI on the CPU"),
        pytest.param(LOST, comfyui(devices=(device(kind="xpu"),)), LOST.why, id="its numbers are not device-wide"),
        pytest.param(LOST, comfyui(devices=(device(total_gib=0),)), LOST.why, id="its numbers are empty"),
        pytest.param(Off(), Missing("refused"), "GPU sensor is off", id="sensor off"),
        pytest.param(gpus(), Missing("refused"), "no GPU", id="no GPU at all"),
        pytest.param(
            gpus(gpu(free_gib=Missing("b")), second(free_gib=Missing("a"))), Off(), "a; b", id="each lost its way"
        ),
    ],
)
def test_with_both_missing_it_holds_and_says_why(nvml, stats, why: str) -> None:
    policy = Policy()
    decision = policy.look(snapshot(0, nvml, ollama=ollama(model(gpu_gib=0)), comfyui=stats))
    assert decision.branch == "2 blind"
    assert decision.reason == f"no GPU reading, holding: {why}"
    assert decision.action is None
    assert gpus_read_at(snapshot(0, LOST), LOST) is None


def test_a_model_partly_on_the_cpu_is_helped_on_second_hand_numbers() -> None:
    policy = Policy()
    assert policy.acts(told_by_comfyui(0)) == SOFT
    assert policy.look(told_by_comfyui(1, free_gib=17, torch_gib=0)).inputs["gpus"] == [
        {"gpu": "comfyui-0", "used_percent": 29.2, "free_bytes": 17 * GIB, "second_hand": True}
    ]
    policy.look(told_by_comfyui(1.5, free_gib=17, torch_gib=0))
    assert policy.of(EventType.FREED)[0].freed_bytes == 16 * GIB


@pytest.mark.parametrize("size_gib", [4.0, 8.0, 12.0])
def test_a_model_wholly_on_the_cpu_raises_no_demand_on_second_hand_numbers(size_gib: float) -> None:
    policy = Policy()
    for at in range(0, 3000, 30):
        decision = policy.look(told_by_comfyui(at, chat=model(size_gib=size_gib, gpu_gib=0), free_gib=7))
        assert decision.action is None
        assert policy.watch.demands == {}


def test_a_model_wholly_on_the_cpu_is_helped_once_nvml_is_back() -> None:
    policy = Policy()
    policy.look(told_by_comfyui(0, chat=model(gpu_gib=0)))
    assert policy.acts(fallen(5, chat=model(gpu_gib=0))) == SOFT


def test_one_lost_gpu_among_several_does_not_hide_the_others() -> None:
    policy = Policy(Rules(comfyui_gpu="GPU-b"))
    seen = snapshot(
        0,
        gpus(gpu(free_gib=Missing("lost")), second(free_gib=1)),
        ollama=ollama(model(gpu_gib=6)),
        comfyui=comfyui(torch_gib=16),
    )
    decision = policy.look(seen)
    assert decision.action == SOFT
    assert decision.inputs["gpus"][0] == {"gpu": "GPU-a", "missing": "lost"}  # type: ignore[index]


def test_comfyui_on_the_lost_one_of_several_gpus_is_left_alone() -> None:
    policy = Policy(Rules(comfyui_gpu="GPU-a"))
    seen = snapshot(
        0,
        gpus(gpu(free_gib=Missing("lost")), second(free_gib=1)),
        ollama=ollama(model(gpu_gib=6)),
        comfyui=comfyui(torch_gib=16),
    )
    decision = policy.look(seen)
    assert (decision.branch, decision.action) == ("2 blind", None)
    assert "no memory reading of GPU 0: lost" in decision.reason


def test_the_use_of_a_lost_gpu_is_said_to_be_unknown() -> None:
    seen = snapshot(0, gpus(gpu(free_gib=12), second(free_gib=Missing("lost"))))
    assert Policy().look(seen).reason == "GPU 0 50 % used, GPU 1 unknown: nobody needs more"


@pytest.mark.parametrize(
    ("gone", "why"),
    [
        pytest.param({"comfyui": Missing("refused")}, "ComfyUI cannot be read: refused", id="ComfyUI"),
        pytest.param({"queue": Missing("timed out")}, "ComfyUI's queue cannot be read: timed out", id="its queue"),
        pytest.param({"comfyui": Off(), "queue": Off()}, "no ComfyUI is configured", id="none configured"),
        pytest.param({"queue": Off()}, "no ComfyUI is configured", id="queue off"),
    ],
)
def test_a_comfyui_that_cannot_be_seen_is_never_freed(gone, why: str) -> None:
    decision = Policy().look(replace(fallen(0), **gone))
    assert decision.action is None
    assert decision.reason.endswith(f"holding, {why}")


def test_a_decision_carries_the_numbers_it_was_made_on() -> None:
    decision = Policy().look(replace(fallen(10, queue=queue(since=-20)), ollama=fallen(7).ollama))
    assert decision.inputs == {
        "reading_age_seconds": {"nvml": 0, "ollama": 3, "comfyui": 0, "comfyui_queue": 0},
        "gpus": [{"gpu": "GPU-a", "used_percent": 95.8, "free_bytes": GIB, "second_hand": False}],
        "ollama": [{"model": CHAT, "size_bytes": 8 * GIB, "size_vram_bytes": 6 * GIB}],
        "comfyui_torch_bytes": 16 * GIB,
        "comfyui_queue": {"remaining": 0, "unchanged_seconds": 30, "runs": 1},
        "demands": [{"reason": f"{CHAT} is 25 % on CPU", "need_free_bytes": 3 * GIB, "age_seconds": 0}],
    }


def test_a_decision_made_on_nothing_says_what_is_missing() -> None:
    seen = snapshot(0, LOST, ollama=Off(), comfyui=Missing("refused"), queue=Missing("timed out"))
    assert Policy().look(seen).inputs == {
        "reading_age_seconds": {
            "nvml": f"missing: {LOST.why}",
            "ollama": "off",
            "comfyui": "missing: refused",
            "comfyui_queue": "missing: timed out",
        },
        "demands": [],
    }


# -- readings that contradict each other


def claims(at: float, claimed_gib: float, nvml=None):
    """Ollama claims memory on a card of which NVML counts 4 GiB used."""
    return snapshot(at, nvml or gpu(free_gib=20), ollama=ollama(model(size_gib=claimed_gib)))


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        pytest.param(
            claims, "Ollama claims 5.0 GiB on the GPU, NVML counts 4.0 GiB used in all", id="too much claimed"
        ),
        pytest.param(
            lambda at, claimed: claims(at, claimed, LOST),
            "Ollama claims 5.0 GiB on the GPU while NVML is gone",
            id="lost",
        ),
    ],
)
def test_a_contradiction_that_lasts_is_told_once(seen, words: str) -> None:
    policy = Policy()
    for at in range(15):
        policy.look(seen(at, 5))
    assert policy.of(EventType.READINGS_DISAGREE) == []
    for at in range(15, 100):
        policy.look(seen(at, 5))
    assert [event.reason for event in policy.of(EventType.READINGS_DISAGREE)] == [words]


def test_a_contradiction_that_comes_back_is_told_again() -> None:
    policy = Policy()
    for at, claimed in ((0, 5), (15, 5), (16, 4), (17, 5), (32, 5)):
        policy.look(claims(at, claimed))
    assert len(policy.of(EventType.READINGS_DISAGREE)) == 2


def test_free_memory_beyond_the_total_is_told_as_nothing_used() -> None:
    policy = Policy()
    for at in (0, 15):
        policy.look(claims(at, 5, gpu(free_gib=30)))
    assert policy.told[-1].reason == "Ollama claims 5.0 GiB on the GPU, NVML counts 0.0 GiB used in all"


@pytest.mark.parametrize(
    "seen",
    [
        pytest.param(lambda at: claims(at, 4.5), id="half a GiB is rounding"),
        pytest.param(lambda at: claims(at, 0, LOST), id="nothing claimed while NVML is gone"),
        pytest.param(lambda at: claims(at, 5, Off()), id="no GPU sensor"),
        pytest.param(lambda at: claims(at, 30, gpus(gpu(free_gib=20), second(free_gib=LOST))), id="one GPU unread"),
        pytest.param(lambda at: snapshot(at, LOST, ollama=Missing("timed out")), id="Ollama unread"),
    ],
)
def test_what_is_no_contradiction_is_not_told(seen) -> None:
    policy = Policy()
    for at in (0, 15, 30):
        policy.look(seen(at))
    assert policy.of(EventType.READINGS_DISAGREE) == []


# -- the fill rate


def test_the_fastest_fill_is_measured_between_readings() -> None:
    policy = Policy()
    for at, free_gib in ((0, 24), (1, 23), (2, 19), (3, 20), (4, 20)):
        policy.look(snapshot(at, gpu(free_gib=free_gib)))
    assert policy.watch.fill_rate_bytes_per_second == 4 * GIB


def test_the_fill_rate_goes_by_the_age_of_the_readings_not_by_how_soon_one_looks_again() -> None:
    policy = Policy()
    seen = snapshot(10.0, gpu(free_gib=24))
    policy.look(seen)
    policy.look(replace(seen, taken_at=10.999))
    policy.look(replace(snapshot(11.0, gpu(free_gib=20))))
    assert policy.watch.fill_rate_bytes_per_second == 4 * GIB


def test_an_unread_gpu_has_no_fill_rate() -> None:
    policy = Policy()
    policy.look(snapshot(0, gpus(gpu(free_gib=24), second(free_gib=LOST))))
    policy.look(snapshot(1, gpus(gpu(free_gib=LOST), second(free_gib=4))))
    policy.look(snapshot(2, LOST, comfyui=Off()))
    assert policy.watch.fill_rate_bytes_per_second == 0


# -- a dead worker


def working(at: float, *, utilization=0, remaining: int = 1, moved_at: float = 0.0, card=None):
    seen = queue(remaining, since=0, moved_at=moved_at)
    return snapshot(at, card or gpu(utilization=utilization), queue=seen)


def test_a_queue_that_never_moves_while_the_gpu_is_idle_is_told_once_as_a_dead_worker() -> None:
    policy = Policy()
    for at in range(0, 595, 5):
        policy.look(working(at, utilization=4))
    assert policy.of(EventType.WORKER_DEAD) == []
    for at in range(600, 1200, 5):
        policy.look(working(at))
    event = policy.of(EventType.WORKER_DEAD)[0]
    assert policy.of(EventType.WORKER_DEAD) == [event]
    assert event.reason.startswith("its queue of 1 has not moved for 10 min while the GPU is idle")
    assert policy.watch.worker_dead


@pytest.mark.parametrize(
    "sign",
    [
        pytest.param(lambda at: working(at, utilization=5 if at % 300 == 0 else 4), id="the GPU works now and then"),
        pytest.param(lambda at: working(at, moved_at=at - at % 300), id="the queue moves"),
        pytest.param(lambda at: working(at, remaining=0), id="the queue is empty"),
        pytest.param(lambda at: working(at, utilization=Missing("not supported")), id="utilization unknown"),
        pytest.param(lambda at: working(at, card=LOST), id="GPU unread"),
        pytest.param(lambda at: replace(working(at), queue=Missing("timed out")), id="queue unread"),
        pytest.param(
            lambda at: working(at, card=gpus(gpu(), second(utilization=50))), id="another GPU works: it may be its"
        ),
    ],
)
def test_a_worker_with_any_sign_of_life_is_not_called_dead(sign) -> None:
    policy = Policy()
    for at in range(0, 2400, 60):
        policy.look(sign(at))
    assert policy.of(EventType.WORKER_DEAD) == []


def test_a_dead_worker_found_at_the_start_is_told_after_as_long_a_look() -> None:
    policy = Policy()
    for at in range(5000, 5605, 5):
        policy.look(working(at))
    assert len(policy.of(EventType.WORKER_DEAD)) == 1


def test_a_worker_that_was_restarted_and_dies_again_is_told_again() -> None:
    policy = Policy()
    for at in (0, 600, 601):
        policy.look(working(at))
    policy.look(working(700, remaining=0))
    assert not policy.watch.worker_dead
    for at in (700, 1400):
        policy.look(working(at, moved_at=700))
    assert len(policy.of(EventType.WORKER_DEAD)) == 2


def test_a_queue_that_cannot_be_read_for_a_moment_is_not_a_second_death() -> None:
    policy = Policy()
    for at in (0, 600):
        policy.look(working(at))
    policy.look(replace(working(610), queue=Missing("timed out")))
    policy.look(working(620))
    assert len(policy.of(EventType.WORKER_DEAD)) == 1


def test_dynamic_vram_needs_no_gpu_reading_to_be_held_back() -> None:
    stats = comfyui(torch_gib=1, version=DYNAMIC, devices=())
    decision = Policy().look(snapshot(0, LOST, ollama=ollama(model(gpu_gib=6)), comfyui=stats))
    assert decision.branch == "2 blind"


def test_rounding_of_one_percent_is_no_cpu_part() -> None:
    policy = Policy()
    policy.look(fallen(0, chat=model(size_gib=8, gpu_gib=8 - 80 * MIB / GIB)))
    assert policy.watch.demands == {}
