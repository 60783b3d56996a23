"""The `varedit-export` command."""

import shlex
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec
from click.core import ParameterSource

import varedit_export
from varedit_engines.engine_compiler import slow_precision
from varedit_export.console import accept, progress, say
from varedit_export.describe import described, parity_row, parity_summary
from varedit_export.errors import ParityError
from varedit_export.options import BuildOptions, EngineOptions, VerifyOptions
from varedit_runtime.backends import choose, find_backend, specs
from varedit_runtime.bundle import Bundle
from varedit_runtime.errors import (
    BundleError,
    CheckpointError,
    ConfigError,
    needs_extra,
    readable_size,
)
from varedit_runtime.locate import remember
from varedit_runtime.manifest import TOKENIZER, ParityLine
from varedit_runtime.precision import PRECISIONS, named
from varedit_runtime.terminal.command import (
    PATH,
    BackendCommand,
    CommandGroup,
    Registered,
    backend_option,
    debug_option,
)

if TYPE_CHECKING:
    from varedit_engines.engine_report import EngineReport
    from varedit_runtime.backends.engines.engine_set import EngineLayout

_PLACE = "PATH|hf://..."  # a file or folder here, or one on the Hugging Face hub
_checkpoint = click.option(
    "--checkpoint",
    metavar=_PLACE,
    help="The transformer: a .pth or .safetensors file, or a folder of shards.",
)
_tokenizer = click.option(
    "--tokenizer", metavar=_PLACE, help="The picture tokenizer: infinity_vae_*.pth."
)
_text_encoder = click.option(
    "--text-encoder", metavar=_PLACE, help="The flan-t5-xl folder, or OWNER/REPOSITORY."
)
_yes = click.option("--yes", is_flag=True, help="Download weights without asking.")
_architectures = click.option(
    "--architecture",
    "architectures",
    multiple=True,
    help="GPU architecture, such as sm89; repeatable, tensorrt-rtx only. Default: this GPU's.",
)


