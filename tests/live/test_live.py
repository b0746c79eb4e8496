"""The contract of each sensor and one real free, against whatever is really there.

    OLLAMA_URL=http://... COMFYUI_URL=http://... pytest tests/live -rs

Each part runs when its server is named (or an NVIDIA driver is there) and is skipped, visibly, when not. Nothing
is unloaded that these tests did not load themselves: a ComfyUI that holds models or is busy is only looked at.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from vram_manager import config
from vram_manager.backends.comfyui import HttpComfyUI
from vram_manager.backends.http import JsonClient
from vram_manager.backends.ollama import HttpOllama
from vram_manager.clock import Clock
from vram_manager.daemon import Daemon, build
from vram_manager.domain.action import FreeComfyUI, Stage, UnloadModel
from vram_manager.domain.decision import ManualFree
from vram_manager.domain.event import Event, EventType
from vram_manager.domain.reading import Missing, Seen
from vram_manager.errors import SensorError
from vram_manager.gateway.proxy import PlainGate, Proxy
from vram_manager.gpus.nvml import NvmlSensor
from vram_manager.store import Store

pytestmark = pytest.mark.asyncio

OLLAMA_URL = os.environ.get("OLLAMA_URL", "")
COMFYUI_URL = os.environ.get("COMFYUI_URL", "")
needs_ollama = pytest.mark.skipif(not OLLAMA_URL, reason="OLLAMA_URL names no real Ollama")
needs_comfyui = pytest.mark.skipif(not COMFYUI_URL, reason="COMFYUI_URL names no real ComfyUI")
# A model of some gigabytes loads within this on a slow disk; nothing is asserted on how long it took.
PATIENCE_SECONDS = 300.0


@contextlib.asynccontextmanager
async def nvml() -> AsyncIterator[NvmlSensor]:
    sensor = NvmlSensor(deadline_seconds=10.0)
    try:
        try:
            await sensor.read()
        except SensorError as error:
            pytest.skip(f"no NVIDIA GPU can be read here: {error.why}")
        yield sensor
    finally:
        sensor.close()


@contextlib.asynccontextmanager
async def real_daemon(directory: Path) -> AsyncIterator[Daemon]:
    """The daemon's own parts on the real rim, told to free nothing by itself: only what a test asks."""
    settings = config.defaults(
        ollama={"ollama_url": OLLAMA_URL},
        comfyui={"comfyui_url": COMFYUI_URL},
        policy={"vram_threshold": 100.0, "vram_unload_threshold": 100.0},
        gateway={"ollama_evict": False, "vram_repair_fallback": False},
    )
    async with nvml() as sensor, contextlib.AsyncExitStack() as stack:
        ollama = comfyui = None
        if OLLAMA_URL:
            ollama = HttpOllama(JsonClient(OLLAMA_URL, name="ollama"))
            await stack.enter_async_context(contextlib.aclosing(ollama))
        if COMFYUI_URL:
            comfyui = HttpComfyUI(JsonClient(COMFYUI_URL, name="comfyui"))
            await stack.enter_async_context(contextlib.aclosing(comfyui))
        store = Store.open(directory)
        daemon = build(settings, Clock.of_running_loop(), store, gpus=sensor, ollama=ollama, comfyui=comfyui)
        stack.callback(daemon.journal.close)
        work = asyncio.create_task(daemon.run())
        try:
            await turns_until(daemon, lambda: daemon.cycle.snapshot is not None)
            yield daemon
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)


async def settled(daemon: Daemon, wish: ManualFree) -> Event:
    """What became of `wish`: the event that ends it."""
    async with daemon.journal.following() as entries, asyncio.timeout(PATIENCE_SECONDS):
        answer = await daemon.cycle.free(wish)
        assert answer.accepted, answer.why
        while True:
            event = (await entries.get()).event
            if event.type in (EventType.FREED, EventType.FREE_UNCONFIRMED):
                return event


async def turns_until(daemon: Daemon, condition: Callable[[], bool]) -> None:
    """Looks at `condition` after each turn of the daemon until it holds."""
    turned, before = asyncio.Event(), daemon.cycle.on_turn

    def note(seconds: float) -> None:
        before(seconds)
        turned.set()

    daemon.cycle.on_turn = note
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not condition():
                turned.clear()
                await turned.wait()
    finally:
        daemon.cycle.on_turn = before


