"""Time a bundle against the reference or other bundles: `varedit-export bench`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from varedit_export.commands.shared_options import BundleOr
from varedit_runtime.backends import BACKENDS, choose
from varedit_runtime.bundle import Bundle
from varedit_runtime.commands.bench import batches_option, dial_option, show_report
from varedit_runtime.errors import needs_extra
from varedit_runtime.terminal.command import BUNDLE, PATH

if TYPE_CHECKING:
    from varedit_runtime.bench_report import Dial


@click.command()
@click.argument("bundle", type=BUNDLE)
@click.option(
    "--against",
    type=BundleOr("opponent", lambda: ("reference", *BACKENDS)),
    metavar="reference|BUNDLE|BACKEND",
    multiple=True,
    default=["reference"],
    help="What it is compared with: the reference, another bundle, or another backend that runs "
    "this one; repeatable. BUNDLE runs in onnxruntime.  [default: reference]",
)
@click.option("--variant", metavar="NAME|all", help="The variant; by default BUNDLE's first.")
@click.option("--repeat", default=5, show_default=True, help="Number of timed edits of each.")
@dial_option
@batches_option
@click.option("--threads", type=int, help="Threads of each; by default one per core.")
@click.option("--json", "json_file", type=PATH, help="Write all numbers here, as JSON.")
def bench(
    bundle: Path,
    against: tuple[str | Path, ...],
    variant: str | None,
    repeat: int,
    dials: "tuple[Dial, ...]",
    batches: bool,
    threads: int | None,
    json_file: Path | None,
) -> None:
    """Time BUNDLE against others, in turns: every stage and scale, memory, disk.

    The reference is eager PyTorch in fp32 with the bundle's own weights. How many times as fast
    something is refers to the first that BUNDLE is compared with.

    \b
    varedit-export bench bundles/2b-512 --repeat 10 --threads 2 --json bench.json
    varedit-export bench bundles/2b --variant all --dial fast --dial unguided
    varedit-export bench bundles/2b-int8 --against reference --against bundles/2b-512
    """
    from msgspec import structs

    from varedit_runtime.bench import check_repeat, measure_batches
    from varedit_runtime.files import check_report

    if json_file is not None:
        check_report(json_file)
    check_repeat(repeat)
    backend = choose("onnxruntime", threads=threads)
    Bundle.open(bundle).manifest.variant(None if variant == "all" else variant)
    with needs_extra("export"):
        from varedit_export.bench import entrants, measure_all

    report = measure_all(entrants(bundle, against), repeat, threads, variant, dials)
    if batches:
        one = None if variant == "all" else variant
        report = structs.replace(report, batches=measure_batches(bundle, repeat, backend, one))
    show_report(report, json_file)
