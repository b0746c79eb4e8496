"""What a call at a gateway is given: as much as can be had, never twice, and never what cannot come."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.policy.desk import RULES, as_gib, book, estimate, lease, of_ollama, request, verdict, with_leases
from tests.policy.worlds import (
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
from vram_manager.domain.lease import Book, Lease, Request, Source, Verdict
from vram_manager.domain.reading import Missing
from vram_manager.domain.snapshot import Snapshot
from vram_manager.policy import Rules
from vram_manager.policy.admission import judge
from vram_manager.policy.rooms import SLACK_BYTES, reachable

SLACK_GIB = SLACK_BYTES / gib(1)


def prompt(size: float = 8.0, *, margin_gib: float = 0.5, **more: Any) -> Request:
    """A prompt that ComfyUI's gateway keeps back."""
    values: dict[str, Any] = {"owner": "comfyui", "for_comfyui": True, "at_gateway": True, **more}
    return request(size, margin_gib=margin_gib, **values)


def chat(size: float = 8.0, *, digest: str = "sha-new", margin_gib: float = 1.0, **more: Any) -> Request:
    """A call for a model that Ollama's gateway keeps back."""
    values: dict[str, Any] = {"owner": "ollama:new", "about": of_ollama(size, digest), "at_gateway": True, **more}
    return request(size, margin_gib=margin_gib, **values)


def load(size: float, *, digest: str = "sha-new", **more: Any) -> Lease:
    """A promise for a model that Ollama loads."""
    return lease(size, owner="ollama:new", about=of_ollama(size, digest), **more)


def test_memory_that_a_loading_model_may_have_by_now_is_not_promised_to_a_prompt() -> None:
    # Of 16 GiB 1 is ComfyUI's own, 5 are nobody's as far as is known, and a model of 10.3 loads.
    seen = snapshot(0, gpu(free_gib=10, total_gib=16), comfyui=comfyui(torch_gib=1, version=DYNAMIC))
    held = book(load(10.3))
    assert not verdict(prompt(5, margin_gib=0), seen, held).admitted
    assert verdict(prompt(5, margin_gib=0), seen).admitted


def test_the_same_holds_for_a_worker_that_loads_unseen() -> None:
    seen = snapshot(0, gpu(free_gib=5, total_gib=16), comfyui=comfyui(torch_gib=1, version=DYNAMIC))
    assert not verdict(prompt(5, margin_gib=0), seen, book(lease(15))).admitted


def test_beside_promises_to_others_a_prompt_of_new_files_gets_what_is_free() -> None:
    # ComfyUI fills what is free before it lets go of anything: 14, of which a model takes 8.
    seen = snapshot(0, gpu(free_gib=14), comfyui=comfyui(torch_gib=10))
    answer = verdict(prompt(6, new_files=True), seen, book(load(8)))
    assert (answer.admitted, as_gib(answer.available_bytes)) == (False, 6.0)
    assert as_gib(verdict(prompt(14, new_files=True), seen).available_bytes) == 24.0


@pytest.mark.parametrize(
    ("promised", "available"),
    [
        pytest.param(load(8), 6.0, id="a model that loads takes it in seconds: what is free beside it"),
        pytest.param(load(8, visible_bytes=gib(8)), 24.0, id="a model that is loaded takes nothing more"),
        pytest.param(lease(8), 16.0, id="a worker who may never be seen to load holds up no files that are there"),
    ],
)
def test_what_a_prompt_of_known_files_gets_beside_promises_to_others(promised: Lease, available: float) -> None:
    seen = snapshot(0, gpu(free_gib=14), comfyui=comfyui(torch_gib=10))
    assert as_gib(verdict(prompt(6), seen, book(promised)).available_bytes) == available


def test_promises_beyond_what_is_free_are_taken_off_what_is_let_go_of() -> None:
    seen = snapshot(0, gpu(free_gib=5), comfyui=comfyui(torch_gib=10))
    answer = verdict(prompt(8, at_gateway=False), seen, book(lease(8)))
    assert (answer.admitted, as_gib(answer.available_bytes)) == (False, 7.0)
    own = replace(model("new", size_gib=8), digest="sha-new")
    about = replace(of_ollama(6, "sha-new"), context=8192)
    answer = verdict(chat(about=about), snapshot(0, gpu(free_gib=5), ollama=ollama(own)), book(lease(8)))
    assert (answer.admitted, as_gib(answer.available_bytes)) == (False, 5.0)
    assert verdict(chat(8), seen, book(lease(8))).available_bytes == 0


