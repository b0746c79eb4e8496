"""What people wrote monitors of their own for, asked of a real daemon through `vram_manager.client`.

Two of them: a worker that takes jobs from a queue and puts them to ComfyUI, and a pipeline whose models stay on a card
of 12 GB. Their own numbers stand here. The README tells the same as a table, in which no test of this file is missing.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import re
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from loguru import logger

from tests.fakes import GIB, MIB, InThread
from tests.test_vram_client import FakeCuda
from vram_manager.client import (
    InsufficientVram,
    Lease,
    MemoryPressureError,
    MemoryPressureWarning,
    VramClient,
    call,
    check_vram_sufficient,
    get_available_vram,
    get_vram_stats,
)
from vram_manager.errors import SensorError

ROOT = Path(__file__).parents[1]
GB = 10**9
HANGS_SECONDS = 3600.0

Serve = Callable[..., InThread]


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    with contextlib.ExitStack() as stack:

        def started(total_gib: int, **settings: str) -> InThread:
            """A daemon over one card that nobody uses; its settings are in the client's environment too."""
            quick = {
                "VRAM_SOCKET": str(tmp_path / "vram.sock"),
                "VRAM_STATE_DIR": str(tmp_path),
                "VRAM_CHECK_INTERVAL": "0.25",
            }
            for name, value in (quick | settings).items():
                monkeypatch.setenv(name, value)
            real = InThread()
            real.card.total_bytes = total_gib * GIB
            real.comfyui.hold(0)
            return stack.enter_context(real)

        yield started


def uses(real: InThread, size_bytes: float) -> None:
    """So much of the card is in use by others now, and what was read before is too old for an answer."""
    real.card.holders["others"] = round(size_bytes)
    real.ahead += 1


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """A torch that has 10.85 GB in tensors, keeps 11.1 and could do without 150 MB of them."""
    torch = types.ModuleType("torch")
    torch.cuda = FakeCuda(allocated=10_850_000_000, reserved=11_100_000_000, freed=150_000_000)
    monkeypatch.setitem(sys.modules, "torch", torch)
    return torch.cuda


@pytest.fixture
def records() -> Iterator[list[Any]]:
    """Every record of the daemon's log as it is written."""
    found: list[Any] = []
    sink = logger.add(lambda message: found.append(message.record), level=0)
    yield found
    logger.remove(sink)


def told(records: list[Any], *levels: str) -> list[str]:
    """The lines of these levels, without the ids at their ends."""
    return [re.sub(r" \[[a-z]+-\d+\]$", "", one["message"]) for one in records if one["level"].name in levels]


def metric(name: str) -> float | None:
    """One sample of GET /metrics, None where there is none."""
    text = call("GET", "/metrics").body
    found = re.search(rf"^vram_manager_{re.escape(name)} (\S+)$", text, flags=re.MULTILINE)
    return float(found[1]) if found else None


# A queue worker in front of ComfyUI: an H100 with 80 GiB, jobs of 24 GiB, a margin of 2.

H100_GIB = 80
ESTIMATES = {"flux2-klein-9b": 18432, "flux2-klein-4b": 8192, "ltx2-19b": 24576, "default": 8192}


@pytest.fixture
def h100(serve: Serve) -> InThread:
    """15 GiB of it are available."""
    real = serve(H100_GIB, VRAM_ESTIMATES=json.dumps(ESTIMATES))
    uses(real, 65 * GIB)
    return real


def test_a_job_that_does_not_fit_is_refused_with_a_sentence_before_it_is_queued(h100: InThread):
    sentence = (
        "Insufficient GPU memory: need 26.0 GiB (24.0 + 2.0 safety margin), 15.0 GiB available on GPU 0 (Fake card 0); "
        "others hold 65.0 GiB; ask for at most 13.0 GiB"
    )
    queued: list[str] = []
    with VramClient(fail_open=False) as vram:
        assert vram.check(24576).reason == sentence
        with pytest.raises(InsufficientVram) as refused, vram.lease(24576):
            queued.append("job")
    assert (str(refused.value), queued) == (sentence, [])
    assert refused.value.admission.shortfall_bytes == 11 * GIB


