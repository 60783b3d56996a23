"""End what runs when a signal arrives, native code too."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from varedit_runtime.terminal.start import SIGNALS


class _Exit:
    """A handler of signals that ends a program as `sys.exit` does, so that its blocks clean up."""

    def __init__(self, arrived: list[int]) -> None:
        self._arrived = arrived

    def __call__(self, number: int, _: FrameType | None) -> None:
        self._arrived.append(number)
        raise SystemExit(128 + number)


@contextmanager
def exit_on_signals(arrived: list[int]) -> Iterator[None]:
    """Raise SystemExit when Ctrl-C is pressed or SIGTERM comes while the block runs.

    arrived: gets the signals' numbers; libraries may turn the exception into another one. For the
    main thread; signals that are ignored stay so.
    """
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    handled = [number for number in SIGNALS if handlers[number] != signal.SIG_IGN]
    hook = sys.unraisablehook

    def again(lost: "sys.UnraisableHookArgs") -> None:
        """Send a signal again whose exception was lost, such as in a destructor."""
        if arrived and isinstance(lost.exc_value, SystemExit):
            timer = threading.Timer(0.01, os.kill, (os.getpid(), arrived[-1]))
            timer.daemon = True
            timer.start()
        else:
            hook(lost)

    try:
        sys.unraisablehook = again
        for number in handled:
            signal.signal(number, _Exit(arrived))
        yield
    finally:
        for number in handled:
            signal.signal(number, handlers[number])
        sys.unraisablehook = hook


@contextmanager
def stopped_by_interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop`, in another thread, as soon as Ctrl-C is pressed while the block runs.

    Python raises KeyboardInterrupt only when native code returns, which may take minutes for a
    graph. Signals reach only the main thread: in other threads, and if the program handles or
    watches its signals itself (as asyncio does), the block just runs. Within `exit_on_signals`,
    SIGTERM stops it too.
    """
    told, telling = socket.socketpair()
    with told, telling:
        telling.setblocking(False)
        if not _take_wakeup(telling):
            yield
            return
        watcher = threading.Thread(target=_watch, args=(told, stop), daemon=True)
        try:
            watcher.start()
            yield
        finally:
            signal.set_wakeup_fd(-1)
            telling.shutdown(socket.SHUT_WR)
            if watcher.ident is not None:  # Ctrl-C may come before it was started
                watcher.join()


def _take_wakeup(telling: socket.socket) -> bool:
    """Have signals written to the socket, unless the program handles them; return whether."""
    if threading.current_thread() is not threading.main_thread():
        return False
    if not _ends(signal.SIGINT):
        return False
    previous = signal.set_wakeup_fd(telling.fileno(), warn_on_full_buffer=False)
    if previous == -1:
        return True
    signal.set_wakeup_fd(previous)
    return False


def _watch(told: socket.socket, stop: Callable[[], None]) -> None:
    """Read the numbers of arriving signals until the other end closes; call stop if one ends us."""
    while numbers := told.recv(1):
        if _ends(numbers[0]):
            stop()


def _ends(number: int) -> bool:
    """Return whether a signal ends the program, instead of being handled by it."""
    handler = signal.getsignal(number)
    return handler is signal.default_int_handler or isinstance(handler, _Exit)
