"""Processes that are killed wherever they use the file system."""

import os
import signal
import sys
from collections.abc import Callable

import pytest

# Python 3.12 warns of other threads that a library started; the child uses none of theirs.
FORKS = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def killed_at(step: int, action: Callable[[], object]) -> bool:
    """Run in a process of its own, killed at its step-th use of the file system.

    Returns whether it was; False when it ended before that.
    """
    child = os.fork()
    if child == 0:
        left = step

        def count(event: str, _: object) -> None:
            nonlocal left
            if event == "open" or event.startswith(("os.", "shutil.", "fcntl.")):
                left -= 1
                if left == -1:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(count)
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0