def test_the_check_of_the_worker_says_yes_no_and_why(h100: InThread, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "vram_manager")
    assert check_vram_sufficient(8192) is True
    assert check_vram_sufficient(80_000) is False
    assert check_vram_sufficient(24576) is False
    yes, never, no = caplog.records
    assert (yes.levelname, never.levelname, no.levelname) == ("INFO", "WARNING", "WARNING")
    assert yes.getMessage() == "VRAM check: 8192 MB required + 2048 MB margin, 15360 MB available: sufficient"
    assert "no waiting helps; use a larger GPU, a smaller model or a smaller margin" in never.getMessage()
    assert no.getMessage().startswith(
        "VRAM check: 24576 MB required + 2048 MB margin, 15360 MB available: rejected: Insufficient GPU memory"
    )


def test_the_margin_comes_from_the_environment_or_with_the_call(serve: Serve):
    real = serve(H100_GIB, VRAM_SAFETY_MARGIN_MB="1024")
    uses(real, 65 * GIB)
    with VramClient(fail_open=False) as vram:
        assert vram.check("14GiB").margin_bytes == GIB
        assert check_vram_sufficient(14 * 1024) is True
        assert check_vram_sufficient(14 * 1024, safety_margin_mb=2048) is False
        assert not vram.check("14GiB", margin_mb=2048)


def test_the_stats_are_those_of_the_health_endpoint(serve: Serve):
    real = serve(H100_GIB)
    uses(real, 24_000 * MIB)
    real.until(lambda: get_available_vram() != 81920)
    health = call("GET", "/health/vram").body
    numbers = {"total_mb": 81920, "used_mb": 24000, "free_mb": 57920, "usage_percent": 29.3}
    assert {name: health[name] for name in numbers} == numbers
    assert health["gpus"] == [{"index": 0, "uuid": "GPU-a", "name": "Fake card 0", **numbers}]
    assert get_vram_stats() == health
    assert get_available_vram() == 57920


def test_the_heartbeat_has_used_and_total(serve: Serve):
    real = serve(H100_GIB)
    uses(real, 8192 * MIB)
    with VramClient(fail_open=False) as vram:
        real.until(lambda: vram.worker_status()["gpu_memory_used"])
        assert vram.worker_status() == {"gpu_memory_used": 8192, "gpu_memory_total": 81920}


def test_a_card_that_cannot_be_read_lets_every_job_through_and_that_is_said(h100: InThread, records: list[Any]):
    h100.gpus.error = h100.comfyui.error = SensorError("NVML: driver gone")
    h100.ahead += 60
    with VramClient(owner="job-7", fail_open=False) as vram:
        answer = vram.check(80_000)
        assert (answer.admitted, answer.fail_open, answer.available_bytes) == (True, True, None)
        assert check_vram_sufficient(80_000) is True
        h100.until(lambda: vram.worker_status() == {"gpu_memory_used": None, "gpu_memory_total": None})
    assert get_available_vram() is None
    warnings = told(records, "WARNING")
    assert "GPU cannot be read: NVML: driver gone" in warnings
    assert any(line.startswith("Admitted job-7 blindly: no GPU reading") for line in warnings)


def test_a_card_that_cannot_be_read_lets_no_job_through_where_that_is_the_setting(serve: Serve):
    real = serve(H100_GIB, VRAM_FAIL_OPEN="false")
    real.gpus.error = real.comfyui.error = SensorError("NVML: driver gone")
    real.ahead += 60
    assert check_vram_sufficient(8192) is False


