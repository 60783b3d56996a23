"""Measure a bundle: `varedit-run bench`."""

from dataclasses import asdict
from pathlib import Path

import click

from varedit_runtime.backends import ChosenBackend
from varedit_runtime.backends.auto import AutoBackend
from varedit_runtime.terminal.command import (
    BUNDLE,
    PATH,
    BackendCommand,
    backend_option,
    debug_option,
)


@click.command(cls=BackendCommand)
@click.argument("bundle", type=BUNDLE)
@click.option("--variant", metavar="NAME", help="The bundle's variant; by default its first.")
@click.option("--repeat", default=5, show_default=True, help="Number of timed edits.")
@backend_option("What runs the bundle; auto: the best that can here.")
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
    from varedit_runtime.bench import check_report, measure_bundle, report_table, write_report

    if json_file is not None:
        check_report(json_file)
    report = measure_bundle(bundle, repeat, backend, variant)
    try:
        click.echo(report_table(report))
    finally:  # also where the output cannot be written
        if json_file is not None:
            write_report(asdict(report), json_file)
