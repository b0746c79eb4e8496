"""Values are found in a body however it is cut, and nothing of the body stays."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vram_manager.gateway.peek import MAX_DEPTH, MAX_VALUE_BYTES, FormField, JsonFields, Reader, Unzstd, parameters

WANTED = (("model",), ("keep_alive",), ("prompt",), ("messages",), ("options", "num_ctx"), ("options", "num_gpu"))
TOP = ("model", "keep_alive", "prompt", "messages")


def pieces(body: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(body), *(cut % (len(body) + 1) for cut in cuts)})
    return [body[begin:end] for begin, end in pairwise(places)]


def read(body: bytes, cuts: list[int] | None = None) -> JsonFields:
    fields = JsonFields(WANTED)
    for piece in pieces(body, cuts or []):
        fields.feed(piece)
    return fields


class Obj(list[tuple[str, Any]]):
    """A JSON object with all its keys, also those that come twice."""


def text_of(value: object, ascii_only: bool, spaces: str) -> str:
    match value:
        case Obj():
            inner = ",".join(
                f"{spaces}{json.dumps(key, ensure_ascii=ascii_only)}{spaces}:{text_of(item, ascii_only, spaces)}"
                for key, item in value
            )
            return f"{spaces}{{{inner}{spaces}}}{spaces}"
        case list():
            return f"{spaces}[{','.join(text_of(item, ascii_only, spaces) for item in value)}{spaces}]{spaces}"
        case _:
            return f"{spaces}{json.dumps(value, ensure_ascii=ascii_only)}{spaces}"


def expected(pairs: Obj) -> tuple[dict[tuple[str, ...], object], dict[str, bool]]:
    """What Go finds: the last of equal keys, whatever their case; two objects for a map become one."""
    values: dict[tuple[str, ...], object] = {}
    empty: dict[str, bool] = {}

    def put(path: tuple[str, ...], value: object) -> None:
        is_long = isinstance(value, str) and len(value) > MAX_VALUE_BYTES
        if isinstance(value, list) or is_long:
            values.pop(path, None)
        else:
            values[path] = value

    for raw, value in pairs:
        key = raw.replace("ſ", "s").lower()
        if key in TOP:
            put((key,), value)
            empty[key] = value is None or value in ("", [])
        elif key == "options" and isinstance(value, Obj):
            for name, inner in value:
                if name in ("num_ctx", "num_gpu"):
                    put((key, name), inner)
        elif key == "options":
            values = {path: found for path, found in values.items() if path[0] != "options"}
    return values, empty


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
    | st.sampled_from(["", '\\"', "\\", '"}],', "\\u0022", "x" * 300, "y" * (MAX_VALUE_BYTES + 1), '{"model":"no"}'])
)
names = st.sampled_from(
    ["model", "Model", "KEEP_ALIVE", "\u212aeep_alive", "prompt", "messages", "meſſages", "meßages", "options"]
)
inner_names = st.sampled_from(["num_ctx", "NUM_CTX", "num_gpu", "model", "stop"])
nested = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.lists(st.tuples(st.text(max_size=4) | inner_names, inner), max_size=4).map(Obj)
    ),
    max_leaves=12,
)
objects = st.lists(st.tuples(names | st.text(max_size=4), nested), max_size=8).map(Obj)


@given(objects, st.booleans(), st.sampled_from(["", " ", "\r\n\t"]), st.lists(st.integers(0), max_size=30))
def test_what_is_found_in_pieces_is_what_a_whole_parser_finds(
    pairs: Obj, ascii_only: bool, spaces: str, cuts: list[int]
) -> None:
    body = text_of(pairs, ascii_only, spaces).encode()

    fields = read(body, cuts)

    values, empty = expected(pairs)
    assert fields.complete
    assert fields.values == values
    assert {key: fields.empty(key) for key in TOP} == {key: empty.get(key) for key in TOP}


def test_each_byte_may_come_alone() -> None:
    body = '{"a":[{"\\"":"}\\\\"}],"\\u006dodel":"f\\u00fcr\\ud83d\\ude00é","options":{"num_ctx":-4.5e3}}'.encode()

    fields = read(body, list(range(len(body))))

    assert fields.values == {("model",): "für😀é", ("options", "num_ctx"): -4500.0}


@pytest.mark.parametrize("content", ["x" * MAX_VALUE_BYTES, '\\"' * (MAX_VALUE_BYTES // 2)])
@pytest.mark.parametrize("cuts", [[], [20], list(range(2000))])
def test_a_string_is_kept_up_to_the_limit_and_no_further(content: str, cuts: list[int]) -> None:
    kept = read(f'{{"model":"{content}"}}'.encode(), cuts)
    passed_over = read(f'{{"model":"x{content}"}}'.encode(), cuts)

    assert kept.values == {("model",): json.loads(f'"{content}"')}
    assert passed_over.values == {}
    assert passed_over.complete
    assert passed_over.empty("model") is False


@pytest.mark.parametrize("later", [[], {}, [1], "x" * 2000])
def test_a_later_value_that_is_not_kept_takes_the_earlier_one_away(later: object) -> None:
    fields = read(b'{"model":"a","Model":%b}' % json.dumps(later).encode())

    assert fields.complete
    assert fields.values == {}


@pytest.mark.parametrize("later", ["null", "[]", "5", '"x"'])
def test_a_later_value_that_is_no_object_takes_what_was_in_the_object_away(later: str) -> None:
    assert read(f'{{"options":{{"num_ctx":1}},"options":{later}}}'.encode()).values == {}


@pytest.mark.parametrize("long", [b'"' + b"x" * 70_000, b'"' + b'\\"' * 35_000, b'["' + b"x" * 70_000, b"1" * 70_000])
def test_of_a_long_value_nothing_stays(long: bytes) -> None:
    fields = read(b'{"messages":' + long, list(range(0, 70_000, 999)))

    assert len(fields._rest) <= MAX_VALUE_BYTES + 1


def test_spaces_are_not_kept() -> None:
    fields = read(b'{"messages":[' + b" " * 5000, [3000])

    assert len(fields._rest) <= 1
    fields.feed(b" ]}")
    assert fields.empty("messages") is True


def test_a_lone_half_of_a_pair_becomes_a_replacement_character() -> None:
    assert read(b'{"model":"a\\ud800"}').values == {("model",): "a\ufffd"}
    assert read(b'{"model":"a\xff"}').values == {("model",): "a\ufffd"}


def test_what_follows_the_object_is_not_looked_at() -> None:
    fields = read(b'{"model":"a"}{"model":"b"}')

    assert fields.complete
    assert fields.values == {("model",): "a"}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"null",
        b'\xef\xbb\xbf{"a":1}',
        b"{",
        b'{"model":"a"',
        b'{"model":"a',
        b'{"model":"a",}',
        b'{"model" "a"}',
        b'{"model":}',
        b'{"model":"a" "b":1}',
        b"{model:1}",
        b'{"model":01}',
        b'{"model":NaN}',
        b'{"model":"\\x"}',
        b'{"model":"a\nb"}',
        b'{"messages":[',
        b'{"options":{"num_ctx":1}',
        b'{"options":{,}}',
        b"\x1f\x8b\x08\x00\x00\x00\x00\x00",
    ],
)
def test_a_body_that_is_broken_or_breaks_off_is_not_complete(body: bytes) -> None:
    assert not read(body).complete
    assert not read(body, list(range(len(body)))).complete


@given(st.binary(max_size=60) | st.text('{}[]":,\\ moel1', max_size=60).map(str.encode), st.lists(st.integers(0)))
@example(b'{"a":' + b"1" * 5000 + b"}", [])
@example(b'{"a":1' + b"e" * 5000 + b"}", [])
def test_no_body_raises_and_no_cut_changes_what_is_found(body: bytes, cuts: list[int]) -> None:
    whole, cut = read(body), read(body, cuts)

    assert (whole.values, whole.complete) == (cut.values, cut.complete)


@pytest.mark.parametrize("opening", [b"[", b"[0,", b'{"":', b'["",'])
def test_nesting_ends_where_go_gives_up(opening: bytes) -> None:
    closing = b"]" if opening.startswith(b"[") else b"}"
    deep = opening * (MAX_DEPTH - 2) + b"[0]" + closing * (MAX_DEPTH - 2)

    assert read(b'{"a":' + deep + b"}").complete
    assert not read(b'{"a":' + opening * (2 * MAX_DEPTH) + closing * (2 * MAX_DEPTH) + b"}").complete


BOUNDARY = "cff66a701551926adc370d2ddb0d0c81"


def field_of(body: bytes, cuts: list[int] | None = None, boundary: str = BOUNDARY) -> str | None:
    field = FormField(boundary, "model")
    for piece in pieces(body, cuts or []):
        field.feed(piece)
    return field.value


def part(
    disposition: str, content: bytes, *, boundary: str = BOUNDARY, end: bytes = b"\r\n", more: bytes = b""
) -> bytes:
    head = f"Content-Disposition: form-data; {disposition}".encode()
    return b"--" + boundary.encode() + end + more + head + end + end + content + end


LAST = f"--{BOUNDARY}--\r\n".encode()
contents = st.sampled_from(
    [
        b"",
        b"m",
        b"\r\n",
        b"--",
        b"\r\n--",
        f"\r\n--{BOUNDARY}x".encode(),
        f"--{BOUNDARY}".encode() + b"-",
        b"\xff" * 300,
    ]
) | st.binary(max_size=40).filter(lambda content: BOUNDARY.encode() not in content)


@given(
    st.lists(st.tuples(st.sampled_from(["model", "file", "Model", "language"]), st.booleans(), contents), max_size=5),
    st.lists(st.integers(0), max_size=30),
    st.booleans(),
)
def test_the_first_field_with_the_name_is_found_before_and_after_files(
    parts: list[tuple[str, bool, bytes]], cuts: list[int], quoted: bool
) -> None:
    body = LAST
    for name, is_file, content in reversed(parts):
        named = f'name="{name}"' if quoted else f"name={name}"
        body = part(named + ('; filename="model"' if is_file else ""), content) + body

    found = [content for name, is_file, content in parts if name == "model" and not is_file]
    assert field_of(body, cuts) == (found[0].decode(errors="replace") if found else None)


@pytest.mark.parametrize(
    "disposition",
    [
        'name="model"',
        "name=model",
        'NAME="model"',
        'x="a; name=b"; name="model"',
        'x="\\"; name=b"; name="model"',
        'name="mo\\del"',
    ],
)
def test_a_name_is_read_however_it_is_written(disposition: str) -> None:
    assert field_of(part(disposition, b"m") + LAST) == "m"


@pytest.mark.parametrize("disposition", ['filename="model"', 'x="; name=model"', 'name="model"; filename=""', "x=1"])
def test_what_only_looks_like_the_name_is_none(disposition: str) -> None:
    assert field_of(part(disposition, b"m") + LAST) is None


def test_a_preamble_other_headers_and_bare_newlines_do_no_harm() -> None:
    other = b"X: content-disposition: form-data; name=no\r\n"

    assert field_of(b"hello\r\n" + part("name=model", b"m", more=other) + LAST) == "m"
    assert field_of(part("name=model", b"m", end=b"\n") + LAST) == "m"


def test_a_field_that_is_long_or_does_not_end_is_unknown_and_is_not_kept() -> None:
    assert field_of(part("name=model", b"x" * MAX_VALUE_BYTES) + LAST) == "x" * MAX_VALUE_BYTES
    assert field_of(part("name=model", b"x" * (MAX_VALUE_BYTES + 1)) + LAST) is None
    assert field_of(part("name=model", b"m")) is None
    endless = (
        part("name=model", b"x" * 90_000),
        part("name=file", b"x" * 90_000),
        part("name=model", b"m", more=b"X: " + b"x" * 90_000),
        f"--{BOUNDARY}".encode() + b" " * 90_000,
    )
    for body in endless:
        field = FormField(BOUNDARY, "model")
        for piece in pieces(body, list(range(0, 90_000, 777))):
            field.feed(piece)
            assert len(field._window) < 16 << 10


def test_parameters_of_a_header() -> None:
    assert parameters('multipart/form-data; Boundary="a b;c" ;x=1') == {"boundary": "a b;c", "x": "1"}
    assert parameters("text/plain") == {}


class Told:
    """A reader that counts."""

    def __init__(self) -> None:
        self.all_bytes = 0
        self.most_bytes = 0

    def feed(self, piece: bytes) -> None:
        self.all_bytes += len(piece)
        self.most_bytes = max(self.most_bytes, len(piece))


def unpack(reader: Reader, body: bytes, cuts: list[int] | None = None, limit_bytes: int = 1 << 20) -> Unzstd:
    unpacked = Unzstd(reader, limit_bytes=limit_bytes, window_bytes=8 << 20)
    for piece in pieces(body, cuts or []):
        unpacked.feed(piece)
    return unpacked


@given(st.lists(st.integers(0), max_size=20), st.booleans())
def test_a_zstd_body_is_read_in_pieces(cuts: list[int], two_frames: bool) -> None:
    zstandard = pytest.importorskip("zstandard")
    halves = [b'{"messages":[{}],', b'"model":"m"}']
    frames = halves if two_frames else [b"".join(halves)]
    fields = JsonFields(WANTED)

    unpacked = unpack(fields, b"".join(zstandard.compress(frame) for frame in frames), cuts)

    assert not unpacked.broken
    assert fields.complete
    assert fields.values == {("model",): "m"}


def test_more_than_the_limit_is_not_unpacked() -> None:
    zstandard = pytest.importorskip("zstandard")
    bomb = zstandard.compress(b"\0" * (64 << 20))
    told = Told()

    unpacked = unpack(told, bomb)

    assert len(bomb) < 8192
    assert unpacked.broken
    assert told.all_bytes <= 1 << 20
    assert told.most_bytes <= 256 << 10
    assert not unpack(Told(), zstandard.compress(b"\0" * (1 << 20))).broken


def test_what_is_no_zstd_is_broken() -> None:
    pytest.importorskip("zstandard")

    assert unpack(Told(), b'{"model":"m"}', [3]).broken


def test_without_the_package_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)

    assert unpack(Told(), b"\x28\xb5\x2f\xfd").broken
