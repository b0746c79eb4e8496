"""Clients as people use them, unchanged, with a real daemon's gateways: they notice nothing of them."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anthropic
import ollama
import openai
import pytest
import pytest_asyncio
import websockets

from tests.gateway.stack import MODEL, PATIENCE_SECONDS, Stack, http_client, stack_in, stopped
from tests.test_end_to_end import needs_compiler
from vram_manager.simulator.comfyui_pictures import SIDE_PIXELS, png
from vram_manager.simulator.world import txt2img

pytestmark = [pytest.mark.asyncio(loop_scope="module"), needs_compiler]

TEXT = "word word word "
QUESTION = [{"role": "user", "content": "why?"}]
EMBEDDER = "nomic-embed-text:latest"


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    """One daemon for all, and room for all: nobody has to wait."""
    async with stack_in(tmp_path_factory.mktemp("stack"), gpu_gib=48) as stack, stack.daemon() as daemon:
        yield stack
        assert await stopped(daemon) == 0
        assert [line for line in daemon.lines if " ERROR " in line or " WARNING " in line] == []


# Ollama's own client.


async def test_ollamas_client_chats_generates_and_embeds(stack: Stack) -> None:
    three = {"num_predict": 3}
    client = ollama.AsyncClient(stack.ollama, trust_env=False)
    chat = await client.chat(MODEL, QUESTION, options=three)
    chatting = await client.chat(MODEL, QUESTION, options=three, stream=True)
    chatted = [part async for part in chatting]
    generated = await client.generate(MODEL, "why?", options=three)
    generating = await client.generate(MODEL, "why?", options=three, stream=True)
    pieces = [part async for part in generating]
    vectors = await client.embed(EMBEDDER, ["a", "b"])
    vector = await client.embeddings(EMBEDDER, "a")
    listed = await client.ps()
    await client.close()

    assert chat.message.content == generated.response == TEXT
    assert "".join(part.message.content for part in chatted) == TEXT
    assert "".join(part.response for part in pieces) == TEXT
    assert (chatted[-1].done, chatted[-1].eval_count) == (True, 3)
    assert len(vectors.embeddings) == 2
    assert vector.embedding == vectors.embeddings[0]
    assert {model.model for model in listed.models} == {MODEL, EMBEDDER}


async def test_ollamas_client_sees_a_pull_step_by_step(stack: Stack) -> None:
    client = ollama.AsyncClient(stack.ollama, trust_env=False)
    pulling = await client.pull(MODEL, stream=True)
    steps = [step async for step in pulling]
    with pytest.raises(ollama.ResponseError, match="file does not exist"):
        [step async for step in await client.pull("nobody-has-it", stream=True)]
    await client.close()

    assert [step.status for step in steps][-3:] == ["verifying sha256 digest", "writing manifest", "success"]
    done = [step.completed for step in steps if step.total]
    assert done == sorted(done)
    assert done[-1] == steps[1].total


async def test_ollamas_client_makes_a_model_of_an_uploaded_file(stack: Stack, tmp_path: Path) -> None:
    weights = tmp_path / "mine.gguf"
    weights.write_bytes(bytes(range(256)) * (64 << 10))
    client = ollama.AsyncClient(stack.ollama, trust_env=False)
    digest = await client.create_blob(weights)
    made = await client.create("mine", files={"mine.gguf": digest}, parameters={"num_ctx": 2048})
    shown = await client.show("mine")
    names = [model.model for model in (await client.list()).models]
    answer = await client.generate("mine", "why?", options={"num_predict": 1})
    copied = await client.copy("mine", "second")
    deleted = [(await client.delete(name)).status for name in ("mine", "second")]
    with pytest.raises(ollama.ResponseError, match="model 'mine' not found") as gone:
        await client.chat("mine", QUESTION)
    await client.close()

    assert digest == f"sha256:{hashlib.sha256(weights.read_bytes()).hexdigest()}"
    assert stack.world.ollama.store.blobs == {digest.removeprefix("sha256:"): weights.stat().st_size}
    assert (made.status, copied.status, deleted) == ("success", "success", ["success", "success"])
    assert shown.parameters is not None
    assert shown.parameters.split() == ["num_ctx", "2048"]
    assert "mine:latest" in names
    assert answer.response == "word "
    assert gone.value.status_code == 404


# OpenAI's.


async def test_openais_client_chats_completes_and_responds(stack: Stack) -> None:
    async with openai.AsyncOpenAI(base_url=f"{stack.ollama}/v1", api_key="-") as client:
        asked: dict[str, Any] = {"model": MODEL, "messages": QUESTION, "max_tokens": 3}
        chat = await client.chat.completions.create(**asked)
        counted = {"stream_options": {"include_usage": True}}
        chunks = [chunk async for chunk in await client.chat.completions.create(**asked, **counted, stream=True)]
        completed = await client.completions.create(model=MODEL, prompt="why?", max_tokens=3)
        completing = await client.completions.create(model=MODEL, prompt="why?", max_tokens=3, stream=True)
        pieces = [piece async for piece in completing]
        async with client.responses.stream(model=MODEL, input="why?", max_output_tokens=3) as responding:
            kinds = [event.type async for event in responding]
            response = await responding.get_final_response()

    assert chat.choices[0].message.content == TEXT
    assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == TEXT
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 3
    assert completed.choices[0].text == TEXT
    assert "".join(piece.choices[0].text for piece in pieces) == TEXT
    assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")
    assert kinds.count("response.output_text.delta") >= 3
    assert response.output_text == TEXT


async def test_openais_client_embeds_hears_and_lists(stack: Stack) -> None:
    async with openai.AsyncOpenAI(base_url=f"{stack.ollama}/v1", api_key="-") as client:
        vectors = await client.embeddings.create(model=EMBEDDER, input=["a", "b"])
        heard = await client.audio.transcriptions.create(model=MODEL, file=("a.wav", b"RIFF" * 100_000))
        models = [model.id async for model in client.models.list()]
        one = await client.models.retrieve(MODEL)

    assert vectors.data[1].embedding == pytest.approx([0.6, 0.8])
    assert heard.text.startswith("word ")
    assert MODEL in models
    assert one.id == MODEL


async def test_openais_client_gets_the_errors_it_has_classes_for(stack: Stack) -> None:
    async with openai.AsyncOpenAI(base_url=f"{stack.ollama}/v1", api_key="-", max_retries=0) as client:
        with pytest.raises(openai.NotFoundError, match="no-such-model"):
            await client.chat.completions.create(model="no-such-model", messages=QUESTION)  # type: ignore[arg-type]
        with pytest.raises(openai.BadRequestError, match="invalid input"):
            await client.embeddings.create(model=EMBEDDER, input=[])


# Anthropic's.


async def test_anthropics_client_gets_whole_messages_streams_and_errors(stack: Stack) -> None:
    asked: dict[str, Any] = {"model": MODEL, "max_tokens": 3, "messages": QUESTION}
    async with anthropic.AsyncAnthropic(base_url=stack.ollama, api_key="-", max_retries=0) as client:
        message = await client.messages.create(**asked)
        async with client.messages.stream(**asked) as stream:
            text = "".join([piece async for piece in stream.text_stream])
            streamed = await stream.get_final_message()
        with pytest.raises(anthropic.NotFoundError, match="no-such-model") as missing:
            await client.messages.create(**asked | {"model": "no-such-model"})

    assert [block.text for block in message.content if block.type == "text"] == [TEXT]
    assert text == TEXT
    assert (streamed.stop_reason, streamed.usage.output_tokens) == ("end_turn", 3)
    assert missing.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]


# A browser with ComfyUI in it.


class Browser:
    """One open page of ComfyUI: a websocket with a clientId, and prompts that carry it."""

    def __init__(self, stack: Stack, client_id: str, prefix: str = "") -> None:
        self.client_id = client_id
        self._url = stack.comfyui + prefix
        address = f"{self._url}/ws?clientId={client_id}".replace("http", "ws", 1)
        self.connecting = websockets.connect(address, proxy=None, max_size=None)

    async def __aenter__(self) -> Browser:
        self._socket = await self.connecting
        return self

    async def __aexit__(self, *args: object) -> None:
        await self._socket.close()

    async def next(self) -> dict[str, Any] | bytes:
        async with asyncio.timeout(PATIENCE_SECONDS):
            message = await self._socket.recv()
        return message if isinstance(message, bytes) else json.loads(message)

    async def say(self, **message: Any) -> None:
        await self._socket.send(json.dumps(message))

    async def post(self, seed: int, steps: int = 4) -> str:
        async with http_client(self._url) as http:
            body = {"prompt": txt2img(steps=steps, seed=seed), "client_id": self.client_id}
            return (await http.post("/prompt", json=body)).raise_for_status().json()["prompt_id"]

    async def until_done(self, prompt_id: str) -> list[dict[str, Any] | bytes]:
        """All that comes up to the end of that prompt."""
        seen: list[dict[str, Any] | bytes] = []
        end = {"type": "executing", "data": {"node": None, "prompt_id": prompt_id}}
        while not seen or seen[-1] != end:
            seen.append(await self.next())
        return seen


def kinds_of(messages: list[dict[str, Any] | bytes]) -> list[str]:
    return ["picture" if isinstance(message, bytes) else message["type"] for message in messages]


def prompts_in(messages: list[dict[str, Any] | bytes]) -> set[str]:
    """Whose progress, errors and ends they tell of; `status` is everybody's."""
    told = [message["data"] for message in messages if isinstance(message, dict)]
    return {data["prompt_id"] for data in told if "prompt_id" in data}


