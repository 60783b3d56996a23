"""Find what a table names, and import it only then."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from varedit_runtime.errors import ConfigError, shown


def entry(kind: str, table: Mapping[str, str], name: str) -> Any:
    """Return what a table of MODULE:VARIABLE has under a name. kind: what it is, for the message.

    Raises ConfigError on an unknown name, or if it is nano's and nano's sources are not installed.
    """
    if name not in table:
        raise ConfigError(f"no {kind} is called {shown(name)}; there are {', '.join(table)}")
    module, _, variable = table[name].partition(":")
    try:
        return getattr(import_module(module), variable)
    except ModuleNotFoundError as error:
        if error.name not in ("varedit_nano", "skia"):
            raise
        raise ConfigError(
            "nano's scenes are drawn in a clone of the project: run pip install -e '.[train]' there"
        ) from error
