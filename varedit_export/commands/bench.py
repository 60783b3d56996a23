"""Time a bundle against the reference: `varedit-export bench`."""

from pathlib import Path

import click

from varedit_runtime.backends import choose
from varedit_runtime.bundle import Bundle
from varedit_runtime.commands.bench import show_report
from varedit_runtime.errors import needs_extra
from varedit_runtime.terminal.command import BUNDLE, PATH, variant_option


@click.command()
@click.argument("bundle", type=BUNDLE)
@variant_option
@click.option("--repeat", default=5, show_default=True, help="Number of timed edits by each.")
@click.option("--threads", type=int, help="Threads of each; by default one per core.")
@click.option("--json", "json_file", type=PATH, help="Write all numbers here, as JSON.")
def bench(
    bundle: Path, variant: str | None, repeat: int, threads: int | None, json_file: Path | None
) -> None:
    """Time BUNDLE against the reference, in turns: every stage and scale, memory, disk.

    The reference is eager PyTorch in fp32 with the bundle's own weights.

    \b
    varedit-export bench bundles/2b-512 --repeat 10 --threads 2 --json bench.json
    """
    from varedit_runtime.bench import check_repeat, check_report

    if json_file is not None:
        check_report(json_file)
    check_repeat(repeat)
    choose("onnxruntime", threads=threads)
    Bundle.open(bundle).manifest.variant(variant)
    with needs_extra("export"):
        from varedit_export.bench import comparison_table, measure_both

    report = measure_both(bundle, repeat, threads, variant)
    show_report(comparison_table(report), report, json_file)
