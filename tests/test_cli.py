"""The verbs against a daemon on its socket: what they print, and with which status they end."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.fakes import InThread
from vram_manager import __version__
from vram_manager.cli import cli, main
from vram_manager.client import VramClient, call
from vram_manager.domain.event import Event, EventType
from vram_manager.domain.lease import Lease, Priority
from vram_manager.domain.model_facts import StoredModel
from vram_manager.domain.reading import Missing
from vram_manager.errors import Rejected, SensorError

BACK = Event(type=EventType.SENSOR_BACK, target="ollama", reason="version 0.33.1")
MODEL = "llama3.1:8b"
WHEN = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> object:
        return json.loads(self.out)


@pytest.fixture
def vram(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Runs `vram-manager` with these arguments."""

    def run(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["vram-manager", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        said = capsys.readouterr()
        status = end.value.code
        log_free = "".join(line for line in said.err.splitlines(keepends=True) if " | " not in line)
        return Ended(status if isinstance(status, int) else int(status is not None), said.out, log_free)

    return run


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quick rules; the socket and the state are the test's own."""
    for name, value in {
        "VRAM_SOCKET": str(tmp_path / "vram.sock"),
        "VRAM_STATE_DIR": str(tmp_path),
        "VRAM_CHECK_INTERVAL": "0.25",
        "VRAM_FREE_COOLDOWN": "0",
        "VRAM_SETTLE_TIMEOUT": "1",
        "COMFYUI_IDLE_SECONDS": "0",
        "VRAM_GRACE_SECONDS": "3600",
    }.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def daemon(environment: None) -> Iterator[InThread]:
    with InThread() as running:
        yield running


def record(daemon: InThread, times: int = 1) -> list[str]:
    assert daemon.daemon is not None
    journal, ids = daemon.daemon.journal, []
    daemon.do(lambda: ids.extend(journal.record(BACK).id for _ in range(times)))
    return ids


def leases(daemon: InThread) -> list[Lease]:
    assert daemon.daemon is not None
    return list(daemon.daemon.admissions.book.leases.values())


def busy(daemon: InThread) -> None:
    assert daemon.daemon is not None
    cycle = daemon.daemon.cycle
    daemon.comfyui.remaining = 1
    daemon.until(lambda: cycle.snapshot and cycle.snapshot.queue.value.remaining)


# Without a daemon.

VERBS = sorted(cli.commands)
TALKS = [
    ["health"],
    ["report"],
    ["report", "--json"],
    ["top"],
    ["top", "--once"],
    ["events"],
    ["events", "--follow"],
    ["why"],
    ["free"],
    ["why", "x"],
    ["leases"],
    ["leases", "--release", "lease-1"],
]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(vram, verb: str):
    ended = vram(verb, "--help")
    assert ended.status == 0
    assert ended.out.startswith(f"Usage: vram-manager {verb}")
    assert vram(verb, "-h").out == ended.out


def test_the_help_of_the_whole_names_every_verb(vram):
    ended = vram("--help")
    assert ended.status == 0
    assert all(f"  {verb} " in ended.out for verb in VERBS)


@pytest.mark.parametrize("arguments", TALKS, ids=" ".join)
def test_without_a_daemon_a_verb_that_talks_to_it_ends_with_4_and_one_line(vram, environment, arguments: list[str]):
    ended = vram(*arguments)
    assert ended.status == 4
    assert ended.out == ""
    assert ended.err.startswith("vram-manager: no daemon: ")
    assert ended.err.count("\n") == 1


def test_the_version_needs_no_daemon(vram):
    assert vram("version") == Ended(0, f"{__version__}\n", "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["fly"],
        ["free", "--stage", "hard"],
        ["events", "--limit", "many"],
        ["free", "--no-such-option"],
        ["why", "a", "b"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_2(vram, environment, arguments: list[str]):
    ended = vram(*arguments)
    assert ended.status == 2
    assert "Usage" in ended.err


# Looking.


def test_health_is_0_while_the_cycle_turns_and_1_when_it_stalls(vram, daemon: InThread):
    assert vram("health") == Ended(0, "ok\n", "")
    daemon.ahead = 3600
    assert vram("health") == Ended(1, "stalled\n", "")


def test_health_is_0_when_only_a_sensor_is_missing(vram, daemon: InThread):
    daemon.ollama.error = SensorError("GET /api/ps: connection refused")
    daemon.until(lambda: isinstance(daemon.daemon.observer.sensors()["ollama"], Missing))
    assert vram("health") == Ended(0, "degraded\n", "")


def test_a_report_says_who_holds_what(vram, daemon: InThread):
    daemon.ollama.load(MODEL, 5, on_gpu=0.5)
    daemon.until(lambda: daemon.daemon.cycle.snapshot.ollama.value.models)
    ended = vram("report")
    assert ended.status == 0
    assert "GPU 0: Fake card 0" in ended.out
    assert "total 24.0 GiB" in ended.out
    assert MODEL in ended.out
    assert "50 % CPU" in ended.out
    assert "ComfyUI 0.3.40" in ended.out
    assert all(len(line) <= 120 for line in ended.out.splitlines())


def test_a_report_for_machines_is_one_document(vram, daemon: InThread):
    document = vram("report", "--json").json
    assert document["gpus"][0]["total_bytes"] == 24 * 2**30
    assert [event["type"] for event in document["events"]][-1] == "sensor_back"


def test_a_report_of_a_daemon_that_sees_nothing_says_so(vram, environment):
    running = InThread()
    for fake in (running.gpus, running.ollama, running.comfyui):
        fake.error = SensorError("gone", "bring it back")
    with running:
        ended = vram("report")
    assert ended.status == 0
    assert "No GPU can be read: gone" in ended.out
    assert "Ollama cannot be read: gone" in ended.out
    assert "ComfyUI cannot be read: gone" in ended.out


def test_a_report_before_the_first_look_says_so(vram, environment):
    starting = InThread(wait_for_first_look=False)
    starting.gpus.takes_seconds = 3600
    with starting:
        ended = vram("report")
        document = vram("report", "--json").json
    assert ended.status == 0
    assert "nothing seen yet" in ended.out
    assert "Now: starting" in ended.out
    assert document["gpus"] == []


def test_events_are_listed_oldest_first_up_to_a_limit_and_after_an_id(vram, daemon: InThread):
    ids = record(daemon, 5)
    listed = vram("events", "--limit", "3").out.splitlines()
    assert [line.rsplit("[", 1)[1].rstrip("]") for line in listed] == ids[2:]
    assert [event["id"] for event in vram("events", "--json", "--after", ids[2]).json] == ids[3:]
    assert vram("events", "--after", ids[4]).out == ""


def test_an_id_that_is_none_is_1_and_says_what_one_looks_like(vram, daemon: InThread):
    ended = vram("events", "--after", "yesterday")
    assert ended.status == 1
    assert ended.err == "vram-manager: after is 'yesterday': must be the id of an event, such as free-0412\n"


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_events_are_followed_until_the_daemon_ends(vram, environment, as_json: bool):
    with InThread() as daemon:
        first = record(daemon, 2)
        later: list[str] = []

        def happen() -> None:
            daemon.until(lambda: daemon.daemon.journal._followers)
            later.extend(record(daemon, 2))
            daemon.stop()

        happening = threading.Thread(target=happen)
        happening.start()
        ended = vram("events", "--follow", "--limit", "2", *(["--json"] if as_json else []))
        happening.join()
    lines = ended.out.splitlines()
    assert [json.loads(line)["id"] if as_json else line.rsplit("[", 1)[1][:-1] for line in lines] == first + later
    assert ended.status == 0


def test_why_lists_what_was_decided_lately(vram, daemon: InThread):
    ended = vram("why")
    assert ended.status == 0
    assert "nobody needs more" in ended.out
    assert "[decision-0001: 3 nobody" in ended.out
    assert vram("why", "--json").json[0]["id"] == "decision-0001"


def test_why_an_event_shows_the_whole_free_and_the_decision_behind_it(vram, daemon: InThread):
    asked = json.loads(vram("free", "--json").out)["action_id"]
    freed = vram("events", "--json").json[-1]
    assert freed["action_id"] == asked
    for named in (asked, freed["id"]):
        ended = vram("why", named)
        assert ended.status == 0
        assert "free_asked  comfyui  soft" in ended.out
        assert "freed  comfyui  soft  8.0 GiB" in ended.out
        assert "asked by hand: a soft free" in ended.out
        assert "reading_age_seconds" in ended.out
    document = vram("why", asked, "--json").json
    assert [event["type"] for event in document["events"]] == ["free_asked", "freed"]
    assert any(decision["branch"] == "manual" for decision in document["decisions"])


def test_why_a_decision_shows_its_numbers(vram, daemon: InThread):
    ended = vram("why", "decision-0001")
    assert ended.status == 0
    assert "reading_age_seconds" in ended.out


def test_why_something_unknown_is_1(vram, daemon: InThread):
    ended = vram("why", "free-9999")
    assert (ended.status, ended.out) == (1, "")
    assert ended.err == "vram-manager: free-9999: no such event or decision is remembered\n"


def test_why_an_event_of_an_earlier_run_says_that_its_decision_is_gone(vram, environment):
    with InThread():
        asked = json.loads(vram("free", "--json").out)["action_id"]
    with InThread():
        ended = vram("why", asked)
    assert ended.status == 0
    assert "free_asked" in ended.out
    assert "only the event is remembered" in ended.out


# Freeing.


def test_a_free_that_is_proven_is_0_and_one_line(vram, daemon: InThread):
    ended = vram("free")
    assert (ended.status, ended.err) == (0, "")
    assert ended.out.count("\n") == 1
    assert "freed  comfyui  soft  8.0 GiB in" in ended.out
    assert "used 33 % -> 0 %" in ended.out


def test_a_free_that_is_not_proven_is_1(vram, daemon: InThread):
    daemon.comfyui.acts_after_seconds = None
    ended = vram("free", "--stage", "unload", "--json")
    assert ended.status == 1
    assert ended.json["type"] == "free_unconfirmed"
    assert ended.json["stage"] == "unload"


def test_a_free_that_is_refused_is_3_and_says_why(vram, daemon: InThread):
    busy(daemon)
    ended = vram("free")
    assert (ended.status, ended.out) == (3, "")
    assert ended.err == "Refused: ComfyUI is busy (1 running or waiting)\n"
    ended = vram("free", "--json")
    assert ended.status == 3
    assert ended.json["error"]["type"] == "not_now"


def test_a_free_that_comfyui_refuses_is_3(vram, daemon: InThread):
    daemon.comfyui.post_error = Rejected("POST /free: HTTP 403")
    ended = vram("free")
    assert (ended.status, ended.err) == (3, "Refused: POST /free: HTTP 403\n")


def test_force_outweighs_a_busy_queue(vram, daemon: InThread):
    busy(daemon)
    ended = vram("free", "--force", "--no-wait")
    assert ended.status == 0
    assert ended.out.startswith("Asked [free-")


def test_without_waiting_only_the_asking_is_reported(vram, daemon: InThread):
    assert vram("free", "--no-wait", "--json").json["accepted"] is True


def test_a_model_is_unloaded_by_name(vram, daemon: InThread):
    daemon.ollama.load(MODEL, 5)
    daemon.until(lambda: daemon.daemon.cycle.snapshot.ollama.value.models)
    ended = vram("free", "--ollama", MODEL)
    assert ended.status == 0
    assert f"freed  ollama:{MODEL}  5.0 GiB" in ended.out


def test_a_model_that_is_not_loaded_is_3(vram, daemon: InThread):
    ended = vram("free", "--ollama", "no-such-model")
    assert (ended.status, ended.err) == (3, "Refused: Ollama has no model no-such-model loaded\n")


def test_a_daemon_that_ends_before_the_proof_is_4(vram, environment):
    with InThread() as daemon:
        daemon.comfyui.acts_after_seconds = None

        def end() -> None:
            daemon.until(lambda: daemon.daemon.journal._followers)
            daemon.stop()

        ending = threading.Thread(target=end)
        ending.start()
        ended = vram("free")
        ending.join()
    assert ended.status == 4
    assert ended.err == "vram-manager: the daemon went away before the proof\n"


@pytest.mark.parametrize("after", ["free 12", "free-12&limit=0", "ü"])
def test_an_odd_id_is_wrong_and_not_a_daemon_that_is_away(vram, daemon: InThread, after: str):
    ended = vram("events", "--after", after)
    assert ended.status == 1
    assert "must be the id of an event" in ended.err


# Asking: nothing is reserved.

FULL = "100GiB"
PROMPT = {"4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sd_xl_base_1.0.safetensors"}}}


def test_a_check_of_what_fits_is_0_and_says_what_is_available(vram, daemon: InThread):
    ended = vram("check", "4GiB")
    assert ended == Ended(0, "Admitted: 4.0 GiB on GPU 0 (Fake card 0), 16.0 GiB available\n", "")
    assert leases(daemon) == []


def test_a_check_of_what_does_not_fit_is_3_and_says_why_and_what_would(vram, daemon: InThread):
    ended = vram("check", "20GiB")
    assert (ended.status, ended.err) == (3, "")
    refused, *others = ended.out.splitlines()
    assert refused.startswith("Refused: Insufficient GPU memory: need 22.0 GiB (20.0 + 2.0 safety margin), 16.0 GiB")
    assert [line.split(" on ")[0] for line in others] == ["  would fit now: up to 14.0 GiB"]


def test_a_check_may_name_its_own_margin_and_gpu(vram, daemon: InThread):
    assert vram("check", "16GiB").status == 3
    assert vram("check", "16GiB", "--margin-mb", "0", "--gpu", "0", "--priority", "batch").status == 0


def test_a_check_for_a_model_estimates_it(vram, environment, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VRAM_ESTIMATES", '{"ltx2-19b": 24576, "tts": 2048}')
    with InThread():
        assert vram("check", "--model", "tts").out.startswith("Admitted: 2.0 GiB on GPU 0")
        ended = vram("check", "--model", "ltx2-19b", "--context", "4096", "--json")
    assert ended.status == 3
    assert ended.json["estimate_source"] == "table"
    assert ended.json["required_bytes"] == 24 * 2**30


def test_a_check_for_a_workflow_estimates_it_from_its_files(vram, daemon: InThread, tmp_path: Path):
    daemon.comfyui.folders["checkpoints"] = {"sd_xl_base_1.0.safetensors": 6 * 2**30}
    file = tmp_path / "prompt.json"
    file.write_text(json.dumps(PROMPT))
    ended = vram("check", "--workflow", str(file), "--json")
    assert ended.json["estimate_source"] == "files"
    assert ended.json["required_bytes"] > 6 * 2**30
    assert ended.status == (0 if ended.json["admitted"] else 3)


def test_a_check_for_machines_is_one_document(vram, daemon: InThread):
    admitted, refused = vram("check", "4GiB", "--json"), vram("check", "20GiB", "--json")
    assert (admitted.status, refused.status) == (0, 3)
    assert admitted.json["admitted"] is True
    assert admitted.json["lease"] is None
    assert refused.json["shortfall_bytes"] == 6 * 2**30
    assert refused.json["alternatives"][0]["required_bytes"] == 14 * 2**30


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "say how much"),
        (["lots"], "must be a size with a unit"),
        (["24"], "must be a size with a unit"),
        (["0GiB"], "must be more than 0"),
        (["4GiB", "--gpu", "7"], "must be the index or UUID of one of 0 (GPU-a)"),
        (["--workflow", "/dev/null"], "--workflow: not JSON"),
        (["--workflow", "/no/such/file"], "No such file"),
        (["4GiB", "--margin-mb", "-1"], "--margin-mb"),
        (["4GiB", "--priority", "urgent"], "--priority"),
        (["--model", "x", "--context", "0"], "--context"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.parametrize("verb", ["check", "exec"])
def test_asking_for_what_is_no_size_is_2(vram, daemon: InThread, verb: str, arguments: list[str], words: str):
    if verb == "exec":
        size = [] if not arguments or arguments[0].startswith("--") else ["--need", arguments.pop(0)]
        arguments = [*size, *arguments, "--", "no-such-command"]
    ended = vram(verb, *arguments)
    assert ended.status == 2
    assert words in ended.err
    assert "Usage" in ended.err


def test_a_workflow_that_is_no_object_is_2(vram, daemon: InThread, tmp_path: Path):
    file = tmp_path / "prompt.json"
    file.write_text("[1, 2]")
    ended = vram("check", "--workflow", str(file))
    assert ended.status == 2
    assert "workflow" in ended.err


def test_a_check_without_a_daemon_is_0_with_a_warning(vram, environment):
    ended = vram("check", "24GiB")
    assert ended.status == 0
    assert ended.out.startswith("Admitted: not asked, admitted all the same: no daemon: ")
    assert ended.err.startswith("vram-manager: warning: no daemon: ")
    assert ended.err.count("\n") == 1


@pytest.mark.parametrize("how", ["option", "setting"])
def test_a_strict_check_without_a_daemon_is_4(vram, environment, monkeypatch: pytest.MonkeyPatch, how: str):
    if how == "setting":
        monkeypatch.setenv("VRAM_FAIL_OPEN", "false")
    ended = vram("check", "24GiB", *(["--strict"] if how == "option" else []))
    assert (ended.status, ended.out) == (4, "")
    assert ended.err.startswith("vram-manager: no daemon: ")
    assert ended.err.count("\n") == 1


# Running a command with its memory promised.


@pytest.fixture
def execute() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `vram-manager exec` as a process of its own, as signals are a process's."""
    running: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "vram_manager", "exec", *arguments]
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        running.append(child)
        return child

    yield start
    for child in running:
        child.kill()
        child.communicate()


# Says its number, and ends when it is told to.
PATIENT = ("sh", "-c", "echo $$; read line")
# Says its number, and ends with 5 after it has said which signal it got.
TOLD = """
import os, signal, sys
def told(number, _):
    print(signal.Signals(number).name, flush=True)
    os._exit(5)
for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, told)
print(os.getpid(), flush=True)
while True:
    signal.pause()
"""


def line_of(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


def held_by(daemon: InThread, pid: int) -> Lease:
    """The only lease, once it belongs to that process: by then its guardian passes signals on."""
    daemon.until(lambda: [lease.pid for lease in leases(daemon)] == [pid])
    return leases(daemon)[0]


@pytest.mark.parametrize(
    ("script", "status"), [("exit 0", 0), ("exit 7", 7), ("kill -KILL $$", 137), ("kill -TERM $$", 143)]
)
def test_exec_ends_as_its_command_does(daemon: InThread, execute, script: str, status: int):
    child = execute("--need", "2GiB", "--", "sh", "-c", f"echo out; echo err >&2; {script}")
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out, err) == (status, "out\n", "err\n")
    assert leases(daemon) == []


def test_a_command_has_its_lease_for_as_long_as_it_runs(vram, daemon: InThread, execute):
    child = execute("--need", "2GiB", *PATIENT)
    lease = held_by(daemon, int(line_of(child)))
    assert (lease.bytes, lease.holds) == (2 * 2**30, 1)
    assert lease.owner == f"sh-{child.pid}"
    assert lease.id in vram("leases").out
    child.communicate("\n", timeout=60)
    assert child.returncode == 0
    assert vram("leases").out == "No lease is live.\n"


def test_the_owner_of_a_lease_may_be_named(vram, daemon: InThread, execute):
    child = execute("--owner", "captions", "--need", "2GiB", "--priority", "batch", "--gpu", "0", "--", *PATIENT)
    lease = held_by(daemon, int(line_of(child)))
    assert (lease.owner, lease.priority) == ("captions", Priority.BATCH)
    child.communicate("\n", timeout=60)


def test_what_follows_the_command_is_the_commands(daemon: InThread, execute):
    child = execute("--need", "1GiB", "sh", "-c", 'echo "$@"', "--", "--need", "--strict", "-x", "--help")
    assert child.communicate(timeout=60) == ("--need --strict -x --help\n", "")


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2]
)
def test_a_signal_is_passed_on_to_the_command(daemon: InThread, execute, number: signal.Signals):
    child = execute("--need", "2GiB", "--", sys.executable, "-S", "-c", TOLD)
    held_by(daemon, int(line_of(child)))
    child.send_signal(number)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out, err) == (5, f"{number.name}\n", "")
    assert leases(daemon) == []


