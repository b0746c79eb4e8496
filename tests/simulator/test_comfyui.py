"""What the simulated ComfyUI does, in virtual time."""

from __future__ import annotations

import asyncio

import pytest

from vram_manager.simulator.comfyui_executor import ComfyUISettings
from vram_manager.simulator.comfyui_memory import HEADROOM_BYTES
from vram_manager.simulator.ledger import GIB, MIB
from vram_manager.simulator.world import COMFYUI_FILES, flux_txt2img, txt2img

pytestmark = [pytest.mark.asyncio, pytest.mark.looptime]

SDXL_BYTES = COMFYUI_FILES[0].size_bytes
CONTEXT_BYTES = 600 * MIB
GC_SECONDS = 0.4


async def devices(tenants):
    return (await tenants.comfyui.get("/system_stats")).json()["devices"][0]


def held(tenants):
    return tenants.ledger.held_bytes("comfyui")


async def idle(tenants):
    """The garbage collection of the last prompt or free is over and the worker waits again."""
    await tenants.comfyui.get("/prompt")
    await asyncio.sleep(2)


# -- memory


async def test_models_stay_after_a_prompt(settle):
    tenants = settle()
    await tenants.render(txt2img())
    await asyncio.sleep(3600)
    assert held(tenants) == SDXL_BYTES + CONTEXT_BYTES


async def test_legacy_weights_are_torchs_and_its_cache_counts_as_free(settle):
    tenants = settle()
    await tenants.render(txt2img(seed=1))
    await asyncio.sleep(5)
    await tenants.render(txt2img(seed=2))  # the last collection is under 10 s ago: the cache stays
    device = await devices(tenants)
    assert device["torch_vram_free"] > 0
    assert device["torch_vram_total"] == SDXL_BYTES + device["torch_vram_free"]
    assert device["vram_free"] - device["torch_vram_free"] == tenants.ledger.free_bytes
    assert device["vram_total"] == tenants.ledger.usable_bytes < tenants.ledger.total_bytes


async def test_the_cache_goes_back_within_ten_seconds_of_a_prompt(settle):
    tenants = settle()
    await tenants.render(txt2img(seed=1))
    await asyncio.sleep(5)
    await tenants.render(txt2img(seed=2))
    await asyncio.sleep(11)
    assert (await devices(tenants))["torch_vram_free"] == 0


async def test_dynamic_weights_are_in_no_torch_number(settle):
    tenants = settle(mode="dynamic")
    await tenants.render(txt2img())
    assert (await devices(tenants))["torch_vram_total"] == 0
    assert held(tenants) == SDXL_BYTES + CONTEXT_BYTES


async def test_an_idle_dynamic_comfyui_never_gives_way(settle):
    tenants = settle(mode="dynamic", gpu_gib=12)
    await tenants.render(txt2img())
    before = held(tenants)
    tenants.ledger.claim("foreign", tenants.ledger.free_bytes)
    await asyncio.sleep(3600)
    assert held(tenants) == before


async def test_a_running_dynamic_comfyui_shrinks_to_keep_its_headroom(settle):
    tenants = settle(mode="dynamic")
    prompt_id = await tenants.post(txt2img(steps=100))
    await asyncio.sleep(6)
    before = held(tenants)
    tenants.ledger.claim("foreign", tenants.ledger.free_bytes)
    await asyncio.sleep(1)
    assert held(tenants) <= before - HEADROOM_BYTES
    await asyncio.sleep(60)
    assert (await tenants.history(prompt_id))["status"]["status_str"] == "success"


async def test_legacy_without_enough_room_loads_partially_and_runs_slower(settle):
    tenants = settle(gpu_gib=12)
    tenants.ledger.claim("foreign", 6 * GIB)
    await tenants.render(txt2img())
    assert tenants.world.comfyui.counters.partial_loads > 0
    assert tenants.world.comfyui.counters.out_of_memory == 0


async def test_out_of_memory_is_an_error_in_the_history_and_unloads_everything(settle):
    tenants = settle(gpu_gib=12, mode="highvram")
    tenants.ledger.claim("foreign", 8 * GIB)
    prompt_id = await tenants.render(txt2img())
    status = (await tenants.history(prompt_id))["status"]
    assert status["status_str"] == "error"
    assert status["messages"][-1][0] == "execution_error"
    assert status["messages"][-1][1]["exception_type"] == "torch.OutOfMemoryError"
    assert tenants.world.comfyui.counters.out_of_memory == 1


