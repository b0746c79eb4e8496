"""Each route and each error of both servers, byte by byte: what a client sends arrives, and what is said to it too.

A tap between the gateway and the server keeps what passes there. So nothing has to be the same twice: the request
that the client wrote is compared with the one that the server got, and the server's answer with the client's.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import pytest_asyncio
import zstandard

from tests.gateway.stack import MODEL, Stack, stack_in, stopped
from tests.gateway.upstream import Line, Message, calling
from tests.test_end_to_end import needs_compiler
from vram_manager.simulator.comfyui_pictures import UPLOAD_LIMIT_BYTES
from vram_manager.simulator.world import txt2img

pytestmark = [pytest.mark.asyncio(loop_scope="module"), needs_compiler]

OLLAMA, COMFYUI = "ollama", "comfyui"
# RFC 9110 7.6.1; what one connection says of itself.
PER_CONNECTION = {b"connection", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade"}
OURS = {b"x-vram-manager-waited-seconds"}
MARK = b"X-Call"


@dataclass(slots=True)
class Tapped:
    """What went over one connection."""

    asked: bytearray = field(default_factory=bytearray)
    said: bytearray = field(default_factory=bytearray)


class Tap:
    """Copies bytes both ways, and keeps them."""

    def __init__(self, url: str) -> None:
        self._host, self._port = url.removeprefix("http://").split(":")
        self.connections: list[Tapped] = []
        self._tasks: set[asyncio.Task[Any]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        tapped = Tapped()
        self.connections.append(tapped)
        behind, beyond = await asyncio.open_connection(self._host, int(self._port))
        try:
            ways = [_copy(reader, beyond, tapped.asked), _copy(behind, writer, tapped.said)]
            copying = [asyncio.ensure_future(way) for way in ways]
            await asyncio.wait(copying, return_when=asyncio.FIRST_COMPLETED)
            for way in copying:
                way.cancel()
            await asyncio.gather(*copying, return_exceptions=True)
        finally:
            for end in (writer, beyond):
                end.close()
                with contextlib.suppress(ConnectionError):
                    await end.wait_closed()
            self._tasks.discard(task)

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def of(self, mark: bytes) -> Tapped:
        """The connection over which the request with that mark went."""
        (found,) = (tapped for tapped in self.connections if b"%b: %b\r\n" % (MARK, mark) in tapped.asked)
        return found


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, kept: bytearray) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(1 << 16):
            kept += data
            writer.write(data)
            await writer.drain()


def line_of(data: bytes) -> Line:
    """To be read as if it came just now."""
    reader = asyncio.StreamReader(limit=1 << 20)
    reader.feed_data(data)
    reader.feed_eof()
    return Line(reader, None)  # type: ignore[arg-type]


def end_to_end(message: Message) -> Message:
    """Without what belongs to one connection, and without what the gateway says of itself."""
    kept = tuple(header for header in message.headers if header[0].lower() not in PER_CONNECTION | OURS)
    return replace(message, headers=kept)


async def answers(line: Line, method: str) -> list[Message]:
    """The answer to one request, after all that came before it (1xx)."""
    came = [await line.answer(method)]
    while came[-1].first.split(b" ")[1].startswith(b"1"):
        came.append(await line.answer(method))
    return came


# The corpus.


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request as it is written. `chunk`: the body goes out in chunks of so many bytes."""

    server: str
    method: str
    target: str
    status: int
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()
    version: str = "1.1"
    host: str | None = None
    chunk: int = 0
    queue_full: bool = False
    """Ollama has no place for one more that waits for a load."""

    def head(self, mark: str, host: str) -> bytes:
        lines = [f"{self.method} {self.target} HTTP/{self.version}", f"Host: {self.host or host}"]
        lines += [f"{name}: {value}" for name, value in self.headers]
        if self.chunk:
            lines.append("Transfer-Encoding: chunked")
        elif self.body or self.method == "POST":
            lines.append(f"Content-Length: {len(self.body)}")
        return "\r\n".join([*lines, f"{MARK.decode()}: {mark}", "", ""]).encode()

    def framed(self) -> bytes:
        if not self.chunk:
            return self.body
        cut = [self.body[at : at + self.chunk] for at in range(0, len(self.body), self.chunk)]
        return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in cut) + b"0\r\n\r\n"

    @property
    def closes(self) -> bool:
        return self.version == "1.0" or ("Connection", "close") in self.headers


