"""Readers of single fields: what they take, what they refuse, and in which words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from starlette.requests import Request

from vram_manager.api import fields
from vram_manager.api.fields import BadRequest
from vram_manager.domain.size import GIB, MAX_BYTES, Size

Reader = Callable[[dict[str, Any], str], Any]
READERS: dict[str, Reader] = {
    "text": fields.text,
    "number": fields.number,
    "whole": fields.whole,
    "flag": fields.flag,
    "one_of": lambda body, name: fields.one_of(body, name, ("a", "b", "c")),
    "size": fields.size,
    "gpu_name": fields.gpu_name,
    "mapping": fields.mapping,
    "sizes": fields.sizes,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("body", [{}, {"x": None}], ids=["absent", "null"])
def test_a_field_that_is_absent_or_null_was_not_given(reader: str, body: dict[str, Any]):
    assert not READERS[reader](body, "x")
    assert fields.flag(body, "x", default=True)


@pytest.mark.parametrize(
    ("reader", "given", "value"),
    [
        ("text", "Grüße", "Grüße"),
        ("text", "x" * 200, "x" * 200),
        ("number", 0, 0.0),
        ("number", 1.5, 1.5),
        ("number", 10**9, 1e9),
        ("whole", 0, 0),
        ("whole", MAX_BYTES, MAX_BYTES),
        ("flag", True, True),
        ("flag", False, False),
        ("one_of", "b", "b"),
        ("size", "24GiB", Size(bytes=24 * GIB)),
        ("size", "90%", Size(percent=90)),
        ("gpu_name", 0, "0"),
        ("gpu_name", "GPU-a", "GPU-a"),
        ("mapping", {"1": {}}, {"1": {}}),
        ("sizes", {"flux": 0}, {"flux": 0}),
    ],
)
def test_a_value_that_can_be_used_is_read(reader: str, given: Any, value: Any):
    assert READERS[reader]({"x": given}, "x") == value


@pytest.mark.parametrize(
    ("reader", "given", "words"),
    [
        ("text", 5, "x is 5: must be 1 to 200 printable characters"),
        ("number", True, "x is true: must be a number from 0 to 1e+09"),
        ("number", float("nan"), "x is NaN: must be a number from 0 to 1e+09"),
        ("number", float("inf"), "x is Infinity: must be a number from 0 to 1e+09"),
        ("number", 10**400, f"x is 1{'0' * 79}...: must be a number from 0 to 1e+09"),
        ("number", "5", 'x is "5": must be a number from 0 to 1e+09'),
        ("number", -0.1, "x is -0.1: must be a number from 0 to 1e+09"),
        ("whole", 1.0, f"x is 1.0: must be a whole number from 0 to {MAX_BYTES}"),
        ("whole", False, f"x is false: must be a whole number from 0 to {MAX_BYTES}"),
        ("flag", 1, "x is 1: must be true or false"),
        ("flag", "yes", 'x is "yes": must be true or false'),
        ("one_of", "d", 'x is "d": must be a, b or c'),
        ("one_of", ["a"], 'x is ["a"]: must be a, b or c'),
        ("size", 24, "x is 24: must be a size with a unit, such as 24GiB, 11.5GB, 512MiB or 90% of the GPU"),
        ("size", "24", 'x is "24": must be a size with a unit, such as 24GiB, 11.5GB, 512MiB or 90% of the GPU'),
        ("size", "0GiB", 'x is "0GiB": must be more than 0 and at most 1024 TiB'),
        ("gpu_name", -1, "x is -1: must be a whole number from 0 to 10000"),
        ("gpu_name", True, "x is true: must be 1 to 200 printable characters"),
        ("mapping", [], "x is []: must be a JSON object"),
        ("sizes", {"a\n": 1}, 'x is "a\\n": must have names of 1 to 256 printable characters'),
        ("sizes", dict.fromkeys(map(str, range(257)), 1), "x has 257 entries: must have at most 256"),
    ],
)
def test_a_value_that_cannot_be_used_is_told_in_words(reader: str, given: Any, words: str):
    with pytest.raises(BadRequest) as problem:
        READERS[reader]({"x": given}, "x")
    assert (problem.value.status, problem.value.kind, problem.value.field) == (422, "invalid", "x")
    assert problem.value.message == words


def test_the_bounds_of_a_number_are_the_callers():
    assert fields.number({"ttl": 86400}, "ttl", least=1, most=86400) == 86400.0
    assert fields.whole({"pid": 1}, "pid", least=1) == 1
    for read in (
        lambda: fields.number({"ttl": 0.9}, "ttl", least=1),
        lambda: fields.number({"ttl": 86401}, "ttl", most=86400),
        lambda: fields.whole({"pid": 0}, "pid", least=1),
    ):
        with pytest.raises(BadRequest):
            read()


def test_a_needed_field_is_told_when_it_is_missing():
    assert fields.needed(0, "x") == 0
    with pytest.raises(BadRequest, match="x is missing: must be given"):
        fields.needed(None, "x")


def test_a_misspelt_field_is_told_the_first_by_name():
    fields.no_others({"a": 1}, ("a", "b"))
    with pytest.raises(BadRequest) as problem:
        fields.no_others({"zz": 1, "a": 1, "aa": 1}, ("a", "b"))
    assert (problem.value.field, problem.value.message) == ("aa", "aa is not a field of this request")


def asked(*messages: dict[str, Any]) -> Request:
    """A request whose body comes in these pieces."""
    left = list(messages)

    async def receive() -> dict[str, Any]:
        return left.pop(0)

    return Request({"type": "http", "method": "POST", "headers": []}, receive)


def piece(body: bytes, more: bool = False) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


@pytest.mark.asyncio
async def test_no_body_is_an_empty_one():
    assert await fields.json_body(asked(piece(b""))) == {}


@pytest.mark.asyncio
async def test_a_body_may_come_in_pieces_up_to_its_limit():
    assert await fields.json_body(asked(piece(b'{"a"', True), piece(b": 1}")), 8) == {"a": 1}
    with pytest.raises(BadRequest, match="the body is larger than 7 bytes") as problem:
        await fields.json_body(asked(piece(b'{"a"', True), piece(b": 1}", True)), 7)
    assert (problem.value.status, problem.value.kind) == (413, "too_large")


@pytest.mark.asyncio
async def test_a_client_that_goes_away_is_no_failure_of_ours():
    with pytest.raises(BadRequest) as problem:
        await fields.json_body(asked(piece(b"{", True), {"type": "http.disconnect"}))
    assert (problem.value.status, problem.value.kind) == (400, "disconnected")


def test_an_error_has_one_shape():
    assert fields.error(409, "not_now", "later").body == b'{"error":{"type":"not_now","message":"later"}}'
    with_field = fields.error(422, "invalid", "no", "x")
    assert with_field.body == b'{"error":{"type":"invalid","message":"no","field":"x"}}'
