"""A child process that edits, as the parent sees it: started, fed, watched and replaced."""

import asyncio
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import SimpleQueue
from socket import socketpair
from threading import Thread
from typing import Any, Protocol

from varedit_runtime.editing.results import EditResult
from varedit_runtime.errors import BackendError, reason
from varedit_serve.editing.messages import BEAT, Opening, Order, Ready

# -P: modules are not looked for in the working folder, which others may write to.
COMMAND = (sys.executable, "-P", "-m", "varedit_serve.editing.worker")
SILENT = 15.0  # seconds without a message after which a process is taken for stopped
SILENT_LOADING = 120.0  # while it loads, when a library may keep Python from running
LEAST_TIME, TIMES = 20.0, 10  # see `patience`
LONGEST_PAUSE = 60.0  # seconds between attempts to start

_log = logging.getLogger(__name__)


def patience(facts: Ready, pictures: int) -> float:
    """Return the seconds that a batch may take before its process is taken for stuck."""
    return max(LEAST_TIME, TIMES * facts.seconds * pictures)


class ChildDiedError(Exception):
    """The process ended before it had edited a batch."""


class BatchFailedError(Exception):
    """The editor failed at a batch; the process goes on. own: whether an edit is at fault."""

    def __init__(self, text: str, own: bool = False) -> None:
        super().__init__(text)
        self.own = own


@dataclass
class _Batch:
    number: int
    patience: float  # seconds that it may still take
    done: "asyncio.Future[list[EditResult]]"
    on_partial: Callable[[int, int, Any], None]


