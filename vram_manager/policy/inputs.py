"""The numbers a decision was made on, as plain data, so that `why` can show them afterwards."""

from __future__ import annotations

from vram_manager.domain.reading import Missing, Reading, Seen
from vram_manager.domain.snapshot import GpuMemory, Gpus, Snapshot
from vram_manager.domain.watch import Watch
from vram_manager.policy.guards import HOUR_SECONDS


def _age(reading: Reading[object], now: float) -> str | float:
    match reading:
        case Seen(at=at):
            return round(now - at, 2)
        case Missing(why=why):
            return f"missing: {why}"
    return "off"


def inputs_of(snapshot: Snapshot, gpus: Gpus | Missing, watch: Watch) -> dict[str, object]:
    """What was seen, how old it was, and who needed what."""
    now = snapshot.taken_at
    inputs: dict[str, object] = {
        "reading_age_seconds": {
            "nvml": _age(snapshot.gpus, now),
            "ollama": _age(snapshot.ollama, now),
            "comfyui": _age(snapshot.comfyui, now),
            "comfyui_queue": _age(snapshot.queue, now),
        }
    }
    if isinstance(gpus, Gpus):
        inputs["gpus"] = [
            {
                "gpu": gpu.uuid,
                "used_percent": round(gpu.memory.used_percent, 1),
                "free_bytes": gpu.memory.free_bytes,
                "second_hand": gpus.second_hand,
            }
            if isinstance(gpu.memory, GpuMemory)
            else {"gpu": gpu.uuid, "missing": gpu.memory.why}
            for gpu in gpus.gpus
        ]
    if isinstance(snapshot.ollama, Seen):
        inputs["ollama"] = [
            {"model": model.name, "size_bytes": model.size_bytes, "size_vram_bytes": model.size_vram_bytes}
            for model in snapshot.ollama.value.models
        ]
    if isinstance(snapshot.comfyui, Seen) and snapshot.comfyui.value.devices:
        device = snapshot.comfyui.value.devices[0]
        inputs["comfyui_torch_bytes"] = device.torch_total_bytes
    if isinstance(snapshot.queue, Seen):
        queue = snapshot.queue.value
        inputs["comfyui_queue"] = {
            "remaining": queue.remaining,
            "unchanged_seconds": round(now - queue.since, 1),
            "runs": queue.runs,
        }
    inputs["demands"] = [
        {
            "reason": demand.reason,
            "need_free_bytes": demand.need_free_bytes,
            "age_seconds": round(now - demand.since, 1),
        }
        for demand in watch.demands.values()
    ]
    recent = sum(now - at < HOUR_SECONDS for at in watch.frees_at)
    if recent:
        inputs["swaps_within_the_hour"] = recent
    return inputs
