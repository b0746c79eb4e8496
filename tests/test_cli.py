"""The verbs against a daemon on its socket: what they print, and with which status they end."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.fakes import InThread
from vram_manager import __version__
from vram_manager.cli import cli, main
from vram_manager.domain.event import Event, EventType
from vram_manager.domain.reading import Missing
from vram_manager.errors import Rejected, SensorError

BACK = Event(type=EventType.SENSOR_BACK, target="ollama", reason="version 0.33.1")
MODEL = "llama3.1:8b"


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
    ["events"],
    ["events", "--follow"],
    ["why"],
    ["free"],
    ["why", "x"],
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
