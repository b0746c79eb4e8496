"""Sizes, as people write them and as every line of this daemon says them."""

from __future__ import annotations

import re
from dataclasses import dataclass

MIB = 2**20
GIB = 2**30

# Larger than any memory: what is more than this is a slip of the pen, and must not reach a sum.
MAX_BYTES = 2**50

_UNITS = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_WRITTEN = re.compile(r"\s*([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*([A-Za-z]+|%)?\s*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Size:
    """A number of bytes, or a share of a GPU's usable memory (`percent`, 0..100): exactly one of them."""

    bytes: int | None = None
    percent: float | None = None

    def on(self, usable_bytes: int) -> int:
        """The bytes this is on a GPU with so much usable memory."""
        return round(usable_bytes * (self.percent or 0.0) / 100.0) if self.bytes is None else self.bytes

    def __str__(self) -> str:
        return f"{self.percent:g}%" if self.bytes is None else gib(self.bytes)


def parse_size(text: str) -> Size:
    """`24GiB`, `11.5GB`, `512 MiB` or `90%`. Raises ValueError with what is allowed."""
    found = _WRITTEN.fullmatch(text)
    number, unit = (found[1], found[2]) if found else ("", None)
    if unit == "%" and 0 < float(number) <= 100:
        return Size(percent=float(number))
    factor = _UNITS.get((unit or "").lower())
    if found is None or unit == "%" or factor is None:
        raise ValueError("must be a size with a unit, such as 24GiB, 11.5GB, 512MiB or 90% of the GPU")
    # Whole bytes in whole numbers: a float would lose some above 8 PiB, and round differently than people do.
    whole, _, rest = number.partition(".")
    size = (int(whole + rest) * factor) // 10 ** len(rest)
    if not 0 < size <= MAX_BYTES:
        raise ValueError(f"must be more than 0 and at most {MAX_BYTES // 2**40} TiB")
    return Size(bytes=size)


def gib(size_bytes: float | None) -> str:
    """5.8 GiB, the way every line says sizes; None is unknown."""
    return "unknown" if size_bytes is None else f"{size_bytes / GIB:.1f} GiB"