def _layout(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return the option for where engines' weights are, under a command's own name for it."""
    return click.option(
        name,
        "layout",
        type=click.Choice(["external", "profiles", "baked"]),
        default="external",
        show_default=True,
        help="Weights: inputs of the engines, inside one for all scales, or inside one per scale.",
    )


def _with(
    kind: type[BuildOptions] | type[EngineOptions] | type[VerifyOptions],
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one argument, `options`, in place of the fields of an options class."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def call(*arguments: Any, **given: Any) -> None:
            names = {field.name for field in fields(kind)} & given.keys()
            command(*arguments, options=kind(**{n: given.pop(n) for n in names}), **given)

        return call

    return decorate


@click.group(cls=CommandGroup)
@click.version_option(package_name="varedit-export")
@debug_option
def main() -> None:
    """Export VAREdit models to bundles that `varedit-run` edits pictures with.

    \b
    varedit-export build --size nano
    varedit-export build --size 8b --res 512 --precision fp16
    varedit-export build --size tiny-2b --res 256 --random-weights 0
    """


@main.command()
@click.option("--size", help="The model: nano, 2b or 8b, or one for tests (125m, tiny-2b, ...).")
@click.option(
    "--res",
    "resolutions",
    type=int,
    multiple=True,
    help="256, 512 or 1024 px; repeat it for a bundle of several resolutions. nano has 128.",
)
@click.option(
    "--aspect", default="1:1", show_default=True, help="Height:width; see varedit-run grids."
)
@_checkpoint
@_tokenizer
@_text_encoder
@click.option(
    "--from",
    "source",
    metavar="OWNER/REPOSITORY|FOLDER",
    help="Where the published weights of 2b and 8b are taken from; by default their authors'.",
)
@click.option(
    "--lora",
    "loras",
    metavar="PLACE[:SCALE]",
    multiple=True,
    help="A LoRA adapter to merge, of PEFT or kohya's naming; repeatable. SCALE is 1 by default.",
)
@_yes
@click.option("--random-weights", type=int, help="Seed of random weights, instead of checkpoints.")
@click.option("--config", type=PATH, help="A recording's config.json, instead of --size and --res.")
@click.option(
    "--precision", type=Registered("precision", PRECISIONS.keys), default="fp32", show_default=True
)
@click.option("--batch", type=int, default=1, show_default=True, help="Pictures at a time.")
@click.option(
    "--text-tokens",
    type=int,
    help="Most tokens of an instruction; by default 128, for nano 48.",
)
@click.option(
    "--no-guidance",
    "guided",
    is_flag=True,
    callback=lambda context, option, given: not given,
    help="Leave out the unconditional rows: half of the work, no guidance.",
)
@click.option(
    "--fused-attention",
    is_flag=True,
    help="Add a graph for onnxruntime on CUDA, which has fused kernels for its attention.",
)
@backend_option("Backend to build for; for the TensorRT ones, engines are compiled too.")
@_layout("--engine-layout")
@_architectures
@click.option("-o", "--output", type=PATH, help="The bundle's folder; by default one of yours.")
@click.pass_context
@_with(BuildOptions)
def build(
    context: click.Context,
    options: BuildOptions,
    backend: Any,
    layout: "EngineLayout",
    architectures: tuple[str, ...],
    yes: bool,
) -> None:
    """Build a bundle, prove its parity with the reference, and publish it.

    The published weights of 2b and 8b are downloaded, once, unless they are given: as paths, or as
    hf://OWNER/REPOSITORY/PATH[@REVISION] on the Hugging Face hub. HF_TOKEN, HF_HOME, HF_ENDPOINT
    and HF_HUB_OFFLINE are obeyed.

    The next build continues an interrupted one. Engines are compiled after the bundle
    is published; if that is interrupted, `varedit-export engines` continues it.

    \b
    varedit-export build --size 8b --res 512 --precision fp16 -o bundles/8b-512
    varedit-export build --size 2b --res 512 --checkpoint 2B-512.pth \\
        --tokenizer hf://FoundationVision/Infinity/infinity_vae_d32reg.pth \\
        --text-encoder google/flan-t5-xl
    varedit-export build --size 8b --res 512 --lora style.safetensors:0.8 -o bundles/style
    varedit-export build --size 125m --res 256 --random-weights 0
    varedit-export build --size nano --precision fp16 --backend tensorrt-rtx \\
        --architecture sm89
    """
    engines = _engine_options(context, backend, layout, architectures, options.precision)
    with progress() as on_step:
        bundle = varedit_export.build(options, on_step, say, partial(accept, yes))
    folder = Path(options.output or bundle.path)
    try:
        remember(folder, _unfit(options, bundle))
    except BundleError as error:  # the bundle is whole all the same
        say(str(error))
    say(parity_summary(bundle.manifest.parity))
    click.echo(folder)
    if engines is not None:
        for variant in bundle.manifest.variants:
            path, _ = _compile(bundle, replace(engines, variant=variant.name))
            say(str(path))


def _unfit(options: BuildOptions, bundle: Bundle) -> str | None:
    """Return why a bundle is not what `varedit-run` should take by default; None if it may."""
    if options.random_weights is not None:
        return "its weights are random"
    return None if TOKENIZER in bundle.manifest.files else "it has no text encoder"


def _engine_options(
    context: click.Context,
    backend: Any,
    layout: "EngineLayout",
    architectures: tuple[str, ...],
    precision: str,
) -> EngineOptions | None:
    """Return what to compile for a backend; None for one without engines.

    Raises now, before anything is built, if the backend cannot compile here.
    """
    if find_backend(backend).compiles:
        engines = EngineOptions(backend, layout=layout, architectures=architectures)
        engines.compiler()
        if advice := slow_precision(named(precision)):
            say(advice)
        return engines
    given = [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name in ("layout", "architectures")
        and context.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE
    ]
    if given:
        raise ConfigError(
            f"{' and '.join(given)}: {backend} runs the graphs and has no engines; leave it out, "
            f"or give --backend {' or '.join(s.name for s in specs() if s.compiles)}"
        )
    return None


@main.command()
@click.argument("bundle", type=PATH)
@backend_option("Backend that runs the engines.", default="tensorrt", compiling=True)
@_layout("--layout")
@_architectures
@click.option("--variant", metavar="NAME", help="The bundle's variant; by default its first.")
@click.option(
    "--workspace",
    type=click.IntRange(1),
    callback=lambda context, option, given: given and given * 10**6,
    help="MB of GPU memory that a layer may use.",
)
@click.option(
    "--optimisation", type=click.IntRange(0, 5), help="0 compiles fast, 5 makes fast engines."
)
@click.option(
    "--aux-streams",
    type=click.IntRange(0, 64),
    default=0,
    show_default=True,
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
    type=click.Choice(["ampere-plus", "same-compute-capability"]),
    help="Make engines for other GPUs too. Not with tensorrt-rtx: give architectures.",
)
@click.option("--again", is_flag=True, help="Recompile existing engines built on this machine.")
@click.option("--report", type=PATH, help="Write every kernel of every engine here, as JSON.")
@_with(EngineOptions)
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
    from varedit_runtime.bench import check_report, write_report

    if report is not None:
        check_report(report, bundle)
    path, reports = _compile(bundle, options)
    if report is not None:
        write_report(msgspec.to_builtins(reports), report)
    click.echo(path)


def _compile(
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


@main.command(cls=BackendCommand)
@click.argument("bundle", type=PATH)
@click.option("--golden", type=PATH, help="Compare also with a recording it was built from.")
@click.option("--report", type=PATH, help="Write all measures here, as JSON.")
@backend_option("Compare this backend too, as it runs on this machine.")
@click.option("--variant", metavar="NAME", help="The backend's variant; by default the first.")
@_with(VerifyOptions)
def verify(bundle: Path, report: Path | None, options: VerifyOptions) -> None:
    """Compare every graph with the reference, teacher-forced; exit 1 on a failed measure.

    The reference takes the bundle's own weights. A recording of the released implementation must
    be the one that the bundle was built from. Engines are compared with ONNX Runtime and, if the
    model fits in memory as a whole, with the reference.

    \b
    varedit-export verify bundles/2b-512 --report parity.json
    varedit-export verify bundles/2b-512 --backend tensorrt
    """
    from varedit_runtime.bench import check_report, write_report

    if report is not None:
        check_report(report, bundle)
    lines: list[ParityLine] = []

    def show(line: ParityLine) -> None:
        click.echo(parity_row(line))
        lines.append(line)

    failure = None
    try:
        varedit_export.verify(bundle, options, show)
    except ParityError as error:
        failure = error
    if report is not None:
        write_report(msgspec.to_builtins(lines), report)
    if failure is not None:
        backend = choose(options.backend).spec
        failed = (line for line in lines if not line.value <= line.tolerance)
        of_engines = (line.stage for line in failed if "against ONNX Runtime" in line.measure)
        if backend.compiles and (stage := next(of_engines, None)):
            named = f" --variant {shlex.quote(options.variant)}" if options.variant else ""
            say(
                "to find the layer that goes wrong first: varedit-export layers "
                f"{shlex.quote(str(bundle))} {stage} --backend {backend.name}{named}"
            )
        raise failure


@main.command()
@click.argument("bundle", type=PATH)
@click.argument("stage")
@backend_option("Backend that runs the engines.", default="tensorrt", compiling=True)
@click.option("--variant", metavar="NAME", help="The bundle's variant; by default its first.")
def layers(bundle: Path, stage: str, backend: Any, variant: str | None) -> None:
    """Find the first layer of STAGE that an engine computes wrongly, on this machine's GPU.

    For a stage that `verify --backend` found wrong: its graph is compiled anew with the outputs of
    all layers, which are compared with ONNX Runtime's. Exits 1 if a layer is wrong.

    \b
    varedit-export layers bundles/2b-512-fp16 scale_03 --backend tensorrt
    """
    compiler = EngineOptions(backend).compiler()
    with needs_extra("export"):
        from varedit_export.parity.layers import first_wrong_layer

    wrong = first_wrong_layer(Bundle.open(bundle), stage, compiler, variant)
    if wrong is not None:
        raise ParityError(f"{stage} goes wrong first in {wrong}")
    click.echo("no layer is wrong when all are outputs: look at a fused kernel, or at the weights")


@main.command()
@click.argument("bundle", type=PATH)
def inspect(bundle: Path) -> None:
    """Show what is in a bundle: model, variants, graphs, sizes, precision, parity.

    \b
    varedit-export inspect bundles/2b-512
    """
    click.echo(described(Bundle.open(bundle)))


@main.command()
@click.argument("bundle", type=PATH, required=False)
@click.pass_context
def doctor(context: click.Context, bundle: Path | None) -> None:
    """Show which backends can edit pictures here, why others cannot, and what would help.

    With BUNDLE, show also whether it fits in memory, and which of its engines are for
    this machine. Exits with 1 if no backend can edit pictures.

    \b
    varedit-export doctor
    varedit-export doctor bundles/2b-512
    """
    from varedit_export.doctor import can_edit, report
    from varedit_runtime.backends.detect import detect_machine

    machine = detect_machine(bundle)
    click.echo(report(machine))
    if not can_edit(machine):
        context.exit(1)


@main.command()
@click.argument("bundle", type=PATH)
@click.option("--variant", metavar="NAME", help="The bundle's variant; by default its first.")
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
    with needs_extra("export"):
        from varedit_export.bench import comparison_table, measure_both
    from varedit_runtime.bench import check_report, write_report

    if json_file is not None:
        check_report(json_file, bundle)
    report = measure_both(bundle, repeat, threads, variant)
    try:
        click.echo(comparison_table(report))
    finally:  # also where the output cannot be written
        if json_file is not None:
            write_report(asdict(report), json_file)


@main.command()
@click.option("--size", required=True, help="Size of the model: 2b or 8b.")
@_checkpoint
@_tokenizer
@_text_encoder
@_yes
@click.option("-o", "--output", type=PATH, required=True, help="The folder to write into.")
def convert(
    size: str,
    checkpoint: str | None,
    tokenizer: str | None,
    text_encoder: str | None,
    yes: bool,
    output: Path,
) -> None:
    """Write one safetensors file per component of the released checkpoints.

    \b
    varedit-export convert --size 2b --checkpoint 2B-512.pth \\
        --tokenizer infinity_vae_d32reg.pth --text-encoder flan-t5-xl \\
        -o converted/2b-512
    """
    with needs_extra("export"):
        from varedit_export.published import bring
        from varedit_reference.convert import convert as convert_checkpoints

    given = {"checkpoint": checkpoint, "tokenizer": tokenizer, "text-encoder": text_encoder}
    if checkpoint is None or tokenizer is None or text_encoder is None:
        missing = " and ".join(f"--{name}" for name, path in given.items() if path is None)
        raise CheckpointError(f"convert needs {missing} too")
    files = bring([checkpoint, tokenizer, text_encoder], partial(accept, yes))
    transformer, picture_tokenizer, text_folder = files.paths
    for path in convert_checkpoints(size, transformer, picture_tokenizer, text_folder, output, say):
        click.echo(path)
