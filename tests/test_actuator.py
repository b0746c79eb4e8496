"""The only door out: it looks once more, asks for one thing, and says what it read just before."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from math import inf

import pytest

from tests.fakes import GIB, Card, FakeComfyUI, FakeGpus, FakeOllama
from vram_manager.actuator import Actuator
from vram_manager.clock import Clock
from vram_manager.domain.action import Action, FreeComfyUI, LoadModel, Stage, UnloadModel
from vram_manager.domain.demand import Demand, Kind
from vram_manager.domain.reading import Missing, Off, Seen
from vram_manager.domain.snapshot import Snapshot
from vram_manager.domain.watch import Asked, Pending, Refused
from vram_manager.errors import Rejected, SensorError, TimedOut

pytestmark = [pytest.mark.asyncio, pytest.mark.looptime]

SOFT = FreeComfyUI(stage=Stage.SOFT)
UNLOAD = FreeComfyUI(stage=Stage.UNLOAD)
MODEL = "llama3.1:8b"
NOON = datetime(2026, 7, 1, 12, tzinfo=UTC)
BLIND = Snapshot(taken_at=0.0, gpus=Missing("not read yet"), ollama=Off(), comfyui=Off(), queue=Off())


class Door:
    """An actuator over fakes of one card."""

    def __init__(self, *, without: str = "", soft_body: dict[str, bool] | None = None) -> None:
        self.card = Card()
        self.gpus = FakeGpus(self.card)
        self.ollama = FakeOllama(self.card)
        self.comfyui = FakeComfyUI(self.card)
        self.comfyui.hold(10)
        self.actuator = Actuator(
            Clock(asyncio.get_running_loop().time, lambda: NOON),
            gpus=None if without == "nvml" else self.gpus,
            ollama=None if without == "ollama" else self.ollama,
            comfyui=None if without == "comfyui" else self.comfyui,
            soft_body=soft_body or {"unload_models": True, "free_memory": False},
        )

    async def ask(self, action: Action = SOFT, *, gpu: str = "GPU-a", need_gib: float | None = None) -> Asked | Refused:
        return await self.actuator.ask(pending(action, gpu=gpu, need_gib=need_gib), BLIND)


def pending(action: Action, *, gpu: str = "GPU-a", need_gib: float | None = None) -> Pending:
    demand = None
    if need_gib is not None:
        need = int(need_gib * GIB)
        demand = Demand(
            kind=Kind.FALLBACK, key="k", gpu=None, need_free_bytes=need, reason="r", since=0.0, last_seen_at=0.0
        )
    return Pending(action=action, gpu=gpu, reason="r", demand=demand, decided_at=0.0)


async def test_what_was_asked_comes_with_the_memory_read_just_before():
    door = Door()
    asked = await door.ask()
    assert isinstance(asked, Asked)
    assert asked.gpu_memory is not None
    assert asked.gpu_memory.free_bytes == 14 * GIB
    assert asked.note == ""


@pytest.mark.parametrize(
    ("action", "body"),
    [
        (SOFT, {"unload_models": False, "free_memory": True}),
        (UNLOAD, {"unload_models": True, "free_memory": True}),
    ],
    ids=["soft", "unload"],
)
async def test_the_soft_body_is_a_setting_and_the_unload_body_is_not(action: FreeComfyUI, body: dict[str, bool]):
    door = Door(soft_body={"unload_models": False, "free_memory": True})
    await door.ask(action)
    assert [sent for _, sent in door.comfyui.posts] == [body]


async def test_a_busy_comfyui_is_not_asked():
    door = Door()
    door.comfyui.remaining = 2
    assert await door.ask() == Refused(at=0.02, why="ComfyUI became busy (2 running or waiting)", tried=False)
    assert door.comfyui.posts == []


async def test_a_forced_free_is_asked_of_a_busy_comfyui_too():
    door = Door()
    door.comfyui.remaining = 2
    assert isinstance(await door.ask(FreeComfyUI(stage=Stage.SOFT, forced=True)), Asked)


async def test_a_queue_that_cannot_be_read_is_not_taken_for_an_idle_one():
    door = Door()
    door.comfyui.queue_error = Rejected("GET /prompt: HTTP 500")
    for action in (SOFT, FreeComfyUI(stage=Stage.SOFT, forced=True)):
        outcome = await door.ask(action)
        assert isinstance(outcome, Refused)
        assert (outcome.why, outcome.tried) == ("GET /prompt: HTTP 500", False)
        assert door.comfyui.posts == []


async def test_room_that_appeared_is_left_alone():
    door = Door()
    outcome = await door.ask(need_gib=14)
    assert isinstance(outcome, Refused)
    assert "room appeared" in outcome.why
    assert isinstance(await door.ask(need_gib=14.1), Asked)


async def test_a_gpu_that_is_gone_is_a_refusal():
    door = Door()
    outcome = await door.ask(gpu="GPU-gone")
    assert isinstance(outcome, Refused)
    assert "GPU" in outcome.why
    assert not outcome.tried
    assert door.comfyui.posts == []


async def test_a_card_whose_memory_is_not_known_is_a_refusal():
    door = Door()
    door.gpus.cards.append(Card("GPU-b"))
    door.card.broken = Missing("GPU is lost")
    assert isinstance(await door.ask(), Refused)
    assert door.comfyui.posts == []


@pytest.mark.parametrize("without", ["", "nvml"], ids=["nvml fails", "no nvml at all"])
async def test_without_nvml_comfyui_tells_the_memory(without: str):
    door = Door(without=without)
    door.gpus.error = SensorError("GPU is lost")
    asked = await door.ask(gpu="comfyui-0")
    assert isinstance(asked, Asked)
    assert asked.gpu_memory is not None
    assert asked.gpu_memory.free_bytes == 14 * GIB


async def test_where_nvml_knows_the_card_but_not_its_memory_comfyui_tells_it():
    door = Door()
    door.card.broken = Missing("memory is not supported (unified memory)")
    asked = await door.ask(gpu="comfyui-0")
    assert isinstance(asked, Asked)
    assert asked.gpu_memory is not None
    assert asked.gpu_memory.free_bytes == 14 * GIB


async def test_a_second_post_looks_at_the_queue_once_more():
    door = Door()
    door.comfyui.remaining = 1
    outcome = await door.actuator.ask_again(SOFT)
    assert isinstance(outcome, Refused)
    assert outcome.why == "ComfyUI became busy (1 running or waiting)"
    assert door.comfyui.posts == []


async def test_nobody_who_could_tell_the_memory_is_a_refusal():
    door = Door()
    door.gpus.error = SensorError("GPU is lost")
    door.comfyui.error = SensorError("GET /system_stats: connection refused")
    outcome = await door.ask()
    assert isinstance(outcome, Refused)
    assert (outcome.why, outcome.tried) == ("GET /system_stats: connection refused", False)


async def test_a_request_that_got_no_answer_may_have_arrived():
    door = Door()
    door.comfyui.post_error = TimedOut("POST /free: no answer within 10 s")
    door.comfyui.post_takes_seconds = 10
    outcome = await door.ask()
    assert isinstance(outcome, Asked)
    assert outcome.note == "POST /free: no answer within 10 s"
    assert outcome.at == pytest.approx(10.02), "the wait for the proof begins when the wait for the answer ends"


async def test_a_look_that_times_out_sent_nothing():
    door = Door()
    door.comfyui.queue_error = TimedOut("GET /prompt: no answer within 10 s")
    outcome = await door.ask()
    assert isinstance(outcome, Refused)
    assert not outcome.tried


@pytest.mark.parametrize(
    "error", [Rejected("POST /free: HTTP 500"), SensorError("POST /free: connection refused")], ids=["500", "refused"]
)
async def test_a_request_that_failed_counts_as_a_try(error: SensorError):
    door = Door()
    door.comfyui.post_error = error
    outcome = await door.ask()
    assert isinstance(outcome, Refused)
    assert (outcome.why, outcome.tried) == (error.why, True)


async def test_a_model_that_is_listed_is_unloaded():
    door = Door()
    door.ollama.load(MODEL, 5)
    assert isinstance(await door.ask(UnloadModel(model=MODEL)), Asked)
    assert door.ollama.unloads == [MODEL]


async def test_a_model_that_has_left_is_not_asked_to_leave():
    door = Door()
    outcome = await door.ask(UnloadModel(model=MODEL))
    assert isinstance(outcome, Refused)
    assert outcome.why == f"{MODEL} is not loaded any more"
    assert door.ollama.unloads == []


def load(*, context: int | None = None, left: timedelta | None = None) -> LoadModel:
    return LoadModel(model=MODEL, context=context, expires_at=None if left is None else NOON + left)


@pytest.mark.parametrize(
    ("action", "context", "seconds"),
    [
        pytest.param(load(), None, None, id="as the server does by itself"),
        pytest.param(load(context=8192, left=timedelta(minutes=5)), 8192, 300, id="with its context, for what is left"),
        pytest.param(load(left=timedelta(days=300 * 365)), None, inf, id="for ever"),
        pytest.param(load(left=timedelta(days=19 * 365)), None, 19 * 365 * 86400, id="for very long"),
    ],
)
async def test_a_model_is_loaded_as_it_was(action: LoadModel, context: int | None, seconds: float | None):
    door = Door()
    assert isinstance(await door.ask(action), Asked)
    assert door.ollama.loads == [(MODEL, context, seconds)]


async def test_a_model_whose_time_is_over_is_not_loaded_again():
    door = Door()
    outcome = await door.ask(load(left=timedelta(0)))
    assert isinstance(outcome, Refused)
    assert (outcome.why, outcome.tried) == (f"the time {MODEL} was to be kept is over", False)
    assert door.ollama.loads == []


async def test_a_load_counts_from_when_it_was_over():
    door = Door()
    door.ollama.takes_seconds = 20
    outcome = await door.ask(load())
    assert isinstance(outcome, Asked)
    assert outcome.at == pytest.approx(20, abs=0.1)


async def test_a_load_that_failed_or_has_no_answer_is_a_refusal():
    door = Door()
    door.ollama.load_error = Rejected("POST /api/generate: HTTP 404: model not found")
    outcome = await door.ask(load())
    assert isinstance(outcome, Refused)
    assert (outcome.why, outcome.tried) == ("POST /api/generate: HTTP 404: model not found", True)
    door.ollama.load_error = TimedOut("POST /api/generate: no answer within 330 s")
    hung = await door.ask(load())
    assert isinstance(hung, Refused)
    assert "no answer within 330 s; does Ollama hang?" in hung.why


async def test_a_backend_that_is_not_configured_is_a_refusal_and_no_crash():
    for without, action in (("comfyui", SOFT), ("ollama", UnloadModel(model=MODEL)), ("ollama", load())):
        outcome = await Door(without=without).ask(action)
        assert isinstance(outcome, Refused)
        assert outcome.why == f"there is no {action.target} here"


async def test_a_bug_is_not_taken_for_a_refusal():
    door = Door()
    door.comfyui.error = ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError):
        await door.ask()


async def test_the_look_is_fresh_whatever_the_snapshot_said():
    door = Door()
    seen = Seen(await door.gpus.read(), 0.0)
    stale = Snapshot(taken_at=0.0, gpus=seen, ollama=Off(), comfyui=Off(), queue=Off())
    door.card.holders["game"] = 3 * GIB
    asked = await door.actuator.ask(pending(SOFT), stale)
    assert isinstance(asked, Asked)
    assert asked.gpu_memory is not None
    assert asked.gpu_memory.free_bytes == 11 * GIB
