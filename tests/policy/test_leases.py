"""The book: what is promised, what of it shows by now, and that nothing is promised twice."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.policy.desk import RULES, as_gib, book, estimate, lease, of_ollama
from tests.policy.worlds import (
    CARD,
    DYNAMIC,
    comfyui,
    gib,
    gpu,
    gpus,
    model,
    ollama,
    process,
    queue,
    second,
    snapshot,
)
from vram_manager.domain.lease import Book, Lease
from vram_manager.domain.reading import Missing
from vram_manager.domain.snapshot import Snapshot
from vram_manager.policy.leases import (
    CLAIM_WINDOW_SECONDS,
    MAX_SERVED,
    Families,
    account,
    at_grant,
    ended,
    granted,
    loaded,
    outstanding,
    overdue,
    put,
    renewed,
    serves,
)

LATER = CLAIM_WINDOW_SECONDS


def card(used_gib: float, *processes: tuple[int, float | Missing], at: float = 0.0, **more: object) -> Snapshot:
    listed = tuple(process(size, pid=pid) for pid, size in processes) if processes else Missing("needs pid: host")
    return snapshot(at, gpu(free_gib=24 - used_gib, processes=listed), **more)  # type: ignore[arg-type]


def give(held: Book, one: Lease, seen: Snapshot, families: Families | None = None) -> Book:
    """One lease more, as the desk enters it."""
    return granted(held, at_grant(one, held, seen, families or {}, RULES))


def look(held: Book, seen: Snapshot, families: Families | None = None) -> Book:
    return account(held, seen, families or {}, RULES)


def visible(held: Book) -> dict[str, float | None]:
    return {one.owner: as_gib(one.visible_bytes) for one in held.leases.values()}


# ---- by process


def test_what_the_holders_process_has_is_visible() -> None:
    held = give(book(), lease(10, pid=7), card(3, (7, 1), (8, 2)))
    held = look(held, card(7, (7, 5), (8, 2)))
    assert visible(held) == {"worker-1": 4.0}
    assert outstanding(held) == {CARD: gib(6)}


def test_a_process_that_does_not_hold_anything_yet_shows_nothing() -> None:
    held = give(book(), lease(10, pid=7), card(2, (8, 2)))
    assert visible(look(held, card(2, (8, 2)))) == {"worker-1": 0.0}
    assert visible(look(held, card(12, (8, 2), (7, 10)))) == {"worker-1": 10.0}


def test_memory_that_the_process_lets_go_of_is_promised_again() -> None:
    held = look(give(book(), lease(10, pid=7), card(0, (7, 0))), card(10, (7, 10)))
    assert outstanding(held) == {}
    assert outstanding(look(held, card(2, (7, 2)))) == {CARD: gib(8)}


def test_more_than_was_asked_for_is_told() -> None:
    held = look(give(book(), lease(10, pid=7), card(0, (7, 0))), card(13, (7, 13)))
    (one,) = held.leases.values()
    assert (as_gib(one.visible_bytes), as_gib(one.overclaimed_bytes), as_gib(one.peak_bytes)) == (10.0, 3.0, 13.0)


def test_the_peak_is_remembered() -> None:
    held = give(book(), lease(10, pid=7), card(0, (7, 0)))
    for used in (2, 9, 4):
        held = look(held, card(used, (7, used)))
    (one,) = held.leases.values()
    assert (as_gib(one.peak_bytes), as_gib(one.used_bytes)) == (9.0, 4.0)


def test_children_hold_memory_in_the_name_of_the_process() -> None:
    families = {7: frozenset({7, 70})}
    held = give(book(), lease(10, pid=7), card(0, (7, 0)), families)
    assert visible(look(held, card(9, (7, 1), (70, 8)), families)) == {"worker-1": 9.0}


def test_two_leases_of_one_process_are_filled_in_the_order_they_were_granted() -> None:
    held = give(book(), lease(10, id="a", owner="a", pid=7), card(0, (7, 0)))
    held = look(held, card(6, (7, 6)))
    held = give(held, lease(5, id="b", owner="b", pid=7, at=1.0), card(6, (7, 6)))
    assert visible(look(held, card(6, (7, 6)))) == {"a": 6.0, "b": 0.0}
    assert visible(look(held, card(13, (7, 13)))) == {"a": 10.0, "b": 3.0}


def test_what_a_released_lease_left_in_the_process_does_not_pass_for_the_next_ones() -> None:
    held = look(give(book(), lease(10, id="a", owner="a", pid=7), card(0, (7, 0))), card(10, (7, 10)))
    held = give(held, lease(5, id="b", owner="b", pid=7, at=1.0), card(10, (7, 10)))
    held = ended(held, "a")
    assert visible(look(held, card(10, (7, 10)))) == {"b": 0.0}
    emptied = look(held, card(0, (7, 0)))
    assert visible(look(emptied, card(5, (7, 5)))) == {"b": 5.0}


def test_another_process_of_another_gpu_is_untouched_by_an_end() -> None:
    one = lease(10, id="a", owner="a", pid=7)
    others = (
        lease(1, id="b", owner="b", pid=8, baseline_bytes=5),
        lease(1, id="c", owner="c", pid=7, gpu="GPU-b", baseline_bytes=5),
        lease(1, id="d", owner="d", pid=7),
    )
    assert list(ended(book(one, *others), "a").leases.values()) == list(others)
    assert list(ended(book(replace(one, pid=None), *others), "a").leases.values()) == list(others)


def test_where_nvml_does_not_tell_sizes_the_process_is_as_good_as_unseen() -> None:
    unknown = card(5, (7, Missing("N/A under WSL2")))
    held = give(book(), lease(10, pid=7), unknown)
    assert visible(look(held, unknown)) == {"worker-1": 0.0}
    # It was seen before and is not now: nothing it says is believed until it claims.
    held = give(book(), lease(10, pid=7), card(0, (7, 0)))
    assert visible(look(held, unknown)) == {"worker-1": 0.0}


# ---- by what the owner says


def claimed(held: Book, size: float) -> Book:
    (one,) = held.leases.values()
    return put(held, replace(one, claimed_bytes=gib(size)))


def test_what_the_owner_claims_is_visible_once_the_gpu_shows_it() -> None:
    held = claimed(give(book(), lease(10), card(0)), 10)
    assert visible(look(held, card(0))) == {"worker-1": 0.0}
    assert visible(look(held, card(10))) == {"worker-1": 10.0}


def test_a_claim_is_not_believed_beyond_what_nobody_else_accounts_for() -> None:
    held = claimed(give(book(), lease(10), card(0)), 10)
    seen = card(16, ollama=ollama(model(size_gib=8)), comfyui=comfyui(torch_gib=4))
    assert visible(look(held, seen)) == {"worker-1": 8.0}


def test_a_claim_of_more_than_was_leased_is_told() -> None:
    held = look(claimed(give(book(), lease(10), card(0)), 12), card(12))
    (one,) = held.leases.values()
    assert as_gib(one.overclaimed_bytes) == 2.0


def test_while_ollama_cannot_be_read_no_more_becomes_visible() -> None:
    held = look(claimed(give(book(), lease(10), card(0)), 4), card(4))
    held = claimed(held, 10)
    assert visible(look(held, card(20, ollama=Missing("slow")))) == {"worker-1": 4.0}


# ---- by what appeared meanwhile


def test_a_worker_that_neither_claims_nor_shows_counts_in_full_for_the_claim_window() -> None:
    held = give(book(), lease(10), card(2))
    assert visible(look(held, card(12, at=LATER - 1))) == {"worker-1": 0.0}
    assert visible(look(held, card(12, at=LATER))) == {"worker-1": 10.0}
    assert visible(look(held, card(7, at=LATER))) == {"worker-1": 5.0}


def test_two_who_cannot_be_seen_share_what_appeared() -> None:
    held = give(book(), lease(10, id="a", owner="a"), card(2))
    held = give(held, lease(8, id="b", owner="b", at=1.0), card(2))
    for used, shown in ((2, (0.0, 0.0)), (10, (8.0, 0.0)), (12, (10.0, 0.0)), (20, (10.0, 8.0))):
        assert tuple(visible(look(held, card(used, at=LATER + 1))).values()) == shown


def test_what_comfyui_may_have_loaded_since_passes_for_nobody_elses() -> None:
    hidden = comfyui(version=DYNAMIC)
    held = give(book(), lease(10), card(2, comfyui=hidden, queue=queue(runs=1)))
    assert visible(look(held, card(12, at=LATER, comfyui=hidden, queue=queue(runs=2)))) == {"worker-1": 0.0}
    assert visible(look(held, card(12, at=LATER, comfyui=hidden, queue=queue(runs=1)))) == {"worker-1": 10.0}
    # ComfyUI says itself what it has: it cannot be mistaken for anybody.
    classic = card(12, at=LATER, comfyui=comfyui(torch_gib=5), queue=queue(runs=2))
    assert visible(look(held, classic)) == {"worker-1": 5.0}


def test_without_a_comfyui_to_ask_all_that_appeared_is_the_workers() -> None:
    held = give(book(), lease(10), card(2, comfyui=Missing("down")))
    assert visible(look(held, card(9, at=LATER, comfyui=Missing("down")))) == {"worker-1": 7.0}


def test_a_lease_that_was_granted_blindly_counts_in_full() -> None:
    held = look(book(lease(10, gpu=None)), card(12, at=LATER))
    (one,) = held.leases.values()
    assert (one.gpu, one.visible_bytes) == (CARD, 0)


def test_a_blind_grant_stays_nobodys_on_a_box_with_two_gpus() -> None:
    seen = snapshot(LATER, gpus(gpu(), second()))
    assert outstanding(look(book(lease(10, gpu=None)), seen)) == {None: gib(10)}


# ---- memory that ComfyUI takes


def test_what_comfyui_holds_counts_for_the_prompt_it_was_leased_for() -> None:
    held = give(book(), lease(10, for_comfyui=True), card(4, comfyui=comfyui(torch_gib=4)))
    assert visible(look(held, card(4, comfyui=comfyui(torch_gib=4)))) == {"worker-1": 4.0}
    assert visible(look(held, card(12, comfyui=comfyui(torch_gib=12)))) == {"worker-1": 10.0}


def test_what_comfyui_held_before_is_no_measure_of_the_prompt() -> None:
    held = give(book(), lease(10, for_comfyui=True), card(12, comfyui=comfyui(torch_gib=12), queue=queue(runs=1)))
    held = look(held, card(12, comfyui=comfyui(torch_gib=12), queue=queue(runs=1)))
    assert next(iter(held.leases.values())).peak_bytes is None
    held = look(held, card(7, comfyui=comfyui(torch_gib=7), queue=queue(1, runs=2)))
    assert next(iter(held.leases.values())).peak_bytes == gib(7)


def test_weights_that_hide_are_told_by_what_appeared_once_comfyui_runs() -> None:
    hidden = comfyui(version=DYNAMIC, torch_gib=0)
    held = give(book(), lease(10, for_comfyui=True), card(2, comfyui=hidden, queue=queue(runs=1)))
    assert visible(look(held, card(11, comfyui=hidden, queue=queue(runs=1)))) == {"worker-1": 0.0}
    assert visible(look(held, card(11, comfyui=hidden, queue=queue(1, runs=2)))) == {"worker-1": 9.0}


def test_a_prompt_leased_for_blindly_shows_only_what_comfyui_says_itself() -> None:
    held = look(book(lease(10, for_comfyui=True)), card(11, comfyui=comfyui(torch_gib=3), queue=queue(1, runs=2)))
    assert visible(held) == {"worker-1": 3.0}


def test_of_several_prompts_only_the_largest_needs_more() -> None:
    seen = card(4, comfyui=comfyui(torch_gib=4))
    held = give(book(), lease(6, id="a", owner="a", for_comfyui=True), seen)
    held = give(held, lease(10, id="b", owner="b", for_comfyui=True, at=1.0), seen)
    assert outstanding(look(held, seen)) == {CARD: gib(6)}


def test_a_model_that_ollama_has_loaded_shows_in_its_own_numbers() -> None:
    held = give(book(), lease(8, about=of_ollama()), card(0))
    assert outstanding(look(held, card(0))) == {CARD: gib(8)}
    assert outstanding(look(held, card(8, ollama=ollama(model("llama3.1:8b"))))) == {}


# ---- the rest of a lease's life


def test_a_gpu_that_cannot_be_read_changes_nothing() -> None:
    held = look(give(book(), lease(10, pid=7), card(0, (7, 0))), card(10, (7, 10)))
    blind = snapshot(1, Missing("gone"), comfyui=Missing("down"))
    assert look(held, blind) == held
    assert look(held, snapshot(1, gpus(gpu(free_gib=Missing("lost")), second()))) == held
    assert at_grant(lease(1), held, blind, {}, RULES) == lease(1)
    assert at_grant(lease(1, gpu="GPU-x"), held, card(1), {}, RULES) == lease(1, gpu="GPU-x")


def test_on_a_gpu_that_is_not_comfyuis_its_memory_is_not_looked_for() -> None:
    rules = replace(RULES, comfyui_gpu="0")
    seen = snapshot(LATER, gpus(gpu(), second(free_gib=14)), comfyui=comfyui(torch_gib=5), queue=Missing("slow"))
    held = granted(book(), at_grant(lease(10, gpu="GPU-b"), book(), snapshot(0, gpus(gpu(), second())), {}, rules))
    assert visible(account(held, seen, {}, rules)) == {"worker-1": 10.0}


def test_a_renewed_lease_has_its_time_before_it_again() -> None:
    one = lease(1, at=0, restores=2)
    assert (renewed(one, 50).expires_at, renewed(one, 50).restores) == (110.0, 0)
    assert (renewed(one, 50, 5).expires_at, renewed(one, 50, 5).ttl_seconds) == (55.0, 5)


@pytest.mark.parametrize(("now", "over"), [(59.9, []), (60.0, ["lease-a"])])
def test_a_lease_expires_with_its_time_unless_a_connection_holds_it(now: float, over: list[str]) -> None:
    held = book(lease(1, owner="a"), lease(1, owner="b", holds=1))
    assert [one.id for one in overdue(held, now)] == over


def test_a_grant_notes_that_its_owner_was_served() -> None:
    held = granted(book(), lease(1, owner="a", at=5.0))
    assert held.served_at == {"a": 5.0}
    assert list(granted(granted(held, lease(1, owner="b", at=6.0)), lease(1, owner="a", at=7.0)).served_at) == [
        "b",
        "a",
    ]


def test_of_the_owners_that_were_served_only_the_latest_are_remembered() -> None:
    held = book()
    for number in range(MAX_SERVED + 5):
        held = granted(held, lease(1, owner=str(number), at=float(number)))
    assert (len(held.served_at), next(iter(held.served_at))) == (MAX_SERVED, "5")


# ---- numbers of different age


def listed_before(used_then: float, used_now: float, *processes: tuple[int, float]) -> Snapshot:
    """Memory was read after the processes were listed."""
    seen = card(used_then, *processes)
    (old,) = seen.gpus.value.gpus  # type: ignore[union-attr]
    now_used = replace(gpu(free_gib=24 - used_now), processes=old.processes, listed_free_bytes=old.memory.free_bytes)
    return snapshot(1.0, now_used)


def test_what_was_let_go_of_since_the_processes_were_listed_may_have_been_the_holders() -> None:
    held = look(give(book(), lease(10, pid=7), card(0, (7, 0))), card(10, (7, 10)))
    assert visible(look(held, listed_before(10, 4, (7, 10)))) == {"worker-1": 4.0}


def test_what_was_taken_since_the_processes_were_listed_passes_for_nobody_elses() -> None:
    held = give(book(), lease(10, id="a", owner="a", pid=7), card(0, (7, 0)))
    held = give(held, lease(8, id="b", owner="b"), card(0, (7, 0)))
    held = put(held, replace(held.leases["b"], claimed_bytes=gib(8)))
    assert visible(look(held, listed_before(0, 10, (7, 0)))) == {"a": 0.0, "b": 0.0}


def test_a_claim_is_not_set_against_numbers_from_before_it() -> None:
    held = give(book(), lease(10), card(8))
    (one,) = held.leases.values()
    held = put(held, replace(one, claimed_bytes=gib(4), claimed_at=5.0))
    assert visible(look(held, card(8, at=4.9))) == {"worker-1": 0.0}
    assert visible(look(held, card(12, at=5.1))) == {"worker-1": 4.0}


# ---- what others leave behind


def test_what_an_ended_lease_left_behind_passes_for_nobody_elses() -> None:
    held = give(book(), lease(8, id="a", owner="a"), card(0))
    held = give(held, lease(8, id="d", owner="d", at=1.0), card(0))
    held = ended(look(held, card(8, at=2.0)), "d")
    assert visible(look(held, card(8, at=LATER))) == {"a": 0.0}
    # It has gone, and what comes now is the worker's own.
    emptied = look(held, card(0, at=LATER))
    assert visible(look(emptied, card(16, at=LATER + 1))) == {"a": 8.0}


def test_what_one_claims_is_not_what_appeared_for_another() -> None:
    held = give(book(), lease(6, id="a", owner="a"), card(8))
    held = give(held, lease(6, id="d", owner="d", at=1.0), card(8))
    held = put(held, replace(held.leases["d"], claimed_bytes=gib(6)))
    assert visible(look(held, card(14, at=LATER))) == {"a": 0.0, "d": 6.0}


def test_of_two_unseen_the_later_one_waits_for_the_memory_of_the_first() -> None:
    held = give(book(), lease(10, id="a", owner="a"), card(2))
    held = give(held, lease(8, id="b", owner="b", at=1.0), card(2))
    for at in (2.0, 30.0, LATER + 1):
        held = look(held, card(2, at=at))
    assert visible(look(held, card(12, at=LATER + 2))) == {"a": 10.0, "b": 0.0}


# ---- while only ComfyUI tells of the memory


def test_while_comfyui_alone_tells_of_the_memory_every_promise_counts_there_in_full() -> None:
    held = look(give(book(), lease(10, pid=7), card(0, (7, 0))), card(10, (7, 10)))
    told = snapshot(1, Missing("NVML is gone"), comfyui=comfyui(free_gib=14))
    assert look(held, told) == held
    assert outstanding(held, told) == {None: gib(10)}
    assert outstanding(held, card(10)) == {}
    assert outstanding(book(), told) == {}


def test_a_share_that_was_promised_blindly_is_a_share_of_the_card_once_that_is_seen() -> None:
    held = look(book(lease(0, gpu=None, about=estimate("50%"))), card(0))
    assert outstanding(held) == {CARD: gib(12)}


@pytest.mark.parametrize(
    ("asked", "has", "serves_it"),
    [
        pytest.param(None, 4096, True, id="any context will do"),
        pytest.param(4096, 4096, True, id="the same"),
        pytest.param(8192, 4096, False, id="a larger one"),
        pytest.param(2048, 4096, False, id="a smaller one: Ollama loads anew all the same"),
        pytest.param(8192, None, True, id="not told"),
    ],
)
def test_a_model_serves_only_the_context_it_was_loaded_with(
    asked: int | None, has: int | None, serves_it: bool
) -> None:
    there = replace(model(size_gib=8), context_length=has)
    about = replace(of_ollama(8), context=asked)
    assert serves(there, about) is serves_it
    assert not serves(there, replace(about, digest="sha-other"))
    seen = snapshot(0, gpu(free_gib=4), ollama=ollama(there))
    assert loaded(about, seen) == (there.name if serves_it else None)


def test_a_promise_for_another_context_is_not_visible_in_the_load_before() -> None:
    there = model(size_gib=8)
    held = book(lease(10, about=replace(of_ollama(10), context=8192)))
    assert visible(look(held, snapshot(0, gpu(free_gib=16), ollama=ollama(there)))) == {"worker-1": 0.0}
    anew = replace(there, context_length=8192)
    assert visible(look(held, snapshot(0, gpu(free_gib=16), ollama=ollama(anew)))) == {"worker-1": 10.0}
