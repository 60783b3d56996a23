"""Measure a bundle: `varedit-run bench`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from varedit_runtime.backends import ChosenBackend
from varedit_runtime.backends.auto import AutoBackend
from varedit_runtime.terminal.command import (
    BUNDLE,
    PATH,
    BackendCommand,
    backend_option,
    debug_option,
    variant_option,
)

if TYPE_CHECKING:
    from varedit_runtime.bench_report import Dial, Report

dial_option = click.option(
    "--dial",
    "dials",
    type=click.Choice(["further", "fast", "unguided"]),
    multiple=True,
    help="Also measure a further result of one picture and instruction, edits with --fast, or "
    "without guidance; repeatable.",
)

batches_option = click.option(
    "--batches", is_flag=True, help="Also measure 1, 2, 4, ... pictures at a time, up to the most."
)


@click.command(cls=BackendCommand)
@click.argument("bundle", type=BUNDLE)
@variant_option
@click.option("--repeat", default=5, show_default=True, help="Number of timed edits.")
@dial_option
@batches_option
@backend_option()
@click.option("--json", "json_file", type=PATH, help="Write all numbers here, as JSON.")
@debug_option
def bench(
    bundle: Path,
    variant: str | None,
    repeat: int,
    dials: "tuple[Dial, ...]",
    batches: bool,
    backend: ChosenBackend | AutoBackend,
    json_file: Path | None,
) -> None:
    """Measure BUNDLE: every stage and scale, start-up, memory.

    \b
    varedit-run bench bundles/2b-512 --repeat 10 --threads 2 --json bench.json
    varedit-run bench bundles/2b-512 --dial further --dial fast
    """
    from msgspec import structs

    from varedit_runtime.bench import measure_batches, measure_bundle
    from varedit_runtime.files import check_report

    if json_file is not None:
        check_report(json_file)
    report = measure_bundle(bundle, repeat, backend, variant, dials)
    if batches:
        costs = measure_batches(bundle, repeat, backend, variant)
        report = structs.replace(report, batches=costs)
    show_report(report, json_file)


def show_report(report: "Report", json_file: Path | None) -> None:
    """Print a report's tables; write its JSON, if a file is named, even if nobody reads those."""
    from varedit_runtime.bench_report import report_table
    from varedit_runtime.files import write_report

    try:
        click.echo(report_table(report))
    finally:
        if json_file is not None:
            write_report(report, json_file)