def test_a_command_that_is_refused_its_memory_does_not_run_and_that_is_3(vram, daemon: InThread, tmp_path: Path):
    ran = tmp_path / "ran"
    ended = vram("exec", "--need", FULL, "--", "touch", str(ran))
    assert (ended.status, ended.out) == (3, "")
    assert ended.err.startswith("vram-manager: Refused: Insufficient GPU memory: need 102.0 GiB (100.0 + 2.0 safety")
    assert not ran.exists()
    assert leases(daemon) == []


def test_a_command_that_is_not_there_is_127(vram, daemon: InThread):
    ended = vram("exec", "--need", "1GiB", "--", "no-such-command", "x")
    assert ended == Ended(127, "", "vram-manager: no-such-command: No such file or directory\n")
    assert leases(daemon) == []


def test_a_command_that_may_not_be_run_is_126(vram, daemon: InThread, tmp_path: Path):
    file = tmp_path / "script.py"
    file.write_text("print('hello')")
    for name in (file, tmp_path):
        ended = vram("exec", "--need", "1GiB", "--", str(name))
        assert ended == Ended(126, "", f"vram-manager: {name}: Permission denied\n")
    assert leases(daemon) == []


def test_exec_without_a_command_is_2(vram, daemon: InThread):
    assert vram("exec", "--need", "1GiB").status == 2