# ---- what its holder lets go of


def test_what_is_only_perhaps_comfyuis_holds_up_no_prompt_at_the_gateway() -> None:
    seen = snapshot(0, gpu(free_gib=4), comfyui=comfyui(version=DYNAMIC))
    assert verdict(prompt(16), seen).admitted
    assert not verdict(prompt(16, at_gateway=False), seen).admitted


def test_what_was_promised_to_the_last_prompt_is_there_for_the_next_one() -> None:
    before = lease(12, owner="comfyui", for_comfyui=True)
    seen = snapshot(0, gpu(free_gib=16))
    assert verdict(prompt(12), seen, book(before)).admitted
    assert not verdict(chat(12), seen, book(before)).admitted
    assert not verdict(prompt(12), seen, book(replace(before, for_comfyui=False))).admitted
    assert not verdict(prompt(12), seen, book(replace(before, gpu=None))).admitted


@pytest.mark.parametrize(
    ("world", "held"),
    [
        pytest.param({"ollama": ollama(model(size_gib=8))}, (), id="Ollama's by now"),
        pytest.param({}, (lease(8, visible_bytes=gib(8)),), id="a worker's by now"),
    ],
)
def test_what_comfyui_said_it_held_is_not_had_twice_once_others_have_it(
    world: dict[str, Any], held: tuple[Lease, ...]
) -> None:
    # It held 16 when it was asked last; since then 8 of them went to somebody else.
    seen = snapshot(0, gpu(free_gib=8), comfyui=comfyui(torch_gib=16), **world)
    answer = verdict(prompt(15.5), seen, book(*held))
    assert (answer.admitted, as_gib(answer.available_bytes)) == (True, 16.0)
    assert not verdict(prompt(16), seen, book(*held)).admitted


def test_models_that_cannot_be_read_are_not_taken_off_what_comfyui_holds() -> None:
    seen = snapshot(0, gpu(free_gib=8), comfyui=comfyui(torch_gib=16), ollama=Missing("slow"))
    assert verdict(prompt(20), seen).admitted


def test_a_model_that_is_loaded_anew_makes_room_for_itself() -> None:
    own = replace(model("new", size_gib=8), digest="sha-new")
    about = replace(of_ollama(12, "sha-new"), context=8192)
    full = snapshot(0, gpu(free_gib=6), ollama=ollama(own, model(size_gib=10)))
    answer = verdict(chat(about=about), full)
    assert (answer.admitted, as_gib(answer.available_bytes)) == (True, 14.0)
    assert not verdict(chat(12, digest="sha-other"), full).admitted
    assert not verdict(chat(about=estimate(12, digest="sha-new")), full).admitted  # memory of its own
    assert not verdict(chat(about=about, at_gateway=False), replace(full, ollama=Missing("slow"))).admitted


def test_what_the_model_had_is_not_had_twice_once_others_have_it() -> None:
    gone = replace(model("new", size_gib=8), digest="sha-new")
    about = replace(of_ollama(12, "sha-new"), context=8192)
    taken = snapshot(0, gpu(free_gib=6), ollama=ollama(gone), comfyui=comfyui(torch_gib=14))
    assert as_gib(verdict(chat(about=about), taken).available_bytes) == 10.0
    by_worker = snapshot(0, gpu(free_gib=6), ollama=ollama(gone))
    held = book(lease(18, visible_bytes=gib(18)))
    assert as_gib(verdict(chat(about=about), by_worker, held).available_bytes) == 6.0
    empty = snapshot(0, gpu(free_gib=24), ollama=ollama(gone))
    assert as_gib(verdict(chat(about=about), empty).available_bytes) == 24.0


def test_on_two_gpus_a_model_makes_room_for_itself_only_where_it_is() -> None:
    own = replace(model("new", size_gib=8), digest="sha-new")
    about = replace(of_ollama(12, "sha-new"), context=8192)
    two = snapshot(0, gpus(gpu(free_gib=6), second(free_gib=7)), ollama=ollama(own))
    assert as_gib(verdict(chat(about=about), two).available_bytes) == 7.0
    assert as_gib(verdict(chat(about=about), two, rules=Rules(ollama_gpu="0")).available_bytes) == 14.0


def test_a_model_that_may_be_gone_in_a_moment_is_asked_for_afresh() -> None:
    seen = snapshot(0, gpu(free_gib=4), ollama=ollama(model(size_gib=8)))
    about = of_ollama(8)
    assert verdict(chat(about=about), seen).required_bytes == 0
    assert as_gib(verdict(chat(about=about, afresh=True), seen).required_bytes) == 8.0


