"""A recording as others read it: CSV line by line while it goes, sentences and JSON at its end."""

from __future__ import annotations

import csv
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final, TextIO

from vram_manager.domain.size import MIB, gib
from vram_manager.journal import rfc3339
from vram_manager.record.timeline import Sample, Series, heights

HEADER: Final = (
    "at",
    "seconds",
    "gpu",
    "taken_mib",
    "free_mib",
    "reserved_mib",
    "total_mib",
    "command_mib",
    "source",
)
_BLOCKS, _ASCII_BLOCKS = "▁▂▃▄▅▆▇█", "_.-=+*%#"
_SPARKLINE_WIDTH: Final = 60
_SHOWN_COMMAND: Final = 60


class Timeline:
    """The CSV file. Each sample is in it at once, so that it is complete however the recording ends."""

    def __init__(self, path: Path | None, say: Callable[[str], None]) -> None:
        """Raises OSError where it cannot be written."""
        self._say = say
        # Line by line: whoever kills us loses nothing.
        self._file: TextIO | None = None
        if path is not None:
            self._file = path.open("w", buffering=1, newline="", encoding="utf-8")
            self._rows = csv.writer(self._file, lineterminator="\n")
            self._rows.writerow(HEADER)

    def write(self, sample: Sample) -> None:
        """One row; a gap is a row without numbers. A full disk ends the file, not the recording."""
        if self._file is None:
            return
        look = sample.look
        numbers: list[object] = [""] * 6
        if look is not None:
            sizes = (look.taken_bytes, look.free_bytes, look.reserved_bytes, look.total_bytes, look.command_bytes)
            numbers = [*("" if size is None else round(size / MIB) for size in sizes), look.source]
        try:
            self._rows.writerow((rfc3339(sample.at), f"{sample.seconds:.3f}", sample.index, *numbers))
        except OSError as error:
            self._say(f"the timeline ends here, {self._file.name} cannot be written: {error.strerror}")
            self.close()

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):
                file.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """What was recorded of one command. `began` is when `seconds` are 0; `took_seconds` is how long the command ran."""

    command: tuple[str, ...]
    status: int
    began: datetime
    took_seconds: float
    interval_seconds: float
    series: Mapping[str, Series]
    not_read: tuple[str, ...] = ()

    def gpus(self) -> list[Series]:
        return sorted(self.series.values(), key=lambda series: series.newest.index)


def in_words(recording: Recording, encoding: str | None) -> str:
    """A paragraph for each GPU, in letters that `encoding` has."""
    return "\n".join(line for series in recording.gpus() for line in _paragraph(recording, series, encoding))


def shown(command: Sequence[str], width: int = _SHOWN_COMMAND) -> str:
    """The command as a person would write it, cut where it is long."""
    line = " ".join(shlex.join(command).split())
    return line if len(line) <= width else line[: width - 3] + "..."


def _paragraph(recording: Recording, series: Series, encoding: str | None) -> list[str]:
    seen, gpu = series.statistics(), series.newest
    peak_at = (recording.began + timedelta(seconds=seen.peak_seconds)).astimezone().strftime("%H:%M:%S")
    rise = seen.peak_bytes - seen.first_bytes
    took = duration(recording.took_seconds)
    looks = "1 sample" if seen.samples == 1 else f"{seen.samples} samples"
    of_total = f" of {gib(series.total_bytes)}" if series.total_bytes else ""
    peak = f"{gib(seen.peak_bytes):>10}{of_total}, +{gib(rise)} over the start"
    lines = [
        f'VRAM of GPU {gpu.index} ({gpu.name}) while "{shown(recording.command)}" ran, {looks} in {took}:',
        f"  peak    {peak}, after {duration(seen.peak_seconds)} (at {peak_at})",
        f"  average {gib(seen.average_bytes):>10} (by time)",
        f"  minimum {gib(seen.minimum_bytes):>10}",
    ]
    if seen.command_peak_bytes:
        lines.append(f"  command {gib(seen.command_peak_bytes):>10} at most (its own processes, once a second)")
    lines.append(f"  {_sparkline(series, encoding)}")
    # Rounded up, as it is a promise.
    digits = 100 if seen.longest_unseen_seconds < 1 else 10
    surely = duration(math.ceil(seen.longest_unseen_seconds * digits) / digits)
    unseen = f"  {', '.join(series.sources)}; a peak longer than {surely} was surely seen"
    if series.gaps:
        lost = duration(sum(gap.end - gap.start for gap in series.gaps))
        unseen += f"; {len(series.gaps)} gap(s), {lost} in all: {series.gaps[0].why}"
    return [*lines, unseen]


def duration(seconds: float) -> str:
    """0.06 s, 20.6 s, 1 h 02 min: as exact as it is worth."""
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 600:
        return f"{seconds:.1f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"


def _sparkline(series: Series, encoding: str | None) -> str:
    """The course of it between its lowest and its highest value; a space is a gap."""
    seen = series.statistics()
    blocks = _BLOCKS
    try:
        blocks.encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        blocks = _ASCII_BLOCKS
    low, span = seen.minimum_bytes, seen.peak_bytes - seen.minimum_bytes
    drawn = heights(series, min(_SPARKLINE_WIDTH, seen.samples))
    line = "".join(
        " " if high is None else blocks[(high - low) * (len(blocks) - 1) // span if span else 0] for high in drawn
    )
    return f"{gib(low)} {line} {gib(seen.peak_bytes)}"


def as_json(recording: Recording) -> dict[str, Any]:
    """The same for machines; without any sample, `gpus` is empty and `why` says why."""
    began, took = recording.began, recording.took_seconds
    return {
        "command": list(recording.command),
        "status": recording.status,
        "began_at": rfc3339(began),
        "took_seconds": round(took, 3),
        "interval_seconds": recording.interval_seconds,
        "gpus": [_gpu(series, began) for series in recording.gpus()],
        "why": None if recording.series else "; ".join(recording.not_read),
    }


def _gpu(series: Series, began: datetime) -> dict[str, Any]:
    seen, gpu = series.statistics(), series.newest
    return {
        "index": gpu.index,
        "uuid": gpu.uuid,
        "name": gpu.name,
        "sources": list(series.sources),
        "total_bytes": series.total_bytes,
        "reserved_bytes": gpu.reserved_bytes,
        "samples": seen.samples,
        "peak_bytes": seen.peak_bytes,
        "peak_at": rfc3339(began + timedelta(seconds=seen.peak_seconds)),
        "peak_seconds": round(seen.peak_seconds, 3),
        "peak_over_start_bytes": seen.peak_bytes - seen.first_bytes,
        "average_bytes": round(seen.average_bytes),
        "minimum_bytes": seen.minimum_bytes,
        "start_bytes": seen.first_bytes,
        "end_bytes": seen.last_bytes,
        "command_peak_bytes": seen.command_peak_bytes,
        "longest_unseen_seconds": round(seen.longest_unseen_seconds, 3),
        "gaps": [asdict(gap) for gap in series.gaps],
    }
