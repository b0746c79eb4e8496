"""What Prometheus reads: true numbers, and no sample where nothing is known."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.fakes import GIB
from tests.policy.desk import book, lease, request
from vram_manager import __version__
from vram_manager.clock import Clock
from vram_manager.domain.action import Stage
from vram_manager.domain.event import Event, EventType
from vram_manager.domain.floor import Floor, Mark
from vram_manager.domain.lease import Book, Ticket
from vram_manager.domain.reading import Missing, Off, Reading, Seen
from vram_manager.domain.share import Share, ShareKind
from vram_manager.domain.snapshot import (
    ComfyUIState,
    Gpu,
    GpuMemory,
    Gpus,
    LoadedModel,
    OllamaState,
    Queue,
    Snapshot,
    TorchDevice,
)
from vram_manager.domain.watch import Watch
from vram_manager.journal import Entry
from vram_manager.metrics import OWNERS, PREFIX, TENANTS_OF_A_GPU, Metrics
from vram_manager.policy.rules import Rules

CARD = Gpu(
    uuid="GPU-a",
    index=0,
    name="RTX 4090",
    memory=GpuMemory(total_bytes=24 * GIB, used_bytes=10 * GIB, free_bytes=13 * GIB, reserved_bytes=GIB),
    utilization_percent=3,
    temperature_celsius=41,
    power_watts=17.5,
)
MODEL = LoadedModel(
    name="llama3.1:8b", digest="d", size_bytes=8 * GIB, size_vram_bytes=6 * GIB, context_length=None, expires_at=None
)
TORCH = TorchDevice(
    name="cuda:0",
    type="cuda",
    index=0,
    vram_total_bytes=24 * GIB,
    vram_free_bytes=13 * GIB,
    torch_total_bytes=4 * GIB,
    torch_free_bytes=GIB,
)
SEEN = Snapshot(
    taken_at=90.0,
    gpus=Seen(Gpus(gpus=(CARD,), driver_version="580"), 89.0),
    ollama=Seen(OllamaState(version="0.33.1", models=(MODEL,)), 88.0),
    comfyui=Seen(ComfyUIState(version="0.20.1", argv=(), devices=(TORCH,)), 87.0),
    queue=Seen(Queue(remaining=2, since=1.0, moved_at=1.0, runs=1), 86.0),
)
GONE = Missing("gone", last_seen_at=40.0)
FREED = Event(
    type=EventType.FREED, target="comfyui", stage=Stage.SOFT, freed_bytes=5 * GIB, took_seconds=1.2, reason="why"
)


@dataclass
class Turn:
    """What the cycle would show of its last turn."""

    snapshot: Snapshot | None = SEEN
    watch: Watch = field(default_factory=Watch)
    turned_at: float | None = 90.0
    rules: Rules = field(default_factory=Rules)


@dataclass
class Sensors:
    states: dict[str, Reading[object]]

    def sensors(self) -> dict[str, Reading[object]]:
        return self.states


@dataclass
class Desk:
    book: Book = field(default_factory=Book)


@dataclass
class Crew:
    soft_violations: int = 2
    hard_violations: int = 3
    leaks: int = 1
    held: dict[str, int] = field(default_factory=lambda: {"tts": 5 * GIB})

    def memory(self) -> dict[str, int]:
        return self.held


@dataclass
class Tenants:
    shares: tuple[Share, ...] = (
        Share(kind=ShareKind.OLLAMA, tenant="ollama:llama3.1:8b", bytes=6 * GIB),
        Share(kind=ShareKind.COMFYUI_IN_USE, tenant="comfyui in use", bytes=4 * GIB),
    )

    def now(self) -> dict[str, tuple[Share, ...]]:
        return {"GPU-a": self.shares}


@dataclass
class Viewed:
    told: list[dict[str, Any]] = field(default_factory=list)

    def views(self) -> list[dict[str, Any]]:
        return self.told


NODES = Viewed(
    [
        {"url": "http://a:11434", "state": "ok", "vram_bytes": 3 * GIB, "ram_bytes": 0},
        {"url": "http://b:11434", "state": "missing", "vram_bytes": None, "ram_bytes": None},
        {"url": "http://c:11434", "state": "unread", "vram_bytes": None, "ram_bytes": None},
    ]
)


@dataclass
class Rising:
    """Floors, as the keeper gives them."""

    floors: tuple[Floor, ...]
    leaks: int = 0

    def now(self) -> tuple[Floor, ...]:
        return self.floors


def floor(measure: str, *sizes_gib: float) -> Floor:
    marks = tuple(Mark(at=datetime(2026, 7, 1, tzinfo=UTC), bytes=round(size * GIB)) for size in sizes_gib)
    return Floor(tenant="comfyui", measure=measure, life="", marks=marks, judged=1, baseline_bytes=marks[0].bytes)


FLOORS = Rising((floor("idle", 2, 3), floor("freed", 9)), leaks=2)


def metrics(
    turn: Turn | None = None,
    desk: Desk | None = None,
    tenants: Tenants | None = None,
    crew: Crew | None = None,
    **states: Reading[object],
) -> Metrics:
    clock = Clock(lambda: 100.0, lambda: datetime.now(UTC))
    parts = (turn or Turn(), Sensors(states), desk or Desk(), crew or Crew(), tenants or Tenants(), NODES, FLOORS)
    return Metrics(clock, *parts)


def samples(scraped: Metrics) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Every sample by name and labels."""
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(scraped.render().decode()):
        for sample in family.samples:
            assert sample.name.startswith(PREFIX)
            labels = tuple(sorted(sample.labels.items()))
            assert labels not in found.get(sample.name, {}), f"{sample.name} twice with {labels}"
            found.setdefault(sample.name, {})[labels] = sample.value
    return {name.removeprefix(PREFIX): values for name, values in found.items()}