def test_only_idle_models_that_may_be_asked_can_give_way() -> None:
    def gives(change: dict[str, Any], **rules: Any) -> float | None:
        seen = snapshot(100, gpu(free_gib=4), ollama=ollama(replace(model(size_gib=8), **change)))
        return as_gib(verdict(chat(8, afresh=True), seen, rules=Rules(**rules)).reclaimable_bytes)

    assert gives({}) == gives({"requests": 0, "active_at": 100.0}) == 8.0
    assert gives({"requests": 1}) == 0
    assert gives({"digest": "sha-new"}) == 0
    assert gives({}, evict=False) == 0
    assert gives({}, pinned=frozenset({CHAT})) == 0
    two = snapshot(0, gpus(gpu(free_gib=4), second(free_gib=2)), ollama=ollama(model(size_gib=8)))
    assert verdict(chat(8), two).reclaimable_bytes == 0
    assert as_gib(verdict(chat(8), two, rules=Rules(ollama_gpu="0")).reclaimable_bytes) == 8.0


# ---- never more than can be had


def asks_for(asked: Request, seen: Snapshot, *held: Lease, **rules: Any) -> float | None:
    """What a call that is larger than the card is told to need, without its margin."""
    return as_gib(verdict(asked, seen, book(*held), rules=Rules(**rules)).required_bytes)


def test_a_call_that_is_larger_than_all_there_is_needs_what_could_be_had() -> None:
    answer = verdict(chat(80), snapshot(0, gpu(free_gib=1), comfyui=comfyui(torch_gib=20)))
    # Of 24 GiB 3 are nobody's: of the other 21 a quarter is left, and 1 is margin.
    assert (answer.hopeless, as_gib(answer.required_bytes)) == (False, 19.8)
    assert verdict(chat(80, at_gateway=False), snapshot(0, gpu(free_gib=1))).hopeless


@pytest.mark.parametrize(
    ("world", "held", "rules", "most_gib"),
    [
        pytest.param({"ollama": ollama(model(size_gib=8))}, (), {}, 10, id="a model that may be asked"),
        pytest.param(
            {"ollama": ollama(replace(model(size_gib=8), requests=1))}, (), {}, 10, id="a model that answers: it ends"
        ),
        pytest.param({"ollama": ollama(model(size_gib=8))}, (), {"evict": False}, 2, id="models are left alone"),
        pytest.param({"ollama": ollama(model(size_gib=8))}, (), {"pinned": frozenset({CHAT})}, 2, id="a pinned model"),
        pytest.param({"ollama": Missing("slow")}, (), {}, 2, id="models that cannot be read"),
        pytest.param({"comfyui": comfyui(torch_gib=8)}, (), {}, 10, id="what ComfyUI holds"),
        pytest.param({"comfyui": Missing("down")}, (), {}, 2, id="a ComfyUI that is down"),
        pytest.param({}, (lease(8, visible_bytes=gib(8)),), {}, 10, id="what a worker has"),
        pytest.param({}, (lease(8),), {}, 2, id="not what a worker does not have yet"),
        pytest.param({}, (load(8),), {}, 10, id="what a model that loads may have"),
        pytest.param({}, (load(8, visible_bytes=gib(8)),), {}, 2, id="not what is listed already"),
        pytest.param({}, (load(8, gpu="GPU-b"),), {}, 2, id="not what loads elsewhere"),
        pytest.param(
            {"ollama": ollama(model(size_gib=22))}, (lease(8, visible_bytes=gib(8)),), {}, 24, id="never more than all"
        ),
    ],
)
def test_what_can_be_had_is_what_is_free_and_what_others_give_back(
    world: dict[str, Any], held: tuple[Lease, ...], rules: dict[str, Any], most_gib: float
) -> None:
    seen = snapshot(0, gpu(free_gib=2), **world)
    assert asks_for(chat(80), seen, *held, **rules) == as_gib(gib(most_gib - SLACK_GIB - 1))
    assert reachable(seen, book(*held), Rules(**rules)) == {CARD: gib(most_gib)}


def test_a_model_that_is_loaded_anew_counts_on_its_own_memory_even_where_models_are_left_alone() -> None:
    own = replace(model("new", size_gib=8), digest="sha-new")
    seen = snapshot(0, gpu(free_gib=2), ollama=ollama(own))
    about = replace(of_ollama(80, "sha-new"), context=8192)
    assert asks_for(chat(about=about), seen, evict=False) == as_gib(gib(10 - SLACK_GIB - 1))


