"""The replies in tests/contracts, as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx

CONTRACTS = Path(__file__).parent.parent / "contracts"


def names(folder: str, *patterns: str) -> list[str]:
    """Names of the samples that match any of the patterns; at least one, or the test would prove nothing."""
    found = sorted({path.name for pattern in patterns for path in (CONTRACTS / folder).glob(pattern)})
    assert found, f"no sample in {folder} matches {patterns}"
    return found


def ollama(name: str) -> Any:
    """The body of an Ollama sample."""
    return json.loads((CONTRACTS / "ollama" / name).read_text("utf-8"))


def comfyui(name: str) -> httpx.Response:
    """A ComfyUI sample as the reply it was."""
    sample = json.loads((CONTRACTS / "comfyui" / name).read_text("utf-8"))["response"]
    text = sample["text"] or "" if sample["json"] is None else json.dumps(sample["json"])
    kind = {"Content-Type": sample["headers"].get("Content-Type", "application/octet-stream")}
    return httpx.Response(sample["status"], headers=kind, text=text)


def cuda_bodies() -> list[dict[str, Any]]:
    """The published CUDA bodies, whole or in part."""
    path = CONTRACTS / "comfyui" / "system_stats.cuda.public-samples.json"
    samples = json.loads(path.read_text("utf-8"))["samples"]
    return [sample.get("body") or {"devices": sample["devices"]} for sample in samples]


def websocket_lines(name: str) -> list[str]:
    """The messages of a recorded websocket, without the recorder's clock."""
    lines = (CONTRACTS / "comfyui" / name).read_text("utf-8").splitlines()
    messages = [json.loads(line) for line in lines if line.strip()]
    return [json.dumps({key: part for key, part in message.items() if key != "t"}) for message in messages]
