"""Both servers on real ports, with real clients."""

from __future__ import annotations

import asyncio
import json
import socket
import struct

import httpx
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from vram_manager.errors import SettingsError
from vram_manager.simulator.comfyui_executor import ComfyUISettings
from vram_manager.simulator.comfyui_pictures import png
from vram_manager.simulator.ledger import GIB, MIB, Ledger
from vram_manager.simulator.ollama_runner import OllamaSettings
from vram_manager.simulator.serve import Extras, control_app, mirrored, serve_world, serving
from vram_manager.simulator.world import World, txt2img

pytestmark = pytest.mark.asyncio

FAST_OLLAMA = OllamaSettings(load_bytes_per_second=1e12, start_seconds=0, unload_seconds=0.05)
FAST_COMFYUI = ComfyUISettings(
    disk_bytes_per_second=1e12,
    ram_bytes_per_second=1e12,
    seconds_per_step=0.001,
    text_seconds=0,
    decode_seconds=0,
    gc_seconds=0.02,
)


def fast_world():
    return World(ollama_settings=FAST_OLLAMA, comfyui_settings=FAST_COMFYUI)


async def until(ledger, true):
    changed = asyncio.Event()
    ledger.on_change.append(changed.set)
    while not true():
        changed.clear()
        await changed.wait()
    ledger.on_change.remove(changed.set)


async def events(socket):
    """All messages of text up to the end of a prompt."""
    seen = []
    while not seen or seen[-1] != ("executing", None):
        message = await socket.recv()
        if isinstance(message, bytes):
            continue
        message = json.loads(message)
        seen.append((message["type"], message["data"].get("node")))
    return seen


async def test_one_gpu_is_shared_over_real_sockets():
    async with (
        fast_world() as world,
        serving(world.ollama.app) as ollama,
        serving(world.comfyui.app) as comfyui,
        httpx.AsyncClient(timeout=30) as client,
        connect(comfyui.replace("http", "ws") + "/ws?clientId=me") as owner,
        connect(comfyui.replace("http", "ws") + "/api/ws?clientId=bystander") as bystander,
    ):
        hello = json.loads(await owner.recv())
        assert hello["data"] == {"status": {"exec_info": {"queue_remaining": 0}}, "sid": "me"}
        await client.post(f"{comfyui}/prompt", json={"prompt": txt2img(steps=2), "client_id": "me"})
        seen = [kind for kind, _ in await events(owner) if kind != "progress_state"]
        assert seen[:4] == ["status", "status", "execution_start", "execution_cached"]
        assert seen[-4:] == ["executed", "execution_success", "status", "executing"]
        statuses = [json.loads(await bystander.recv()) for _ in range(4)]
        assert [status["type"] for status in statuses] == ["status"] * 4
        assert [status["data"]["status"]["exec_info"]["queue_remaining"] for status in statuses] == [
            0,
            1,
            1,
            0,
        ]
        url = f"{ollama}/api/chat"
        body = {"model": "llama3.1:8b", "messages": [{"role": "user", "content": "hi"}]}
        async with client.stream("POST", url, json=body) as stream:
            lines = [json.loads(line) async for line in stream.aiter_lines()]
        assert lines[-1]["done_reason"] == "stop"
        assert set(world.ledger.holders()) == {"comfyui", "ollama:llama3.1:8b"}


async def test_a_second_socket_of_the_same_client_takes_over_its_messages():
    async with fast_world() as world, serving(world.comfyui.app) as comfyui, httpx.AsyncClient() as client:
        url = comfyui.replace("http", "ws") + "/ws?clientId=me"
        async with connect(url) as first, connect(url) as second:
            await client.post(f"{comfyui}/prompt", json={"prompt": txt2img(steps=2), "client_id": "me"})
            await events(second)
            assert json.loads(await first.recv())["type"] == "status"  # its welcome, and then nothing more
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(first.recv(), 0.05)


async def test_the_pictures_of_each_step_go_to_the_prompts_client_alone():
    async with (
        fast_world() as world,
        serving(world.comfyui.app) as comfyui,
        httpx.AsyncClient() as client,
        connect(comfyui.replace("http", "ws") + "/ws?clientId=me") as owner,
        connect(comfyui.replace("http", "ws") + "/ws?clientId=bystander") as bystander,
    ):
        await client.post(f"{comfyui}/prompt", json={"prompt": txt2img(steps=3), "client_id": "me"})
        pictures = []
        while len(pictures) < 3:
            message = await owner.recv()
            pictures += [message] if isinstance(message, bytes) else []
        assert [struct.unpack(">II", picture[:8]) for picture in pictures] == [(1, 2)] * 3
        assert [picture[8:] for picture in pictures] == [png(f"step {step}", 64) for step in (1, 2, 3)]
        told = [await bystander.recv() for _ in range(4)]
        assert [json.loads(message)["type"] for message in told] == ["status"] * 4


