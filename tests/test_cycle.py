"""The whole turn on a pretended rim, in virtual time: what is asked, proven, told, and what is not."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta
from typing import ClassVar

import pytest

from tests.fakes import GIB, QUICK, Card, FakeGpus, Spine, now, until
from vram_manager.domain.action import FreeComfyUI, Stage, UnloadModel
from vram_manager.domain.decision import ManualFree
from vram_manager.domain.event import EventType
from vram_manager.domain.snapshot import Gpus, ProcessMemory
from vram_manager.errors import Rejected, SensorError, TimedOut
from vram_manager.policy import Rules

pytestmark = [pytest.mark.asyncio, pytest.mark.looptime]

ASKED, FREED = EventType.FREE_ASKED, EventType.FREED
UNCONFIRMED, REFUSED = EventType.FREE_UNCONFIRMED, EventType.FREE_REFUSED
MODEL = "llama3.1:8b"
SOFT = ManualFree(action=FreeComfyUI(stage=Stage.SOFT), force=False)
FORCED = ManualFree(action=FreeComfyUI(stage=Stage.UNLOAD, forced=True), force=True)


def a_model_fell_to_the_cpu(spine: Spine) -> None:
    """ComfyUI holds 20 of 24 GiB, and a model of 8 GiB found room for half of itself."""
    spine.comfyui.hold(20)
    spine.ollama.load(MODEL, 8, on_gpu=0.45)


async def a_prompt_starts_unseen(spine: Spine) -> None:
    """Just after a poll and just before the action: there is no websocket, and the next poll is a second away."""
    await until(lambda: len(spine.comfyui.polls) == 3)
    await asyncio.sleep(0.05)
    spine.comfyui.remaining = 1
    assert spine.cycle.watch.pending is None


async def test_a_free_is_asked_proven_and_told_with_bytes_seconds_percents_and_ids():
    spine = Spine()
    a_model_fell_to_the_cpu(spine)
    async with spine.running():
        freed = await spine.event(FREED)
    asked = spine.entries(ASKED)[0]
    assert [body for _, body in spine.comfyui.posts] == [{"unload_models": True, "free_memory": False}]
    assert asked.event.target == "comfyui"
    assert asked.event.stage is Stage.SOFT
    assert asked.event.gpu == "GPU-a"
    assert asked.event.reason == f"{MODEL} is 55 % on CPU"
    assert asked.event.used_percent_before == pytest.approx(100 * 23.6 / 24)
    assert freed.event.action_id == asked.id
    assert freed.event.freed_bytes == 20 * GIB
    assert freed.event.took_seconds == pytest.approx(1.0, abs=0.3)
    assert freed.event.used_percent_before == asked.event.used_percent_before
    assert freed.event.used_percent_after == pytest.approx(100 * 3.6 / 24)
    assert freed.event.stage is Stage.SOFT
    assert (asked.id, freed.id) == (f"free-{asked.seq:04d}", f"free-{freed.seq:04d}")


async def test_nothing_is_asked_while_nobody_needs_anything():
    spine = Spine()
    spine.comfyui.hold(4)
    spine.ollama.load(MODEL, 5)
    async with spine.running():
        await asyncio.sleep(200)
    assert spine.comfyui.posts == []
    assert spine.told(ASKED, FREED, UNCONFIRMED, REFUSED) == []


async def test_pressure_is_answered_after_its_grace_with_nobody_waiting():
    spine = Spine(rules=replace(QUICK, grace_seconds=60, empty_room_grace_seconds=60))
    spine.comfyui.hold(20)
    async with spine.running():
        await spine.event(FREED)
    assert 60 <= spine.comfyui.posts[0][0] <= 66
    assert len(spine.told(EventType.PRESSURE_BEGAN)) == len(spine.told(EventType.PRESSURE_ENDED)) == 1


async def test_a_recheck_that_sees_comfyui_busy_posts_nothing_and_says_so():
    spine = Spine()
    a_model_fell_to_the_cpu(spine)
    async with spine.running():
        await a_prompt_starts_unseen(spine)
        refused = await spine.event(REFUSED)
        await asyncio.sleep(60)
    assert spine.comfyui.posts == []
    assert "ComfyUI became busy (1 running or waiting)" in refused.event.reason
    assert f"{MODEL} is 55 % on CPU" in refused.event.reason
    assert spine.told(ASKED) == []


async def test_a_refusal_is_told_once_and_not_in_a_tight_loop():
    spine = Spine()
    a_model_fell_to_the_cpu(spine)
    async with spine.running():
        await a_prompt_starts_unseen(spine)
        await asyncio.sleep(120)
    assert len(spine.told(REFUSED)) == 1


async def test_a_disagreement_that_lasts_is_asked_again_no_faster_than_the_sensors_look():
    spine = Spine()
    a_model_fell_to_the_cpu(spine)
    async with spine.running():
        await until(lambda: spine.observer.ready)
        spine.gpus.error = TimedOut("NVML did not answer within 5 s")
        await asyncio.sleep(4)
    assert len(spine.told(REFUSED)) <= 2


async def test_the_demand_survives_a_refusal_and_is_answered_when_comfyui_is_idle_again():
    spine = Spine()
    a_model_fell_to_the_cpu(spine)
    async with spine.running():
        await a_prompt_starts_unseen(spine)
        await spine.event(REFUSED)
        await asyncio.sleep(20)
        spine.comfyui.remaining = 0
        await spine.event(FREED)
    assert len(spine.comfyui.posts) == 1


@pytest.mark.parametrize(
    "error",
    [Rejected("POST /free: HTTP 500"), SensorError("POST /free: connection refused")],
    ids=["500", "connection refused"],
)
async def test_a_post_that_fails_is_told_counts_for_the_cooldown_and_the_daemon_goes_on(error: SensorError):
    spine = Spine()
    a_model_fell_to_the_cpu(spine)
    spine.comfyui.post_error = error
    async with spine.running():
        refused = await spine.event(REFUSED)
        spine.comfyui.post_error = None
        await spine.event(FREED)
    assert error.why in refused.event.reason
    (first, _), (second, _) = spine.comfyui.posts
    assert second - first >= QUICK.cooldown_seconds
    assert len(spine.told(REFUSED)) == 1


async def test_a_post_that_times_out_waits_for_the_proof_all_the_same():
    spine = Spine()
    a_model_fell_to_the_cpu(spine)
    spine.comfyui.post_error = TimedOut("POST /free: no answer within 10 s")
    spine.comfyui.post_takes_seconds = 10
    spine.comfyui.acts_after_seconds = 12
    async with spine.running():
        done = await spine.event(FREED, UNCONFIRMED)
        await asyncio.sleep(60)
    assert done.event.type is FREED
    assert done.event.freed_bytes == 20 * GIB
    assert len(spine.comfyui.posts) == 1
    assert "no answer within 10 s" in spine.told(ASKED)[0].reason


async def test_what_came_back_while_the_post_hung_is_proven_too():
    spine = Spine()
    a_model_fell_to_the_cpu(spine)
    spine.comfyui.post_error = TimedOut("POST /free: no answer within 10 s")
    spine.comfyui.post_takes_seconds = 10
    async with spine.running():
        done = await spine.event(FREED, UNCONFIRMED)
    assert done.event.type is FREED
    assert done.event.freed_bytes == 20 * GIB


async def test_a_model_that_loads_into_the_room_while_the_post_still_hangs_does_not_hide_the_proof():
    spine = Spine()
    a_model_fell_to_the_cpu(spine)
    spine.comfyui.post_takes_seconds = 8
    async with spine.running():
        await until(lambda: spine.comfyui.held_bytes == 0)
        spine.ollama.load("qwen3:14b", 18)
        done = await spine.event(FREED, UNCONFIRMED)
    assert done.event.type is FREED
    assert done.event.freed_bytes == 20 * GIB


async def test_a_prompt_that_starts_while_the_post_still_hangs_is_the_reason_that_is_told():
    spine = Spine()
    a_model_fell_to_the_cpu(spine)
    spine.comfyui.post_takes_seconds = 8
    spine.comfyui.acts_after_seconds = None
    async with spine.running():
        await until(lambda: spine.comfyui.posts)
        spine.comfyui.remaining = 1
        await asyncio.sleep(4)
        spine.comfyui.remaining = 0
        done = await spine.event(FREED, UNCONFIRMED)
    assert "ComfyUI started a prompt meanwhile" in done.event.reason


async def test_a_lost_flag_is_posted_once_more_and_then_proven():
    spine = Spine()
    a_model_fell_to_the_cpu(spine)
    spine.comfyui.lost_flags = 1
    async with spine.running():
        freed = await spine.event(FREED)
    first, again = [entry for entry in spine.entries(ASKED) if entry.event.target == "comfyui"]
    assert len(spine.comfyui.posts) == 2
    assert spine.comfyui.posts[1][0] - spine.comfyui.posts[0][0] == pytest.approx(3, abs=0.3)
    assert "asked again, the first flag was lost" in again.event.reason
    assert again.event.action_id == first.id
    assert freed.event.action_id == first.id


async def test_the_second_post_goes_out_at_most_once_however_slow_it_is():
    spine = Spine(rules=replace(QUICK, settle_timeout_seconds=60))
    a_model_fell_to_the_cpu(spine)
    spine.comfyui.acts_after_seconds = None
    async with spine.running():
        await until(lambda: len(spine.comfyui.posts) == 2)
        spine.comfyui.post_takes_seconds = 30
        await until(lambda: now() > 50)
    assert len(spine.comfyui.posts) == 2


async def test_a_second_post_that_fails_is_told_and_the_proof_is_awaited_all_the_same():
    spine = Spine()
    a_model_fell_to_the_cpu(spine)
    spine.comfyui.lost_flags = 1
    async with spine.running():
        await until(lambda: len(spine.comfyui.posts) == 1)
        spine.comfyui.post_error = Rejected("POST /free: HTTP 500")
        refused = await spine.event(REFUSED)
        spine.comfyui.hold(0)
        freed = await spine.event(FREED)
    assert refused.event.action_id == freed.event.action_id == spine.entries(ASKED)[0].id


async def test_two_requests_are_never_under_way_at_once_even_when_the_second_post_hangs():
    """The second post hangs past the settle timeout; the unload stage must not be posted beside it."""
    spine = Spine()
    a_model_fell_to_the_cpu(spine)
    spine.comfyui.acts_after_seconds = None
    async with spine.running():
        await until(lambda: len(spine.comfyui.posts) == 1)
        spine.comfyui.post_takes_seconds = 10
        spine.comfyui.post_error = TimedOut("POST /free: no answer within 10 s")
        await until(lambda: len(spine.comfyui.posts) >= 3)
        await asyncio.sleep(15)
    assert [body["free_memory"] for _, body in spine.comfyui.posts[:3]] == [False, False, True]
    assert spine.comfyui.most_posting_at_once == 1


async def test_a_slow_actuator_and_a_storm_of_events_still_make_one_action_at_a_time():
    spine = Spine()
    a_model_fell_to_the_cpu(spine)
    spine.comfyui.post_takes_seconds = 10
    spine.comfyui.socket_error = None

    async def storm() -> None:
        for number in range(1000):
            spine.comfyui.push(number % 2)
            spine.ollama.load(f"model-{number % 7}", 1, on_gpu=0.5)
            await asyncio.sleep(0.01)
        spine.comfyui.push(0)

    async with spine.running():
        await until(lambda: spine.comfyui.posts)
        answers = [asyncio.ensure_future(spine.cycle.free(FORCED)) for _ in range(50)]
        await storm()
        await asyncio.sleep(120)
        assert all(answer.done() for answer in answers)
    assert spine.comfyui.most_posting_at_once == 1
    assert not any(answer.result().accepted for answer in answers)
    settled = len(spine.told(FREED, UNCONFIRMED))
    assert len({entry.event.action_id or entry.id for entry in spine.entries(ASKED)}) == settled
    assert settled >= 1


async def test_turns_go_on_while_a_request_is_under_way():
    spine = Spine()
    a_model_fell_to_the_cpu(spine)
    spine.comfyui.post_takes_seconds = 10
    async with spine.running():
        await until(lambda: spine.comfyui.posts)
        before = len(spine.turns)
        await asyncio.sleep(5)
        assert len(spine.turns) - before >= 15
        spine.ollama.load("qwen3:14b", 1)
        await spine.event(EventType.MODEL_DETECTED, within=2)


async def test_a_wish_is_answered_with_the_id_of_the_event_that_tells_it():
    spine = Spine()
    spine.comfyui.hold(8)
    async with spine.running():
        await asyncio.sleep(5)
        answer = await spine.cycle.free(SOFT)
        freed = await spine.event(FREED)
    assert answer.accepted
    assert answer.event_id == spine.entries(ASKED)[0].id == freed.event.action_id
    assert freed.event.reason == "asked by hand"


async def test_a_wish_while_another_free_settles_is_refused_with_why():
    spine = Spine()
    spine.comfyui.hold(8)
    spine.comfyui.acts_after_seconds = None
    async with spine.running():
        await asyncio.sleep(5)
        first = await spine.cycle.free(SOFT)
        second = await spine.cycle.free(FORCED)
    assert first.accepted
    assert not second.accepted
    assert second.why == "a soft free is still settling"
    assert len(spine.comfyui.posts) == 1


async def test_of_many_wishes_at_once_one_is_granted_and_all_are_answered():
    spine = Spine()
    spine.comfyui.hold(8)
    async with spine.running():
        await asyncio.sleep(5)
        answers = await asyncio.gather(*(spine.cycle.free(SOFT) for _ in range(100)))
    assert [answer.accepted for answer in answers].count(True) == 1
    assert len(spine.comfyui.posts) == 1


async def test_a_wish_before_the_first_look_is_refused_with_why():
    spine = Spine()
    spine.gpus.takes_seconds = 3
    async with spine.running():
        answer = await spine.cycle.free(SOFT)
    assert not answer.accepted
    assert "not read yet" in answer.why


async def test_a_wish_whose_post_fails_is_refused_with_what_the_server_said():
    spine = Spine()
    spine.comfyui.hold(8)
    spine.comfyui.post_error = Rejected("POST /free: HTTP 403")
    async with spine.running():
        await asyncio.sleep(5)
        answer = await spine.cycle.free(SOFT)
    assert not answer.accepted
    assert answer.why == "POST /free: HTTP 403"


async def test_a_wish_whose_asker_has_gone_is_carried_out_and_hurts_nobody():
    spine = Spine()
    spine.comfyui.hold(8)
    async with spine.running():
        await asyncio.sleep(5)
        asking = asyncio.ensure_future(spine.cycle.free(SOFT))
        await asyncio.sleep(0)
        asking.cancel()
        await spine.event(FREED)


async def test_a_forced_wish_goes_out_under_a_running_prompt():
    spine = Spine()
    spine.comfyui.hold(8)
    spine.comfyui.remaining = 1
    async with spine.running():
        await asyncio.sleep(5)
        unforced = await spine.cycle.free(SOFT)
        forced = await spine.cycle.free(FORCED)
    assert (unforced.accepted, forced.accepted) == (False, True)
    assert "ComfyUI is busy" in unforced.why


async def test_a_model_is_unloaded_by_hand_and_its_leaving_proven():
    spine = Spine()
    spine.ollama.load(MODEL, 8)
    async with spine.running():
        await asyncio.sleep(5)
        answer = await spine.cycle.free(ManualFree(action=UnloadModel(model=MODEL), force=False))
        freed = await spine.event(FREED)
    assert answer.accepted
    assert spine.ollama.unloads == [MODEL]
    assert freed.event.target == f"ollama:{MODEL}"
    assert freed.event.freed_bytes == 8 * GIB
    assert freed.event.stage is None


async def test_room_that_appeared_while_looking_is_left_alone():
    spine = Spine()
    a_model_fell_to_the_cpu(spine)
    async with spine.running():
        await until(lambda: now() >= 1.9)
        spine.gpus.takes_seconds = 0.3
        await asyncio.sleep(0.2)
        spine.comfyui.hold(0)
        await asyncio.sleep(30)
    assert spine.comfyui.posts == []
    assert all("room appeared" in event.reason for event in spine.told(REFUSED))


async def test_the_unload_stage_follows_in_the_same_episode_when_the_soft_free_was_not_enough():
    spine = Spine()
    a_model_fell_to_the_cpu(spine)
    spine.comfyui.keeps_bytes = 19 * GIB
    async with spine.running():
        await until(lambda: len(spine.comfyui.posts) == 2)
        spine.comfyui.keeps_bytes = 0
        await spine.event(FREED, nth=2)
    (soft, first), (unload, second) = spine.comfyui.posts
    assert (first["free_memory"], second["free_memory"]) == (False, True)
    assert unload - soft < QUICK.cooldown_seconds
    assert [entry.event.stage for entry in spine.entries(ASKED)] == [Stage.SOFT, Stage.UNLOAD]


async def test_a_free_that_gives_nothing_back_ends_unconfirmed_and_is_not_repeated():
    spine = Spine()
    a_model_fell_to_the_cpu(spine)
    spine.comfyui.acts_after_seconds = None
    async with spine.running():
        await asyncio.sleep(200)
    # Soft, once more, unload stage, once more: then ComfyUI must run again before it is asked again.
    assert len(spine.comfyui.posts) == 4
    final = [event for event in spine.told(UNCONFIRMED) if event.final]
    assert len(final) == 1
    assert spine.cycle.watch.unreclaimable == {"GPU-a": 20 * GIB}


async def test_an_asked_event_names_the_decision_it_came_from_however_slow_the_request_was():
    spine = Spine()
    a_model_fell_to_the_cpu(spine)
    spine.comfyui.post_takes_seconds = 5
    async with spine.running():
        await spine.event(FREED)
    asked = spine.entries(ASKED)[0]
    decision = next(entry for entry in spine.journal.decisions(500) if entry.id == asked.decision_id)
    assert decision.decision.branch == "6 act"


async def test_a_refused_event_names_the_decision_it_came_from():
    spine = Spine()
    a_model_fell_to_the_cpu(spine)
    spine.comfyui.post_takes_seconds = 5
    spine.comfyui.post_error = Rejected("POST /free: HTTP 500")
    async with spine.running():
        refused = await spine.event(REFUSED)
    decision = next(entry for entry in spine.journal.decisions(500) if entry.id == refused.decision_id)
    assert decision.decision.branch == "6 act"


@pytest.mark.parametrize("part", ["gpus", "ollama", "comfyui", "the request"])
async def test_a_bug_in_a_part_ends_the_run_with_the_exception(part: str):
    spine = Spine()
    a_model_fell_to_the_cpu(spine)
    if part == "the request":
        spine.comfyui.post_error = ZeroDivisionError("a bug")
    else:
        getattr(spine, part).error = ZeroDivisionError("a bug")
    with pytest.raises(BaseExceptionGroup) as caught:
        async with spine.running():
            await asyncio.sleep(60)
    found = caught.value.subgroup(ZeroDivisionError)
    assert found is not None


async def test_a_wall_clock_that_jumps_by_years_changes_no_decision():
    async def story(jumps: bool) -> list[str]:
        spine = Spine()
        a_model_fell_to_the_cpu(spine)
        spine.comfyui.keeps_bytes = 19 * GIB
        async with spine.running():
            for number in range(120):
                if jumps:
                    spine.wall.ahead = timedelta(days=365 * 20 * (-1) ** number)
                await asyncio.sleep(0.5)
        assert len(spine.comfyui.posts) == 3
        return [entry.decision.branch for entry in spine.journal.decisions(500)]

    assert await story(jumps=True) == await story(jumps=False)


async def test_a_lost_gpu_is_said_once_holds_and_goes_on_when_it_is_back():
    spine = Spine(comfyui=True)
    a_model_fell_to_the_cpu(spine)
    spine.gpus.error = SensorError("GPU is lost")
    spine.comfyui.error = SensorError("GET /system_stats: connection refused")
    async with spine.running():
        await asyncio.sleep(100)
        assert spine.comfyui.posts == []
        assert len(spine.told(EventType.SENSOR_LOST)) == 2
        spine.gpus.error = spine.comfyui.error = None
        await spine.event(FREED)
    assert [event.target for event in spine.told(EventType.SENSOR_BACK)].count("nvml") == 1


async def test_a_hanging_ollama_at_the_start_does_not_keep_the_others_waiting():
    """It can take 15 s to answer; images need room all the same."""
    spine = Spine()
    spine.comfyui.hold(20)
    spine.ollama.takes_seconds = 15
    async with spine.running():
        await until(lambda: spine.cycle.snapshot is not None, within=6.1)
        await spine.event(EventType.PRESSURE_BEGAN, within=6)


async def test_a_restart_shortly_after_a_free_does_not_free_again_before_the_cooldown_is_over():
    first = Spine()
    a_model_fell_to_the_cpu(first)
    async with first.running():
        await first.event(ASKED)
        asked_at = first.comfyui.posts[0][0]
    for row in first.journal._unwritten:
        first.store.rows.append(row)
    again = Spine(store=first.store, wall=first.wall)
    a_model_fell_to_the_cpu(again)
    async with again.running():
        await until(lambda: again.comfyui.posts)
    assert again.comfyui.posts[0][0] - asked_at >= QUICK.cooldown_seconds - 1


class OwnProcesses(FakeGpus):
    """A card whose process list tells who holds what, at each look."""

    commands: ClassVar = {"comfyui": ("python", "main.py", "--listen")}

    async def read(self, *, with_processes: bool = False) -> Gpus:
        self.processes = {
            card.uuid: tuple(
                ProcessMemory(pid=pid, used_bytes=held, command=self.commands.get(who, (who,)))
                for pid, (who, held) in enumerate(card.holders.items())
            )
            for card in self.cards
        }
        return await super().read(with_processes=with_processes)


async def test_what_a_process_held_before_a_free_is_not_asked_for_once_more():
    card = Card(game=21 * GIB)
    spine = Spine(card=card, gpus=OwnProcesses(card))
    spine.comfyui.version = "0.20.1"
    spine.comfyui.hold(2.5)
    spine.comfyui.keeps_bytes = GIB // 10
    async with spine.running():
        await asyncio.sleep(120)
    assert [event.stage for event in spine.told(ASKED, FREED, UNCONFIRMED)] == [Stage.SOFT, Stage.SOFT]


async def test_a_use_over_the_unload_threshold_escalates_though_the_demand_itself_is_met():
    spine = Spine(rules=replace(QUICK, grace_seconds=1000, empty_room_grace_seconds=1000))
    spine.comfyui.hold(20)
    spine.comfyui.keeps_bytes = 18 * GIB
    spine.ollama.load(MODEL, 3.5, on_gpu=3 / 3.5)
    async with spine.running():
        await asyncio.sleep(60)
    assert [body["free_memory"] for _, body in spine.comfyui.posts][:2] == [False, True]


@pytest.mark.parametrize(
    "ollama_gpu",
    [
        pytest.param(None, id="not said"),
        pytest.param("0", id="by index"),
        pytest.param("GPU-a", id="by uuid"),
    ],
)
async def test_a_model_is_unloaded_by_hand_on_a_box_with_two_gpus(ollama_gpu: str | None):
    card = Card()
    spine = Spine(card=card, gpus=FakeGpus(card, Card("GPU-b")), rules=replace(QUICK, ollama_gpu=ollama_gpu))
    spine.ollama.load(MODEL, 8)
    async with spine.running():
        await asyncio.sleep(5)
        answer = await spine.cycle.free(ManualFree(action=UnloadModel(model=MODEL), force=False))
        assert answer.accepted, answer.why
        await spine.event(FREED)


async def test_two_gpus_each_have_their_own_proof():
    other = Card("GPU-b", busy=23 * GIB)
    card = Card()
    spine = Spine(card=card, gpus=FakeGpus(other, card), rules=replace(QUICK, comfyui_gpu="GPU-a"))
    a_model_fell_to_the_cpu(spine)
    async with spine.running():
        freed = await spine.event(FREED)
    assert freed.event.gpu == "GPU-a"
    assert freed.event.freed_bytes == 20 * GIB


async def test_without_monitoring_everything_is_seen_and_nothing_is_asked():
    spine = Spine(rules=replace(QUICK, enabled=False))
    a_model_fell_to_the_cpu(spine)
    async with spine.running():
        await asyncio.sleep(150)
        answer = await spine.cycle.free(FORCED)
    assert spine.comfyui.posts == []
    assert not answer.accepted
    assert "ENABLE_VRAM_MONITORING=false" in answer.why
    assert spine.told(EventType.CPU_FALLBACK)


async def test_a_dry_run_says_once_what_it_would_do_and_does_nothing():
    spine = Spine(rules=replace(QUICK, dry_run=True))
    a_model_fell_to_the_cpu(spine)
    async with spine.running():
        await asyncio.sleep(150)
    assert spine.comfyui.posts == []
    assert [event.target for event in spine.told(EventType.DRY_RUN)] == ["comfyui", "comfyui"]


async def test_defaults_do_not_turn_faster_than_they_must_while_nothing_happens():
    spine = Spine(rules=Rules())
    spine.comfyui.hold(2)
    async with spine.running():
        await asyncio.sleep(30)
        before = len(spine.turns)
        await asyncio.sleep(150)
    assert len(spine.turns) - before <= 31


# -- models that fell to the CPU are repaired


async def test_a_model_that_fell_to_the_cpu_is_on_the_gpu_again_with_what_it_had():
    spine = Spine()
    a_model_fell_to_the_cpu(spine)
    spine.ollama.gib[MODEL] = 8
    until_then = spine.wall() + timedelta(minutes=10)
    spine.ollama.listed[MODEL] = replace(spine.ollama.listed[MODEL], context_length=8192, expires_at=until_then)
    async with spine.running():
        done = await spine.event(EventType.REPAIRED)
        await asyncio.sleep(300)
    assert done.event.target == f"ollama:{MODEL}"
    assert spine.ollama.unloads == [MODEL]
    ((name, context, seconds),) = spine.ollama.loads
    assert (name, context) == (MODEL, 8192)
    assert seconds is not None
    assert 500 < seconds <= 600
    assert spine.told(EventType.REPAIR_FAILED) == []
    assert spine.cycle.watch.mending is None


async def test_a_model_that_cannot_be_loaded_again_is_told_once_and_left_to_its_next_request():
    spine = Spine()
    a_model_fell_to_the_cpu(spine)
    spine.ollama.listed[MODEL] = replace(spine.ollama.listed[MODEL], expires_at=None)
    spine.ollama.load_error = Rejected("POST /api/generate: HTTP 404: model not found")
    async with spine.running():
        failed = await spine.event(EventType.REPAIR_FAILED)
        await asyncio.sleep(300)
    assert "HTTP 404: model not found" in failed.event.reason
    assert len(spine.told(EventType.REPAIR_FAILED)) == len(spine.ollama.loads) == 1


async def test_turns_go_on_while_a_model_loads_for_long():
    spine = Spine()
    a_model_fell_to_the_cpu(spine)
    spine.ollama.listed[MODEL] = replace(spine.ollama.listed[MODEL], expires_at=None)
    spine.ollama.gib[MODEL] = 8
    async with spine.running():
        await until(lambda: spine.ollama.unloads)
        await until(lambda: not spine.ollama.listed)
        spine.ollama.takes_seconds = 8
        await until(lambda: spine.ollama.loads)
        before = len(spine.turns)
        await asyncio.sleep(5)
        assert len(spine.turns) - before >= 15
        spine.ollama.takes_seconds = 0.01
        await spine.event(EventType.REPAIRED)
    assert len(spine.ollama.loads) == 1
