"""The plain proxy: what comes out at one end is what went in at the other."""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.gateway.upstream import Line, Message, Upstream, between, calling, gateway, soon, until
from vram_manager.errors import SettingsError
from vram_manager.gateway.head import Address
from vram_manager.gateway.proxy import PlainGate, Proxy

pytestmark = pytest.mark.asyncio

PER_CONNECTION = {
    b"connection",
    b"keep-alive",
    b"proxy-authenticate",
    b"proxy-authorization",
    b"proxy-connection",
    b"te",
    b"trailer",
    b"transfer-encoding",
    b"upgrade",
}
GET = b"GET / HTTP/1.1\r\nHost: box:1\r\n\r\n"
CHUNKED = b"POST /u HTTP/1.1\r\nHost: box\r\nTransfer-Encoding: chunked\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One call: what the client sends, what the server answers, and whether it closes then."""

    request: bytes
    answer: bytes
    answers: int = 1
    closes: bool = False

    @property
    def method(self) -> str:
        return self.request.split(b" ", 1)[0].decode()


CORPUS = {
    "content-length": Case(
        request=b"POST /api/chat?x=%20y&z HTTP/1.1\r\nhost: box:1\r\nCONTENT-length: 5\r\n"
        b"x-Odd_Case.1: a  b\t\r\n\r\nhello",
        answer=b"HTTP/1.1 200 Quite Fine\r\nX-ODD: 1\r\ncontent-LENGTH: 3\r\nx-odd: 2\r\n\r\n\x00\xff\n",
    ),
    "chunked both ways": Case(
        request=CHUNKED + b"3;ext=1\r\nabc\r\nA\r\n0123456789\r\n0\r\n\r\n",
        answer=b"HTTP/1.1 201 Created\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nwiki\r\n0\r\n\r\n",
    ),
    "trailers are for one connection": Case(
        request=CHUNKED + b"1\r\na\r\n0\r\nX: 1\r\n\r\n",
        answer=b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nwiki\r\n0\r\nY: 2\r\n\r\n",
    ),
    "ends with the connection": Case(request=GET, answer=b"HTTP/1.1 200 OK\r\nA: b\r\n\r\nto the end", closes=True),
    "an old server": Case(request=GET, answer=b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n", closes=True),
    "head": Case(
        request=b"HEAD /api/tags HTTP/1.1\r\nHost: box\r\n\r\n",
        answer=b"HTTP/1.1 200 OK\r\nContent-Length: 1234\r\nX: y\r\n\r\n",
    ),
    "head of a stream": Case(
        request=b"HEAD / HTTP/1.1\r\nHost: box\r\n\r\n",
        answer=b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
    ),
    "head without a length": Case(request=b"HEAD / HTTP/1.1\r\nHost: box\r\n\r\n", answer=b"HTTP/1.1 404 Gone\r\n\r\n"),
    "204": Case(request=b"DELETE /x HTTP/1.1\r\nHost: box\r\n\r\n", answer=b"HTTP/1.1 204 No Content\r\nA: b\r\n\r\n"),
    "304 with a length": Case(
        request=GET, answer=b'HTTP/1.1 304 Not Modified\r\nETag: "x"\r\nContent-Length: 77\r\n\r\n'
    ),
    "cookies": Case(
        request=b"GET / HTTP/1.1\r\nHost: box\r\nCookie: a=b\r\nCookie: c=d\r\n\r\n",
        answer=b"HTTP/1.1 200 OK\r\nSet-Cookie: a=1\r\nX: y\r\nSet-Cookie: b=2\r\nContent-Length: 0\r\n\r\n",
    ),
    "early hints": Case(
        request=GET,
        answer=b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n" + OK,
        answers=3,
    ),
    "bytes that are no ascii": Case(
        request=b"GET /view?filename=%C3%A4 HTTP/1.1\r\nHost: box\r\nX: \xc3\xa4\r\n\r\n",
        answer=b'HTTP/1.1 200 \xc3\xa4\r\nContent-Disposition: filename="\xc3\xa4.png"\r\nX-Empty:\r\n'
        b"Content-Length: 0\r\n\r\n",
    ),
    "no reason": Case(request=GET, answer=b"HTTP/1.1 299 \r\nContent-Length: 0\r\n\r\n"),
    "options of the server": Case(request=b"OPTIONS * HTTP/1.1\r\nHost: box\r\n\r\n", answer=OK),
    "an odd code": Case(request=GET, answer=b"HTTP/1.1 799 Odd\r\nContent-Length: 1\r\n\r\nx"),
}


def end_to_end(message: Message) -> Message:
    """Without what belongs to one connection, and without white space around a value, which says nothing."""
    named = {token.strip().lower() for value in message.all(b"connection") for token in value.split(b",")}
    dropped = PER_CONNECTION | named
    kept = tuple((name, value.strip()) for name, value in message.headers if name.lower() not in dropped)
    return Message(first=message.first, headers=kept, body=message.body)


async def answers(case: Case, port: int) -> list[Message]:
    async with calling(port) as client:
        client.send(case.request)
        return [end_to_end(await client.answer(case.method)) for _ in range(case.answers)]


@pytest.mark.parametrize("name", CORPUS)
async def test_a_call_through_the_gateway_is_the_call_itself(name: str) -> None:
    case, seen = CORPUS[name], []

    async def script(line: Line) -> None:
        seen.append(end_to_end(await line.request()))
        line.send(case.answer)
        if not case.closes:
            await line.left()

    async with Upstream(script) as upstream, gateway(upstream.url) as proxy:
        direct = await answers(case, upstream.port)
        through = await answers(case, proxy.address[1])

    assert through == direct
    assert seen[1] == seen[0]


async def test_an_http_1_0_client_gets_bytes_and_an_end() -> None:
    async def script(line: Line) -> None:
        seen.append(await line.request())
        line.send(
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"
        )
        await line.left()

    seen: list[Message] = []
    async with between(script) as (client, upstream):
        client.send(b"GET / HTTP/1.0\r\n\r\n")
        answer = await client.rest()

        assert answer == b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nok"
        assert seen[0].all(b"host") == [f"127.0.0.1:{upstream.port}".encode()]


async def test_a_client_that_waits_for_100_continue_gets_the_servers() -> None:
    async def script(line: Line) -> None:
        head = await line.head()
        line.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await line.body(head)
        line.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        await line.left()

    async with between(script) as (client, _):
        client.send(b"POST / HTTP/1.1\r\nHost: box\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n")
        assert (await client.head()).first == b"HTTP/1.1 100 Continue"
        client.send(b"body")

        assert (await client.answer()).body == b"body"


async def test_a_connection_serves_request_after_request_over_one_upstream_connection() -> None:
    async def script(line: Line) -> None:
        while True:
            request = await line.request()
            line.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(request.first), request.first))

    async with between(script) as (client, upstream):
        for number in range(20):
            client.send(b"POST /%d HTTP/1.1\r\nHost: box\r\nContent-Length: 3\r\n\r\nabc" % number)
            assert (await client.answer()).body == b"POST /%d HTTP/1.1" % number

        assert len(upstream.lines) == 1


