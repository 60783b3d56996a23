"""Measure a bundle: `varedit-run bench`."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

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


@click.command(cls=BackendCommand)
@click.argument("bundle", type=BUNDLE)
@variant_option
@click.option("--repeat", default=5, show_default=True, help="Number of timed edits.")
@backend_option()
@click.option("--json", "json_file", type=PATH, help="Write all numbers here, as JSON.")
@debug_option
def bench(
    bundle: Path,
    variant: str | None,
    repeat: int,
    backend: ChosenBackend | AutoBackend,
    json_file: Path | None,
) -> None:
    """Measure BUNDLE: every stage and scale, start-up, memory.

    \b
    varedit-run bench bundles/2b-512 --repeat 10 --threads 2 --json bench.json
    """
    from varedit_runtime.bench import check_report, measure_bundle, report_table

    if json_file is not None:
        check_report(json_file)
    report = measure_bundle(bundle, repeat, backend, variant)
    show_report(report_table(report), report, json_file)


def show_report(table: str, report: Any, json_file: Path | None) -> None:
    """Print a report's table; write its numbers, if a file is named, even if nobody reads that."""
    from varedit_runtime.bench import write_report

    try:
        click.echo(table)
    finally:
        if json_file is not None:
            write_report(asdict(report), json_file)
