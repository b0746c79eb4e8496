"""A real daemon's gateways in bad times: it is killed, clients leave, servers go away, hundreds come at once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import resource
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import anthropic
import httpx
import ollama
import openai
import pytest
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tests.gateway.stack import MODEL, Stack, Watched, http_client, stack_in, stopped, until
from tests.gateway.upstream import calling
from tests.test_admission_end_to_end import killed
from tests.test_end_to_end import free_ports, needs_compiler
from vram_manager.simulator.serve import serving
from vram_manager.simulator.world import txt2img

pytestmark = [pytest.mark.asyncio, needs_compiler]

MIB = 2**20
Wrapped = TypeVar("Wrapped", bound=ASGIApp)
ENDLESS = 1_000_000


def asked(who: str, words: int = 3, **more: Any) -> dict[str, Any]:
    """The arguments of a POST that makes Ollama say so many words to `who`."""
    body = {"model": MODEL, "prompt": "why?", "options": {"num_predict": words}, **more}
    return {"json": body, "headers": {"X-Request-Id": who}}


async def said(http: httpx.AsyncClient, who: str, words: int = 3, **more: Any) -> str:
    """A whole answer."""
    reply = await http.post("/api/generate", **asked(who, words, stream=False, **more))
    return reply.raise_for_status().json()["response"]


@contextlib.asynccontextmanager
async def streaming(url: str, who: str, words: int, **more: Any) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
    """The parts of an answer as they come; the client leaves with the block. The first ones have come."""
    async with http_client(url) as http, http.stream("POST", "/api/generate", **asked(who, words, **more)) as reply:
        assert reply.status_code == 200
        parts = (json.loads(line) async for line in reply.aiter_lines())
        while not (await anext(parts))["response"]:
            pass
        yield parts


@contextlib.asynccontextmanager
async def crowded(stack: Stack) -> AsyncIterator[None]:
    """Another model has most of 14 GiB and is in use: whoever asks for `MODEL` has to wait."""
    stack.world.ollama.work.gpu_tokens_per_second = 100
    async with streaming(stack.ollama, "neighbour", ENDLESS, model="qwen3:14b"):
        yield


def rss_bytes(pid: int) -> int:
    kib = re.search(r"^VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert kib is not None
    return int(kib[1]) * 1024


# The daemon ends.


async def test_a_daemon_that_is_killed_loses_the_stream_and_nothing_else(tmp_path: Path) -> None:
    async with stack_in(tmp_path, gpu_gib=48) as stack, http_client(stack.comfyui) as comfyui:
        stack.world.ollama.work.gpu_tokens_per_second = 100
        async with stack.daemon() as first:
            body = {"prompt": txt2img(steps=50)}
            prompt_id = (await comfyui.post("/prompt", json=body)).raise_for_status().json()["prompt_id"]
            async with streaming(stack.ollama, "victim", ENDLESS) as parts:
                runner = stack.runner()
                assert runner is not None
                assert runner.users == 1
                await killed(first.process)
                with pytest.raises(httpx.TransportError):
                    async for _ in parts:
                        pass
            # Nobody generates for a client that is gone.
            await until(lambda: runner.users == 0)
        async with stack.daemon(), http_client(stack.ollama) as http:
            assert await said(http, "next") == "word word word "
            history = stack.world.comfyui.queue.history
            await until(lambda: prompt_id in history)
            assert history[prompt_id]["status"]["completed"]
            assert prompt_id in (await http_get(stack.comfyui, f"/history/{prompt_id}"))


async def http_get(url: str, path: str) -> Any:
    async with http_client(url) as http:
        return (await http.get(path)).raise_for_status().json()


async def test_a_daemon_that_is_stopped_lets_a_stream_end_and_takes_no_new_ones(tmp_path: Path) -> None:
    async with stack_in(tmp_path) as stack:
        stack.world.ollama.work.gpu_tokens_per_second = 40
        async with stack.daemon() as daemon, streaming(stack.ollama, "last", 40) as parts:
            daemon.process.terminate()
            await daemon.line("Stopping")
            heard = [part async for part in parts]
            assert await stopped(daemon) == 0
        with pytest.raises(httpx.ConnectError):
            await http_get(stack.ollama, "/api/version")

    assert heard[-1]["done"]
    assert heard[-1]["eval_count"] == 40
    assert sum(part["response"] == "word " for part in heard) == 39


@pytest.mark.parametrize(
    ("path", "key"),
    [("/v1/snapshot", "held"), ("/v1/leases", "line")],
    ids=["who has only just come", "who is in line"],
)
async def test_a_daemon_that_is_stopped_lets_go_on(tmp_path: Path, path: str, key: str) -> None:
    async with stack_in(tmp_path, gpu_gib=14) as stack, stack.daemon() as daemon, http_client(stack.ollama) as http:
        async with crowded(stack):
            held = asyncio.create_task(said(http, "patient"))
            await stack.told(path, lambda body: body[key])
            daemon.process.terminate()
            await daemon.line("Stopping")
        assert await held == "word word word "
        assert await stopped(daemon) == 0


def kept(app: Wrapped, apps: list[Wrapped]) -> Wrapped:
    """For the test, too."""
    apps.append(app)
    return app


# Clients leave.


async def test_a_client_that_leaves_while_it_is_held_leaves_nothing_and_the_others_keep_their_place(
    tmp_path: Path,
) -> None:
    async with stack_in(tmp_path, gpu_gib=14) as stack, stack.daemon(), http_client(stack.ollama) as http:
        async with crowded(stack):
            calls = [asyncio.create_task(said(http, who)) for who in ("leaves", "stays")]
            await stack.told("/v1/snapshot", lambda body: len(body["held"]) == 2)
            calls[0].cancel()
            await stack.told("/v1/snapshot", lambda body: len(body["held"]) == 1)
            assert [ask.request_id for ask in stack.world.ollama.asked] == ["neighbour"]
        assert await calls[1] == "word word word "
        await asyncio.gather(*calls, return_exceptions=True)

    assert [served.request_id for served in stack.world.ollama.served] == ["neighbour", "stays"]
    assert stack.world.ollama.counters.loads_with_cpu_layers == 0


async def test_a_client_that_leaves_while_its_model_loads_ends_the_load_and_the_next_one_loads_it(
    tmp_path: Path,
) -> None:
    watched: list[Watched] = []
    async with (
        stack_in(tmp_path, ollama=lambda app: kept(Watched(app), watched)) as stack,
        stack.daemon(),
        http_client(stack.ollama) as http,
    ):
        stack.world.ollama.scheduler.hang = True
        calls = [asyncio.create_task(said(http, who)) for who in ("leaves", "stays")]
        await until(lambda: watched[0].active >= {"leaves", "stays"})
        calls[0].cancel()
        await until(lambda: "leaves" not in watched[0].active)
        assert "stays" in watched[0].active
        stack.world.ollama.scheduler.hang = False
        assert await calls[1] == "word word word "
        await asyncio.gather(*calls, return_exceptions=True)

    assert [served.request_id for served in stack.world.ollama.served] == ["stays"]


async def test_a_client_that_leaves_a_stream_ends_its_generation_and_no_other(tmp_path: Path) -> None:
    watched: list[Watched] = []
    async with (
        stack_in(tmp_path, ollama=lambda app: kept(Watched(app), watched)) as stack,
        stack.daemon(),
        http_client(stack.ollama) as http,
    ):
        stack.world.ollama.work.gpu_tokens_per_second = 200
        await said(http, "first")
        runner = stack.runner()
        assert runner is not None
        # OLLAMA_NUM_PARALLEL: both are served at the same time.
        runner.slot = asyncio.Semaphore(2)  # type: ignore[assignment]
        async with streaming(stack.ollama, "stays", 100) as stays:
            async with streaming(stack.ollama, "leaves", ENDLESS):
                assert watched[0].active >= {"leaves", "stays"}
            await until(lambda: "leaves" not in watched[0].active)
            assert "stays" in watched[0].active
            heard = [part async for part in stays]
        await until(lambda: runner.users == 0)
        assert heard[-1]["eval_count"] == 100
        assert await said(http, "next") == "word word word "


# Many at once.

STREAMS = 500
STALLED = 50


class Marked:
    """Ollama's words to each client are its own name, and no first word comes before `together` have asked."""

    def __init__(self, app: ASGIApp, together: int) -> None:
        self._app = app
        self._together = together
        self._all_here = asyncio.Event()
        self.here = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        mark = Headers(scope=scope).get("x-mark")

        async def marked(message: Message) -> None:
            assert mark is not None
            if message["type"] == "http.response.start":
                await send(message)
                self.here += 1
                if self.here == self._together:
                    self._all_here.set()
                await self._all_here.wait()
            else:
                await send(message | {"body": message["body"].replace(b"word ", mark.encode() + b" ")})

        await self._app(scope, receive, send if mark is None else marked)