async def test_pipelined_requests_are_answered_in_order_and_one_at_a_time() -> None:
    open_now = []

    async def script(line: Line) -> None:
        while True:
            request = await line.request()
            open_now.append(line.reader._buffer[:])  # type: ignore[attr-defined]
            line.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(request.body), request.body))

    async with between(script) as (client, _):
        first = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n0\r\n0\r\nTrailing: x\r\n\r\n"
        client.send(
            first + b"".join(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\n%d" % n for n in range(1, 9))
        )

        assert [(await client.answer()).body for _ in range(9)] == [b"%d" % n for n in range(9)]
        assert open_now == [b""] * 9


async def test_connection_close_of_the_client_reaches_the_server() -> None:
    async def script(line: Line) -> None:
        assert (await line.request()).all(b"connection") == [b"close"]
        line.send(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok")

    async with between(script) as (client, _):
        client.send(b"GET / HTTP/1.1\r\nHost: box\r\nConnection: close\r\n\r\n")

        assert await client.rest() == b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"


async def test_what_connection_names_stays_behind_but_never_the_length() -> None:
    async def script(line: Line) -> None:
        seen.append(await line.request())
        line.send(
            b"HTTP/1.1 200 OK\r\nConnection: X-Hop\r\nX-Hop: 1\r\nKeep-Alive: timeout=5\r\nContent-Length: 0\r\n\r\n"
        )
        await line.left()

    seen: list[Message] = []
    async with between(script) as (client, _):
        client.send(
            b"POST / HTTP/1.1\r\nHost: box\r\nConnection: keep-alive, X-Mine, Content-Length\r\nX-Mine: 1\r\n"
            b"Proxy-Authorization: secret\r\nTE: trailers\r\nContent-Length: 1\r\n\r\nx"
        )
        answer = await client.answer()

    assert seen == [
        Message(first=b"POST / HTTP/1.1", headers=((b"Host", b"box"), (b"Content-Length", b"1")), body=b"x")
    ]
    assert answer.headers == ((b"Content-Length", b"0"),)


async def test_an_upgrade_to_http2_is_not_offered_on_and_its_body_is_kept() -> None:
    async def script(line: Line) -> None:
        while True:
            request = await line.request()
            assert not request.all(b"upgrade")
            assert not request.all(b"http2-settings")
            line.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(request.body), request.body))

    head = (
        b"POST / HTTP/1.1\r\nHost: a\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\nConnection: Upgrade, HTTP2-Settings\r\n"
    )
    async with between(script) as (client, _):
        client.send(head + b"Content-Length: 5\r\n\r\nhello")
        assert (await client.answer()).body == b"hello"
        client.send(head + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
        client.send(b"2\r\nde\r\n0\r\n\r\n" + head + b"\r\n" + head + b"Content-Length: 1\r\n\r\nx")
        assert [(await client.answer()).body for _ in range(3)] == [b"abcde", b"", b"x"]


async def test_a_whole_url_as_target_becomes_its_path_and_host() -> None:
    async def script(line: Line) -> None:
        seen.append(await line.request())
        line.send(OK)
        await line.left()

    seen: list[Message] = []
    async with between(script) as (client, _):
        client.send(b"GET http://me:pw@other:2/api/chat?x HTTP/1.1\r\nhost: box\r\nA: b\r\n\r\n")
        await client.answer()

    assert seen == [Message(first=b"GET /api/chat?x HTTP/1.1", headers=((b"Host", b"other:2"), (b"A", b"b")))]


async def test_a_path_of_the_upstreams_url_goes_before_each_target() -> None:
    async def script(line: Line) -> None:
        seen.append((await line.request()).first)
        line.send(OK)
        await line.left()

    seen: list[bytes] = []
    async with (
        Upstream(script) as upstream,
        gateway(f"{upstream.url}/ollama/") as proxy,
        calling(proxy.address[1]) as client,
    ):
        client.send(b"GET /api/tags?x HTTP/1.1\r\nHost: box\r\n\r\n")
        await client.answer()

    assert seen == [b"GET /ollama/api/tags?x HTTP/1.1"]


# What a second server might read in another way than the first is refused, and the server behind sees nothing of it.
SMUGGLED = {
    "length and chunked": CHUNKED.replace(b"Tr", b"Content-Length: 4\r\nTr") + b"0\r\n\r\n",
    "chunked and length": CHUNKED.removesuffix(b"\r\n") + b"Content-Length: 4\r\n\r\n0\r\n\r\n",
    "two lengths": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "a list of lengths": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1, 2\r\n\r\nab",
    "a signed length": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +1\r\n\r\na",
    "space before the colon": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length : 1\r\n\r\na",
    "a folded header": b"GET / HTTP/1.1\r\nHost: a\r\nX: b\r\n c\r\n\r\n",
    "a bare line feed": b"GET / HTTP/1.1\r\nHost: a\nX: b\r\n\r\n",
    "a bare carriage return": b"GET / HTTP/1.1\r\nHost: a\rX: b\r\n\r\n",
    "a line feed in a chunk's line": b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\na\n0\n\n",
    "another coding": b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "an unknown coding": b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "chunked in HTTP/1.0": b"POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "two hosts": b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    "a nul": b"GET / HTTP/1.1\r\nHost: a\r\nX: \x00\r\n\r\n",
    "HTTP/0.9": b"GET /\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a tunnel to elsewhere": b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n",
    "a websocket with a body": b"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n"
    b"Content-Length: 3\r\n\r\nabc",
    "no target": b"GET HTTP/1.1\r\nHost: a\r\n\r\n",
    "no HTTP": b"\x16\x03\x01\x00\xa5\x01\x00\x00",
}


@pytest.mark.parametrize("name", SMUGGLED)
async def test_a_request_that_can_be_read_in_two_ways_is_refused_and_the_connection_closed(name: str) -> None:
    seen = []

    async def script(line: Line) -> None:
        seen.append(await line.rest())

    async with between(script) as (client, _):
        client.send(SMUGGLED[name] + b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n")
        refused = await client.rest()

    assert refused[9:12] in {b"400", b"405", b"501", b"505"}
    assert refused.count(b"HTTP/1.1 ") <= 2
    assert b"Connection: close\r\n" in refused
    assert not any(b"/smuggled" in sent or b"\r\n0\r\n\r\n" in sent for sent in seen)


async def test_a_refused_request_waits_its_turn_behind_the_one_before() -> None:
    asked = asyncio.Event()
    go = asyncio.Event()

    async def script(line: Line) -> None:
        await line.request()
        asked.set()
        await soon(go.wait())
        line.send(OK)
        await line.left()

    async with between(script) as (client, _):
        client.send(GET + b"NONSENSE\r\n\r\n")
        await soon(asked.wait())
        go.set()

        assert (await client.answer()).body == b"ok"
        assert (await client.answer()).first == b"HTTP/1.1 400 Bad Request"
        assert await client.rest() == b""


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * (300 << 10) + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * (100 << 10) + b"\r\n",
        b"GET /" + b"x" * (2 << 20),
        b"GET / HTTP/1.1\r\nX: " + b"x" * (2 << 20),
    ],
    ids=["one long header", "many headers", "a target without end", "a header without end"],
)
async def test_a_head_over_its_limit_is_refused(head: bytes) -> None:
    async def script(line: Line) -> None:
        raise AssertionError("nothing is sent on")

    async with between(script) as (client, _):
        client.send(head)

        assert (await client.answer()).first == b"HTTP/1.1 431 Request Header Fields Too Large"