def entry(event: Event) -> Entry:
    return Entry(id="free-0001", seq=1, at=datetime.now(UTC), event=event)


def test_gauges_tell_the_last_turn():
    told = samples(metrics())
    gpu = (("gpu", "GPU-a"),)
    assert told["gpu_memory_total_bytes"] == {gpu: 24 * GIB}
    assert told["gpu_memory_used_bytes"] == {gpu: 10 * GIB}
    assert told["gpu_memory_free_bytes"] == {gpu: 13 * GIB}
    assert told["tenant_memory_bytes"] == {(("tenant", "ollama"),): 6 * GIB, (("tenant", "comfyui"),): 4 * GIB}
    assert told["ollama_model_vram_bytes"] == {(("model", "llama3.1:8b"),): 6 * GIB}
    assert told["ollama_model_cpu_ratio"] == {(("model", "llama3.1:8b"),): 0.25}
    assert told["comfyui_queue_remaining"] == {(): 2}
    assert told["build_info"] == {(("version", __version__),): 1}


def test_further_servers_are_up_or_down_once_they_were_asked():
    told = samples(metrics())
    a, b = (("node", "http://a:11434"),), (("node", "http://b:11434"),)
    assert told["node_up"] == {a: 1, b: 0}
    assert told["node_ollama_vram_bytes"] == {a: 3 * GIB}
    assert told["node_ollama_ram_bytes"] == {a: 0}


def test_a_tenant_has_a_floor_for_each_way_in_which_it_is_measured():
    told = samples(metrics())
    idle, freed = ((("measure", name), ("tenant", "comfyui")) for name in ("idle", "freed"))
    assert told["idle_floor_bytes"] == {idle: 3 * GIB, freed: 9 * GIB}
    assert told["idle_floor_growth_bytes"] == {idle: GIB, freed: 0}


def test_leaks_of_workers_and_of_the_others_are_counted_together():
    assert samples(metrics())["leaks_total"] == {(): 3}


def test_a_card_is_told_with_its_state_and_how_that_is_known():
    told = samples(metrics())
    gpu = (("gpu", "GPU-a"),)
    assert told["gpu_memory_reserved_bytes"] == {gpu: GIB}
    assert told["gpu_memory_used_ratio"] == {gpu: pytest.approx(10 / 23)}
    assert told["gpu_utilization_ratio"] == {gpu: 0.03}
    assert told["gpu_temperature_celsius"] == {gpu: 41}
    assert told["gpu_power_watts"] == {gpu: 17.5}
    (labels,) = told["gpu_info"]
    assert dict(labels) == {
        "gpu": "GPU-a",
        "index": "0",
        "name": "RTX 4090",
        "vendor": "nvidia",
        "source": "NVML",
        "trust": "measured",
    }


def test_what_a_card_does_not_tell_of_its_state_has_no_sample():
    mute = replace(CARD, utilization_percent=GONE, temperature_celsius=GONE, power_watts=GONE)
    memory = replace(CARD.memory, reserved_bytes=GONE)
    gpus = Gpus(gpus=(replace(mute, memory=memory),), driver_version="580")
    told = samples(metrics(Turn(snapshot=replace(SEEN, gpus=Seen(gpus, 89.0)))))
    assert not {"gpu_utilization_ratio", "gpu_temperature_celsius", "gpu_power_watts"} & told.keys()
    assert "gpu_memory_reserved_bytes" not in told
    assert told["gpu_memory_used_ratio"] == {(("gpu", "GPU-a"),): pytest.approx(11 / 24)}