@contextlib.contextmanager
def descriptors(soft: int) -> Iterator[None]:
    """So many files may be open in this process, and in those it starts meanwhile at first."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


async def marked_words(port: int, mark: str) -> list[str]:
    async with calling(port) as line:
        body = json.dumps({"model": MODEL, "prompt": "why?", "options": {"num_predict": 5}}).encode()
        head = (
            f"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nX-Mark: {mark}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        line.send(head.encode() + body)
        answer = await line.answer()
    parts = [json.loads(part) for part in answer.body.splitlines()]
    assert parts[-1]["done"]
    return [part["response"] for part in parts if part["response"]]


async def test_five_hundred_streams_at_once_are_all_whole_and_each_its_own(tmp_path: Path) -> None:
    apps: list[Marked] = []
    marked = stack_in(tmp_path, ollama=lambda app: kept(Marked(app, STREAMS), apps))
    async with marked as stack, contextlib.AsyncExitStack() as daemons:
        # As systemd and a shell start it: fewer than two for each stream.
        with descriptors(512):
            await daemons.enter_async_context(stack.daemon())
        async with http_client(stack.ollama) as http:
            await said(http, "first")
            runner = stack.runner()
            assert runner is not None
            runner.slot = asyncio.Semaphore(STREAMS)  # type: ignore[assignment]
            port = int(stack.ollama.rpartition(":")[2])
            with descriptors(min(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1])):
                heard = await asyncio.gather(*(marked_words(port, f"m{number}") for number in range(STREAMS)))
                assert await said(http, "next") == "word word word "

    assert apps[0].here == STREAMS
    assert heard == [[f"m{number} "] * 5 for number in range(STREAMS)]


class Large:
    """Answers GET /large with much more than all buffers on the way take, and counts what it got rid of."""

    PIECE = bytes(range(256)) * 256
    PIECES = 4096

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.pieces = self.active = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get("path") != "/large":
            await self._app(scope, receive, send)
            return
        self.active += 1
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for number in range(self.PIECES):
                await send({"type": "http.response.body", "body": self.PIECE, "more_body": number + 1 < self.PIECES})
                self.pieces += 1
        finally:
            self.active -= 1


async def standing_still(count: Callable[[], int]) -> None:
    """Returns when `count` has not changed for some hundred turns of the loop."""
    last, same = count(), 0
    async with asyncio.timeout(60):
        while same < 100:
            await asyncio.sleep(0.005)
            last, same = (count(), same + 1) if count() == last else (count(), 0)


async def test_readers_that_stall_do_not_fill_the_daemons_memory(tmp_path: Path) -> None:
    apps: list[Large] = []
    async with stack_in(tmp_path, ollama=lambda app: kept(Large(app), apps)) as stack, stack.daemon() as daemon:
        port, pid = int(stack.ollama.rpartition(":")[2]), daemon.process.pid
        await stack.told("/v1/snapshot", lambda body: body["ollama"])
        before = rss_bytes(pid)
        async with contextlib.AsyncExitStack() as clients:
            lines = [await clients.enter_async_context(calling(port)) for _ in range(STALLED)]
            for line in lines:
                line.send(b"GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await until(lambda: apps[0].active == STALLED)
            await standing_still(lambda: apps[0].pieces)
            during = rss_bytes(pid)
            assert apps[0].active == STALLED
            # One of them wakes up, and has lost nothing.
            head, heard = await lines[0].head(), bytearray()
            while len(heard) < 16 * MIB:
                heard += await lines[0].chunk()
            assert head.first == b"HTTP/1.1 200 OK"
            assert heard == (Large.PIECE * Large.PIECES)[: len(heard)]
            for line in lines:
                line.break_off()
        await until(lambda: apps[0].active == 0)
        async with http_client(stack.ollama) as http:
            assert await said(http, "next") == "word word word "
        after = rss_bytes(pid)

    assert during - before < 30 * MIB
    assert after - before < 30 * MIB


# Nobody decides, or somebody does so wrongly: a plain proxy is left.


class Garbage:
    """Answers nonsense at `paths`, where an arbiter looks for facts; the rest is Ollama."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.paths = {"/api/show", "/api/ps", "/api/tags", "/api/version"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get("path") in self.paths:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b'{"models": [[]], "model_info": 7, "details": "\xff'})
        else:
            await self._app(scope, receive, send)