def test_exec_waits_in_line_for_its_memory(vram, daemon: InThread, execute):
    busy(daemon)
    first = execute("--need", "12GiB", *PATIENT)
    first_pid = int(line_of(first))
    second = execute("--need", "12GiB", "--wait", "600", *PATIENT)
    daemon.until(lambda: daemon.daemon.admissions.book.line)
    assert [lease.pid for lease in leases(daemon)] == [first_pid]
    first.communicate("\n", timeout=60)
    held_by(daemon, int(line_of(second)))
    second.communicate("\n", timeout=60)
    assert (first.returncode, second.returncode) == (0, 0)


def test_exec_without_a_daemon_runs_the_command_with_a_warning(environment, execute):
    child = execute("--need", "2GiB", "--", "sh", "-c", "echo out; exit 7")
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out) == (7, "out\n")
    assert err.startswith("vram-manager: warning: no daemon: ")
    assert err.count("\n") == 1


def test_a_strict_exec_without_a_daemon_runs_nothing_and_is_4(vram, environment, tmp_path: Path):
    ran = tmp_path / "ran"
    ended = vram("exec", "--strict", "--need", "2GiB", "--", "touch", str(ran))
    assert (ended.status, ended.out) == (4, "")
    assert ended.err.startswith("vram-manager: no daemon: ")
    assert ended.err.count("\n") == 1
    assert not ran.exists()


