"""The OpenAPI document of the socket. A test holds it against the routes and against real answers."""

from __future__ import annotations

from typing import Any

from vram_manager import __version__
from vram_manager.domain.demand import Kind
from vram_manager.domain.event import EventType
from vram_manager.domain.sample import Level
from vram_manager.domain.share import Certainty, ShareKind
from vram_manager.domain.snapshot import Trust
from vram_manager.policy.series import COLUMNS


def _json(words: str, schema: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"description": words, "content": {"application/json": {"schema": schema or {"type": "object"}}}}


def _nullable(kind: str) -> dict[str, Any]:
    return {"type": [kind, "null"]}


def _get(words: str, answers: dict[str, Any], parameters: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    return {"get": {"summary": words, "responses": answers, **({"parameters": parameters} if parameters else {})}}


_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}, "field": {"type": "string"}},
        }
    },
}
_MEGABYTES = {
    "total_mb": _nullable("integer"),
    "used_mb": _nullable("integer"),
    "free_mb": _nullable("integer"),
    "usage_percent": _nullable("number"),
}
_HEALTH = {
    "type": "object",
    "required": ["status", "version", "sensors", "cycle_age_seconds"],
    "properties": {
        "status": {"enum": ["ok", "degraded", "stalled"]},
        "version": {"type": "string"},
        "cycle_age_seconds": _nullable("number"),
        "dry_run": {"type": "boolean"},
        "monitoring": {"type": "boolean"},
        "sensors": {
            "type": "object",
            "required": ["nvml", "ollama", "comfyui"],
            "additionalProperties": {
                "type": "object",
                "required": ["state", "why", "age_seconds"],
                "properties": {
                    "state": {"enum": ["ok", "missing", "off"]},
                    "why": _nullable("string"),
                    "remedy": _nullable("string"),
                    "age_seconds": _nullable("number"),
                },
            },
        },
    },
}
_EVENT = {
    "type": "object",
    "required": ["id", "at", "type", "gpu", "target", "stage", "reason", "freed_bytes", "took_seconds"],
    "properties": {
        "id": {"type": "string"},
        "at": {"type": "string", "format": "date-time"},
        "type": {"enum": [kind.value for kind in EventType]},
        "gpu": _nullable("string"),
        "target": _nullable("string"),
        "stage": {"enum": ["soft", "unload", None]},
        "reason": {"type": "string"},
        "freed_bytes": _nullable("integer"),
        "took_seconds": _nullable("number"),
        "used_percent_before": _nullable("number"),
        "used_percent_after": _nullable("number"),
        "action_id": _nullable("string"),
        "models": {"type": "array", "items": {"type": "string"}},
        "decision_id": _nullable("string"),
    },
}
_DECISION = {
    "type": "object",
    "required": ["id", "at", "reason", "action", "inputs"],
    "properties": {
        "id": {"type": "string"},
        "at": {"type": "string", "format": "date-time"},
        "until": {"type": "string", "format": "date-time"},
        "count": {"type": "integer"},
        "branch": {"type": "string"},
        "reason": {"type": "string"},
        "action": {"type": ["object", "null"]},
        "inputs": {"type": "object"},
    },
}