async def test_a_large_body_behind_a_small_head_is_no_large_head() -> None:
    async def script(line: Line) -> None:
        while True:
            await line.request()
            line.send(OK)

    large = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 400000\r\n\r\n" + b"x" * 400_000
    async with between(script) as (client, _):
        client.send(large * 3)

        assert [(await client.answer()).body for _ in range(3)] == [b"ok"] * 3


# (upstream, listener, rewrite_host) -> what takes the place of the client's Host.
@pytest.mark.parametrize(
    ("url", "listener", "rewrite", "host"),
    [
        ("http://localhost:11434", "0.0.0.0", True, b"localhost:11434"),
        ("http://127.0.0.1:11434", "192.168.1.2", True, b"localhost:11434"),
        ("http://127.8.8.8:11434", "::", True, b"localhost:11434"),
        ("http://[::1]:11434", "0.0.0.0", True, b"localhost:11434"),
        ("http://localhost:11434", "127.0.0.1", True, None),
        ("http://localhost:11434", "::1", True, None),
        ("http://localhost:8188", "0.0.0.0", False, None),
        ("http://ollama:11434", "0.0.0.0", True, None),
        ("http://10.0.0.2:11434", "0.0.0.0", True, None),
        ("https://box", "127.0.0.1", True, b"box"),
        ("https://me:pw@box:8443/x", "0.0.0.0", False, b"box:8443"),
        ("https://[fe80::1]:8443", "0.0.0.0", False, b"[fe80::1]:8443"),
    ],
)
async def test_host_is_rewritten_only_where_the_server_would_refuse_it(
    url: str, listener: str, rewrite: bool, host: bytes | None
) -> None:
    assert Address.of(url).host_for(listener, rewrite=rewrite) == host


