"""The official clients of Ollama, OpenAI and Anthropic, unchanged, with the simulated Ollama."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from vram_manager.simulator.ollama_runner import OllamaSettings
from vram_manager.simulator.serve import serving
from vram_manager.simulator.world import World

pytestmark = pytest.mark.asyncio

MODEL = "llama3.1:8b"
TEXT = "word word word "


@pytest_asyncio.fixture
async def url() -> AsyncIterator[str]:
    """Of a simulated Ollama that takes no time to speak of."""
    fast = OllamaSettings(load_bytes_per_second=1e12, start_seconds=0, unload_seconds=0)
    async with World(ollama_settings=fast) as world, serving(world.ollama.app) as address:
        world.ollama.work.gpu_tokens_per_second = 1e6
        yield address


async def test_ollamas_client_gets_what_it_expects(url):
    ollama = pytest.importorskip("ollama")
    client = ollama.AsyncClient(url)
    three = {"num_predict": 3}
    question = [{"role": "user", "content": "why?"}]
    assert (await client.generate(MODEL, "why?", options=three)).response == TEXT
    stream = await client.chat(MODEL, question, options=three, stream=True)
    assert "".join([part.message.content async for part in stream]) == TEXT
    assert len((await client.embed("nomic-embed-text", ["a", "b"])).embeddings) == 2
    assert {model.model for model in (await client.ps()).models} == {MODEL, "nomic-embed-text:latest"}
    assert (await client.create("mine", from_=MODEL, parameters={"num_ctx": 8192})).status == "success"
    assert (await client.show("mine")).parameters.split() == ["num_ctx", "8192"]
    assert [part.status async for part in await client.pull("mine", stream=True)][-1] == "success"
    assert (await client.copy("mine", "second")).status == "success"
    assert (await client.delete("second")).status == "success"
    with pytest.raises(ollama.ResponseError, match="model 'second' not found"):
        await client.generate("second", "why?")
    await client.close()


async def test_openais_client_gets_what_it_expects(url):
    openai = pytest.importorskip("openai")
    question = [{"role": "user", "content": "why?"}]
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-") as client:
        chat = await client.chat.completions.create(model=MODEL, messages=question, max_tokens=3)
        assert chat.choices[0].message.content == TEXT
        stream = await client.chat.completions.create(model=MODEL, messages=question, max_tokens=3, stream=True)
        assert "".join([chunk.choices[0].delta.content async for chunk in stream]) == TEXT
        assert (await client.completions.create(model=MODEL, prompt="why?", max_tokens=3)).choices[0].text == TEXT
        response = await client.responses.create(model=MODEL, input="why?", max_output_tokens=3)
        assert response.output_text == TEXT
        async with client.responses.stream(model=MODEL, input="why?", max_output_tokens=3) as responding:
            assert (await responding.get_final_response()).output_text == TEXT
        vectors = await client.embeddings.create(model="nomic-embed-text", input=["a", "b"])
        assert vectors.data[1].embedding == pytest.approx([0.6, 0.8])
        heard = await client.audio.transcriptions.create(model=MODEL, file=("a.wav", b"RIFF"))
        assert heard.text.startswith("word ")
        assert MODEL in [model.id async for model in client.models.list()]
        with pytest.raises(openai.NotFoundError):
            await client.responses.create(model="no-such-model", input="why?")


async def test_anthropics_client_gets_what_it_expects(url):
    anthropic = pytest.importorskip("anthropic")
    ask = {"model": MODEL, "max_tokens": 3, "messages": [{"role": "user", "content": "why?"}]}
    async with anthropic.AsyncAnthropic(base_url=url, api_key="-") as client:
        assert (await client.messages.create(**ask)).content[0].text == TEXT
        async with client.messages.stream(**ask) as stream:
            assert "".join([text async for text in stream.text_stream]) == TEXT
        with pytest.raises(anthropic.NotFoundError, match="no-such-model"):
            await client.messages.create(**ask | {"model": "no-such-model"})
