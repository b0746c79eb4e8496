"""The worker of the README, as it stands there, beside a real daemon."""

from __future__ import annotations

import queue
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import GIB, InThread
from vram_manager.client import VramClient
from vram_manager.errors import ManagerAwayWarning

README = (Path(__file__).parents[1] / "README.md").read_text()
CARD = {"gpu_memory_used": 8 * 1024, "gpu_memory_total": 24 * 1024}


@pytest.fixture(scope="module")
def work() -> Callable[..., None]:
    """The function of the code block in the README."""
    (code,) = re.findall(r"<!-- worker example -->\n```python\n(.*?)```", README, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    example: Callable[..., None] = names["work"]
    return example


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The socket and the state are the test's own; idle ComfyUI gives way at once."""
    for name, value in {
        "VRAM_SOCKET": str(tmp_path / "vram.sock"),
        "VRAM_STATE_DIR": str(tmp_path),
        "VRAM_CHECK_INTERVAL": "0.25",
        "COMFYUI_IDLE_SECONDS": "0",
    }.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def daemon(environment: None) -> Iterator[InThread]:
    with InThread() as running:
        yield running


class Queue:
    """Jobs to pull, and what was reported of them. `rendered` says what was promised to whom at the time."""

    def __init__(self, *jobs: dict[str, Any], daemon: InThread | None = None) -> None:
        self._daemon = daemon
        self.jobs: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        for job in (*jobs, None):
            self.jobs.put(job)
        self.reported: list[tuple[object, str, dict[str, Any]]] = []
        self.rendered: list[dict[str, int]] = []

    def report(self, job: object, state: str, details: dict[str, Any]) -> None:
        self.reported.append((job, state, details))

    def render(self, job: dict[str, Any]) -> str:
        if self._daemon is not None:
            self.rendered.append(promised(self._daemon))
        return f"image {job['id']}"


def promised(daemon: InThread) -> dict[str, int]:
    """Bytes by owner."""
    assert daemon.daemon is not None
    return {lease.owner: lease.bytes for lease in daemon.daemon.admissions.book.leases.values()}


def rendering(daemon: InThread) -> None:
    """ComfyUI is at work: it keeps its 8 of the card's 24 GiB."""
    assert daemon.daemon is not None
    cycle = daemon.daemon.cycle
    daemon.comfyui.remaining = 1
    daemon.until(lambda: cycle.snapshot and cycle.snapshot.queue.value.remaining)


def test_a_job_that_fits_is_done_under_a_lease_and_gives_it_back(work, daemon: InThread):
    jobs = Queue({"id": 1, "needs": "4GiB"}, {"id": 2, "needs": 2048}, daemon=daemon)
    work(jobs.jobs, jobs.report, jobs.render)
    assert jobs.reported == [
        (1, "done", {"result": "image 1", "leak": None, **CARD}),
        (2, "done", {"result": "image 2", "leak": None, **CARD}),
    ]
    assert jobs.rendered == [{"queue-worker": 4 * GIB}, {"queue-worker": 2 * GIB}]
    assert promised(daemon) == {}


def test_a_job_that_can_never_fit_fails_with_a_sentence_and_the_next_is_done(work, daemon: InThread):
    jobs = Queue({"id": "huge", "needs": "100GiB"}, {"id": "small", "needs": "1GiB"}, daemon=daemon)
    work(jobs.jobs, jobs.report, jobs.render)
    (huge, state, details), (small, then, _) = jobs.reported
    assert (huge, state, small, then) == ("huge", "failed", "small", "done")
    assert details["error"].startswith(
        "Insufficient GPU memory: need 102.0 GiB (100.0 + 2.0 safety margin), GPU 0 (Fake card 0) has 24.0 GiB in all: "
        "no waiting helps"
    )
    assert {name: details[name] for name in CARD} == CARD
    assert jobs.rendered == [{"queue-worker": GIB}]


def test_a_job_that_would_not_wait_fails_while_there_is_no_room(work, daemon: InThread):
    rendering(daemon)
    jobs = Queue({"id": 1, "needs": "20GiB", "wait_seconds": 0}, daemon=daemon)
    work(jobs.jobs, jobs.report, jobs.render)
    ((_, state, details),) = jobs.reported
    assert state == "failed"
    assert "ComfyUI holds 8.0 GiB and is rendering" in details["error"]
    assert jobs.rendered == []


def test_a_job_for_which_comfyui_has_to_give_way_is_done(work, daemon: InThread):
    jobs = Queue({"id": 1, "needs": "20GiB"}, daemon=daemon)
    work(jobs.jobs, jobs.report, jobs.render)
    assert [(job, state) for job, state, _ in jobs.reported] == [(1, "done")]
    assert jobs.rendered == [{"queue-worker": 20 * GIB}]
    assert daemon.comfyui.posts


def test_a_job_waits_until_another_lease_is_given_back(work, daemon: InThread):
    rendering(daemon)
    jobs = Queue({"id": 1, "needs": "8GiB"}, daemon=daemon)
    working = threading.Thread(target=work, args=(jobs.jobs, jobs.report, jobs.render))
    with VramClient(owner="tts") as other:
        with other.lease("8GiB"):
            working.start()
            daemon.until(lambda: daemon.daemon.admissions.book.line)
            assert promised(daemon) == {"tts": 8 * GIB}
            assert jobs.reported == []
        working.join(60)
    assert not working.is_alive()
    assert jobs.reported == [(1, "done", {"result": "image 1", "leak": None, **CARD})]
    assert jobs.rendered == [{"queue-worker": 8 * GIB}]


def test_a_job_at_the_hard_limit_fails_before_it_allocates(work, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VRAM_SOFT_LIMIT", "8GiB")
    monkeypatch.setenv("VRAM_HARD_LIMIT", "8.2GiB")
    with InThread() as daemon:
        jobs = Queue({"id": 1, "needs": "1GiB"}, daemon=daemon)
        work(jobs.jobs, jobs.report, jobs.render)
        assert promised(daemon) == {}
    ((_, state, details),) = jobs.reported
    assert state == "failed"
    assert "hard limit" in details["error"]
    assert "before decoding" in details["error"]
    assert jobs.rendered == []


def test_jobs_are_done_without_a_daemon_too_and_that_is_said_once(work):
    jobs = Queue({"id": 1, "needs": "4GiB"}, {"id": 2, "needs": "100GiB"})
    with pytest.warns(ManagerAwayWarning) as said:
        work(jobs.jobs, jobs.report, jobs.render)
    unknown = dict.fromkeys(CARD)
    assert jobs.reported == [
        (1, "done", {"result": "image 1", "leak": None, **unknown}),
        (2, "done", {"result": "image 2", "leak": None, **unknown}),
    ]
    assert len(said) == 1