@pytest.mark.parametrize(
    ("sent", "arrives"),
    [
        (b"http://box:1", []),
        (b"https://BOX:1", []),
        (b"http://box:2", [b"http://box:2"]),
        (b"http://evil.example", [b"http://evil.example"]),
        (b"null", [b"null"]),
    ],
)
async def test_where_host_is_rewritten_an_origin_that_was_its_own_is_dropped(sent: bytes, arrives: list[bytes]) -> None:
    async def script(line: Line) -> None:
        seen.append(await line.request())
        line.send(OK)
        await line.left()

    seen: list[Message] = []
    request = b"GET / HTTP/1.1\r\nA: b\r\nHost: Box:1\r\nOrigin: %b\r\n\r\n" % sent
    async with between(script, host="0.0.0.0") as (client, upstream):
        client.send(request)
        await client.answer()

        assert seen[0].headers[:2] == ((b"A", b"b"), (b"Host", b"localhost:%d" % upstream.port))
        assert seen[0].all(b"origin") == arrives

    async with between(script) as (client, _):
        client.send(request)
        await client.answer()

        assert seen[1].all(b"host") == [b"Box:1"]
        assert seen[1].all(b"origin") == [sent]


async def test_an_address_that_cannot_be_had_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SettingsError, match=rf"127\.0\.0\.1:{port}"):
            await Proxy("http://localhost:1", PlainGate(), rewrite_host=True).listen("127.0.0.1", port)