# Leases.


def admitted(size: str, owner: str) -> str:
    """Granted, and held by nobody."""
    wish = {"required": size, "owner": owner, "ttl_seconds": 3600}
    body = call("POST", "/v1/admissions", wish).body
    assert body["admitted"], body["reason"]
    return str(body["lease"]["id"])


def test_without_leases_there_is_one_line(vram, daemon: InThread):
    assert vram("leases") == Ended(0, "No lease is live.\n", "")
    assert vram("leases", "--json").json == {"leases": [], "line": []}


def test_leases_are_listed_oldest_first(vram, daemon: InThread):
    first, second = admitted("2GiB", "tts"), admitted("3GiB", "video")
    daemon.card.holders["video"] = 4 * 2**30
    call("POST", f"/v1/leases/{second}/claimed", {"bytes": 4 * 2**30})
    daemon.until(lambda: leases(daemon)[1].visible_bytes)
    ended = vram("leases")
    assert ended.status == 0
    one, two = ended.out.splitlines()
    assert re.fullmatch(f"{first}  tts: 2.0 GiB \\(request\\), 0.0 GiB taken; until {WHEN}", one)
    assert re.fullmatch(
        f"{second}  video: 3.0 GiB \\(request\\), 3.0 GiB taken, peak 4.0 GiB, "
        f"1.0 GiB MORE THAN ASKED FOR; until {WHEN}",
        two,
    )
    assert [lease["id"] for lease in vram("leases", "--json").json["leases"]] == [first, second]