async def test_another_model_moves_the_first_out_when_there_is_no_room_for_both(settle):
    tenants = settle(gpu_gib=16)
    await tenants.render(txt2img())
    await tenants.render(flux_txt2img())
    assert tenants.world.comfyui.counters.out_of_memory == 0
    assert held(tenants) <= tenants.ledger.usable_bytes


# -- what a free does


@pytest.mark.parametrize("mode", ["legacy", "dynamic"])
async def test_unload_models_keeps_the_node_cache(settle, mode):
    tenants = settle(mode=mode)
    await tenants.render(txt2img(seed=1))
    await idle(tenants)
    await tenants.free(unload_models=True)
    await idle(tenants)
    assert held(tenants) == CONTEXT_BYTES
    prompt_id = await tenants.render(txt2img(seed=2))
    cached = (await tenants.history(prompt_id))["status"]["messages"][1][1]["nodes"]
    assert {"4", "5", "6", "7"} == set(cached)
    counters = tenants.world.comfyui.counters
    assert counters.loads_from_ram == 2  # sampler and decoder; the text encoder's results were kept


@pytest.mark.parametrize(
    "body",
    [
        {"free_memory": True},
        {"unload_models": False, "free_memory": True},
        {"unload_models": "", "free_memory": "no"},
    ],
    ids=str,
)
async def test_free_memory_is_the_hardest_body_whatever_unload_models_says(settle, body):
    tenants = settle()
    await tenants.render(txt2img(seed=1))
    await idle(tenants)
    loads = tenants.world.comfyui.counters.loads_from_disk
    await tenants.free(**body)
    await idle(tenants)
    assert held(tenants) == CONTEXT_BYTES
    prompt_id = await tenants.render(txt2img(seed=1))
    assert (await tenants.history(prompt_id))["status"]["messages"][1][1]["nodes"] == []
    assert tenants.world.comfyui.counters.loads_from_disk > loads


async def test_under_highvram_unload_models_frees_no_diffusion_weights(settle):
    tenants = settle(mode="highvram")
    await tenants.render(txt2img())
    await idle(tenants)
    await tenants.free(unload_models=True)
    await idle(tenants)
    assert held(tenants) > 4 * GIB
    await tenants.free(free_memory=True)
    await idle(tenants)
    assert held(tenants) == CONTEXT_BYTES


async def test_custom_nodes_keep_what_only_a_reset_or_a_restart_frees(settle):
    settings = ComfyUISettings(custom_node_bytes=300 * MIB, module_global_bytes=200 * MIB)
    tenants = settle(comfyui_settings=settings)
    await tenants.render(txt2img())
    await idle(tenants)
    await tenants.free(unload_models=True)
    await idle(tenants)
    assert held(tenants) == CONTEXT_BYTES + 500 * MIB
    await tenants.free(free_memory=True)
    await idle(tenants)
    assert held(tenants) == CONTEXT_BYTES + 200 * MIB


async def test_an_identical_prompt_runs_no_node(settle):
    tenants = settle()
    await tenants.render(txt2img())
    await idle(tenants)
    started_at = asyncio.get_running_loop().time()
    await tenants.render(txt2img())
    assert asyncio.get_running_loop().time() - started_at < 1


# -- when a free acts


async def test_a_free_is_answered_before_anything_is_done(settle):
    tenants = settle(mode="dynamic")
    await tenants.render(txt2img())
    await idle(tenants)
    before = held(tenants)
    await tenants.free(unload_models=True)
    assert held(tenants) == before
    await asyncio.sleep(1)
    assert held(tenants) == CONTEXT_BYTES


async def test_a_free_waits_for_the_running_prompt_and_goes_before_the_next(settle):
    tenants = settle()
    first = await tenants.post(txt2img(seed=1, steps=40))
    second = await tenants.post(txt2img(seed=2))
    await asyncio.sleep(6)
    await tenants.free(free_memory=True)
    assert tenants.world.comfyui.counters.frees_posted_while_busy == 1
    await tenants.ended(first)
    assert tenants.world.comfyui.counters.frees_acted_on == 1
    await tenants.ended(second)
    assert tenants.world.comfyui.counters.loads_from_disk == 2
    assert tenants.world.comfyui.counters.frees_acted_on == 1


async def test_a_free_during_the_collection_of_another_is_lost_until_the_next_post(settle):
    tenants = settle()
    await tenants.render(txt2img())
    await idle(tenants)
    await tenants.free(unload_models=True)
    await asyncio.sleep(0.7)  # the copy to RAM takes 0.54 s, then it collects
    await tenants.free(free_memory=True)
    await asyncio.sleep(900)
    assert tenants.world.comfyui.counters.frees_acted_on == 1
    await tenants.free(unload_models=True)
    await asyncio.sleep(2)
    assert tenants.world.comfyui.counters.frees_acted_on == 2
    prompt_id = await tenants.render(txt2img())
    assert (await tenants.history(prompt_id))["status"]["messages"][1][1]["nodes"] == []  # flags had merged