@pytest.mark.parametrize("prefix", ["", "/api"])
async def test_a_browser_sees_status_progress_and_a_picture_of_each_step(stack: Stack, prefix: str) -> None:
    async with Browser(stack, "alice", prefix) as browser:
        hello = await browser.next()
        await browser.say(type="feature_flags", data={"supports_preview_metadata": True})
        flags = await browser.next()
        prompt_id = await browser.post(seed=len(prefix))
        seen = await browser.until_done(prompt_id)
        async with http_client(stack.comfyui + prefix) as http:
            entry = (await http.get(f"/history/{prompt_id}")).json()[prompt_id]
            (image,) = (image for output in entry["outputs"].values() for image in output["images"])
            viewed = await http.get("/view", params=image)

    assert isinstance(hello, dict)
    assert hello["data"]["sid"] == "alice"
    assert isinstance(flags, dict)
    assert flags["type"] == "feature_flags"
    kinds = kinds_of(seen)
    assert kinds.count("progress") == kinds.count("picture") == 4
    assert kinds[-3:] == ["execution_success", "status", "executing"]
    pictures = [message for message in seen if isinstance(message, bytes)]
    assert all(picture.startswith(b"\0\0\0\1\0\0\0\2\x89PNG") for picture in pictures)
    assert prompts_in(seen) == {prompt_id}
    assert viewed.content == png(image["filename"], SIDE_PIXELS)