async def test_nvml_gives_every_gpu_an_identity_and_memory_that_adds_up() -> None:
    async with nvml() as sensor:
        seen = await sensor.read(with_processes=True)

    assert seen.gpus
    for gpu in seen.gpus:
        assert gpu.uuid
        assert gpu.name
        if isinstance(gpu.memory, Missing):
            assert gpu.memory.why
            continue
        memory = gpu.memory
        assert 0 <= memory.free_bytes <= memory.total_bytes
        assert 0.0 <= memory.used_percent <= 100.0
        if isinstance(memory.reserved_bytes, int):
            accounted = memory.reserved_bytes + memory.used_bytes + memory.free_bytes
            assert abs(accounted - memory.total_bytes) <= 2**21


async def test_nvml_is_read_again_and_again_without_trouble() -> None:
    async with nvml() as sensor:
        reads = [await sensor.read() for _ in range(200)]

    assert {tuple(gpu.uuid for gpu in seen.gpus) for seen in reads} == {tuple(gpu.uuid for gpu in reads[0].gpus)}


@needs_ollama
async def test_ollama_lists_models_with_sizes_that_make_sense() -> None:
    async with contextlib.aclosing(HttpOllama(JsonClient(OLLAMA_URL, name="ollama"))) as ollama:
        state = await ollama.models()

    assert isinstance(state.version, str)
    for model in state.models:
        assert model.name
        assert model.digest
        assert model.size_vram_bytes >= 0
        assert model.size_bytes > 0


@needs_ollama
async def test_a_model_loaded_here_is_listed_unloaded_on_request_and_its_memory_comes_back(tmp_path: Path) -> None:
    async with real_daemon(tmp_path) as daemon, httpx.AsyncClient(timeout=PATIENCE_SECONDS) as http:
        loaded = {model["name"] for model in (await http.get(f"{OLLAMA_URL}/api/ps")).json()["models"]}
        local = [
            model
            for model in (await http.get(f"{OLLAMA_URL}/api/tags")).json()["models"]
            if not model.get("remote_host") and model["name"] not in loaded
        ]
        if loaded:
            pytest.skip(f"{', '.join(sorted(loaded))} already loaded by somebody: not touched")
        if not local:
            pytest.skip("no local model to load")
        name = min(local, key=lambda model: model["size"])["name"]
        reply = await http.post(f"{OLLAMA_URL}/api/generate", json={"model": name})
        if reply.status_code == 400:  # an embedding model: loaded by an embedding of nothing
            reply = await http.post(f"{OLLAMA_URL}/api/embed", json={"model": name})
        reply.raise_for_status()
        await turns_until(daemon, lambda: name in (daemon.cycle.watch.models or ()))
        event = await settled(daemon, ManualFree(action=UnloadModel(model=name), force=False))

    assert event.type is EventType.FREED, event.reason
    assert event.freed_bytes


@needs_comfyui
async def test_comfyui_tells_its_devices_and_its_queue() -> None:
    async with contextlib.aclosing(HttpComfyUI(JsonClient(COMFYUI_URL, name="comfyui"))) as comfyui:
        stats = await comfyui.stats()
        remaining = await comfyui.queue_remaining()

    assert stats.argv
    assert remaining >= 0
    for device in stats.devices:
        assert 0 <= device.device_free_bytes <= device.vram_total_bytes
        assert 0 <= device.torch_free_bytes <= device.torch_total_bytes


@needs_comfyui
async def test_comfyui_pushes_its_queue_to_a_private_websocket() -> None:
    async with (
        contextlib.aclosing(HttpComfyUI(JsonClient(COMFYUI_URL, name="comfyui"))) as comfyui,
        contextlib.aclosing(comfyui.statuses()) as statuses,
        asyncio.timeout(30),
    ):
        first = await anext(statuses)

    assert first >= 0


