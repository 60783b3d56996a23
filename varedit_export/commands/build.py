"""Build a bundle: `varedit-export build`."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click
from click.core import ParameterSource

import varedit_export
from varedit_engines.engine_compiler import check_precision, slow_precision
from varedit_export.check_options import check_build
from varedit_export.commands.engines import compile_and_show
from varedit_export.commands.gate import Gate, gate_options
from varedit_export.commands.shared_options import (
    architectures_option,
    checkpoint_option,
    layout_option,
    option_of,
    prefer_ema_option,
    source_option,
    text_encoder_option,
    tokenizer_option,
    with_options,
    yes_option,
)
from varedit_export.console import accept, progress, say
from varedit_export.describe import parity_summary
from varedit_export.options import BuildOptions, EngineOptions
from varedit_runtime.backends import ChosenBackend, choose, find_backend, specs
from varedit_runtime.backends.auto import AUTO, best, best_precision, told
from varedit_runtime.backends.engines.import_tensorrt import RTX
from varedit_runtime.bundle import Bundle
from varedit_runtime.errors import BundleError, ConfigError
from varedit_runtime.grids import Conditioning
from varedit_runtime.locate import choose_default, label
from varedit_runtime.precision import PRECISIONS, named
from varedit_runtime.terminal.command import BUNDLE, PATH, Registered, backend_option

if TYPE_CHECKING:
    from varedit_runtime.backends.engines.engine_set import EngineLayout


@click.command()
@click.option("--size", help="The model: nano, 2b or 8b, or one for tests (125m, tiny-2b, ...).")
@click.option(
    "--res",
    "resolutions",
    type=int,
    multiple=True,
    help="256, 512 or 1024 px; repeat it for a bundle of several resolutions. nano has 128.",
)
@option_of(BuildOptions, "--aspect", help="Height:width; see varedit-run grids.")
@option_of(
    BuildOptions,
    "--conditioning",
    type=click.Choice(get_args(Conditioning)),
    help="How the model sees its source, as it was trained: finest, full are the paper's others.",
)
@checkpoint_option
@prefer_ema_option
@tokenizer_option
@text_encoder_option
@source_option
@click.option(
    "--lora",
    "loras",
    metavar="PLACE[:SCALE]",
    multiple=True,
    help="A LoRA adapter to merge, of PEFT or kohya's naming; repeatable. SCALE is 1 by default.",
)
@yes_option
@click.option("--random-weights", type=int, help="Seed of random weights, instead of checkpoints.")
@click.option("--config", type=PATH, help="A recording's config.json, instead of --size and --res.")
@option_of(
    BuildOptions,
    "--precision",
    type=Registered("precision", lambda: (AUTO, *PRECISIONS)),
    help="auto: fp16 for a backend that runs on a GPU, else fp32. int8, int7: for CPUs with and "
    "without VNNI. fp8 (since sm89), int8-gpu: for engines.",
)
@option_of(BuildOptions, "--batch", type=int, help="Most pictures at a time.")
@click.option(
    "--text-tokens", type=int, help="Most tokens of an instruction; by default 128, for nano 48."
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
@backend_option(
    "Backend to build for; for the TensorRT ones, engines are compiled too. auto: the best here."
)
@layout_option("--engine-layout")
@architectures_option
@click.option(
    "--graphs-from",
    type=BUNDLE,
    metavar="BUNDLE",
    help="Take the graphs and engines of a bundle of the same shapes: the weights alone are new.",
)
@click.option(
    "--dry-run", is_flag=True, help="Say what building and editing take; fetch and build nothing."
)
@click.option("-o", "--output", type=PATH, help="The bundle's folder; by default one of yours.")
@click.option(
    "--default",
    "as_default",
    is_flag=True,
    help="Make it varedit-run's default, as it is done without -o.",
)
@gate_options
@click.pass_context
@with_options(BuildOptions)
def build(
    context: click.Context,
    options: BuildOptions,
    backend: Any,
    layout: "EngineLayout",
    architectures: tuple[str, ...],
    as_default: bool,
    yes: bool,
    dry_run: bool,
    gate: Gate | None,
) -> None:
    """Build a bundle, prove its parity with the reference, and publish it.

    The published weights are downloaded, once, unless they are given: as paths, or as
    hf://OWNER/REPOSITORY/PATH[@REVISION] on the Hugging Face hub. HF_TOKEN, HF_HOME, HF_ENDPOINT
    and HF_HUB_OFFLINE are obeyed.

    Without -o the bundle is one of yours: its folder's name is then enough to name it, and it
    becomes varedit-run's default, if it can edit. `varedit-run bundles` shows both.

    The next build continues an interrupted one. Engines are compiled after the bundle
    is published; if that is interrupted, `varedit-export engines` continues it.

    \b
    varedit-export build --size 8b --res 512
    varedit-export build --size 2b --res 512 --checkpoint 2B-512.pth \\
        --tokenizer hf://FoundationVision/Infinity/infinity_vae_d32reg.pth \\
        --text-encoder google/flan-t5-xl
    varedit-export build --size 8b --res 512 --lora style.safetensors:0.8 -o bundles/style
    varedit-export build --size 8b --res 512 --checkpoint tuned.pth --graphs-from bundles/8b-512
    varedit-export build --size nano --evaluate nano --fail-below accuracy=85
    varedit-export build --size nano --backend tensorrt-rtx --architecture sm89
    """
    options = options.for_graphs
    chosen = _chosen_backend(backend, architectures, options.precision)
    options = _checked(options, chosen, as_default)
    name = chosen.spec.name
    engines = _engine_options(context, name, layout, architectures, options.precision)
    if backend == AUTO:
        say(told(chosen))
    if dry_run:
        click.echo(varedit_export.plan_build(options))
        return
    with progress() as on_step:
        bundle = varedit_export.build(options, on_step, say, partial(accept, yes))
    chosen_default = as_default or options.output is None
    passes = gate and partial(gate.passes, bundle, partial(accept, yes))
    _finish(context, bundle, Path(options.output or bundle.path), chosen_default, engines, passes)


def _finish(
    context: click.Context,
    bundle: Bundle,
    folder: Path,
    as_default: bool,
    engines: EngineOptions | None,
    passes: Callable[[], bool] | None,
) -> None:
    """Tell of a new bundle, and compile its engines; one with a gate has to pass it."""
    if passes is None:
        _say_default(bundle, folder, as_default)
    say(parity_summary(bundle.manifest.parity))
    click.echo(folder)
    if engines is not None:
        _compile_all(bundle, engines)
    if passes is not None:
        passed = passes()
        _say_default(bundle, folder, passed and as_default)
        context.exit(not passed)


def _compile_all(bundle: Bundle, engines: EngineOptions) -> None:
    for variant in bundle.manifest.variants:
        path, _ = compile_and_show(bundle, replace(engines, variant=variant.name))
        say(str(path))


def _chosen_backend(backend: str, architectures: Sequence[str], precision: str) -> ChosenBackend:
    """Return the backend to build for: the one named, also by what it alone has."""
    from varedit_runtime.backends.detect import detect_machine

    if backend == AUTO and not architectures and precision != AUTO and named(precision).no_gpu:
        return replace(choose("onnxruntime", provider="cpu"), why=f"{precision} is for CPUs alone")
    if backend == AUTO and architectures:
        return replace(choose(RTX), why="it alone compiles for architectures that are named")
    return best(detect_machine(), backend)


def _checked(options: BuildOptions, chosen: ChosenBackend, as_default: bool) -> BuildOptions:
    """Return the options, with a precision, after checking them by themselves."""
    if options.precision == AUTO:
        options = replace(options, precision=best_precision(chosen))
    if as_default:
        _check_default(options)
    check_build(options)
    return options


def _say_default(bundle: Bundle, folder: Path, chosen: bool) -> None:
    """Make a bundle the default if that was chosen, and say so; else say how to do it."""
    if chosen:
        try:
            say(choose_default(folder))
        except BundleError as error:  # the bundle is whole all the same
            say(str(error))
    elif bundle.manifest.unfit is None:
        command = f"varedit-run bundles --set {shlex.quote(label(folder))}"
        say(f"to make it varedit-run's default: {command}")


def _check_default(options: BuildOptions) -> None:
    """Raise ConfigError if the bundle will be unfit for editing, before it is built."""
    unfit = None
    if options.random_weights is not None:
        unfit = "random weights"
    elif options.config is not None and options.text_encoder is None:
        unfit = "no text encoder"
    if unfit is not None:
        raise ConfigError(f"--default: a bundle with {unfit} is unfit for editing; leave it out")


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
        check_precision(named(precision), "+".join(architectures))  # says more than a missing GPU
        check_precision(named(precision), engines.compiler().gpu)
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