async def test_calls_pass_where_ollama_tells_nonsense_of_its_models(tmp_path: Path) -> None:
    apps: list[Garbage] = []
    async with (
        # A call that waited for its time would never end here.
        stack_in(tmp_path, ollama=lambda app: kept(Garbage(app), apps), GATEWAY_MAX_WAIT="3600") as stack,
        stack.daemon() as daemon,
        http_client(stack.ollama) as http,
    ):
        assert [await said(http, who) for who in ("one", "two")] == ["word word word "] * 2
        for path in sorted(apps[0].paths):
            apps[0].paths = {path}
            await http.post("/api/generate", json={"model": MODEL, "keep_alive": 0})
            await until(lambda: stack.runner() is None)
            assert [await said(http, who) for who in ("one", "two")] == ["word word word "] * 2
        assert await stopped(daemon) == 0


async def test_calls_pass_where_nvml_hangs(tmp_path: Path) -> None:
    settings = {"GATEWAY_MAX_WAIT": "3600", "VRAM_CHECK_TIMEOUT_SECONDS": "1"}
    async with stack_in(tmp_path, gpu_gib=48, **settings) as stack:
        nvml = stack.nvml()
        nvml.hang_ms = 1_000_000
        async with stack.daemon() as daemon:
            await until(lambda: nvml.hanging)
            assert await both_serve(stack) == ("word word word ", 200)
            nvml.hang_ms = 0
            await daemon.line("can be read: GPU 0")
            assert await both_serve(stack) == ("word word word ", 200)
            nvml.hang_ms = 1_000_000
            await until(lambda: nvml.hanging)
            assert await both_serve(stack) == ("word word word ", 200)
            nvml.hang_ms = 0
            assert await stopped(daemon) == 0


