"""Prometheus numbers: gauges read from the last turn when scraped, counters fed by the journal.

What is not known has no sample: a gap in a graph, never a zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from vram_manager import __version__
from vram_manager.clock import Clock
from vram_manager.domain.event import EventType
from vram_manager.domain.floor import Floor
from vram_manager.domain.lease import Book, Lease
from vram_manager.domain.reading import Missing, Off, Reading, Seen
from vram_manager.domain.share import Share, ShareKind
from vram_manager.domain.snapshot import Gpu, GpuMemory, Snapshot
from vram_manager.domain.watch import Watch
from vram_manager.journal import Entry
from vram_manager.policy.rules import Rules

PREFIX = "vram_manager_"
# Names of tenants come from outside: of each GPU the largest have a series of their own, the rest are "the rest".
TENANTS_OF_A_GPU = 32
# So do those of who asks for leases: a name with a number of its own in every job would make a series for each.
OWNERS = 32
_THE_REST = "the rest"
WEBHOOK_OUTCOMES = ("delivered", "failed", "dropped")
_REPAIRS = {EventType.REPAIRED: "repaired", EventType.REPAIR_FAILED: "failed"}
_OUTCOMES = {
    EventType.FREED: "freed",
    EventType.FREE_UNCONFIRMED: "unconfirmed",
    EventType.FREE_REFUSED: "refused",
    EventType.DRY_RUN: "dry_run",
}


class Watched(Protocol):
    """What the gauges are read from: the cycle."""

    snapshot: Snapshot | None
    watch: Watch
    turned_at: float | None
    rules: Rules


class Sharing(Protocol):
    """Who has how much of each GPU."""

    def now(self) -> Mapping[str, Sequence[Share]]: ...


class Sensing(Protocol):
    """What the sensor gauges are read from: the observer."""

    def sensors(self) -> dict[str, Reading[object]]: ...


class Promising(Protocol):
    """What the gauges of leases are read from."""

    book: Book


class Watching(Protocol):
    """What the numbers of workers are read from."""

    soft_violations: int
    hard_violations: int
    leaks: int

    def memory(self) -> Mapping[str, int]: ...


class Viewed(Protocol):
    """What is shown by the API as JSON, and has numbers: further Ollama servers."""

    def views(self) -> list[dict[str, Any]]: ...


class Rising(Protocol):
    """What the numbers of floors are read from."""

    leaks: int

    def now(self) -> Iterable[Floor]: ...


class Metrics(Collector):
    """All metrics of one daemon, in a registry of their own."""

    def __init__(
        self,
        clock: Clock,
        cycle: Watched,
        observer: Sensing,
        admissions: Promising,
        workers: Watching,
        tenants: Sharing,
        nodes: Viewed | None = None,
        floors: Rising | None = None,
    ) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._clock = clock
        self._cycle = cycle
        self._observer = observer
        self._admissions = admissions
        self._workers = workers
        self._tenants = tenants
        self._nodes = nodes
        self._floors = floors
        self._registry = CollectorRegistry()
        self._registry.register(self)
        # From 0 on: the first of a kind is a rise too.
        self._events = self._counter("events", "Recorded events by type.", ("type",))
        for kind in EventType:
            self._events.labels(kind)
        self._webhook = self._counter("webhook_deliveries", "Events for the webhook by outcome.", ("outcome",))
        for outcome in WEBHOOK_OUTCOMES:
            self._webhook.labels(outcome)
        self._frees = self._counter("frees", "Frees by how they ended.", ("target", "stage", "outcome"))
        self._freed = self._counter("freed_bytes", "Bytes proven to have come back.", ("target", "stage"))
        self._fallbacks = self._counter("cpu_fallbacks", "Placements of an Ollama model that touch the CPU.")
        self._duration = self._histogram(
            "free_duration_seconds", "From the request to the proof.", (0.25, 0.5, 1, 2, 3, 5, 10, 30)
        )
        self._turns = self._histogram(
            "cycle_duration_seconds", "One turn of the cycle.", (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.25, 1)
        )

        self._repairs = self._counter("repairs", "Models taken off the CPU by how it ended.", ("outcome",))
        self._gateway = self._counter(
            "gateway_requests", "Requests at the gateways by what became of them.", ("upstream", "outcome")
        )
        self._holds = self._histogram(
            "gateway_hold_seconds",
            "How long held requests waited at a gateway.",
            (0.1, 0.5, 1, 2, 5, 10, 20, 40, 60, 300),
        )
        self._admitted = self._counter("admissions", "Admission requests by how they ended.", ("outcome",))
        self._waits = self._histogram(
            "admission_wait_seconds",
            "From an admission request to its answer.",
            (0.001, 0.005, 0.05, 0.5, 1, 5, 15, 60, 300, 1800),
        )
        self._peak_ratios = self._histogram(
            "estimate_peak_ratio",
            "Measured peak of a lease over what was estimated: above 1 the estimate was too small.",
            (0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2, 4),
            ("source",),
        )

    def _counter(self, name: str, words: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(PREFIX + name, words, labels, registry=self._registry)

    def _histogram(self, name: str, words: str, buckets: tuple[float, ...], labels: tuple[str, ...] = ()) -> Histogram:
        return Histogram(PREFIX + name, words, labels, buckets=buckets, registry=self._registry)

    def count(self, entry: Entry) -> None:
        """Counts one journal entry."""
        event = entry.event
        self._events.labels(event.type).inc()
        target, stage = (event.target or "").partition(":")[0], event.stage or ""
        # A dry run that would have refused a worker is no free.
        if (outcome := _OUTCOMES.get(event.type)) is not None and target != "worker":
            self._frees.labels(target, stage, outcome).inc()
        if event.type is EventType.FREED:
            self._freed.labels(target, stage).inc(event.freed_bytes or 0)
            self._duration.observe(event.took_seconds or 0.0)
        if event.type is EventType.CPU_FALLBACK:
            self._fallbacks.inc()
        if (repair := _REPAIRS.get(event.type)) is not None:
            self._repairs.labels(repair).inc()

    def at_gateway(self, upstream: str, outcome: str, waited_seconds: float) -> None:
        """Counts one request at a gateway; those that did not wait leave no mark in the histogram."""
        self._gateway.labels(upstream, outcome).inc()
        if outcome in {"held", "timeout", "refused"}:
            self._holds.observe(waited_seconds)

    def told(self, outcome: str) -> None:
        """Counts one event that the webhook was to be told."""
        self._webhook.labels(outcome).inc()

    def turned(self, seconds: float) -> None:
        """Counts one turn."""
        self._turns.observe(seconds)

    def answered(self, outcome: str, waited_seconds: float) -> None:
        """Counts one admission request."""
        self._admitted.labels(outcome).inc()
        self._waits.observe(waited_seconds)

    def lease_ended(self, lease: Lease) -> None:
        """Counts how good the estimate of a lease was, where its peak was seen."""
        if lease.peak_bytes and lease.bytes:
            self._peak_ratios.labels(str(lease.estimate.source)).observe(lease.peak_bytes / lease.bytes)

    def render(self) -> bytes:
        """The text exposition format, version 0.0.4."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Gauges from the last turn."""
        yield self._gauge("build_info", "The running version.", {(__version__,): 1.0}, ("version",))
        snapshot = self._cycle.snapshot
        if snapshot is not None:
            yield from self._gpu_gauges(snapshot)
            yield from self._tenant_gauges(snapshot)
        yield self._gauge(
            "unreclaimable_bytes",
            "Memory that stays in use although everybody who could give it back was asked.",
            {(gpu,): float(size) for gpu, size in self._cycle.watch.unreclaimable.items()},
            ("gpu",),
        )
        yield from self._promises()
        yield from self._node_gauges()
        yield from self._floor_gauges()
        up: dict[tuple[str, ...], float] = {}
        ages: dict[tuple[str, ...], float] = {}
        now = self._clock.monotonic()
        for sensor, reading in self._observer.sensors().items():
            if isinstance(reading, Off):
                continue
            up[(sensor,)] = float(isinstance(reading, Seen))
            last = reading.at if isinstance(reading, Seen) else reading.last_seen_at
            if last is not None:
                ages[(sensor,)] = max(0.0, now - last)
        yield self._gauge("sensor_up", "1 when the sensor's last reading can be used.", up, ("sensor",))
        yield self._gauge("reading_age_seconds", "Age of the sensor's last reading.", ages, ("sensor",))

    def _promises(self) -> Iterator[Metric]:
        book = self._admissions.book
        leased: dict[tuple[str, ...], float] = {}
        over: dict[str, int] = {}
        for lease in book.leases.values():
            leased[(lease.gpu or "",)] = leased.get((lease.gpu or "",), 0.0) + lease.bytes
            over[lease.owner] = over.get(lease.owner, 0) + lease.overclaimed_bytes
        yield self._gauge("gpu_memory_leased_bytes", "Memory promised to lease holders.", leased, ("gpu",))
        yield self._gauge("lease_overclaimed_bytes", "Memory taken beyond what was leased.", _largest(over), ("owner",))
        yield self._gauge("leases", "Live leases.", {(): float(len(book.leases))}, ())
        yield self._gauge("admissions_waiting", "Admission requests in line.", {(): float(len(book.line))}, ())
        oldest = min((ticket.since for ticket in book.line), default=None)
        waited: dict[tuple[str, ...], float] = {} if oldest is None else {(): self._clock.monotonic() - oldest}
        yield self._gauge("admissions_oldest_wait_seconds", "How long the first in line has waited.", waited, ())
        held = _largest(self._workers.memory())
        yield self._gauge("worker_memory_bytes", "GPU memory a worker last reported as its own.", held, ("owner",))
        soft, hard, leaks = self._workers.soft_violations, self._workers.hard_violations, self._workers.leaks
        yield self._sum("soft_limit_violations", "Use that stayed above the soft limit.", soft)
        yield self._sum("hard_limit_violations", "Checks answered with: stop before you allocate.", hard)
        leaks += 0 if self._floors is None else self._floors.leaks
        yield self._sum("leaks", "Tenants whose memory between generations kept growing.", leaks)

    def _gpu_gauges(self, snapshot: Snapshot) -> Iterator[GaugeMetricFamily]:
        gpus = snapshot.gpus.value.gpus if isinstance(snapshot.gpus, Seen) else ()
        memories = {gpu.uuid: gpu.memory for gpu in gpus if isinstance(gpu.memory, GpuMemory)}
        for name in ("total", "used", "free"):
            yield self._gauge(
                f"gpu_memory_{name}_bytes",
                f"Memory of the GPU: {name}, as its driver tells it.",
                {(uuid,): float(getattr(memory, f"{name}_bytes")) for uuid, memory in memories.items()},
                ("gpu",),
            )
        reserves: dict[tuple[str, ...], float] = {}
        ratios: dict[tuple[str, ...], float] = {}
        limits: dict[tuple[str, ...], float] = {}
        for uuid, memory in memories.items():
            if not isinstance(memory.reserved_bytes, Missing):
                reserves[(uuid,)] = float(memory.reserved_bytes)
            ratios[(uuid,)] = memory.used_percent / 100
            limits |= {(uuid, name): size for name, size in self._limits(memory.usable_bytes).items()}
        yield self._gauge("gpu_memory_reserved_bytes", "What the driver keeps for itself.", reserves, ("gpu",))
        yield self._gauge("gpu_memory_used_ratio", "Taken of what processes can have.", ratios, ("gpu",))
        words = "What taken memory is compared with: thresholds of the frees, limits of the workers."
        yield self._gauge("gpu_memory_limit_bytes", words, limits, ("gpu", "limit"))
        yield from self._gpu_state(gpus)
        words = "Memory taken on a GPU by who has it; adds up to all that is taken."
        yield self._gauge("gpu_tenant_memory_bytes", words, self._shares(), ("gpu", "kind", "tenant"))

    def _limits(self, usable_bytes: int) -> dict[str, float]:
        rules = self._cycle.rules
        return {
            "threshold": usable_bytes * rules.threshold_percent / 100,
            "unload_threshold": usable_bytes * rules.unload_threshold_percent / 100,
            "soft_limit": float(rules.soft_limit.on(usable_bytes)),
            "hard_limit": float(rules.hard_limit.on(usable_bytes)),
        }

    def _gpu_state(self, gpus: Sequence[Gpu]) -> Iterator[GaugeMetricFamily]:
        told: dict[tuple[str, ...], float] = {
            (gpu.uuid, str(gpu.index), gpu.name, gpu.vendor, gpu.source, str(gpu.trust)): 1.0 for gpu in gpus
        }
        labels = ("gpu", "index", "name", "vendor", "source", "trust")
        yield self._gauge("gpu_info", "A GPU, and how its numbers are known.", told, labels)
        for name, field, unit, words in (
            ("gpu_utilization_ratio", "utilization_percent", 0.01, "Part of the time in which the GPU computed."),
            ("gpu_temperature_celsius", "temperature_celsius", 1.0, "Temperature of the GPU, up to a minute old."),
            ("gpu_power_watts", "power_watts", 1.0, "Power that the GPU draws, up to a minute old."),
        ):
            values = {gpu.uuid: getattr(gpu, field) for gpu in gpus}
            known: dict[tuple[str, ...], float] = {
                (uuid,): value * unit for uuid, value in values.items() if not isinstance(value, Missing)
            }
            yield self._gauge(name, words, known, ("gpu",))

    def _shares(self) -> dict[tuple[str, ...], float]:
        found: dict[tuple[str, ...], float] = {}
        for gpu, shares in self._tenants.now().items():
            largest = sorted(shares, key=lambda share: -share.bytes)
            for rank, share in enumerate(largest):
                named = rank < TENANTS_OF_A_GPU or share.kind is ShareKind.OTHERS
                key = (gpu, str(share.kind), share.tenant if named else _THE_REST)
                found[key] = found.get(key, 0.0) + share.bytes
        return found

    def _tenant_gauges(self, snapshot: Snapshot) -> Iterator[GaugeMetricFamily]:
        tenants: dict[tuple[str, ...], float] = {}
        vram: dict[tuple[str, ...], float] = {}
        ratios: dict[tuple[str, ...], float] = {}
        if isinstance(snapshot.ollama, Seen):
            models = snapshot.ollama.value.models
            tenants[("ollama",)] = float(sum(model.size_vram_bytes for model in models))
            for model in models:
                vram[(model.name,)] = float(model.size_vram_bytes)
                if not isinstance(model.cpu_ratio, Missing):
                    ratios[(model.name,)] = model.cpu_ratio
        if isinstance(snapshot.comfyui, Seen) and (devices := snapshot.comfyui.value.devices):
            tenants[("comfyui",)] = float(devices[0].torch_total_bytes)
        yield self._gauge("tenant_memory_bytes", "GPU memory a tenant reports as its own.", tenants, ("tenant",))
        yield self._gauge("ollama_model_vram_bytes", "GPU memory Ollama reports for a model.", vram, ("model",))
        yield self._gauge("ollama_model_cpu_ratio", "Part of a model that is on the CPU.", ratios, ("model",))
        if isinstance(snapshot.queue, Seen):
            remaining: dict[tuple[str, ...], float] = {(): float(snapshot.queue.value.remaining)}
            yield self._gauge("comfyui_queue_remaining", "Prompts running or waiting in ComfyUI.", remaining, ())

    def _node_gauges(self) -> Iterator[GaugeMetricFamily]:
        views = [] if self._nodes is None else self._nodes.views()
        nodes = [node for node in views if node["state"] != "unread"]
        up: dict[tuple[str, ...], float] = {(node["url"],): float(node["state"] == "ok") for node in nodes}
        yield self._gauge("node_up", "1 when a further Ollama server answers.", up, ("node",))
        for name in ("vram", "ram"):
            held: dict[tuple[str, ...], float] = {
                (node["url"],): float(size) for node in nodes if (size := node[f"{name}_bytes"]) is not None
            }
            words = f"What the models of a further Ollama server take of its {name.upper()}."
            yield self._gauge(f"node_ollama_{name}_bytes", words, held, ("node",))

    def _floor_gauges(self) -> Iterator[GaugeMetricFamily]:
        floors = () if self._floors is None else tuple(self._floors.now())
        labels = ("tenant", "measure")
        kept: dict[tuple[str, ...], float] = {(one.tenant, one.measure): float(one.floor_bytes) for one in floors}
        grown: dict[tuple[str, ...], float] = {(one.tenant, one.measure): float(one.growth_bytes) for one in floors}
        yield self._gauge("idle_floor_bytes", "What a tenant keeps when nothing of it is wanted.", kept, labels)
        yield self._gauge("idle_floor_growth_bytes", "How much that has risen since it started.", grown, labels)

    @staticmethod
    def _sum(name: str, words: str, number: int) -> Metric:
        return CounterMetricFamily(PREFIX + name, words, value=number)

    @staticmethod
    def _gauge(
        name: str, words: str, samples: dict[tuple[str, ...], float], labels: tuple[str, ...]
    ) -> GaugeMetricFamily:
        family = GaugeMetricFamily(PREFIX + name, words, labels=labels)
        # Names come from outside: what UTF-8 cannot say must not take the whole page with it, nor come twice.
        told: dict[tuple[str, ...], float] = {}
        for values, number in samples.items():
            key = tuple(value.encode(errors="replace").decode() for value in values)
            told[key] = told.get(key, 0.0) + number
        for key, number in told.items():
            family.add_metric(key, number)
        return family


def _largest(sizes: Mapping[str, int]) -> dict[tuple[str, ...], float]:
    """The largest by owner, and what the others have as one."""
    found: dict[tuple[str, ...], float] = {}
    for rank, (owner, size) in enumerate(sorted(sizes.items(), key=lambda one: (-one[1], one[0]))):
        key = (owner if rank < OWNERS else _THE_REST,)
        found[key] = found.get(key, 0.0) + size
    return found