class _Process:
    """One process, with a thread that reads what it sends and one that writes to it."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        on_message: Callable[..., None],
    ) -> None:
        """environment: variables that it has besides those of this process.

        on_message: called in the event loop with each message; with ("died",) at the end.
        """
        ours, theirs = socketpair()
        with ours, theirs:
            number = theirs.fileno()
            # A group of its own: Ctrl-C in a terminal is the parent's alone.
            self._popen = subprocess.Popen(
                [*command, str(number)],
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                pass_fds=[number],
                process_group=0,
            )
            self._connection = Connection(ours.detach())
        self._outbox = SimpleQueue[tuple[Any, ...] | None]()
        self._loop, self._on_message = asyncio.get_running_loop(), on_message
        for work in (self._read, self._write):
            Thread(target=work, daemon=True).start()

    @property
    def pid(self) -> int:
        return self._popen.pid

    def send(self, *message: Any) -> None:
        """Send a message, in another thread: a process that is stuck does not read."""
        self._outbox.put(message)

    def kill(self) -> None:
        """End the process at once."""
        self._popen.kill()

    def _read(self) -> None:
        with suppress(Exception):  # the socket's end, or what is no message
            while True:
                self._tell(self._connection.recv())
        self.kill()
        self._popen.wait()
        self._outbox.put(None)
        self._tell(("died",))

    def _write(self) -> None:
        with suppress(OSError):
            while (message := self._outbox.get()) is not None:
                self._connection.send(message)

    def _tell(self, message: tuple[Any, ...]) -> None:
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._on_message, message)


class Listener(Protocol):
    """Learns what becomes of children.

    facts: what the last child that became ready told of its editor; None before the first one.
    """

    facts: Ready | None

    def on_ready(self, facts: Ready) -> None:
        """Set `facts`."""

    def on_restart(self, why: str) -> None:
        """Learn why a process is replaced: died, silent, stuck, failed or unfit."""


class Child:
    """Keeps a process running that edits one batch after the other.

    ready: whether the process can edit now.
    """

    def __init__(
        self,
        opening: Opening,
        listener: Listener,
        command: Sequence[str] = COMMAND,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """environment: variables of the process besides those of this one."""
        self._opening, self._listener = opening, listener
        self._command, self._environment = command, environment or {}
        self._process: _Process | None = None
        self._changed = asyncio.Event()
        self._batch: _Batch | None = None
        self._numbers, self._patience, self._why = 0, SILENT, ""
        self.ready = False

    @property
    def pid(self) -> int | None:
        """The process's number, None between two processes."""
        return self._process.pid if self._process else None

    async def run(self) -> None:
        """Keep a process running.

        Raises BackendError if the bundle cannot be opened and no child has ever been ready.
        """
        pause = 1.0
        try:
            while True:
                served = await self._run_one()
                why, _, told = (self._why or "died").partition(": ")
                if why == "unfit" and self._listener.facts is None:
                    raise BackendError(told)
                _log.error("the editing process is replaced: %s", self._why or "it died")
                self._listener.on_restart(why)
                pause = 1.0 if served else min(2 * pause, LONGEST_PAUSE)
                if not served:
                    await asyncio.sleep(pause)
        finally:
            self.end()

    def replace(self, why: str) -> None:
        """Have the process replaced, which can edit but may be damaged or short of memory."""
        self.ready, self._why = False, why
        self._changed.set()

    def end(self) -> None:
        """End the process at once, whatever it does."""
        if self._process is not None:
            self._process.kill()

    async def _run_one(self) -> bool:
        """Start a process and watch it until it has died; return whether it was ever ready."""
        self._patience, self._why = SILENT_LOADING, ""
        try:
            process = self._process = _Process(self._command, self._environment, self._hear)
        except OSError as error:  # too many files are open, or memory is short
            self._why = f"unfit: no process can be started ({reason(error)})"
            return False
        process.send("open", self._opening)
        served = False
        while self._process is not None:
            served = served or self.ready
            if self._why:
                process.kill()
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), BEAT)
            except TimeoutError:
                self._lose_patience()
        return served

    def _lose_patience(self) -> None:
        """Count a beat; no clock is asked, which goes on while a whole machine sleeps."""
        self._patience -= BEAT
        if self._patience < 0:
            self._why = self._why or "silent"
        elif self._batch is not None:
            self._batch.patience -= BEAT
            if self._batch.patience < 0:
                self._why = self._why or "stuck"

    def _hear(self, message: tuple[Any, ...]) -> None:
        """Take a message of the process."""
        self._patience = SILENT if self.ready else SILENT_LOADING
        match message:
            case ("ready", facts):
                self.ready, self._patience = True, SILENT
                _log.info("ready: an edit takes %.2f s on %s", facts.seconds, facts.provider)
                self._listener.on_ready(facts)
            case ("unfit", text):
                self._why = f"unfit: {text}"
            case ("died",):
                self.ready, self._process = False, None
                if self._batch is not None:
                    self._finish(ChildDiedError())
            case ("partial", number, *rest) if self._batch and self._batch.number == number:
                self._batch.on_partial(*rest)
            case ("edited", number, results) if self._batch and self._batch.number == number:
                self._finish(results)
            case ("failed", number, *why) if self._batch and self._batch.number == number:
                self._finish(BatchFailedError(*why))
        if message[0] in ("ready", "unfit", "died"):
            self._changed.set()

    def _finish(self, outcome: "list[EditResult] | Exception") -> None:
        assert self._batch is not None
        batch, self._batch = self._batch, None
        if batch.done.cancelled():
            return
        if isinstance(outcome, Exception):
            batch.done.set_exception(outcome)
        else:
            batch.done.set_result(outcome)

    async def edit(
        self, orders: list[Order], on_partial: Callable[[int, int, Any], None]
    ) -> list[EditResult]:
        """Edit a batch; on_partial gets place, index and picture of previews.

        Raises ChildDiedError or BatchFailedError.
        """
        facts = self._listener.facts
        assert facts is not None and self._process is not None and self._batch is None
        self._numbers += 1
        done = asyncio.get_running_loop().create_future()
        batch = self._batch = _Batch(self._numbers, patience(facts, len(orders)), done, on_partial)
        self._process.send("edit", batch.number, orders)
        return await batch.done

    def cancel(self) -> None:
        """End the batch that is edited, of which nobody waits for any picture."""
        if self._batch is not None and self._process is not None:
            self._process.send("cancel", self._batch.number)
