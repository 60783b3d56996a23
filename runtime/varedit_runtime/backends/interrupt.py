"""End what runs when a signal arrives or the edit is ended, native code too."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from varedit_runtime.backends.handle import stoppable
from varedit_runtime.errors import SignalArrived
from varedit_runtime.terminal.start import SIGNALS


class _Exit:
    """A handler of signals that ends a program by an exception, so that its blocks clean up."""

    def __init__(self, arrived: list[int]) -> None:
        self._arrived = arrived

    def __call__(self, number: int, _: FrameType | None) -> None:
        self._arrived.append(number)
        raise SignalArrived


@contextmanager
def exit_on_signals(arrived: list[int]) -> Iterator[None]:
    """Raise SignalArrived when Ctrl-C is pressed or SIGTERM comes while the block runs.

    arrived: gets the signals' numbers; libraries may turn the exception into another one. For the
    main thread; signals that are ignored stay so.
    """
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    handled = [number for number in SIGNALS if handlers[number] != signal.SIG_IGN]
    hook = sys.unraisablehook

    def again(lost: "sys.UnraisableHookArgs") -> None:
        """Send a signal again whose exception was lost, such as in a destructor."""
        if arrived and isinstance(lost.exc_value, SignalArrived):
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
def held_signals() -> Iterator[list[int]]:
    """Hold back Ctrl-C and SIGTERM while the block runs, as no exception may pass native frames.

    Yields a list that gets their numbers. After the block the first one is handled as it would have
    been. Nothing is held that Python does not handle, or in threads other than the main one.
    """
    arrived: list[int] = []
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    held = [number for number in SIGNALS if callable(handlers[number])]
    if threading.current_thread() is not threading.main_thread():
        held = []
    try:
        for number in held:
            signal.signal(number, lambda number, _: arrived.append(number))
        yield arrived
    finally:
        for number in held:
            signal.signal(number, handlers[number])
        if arrived:
            signal.raise_signal(arrived[0])


def run_stoppable(work: Callable[[], object], stop: Callable[[], None]) -> None:
    """Run native code; call `stop`, in another thread, as soon as the code is to end.

    It is to end when the edit's handle ends it, or when Ctrl-C is pressed. Python raises
    KeyboardInterrupt only when native code returns, which may take minutes for a graph. Signals
    reach only the main thread: in other threads, and if the program handles or watches its signals
    itself (as asyncio does), they end nothing. Within `exit_on_signals`, SIGTERM stops it too.
    """
    with stoppable(stop):
        _run_until_signal(work, stop)


def _run_until_signal(work: Callable[[], object], stop: Callable[[], None]) -> None:
    """Run native code; call `stop`, in another thread, as soon as a signal arrives that ends us.

    It is no context manager: a signal's exception would be raised where `__exit__` begins, which
    then would do nothing, and the next work could not be stopped.
    """
    told, telling = socket.socketpair()
    with told, telling:
        telling.setblocking(False)
        if not _take_wakeup(telling):
            work()
            return
        watcher = threading.Thread(target=_watch, args=(told, stop), daemon=True)
        try:
            watcher.start()
            work()
        finally:
            try:
                signal.set_wakeup_fd(-1)
            finally:  # a signal's exception may come here too
                telling.shutdown(socket.SHUT_WR)
                if watcher.ident is not None:  # Ctrl-C may come before it was started
                    watcher.join()


def _take_wakeup(telling: socket.socket) -> bool:
    """Have signals written to the socket, unless the program handles them; return whether."""
    if threading.current_thread() is not threading.main_thread():
        return False
    if not any(map(_ends, SIGNALS)):  # Ctrl-C is ignored in a shell's background
        return False
    previous = signal.set_wakeup_fd(telling.fileno(), warn_on_full_buffer=False)
    if previous == -1:
        return True
    signal.set_wakeup_fd(previous)
    return False


def _watch(told: socket.socket, stop: Callable[[], None]) -> None:
    """Read the numbers of arriving signals until the other end closes; call stop if one ends us."""
    with suppress(OSError):  # a second signal may close the socket while this waits
        while numbers := told.recv(1):
            if _ends(numbers[0]):
                stop()


def _ends(number: int) -> bool:
    """Return whether a signal ends the program, instead of being handled by it."""
    handler = signal.getsignal(number)
    return handler is signal.default_int_handler or isinstance(handler, _Exit)