THREE_WORDS = {"num_predict": 3}
QUESTION = [{"role": "user", "content": "why?"}]
EMBEDDER = "nomic-embed-text"
JSON = (("Content-Type", "application/json"),)
BLOB = bytes(range(256)) * 1024
BLOB_NAME = f"/api/blobs/sha256:{hashlib.sha256(BLOB).hexdigest()}"


def ollama(target: str, status: int = 200, method: str = "GET", **more: Any) -> Call:
    return Call(server=OLLAMA, method=method, target=target, status=status, **more)


def comfyui(target: str, status: int = 200, method: str = "GET", **more: Any) -> Call:
    return Call(server=COMFYUI, method=method, target=target, status=status, **more)


def post(call: Any, target: str, content: Any, status: int = 200, **more: Any) -> Call:
    headers = JSON + more.pop("headers", ())
    return call(target, status, more.pop("method", "POST"), body=json.dumps(content).encode(), headers=headers, **more)


def form(**parts: bytes) -> dict[str, Any]:
    """A multipart body and the header that tells its boundary; a part that is a file is named so."""
    written = b"".join(
        b'--cut\r\nContent-Disposition: form-data; name="%b"%b\r\n\r\n%b\r\n'
        % (name.encode(), b'; filename="cat.png"' if name in {"file", "image"} else b"", content)
        for name, content in parts.items()
    )
    return {
        "method": "POST",
        "body": written + b"--cut--\r\n",
        "headers": (("Content-Type", "multipart/form-data; boundary=cut"),),
    }


def of_ollama() -> Iterator[tuple[str, Call]]:
    for target in ("/", "/api/version", "/api/status", "/api/ps", "/api/tags", "/v1/models", f"/v1/models/{MODEL}"):
        yield f"GET {target}", ollama(target)
        yield f"HEAD {target}", ollama(target, method="HEAD")
    yield "a query", ollama("/api/tags?x=%20%C3%A4&y=;&&")
    yield "an encoded path", ollama(f"/v1/models/{MODEL.replace(':', '%3a')}")
    yield "a model that OpenAI's list does not have", ollama("/v1/models/no-such-model", 404)
    yield "an unknown route", ollama("/api/nothing", 404)
    yield "a slash too many", ollama("/api/tags/", 404)
    yield "a double slash", ollama("//api/tags", 404)
    yield "the wrong method", ollama("/api/generate", 405)
    yield "another wrong method", ollama("/api/tags", 405, "PATCH", body=b"{}")
    yield (
        "headers in odd shapes",
        ollama(
            "/api/version", headers=(("x-EMPTY", ""), ("X-Twice", "1"), ("x-twice", "2"), ("X-Latin", "\xe4;=,\t\"'"))
        ),
    )


