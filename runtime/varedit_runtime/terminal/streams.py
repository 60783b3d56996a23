"""Standard streams that a command can write to wherever they lead, and whatever the text."""

import codecs
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO, cast

from varedit_runtime.errors import VareditError

STREAM = "-"  # the argument that means standard input or output

_AS_IT_CAN = "varedit-as-it-can"


class OutputError(VareditError):
    """Standard output that cannot be written: it is full, closed, or nobody reads it any more."""


@contextmanager
def dependable_streams() -> Iterator[None]:
    """Replace stdout and stderr within the block.

    A failing write to stdout raises OutputError; what stderr cannot take is dropped. Characters
    that an encoding lacks are escaped, and names of files that are not text keep their bytes.
    """
    _occupy_descriptors()
    stdout = _Stream(sys.stdout or _opened(1), _raise)
    stderr = _Stream(sys.stderr or _opened(2), lambda error: None)
    with redirect_stdout(cast(TextIO, stdout)), redirect_stderr(cast(TextIO, stderr)):
        yield


class _Stream:
    """A stream that, once a write has failed, hands the error to a function at every write."""

    def __init__(self, stream: Any, failed: Callable[[OSError], None]) -> None:
        self._stream, self._failed = stream, failed
        self._error: OSError | None = None
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors=_AS_IT_CAN)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @property
    def buffer(self) -> "_Stream":
        return _Stream(self._stream.buffer, self._failed)

    @property
    def encoding(self) -> str:
        # click would take ASCII for a mistake, and write UTF-8 to the buffer instead.
        name = codecs.lookup(self._stream.encoding or "utf-8").name
        return "latin-1" if name == "ascii" else name

    def write(self, text: str | bytes) -> int:
        self._do(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._do(self._stream.flush)

    def _do(self, work: Callable[[], object]) -> None:
        if self._error is None:
            try:
                work()
            except OSError as error:
                self._error = error
                self._silence()
        if self._error is not None:
            self._failed(self._error)

    def _silence(self) -> None:
        """Let the descriptor lead nowhere: Python flushes once more at the end, and would fail."""
        with suppress(OSError, ValueError):  # some streams have none
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


def _opened(descriptor: int) -> TextIO:
    return os.fdopen(descriptor, "w", closefd=False)


def _raise(error: OSError) -> None:
    raise OutputError(f"the output cannot be written: {error.strerror}") from error


def _occupy_descriptors() -> None:
    """Open what a shell closed, such as by `2>&-`, so that no other file gets its number.

    Libraries would write their messages into that file. Writing to these fails, as it would have.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDONLY)  # gets the lowest number that is free


def _as_it_can(error: UnicodeError) -> tuple[str | bytes, int]:
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.backslashreplace_errors(error)


codecs.register_error(_AS_IT_CAN, _as_it_can)
