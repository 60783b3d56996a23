"""Ctrl-C while native code runs."""

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def stopped_by_interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop`, in another thread, as soon as Ctrl-C is pressed while the block runs.

    Python raises KeyboardInterrupt only when native code returns, which may take minutes for a
    graph. Signals reach only the main thread: in other threads, and if the program handles or
    watches its signals itself (as asyncio does), the block just runs.
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
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return False
    previous = signal.set_wakeup_fd(telling.fileno(), warn_on_full_buffer=False)
    if previous == -1:
        return True
    signal.set_wakeup_fd(previous)
    return False


def _watch(told: socket.socket, stop: Callable[[], None]) -> None:
    """Read the numbers of arriving signals until the other end closes; call stop on SIGINT."""
    while numbers := told.recv(1):
        if numbers[0] == signal.SIGINT:
            stop()
