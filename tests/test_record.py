"""`vram-manager record`: every sample counts, the command notices nothing, and what is not known is not told."""

from __future__ import annotations

import asyncio
import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fake_nvml import build, compiler
from tests.fakes import InThread
from vram_manager import child
from vram_manager.cli import main
from vram_manager.errors import Rejected, SensorError
from vram_manager.record import plot, run, sources
from vram_manager.record.output import HEADER, Recording, Timeline, as_json, duration, in_words, shown
from vram_manager.record.recorder import Recorder
from vram_manager.record.timeline import Look, Sample, Series, Unread, heights
from vram_manager.simulator.nvml_state import NvmlState

ROOT = Path(__file__).parents[1]
MIB, GIB = 2**20, 2**30
TOTAL, RESERVED = 24576 * MIB, 450 * MIB
PATIENT = ("sh", "-c", "echo $$; read -r _")
"""A command that says its pid and ends when its stdin has a line."""


def eventually(true: Callable[[], Any], seconds: float = 30) -> Any:
    """What `true()` gives once it is something."""
    until = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < until, "it has not come true in time"
        time.sleep(0.002)
    return found


def look(taken_gib: float = 1, *, uuid: str = "GPU-a", index: int = 0, **other: Any) -> Look:
    taken = int(taken_gib * GIB)
    values = {"name": "Card", "source": "NVML", "total_bytes": 24 * GIB, "free_bytes": 24 * GIB - taken}
    return Look(uuid=uuid, index=index, taken_bytes=taken, **(values | other))


def series_of(*at_and_gib: tuple[float, float]) -> Series:
    found = Series(look(at_and_gib[0][1]))
    for seconds, taken in at_and_gib:
        found.add(look(taken), seconds, seconds)
    return found


# Statistics.


def test_peak_average_and_minimum_come_from_all_samples_and_their_number_is_told() -> None:
    seen = series_of((0, 4), (1, 18), (2, 6), (3, 2), (4, 4)).statistics()
    assert (seen.samples, seen.peak_bytes, seen.minimum_bytes) == (5, 18 * GIB, 2 * GIB)
    assert (seen.first_bytes, seen.last_bytes, seen.peak_seconds) == (4 * GIB, 4 * GIB, 1)
    assert seen.average_bytes == (11 + 12 + 4 + 3) / 4 * GIB


def test_the_average_weighs_a_value_by_the_time_it_lasted_not_by_its_samples() -> None:
    often, rare = [(second / 10, 10.0) for second in range(11)], [(11.0, 0.0), (21.0, 0.0)]
    assert series_of(*often, *rare).statistics().average_bytes == (10 * 1 + 5 * 10 + 0 * 10) / 21 * GIB


def test_of_a_peak_that_comes_again_the_first_time_is_told() -> None:
    assert series_of((0, 1), (1, 3), (2, 1), (3, 3)).statistics().peak_seconds == 1


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(0, 80 * GIB)), min_size=1, max_size=60))
def test_the_average_lies_between_minimum_and_peak(steps: list[tuple[float, int]]) -> None:
    at, found = 0.0, Series(look(steps[0][1] / GIB))
    for pause, taken in steps:
        at += pause
        found.add(look(taken / GIB), at, at)
    seen = found.statistics()
    assert seen.minimum_bytes <= seen.average_bytes <= seen.peak_bytes
    assert seen.samples == len(steps)
    assert min(column.low for part in found.runs() for column in part) == seen.minimum_bytes
    assert max(column.high for part in found.runs() for column in part) == seen.peak_bytes


