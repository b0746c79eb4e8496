"""A pretended box with a busy day, told in the words of the API, and the server that tells it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from vram_manager.api import page

GIB = 2**30
MORNING = datetime(2026, 3, 2, 7, 30, tzinfo=UTC).timestamp()
TOTAL, RESERVED = 24 * GIB - 12 * 2**20, GIB // 2
USABLE = TOTAL - RESERVED
# Nothing was recorded for ten minutes of the night.
SILENCE = (MORNING - 4 * 3600, MORNING - 4 * 3600 + 600)
# From the end of a run of ComfyUI's to the free of what it keeps.
RUN_MINUTES, IDLE_MINUTES, ROUND_MINUTES = 9, 7, 23


def stamp(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat().replace("+00:00", "Z")


def gpu_id(index: int) -> str:
    return f"GPU-{index:04d}-feed"


class Box:
    """What the API says. Its time is its own and stands still until it is put forward."""

    def __init__(self, gpus: int = 1, model: str = "qwen3:14b") -> None:
        self.gpus = gpus
        self.model = model
        self.now = MORNING
        self.recorded = True
        self.new: list[dict[str, Any]] = []
        self.more: dict[str, Any] = {}
        self.asked: list[str] = []
        self.readers = 0
        self.stopping = threading.Event()

    def tenants(self, index: int, at: float) -> list[dict[str, Any]]:
        """Who has what of a GPU at that time, from the bottom up."""
        minute = at / 60 + 11 * index
        step = minute % ROUND_MINUTES
        running = step < RUN_MINUTES
        kept = 4.5 + 1.5 * ((minute // ROUND_MINUTES) % 3) / 2
        sizes = [
            ("ollama", "ollama:llama3.1:8b", 5.6 if minute % 47 < 33 else 0.0, "measured"),
            ("ollama", f"ollama:{self.model}", 9.4 if 55 <= minute % 97 < 84 else 0.0, "measured"),
            ("comfyui_in_use", "comfyui in use", 2.5 + 0.25 * step if running else 0.0, "measured"),
            (
                "comfyui_cached",
                "comfyui cached",
                kept if RUN_MINUTES <= step < RUN_MINUTES + IDLE_MINUTES else 0.0,
                "measured",
            ),
            ("comfyui_unseen", "comfyui unseen", 0.6, "learned"),
            ("worker", "worker:tts", 1.8 if minute % 31 < 24 else 0.0, "measured"),
            ("process", "process:Xorg", 0.3, "measured"),
            ("others", "others", 0.7 + 0.0004 * ((at - MORNING + 86400) / 60 % 500), "perhaps"),
        ]
        return [
            {"kind": kind, "tenant": tenant, "bytes": int(size * GIB), "certainty": certainty}
            for kind, tenant, size, certainty in sizes
            if size
        ]

    def leased(self, index: int, at: float) -> int:
        return 2 * GIB if (at / 60 + 11 * index) % 31 >= 24 else 0

    def gpu(self, index: int) -> dict[str, Any]:
        tenants = self.tenants(index, self.now)
        taken = sum(share["bytes"] for share in tenants)
        return {
            "index": index,
            "uuid": gpu_id(index),
            "name": "NVIDIA GeForce RTX 4090",
            "vendor": "nvidia",
            "source": "NVML",
            "trust": "measured",
            "unified": False,
            "asleep": False,
            "total_bytes": TOTAL,
            "used_bytes": taken + RESERVED,
            "free_bytes": USABLE - taken,
            "reserved_bytes": RESERVED,
            "taken_bytes": taken,
            "leased_bytes": self.leased(index, self.now),
            "used_percent": round(100 * taken / USABLE, 1),
            "why": None,
            "utilization_percent": 87,
            "temperature_celsius": 64,
            "power_watts": 312.4,
            "processes": [],
            "processes_why": None,
            "limits": {
                "threshold_bytes": round(USABLE * 0.75),
                "unload_threshold_bytes": round(USABLE * 0.85),
                "soft_limit_bytes": round(USABLE * 0.90),
                "hard_limit_bytes": round(USABLE * 0.95),
            },
            "tenants": tenants,
        }

    def snapshot(self) -> dict[str, Any]:
        return {
            "taken_at": stamp(self.now),
            "age_seconds": 0.0,
            "gpus": [self.gpu(index) for index in range(self.gpus)],
            "gpus_why": None,
            "gpus_left_out": [],
            "second_hand": False,
            "ollama": {
                "state": "ok",
                "version": "0.33.1",
                "age_seconds": 0.2,
                "models": [
                    self.loaded("llama3.1:8b", 5.6, 0.0, 8192, 240),
                    self.loaded(self.model, 9.4, 0.23, 32768, 86400 * 365),
                ],
            },
            "comfyui": {
                "state": "ok",
                "version": "0.3.60",
                "queue_remaining": 0,
                "idle_seconds": 131.0,
                "devices": [{"torch_total_bytes": 6 * GIB, "torch_free_bytes": 5 * GIB}],
            },
            "leases": [
                {
                    "id": "lease-1",
                    "owner": "tts",
                    "gpu": gpu_id(0),
                    "bytes": 2 * GIB,
                    "outstanding_bytes": GIB // 5,
                    "used_bytes": int(1.8 * GIB),
                    "overclaimed_bytes": 0,
                    "priority": "batch",
                    "held": False,
                    "expires_at": stamp(self.now + 300),
                }
            ],
            "line": [
                {
                    "position": 1,
                    "owner": "training",
                    "required": "18.0 GiB",
                    "required_bytes": 18 * GIB,
                    "gpu": None,
                    "priority": "normal",
                    "waited_seconds": 95.0,
                    "eta_seconds": 120.0,
                }
            ],
            "held": [
                {
                    "upstream": "comfyui",
                    "what": "a prompt",
                    "why": "needs 11.9 GiB, 7.1 GiB free",
                    "waited_seconds": 4.2,
                }
            ],
            "demands": [],
            "unreclaimable_bytes": {},
            "settling": None,
            "now": "used 61.2 % on GPU 0, below the threshold of 75 %",
            **self.more,
        }

    def loaded(self, name: str, size: float, on_cpu: float, context: int, leaves: float) -> dict[str, Any]:
        return {
            "name": name,
            "digest": "62757c860e01",
            "size_bytes": int(size * GIB),
            "size_vram_bytes": int(size * (1 - on_cpu) * GIB),
            "cpu_ratio": on_cpu,
            "context_length": context,
            "expires_at": stamp(self.now + leaves),
            "requests": 1,
        }

    def events(self, begin: float, end: float) -> list[dict[str, Any]]:
        """ComfyUI is freed after each run of GPU 0, and now and then something else happens."""
        made = []
        for number in range(int(begin / 60 / ROUND_MINUTES) - 1, int(end / 60 / ROUND_MINUTES) + 1):
            at = (number * ROUND_MINUTES + RUN_MINUTES + IDLE_MINUTES) * 60
            made.append(self.event(number, at - 2, "free_asked", "comfyui", stage="unload"))
            made.append(self.event(number, at, "freed", "comfyui", freed_bytes=5 * GIB, stage="unload"))
            if number % 4 == 0:
                made.append(self.event(number, at - 200, "cpu_fallback", f"ollama:{self.model}"))
            if number % 9 == 0:
                made.append(self.event(number, at + 700, "leak", "worker:tts"))
            if number % 5 == 0:
                made.append(self.event(number, at + 300, "admitted", "worker:tts"))
        return [event for event in made if begin <= datetime.fromisoformat(event["at"]).timestamp() <= end]

    def event(self, number: int, at: float, kind: str, target: str, **more: Any) -> dict[str, Any]:
        reasons = {
            "free_asked": "used 88.1 % above the threshold of 85 % for 30 s",
            "freed": "used 88.1 % above the threshold of 85 % for 30 s, and ComfyUI was idle for 420 s",
            "cpu_fallback": f"{self.model} is 23 % on the CPU: 7.2 of 9.4 GiB fitted",
            "leak": "grew by 0.3 GiB over 100 generations",
            "admitted": "2.0 GiB on GPU 0, 9.1 GiB available",
        }
        return {
            "id": f"{kind}-{number}",
            "at": stamp(at),
            "type": kind,
            "gpu": gpu_id(0),
            "target": target,
            "stage": None,
            "reason": reasons[kind],
            "freed_bytes": None,
            "took_seconds": 2.1 if kind == "freed" else None,
            "used_percent_before": 88.1 if kind == "freed" else None,
            "used_percent_after": 66.0 if kind == "freed" else None,
            "action_id": f"free_asked-{number}" if kind.startswith("free") else None,
            "models": [],
            "decision_id": {"free_asked": "decision-0412", "freed": "decision-0413"}.get(kind),
            **more,
        }

    def history(self, begin: float, end: float, step: int) -> dict[str, Any]:
        times: list[float] = []
        at = begin - begin % step + step
        while at <= min(end, self.now):
            if not SILENCE[0] < at < SILENCE[1] or not times or times[-1] < SILENCE[0] or step < 600:
                times.append(at)
            at += step
        return {
            "from": stamp(begin),
            "to": stamp(end),
            "step_seconds": step,
            "level": "raw" if step < 60 else "minute",
            "gpus": [self.column(index, times) for index in range(self.gpus)],
            "queue": {"at": times, "remaining": [0] * len(times)},
            "events": self.events(begin, min(end, self.now))[-500:],
        }

    def column(self, index: int, times: list[float]) -> dict[str, Any]:
        known = [not SILENCE[0] < at < SILENCE[1] for at in times]
        held = [
            {share["tenant"]: share for share in self.tenants(index, at)} if there else {}
            for at, there in zip(times, known, strict=True)
        ]
        kinds = {name: share["kind"] for shares in held for name, share in shares.items()}
        taken = [
            sum(share["bytes"] for share in shares.values()) if there else None
            for shares, there in zip(held, known, strict=True)
        ]

        def where_known(values: list[Any]) -> list[Any]:
            return [value if there else None for value, there in zip(values, known, strict=True)]

        free = [None if size is None else USABLE - size for size in taken]
        return {
            "uuid": gpu_id(index),
            "index": index,
            "name": "NVIDIA GeForce RTX 4090",
            "total_bytes": TOTAL,
            "reserved_bytes": RESERVED,
            "at": times,
            "taken_bytes": taken,
            "taken_max_bytes": taken,
            "free_bytes": free,
            "free_min_bytes": free,
            "leased_bytes": where_known([self.leased(index, at) for at in times]),
            "utilization_percent": where_known([87] * len(times)),
            "temperature_celsius": where_known([64] * len(times)),
            "power_watts": where_known([312.4] * len(times)),
            "tenants": [
                {
                    "tenant": name,
                    "kind": kind,
                    "bytes": where_known([shares[name]["bytes"] if name in shares else 0 for shares in held]),
                }
                for name, kind in kinds.items()
            ],
        }

    def decisions(self) -> list[dict[str, Any]]:
        inputs = {
            "gpus": [{"gpu": gpu_id(0), "used_percent": 88.1, "free_bytes": int(2.8 * GIB)}],
            "comfyui_queue": {"remaining": 0, "unchanged_seconds": 420.3},
            "demands": [],
        }
        return [
            {
                "id": f"decision-{413 - step:04d}",
                "at": stamp(self.now - 600 * (step + 1)),
                "until": stamp(self.now - 600 * step),
                "count": 1 if step == 1 else 120,
                "branch": "5 free" if step == 1 else "2 calm",
                "reason": "used 88.1 % above 85 % for 30 s: ComfyUI gives way"
                if step == 1
                else "used 61.2 % is below 75 %",
                "action": {"target": "comfyui", "stage": "unload"} if step == 1 else None,
                "inputs": inputs,
            }
            for step in range(3)
        ]

    def app(self) -> Starlette:
        async def snapshot(request: Request) -> Response:
            self.asked.append("snapshot")
            return JSONResponse(self.snapshot())

        async def health(request: Request) -> Response:
            sensors = {name: {"state": "ok", "why": None, "age_seconds": 0.1} for name in ("nvml", "ollama", "comfyui")}
            return JSONResponse({"status": "ok", "version": "0.4.0", "sensors": sensors, "dry_run": False})

        async def history(request: Request) -> Response:
            if not self.recorded:
                message = "no history is kept: VRAM_HISTORY_MB=0"
                return JSONResponse({"error": {"type": "not_found", "message": message}}, status_code=404)
            asked = request.query_params
            begin, end = (datetime.fromisoformat(asked[name]).timestamp() for name in ("from", "to"))
            return JSONResponse(self.history(begin, end, int(asked["step"])))

        async def events(request: Request) -> Response:
            if "text/event-stream" in request.headers["accept"]:
                return StreamingResponse(self.stream(), media_type="text/event-stream")
            return JSONResponse({"events": self.events(self.now - 86400, self.now)})

        async def decisions(request: Request) -> Response:
            return JSONResponse({"decisions": self.decisions()})

        return Starlette(
            routes=[
                *page.routes(),
                Route("/health", health),
                Route("/v1/snapshot", snapshot),
                Route("/v1/history", history),
                Route("/v1/events", events),
                Route("/v1/decisions", decisions),
            ]
        )

    async def stream(self) -> AsyncIterator[str]:
        """Events that tests put into `new`; it ends with the server."""
        self.readers += 1
        try:
            while not self.stopping.is_set():
                while self.new:
                    yield f"data: {json.dumps(self.new.pop(0))}\n\n"
                await asyncio.sleep(0.05)
        finally:
            self.readers -= 1


@contextlib.contextmanager
def serving(box: Box, port: int = 0) -> Iterator[str]:
    """The address at which `box` answers inside the block."""
    listener = socket.create_server(("127.0.0.1", port))
    config = uvicorn.Config(box.app(), log_config=None, lifespan="off", ws="none", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)

    box.stopping.clear()
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield "http://{}:{}".format(*listener.getsockname())
    finally:
        server.should_exit = True
        box.stopping.set()
        thread.join()
        listener.close()