async def test_two_browsers_see_their_own_prompts_and_each_others_queue(stack: Stack) -> None:
    async with Browser(stack, "alice") as alice, Browser(stack, "bob") as bob:
        ids = await asyncio.gather(alice.post(seed=11), bob.post(seed=12))
        seen = await asyncio.gather(alice.until_done(ids[0]), bob.until_done(ids[1]))

    assert [prompts_in(messages) for messages in seen] == [{ids[0]}, {ids[1]}]
    assert [kinds_of(messages).count("picture") for messages in seen] == [4, 4]
    left = [message["data"]["status"]["exec_info"]["queue_remaining"] for message in seen[0] if _is_status(message)]
    assert max(left) == 2


def _is_status(message: dict[str, Any] | bytes) -> bool:
    return isinstance(message, dict) and message["type"] == "status"


async def test_a_browser_that_comes_back_under_its_name_sees_the_rest_of_its_prompt(stack: Stack) -> None:
    async with Browser(stack, "carol") as browser:
        prompt_id = await browser.post(seed=21, steps=40)
        while not isinstance(await browser.next(), bytes):
            pass
    async with Browser(stack, "carol") as again:
        seen = await again.until_done(prompt_id)

    assert prompts_in(seen) == {prompt_id}
    assert 0 < kinds_of(seen).count("picture") < 40


async def test_pictures_go_up_and_come_back_and_the_aliases_are_the_same(stack: Stack) -> None:
    picture = bytes(range(256)) * 4096
    async with http_client(stack.comfyui) as http:
        uploads = [
            (await http.post(f"{prefix}/upload/image", files={"image": ("cat.png", picture)})).json()
            for prefix in ("", "/api")
        ]
        views = [await http.get(f"{prefix}/view", params={"filename": "cat.png", "type": "input"}) for prefix in _BOTH]
        ranged = await http.get("/view?filename=no%20such%2Fcat.png&type=input")
        infos = [(await http.get(f"{prefix}/object_info")).content for prefix in _BOTH]
        pages = [
            await http.get(path) for path in ("/", "/queue", "/api/queue", "/history?max_items=1", "/system_stats")
        ]

    uploaded = next(iter(stack.world.comfyui.pictures.uploads.values()))
    assert uploads == [{"name": "cat.png", "subfolder": "", "type": "input"}] * 2
    assert (uploaded.size_bytes, uploaded.sha256) == (len(picture), hashlib.sha256(picture).hexdigest())
    assert [view.content for view in views] == [png("cat.png", SIDE_PIXELS)] * 2
    assert ranged.status_code == 404
    assert infos[0] == infos[1]
    assert [page.status_code for page in pages] == [200] * len(pages)


_BOTH = ("", "/api")


async def test_a_page_of_a_stranger_gets_the_servers_403_also_at_the_websocket(stack: Stack) -> None:
    stranger = {"Origin": "http://evil.example"}
    async with http_client(stack.comfyui) as http:
        refused = await http.get("/queue", headers=stranger)
    address = f"{stack.comfyui}/ws".replace("http", "ws", 1)
    with pytest.raises(websockets.InvalidStatus, match="403"):
        await websockets.connect(address, proxy=None, origin=websockets.Origin(stranger["Origin"]))
    async with http_client(stack.ollama) as http:
        foreign = await http.get("/api/tags", headers=stranger)
        of_this_machine = await http.get("/api/tags", headers={"Origin": stack.ollama})

    assert (refused.status_code, foreign.status_code, of_this_machine.status_code) == (403, 403, 200)