def of_ollamas_models() -> Iterator[tuple[str, Call]]:
    for verb, asked in (("generate", {"prompt": "why?"}), ("chat", {"messages": QUESTION})):
        words = {"model": MODEL, **asked, "options": THREE_WORDS}
        target = f"/api/{verb}"
        yield f"{verb} streams", post(ollama, target, words)
        yield f"{verb} in one piece", post(ollama, target, words | {"stream": False})
        yield f"{verb} in chunks of 7", post(ollama, target, words, chunk=7)
        yield f"{verb} and close", post(ollama, target, words, headers=(("Connection", "close"),))
        yield f"{verb} with HTTP/1.0", post(ollama, target, words, version="1.0")
        yield f"{verb} waits for 100-continue", post(ollama, target, words, headers=(("Expect", "100-continue"),))
        yield f"{verb} of nothing", post(ollama, target, {"model": MODEL})
        yield f"{verb} of no model", post(ollama, target, asked, 400)
        yield f"{verb} of an unknown model", post(ollama, target, words | {"model": "no-such-model"}, 404)
        yield f"{verb} by an embedder", post(ollama, target, words | {"model": EMBEDDER}, 400)
        yield f"{verb} with a bad keep_alive", post(ollama, target, words | {"keep_alive": "soon"}, 400)
        yield f"{verb} that is no JSON", ollama(target, 400, "POST", body=b'{"model":', headers=JSON)
        yield f"{verb} without a body", ollama(target, 400, "POST")
        yield f"{verb} with a chunked body of nothing", ollama(target, 400, "POST", chunk=1)
        yield f"{verb} unloads", post(ollama, target, {"model": MODEL, "keep_alive": 0})
        yield f"{verb} while the queue is full", post(ollama, target, words, 503, queue_full=True)
        yield (
            f"{verb} that does not fit",
            post(ollama, target, words | {"options": {"num_gpu": 999, "num_ctx": 131072}}, 500),
        )
    yield "embed", post(ollama, "/api/embed", {"model": EMBEDDER, "input": ["a", "b"]})
    yield "embed nothing", post(ollama, "/api/embed", {"model": EMBEDDER})
    yield "embed by an unknown model", post(ollama, "/api/embed", {"model": "no-such-model"}, 404)
    yield "embeddings", post(ollama, "/api/embeddings", {"model": EMBEDDER, "prompt": "a"})


def of_ollamas_store() -> Iterator[tuple[str, Call]]:
    yield "show", post(ollama, "/api/show", {"model": MODEL})
    yield "show an unknown model", post(ollama, "/api/show", {"model": "no-such-model"}, 404)
    yield "a blob that is not there", ollama(BLOB_NAME, 404, "HEAD")
    yield "a blob", ollama(BLOB_NAME, 201, "POST", body=BLOB, chunk=1000)
    yield "a blob that is there", ollama(BLOB_NAME, method="HEAD")
    yield "a blob that is another", ollama(f"/api/blobs/sha256-{'0' * 64}", 400, "POST", body=b"other")
    yield "a blob's wrong name", ollama("/api/blobs/x", 400, "HEAD")
    yield "create", post(ollama, "/api/create", {"model": "mine", "from": MODEL})
    yield "create of nothing", post(ollama, "/api/create", {"model": "mine", "from": "x", "stream": False}, 500)
    yield "copy", post(ollama, "/api/copy", {"source": "mine", "destination": "second"})
    yield "copy of an unknown model", post(ollama, "/api/copy", {"source": "no-such-model", "destination": "x"}, 404)
    yield "delete", post(ollama, "/api/delete", {"model": "second"}, method="DELETE")
    yield "delete of an unknown model", post(ollama, "/api/delete", {"model": "second"}, 404, method="DELETE")
    yield "pull", post(ollama, "/api/pull", {"model": MODEL})
    yield "pull in one piece", post(ollama, "/api/pull", {"model": MODEL, "stream": False})
    yield "pull of an unknown model", post(ollama, "/api/pull", {"model": "no-such-model"})


def of_ollamas_compatible_routes() -> Iterator[tuple[str, Call]]:
    compatible: dict[str, dict[str, Any]] = {
        "chat/completions": {"messages": QUESTION, "max_tokens": 3},
        "completions": {"prompt": "why?", "max_tokens": 3},
        "responses": {"input": "why?", "max_output_tokens": 3},
        "messages": {"messages": QUESTION, "max_tokens": 3},
    }
    for route, asked in compatible.items():
        target, words = f"/v1/{route}", {"model": MODEL, **asked}
        packed = zstandard.compress(json.dumps(words).encode())
        zstd = (*JSON, ("Content-Encoding", "zstd"))
        yield route, post(ollama, target, words)
        yield f"{route} streams", post(ollama, target, words | {"stream": True})
        yield f"{route} packed", ollama(target, method="POST", body=packed, headers=zstd)
        yield f"{route} packed in chunks of 3", ollama(target, method="POST", body=packed, headers=zstd, chunk=3)
        yield f"{route} packed badly", ollama(target, 400, "POST", body=b"(\xb5/\xfdnonsense", headers=zstd)
        yield f"{route} of an unknown model", post(ollama, target, words | {"model": "no-such-model"}, 404)
        yield f"{route} that is no JSON", ollama(target, 400, "POST", body=b"[", headers=JSON)
        yield f"{route} while the queue is full", post(ollama, target, words, 503, queue_full=True)
    yield "v1 embeddings", post(ollama, "/v1/embeddings", {"model": EMBEDDER, "input": ["a", "b"]})
    yield "v1 embeddings of nothing", post(ollama, "/v1/embeddings", {"model": EMBEDDER, "input": []}, 400)
    sound = form(model=MODEL.encode(), file=b"RIFF" * 10_000, response_format=b"text")
    yield "a transcription", ollama("/v1/audio/transcriptions", **sound)
    yield "a transcription in chunks", ollama("/v1/audio/transcriptions", **sound, chunk=5000)
    yield "a transcription of nothing", ollama("/v1/audio/transcriptions", 400, **form(model=MODEL.encode()))


