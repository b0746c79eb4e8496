"""The processes of this machine, as far as this one may see them: who is there, who descends from whom, who ends.

In a container without the host's pid namespace nearly nobody is to be seen; then leases end by their connection or
their time, and memory shows by what its owner says.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

# Deeper than any real chain of parents; a tree read while it changes must not lead in circles.
_MAX_DEPTH = 64


class Processes:
    """Looks into /proc and waits for ends; every look may find that the process is gone."""

    def __init__(self, proc_root: Path = Path("/proc")) -> None:
        self._root = proc_root
        self._watched: dict[str, int] = {}

    def started(self, pid: int) -> str | None:
        """When the process began, in the kernel's ticks: tells it from a later one with its number. None: not there."""
        fields = self._stat(pid)
        # Field 22 of proc(5); the name, which may hold spaces, is cut off before it. Z is dead and not yet fetched.
        return None if fields is None or fields[0] in ("Z", "X") else fields[19]

    def seen_as(self, peer_pid: int | None, named_pid: int) -> int | None:
        """The number under which this process sees the one that its peer calls `named_pid`; None: it does not.

        A peer in another pid namespace counts differently; the kernel tells the peer's own number in ours.
        """
        if not peer_pid:
            return None
        numbers = self._numbers(peer_pid)
        if len(numbers) == 1:
            return named_pid if self.started(named_pid) is not None else None
        return peer_pid if numbers and numbers[-1] == named_pid else None

    def families(self, roots: Iterable[int], pids: Iterable[int]) -> dict[int, frozenset[int]]:
        """Which of `pids` descend from each of `roots`, itself included."""
        wanted = set(roots)
        members: dict[int, set[int]] = {root: {root} for root in wanted}
        for pid in pids if wanted else ():
            ancestor: int | None = pid
            for _ in range(_MAX_DEPTH):
                if ancestor is None or ancestor <= 1:
                    break
                if ancestor in wanted:
                    members[ancestor].add(pid)
                ancestor = self._parent(ancestor)
        return {root: frozenset(found) for root, found in members.items()}

    def watch(self, key: str, pid: int, gone: Callable[[], None]) -> None:
        """Calls `gone` once the process has ended, until `unwatch(key)`. Needs pidfd_open (Linux 5.3)."""
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            asyncio.get_running_loop().call_soon(gone)
            return
        except OSError:
            return  # an old kernel or a strict sandbox: the lease's connection and its time remain
        self._watched[key] = descriptor
        asyncio.get_running_loop().add_reader(descriptor, self._ended, key, gone)

    def unwatch(self, key: str) -> None:
        descriptor = self._watched.pop(key, None)
        if descriptor is not None:
            asyncio.get_running_loop().remove_reader(descriptor)
            os.close(descriptor)

    def _ended(self, key: str, gone: Callable[[], None]) -> None:
        self.unwatch(key)
        gone()

    def _stat(self, pid: int) -> list[str] | None:
        try:
            text = (self._root / str(pid) / "stat").read_text(errors="replace")
        except OSError:
            return None
        fields = text.rpartition(")")[2].split()
        return fields if len(fields) > 19 else None

    def _parent(self, pid: int) -> int | None:
        fields = self._stat(pid)
        return None if fields is None else int(fields[1])

    def _numbers(self, pid: int) -> list[int]:
        """The process's number in each pid namespace from ours inwards."""
        with contextlib.suppress(OSError, ValueError):
            for line in (self._root / str(pid) / "status").read_text(errors="replace").splitlines():
                if line.startswith("NSpid:"):
                    return [int(number) for number in line.split()[1:]]
        return []
