"""The commands that train nano: options, the run's folder, weights to start from."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import wraps
from hashlib import sha256
from pathlib import Path
from typing import Any

import click

from varedit_export.training.loop import TrainingRecipe, train
from varedit_export.training.run_folder import RunFolder
from varedit_nano.check_gradients import check_gradients
from varedit_nano.data import FIRST_TRAINING_SEED
from varedit_nano.model import NANO
from varedit_nano.task import NanoMachine, NanoTask
from varedit_runtime.errors import ConfigError

SEEDS_OF_A_RUN = 10**7  # so that no two runs see the same pictures


@dataclass(frozen=True)
class NanoRecipe(TrainingRecipe):
    """How a part of nano learns. first_seed: the first of its data's seeds."""

    first_seed: int = FIRST_TRAINING_SEED


def training_options(recipe: NanoRecipe, run: Path) -> Callable[..., Any]:
    """Return a decorator that adds the options of both trainers, for `run_training`."""
    path = click.Path(path_type=Path)
    options = [
        click.option("--run", type=path, default=run, show_default=True, help="The run's folder."),
        click.option("--steps", default=recipe.steps, show_default=True),
        click.option("--batch", default=recipe.batch, show_default=True),
        click.option("--learning-rate", default=recipe.learning_rate, show_default=True),
        click.option(
            "--start-from",
            type=path,
            help="Weights to continue from, on new pictures: a run's ema folder, or nano's own.",
        ),
        click.option("--check-gradients", is_flag=True, help="Check the fast path and stop."),
        click.option("--device", default="cpu", show_default=True, help="cpu or cuda."),
        click.option("--workers", default=0, show_default=True, help="Processes that draw data."),
        click.option("--precision", type=click.Choice(["fp32", "bf16"]), default="fp32"),
        click.option("--compiled", is_flag=True, help="Use torch.compile."),
        click.option("--log-every", default=20, show_default=True, help="Steps."),
        click.option("--save-every", default=200, show_default=True, help="Steps."),
        click.option("--report-every", default=500, show_default=True, help="Steps."),
    ]

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def tokenizer_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of a tokenizer's sizes, by default nano's; the command gets one `size`."""
    nano = NANO.tokenizer

    @click.option("--bits", default=nano.bits, show_default=True, help="Bits per token.")
    @click.option(
        "--channels",
        default=nano.channels,
        show_default=True,
        help="Channels of the tokenizer's first convolution.",
    )
    @click.option(
        "--multipliers",
        type=int,
        nargs=len(nano.multipliers),
        default=nano.multipliers,
        show_default=True,
        help="Channels of each level of the tokenizer, finest first, in multiples of --channels.",
    )
    @wraps(command)
    def sized(bits: int, channels: int, multipliers: tuple[int, ...], **options: Any) -> Any:
        size = replace(nano, bits=bits, channels=channels, multipliers=multipliers)
        return command(size=size, **options)

    return sized


def run_training(
    build: Callable[[NanoRecipe, NanoMachine], NanoTask],
    recipe: NanoRecipe,
    learns: Mapping[str, Any],
    **options: Any,
) -> None:
    """Train as the command line says, or continue a run that was stopped.

    learns: options that the run folder records besides the recipe.
    """
    machine, options = split_options(options)
    chosen = {name: options[name] for name in ("steps", "batch", "learning_rate")}
    recipe = replace(recipe, **chosen)
    if recipe.steps * recipe.batch > SEEDS_OF_A_RUN:
        raise ConfigError(
            f"{recipe.steps} steps of {recipe.batch} pictures are more than {SEEDS_OF_A_RUN} "
            "pictures, the most of a run: give fewer --steps or a smaller --batch"
        )
    start_from = options["start_from"]
    if start_from is not None:
        digest = _digest(start_from)
        recipe = replace(recipe, first_seed=_seed_after(digest))
        learns = {**learns, "start_from": digest}
    task = build(recipe, machine)
    if options["check_gradients"]:
        cosine, ratio = check_gradients(task)
        click.echo(f"cosine to eager fp32 {cosine:.6f}, norm {ratio:.4f} times")
        return
    folder = RunFolder(options["run"])
    if start_from is not None:
        task.restore(start_from)
    with folder.locked():
        folder.keep_options({**asdict(recipe), **learns})
        if machine.precision != "fp32" or machine.compiled:
            check_gradients(task)
        train(task, recipe, machine, folder)


def _seed_after(digest: str) -> int:
    """Return a first seed by the weights' digest: continued training sees new pictures."""
    return FIRST_TRAINING_SEED + int(digest[:8], 16) * SEEDS_OF_A_RUN


def _digest(folder: Path) -> str:
    """Return a digest of all weights below a folder."""
    digests = (sha256(file.read_bytes()) for file in sorted(folder.rglob("*.safetensors")))
    return sha256(b"".join(digest.digest() for digest in digests)).hexdigest()


def split_options(options: Mapping[str, Any]) -> tuple[NanoMachine, dict[str, Any]]:
    """Split command-line options into the machine's and all others."""
    names = {f.name for f in fields(NanoMachine)}
    machine = NanoMachine(**{name: value for name, value in options.items() if name in names})
    return machine, {name: value for name, value in options.items() if name not in names}