async def test_a_lost_flag_hits_the_model_that_the_next_prompt_loaded(settle):
    tenants = settle()
    await tenants.render(txt2img())
    await idle(tenants)
    await tenants.free(unload_models=True)
    await asyncio.sleep(0.7)
    await tenants.free(unload_models=True)
    await asyncio.sleep(30)
    await tenants.render(txt2img(seed=2))
    await idle(tenants)
    assert held(tenants) == CONTEXT_BYTES


async def test_two_frees_two_seconds_apart_both_act(settle):
    tenants = settle()
    await tenants.render(txt2img())
    await idle(tenants)
    await tenants.free(unload_models=True)
    await asyncio.sleep(2)
    await tenants.free(free_memory=True)
    await asyncio.sleep(2)
    assert tenants.world.comfyui.counters.frees_acted_on == 2


async def test_an_empty_object_does_not_even_wake_the_worker(settle):
    tenants = settle()
    await idle(tenants)
    await tenants.free()
    await asyncio.sleep(2)
    assert tenants.world.comfyui.counters.frees_acted_on == 0


async def test_every_reply_stalls_while_garbage_is_collected(settle):
    tenants = settle(mode="dynamic")
    await idle(tenants)
    await tenants.free(unload_models=True)
    await asyncio.sleep(0.01)
    asked_at = asyncio.get_running_loop().time()
    await tenants.comfyui.get("/prompt")
    assert asyncio.get_running_loop().time() - asked_at == pytest.approx(GC_SECONDS, abs=0.02)


async def test_a_dead_worker_takes_prompts_and_frees_and_runs_nothing(settle):
    tenants = settle()
    tenants.world.comfyui.dead_worker = True
    await tenants.post(txt2img())
    await tenants.free(free_memory=True)
    await asyncio.sleep(5000)
    queue = (await tenants.comfyui.get("/prompt")).json()
    assert queue == {"exec_info": {"queue_remaining": 1}}
    assert tenants.world.comfyui.counters.prompts_run == 0
    assert tenants.world.comfyui.counters.frees_acted_on == 0


# -- queue


async def test_only_pending_prompts_can_be_deleted(settle):
    tenants = settle()
    running, pending = await tenants.post(txt2img(seed=1)), await tenants.post(txt2img(seed=2))
    await asyncio.sleep(1)
    await tenants.comfyui.post("/queue", json={"delete": [running, pending, "unknown"]})
    assert (await tenants.comfyui.get("/prompt")).json()["exec_info"]["queue_remaining"] == 1


async def test_a_prompt_posted_to_the_front_runs_next(settle):
    tenants = settle()
    await tenants.post(txt2img(seed=1))
    await asyncio.sleep(1)
    await tenants.post(txt2img(seed=2))
    urgent = await tenants.post(txt2img(seed=3), front=True)
    queue = (await tenants.comfyui.get("/queue")).json()
    assert queue["queue_pending"][0][:2] == [-2, urgent]


async def test_interrupt_takes_effect_at_the_next_step(settle):
    tenants = settle()
    prompt_id = await tenants.post(txt2img(steps=1000))
    await asyncio.sleep(8)
    await tenants.comfyui.post("/interrupt", json={"prompt_id": "another"})
    await asyncio.sleep(1)
    assert not await tenants.history(prompt_id)
    await tenants.comfyui.post("/interrupt")
    await asyncio.sleep(1)
    status = (await tenants.history(prompt_id))["status"]
    assert (status["status_str"], status["messages"][-1][0]) == ("error", "execution_interrupted")


async def test_a_lost_gpu_fails_prompts_and_stats_but_not_the_queue(settle):
    tenants = settle()
    tenants.ledger.lost = True
    prompt_id = await tenants.render(txt2img())
    assert (await tenants.history(prompt_id))["status"]["status_str"] == "error"
    assert (await tenants.comfyui.get("/system_stats")).status_code == 500
    assert (await tenants.comfyui.get("/queue")).status_code == 200


async def test_a_node_that_raises_ends_its_prompt_and_not_the_worker(settle):
    tenants = settle()
    wrong = txt2img()
    wrong["3"]["inputs"]["model"] = 1
    prompt_id = await tenants.render(wrong)
    assert (await tenants.history(prompt_id))["status"]["messages"][-1][0] == "execution_error"
    prompt_id = await tenants.render(txt2img())
    assert (await tenants.history(prompt_id))["status"]["completed"]
