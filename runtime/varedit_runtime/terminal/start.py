"""Start a command so that Ctrl-C ends it with one line from the beginning.

Python and what a command imports first take tenths of a second. This module imports next to
nothing, and ends the process at once on a signal until the command handles signals itself.
"""

import os
import signal
from importlib import import_module
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def varedit_run() -> None:
    """Run the `varedit-run` command."""
    _start("varedit_runtime.cli")


def varedit_export() -> None:
    """Run the `varedit-export` command."""
    # By name: signals are handled before any module of that package is imported.
    _start("varedit_export.cli")


def varedit_serve() -> None:
    """Run the `varedit-serve` command."""
    _start("varedit_serve.cli")


def _start(module: str) -> None:
    end_on_signals()
    try:
        import_module(module).main()
    except SystemExit as ended:
        if ended.code in [128 + number for number in SIGNALS]:
            # All is cleaned up and said: wait for no thread that computes what nobody will read.
            os._exit(ended.code)
        raise


def end_on_signals() -> None:
    """End the process with one line when a signal arrives, until a command handles signals."""
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as in a shell's background
            signal.signal(number, _end)


def _end(number: int, _: FrameType | None) -> None:
    try:
        os.write(2, b"Interrupted.\n")
    finally:  # nothing has been made that would have to be removed
        os._exit(128 + number)
