"""The training loop that tokenizer and transformer share."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import wraps
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import click
import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import Dataset
from tqdm import tqdm

from varedit_nano.checkpointing import RunFolder, TrainingState
from varedit_nano.data import FIRST_TRAINING_SEED, batches
from varedit_nano.model import NANO
from varedit_nano.optimisers import Optimisers, optimisers
from varedit_runtime.errors import ConfigError

Batch = TypeVar("Batch")
ComputeType = Literal["fp32", "bf16"]

SEEDS_OF_A_RUN = 10**7  # so that no two runs see the same pictures
SMALLEST_COSINE = 0.98
LARGEST_NORM_ERROR = 0.1


@dataclass(frozen=True)
class TrainingRecipe:
    """How a model learns, on every machine alike. first_seed: the first of its data's seeds."""

    steps: int
    batch: int
    learning_rate: float
    weight_decay: float
    betas: tuple[float, float]
    warmup: int
    clip: float = 1.0
    ema_decay: float = 0.999
    seed: int = 0
    first_seed: int = FIRST_TRAINING_SEED


@dataclass(frozen=True)
class TrainingMachine:
    """How a machine computes it, and after how many steps it logs, saves and reports."""

    device: str = "cpu"
    workers: int = 0
    precision: ComputeType = "fp32"
    compiled: bool = False
    log_every: int = 20
    save_every: int = 200
    report_every: int = 500

    @property
    def memory_format(self) -> torch.memory_format:
        """The faster memory format of the tokenizer's convolutions, forward and backward."""
        return torch.channels_last if self.device == "cuda" else torch.contiguous_format


class Task(Protocol[Batch]):
    """A model to train, with data and loss. fast: compute as the machine says, else eager fp32."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def hidden(self) -> tuple[nn.Parameter, ...]:
        """The matrices that Muon trains."""
        ...

    @property
    def dataset(self) -> Dataset[Batch]: ...

    def losses(self, batch: Batch, step: int, fast: bool) -> dict[str, Tensor]:
        """Return a batch's losses as scalars: "loss" is minimised, all others are only logged."""
        ...

    def report(self, model: nn.Module) -> tuple[dict[str, float], Image.Image]:
        """Return scores and a sheet of pictures of the averaged model."""
        ...

    def export(self, model: nn.Module, folder: Path) -> None:
        """Write the averaged weights."""
        ...

    def restore(self, folder: Path) -> None:
        """Load the weights that `export` wrote. Raises VareditError if they do not fit."""
        ...


def train(
    task: Task[Any], recipe: TrainingRecipe, machine: TrainingMachine, run: RunFolder
) -> TrainingState:
    """Train from the run folder's checkpoint, if any, to the recipe's last step."""
    state = TrainingState.start(task.model, _optimisers(task, recipe))
    run.resume(state)
    if machine.precision != "fp32" or machine.compiled:
        check_gradients(task)
    steps = range(state.step, recipe.steps)
    progress = tqdm(
        batches(task.dataset, steps, machine.workers),
        initial=state.step,
        total=recipe.steps,
        disable=None,
    )
    logged = Averages()
    for step, batch in zip(steps, progress, strict=True):
        logged.add(train_step(task, state, recipe, batch, fast=True))
        if _due(state.step, machine.log_every, recipe):
            entry = logged.take()
            run.log({"step": state.step, "rate": learning_rate(recipe, step), **entry})
            progress.set_postfix({"loss": f"{entry['loss']:.4f}"})
        if _due(state.step, machine.report_every, recipe):
            scores, sheet = task.report(state.ema)
            run.log({"step": state.step, **scores})
            sheet.save(run.sheets / f"{state.step:07}.png")
        if _due(state.step, machine.save_every, recipe):
            run.save(state)
            task.export(state.ema, run.ema)
    return state


def train_step(
    task: Task[Batch],
    state: TrainingState,
    recipe: TrainingRecipe,
    batch: Batch,
    fast: bool = False,
) -> dict[str, Tensor]:
    """Take one step of the optimisers and the EMA; return the losses before it."""
    for group in state.optimiser.param_groups:
        group["lr"] = learning_rate(recipe, state.step)
    losses = task.losses(batch, state.step, fast)
    state.optimiser.zero_grad(set_to_none=True)
    losses["loss"].backward()
    norm = nn.utils.clip_grad_norm_(state.model.parameters(), recipe.clip)
    state.optimiser.step()
    state.step += 1
    average(state.ema, state.model, ema_decay(recipe, state.step))
    return {name: loss.detach() for name, loss in losses.items()} | {"gradient": norm.detach()}