_SIZE = {"type": "string", "examples": ["24GiB", "11.5GB", "90%"]}
_LEASE = {
    "type": "object",
    "required": ["id", "owner", "gpu", "bytes", "visible_bytes", "outstanding_bytes", "expires_at", "held"],
    "properties": {
        "id": {"type": "string"},
        "owner": {"type": "string"},
        "gpu": _nullable("string"),
        "bytes": {"type": "integer"},
        "visible_bytes": {"type": "integer", "description": "What of it shows in the GPU's numbers by now"},
        "outstanding_bytes": {"type": "integer", "description": "The rest: held back from others"},
        "claimed_bytes": _nullable("integer"),
        "used_bytes": _nullable("integer"),
        "peak_bytes": _nullable("integer"),
        "overclaimed_bytes": {"type": "integer"},
        "priority": {"enum": ["interactive", "normal", "batch"]},
        "held": {"type": "boolean", "description": "An open connection keeps it; then expires_at is null"},
        "granted_at": {"type": "string", "format": "date-time"},
        "expires_at": {"type": ["string", "null"], "format": "date-time"},
        "ttl_seconds": {"type": "number"},
        "pid": _nullable("integer"),
        "estimate_source": {"type": "string"},
        "estimate": {"type": "string"},
    },
}
_ADMISSION = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "required": _SIZE,
        "required_mb": {"type": "integer"},
        "model": {"type": "string", "description": "Estimate for this model instead"},
        "context": {"type": "integer", "description": "Context of an Ollama model, tokens"},
        "workflow": {"type": "object", "description": "Estimate for this ComfyUI prompt (API format) instead"},
        "margin_mb": {"type": "integer", "description": "Instead of VRAM_SAFETY_MARGIN_MB"},
        "gpu": {"type": ["string", "integer"], "description": "UUID or index; else the one with most room"},
        "owner": {"type": "string"},
        "pid": {"type": "integer", "description": "The process that will hold the memory"},
        "priority": {"enum": ["interactive", "normal", "batch"], "default": "normal"},
        "wait_seconds": {"type": "number", "description": "Absent: only as long as making room takes; 0: not at all"},
        "ttl_seconds": {"type": "number", "default": 60},
        "lease": {"type": "boolean", "default": True, "description": "false: an answer, nothing is reserved"},
        "dry_run": {"type": "boolean", "default": False, "description": "Never refuse, say who would have been"},
        "request_id": {"type": "string", "description": "The same id again is the same question"},
    },
}
_VERDICT = {
    "type": "object",
    "required": [
        "admitted",
        "reason",
        "gpu",
        "required_bytes",
        "margin_bytes",
        "available_bytes",
        "shortfall_bytes",
        "estimate_source",
        "lease",
        "fail_open",
        "dry_run",
        "waited_seconds",
        "position",
        "retry_after_seconds",
        "alternatives",
    ],
    "properties": {
        "admitted": {"type": "boolean"},
        "reason": {"type": "string"},
        "gpu": _nullable("string"),
        "required_bytes": _nullable("integer"),
        "margin_bytes": {"type": "integer"},
        "available_bytes": _nullable("integer"),
        "shortfall_bytes": _nullable("integer"),
        "reclaimable_bytes": {"type": "integer", "description": "What idle tenants could give back"},
        "estimate_source": {"enum": ["request", "learned", "table", "files", "default"]},
        "estimate": {"type": "string"},
        "lease": {"type": ["object", "null"]},
        "fail_open": {"type": "boolean"},
        "dry_run": {"type": "boolean"},
        "monitoring": {"type": "boolean"},
        "waited_seconds": {"type": "number"},
        "position": _nullable("integer"),
        "retry_after_seconds": {"type": ["number", "null"], "description": "An estimate"},
        "alternatives": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["gpu", "required_bytes", "model", "words"],
                "properties": {
                    "gpu": _nullable("string"),
                    "required_bytes": {"type": "integer"},
                    "model": _nullable("string"),
                    "words": {"type": "string"},
                },
            },
        },
    },
}
_WAITING = {
    "type": "object",
    "required": ["position", "owner", "required_bytes", "gpu", "priority", "waited_seconds", "eta_seconds"],
    "properties": {
        "position": {"type": "integer"},
        "owner": {"type": "string"},
        "required": {"type": "string", "description": "As asked for: 8.0 GiB, or 90%"},
        "required_bytes": _nullable("integer"),
        "gpu": _nullable("string"),
        "priority": {"type": "string"},
        "waited_seconds": {"type": "number"},
        "eta_seconds": {"type": ["number", "null"], "description": "An estimate"},
    },
}
_MODEL = {
    "type": "object",
    "required": ["name", "size_bytes", "size_vram_bytes", "cpu_ratio", "context_length", "expires_at", "requests"],
    "properties": {
        "name": {"type": "string"},
        "digest": {"type": "string"},
        "size_bytes": {"type": "integer"},
        "size_vram_bytes": {"type": "integer"},
        "cpu_ratio": {"type": ["number", "null"], "description": "The part on the CPU, 0 to 1"},
        "context_length": _nullable("integer"),
        "expires_at": {"type": ["string", "null"], "format": "date-time"},
        "requests": {
            "type": ["integer", "null"],
            "description": "Under way through the gateway; null without one: Ollama itself does not say",
        },
    },
}
_OLLAMA = {
    "type": ["object", "null"],
    "required": ["state", "models"],
    "properties": {
        "state": {"enum": ["ok", "missing"]},
        "why": {"type": "string"},
        "version": _nullable("string"),
        "age_seconds": {"type": "number"},
        "models": {"type": ["array", "null"], "items": _MODEL},
    },
}
_NODE = {
    "type": "object",
    "required": ["url", "state", "why", "age_seconds", "version", "verdict", "vram_bytes", "ram_bytes", "models"],
    "properties": {
        "url": {"type": "string", "description": "Without a name and password in it"},
        "state": {"enum": ["ok", "missing", "unread"]},
        "why": _nullable("string"),
        "remedy": _nullable("string"),
        "age_seconds": _nullable("number"),
        "version": _nullable("string"),
        "verdict": {
            "enum": ["gpu", "cpu", "split", "idle", "unknown"],
            "description": "Where its models are, by what it tells of their sizes; idle: nothing is loaded",
        },
        "vram_bytes": _nullable("integer"),
        "ram_bytes": _nullable("integer"),
        "models": {"type": ["array", "null"], "items": _MODEL},
    },
}
_HELD = {
    "type": "object",
    "required": ["upstream", "what", "why", "waited_seconds"],
    "properties": {
        "upstream": {"enum": ["ollama", "comfyui"]},
        "what": {"type": "string", "description": "The model, or a prompt"},
        "why": {"type": "string"},
        "waited_seconds": {"type": "number"},
    },
}
_DEMAND = {
    "type": "object",
    "required": ["kind", "gpu", "need_free_bytes", "reason", "age_seconds"],
    "properties": {
        "kind": {"enum": [kind.name.lower() for kind in Kind]},
        "gpu": _nullable("string"),
        "need_free_bytes": {"type": "integer"},
        "reason": {"type": "string"},
        "age_seconds": {"type": "number"},
    },
}
_SHARE = {
    "type": "object",
    "required": ["kind", "tenant", "bytes", "certainty"],
    "properties": {
        "kind": {"enum": [str(kind) for kind in ShareKind]},
        "tenant": {"type": "string", "description": "A name that stays the same over time, such as ollama:llama3.1:8b"},
        "bytes": {"type": "integer"},
        "certainty": {"enum": [str(certainty) for certainty in Certainty]},
    },
}
_GPU = {
    "type": "object",
    "required": ["index", "uuid", "name", "vendor", "source", "trust", "unified", "asleep", "limits", "tenants"],
    "properties": {
        "trust": {"enum": [str(trust) for trust in Trust], "description": "How sure its numbers are"},
        "source": {"type": "string", "description": "Where its memory is read from"},
        "leased_bytes": {"type": "integer", "description": "What of its free memory is promised"},
        "fits_bytes": {"type": ["integer", "null"], "description": "The largest request that would be admitted now"},
        "unknown": {
            "type": "object",
            "description": "Why utilization_percent, temperature_celsius or power_watts is null",
            "additionalProperties": {"type": "string"},
        },
        "limits": {"type": ["object", "null"], "additionalProperties": {"type": "integer"}},
        "tenants": {"type": "array", "description": "Who has what is taken; adds up to taken_bytes", "items": _SHARE},
    },
}
_FLOOR = {
    "type": "object",
    "required": [
        "tenant",
        "measure",
        "baseline_bytes",
        "floor_bytes",
        "growth_bytes",
        "generations",
        "leak",
        "points",
    ],
    "properties": {
        "tenant": {"type": "string", "description": "comfyui, ollama, ollama:MODEL, worker:OWNER or others"},
        "measure": {"type": "string", "description": "How and when it was measured"},
        "baseline_bytes": {"type": "integer", "description": "What it was at first"},
        "floor_bytes": {"type": "integer", "description": "What it is now"},
        "growth_bytes": {"type": "integer"},
        "generations": {"type": "integer", "description": "Runs, loads or generations between the points"},
        "leak": {"type": "boolean", "description": "A leak was told of it"},
        "points": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["at", "bytes", "runs", "ran"],
                "properties": {
                    "at": {"type": "string", "format": "date-time"},
                    "bytes": {"type": "integer"},
                    "runs": {"type": "integer", "description": "Since the point before"},
                    "ran": {"type": "array", "items": {"type": "string"}},
                },
            },
        },
    },
}
_SNAPSHOT = {
    "type": "object",
    "required": [
        "taken_at",
        "age_seconds",
        "gpus",
        "gpus_why",
        "second_hand",
        "ollama",
        "comfyui",
        "leases",
        "line",
        "floors",
        "demands",
        "held",
        "unreclaimable_bytes",
        "settling",
        "now",
    ],
    "properties": {
        "taken_at": {"type": ["string", "null"], "format": "date-time"},
        "age_seconds": _nullable("number"),
        "gpus": {"type": "array", "items": _GPU},
        "gpus_left_out": {"type": "array", "description": "Further GPUs, and why not", "items": {"type": "string"}},
        "gpus_why": _nullable("string"),
        "second_hand": {"type": "boolean", "description": "The GPU's numbers are ComfyUI's: NVML cannot be read"},
        "ollama": _OLLAMA,
        "comfyui": {"type": ["object", "null"]},
        "leases": {"type": "array", "items": _LEASE},
        "floors": {
            "type": "array",
            "description": "What tenants keep when nothing of them is wanted, the newest first",
            "items": _FLOOR,
        },
        "line": {"type": "array", "description": "Who waits for a lease, in order", "items": {"type": "object"}},
        "demands": {"type": "array", "description": "Who needs memory", "items": _DEMAND},
        "held": {"type": "array", "description": "Calls that wait at a gateway now, oldest first", "items": _HELD},
        "unreclaimable_bytes": {"type": "object", "additionalProperties": {"type": "integer"}},
        "settling": {"type": ["string", "null"], "description": "Why the free was asked whose proof is waited for"},
        "now": {"type": ["string", "null"], "description": "The last decision in words"},
        "margin_bytes": {"type": ["integer", "null"], "description": "What an admission leaves free"},
        "nodes": {"type": "array", "description": "Further Ollama servers, of OLLAMA_NODES", "items": _NODE},
    },
}
_SERIES = {"type": "array", "items": {"type": ["number", "null"]}}
_HISTORY = {
    "type": "object",
    "required": ["from", "to", "step_seconds", "level", "gpus", "queue", "events"],
    "properties": {
        "from": {"type": "string", "format": "date-time"},
        "to": {"type": "string", "format": "date-time"},
        "step_seconds": {"type": "integer"},
        "level": {"enum": [str(level) for level in Level], "description": "What the steps are made of"},
        "gpus": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["uuid", "index", "name", "total_bytes", "reserved_bytes", "at", *COLUMNS, "tenants"],
                "properties": {
                    "at": {
                        "type": "array",
                        "description": "When each step begins, seconds since 1970; a gap is one step of nulls",
                        "items": {"type": "number"},
                    },
                    "reserved_bytes": _nullable("integer"),
                    **dict.fromkeys(COLUMNS, _SERIES),
                    "tenants": {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "required": ["tenant", "kind", "bytes", "max_bytes"],
                            "properties": {"bytes": _SERIES, "max_bytes": _SERIES},
                        },
                    },
                },
            },
        },
        "queue": {"type": "object", "required": ["at", "remaining"], "properties": {"remaining": _SERIES}},
        "events": {"type": "array", "description": "The newest 500 of the window", "items": _EVENT},
    },
}
_ONE_LEASE = {"type": "object", "required": ["lease"], "properties": {"lease": _LEASE}}