async def test_a_server_that_is_not_there_is_a_502_and_the_connection_goes_on() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    async with gateway(f"http://me:secret@127.0.0.1:{port}") as proxy, calling(proxy.address[1]) as client:
        for _ in range(2):
            client.send(b"POST / HTTP/1.1\r\nHost: box\r\nContent-Length: 2\r\n\r\nhi")
            answer = await client.answer()
            assert answer.first == b"HTTP/1.1 502 Bad Gateway"
            assert answer.body == b'{"error": "connection refused (127.0.0.1:%d)"}' % port
            assert answer.all(b"content-type") == [b"application/json"]


async def test_a_name_that_nobody_has_is_a_502() -> None:
    async with gateway("http://no-such-host.invalid:1") as proxy, calling(proxy.address[1]) as client:
        client.send(b"HEAD / HTTP/1.1\r\nHost: box\r\n\r\n" + GET)
        assert (await client.answer("HEAD")).first == b"HTTP/1.1 502 Bad Gateway"
        assert (await client.answer()).body == b'{"error": "name not found (no-such-host.invalid:1)"}'


async def test_a_refused_upload_can_still_read_why() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    async with gateway(f"http://127.0.0.1:{port}") as proxy, calling(proxy.address[1]) as client:
        client.send(b"POST / HTTP/1.1\r\nHost: box\r\nContent-Length: 50000000\r\n\r\n" + b"x" * 5_000_000)
        answer = await client.answer()

        assert answer.first == b"HTTP/1.1 502 Bad Gateway"
        assert answer.all(b"connection") == [b"close"]
        assert await client.rest() == b""


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 200 O", b"HTTP/1.1 100 Continue\r\n\r\n"])
async def test_a_server_that_closes_without_an_answer_is_a_502(said: bytes) -> None:
    async def script(line: Line) -> None:
        await line.request()
        line.send(said)

    async with between(script) as (client, upstream):
        client.send(GET)
        answer = await client.answer()
        if answer.first == b"HTTP/1.1 100 Continue":
            answer = await client.answer()

        assert answer.first == b"HTTP/1.1 502 Bad Gateway"
        assert answer.body == b'{"error": "closed without an answer (127.0.0.1:%d)"}' % upstream.port


