"""Reads a few values out of a body that flows past, in pieces of any size. Nothing of the body is kept.

No reader raises, whatever it is fed: a body that it cannot read is one without the values that were looked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any, Final, Protocol

Path = tuple[str, ...]
"""Where a value is: `("model",)` at the top of the object, `("options", "num_ctx")` one level down."""
Scalar = str | int | float | bool | None

MAX_VALUE_BYTES: Final = 1024
"""A string or a number longer than this as sent (with its escapes) is passed over."""
MAX_MEMBERS: Final = 4096
"""Of the object and of those looked into. No client has a tenth of that, and each costs some microseconds."""
MAX_DEPTH: Final = 10_000
"""encoding/json gives up where values are nested more deeply (scanner.go: maxNestingDepth)."""

_SPACE: Final = re.compile(rb"[ \t\n\r]*+")
# All loops are possessive: they run in C without remembering a way back, so in linear time and without memory.
_ESCAPES: Final = re.compile(rb'(?:\\.[^"\\]*+)*+', re.DOTALL)
_SCALAR: Final = re.compile(rb"[^ \t\n\r,\]}]*+")
_LITERAL: Final = re.compile(rb"true|false|null|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
# What changes no depth: short strings, whatever is between them, and a list or an object that holds only these.
_PLAIN: Final = rb'[^"\[\]{}]++|"[^"\\]{0,256}+"'
_FLAT: Final = re.compile(rb"(?:%b|\[(?:%b)*+\]|\{(?:%b)*+\})*+" % (_PLAIN, _PLAIN, _PLAIN))
_OPENING: Final = re.compile(rb"[\[{]++")
_CLOSING: Final = re.compile(rb"[\]}]++")
_SURROGATES: Final = re.compile("[\ud800-\udfff]")

_QUOTE, _COMMA, _COLON = b'",:'
_OPEN_OBJECT, _CLOSE_OBJECT, _OPEN_LIST, _CLOSE_LIST = b"{}[]"


class Reader(Protocol):
    """Is fed with a body."""

    def feed(self, piece: bytes) -> None: ...


class JsonFields:
    """The values of a JSON object at the wanted paths, as Go's encoding/json would find them.

    Of a key that comes twice the last value counts, whatever its case: keys of the object itself are compared
    without case, those one level down exactly (in Ollama they are keys of a map, and two such objects are merged).
    """

    def __init__(self, wanted: Iterable[Path]) -> None:
        """`wanted` are paths of one or two keys, the first one in lower case."""
        self.values: dict[Path, Scalar] = {}
        """What was found. Lists, objects and longer strings are not here."""
        self.complete: bool = False
        """The whole object was seen. What follows it is not looked at, as json.Decoder does not either."""
        self._wanted = frozenset(wanted)
        self._parents = frozenset(path[:1] for path in self._wanted if len(path) > 1)
        self._empty: dict[str, bool] = {}
        self._step: Callable[[bytes, int], int] | None = self._begin
        self._rest = b""  # the beginning of a token whose end has not come
        self._parent: Path = ()  # the wanted object whose keys are read; (): the top
        self._path: Path | None = None  # of the value that is read; None: not wanted
        self._first = True  # the object may end here: it has just begun
        self._members = 0  # read by name so far
        self._depth = 0  # of a value that is passed over
        self._after: Callable[[bytes, int], int] = self._colon  # comes when a long string is over

    def empty(self, key: str) -> bool | None:
        """Whether the wanted value is null, "", [] or {}; None where there is none."""
        return self._empty.get(key)

    def feed(self, piece: bytes) -> None:
        """Take the next piece of the body."""
        if self._step is None:
            return
        data = self._rest + piece if self._rest else piece
        self._rest = b""
        position = 0
        while self._step is not None:
            position = _end(_SPACE, data, position)
            if position == len(data):
                return
            position = self._step(data, position)

    def _begin(self, data: bytes, position: int) -> int:
        if data[position] != _OPEN_OBJECT:
            return self._stop(data)
        self._step = self._key
        return position + 1

    def _key(self, data: bytes, position: int) -> int:
        if data[position] == _CLOSE_OBJECT and self._first:
            return self._leave(position)
        self._members += 1
        if data[position] != _QUOTE or self._members > MAX_MEMBERS:
            return self._stop(data)
        end, raw = self._string(data, position, self._colon)
        if raw is None:
            self._path = None
            return end
        key = _text(raw)
        if key is None:
            return self._stop(data)
        # The long s and the Kelvin sign are the two letters that encoding/json takes for ASCII ones.
        path = (*self._parent, key) if self._parent else (key.replace("ſ", "s").lower(),)
        self._path = path if path in self._wanted or path in self._parents else None
        self._step = self._colon
        return end

    def _colon(self, data: bytes, position: int) -> int:
        if data[position] != _COLON:
            return self._stop(data)
        self._step = self._value
        return position + 1

    def _value(self, data: bytes, position: int) -> int:
        first = data[position]
        if first == _QUOTE:
            return self._text_value(data, position)
        if first in (_OPEN_OBJECT, _OPEN_LIST):
            return self._container(data, position)
        return self._scalar(data, position)

    def _text_value(self, data: bytes, position: int) -> int:
        end, raw = self._string(data, position, self._comma)
        if raw is None:
            if self._step != self._value:
                self._note(empty=False)
            return end
        value = _text(raw)
        if value is None:
            return self._stop(data)
        self._note(value, known=True, empty=not value)
        self._step = self._comma
        return end

    def _scalar(self, data: bytes, position: int) -> int:
        end = _end(_SCALAR, data, position)
        token = data[position : min(end, position + MAX_VALUE_BYTES + 1)]
        if end == len(data):
            return self._wait(token, data)
        if len(token) > MAX_VALUE_BYTES:
            self._note(empty=False)
        elif _LITERAL.fullmatch(token):
            value: Scalar = json.loads(token)
            self._note(value, known=True, empty=value is None)
        else:
            return self._stop(data)
        self._step = self._comma
        return end

    def _container(self, data: bytes, position: int) -> int:
        following = _end(_SPACE, data, position + 1)
        if following == len(data):
            return self._wait(data[position : position + 1], data)
        if self._path in self._parents and data[position] == _OPEN_OBJECT:
            self._parent, self._first, self._step = self._path or (), True, self._key
            return position + 1
        self._note(empty=data[following] in (_CLOSE_OBJECT, _CLOSE_LIST))
        self._depth, self._step = 1, self._pass_over
        return position + 1

    def _comma(self, data: bytes, position: int) -> int:
        if data[position] == _CLOSE_OBJECT:
            return self._leave(position)
        if data[position] != _COMMA:
            return self._stop(data)
        self._first = False
        self._step = self._key
        return position + 1

    def _leave(self, position: int) -> int:
        """Here an object ends: the one that was looked into, or all."""
        self.complete = not self._parent
        self._step = None if self.complete else self._comma
        self._parent = ()
        return position + 1

    def _pass_over(self, data: bytes, position: int) -> int:
        """On through a list or an object that holds nothing wanted."""
        while (position := _end(_FLAT, data, position)) < len(data):
            begin = position
            if data[begin] == _QUOTE:
                end = _string_end(data, begin + 1)
                if end == len(data) or data[end] != _QUOTE:
                    return self._wait_for_quote(data, end, self._pass_over)
                position = end + 1
            elif data[begin] in (_OPEN_OBJECT, _OPEN_LIST):
                position = _end(_OPENING, data, begin)
                self._depth += position - begin
                if self._depth + 1 + len(self._parent) > MAX_DEPTH:
                    return self._stop(data)
            else:
                position = min(_end(_CLOSING, data, begin), begin + self._depth)
                self._depth -= position - begin
                if not self._depth:
                    self._step = self._comma
                    return position
        return position

    def _pass_over_string(self, data: bytes, position: int) -> int:
        end = _string_end(data, position)
        if end == len(data) or data[end] != _QUOTE:
            return self._wait_for_quote(data, end, self._after)
        self._step = self._after
        return end + 1

    def _string(self, data: bytes, position: int, after: Callable[[bytes, int], int]) -> tuple[int, bytes | None]:
        """Where the string that begins here ends, and the string with its quotes.

        None: its end has not come. It waits in the same step for it, or it is too long and is being passed over.
        """
        end = _string_end(data, position + 1)
        if end < len(data) and data[end] == _QUOTE:
            if end - position - 1 <= MAX_VALUE_BYTES:
                return end + 1, data[position : end + 1]
            self._step = after
            return end + 1, None
        if len(data) - position - 1 <= MAX_VALUE_BYTES:
            return self._wait(data[position:], data), None
        return self._wait_for_quote(data, end, after), None

    def _wait_for_quote(self, data: bytes, end: int, after: Callable[[bytes, int], int]) -> int:
        self._step, self._after = self._pass_over_string, after
        return self._wait(data[end:], data)  # nothing, or a backslash whose second half has not come

    def _wait(self, rest: bytes, data: bytes) -> int:
        self._rest = rest
        return len(data)

    def _stop(self, data: bytes) -> int:
        self._step = None
        return len(data)

    def _note(self, value: Scalar = None, *, known: bool = False, empty: bool) -> None:
        path = self._path
        if path is None:
            return
        if path in self._parents:
            for lost in [inner for inner in self.values if inner[:1] == path]:
                del self.values[lost]
        if path not in self._wanted:
            return
        if known:
            self.values[path] = value
        else:
            self.values.pop(path, None)
        if len(path) == 1:
            self._empty[path[0]] = empty


def _end(pattern: re.Pattern[bytes], data: bytes, position: int) -> int:
    """Where a pattern that fits everywhere ends."""
    found = pattern.match(data, position)
    return found.end() if found else position


def _string_end(data: bytes, position: int) -> int:
    """The place of the quote that ends the string; if it has not come, that of a last half escape, or the end."""
    quote = data.find(b'"', position)
    end = len(data) if quote < 0 else quote
    escape = data.find(b"\\", position, end)
    return end if escape < 0 else _end(_ESCAPES, data, escape)


def _text(raw: bytes) -> str | None:
    """A JSON string, its broken characters replaced as encoding/json does; None where it is none."""
    try:
        return _SURROGATES.sub("\ufffd", json.loads(raw.decode(errors="replace")))
    except ValueError:
        return None


_HEADER: Final = re.compile(rb"\ncontent-disposition[ \t]*:[ \t]*form-data[ \t]*(;[^\r\n]*)", re.IGNORECASE)
_PARAMETER: Final = re.compile(r';\s*([^\s;="]+)\s*=\s*(?:"((?:[^"\\]|\\.)*+)"|([^\s;"]*))')
_HEADERS_END: Final = re.compile(rb"\n\r?\n")
_AFTER_BOUNDARY: Final = re.compile(rb"--|[ \t]{0,80}\r?\n")
_HALF_OF_IT: Final = re.compile(rb"-?|[ \t]{0,80}\r?")
_MAX_HEADERS_BYTES: Final = 8 * 1024


def parameters(value: str) -> dict[str, str]:
    """The parameters of a header's value, `; name="value"` or `; name=value`; names in lower case."""
    return {
        name.lower(): re.sub(r"\\(.)", r"\1", quoted) if quoted else bare
        for name, quoted, bare in _PARAMETER.findall(value[value.find(";") :] if ";" in value else "")
    }


