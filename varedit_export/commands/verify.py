"""Compare a bundle with the reference: `varedit-export verify`."""

import shlex
from collections.abc import Sequence
from pathlib import Path

import click

import varedit_export
from varedit_export.commands.shared_options import with_options
from varedit_export.console import say
from varedit_export.describe import parity_row
from varedit_export.errors import ParityError
from varedit_export.options import VerifyOptions
from varedit_runtime.backends import DEFAULT, choose
from varedit_runtime.manifest import ParityLine
from varedit_runtime.terminal.command import BUNDLE, PATH, BackendCommand, backend_option
from varedit_runtime.terminal.streams import OutputError


@click.command(cls=BackendCommand)
@click.argument("bundle", type=BUNDLE)
@click.option("--golden", type=PATH, help="Compare also with a recording it was built from.")
@click.option("--report", type=PATH, help="Write all measures here, as JSON.")
@backend_option("Compare this backend too, as it runs on this machine.", default=DEFAULT)
@click.option("--variant", metavar="NAME", help="The backend's variant; by default the first.")
@with_options(VerifyOptions)
def verify(bundle: Path, report: Path | None, options: VerifyOptions) -> None:
    """Compare every graph with the reference, teacher-forced; exit 1 on a failed measure.

    The reference takes the bundle's own weights. A recording of the released implementation must
    be the one that the bundle was built from. Engines are compared with ONNX Runtime and, if the
    model fits in memory as a whole, with the reference.

    \b
    varedit-export verify bundles/2b-512 --report parity.json
    varedit-export verify bundles/2b-512 --backend tensorrt
    """
    from varedit_runtime.files import check_report, write_report

    if report is not None:
        check_report(report)
    lines: list[ParityLine] = []
    failure: ParityError | None = None
    unwritten: OutputError | None = None

    def show(line: ParityLine) -> None:
        nonlocal unwritten
        lines.append(line)
        try:
            click.echo(parity_row(line))
        except OutputError as error:
            if report is None:  # else what is measured can still be written there
                raise
            unwritten = error

    try:
        varedit_export.verify(bundle, options, show)
    except ParityError as error:
        failure = error
    if report is not None:
        write_report(lines, report)
    if failure is not None:
        _say_where_to_look(lines, bundle, options)
        raise failure
    if unwritten is not None:
        raise unwritten


def _say_where_to_look(lines: Sequence[ParityLine], bundle: Path, options: VerifyOptions) -> None:
    """Say how to find the wrong layer of the first engine that differs from ONNX Runtime."""
    backend = choose(options.backend).spec
    failed = (line for line in lines if not line.value <= line.tolerance)
    stage = next((line.stage for line in failed if line.against == DEFAULT), None)
    if backend.compiles and stage is not None:
        named = f" --variant {shlex.quote(options.variant)}" if options.variant else ""
        say(
            "to find the layer that goes wrong first: varedit-export layers "
            f"{shlex.quote(str(bundle))} {stage} --backend {backend.name}{named}"
        )
