"""Further Ollama servers: what is told of each, at which pace they are asked, and when somebody is told."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from itertools import pairwise

import httpx
import pytest

from tests.fakes import GIB, Card, FakeOllama, now, until
from vram_manager.clock import Clock
from vram_manager.domain.event import Event, EventType
from vram_manager.domain.reading import Missing
from vram_manager.errors import Rejected, SensorError, TimedOut
from vram_manager.nodes import NODE_LIMIT_SECONDS, NODE_SECONDS, NODE_SLOWEST_SECONDS, Nodes, checked, look
from vram_manager.simulator.serve import serving
from vram_manager.simulator.world import World

pytestmark = [pytest.mark.asyncio, pytest.mark.looptime]

NEAR, FAR = "http://near:11434", "http://far:11434"
REFUSED = SensorError("GET /api/ps: connection refused", "check that it runs")


class Watched:
    """Some nodes that are asked, and what was told."""

    def __init__(self, *urls: str) -> None:
        self.servers = {url: FakeOllama(Card()) for url in urls or (NEAR,)}
        self.near = next(iter(self.servers.values()))
        self.told: list[Event] = []
        clock = Clock(asyncio.get_running_loop().time, lambda: datetime.now(UTC))
        self.nodes = Nodes(clock, self.servers, self.told.append)

    @property
    def view(self):
        return self.nodes.views()[0]

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with asyncio.TaskGroup() as tasks:
            work = tasks.create_task(self.nodes.run())
            await until(lambda: self.view["state"] != "unread")
            yield
            work.cancel()


# What is told of one.


async def test_before_it_was_asked_a_node_is_unread_and_nothing_of_it_is_known():
    view = Watched().view
    assert (view["state"], view["verdict"], view["why"]) == ("unread", "unknown", "not asked yet")
    assert [view[name] for name in ("models", "vram_bytes", "ram_bytes", "version", "age_seconds")] == [None] * 5


@pytest.mark.parametrize(
    ("on_gpu", "verdict", "vram_gib", "ram_gib"),
    [([], "idle", 0, 0), ([1, 1], "gpu", 8, 0), ([0, 0], "cpu", 0, 8), ([0.5], "split", 2, 2), ([1, 0], "split", 4, 4)],
    ids=["nothing", "all on the GPU", "all on the CPU", "one in halves", "one on each"],
)
async def test_where_a_node_runs_its_models_is_told_by_their_sizes(on_gpu, verdict, vram_gib, ram_gib):
    watched = Watched()
    for place, share in enumerate(on_gpu):
        watched.near.hold(f"m{place}:1b", 4, on_gpu=share)
    async with watched.running():
        view = watched.view
    assert (view["state"], view["verdict"], view["version"]) == ("ok", verdict, "0.33.1")
    assert (view["vram_bytes"], view["ram_bytes"]) == (vram_gib * GIB, ram_gib * GIB)
    assert len(view["models"]) == len(on_gpu)


async def test_sizes_that_contradict_each_other_are_unknown_and_never_0():
    watched = Watched()
    watched.near.hold("odd:1b", 1, on_gpu=2)
    async with watched.running():
        view = watched.view
    assert (view["state"], view["verdict"], view["vram_bytes"], view["ram_bytes"]) == ("ok", "unknown", None, None)
    assert view["models"][0]["cpu_ratio"] is None


async def test_a_node_without_a_version_is_a_reading_all_the_same():
    watched = Watched()
    watched.near.version = Missing("no answer")
    async with watched.running():
        assert (watched.view["state"], watched.view["version"]) == ("ok", None)


async def test_a_node_that_is_away_says_why_and_what_to_do():
    watched = Watched()
    watched.near.error = REFUSED
    async with watched.running():
        view = watched.view
    assert (view["state"], view["why"], view["remedy"]) == ("missing", REFUSED.why, REFUSED.remedy)
    assert (view["verdict"], view["models"], view["vram_bytes"]) == ("unknown", None, None)


async def test_the_password_in_a_url_is_never_shown():
    watched = Watched("http://me:hunter2@near:11434")
    watched.near.error = REFUSED
    async with watched.running():
        assert watched.view["url"] == NEAR
    assert [event.target for event in watched.told] == [f"node:{NEAR}"]


# At which pace.


async def test_a_node_is_asked_every_15_s():
    watched = Watched()
    async with watched.running():
        await until(lambda: len(watched.near.looks) == 4)
    looks = watched.near.looks
    assert [round(two - one) for one, two in pairwise(looks)] == [NODE_SECONDS] * 3


async def test_one_that_hangs_delays_no_other():
    watched = Watched(FAR, NEAR)
    far, near = watched.servers.values()
    far.takes_seconds = 3600
    async with asyncio.TaskGroup() as tasks:
        work = tasks.create_task(watched.nodes.run())
        await until(lambda: len(near.looks) == 5)
        assert now() < 5 * NODE_SECONDS
        work.cancel()


async def test_one_that_hangs_is_missing_after_its_own_deadline():
    watched = Watched()
    watched.near.takes_seconds = 3600
    async with watched.running():
        assert (watched.view["state"], watched.view["why"]) == ("missing", "no answer within 25 s")


async def test_one_that_is_away_is_asked_less_and_less_often():
    watched = Watched()
    watched.near.error = REFUSED
    async with watched.running():
        await until(lambda: len(watched.near.looks) == 6, within=900)
    looks = watched.near.looks
    pauses = [round(two - one) for one, two in pairwise(looks)]
    assert pauses == [30, 60, 120, NODE_SLOWEST_SECONDS, NODE_SLOWEST_SECONDS]


async def test_slow_is_not_down():
    watched = Watched()
    watched.near.hold("m:1b", 4)
    async with watched.running():
        watched.near.error = TimedOut("GET /api/ps: no answer within 15 s")
        seen = len(watched.near.looks)
        await until(lambda: len(watched.near.looks) == seen + 2)
        assert watched.view["state"] == "ok"
        assert watched.view["age_seconds"] > NODE_SECONDS
        await until(lambda: watched.view["state"] == "missing")
        assert watched.view["age_seconds"] > NODE_LIMIT_SECONDS
    assert [event.type for event in watched.told] == [EventType.SENSOR_LOST]


async def test_a_bug_is_not_swallowed():
    watched = Watched()
    watched.near.error = ZeroDivisionError()
    with pytest.raises(ExceptionGroup):
        await watched.nodes.run()


# Who is told.


async def test_it_is_told_once_that_a_node_is_lost_and_once_that_it_is_back():
    watched = Watched()
    async with watched.running():
        assert watched.told == []
        watched.near.error = REFUSED
        await asyncio.sleep(600)
        assert [(event.type, event.target, event.reason) for event in watched.told] == [
            (EventType.SENSOR_LOST, f"node:{NEAR}", f"{REFUSED.why}; {REFUSED.remedy}")
        ]
        watched.near.error = None
        await asyncio.sleep(600)
    assert [(event.type, event.target, event.reason) for event in watched.told[1:]] == [
        (EventType.SENSOR_BACK, f"node:{NEAR}", "version 0.33.1")
    ]


async def test_every_server_is_closed():
    watched = Watched(NEAR, FAR)
    await watched.nodes.aclose()
    assert all(server.closed for server in watched.servers.values())


# From the command line.


@pytest.mark.looptime(False)
async def test_a_node_that_is_named_is_asked_from_here():
    async with World() as world, serving(world.ollama.app) as url, httpx.AsyncClient(base_url=url) as user:
        (idle,) = await asyncio.to_thread(look, [url])
        await user.post("/api/generate", json={"model": "gemma3:4b"}, timeout=60)
        (node,) = await asyncio.to_thread(look, [url, url])
    assert (idle["verdict"], idle["models"]) == ("idle", [])
    assert (node["verdict"], [model["name"] for model in node["models"]]) == ("gpu", ["gemma3:4b"])
    assert node["vram_bytes"] > 3 * GIB
    assert "measured" not in node


@pytest.mark.looptime(False)
async def test_a_node_with_nothing_loaded_shows_where_it_runs_once_it_is_measured():
    async with World() as world, serving(world.ollama.app) as url:
        known = [{"url": url, "verdict": "idle"}, {"url": "http://127.0.0.1:1", "verdict": "gpu"}]
        (node,) = await asyncio.to_thread(look, [], known, measure=True)
    assert (node["verdict"], node["measured"]["verdict"], node["measured"]["loaded_for_it"]) == ("gpu", "gpu", True)


@pytest.mark.looptime(False)
async def test_what_cannot_be_measured_is_said_and_shown_all_the_same():
    async with World(ollama_models=()) as world, serving(world.ollama.app) as url:
        (node,) = await asyncio.to_thread(look, [url], measure=True)
    assert node["verdict"] == "idle"
    assert node["measured"]["words"].startswith("not measured: it has no model of its own on disk; pull a small one")


@pytest.mark.looptime(False)
async def test_a_node_of_the_setting_is_asked_with_its_password(monkeypatch):
    asked: list[str | None] = []

    async def proxy(scope, receive, send):
        asked.append(dict(scope["headers"]).get(b"authorization"))
        await send({"type": "http.response.start", "status": 401, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async with serving(proxy) as url:
        monkeypatch.setenv("OLLAMA_NODES", url.replace("//", "//me:pw@"))
        (node,) = await asyncio.to_thread(look, [], [{"url": url, "verdict": "unknown"}], measure=True)
    assert asked[0] == b"Basic bWU6cHc="
    assert (node["url"], node["state"]) == (url, "missing")
    assert "pw" not in str(node)


@pytest.mark.looptime(False)
@pytest.mark.parametrize("url", ["box:11434", "ftp://box", "http://", "http://box:0", "http://[::1", "http://a b", ""])
async def test_what_is_no_url_is_refused_with_what_is_allowed(url: str):
    with pytest.raises(ValueError, match="must be an http:// or https:// URL") as refused:
        checked(url)
    assert repr(url) in str(refused.value)


@pytest.mark.looptime(False)
async def test_a_refused_url_keeps_its_password():
    with pytest.raises(ValueError, match="must be") as refused:
        checked("http://me:hunter2@box:0")
    assert "hunter2" not in str(refused.value)


@pytest.mark.looptime(False)
async def test_a_slash_at_the_end_is_no_other_node():
    assert checked(" http://box:11434/ ") == "http://box:11434"


async def test_a_reply_that_is_none_is_missing():
    watched = Watched()
    watched.near.error = Rejected("GET /api/ps: models: is missing")
    async with watched.running():
        assert (watched.view["state"], watched.view["verdict"]) == ("missing", "unknown")
