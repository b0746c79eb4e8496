"""The webhook: what is sent, when it is sent again, what is given up, and that nobody ever waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import timedelta
from typing import Any, TypeAlias

import httpx
import looptime
import pytest
import respx
from hypothesis import given, settings
from hypothesis import strategies as st
from loguru import logger

from tests.fakes import FakeStore, WallClock, now
from vram_manager import __version__
from vram_manager.clock import Clock
from vram_manager.domain.event import Event, EventType
from vram_manager.journal import Journal, as_json, line
from vram_manager.webhook import (
    DEADLINE_SECONDS,
    LONGEST_PAUSE_SECONDS,
    QUEUE_EVENTS,
    STOP_SECONDS,
    TRIES,
    Webhook,
)

URL = "https://hooks.test/services/T0/B0/very-secret-path?token=very-secret-query"
LEAK = Event(type=EventType.LEAK, target="worker:tts", reason="grew by 312.0 MiB over 100 generations")
WORKS = httpx.Response(200)


class Receiver:
    """Answers what it is told to, one after the other and the last for ever; notes when it was asked what."""

    def __init__(self, *answers: httpx.Response | Exception | Callable[[], Awaitable[httpx.Response]]) -> None:
        self.answers = list(answers) or [WORKS]
        self.at: list[float] = []
        self.got: list[httpx.Request] = []

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        self.at.append(now())
        self.got.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer if isinstance(answer, httpx.Response) else await answer()

    def bodies(self) -> list[dict[str, Any]]:
        return [json.loads(request.content) for request in self.got]

    def told(self) -> list[str]:
        """The numbers in the events' ids."""
        return [body["id"].rpartition("-")[2] for body in self.bodies()]


async def never() -> httpx.Response:
    await asyncio.Event().wait()
    raise AssertionError


class Told:
    """A journal, a webhook that is told what it records, and a count of what became of it."""

    def __init__(self, secret: str | None, events: tuple[str, ...], url: str) -> None:
        self.wall = WallClock()
        clock = Clock(asyncio.get_running_loop().time, self.wall)
        self.journal = Journal(clock, FakeStore())  # type: ignore[arg-type]
        self.webhook = Webhook(clock, url, events, secret)
        self.outcomes: Counter[str] = Counter()
        self.moved = asyncio.Event()
        self.webhook.on_outcome = self.note
        self.journal.listen(self.webhook.listen)

    def note(self, outcome: str) -> None:
        self.outcomes.update([outcome])
        self.moved.set()

    def record(self, times: int = 1, event: Event = LEAK) -> None:
        for _ in range(times):
            self.journal.record(event)

    async def done(self, **outcomes: int) -> None:
        """Waits, in virtual time, until that much has become of what was recorded."""
        async with asyncio.timeout(3600):
            while self.outcomes.total() < sum(outcomes.values()):
                self.moved.clear()
                await self.moved.wait()
        assert self.outcomes == outcomes


@contextlib.asynccontextmanager
async def telling(
    receiver: Receiver, *, secret: str | None = None, events: tuple[str, ...] = ("leak",), url: str = URL
) -> AsyncIterator[Told]:
    with respx.mock(assert_all_called=False) as router:
        router.route(method="POST").mock(side_effect=receiver)
        told = Told(secret, events, url)
        work = asyncio.create_task(told.webhook.run())
        try:
            yield told
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
            await told.webhook.aclose()


Lines: TypeAlias = Callable[[], list[str]]


@pytest.fixture
def lines() -> Iterator[Lines]:
    """What the log has said of the webhook so far; never what is secret of its URL."""
    said: list[str] = []
    number = logger.add(lambda message: said.append(str(message).strip()), format="{level} {message}", level="DEBUG")
    yield lambda: [line for line in said if "The webhook at" in line]
    logger.remove(number)
    assert "very-secret" not in "\n".join(said)


