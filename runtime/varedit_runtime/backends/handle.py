"""End an edit from outside: by a call in any thread, or at a time that was set before."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import TIMEOUT_MAX, RLock, Timer
from time import monotonic
from typing import Protocol

from varedit_runtime.errors import BackendError, ConfigError, DeadlineExceeded, EditCancelled
from varedit_runtime.values import checked

PATIENCE = 0.02  # seconds after which an edit that waits for its turn looks whether it was ended


class EditHandle:
    """Ends an edit that it is given to: `Editor.edit(..., handle=handle)`.

    One handle may serve several edits, at once or one after the other: it ends all of them.
    """

    def __init__(self, deadline: float | None = None) -> None:
        """deadline: when edits end, in seconds of `time.monotonic`. Raises ConfigError."""
        self.deadline: float | None = checked("deadline", deadline, float | None)
        if self.deadline is not None and not abs(self.deadline) < float("inf"):
            raise ConfigError("deadline is not finite; give a time of time.monotonic(), or None")
        self._cancelled = self._expired = False
        self._lock = RLock()  # a signal's handler may cancel what the same thread runs
        self._stops: list[Callable[[], None]] = []

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled

    def cancel(self) -> None:
        """End edits before their next stage; what ONNX Runtime runs ends at its next node.

        `Editor.edit` then raises EditCancelled. Any thread may call this, any number of times.
        """
        with self._lock:
            self._cancelled = True
            for stop in self._stops:
                stop()

    def check(self) -> None:
        """Raise EditCancelled if it was cancelled, DeadlineExceeded if the deadline is over."""
        if self._cancelled:
            raise EditCancelled("the edit was cancelled")
        self._expired |= self.deadline is not None and monotonic() >= self.deadline
        if self._expired:
            raise DeadlineExceeded("the edit's deadline is over: nothing more is computed")

    @contextmanager
    def stopping(self, stop: Callable[[], None]) -> Iterator[None]:
        """Call `stop`, in any thread, if edits are to end while the block runs, or before."""
        timer = None
        with self._lock:
            self._stops.append(stop)
            if self._cancelled:
                stop()
        try:
            if self.deadline is not None:
                left = min(max(0, self.deadline - monotonic()), TIMEOUT_MAX)
                timer = Timer(left, self._expire, (stop,))
                timer.daemon = True
                timer.start()
            yield
        finally:
            if timer is not None:
                timer.cancel()
            with self._lock:
                self._stops.remove(stop)

    def _expire(self, stop: Callable[[], None]) -> None:
        self._expired = True  # whatever the clock says by then
        stop()

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """Let what runs in the block be ended: `stoppable` finds this handle there.

        What fails because it was ended raises EditCancelled.
        """
        token = _HEEDED.set(self)
        try:
            self.check()
            yield
        except BackendError as error:
            try:
                self.check()
            except EditCancelled as ended:
                raise ended from error
            raise
        finally:
            _HEEDED.reset(token)

    @contextmanager
    def taking(self, lock: "Lock") -> Iterator[None]:
        """Hold a lock while the block runs. Raises EditCancelled if the wait for it was ended."""
        while not lock.acquire(timeout=PATIENCE):
            self.check()
        try:
            yield
        finally:
            lock.release()


class Lock(Protocol):
    """A lock of `threading`."""

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool: ...

    def release(self) -> None: ...


_HEEDED: ContextVar[EditHandle | None] = ContextVar("heeded", default=None)


def heeded() -> EditHandle | None:
    """Return the handle that can end the edit that this thread makes, if any."""
    return _HEEDED.get()


@contextmanager
def stoppable(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` if the edit that this thread makes is ended while the block runs."""
    handle = heeded()
    if handle is None:
        yield
    else:
        with handle.stopping(stop):
            yield
