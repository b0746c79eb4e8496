"""May I? What is admitted, what is refused with which words, and whose turn it is."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from tests.policy.desk import RULES, as_gib, book, estimate, lease, of_ollama, request, verdict, with_leases
from tests.policy.worlds import (
    CARD,
    DYNAMIC,
    GIB,
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
from vram_manager.domain.demand import Kind
from vram_manager.domain.lease import Priority, Source, Ticket
from vram_manager.domain.reading import Missing
from vram_manager.domain.snapshot import Snapshot
from vram_manager.domain.watch import Watch
from vram_manager.policy import Rules, decide
from vram_manager.policy.admission import Pace, eta_seconds, judge, lease_of
from vram_manager.policy.leases import outstanding
from vram_manager.policy.line import demands, in_order, kept_before, whose_turn

NOON = datetime(2026, 7, 1, 12, tzinfo=UTC)


def card_4090(free_gib: float = 15.0) -> Snapshot:
    return snapshot(0, gpu(free_gib=free_gib, name="RTX 4090"))


# ---- 1. nothing can be said


def test_with_monitoring_off_everybody_is_admitted_and_the_answer_says_so() -> None:
    answer = verdict(request(80), card_4090(1), rules=Rules(enabled=False))
    assert answer.admitted
    assert "ENABLE_VRAM_MONITORING=false" in answer.reason
    assert not answer.fail_open


@pytest.mark.parametrize(
    "blind",
    [
        pytest.param(snapshot(0, Missing("driver gone"), comfyui=Missing("down")), id="no reading at all"),
        pytest.param(
            snapshot(0, gpus(gpu(free_gib=Missing("driver gone")), second(free_gib=5))),
            id="not of the GPU that is asked for",
        ),
    ],
)
def test_without_a_reading_the_request_is_admitted_with_the_mark_of_it(blind: Snapshot) -> None:
    answer = verdict(request(80, gpu="0"), blind)
    assert answer.admitted
    assert answer.fail_open
    assert "driver gone" in answer.reason
    assert answer.available_bytes is None


def test_without_a_reading_nobody_is_admitted_where_that_is_the_setting() -> None:
    blind = snapshot(0, Missing("driver gone"), comfyui=Missing("down"))
    answer = verdict(request(1), blind, rules=Rules(fail_open=False))
    assert not answer.admitted
    assert "VRAM_FAIL_OPEN=false" in answer.reason
    assert verdict(request(1, dry_run=True), blind, rules=Rules(fail_open=False)).admitted


def test_a_gpu_that_is_not_there_is_refused_with_those_that_are() -> None:
    answer = verdict(request(1, gpu="7"), card_4090())
    assert (answer.admitted, answer.hopeless) == (False, True)
    assert answer.reason == "gpu is 7: must be the index or UUID of one of 0 (GPU-a)"


def test_who_waits_for_a_gpu_that_has_gone_is_told_so_and_keeps_nobody_out() -> None:
    line = (waiting(4, "worker-1", 0, gpu="GPU-b"), waiting(4, "worker-2", 95))
    left = snapshot(100, gpu(free_gib=10))
    assert demands(book(line=line[:1]), left, RULES) == ()
    assert kept_before(request(4), book(line=line), left, RULES) == {}
    found = whose_turn(book(line=line), left, RULES)
    assert found is not None
    assert (found[0].request.owner, found[1].hopeless) == ("worker-1", True)


# ---- 2. more than there is


def test_more_than_the_gpu_has_is_refused_at_once_whatever_is_free() -> None:
    answer = verdict(request(80), card_4090(24))
    assert not answer.admitted
    assert answer.hopeless
    assert answer.reason == (
        "Insufficient GPU memory: need 82.0 GiB (80.0 + 2.0 safety margin), GPU 0 (RTX 4090) has 24.0 GiB in all: "
        "no waiting helps; use a larger GPU, a smaller model or a smaller margin"
    )
    assert verdict(request(23), card_4090(24)).hopeless  # the margin counts


def test_without_a_margin_the_words_speak_of_none() -> None:
    answer = verdict(request(80, margin_gib=0), card_4090())
    assert "need 80.0 GiB, GPU 0" in answer.reason
    assert answer.reason.endswith("a smaller model")


# ---- 3. it fits


@pytest.mark.parametrize(("free_gib", "admitted"), [(26.0, True), (25.99, False)])
def test_what_fits_with_its_margin_is_admitted_to_the_byte(free_gib: float, admitted: bool) -> None:
    answer = verdict(request(24), snapshot(0, gpu(free_gib=free_gib, total_gib=48)))
    assert answer.admitted is admitted


def test_a_share_of_the_gpu_is_a_size() -> None:
    answer = verdict(request("50%"), card_4090())
    assert as_gib(answer.required_bytes) == 12.0
    assert answer.admitted


def test_what_is_promised_to_others_and_not_yet_visible_is_not_available() -> None:
    held = book(lease(10, visible_bytes=gib(4)))
    answer = verdict(request(8, owner="b"), card_4090(15), held)
    assert as_gib(answer.available_bytes) == 9.0
    assert as_gib(answer.shortfall_bytes) == 1.0
    assert not answer.admitted


def test_a_promise_made_while_blind_counts_on_every_gpu() -> None:
    held = book(lease(10, gpu=None))
    seen = snapshot(0, gpus(gpu(free_gib=15), second(free_gib=15)))
    assert as_gib(verdict(request(8, owner="b"), seen, held).available_bytes) == 5.0


def test_the_gpu_with_most_room_is_chosen() -> None:
    seen = snapshot(0, gpus(gpu(free_gib=12), second(free_gib=20)))
    assert verdict(request(8), seen).gpu == "GPU-b"
    assert verdict(request(8, gpu="0"), seen).gpu == CARD


def test_a_gpu_that_cannot_be_read_is_passed_over() -> None:
    seen = snapshot(0, gpus(gpu(free_gib=Missing("lost")), second(free_gib=20)))
    assert verdict(request(8), seen).gpu == "GPU-b"


def test_an_ollama_model_goes_where_ollama_may() -> None:
    seen = snapshot(0, gpus(gpu(free_gib=12), second(free_gib=20)))
    rules = Rules(ollama_gpu="0")
    assert verdict(request(8, about=of_ollama()), seen, rules=rules).gpu == CARD
    assert verdict(request(8, about=of_ollama()), seen, rules=Rules(ollama_gpu="9")).gpu == "GPU-b"


def test_a_model_that_is_wholly_on_the_gpu_needs_no_more() -> None:
    full = snapshot(0, gpu(free_gib=0.5), ollama=ollama(model("llama3.1:8b")))
    answer = verdict(request(8, about=of_ollama()), full)
    assert (answer.admitted, answer.required_bytes) == (True, 0)
    assert answer.reason == "llama3.1:8b is wholly on the GPU already"
    partly = snapshot(0, gpu(free_gib=0.5), ollama=ollama(model("llama3.1:8b", gpu_gib=4)))
    assert not verdict(request(8, about=of_ollama()), partly).admitted
    # Who names a size beside the model means memory of its own.
    own = estimate(8, digest="sha-llama3.1:8b")
    assert not verdict(request(8, about=own), full).admitted
    assert not verdict(request(8, about=of_ollama()), snapshot(0, gpu(free_gib=0.5), ollama=Missing("slow"))).admitted


def test_a_prompt_whose_files_are_more_than_the_card_needs_the_whole_of_it() -> None:
    large = estimate(40, source=Source.FILES)
    empty = verdict(request(40, about=large, for_comfyui=True), card_4090(24))
    assert (empty.admitted, as_gib(empty.required_bytes)) == (True, 22.0)
    assert not verdict(request(40, about=large, for_comfyui=True), card_4090(20)).admitted
    assert verdict(request(40, about=large), card_4090(24)).hopeless


def test_what_comfyui_holds_is_there_for_its_own_prompt() -> None:
    seen = snapshot(0, gpu(free_gib=4), comfyui=comfyui(torch_gib=10))
    assert not verdict(request(10), seen).admitted
    answer = verdict(request(10, for_comfyui=True), seen)
    assert answer.admitted
    assert as_gib(answer.available_bytes) == 14.0


def test_a_prompt_runs_on_comfyuis_gpu_where_that_is_known() -> None:
    two = gpus(gpu(free_gib=12), second(free_gib=20))
    assert verdict(request(8, for_comfyui=True), snapshot(0, two), rules=Rules(comfyui_gpu="0")).gpu == CARD
    unseen = snapshot(0, two, comfyui=Missing("down"))
    assert verdict(request(8, for_comfyui=True), unseen, rules=Rules(comfyui_gpu="0")).gpu == "GPU-b"


def test_memory_that_is_only_perhaps_comfyuis_is_not_there_for_its_prompt() -> None:
    seen = snapshot(0, gpu(free_gib=4), comfyui=comfyui(version=DYNAMIC))
    assert not verdict(request(10, for_comfyui=True), seen).admitted


# ---- 4. why not


def test_the_refusal_names_need_margin_available_holder_and_eta() -> None:
    rendering = snapshot(
        0,
        gpu(free_gib=15, total_gib=32, name="RTX 4090"),
        comfyui=comfyui(torch_gib=12),
        queue=queue(1, since=-20.0),
    )
    answer = verdict(request(24), rendering, pace=Pace(prompt_seconds=55.0))
    assert answer.reason == (
        "Insufficient GPU memory: need 26.0 GiB (24.0 + 2.0 safety margin), 15.0 GiB available on GPU 0 (RTX 4090); "
        "ComfyUI holds 12.0 GiB and is rendering, ETA 40 s; ask for at most 13.0 GiB or wait for it with wait_seconds"
    )
    assert answer.retry_after_seconds == 40.0
    assert as_gib(answer.shortfall_bytes) == 11.0


@pytest.mark.parametrize(
    ("seen", "held", "words"),
    [
        pytest.param(
            snapshot(0, gpu(free_gib=4), comfyui=comfyui(torch_gib=16)),
            book(),
            "ComfyUI holds 16.0 GiB and is idle",
            id="idle",
        ),
        pytest.param(
            snapshot(0, gpu(free_gib=4), comfyui=comfyui(torch_gib=16), queue=Missing("slow")),
            book(),
            "ComfyUI holds 16.0 GiB, ETA",
            id="queue unknown",
        ),
        pytest.param(
            snapshot(0, gpu(free_gib=4), comfyui=comfyui(version=DYNAMIC)),
            book(),
            "ComfyUI holds perhaps 19.0 GiB and is idle",
            id="hidden weights",
        ),
        pytest.param(
            snapshot(0, gpu(free_gib=4), ollama=ollama(model("llama3.1:8b", size_gib=18))),
            book(),
            "Ollama holds 18.0 GiB for llama3.1:8b",
            id="a model",
        ),
        pytest.param(
            snapshot(0, gpu(free_gib=22)), book(lease(21, owner="tts")), "tts has a lease of 21.0 GiB", id="a lease"
        ),
        pytest.param(snapshot(0, gpu(free_gib=4)), book(), "others hold 20.0 GiB", id="somebody"),
        pytest.param(
            snapshot(0, gpu(free_gib=4), comfyui=Missing("down"), ollama=Missing("down")),
            book(),
            "others hold 20.0 GiB",
            id="nobody can be asked",
        ),
    ],
)
def test_the_largest_holder_is_named(seen: Snapshot, held, words: str) -> None:
    if words.endswith(", ETA"):
        words = words.removesuffix(", ETA")
    answer = verdict(request(20, owner="b"), seen, held)
    assert not answer.admitted
    assert f"; {words}" in answer.reason


def test_alternatives_say_what_would_fit_now() -> None:
    rules = Rules(estimates={"ltx2-19b": gib(24), "ltx2-distilled": gib(12), "tiny": gib(1), "default": gib(2)})
    asked = request(24, names=("ltx2-19b",))
    answer = verdict(asked, snapshot(0, gpu(free_gib=15, total_gib=48, name="H100")), rules=rules)
    assert [one.words for one in answer.alternatives] == [
        "up to 13.0 GiB on GPU 0 (H100)",
        "ltx2-distilled (12.0 GiB) on GPU 0 (H100)",
        "tiny (1.0 GiB) on GPU 0 (H100)",
    ]
    assert answer.alternatives[1].model == "ltx2-distilled"


def test_nothing_that_fits_is_no_alternative() -> None:
    assert verdict(request(20), card_4090(2.1)).alternatives == ()


def test_in_a_dry_run_nobody_is_refused_and_the_answer_says_who_would_have_been() -> None:
    for answer in (
        verdict(request(20), card_4090(), rules=Rules(dry_run=True)),
        verdict(request(20, dry_run=True), card_4090()),
    ):
        assert answer.admitted
        assert answer.dry_run
        assert answer.reason.startswith("DRY RUN: would refuse: Insufficient GPU memory: need 22.0 GiB")


def test_only_an_idle_comfyui_can_be_asked_to_give_way() -> None:
    idle = snapshot(0, gpu(free_gib=4), comfyui=comfyui(torch_gib=16))
    busy = snapshot(0, gpu(free_gib=4), comfyui=comfyui(torch_gib=16), queue=queue(1))
    assert as_gib(verdict(request(10), idle).reclaimable_bytes) == 16.0
    assert verdict(request(10), busy).reclaimable_bytes == 0


# ---- when


def eta(seen: Snapshot, held=None, need_gib: float = 12.0, **pace: object) -> float | None:
    held = held or book()
    card = seen.gpus.value.gpus[0]  # type: ignore[union-attr]
    known = Pace(**pace)  # type: ignore[arg-type]
    return eta_seconds(gib(need_gib), card, with_leases(seen, held), held, RULES, known, NOON)


def leaving(seconds: float, size: float = 10.0, name: str = "m"):
    return replace(model(name, size_gib=size), expires_at=NOON + timedelta(seconds=seconds))


def test_a_model_leaves_when_its_keep_alive_is_over() -> None:
    assert eta(snapshot(0, gpu(free_gib=4), ollama=ollama(leaving(240)))) == 240.0


@pytest.mark.parametrize("seconds", [-5.0, 10 * 365 * 86_400.0])
def test_a_model_that_is_busy_or_kept_for_ever_is_not_waited_for(seconds: float) -> None:
    assert eta(snapshot(0, gpu(free_gib=4), ollama=ollama(leaving(seconds)))) is None


def test_the_eta_is_when_enough_has_come_together() -> None:
    models = ollama(leaving(30, 3, "a"), leaving(90, 3, "b"), leaving(300, 6, "c"))
    assert eta(snapshot(0, gpu(free_gib=4), ollama=models)) == 300.0


def test_an_idle_comfyui_gives_way_within_seconds() -> None:
    assert eta(snapshot(0, gpu(free_gib=4), comfyui=comfyui(torch_gib=12))) == 3.0
    fresh = snapshot(0, gpu(free_gib=4), comfyui=comfyui(torch_gib=12), queue=queue(since=-0.5))
    assert eta(fresh) == 4.5


def test_a_queue_is_waited_for_at_its_usual_pace() -> None:
    busy = snapshot(0, gpu(free_gib=4), comfyui=comfyui(torch_gib=12), queue=queue(3, since=-10.0))
    assert eta(busy, prompt_seconds=30.0) == 20 + 60 + 2 + 3
    assert eta(busy) is None


def test_a_lease_is_waited_for_as_long_as_its_owner_usually_keeps_one() -> None:
    held = book(lease(10, at=-20.0, holds=1))
    assert eta(snapshot(0, gpu(free_gib=12)), held, lease_seconds={"worker-1": 50.0}) == 30.0
    assert eta(snapshot(0, gpu(free_gib=12)), held) is None
    assert eta(snapshot(0, gpu(free_gib=12)), book(lease(10, at=-20.0))) == 40.0


def test_leases_elsewhere_do_not_help() -> None:
    assert eta(snapshot(0, gpu(free_gib=4)), book(lease(10, gpu="GPU-b"))) is None


def test_there_is_no_eta_without_a_reading() -> None:
    blind = snapshot(0, Missing("gone"), comfyui=Missing("down"))
    assert eta_seconds(1, gpu(), blind, book(), RULES, Pace(), NOON) is None
    unread = gpu(free_gib=Missing("lost"))
    assert eta_seconds(1, unread, snapshot(0, gpus(unread, second())), book(), RULES, Pace(), None) is None


# ---- the line


def waiting(size: float, owner: str, since: float, **more: object) -> Ticket:
    return Ticket(request=request(size, owner=owner, **more), since=since)


def owners(*line: Ticket, now: float = 100.0, served_at: dict[str, float] | None = None) -> list[str]:
    return [ticket.request.owner for ticket in in_order(book(line=line, served_at=served_at), now)]


def test_priority_goes_before_age() -> None:
    assert owners(
        waiting(1, "batch", 70, priority=Priority.BATCH),
        waiting(1, "normal", 80),
        waiting(1, "interactive", 90, priority=Priority.INTERACTIVE),
    ) == ["interactive", "normal", "batch"]


def test_who_waits_long_rises() -> None:
    old, new = waiting(1, "old", 0, priority=Priority.BATCH), waiting(1, "new", 119, priority=Priority.INTERACTIVE)
    assert owners(old, new, now=119.9) == ["new", "old"]
    assert owners(old, new, now=120.0) == ["old", "new"]


def test_one_who_floods_the_line_goes_to_its_back_once_served() -> None:
    flood = [waiting(size, "flood", 60 + size) for size in range(1, 6)]
    assert owners(*flood, waiting(1, "single", 80), served_at={"flood": 90.0})[0] == "single"
    assert owners(*flood, waiting(1, "single", 80), served_at={"flood": 70.0})[0] == "flood"
    assert owners(*flood, waiting(1, "single", 80))[0] == "flood"


def test_newcomers_do_not_pass_one_who_waits() -> None:
    assert owners(waiting(1, "old", 60), waiting(1, "new", 99), now=100) == ["old", "new"]


def test_the_first_who_fits_is_served() -> None:
    line = (waiting(20, "large", 95), waiting(4, "small", 96))
    found = whose_turn(book(line=line), snapshot(100, gpu(free_gib=10)), RULES)
    assert found is not None
    assert found[0].request.owner == "small"
    assert found[1].admitted


def test_nobody_who_fits_is_nobodys_turn() -> None:
    assert whose_turn(book(line=(waiting(20, "large", 95),)), snapshot(100, gpu(free_gib=10)), RULES) is None


def test_after_a_while_a_large_request_is_overtaken_no_more() -> None:
    line = (waiting(20, "large", 60), waiting(4, "small", 96))
    # 18 GiB of models will leave some day: waiting helps.
    seen = snapshot(100, gpu(free_gib=10), ollama=ollama(model(size_gib=14)))
    assert whose_turn(book(line=line), seen, RULES) is None


def test_a_large_request_that_no_waiting_helps_keeps_nobody_else_out() -> None:
    line = (waiting(20, "large", 60), waiting(4, "small", 96))
    found = whose_turn(book(line=line), snapshot(100, gpu(free_gib=10)), RULES)
    assert found is not None
    assert found[0].request.owner == "small"


def test_models_that_cannot_be_seen_are_not_counted_on() -> None:
    line = (waiting(20, "large", 60), waiting(4, "small", 96))
    seen = snapshot(100, gpu(free_gib=10), ollama=Missing("slow"), comfyui=Missing("slow"))
    found = whose_turn(book(line=line), seen, RULES)
    assert found is not None
    assert found[0].request.owner == "small"


def test_one_who_waits_for_one_gpu_keeps_no_other() -> None:
    line = (waiting(20, "large", 60, gpu="0"), waiting(4, "small", 96))
    two = gpus(gpu(free_gib=10), second(free_gib=10))
    held = book(lease(14, visible_bytes=gib(14)), line=line)
    seen = with_leases(snapshot(100, two), held)
    found = whose_turn(held, seen, RULES)
    assert found is not None
    assert found[1].gpu == "GPU-b"


def test_a_newcomer_may_not_have_what_is_kept_for_one_before_it() -> None:
    held = book(lease(14, visible_bytes=gib(14)), line=(waiting(20, "large", 40),))
    seen = with_leases(snapshot(100, gpu(free_gib=10, name="RTX 4090")), held)
    small = request(4, owner="small")
    kept = kept_before(small, held, seen, RULES)
    assert kept == {CARD: "large, who has waited 60 s for 20.0 GiB"}
    answer = verdict(small, seen, held, kept=kept)
    assert not answer.admitted
    assert "10.0 GiB available on GPU 0 (RTX 4090); kept for large, who has waited 60 s" in answer.reason


def test_a_newcomer_of_higher_priority_goes_before_the_line() -> None:
    held = book(lease(14, visible_bytes=gib(14)), line=(waiting(20, "large", 60, priority=Priority.BATCH),))
    seen = with_leases(snapshot(100, gpu(free_gib=10)), held)
    assert kept_before(request(4, owner="chat", priority=Priority.INTERACTIVE), held, seen, RULES) == {}


def test_nothing_is_kept_while_nothing_can_be_seen() -> None:
    line = (waiting(20, "large", 0),)
    blind = snapshot(100, Missing("gone"), comfyui=Missing("down"))
    assert kept_before(request(4), book(line=line), blind, RULES) == {}
    unread = snapshot(100, gpus(gpu(free_gib=Missing("lost")), second()))
    assert kept_before(request(4), book(line=(waiting(20, "large", 0, gpu="0"),)), unread, RULES) == {}


# ---- what the daemon is asked for


def test_the_first_in_line_is_a_demand_for_its_need_and_margin() -> None:
    line = (waiting(20, "worker-1", 95), waiting(4, "worker-2", 96))
    (demand,) = demands(book(line=line), snapshot(100, gpu(free_gib=1)), RULES)
    assert demand.kind is Kind.WAITING
    assert demand.need_free_bytes == 22 * GIB
    assert demand.reason == "worker-1 waits for 20.0 GiB"
    assert demand.gpu == CARD
    assert not demand.patient


def test_a_batch_job_asks_patiently() -> None:
    (demand,) = demands(
        book(line=(waiting(20, "b", 95, priority=Priority.BATCH),)), snapshot(100, gpu(free_gib=1)), RULES
    )
    assert demand.patient


def test_on_several_gpus_any_of_them_would_do() -> None:
    seen = snapshot(100, gpus(gpu(free_gib=1), second(free_gib=1)))
    line = (waiting(20, "any", 95), waiting(4, "other", 96), waiting(4, "first", 97, gpu="0"))
    assert [(one.gpu, one.reason) for one in demands(book(line=line), seen, RULES)] == [
        (None, "any waits for 20.0 GiB"),
        (CARD, "first waits for 4.0 GiB"),
    ]


def test_comfyui_is_not_asked_to_make_room_for_itself() -> None:
    seen = snapshot(100, gpu(free_gib=1), comfyui=comfyui(torch_gib=20))
    (demand,) = demands(book(line=(waiting(20, "queue", 95, for_comfyui=True),)), seen, RULES)
    assert decide(replace(seen, asks=(demand,)), Watch(), RULES).branch == "4 would not fit"


def test_nothing_is_asked_for_while_nothing_can_be_seen() -> None:
    line = (waiting(20, "worker-1", 95),)
    assert demands(book(line=line), snapshot(100, Missing("gone"), comfyui=Missing("down")), RULES) == ()


def test_a_lease_is_what_was_admitted() -> None:
    asked = request("50%", owner="w", ttl_seconds=30.0, pid=7)
    given = lease_of(asked, verdict(asked, card_4090()), "lease-1", 100.0)
    assert (given.owner, given.gpu, as_gib(given.bytes), given.expires_at, given.pid) == ("w", CARD, 12.0, 130.0, 7)
    blind = lease_of(request(8), verdict(request(8), snapshot(0, Missing("x"), comfyui=Missing("y"))), "lease-2", 0.0)
    assert (blind.gpu, as_gib(blind.bytes)) == (None, 8.0)
    share = lease_of(request("5%"), verdict(request(8), snapshot(0, Missing("x"), comfyui=Missing("y"))), "l", 0.0)
    assert as_gib(share.bytes) == 8.0


def test_who_waits_is_admitted_when_the_question_goes_away() -> None:
    line = (waiting(20, "worker-1", 95),)
    full = snapshot(100, gpu(free_gib=1))
    blind = snapshot(100, Missing("gone"), comfyui=Missing("down"))
    for seen, rules in ((full, Rules(enabled=False)), (full, Rules(dry_run=True)), (blind, RULES)):
        found = whose_turn(book(line=line), seen, rules)
        assert found is not None
        assert found[1].admitted
    assert whose_turn(book(line=line), blind, Rules(fail_open=False)) is None


def test_who_waits_for_a_model_is_admitted_once_it_is_loaded() -> None:
    line = (waiting(20, "worker-1", 95, about=of_ollama(20)),)
    seen = snapshot(100, gpu(free_gib=1), ollama=ollama(model("llama3.1:8b", size_gib=20)))
    found = whose_turn(book(line=line), seen, RULES)
    assert found is not None
    assert found[1].admitted


def test_who_waits_for_a_card_that_is_lost_is_asked_about_no_other() -> None:
    line = (waiting(4, "worker-1", 95, gpu="0"),)
    lost = snapshot(100, gpus(gpu(free_gib=Missing("lost")), second()))
    found = whose_turn(book(line=line), lost, RULES)
    assert found is not None
    assert found[1].fail_open


def test_who_waits_for_more_than_there_is_any_more_is_told_so() -> None:
    found = whose_turn(book(line=(waiting(40, "worker-1", 95),)), snapshot(100, gpu(free_gib=1)), RULES)
    assert found is not None
    assert found[1].hopeless


def test_where_nobody_waits_nothing_is_kept() -> None:
    assert kept_before(request(4), book(), snapshot(100, gpu(free_gib=10)), RULES) == {}


def test_a_card_that_only_comfyui_tells_of_goes_by_no_name() -> None:
    told = snapshot(0, Missing("NVML is gone"), comfyui=comfyui(free_gib=14))
    answer = verdict(request(8), told)
    assert (answer.admitted, answer.gpu, as_gib(answer.available_bytes)) == (True, None, 14.0)
    assert verdict(request(8, gpu="GPU-a"), told).admitted
    held = book(lease(10, owner="tts"))
    refused = judge(request(8, gpu="GPU-a"), replace(told, leased_bytes=outstanding(held, told)), held, RULES)
    assert not refused.admitted
    assert "tts has a lease of 10.0 GiB" in refused.reason


def test_a_model_with_another_context_is_not_the_one_that_is_loaded() -> None:
    seen = snapshot(0, gpu(free_gib=0.5), ollama=ollama(model("llama3.1:8b")))
    other = replace(of_ollama(20), context=8192)
    assert not verdict(request(20, about=other), seen).admitted
    assert verdict(request(20, about=replace(other, context=4096)), seen).required_bytes == 0


def test_the_line_waits_for_a_model_afresh_where_it_may_be_gone_in_a_moment() -> None:
    seen = snapshot(100, gpu(free_gib=1), ollama=ollama(model("llama3.1:8b", size_gib=20)))
    line = (waiting(20, "worker-1", 95, about=of_ollama(20), afresh=True, gpu="0"),)
    found = whose_turn(book(line=line), seen, RULES)
    # It makes room for itself: 20 and the 1 that is free are not 22.
    assert found is None
    line = (waiting(18, "worker-1", 95, about=of_ollama(18), afresh=True, gpu="0"),)
    found = whose_turn(book(line=line), seen, RULES)
    assert found is not None
    assert as_gib(found[1].required_bytes) == 18.0