@pytest.mark.parametrize(
    "nonsense",
    [
        b"SSH-2.0-OpenSSH\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nxx",
        b"HTTP/1.1 101 Switching\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * (1 << 20),
    ],
    ids=["another protocol", "two framings", "another coding", "an unasked upgrade", "a head without end"],
)
async def test_an_answer_that_is_no_http_is_a_502(nonsense: bytes) -> None:
    async def script(line: Line) -> None:
        await line.request()
        line.send(nonsense)
        await line.left()

    async with between(script) as (client, _):
        client.send(GET)
        answer = await client.answer()

    assert answer.first == b"HTTP/1.1 502 Bad Gateway"
    assert answer.body.startswith(b'{"error": "no HTTP (')


async def test_a_kept_connection_that_closes_unanswered_is_closed_as_it_would_be_without_us() -> None:
    async def script(line: Line) -> None:
        await line.request()
        line.send(OK)
        await line.request()

    async with between(script) as (client, _):
        client.send(GET)
        await client.answer()
        client.send(GET)

        assert await client.rest() == b""


@pytest.mark.parametrize("last_word", [b"", b"HTTP/1.1 408 Request Timeout\r\n\r\n"])
async def test_a_server_that_closes_an_idle_connection_closes_the_clients(last_word: bytes) -> None:
    go = asyncio.Event()

    async def script(line: Line) -> None:
        await line.request()
        line.send(OK)
        await soon(go.wait())
        line.send(last_word)

    async with between(script) as (client, _):
        client.send(GET)
        await client.answer()
        go.set()

        assert await client.rest() == b""


