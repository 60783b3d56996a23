"""Errors of the exporter alone."""

from varedit_runtime.errors import VareditError


class ExportError(VareditError):
    """A graph did not come out as it must; the message names it."""


class ParityError(VareditError):
    """Graphs that do not agree with the reference; the message names the worst measures."""


class JudgeError(VareditError):
    """A judge that cannot be asked."""


class DatasetError(VareditError):
    """Data to evaluate or train on that is missing, damaged, or not in its published format."""
