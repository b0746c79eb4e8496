"""1. An action is settling: what proves it, what does not, and when it is asked once more."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.policy.worlds import (
    CHAT,
    GIB,
    SOFT,
    UNLOAD,
    Policy,
    comfyui,
    fallen,
    gib,
    gpu,
    gpus,
    model,
    ollama,
    queue,
    second,
    snapshot,
)
from vram_manager.domain.action import UnloadModel
from vram_manager.domain.event import EventType
from vram_manager.domain.reading import Missing, Off, Seen
from vram_manager.domain.snapshot import Snapshot
from vram_manager.domain.watch import Asked, Refused, Watch
from vram_manager.policy import Rules, asked, refused, reposted

OUTCOMES = (EventType.FREED, EventType.FREE_UNCONFIRMED)


def asked_at_zero(**changed: object) -> Policy:
    """A soft free of 16 GiB for a chat that fell to the CPU went out at 0 s, with 1 GiB free."""
    policy = Policy(Rules(**changed))  # type: ignore[arg-type]
    assert policy.acts(fallen(0)) == SOFT
    return policy


def outcome(policy: Policy) -> tuple[EventType, float] | None:
    """How it ended, with the GiB that are told."""
    ends = [event for event in policy.told if event.type in OUTCOMES]
    assert len(ends) <= 1
    return (ends[0].type, (ends[0].freed_bytes or 0) / GIB) if ends else None


def stale(seen: Snapshot, *, gpus_at: float | None = None, comfyui_at: float | None = None) -> Snapshot:
    """The same snapshot, with readings that are older than it."""
    if gpus_at is not None and isinstance(seen.gpus, Seen):
        seen = replace(seen, gpus=Seen(seen.gpus.value, gpus_at))
    if comfyui_at is not None and isinstance(seen.comfyui, Seen):
        seen = replace(seen, comfyui=Seen(seen.comfyui.value, comfyui_at))
    return seen


# -- proof


@pytest.mark.parametrize(
    ("rise_gib", "settled_after"),
    [
        pytest.param(16.0, 1.5, id="all of it: after half a second without growth"),
        pytest.param(12.0, 1.5, id="75 % is enough"),
        pytest.param(11.9, 4.0, id="less than 75 %: three seconds of patience for the rest"),
        pytest.param(0.25, 4.0, id="as little as is worth a free"),
    ],
)
def test_memory_that_came_back_is_told_once_nothing_more_follows(rise_gib: float, settled_after: float) -> None:
    policy = asked_at_zero()
    for at in (1.0, 1.25, settled_after - 0.25):
        policy.look(fallen(at, free_gib=1 + rise_gib, torch_gib=16 - rise_gib))
        assert outcome(policy) is None
    policy.look(fallen(settled_after, free_gib=1 + rise_gib, torch_gib=16 - rise_gib))
    assert outcome(policy) == (EventType.FREED, pytest.approx(rise_gib))


def test_memory_that_comes_back_in_steps_is_told_as_one_sum_with_the_time_of_the_last_step() -> None:
    policy = asked_at_zero()
    for at, free_gib in ((0.5, 13.0), (0.9, 15.0), (1.3, 17.0), (1.7, 17.0), (1.8, 17.0)):
        policy.look(fallen(at, free_gib=free_gib, torch_gib=17 - free_gib))
    event = policy.of(EventType.FREED)[0]
    assert event.freed_bytes == 16 * GIB
    assert event.took_seconds == pytest.approx(1.3)
    assert event.used_percent_before == pytest.approx(100 * 23 / 24)
    assert event.used_percent_after == pytest.approx(100 * 7 / 24)


def test_growth_smaller_than_a_page_of_dynamic_vram_does_not_delay_the_verdict() -> None:
    policy = asked_at_zero()
    policy.look(fallen(1.0, free_gib=17.0, torch_gib=0))
    policy.look(fallen(1.5, free_gib=17.0 + 31 / 1024, torch_gib=0))
    assert outcome(policy) == (EventType.FREED, 16.0)


def test_a_rise_stays_proven_when_somebody_takes_the_room_right_away() -> None:
    policy = asked_at_zero()
    policy.look(fallen(0.5, free_gib=17.0, torch_gib=0))
    for at in (0.75, 1.0):
        policy.look(fallen(at, free_gib=9.0, torch_gib=0))
    assert outcome(policy) == (EventType.FREED, 16.0)


def test_torchs_own_report_proves_the_free_when_ollama_takes_the_room_meanwhile() -> None:
    policy = asked_at_zero()
    newcomer = ollama(model(gpu_gib=6.0), model("qwen3:14b", size_gib=16.0))
    for at in (1.0, 1.5):
        policy.look(snapshot(at, gpu(free_gib=1.0), ollama=newcomer, comfyui=comfyui(torch_gib=0)))
    assert outcome(policy) == (EventType.FREED, 16.0)


def test_torchs_report_proves_nothing_once_comfyui_runs_again() -> None:
    # The new prompt moves memory from node outputs to weights that torch does not count.
    policy = asked_at_zero()
    for at in (1.0, 2.0, 10.0):
        policy.look(fallen(at, torch_gib=12, queue=queue(1, since=0.5, runs=2)))
    assert outcome(policy) == (EventType.FREE_UNCONFIRMED, 0.0)


def test_a_model_whose_load_only_now_shows_in_the_list_does_not_pass_for_freed_memory() -> None:
    # Ollama lists a model once it is loaded: its memory was taken before the free was asked.
    policy = asked_at_zero()
    newcomer = ollama(model(gpu_gib=6.0), model("qwen3:14b", size_gib=12.0))
    for at in (1.0, 2.0, 10.0):
        policy.look(snapshot(at, gpu(free_gib=1.0), ollama=newcomer, comfyui=comfyui(torch_gib=16)))
    assert outcome(policy) == (EventType.FREE_UNCONFIRMED, 0.0)


def test_nothing_is_concluded_before_comfyui_was_read_again_after_the_rise() -> None:
    policy = asked_at_zero()
    policy.look(fallen(1.0, free_gib=17.0, torch_gib=0))
    policy.look(stale(fallen(1.6, free_gib=17.0, torch_gib=16), comfyui_at=0.9))
    assert outcome(policy) is None
    policy.look(fallen(1.75, free_gib=17.0, torch_gib=0))
    assert outcome(policy) == (EventType.FREED, 16.0)


@pytest.mark.parametrize("lost", [Missing("timed out"), Off()], ids=["missing", "switched off"])
def test_a_comfyui_that_cannot_be_read_any_more_does_not_hold_the_verdict_up(lost: Missing | Off) -> None:
    policy = asked_at_zero()
    for at in (1.0, 1.5):
        policy.look(snapshot(at, gpu(free_gib=17.0), ollama=ollama(model(gpu_gib=6.0)), comfyui=lost))
    assert outcome(policy) == (EventType.FREED, 16.0)


# -- no proof


def test_a_free_that_gave_nothing_is_unconfirmed_after_the_settle_timeout() -> None:
    policy = asked_at_zero(settle_timeout_seconds=8.0)
    for at in (1.0, 7.9):
        policy.look(fallen(at))
        assert outcome(policy) is None
    policy.look(fallen(8.0))
    assert outcome(policy) == (EventType.FREE_UNCONFIRMED, 0.0)


def test_memory_that_fell_is_told_as_nothing_freed_never_as_a_negative_number() -> None:
    policy = asked_at_zero()
    policy.look(fallen(10.0, free_gib=0.25, torch_gib=17.0))
    assert outcome(policy) == (EventType.FREE_UNCONFIRMED, 0.0)


def test_what_still_grows_at_the_timeout_is_told_as_freed() -> None:
    policy = asked_at_zero()
    for at in (9.0, 9.75):
        policy.look(fallen(at, free_gib=at - 5, torch_gib=1.0))
    policy.look(fallen(10.0, free_gib=5.5, torch_gib=16.0))
    assert outcome(policy) == (EventType.FREED, 15.0)


@pytest.mark.parametrize("read_at", [-0.5, 0.0], ids=["before it", "as it went out"])
def test_readings_older_than_the_ask_prove_nothing(read_at: float) -> None:
    policy = asked_at_zero()
    for at in (1.0, 2.0, 9.9):
        policy.look(stale(fallen(at, free_gib=17.0, torch_gib=0), gpus_at=read_at, comfyui_at=read_at))
    assert outcome(policy) is None
    policy.look(fallen(10, free_gib=1, torch_gib=16))
    assert outcome(policy) == (EventType.FREE_UNCONFIRMED, 0.0)


@pytest.mark.parametrize(
    ("end", "why"),
    [
        pytest.param(fallen(10), "outside ComfyUI's model management", id="idle, nothing came"),
        pytest.param(
            snapshot(10, Missing("lost"), comfyui=comfyui(torch_gib=16, devices=())),
            "the GPU could not be read",
            id="GPU lost",
        ),
        pytest.param(fallen(10, queue=queue(1, since=1, runs=2)), "acts after that", id="a prompt runs"),
        pytest.param(fallen(10, queue=queue(since=5, runs=2)), "acts after that", id="a prompt ran"),
        pytest.param(fallen(10, queue=Missing("timed out")), "outside ComfyUI's", id="queue unknown"),
    ],
)
def test_an_unconfirmed_free_says_what_is_known_instead(end: Snapshot, why: str) -> None:
    policy = asked_at_zero()
    policy.look(end)
    event = policy.of(EventType.FREE_UNCONFIRMED)[0]
    assert event.reason.startswith(f"{CHAT} is 25 % on CPU; ")
    assert why in event.reason


def test_a_gpu_reading_lost_while_settling_leaves_torchs_report_as_the_proof() -> None:
    policy = asked_at_zero()
    for at in (1.0, 1.5):
        policy.look(snapshot(at, Missing("driver reload"), comfyui=comfyui(torch_gib=0)))
    assert outcome(policy) == (EventType.FREED, 16.0)
    assert policy.of(EventType.FREED)[0].used_percent_after is None


def test_a_gpu_lost_among_others_while_settling_proves_nothing() -> None:
    policy = Policy(Rules(comfyui_gpu="0"))
    chat = ollama(model(gpu_gib=6.0))
    policy.acts(snapshot(0, gpus(gpu(free_gib=1), second(free_gib=1)), ollama=chat, comfyui=comfyui(torch_gib=16)))
    gone = gpus(gpu(free_gib=Missing("lost")), second(free_gib=20))
    decision = policy.look(snapshot(5, gone, ollama=chat, comfyui=comfyui(torch_gib=16)))
    assert decision.branch == "1 settling"
    assert outcome(policy) is None


# -- once more


@pytest.mark.parametrize(
    ("at", "again"), [pytest.param(2.9, False, id="too early"), pytest.param(3.0, True, id="after three seconds")]
)
def test_a_lost_flag_is_posted_once_more_after_three_seconds(at: float, again: bool) -> None:
    policy = asked_at_zero()
    decision = policy.look(fallen(at))
    assert (decision.action, decision.repost) == ((SOFT, True) if again else (None, False))


def test_a_flag_is_posted_once_more_and_only_once() -> None:
    policy = asked_at_zero()
    posts = [at / 4 for at in range(1, 40) if policy.acts(fallen(at / 4)) is not None]
    assert posts == [3.0]


def test_nothing_is_posted_again_once_some_memory_came_back() -> None:
    policy = asked_at_zero()
    policy.look(fallen(2.5, free_gib=2.0, torch_gib=15.0))
    assert policy.acts(fallen(3.5, free_gib=2.0, torch_gib=15.0)) is None


@pytest.mark.parametrize(
    "seen",
    [
        pytest.param(fallen(4, queue=queue(1, since=1, runs=2)), id="a prompt runs"),
        pytest.param(fallen(4, queue=queue(since=3.9, runs=2)), id="a prompt has just ended: its flag acted with it"),
        pytest.param(fallen(4, queue=Missing("timed out")), id="the queue cannot be read"),
        pytest.param(fallen(4, queue=Seen(queue(), 0.0)), id="the queue was last read before the post"),
        pytest.param(
            snapshot(4, gpus(gpu(free_gib=Missing("lost"))), comfyui=comfyui(devices=())), id="the GPU cannot be read"
        ),
        pytest.param(
            snapshot(4, gpu(free_gib=1), ollama=ollama(model(gpu_gib=6)), comfyui=Missing("no answer")),
            id="ComfyUI cannot be read",
        ),
    ],
)
def test_nothing_is_posted_again_unless_an_idle_comfyui_is_seen_to_hold_on(seen: Snapshot) -> None:
    assert asked_at_zero().acts(seen) is None


def test_an_unload_of_ollama_is_never_posted_twice() -> None:
    policy = unloading()
    assert policy.acts(snapshot(5, gpu(free_gib=16), ollama=ollama(model()))) is None


def test_the_second_post_gets_no_new_settle_timeout() -> None:
    policy = asked_at_zero()
    assert policy.acts(fallen(3)) == SOFT
    policy.look(fallen(9.9))
    assert outcome(policy) is None
    policy.look(fallen(10))
    assert outcome(policy) == (EventType.FREE_UNCONFIRMED, 0.0)


# -- while the request is under way


def test_nothing_else_is_decided_while_the_request_is_under_way() -> None:
    policy = Policy()
    policy.look(fallen(0))
    for at in (0.3, 60.0):
        assert policy.look(fallen(at)).branch == "1 settling"
    assert outcome(policy) is None


def test_the_clock_of_a_free_starts_when_the_request_went_out() -> None:
    policy = Policy()
    policy.look(fallen(0))
    policy.post(at=0.8)
    for at in (1.0, 1.5):
        policy.look(fallen(at, free_gib=17, torch_gib=0))
    assert policy.of(EventType.FREED)[0].took_seconds == pytest.approx(0.2)


def test_a_refused_action_is_over_and_does_not_count_as_a_post() -> None:
    policy = Policy()
    policy.look(fallen(0))
    policy.watch = refused(policy.watch, Refused(at=0.1, why="ComfyUI became busy", tried=False))
    assert policy.watch.pending is None
    assert policy.watch.posted_at == {}
    assert policy.acts(fallen(5)) == SOFT


def test_a_request_that_failed_is_cooled_down_like_one_that_went_through() -> None:
    policy = Policy()
    policy.look(fallen(0))
    policy.watch = refused(policy.watch, Refused(at=0.1, why="HTTP 500", tried=True))
    assert policy.look(fallen(5)).branch == "5 cooldown"
    assert policy.acts(fallen(30.1)) == SOFT


@pytest.mark.parametrize(
    "report",
    [
        pytest.param(lambda watch: asked(watch, Asked(at=1, gpu_memory=None), fallen(1), "free-1"), id="asked"),
        pytest.param(lambda watch: reposted(watch, 1), id="posted again"),
        pytest.param(lambda watch: refused(watch, Refused(at=1, why="", tried=True)), id="refused"),
    ],
)
def test_a_report_about_nothing_under_way_changes_nothing(report) -> None:
    assert report(Watch()) == Watch()


@pytest.mark.parametrize(
    ("seen", "torch_known"),
    [
        pytest.param(fallen(0), True, id="all seen"),
        pytest.param(replace(fallen(0), comfyui=Missing("gone"), queue=Missing("gone")), False, id="ComfyUI gone"),
    ],
)
def test_the_numbers_before_the_ask_are_remembered_where_they_are_known(seen: Snapshot, torch_known: bool) -> None:
    policy = Policy()
    policy.look(fallen(0))
    pending = asked(policy.watch, Asked(at=0, gpu_memory=None), seen, "free-1").pending
    assert pending is not None
    assert (pending.holder_bytes_before, pending.runs_before) == ((gib(16), 1) if torch_known else (None, None))
    assert pending.free_bytes_before is None


def test_only_the_frees_of_the_last_hour_are_counted() -> None:
    policy = Policy(watch=Watch(frees_at=(-3601.0, -3600.0, -3599.0)))
    policy.acts(fallen(0))
    assert policy.watch.frees_at == (-3599.0, 0.0)


# -- a model of Ollama


def unloading(chat_gib: float = 8.0, gpu_gib: float | None = None) -> Policy:
    """The model was asked to leave at 0 s, with 16 GiB free."""
    policy = Policy()
    loaded = ollama(model(size_gib=chat_gib, gpu_gib=gpu_gib))
    decision = policy.wish(UnloadModel(model=CHAT), snapshot(0, gpu(free_gib=16), ollama=loaded))
    assert decision.action == UnloadModel(model=CHAT)
    policy.post()
    return policy


def test_an_unload_is_proven_when_its_model_left_the_list_and_the_memory_came_back() -> None:
    policy = unloading()
    for at in (1.0, 1.5):
        policy.look(snapshot(at, gpu(free_gib=24)))
    assert outcome(policy) == (EventType.FREED, 8.0)
    assert policy.of(EventType.FREED)[0].stage is None


def test_an_unload_is_not_proven_by_free_memory_while_the_model_is_still_listed() -> None:
    policy = unloading()
    for at in (1.0, 5.0, 10.0):
        assert outcome(policy) is None
        policy.look(snapshot(at, gpu(free_gib=24), ollama=ollama(model())))
    assert outcome(policy) == (EventType.FREE_UNCONFIRMED, 8.0)
    assert "still listed: it leaves after its last request" in policy.told[-1].reason


@pytest.mark.parametrize(
    "unread",
    [Missing("timed out"), Off(), Seen(ollama(), 0.0)],
    ids=["missing", "off", "read before the ask"],
)
def test_an_ollama_that_was_not_read_since_proves_nothing(unread) -> None:
    policy = unloading()
    policy.look(snapshot(10, gpu(free_gib=24), ollama=unread))
    assert outcome(policy) == (EventType.FREE_UNCONFIRMED, 8.0)
    assert "Ollama could not be read meanwhile" in policy.told[-1].reason


def test_a_model_that_left_without_its_memory_is_told_so() -> None:
    policy = unloading()
    policy.look(snapshot(10, gpu(free_gib=16)))
    assert "its memory did not come back" in policy.told[-1].reason


def test_a_model_that_left_while_the_gpu_could_not_be_read_is_told_so() -> None:
    policy = unloading()
    policy.look(snapshot(10, Missing("lost"), comfyui=Off()))
    assert "the GPU could not be read meanwhile" in policy.told[-1].reason


def test_a_model_wholly_on_the_cpu_has_left_once_it_is_off_the_list() -> None:
    policy = unloading(gpu_gib=0.0)
    policy.look(snapshot(0.5, gpu(free_gib=16), ollama=ollama(model(gpu_gib=0.0))))
    assert outcome(policy) is None
    policy.look(snapshot(1.0, gpu(free_gib=16)))
    assert outcome(policy) == (EventType.FREED, 0.0)
    assert policy.of(EventType.FREED)[0].took_seconds == 1.0


# -- the unload stage that gave back too little


def unload_stage(**changed: object) -> Policy:
    """The unload stage went out at 0 s, with 1 GiB free: 16 GiB are expected, as its flags keep weights on the GPU."""
    policy = Policy(Rules(**changed))  # type: ignore[arg-type]
    assert policy.acts(highvram(0)) == UNLOAD
    return policy


def highvram(at: float, *, free_gib: float = 1.0, torch_gib: float = 16.0, **more: object) -> Snapshot:
    held = comfyui("main.py", "--highvram", torch_gib=torch_gib)
    return replace(fallen(at, free_gib=free_gib, **more), comfyui=Seen(held, at))  # type: ignore[arg-type]


def posts(policy: Policy, *, free_gib: float, torch_gib: float, until: float = 12.0, **more: object) -> list[float]:
    """When it is posted again, while so much has come back from 1 s on."""
    times = [at / 4 for at in range(1, int(until * 4))]
    return [
        at
        for at in times
        if policy.acts(highvram(at, **({"free_gib": free_gib, "torch_gib": torch_gib} if at >= 1 else {}), **more))
        == UNLOAD
    ]


def test_an_unload_stage_that_gave_back_too_little_is_posted_once_more() -> None:
    # 2 of 16 have come, and nothing follows for 3 s: ComfyUI tidied up by itself, the flag was lost.
    policy = unload_stage()
    assert posts(policy, free_gib=3.0, torch_gib=14.0, until=9.0) == [4.0]


@pytest.mark.parametrize(
    ("free_gib", "torch_gib"),
    [pytest.param(13.0, 4.0, id="three quarters are enough"), pytest.param(16.9, 0.1, id="all of it")],
)
def test_an_unload_stage_that_gave_back_enough_is_not_posted_again(free_gib: float, torch_gib: float) -> None:
    policy = unload_stage()
    assert posts(policy, free_gib=free_gib, torch_gib=torch_gib, until=9.0) == []
    assert outcome(policy) is not None


def test_what_is_missing_must_be_worth_a_second_post() -> None:
    # 0.9 GiB were expected, 0.66 have come: what is missing is less than anybody asks for.
    policy = Policy(Rules())
    assert policy.acts(highvram(0, free_gib=2.5, torch_gib=0.9)) == UNLOAD
    assert posts(policy, free_gib=3.16, torch_gib=0.24, until=9.0) == []


def test_a_soft_free_that_gave_back_too_little_is_followed_by_the_unload_stage_instead() -> None:
    policy = asked_at_zero()
    again = [policy.acts(fallen(at / 4, free_gib=2.0, torch_gib=15.0)) for at in range(4, 30)]
    assert SOFT not in again


@pytest.mark.parametrize(
    "world",
    [
        pytest.param({"queue": queue(since=0.5, runs=2)}, id="a prompt has run: it took the flag with it"),
        pytest.param({"queue": queue(1, since=0.5, runs=2)}, id="a prompt runs"),
        pytest.param({"queue": Missing("slow")}, id="its queue cannot be read"),
    ],
)
def test_too_little_is_no_reason_to_post_again_where_comfyui_did_not_rest(world: dict[str, object]) -> None:
    assert posts(unload_stage(), free_gib=3.0, torch_gib=14.0, until=9.0, **world) == []


def test_too_little_is_posted_for_once_only_and_ends_with_the_settle_timeout() -> None:
    policy = unload_stage(settle_timeout_seconds=20.0)
    assert posts(policy, free_gib=3.0, torch_gib=14.0, until=19.0) == [4.0]
    late = unload_stage(settle_timeout_seconds=4.0)
    assert posts(late, free_gib=3.0, torch_gib=14.0, until=4.5) == []
    assert outcome(late) == (EventType.FREED, 2.0)
