"""Ollama and ComfyUI take turns at the gateways: who is let in, who gives way, and that nobody waits for ever."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.policy.desk import RULES, as_gib, book, lease, of_ollama, request, with_leases
from tests.policy.test_gateway_room import Card, cards, chat, prompt
from tests.policy.worlds import (
    CALM,
    CARD,
    CHAT,
    CLASSIC,
    DYNAMIC,
    comfyui,
    gib,
    gpu,
    gpus,
    model,
    ollama,
    queue,
    second,
    snapshot,
)
from vram_manager.domain.action import FreeComfyUI, UnloadModel
from vram_manager.domain.lease import Lease, Priority, Request, Ticket
from vram_manager.domain.reading import Missing
from vram_manager.domain.snapshot import LoadedModel, Snapshot
from vram_manager.domain.watch import Watch
from vram_manager.policy import Rules, decide
from vram_manager.policy.admission import judge
from vram_manager.policy.line import (
    OVERTAKING_SECONDS,
    demands,
    gives_way,
    in_order,
    kept_before,
    overtaking_seconds,
    whose_turn,
)

TURNS = Rules(chat_turn_seconds=10, image_turn_seconds=20)


def since(asked: Request, at: float = 0.0) -> Ticket:
    return Ticket(request=asked, since=at)


# ---- how long others may go before one


def test_a_prompt_a_chat_and_a_worker_each_wait_for_a_turn_of_their_own() -> None:
    assert overtaking_seconds(prompt(), TURNS) == 20
    assert overtaking_seconds(chat(), TURNS) == 10
    assert overtaking_seconds(request(8), TURNS) == OVERTAKING_SECONDS
    assert overtaking_seconds(request(8, for_comfyui=True), TURNS) == OVERTAKING_SECONDS


@pytest.mark.parametrize(
    ("one", "other", "turn"),
    [
        pytest.param(prompt(20), chat(4), 20.0, id="a prompt before a chat"),
        pytest.param(chat(20), prompt(4), 10.0, id="a chat before a prompt"),
    ],
)
def test_the_other_side_goes_before_one_until_its_turn_has_come(one: Request, other: Request, turn: float) -> None:
    line = (since(one), since(other, 5.0))

    def first(now: float) -> Request | None:
        # A worker holds what the first one lacks.
        held = book(lease(14, visible_bytes=gib(14)), line=line)
        found = whose_turn(held, with_leases(snapshot(now, gpu(free_gib=10)), held), TURNS)
        return None if found is None else found[0].request

    assert first(turn - 0.1) == other
    assert first(turn) is None


def test_a_turn_that_has_come_is_not_lost_while_memory_is_on_its_way() -> None:
    # A moment ago 20 could be had; ComfyUI moves its weights, and for now 12 of them are in nobody's numbers.
    seen = replace(snapshot(100, gpu(free_gib=8)), reachable_bytes={CARD: gib(20)})
    line = (since(chat(18)),)
    assert kept_before(prompt(4), book(line=line), seen, TURNS).keys() == {CARD}
    # A worker counts on nothing but what is seen.
    assert kept_before(prompt(4), book(line=(since(request(17)),)), seen, TURNS) == {}


def test_on_two_gpus_only_the_one_that_can_be_had_is_kept() -> None:
    two = snapshot(
        100, gpus(gpu(free_gib=2), second(free_gib=5)), comfyui=comfyui(torch_gib=18), queue=queue(1, since=0)
    )
    rules = replace(TURNS, comfyui_gpu="0")
    assert kept_before(prompt(4), book(line=(since(chat(16)),)), two, rules).keys() == {CARD}


@settings(max_examples=200, deadline=None)
@given(card=cards(), sizes=st.lists(st.integers(1, 200), min_size=2, max_size=5), data=st.data())
def test_nobody_behind_a_call_whose_turn_has_come_is_let_in_before_it(
    card: Card, sizes: list[int], data: st.DataObject
) -> None:
    """And nobody new gets in front of it: whoever is has come, or was served, before it."""
    line = []
    for number, size in enumerate(sizes):
        of = data.draw(st.sampled_from([prompt, chat]))
        about = of_ollama(size / 4, f"sha-{number}")
        asked = of(about=about, owner="comfyui" if of is prompt else f"ollama:{number}", priority=Priority.INTERACTIVE)
        line.append(since(replace(asked, id=str(number)), data.draw(st.floats(0, 60))))
    held = replace(card.book(), line=tuple(line), served_at={"comfyui": data.draw(st.floats(0, 60))})
    seen = replace(card.snapshot(dynamic=data.draw(st.booleans())), taken_at=60.0)
    order = in_order(held, 60.0)
    due = [place for place, one in enumerate(order) if 60.0 - one.since >= overtaking_seconds(one.request, TURNS)]
    found = whose_turn(held, seen, TURNS)
    if due:
        assert found is None or order.index(found[0]) <= due[0]
        newcomer = prompt(1, priority=Priority.INTERACTIVE, owner="newcomer")
        assert kept_before(newcomer, held, seen, TURNS).keys() == {CARD}
        assert not judge(newcomer, seen, held, TURNS, kept=kept_before(newcomer, held, seen, TURNS)).admitted


# ---- both sides wait, and nobody works


@dataclass(frozen=True, kw_only=True)
class Idle:
    """A card of 24 GiB on which nobody works: what an idle ComfyUI and idle models have, and somebody unknown."""

    torch: float
    hidden: float
    models: tuple[tuple[str, float], ...]
    foreign: float
    dynamic: bool

    def snapshot(self, at: float) -> Snapshot:
        taken = self.torch + self.hidden + sum(size for _, size in self.models) + self.foreign
        return snapshot(
            at,
            gpu(free_gib=24 - taken),
            ollama=ollama(*(replace(model(name, size_gib=size), requests=0) for name, size in self.models)),
            comfyui=comfyui(torch_gib=self.torch, version=DYNAMIC if self.dynamic else CLASSIC),
        )

    def after(self, action: object) -> Idle:
        if isinstance(action, FreeComfyUI):
            return replace(self, torch=0.0, hidden=0.0)
        assert isinstance(action, UnloadModel)
        return replace(self, models=tuple(one for one in self.models if one[0] != action.model))


@st.composite
def idle_cards(draw: st.DrawFn) -> Idle:
    parts = sorted(draw(st.lists(st.integers(0, 92), min_size=4, max_size=4)))
    torch, hidden, a, b = ((high - low) / 4 for low, high in zip([0, *parts[:-1]], parts, strict=True))
    dynamic = draw(st.booleans())
    # Of what nobody accounts for so much counts as contexts and a desktop; more would pass for hidden weights.
    foreign = draw(st.sampled_from([0.0, 0.5, 1.0]))
    models = tuple((name, size) for name, size in (("a", a), ("b", b)) if size)
    return Idle(torch=torch, hidden=hidden if dynamic else 0.0, models=models, foreign=foreign, dynamic=dynamic)


@settings(max_examples=300, deadline=None)
@given(
    world=idle_cards(),
    prompt_gib=st.integers(1, 40),
    chat_gib=st.integers(1, 40),
    margin_gib=st.integers(0, 8),
    sinces=st.tuples(st.floats(0, 100), st.floats(0, 100)),
    worker_gib=st.none() | st.integers(1, 20),
)
def test_of_two_sides_that_wait_for_each_other_both_are_let_in(
    world: Idle,
    prompt_gib: int,
    chat_gib: int,
    margin_gib: int,
    sinces: tuple[float, float],
    worker_gib: int | None,
) -> None:
    """In each turn of an idle card somebody is let in, or somebody is asked to give way who does."""
    line = [
        since(prompt(prompt_gib, priority=Priority.INTERACTIVE), sinces[0]),
        since(chat(chat_gib, margin_gib=margin_gib, priority=Priority.INTERACTIVE), sinces[1]),
    ]
    if worker_gib is not None:
        # One who waits with them, for what may be more than ever comes, keeps neither of them out.
        line.append(since(request(worker_gib, owner="worker", priority=Priority.INTERACTIVE), -1000.0))
    held, now = book(line=tuple(line)), 100.0
    for _ in range(12):
        if not any(one.request.at_gateway for one in held.line):
            return
        seen = world.snapshot(now)
        found = whose_turn(held, seen, CALM)
        if found is not None:
            held = replace(held, line=tuple(one for one in held.line if one is not found[0]))
            continue
        asked = replace(seen, asks=demands(held, seen, CALM))
        decision = decide(asked, Watch(), CALM)
        assert decision.action is not None, decision.reason
        world, now = world.after(decision.action), now + 60.0
    raise AssertionError(f"still in line: {[one.request.owner for one in held.line]}")


# ---- what is asked for


def test_a_demand_tells_on_whose_side_it_is_and_for_which_model() -> None:
    full = snapshot(100, gpu(free_gib=2))
    (image,) = demands(book(line=(since(prompt(20)),)), full, RULES)
    assert (image.for_comfyui, image.model) == (True, None)
    (words,) = demands(book(line=(since(chat(20)),)), full, RULES)
    assert (words.for_comfyui, words.model) == (False, "sha-new")
    own = replace(chat().estimate, source=request(8).estimate.source)
    (worker,) = demands(book(line=(since(request(20, about=own)),)), full, RULES)
    assert (worker.for_comfyui, worker.model) == (False, None)


def test_no_more_is_asked_for_than_is_missing_beside_what_is_there_for_it_already() -> None:
    def needs(*held: Lease) -> float | None:
        asks = book(*held, line=(since(prompt(15.5)),))
        seen = snapshot(100, gpu(free_gib=8), comfyui=comfyui(torch_gib=4), ollama=ollama(model(size_gib=12)))
        (demand,) = demands(asks, with_leases(seen, asks), RULES)
        return as_gib(demand.need_free_bytes)

    # 4 are its own: beside the 8 that are free 4 are missing.
    assert needs() == 12.0
    # What was promised to its last prompt is its own as well: nothing more is missing.
    assert needs(lease(6, owner="comfyui", for_comfyui=True)) == 6.0


def test_one_whom_nothing_helps_does_not_keep_room_from_being_made_for_the_next() -> None:
    held = book(line=(since(request(18), -1.0), since(prompt(8))))
    (demand,) = demands(held, snapshot(100, gpu(free_gib=6), ollama=ollama(model(size_gib=8))), RULES)
    assert (demand.for_comfyui, as_gib(demand.need_free_bytes)) == (True, 8.5)
    (alone,) = demands(book(line=held.line[:1]), snapshot(100, gpu(free_gib=6)), RULES)
    assert as_gib(alone.need_free_bytes) == 20.0


# ---- who serves nobody new before another had its room


BUSY = replace(model(size_gib=8), requests=1)


def named(
    asked: Request,
    *,
    models: tuple[LoadedModel, ...] = (BUSY,),
    of: LoadedModel = BUSY,
    waited: float = 20.0,
    free_gib: float = 6.0,
    held: tuple[Lease, ...] = (),
    rules: dict[str, Any] | None = None,
    **world: Any,
) -> str | None:
    line = (since(asked, 100.0 - waited),)
    the_book = book(*held, line=line)
    seen = with_leases(
        snapshot(100, world.pop("card", gpu(free_gib=free_gib)), ollama=ollama(*models), **world), the_book
    )
    return gives_way(of, the_book, seen, replace(TURNS, **(rules or {})))


def test_a_model_in_constant_use_gives_way_once_a_turn_is_over() -> None:
    assert named(prompt(12)) == f"comfyui has waited 20 s for the room of {CHAT}"
    assert named(prompt(12), waited=19.9) is None
    assert named(chat(12), waited=10.0) == f"ollama:new has waited 10 s for the room of {CHAT}"
    assert named(chat(12), waited=9.9) is None
    assert named(request(12), waited=30.0) == f"worker-1 has waited 30 s for the room of {CHAT}"
    assert named(request(12), waited=29.9) is None


def test_where_nobody_waits_nobody_gives_way() -> None:
    assert gives_way(BUSY, book(), snapshot(100, gpu(free_gib=6), ollama=ollama(BUSY)), TURNS) is None


def test_who_waited_too_briefly_does_not_hide_one_behind_who_did_not() -> None:
    held = book(line=(since(request(12, priority=Priority.INTERACTIVE), 95.0), since(prompt(12), 60.0)))
    said = gives_way(BUSY, held, snapshot(100, gpu(free_gib=6), ollama=ollama(BUSY)), TURNS)
    assert said == f"comfyui has waited 40 s for the room of {CHAT}"


IDLE = replace(model("idle", size_gib=8), requests=0)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param({"asked": prompt(5)}, id="what is free is enough"),
        pytest.param({"asked": chat(12, digest=BUSY.digest)}, id="it is the one that is waited for"),
        pytest.param({"asked": prompt(12), "rules": {"evict": False}}, id="models are left alone"),
        pytest.param({"asked": prompt(12), "rules": {"pinned": frozenset({CHAT})}}, id="it is pinned"),
        pytest.param({"asked": request(15)}, id="not even its room would be enough"),
        pytest.param(
            {"asked": prompt(12), "free_gib": 2, "held": (lease(14, visible_bytes=gib(14)),)},
            id="a worker would have to leave first",
        ),
        pytest.param({"asked": chat(12), "free_gib": 1, "comfyui": comfyui(torch_gib=15), "queue": queue(1)},
            id="ComfyUI would have to end first"),
        pytest.param({"asked": prompt(12), "models": (BUSY, IDLE)}, id="another one that is idle is enough"),
        pytest.param({"asked": chat(12), "comfyui": comfyui(torch_gib=8)}, id="an idle ComfyUI is enough"),
        pytest.param({"asked": prompt(12), "of": replace(BUSY, size_vram_bytes=0)}, id="it has nothing on the GPU"),
        pytest.param({"asked": prompt(12), "card": gpus(gpu(free_gib=6), second(free_gib=1))}, id="on which GPU?"),
        pytest.param({"asked": request(12, gpu="1"), "card": gpus(gpu(free_gib=6), second(free_gib=1)),
            "rules": {"ollama_gpu": "0"}}, id="the other GPU is waited for"),
        pytest.param({"asked": prompt(12), "card": Missing("gone"), "comfyui": Missing("down")}, id="nothing is seen"),
        pytest.param({"asked": request(12, gpu="1"), "card": gpus(gpu(free_gib=6), second(free_gib=Missing("lost"))),
            "rules": {"ollama_gpu": "0"}}, id="the GPU that is waited for is lost"),
    ],
)  # fmt: skip
def test_a_model_serves_on_where_its_leaving_would_not_help(case: dict[str, Any]) -> None:
    values = {"waited": 60.0, **case}
    assert named(values.pop("asked"), **values) is None


def test_an_idle_model_that_is_needed_serves_nobody_new_either() -> None:
    assert named(prompt(12), models=(IDLE,), of=IDLE) is not None
    other = replace(model("other", size_gib=8), requests=0)
    assert named(prompt(12), models=(IDLE, other), of=IDLE, free_gib=6) is None
    assert named(prompt(19), models=(IDLE, other), of=IDLE, free_gib=6) is not None


def test_of_two_in_use_both_give_way_where_both_are_needed() -> None:
    other = replace(BUSY, name="other", digest="sha-other", size_vram_bytes=gib(5))
    assert named(prompt(16), models=(BUSY, other), free_gib=6) is not None
    assert named(prompt(16), models=(BUSY, other), of=other, free_gib=6) is not None


def test_a_model_that_is_waited_for_in_another_context_does_not_give_way_to_itself() -> None:
    other = replace(BUSY, name="other", digest="sha-other")
    asked = request(15, about=replace(of_ollama(15, BUSY.digest), context=8192))
    assert named(asked, models=(BUSY, other), waited=60.0) is None
    assert named(asked, models=(BUSY, other), of=other, waited=60.0) is not None


def test_what_the_waited_for_model_has_itself_is_not_counted_on_twice() -> None:
    own = replace(BUSY, name="own", digest="sha-own")

    def wants(size: float) -> str | None:
        about = replace(of_ollama(size, "sha-own"), context=8192)
        return named(request(about=about), models=(own, BUSY), free_gib=6, waited=60.0)

    # 6 are free, its own are 8, and those that it waits for 8: with its margin of 2 it may have 20.
    assert wants(20) is not None
    assert wants(20.1) is None


def test_on_the_gpu_that_is_ollamas_a_model_gives_way_to_the_prompt_there() -> None:
    two = gpus(gpu(free_gib=6), second(free_gib=1))
    rules = {"ollama_gpu": "0", "comfyui_gpu": "0"}
    assert named(prompt(12), card=two, rules=rules) is not None
    assert named(prompt(12), card=two, rules={**rules, "comfyui_gpu": "1"}) is None


@settings(max_examples=400, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 1)), min_size=1, max_size=3),
    torch=st.integers(0, 12),
    works=st.booleans(),
    worker=st.integers(0, 12),
    pinned=st.booleans(),
    free=st.integers(0, 12),
    foreign=st.integers(0, 4),
    size=st.integers(1, 48),
    kind=st.sampled_from([prompt, chat, request]),
)
def test_whoever_gives_way_is_needed_and_helps(
    sizes: list[tuple[int, int]],
    torch: int,
    works: bool,
    worker: int,
    pinned: bool,
    free: int,
    foreign: int,
    size: int,
    kind: Any,
) -> None:
    """Once the idle have left one still lacks its room; once those in use have left as well it has it."""
    models = tuple(replace(model(f"m{n}", size_gib=own), requests=requests) for n, (own, requests) in enumerate(sizes))
    rules = replace(TURNS, pinned=frozenset({"m0:latest"}) if pinned else frozenset())
    asked = kind(size)
    held = book(lease(worker, visible_bytes=gib(worker)), line=(since(asked, -100.0),))
    total = free + sum(own for own, _ in sizes) + torch + worker + foreign

    def admits(stay: tuple[LoadedModel, ...], torch_gib: float, before: Snapshot | None) -> bool:
        used = sum(one.size_vram_bytes for one in stay) + gib(torch_gib + worker + foreign)
        card = gpu(free_gib=total - used / gib(1), total_gib=total)
        seen = snapshot(0, card, ollama=ollama(*stay), comfyui=comfyui(torch_gib=torch_gib))
        # What it needs is what could be had at the time.
        known = {} if before is None else {CARD: gib(most)}
        return judge(asked, replace(with_leases(seen, held), reachable_bytes=known), held, rules).admitted

    may = [one for one in models if not (pinned and one.name == "m0")]
    most = total - foreign - (sizes[0][0] if pinned else 0)
    now = with_leases(
        snapshot(
            0,
            gpu(free_gib=free, total_gib=total),
            ollama=ollama(*models),
            comfyui=comfyui(torch_gib=torch),
            queue=queue(1 if works else 0),
        ),
        held,
    )
    torch_left = torch if works or kind is prompt else 0
    kept = tuple(one for one in models if one not in may)
    for one in may:
        if gives_way(one, held, now, rules) is not None:
            assert admits(kept, torch_left, now)
            in_use = tuple(other for other in may if other.requests and other is not one)
            idle_gone = tuple(other for other in models if other in kept or other in in_use or other is one)
            assert not admits(idle_gone, torch_left, now)
    assert all(gives_way(one, held, now, rules) is None for one in kept)