def _post(words: str, schema: dict[str, Any], answers: dict[str, Any]) -> dict[str, Any]:
    """A POST with a JSON body; the ways in which one can be wrong are always the same."""
    return {
        "post": {
            "summary": words,
            "requestBody": {"content": {"application/json": {"schema": schema}}},
            "responses": {
                **answers,
                "400": _json("Not JSON", _ERROR),
                "401": _json("TCP: wrong or no token", _ERROR),
                "403": _json("TCP: read-only", _ERROR),
                "413": _json("Body too large", _ERROR),
                "422": _json("A field is wrong, and which", _ERROR),
            },
        }
    }


def _list(name: str, item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "required": [name], "properties": {name: {"type": "array", "items": item}}}


def _query(name: str, words: str) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "description": words, "schema": {"type": "string"}}


_REPORT = {
    "gpu": {"type": ["string", "integer"], "description": "UUID or index; else the only one, else the fullest"},
    "allocated_bytes": {"type": "integer", "description": "torch.cuda.memory_allocated()"},
    "reserved_bytes": {"type": "integer", "description": "torch.cuda.memory_reserved()"},
}
_SLOT = {"type": ["integer", "string", "null"]}
_SIZES = {"type": "object", "additionalProperties": {"type": "integer"}}
_LEAK = {
    "type": ["object", "null"],
    "required": ["initial_bytes", "current_bytes", "delta_bytes", "generations", "delta_per_generation_bytes"],
    "properties": {
        "initial_bytes": {"type": "integer"},
        "current_bytes": {"type": "integer"},
        "delta_bytes": {"type": "integer"},
        "generations": {"type": "integer"},
        "delta_per_generation_bytes": {"type": "integer"},
    },
}
_CHECK = {
    "type": "object",
    "required": [
        "level",
        "sustained",
        "used_bytes",
        "soft_limit_bytes",
        "hard_limit_bytes",
        "requested_bytes",
        "gpu",
        "message",
    ],
    "properties": {
        "level": {"enum": ["ok", "soft", "hard", "unknown"]},
        "sustained": {"type": "boolean"},
        "used_bytes": _nullable("integer"),
        "soft_limit_bytes": _nullable("integer"),
        "hard_limit_bytes": _nullable("integer"),
        "requested_bytes": {"type": "integer"},
        "gpu": _nullable("string"),
        "message": {"type": "string"},
    },
}
_FIT = {
    "type": "object",
    "required": [
        "owner",
        "models_bytes",
        "buffers_bytes",
        "total_bytes",
        "budget_bytes",
        "fits",
        "shortfall_bytes",
        "over_budget",
        "message",
    ],
    "properties": {
        "owner": {"type": "string"},
        "models_bytes": {"type": "integer"},
        "buffers_bytes": {"type": "integer"},
        "total_bytes": {"type": "integer"},
        "budget_bytes": _nullable("integer"),
        "fits": {"type": "boolean"},
        "shortfall_bytes": {"type": "integer"},
        "over_budget": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name", "bytes", "budget_bytes"],
                "properties": {
                    "name": {"type": "string"},
                    "bytes": {"type": "integer"},
                    "budget_bytes": {"type": "integer"},
                },
            },
        },
        "message": {"type": "string"},
    },
}
_POINT = {
    "type": "object",
    "required": ["timestamp", "event", "slot", "vram_usage_gb", "vram_allocated_gb", "vram_reserved_gb", "models"],
    "properties": {
        "timestamp": {"type": "string", "format": "date-time"},
        "event": {"type": "string"},
        "slot": _SLOT,
        "vram_usage_gb": _nullable("number"),
        "vram_allocated_gb": _nullable("number"),
        "vram_reserved_gb": _nullable("number"),
        "models": {"type": "object", "additionalProperties": {"type": "number"}},
    },
}
_GENERATION = {
    "type": "object",
    "required": ["delta_bytes", "generations", "leak"],
    "properties": {"delta_bytes": _nullable("integer"), "generations": {"type": "integer"}, "leak": _LEAK},
}
_WORKER = {
    "type": "object",
    "required": [
        "owner",
        "models",
        "buffers",
        "budget_bytes",
        "allocated_bytes",
        "reserved_bytes",
        "generations",
        "last_delta_bytes",
        "leak",
        "seen_at",
    ],
    "properties": {
        "owner": {"type": "string"},
        "models": _SIZES,
        "buffers": _SIZES,
        "budget_bytes": _nullable("integer"),
        "allocated_bytes": _nullable("integer"),
        "reserved_bytes": _nullable("integer"),
        "generations": {"type": "integer"},
        "last_delta_bytes": _nullable("integer"),
        "leak": _LEAK,
        "seen_at": {"type": "string", "format": "date-time"},
    },
}


