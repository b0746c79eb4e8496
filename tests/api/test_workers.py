"""The routes of workers: what is asked rightly gets its answer, what is not is told which field was wrong."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import pytest_asyncio
from starlette.applications import Starlette
from starlette.requests import Request

from tests.api.conftest import error_of
from tests.fakes import FakeStore
from tests.policy.worlds import GIB, MIB, gib, gpu, gpus, second, snapshot
from vram_manager.api.fields import MAX_BODY_BYTES, BadRequest, bad_request, error
from vram_manager.api.workers import routes
from vram_manager.clock import Clock
from vram_manager.domain.size import MAX_BYTES, Size
from vram_manager.domain.snapshot import Snapshot
from vram_manager.journal import Journal
from vram_manager.policy import Rules
from vram_manager.workers import Workers

pytestmark = pytest.mark.asyncio

NOON = datetime(2026, 7, 1, 12, tzinfo=UTC)
RULES = Rules(
    soft_limit=Size(bytes=11 * GIB), hard_limit=Size(bytes=gib(11.5)), soft_limit_seconds=0.0, leak_generations=10
)
LIMITS, GENERATIONS = "/v1/limits/check", "/v1/generations"
MODELS, POINTS = "/v1/workers/worker-1/models", "/v1/workers/worker-1/snapshots"
CORRECT: dict[str, dict[str, Any]] = {
    LIMITS: {},
    GENERATIONS: {"owner": "worker-1", "phase": "end", "id": "1"},
    MODELS: {"models": {}},
    POINTS: {"event": "startup"},
}
REPORTING = (LIMITS, GENERATIONS, POINTS)


class Desk:
    """The routes over one set of workers; `allowed` is whether their caller may change anything."""

    def __init__(self) -> None:
        self.used_gib = 5.0
        self.allowed = True
        self.looks: list[float] = []
        clock = Clock(lambda: 0.0, lambda: NOON)
        leased = {"leased": 2 * GIB}
        journal = Journal(clock, FakeStore())  # type: ignore[arg-type]
        self.workers = Workers(clock, journal, RULES, snapshot=self.seen, leased_bytes=leased.get)
        known = routes(self.workers, self.guarded, self.look)
        application = Starlette(routes=known, exception_handlers={BadRequest: bad_request})
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(application), base_url="http://vram")

    async def look(self, max_age_seconds: float) -> None:
        self.looks.append(max_age_seconds)

    def seen(self) -> Snapshot:
        return snapshot(0, gpus(gpu(total_gib=12, free_gib=12 - self.used_gib), second(total_gib=12, free_gib=12)))

    def guarded(self, handler: Any) -> Any:
        async def checked(request: Request) -> Any:
            return await handler(request) if self.allowed else error(401, "unauthorized", "no")

        return checked

    async def post(self, path: str, **body: Any) -> Any:
        reply = await self.http.post(path, json=body)
        assert reply.status_code == 200, reply.text
        return reply.json()

    async def refused(self, path: str, content: Any) -> tuple[int, dict[str, Any]]:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        reply = await self.http.post(path, content=raw)
        return reply.status_code, error_of(reply)


@pytest_asyncio.fixture
async def desk() -> AsyncIterator[Desk]:
    desk = Desk()
    async with desk.http:
        yield desk


# What is asked rightly.


async def test_a_check_within_the_limits_is_ok(desk: Desk):
    assert await desk.post(LIMITS, owner="worker-1", gpu=0) == {
        "level": "ok",
        "sustained": False,
        "used_bytes": 5 * GIB,
        "soft_limit_bytes": 11 * GIB,
        "hard_limit_bytes": gib(11.5),
        "requested_bytes": 0,
        "gpu": "GPU-a",
        "message": "5.0 GiB used of 11.0 GiB soft limit on GPU 0",
    }


async def test_a_check_over_the_soft_limit_is_soft(desk: Desk):
    desk.used_gib = 11.3
    answer = await desk.post(LIMITS, owner="worker-1", context="before vae decode")
    assert (answer["level"], answer["sustained"]) == ("soft", True)
    assert answer["message"].endswith("(+0.3 GiB), before vae decode")


async def test_a_check_is_hard_before_the_allocation(desk: Desk):
    desk.used_gib = 11.2
    answer = await desk.post(LIMITS, owner="worker-1", requesting_mb=800)
    assert (answer["level"], answer["requested_bytes"]) == ("hard", 800 * MIB)
    (demand,) = desk.workers.demands(0)
    assert demand.key == "hard-limit:worker-1"


async def test_a_check_counts_what_the_worker_says_it_holds(desk: Desk):
    for field in ("allocated_bytes", "reserved_bytes"):
        answer = await desk.post(LIMITS, **{field: gib(11.2)})
        assert (answer["level"], answer["used_bytes"]) == ("soft", gib(11.2))


async def test_who_does_not_say_a_name_is_anonymous(desk: Desk):
    await desk.post(LIMITS)
    assert (await desk.http.get("/v1/workers")).json()["workers"][0]["owner"] == "anonymous"


async def test_models_over_their_budgets_are_named(desk: Desk):
    answer = await desk.post(
        MODELS, models={"flux": gib(6.5), "clip": GIB}, buffers={"video": GIB}, budgets={"flux": 6 * GIB},
        budget_bytes=8 * GIB,
    )  # fmt: skip
    assert answer == {
        "owner": "worker-1",
        "models_bytes": gib(7.5),
        "buffers_bytes": GIB,
        "total_bytes": gib(8.5),
        "budget_bytes": 8 * GIB,
        "fits": False,
        "shortfall_bytes": gib(0.5),
        "over_budget": [{"name": "flux", "bytes": gib(6.5), "budget_bytes": 6 * GIB}],
        "message": "7.5 GiB in models + 1.0 GiB in buffers, 0.5 GiB over the budget of 8.0 GiB; "
        "flux is over its budget: 6.5 GiB of 6.0 GiB",
    }


async def test_a_budget_is_what_is_leased_or_not_known(desk: Desk):
    leased = await desk.post("/v1/workers/leased/models", models={"flux": 3 * GIB})
    unknown = await desk.post(MODELS, models={"flux": 3 * GIB}, buffers=None, budgets=None, budget_bytes=None)
    assert (leased["budget_bytes"], leased["shortfall_bytes"]) == (2 * GIB, GIB)
    assert (unknown["budget_bytes"], unknown["fits"]) == (None, True)


async def test_a_named_point_has_the_structured_form(desk: Desk):
    await desk.post(MODELS, models={"flux": 6 * 10**9})
    desk.used_gib = 10.95e9 / GIB
    answer = await desk.post(POINTS, event="post_generation", slot=12345, allocated_bytes=10_850_000_000)
    assert answer == {
        "timestamp": "2026-07-01T12:00:00.000Z",
        "event": "post_generation",
        "slot": 12345,
        "vram_usage_gb": 10.95,
        "vram_allocated_gb": 10.85,
        "vram_reserved_gb": None,
        "models": {"flux": 6.0},
    }


async def test_a_slot_may_have_a_name(desk: Desk):
    assert (await desk.post(POINTS, event="startup", slot="left"))["slot"] == "left"
    assert (await desk.post(POINTS, event="startup"))["slot"] is None


async def test_a_generation_answers_its_delta_also_when_sent_again(desk: Desk):
    start = {"owner": "worker-1", "phase": "start", "id": "slot-1", "allocated_bytes": GIB}
    end = {"owner": "worker-1", "phase": "end", "id": "slot-1", "allocated_bytes": 3 * GIB, "slot": 1}
    assert await desk.post(GENERATIONS, **start) == {"delta_bytes": None, "generations": 0, "leak": None}
    for _ in range(2):
        assert await desk.post(GENERATIONS, **end) == {"delta_bytes": 2 * GIB, "generations": 1, "leak": None}


async def test_a_leak_is_in_the_answer_and_in_the_listing(desk: Desk):
    for n in range(1, 21):
        body = {"owner": "worker-1", "phase": "end", "id": str(n), "reserved_bytes": GIB + 20 * MIB * n}
        answer = await desk.post(GENERATIONS, **body)
    leak = {
        "initial_bytes": GIB + 120 * MIB,
        "current_bytes": GIB + 320 * MIB,
        "delta_bytes": 200 * MIB,
        "generations": 10,
        "delta_per_generation_bytes": 20 * MIB,
    }
    assert answer == {"delta_bytes": None, "generations": 20, "leak": leak}
    assert (await desk.http.get("/v1/workers")).json() == {
        "workers": [
            {
                "owner": "worker-1",
                "models": {},
                "buffers": {},
                "budget_bytes": None,
                "allocated_bytes": None,
                "reserved_bytes": GIB + 400 * MIB,
                "generations": 20,
                "last_delta_bytes": None,
                "leak": leak,
                "seen_at": "2026-07-01T12:00:00.000Z",
            }
        ]
    }


@pytest.mark.parametrize("owner", ["a/b", "a/models", "Grüße 😀", "100%", "x" * 200, "?#&="])
async def test_an_owner_may_be_called_anything_that_prints(desk: Desk, owner: str):
    for path, body in (("models", {"models": {}}), ("snapshots", {"event": "startup"})):
        await desk.post(f"/v1/workers/{quote(owner, safe='')}/{path}", **body)
    assert [worker["owner"] for worker in (await desk.http.get("/v1/workers")).json()["workers"]] == [owner]


async def test_what_changes_something_is_guarded_and_what_only_looks_is_not(desk: Desk):
    desk.allowed = False
    for path, body in CORRECT.items():
        assert (await desk.http.post(path, json=body)).status_code == 401
    assert (await desk.http.get("/v1/workers")).json() == {"workers": []}


@pytest.mark.parametrize("path", CORRECT)
async def test_the_least_that_can_be_asked_is_enough(desk: Desk, path: str):
    await desk.post(path, **CORRECT[path])


# What is asked wrongly.

BIG = MAX_BYTES + 1
WRONG = [
    *[(path, {"now": True}, "now") for path in CORRECT],
    *[(path, {field: value}, field) for path in REPORTING for field in ("allocated_bytes", "reserved_bytes")
      for value in (-1, 1.5, "1", True, [], BIG, 10**400)],
    *[(path, {"gpu": value}, "gpu") for path in REPORTING for value in (-1, 1.0, True, "", [], "x" * 201, 10**400)],
    *[(path, {"owner": value}, "owner") for path in (LIMITS, GENERATIONS)
      for value in ("", " ", "a\nb", "\ud800", 5, {}, "x" * 201)],
    *[(LIMITS, {"requesting_mb": value}, "requesting_mb") for value in (-1, 0.5, "1", 2**31)],
    *[(LIMITS, {"context": value}, "context") for value in (5, "a\x1b[31m", "x" * 201)],
    *[(path, {"slot": value}, "slot") for path in (GENERATIONS, POINTS) for value in (-1, 1.5, True, "", [], 2**63)],
    *[(GENERATIONS, {field: None}, field) for field in ("owner", "phase", "id")],
    *[(GENERATIONS, {"phase": value}, "phase") for value in ("middle", 1, [], {})],
    *[(GENERATIONS, {"id": value}, "id") for value in (5, "", "x" * 201)],
    *[(POINTS, {"event": value}, "event") for value in (None, 5, "", "x" * 201)],
    (MODELS, {"models": None}, "models"),
    *[(MODELS, {field: value}, field) for field in ("models", "buffers", "budgets") for value in (
        [], "flux", 5, True, {"flux": -1}, {"flux": 1.5}, {"flux": "6GB"}, {"flux": None}, {"flux": True},
        {"flux": {}}, {"flux": BIG}, {"flux": 10**400}, {"": 1}, {" ": 1}, {"x" * 257: 1}, {"a\nb": 1},
        {"\ud800": 1}, {str(n): n for n in range(257)})],
    *[(MODELS, {"budget_bytes": value}, "budget_bytes") for value in (-1, 1.5, "6GB", BIG)],
]  # fmt: skip


@pytest.mark.parametrize(("path", "more", "field"), WRONG, ids=lambda value: ascii(value)[:60])
async def test_a_wrong_field_is_422_and_named(desk: Desk, path: str, more: dict[str, Any], field: str):
    status, problem = await desk.refused(path, {**CORRECT[path], **more})
    assert (status, problem["type"], problem["field"]) == (422, "invalid", field)
    assert len(problem["message"]) < 400
    assert desk.workers.listing() == []


async def test_a_wrong_size_says_which_and_what_it_must_be(desk: Desk):
    _, problem = await desk.refused(MODELS, {"models": {"flux": -1}})
    assert problem["message"] == f"models: flux is -1: must be a whole number of bytes from 0 to {MAX_BYTES}"


@pytest.mark.parametrize("name", ["models", "buffers", "budgets"])
async def test_the_most_that_may_be_named_is_answered(desk: Desk, name: str):
    entries = {"x" * 250 + str(n): MAX_BYTES for n in range(256)}
    answer = await desk.post(MODELS, **{"models": {}, name: entries})
    assert answer["total_bytes"] == (0 if name == "budgets" else 256 * MAX_BYTES)


@pytest.mark.parametrize("path", REPORTING)
@pytest.mark.parametrize("name", [7, "7", "GPU-z"])
async def test_a_gpu_that_is_not_there_is_404_and_named(desk: Desk, path: str, name: int | str):
    status, problem = await desk.refused(path, {**CORRECT[path], "gpu": name})
    assert (status, problem["type"], problem["field"]) == (404, "not_found", "gpu")
    assert problem["message"] == f"GPU {name} is none of the GPUs seen here"
    assert desk.workers.listing() == []


@pytest.mark.parametrize("owner", ["x" * 201, "%09", "%20", ""])
async def test_an_owner_that_cannot_be_shown_is_422(desk: Desk, owner: str):
    for path, body in (("models", {"models": {}}), ("snapshots", {"event": "startup"})):
        status, problem = await desk.refused(f"/v1/workers/{owner}/{path}", body)
        assert (status, problem["field"]) == (422, "owner")


@pytest.mark.parametrize("path", CORRECT)
@pytest.mark.parametrize(
    ("content", "status"),
    [
        pytest.param(b"{", 400, id="no JSON"),
        pytest.param(b"[" * 100_000, 400, id="too deep"),
        pytest.param(b"9" * 10_000, 400, id="a number without end"),
        pytest.param(b"[]", 422, id="no object"),
        pytest.param(b" " * (MAX_BODY_BYTES + 1), 413, id="too large"),
    ],
)
async def test_a_body_that_cannot_be_read_is_told_apart(desk: Desk, path: str, content: bytes, status: int):
    assert (await desk.refused(path, content))[0] == status


async def test_a_number_that_is_none_is_wrong(desk: Desk):
    for none in (b"NaN", b"Infinity", b"-Infinity", b"1e999"):
        assert (await desk.refused(LIMITS, b'{"requesting_mb": ' + none + b"}"))[0] == 422


async def test_the_gpu_is_looked_at_again_before_a_limit_is_judged() -> None:
    desk = Desk()
    await desk.post(LIMITS, owner="w")
    assert desk.looks == [0.25]


async def test_what_is_measured_by_the_gpu_is_measured_now() -> None:
    desk = Desk()
    await desk.post(GENERATIONS, owner="w", phase="start", id="1")
    await desk.post(POINTS, event="startup")
    assert desk.looks == [0.0, 0.0]
    await desk.post(GENERATIONS, owner="w", phase="end", id="1", allocated_bytes=5)
    assert desk.looks == [0.0, 0.0]
