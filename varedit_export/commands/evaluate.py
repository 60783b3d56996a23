"""Evaluate a bundle's edits on a benchmark: `varedit-export evaluate`."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

import varedit_export
from varedit_export.commands.shared_options import (
    PLACE,
    BundleOr,
    fail_below_option,
    option_of,
    with_judge,
    with_options,
    yes_option,
)
from varedit_export.console import accept, progress, say
from varedit_export.evaluation.benchmarks import BENCHMARKS
from varedit_export.evaluation.metrics import FAMILIES
from varedit_export.options import EvaluateOptions
from varedit_runtime.backends import BACKENDS
from varedit_runtime.terminal.command import (
    BUNDLE,
    PATH,
    BackendCommand,
    Registered,
    backend_option,
    tell_when_interrupted,
    variant_option,
)

if TYPE_CHECKING:
    from varedit_export.evaluation.report import Report

PARTS = 10  # of the edits, and of each family's scores, that have lines of progress
benchmark_type = Registered("benchmark", lambda: BENCHMARKS)


@click.command(cls=BackendCommand)
@click.argument("bundle", type=BUNDLE)
@click.option("--benchmark", type=benchmark_type, required=True, help="What is edited and scored.")
@click.option("--data", metavar=PLACE, help="The benchmark's data set: its folder.")
@click.option("-o", "--output", type=PATH, required=True, help="The run's folder.")
@click.option(
    "--metric",
    "metrics",
    type=Registered("metric", lambda: FAMILIES),
    multiple=True,
    help="Scores to compute; repeatable. Default: the benchmark's.",
)
@click.option(
    "--weights",
    metavar=f"METRIC={PLACE}",
    multiple=True,
    help="Where a metric's model is; repeatable. Default: its authors' on the hub.",
)
@option_of(EvaluateOptions, "--seed", help="Edit i has SEED + i.")
@click.option("--limit", type=int, help="Number of edits, of all types alike. Default: all.")
@click.option(
    "--against",
    type=BundleOr("opponent", lambda: BACKENDS),
    metavar="BUNDLE|BACKEND|RUN",
    help="Compare edit by edit with another bundle, another backend, or a finished run.",
)
@fail_below_option
@with_judge
@click.option("--guidance-scale", type=float, help="Default: the bundle's own.")
@click.option("--temperature", type=float, help="Default: the bundle's own.")
@click.option("--fast", is_flag=True, help="No guidance at the last two scales.")
@click.option("--ray", is_flag=True, help="Edit on the Ray cluster of RAY_ADDRESS, or a new one.")
@backend_option()
@variant_option
@yes_option
@click.pass_context
@with_options(EvaluateOptions)
def evaluate(context: click.Context, bundle: Path, options: EvaluateOptions, yes: bool) -> None:
    """Make a benchmark's edits with BUNDLE, score them, and write a report.

    RUN gets the pictures, the scores of every edit, report.json and report.html. The same command
    continues a run that was interrupted. Intervals hold a mean with 95 % confidence.

    \b
    varedit-export evaluate nano --benchmark nano -o runs/nano
    varedit-export evaluate bundles/8b-512 --benchmark pie-bench --data PIE -o runs/8b \\
        --against bundles/8b-512-int8
    varedit-export evaluate bundles/2b --benchmark emu-edit -o runs/2b \\
        --data hf://datasets/facebook/emu_edit_test_set --limit 200 --fail-below clip_out=0.26
    """
    tell_when_interrupted(context, "The same command continues this run.")
    with progress(PARTS) as on_step:
        report = varedit_export.evaluate(bundle, options, on_step, say, partial(accept, yes))
    show(report, Path(options.output))
    if report.failures:
        context.exit(1)


def show(report: "Report", folder: Path) -> None:
    """Print a report's table and verdicts, and which scores are worse than they must be."""
    from varedit_export.evaluation.page import PAGE
    from varedit_export.evaluation.report import table, verdicts

    click.echo(table(report))
    for line in verdicts(report):
        click.echo(line)
    for judge in report.judges:
        say(str(judge))
    failed = [row for row in report.edits if row.failed is not None]
    if failed:
        say(f"{len(failed)} edits could not be made, such as {failed[0].id}: {failed[0].failed}")
    say(str(folder / PAGE))
    for line in report.failures:
        say(f"--fail-below: {line}")