async def both_serve(stack: Stack) -> tuple[str, int]:
    """A call of each gateway."""
    async with http_client(stack.ollama) as http, http_client(stack.comfyui) as comfyui:
        words = await said(http, "one")
        prompted = await comfyui.post("/prompt", json={"prompt": txt2img(steps=1)})
        return words, prompted.status_code


async def test_calls_pass_where_there_is_no_gpu_and_no_state_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    nothing = {"FAKE_NVML_STATE": str(tmp_path / "none"), "VRAM_STATE_DIR": str(tmp_path / "file" / "state")}
    async with stack_in(tmp_path, gpu_gib=48, GATEWAY_MAX_WAIT="3600") as stack, stack.daemon(**nothing) as daemon:
        assert await both_serve(stack) == ("word word word ", 200)
        assert await stopped(daemon) == 0


# A server that is not there.


@contextlib.asynccontextmanager
async def nobody_at(url: str) -> AsyncIterator[str]:
    """Instead of the server's: an address at which nobody listens."""
    yield f"http://127.0.0.1:{free_ports(1)[0]}"


async def test_a_server_that_is_down_is_a_502_in_its_own_words_and_works_when_it_is_back(tmp_path: Path) -> None:
    question: Any = [{"role": "user", "content": "why?"}]
    async with (
        stack_in(tmp_path, gpu_gib=48, before_ollama=nobody_at, before_comfyui=nobody_at) as stack,
        stack.daemon(),
        http_client(stack.comfyui) as comfyui,
        openai.AsyncOpenAI(base_url=f"{stack.ollama}/v1", api_key="-", max_retries=0) as openais,
        anthropic.AsyncAnthropic(base_url=stack.ollama, api_key="-", max_retries=0) as anthropics,
    ):
        ollamas = ollama.AsyncClient(stack.ollama, trust_env=False)
        with pytest.raises(ollama.ResponseError, match="Ollama cannot be reached: connection refused") as native:
            await ollamas.chat(MODEL, question)
        with pytest.raises(ollama.ResponseError, match="Ollama cannot be reached: connection refused"):
            await ollamas.show(MODEL)
        with pytest.raises(openai.InternalServerError, match="Ollama cannot be reached") as v1:
            await openais.chat.completions.create(model=MODEL, messages=question)
        with pytest.raises(anthropic.InternalServerError, match="Ollama cannot be reached") as messages:
            await anthropics.messages.create(model=MODEL, max_tokens=3, messages=question)
        prompted = await comfyui.post("/prompt", json={"prompt": txt2img(steps=1)})

        assert native.value.status_code == v1.value.status_code == messages.value.status_code == 502
        assert isinstance(v1.value.body, dict)
        assert v1.value.body | {"message": ""} == {"message": "", "type": "api_error", "param": None, "code": None}
        assert isinstance(messages.value.body, dict)
        assert (messages.value.body["type"], messages.value.body["error"]["type"]) == ("error", "api_error")
        assert prompted.status_code == 502
        assert prompted.json()["error"]["type"] == "comfyui_unreachable"
        assert prompted.json()["node_errors"] == {}

        world = stack.world
        ports = {name: int(url.rpartition(":")[2]) for name, url in stack.direct.items()}
        # Each without the other one.
        async with serving(world.ollama.app, port=ports["ollama"]):
            assert (await ollamas.chat(MODEL, question, options={"num_predict": 3})).message.content
        async with serving(world.comfyui.app, port=ports["comfyui"]):
            assert (await comfyui.post("/prompt", json={"prompt": txt2img(steps=1)})).status_code == 200
        with pytest.raises(ollama.ResponseError, match="Ollama cannot be reached"):
            await ollamas.chat(MODEL, question)
        await ollamas.close()


