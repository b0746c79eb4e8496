"""Just enough of JSON Schema to hold answers against /openapi.json."""

from __future__ import annotations

from datetime import datetime
from typing import Any

_KINDS: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}
_KNOWN = {
    "type", "enum", "const", "required", "properties", "additionalProperties", "items", "format", "default",
    "description",
}  # fmt: skip


def complaints(value: Any, schema: dict[str, Any], place: str = "") -> list[str]:
    """Everything in `value` that `schema` does not allow."""
    assert schema.keys() <= _KNOWN, f"{place}: this checker does not know {sorted(schema.keys() - _KNOWN)}"
    found: list[str] = []
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(_is(value, kind) for kind in kinds):
        return [f"{place}: {value!r} is no {' or '.join(kinds)}"]
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{place}: {value!r} is none of {schema['enum']}")
    if "const" in schema and value != schema["const"]:
        found.append(f"{place}: {value!r} is not {schema['const']!r}")
    if schema.get("format") == "date-time" and value is not None and datetime.fromisoformat(value).tzinfo is None:
        found.append(f"{place}: {value!r} has no time zone")
    if isinstance(value, list):
        for index, item in enumerate(value):
            found += complaints(item, schema.get("items", {}), f"{place}[{index}]")
    if isinstance(value, dict):
        named = schema.get("properties", {})
        others = schema.get("additionalProperties", {})
        found += [f"{place}: has no {name}" for name in schema.get("required", ()) if name not in value]
        for name, item in value.items():
            rule = named.get(name, others)
            if rule is False:
                found.append(f"{place}: {name} is not allowed")
            elif isinstance(rule, dict):
                found += complaints(item, rule, f"{place}.{name}")
    return found


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    return isinstance(value, _KINDS[kind])