def test_a_reading_that_hangs_does_not_hang_the_answer(h100: InThread):
    with VramClient(fail_open=False) as vram:
        assert not vram.check(24576)
        h100.gpus.takes_seconds = HANGS_SECONDS
        h100.ahead += 2
        # From the last reading while it is young, and blindly when it is not.
        assert not vram.check(24576).fail_open
        h100.comfyui.error = SensorError("GET /system_stats: connection refused")
        h100.ahead += 60
        assert vram.check(24576).fail_open
    assert call("GET", "/health").body["sensors"]["nvml"]["state"] == "missing"


def test_in_a_dry_run_a_refusal_is_said_and_the_job_goes_on(
    serve: Serve, caplog: pytest.LogCaptureFixture, records: list[Any]
):
    real = serve(H100_GIB, VRAM_CHECK_DRY_RUN="true")
    uses(real, 65 * GIB)
    assert check_vram_sufficient(24576) is True
    assert caplog.records[-1].levelname == "WARNING"
    assert caplog.messages[-1].startswith(
        "DRY RUN: would reject 24576 MB required + 2048 MB margin, 15360 MB available"
    )
    with VramClient(owner="job-7", fail_open=False) as vram, vram.lease(24576) as lease:
        assert (lease.id, lease.admission.dry_run) == (None, True)
    assert any(
        line.startswith("DRY RUN: would refuse job-7: Insufficient GPU memory") for line in told(records, "INFO")
    )


def test_switched_off_nothing_is_refused(serve: Serve):
    real = serve(H100_GIB, ENABLE_VRAM_MONITORING="false")
    uses(real, 65 * GIB)
    assert check_vram_sufficient(80_000) is True
    with VramClient(fail_open=False) as vram:
        answer = vram.check(80_000)
    assert (answer.admitted, answer.monitoring) == (True, False)


def test_a_job_that_says_nothing_counts_as_the_default(serve: Serve):
    serve(H100_GIB, VRAM_DEFAULT_ESTIMATE_MB="8192")
    with VramClient(fail_open=False) as vram:
        answer = vram.check()
    assert (answer.required_bytes, answer.estimate_source) == (8192 * MIB, "default")


@pytest.mark.parametrize("model", ESTIMATES)
def test_the_table_of_estimates_is_looked_up_by_model(serve: Serve, model: str):
    serve(H100_GIB, VRAM_ESTIMATES=json.dumps(ESTIMATES), VRAM_DEFAULT_ESTIMATE_MB="1024")
    known = model != "default"
    with VramClient(fail_open=False) as vram:
        answer = vram.check(model=model if known else "sdxl")
    assert (answer.required_bytes, answer.estimate_source) == (ESTIMATES[model] * MIB, "table" if known else "default")


def test_a_checkpoint_of_the_workflow_is_found_in_the_table(serve: Serve):
    serve(H100_GIB, VRAM_ESTIMATES='{"ltx-2-19b": 24576}')
    workflow = {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "ltx-2-19b-dev-fp8.safetensors"}},
        "2": {"class_type": "SaveVideo", "inputs": {"video": ["1", 0]}},
    }
    with VramClient(fail_open=False) as vram:
        answer = vram.check(workflow=workflow)
    assert (answer.required_bytes, answer.estimate_source) == (24 * GIB, "table")


def test_a_refusal_names_a_smaller_model_that_fits(serve: Serve):
    real = serve(H100_GIB, VRAM_ESTIMATES='{"ltx2-19b": 24576, "ltx2-distilled": 12288}')
    uses(real, 65 * GIB)
    with VramClient(fail_open=False) as vram:
        answer = vram.check(model="ltx2-19b")
    assert not answer
    assert [one.words for one in answer.alternatives] == [
        "up to 13.0 GiB on GPU 0 (Fake card 0)",
        "ltx2-distilled (12.0 GiB) on GPU 0 (Fake card 0)",
    ]
    assert answer.alternatives[1].model == "ltx2-distilled"


