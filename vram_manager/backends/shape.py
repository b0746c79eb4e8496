"""What a reply must look like, and one short sentence about the first thing that does not."""

from __future__ import annotations

import json
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vram_manager.errors import Rejected

# 2**50 bytes are 1 PiB: no memory is that large, so a larger number is garbage and must not reach a sum.
Amount = Annotated[int, Field(ge=0, le=2**50)]

# 1024 characters: names are printed in logs and metrics; the longest real ones have about 100.
Name = Annotated[str, Field(min_length=1, max_length=1024)]


class Shape(BaseModel):
    """The fields we read of one JSON object: no coercion, and fields we do not know are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


_SHORTER = {
    "Input should be": "must be",
    "String should": "must",
    "greater than or equal to": ">=",
    "less than or equal to": "<=",
    "valid ": "",
}

ShapeT = TypeVar("ShapeT", bound=Shape)


def shaped(shape: type[ShapeT], document: object) -> ShapeT:
    """The document as `shape`, or Rejected with the place and the value that do not fit."""
    try:
        return shape.model_validate(document)
    except ValidationError as error:
        raise Rejected(_first_complaint(error)) from error


def _first_complaint(error: ValidationError) -> str:
    """For example `models[0].size_vram: must be >= 0, is -1`."""
    first = error.errors(include_url=False)[0]
    place = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in first["loc"])
    place = place.lstrip(".") or "the reply"
    if first["type"] == "missing":
        return f"{place}: is missing"
    if first["type"] == "model_type":
        return f"{place}: must be an object, is {_brief(first['input'])}"
    rule = first["msg"]
    for theirs, ours in _SHORTER.items():
        rule = rule.replace(theirs, ours)
    return f"{place}: {rule}, is {_brief(first['input'])}"


def _brief(value: object) -> str:
    """The value as JSON where that is short, in ASCII because it goes into a log line."""
    match value:
        case dict():
            return "an object"
        case list():
            return "a list"
        case _:
            text = json.dumps(value, default=repr)
            return text if len(text) <= 40 else f"{text[:37]}..."