class FormField:
    """The value of the first field with that name in a multipart/form-data body; files do not count."""

    def __init__(self, boundary: str, name: str) -> None:
        self.value: str | None = None
        """None while it has not come, and where it is longer than MAX_VALUE_BYTES."""
        self._name = name
        self._boundary = b"\n--" + boundary.encode()
        self._window = b"\n"  # the first boundary stands at the beginning of a line too
        self._step: Callable[[bytes], bytes | None] | None = self._boundary_line

    def feed(self, piece: bytes) -> None:
        """Take the next piece of the body."""
        if self._step is None:
            return
        self._window += piece
        while self._step is not None and (rest := self._step(self._window)) is not None:
            self._window = rest

    def _boundary_line(self, data: bytes) -> bytes | None:
        """What follows the next boundary; None: it has not come."""
        place, after = self._next_boundary(data)
        if not after:
            self._window = data[place:]
            return None
        self._step = None if after[0] == b"--" else self._headers
        return b"\n" + data[after.end() :] if self._step else b""

    def _headers(self, data: bytes) -> bytes | None:
        """What follows the headers of a part; None: they have not come."""
        end = _HEADERS_END.search(data)
        if not end:
            self._give_up_over(_MAX_HEADERS_BYTES)
            return None
        header = _HEADER.search(data, 0, end.end())
        found = parameters(header[1].decode(errors="replace")) if header else {}
        wanted = found.get("name") == self._name and "filename" not in found
        self._step = self._content if wanted else self._boundary_line
        return b"\n" + data[end.end() :]

    def _content(self, data: bytes) -> bytes | None:
        """Nothing more: here is the value. None: its end has not come."""
        end, after = self._next_boundary(data)
        if not after:
            self._give_up_over(2 * MAX_VALUE_BYTES + len(self._boundary))
            return None
        raw = data[1:end].removesuffix(b"\r")
        if len(raw) <= MAX_VALUE_BYTES:
            self.value = raw.decode(errors="replace")
        self._step = None
        return b""

    def _next_boundary(self, data: bytes) -> tuple[int, re.Match[bytes] | None]:
        """Where it is, and what ends it. None: it has not come, at least before that place."""
        end = 0
        while (place := data.find(self._boundary, end)) >= 0:
            end = place + len(self._boundary)
            after = _AFTER_BOUNDARY.match(data, end)
            if after or _HALF_OF_IT.fullmatch(data, end):
                return place, after
        return max(0, len(data) - len(self._boundary)), None

    def _give_up_over(self, limit_bytes: int) -> None:
        if len(self._window) > limit_bytes:
            self._step, self._window = None, b""