def learning_rate(recipe: TrainingRecipe, step: int) -> float:
    """Return the learning rate: linear warmup, then linear decay to zero after the last step."""
    up = (step + 1) / max(recipe.warmup, 1)
    down = (recipe.steps - step) / max(recipe.steps - recipe.warmup, 1)
    return recipe.learning_rate * min(up, down, 1.0)


def ema_decay(recipe: TrainingRecipe, step: int) -> float:
    """Return the EMA's decay, smaller at first, so that it forgets the untrained weights."""
    return min(recipe.ema_decay, (1 + step) / (10 + step))


def average(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """Update the average: decay·average + (1 - decay)·model."""
    update = get_ema_multi_avg_fn(decay)
    update(list(ema.parameters()), list(model.parameters()), 0)


@dataclass
class Averages:
    """Means of logged scalars, which are copied from the device only when taken."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    count: int = 0

    def add(self, values: Mapping[str, Tensor]) -> None:
        self.sums = {name: self.sums.get(name, 0) + value for name, value in values.items()}
        self.count += 1

    def take(self) -> dict[str, float]:
        means = {name: float(value) / self.count for name, value in self.sums.items()}
        self.sums, self.count = {}, 0
        return means


def check_gradients(task: Task[Any]) -> tuple[float, float]:
    """Compare the gradients of one batch on the fast path with those of eager fp32.

    Returns the cosine between them and the ratio of their norms. Raises ConfigError if they
    differ by more than rounding explains: the compiler or the hardware then computes wrongly.
    """
    batch = task.dataset[0]
    exact, fast = (_gradient(task, batch, fast) for fast in (False, True))
    cosine = float(nn.functional.cosine_similarity(exact, fast, dim=0))
    ratio = float(fast.norm() / exact.norm())
    if not (cosine >= SMALLEST_COSINE and abs(ratio - 1) <= LARGEST_NORM_ERROR):
        raise ConfigError(
            f"the fast path's gradients are wrong on this machine: cosine {cosine:.4f} to eager "
            f"fp32's, norm {ratio:.3f} times theirs; train without --compiled, or with --precision "
            "fp32"
        )
    return cosine, ratio


def _gradient(task: Task[Any], batch: Any, fast: bool) -> Tensor:
    task.model.zero_grad(set_to_none=True)
    task.losses(batch, 0, fast)["loss"].backward()
    grads = [p.grad for p in task.model.parameters() if p.grad is not None]
    gradient = torch.cat([grad.flatten() for grad in grads]).double()
    task.model.zero_grad(set_to_none=True)
    return gradient


def _optimisers(task: Task[Any], recipe: TrainingRecipe) -> Optimisers:
    return optimisers(
        task.model, recipe.learning_rate, recipe.weight_decay, recipe.betas, task.hidden
    )


def _due(step: int, every: int, recipe: TrainingRecipe) -> bool:
    return step % every == 0 or step == recipe.steps


def training_options(recipe: TrainingRecipe, run: Path) -> Callable[..., Any]:
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
    build: Callable[[TrainingRecipe, TrainingMachine], Task[Any]],
    recipe: TrainingRecipe,
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
    folder.keep_options({**asdict(recipe), **learns})
    train(task, recipe, machine, folder)


def _seed_after(digest: str) -> int:
    """Return a first seed by the weights' digest: continued training sees new pictures."""
    return FIRST_TRAINING_SEED + int(digest[:8], 16) * SEEDS_OF_A_RUN


def _digest(folder: Path) -> str:
    """Return a digest of all weights below a folder."""
    digests = (sha256(file.read_bytes()) for file in sorted(folder.rglob("*.safetensors")))
    return sha256(b"".join(digest.digest() for digest in digests)).hexdigest()


def split_options(options: Mapping[str, Any]) -> tuple[TrainingMachine, dict[str, Any]]:
    """Split command-line options into the machine's and all others."""
    names = {f.name for f in fields(TrainingMachine)}
    machine = TrainingMachine(**{name: value for name, value in options.items() if name in names})
    return machine, {name: value for name, value in options.items() if name not in names}
