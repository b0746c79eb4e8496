"""Who has how much of a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.policy.worlds import DYNAMIC, GIB, comfyui, device, gib, gpu, gpus, model, ollama, process, second, snapshot
from vram_manager.domain.action import Stage
from vram_manager.domain.lease import Estimate, Lease, Priority, Source
from vram_manager.domain.reading import Missing, Off
from vram_manager.domain.share import Certainty, Share, ShareKind
from vram_manager.domain.size import Size
from vram_manager.domain.snapshot import Gpu, Snapshot
from vram_manager.domain.watch import Lesson
from vram_manager.policy import Rules
from vram_manager.policy.shares import shares


def lease(owner: str, visible_gib: float, *, at_gateway: bool = False, pid: int | None = None) -> Lease:
    return Lease(
        id=f"lease-{owner}",
        request_id="r",
        owner=owner,
        gpu="GPU-a",
        bytes=gib(8),
        priority=Priority.NORMAL,
        estimate=Estimate(size=Size(bytes=gib(8)), source=Source.REQUEST, words=""),
        ttl_seconds=60,
        granted_at=0,
        expires_at=60,
        visible_bytes=gib(visible_gib),
        at_gateway=at_gateway,
        pid=pid,
    )


def told(
    seen: Snapshot, *cards: Gpu, leases: tuple[Lease, ...] = (), reported: dict[str, int] | None = None, **rules: object
) -> dict[str, float]:
    """GiB by tenant on the first card."""
    found = shares(seen, gpus(*cards), cards[0], leases=leases, reported=reported or {}, rules=Rules(**rules))  # type: ignore[arg-type]
    return {share.tenant: share.bytes / GIB for share in found}


def test_the_shares_of_a_busy_card() -> None:
    card = gpu(free_gib=2, processes=(process(0.5, "/usr/lib/xorg/Xorg", "-core", pid=7),))
    seen = snapshot(
        0,
        gpus(card),
        comfyui=comfyui(devices=(device(torch_gib=8, torch_free_gib=3),)),
        ollama=ollama(model(size_gib=6)),
    )

    assert told(seen, card, leases=(lease("tts", 4, pid=9),)) == {
        "ollama:llama3.1:8b": 6,
        "comfyui in use": 5,
        "comfyui cached": 3,
        "worker:tts": 4,
        "process:Xorg": 0.5,
        "others": 3.5,
    }


def test_weights_that_comfyui_does_not_count_are_perhaps_its() -> None:
    card = gpu(free_gib=10)
    seen = snapshot(0, gpus(card), comfyui=comfyui(version=DYNAMIC), ollama=ollama())
    found = shares(seen, gpus(card), card, rules=Rules())

    assert found[0] == Share(
        kind=ShareKind.COMFYUI_UNSEEN, tenant="comfyui unseen", bytes=gib(13), certainty=Certainty.PERHAPS
    )
    assert found[1].tenant == "others"


def test_what_programs_of_the_cpu_have_of_unified_memory_is_not_guessed_to_be_comfyuis() -> None:
    card = replace(gpu(free_gib=10), unified=True)
    seen = snapshot(0, gpus(card), comfyui=comfyui(version=DYNAMIC, devices=(device(torch_gib=2),)), ollama=ollama())
    learned = Lesson(runs=0, stages=frozenset({Stage.SOFT}), freed_bytes=0, floors={Stage.SOFT: gib(9)})

    assert told(seen, card) == {"comfyui in use": 2, "others": 12}
    found = shares(seen, gpus(card), card, lesson=learned, rules=Rules())
    assert {share.tenant: share.bytes / GIB for share in found} == {
        "comfyui in use": 2,
        "comfyui unseen": 3,
        "others": 9,
    }


def test_a_worker_counts_with_its_lease_or_its_own_word_whichever_is_more() -> None:
    card = gpu(free_gib=0)
    seen = snapshot(0, gpus(card), comfyui=Off(), ollama=Off())
    found = told(seen, card, leases=(lease("a", 3), lease("b", 1)), reported={"b": gib(2), "c": gib(1)})

    assert found == {"worker:a": 3, "worker:b": 2, "worker:c": 1, "others": 18}


def test_the_lease_of_a_call_at_a_gateway_is_its_tenants_own_memory() -> None:
    card = gpu(free_gib=12)
    seen = snapshot(0, gpus(card), comfyui=Off(), ollama=ollama(model(size_gib=8)))

    assert told(seen, card, leases=(lease("ollama:x", 8, at_gateway=True),)) == {"ollama:llama3.1:8b": 8, "others": 4}


def test_programs_are_added_up_by_their_names_and_those_that_are_somebody_are_left_out() -> None:
    card = gpu(
        free_gib=4,
        processes=(
            process(2, "/usr/bin/python3", "a.py", pid=5),
            process(1, "python3", "b.py", pid=6),
            process(1.5, pid=11),
            process(3, "/usr/bin/ollama", "runner", pid=7),
            process(3, "/usr/lib/ollama/llama-server", "--port", "1", pid=8),
            process(4, "llama-server", pid=10),
            process(5, "tts", pid=9),
            process(Missing("N/A"), "hidden", pid=12),
            process(0.5, "", pid=13),
        ),
    )
    seen = snapshot(0, gpus(card), comfyui=Off(), ollama=ollama(model(size_gib=6)))

    assert told(seen, card, leases=(lease("tts", 5, pid=9),)) == {
        "ollama:llama3.1:8b": 6,
        "worker:tts": 5,
        "process:llama-server": 4,
        "process:python3": 3,
        "process:hidden": 1.5,
        "process:unnamed": 0.5,
    }


@pytest.mark.parametrize(
    ("models", "expected"),
    [
        pytest.param((model(size_gib=6),), {"ollama:llama3.1:8b": 4.0}, id="one model is what its runner has here"),
        pytest.param((model(size_gib=6), model("b", size_gib=9)), {"ollama": 4.0}, id="two cannot be told apart"),
    ],
)
def test_with_several_cards_ollamas_runners_tell_where_it_is(models, expected: dict[str, float]) -> None:
    here = gpu(free_gib=20, processes=(process(4, "/usr/bin/ollama", "runner", pid=7),))
    other = second(free_gib=13, processes=(process(11, "/usr/bin/ollama", "runner", pid=8),))
    seen = snapshot(0, gpus(here, other), comfyui=Off(), ollama=ollama(*models))

    assert told(seen, here, other) == expected


def test_with_several_cards_and_nobody_to_tell_it_is_nobodys() -> None:
    here, other = gpu(free_gib=20), second(free_gib=20)
    seen = snapshot(0, gpus(here, other), comfyui=Off(), ollama=ollama(model()))

    assert told(seen, here, other) == {"others": 4}


def test_an_ollama_that_cannot_be_read_has_no_share() -> None:
    card = gpu(free_gib=20)

    assert told(snapshot(0, gpus(card), comfyui=Off(), ollama=Missing("x")), card) == {"others": 4}


def test_a_card_whose_memory_is_not_known_has_no_shares() -> None:
    card = gpu(free_gib=Missing("lost"))

    assert told(snapshot(0, gpus(card)), card) == {}


sizes = st.floats(0, 40, allow_nan=False)


@given(free=st.floats(0, 24), chat=sizes, torch=sizes, cached=sizes, leased=sizes, said=sizes, listed=sizes)
def test_shares_add_up_to_what_is_taken_and_none_is_empty_or_negative(
    free: float, chat: float, torch: float, cached: float, leased: float, said: float, listed: float
) -> None:
    card = gpu(free_gib=free, processes=(process(listed, "x"),))
    seen = snapshot(
        0,
        gpus(card),
        comfyui=comfyui(devices=(replace(device(torch_gib=torch), torch_free_bytes=gib(min(cached, torch))),)),
        ollama=ollama(model(size_gib=chat)),
    )
    found = shares(seen, gpus(card), card, leases=(lease("a", leased),), reported={"b": gib(said)}, rules=Rules())

    assert not isinstance(card.memory, Missing)
    assert sum(share.bytes for share in found) == card.memory.taken_bytes
    assert all(share.bytes > 0 for share in found)
    assert len({share.tenant for share in found}) == len(found)