async def test_a_foreign_origin_gets_no_websocket():
    async with fast_world() as world, serving(world.comfyui.app) as comfyui:
        with pytest.raises(InvalidStatus) as refused:
            async with connect(comfyui.replace("http", "ws") + "/ws", origin="http://evil.example"):
                pass
    assert refused.value.response.status_code == 403


async def test_hanging_up_over_a_real_socket_aborts_the_load():
    slow = OllamaSettings(load_bytes_per_second=GIB, start_seconds=0)
    async with World(ollama_settings=slow) as world, serving(world.ollama.app) as ollama:
        async with httpx.AsyncClient() as client:
            loading = asyncio.ensure_future(client.post(f"{ollama}/api/generate", json={"model": "qwen3:14b"}))
            await until(world.ledger, lambda: "ollama:qwen3:14b" in world.ledger.holders())
            loading.cancel()
            await asyncio.gather(loading, return_exceptions=True)
        await until(world.ledger, lambda: "ollama:qwen3:14b" not in world.ledger.holders())
    assert world.ollama.counters.loads == 0


async def test_the_control_app_gives_memory_to_strangers():
    ledger = Ledger(24 * GIB)
    transport = httpx.ASGITransport(control_app(ledger))
    async with httpx.AsyncClient(transport=transport, base_url="http://control") as client:
        held = await client.post("/gpu/hold", json={"holder": "game", "bytes": GIB})
        too_much = await client.post("/gpu/hold", json={"holder": "game", "bytes": 30 * GIB})
        wrong = await client.post("/gpu/hold", json={"bytes": "many"})
        await client.post("/gpu/hold", json={"holder": "game", "bytes": 0})
        after = await client.get("/gpu")
    assert held.json()["holders"] == {"game": GIB}
    assert (too_much.status_code, wrong.status_code) == (409, 400)
    assert after.json()["holders"] == {}


async def test_the_ledger_is_mirrored_for_the_fake_nvml(tmp_path):
    from vram_manager.simulator.nvml_state import NvmlState

    ledger = Ledger(24 * GIB)
    path = tmp_path / "nvml"
    with mirrored(path, ledger):
        ledger.claim("comfyui", 600 * MIB)
        raw = NvmlState.from_buffer_copy(path.read_bytes())
    assert raw.gpus[0].used == 600 * MIB
    assert raw.gpus[0].total - raw.gpus[0].reserved - raw.gpus[0].used == raw.gpus[0].free
    assert ledger.on_change == []


async def test_a_served_world_ends_when_cancelled(unused_tcp_port_factory):
    ollama_port, comfyui_port, control_port = (unused_tcp_port_factory() for _ in range(3))
    serving_it = asyncio.ensure_future(
        serve_world(ollama_port=ollama_port, comfyui_port=comfyui_port, control_port=control_port)
    )
    async with httpx.AsyncClient() as client:
        while True:
            try:
                gpu = await client.get(f"http://127.0.0.1:{control_port}/gpu")
                break
            except httpx.ConnectError:
                await asyncio.sleep(0)
        version = await client.get(f"http://127.0.0.1:{ollama_port}/api/version")
        queue = await client.get(f"http://127.0.0.1:{comfyui_port}/prompt")
    serving_it.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving_it
    assert list(gpu.json()["holders"]) == ["comfyui"]
    assert version.json() == {"version": "0.32.15"}
    assert queue.json() == {"exec_info": {"queue_remaining": 0}}


async def test_where_any_port_will_do_that_holds_for_the_further_servers_too(
    capsys,
) -> None:
    world = asyncio.create_task(
        serve_world(
            host="127.0.0.1",
            ollama_port=0,
            comfyui_port=0,
            control_port=None,
            gpu_gib=24,
            mode="dynamic",
            nvml_state=None,
            extras=Extras(nodes=2),
        )
    )
    said = ""
    async with asyncio.timeout(30):
        while "OLLAMA_NODES" not in said:
            assert not world.done()
            await asyncio.sleep(0)
            said += capsys.readouterr().out
    urls = said.partition("OLLAMA_NODES=")[2].strip().split(",")

    async with httpx.AsyncClient() as http:
        answers = [(await http.get(f"{url}/api/version")).status_code for url in urls]
    world.cancel()
    await asyncio.gather(world, return_exceptions=True)

    assert answers == [200, 200]


async def test_a_port_that_cannot_be_had_is_one_line():
    async with fast_world() as world:
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            with pytest.raises(SettingsError, match=f"^127.0.0.1:{port}: cannot be listened on .*choose another port$"):
                async with serving(world.ollama.app, port=port):
                    pass
        with pytest.raises(SettingsError, match=r"^127.0.0.1:65536: is no port"):
            async with serving(world.ollama.app, port=65_536):
                pass


async def test_a_state_file_that_cannot_be_written_is_one_line(tmp_path) -> None:
    file = tmp_path / "nowhere" / "state"
    refused = pytest.raises(SettingsError, match=r"^--nvml-state .*state: cannot be written \(No such file")
    with refused, mirrored(file, Ledger(GIB)):
        pass
