"""What `varedit-export` shows while it works: lines, a progress bar, a question."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import click

from varedit_engines.progress import OnStep
from varedit_runtime.errors import ConfigError, printable

if TYPE_CHECKING:
    from varedit_export.weights.download import Download


def say(line: str) -> None:
    """Show printable lines on stderr, above a bar if there is one."""
    lines = "\n".join(map(printable, line.split("\n")))
    if "tqdm" in sys.modules:
        from tqdm import tqdm

        tqdm.write(lines, file=sys.stderr)
    else:  # there is no bar
        click.echo(lines, err=True)


@contextmanager
def progress(parts: int = 0) -> Iterator[OnStep]:
    """Show a bar that counts steps on a terminal, and a line for each step elsewhere.

    parts: a step that counts things, such as edits, also has a line after each of so many parts.
    There is no estimate of the time left: steps differ a hundredfold.
    """
    form = "{desc} |{bar}| {n_fmt} of {total_fmt}, {elapsed}"
    with ExitStack() as stack:
        bar: Any = None  # from the first step on: what is before has bars of its own
        last: Any = None

        def show(what: str, done: int, steps: int) -> None:
            nonlocal bar, last
            if bar is None:
                from tqdm import tqdm

                bar = stack.enter_context(tqdm(total=steps, disable=None, bar_format=form))
            bar.n = done
            bar.set_description_str(what)
            # How far a step is stands behind a comma.
            step = (what.partition(",")[0], done * parts // max(steps, 1))
            if bar.disable and step != last:
                say(f"  {done} of {steps}: {what}")
            last = step

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