def test_the_limits_are_those_of_the_rules_on_what_processes_can_have():
    told = samples(metrics(Turn(rules=Rules(threshold_percent=50, unload_threshold_percent=100))))
    usable = 23 * GIB
    assert {labels[1][1]: size for labels, size in told["gpu_memory_limit_bytes"].items()} == {
        "threshold": usable / 2,
        "unload_threshold": usable,
        "soft_limit": pytest.approx(0.9 * usable, abs=1),
        "hard_limit": pytest.approx(0.95 * usable, abs=1),
    }


def test_every_tenant_of_a_card_is_told():
    told = samples(metrics())["gpu_tenant_memory_bytes"]
    assert {dict(labels)["tenant"]: size for labels, size in told.items()} == {
        "ollama:llama3.1:8b": 6 * GIB,
        "comfyui in use": 4 * GIB,
    }


def test_a_crowd_of_tenants_is_told_as_the_largest_and_the_rest_and_still_adds_up():
    crowd = tuple(
        Share(kind=ShareKind.PROCESS, tenant=f"process:{number}", bytes=1000 + number) for number in range(100)
    )
    others = Share(kind=ShareKind.OTHERS, tenant="others", bytes=1)
    told = samples(metrics(tenants=Tenants((*crowd, others))))["gpu_tenant_memory_bytes"]
    names = {dict(labels)["tenant"] for labels in told}
    assert len(told) == TENANTS_OF_A_GPU + 2
    assert {"process:99", "the rest", "others"} <= names
    assert "process:0" not in names
    assert sum(told.values()) == sum(share.bytes for share in crowd) + 1


GAUGES_OF_READINGS = (
    "gpu_info",
    "gpu_memory_limit_bytes",
    "gpu_memory_reserved_bytes",
    "gpu_memory_used_ratio",
    "gpu_power_watts",
    "gpu_temperature_celsius",
    "gpu_utilization_ratio",
    "gpu_memory_total_bytes",
    "gpu_memory_used_bytes",
    "gpu_memory_free_bytes",
    "tenant_memory_bytes",
    "ollama_model_vram_bytes",
    "ollama_model_cpu_ratio",
    "comfyui_queue_remaining",
)


@pytest.mark.parametrize(
    "snapshot",
    [
        None,
        replace(SEEN, gpus=GONE, ollama=GONE, comfyui=GONE, queue=GONE),
        replace(SEEN, gpus=Off(), ollama=Off(), comfyui=Off(), queue=Off()),
    ],
    ids=["before the first turn", "all missing", "all off"],
)
def test_what_is_not_known_has_no_sample_and_is_no_zero(snapshot: Snapshot | None):
    told = samples(metrics(Turn(snapshot=snapshot)))
    assert [name for name in GAUGES_OF_READINGS if name in told] == []


def test_a_card_whose_memory_is_not_known_has_no_sample_beside_those_that_have():
    gpus = Gpus(gpus=(replace(CARD, memory=GONE), replace(CARD, uuid="GPU-b")), driver_version="580")
    told = samples(metrics(Turn(snapshot=replace(SEEN, gpus=Seen(gpus, 89.0)))))
    assert list(told["gpu_memory_free_bytes"]) == [(("gpu", "GPU-b"),)]


def test_numbers_that_only_comfyui_told_are_not_passed_off_as_nvmls():
    assert "gpu_memory_used_bytes" not in samples(metrics(Turn(snapshot=replace(SEEN, gpus=GONE))))


def test_a_model_whose_place_is_not_known_has_no_ratio():
    odd = replace(MODEL, size_vram_bytes=9 * GIB)
    told = samples(metrics(Turn(snapshot=replace(SEEN, ollama=Seen(OllamaState(version="1", models=(odd,)), 1.0)))))
    assert "ollama_model_cpu_ratio" not in told
    assert told["ollama_model_vram_bytes"] == {(("model", "llama3.1:8b"),): 9 * GIB}


def test_an_ollama_without_a_model_holds_nothing_and_that_is_known():
    nothing = Seen(OllamaState(version="1", models=()), 1.0)
    told = samples(metrics(Turn(snapshot=replace(SEEN, ollama=nothing))))
    assert told["tenant_memory_bytes"][("tenant", "ollama"),] == 0


def test_sensors_are_up_or_down_and_their_readings_have_an_age():
    told = samples(metrics(nvml=Seen(None, 97.5), ollama=GONE, comfyui=Missing("never answered")))
    assert told["sensor_up"] == {(("sensor", "nvml"),): 1, (("sensor", "ollama"),): 0, (("sensor", "comfyui"),): 0}
    assert told["reading_age_seconds"] == {(("sensor", "nvml"),): 2.5, (("sensor", "ollama"),): 60}


