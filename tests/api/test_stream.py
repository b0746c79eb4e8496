"""The event stream: everything that happens from an id on, once, until somebody leaves."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from loguru import logger

from tests.api.conftest import Served
from vram_manager.journal import RING_EVENTS

pytestmark = pytest.mark.asyncio


class Stream:
    """One open stream. Comment lines are counted, messages are given."""

    def __init__(self, lines: AsyncIterator[str]) -> None:
        self._lines = lines
        self.comments = 0

    async def message(self) -> dict[str, Any]:
        """The next event; its id stands beside its data."""
        named = None
        async with asyncio.timeout(20):
            async for line in self._lines:
                if line.startswith(":"):
                    self.comments += 1
                elif line.startswith("id: "):
                    named = line[4:]
                elif line.startswith("data: "):
                    event = json.loads(line[6:])
                    assert event["id"] == named
                    return dict(event)
        raise EOFError

    async def ids(self, count: int) -> list[str]:
        return [(await self.message())["id"] for _ in range(count)]


@contextlib.asynccontextmanager
async def stream(served: Served, query: str = "", **headers: str) -> AsyncIterator[Stream]:
    """A stream that has begun: what is recorded from here on is in it."""
    sent = {"Accept": "text/event-stream", **headers}
    async with served.http.stream("GET", f"/v1/events{query}", headers=sent) as reply:
        assert reply.status_code == 200
        assert reply.headers["content-type"].startswith("text/event-stream")
        yield Stream(reply.aiter_lines())


async def test_a_stream_begins_now_and_goes_on(served: Served):
    served.record(3)
    async with stream(served) as following:
        ids = served.record(2)
        assert await following.ids(2) == ids
        ids = served.record(1)
        assert await following.ids(1) == ids


async def test_a_stream_is_asked_for_among_other_types_too(served: Served):
    async with stream(served, Accept="application/json;q=0.1, text/event-stream") as following:
        assert await following.ids(0) == []


@pytest.mark.parametrize("way", ["after", "last-event-id"])
async def test_a_stream_resumes_after_the_last_event_that_was_seen(served: Served, way: str):
    ids = served.record(5)
    query, headers = (f"?after={ids[1]}", {}) if way == "after" else ("", {"Last-Event-ID": ids[1]})
    async with stream(served, query, **headers) as following:
        assert await following.ids(3) == ids[2:]
        more = served.record(2)
        assert await following.ids(2) == more


async def test_a_browser_that_comes_back_is_not_told_everything_again(served: Served):
    """An EventSource reconnects with the address it was made with, and says in a header how far it got."""
    ids = served.record(5)
    async with stream(served, f"?after={ids[0]}", **{"Last-Event-ID": ids[3]}) as following:
        assert await following.ids(1) == ids[4:]


async def test_nothing_is_lost_or_said_twice_at_the_seam_between_past_and_present(served: Served):
    first = served.record(200)

    async def storm() -> list[str]:
        ids = []
        for _ in range(300):
            ids += served.record()
            await asyncio.sleep(0)
        return ids

    storming = asyncio.create_task(storm())
    async with stream(served, f"?after={first[99]}") as following:
        got = await following.ids(400)
    assert got == first[100:] + await storming


async def test_a_stream_that_names_an_id_of_an_earlier_life_gets_all_there_is(served: Served):
    """Without a history on disk ids begin anew at a restart; a follower comes back with one that is far ahead."""
    ids = served.record(2)
    async with stream(served, **{"Last-Event-ID": "free-0412"}) as following:
        got = [(await following.message())["id"]]
        while got[-1] != ids[-1]:
            got.append((await following.message())["id"])
        assert got[-2:] == ids
        more = served.record(1)
        assert await following.ids(1) == more


async def test_followers_that_do_not_read_hold_up_nobody_and_lose_the_oldest_only(served: Served):
    async with contextlib.AsyncExitStack() as stack:
        slow = [await stack.enter_async_context(stream(served)) for _ in range(5)]
        await asyncio.sleep(0)
        logger.disable("vram_manager.journal")
        ids = served.record(3 * RING_EVENTS)
        logger.enable("vram_manager.journal")
        async with asyncio.timeout(20):
            assert (await served.http.get("/health")).status_code == 200
        for following in slow:
            got = await following.ids(RING_EVENTS)
            assert got[-1] == ids[-1]
            assert got == ids[-RING_EVENTS:]


async def test_a_reader_who_leaves_is_forgotten(served: Served):
    listening = len(served.daemon.journal._listeners)
    async with stream(served):
        assert len(served.daemon.journal._listeners) == listening + 1
    async with asyncio.timeout(20):
        while len(served.daemon.journal._listeners) > listening:
            await served.http.get("/health")


async def test_a_stream_in_which_nothing_happens_shows_that_it_lives(served: Served):
    loop = asyncio.get_running_loop()
    time = loop.time
    async with stream(served) as following:
        loop.time = lambda: time() + 16  # type: ignore[method-assign]
        await served.http.get("/health")
        served.record()
        await following.ids(1)
        assert following.comments >= 1


FOLLOW = b"GET /v1/events HTTP/1.1\r\nHost: vram\r\nAccept: text/event-stream\r\n\r\n"


async def test_the_end_of_the_daemon_ends_its_streams_properly_and_without_a_word_in_the_log(
    serve: Callable[..., Any], capfd: pytest.CaptureFixture[str]
):
    lines: list[str] = []
    sink = logger.add(lines.append, level="INFO", format="{message}")
    async with serve() as served:
        reader, writer = await served.connect(FOLLOW)
        await reader.readuntil(b"\r\n\r\n")
        lines.clear()
    rest = await asyncio.wait_for(reader.read(), 20)
    writer.close()
    await writer.wait_closed()
    logger.remove(sink)
    assert rest.endswith(b"0\r\n\r\n")
    assert lines == []
    assert "Traceback" not in capfd.readouterr().err
