"""Check the reference against recordings of the released implementation, a command of its own.

python -m varedit_reference.golden DIR [DIR ...]
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from varedit_runtime.errors import MissingExtraError, VareditError, needs_extra
from varedit_runtime.terminal.start import end_on_signals

if TYPE_CHECKING:
    from varedit_reference.golden.recordings import Measurement


@click.command()
@click.argument("folders", metavar="DIR [DIR ...]", nargs=-1, required=True, type=Path)
def main(folders: tuple[Path, ...]) -> None:
    """Check the reference against recordings.

    Checks all of them. Exits with 1 if a tolerance is exceeded or a recording cannot be checked.
    """
    try:
        with needs_extra("export"):
            from varedit_reference.golden.recordings import check, open_recording
    except MissingExtraError as error:
        raise click.ClickException(str(error)) from error
    exceeded, unchecked = 0, 0
    for folder in folders:
        click.echo(f"{folder}")
        try:
            for measurement in check(open_recording(folder)):
                exceeded += not _print(measurement)
        except VareditError as error:
            click.echo(f"Error: {error}", err=True)
            unchecked += 1
    if exceeded:
        click.echo(f"{exceeded} measurements exceed their tolerance", err=True)
    if exceeded or unchecked:
        sys.exit(1)


def _print(line: "Measurement") -> bool:
    verdict = "ok" if line.passed else "EXCEEDED"
    click.echo(f"  {line.stage:<52} {line.error:9.2e}  <= {line.tolerance:7.1e}  {verdict}")
    return line.passed


if __name__ == "__main__":
    end_on_signals()  # importing PyTorch takes seconds
    main()
