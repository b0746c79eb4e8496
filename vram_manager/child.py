"""A command that is run for somebody: signals go to it, and its exit status is ours."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Final

_PASSED_ON: Final = (
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGINT,
    signal.SIGQUIT,
)
# A terminal sends these two to the command itself.
_FROM_TERMINAL: Final = (signal.SIGINT, signal.SIGQUIT)


class CannotRun(Exception):
    """The command was not started; `status` is what a shell ends with then: 127 not found, 126 anything else."""

    def __init__(self, name: str, error: OSError) -> None:
        super().__init__(f"{name}: {error.strerror}")
        self.status = 127 if isinstance(error, FileNotFoundError) else 126


def run(command: Sequence[str], *, pass_fds: Sequence[int] = (), started: Callable[[int], object] | None = None) -> int:
    """The command's exit status, as a shell counts: 128 + N when signal N ended it.

    `started` is told its pid. Raises CannotRun. Only the main thread may call this.
    """
    early: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, _: FrameType | None) -> None:
        if child is None:
            early.append(number)
        else:
            child.send_signal(number)

    terminal = sys.stdin is not None and not sys.stdin.closed and sys.stdin.isatty()
    handlers = {number: _nothing if terminal and number in _FROM_TERMINAL else pass_on for number in _PASSED_ON}
    before = {number: signal.getsignal(number) for number in _PASSED_ON}
    # A command inherits what is ignored, and gets as the default what is handled. So nothing is set to be ignored here,
    # and what somebody has us ignore (nohup) is handled only once the command has inherited that.
    ignored = [number for number in _PASSED_ON if before[number] is signal.SIG_IGN]
    try:
        for number in _PASSED_ON:
            if number not in ignored:
                signal.signal(number, handlers[number])
        try:
            child = subprocess.Popen(command, pass_fds=pass_fds)
        except OSError as error:
            raise CannotRun(command[0], error) from error
        for number in ignored:
            signal.signal(number, handlers[number])
        for came in early:
            child.send_signal(came)
        if started is not None:
            started(child.pid)
        status = child.wait()
    finally:
        for number in _PASSED_ON:
            signal.signal(number, before[number])
    return 128 - status if status < 0 else status


def _nothing(_: int, __: FrameType | None) -> None:
    """Not SIG_IGN, which the command would inherit."""
