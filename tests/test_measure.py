"""Measured inference: with which model, how it is asked, what follows, and what goes wrong."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest
import pytest_asyncio
import respx

from vram_manager.backends.http import JsonClient
from vram_manager.domain.reading import Missing
from vram_manager.errors import Rejected, SensorError, TimedOut
from vram_manager.measure import KEEP_SECONDS, LEAN_CONTEXT, Speed, as_json, by_speed, measured, not_measured
from vram_manager.simulator.world import OLLAMA_MODELS, World

pytestmark = [pytest.mark.asyncio, pytest.mark.looptime]

BASE = "http://node.test:11434"
GIB = 2**30
CHAT, EMBEDDER = "llama3.1:8b", "nomic-embed-text:latest"
GENERATIVE = [model for model in OLLAMA_MODELS if "completion" in model.capabilities]


class Recording(httpx.AsyncBaseTransport):
    """Keeps what goes through it."""

    def __init__(self, through: httpx.AsyncBaseTransport, bodies: list[tuple[str, dict[str, Any]]]) -> None:
        self.through, self.bodies = through, bodies

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.bodies.append((request.url.path, json.loads(await request.aread() or b"{}")))
        return await self.through.handle_async_request(request)


class Box:
    """A simulated Ollama, a client of it, and what it was asked."""

    def __init__(self, **how: Any) -> None:
        self.world = World(**how)
        self.bodies: list[tuple[str, dict[str, Any]]] = []
        transport = httpx.ASGITransport(self.world.ollama.app)

        self.client = JsonClient(BASE, name="node", transport=Recording(transport, self.bodies))
        self.user = httpx.AsyncClient(base_url=BASE, transport=transport)

    async def load(self, model: str, **options: Any) -> None:
        verb = "/api/embed" if model == EMBEDDER else "/api/generate"
        reply = await self.user.post(verb, json={"model": model, "options": options}, timeout=None)
        assert reply.status_code == 200, reply.text

    async def listed(self) -> dict[str, dict[str, Any]]:
        return {model["name"]: model for model in (await self.user.get("/api/ps")).json()["models"]}

    def asked(self, path: str) -> list[dict[str, Any]]:
        return [body for asked, body in self.bodies if asked == path]


@pytest_asyncio.fixture
async def box() -> AsyncIterator[Callable[..., Box]]:
    made: list[Box] = []

    def make(**how: Any) -> Box:
        made.append(Box(**how))
        return made[-1]

    yield make
    for one in made:
        await one.client.aclose()
        await one.user.aclose()
        await one.world.close()


# What is asked of it.


async def test_of_what_is_loaded_the_smallest_that_generates_is_asked(box):
    node = box()
    for model in ("qwen3:14b", CHAT, EMBEDDER):
        await node.load(model)
    speed = await measured(node.client)
    assert (speed.model, speed.kind, speed.verdict, speed.loaded_for_it) == (CHAT, "generation", "gpu", False)
    assert speed.tokens_per_second == pytest.approx(60, rel=0.1)


async def test_nothing_that_is_loaded_leaves_or_is_loaded_anew(box):
    node = box()
    await node.load("qwen3:14b", num_ctx=6144)
    await node.load(CHAT, num_ctx=8192)
    before = node.world.ollama.counters.loads
    await measured(node.client)
    assert node.world.ollama.counters.loads == before
    assert {name: model["context_length"] for name, model in (await node.listed()).items()} == {
        "qwen3:14b": 6144,
        CHAT: 8192,
    }


async def test_a_loaded_model_is_given_no_keep_alive_of_ours(box):
    node = box()
    await node.load(CHAT)
    await measured(node.client)
    (body,) = node.asked("/api/generate")
    assert "keep_alive" not in body


async def test_only_an_embedder_is_loaded_so_that_is_asked(box):
    node = box()
    await node.load(EMBEDDER)
    speed = await measured(node.client)
    assert (speed.model, speed.kind, speed.verdict) == (EMBEDDER, "embedding", "gpu")
    assert not node.asked("/api/generate")


async def test_nothing_is_loaded_so_the_smallest_on_disk_is_and_it_leaves_soon(box):
    node = box(ollama_models=GENERATIVE)
    speed = await measured(node.client)
    assert (speed.model, speed.loaded_for_it, speed.verdict) == ("gemma3:4b", True, "gpu")
    assert list(await node.listed()) == ["gemma3:4b"]
    await asyncio.sleep(KEEP_SECONDS + 3)
    assert await node.listed() == {}


async def test_what_is_loaded_for_it_is_loaded_with_as_little_memory_as_can_be(box):
    node = box(ollama_models=GENERATIVE)
    await measured(node.client)
    assert (await node.listed())["gemma3:4b"]["context_length"] == LEAN_CONTEXT


async def test_we_never_unload(box):
    node = box()
    await measured(node.client)
    await node.load(CHAT)
    await measured(node.client)
    assert all(body.get("keep_alive") != 0 for _, body in node.bodies)


async def test_the_load_does_not_count_as_slowness(box):
    node = box(ollama_models=GENERATIVE)
    speed = await measured(node.client)
    assert speed.tokens_per_second == pytest.approx(60, rel=0.1)


async def test_a_model_on_the_cpu_is_told_by_its_size_and_is_as_slow(box):
    node = box(ollama_models=[replace(GENERATIVE[0], num_gpu=0)])
    speed = await measured(node.client)
    assert (speed.verdict, speed.by_speed, speed.doubt) == ("cpu", False, None)
    assert speed.tokens_per_second == pytest.approx(4, rel=0.1)
    assert "about 4 tokens/s" in speed.words
    assert ": on a CPU" in speed.words


async def test_a_model_on_both_is_split(box):
    node = box(ollama_models=[replace(GENERATIVE[0], num_gpu=20)])
    assert (await measured(node.client)).verdict == "split"


# Odd servers.


def listed(name: str = "m:1b", size: int = 5 * GIB, vram: int = 5 * GIB) -> dict[str, Any]:
    return {"name": name, "digest": "a" * 64, "size": size, "size_vram": vram, "context_length": 4096}


def stored(name: str, size: int = GIB, **more: Any) -> dict[str, Any]:
    return {"name": name, "digest": "a" * 64, "size": size, **more}


class Odd:
    """A server that says what a test tells it to."""

    def __init__(self, router: respx.MockRouter) -> None:
        self.router = router
        self.ps([listed()])
        self.show(["completion"])
        self.generates(16, 1.0)

    def ps(self, *replies: list[dict[str, Any]]) -> None:
        """One after the other; the last one stays."""
        left = [httpx.Response(200, json={"models": models}) for models in replies]
        self.router.get("/api/ps").mock(side_effect=lambda _: left.pop(0) if len(left) > 1 else left[0])

    def tags(self, *models: dict[str, Any]) -> None:
        self.router.get("/api/tags").respond(json={"models": list(models)})

    def show(self, capabilities: list[str] | None, **info: Any) -> None:
        able = {} if capabilities is None else {"capabilities": capabilities}
        self.router.post("/api/show").respond(json={**able, "model_info": info})

    def generates(self, tokens: int, seconds: float) -> None:
        numbers = {"eval_count": tokens, "eval_duration": int(seconds * 1e9), "load_duration": 60 * 10**9}
        self.router.post("/api/generate").respond(json={"response": "", "thinking": "hm", **numbers})

    def embeds(self, tokens: int, seconds: float) -> None:
        numbers = {"total_duration": int((seconds + 60) * 1e9), "load_duration": 60 * 10**9}
        self.router.post("/api/embed").respond(json={"embeddings": [], "prompt_eval_count": tokens, **numbers})

    async def speed(self) -> Speed:
        client = JsonClient(BASE, name="node")
        try:
            return await measured(client)
        finally:
            await client.aclose()


@pytest.fixture
def odd():
    with respx.mock(base_url=BASE, assert_all_called=False) as router:
        yield Odd(router)


@pytest.mark.parametrize("vram", [6 * GIB, 5 * GIB + 1], ids=["more than there is", "one byte more"])
async def test_sizes_that_contradict_leave_it_to_the_speed_which_is_not_sure(odd: Odd, vram: int):
    odd.ps([listed(vram=vram)])
    odd.generates(16, 4.0)
    speed = await odd.speed()
    assert (speed.verdict, speed.by_speed) == ("cpu", True)
    assert speed.words == "about 4 tokens/s with m:1b (5.0 GiB): as on a CPU (by its speed alone, so not sure)"


async def test_a_speed_that_both_could_have_says_nothing(odd: Odd):
    odd.ps([listed(vram=6 * GIB)])
    odd.generates(16, 0.5)
    speed = await odd.speed()
    assert (speed.verdict, speed.by_speed) == ("unknown", False)
    assert speed.words.endswith("where it runs cannot be told")
    assert as_json(speed)["by"] is None


async def test_a_model_that_is_gone_before_the_second_look_has_no_size(odd: Odd):
    odd.ps([listed()], [])
    speed = await odd.speed()
    assert as_json(speed)["size_bytes"] is None
    assert speed.verdict == "unknown"


async def test_slow_though_it_says_gpu_is_doubted_and_not_overruled(odd: Odd):
    odd.generates(16, 8.0)
    speed = await odd.speed()
    assert speed.verdict == "gpu"
    assert "yet that is as slow as on a CPU" in speed.words


async def test_fast_though_it_says_cpu_is_doubted_and_not_overruled(odd: Odd):
    odd.ps([listed(vram=0)])
    odd.generates(16, 0.1)
    speed = await odd.speed()
    assert speed.verdict == "cpu"
    assert "yet that is as fast as on a GPU" in speed.words


async def test_a_model_of_experts_is_no_proof_by_being_fast(odd: Odd):
    odd.ps([listed(vram=6 * GIB)])
    odd.show(["completion"], **{"qwen3moe.expert_count": 128})
    odd.generates(16, 0.1)
    assert (await odd.speed()).verdict == "unknown"


async def test_of_embedders_that_are_loaded_the_smallest_is_asked(odd: Odd):
    odd.ps([listed("large:1b"), listed("small:1b", GIB, GIB)])
    odd.show(["embedding"])
    odd.embeds(500, 0.1)
    assert (await odd.speed()).model == "small:1b"


async def test_an_answer_that_ends_at_once_has_no_speed(odd: Odd):
    odd.generates(1, 0.001)
    speed = await odd.speed()
    assert speed.tokens_per_second == Missing("it answered with 1 tokens")
    assert speed.verdict == "gpu"
    assert as_json(speed)["tokens_per_second"] is None


async def test_a_server_of_old_that_tells_no_capabilities_is_asked_to_embed_when_it_refuses_to_generate(odd: Odd):
    odd.show(None)
    odd.router.post("/api/generate").respond(400, json={"error": '"m:1b" does not support generate'})
    odd.embeds(500, 0.1)
    speed = await odd.speed()
    assert (speed.kind, speed.tokens_per_second) == ("embedding", 5000)


async def test_another_refusal_is_told_as_it_is(odd: Odd):
    odd.router.post("/api/generate").respond(500, json={"error": "llama-server ended"})
    with pytest.raises(Rejected, match=r"POST /api/generate: HTTP 500: llama-server ended"):
        await odd.speed()


async def test_models_of_a_cloud_are_no_signal(odd: Odd):
    odd.ps([])
    odd.tags(stored("gpt-oss:120b-cloud", 384), stored("far:1b", 384, remote_host="https://ollama.com:443"))
    with pytest.raises(Rejected, match="no model of its own on disk") as refused:
        await odd.speed()
    assert refused.value.remedy == "pull a small one, such as llama3.2:1b"


async def test_a_model_that_only_paints_is_passed_over(odd: Odd):
    odd.ps([])
    odd.tags(stored("paint:1b"))
    odd.show(["image"])
    with pytest.raises(Rejected, match="no model there generates or embeds"):
        await odd.speed()


async def test_a_server_that_is_away_is_told_in_words(odd: Odd):
    odd.router.get("/api/ps").mock(side_effect=httpx.ConnectError("refused"))
    with pytest.raises(SensorError, match=r"GET /api/ps: "):
        await odd.speed()


async def test_a_server_that_never_ends_is_given_up_after_the_deadline(odd: Odd):
    async def never(request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(3600)
        raise AssertionError

    odd.router.post("/api/generate").mock(side_effect=never)
    began = asyncio.get_running_loop().time()
    with pytest.raises(TimedOut, match="within 120 s"):
        await odd.speed()
    assert asyncio.get_running_loop().time() - began == pytest.approx(120, abs=1)


async def test_an_embedder_whose_numbers_are_not_told_has_no_speed(odd: Odd):
    odd.show(["embedding"])
    odd.router.post("/api/embed").respond(json={"embeddings": []})
    assert (await odd.speed()).tokens_per_second == Missing("it does not tell how long an embedding took")


# Speed alone.


@pytest.mark.looptime(False)
@pytest.mark.parametrize(
    ("fast", "size_gib", "verdict"),
    [
        pytest.param(4, 4.4, "cpu", id="8B in 4 bits on a desktop CPU"),
        pytest.param(60, 4.4, "unknown", id="8B on a card, or a server of many channels"),
        pytest.param(130, 4.4, "gpu", id="8B on a 4090"),
        pytest.param(1.5, 40, "unknown", id="70B on 8 channels, or spread over both"),
        pytest.param(40, 0.8, "unknown", id="a small model is slowed down by all else"),
        pytest.param(10, 0.8, "cpu", id="a small model this slow"),
        pytest.param(0, 4.4, "cpu", id="it stands still"),
    ],
)
async def test_tokens_times_bytes_is_how_fast_memory_was_read(fast: float, size_gib: float, verdict: str):
    assert by_speed(fast, int(size_gib * GIB), embeds=False, experts=False) == verdict


@pytest.mark.looptime(False)
@pytest.mark.parametrize(("fast", "verdict"), [(200, "cpu"), (3000, "unknown"), (40_000, "gpu")])
async def test_embedding_is_reckoned_not_read(fast: float, verdict: str):
    assert by_speed(fast, 700 * 10**6, embeds=True, experts=False) == verdict


@pytest.mark.looptime(False)
async def test_what_was_not_measured_has_the_same_fields():
    speed = Speed(
        model="m",
        kind="generation",
        tokens_per_second=1.234,
        size_bytes=1,
        size_vram_bytes=1,
        loaded_for_it=True,
        verdict="gpu",
        by_speed=False,
    )
    assert not_measured("no").keys() == as_json(speed).keys()
    assert as_json(speed)["tokens_per_second"] == 1.23
    assert as_json(speed)["by"] == "size_vram"
    assert f"leaves within {KEEP_SECONDS} s" in speed.words