def test_a_lease_that_is_held_says_so(vram, daemon: InThread):
    with VramClient(owner="tts") as client, client.lease("2GiB") as lease:
        assert vram("leases").out == f"{lease.id}  tts: 2.0 GiB (request), 0.0 GiB taken; held by its connection\n"


@pytest.fixture
def in_line(daemon: InThread) -> Iterator[Callable[[], None]]:
    """Puts somebody in line for 12 GiB, of which there is no room beside a render and another 12."""
    wish = {"required": "12GiB", "owner": "captions", "priority": "batch", "wait_seconds": 600}
    asking = threading.Thread(target=lambda: call("POST", "/v1/admissions", wish, timeout_seconds=60))

    def ask() -> None:
        busy(daemon)
        asking.start()
        daemon.until(lambda: daemon.daemon.admissions.book.line)

    yield ask
    for lease in leases(daemon):
        call("DELETE", f"/v1/leases/{lease.id}")
    asking.join(60)
    assert not asking.is_alive()


def test_the_line_is_listed_with_when_each_may_be_served(vram, daemon: InThread, in_line: Callable[[], None]):
    admitted("12GiB", "video")
    in_line()
    held, title, waiting = vram("leases").out.splitlines()
    assert "video: 12.0 GiB" in held
    assert title == "Waiting in line"
    assert re.fullmatch(r"  1\. captions: 12\.0 GiB, batch, for \d+ s, ETA \d+ s \(estimate\)", waiting)
    (one,) = vram("leases", "--json").json["line"]
    assert (one["owner"], one["position"], one["required_bytes"]) == ("captions", 1, 12 * 2**30)
    assert one["eta_seconds"] > 0