def test_a_margin_is_cut_as_well_where_not_even_that_can_be_had() -> None:
    seen = snapshot(0, gpu(free_gib=6))
    answer = verdict(chat(60, margin_gib=13), seen)
    assert (answer.admitted, answer.required_bytes) == (True, 0)
    assert verdict(chat(60, margin_gib=30), seen).admitted
    assert verdict(chat(60, margin_gib=30), snapshot(0, gpu(free_gib=0.1))).admitted
    waits = verdict(chat(60, margin_gib=13), seen, book(load(4)))
    assert "need 9.8 GiB (0.0 + 9.8 safety margin)" in waits.reason


def test_what_is_on_its_way_from_one_to_another_is_still_counted_on() -> None:
    seen = replace(snapshot(0, gpu(free_gib=2)), reachable_bytes={CARD: gib(20)})
    assert asks_for(chat(80), seen) == as_gib(gib(20 - SLACK_GIB - 1))
    less = replace(snapshot(0, gpu(free_gib=22)), reachable_bytes={CARD: gib(20)})
    assert asks_for(chat(80), less) == as_gib(gib(22 - SLACK_GIB - 1))


def test_a_small_gpu_does_not_pass_for_room_enough() -> None:
    two = snapshot(
        0, gpus(gpu(free_gib=14), second(free_gib=0.5)), comfyui=comfyui(torch_gib=10), queue=queue(1, since=0)
    )
    answer = verdict(chat(20), two, rules=Rules(comfyui_gpu="0"))
    assert (answer.admitted, answer.gpu, as_gib(answer.required_bytes)) == (False, CARD, 20.0)


def test_what_can_be_had_is_known_of_each_gpu_that_can_be_read() -> None:
    two = gpus(gpu(free_gib=Missing("lost")), second(free_gib=5))
    assert reachable(snapshot(0, two), book(), RULES) == {"GPU-b": gib(5)}
    assert reachable(snapshot(0, Missing("gone"), comfyui=Missing("down")), book(), RULES) == {}


# ---- whatever there is

QUARTERS = st.integers(0, 64)


@dataclass(frozen=True, kw_only=True)
class Card:
    """One GPU as it is, in quarters of a GiB, and what is seen of it. `listed` and `torch_said` may be out of date.

    Of the models `own` is the one that is asked for in another context.
    """

    free: int
    torch: int
    torch_said: int
    hidden: int
    models: tuple[int, ...]
    listed: tuple[bool, ...]
    gone: tuple[int, ...]
    own: int
    own_listed: int
    loading: tuple[tuple[int, int], ...]
    working: tuple[tuple[int, int, int], ...]
    foreign: int

    @property
    def taken(self) -> int:
        loaded = sum(has for _, has in self.loading) + sum(has for _, has, _ in self.working)
        return self.torch + self.hidden + sum(self.models) + self.own + loaded + self.foreign

    @property
    def promised(self) -> int:
        """What those who were promised memory will still take."""
        return sum(size - has for size, has in self.loading) + sum(size - has for size, has, _ in self.working)

    @property
    def unlisted(self) -> int:
        return sum(size for size, seen in zip(self.models, self.listed, strict=True) if not seen)

    def book(self) -> Book:
        loads = [load(size / 4, id=f"load-{n}") for n, (size, _) in enumerate(self.loading)]
        works = [
            lease(size / 4, id=f"work-{n}", visible_bytes=gib(shown / 4))
            for n, (size, _, shown) in enumerate(self.working)
        ]
        return book(*loads, *works)

    def snapshot(self, *, dynamic: bool) -> Snapshot:
        told = [size for size, seen in zip(self.models, self.listed, strict=True) if seen] + list(self.gone)
        models = [model(f"m{n}", size_gib=size / 4) for n, size in enumerate(told)]
        if self.own_listed:
            models.append(replace(model("own", size_gib=self.own_listed / 4), context_length=2048))
        seen = snapshot(
            0,
            gpu(free_gib=self.free / 4, total_gib=(self.free + self.taken) / 4),
            ollama=ollama(*models),
            comfyui=comfyui(torch_gib=self.torch_said / 4, version=DYNAMIC if dynamic else CLASSIC),
        )
        shown = sum(gib(shown / 4) for _, _, shown in self.working)
        return replace(with_leases(seen, self.book()), workers_bytes={CARD: shown})