def _told(
    words: str,
    body: dict[str, Any],
    needed: list[str],
    answer: dict[str, Any],
    *,
    owner: bool = False,
    gpu: bool = False,
) -> dict[str, Any]:
    """A POST by which a worker tells something of itself."""
    schema = {"type": "object", "additionalProperties": False, "required": needed, "properties": body}
    named = {"name": "owner", "in": "path", "required": True, "schema": {"type": "string", "maxLength": 200}}
    return {
        "post": {
            "summary": words,
            **({"parameters": [named]} if owner else {}),
            "requestBody": {"content": {"application/json": {"schema": schema}}},
            "responses": {
                "200": _json("The answer", answer),
                "400": _json("Not JSON", _ERROR),
                "401": _json("TCP: wrong or no token", _ERROR),
                "403": _json("TCP: read-only", _ERROR),
                **({"404": _json("No such GPU", _ERROR)} if gpu else {}),
                "413": _json("Body too large", _ERROR),
                "422": _json("A field is wrong, and which", _ERROR),
            },
        }
    }


_TEXT = {"type": "string"}
_WORKER_PATHS = {
    "/v1/limits/check": _told(
        "How near to its limits a GPU is, with what is about to be allocated",
        {"owner": _TEXT, "context": _TEXT, "requesting_mb": {"type": "integer"}, **_REPORT},
        [],
        _CHECK,
        gpu=True,
    ),
    "/v1/generations": _told(
        "A generation begins or has ended; what it left behind, and a leak",
        {"owner": _TEXT, "phase": {"enum": ["start", "end"]}, "id": _TEXT, "slot": _SLOT, **_REPORT},
        ["owner", "phase", "id"],
        _GENERATION,
        gpu=True,
    ),
    "/v1/workers": _get(
        "Every worker that told of itself", {"200": _json("Least recently seen first", _list("workers", _WORKER))}
    ),
    "/v1/workers/{owner}/models": _told(
        "What a worker has loaded, and whether that and its buffers fit",
        {"models": _SIZES, "buffers": _SIZES, "budgets": _SIZES, "budget_bytes": {"type": "integer"}},
        ["models"],
        _FIT,
        owner=True,
    ),
    "/v1/workers/{owner}/snapshots": _told(
        "Memory at a named point, also in the log at DEBUG",
        {"event": _TEXT, "slot": _SLOT, **_REPORT},
        ["event"],
        _POINT,
        owner=True,
        gpu=True,
    ),
}