def test_a_wait_whose_end_cannot_be_foreseen_has_no_eta(vram, daemon: InThread, in_line: Callable[[], None]):
    with VramClient(owner="video") as client, client.lease("12GiB"):
        in_line()
        waiting = vram("leases").out.splitlines()[-1]
        assert re.fullmatch(r"  1\. captions: 12\.0 GiB, batch, for \d+ s, no ETA", waiting)


def test_a_lease_may_be_ended_by_hand_once(vram, daemon: InThread):
    lease_id = admitted("2GiB", "tts")
    assert vram("leases", "--release", lease_id) == Ended(0, f"Released {lease_id}\n", "")
    assert leases(daemon) == []
    ended = vram("leases", "--release", lease_id)
    assert (ended.status, ended.out) == (1, "")
    assert ended.err.startswith(f"vram-manager: {lease_id} is no live lease")


@pytest.mark.parametrize("name", ["lease 1", "../snapshot", "lease/1", "ü", "%", ""], ids=repr)
def test_the_id_of_no_lease_is_1_and_one_line(vram, daemon: InThread, name: str):
    ended = vram("leases", "--release", name)
    assert (ended.status, ended.out) == (1, "")
    assert ended.err.count("\n") == 1


def test_a_report_shows_the_leases(vram, daemon: InThread):
    assert "Leases" not in vram("report").out
    lease_id = admitted("2GiB", "tts")
    lines = vram("report").out.splitlines()
    shown = lines[lines.index("Leases") + 1]
    assert shown.startswith(f"   {lease_id}  tts: 2.0 GiB (request), 0.0 GiB taken; until ")
    assert vram("report", "--json").json["leases"][0]["id"] == lease_id