def test_a_sensor_that_is_off_is_neither_up_nor_down():
    assert samples(metrics(nvml=Seen(None, 99.0), ollama=Off()))["sensor_up"] == {(("sensor", "nvml"),): 1}


@pytest.mark.parametrize(
    ("kind", "outcome"),
    [
        (EventType.FREED, "freed"),
        (EventType.FREE_UNCONFIRMED, "unconfirmed"),
        (EventType.FREE_REFUSED, "refused"),
        (EventType.DRY_RUN, "dry_run"),
    ],
)
def test_frees_are_counted_by_how_they_ended(kind: EventType, outcome: str):
    counted = metrics()
    for _ in range(2):
        counted.count(entry(replace(FREED, type=kind)))
    labels = (("outcome", outcome), ("stage", "soft"), ("target", "comfyui"))
    assert samples(counted)["frees_total"] == {labels: 2}


def test_bytes_and_seconds_are_counted_for_what_was_proven_only():
    counted = metrics()
    counted.count(entry(FREED))
    counted.count(entry(replace(FREED, type=EventType.FREE_UNCONFIRMED)))
    told = samples(counted)
    assert told["freed_bytes_total"] == {(("stage", "soft"), ("target", "comfyui")): 5 * GIB}
    assert told["free_duration_seconds_count"] == {(): 1}
    assert told["free_duration_seconds_sum"] == {(): 1.2}
    assert told["free_duration_seconds_bucket"][("le", "1.0"),] == 0
    assert told["free_duration_seconds_bucket"][("le", "2.0"),] == 1


def test_unloads_are_counted_for_ollama_as_a_whole_and_not_by_model():
    counted = metrics()
    counted.count(entry(replace(FREED, target="ollama:llama3.1:8b", stage=None)))
    assert list(samples(counted)["frees_total"]) == [(("outcome", "freed"), ("stage", ""), ("target", "ollama"))]


def test_cpu_fallbacks_and_turns_are_counted():
    counted = metrics()
    counted.count(entry(Event(type=EventType.CPU_FALLBACK, target="ollama", reason="m is 38 % on CPU")))
    counted.turned(0.002)
    told = samples(counted)
    assert told["cpu_fallbacks_total"] == {(): 1}
    assert told["cycle_duration_seconds_count"] == {(): 1}


@pytest.mark.parametrize(("kind", "outcome"), [(EventType.REPAIRED, "repaired"), (EventType.REPAIR_FAILED, "failed")])
def test_repairs_are_counted_by_how_they_ended(kind: EventType, outcome: str):
    counted = metrics()
    counted.count(entry(Event(type=kind, target="ollama:llama3.1:8b", took_seconds=4.0)))
    counted.count(entry(Event(type=EventType.WARMED_BACK, target="ollama:llama3.1:8b", took_seconds=4.0)))
    told = samples(counted)
    assert told["repairs_total"] == {(("outcome", outcome),): 1}
    assert "frees_total" not in told


@pytest.mark.parametrize("outcome", ["held", "timeout", "refused"])
def test_requests_at_a_gateway_are_counted_and_those_that_waited_are_measured(outcome: str):
    counted = metrics()
    counted.at_gateway("ollama", outcome, 3.5)
    told = samples(counted)
    assert told["gateway_requests_total"] == {(("outcome", outcome), ("upstream", "ollama")): 1}
    assert told["gateway_hold_seconds_count"] == {(): 1}
    assert told["gateway_hold_seconds_sum"] == {(): 3.5}


@pytest.mark.parametrize("outcome", ["passed", "unread", "unreachable"])
def test_a_request_that_did_not_wait_leaves_no_mark_among_the_waits(outcome: str):
    counted = metrics()
    counted.at_gateway("comfyui", outcome, 0.0)
    told = samples(counted)
    assert told["gateway_requests_total"] == {(("outcome", outcome), ("upstream", "comfyui")): 1}
    assert told["gateway_hold_seconds_count"] == {(): 0}


@pytest.mark.parametrize("kind", EventType)
def test_every_type_of_event_is_counted_from_nought(kind: EventType):
    counted = metrics()
    assert samples(counted)["events_total"][("type", kind),] == 0
    counted.count(entry(Event(type=kind)))
    told = samples(counted)["events_total"]
    assert told[("type", kind),] == 1
    assert sum(told.values()) == 1


