"""The client: what is sent, what is asked again, and how each failure reads."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import httpx
import pytest
import respx

from vram_manager.backends.http import REPLY_LIMIT_BYTES, HttpStatus, JsonClient, errors_of
from vram_manager.errors import Rejected, SensorError, TimedOut

BASE = "http://server.test:1234"


def whole(document: object) -> object:
    return document


async def ask(base: str = BASE, deadline: float = 5.0) -> object:
    client = JsonClient(base, name="Server")
    try:
        return await client.get("/thing", whole, deadline=deadline)
    finally:
        await client.aclose()


async def why_of(call: Awaitable[object], kind: type[SensorError] = Rejected) -> str:
    with pytest.raises(SensorError) as caught:
        await call
    assert type(caught.value) is kind
    assert str(caught.value) == caught.value.why
    return caught.value.why


@respx.mock
@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("reply", "why"),
    [
        pytest.param(httpx.Response(500), "GET /thing: HTTP 500", id="500"),
        pytest.param(httpx.Response(500, html="<h1>no</h1>"), "GET /thing: HTTP 500", id="500 in HTML"),
        pytest.param(httpx.Response(503, json={"error": "busy"}), "GET /thing: HTTP 503: busy", id="own words"),
        pytest.param(
            httpx.Response(404, json={"error": {"message": "not\nhere"}}),
            r"GET /thing: HTTP 404: not\nhere",
            id="own words in OpenAI's shape, on one line",
        ),
        pytest.param(httpx.Response(400, json={"error": 7}), "GET /thing: HTTP 400", id="no words"),
        pytest.param(httpx.Response(400, json=[1]), "GET /thing: HTTP 400", id="error body is a list"),
    ],
)
async def test_a_status_other_than_2xx_is_refused_with_the_servers_own_words(reply: httpx.Response, why: str) -> None:
    respx.get(f"{BASE}/thing").mock(return_value=reply)
    assert await why_of(ask(), HttpStatus) == why


@respx.mock
@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("reply", "why"),
    [
        pytest.param(httpx.Response(200, html="<p>"), "GET /thing: not JSON (text/html)", id="HTML"),
        pytest.param(httpx.Response(200), "GET /thing: not JSON (empty)", id="empty"),
        pytest.param(httpx.Response(200, content=b'{"a'), "GET /thing: not JSON (no content type)", id="cut"),
        pytest.param(httpx.Response(200, content=b"\xff\xfe\xfa"), None, id="not UTF-8"),
        pytest.param(httpx.Response(200, content=b'{"a": NaN}'), None, id="NaN"),
        pytest.param(httpx.Response(200, content=b"[" * 200_000), None, id="nested without end"),
        pytest.param(httpx.Response(200, content=b"9" * 5_000), None, id="a number of 5000 digits"),
    ],
)
async def test_a_body_that_is_not_json_is_refused(reply: httpx.Response, why: str | None) -> None:
    respx.get(f"{BASE}/thing").mock(return_value=reply)
    said = await why_of(ask())
    assert said == (why or "GET /thing: not JSON (no content type)")


@respx.mock
@pytest.mark.asyncio
async def test_a_reply_of_5_mib_is_refused_and_the_sizes_are_named() -> None:
    respx.get(f"{BASE}/thing").mock(return_value=httpx.Response(200, content=b" " * (5 * 1024 * 1024)))
    why = await why_of(ask())
    assert why == f"GET /thing: reply of more than {REPLY_LIMIT_BYTES} bytes (content-length 5242880)"


@respx.mock
@pytest.mark.asyncio
async def test_a_reply_of_unknown_length_is_not_read_past_the_limit() -> None:
    parts_read = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal parts_read
        while True:
            parts_read += 1
            yield b" " * 65536

    respx.get(f"{BASE}/thing").mock(return_value=httpx.Response(200, content=endless()))
    assert "content-length unknown" in await why_of(ask())
    assert parts_read == REPLY_LIMIT_BYTES // 65536 + 1


@respx.mock
@pytest.mark.asyncio
async def test_a_reply_of_exactly_the_limit_is_read() -> None:
    body = b"[]" + b" " * (REPLY_LIMIT_BYTES - 2)
    respx.get(f"{BASE}/thing").mock(return_value=httpx.Response(200, content=body))
    assert await ask() == []


@respx.mock
@pytest.mark.asyncio
@pytest.mark.parametrize("status", [301, 302, 307, 308])
async def test_a_redirect_is_refused_and_not_followed(status: int) -> None:
    respx.get(f"{BASE}/thing").mock(return_value=httpx.Response(status, headers={"Location": "/other"}))
    other = respx.get(f"{BASE}/other").mock(return_value=httpx.Response(200, json=1))
    with pytest.raises(HttpStatus) as caught:
        await ask()
    assert caught.value.status == status
    assert "not followed" in str(caught.value.remedy)
    assert not other.called


@respx.mock
@pytest.mark.asyncio
async def test_a_refusal_for_want_of_a_header_says_what_to_do() -> None:
    respx.get(f"{BASE}/thing").mock(return_value=httpx.Response(401))
    with pytest.raises(HttpStatus) as caught:
        await ask()
    assert "header" in str(caught.value.remedy)


@respx.mock
@pytest.mark.asyncio
@pytest.mark.parametrize("failure", [httpx.ReadTimeout, httpx.ConnectTimeout, httpx.PoolTimeout])
async def test_a_timeout_of_the_wire_is_timed_out(failure: type[httpx.TimeoutException]) -> None:
    respx.get(f"{BASE}/thing").mock(side_effect=failure("slow"))
    assert await why_of(ask(), TimedOut) == "GET /thing: no answer within 5 s"


@pytest.mark.asyncio
async def test_the_deadline_covers_the_whole_call() -> None:
    async def silent(request: httpx.Request) -> httpx.Response:
        await asyncio.Event().wait()
        raise AssertionError

    client = JsonClient(BASE, name="Server", transport=httpx.MockTransport(silent))
    assert await why_of(client.get("/thing", whole, deadline=0.01), TimedOut) == ("GET /thing: no answer within 0.01 s")


@pytest.mark.asyncio
async def test_a_body_that_trickles_past_the_deadline_is_timed_out() -> None:
    async def trickle() -> AsyncIterator[bytes]:
        while True:
            yield b" "
            await asyncio.sleep(0)

    async def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=trickle())

    client = JsonClient(BASE, name="Server", transport=httpx.MockTransport(answer))
    await why_of(client.get("/thing", whole, deadline=0.02), TimedOut)


@respx.mock
@pytest.mark.asyncio
@pytest.mark.parametrize("failure", [httpx.ConnectError, httpx.ReadError, httpx.RemoteProtocolError])
async def test_a_get_is_asked_once_more_when_the_connection_failed_before_a_reply(
    failure: type[httpx.TransportError],
) -> None:
    route = respx.get(f"{BASE}/thing").mock(side_effect=[failure("gone"), httpx.Response(200, json=[1])])
    assert await ask() == [1]
    assert route.call_count == 2


@respx.mock
@pytest.mark.asyncio
async def test_a_get_is_asked_no_more_than_twice() -> None:
    route = respx.get(f"{BASE}/thing").mock(side_effect=httpx.ReadError("gone"))
    assert await why_of(ask(), SensorError) == "GET /thing: gone"
    assert route.call_count == 2


@respx.mock
@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("failure", "calls"), [(httpx.ConnectError, 2), (httpx.ReadError, 1), (httpx.RemoteProtocolError, 1)]
)
async def test_a_post_is_sent_again_only_when_it_never_left(failure: type[httpx.TransportError], calls: int) -> None:
    route = respx.post(f"{BASE}/do").mock(side_effect=failure("gone"))
    client = JsonClient(BASE, name="Server")
    assert await why_of(client.post("/do", {}, deadline=5), SensorError) == "POST /do: gone"
    assert route.call_count == calls


@respx.mock
@pytest.mark.asyncio
async def test_an_answer_that_refuses_is_not_asked_again() -> None:
    route = respx.get(f"{BASE}/thing").mock(return_value=httpx.Response(500))
    await why_of(ask(), HttpStatus)
    assert route.call_count == 1


@respx.mock
@pytest.mark.asyncio
async def test_neither_origin_nor_sec_fetch_site_is_ever_sent() -> None:
    route = respx.get(f"{BASE}/thing").mock(return_value=httpx.Response(200, json=1))
    headers = {"oRiGiN": "http://x", "Sec-Fetch-Site": "cross-site", "Authorization": "Bearer t"}
    client = JsonClient(BASE, name="Server", headers=headers)
    await client.get("/thing", whole, deadline=5)
    sent = route.calls.last.request.headers
    assert sent["authorization"] == "Bearer t"
    assert "origin" not in sent
    assert "sec-fetch-site" not in sent


@respx.mock
@pytest.mark.asyncio
@pytest.mark.parametrize("base", ["http://box.test/ollama", "http://box.test/ollama/"])
async def test_a_base_url_may_have_a_path(base: str) -> None:
    respx.get("http://box.test/ollama/thing").mock(return_value=httpx.Response(200, json=1))
    assert await ask(base) == 1
    assert str(JsonClient(base, name="Server").address("/ws")) == "http://box.test/ollama/ws"


@pytest.mark.asyncio
async def test_proxy_variables_are_not_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    async with raw_server(canned(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n7")) as base:
        assert await ask(base) == 7


def test_certificates_are_loaded_for_https_only() -> None:
    assert JsonClient(BASE, name="Server").tls is None
    tls = JsonClient("https://server.test", name="Server").tls
    assert tls is not None
    assert tls.verify_mode is ssl.CERT_REQUIRED


# Below: real sockets, as only they break in the ways that sockets break.

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def raw_server(answer: Answer) -> AsyncIterator[str]:
    """A TCP server on loopback that answers with whatever bytes `answer` writes, then hangs up."""

    serving: list[asyncio.Task[None] | None] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.append(asyncio.current_task())
        with suppress(ConnectionError):
            await answer(reader, writer)
            writer.close()
            await writer.wait_closed()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    await asyncio.gather(*(task for task in serving if task))


def canned(reply: bytes) -> Answer:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(reply)

    return answer


@pytest.mark.asyncio
async def test_a_server_that_is_not_there_is_connection_refused() -> None:
    async with raw_server(canned(b"")) as base:
        pass
    with pytest.raises(SensorError) as caught:
        await ask(base)
    assert caught.value.why == "GET /thing: connection refused"
    assert "check that Server runs" in str(caught.value.remedy)


@pytest.mark.asyncio
async def test_a_name_that_does_not_exist_is_host_name_not_found() -> None:
    assert await why_of(ask("http://no-such-host.invalid"), SensorError) == "GET /thing: host name not found"


@pytest.mark.asyncio
async def test_a_connection_closed_in_the_middle_of_the_body_is_a_sensor_error() -> None:
    async with raw_server(canned(b'HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"a": ')) as base:
        why = await why_of(ask(base), SensorError)
    assert why.startswith("GET /thing: peer closed connection")


@pytest.mark.asyncio
async def test_a_connection_that_is_reset_is_connection_reset() -> None:
    async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        # Lingering for 0 s makes close() send RST, as a killed container's address does.
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    async with raw_server(reset) as base:
        assert await why_of(ask(base), SensorError) == "GET /thing: connection reset"


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("cause", "why"),
    [
        (ssl.SSLCertVerificationError(1, "self-signed certificate"), "certificate not trusted"),
        # As a name with an IPv6 and an IPv4 address fails, localhost for one.
        (
            ExceptionGroup("all failed", [ConnectionRefusedError(111), ConnectionRefusedError(111)]),
            "connection refused",
        ),
        (OSError(113, "No route to host"), "no route to host"),
        (ValueError("odd"), "all failed"),
    ],
)
async def test_the_reason_is_looked_for_at_the_root_of_the_error(cause: Exception, why: str) -> None:
    async def fail(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("all failed") from cause

    client = JsonClient(BASE, name="Server", transport=httpx.MockTransport(fail))
    assert await why_of(client.get("/thing", whole, deadline=5), SensorError) == f"GET /thing: {why}"


@pytest.mark.asyncio
async def test_a_server_that_speaks_no_http_is_a_sensor_error() -> None:
    async with raw_server(canned(b"220 mail.example ESMTP\r\n\r\n")) as base:
        assert (await why_of(ask(base), SensorError)).startswith("GET /thing: ")


@pytest.mark.asyncio
async def test_a_kept_connection_that_the_server_closed_is_replaced_unnoticed() -> None:
    connections = 0

    async def one_reply_per_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nConnection: keep-alive\r\n\r\n1")
        await reader.read(1)  # the second request arrives on this connection, or the client has noticed

    async with raw_server(one_reply_per_connection) as base:
        client = JsonClient(base, name="Server")
        assert [await client.get("/thing", whole, deadline=5) for _ in range(3)] == [1, 1, 1]
        await client.aclose()
    assert connections == 3


@pytest.mark.asyncio
async def test_a_post_sends_json_and_needs_no_body_in_return() -> None:
    received: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        received.append(head + await reader.readexactly(len(b'{"a":true}')))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    async with raw_server(answer) as base:
        client = JsonClient(base, name="Server")
        await client.post("/do", {"a": True}, deadline=5)
        await client.aclose()
    head, _, body = received[0].partition(b"\r\n\r\n")
    assert json.loads(body) == {"a": True}
    assert b"content-type: application/json" in head.lower()
    assert b"\r\norigin:" not in head.lower()


def test_errors_that_are_each_others_cause_are_told_in_their_own_words() -> None:
    first, second = httpx.ConnectError("first"), httpx.ConnectError("second")
    first.__cause__, second.__cause__ = second, first

    with pytest.raises(SensorError, match="first"), errors_of("GET /x", server="ollama", deadline=1):
        raise first