class _Enough(Exception):
    """More came out than is looked at."""


class Unzstd:
    """Feeds a reader with what a zstd body holds, up to a limit; `broken` tells that it could not."""

    def __init__(self, reader: Reader, *, limit_bytes: int, window_bytes: int) -> None:
        self.broken: bool = False
        """zstandard is not installed, the body is no zstd, or more came out of it than the limit."""
        self._reader = reader
        self._left_bytes = limit_bytes
        try:
            zstandard: Any = import_module("zstandard")
        except ImportError:
            self._writer: Any = None
            self.broken = True
            return
        self._error: type[Exception] = zstandard.ZstdError
        # A writer hands on what it has in blocks, so a small piece that unpacks to gigabytes fills no memory.
        self._writer = zstandard.ZstdDecompressor(max_window_size=window_bytes).stream_writer(self, closefd=False)

    def feed(self, piece: bytes) -> None:
        """Take the next piece of the body as sent."""
        if self.broken:
            return
        try:
            self._writer.write(piece)
        except (self._error, _Enough):
            self.broken, self._writer = True, None

    def write(self, block: bytes) -> int:
        """What came out; called by zstandard."""
        self._left_bytes -= len(block)
        if self._left_bytes < 0:
            raise _Enough
        self._reader.feed(bytes(block))
        return len(block)
