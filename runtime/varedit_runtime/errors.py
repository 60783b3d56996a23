"""The errors that this project raises on purpose; `str(error)` is one line for a person."""

import reprlib
from collections.abc import Iterator
from contextlib import contextmanager

LONGEST = 2000  # characters of a message
# What code of others may raise while it is imported or asked: a module may even end the program.
ANY_FAILURE = (Exception, SystemExit)

_CUT, _END = " [...] ", 700  # a longer one keeps its end, where advice stands


class SignalArrived(BaseException):
    """Ctrl-C or SIGTERM ends a command: no handler of failures may take it for one."""


class VareditError(Exception):
    """Base class of all errors below. Messages are made `printable`.

    argument: the argument of `prepare` or `edit` that is at fault, where one is.
    """

    argument: str | None = None

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message))


class ConfigError(VareditError, ValueError):
    """An unusable argument, such as a wrong size or an unknown name (known ones are listed)."""


class PictureError(VareditError):
    """A picture that cannot be read, used or written."""


class CheckpointError(VareditError):
    """Weights that cannot be read, or do not fit the model."""


class BundleError(VareditError):
    """A bundle that is missing, damaged, of another kind or version, or cannot be written."""


class TextError(VareditError):
    """An instruction that cannot be used, such as an empty or too long one."""


class BackendError(VareditError):
    """A backend that cannot run as asked: a provider is absent, a graph or engine cannot load."""


class NoPictureError(BackendError):
    """An edit whose arithmetic gave no picture; other edits are not affected."""


class EditorError(VareditError):
    """An editor, or a preview, that cannot be used now: closed, or copied by a fork."""


class EditCancelled(VareditError):
    """An edit that the caller ended; the editor can be used again."""


class DeadlineExceeded(EditCancelled):
    """An edit that its handle's deadline ended."""


class MissingExtraError(VareditError):
    """An optional package is not installed; the message gives the command that installs it."""


class EditWarning(UserWarning):
    """An edit that can be made, but will hardly be what is wanted; the message is one line."""


def printable(text: str) -> str:
    """Return text on one line of bounded length, without what a terminal obeys or cannot show."""
    line = " ".join(_cut(text).splitlines())
    if not line.isprintable():
        line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
    return _cut(line)


def _cut(text: str) -> str:
    long = len(text) > LONGEST
    return f"{text[: LONGEST - len(_CUT) - _END]}{_CUT}{text[-_END:]}" if long else text


def shown(value: object) -> str:
    """Return the start and end of a value's repr, for a message; its type's name if that fails."""
    try:
        return _SHORT.repr(value)
    except Exception:  # a caller's object may raise anything, and an int be too long to convert
        return f"of type {type(value).__name__}"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


def readable_size(count: int) -> str:
    """Return a number of bytes for a person to read."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.{0 if count >= 100 * size else 1}f} {unit}"
    return f"{count} bytes"


def one_line(error: object) -> str:
    """Return an error's text, or another one, `printable` and without repeated spaces."""
    try:
        text = str(error)
    except Exception:  # another library's error may not even have a text
        text = type(error).__name__
    return printable(" ".join(text.split()))


def reason(error: BaseException) -> str:
    """Return an error's text as `one_line` does; the name of its type if it has none."""
    return one_line(error) or type(error).__name__


@contextmanager
def one_of_many(what: str, place: int, count: int) -> Iterator[None]:
    """Say in an error of this project which of several things it is about; place is from 0."""
    try:
        yield
    except VareditError as error:
        if count > 1:
            error.args = (printable(f"{what} {place + 1} of {count}: {error}"),)
        raise


@contextmanager
def about(argument: str) -> Iterator[None]:
    """Name the argument that an error of this project is about, unless it has named one."""
    try:
        yield
    except VareditError as error:
        error.argument = error.argument or argument
        raise


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Wrap imports of packages that an extra such as `export` installs.

    Raises MissingExtraError, which names the extra, if a package is absent.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if str(error.name).startswith("varedit_"):
            raise
        raise MissingExtraError(
            f"varedit-export[{extra}] is not installed ({error.name} is missing); run: "
            f'pip install "varedit-export[{extra}]"'
        ) from error
