"""A gate in the proxy: it sees a body flow past, holds a request, refuses it, and is told once how each ended."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from loguru import logger

from tests.gateway.test_proxy import GET, OK
from tests.gateway.upstream import Line, Upstream, between, calling, gateway, soon, until
from vram_manager.gateway.proxy import Head, Held, Passage, Reply

pytestmark = pytest.mark.asyncio

POST = b"POST /api/chat?a=b HTTP/1.1\r\nHost: box\r\nContent-Length: 5\r\n\r\n"
REFUSED = Reply(status=503, body=b'{"error":"full"}', headers=((b"Retry-After", b"30"),))


class Watched:
    """One request, as a gate sees it."""

    def __init__(self, gate: Recorder) -> None:
        self._gate = gate
        self.pieces: list[bytes] = []
        self.told: list[str] = []

    def look(self, piece: bytes) -> None:
        self.pieces.append(piece)

    async def may_pass(self) -> Passage | Reply:
        self.told.append("asked")
        self._gate.asked.release()
        try:
            return await self._gate.verdict()
        except asyncio.CancelledError:
            self.told.append("cancelled")
            raise

    def answered(self, status: int) -> None:
        self.told.append(str(status))

    def over(self) -> None:
        self.told.append("over")


class Recorder:
    """Watches every POST; `verdict` is what `may_pass` awaits."""

    def __init__(self, verdict: Callable[[], Awaitable[Passage | Reply]] | None = None) -> None:
        self.go = asyncio.Event()
        self.asked = asyncio.Semaphore(0)
        self.heads: list[Head] = []
        self.watched: list[Watched] = []
        self.verdict = verdict or self._when_told

    async def _when_told(self) -> Passage | Reply:
        await self.go.wait()
        return Passage(headers=((b"X-Waited", b"1 s"),))

    def watch(self, head: Head) -> Held | None:
        self.heads.append(head)
        if head.method != "POST":
            return None
        self.watched.append(Watched(self))
        return self.watched[-1]

    def unreachable(self, head: Head, why: str) -> Reply:
        return Reply(status=502, body=f"{head.path}: {why}".encode())

    @property
    def told(self) -> list[str]:
        (watched,) = self.watched
        return watched.told


async def refuse() -> Reply:
    return REFUSED


async def let() -> Passage:
    return Passage()


async def answers_all(line: Line) -> None:
    while True:
        request = await line.request()
        line.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(request.body), request.body))


async def test_a_head_says_path_and_headers() -> None:
    head = Head(method="GET", target="/a%20b?x=/y#z", headers=((b"Host", b"a"), (b"X-A", b"1"), (b"x-a", b"2")))

    assert head.path == "/a%20b"
    assert head.header(b"X-a") == b"1"
    assert head.header(b"none") is None


async def test_a_held_request_reaches_nobody_before_it_may_pass() -> None:
    gate = Recorder()
    async with between(answers_all, gate) as (client, upstream):
        client.send(POST + b"hello")
        await soon(gate.asked.acquire())
        assert upstream.lines == []
        assert gate.watched[0].pieces == [b"hello"]
        assert gate.heads[0].target == "/api/chat?a=b"
        assert gate.heads[0].path == "/api/chat"
        assert gate.heads[0].headers == ((b"Host", b"box"), (b"Content-Length", b"5"))

        gate.go.set()
        answer = await client.answer()

        assert answer.body == b"hello"
        assert answer.headers == ((b"Content-Length", b"5"), (b"X-Waited", b"1 s"))
        await until(lambda: gate.told == ["asked", "200", "over"])


async def test_a_request_without_body_is_held_too() -> None:
    gate = Recorder()
    async with between(answers_all, gate) as (client, upstream):
        client.send(POST.replace(b"5", b"0"))
        await soon(gate.asked.acquire())
        assert upstream.lines == []
        gate.go.set()
        assert (await client.answer()).first == b"HTTP/1.1 200 OK"


@pytest.mark.parametrize("chunked", [True, False])
async def test_of_a_body_in_pieces_only_the_newest_is_kept_back(chunked: bool) -> None:
    gate = Recorder()
    got: list[bytes] = []

    async def script(line: Line) -> None:
        head = await line.head()
        while len(got) < 3:
            got.append(await (line.chunk() if chunked else line.exactly(4)))
        assert not chunked or await line.chunk() == b""
        assert bool(head.all(b"transfer-encoding")) is chunked
        line.send(OK)
        await line.left()

    framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: 12"
    async with between(script, gate) as (client, upstream):
        client.send(b"POST / HTTP/1.1\r\nHost: box\r\n%b\r\n\r\n" % framing)
        for number, piece in enumerate((b"abcd", b"efgh", b"ijkl"), 1):
            client.send(b"4\r\n%b\r\n" % piece if chunked else piece)
            await until(lambda number=number: gate.watched and len(gate.watched[0].pieces) == number)
            await until(lambda number=number: len(got) == number - 1)
        client.send(b"0\r\n\r\n" if chunked else b"")
        await soon(gate.asked.acquire())
        assert got == [b"abcd", b"efgh"]

        gate.go.set()
        assert (await client.answer()).body == b"ok"
        assert got == [b"abcd", b"efgh", b"ijkl"]
        assert len(upstream.lines) == 1


async def test_where_the_client_waits_for_100_continue_the_head_goes_out_and_the_body_is_held() -> None:
    gate = Recorder()
    got: list[bytes] = []

    async def script(line: Line) -> None:
        head = await line.head()
        line.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        got.append(await line.body(head))
        line.send(OK)
        await line.left()

    async with between(script, gate) as (client, _):
        client.send(POST.replace(b"Host", b"Expect: 100-continue\r\nHost"))
        assert (await client.head()).first == b"HTTP/1.1 100 Continue"
        client.send(b"hello")
        await soon(gate.asked.acquire())
        assert got == []
        gate.go.set()
        assert (await client.answer()).body == b"ok"
        assert gate.told[:2] == ["asked", "200"]


async def test_a_refusal_is_the_gates_answer_and_the_connection_goes_on() -> None:
    gate = Recorder(refuse)
    async with between(answers_all, gate) as (client, upstream):
        for _ in range(2):
            client.send(POST + b"hello")
            answer = await client.answer()
            assert answer.first == b"HTTP/1.1 503 Service Unavailable"
            assert answer.body == REFUSED.body
            assert answer.headers[-1] == (b"Retry-After", b"30")
        client.send(GET)
        assert (await client.answer()).first == b"HTTP/1.1 200 OK"
        assert len(upstream.lines) == 1

    assert [watched.told for watched in gate.watched] == [["asked", "over"]] * 2


async def test_a_refusal_after_pieces_have_gone_ends_that_request_at_the_server() -> None:
    gate = Recorder(refuse)
    seen = []

    async def script(line: Line) -> None:
        request = await line.request()
        seen.append(request)
        line.send(OK)
        await line.left()

    async with between(script, gate) as (client, upstream):
        client.send(POST + b"he")
        await until(lambda: gate.watched and gate.watched[0].pieces)
        client.send(b"l")
        await until(lambda: upstream.lines)
        client.send(b"lo" + GET)
        assert (await client.answer()).body == REFUSED.body
        assert (await client.answer()).body == b"ok"

    assert [request.first for request in seen] == [b"GET / HTTP/1.1"]


async def test_a_client_that_leaves_cancels_the_hold() -> None:
    gate = Recorder()
    async with Upstream(answers_all) as upstream, gateway(upstream.url, gate) as proxy:
        async with calling(proxy.address[1]) as client:
            client.send(POST + b"hello")
            await soon(gate.asked.acquire())
            assert proxy.open_exchanges == 1
        await until(lambda: gate.told == ["asked", "cancelled", "over"])
        assert proxy.open_exchanges == 0
        assert upstream.lines == []


async def test_closing_cancels_a_hold() -> None:
    gate = Recorder()
    async with between(answers_all, gate) as (client, _):
        client.send(POST + b"hello")
        await soon(gate.asked.acquire())

    assert gate.told == ["asked", "cancelled", "over"]


async def test_a_connection_that_the_server_closed_during_a_hold_is_made_anew() -> None:
    gate = Recorder()
    closes = asyncio.Event()

    async def script(line: Line) -> None:
        await line.request()
        line.send(OK)
        if len(upstream.lines) == 1:
            await soon(closes.wait())
        else:
            await line.left()

    async with between(script, gate) as (client, upstream):
        client.send(GET)
        await client.answer()
        client.send(POST + b"hello")
        await soon(gate.asked.acquire())
        closes.set()
        await until(upstream.lines[0].writer.transport.is_closing)
        await soon(upstream.lines[0].left())
        gate.go.set()

        assert (await client.answer()).body == b"ok"
        assert len(upstream.lines) == 2
    assert gate.told == ["asked", "200", "over"]


async def test_the_502_is_in_the_gates_words() -> None:
    gate = Recorder(let)

    async def script(line: Line) -> None:
        await line.head()

    async with between(script, gate) as (client, upstream):
        client.send(POST + b"hello")
        answer = await client.answer()

        assert answer.body == b"/api/chat: closed without an answer (127.0.0.1:%d)" % upstream.port
    assert gate.told == ["asked", "over"]


async def answer_then_break(line: Line) -> None:
    await line.request()
    line.send(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf")


async def switches(line: Line) -> None:
    await line.request()
    line.send(b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 204 No\r\n\r\n")
    await line.left()


async def answers_early(line: Line) -> None:
    await line.head()
    line.send(b"HTTP/1.1 400 Bad\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
    await line.left()


@pytest.mark.parametrize(
    ("script", "request_bytes", "told"),
    [
        (answers_all, POST + b"hello", ["asked", "200", "over"]),
        (switches, POST + b"hello", ["asked", "204", "over"]),
        (answer_then_break, POST + b"hello", ["asked", "200", "over"]),
        (answers_early, POST.replace(b"Host", b"Expect: 100-continue\r\nHost"), ["400", "over"]),
        (answers_all, POST.replace(b"Content-Length: 5", b"Transfer-Encoding: chunked") + b"1\r\n", ["over"]),
        (answers_all, POST + b"hel", ["over"]),
    ],
    ids=["answered", "hints first", "broken off", "answered early", "malformed later", "half sent"],
)
async def test_each_way_to_end_is_told_once(
    script: Callable[[Line], Awaitable[None]], request_bytes: bytes, told: list[str]
) -> None:
    gate = Recorder(let)
    async with Upstream(script) as upstream, gateway(upstream.url, gate) as proxy:
        async with calling(proxy.address[1]) as client:
            client.send(request_bytes)
            await until(lambda: gate.watched)
            if b"chunked" in request_bytes:
                client.send(b"nonsense")
                assert (await client.head()).first == b"HTTP/1.1 400 Bad Request"
            if told[0] != "over":
                head = await client.head()
                while head.first.startswith(b"HTTP/1.1 1"):
                    head = await client.head()
                if script is answers_all:
                    await client.body(head, answer_to="POST")
        await until(lambda: proxy.open_exchanges == 0)
        await until(lambda: not proxy._common.connections)
        assert gate.told == told


async def test_a_websocket_that_is_watched_is_answered_with_101_and_over_with_its_tunnel() -> None:
    class All(Recorder):
        def watch(self, head: Head) -> Held:
            self.watched.append(Watched(self))
            return self.watched[-1]

    async def script(line: Line) -> None:
        await line.request()
        line.send(b"HTTP/1.1 101 S\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")
        await line.left()

    gate = All()
    async with Upstream(script) as upstream, gateway(upstream.url, gate) as proxy:
        async with calling(proxy.address[1]) as client:
            client.send(b"GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")
            await soon(gate.asked.acquire())
            gate.go.set()
            assert (await client.head()).all(b"x-waited") == [b"1 s"]
            assert gate.told == ["asked", "101"]
        await until(lambda: gate.told == ["asked", "101", "over"])


def fails(*_: object) -> Passage:
    raise ValueError("a bug in the gate")


async def fails_later() -> Passage:
    raise ValueError("a bug in the gate")


async def injects() -> Passage:
    return Passage(headers=((b"X-Model", b"a\r\nSet-Cookie: evil"),))


async def nothing() -> Passage:
    return None  # type: ignore[return-value]


async def gives_up() -> Passage:
    raise asyncio.CancelledError


@pytest.mark.parametrize("part", ["watch", "look", "answered", "over", "may_pass", "injects", "nothing", "gives up"])
async def test_a_gate_that_fails_leaves_a_plain_proxy(part: str) -> None:
    told: list[str] = []
    sink = logger.add(told.append, level="ERROR", format="{message}")
    verdicts = {"may_pass": fails_later, "injects": injects, "nothing": nothing, "gives up": gives_up}
    gate = Recorder(verdicts.get(part, let))

    class Broken(Watched):
        pass

    if part in {"look", "answered", "over"}:
        setattr(Broken, part, fails)
    watch = gate.watch
    if part == "watch":
        gate.watch = fails  # type: ignore[assignment,method-assign]
    elif part not in verdicts:

        def watch_with(head: Head) -> Held | None:
            watch(head)
            gate.watched[-1] = Broken(gate)
            return gate.watched[-1]

        gate.watch = watch_with  # type: ignore[method-assign]

    async with Upstream(answers_all) as upstream, gateway(upstream.url, gate) as proxy:
        async with calling(proxy.address[1]) as client:
            for _ in range(3):
                client.send(POST + b"he")
                client.send(b"llo")
                answer = await client.answer()
                assert answer.headers == ((b"Content-Length", b"5"),)
                assert answer.body == b"hello"
        await until(lambda: proxy.open_exchanges == 0)
    logger.remove(sink)

    # Once a minute, however often it fails; to give up is no bug.
    assert len(told) == (part != "gives up")
    if part not in {"watch", "over"}:
        assert [watched.told.count("over") for watched in gate.watched] == [1, 1, 1]


@pytest.mark.parametrize("reply", [None, Reply(status=502, body=b"", headers=((b"A", b"b\nc"),))])
async def test_a_gate_that_cannot_word_the_502_leaves_ours(reply: Reply | None) -> None:
    gate = Recorder()
    gate.unreachable = lambda head, why: reply  # type: ignore[assignment,method-assign,return-value]
    sink = logger.add(lambda _: None, level="ERROR")
    async with gateway("http://127.0.0.1:1", gate) as proxy, calling(proxy.address[1]) as client:
        client.send(GET)
        assert (await client.answer()).body == b'{"error": "connection refused (127.0.0.1:1)"}'
    logger.remove(sink)
