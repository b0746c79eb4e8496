"""The whole box in a few numbers, from a snapshot as the API tells it. What is not known is null."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# What the API says before its first look; where no daemon answers there is no more.
NO_SNAPSHOT: dict[str, Any] = {
    "taken_at": None,
    "age_seconds": None,
    "gpus": [],
    "gpus_why": "no daemon was asked",
    "gpus_left_out": [],
    "second_hand": False,
    "margin_bytes": None,
    "ollama": None,
    "comfyui": None,
    "leases": [],
    "line": [],
    "demands": [],
    "held": [],
    "unreclaimable_bytes": {},
    "settling": None,
    "now": None,
    "nodes": [],
}

# What a GPU of a daemon before 0.4.0, which lacks these, must have been.
_OLDER_GPU: dict[str, Any] = {
    "vendor": "nvidia",
    "trust": "measured",
    "unified": False,
    "asleep": False,
    "tenants": [],
    "limits": None,
    "processes": None,
    "processes_why": "the daemon does not say",
}


def completed(snapshot: dict[str, Any]) -> dict[str, Any]:
    """The snapshot with what an older daemon leaves out, as far as it follows from what it says."""
    gpus = [_completed(gpu, snapshot) for gpu in snapshot["gpus"]]
    return {**NO_SNAPSHOT, "gpus_why": None, **snapshot, "gpus": gpus}


def _completed(gpu: dict[str, Any], snapshot: dict[str, Any]) -> dict[str, Any]:
    total, free = gpu["total_bytes"], gpu["free_bytes"]
    leases = (lease for lease in snapshot.get("leases", ()) if lease.get("gpu") == gpu["uuid"])
    return {
        **_OLDER_GPU,
        "source": "ComfyUI" if snapshot.get("second_hand") else "NVML",
        "taken_bytes": None if total is None else total - (gpu["reserved_bytes"] or 0) - free,
        "leased_bytes": sum(lease.get("outstanding_bytes", 0) for lease in leases),
        **gpu,
    }


def document(
    snapshot: dict[str, Any],
    events: list[dict[str, Any]],
    nodes: Sequence[dict[str, Any]] = (),
    *,
    problem: str | None = None,
) -> dict[str, Any]:
    """All that a report says; `nodes` are what was asked from here, in place of what the daemon said of the same.

    `problem` is why there is no daemon to ask.
    """
    snapshot = completed(snapshot)
    asked = {node["url"]: node for node in nodes}
    known = [asked.pop(node["url"], node) for node in snapshot["nodes"]]
    nodes = [*known, *asked.values()]
    return {**snapshot, "problem": problem, "events": events, "nodes": nodes, "summary": summary(snapshot)}


def summary(snapshot: dict[str, Any]) -> dict[str, Any]:
    """Sums over the GPUs whose memory is known; `unknown_gpus` are the indices of the others.

    `used_bytes` is what is taken, without the driver's own reserve. `fits_bytes` is the largest request that would be
    admitted now, on the GPU of the index `fits_gpu`. `ollama_accelerated`: "yes", "partly", "no", "idle" (nothing is
    loaded), "unknown" or "none".
    """
    known = [gpu for gpu in snapshot["gpus"] if gpu["total_bytes"] is not None]
    best: dict[str, Any] = max(known, key=lambda gpu: gpu.get("fits_bytes") or 0, default={})
    usable = _sum(known, "taken_bytes", "free_bytes")
    taken = _sum(known, "taken_bytes")
    return {
        "gpus": len(snapshot["gpus"]),
        "unknown_gpus": [gpu["index"] for gpu in snapshot["gpus"] if gpu["total_bytes"] is None],
        "vendors": list(dict.fromkeys(gpu["vendor"] for gpu in snapshot["gpus"])),
        "total_bytes": _sum(known, "total_bytes"),
        "used_bytes": taken,
        "free_bytes": _sum(known, "free_bytes"),
        "leased_bytes": _sum(known, "leased_bytes"),
        "used_percent": round(100 * taken / usable, 1) if usable and taken is not None else None,
        "margin_bytes": snapshot.get("margin_bytes"),
        "fits_bytes": best.get("fits_bytes"),
        "fits_gpu": best.get("index"),
        **_of_ollama(snapshot["ollama"]),
    }


def _sum(gpus: list[dict[str, Any]], *fields: str) -> int | None:
    return sum(gpu[field] for gpu in gpus for field in fields) if gpus else None


def _of_ollama(ollama: dict[str, Any] | None) -> dict[str, Any]:
    models = (ollama or {}).get("models")
    vram, ram = placed(models)
    if ollama is None:
        accelerated = "none"
    elif models is None or (models and vram is None):
        accelerated = "unknown"
    else:
        accelerated = {"idle": "idle", "gpu": "yes", "cpu": "no", "split": "partly"}[verdict(models)]
    return {"ollama_accelerated": accelerated, "ollama_vram_bytes": vram, "ollama_ram_bytes": ram}


def placed(models: list[dict[str, Any]] | None) -> tuple[int | None, int | None]:
    """Bytes of Ollama's models in VRAM and in RAM; neither is known where the sizes of one contradict each other."""
    if models is None or any(model["cpu_ratio"] is None for model in models):
        return None, None
    ram = sum(model["size_bytes"] - model["size_vram_bytes"] for model in models if model["cpu_ratio"])
    return sum(model["size_vram_bytes"] for model in models), ram


def verdict(models: list[dict[str, Any]] | None) -> str:
    """Where the models of one Ollama are: "gpu", "cpu", "split", "idle" (there are none) or "unknown"."""
    if models is None or any(model["cpu_ratio"] is None for model in models):
        return "unknown"
    if not models:
        return "idle"
    ratios = {model["cpu_ratio"] for model in models}
    return "gpu" if ratios == {0} else "cpu" if ratios == {1} else "split"