def test_a_refusal_says_in_how_many_minutes_to_try_again(serve: Serve):
    real = serve(H100_GIB)
    with VramClient(owner="job-1", fail_open=False) as vram:
        with vram.lease("65GiB"):
            real.ahead += 300
        with vram.lease("65GiB"):
            answer = VramClient(owner="job-2", fail_open=False).check(24576)
    assert not answer
    assert "job-1 has a lease of 65.0 GiB, ETA 5 min" in answer.reason
    assert answer.retry_after_seconds is not None
    assert 240 < answer.retry_after_seconds <= 330


def test_a_job_may_wait_for_its_memory_instead_of_failing(serve: Serve):
    real = serve(H100_GIB)
    granted: list[Lease] = []

    def wait() -> None:
        with VramClient(owner="job-2", fail_open=False).lease(24576, wait_seconds=600) as lease:
            granted.append(lease)

    waiting = threading.Thread(target=wait)
    with VramClient(owner="job-1", fail_open=False) as vram, vram.lease("65GiB"):
        waiting.start()
        real.until(lambda: real.daemon is not None and real.daemon.admissions.book.line)
        (one,) = call("GET", "/v1/leases").body["line"]
        assert (one["owner"], one["position"], one["required_bytes"]) == ("job-2", 1, 24 * GIB)
        assert granted == []
    waiting.join(20)
    assert [lease.admission.admitted for lease in granted] == [True]


def test_every_decision_is_logged_with_who_why_and_how_much(h100: InThread, records: list[Any]):
    with VramClient(owner="job-7", fail_open=False) as vram:
        with vram.lease(8192):
            pass
        assert not vram.check(24576)
    lines = told(records, "INFO", "WARNING")
    granted = (
        r"Admitted job-7: 8\.0 GiB on GPU 0 \(Fake card 0\), 15\.0 GiB available "
        r"\(request: as asked for; lease-\w+\)"
    )
    assert any(re.fullmatch(granted, line) for line in lines)
    assert any(line.startswith("Refused job-7: Insufficient GPU memory: need 26.0 GiB (24.0 + 2.0") for line in lines)


def test_the_log_tells_what_a_job_was_thought_to_need_and_what_it_took(h100: InThread, records: list[Any]):
    with VramClient(owner="job-7", fail_open=False) as vram, vram.lease(8192) as lease:
        lease.claimed(9 * GIB)
    (line,) = [line for line in told(records, "INFO") if line.startswith("Lease of job-7 ended: released")]
    assert line.endswith("estimated 8.0 GiB, peak 9.0 GiB")
    assert metric('estimate_peak_ratio_count{source="request"}') == 1


# A pipeline with fixed budgets: five models on a card of 12 GB, a soft limit of 11.0 and a hard one of 11.5.

CARD_GIB = 12
LIMITS = {"VRAM_SOFT_LIMIT": "11GB", "VRAM_HARD_LIMIT": "11.5GB", "VRAM_SOFT_LIMIT_SECONDS": "0"}
MODELS_GB = {"flux": 6.0, "liveportrait": 3.5, "kokoro": 0.4, "clip_b": 0.3, "clip_l": 0.6}
MODELS = {name: round(size * GB) for name, size in MODELS_GB.items()}
BUDGET = 11_800_000_000


@pytest.fixture
def card(serve: Serve) -> InThread:
    return serve(CARD_GIB, **LIMITS)


@pytest.fixture
def director(card: InThread) -> Iterator[VramClient]:
    with VramClient(owner="director", fail_open=False) as vram:
        yield vram


def test_within_its_budget_a_pipeline_hears_nothing(
    card: InThread, director: VramClient, cuda: FakeCuda, records: list[Any]
):
    cuda.reserved = cuda.allocated
    assert director.report_models(MODELS, budgets=MODELS, budget_bytes=BUDGET).fits
    for used in (10.85, 10.9, 11.0):
        uses(card, used * GB)
        limits = director.limits(context="before generation")
        assert (limits.level, limits.used_bytes) == ("ok", round(used * GB))
    assert (limits.soft_limit_bytes, limits.hard_limit_bytes) == (11_000_000_000, 11_500_000_000)
    (worker,) = call("GET", "/v1/workers").body["workers"]
    assert (worker["models"], worker["allocated_bytes"]) == (MODELS, 10_850_000_000)
    assert told(records, "WARNING", "ERROR") == []
    assert (metric("soft_limit_violations_total"), metric("hard_limit_violations_total")) == (0, 0)


