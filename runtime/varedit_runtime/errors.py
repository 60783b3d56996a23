"""The errors that this project raises on purpose; `str(error)` is one line for a person."""

from collections.abc import Iterator
from contextlib import contextmanager


class VareditError(Exception):
    """Base class of all errors below."""

    def __str__(self) -> str:
        """Return the text on one line; escape what a terminal would obey or cannot show."""
        text = " ".join(super().__str__().splitlines())
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


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


class EditorError(VareditError):
    """An editor that cannot be used now: it was closed, or is called from its own `on_scale`."""


class EditCancelled(VareditError):
    """The caller cancelled an edit between two scales; the editor can be used again."""


class MissingExtraError(VareditError):
    """An optional package is not installed; the message gives the command that installs it."""


def one_line(error: object) -> str:
    """Return an error's text, or another one, without line breaks and repeated spaces."""
    return " ".join(str(error).split())


def reason(error: Exception) -> str:
    """Return an error's text as `one_line` does; the name of its type if it has none."""
    return one_line(error) or type(error).__name__


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
            f'{error.name} is not installed; run: pip install "varedit-export[{extra}]"'
        ) from error
