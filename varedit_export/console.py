"""What `varedit-export` shows while it works: lines, a progress bar, a question."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import click

from varedit_engines import OnStep
from varedit_runtime.errors import ConfigError, needs_extra

if TYPE_CHECKING:
    from varedit_export.weights.published import Download


def say(line: str) -> None:
    """Show a line on stderr, above a bar if there is one."""
    with needs_extra("export"):
        from tqdm import tqdm

    tqdm.write(line, file=sys.stderr)


@contextmanager
def progress() -> Iterator[OnStep]:
    """Show a bar on a terminal, nothing elsewhere."""
    with needs_extra("export"):
        from tqdm import tqdm

    with tqdm(total=1, disable=None, bar_format="{l_bar}{bar}| {elapsed}") as bar:

        def show(what: str, done: int, steps: int) -> None:
            bar.total, bar.n = steps, done
            bar.set_description(what)

        yield show


def accept(yes: bool, download: "Download") -> None:
    """Show what will be downloaded; ask on a terminal, and elsewhere refuse, unless told --yes."""
    say(str(download))
    if yes:
        return
    if sys.stdin is None or not sys.stdin.isatty():
        raise ConfigError("weights have to be downloaded: give --yes to do so without being asked")
    with suppress(click.Abort):  # the end of the input, such as by Ctrl-D
        if click.confirm("Download?", err=True):
            return
    raise ConfigError("not downloaded")
