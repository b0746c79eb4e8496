"""Values -> JSON. The contract for scripts, the CLI and dashboards: what is not known is null, with a reason beside."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from vram_manager import __version__
from vram_manager.clock import Clock
from vram_manager.cycle import Cycle
from vram_manager.domain.reading import Missing, Off, Reading, Seen
from vram_manager.domain.share import Share
from vram_manager.domain.size import MIB
from vram_manager.domain.snapshot import Gpu, GpuMemory, Snapshot
from vram_manager.gateway.waiting import Waiter
from vram_manager.journal import DecisionEntry, rfc3339
from vram_manager.nodes import model_view
from vram_manager.observer import Observer
from vram_manager.policy.accounting import gpus_seen
from vram_manager.policy.rules import Rules
from vram_manager.summary import NO_SNAPSHOT

# A turn takes a millisecond and the slowest beat is the interval: three of them without one is a stall.
STALLED_BEATS, STALLED_SECONDS = 3, 15.0


def health(clock: Clock, cycle: Cycle, observer: Observer) -> tuple[dict[str, Any], bool]:
    """Alive and which sensors are well; True when the cycle has stalled."""
    now = clock.monotonic()
    sensors = {name: _sensor(reading, now) for name, reading in observer.sensors().items()}
    age = None if cycle.turned_at is None else now - cycle.turned_at
    stalled = age is not None and age > max(STALLED_SECONDS, STALLED_BEATS * cycle.rules.interval_seconds)
    missing = any(sensor["state"] == "missing" for sensor in sensors.values())
    status = "stalled" if stalled else "degraded" if missing else "ok"
    return {
        "status": status,
        "version": __version__,
        "sensors": sensors,
        "cycle_age_seconds": None if age is None else round(age, 3),
        "dry_run": cycle.rules.dry_run,
        "monitoring": cycle.rules.enabled,
    }, stalled


def _sensor(reading: Reading[object], now: float) -> dict[str, Any]:
    match reading:
        case Seen(at=at):
            return {"state": "ok", "why": None, "age_seconds": round(now - at, 3)}
        case Missing(why=why, remedy=remedy, last_seen_at=last):
            return {
                "state": "missing",
                "why": why,
                "remedy": remedy,
                "age_seconds": None if last is None else round(now - last, 3),
            }
        case Off():
            return {"state": "off", "why": None, "age_seconds": None}


def health_vram(snapshot: Snapshot | None) -> dict[str, Any]:
    """Sums over the GPUs whose memory is known; null where none is."""
    gpus = [] if snapshot is None else _gpus(snapshot)
    views = [
        {
            "index": gpu.index,
            "uuid": gpu.uuid,
            "name": gpu.name,
            **(_megabytes([gpu.memory]) if isinstance(gpu.memory, GpuMemory) else _megabytes([])),
        }
        for gpu in gpus
    ]
    return {**_megabytes([gpu.memory for gpu in gpus if isinstance(gpu.memory, GpuMemory)]), "gpus": views}


def _megabytes(memories: list[GpuMemory]) -> dict[str, Any]:
    if not memories:
        return {"total_mb": None, "used_mb": None, "free_mb": None, "usage_percent": None}
    usable = sum(memory.usable_bytes for memory in memories)
    free = sum(memory.free_bytes for memory in memories)
    return {
        "total_mb": sum(memory.total_bytes for memory in memories) // MIB,
        "used_mb": sum(memory.used_bytes for memory in memories) // MIB,
        "free_mb": free // MIB,
        "usage_percent": round(100.0 * (1.0 - free / usable), 1),
    }


def _gpus(snapshot: Snapshot) -> tuple[Gpu, ...]:
    """Every GPU seen, also those whose memory is not known; second-hand ones only where there are no others."""
    if isinstance(snapshot.gpus, Seen) and any(isinstance(gpu.memory, GpuMemory) for gpu in snapshot.gpus.value.gpus):
        return snapshot.gpus.value.gpus
    seen = gpus_seen(snapshot)
    if not isinstance(seen, Missing):
        return seen.gpus
    return snapshot.gpus.value.gpus if isinstance(snapshot.gpus, Seen) else ()


def snapshot(clock: Clock, cycle: Cycle, tenants: Mapping[str, tuple[Share, ...]]) -> dict[str, Any]:
    """Everything that was seen at the last turn, who has how much of it, and who needs what."""
    seen = cycle.snapshot
    if seen is None:
        return NO_SNAPSHOT | {"gpus_why": None}
    age = clock.monotonic() - seen.taken_at
    gpus = gpus_seen(seen)
    return {
        "taken_at": rfc3339(clock.utcnow() - timedelta(seconds=age)),
        "age_seconds": round(age, 3),
        "gpus": [
            {
                **_gpu(gpu),
                "leased_bytes": seen.leased_on(gpu.uuid),
                "fits_bytes": _fits_bytes(gpu, seen.leased_on(gpu.uuid), cycle.rules),
                "limits": _limits(gpu, cycle.rules),
                "tenants": [_share(share) for share in tenants.get(gpu.uuid, ())],
            }
            for gpu in _gpus(seen)
        ],
        "gpus_why": gpus.why if isinstance(gpus, Missing) else None,
        "gpus_left_out": [] if isinstance(gpus, Missing) else list(gpus.left_out),
        "second_hand": False if isinstance(gpus, Missing) else gpus.second_hand,
        "margin_bytes": cycle.rules.safety_margin_bytes,
        "ollama": _ollama(seen),
        "comfyui": _comfyui(seen),
        "leases": [],
        "demands": [
            {
                "kind": demand.kind.name.lower(),
                "gpu": demand.gpu,
                "need_free_bytes": demand.need_free_bytes,
                "reason": demand.reason,
                "age_seconds": round(seen.taken_at - demand.since, 1),
            }
            for demand in cycle.watch.demands.values()
        ],
        "unreclaimable_bytes": dict(cycle.watch.unreclaimable),
        "settling": cycle.watch.pending.reason if cycle.watch.pending else None,
        "now": cycle.decision.reason if cycle.decision else None,
    }


def waiter(waiter: Waiter, now: float) -> dict[str, Any]:
    """One call that a gateway holds."""
    return {
        "upstream": waiter.upstream,
        "what": waiter.what,
        "why": waiter.why,
        "waited_seconds": round(now - waiter.since, 1),
    }


def _known(value: object) -> Any:
    return None if isinstance(value, Missing) else value


def _gpu(gpu: Gpu) -> dict[str, Any]:
    memory = gpu.memory
    view: dict[str, Any] = {
        "index": gpu.index,
        "uuid": gpu.uuid,
        "name": gpu.name,
        "vendor": gpu.vendor,
        "source": gpu.source,
        "trust": str(gpu.trust),
        "unified": gpu.unified,
        "asleep": gpu.asleep,
        "total_bytes": None,
        "used_bytes": None,
        "free_bytes": None,
        "reserved_bytes": None,
        "taken_bytes": None,
        "used_percent": None,
        "why": memory.why if isinstance(memory, Missing) else None,
        "utilization_percent": _known(gpu.utilization_percent),
        "temperature_celsius": _known(gpu.temperature_celsius),
        "power_watts": _known(gpu.power_watts),
        "unknown": {
            name: value.why
            for name in ("utilization_percent", "temperature_celsius", "power_watts")
            if isinstance(value := getattr(gpu, name), Missing)
        },
        "processes": None,
        "processes_why": gpu.processes.why if isinstance(gpu.processes, Missing) else None,
    }
    if isinstance(memory, GpuMemory):
        view |= {
            "total_bytes": memory.total_bytes,
            "used_bytes": memory.used_bytes,
            "free_bytes": memory.free_bytes,
            "reserved_bytes": _known(memory.reserved_bytes),
            "taken_bytes": memory.taken_bytes,
            "used_percent": round(memory.used_percent, 1),
        }
    if not isinstance(gpu.processes, Missing):
        view["processes"] = [
            {
                "pid": process.pid,
                "used_bytes": _known(process.used_bytes),
                "command": None if isinstance(process.command, Missing) else " ".join(process.command),
            }
            for process in gpu.processes
        ]
    return view


def _fits_bytes(gpu: Gpu, leased_bytes: int, rules: Rules) -> int | None:
    """The largest request that would be admitted there now, beside what is promised."""
    if isinstance(gpu.memory, Missing):
        return None
    return max(0, gpu.memory.free_bytes - leased_bytes - rules.safety_margin_bytes)


def _limits(gpu: Gpu, rules: Rules) -> dict[str, int] | None:
    """The lines that use is compared with, in bytes taken of the GPU."""
    memory = gpu.memory
    if isinstance(memory, Missing):
        return None
    whole = memory.usable_bytes
    return {
        "threshold_bytes": round(whole * rules.threshold_percent / 100),
        "unload_threshold_bytes": round(whole * rules.unload_threshold_percent / 100),
        "soft_limit_bytes": rules.soft_limit.on(whole),
        "hard_limit_bytes": rules.hard_limit.on(whole),
    }


def _share(share: Share) -> dict[str, Any]:
    return {
        "kind": str(share.kind),
        "tenant": share.tenant,
        "bytes": share.bytes,
        "certainty": str(share.certainty),
    }


def _ollama(seen: Snapshot) -> dict[str, Any] | None:
    match seen.ollama:
        case Seen(value=ollama, at=at):
            return {
                "state": "ok",
                "version": _known(ollama.version),
                "age_seconds": round(seen.taken_at - at, 3),
                "models": [model_view(model) for model in ollama.models],
            }
        case Missing(why=why):
            return {"state": "missing", "why": why, "models": None}
    return None


def _comfyui(seen: Snapshot) -> dict[str, Any] | None:
    if isinstance(seen.comfyui, Off):
        return None
    view: dict[str, Any] = {"state": "ok", "queue_remaining": None, "idle_seconds": None, "devices": None}
    for reading in (seen.comfyui, seen.queue):
        if isinstance(reading, Missing):
            view |= {"state": "missing", "why": reading.why}
    if isinstance(seen.queue, Seen):
        queue = seen.queue.value
        view["queue_remaining"] = queue.remaining
        view["idle_seconds"] = round(seen.taken_at - queue.since, 1) if queue.idle else 0.0
    if isinstance(seen.comfyui, Seen):
        comfyui = seen.comfyui.value
        view |= {
            "version": _known(comfyui.version),
            "argv": list(comfyui.argv),
            "devices": [
                {
                    "name": device.name,
                    "vram_total_bytes": device.vram_total_bytes,
                    "device_free_bytes": device.device_free_bytes,
                    "torch_total_bytes": device.torch_total_bytes,
                    "torch_free_bytes": device.torch_free_bytes,
                }
                for device in comfyui.devices
            ],
        }
    return view


def decision(entry: DecisionEntry) -> dict[str, Any]:
    """One decision with the numbers it was made on."""
    action = entry.decision.action
    return {
        "id": entry.id,
        "at": rfc3339(entry.at),
        "until": rfc3339(entry.until),
        "count": entry.count,
        "branch": entry.decision.branch,
        "reason": entry.decision.reason,
        "action": None if action is None else {"target": action.target, "stage": getattr(action, "stage", None)},
        "inputs": dict(entry.decision.inputs),
    }