# The gateways.


@pytest.fixture
def gateway(environment: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The port of a gateway in front of an Ollama that takes every request and answers none."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with socket.create_server(("127.0.0.1", 0)) as unused:
            port = int(unused.getsockname()[1])
        monkeypatch.setenv("OLLAMA_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("GATEWAY_OLLAMA_PORT", str(port))
        yield port


@contextlib.contextmanager
def asked(port: int) -> Iterator[None]:
    """Somebody asks the gateway for a chat and waits for its answer."""
    body = json.dumps({"model": MODEL, "prompt": "Why?"})
    head = f"POST /api/generate HTTP/1.1\r\nHost: box\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall((head + body).encode())
        yield


def test_a_report_shows_the_requests_under_way(vram, gateway: int):
    with InThread() as daemon:
        daemon.ollama.hold(MODEL, 5)
        daemon.until(lambda: daemon.daemon.cycle.snapshot.ollama.value.models)
        assert "under way" not in vram("report").out
        with asked(gateway):
            daemon.until(lambda: daemon.daemon.cycle.snapshot.ollama.value.models[0].requests)
            assert "GPU (VRAM)  in use (1 under way)  context 4096" in vram("report").out


def test_a_report_shows_the_calls_that_are_held_and_why(vram, gateway: int):
    with InThread() as daemon:
        daemon.ollama.stored[MODEL] = StoredModel(digest="a" * 64, file_bytes=5 * 2**30)
        daemon.comfyui.hold(23)
        busy(daemon)
        assert "Held at the gateways" not in vram("report").out
        with asked(gateway):
            daemon.until(daemon.daemon.gateways.waiting)
            lines = vram("report").out.splitlines()
            held = lines[lines.index("Held at the gateways") + 1]
            assert re.fullmatch(rf"   Ollama: {MODEL}, for \d+ s: {MODEL} waits for room", held)