async def test_more_than_was_asked_for_is_never_the_next_answer() -> None:
    async def script(line: Line) -> None:
        await line.request()
        line.send(OK + b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")
        await line.left()

    async with between(script) as (client, _):
        client.send(GET + GET)

        assert (await client.answer()).body == b"ok"
        assert await client.rest() == b""


async def test_a_body_behind_the_answer_to_head_is_never_the_next_answer() -> None:
    async def script(line: Line) -> None:
        await line.request()
        line.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        await line.left()

    async with between(script) as (client, _):
        client.send(b"HEAD / HTTP/1.1\r\nHost: box\r\n\r\n")

        assert await client.rest() == b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n"


async def test_an_early_answer_does_not_end_an_upload_that_the_server_still_takes() -> None:
    taken = []

    async def script(line: Line) -> None:
        head = await line.head()
        line.send(OK)
        taken.append(await line.body(head))
        await line.request()
        line.send(OK)
        await line.left()

    async with between(script) as (client, _):
        client.send(b"POST / HTTP/1.1\r\nHost: box\r\nContent-Length: 6\r\n\r\nabc")
        assert (await client.answer()).body == b"ok"
        client.send(b"def" + GET)

        assert (await client.answer()).body == b"ok"
        assert taken == [b"abcdef"]


async def test_an_early_answer_that_closes_ends_the_upload() -> None:
    async def script(line: Line) -> None:
        await line.head()
        line.send(b"HTTP/1.1 413 Too Large\r\nConnection: close\r\nContent-Length: 3\r\n\r\nbig")
        await line.left()

    async with between(script) as (client, _):
        client.send(b"POST / HTTP/1.1\r\nHost: box\r\nContent-Length: 90000000\r\n\r\n" + b"x" * 1_000_000)

        assert (await client.answer()).body == b"big"
        assert await client.rest() == b""


async def test_closing_lets_an_open_answer_end_and_closes_idle_connections_at_once() -> None:
    go, asked = asyncio.Event(), asyncio.Event()

    async def script(line: Line) -> None:
        request = await line.request()
        if request.first == b"GET /slow HTTP/1.1":
            asked.set()
            await soon(go.wait())
        line.send(OK)
        await line.left()

    async with Upstream(script) as upstream:
        proxy = Proxy(upstream.url, PlainGate(), rewrite_host=True)
        await proxy.listen("127.0.0.1", 0)
        async with calling(proxy.address[1]) as idle, calling(proxy.address[1]) as slow:
            idle.send(GET)
            await idle.answer()
            slow.send(b"GET /slow HTTP/1.1\r\nHost: box\r\n\r\n")
            await soon(asked.wait())
            assert proxy.open_exchanges == 1

            closing = asyncio.create_task(proxy.close(60.0))
            assert await idle.rest() == b""
            assert not closing.done()
            with pytest.raises(ConnectionError):
                await asyncio.open_connection(*proxy.address)
            go.set()
            answer = await slow.answer()
            await soon(closing)

    assert answer.body == b"ok"
    assert answer.all(b"connection") == [b"close"]
    assert proxy.open_exchanges == 0


async def test_closing_cuts_off_what_outlives_the_grace() -> None:
    async def script(line: Line) -> None:
        await line.request()
        line.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n")
        await line.left()

    async with Upstream(script) as upstream:
        proxy = Proxy(upstream.url, PlainGate(), rewrite_host=True)
        await proxy.listen("127.0.0.1", 0)
        async with calling(proxy.address[1]) as client:
            client.send(GET)
            head = await client.head()
            await proxy.close(0.0)
            with pytest.raises(EOFError):
                await client.body(head, answer_to="GET")


async def test_a_client_for_whom_no_descriptor_is_left_is_turned_away_and_the_others_stay() -> None:
    async def script(line: Line) -> None:
        while True:
            await line.request()
            line.send(OK)

    async with Upstream(script) as upstream, gateway(upstream.url) as proxy, calling(proxy.address[1]) as first:
        first.send(GET)
        await first.answer()
        proxy._common.most_connections = 2
        async with calling(proxy.address[1]) as second:
            await second.left()
        first.send(GET)
        assert (await first.answer()).body == b"ok"


async def test_a_head_that_does_not_come_is_not_waited_for_without_end() -> None:
    async def script(line: Line) -> None:
        raise AssertionError("nothing is sent on")

    async with Upstream(script) as upstream, gateway(upstream.url) as proxy:
        for sent, answer in ((b"", b""), (b"GET / HTTP/1.1\r\nHo", b"HTTP/1.1 408 Request Timeout\r\n")):
            async with calling(proxy.address[1]) as client:
                client.send(sent)
                await until(lambda: proxy._common.connections)
                (side,) = proxy._common.connections
                await until(lambda side=side, sent=sent: side._in_head == bool(sent))
                timer = side._late
                assert timer is not None
                # As the loop does when the time has come.
                timer._run()
                timer.cancel()
                assert (await client.rest()).startswith(answer)
            await until(lambda: not proxy._common.connections)


async def test_a_proxy_that_never_listened_can_be_closed() -> None:
    await Proxy("http://localhost:1", PlainGate(), rewrite_host=False).close(1.0)


# The bytes of a conversation, cut anywhere, mean the same.

REQUESTS = [
    b"GET /a HTTP/1.1\r\nHost: box\r\nX-Empty:\r\n\r\n",
    b"POST /b HTTP/1.1\r\nHost: box\r\nContent-Length: 11\r\n\r\nhello world",
    b"POST /c HTTP/1.1\r\nHost: box\r\nTransfer-Encoding: chunked\r\n\r\n3;x\r\nabc\r\n4\r\ndefg\r\n0\r\nT: 1\r\n\r\n",
    b"HEAD /d HTTP/1.1\r\nHost: box\r\n\r\n",
    b"POST /e HTTP/1.1\r\nHost: b\r\nUpgrade: h2c\r\nConnection: Upgrade\r\nContent-Length: 3\r\n\r\nxyz",
    b"GET /f HTTP/1.1\r\nHost: b\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
]
CHUNKS = b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n1\r\n!\r\n0\r\nT: 1\r\n\r\n"
ANSWERS = [
    b"HTTP/1.1 200 OK\r\nX-Empty:\r\nContent-Length: 5\r\n\r\nhello",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 Fine\r\n" + CHUNKS,
    b"HTTP/1.1 204 No Content\r\n\r\n",
    b"HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n",
]


def pieces_of(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = sorted({cut % (len(data) + 1) for cut in cuts} | {0, len(data)})
    return [data[start:end] for start, end in itertools.pairwise(edges)]


@dataclass
class Run:
    seen: list[Message]
    got: list[Message]


async def conversation(requests: list[bytes], replies: list[bytes], cut: Callable[[bytes], list[bytes]]) -> Run:
    """All requests at once, cut by `cut`, as are the answers."""
    run = Run([], [])

    async def send(line: Line, data: bytes) -> None:
        for piece in cut(data):
            line.send(piece)
            await line.writer.drain()
            await asyncio.sleep(0)

    async def script(line: Line) -> None:
        for reply in replies:
            run.seen.append(end_to_end(await line.request()))
            await send(line, reply)
        await line.left()

    async with between(script) as (client, _):
        sending = asyncio.create_task(send(client, b"".join(requests)))
        for request, reply in zip(requests, replies, strict=True):
            for _ in range(1 + (b" 100 Continue" in reply)):
                run.got.append(end_to_end(await client.answer(request.split(b" ", 1)[0].decode())))
        await sending
        await until(lambda: len(run.seen) == len(replies))
    return run


@settings(max_examples=60, deadline=None)
@given(
    calls=st.lists(st.tuples(st.sampled_from(REQUESTS), st.sampled_from(ANSWERS)), min_size=1, max_size=5),
    cuts=st.lists(st.integers(0, 5000), max_size=40),
)
async def test_any_cut_of_a_conversation_means_the_same(calls: list[tuple[bytes, bytes]], cuts: list[int]) -> None:
    calls = [call for call in calls if not (call[0].startswith(b"HEAD") and b"200" in call[1])]
    requests, replies = [call[0] for call in calls], [call[1] for call in calls]

    whole = await conversation(requests, replies, lambda data: [data])
    cut = await conversation(requests, replies, lambda data: pieces_of(data, cuts))

    assert (cut.seen, cut.got) == (whole.seen, whole.got)
    assert [message.first.split(b" ")[1] for message in whole.seen] == [r.split(b" ")[1] for r in requests]


@settings(max_examples=200, deadline=None)
@given(garbage=st.binary(max_size=400), head=st.sampled_from([b"", b"GET / HTTP/1.1\r\n", *REQUESTS]))
async def test_no_bytes_of_a_client_break_the_proxy(garbage: bytes, head: bytes) -> None:
    async def script(line: Line) -> None:
        while True:
            await line.request()
            line.send(OK)

    async with Upstream(script) as upstream, gateway(upstream.url) as proxy:
        async with calling(proxy.address[1]) as client:
            client.send(head + garbage)
            await client.writer.drain()
        async with calling(proxy.address[1]) as client:
            client.send(GET)
            assert (await client.answer()).body == b"ok"
        await until(lambda: proxy.open_exchanges == 0)