@pytest.mark.asyncio
@pytest.mark.looptime
async def test_an_event_is_told_as_the_api_tells_it_with_its_log_line_for_chats() -> None:
    receiver = Receiver()
    async with telling(receiver) as told:
        told.record()
        await told.done(delivered=1)
        (entry,) = told.journal.events()
    (body,) = receiver.bodies()
    _, words = line(entry)
    assert words.startswith("Potential memory leak of tts: grew by 312.0 MiB")
    assert body == {**json.loads(json.dumps(as_json(entry))), "text": words, "content": words}
    headers = receiver.got[0].headers
    assert headers["content-type"] == "application/json"
    assert headers["user-agent"] == f"vram-manager/{__version__}"
    assert headers["x-vram-manager-event"] == "leak"
    assert headers["x-vram-manager-delivery"].startswith("leak-0001.")
    assert "x-vram-manager-signature" not in headers


@pytest.mark.asyncio
@pytest.mark.looptime
async def test_only_chosen_events_are_told() -> None:
    receiver = Receiver()
    async with telling(receiver, events=("leak", "sensor_lost")) as told:
        for kind in EventType:
            told.record(event=Event(type=kind, target="comfyui"))
        await told.done(delivered=2)
    assert [body["type"] for body in receiver.bodies()] == ["leak", "sensor_lost"]


@pytest.mark.asyncio
@pytest.mark.looptime
async def test_nobody_is_called_by_the_name_of_a_model() -> None:
    receiver = Receiver()
    async with telling(receiver) as told:
        told.record(event=Event(type=EventType.LEAK, target="worker:@everyone", reason="<!channel> " + "x" * 3000))
        await told.done(delivered=1)
    (body,) = receiver.bodies()
    assert "@everyone" not in body["text"]
    assert "<!" not in body["text"]
    assert len(body["content"]) == 2000
    assert body["target"] == "worker:@everyone"


@pytest.mark.asyncio
@pytest.mark.looptime
async def test_the_name_and_password_of_the_url_are_sent_as_such() -> None:
    receiver = Receiver()
    async with telling(receiver, url="http://me:very-secret@hooks.test/x") as told:
        told.record()
        await told.done(delivered=1)
    assert receiver.got[0].headers["authorization"].startswith("Basic ")


def signed_by(secret: str, request: httpx.Request) -> bool:
    """What a receiver does, in other words than ours: the keyed hash from its definition (RFC 2104)."""
    key = secret.encode()
    key = hashlib.sha256(key).digest() if len(key) > 64 else key
    inner, outer = (bytes(byte ^ pad for byte in key.ljust(64, b"\0")) for pad in (0x36, 0x5C))
    message = request.headers["x-vram-manager-timestamp"].encode() + b"." + request.content
    digest = hashlib.sha256(outer + hashlib.sha256(inner + message).digest()).hexdigest()
    return hmac.compare_digest(request.headers["x-vram-manager-signature"], f"sha256={digest}")


@pytest.mark.parametrize("secret", ["s", "Schlüssel", "x" * 100])
@pytest.mark.asyncio
@pytest.mark.looptime
async def test_the_signature_is_that_of_the_secret_and_of_no_other(secret: str) -> None:
    receiver = Receiver()
    async with telling(receiver, secret=secret) as told:
        told.record()
        await told.done(delivered=1)
    assert signed_by(secret, receiver.got[0])
    assert not signed_by(secret + "x", receiver.got[0])


@pytest.mark.asyncio
@pytest.mark.looptime
async def test_each_try_is_dated_anew_and_is_the_same_delivery() -> None:
    receiver = Receiver(httpx.Response(503), WORKS)
    async with telling(receiver, secret="s") as told:
        told.record(2)
        await told.done(delivered=2)
    first, again, other = receiver.got
    name = "x-vram-manager-delivery"
    assert first.headers[name] == again.headers[name] != other.headers[name]
    stamps = [int(request.headers["x-vram-manager-timestamp"]) for request in receiver.got]
    assert stamps == [int((told.wall.zero + timedelta(seconds=at)).timestamp()) for at in receiver.at]
    assert stamps[1] > stamps[0]
    assert all(signed_by("s", request) for request in receiver.got)


PASSING = [
    pytest.param(httpx.Response(status), id=str(status)) for status in (408, 425, 429, 500, 502, 503, 504, 599)
] + [
    pytest.param(ConnectionRefusedError(), id="refused"),
    pytest.param(ConnectionResetError(), id="reset"),
    pytest.param(never, id="hangs"),
]


