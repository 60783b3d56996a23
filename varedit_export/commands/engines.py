"""Compile engines, and find a wrong layer of one: `varedit-export engines`, `layers`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

import varedit_export
from varedit_engines.engine_compiler import Hardware
from varedit_export.commands.shared_options import (
    architectures_option,
    layout_option,
    option_of,
    with_options,
)
from varedit_export.console import progress, say
from varedit_export.errors import ParityError
from varedit_export.options import EngineOptions
from varedit_runtime.bundle import Bundle
from varedit_runtime.errors import needs_extra, readable_size
from varedit_runtime.terminal.command import BUNDLE, PATH, backend_option, variant_option

if TYPE_CHECKING:
    from varedit_engines.engine_report import EngineReport


@click.command()
@click.argument("bundle", type=BUNDLE)
@backend_option("Backend that runs the engines.", default="tensorrt", compiling=True)
@layout_option("--layout")
@architectures_option
@variant_option
@click.option(
    "--workspace",
    type=click.IntRange(1),
    callback=lambda context, option, given: given and given * 10**6,
    help="MB of GPU memory that a layer may use.",
)
@click.option(
    "--optimisation", type=click.IntRange(0, 5), help="0 compiles fast, 5 makes fast engines."
)
@option_of(
    EngineOptions,
    "--aux-streams",
    type=click.IntRange(0, 64),
    help="Streams besides its own that an engine may use, each with scratch memory.",
)
@click.option("--tf32", is_flag=True, help="Round fp32 factors to TF32, for speed.")
@click.option(
    "--version-compatible",
    is_flag=True,
    help="Make engines for later TensorRT versions too. Not with tensorrt-rtx.",
)
@click.option(
    "--hardware-compatible",
    type=click.Choice(get_args(Hardware)),
    help="Make engines for other GPUs too. Not with tensorrt-rtx: give architectures.",
)
@click.option("--again", is_flag=True, help="Recompile existing engines built on this machine.")
@click.option("--report", type=PATH, help="Write every kernel of every engine here, as JSON.")
@with_options(EngineOptions)
def engines(bundle: Path, report: Path | None, options: EngineOptions) -> None:
    """Compile a bundle's graphs to TensorRT engines, kept with the bundle or in your cache.

    Engines of the same graphs and settings that were compiled before are used again. Damaged
    ones are recompiled, unless they were built elsewhere. For each engine it shows how many kernels
    it has, which bytes they move, and whether they fuse attention.

    \b
    varedit-export engines bundles/2b-512
    varedit-export engines bundles/2b-512 --backend tensorrt-rtx --architecture sm89
    varedit-export engines bundles/2b-512 --hardware-compatible ampere-plus
    varedit-export engines bundles/2b-512 --report kernels.json
    """
    from varedit_runtime.files import check_report, write_report

    if report is not None:
        check_report(report)
    path, reports = compile_and_show(bundle, options)
    if report is not None:
        write_report(reports, report)
    click.echo(path)


def compile_and_show(
    bundle: Bundle | Path, options: EngineOptions
) -> tuple[Path, "dict[str, EngineReport]"]:
    """Compile a variant's engines, show the progress, and return their folder and reports."""
    with progress() as on_step:
        found = varedit_export.compile_engines(bundle, options, on_step, say)
    from varedit_engines.engine_report import engine_reports

    reports, files = dict(engine_reports(found)), found.manifest.files
    for stage, plan in found.manifest.plans.items():
        size = readable_size(files[plan.file].size)
        told = reports.get(stage, "compiled by an earlier version: --again lists its kernels")
        say(f"  {stage:<16} {size:>8}  {told}")
    return found.path, reports


@click.command()
@click.argument("bundle", type=BUNDLE)
@click.argument("stage")
@backend_option("Backend that runs the engines.", default="tensorrt", compiling=True)
@variant_option
def layers(bundle: Path, stage: str, backend: Any, variant: str | None) -> None:
    """Find the first layer of STAGE that an engine computes wrongly, on this machine's GPU.

    For a stage that `verify --backend` found wrong: its graph is compiled anew with the outputs of
    all layers, which are compared with ONNX Runtime's. Exits 1 if a layer is wrong.

    \b
    varedit-export layers bundles/2b-512-fp16 scale_03 --backend tensorrt
    """
    opened = Bundle.open(bundle)
    opened.manifest.variant(variant).graph(stage)
    compiler = EngineOptions(backend).compiler()
    with needs_extra("export"):
        from varedit_export.parity.layers import first_wrong_layer

    wrong = first_wrong_layer(opened, stage, compiler, variant)
    if wrong is not None:
        raise ParityError(f"{stage} goes wrong first in {wrong}")
    click.echo("no layer is wrong when all are outputs: look at a fused kernel, or at the weights")