def test_a_card_that_is_too_small_is_refused_before_anything_is_loaded(serve: Serve):
    serve(8)
    with VramClient() as vram:
        with pytest.raises(InsufficientVram) as refused:
            vram.require_total("11.8GiB")
        assert str(refused.value) == (
            "Insufficient VRAM: 8.0 GiB in all on GPU 0 (Fake card 0), 11.8 GiB required: "
            "use a GPU with at least 12 GiB"
        )
        with pytest.raises(InsufficientVram):
            vram.require_total("11.8GB")


def test_a_card_that_is_large_enough_passes_before_anything_is_loaded(card: InThread, director: VramClient):
    uses(card, 11 * GB)  # in all, whatever of it is in use
    director.require_total("11.8GB")
    director.require_total("12GiB", gpu=0)


UNITS = [pytest.param("GiB", GIB, ("10.8", "11.0", "11.2", "11.3", "11.5"), id="GiB")]
UNITS += [pytest.param("GB", GB, ("10.1", "10.2", "10.4", "10.5", "10.7"), id="GB")]


@pytest.mark.parametrize(("unit", "factor", "shown"), UNITS)
def test_over_the_soft_limit_a_generation_is_warned_and_goes_on(
    serve: Serve, records: list[Any], unit: str, factor: int, shown: tuple[str, ...]
):
    real = serve(CARD_GIB, VRAM_SOFT_LIMIT=f"11{unit}", VRAM_HARD_LIMIT=f"11.5{unit}", VRAM_SOFT_LIMIT_SECONDS="0")
    used, soft, _, more, _ = shown
    with VramClient(owner="director", fail_open=False) as vram, vram.generation(slot=12345) as generation:
        uses(real, 10.8 * factor)
        assert vram.limits().level == "ok"
        words = f"{used} GiB used + 0.5 GiB requested of {soft} GiB soft limit on GPU 0 (+0.3 GiB), vae decode"
        with pytest.warns(MemoryPressureWarning, match=re.escape(words)):
            assert vram.limits(requesting_mb=500, context="vae decode").level == "soft"
        uses(real, 11.3 * factor)
        after = f"{more} GiB used of {soft} GiB soft limit on GPU 0 (+0.3 GiB)"
        with pytest.warns(MemoryPressureWarning, match=re.escape(after)):
            limits = vram.limits()
    assert (limits.used_bytes, limits.soft_limit_bytes) == (round(11.3 * factor), 11 * factor)
    assert generation.generations == 1
    # Both are one excursion.
    assert told(records, "WARNING", "ERROR") == [f"VRAM soft limit exceeded by director: {words}"]
    assert metric("soft_limit_violations_total") == 1


@pytest.mark.parametrize(("unit", "factor", "shown"), UNITS)
def test_an_allocation_over_the_hard_limit_is_refused_before_it_is_made(
    serve: Serve, cuda: FakeCuda, records: list[Any], unit: str, factor: int, shown: tuple[str, ...]
):
    real = serve(CARD_GIB, VRAM_SOFT_LIMIT=f"11{unit}", VRAM_HARD_LIMIT=f"11.5{unit}")
    uses(real, 11.2 * factor)
    made: list[str] = []

    def generate_slot(vram: VramClient) -> None:
        with vram.generation(slot=12345):
            vram.limits(requesting_mb=800, context="upscale")
            made.append("tensor")

    with VramClient(owner="director", fail_open=False) as vram, pytest.raises(MemoryPressureError) as refused:
        generate_slot(vram)
    words = f"{shown[2]} GiB used + 0.8 GiB requested > {shown[4]} GiB hard limit on GPU 0, upscale"
    assert (str(refused.value), made, cuda.emptied) == (words, [], 1)
    limits = refused.value.limits
    assert (limits.level, limits.requested_bytes) == ("hard", 800 * MIB)
    assert (limits.used_bytes, limits.hard_limit_bytes) == (round(11.2 * factor), round(11.5 * factor))
    assert told(records, "ERROR") == [f"VRAM hard limit exceeded by director: {words}"]
    assert metric("hard_limit_violations_total") == 1