@pytest.mark.parametrize("answer", PASSING)
@pytest.mark.asyncio
@pytest.mark.looptime
async def test_what_may_pass_is_tried_five_times_within_five_minutes_and_then_given_up(answer: Any) -> None:
    receiver = Receiver(answer)
    async with telling(receiver) as told:
        told.record()
        await told.done(failed=1)
        assert now() - receiver.at[0] <= 300.0
    assert len(receiver.at) == TRIES
    took = DEADLINE_SECONDS if answer is never else 0.0
    pauses = [later - at - took for at, later in zip(receiver.at, receiver.at[1:], strict=False)]
    for pause, shortest in zip(pauses, (5, 15, 45, 55), strict=True):
        assert shortest - 0.01 <= pause <= shortest + 5.01


@pytest.mark.parametrize("status", [301, 302, 307, 308, 400, 401, 403, 404, 410, 413, 422])
@pytest.mark.asyncio
@pytest.mark.looptime
async def test_what_will_not_change_is_not_tried_again(status: int) -> None:
    receiver = Receiver(httpx.Response(status, headers={"Location": "https://elsewhere.test/"}), WORKS)
    async with telling(receiver) as told:
        told.record(2)
        await told.done(failed=1, delivered=1)
    assert receiver.told() == ["0001", "0002"]
    assert {request.url.host for request in receiver.got} == {"hooks.test"}


@pytest.mark.parametrize(
    ("said", "waits"),
    [
        ("7", 7.0),
        ("0", 0.0),
        ("1.5", 1.5),
        ("86400", LONGEST_PAUSE_SECONDS),
        ("Wed, 01 Jul 2026 12:00:20 GMT", 20.0),
        ("Wed, 01 Jul 2020 12:00:00 GMT", 0.0),
    ],
)
@pytest.mark.asyncio
@pytest.mark.looptime
async def test_the_receiver_says_when_to_come_again(said: str, waits: float) -> None:
    receiver = Receiver(httpx.Response(429, headers={"Retry-After": said}), WORKS)
    async with telling(receiver) as told:
        told.record()
        await told.done(delivered=1)
    assert receiver.at[1] - receiver.at[0] == pytest.approx(waits, abs=1.1)


@pytest.mark.parametrize("said", ["", "soon", "-3", "nan", "inf", "Wed, 99 Foo 2026"])
@pytest.mark.asyncio
@pytest.mark.looptime
async def test_a_wish_that_cannot_be_read_is_none(said: str) -> None:
    receiver = Receiver(httpx.Response(429, headers={"Retry-After": said}), WORKS)
    async with telling(receiver) as told:
        told.record()
        await told.done(delivered=1)
    assert 5.0 <= receiver.at[1] - receiver.at[0] <= 10.1


@pytest.mark.asyncio
@pytest.mark.looptime
async def test_an_outage_is_said_once_and_so_is_its_end(lines: Lines) -> None:
    receiver = Receiver(*[httpx.Response(404)] * 3, WORKS)
    async with telling(receiver) as told:
        told.record(5)
        await told.done(failed=3, delivered=2)
    assert lines() == [
        "WARNING The webhook at https://hooks.test cannot be told: POST: HTTP 404",
        "INFO The webhook at https://hooks.test can be told again, after 3 events that it was not told",
    ]


@pytest.mark.asyncio
@pytest.mark.looptime
async def test_a_redirect_is_said_with_its_remedy(lines: Lines) -> None:
    async with telling(Receiver(httpx.Response(301)), url="http://hooks.test:8080/very-secret") as told:
        told.record()
        await told.done(failed=1)
    assert lines() == [
        (
            "WARNING The webhook at http://hooks.test:8080 cannot be told: POST: HTTP 301; "
            "set VRAM_WEBHOOK_URL to where it redirects: redirects are not followed"
        )
    ]


@pytest.mark.asyncio
@pytest.mark.looptime
async def test_the_oldest_make_room_and_that_is_said_once_each_time(lines: Lines) -> None:
    gate = asyncio.Event()

    async def later() -> httpx.Response:
        await gate.wait()
        return WORKS

    receiver = Receiver(later)
    async with telling(receiver) as told:
        told.record()
        await asyncio.sleep(0.1)
        told.record(QUEUE_EVENTS + 3)
        assert told.outcomes == {"dropped": 3}
        gate.set()
        await told.done(dropped=3, delivered=QUEUE_EVENTS + 1)
        said = lines()
        await asyncio.sleep(0.1)
        gate.clear()
        told.record()
        await asyncio.sleep(0.1)
        told.record(QUEUE_EVENTS + 1)
        gate.set()
        await told.done(dropped=4, delivered=2 * QUEUE_EVENTS + 2)
    numbers = [int(number) for number in receiver.told()]
    assert numbers[: QUEUE_EVENTS + 1] == [1, *range(5, QUEUE_EVENTS + 5)]
    assert lines() == said * 2
    assert said == [
        (
            f"WARNING The webhook at https://hooks.test does not keep up: of more than {QUEUE_EVENTS} events "
            "the oldest are dropped"
        )
    ]


