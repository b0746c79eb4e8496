"""The OpenAPI document of the socket. A test holds it against the routes and against real answers."""

from __future__ import annotations

from typing import Any

from vram_manager import __version__


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
        "type": {"type": "string"},
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


def _list(name: str, item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "required": [name], "properties": {name: {"type": "array", "items": item}}}


def _query(name: str, words: str) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "description": words, "schema": {"type": "string"}}


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
        "/v1/snapshot": _get("Everything that was seen at the last turn", {"200": _json("The snapshot")}),
        "/v1/events": _get(
            "What happened; with Accept: text/event-stream it goes on as it happens",
            {"200": _json("Events, oldest first", _list("events", _EVENT)), "422": _json("Bad query", _ERROR)},
            [_query("after", "Only events after this id"), _query("limit", "At most so many, 1-1000")],
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
        "/metrics": {
            "get": {
                "summary": "Prometheus",
                "responses": {"200": {"description": "Text exposition format", "content": {"text/plain": {}}}},
            }
        },
        "/openapi.json": _get("This document", {"200": _json("OpenAPI 3.1")}),
    },
}
