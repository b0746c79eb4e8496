"""Who is there, who descends from whom, who ends: on a /proc made up for the test, and on real children."""

from __future__ import annotations

import asyncio
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vram_manager.processes import Processes

# The kernel gives no number as large as this one: pid_max is at most 2**22.
NOBODY = 2**22
PATIENCE = 20.0


class Proc:
    """A /proc with the processes of the test."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.processes = Processes(root)

    def add(
        self, pid: int, parent: int = 1, *, name: str = "python", state: str = "S", started: int = 4711, ns: str = ""
    ) -> None:
        directory = self.root / str(pid)
        directory.mkdir()
        between = " ".join(str(field) for field in range(5, 22))
        (directory / "stat").write_text(f"{pid} ({name}) {state} {parent} {between} {started} 23 24\n")
        (directory / "status").write_text(f"Name:\t{name}\nPPid:\t{parent}\nNSpid:\t{ns or pid}\nThreads:\t1\n")


@pytest.fixture
def proc(tmp_path: Path) -> Proc:
    return Proc(tmp_path)


Spawn = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Starts a child that lives until the test kills it or is over."""
    children: list[subprocess.Popen[str]] = []

    def start(*command: str) -> subprocess.Popen[str]:
        child = subprocess.Popen(command or ("sleep", "1000"), stdout=subprocess.PIPE, text=True)
        children.append(child)
        return child

    yield start
    for child in children:
        child.kill()
        child.communicate()


def end(child: subprocess.Popen[str]) -> None:
    """The child is dead, and nobody has fetched it yet."""
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)


# When it began.


@pytest.mark.parametrize(
    "name", ["python", "", "tmux: server", "a (b) c", "x) R 1 1", ") S 2 3 4 5 6 7", "ünï", "a\nb"], ids=repr
)
def test_the_start_is_read_whatever_the_process_is_called(proc: Proc, name: str):
    proc.add(7, name=name, started=987654)
    assert proc.processes.started(7) == "987654"


def test_a_name_that_is_no_utf8_hides_no_process(proc: Proc):
    proc.add(7, started=99)
    stat = proc.root / "7" / "stat"
    stat.write_bytes(stat.read_bytes().replace(b"python", b"\xff\xfe (\x80"))
    assert proc.processes.started(7) == "99"


@pytest.mark.parametrize(("state", "there"), [("R", True), ("S", True), ("D", True), ("T", True), ("Z", False)])
def test_what_is_dead_and_not_yet_fetched_is_not_there(proc: Proc, state: str, there: bool):
    proc.add(7, state=state)
    assert (proc.processes.started(7) is not None) is there


@pytest.mark.parametrize("said", ["", "7 (python) S", "nonsense"], ids=repr)
def test_a_process_that_vanishes_while_it_is_read_is_not_there(proc: Proc, said: str):
    proc.add(7)
    (proc.root / "7" / "stat").write_text(said)
    assert proc.processes.started(7) is None
    assert proc.processes.families([1, 7], [7]) == {1: {1}, 7: {7}}


def test_nobody_has_not_begun(proc: Proc):
    assert proc.processes.started(8) is None


# Under which number it is seen.


def test_a_peer_among_us_names_any_process_that_lives(proc: Proc):
    proc.add(7)
    proc.add(8)
    proc.add(9, state="Z")
    assert proc.processes.seen_as(7, 7) == 7
    assert proc.processes.seen_as(7, 8) == 8
    assert proc.processes.seen_as(7, 9) is None
    assert proc.processes.seen_as(7, 10) is None


def test_a_peer_in_a_container_is_seen_under_our_number_for_it(proc: Proc):
    proc.add(31_000, ns="31000\t412\t1")
    assert proc.processes.seen_as(31_000, 1) == 31_000


@pytest.mark.parametrize("named", [412, 7, 31_000])
def test_a_number_that_a_peer_in_a_container_gives_to_another_is_not_taken_for_one_of_ours(proc: Proc, named: int):
    proc.add(31_000, ns="31000\t412\t1")
    proc.add(7)
    proc.add(412)
    assert proc.processes.seen_as(31_000, named) is None


@pytest.mark.parametrize("peer", [None, 0], ids=["over TCP", "outside of our namespace"])
def test_of_a_peer_that_cannot_be_seen_no_process_can_be(proc: Proc, peer: int | None):
    proc.add(7)
    assert proc.processes.seen_as(peer, 7) is None


@pytest.mark.parametrize("status", [None, "", "Name:\tx\n", "NSpid:\tx\n"], ids=repr)
def test_a_peer_whose_numbers_are_not_told_is_not_guessed_at(proc: Proc, status: str | None):
    proc.add(7)
    if status is None:
        (proc.root / "7" / "status").unlink()
    else:
        (proc.root / "7" / "status").write_text(status)
    assert proc.processes.seen_as(7, 7) is None


# Who descends from whom.


