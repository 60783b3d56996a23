"""The errors this project raises on purpose; `str(error)` is one line for a person."""

from collections.abc import Iterator
from contextlib import contextmanager


class VareditError(Exception):
    """Base of all errors below."""


class ConfigError(VareditError, ValueError):
    """An impossible size, or an unknown name; the message says which exist."""


class PictureError(VareditError):
    """A picture that cannot be read, used or written."""


class CheckpointError(VareditError):
    """Weights that cannot be read, or do not fit the model."""


class BundleError(VareditError):
    """A bundle that is missing, damaged, of another kind or version, or cannot be written."""


class TextError(VareditError):
    """An instruction that cannot be used, such as an empty or too long one."""


class BackendError(VareditError):
    """Graphs that cannot run as asked: an unknown or absent provider, a graph that won't load."""


class EditorError(VareditError):
    """An editor used when it cannot be: after it was closed, or from inside its own `on_scale`."""


class EditCancelled(VareditError):
    """The caller cancelled an edit between two scales. The editor can be used again."""


class MissingExtraError(VareditError):
    """An optional package is not installed; the message names the command that does it."""


def one_line(error: object) -> str:
    """Return an error's text, or another one, without line breaks and repeated spaces."""
    return " ".join(str(error).split())


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Around imports that an extra of the distribution provides, such as `export`.

    Raises MissingExtraError when a package is absent.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if str(error.name).startswith("varedit_"):
            raise
        raise MissingExtraError(
            f'{error.name} is not installed; run: pip install "varedit-export[{extra}]"'
        ) from error