# Where it listens.


async def test_a_port_that_is_taken_is_2_and_one_line_that_names_it(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        names = ("GATEWAY_OLLAMA_PORT", "GATEWAY_COMFYUI_PORT")
        for name in names:
            (tmp_path / name).mkdir()
        ended = await asyncio.gather(*(refused_start(tmp_path / name, {name: port}) for name in names))

    assert [status for status, _ in ended] == [2, 2]
    for name, (_, problem) in zip(names, ended, strict=True):
        assert problem.count("\n") == 1
        assert f"{name}={port}" in problem
        assert not (tmp_path / name / "vram.sock").exists()


async def refused_start(directory: Path, settings: dict[str, str]) -> tuple[int | None, str]:
    """The exit status of a daemon that does not come up, and what it says of it."""
    own = {"VRAM_SOCKET": str(directory / "vram.sock"), "VRAM_STATE_DIR": str(directory / "state")}
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "vram_manager", "run"),
        env={**os.environ, **own, **settings},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    _, problem = await child.communicate()
    return child.returncode, problem.decode()


async def test_from_other_machines_it_is_reached_by_any_name_and_a_strangers_page_is_not_let_in(tmp_path: Path) -> None:
    async with stack_in(tmp_path, GATEWAY_HOST="0.0.0.0") as stack, stack.daemon(), http_client(stack.ollama) as http:
        named = await http.get("/api/tags", headers={"Host": "gpu-box:11435"})
        page = await http.get("/api/tags", headers={"Host": "gpu-box:11435", "Origin": "http://gpu-box:11435"})
        foreign = await http.get("/api/tags", headers={"Host": "gpu-box:11435", "Origin": "http://evil.example"})

    assert (named.status_code, page.status_code, foreign.status_code) == (200, 200, 403)


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
async def test_it_listens_on_ipv6_too(tmp_path: Path) -> None:
    async with (
        stack_in(tmp_path, GATEWAY_HOST="::1") as stack,
        stack.daemon(),
        http_client(stack.ollama.replace("127.0.0.1", "[::1]")) as http,
    ):
        assert await said(http, "one") == "word word word "
