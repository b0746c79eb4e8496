"""Streams: each piece at once, no more of them in memory than a slow reader is forgiven for, and no false end."""

from __future__ import annotations

import asyncio
import hashlib
import socket

import pytest

from tests.gateway.upstream import Line, Upstream, between, calling, gateway, soon, until

pytestmark = pytest.mark.asyncio

GET = b"GET / HTTP/1.1\r\nHost: box\r\n\r\n"
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
MIB = 1 << 20


def chunk(piece: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(piece), piece)


@pytest.mark.parametrize(
    ("head", "frame"),
    [
        (STREAM, chunk),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", bytes),
        (b"HTTP/1.1 200 OK\r\n\r\n", bytes),
    ],
    ids=["chunked", "with a length", "to the end"],
)
async def test_a_token_arrives_before_the_next_one_is_sent(head: bytes, frame: type[bytes]) -> None:
    arrived = asyncio.Semaphore(0)

    async def script(line: Line) -> None:
        await line.request()
        line.send(head)
        for number in range(20):
            line.send(frame(b'data: {"n": %2d}\n\n' % number))
            await soon(arrived.acquire())

    async with between(script) as (client, _):
        client.send(GET)
        answer = await client.head()
        for number in range(20):
            expected = b'data: {"n": %2d}\n\n' % number
            piece = await (client.chunk() if answer.all(b"transfer-encoding") else client.exactly(len(expected)))
            assert piece == expected
            arrived.release()


async def test_a_piece_of_an_upload_arrives_before_the_next_one_is_sent() -> None:
    arrived = asyncio.Semaphore(0)

    async def script(line: Line) -> None:
        await line.head()
        while await line.chunk():
            arrived.release()
        line.send(b"HTTP/1.1 204 No\r\n\r\n")
        await line.left()

    async with between(script) as (client, _):
        client.send(b"POST / HTTP/1.1\r\nHost: box\r\nTransfer-Encoding: chunked\r\n\r\n")
        for number in range(20):
            client.send(chunk(b"%d" % number))
            await soon(arrived.acquire())
        client.send(b"0\r\n\r\n")
        assert (await client.answer()).first == b"HTTP/1.1 204 No"


@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize("said", [b"", STREAM + chunk(b"token")], ids=["before the answer", "in the stream"])
async def test_a_client_that_leaves_ends_the_upstream_request(said: bytes, reset: bool) -> None:
    asked, left = asyncio.Event(), asyncio.Event()

    async def script(line: Line) -> None:
        await line.request()
        line.send(said)
        asked.set()
        await line.left()
        left.set()

    async with Upstream(script) as upstream, gateway(upstream.url) as proxy:
        async with calling(proxy.address[1]) as client:
            client.send(GET)
            await soon(asked.wait())
            if said:
                await client.head()
            if reset:
                client.break_off()
        await soon(left.wait())
        await until(lambda: proxy.open_exchanges == 0)


async def test_a_client_that_leaves_behind_a_pipelined_request_ends_the_first() -> None:
    asked, left = asyncio.Event(), asyncio.Event()

    async def script(line: Line) -> None:
        await line.request()
        asked.set()
        await line.left()
        left.set()

    async with Upstream(script) as upstream, gateway(upstream.url) as proxy:
        async with calling(proxy.address[1]) as client:
            client.send(GET * 10)
            await soon(asked.wait())
        await soon(left.wait())