def test_a_spike_is_no_warning_and_half_a_minute_over_the_soft_limit_is(serve: Serve):
    real = serve(CARD_GIB, **(LIMITS | {"VRAM_SOFT_LIMIT_SECONDS": "30"}))
    uses(real, 11.3 * GB)
    with VramClient(owner="director", fail_open=False) as vram:
        for _ in range(7):
            limits = vram.limits()  # a warning would end the test
            assert (limits.level, limits.sustained) == ("soft", False)
            real.ahead += 4
        assert metric("soft_limit_violations_total") == 0
        real.ahead += 4
        with pytest.warns(MemoryPressureWarning, match="soft limit"):
            assert vram.limits().sustained
    assert metric("soft_limit_violations_total") == 1


def test_at_the_soft_limit_the_cache_is_emptied_and_the_log_says_what_that_freed(
    card: InThread, director: VramClient, cuda: FakeCuda, caplog: pytest.LogCaptureFixture
):
    uses(card, 11.1 * GB)
    with pytest.warns(MemoryPressureWarning, match="soft limit"):
        director.limits()
    assert cuda.emptied == 1
    assert "Emergency cleanup freed 150 MB (11.10 GB -> 10.95 GB)" in caplog.messages


def test_the_emergency_cleanup_can_be_switched_off_and_done_by_hand(card: InThread, cuda: FakeCuda):
    uses(card, 11.1 * GB)
    with VramClient(owner="director", fail_open=False, emergency_cleanup=False) as vram:
        with pytest.warns(MemoryPressureWarning, match="soft limit"):
            vram.limits()
        assert cuda.emptied == 0
        assert vram.clear_cuda_cache() == 150_000_000


def test_a_model_over_its_own_budget_is_named(card: InThread, director: VramClient):
    with pytest.warns(MemoryPressureWarning, match=r"^flux holds 6\.50 GB, 0\.50 GB over its budget of 6\.00 GB$"):
        report = director.report_models(MODELS | {"flux": 6_500_000_000}, budgets=MODELS, budget_bytes=BUDGET)
    (over,) = report.over_budget
    assert (over.name, over.bytes, over.budget_bytes) == ("flux", 6_500_000_000, 6_000_000_000)
    assert (report.models_bytes, report.fits) == (11_300_000_000, True)


def test_buffers_are_checked_against_the_budget_before_they_are_allocated(card: InThread, director: VramClient):
    buffers = {"actor": 300_000_000, "video": 600_000_000, "audio": 100_000_000}
    report = director.report_models(MODELS, buffers=buffers, budget_bytes=BUDGET)
    assert (report.total_bytes, report.fits) == (BUDGET, True)
    with pytest.raises(InsufficientVram, match=r"10\.1 GiB in models \+ 1\.1 GiB in buffers, .* over the budget"):
        director.report_models(MODELS, buffers=buffers | {"video": 800_000_000}, budget_bytes=BUDGET)


def test_a_generation_tells_what_it_left_behind(director: VramClient, cuda: FakeCuda):
    with director.generation(slot=12345) as generation:
        cuda.allocated += 500_000_000
    assert (generation.delta_bytes, generation.generations, generation.leak) == (500_000_000, 1, None)


def generate(vram: VramClient, cuda: FakeCuda, times: int, grows_bytes: int) -> list[Any]:
    """The leaks that were told in so many generations, each of which leaves `grows_bytes` behind."""
    leaks = []
    for slot in range(times):
        with vram.generation(slot=slot) as generation:
            cuda.allocated += grows_bytes
        leaks.append(generation.leak)
    return [leak for leak in leaks if leak is not None]