@needs_comfyui
async def test_what_comfyui_loaded_for_this_test_is_freed_and_the_memory_comes_back(tmp_path: Path) -> None:
    async with real_daemon(tmp_path) as daemon, httpx.AsyncClient(timeout=PATIENCE_SECONDS) as http:
        stats = (await http.get(f"{COMFYUI_URL}/system_stats")).json()
        if stats["devices"][0]["torch_vram_total"] > 64 * 2**20:
            pytest.skip("ComfyUI already holds memory of somebody else: not touched")
        if (await http.get(f"{COMFYUI_URL}/prompt")).json()["exec_info"]["queue_remaining"]:
            pytest.skip("ComfyUI is busy with somebody else's prompt: not touched")
        checkpoints = (await http.get(f"{COMFYUI_URL}/experiment/models/checkpoints")).json()
        if not checkpoints:
            pytest.skip("no checkpoint to load")
        smallest = min(checkpoints, key=lambda file: file.get("size", 0))["name"]
        runs = idle_runs(daemon)
        prompt = (await http.post(f"{COMFYUI_URL}/prompt", json={"prompt": small_image(smallest)})).json()
        assert "prompt_id" in prompt, prompt
        await turns_until(daemon, lambda: idle_runs(daemon) > runs)
        assert prompt["prompt_id"] in (await http.get(f"{COMFYUI_URL}/history/{prompt['prompt_id']}")).json()
        event = await settled(daemon, ManualFree(action=FreeComfyUI(stage=Stage.SOFT), force=True))

    assert event.type is EventType.FREED, event.reason
    assert event.freed_bytes is not None
    assert event.freed_bytes > 256 * 2**20


def idle_runs(daemon: Daemon) -> int:
    """How many times ComfyUI was seen to run and to be idle for 2 s after it, when no flag is lost any more."""
    snapshot = daemon.cycle.snapshot
    assert snapshot is not None
    if not isinstance(snapshot.queue, Seen) or not snapshot.queue.value.idle:
        return -1
    queue = snapshot.queue.value
    return queue.runs if snapshot.taken_at - queue.since >= 2.0 else -1


def small_image(checkpoint: str) -> dict[str, Any]:
    """One step at 256 x 256: loads everything, computes next to nothing."""
    return {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": checkpoint}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a lighthouse"}},
        "3": {"class_type": "EmptyLatentImage", "inputs": {"width": 256, "height": 256, "batch_size": 1}},
        "4": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["1", 0],
                "positive": ["2", 0],
                "negative": ["2", 0],
                "latent_image": ["3", 0],
                "seed": 1,
                "steps": 1,
                "cfg": 1.0,
                "sampler_name": "euler",
                "scheduler": "normal",
                "denoise": 1.0,
            },
        },
        "5": {"class_type": "VAEDecode", "inputs": {"samples": ["4", 0], "vae": ["1", 2]}},
        "6": {"class_type": "PreviewImage", "inputs": {"images": ["5", 0]}},
    }


async def test_a_real_gpu_reading_drives_a_whole_turn(tmp_path: Path) -> None:
    async with real_daemon(tmp_path) as daemon:
        snapshot, decision = daemon.cycle.snapshot, daemon.cycle.decision

    assert snapshot is not None
    assert decision is not None
    assert decision.action is None
    assert any(isinstance(gpu["free_bytes"], int) for gpu in _inputs(decision.inputs))


def _inputs(inputs: Any) -> list[dict[str, Any]]:
    return list(inputs["gpus"])


@contextlib.asynccontextmanager
async def through_a_gateway(url: str) -> AsyncIterator[tuple[httpx.AsyncClient, httpx.AsyncClient]]:
    """Two clients of the same server: one asks it directly, the other through a proxy that decides nothing."""
    proxy = Proxy(url, PlainGate(), rewrite_host=True)
    await proxy.listen("127.0.0.1", 0)
    try:
        async with (
            httpx.AsyncClient(base_url=url, timeout=PATIENCE_SECONDS) as direct,
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{proxy.address[1]}", timeout=PATIENCE_SECONDS) as proxied,
        ):
            yield direct, proxied
    finally:
        await proxy.close(0.0)


async def said(client: httpx.AsyncClient, path: str) -> tuple[int, bytes, str | None]:
    response = await client.get(path)
    return response.status_code, response.content, response.headers.get("content-type")


@needs_ollama
@pytest.mark.parametrize("path", ["/", "/api/version", "/api/tags", "/v1/models", "/api/nothing-of-that-name"])
async def test_ollama_answers_the_same_through_the_proxy(path: str) -> None:
    async with through_a_gateway(OLLAMA_URL) as (direct, proxied):
        assert await said(proxied, path) == await said(direct, path)


@needs_comfyui
@pytest.mark.parametrize("path", ["/", "/features", "/api/queue", "/models", "/api/nothing-of-that-name"])
async def test_comfyui_answers_the_same_through_the_proxy(path: str) -> None:
    async with through_a_gateway(COMFYUI_URL) as (direct, proxied):
        assert await said(proxied, path) == await said(direct, path)