def of_ollamas_gate() -> Iterator[tuple[str, Call]]:
    for origin, allowed in (("http://evil.example", False), ("http://localhost:3000", True), ("app://page", True)):
        headers = (("Origin", origin), ("Access-Control-Request-Method", "POST"))
        yield f"OPTIONS from {origin}", ollama("/api/chat", 204 if allowed else 403, "OPTIONS", headers=headers)
        yield f"GET from {origin}", ollama("/api/tags", 200 if allowed else 403, headers=headers[:1])
    yield "a foreign Host", ollama("/api/tags", 403, host="evil.example")
    yield "a Host of this network", ollama("/api/tags", host="box.local:1")
    yield "a foreign Host with a chat", post(ollama, "/api/chat", {"model": MODEL}, 403, host="evil.example")


def of_comfyui() -> Iterator[tuple[str, Call]]:
    paths = ("/system_stats", "/queue", "/prompt", "/history", "/history/x", "/features", "/object_info/KSampler")
    for target in ("/", *paths, *(f"/api{path}" for path in paths), "/object_info", "/experiment/models/checkpoints"):
        yield f"GET {target}", comfyui(target)
    yield "a newest one", comfyui("/api/history?max_items=1")
    yield "HEAD", comfyui("/queue", method="HEAD")
    yield "OPTIONS", comfyui("/prompt", method="OPTIONS")
    yield "HTTP/1.0", comfyui("/system_stats", version="1.0")
    yield "close", comfyui("/system_stats", headers=(("Connection", "close"),))
    yield "an unknown route", comfyui("/internal/nothing", 404)
    yield "the wrong method", comfyui("/queue", 405, "DELETE")

    for target in ("/prompt", "/api/prompt"):
        prompt = txt2img(steps=1)
        yield f"{target}", post(comfyui, target, {"prompt": prompt, "client_id": "x"})
        yield f"{target} in chunks", post(comfyui, target, {"prompt": prompt}, chunk=100)
        yield (
            f"{target} waits for 100-continue",
            post(comfyui, target, {"prompt": prompt}, headers=(("Expect", "100-continue"),)),
        )
        yield f"{target} without one", post(comfyui, target, {}, 400)
        yield f"{target} with a wrong id", post(comfyui, target, {"prompt": prompt, "prompt_id": "7"}, 400)
        yield (
            f"{target} with an unknown node",
            post(comfyui, target, {"prompt": {"1": {"class_type": "No", "inputs": {}}}}, 400),
        )
        yield f"{target} of an unknown file", post(comfyui, target, {"prompt": txt2img("no.safetensors")}, 400)
        yield f"{target} that is no JSON", comfyui(target, 500, "POST", body=b"{", headers=JSON)
        yield f"{target} without a body", comfyui(target, 500, "POST")
        yield f"{target} that is a list", post(comfyui, target, [], 500)
    yield "free", post(comfyui, "/free", {"free_memory": True})
    yield "free that is no JSON", comfyui("/free", 500, "POST", body=b"x")
    yield "interrupt", comfyui("/api/interrupt", method="POST")
    yield "delete from the queue", post(comfyui, "/queue", {"delete": ["x"], "clear": True})

    yield "an upload", comfyui("/upload/image", **form(image=BLOB, type=b"input", overwrite=b"true"))
    yield "an upload in chunks", comfyui("/api/upload/image", **form(image=BLOB), chunk=4096)
    yield "an upload of nothing", comfyui("/upload/image", 400, **form(type=b"input"))
    yield "an upload that is too large", comfyui("/upload/image", 413, **form(image=bytes(UPLOAD_LIMIT_BYTES)))
    yield "a view", comfyui("/view?filename=cat.png&type=input")
    yield "another view", comfyui("/api/view?filename=cat.png&type=input&subfolder=")
    yield "a view of nothing", comfyui("/view?filename=dog.png", 404)
    yield "a view of what must not be seen", comfyui("/view?filename=../cat.png", 400)

    for origin, status in (("http://evil.example", 403), ("http://127.0.0.1:1", 403), ("null", 200)):
        yield f"from {origin}", comfyui("/queue", status, headers=(("Origin", origin),))
    yield "from a stranger's page", comfyui("/queue", 403, headers=(("Sec-Fetch-Site", "cross-site"),))
    yield "under another name", comfyui("/queue", host="comfy.lan", headers=(("Origin", "http://evil.example"),))
    yield "a websocket's path without a websocket", comfyui("/ws", 404)