# The first five warm up, and the floor of the next five is what the hundred that follow are compared with.
SETTLING = 10


def test_a_hundred_generations_that_each_keep_2_mb_are_a_leak(
    director: VramClient, cuda: FakeCuda, records: list[Any], caplog: pytest.LogCaptureFixture
):
    cuda.allocated = 10_800_000_000 - 6 * 2_000_000  # 10.8 GB after the sixth
    assert generate(director, cuda, SETTLING + 99, 2_000_000) == []
    (leak,) = generate(director, cuda, 1, 2_000_000)
    assert (leak.initial_bytes, leak.current_bytes) == (10_800_000_000, 11_000_000_000)
    assert (leak.delta_bytes, leak.generations, leak.delta_per_generation_bytes) == (200_000_000, 100, 2_000_000)
    assert "memory leak: 10.80 GB -> 11.00 GB in 100 generations" in caplog.messages
    assert told(records, "WARNING") == [
        "Potential memory leak of director: 10.1 GiB -> 10.2 GiB kept after 100 generations: +191 MiB, 1.9 MiB each"
    ]
    assert metric("leaks_total") == 1


def test_a_hundred_generations_that_keep_less_than_100_mb_are_no_leak(director: VramClient, cuda: FakeCuda):
    assert generate(director, cuda, SETTLING + 100, 900_000) == []
    assert metric("leaks_total") == 0


def test_limits_and_the_measure_of_a_leak_come_from_the_environment(serve: Serve, cuda: FakeCuda):
    real = serve(
        CARD_GIB,
        VRAM_SOFT_LIMIT="50%",
        VRAM_HARD_LIMIT="75%",
        VRAM_LEAK_GENERATIONS="50",
        VRAM_LEAK_THRESHOLD_MB="10",
    )
    uses(real, 3 * GIB)
    cuda.allocated = cuda.reserved = 2 * GIB
    with VramClient(owner="director", fail_open=False) as vram:
        limits = vram.limits()
        assert (limits.soft_limit_bytes, limits.hard_limit_bytes) == (6 * GIB, 9 * GIB)
        (leak,) = generate(vram, cuda, SETTLING + 50, MIB)
    assert (leak.generations, leak.delta_bytes) == (50, 50 * MIB)


SNAPSHOT = {
    "event": "post_generation",
    "slot": 12345,
    "vram_usage_gb": 10.95,
    "vram_allocated_gb": 10.85,
    "vram_reserved_gb": 11.2,
    "models": MODELS_GB,
}


def test_a_snapshot_has_the_structure_that_tools_read(
    card: InThread, director: VramClient, cuda: FakeCuda, records: list[Any], caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.DEBUG, "vram_manager")
    cuda.reserved = 11_200_000_000
    uses(card, 10.95 * GB)
    director.report_models(MODELS)
    director.check(1, margin_mb=0)  # has the card read again
    snapshot = director.snapshot("post_generation", slot=12345)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", snapshot["timestamp"])
    assert snapshot == {"timestamp": snapshot["timestamp"], **SNAPSHOT}
    (logged,) = [one["extra"]["snapshot"] for one in records if "snapshot" in one["extra"]]
    assert logged == {"owner": "director", **snapshot}
    assert f"VRAM snapshot {json.dumps(snapshot)}" in caplog.messages


def test_snapshots_are_logged_at_the_start_after_loading_and_around_each_generation(
    director: VramClient, records: list[Any]
):
    director.snapshot("startup")
    director.report_models(MODELS)
    director.snapshot("post_load")
    with director.generation(slot=12345):
        pass
    logged = [one["extra"]["snapshot"] for one in records if "snapshot" in one["extra"]]
    assert [(one["event"], one["slot"], one["models"]) for one in logged] == [
        ("startup", None, {}),
        ("post_load", None, MODELS_GB),
        ("pre_generation", 12345, MODELS_GB),
        ("post_generation", 12345, MODELS_GB),
    ]


