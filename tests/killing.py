"""Processes that are killed wherever they use the file system."""

import os
import signal
import sys
from collections.abc import Callable

import pytest

# Python 3.12 warns of other threads that a library started; the child uses none of theirs.
FORKS = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


LIMIT = 120  # seconds, after which a process that does not end is killed


def killed_at(step: int, action: Callable[[], object]) -> bool:
    """Run in a process of its own, killed at its step-th use of the file system.

    Returns whether it was; False when it ended before that.
    """
    left = step

    def count() -> None:
        nonlocal left
        left -= 1
        if left == -1:
            os.kill(os.getpid(), signal.SIGKILL)

    status = _status(action, count, lambda: None)
    assert status in (0, -signal.SIGKILL)
    return status != 0


def uses(action: Callable[[], object]) -> int:
    """Run in a process of its own; return how often it uses the file system."""
    reading, writing = os.pipe()
    counted = 0

    def count() -> None:
        nonlocal counted
        counted += 1

    assert _status(action, count, lambda: os.write(writing, str(counted).encode())) == 0
    found = os.read(reading, 20)
    for end in (reading, writing):
        os.close(end)
    return int(found)


def _status(
    action: Callable[[], object], count: Callable[[], None], end: Callable[[], object]
) -> int:
    """Run an action in a process of its own, and `count` before each use of the file system.

    Returns its exit status, after `end`; minus the signal that killed it.
    """
    child = os.fork()
    if child == 0:
        signal.alarm(LIMIT)

        def hook(event: str, _: object) -> None:
            if event == "open" or event.startswith(("os.", "shutil.", "fcntl.")):
                count()

        try:
            sys.addaudithook(hook)
            action()
            end()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