@pytest.mark.parametrize("sent", [b"GET / HT", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nhalf"])
async def test_a_client_that_leaves_in_the_middle_of_a_request_leaves_nothing(sent: bytes) -> None:
    seen = []

    async def script(line: Line) -> None:
        head = await line.head()
        seen.append(head.first)
        await line.left()
        seen.append(b"left")

    async with Upstream(script) as upstream, gateway(upstream.url) as proxy:
        async with calling(proxy.address[1]) as client:
            client.send(sent)
            if b"POST" in sent:
                await until(lambda: seen)
        await until(lambda: not proxy._common.connections)
        await until(lambda: seen in ([], [b"POST / HTTP/1.1", b"left"]))
        assert len(upstream.lines) == (b"POST" in sent)


async def test_a_client_that_leaves_while_the_server_is_being_reached_leaves_nothing() -> None:
    # A backlog that is full takes no connection and refuses none.
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen(0)
        with socket.socket() as first, socket.socket() as second:
            for filler in (first, second):
                filler.setblocking(False)
                filler.connect_ex(busy.getsockname())
            async with gateway(f"http://127.0.0.1:{busy.getsockname()[1]}") as proxy:
                async with calling(proxy.address[1]) as client:
                    client.send(GET)
                    await until(lambda: proxy.open_exchanges == 1)
                await until(lambda: proxy.open_exchanges == 0)
                for _ in range(20):
                    await asyncio.sleep(0)
                # Cancelled, not waited for until its own limit.
                assert not proxy._common.tasks


@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize(
    "said",
    [
        STREAM + chunk(b"token") + b"5\r\nto",
        STREAM + chunk(b"token"),
        b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\ntoken",
        b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n",
    ],
    ids=["inside a chunk", "between chunks", "inside a length", "behind the head"],
)
async def test_an_answer_that_breaks_off_has_no_clean_end(said: bytes, reset: bool) -> None:
    heard = asyncio.Event()

    async def script(line: Line) -> None:
        await line.request()
        line.send(said)
        await soon(heard.wait())
        if reset:
            line.break_off()

    async with between(script) as (client, _):
        client.send(GET)
        answer = await client.head()
        if b"token" in said:
            start = await (client.chunk() if answer.all(b"transfer-encoding") else client.exactly(5))
            assert start == b"token"
        heard.set()
        with pytest.raises((EOFError, ConnectionError)):
            await client.body(answer, answer_to="GET")


async def test_a_reset_is_no_end_of_an_answer_that_ends_with_the_connection() -> None:
    heard = asyncio.Event()

    async def script(line: Line) -> None:
        await line.request()
        line.send(b"HTTP/1.1 200 OK\r\n\r\ntoken")
        await soon(heard.wait())
        line.break_off()

    async with between(script) as (client, _):
        client.send(GET)
        answer = await client.head()
        assert await client.chunk() == b"token"
        heard.set()
        with pytest.raises((EOFError, ConnectionError)):
            await client.body(answer, answer_to="GET")


async def test_an_http_1_0_client_sees_a_reset_where_nothing_else_could_tell_the_break() -> None:
    heard = asyncio.Event()

    async def script(line: Line) -> None:
        await line.request()
        line.send(STREAM + chunk(b"token"))
        await soon(heard.wait())

    async with between(script) as (client, _):
        client.send(b"GET / HTTP/1.0\r\n\r\n")
        await client.head()
        assert await client.exactly(5) == b"token"
        heard.set()
        with pytest.raises(ConnectionResetError):
            await client.rest()


async def test_a_server_that_breaks_off_in_the_middle_of_an_upload_is_a_502() -> None:
    async def script(line: Line) -> None:
        await line.head()
        await line.exactly(10)
        line.break_off()

    async with between(script) as (client, _):
        client.send(b"POST / HTTP/1.1\r\nHost: box\r\nContent-Length: 100\r\n\r\n0123456789")

        assert (await client.answer()).first == b"HTTP/1.1 502 Bad Gateway"


async def test_a_reader_that_stalls_stops_the_server_and_not_our_memory() -> None:
    stalled = asyncio.Event()
    sent = 0

    async def script(line: Line) -> None:
        nonlocal sent
        line.writer.transport.set_write_buffer_limits(high=MIB)
        await line.request()
        line.send(STREAM)
        piece = chunk(b"x" * MIB)
        for _ in range(200):
            line.send(piece)
            stalled.set()
            await line.writer.drain()
            sent += MIB
        line.send(b"0\r\n\r\n")

    async with Upstream(script) as upstream, gateway(upstream.url) as proxy, calling(proxy.address[1]) as client:
        client.send(GET)
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        (side,) = await _client_sides(proxy)
        await until(lambda: side._full)
        # Whatever the sockets' buffers hold, what we hold is one read and the transport's own limit.
        assert side._transport.get_write_buffer_size() < MIB
        assert side._upstream is not None
        assert not side._upstream._transport.is_reading()
        seen = -1
        while seen != sent:
            seen = sent
            for _ in range(50):
                await asyncio.sleep(0)
        assert sent < 100 * MIB

        client.writer.transport.resume_reading()  # type: ignore[attr-defined]
        answer = await client.head()
        size_bytes = 0
        while piece := await client.chunk():
            size_bytes += len(piece)
            assert side._transport.get_write_buffer_size() < MIB
    assert answer.first == b"HTTP/1.1 200 OK"
    assert size_bytes == 200 * MIB


async def test_a_server_that_stalls_stops_the_client_and_not_our_memory() -> None:
    go = asyncio.Event()
    received = 0

    async def script(line: Line) -> None:
        nonlocal received
        head = await line.head()
        line.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await soon(go.wait())
        line.writer.transport.resume_reading()  # type: ignore[attr-defined]
        received = len(await line.body(head))
        line.send(b"HTTP/1.1 204 No\r\n\r\n")
        await line.left()

    size_bytes = 64 * MIB
    async with Upstream(script) as upstream, gateway(upstream.url) as proxy, calling(proxy.address[1]) as client:
        client.send(b"POST / HTTP/1.1\r\nHost: box\r\nContent-Length: %d\r\n\r\n" % size_bytes)
        client.send(bytes(size_bytes))
        (side,) = await _client_sides(proxy)
        await until(lambda: side._upstream and side._upstream._transport and side._upstream.full)
        assert side._upstream is not None
        assert side._upstream._transport.get_write_buffer_size() < MIB
        assert not side._transport.is_reading()
        go.set()

        assert (await client.answer()).first == b"HTTP/1.1 204 No"
    assert received == size_bytes


@pytest.mark.parametrize("chunked", [True, False])
async def test_a_large_upload_streams_through_unchanged_and_is_never_held(chunked: bool) -> None:
    pieces = 300
    digest = hashlib.sha256()

    async def script(line: Line) -> None:
        head = await line.head()
        assert bool(head.all(b"transfer-encoding")) is chunked
        if chunked:
            while piece := await line.chunk():
                digest.update(piece)
        else:
            for _ in range(pieces):
                digest.update(await line.exactly(MIB))
        line.send(b"HTTP/1.1 204 No\r\n\r\n")
        await line.left()

    expected = hashlib.sha256()
    framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % (pieces * MIB)
    async with Upstream(script) as upstream, gateway(upstream.url) as proxy, calling(proxy.address[1]) as client:
        client.send(b"POST / HTTP/1.1\r\nHost: box\r\n%b\r\n\r\n" % framing)
        (side,) = await _client_sides(proxy)
        most = 0
        for number in range(pieces):
            piece = number.to_bytes(8, "big") * (MIB // 8)
            expected.update(piece)
            client.send(chunk(piece) if chunked else piece)
            await client.writer.drain()
            if side._upstream is not None and side._upstream._transport is not None:
                most = max(most, side._upstream._transport.get_write_buffer_size() + side._upstream._backlog_bytes)
        client.send(b"0\r\n\r\n" if chunked else b"")

        assert (await client.answer()).first == b"HTTP/1.1 204 No"
    assert digest.digest() == expected.digest()
    assert most < MIB


async def test_pipelining_without_end_is_not_read_without_end() -> None:
    async def script(line: Line) -> None:
        await line.request()
        await line.left()

    async with Upstream(script) as upstream, gateway(upstream.url) as proxy, calling(proxy.address[1]) as client:
        client.send(GET * (16 * MIB // len(GET)))
        (side,) = await _client_sides(proxy)
        await until(lambda: not side._transport.is_reading())
        assert len(side._queue) * len(GET) < MIB
        client.break_off()


async def test_five_hundred_streams_at_once_all_arrive() -> None:
    everybody = asyncio.Event()
    asked = 0

    async def script(line: Line) -> None:
        nonlocal asked
        request = await line.request()
        line.send(STREAM)
        asked += 1
        if asked == count:
            everybody.set()
        await soon(everybody.wait())
        for _ in range(10):
            line.send(chunk(request.first))
            await line.writer.drain()
        line.send(b"0\r\n\r\n")
        await line.left()

    async def one(port: int, number: int) -> bool:
        async with calling(port) as client:
            client.send(b"GET /%d HTTP/1.1\r\nHost: box\r\n\r\n" % number)
            return (await client.answer()).body == b"GET /%d HTTP/1.1" % number * 10

    # Four descriptors each, where the process has not many.
    import resource

    count = min(500, (resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 256) // 4)
    async with Upstream(script) as upstream, gateway(upstream.url) as proxy:
        arrived = await asyncio.gather(*[one(proxy.address[1], number) for number in range(count)])
        await until(lambda: proxy.open_exchanges == 0)
    assert arrived == [True] * count


async def _client_sides(proxy):
    """The connections of clients, as soon as there is one that has asked something."""
    await until(lambda: proxy.open_exchanges)
    return [side for side in proxy._common.connections if hasattr(side, "_queue")]