def test_use_is_a_metric_of_the_card_and_of_each_worker(card: InThread, director: VramClient, cuda: FakeCuda):
    uses(card, 10.95 * GB)
    assert director.limits(allocated_bytes=10_850_000_000).level == "ok"
    card.until(lambda: metric('gpu_memory_used_bytes{gpu="GPU-a"}') == 10_950_000_000)
    assert metric('worker_memory_bytes{owner="director"}') == 10_850_000_000


def kept(real: InThread) -> int:
    """How many objects of ours are alive, seen between two turns of the daemon's loop."""
    found: list[int] = []
    real.do(lambda: found.append(_ours()))
    return found[0]


def _ours() -> int:
    gc.collect()
    return sum(str(type(one).__module__).startswith("vram_manager") for one in gc.get_objects())


@pytest.fixture
def silent() -> Iterator[None]:
    """The daemon logs nothing."""
    logger.disable("vram_manager")
    yield
    logger.enable("vram_manager")


@pytest.mark.usefixtures("silent", "cuda")
def test_a_thousand_calls_leave_no_more_behind_than_a_hundred(card: InThread, director: VramClient):
    def calls(first: int, last: int) -> None:
        for slot in range(first, last):
            director.limits(context=f"slot {slot}", allocated_bytes=GB)
            director.snapshot("post_generation", slot=slot)
            with director.generation(slot=slot):
                pass

    calls(0, 100)
    before = kept(card)
    calls(100, 350)  # four each
    assert kept(card) - before < 100


def test_what_is_free_is_what_is_free_now(serve):
    real = serve(80, VRAM_CHECK_INTERVAL="5")
    uses(real, 65 * GIB)
    assert get_available_vram() == 15 * 1024


def test_a_generation_without_torch_is_measured_by_the_gpu_at_its_ends(serve):
    real = serve(12, VRAM_CHECK_INTERVAL="5")
    with VramClient(owner="x", fail_open=False) as vram:
        with vram.generation() as generation:
            real.card.holders["others"] = GIB
        assert generation.delta_bytes == GIB
        real.card.holders["others"] = 2 * GB
        assert vram.snapshot("post_generation")["vram_usage_gb"] == 2.0


def test_a_daemon_that_cannot_see_is_told_in_the_workers_log(h100, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "vram_manager")
    h100.gpus.error = h100.comfyui.error = SensorError("NVML: driver gone")
    h100.ahead += 60
    assert check_vram_sufficient(8192)
    assert "admitted unseen" in caplog.messages[-1]


# What the README says of all this.

SECTION = "## From a hand-written monitor\n"


def wishes() -> str:
    return (ROOT / "README.md").read_text().partition(SECTION)[2].partition("\n## ")[0]


def named() -> list[tuple[str, str]]:
    return re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", wishes())


@pytest.mark.parametrize(("file", "name"), sorted(set(named())))
def test_every_test_that_the_readme_names_is_there(file: str, name: str):
    assert re.search(rf"^(?:async )?def {name}\(", (ROOT / file).read_text(), flags=re.MULTILINE)


def test_every_wish_says_where_it_is_shown():
    rows = re.findall(r"^\| (?!wish \|)(.*) \|$", wishes(), flags=re.MULTILINE)
    assert len(rows) > 40
    for row in rows:
        _, _, shown = row.split(" | ")
        assert re.fullmatch(r"(`(tests/[\w/]+\.py::test_\w+|benchmarks/\w+\.py)`(, )?)+", shown), row


def test_every_test_of_this_file_is_in_the_readme():
    source = Path(__file__).read_text().partition("# What the README says")[0]
    here = set(re.findall(r"^def (test_\w+)\(", source, flags=re.MULTILINE))
    assert here == {name for file, name in named() if file == "tests/test_wishes.py"}