def test_what_the_webhook_was_told_is_counted_from_nought():
    counted = metrics()
    counted.told("failed")
    assert samples(counted)["webhook_deliveries_total"] == {
        (("outcome", "delivered"),): 0,
        (("outcome", "failed"),): 1,
        (("outcome", "dropped"),): 0,
    }


def test_what_nobody_can_give_back_is_shown():
    told = samples(metrics(Turn(watch=Watch(unreclaimable={"GPU-a": 3 * GIB}))))
    assert told["unreclaimable_bytes"] == {(("gpu", "GPU-a"),): 3 * GIB}


@pytest.mark.parametrize("name", ['a"b\\c\nd', "模型:7b", "lone \ud800 surrogate", "x" * 1000])
def test_no_name_from_outside_breaks_the_text(name: str):
    models = (replace(MODEL, name=name), MODEL)
    told = samples(metrics(Turn(snapshot=replace(SEEN, ollama=Seen(OllamaState(version="1", models=models), 1.0)))))
    assert len(told["ollama_model_vram_bytes"]) == 2


def test_names_that_utf8_cannot_tell_apart_are_one_sample():
    models = tuple(replace(MODEL, name=name, size_vram_bytes=GIB) for name in ("a\ud800", "a\ud801"))
    told = samples(metrics(Turn(snapshot=replace(SEEN, ollama=Seen(OllamaState(version="1", models=models), 1.0)))))
    assert told["ollama_model_vram_bytes"] == {(("model", "a?"),): 2.0 * GIB}


def test_a_crowd_of_workers_is_told_as_the_largest_and_the_rest_and_still_adds_up() -> None:
    crowd = {f"job-{number}": 1000 + number for number in range(500)}
    promised = [lease(1, owner=owner, id=owner, used_bytes=GIB + 2) for owner in crowd]
    shown = samples(metrics(desk=Desk(book(*promised)), crew=Crew(held=crowd)))
    for name, total in (("worker_memory_bytes", sum(crowd.values())), ("lease_overclaimed_bytes", 1000)):
        assert len(shown[name]) == OWNERS + 1
        assert (("owner", "the rest"),) in shown[name]
        assert sum(shown[name].values()) == total
    assert (("owner", "job-499"),) in shown["worker_memory_bytes"]


def test_scrapes_change_nothing():
    scraped = metrics()
    scraped.count(entry(FREED))
    assert scraped.render() == scraped.render()


def test_two_daemons_in_one_process_do_not_share_their_counters():
    one, other = metrics(), metrics()
    one.count(entry(FREED))
    assert "frees_total" not in samples(other)


def test_what_is_promised_and_what_is_taken_beyond_it_is_shown() -> None:
    promised = [
        lease(4, owner="tts", id="a"),
        lease(6, owner="video", id="b", used_bytes=7 * GIB),
        lease(1, owner="tts", id="c", gpu=None),
    ]
    shown = samples(metrics(desk=Desk(book(*promised, line=(Ticket(request=request(2), since=0.0),)))))
    assert shown["gpu_memory_leased_bytes"] == {(("gpu", "GPU-a"),): 10.0 * GIB, (("gpu", ""),): 1.0 * GIB}
    assert shown["lease_overclaimed_bytes"] == {(("owner", "tts"),): 0.0, (("owner", "video"),): 1.0 * GIB}
    assert shown["leases"] == {(): 3.0}
    assert shown["admissions_waiting"] == {(): 1.0}
    assert shown["admissions_oldest_wait_seconds"] == {(): 100.0}


def test_where_nobody_is_in_line_nobody_has_waited() -> None:
    assert "admissions_oldest_wait_seconds" not in samples(metrics())


def test_what_workers_say_and_do_is_counted() -> None:
    shown = samples(metrics())
    assert shown["worker_memory_bytes"] == {(("owner", "tts"),): 5.0 * GIB}
    assert shown["soft_limit_violations_total"] == {(): 2.0}
    assert shown["hard_limit_violations_total"] == {(): 3.0}
    assert shown["leaks_total"] == {(): 3.0}


def test_answers_and_the_quality_of_estimates_are_counted() -> None:
    scraped = metrics()
    scraped.answered("admitted", 0.001)
    scraped.answered("refused", 12.0)
    scraped.lease_ended(lease(4, peak_bytes=3 * GIB))
    scraped.lease_ended(lease(4))
    shown = samples(scraped)
    assert shown["admissions_total"] == {(("outcome", "admitted"),): 1.0, (("outcome", "refused"),): 1.0}
    assert shown["admission_wait_seconds_count"] == {(): 2.0}
    assert shown["estimate_peak_ratio_sum"] == {(("source", "request"),): 0.75}