def test_a_family_is_the_process_its_children_and_theirs(proc: Proc):
    for pid, parent in ((10, 1), (11, 10), (12, 11), (20, 1), (21, 20)):
        proc.add(pid, parent)
    assert proc.processes.families([10, 20], [10, 11, 12, 20, 21, 99]) == {10: {10, 11, 12}, 20: {20, 21}}


def test_a_process_belongs_to_each_ancestor_that_is_asked_for(proc: Proc):
    proc.add(10)
    proc.add(11, 10)
    proc.add(12, 11)
    assert proc.processes.families([10, 11], [12]) == {10: {10, 12}, 11: {11, 12}}


def test_a_child_whose_parent_vanished_belongs_to_nobody(proc: Proc):
    proc.add(10)
    proc.add(12, 11)
    assert proc.processes.families([10], [12]) == {10: {10}}


def test_parents_that_lead_in_circles_end(proc: Proc):
    proc.add(10, 11)
    proc.add(11, 10)
    proc.add(12, 12)
    assert proc.processes.families([10, 99], [10, 11, 12]) == {10: {10, 11}, 99: {99}}


def test_without_roots_nobody_is_looked_at(proc: Proc):
    assert proc.processes.families([], [10]) == {}


# Real ones.


def test_a_child_is_there_until_it_ends_even_before_it_is_fetched(spawn: Spawn):
    processes, child = Processes(), spawn()
    assert processes.started(child.pid) is not None
    assert processes.seen_as(os.getpid(), child.pid) == child.pid
    end(child)
    assert processes.started(child.pid) is None
    assert processes.seen_as(os.getpid(), child.pid) is None


def test_a_grandchild_is_of_the_family(spawn: Spawn):
    child = spawn("sh", "-c", "sleep 1000 & echo $!; wait")
    assert child.stdout is not None
    grandchild = int(child.stdout.readline())
    try:
        found = Processes().families([os.getpid(), child.pid], [grandchild])
        assert found == {os.getpid(): {os.getpid(), grandchild}, child.pid: {child.pid, grandchild}}
    finally:
        os.kill(grandchild, 9)


def open_files() -> list[Path]:
    return sorted(Path("/proc/self/fd").iterdir())


@pytest.mark.asyncio
async def test_the_end_of_a_watched_process_is_told_once_and_nothing_is_left(spawn: Spawn):
    processes, child, told, over = Processes(), spawn(), [], asyncio.Event()
    before = open_files()
    processes.watch("lease-1", child.pid, lambda: (told.append(1), over.set()))
    child.kill()
    await asyncio.wait_for(over.wait(), PATIENCE)
    assert open_files() == before
    processes.unwatch("lease-1")
    assert told == [1]


@pytest.mark.asyncio
async def test_several_who_watch_one_process_are_all_told(spawn: Spawn):
    processes, child = Processes(), spawn()
    ends = {key: asyncio.Event() for key in ("lease-1", "lease-2", "lease-3")}
    for key, over in ends.items():
        processes.watch(key, child.pid, over.set)
    child.kill()
    for over in ends.values():
        await asyncio.wait_for(over.wait(), PATIENCE)


@pytest.mark.asyncio
async def test_who_no_longer_watches_is_not_told(spawn: Spawn):
    processes, child, told, over = Processes(), spawn(), [], asyncio.Event()
    processes.watch("lease-1", child.pid, lambda: told.append("lease-1"))
    processes.unwatch("lease-1")
    processes.unwatch("lease-1")
    # Its descriptor has the number of the one that was closed.
    processes.watch("lease-2", child.pid, over.set)
    child.kill()
    await asyncio.wait_for(over.wait(), PATIENCE)
    assert told == []


@pytest.mark.asyncio
async def test_watching_and_no_longer_leaves_no_descriptor_open():
    processes, before = Processes(), open_files()
    for number in range(100):
        processes.watch(f"lease-{number}", os.getpid(), lambda: None)
    assert len(open_files()) == len(before) + 100
    for number in range(100):
        processes.unwatch(f"lease-{number}")
    assert open_files() == before


@pytest.mark.asyncio
@pytest.mark.parametrize("fetched", [True, False])
async def test_an_end_before_the_watch_is_told_at_once(spawn: Spawn, fetched: bool):
    processes, child, over = Processes(), spawn(), asyncio.Event()
    end(child)
    before = open_files()
    processes.watch("lease-1", NOBODY if fetched else child.pid, over.set)
    assert not over.is_set(), "not inside of the call: the caller's book is not yet complete"
    await asyncio.wait_for(over.wait(), PATIENCE)
    assert open_files() == before


@pytest.mark.asyncio
async def test_what_cannot_be_watched_is_no_error_and_does_not_pass_for_gone():
    # A thread that is not its process's first has a number, and no end that could be watched.
    here, over = threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: (here.set(), over.wait()))
    thread.start()
    try:
        assert here.wait(PATIENCE)
        assert thread.native_id is not None
        processes, told, before = Processes(), [], open_files()
        processes.watch("lease-1", thread.native_id, lambda: told.append(1))
        await asyncio.sleep(0)
        processes.unwatch("lease-1")
        assert (told, open_files()) == ([], before)
    finally:
        over.set()
        thread.join()