@st.composite
def cards(draw: st.DrawFn) -> Card:
    models = draw(st.lists(QUARTERS, max_size=2).map(tuple))
    torch, own = draw(QUARTERS), draw(st.sampled_from([0, 16]))
    works = draw(st.lists(st.tuples(QUARTERS, QUARTERS, QUARTERS).map(lambda w: tuple(sorted(w))[::-1]), max_size=2))
    return Card(
        free=draw(QUARTERS),
        torch=torch,
        torch_said=draw(st.just(torch) | QUARTERS),
        hidden=draw(st.just(0) | QUARTERS),
        models=models,
        listed=tuple(draw(st.booleans()) for _ in models),
        gone=draw(st.just(()) | st.tuples(QUARTERS)),
        own=own,
        own_listed=draw(st.sampled_from([own, 0, 16])),
        loading=draw(st.lists(st.tuples(QUARTERS, QUARTERS).map(lambda w: (max(w), min(w))), max_size=2).map(tuple)),
        working=tuple(works),  # type: ignore[arg-type]
        foreign=draw(st.just(0) | QUARTERS),
    )


@settings(max_examples=400, deadline=None)
@given(card=cards(), size=QUARTERS, dynamic=st.booleans(), for_comfyui=st.booleans())
def test_no_byte_is_promised_to_two_but_for_what_nobody_accounts_for(
    card: Card, size: int, dynamic: bool, for_comfyui: bool
) -> None:
    """Whatever the ages of the readings: what is listed or promised is nobody else's.

    Only memory that is in use and that nobody says is his - not yet listed and not promised either - may pass for
    what ComfyUI holds, by its numbers of before or by the guess about DynamicVRAM, or for what a model had that has
    left meanwhile.
    """
    about = replace(of_ollama(size / 4, "sha-own"), context=8192)
    asked = prompt(size / 4) if for_comfyui else chat(about=about)
    answer = verdict_of(asked, card.snapshot(dynamic=dynamic), card.book())
    if not answer.admitted or not answer.required_bytes:
        return
    lets_go = card.torch + card.hidden if for_comfyui else card.own
    unknown = card.foreign + card.unlisted
    if for_comfyui:
        unknown += max(0, card.own - card.own_listed)
    else:
        unknown += max(0, card.torch + card.hidden - card.torch_said)
    need = answer.required_bytes + asked.margin_bytes
    assert need + gib((card.taken - lets_go + card.promised) / 4) <= gib((card.free + card.taken + unknown) / 4)


def verdict_of(asked: Request, seen: Snapshot, held: Book) -> Verdict:
    """The snapshot holds the promises already."""
    return judge(asked, seen, held, RULES)


@settings(max_examples=300, deadline=None)
@given(
    card=cards(),
    size=st.integers(0, 4000),
    margin=st.integers(0, 400),
    dynamic=st.booleans(),
    for_comfyui=st.booleans(),
    source=st.sampled_from([Source.FILES, Source.LEARNED]),
    before=QUARTERS,
)
def test_a_call_at_a_gateway_is_never_hopeless_and_needs_no_more_than_can_be_had(
    card: Card, size: int, margin: int, dynamic: bool, for_comfyui: bool, source: Source, before: int
) -> None:
    seen = replace(card.snapshot(dynamic=dynamic), reachable_bytes={CARD: gib(min(before, card.free + card.taken) / 4)})
    about = replace(of_ollama(size / 4, "sha-new"), source=source)
    asked = (prompt if for_comfyui else chat)(about=about, margin_gib=margin / 4)
    answer = verdict_of(asked, seen, card.book())
    assert not answer.hopeless
    assert answer.required_bytes is not None
    most = max(*seen.reachable_bytes.values(), *reachable(seen, card.book(), RULES).values())
    need = answer.required_bytes if answer.admitted else (answer.available_bytes or 0) + (answer.shortfall_bytes or 0)
    assert need <= max(0, most - SLACK_BYTES)


@settings(max_examples=200, deadline=None)
@given(card=cards(), size=QUARTERS, dynamic=st.booleans(), for_comfyui=st.booleans(), before=QUARTERS)
def test_what_could_be_had_before_changes_nothing_for_a_worker(
    card: Card, size: int, dynamic: bool, for_comfyui: bool, before: int
) -> None:
    seen = card.snapshot(dynamic=dynamic)
    asked = request(size / 4, for_comfyui=for_comfyui)
    answer = verdict_of(asked, seen, card.book())
    assert verdict_of(asked, replace(seen, reachable_bytes={CARD: gib(before / 4)}), card.book()) == answer
    # It needs what it asks for, whatever can be had.
    assert answer.required_bytes == gib(size / 4)