PARTS = (
    of_ollama,
    of_ollamas_models,
    of_ollamas_store,
    of_ollamas_compatible_routes,
    of_ollamas_gate,
    of_comfyui,
)
CORPUS = {f"{call.server}: {name}": call for of in PARTS for name, call in of()}


# One daemon, and a tap before each server.


@dataclass(frozen=True, slots=True, kw_only=True)
class Taps:
    stack: Stack
    by_server: dict[str, Tap]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def taps(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Taps]:
    by_server: dict[str, Tap] = {}

    def tapped(name: str) -> Any:
        @contextlib.asynccontextmanager
        async def before(url: str) -> AsyncIterator[str]:
            tap = by_server[name] = Tap(url)
            server = await asyncio.start_server(tap.serve, "127.0.0.1", 0)
            try:
                yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            finally:
                server.close()
                await tap.close()

        return before

    directory = tmp_path_factory.mktemp("stack")
    before = {"before_ollama": tapped(OLLAMA), "before_comfyui": tapped(COMFYUI)}
    async with stack_in(directory, gpu_gib=20, GATEWAY_MAX_WAIT="1", **before) as stack, stack.daemon() as daemon:
        yield Taps(stack=stack, by_server=by_server)
        assert await stopped(daemon) == 0
        assert [line for line in daemon.lines if " ERROR " in line] == []


@pytest.mark.parametrize("name", CORPUS)
async def test_a_call_and_its_answer_are_the_same_on_both_sides(taps: Taps, name: str) -> None:
    call, stack, tap = CORPUS[name], taps.stack, taps.by_server[CORPUS[name].server]
    mark = hashlib.sha256(name.encode()).hexdigest()
    port = int(getattr(stack, call.server).rpartition(":")[2])
    scheduler = stack.world.ollama.scheduler
    settings = scheduler.settings
    if call.queue_full:
        await scheduler.unload(stack.world.ollama.models[MODEL])
        scheduler.settings = replace(settings, max_queue=0)
    head, body = call.head(mark, f"127.0.0.1:{port}"), call.framed()
    async with calling(port) as client:
        client.send(head)
        came = [await client.answer()] if ("Expect", "100-continue") in call.headers else []
        client.send(body)
        came += await answers(client, call.method)
        if call.closes:
            assert await client.rest() == b""
        else:
            # The same connection serves on: nobody lost count of bytes.
            client.send(b"GET /api/version HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert int((await client.answer()).first.split()[1]) in {200, 404}
    scheduler.settings = settings

    tapped = tap.of(mark.encode())
    arrived = await line_of(bytes(tapped.asked)).request()
    said = await answers(line_of(bytes(tapped.said)), call.method)
    sent = await line_of(head + body).request()
    assert end_to_end(arrived) == end_to_end(replace(sent, first=sent.first.replace(b"HTTP/1.0", b"HTTP/1.1")))
    assert [end_to_end(message) for message in came] == [end_to_end(message) for message in said]
    assert came[-1].first.split(b" ")[1] == b"%d" % call.status