@given(
    steps=st.lists(st.tuples(st.floats(0, 3), st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=20),
    begins=st.floats(0, 1),
    longer=st.floats(1e-6, 5),
)
def test_a_peak_that_lasts_longer_than_is_told_falls_into_some_look(
    steps: list[tuple[float, float, float]], begins: float, longer: float
) -> None:
    at, found, moments = 0.0, Series(look()), []
    for pause, takes, within in steps:
        began, ended = at + pause, at + pause + takes
        found.add(look(), began, ended)
        moments.append(began + within * takes)
        at = ended
    found.end(at)
    # Any peak within the recorded time that lasts longer: whenever inside a look the card answers, it saw the peak.
    lasts = found.statistics().longest_unseen_seconds + longer
    start = begins * (at - lasts)
    if start >= 0:
        assert any(start <= moment <= start + lasts for moment in moments)


def test_a_gap_has_no_part_in_the_average_and_is_told() -> None:
    found = series_of((0, 2), (1, 2))
    assert found.lose("the driver hangs")
    assert not found.lose("it still hangs")
    found.add(look(8), 11, 11)
    found.add(look(8), 12, 12)
    seen = found.statistics()
    assert seen.average_bytes == 5 * GIB
    assert seen.longest_unseen_seconds == 10
    assert [(gap.start, gap.end, gap.why) for gap in found.gaps] == [(1, 11, "the driver hangs")]
    assert [len(part) for part in found.runs()] == [2, 2]
    found.end(12)
    assert len(found.gaps) == 1


def test_a_gap_at_the_end_lasts_until_the_end() -> None:
    found = series_of((0, 2), (1, 2))
    found.lose("gone")
    found.end(9)
    assert [(gap.start, gap.end) for gap in found.gaps] == [(1, 9)]
    assert found.statistics().longest_unseen_seconds == 8


def test_a_long_recording_is_drawn_coarser_and_loses_no_extreme() -> None:
    found = Series(look(4))
    for number in range(30_000):
        taken = 18 if number == 12_345 else 1 if number == 23_456 else 4
        found.add(look(taken), number / 20, number / 20)
    columns = [column for part in found.runs() for column in part]
    assert len(columns) <= 4097
    assert {column.high for column in columns} == {18 * GIB, 4 * GIB}
    assert min(column.low for column in columns) == 1 * GIB
    assert (columns[0].start, columns[-1].end) == (0, 29_999 / 20)


def test_the_sketch_shows_gaps_as_nothing_and_rare_looks_as_lasting() -> None:
    found = series_of((0, 1), (4, 3))
    assert heights(found, 5) == [1 * GIB, 1 * GIB, 1 * GIB, 1 * GIB, 3 * GIB]
    found.lose("gone")
    found.add(look(2), 8, 8)
    assert heights(found, 8) == [GIB, GIB, GIB, GIB, 3 * GIB, None, None, 2 * GIB]


# What is told.


def recording(*found: Series, command: tuple[str, ...] = ("python", "e2e.py"), status: int = 0) -> Recording:
    return Recording(
        command=command,
        status=status,
        began=datetime(2026, 3, 1, 12, tzinfo=UTC),
        took_seconds=20.6,
        interval_seconds=0.05,
        series={one.newest.uuid: one for one in found},
    )


def test_the_summary_names_peak_average_minimum_and_what_they_are_made_of() -> None:
    found = series_of((0, 4), (1, 18), (2, 6), (3, 2), (4, 4))
    clock = (datetime(2026, 3, 1, 12, tzinfo=UTC) + timedelta(seconds=1)).astimezone().strftime("%H:%M:%S")
    assert in_words(recording(found), "utf-8").splitlines() == [
        'VRAM of GPU 0 (Card) while "python e2e.py" ran, 5 samples in 20.6 s:',
        f"  peak      18.0 GiB of 24.0 GiB, +14.0 GiB over the start, after 1.0 s (at {clock})",
        "  average    7.5 GiB (by time)",
        "  minimum    2.0 GiB",
        "  2.0 GiB ▁█▂▁▁ 18.0 GiB",
        "  NVML; a peak longer than 1.0 s was surely seen",
    ]


def test_a_terminal_without_the_letters_gets_others() -> None:
    words = in_words(recording(series_of((0, 1), (1, 9))), "ascii")
    words.encode("ascii")
    assert "1.0 GiB _# 9.0 GiB" in words


def test_gaps_are_in_the_summary_so_that_nobody_trusts_it_too_much() -> None:
    found = series_of((0, 1), (1, 1))
    found.lose("the GPU is lost")
    found.end(5)
    assert in_words(recording(found), None).splitlines()[-1] == (
        "  NVML; a peak longer than 4.0 s was surely seen; 1 gap(s), 4.0 s in all: the GPU is lost"
    )


def test_json_has_the_same_and_null_for_what_is_not_known() -> None:
    found = Series(look(5, total_bytes=None, free_bytes=None))
    found.add(look(5, total_bytes=None, free_bytes=None), 0, 0)
    document = json.loads(json.dumps(as_json(recording(found, status=7))))
    (gpu,) = document["gpus"]
    assert (document["status"], document["command"], document["why"]) == (7, ["python", "e2e.py"], None)
    assert (gpu["peak_bytes"], gpu["average_bytes"], gpu["minimum_bytes"], gpu["samples"]) == (5 * GIB,) * 3 + (1,)
    assert (gpu["total_bytes"], gpu["reserved_bytes"], gpu["command_peak_bytes"]) == (None, None, None)
    assert gpu["peak_at"] == "2026-03-01T12:00:00.000Z"


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.054, "0.05 s"), (20.61, "20.6 s"), (900, "15 min"), (3725, "1 h 02 min")]
)
def test_a_duration_is_as_exact_as_it_is_worth(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_a_long_command_is_cut_and_stays_on_one_line() -> None:
    assert shown(["sh", "-c", "echo a\necho b"]) == "sh -c 'echo a echo b'"
    assert len(shown(["x" * 500])) == 60


def test_a_row_of_the_timeline_adds_up_and_an_unknown_number_is_an_empty_field(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    timeline = Timeline(file, print)
    at = datetime(2026, 3, 1, 12, tzinfo=UTC)
    full = look(2, reserved_bytes=512 * MIB, free_bytes=24 * GIB - 2 * GIB - 512 * MIB, command_bytes=GIB)
    timeline.write(Sample(at=at, seconds=0.05, index=0, look=full))
    timeline.write(Sample(at=at, seconds=1, index=0, look=None))
    timeline.write(Sample(at=at, seconds=2, index=0, look=look(3, total_bytes=None, free_bytes=None)))
    # Read before it is closed: nothing waits in a buffer that a kill would lose.
    assert file.read_text().splitlines() == [
        ",".join(HEADER),
        "2026-03-01T12:00:00.000Z,0.050,0,2048,22016,512,24576,1024,NVML",
        "2026-03-01T12:00:00.000Z,1.000,0,,,,,,",
        "2026-03-01T12:00:00.000Z,2.000,0,3072,,,,,NVML",
    ]
    timeline.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_told_once_and_ends_only_the_timeline() -> None:
    said: list[str] = []
    with Path("/dev/full").open("w") as full:
        timeline = Timeline(None, said.append)
        timeline._file, timeline._rows = full, csv.writer(full)
        for _ in range(10_000):
            timeline.write(Sample(at=datetime.now(UTC), seconds=0, index=0, look=look()))
    assert said == ["the timeline ends here, /dev/full cannot be written: No space left on device"]


# ComfyUI as the source.


def device(**fields: Any) -> dict[str, Any]:
    return {"devices": [{"name": "cuda:0 NVIDIA GeForce RTX 3090 : native", "type": "cuda", "index": 0, **fields}]}


def test_comfyui_tells_bytes_and_what_torch_keeps_unused_is_taken() -> None:
    said = device(vram_total=25298141184, vram_free=5987286066, torch_vram_total=17112760320, torch_vram_free=25541682)
    (seen,) = sources.looks_of_comfyui(said)
    assert seen.free_bytes == 5987286066 - 25541682
    assert seen.taken_bytes == 25298141184 - seen.free_bytes
    assert (seen.total_bytes, seen.reserved_bytes, seen.source) == (25298141184, None, "ComfyUI")


def test_comfyui_may_tell_megabytes() -> None:
    (seen,) = sources.looks_of_comfyui(device(used_mem_mb=18432, free_mem_mb=5694.5, total_mem_mb=24126.5))
    assert (seen.taken_bytes, seen.free_bytes) == (18432 * MIB, int(5694.5 * MIB))
    assert seen.total_bytes == int(24126.5 * MIB)


def test_bytes_go_before_megabytes_where_comfyui_tells_both() -> None:
    (seen,) = sources.looks_of_comfyui(device(vram_used=7 * GIB, used_mem_mb=1))
    assert seen.taken_bytes == 7 * GIB


@pytest.mark.parametrize("used", [{"vram_used": 5 * GIB}, {"used_mem_mb": 5120}], ids=["bytes", "megabytes"])
def test_a_total_that_comfyui_does_not_tell_is_unknown_and_never_made_up(used: dict[str, int]) -> None:
    (seen,) = sources.looks_of_comfyui(device(**used))
    assert (seen.taken_bytes, seen.total_bytes, seen.free_bytes) == (5 * GIB, None, None)


def test_a_used_of_0_is_0_and_not_missing() -> None:
    (seen,) = sources.looks_of_comfyui(device(vram_used=0, used_mem_mb=512))
    assert seen.taken_bytes == 0


@pytest.mark.parametrize("fields", [{}, {"vram_free": GIB}, {"vram_total": GIB}, {"total_mem_mb": 24576}])
def test_where_nothing_tells_what_is_used_it_is_no_reading_and_never_0(fields: dict[str, int]) -> None:
    with pytest.raises(Rejected, match=r"devices\[0\]: how much memory is used does not follow"):
        sources.looks_of_comfyui(device(**fields))


def test_a_comfyui_on_the_cpu_has_no_gpu() -> None:
    with pytest.raises(Rejected, match="without a GPU"):
        sources.looks_of_comfyui({"devices": [{"name": "cpu", "type": "cpu", "vram_total": GIB, "vram_free": 0}]})


# The recorder.


class Scripted:
    """A source that gives these answers, the last one for ever; `through` is set once that was given.

    `late`: it tells of a GPU only once the recording has begun.
    """

    rest_seconds = 0.0

    def __init__(
        self, *answers: Sequence[Look | Unread] | SensorError, name: str = "script", late: bool = False
    ) -> None:
        self.name = name
        self.begun = threading.Event()
        if not late:
            self.begun.set()
        self.answers = list(answers)
        self.through = threading.Event()
        self.pids: list[int | None] = []
        self.closed = 0

    async def look(self, command_pid: int | None) -> tuple[Look | Unread, ...]:
        self.pids.append(command_pid)
        answer = self.answers[0]
        if len(self.answers) > 1:
            self.answers.pop(0)
        else:
            self.through.set()
        if isinstance(answer, SensorError):
            raise answer
        assert await asyncio.to_thread(self.begun.wait, 30)
        return tuple(answer)

    async def close(self) -> None:
        self.closed += 1


class Recorded:
    """What a recorder wrote and said while these sources answered."""

    def __init__(self, *asked: Scripted, until: Scripted | None = None, gpu: str | None = None) -> None:
        self.samples: list[Sample] = []
        self.said: list[str] = []
        self.recorder = Recorder(
            asked,
            interval_seconds=0.001,
            gpu=gpu,
            write=self.samples.append,
            say=self.said.append,
            ask_again_seconds=0.0,
        )
        self.recorder.start()
        for source in asked:
            source.begun.set()
        if self.recorder.not_there is None:
            assert (until or asked[0]).through.wait(30)
        self.recorder.stop()
        assert all(source.closed == 1 for source in asked)

    @property
    def gib(self) -> list[float | None]:
        """What was taken, sample by sample, repetitions left out."""
        found: list[float | None] = []
        for sample in self.samples:
            taken = None if sample.look is None else sample.look.taken_bytes / GIB
            if not found or found[-1] != taken:
                found.append(taken)
        return found


LOST = SensorError("the GPU is lost")


def test_the_first_sample_is_there_before_the_command_and_samples_stop_with_it() -> None:
    source, samples = Scripted([look(3)]), []
    recorder = Recorder([source], interval_seconds=3600, gpu=None, write=samples.append, say=print)
    recorder.start()
    assert [sample.seconds for sample in samples] == [0.0]
    source.answers = [[look(7)]]
    recorder.stop()
    assert [sample.look.taken_bytes for sample in samples] == [3 * GIB, 7 * GIB]
    assert not any(thread.name == "recorder" for thread in threading.enumerate())
    assert source.closed == 1


def test_the_first_source_that_answers_is_used_and_no_other() -> None:
    driver, comfyui, daemon = Scripted(LOST), Scripted([look(2)], name="ComfyUI"), Scripted([look(3)])
    recorded = Recorded(driver, comfyui, daemon, until=comfyui)
    assert recorded.gib == [2]
    assert daemon.pids == []
    assert recorded.said == []


def test_a_source_that_is_lost_is_a_gap_told_once_and_asked_again() -> None:
    driver = Scripted([look(2)], LOST, [look(4)], LOST, [look(5)])
    recorded = Recorded(driver)
    assert recorded.gib == [2, None, 4, None, 5]
    assert recorded.said == [
        "the memory of GPU 0 cannot be read any more, the recording has a gap: script: the GPU is lost"
    ]
    assert len(recorded.recorder.series["GPU-a"].gaps) == 2


def test_another_source_goes_on_where_it_tells_of_the_same_gpu() -> None:
    driver, daemon = Scripted([look(2)], LOST), Scripted([look(3, source="the daemon")])
    recorded = Recorded(driver, daemon, until=daemon)
    assert recorded.gib == [2, 3]
    assert recorded.recorder.series["GPU-a"].sources == ["NVML", "the daemon"]
    assert recorded.said == []


def test_a_source_that_counts_another_thing_is_not_mixed_in() -> None:
    driver, comfyui = Scripted([look(2)], LOST), Scripted([look(9, uuid="comfyui-0", source="ComfyUI")])
    recorded = Recorded(driver, comfyui, until=comfyui)
    assert recorded.gib == [2, None]
    assert recorded.recorder.series.keys() == {"GPU-a"}


def test_a_comfyui_that_the_command_starts_is_recorded_from_then_on() -> None:
    comfyui = Scripted(SensorError("connection refused"), [look(2)], [look(3)], name="ComfyUI", late=True)
    recorded = Recorded(comfyui)
    assert recorded.gib == [2, 3]
    assert recorded.samples[0].seconds > 0
    assert recorded.recorder.series["GPU-a"].statistics().longest_unseen_seconds > 0


def test_of_several_gpus_the_one_that_fails_has_a_gap_and_the_other_none() -> None:
    both = [look(1), look(5, uuid="GPU-b", index=1)]
    recorded = Recorded(Scripted(both, [both[0], Unread(uuid="GPU-b", index=1, why="reset")], both, both[:1]))
    gaps = {uuid: [gap.why for gap in series.gaps] for uuid, series in recorded.recorder.series.items()}
    assert gaps == {"GPU-a": [], "GPU-b": ["reset", "it is not there any more"]}
    assert [sample.index for sample in recorded.samples if sample.look is None] == [1, 1]


@pytest.mark.parametrize("gpu", ["1", "GPU-b"])
def test_one_gpu_may_be_chosen_by_index_or_uuid(gpu: str) -> None:
    recorded = Recorded(Scripted([look(1), look(5, uuid="GPU-b", index=1)]), gpu=gpu)
    assert recorded.gib == [5]


def test_a_gpu_that_is_not_there_is_told_with_those_that_are() -> None:
    recorded = Recorded(Scripted([look(1), look(5, uuid="GPU-b", index=1)]), gpu="7")
    assert recorded.recorder.not_there == "--gpu 7: script shows no such GPU; it has 0 (Card), 1 (Card)"
    assert recorded.samples == []


def test_a_chosen_gpu_that_cannot_be_read_is_no_reason_to_refuse() -> None:
    unread = Unread(uuid="GPU-b", index=1, why="reset")
    recorded = Recorded(Scripted([look(1), unread]), gpu="1")
    assert (recorded.recorder.not_there, recorded.recorder.not_read) == (None, ["script: reset"])
    assert recorded.samples == []


def test_a_list_of_processes_is_asked_for_rarely() -> None:
    driver = Scripted(*[[look(1)] for _ in range(50)])
    recorder = Recorder([driver], interval_seconds=0.001, gpu=None, write=lambda _: None, say=print)
    recorder.command_pid = 42
    recorder.start()
    assert driver.through.wait(30)
    recorder.stop()
    asked = [pid for pid in driver.pids if pid is not None]
    assert set(asked) == {42}
    assert len(asked) < len(driver.pids) / 2


# The command, signals and exit status.


@pytest.fixture
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in child._PASSED_ON}
    yield
    for number, handler in before.items():
        assert signal.getsignal(number) == handler
        signal.signal(number, handler)


class Terminating(list[int]):
    """Descriptors for a child. Whoever asks for them, as Popen does before it forks, gets a SIGTERM first."""

    def __iter__(self) -> Iterator[int]:
        os.kill(os.getpid(), signal.SIGTERM)
        return super().__iter__()


def test_a_signal_before_the_command_is_there_reaches_it_all_the_same(handlers: None) -> None:
    assert child.run(["sleep", "60"], pass_fds=Terminating()) == 128 + signal.SIGTERM


def test_a_signal_that_was_ignored_stays_ignored_for_the_command_too(handlers: None) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert child.run(["sh", "-c", "kill -HUP $$; exit 3"]) == 3
    finally:
        signal.signal(signal.SIGHUP, before)
    assert child.run(["sh", "-c", "kill -HUP $$; exit 3"]) == 128 + signal.SIGHUP


def test_a_signal_that_was_ignored_is_passed_on_for_the_command_to_judge(handlers: None, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    script = f"""if True:
        import pathlib, signal, sys
        signal.signal(signal.SIGHUP, lambda *_: sys.exit(5))
        pathlib.Path({str(ready)!r}).touch()
        signal.pause()
    """

    def started(_: int) -> None:
        eventually(ready.exists)
        os.kill(os.getpid(), signal.SIGHUP)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert child.run([sys.executable, "-S", "-c", script], started=started) == 5
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("script", "status"), [("exit 0", 0), ("exit 7", 7), ("kill -KILL $$", 137), ("kill -TERM $$", 143)]
)
def test_the_exit_status_is_the_commands(handlers: None, capsys, script: str, status: int) -> None:
    assert run.record(["sh", "-c", script], run.Wish(), [Scripted([look(3)])]) == status
    assert "peak       3.0 GiB" in capsys.readouterr().err


def test_a_command_that_is_not_there_is_127_and_one_that_may_not_run_126(handlers: None, capsys, tmp_path) -> None:
    assert run.record(["no-such-command"], run.Wish(), [Scripted([look(3)])]) == 127
    assert capsys.readouterr().err == "vram-manager: no-such-command: No such file or directory\n"
    assert run.record([str(tmp_path)], run.Wish(), [Scripted([look(3)])]) == 126
    assert capsys.readouterr().err == f"vram-manager: {tmp_path}: Permission denied\n"


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"gpu": "3"}, "--gpu 3: script shows no such GPU; it has 0 (Card)"),
        ({"picture": Path("a.bmp")}, "--plot a.bmp: must end in .png, .svg or .pdf"),
        ({"picture": Path("no/such/a.png")}, "--plot no/such/a.png: cannot be written: name a file in a directory"),
        ({"timeline": Path("no/such/a.csv")}, "--out no/such/a.csv: cannot be written: No such file or directory"),
        ({"summary": Path("no/such/a.json")}, "--summary no/such/a.json: cannot be written: name a file in a"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_done_is_2_and_one_line_and_the_command_does_not_run(
    capsys, tmp_path: Path, wish: dict[str, Any], words: str
) -> None:
    assert run.record(["touch", str(tmp_path / "ran")], run.Wish(**wish), [Scripted([look(3)])]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"vram-manager: {words}")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("option", [("--interval", "0"), ("--intervall", "1"), ("--out", ".")], ids=" ".join)
def test_a_wrong_option_is_2_and_the_command_does_not_run(monkeypatch, capsys, tmp_path: Path, option) -> None:
    monkeypatch.setattr(sys, "argv", ["vram-manager", "record", *option, "--", "touch", str(tmp_path / "ran")])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert option[0] in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


# The whole, on a real NVML library without a GPU.


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if compiler() is None:
        pytest.skip("the fake NVML library needs a C compiler (cc or gcc)")
    return build(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def state(tmp_path: Path) -> Iterator[NvmlState]:
    with NvmlState(tmp_path / "nvml.state", gpus=1) as state:
        take(state, 4)
        yield state


def take(state: NvmlState, gib: float, index: int = 0) -> None:
    taken = int(gib * GIB)
    state.set_memory(index, total=TOTAL, reserved=RESERVED, used=taken, free=TOTAL - RESERVED - taken)


@pytest.fixture
def vram_record(
    library: Path, state: NvmlState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `vram-manager record` with these arguments; no daemon, no ComfyUI."""
    for name, value in {
        "FAKE_NVML_STATE": str(state.path),
        "LD_LIBRARY_PATH": str(library.parent),
        "COMFYUI_URL": "",
        "VRAM_SOCKET": str(tmp_path / "vram.sock"),
        "PYTHONPATH": str(ROOT),
        "PYTHONIOENCODING": "utf-8",
    }.items():
        monkeypatch.setenv(name, value)
    started = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        command = [sys.executable, "-m", "vram_manager", "record", *arguments]
        started.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, cwd=tmp_path))
        return started[-1]

    # Somebody who runs tests in the background may have us ignore it, and a shell cannot trap what it inherits so.
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield start
    signal.signal(signal.SIGINT, interrupt)
    for process in started:
        with process:
            process.kill()


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as lines:
        return [row for row in csv.DictReader(lines) if row["source"] is not None]


def taken_mib(file: Path) -> list[int]:
    return [int(row["taken_mib"]) for row in rows(file) if row["taken_mib"]]


# Does to the fake card what a generation does to a real one, without waiting for anything but looks at it.
GENERATE = """
import ctypes, mmap, os
from vram_manager.simulator.nvml_state import NvmlState

with open(os.environ["FAKE_NVML_STATE"], "r+b") as file:
    state = NvmlState.from_buffer(mmap.mmap(file.fileno(), ctypes.sizeof(NvmlState)))

def take(gib):
    gpu = state.gpus[0]
    gpu.used = int(gib * 2**30)
    gpu.free = gpu.total - gpu.reserved - gpu.used

def looked():
    until = state.calls + 12
    while state.calls < until:
        pass

state.add_process(0, os.getpid(), 11 * 2**30)
for gib in (6, 18, 5):
    take(gib)
    looked()
"""


def test_the_peak_of_a_command_that_unloads_at_once_is_found(vram_record, tmp_path: Path) -> None:
    summary = tmp_path / "summary.json"
    child = vram_record("--summary", str(summary), "--", sys.executable, "-c", GENERATE + "take(4)")
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out) == (0, "")
    (gpu,) = json.loads(summary.read_text())["gpus"]
    assert (gpu["peak_bytes"], gpu["minimum_bytes"], gpu["peak_over_start_bytes"]) == (18 * GIB, 4 * GIB, 14 * GIB)
    assert gpu["start_bytes"] == gpu["end_bytes"] == 4 * GIB
    assert "peak      18.0 GiB of 24.0 GiB, +14.0 GiB over the start" in err
    assert f"{gpu['samples']} samples" in err


def test_samples_begin_before_the_command_and_go_on_until_after_it(vram_record, tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    child = vram_record("--out", str(file), "--", sys.executable, "-c", GENERATE + "take(9)")
    child.communicate(timeout=60)
    found = taken_mib(file)
    assert (found[0], found[-1]) == (4096, 9216)
    assert {6144, 18432, 5120} < set(found)
    first = rows(file)[0]
    assert (first["seconds"], first["gpu"], first["source"]) == ("0.000", "0", "NVML")
    assert (first["free_mib"], first["reserved_mib"], first["total_mib"]) == ("20030", "450", "24576")


def test_a_timeline_outlives_a_kill(vram_record, state: NvmlState, tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    child = vram_record("--out", str(file), "--interval", "0.005", *PATIENT)
    assert child.stdout is not None
    child.stdout.readline()
    take(state, 11)
    eventually(lambda: 11264 in taken_mib(file))
    child.kill()
    child.wait()
    assert taken_mib(file)[-1] == 11264


def test_what_the_command_itself_has_is_told_where_processes_are_listed(vram_record, tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    script = GENERATE + "for _ in range(4000):\n    looked()\n    if state.process_calls > 3: break"
    child = vram_record("--out", str(file), "--", "sh", "-c", '"$0" -c "$1"; exit 0', sys.executable, script)
    _, err = child.communicate(timeout=60)
    assert "11264" in {row["command_mib"] for row in rows(file)}
    assert "  command   11.0 GiB at most (its own processes, once a second)" in err


def test_a_command_that_ends_at_once_has_a_sample_before_and_one_after_it(vram_record) -> None:
    child = vram_record("--", "true")
    _, err = child.communicate(timeout=60)
    assert child.returncode == 0
    assert 'while "true" ran, 2 samples in' in err or "3 samples in" in err


def test_record_ends_as_its_command_does_and_leaves_its_input_and_output_alone(vram_record) -> None:
    child = vram_record("--json", "--", "sh", "-c", "cat; echo err >&2; kill -KILL $$")
    out, err = child.communicate("x" * 300_000, timeout=60)
    assert (child.returncode, out) == (137, "x" * 300_000)
    first, last = err.splitlines()
    assert first == "err"
    assert json.loads(last)["status"] == 137


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_goes_to_the_command_and_the_summary_still_comes(vram_record, number: signal.Signals) -> None:
    # When these tests are interrupted it must not stay: it ends with whoever started it.
    wait = "while kill -0 $PPID; do sleep 0.05; done"
    script = f"trap 'echo told; exit 5' {number.name.removeprefix('SIG')}; echo ready; {wait}"
    child = vram_record("--", "sh", "-c", script)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    child.send_signal(number)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out) == (5, "told\n")
    assert "VRAM of GPU 0 (Fake GPU 0) while" in err


@pytest.mark.usefixtures("vram_record")
def test_without_a_stderr_nothing_of_ours_is_mixed_into_what_the_command_prints() -> None:
    without = ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-m", "vram_manager", "record"]
    for options in ([], ["--json"], ["--gpu", "0", "--out", "/dev/full"]):
        done = subprocess.run([*without, *options, "--", "echo", "its own"], stdout=subprocess.PIPE, check=False)
        expected = (2, b"") if "--out" in options else (0, b"its own\n")
        assert (done.returncode, done.stdout) == expected, options


def test_a_daemon_that_the_command_leaves_behind_does_not_keep_the_recording_open(vram_record) -> None:
    child = vram_record("--", "sh", "-c", "sleep 60 <&- >&- 2>&- & echo $!")
    out, err = child.communicate(timeout=60)
    os.kill(int(out), signal.SIGKILL)
    assert child.returncode == 0
    assert "VRAM of GPU 0" in err


def test_where_nothing_can_be_read_the_command_runs_with_one_warning(vram_record, state: NvmlState, tmp_path) -> None:
    state.init_error = 9
    summary = tmp_path / "summary.json"
    child = vram_record("--summary", str(summary), "--plot", str(tmp_path / "a.png"), "--", "sh", "-c", "cat; exit 7")
    out, err = child.communicate("in", timeout=60)
    assert (child.returncode, out) == (7, "in")
    assert err.count("\n") == 1
    assert err.startswith("vram-manager: warning: GPU memory cannot be read, so there is nothing to record yet (")
    assert "the NVIDIA driver is not loaded" in err
    assert "no daemon" in err
    document = json.loads(summary.read_text())
    assert (document["gpus"], document["status"]) == ([], 7)
    assert "the NVIDIA driver is not loaded" in document["why"]
    assert not (tmp_path / "a.png").exists()


def test_without_matplotlib_a_picture_is_refused_with_the_remedy_before_the_command_runs(
    vram_record, tmp_path: Path
) -> None:
    (tmp_path / "matplotlib.py").write_text("raise ImportError('No module named matplotlib')")
    os.environ["PYTHONPATH"] = f"{tmp_path}:{ROOT}"
    child = vram_record("--plot", "a.png", "--", "touch", str(tmp_path / "ran"))
    _, err = child.communicate(timeout=60)
    assert child.returncode == 2
    assert "pip install 'vram-manager[plot]'" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "ran").exists()


# The sources behind one another.


class Stats(BaseHTTPRequestHandler):
    """A ComfyUI that knows its memory and nothing else."""

    def do_GET(self) -> None:
        body = json.dumps({"system": {}, **device(vram_total=24 * GIB, vram_free=20 * GIB)}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def comfyui(vram_record, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Stats) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv("COMFYUI_URL", f"http://127.0.0.1:{server.server_port}")
        yield
        server.shutdown()
        thread.join()


def test_without_a_driver_comfyui_is_asked(vram_record, comfyui, state: NvmlState, tmp_path: Path) -> None:
    state.init_error = 9
    file = tmp_path / "a.csv"
    child = vram_record("--out", str(file), "--", "true")
    _, err = child.communicate(timeout=60)
    assert {row["source"] for row in rows(file)} == {"ComfyUI"}
    assert set(taken_mib(file)) == {4096}
    assert "warning" not in err
    assert "  ComfyUI; a peak longer than" in err


def test_the_driver_goes_before_comfyui_and_a_silent_comfyui_is_not_worth_a_word(
    vram_record, state: NvmlState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMFYUI_URL", "http://127.0.0.1:9")
    file = tmp_path / "a.csv"
    child = vram_record("--out", str(file), "--", "true")
    _, err = child.communicate(timeout=60)
    assert {row["source"] for row in rows(file)} == {"NVML"}
    assert "ComfyUI" not in err


def test_the_daemon_is_asked_where_nobody_else_answers(
    vram_record, state: NvmlState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state.init_error = 9
    monkeypatch.setenv("VRAM_STATE_DIR", str(tmp_path))
    monkeypatch.setenv("VRAM_CHECK_INTERVAL", "0.25")
    with InThread() as running:
        file = tmp_path / "a.csv"
        process = vram_record("--out", str(file), *PATIENT)
        assert process.stdout is not None
        process.stdout.readline()
        running.card.holders["video"] = 3 * GIB
        eventually(lambda: 11264 in taken_mib(file))
        process.communicate("\n", timeout=60)
    assert taken_mib(file)[0] == 8192
    assert {row["source"] for row in rows(file)} == {"the daemon"}


def test_a_snapshot_counts_once_and_its_age_counts_into_what_was_unseen() -> None:
    gpu = {"uuid": "GPU-a", "index": 0, "name": "Card", "total_bytes": 10, "reserved_bytes": 1, "free_bytes": 4}
    snapshot = {"taken_at": "2026-03-01T12:00:00.000Z", "gpus": [gpu], "gpus_why": None, "second_hand": False}
    (seen,) = sources.looks_of_the_daemon(snapshot, datetime(2026, 3, 1, 12, 0, 3, tzinfo=UTC))
    assert (seen.taken_bytes, seen.age_seconds) == (5, 3.0)
    found = Series(seen)
    found.add(seen, -3, 0)
    found.add(seen, 0, 3)
    assert found.statistics().longest_unseen_seconds == 6


# The picture.


@pytest.mark.parametrize("suffix", plot.SUFFIXES)
def test_a_picture_is_drawn_in_the_format_of_its_name(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    one = series_of((0, 4), (1, 18), (2, 4))
    one.lose("gone")
    one.add(look(4), 4, 4)
    other = Series(look(1, uuid="GPU-b", index=1, total_bytes=None))
    other.add(look(1, uuid="GPU-b", index=1, total_bytes=None), 0, 0)
    file = tmp_path / f"a{suffix.upper()}"
    assert plot.problem(file) is None
    plot.draw(recording(one, other, command=("echo", "$x^2$", "$_")), file)
    head = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix]
    assert file.read_bytes().startswith(head)


def test_a_picture_tells_its_command_its_peak_its_average_and_its_total(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib").rcParams["svg.fonttype"] = "none"
    file = tmp_path / "a.svg"
    plot.draw(recording(series_of((0, 4), (1, 18), (2, 4))), file)
    text = file.read_text()
    for words in ("python e2e.py", "peak 18.0 GiB after 1.0 s", "average 11.0 GiB", "total 24.0 GiB", "GPU 0: Card"):
        assert words in text


def test_a_wish_that_names_no_file_writes_none(vram_record, tmp_path: Path) -> None:
    before = set(tmp_path.iterdir())
    child = vram_record("--", "true")
    child.communicate(timeout=60)
    assert set(tmp_path.iterdir()) == before
    assert run.Wish().interval_seconds < 5
