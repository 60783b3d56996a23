"""The program of the child process: it holds the editor, and edits what the parent sends.

`messages.py` says what that is; the number of the socket is the only argument. The child ends when
the parent does, whatever it is computing: its socket then closes.
"""

import ctypes
import os
import pickle
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any

from PIL import Image

from varedit_runtime import EditHandle, Editor
from varedit_runtime.editing.results import Progress
from varedit_runtime.errors import EditCancelled, NoPictureError, VareditError, reason
from varedit_serve.editing.messages import BEAT, Opening, Order, Ready

_PR_SET_PDEATHSIG = 1


class Worker:
    """Edits batches. connection: to the parent."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._sending = connection, Lock()
        self._inbox = SimpleQueue[tuple[Any, ...]]()
        self._handles: dict[int, EditHandle] = {}

    def run(self) -> None:
        """Open an editor and edit, until the parent closes the connection."""
        Thread(target=self._receive, daemon=True).start()
        Thread(target=self._beat, daemon=True).start()
        _, opening = self._inbox.get()
        try:
            editor, ready = opened(opening)
        except (VareditError, MemoryError, OSError) as error:
            self._send("unfit", reason(error))
            return
        self._send("ready", ready)
        while True:
            _, number, orders = self._inbox.get()
            self._edit(editor, number, orders)

    def _edit(self, editor: Editor, number: int, orders: list[Order]) -> None:
        def tell(kind: str, *told: Any) -> None:
            self._send(kind, number, *told)

        try:
            edit_orders(editor, orders, self._handles[number], tell)
        finally:
            del self._handles[number]

    def _send(self, *message: Any) -> None:
        with self._sending:
            self._connection.send(message)

    def _receive(self) -> None:
        with _end_of_process():
            while True:
                message = self._connection.recv()
                if message[0] == "cancel":
                    with suppress(KeyError):  # it is done already
                        self._handles[message[1]].cancel()
                    continue
                if message[0] == "edit":
                    self._handles[message[1]] = EditHandle()
                self._inbox.put(message)

    def _beat(self) -> None:
        with _end_of_process():
            while True:
                self._send("alive")
                time.sleep(BEAT)


@contextmanager
def _end_of_process() -> Iterator[None]:
    """End the process where the parent has gone, or a thread fails, native code or not."""
    try:
        yield
    finally:
        os._exit(1)


def edit_orders(
    editor: Editor, orders: list[Order], handle: EditHandle, tell: Callable[..., None]
) -> None:
    """Edit a batch.

    tell: called with "partial", place, index and image of previews, then with "edited" and the
    results, or "failed", why, and whether an edit is at fault; why is "cancelled" if the handle
    ended the edit.
    """

    def show(progress: Progress) -> None:
        for place in progress.pictures:
            if progress.scale in (scales := orders[place].previews):
                index = scales.index(progress.scale)
                tell("partial", place, index, progress.preview(place))

    listener = show if any(one.previews for one in orders) else None
    try:
        edits = [replace(pickle.loads(one.prepared), seed=one.seed) for one in orders]
        tell("edited", editor.edit_prepared(edits, on_scale=listener, handle=handle))
    except Exception as error:  # a traceback on stderr would show paths
        text = "cancelled" if isinstance(error, EditCancelled) else reason(error)
        tell("failed", text, isinstance(error, NoPictureError))


def opened(opening: Opening) -> tuple[Editor, Ready]:
    """Open an editor, and edit once, so that the first request finds all warm, and measure that."""
    editor = Editor.open(**vars(opening))
    edit = editor.prepare(Image.new("RGB", (64, 64), "white"), "add a red circle", seed=0)
    seconds = []
    for _ in range(2):
        editor.forget()
        start = time.monotonic()
        editor.edit_prepared([edit])
        seconds.append(time.monotonic() - start)
    batch = editor.variant.batch
    # On a CPU a batch takes as long as its pictures one by one, and the first would wait for all.
    usual = 1 if editor.provider == "cpu" else batch
    return editor, Ready(editor.provider, editor.grouping, batch, min(seconds), usual)


def main() -> None:
    """Run the child's program."""
    # Ctrl-C and a service manager reach all processes; the parent alone says when this one ends.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":  # also ends with its parent while it is stopped, or stuck in C
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    warnings.simplefilter("ignore")  # EditWarnings are in the results
    try:
        Worker(Connection(int(sys.argv[1]))).run()
    except Exception as error:  # its text, and a traceback, could tell what a client sent
        sys.exit(f"the editing process failed: {type(error).__name__}")


if __name__ == "__main__":
    main()
