"""The course of a recording as a picture. matplotlib is an extra, and only imported where a picture is wanted."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from vram_manager.domain.size import GIB, gib
from vram_manager.record.output import Recording, duration, shown
from vram_manager.record.timeline import Column, Series

SUFFIXES: Final = (".png", ".svg", ".pdf")
_TAKEN, _LINES, _TEXT = "#2f6fb0", "#c2452d", "#444444"


def problem(path: Path) -> str | None:
    """Why no picture can be drawn there, and what to do about it; None where one can."""
    if path.suffix.lower() not in SUFFIXES:
        return f"--plot {path}: must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
    try:
        import matplotlib.figure  # noqa: F401, PLC0415 - half a second, and the command should not wait for nothing
    except ImportError as error:
        return f"--plot needs matplotlib ({error}): pip install 'vram-manager[plot]', or record with --out only"
    return None


def draw(recording: Recording, path: Path) -> None:
    """One panel for each GPU. Raises OSError where the file cannot be written."""
    # A Figure of its own, not pyplot: no display is looked for, and no state is left behind.
    from matplotlib.figure import Figure  # noqa: PLC0415

    gpus = recording.gpus()
    figure = Figure(figsize=(11, 1.4 + 3.2 * len(gpus)), dpi=110, layout="constrained")
    panels = figure.subplots(len(gpus), 1, sharex=True, squeeze=False)[:, 0]
    unit, name = _unit(recording.took_seconds)
    for panel, series in zip(panels, gpus, strict=True):
        _panel(panel, series, unit)
    panels[-1].set_xlabel(f"{name} since the start ({recording.began.astimezone():%Y-%m-%d %H:%M:%S})", color=_TEXT)
    title = f"GPU memory while “{shown(recording.command, 80)}” ran"
    figure.suptitle(title.replace("$", r"\$"), fontsize=13)
    figure.savefig(path, format=path.suffix[1:].lower())


def _panel(panel: Any, series: Series, unit: float) -> None:
    seen, gpu = series.statistics(), series.newest
    for run in series.runs():
        at, low, high = _points(run, unit)
        panel.fill_between(at, 0, high, color=_TAKEN, alpha=0.15, linewidth=0)
        # Only where columns hold many samples is there anything between their lows and highs.
        panel.fill_between(at, low, high, color=_TAKEN, alpha=0.35, linewidth=0)
        panel.plot(at, high, color=_TAKEN, linewidth=1.6, marker="." if len(at) == 1 else None)
    for gap in series.gaps:
        panel.axvspan(gap.start / unit, gap.end / unit, color="#999999", alpha=0.25, linewidth=0, hatch="//")
    top = max(seen.peak_bytes, series.total_bytes or 0) / GIB
    if series.total_bytes:
        panel.axhline(series.total_bytes / GIB, color=_TEXT, linewidth=1, label=f"total {gib(series.total_bytes)}")
    average = f"average {gib(seen.average_bytes)}"
    panel.axhline(seen.average_bytes / GIB, color=_LINES, linewidth=1, linestyle="--", label=average)
    peak_at, peak = seen.peak_seconds / unit, seen.peak_bytes / GIB
    said = f"peak {gib(seen.peak_bytes)} after {duration(seen.peak_seconds)}"
    panel.plot([peak_at], [peak], "o", color=_LINES, markersize=6, label=said)
    place = seen.peak_seconds / (series.runs()[-1][-1].end or 1.0)
    side = "left" if place < 0.05 else "right" if place > 0.95 else "center"
    words = panel.annotate(gib(seen.peak_bytes), (peak_at, peak), (0, 8), textcoords="offset points", ha=side)
    words.set(color=_LINES, bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1})
    panel.set_ylim(0, top * 1.12)
    panel.locator_params(axis="y", nbins=7, steps=[1, 2, 4, 8, 10])
    panel.margins(x=0.01)
    panel.set_title(f"GPU {gpu.index}: {gpu.name}", loc="left", fontsize=10, color=_TEXT)
    panel.set_ylabel("taken, GiB", color=_TEXT)
    panel.grid(axis="y", alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9)


def _points(run: tuple[Column, ...], unit: float) -> tuple[list[float], list[float], list[float]]:
    """Where each column begins and ends, and how low and high it is there."""
    at, low, high = [], [], []
    for column in run:
        for seconds in (column.start, column.end) if column.end > column.start else (column.start,):
            at.append(seconds / unit)
            low.append(column.low / GIB)
            high.append(column.high / GIB)
    return at, low, high


def _unit(seconds: float) -> tuple[float, str]:
    """In what a time of that length is shown best."""
    return (1.0, "seconds") if seconds < 300 else (60.0, "minutes") if seconds < 3 * 3600 else (3600.0, "hours")
