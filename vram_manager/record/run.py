"""The command, its recording, and what is told at the end. stdout and stdin are the command's own."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from vram_manager import child
from vram_manager.record import plot
from vram_manager.record.output import Recording, Timeline, as_json, in_words
from vram_manager.record.recorder import Recorder
from vram_manager.record.sources import Source

USAGE = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What is recorded and where it goes. `gpu`: index or UUID, None for all. No file is written unless it is named."""

    interval_seconds: float = 0.05
    gpu: str | None = None
    timeline: Path | None = None
    picture: Path | None = None
    summary: Path | None = None
    as_json: bool = False


def record(command: Sequence[str], wish: Wish, sources: Sequence[Source]) -> int:
    """Runs the command and returns its exit status; 2 where a wish cannot be granted: then it was not run.

    126 and 127: it cannot be run, as a shell says it; 128 + N: signal N ended it. For the main thread.
    """
    wrong = _unwritable("--summary", wish.summary) or _unwritable("--plot", wish.picture)
    if wrong is None and wish.picture is not None:
        wrong = plot.problem(wish.picture)
    if wrong is not None:
        return _refuse(wrong)
    try:
        timeline = Timeline(wish.timeline, _say)
    except OSError as error:
        return _refuse(f"--out {wish.timeline}: cannot be written: {error.strerror}")
    recorder = Recorder(sources, interval_seconds=wish.interval_seconds, gpu=wish.gpu, write=timeline.write, say=_warn)
    try:
        recording = _recorded(command, wish, recorder)
    finally:
        timeline.close()
    if isinstance(recording, int):
        return recording
    _tell(recording, wish)
    return recording.status


def _recorded(command: Sequence[str], wish: Wish, recorder: Recorder) -> Recording | int:
    """The recording, or the exit status where the command did not run."""
    recorder.start()
    if recorder.not_there is not None:
        recorder.stop()
        return _refuse(recorder.not_there)
    if not recorder.series:
        why = "; ".join(recorder.not_read) or "no answer yet"
        _warn(f"GPU memory cannot be read, so there is nothing to record yet ({why}); vram-manager doctor says more")

    def started(pid: int) -> None:
        recorder.command_pid = pid

    began = time.monotonic()
    try:
        status = child.run(command, started=started)
    except child.CannotRun as error:
        recorder.stop()
        _say(str(error))
        return error.status
    took_seconds = time.monotonic() - began
    recorder.stop()
    if recorder.not_there is not None:  # the first look had taken too long to be waited for
        _warn(recorder.not_there)
    return Recording(
        command=tuple(command),
        status=status,
        began=recorder.began_at,
        took_seconds=took_seconds,
        interval_seconds=wish.interval_seconds,
        series=recorder.series,
        not_read=tuple(recorder.not_read),
    )


def _tell(recording: Recording, wish: Wish) -> None:
    """What goes wrong from here on is said, and the exit status stays the command's."""
    document = json.dumps(as_json(recording))
    if wish.as_json:
        _print(document)
    elif recording.series:
        _print(in_words(recording, sys.stderr.encoding if sys.stderr else None))
    try:
        if wish.summary is not None:
            wish.summary.write_text(document + "\n", encoding="utf-8")
        if wish.picture is not None and recording.series:
            plot.draw(recording, wish.picture)
    except OSError as error:
        _say(f"{error.filename}: cannot be written: {error.strerror}")


def _unwritable(option: str, path: Path | None) -> str | None:
    """Looked at before the command runs, and without making a file that it may never come to."""
    if path is None or (os.access(path if path.exists() else path.parent, os.W_OK) and not path.is_dir()):
        return None
    return f"{option} {path}: cannot be written: name a file in a directory that is there and may be written to"


def _refuse(why: str) -> int:
    _say(why)
    return USAGE


def _warn(words: str) -> None:
    _say(f"warning: {words}")


def _say(words: str) -> None:
    _print(f"vram-manager: {words}")


def _print(words: str) -> None:
    if sys.stderr is None:  # `2>&-`; print would take stdout, which is the command's
        return
    with suppress(OSError, ValueError):  # nobody reads it any more
        print(words, file=sys.stderr, flush=True)