@pytest.mark.asyncio
@pytest.mark.looptime
async def test_a_receiver_that_hangs_delays_neither_the_journal_nor_for_long_the_end(lines: Lines) -> None:
    async with telling(Receiver(never)) as told:
        told.record()
        await asyncio.sleep(1)
        before = now()
        told.record(9)
        assert now() == before
    assert now() - before == pytest.approx(STOP_SECONDS)
    await told.webhook.aclose()
    assert told.outcomes == {"dropped": 10}
    assert lines() == ["WARNING The webhook at https://hooks.test was not told 10 events: there was no time left"]


@pytest.mark.asyncio
@pytest.mark.looptime
async def test_what_is_queued_at_the_end_is_still_told_also_what_waits_for_its_next_try() -> None:
    receiver = Receiver(httpx.Response(503), WORKS)
    async with telling(receiver) as told:
        told.record(3)
        await asyncio.sleep(1)
        assert told.outcomes == {}
        before = now()
    assert now() - before < STOP_SECONDS
    assert receiver.told() == ["0001", "0001", "0002", "0003"]
    assert told.outcomes == {"delivered": 3}


@pytest.mark.asyncio
@pytest.mark.looptime
async def test_at_the_end_nothing_is_tried_twice() -> None:
    receiver = Receiver(httpx.Response(503))
    async with telling(receiver) as told:
        told.record(3)
    assert receiver.told() == ["0001", "0002", "0003"]
    assert told.outcomes == {"failed": 3}


@pytest.mark.asyncio
@pytest.mark.looptime
async def test_after_the_end_nothing_is_queued() -> None:
    receiver = Receiver()
    async with telling(receiver) as told:
        pass
    told.record()
    await told.webhook.aclose()
    assert receiver.got == []
    assert told.outcomes == {}


ANSWERS = st.sampled_from([200, 204, 404, 503, "retry", "hang", "reset"])
STEPS = st.lists(st.tuples(st.integers(0, 90), st.sampled_from([0.0, 0.5, 20.0, 400.0])), min_size=1, max_size=6)


def answer_of(what: int | str) -> Any:
    match what:
        case "retry":
            return httpx.Response(429, headers={"Retry-After": "3"})
        case "hang":
            return never
        case "reset":
            return ConnectionResetError()
    return httpx.Response(int(what))


@given(answers=st.lists(ANSWERS, min_size=1, max_size=12), steps=STEPS)
@settings(max_examples=25, deadline=None)
def test_every_event_is_told_in_order_or_counted_as_failed_or_dropped(
    answers: list[int | str], steps: list[tuple[int, float]]
) -> None:
    async def story() -> tuple[Told, Receiver, int]:
        receiver = Receiver(*map(answer_of, answers))
        async with telling(receiver, url="http://hooks.test/x") as told:
            for count, pause in steps:
                told.record(count)
                await asyncio.sleep(pause)
        return told, receiver, sum(count for count, _ in steps)

    with asyncio.Runner(loop_factory=lambda: looptime.patch_event_loop(asyncio.new_event_loop())) as runner:
        told, receiver, recorded = runner.run(story())
    assert told.outcomes.total() == recorded
    numbers = [int(number) for number in receiver.told()]
    assert numbers == sorted(numbers)
    taken = [number for number, answer in zip(numbers, given_answers(answers, len(numbers)), strict=True) if answer]
    assert len(taken) == len(set(taken))
    assert told.outcomes["delivered"] == len(taken)


def given_answers(answers: list[int | str], asked: int) -> list[bool]:
    """For each time it was asked, whether the receiver took it."""
    told = [answers[min(number, len(answers) - 1)] for number in range(asked)]
    return [answer in {200, 204} for answer in told]
