"""Prometheus numbers: gauges read from the last turn when scraped, counters fed by the journal.

What is not known has no sample: a gap in a graph, never a zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from vram_manager import __version__
from vram_manager.clock import Clock
from vram_manager.domain.event import EventType
from vram_manager.domain.reading import Missing, Off, Reading, Seen
from vram_manager.domain.snapshot import GpuMemory, Snapshot
from vram_manager.domain.watch import Watch
from vram_manager.journal import Entry

PREFIX = "vram_manager_"
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


class Sensing(Protocol):
    """What the sensor gauges are read from: the observer."""

    def sensors(self) -> dict[str, Reading[object]]: ...


class Metrics(Collector):
    """All metrics of one daemon, in a registry of their own."""

    def __init__(self, clock: Clock, cycle: Watched, observer: Sensing) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._clock = clock
        self._cycle = cycle
        self._observer = observer
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._frees = self._counter("frees", "Frees by how they ended.", ("target", "stage", "outcome"))
        self._freed = self._counter("freed_bytes", "Bytes proven to have come back.", ("target", "stage"))
        self._fallbacks = self._counter("cpu_fallbacks", "Placements of an Ollama model that touch the CPU.")
        self._duration = self._histogram(
            "free_duration_seconds", "From the request to the proof.", (0.25, 0.5, 1, 2, 3, 5, 10, 30)
        )
        self._turns = self._histogram(
            "cycle_duration_seconds", "One turn of the cycle.", (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.25, 1)
        )

    def _counter(self, name: str, words: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(PREFIX + name, words, labels, registry=self._registry)

    def _histogram(self, name: str, words: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(PREFIX + name, words, buckets=buckets, registry=self._registry)

    def count(self, entry: Entry) -> None:
        """Counts one journal entry."""
        event = entry.event
        target, stage = (event.target or "").partition(":")[0], event.stage or ""
        if (outcome := _OUTCOMES.get(event.type)) is not None:
            self._frees.labels(target, stage, outcome).inc()
        if event.type is EventType.FREED:
            self._freed.labels(target, stage).inc(event.freed_bytes or 0)
            self._duration.observe(event.took_seconds or 0.0)
        if event.type is EventType.CPU_FALLBACK:
            self._fallbacks.inc()

    def turned(self, seconds: float) -> None:
        """Counts one turn."""
        self._turns.observe(seconds)

    def render(self) -> bytes:
        """The text exposition format, version 0.0.4."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[GaugeMetricFamily]:
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

    def _gpu_gauges(self, snapshot: Snapshot) -> Iterator[GaugeMetricFamily]:
        memories = {}
        if isinstance(snapshot.gpus, Seen):
            memories = {gpu.uuid: gpu.memory for gpu in snapshot.gpus.value.gpus if isinstance(gpu.memory, GpuMemory)}
        for name in ("total", "used", "free"):
            yield self._gauge(
                f"gpu_memory_{name}_bytes",
                f"NVML's {name} memory of the GPU.",
                {(uuid,): float(getattr(memory, f"{name}_bytes")) for uuid, memory in memories.items()},
                ("gpu",),
            )

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

    @staticmethod
    def _gauge(
        name: str, words: str, samples: dict[tuple[str, ...], float], labels: tuple[str, ...]
    ) -> GaugeMetricFamily:
        family = GaugeMetricFamily(PREFIX + name, words, labels=labels)
        for values, number in samples.items():
            # Names come from outside; one that UTF-8 cannot say must not take the whole page with it.
            family.add_metric([value.encode(errors="replace").decode() for value in values], number)
        return family