DOCUMENT: dict[str, Any] = {
    "openapi": "3.1.0",
    "info": {
        "title": "vram-manager",
        "version": __version__,
        "description": "The daemon's Unix socket (and TCP when VRAM_HTTP_PORT is set). Bytes are integers, times are "
        "seconds, timestamps RFC 3339 UTC; what is not known is null.",
    },
    "paths": {
        "/health": _get(
            "Alive, and which sensors are well",
            {"200": _json("Alive", _HEALTH), "503": _json("The cycle has stalled", _HEALTH)},
        ),
        "/ready": _get("Whether a first full look has been had", {"200": _json("Ready"), "503": _json("Not yet")}),
        "/health/vram": _get(
            "Memory of all GPUs and of each",
            {
                "200": _json(
                    "Memory in MiB",
                    {
                        "type": "object",
                        "required": [*_MEGABYTES, "gpus"],
                        "properties": {
                            **_MEGABYTES,
                            "gpus": {"type": "array", "items": {"type": "object", "properties": _MEGABYTES}},
                        },
                    },
                )
            },
        ),
        "/v1/snapshot": _get("Everything that was seen at the last turn", {"200": _json("The snapshot", _SNAPSHOT)}),
        "/v1/events": _get(
            "What happened; with Accept: text/event-stream it goes on as it happens",
            {"200": _json("Events, oldest first", _list("events", _EVENT)), "422": _json("Bad query", _ERROR)},
            [_query("after", "Only events after this id"), _query("limit", "At most so many, 1-1000")],
        ),
        "/v1/history": _get(
            "How the GPUs were used over time; CSV with format=csv or Accept: text/csv",
            {
                "200": _json("Columns of equal length, a row a step", _HISTORY),
                "422": _json("Bad query", _ERROR),
                "503": _json("The history cannot be read", _ERROR),
            },
            [
                _query("from", "RFC 3339, or before now, such as -2h; an hour before `to` without it"),
                _query("to", "RFC 3339, or before now; now without it"),
                _query("step", "Seconds; without it about 600 steps. It grows where there would be more than 1500"),
                _query("gpu", "UUID or index; all without it"),
                _query("format", "json or csv"),
            ],
        ),
        "/v1/decisions": _get(
            "What was decided and on which numbers",
            {"200": _json("Newest first", _list("decisions", _DECISION)), "422": _json("Bad query", _ERROR)},
            [_query("limit", "At most so many, 1-1000")],
        ),
        "/v1/free": {
            "post": {
                "summary": "Ask for a free by hand, bound by the same rules",
                "requestBody": {
                    "content": {
                        "application/json": {
                            "schema": {
                                "type": "object",
                                "additionalProperties": False,
                                "properties": {
                                    "stage": {"enum": ["soft", "unload"], "default": "soft"},
                                    "force": {"type": "boolean", "default": False},
                                    "target": {"enum": ["comfyui", "ollama"], "default": "comfyui"},
                                    "model": {"type": "string", "description": "With target ollama: what to unload"},
                                },
                            }
                        }
                    }
                },
                "responses": {
                    "202": _json(
                        "Asked; the proof follows as an event",
                        {
                            "type": "object",
                            "required": ["accepted", "event_id"],
                            "properties": {"accepted": {"const": True}, "event_id": {"type": "string"}},
                        },
                    ),
                    "400": _json("Not JSON", _ERROR),
                    "401": _json("TCP: wrong or no token", _ERROR),
                    "403": _json("TCP: read-only", _ERROR),
                    "409": _json("Not now, and why", _ERROR),
                    "413": _json("Body too large", _ERROR),
                    "422": _json("A field is wrong, and which", _ERROR),
                },
            }
        },
        "/v1/admissions": _post(
            "May I? The connection stays open while the request waits in line; hang up to leave it",
            _ADMISSION,
            {
                "200": _json("Admitted or refused, and why", _VERDICT),
                "404": _json("No such GPU", _ERROR),
                "409": _json("The request_id is that of another request", _ERROR),
                "503": _json("The line is full, or the daemon stops", _ERROR),
            },
        ),
        "/v1/leases": _get(
            "Who was promised how much, and who waits",
            {
                "200": _json(
                    "Leases, oldest first; the line in its order",
                    {
                        "type": "object",
                        "required": ["leases", "line"],
                        "properties": {
                            "leases": {"type": "array", "items": _LEASE},
                            "line": {"type": "array", "items": _WAITING},
                        },
                    },
                )
            },
        ),
        "/v1/leases/{id}": {
            "delete": {
                "summary": "Give a lease back",
                "responses": {"204": {"description": "Given back"}, "404": _json("No live lease", _ERROR)},
            }
        },
        "/v1/leases/{id}/renew": _post(
            "Its time to live starts anew",
            {
                "type": "object",
                "additionalProperties": False,
                "properties": {
                    "ttl_seconds": {"type": "number"},
                    "pid": {"type": "integer", "description": "The process that holds the memory from now on"},
                    "claimed_bytes": {"type": "integer"},
                },
            },
            {"200": _json("Renewed", _ONE_LEASE), "404": _json("No live lease", _ERROR)},
        ),
        "/v1/leases/{id}/claimed": _post(
            "So much of it has been taken, in all",
            {
                "type": "object",
                "additionalProperties": False,
                "properties": {"bytes": {"type": "integer", "description": "Absent: all of it"}},
            },
            {"200": _json("Noted", _ONE_LEASE), "404": _json("No live lease", _ERROR)},
        ),
        "/v1/leases/{id}/hold": _get(
            "The lease lives as long as this connection; it ends when the lease does",
            {
                "200": {"description": "Lines of JSON, then empty ones", "content": {"application/x-ndjson": {}}},
                "404": _json("No live lease", _ERROR),
            },
        ),
        **_WORKER_PATHS,
        "/metrics": {
            "get": {
                "summary": "Prometheus",
                "responses": {"200": {"description": "Text exposition format", "content": {"text/plain": {}}}},
            }
        },
        "/openapi.json": _get("This document", {"200": _json("OpenAPI 3.1")}),
    },
}
