"""The training loop that every model shares: nano's tokenizer, its transformer, and fine-tuning.

Everything that is random, and what a step learns from, depends on the recipe and the step alone.
So a run that was killed continues from its checkpoint as if nothing had happened.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from PIL import Image
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from varedit_export.training.optimisers import Optimisers, optimisers
from varedit_export.training.parallel import is_first, number, processes, summed
from varedit_export.training.run_folder import RunFolder, TrainingState
from varedit_runtime.backends.interrupt import held_signals
from varedit_runtime.errors import ConfigError, SignalArrived

Batch = TypeVar("Batch")
ComputeType = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class TrainingRecipe:
    """How a model learns, on every machine alike. ema_decay: 0 averages no weights."""

    steps: int
    batch: int
    learning_rate: float
    weight_decay: float
    betas: tuple[float, float]
    warmup: int
    clip: float = 1.0
    ema_decay: float = 0.999
    seed: int = 0


@dataclass(frozen=True)
class TrainingMachine:
    """How a machine computes it, and after how many steps it logs, saves and reports."""

    device: str = "cpu"
    workers: int = 0
    precision: ComputeType = "fp32"
    log_every: int = 20
    save_every: int = 200
    report_every: int = 500


class Task(Protocol[Batch]):
    """A model to train, with data and loss."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def hidden(self) -> tuple[nn.Parameter, ...]:
        """The matrices and kernels that Muon trains."""
        ...

    @property
    def dataset(self) -> Dataset[Sequence[Batch]]:
        """The parts of every step's batch; each is computed by itself, and gradients are summed."""
        ...

    def losses(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Return a batch's losses as scalars: "loss" is minimised, all others are only logged.

        Those of all parts of a step's batch, in all processes, are summed.
        """
        ...

    def report(self, model: nn.Module) -> tuple[dict[str, float], Image.Image]:
        """Return scores and a sheet of pictures of the averaged model."""
        ...

    def export(self, model: nn.Module, folder: Path) -> None:
        """Write the averaged weights."""
        ...


def train(
    task: Task[Any],
    recipe: TrainingRecipe,
    machine: TrainingMachine,
    run: RunFolder,
    notice: Callable[[str], None] = lambda line: None,
) -> TrainingState:
    """Train from the run folder's checkpoint, if any, to the recipe's last step.

    notice: called with a line for every entry of the log. Ctrl-C in the only process saves the
    last whole step; several processes would be at different places of it.
    """
    state = TrainingState.start(task.model, _optimisers(task, recipe), recipe.ema_decay > 0)
    run.resume(state)
    if state.step == recipe.steps:  # it may have been stopped before its weights were written
        task.export(state.averaged, run.weights)
    try:
        _steps(task, state, recipe, machine, run, notice)
    except (KeyboardInterrupt, SignalArrived):
        if processes() == 1 and not _divergence(state):
            run.save(state)
            notice(f"{run.folder}: saved after {state.step} steps; the same command continues")
        raise
    return state


def _steps(
    task: Task[Any],
    state: TrainingState,
    recipe: TrainingRecipe,
    machine: TrainingMachine,
    run: RunFolder,
    notice: Callable[[str], None],
) -> None:
    steps = range(state.step, recipe.steps)
    bar = tqdm(
        batches(task.dataset, steps, machine.workers),
        initial=state.step,
        total=recipe.steps,
        disable=None if is_first() else True,
    )
    logged = Averages()
    for step, parts in zip(steps, bar, strict=True):
        logged.add(train_step(task, state, recipe, parts))
        if _due(state.step, machine.log_every, recipe):
            _check_values(state, run)
            entry = logged.take()
            run.log({"step": state.step, "rate": learning_rate(recipe, step), **entry})
            bar.set_postfix({"loss": f"{entry['loss']:.4f}"})
            notice(f"step {state.step} of {recipe.steps}: {_told(entry)}")
        if _due(state.step, machine.save_every, recipe):
            _check_values(state, run)
            # Whoever stops between the two goes on from the older checkpoint and writes both again.
            task.export(state.averaged, run.weights)
            run.save(state)
        if _due(state.step, machine.report_every, recipe):  # which may run out of memory
            scores, sheet = task.report(state.averaged)
            run.log({"step": state.step, **scores})
            run.keep_sheet(f"{state.step:07}.png", sheet)
            notice(f"step {state.step} of {recipe.steps}: {_told(scores)}")


def _check_values(state: TrainingState, run: RunFolder) -> None:
    """Raise ConfigError if training has diverged: the checkpoint stays as it was before."""
    if found := _divergence(state):
        raise ConfigError(
            f"{found} at step {state.step}, so training has diverged: start again in another "
            f"folder with a smaller --learning-rate; {run.folder} keeps what was saved before"
        )


def _divergence(state: TrainingState) -> str:
    """Say which value of the last step is not finite, "" if none: the weights are then not."""
    values = {name: float(state.values[name]) for name in ("loss", "gradient") if state.values}
    wrong = (f"the {name} is {value}" for name, value in values.items() if not isfinite(value))
    return next(wrong, "")


def _told(entry: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in entry.items())


def batches(
    dataset: Dataset[Sequence[Batch]], steps: range, workers: int
) -> Iterator[Sequence[Batch]]:
    """Yield the batches of these steps in order; worker processes, if any, make them ahead."""
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
    )
    return iter(loader)


def train_step(
    task: Task[Batch],
    state: TrainingState,
    recipe: TrainingRecipe,
    parts: Sequence[Batch],
) -> dict[str, Tensor]:
    """Take one step of the optimisers and the EMA; return the losses before it."""
    for group in state.optimiser.param_groups:
        group["lr"] = learning_rate(recipe, state.step)
    state.optimiser.zero_grad(set_to_none=True)
    sums: dict[str, Tensor] = {}
    for part in parts:
        losses = task.losses(part, state.step)
        # Gradients are averaged over the processes, and losses are to be summed.
        (losses["loss"] * processes()).backward()
        sums = {name: sums.get(name, 0) + loss.detach() for name, loss in losses.items()}
    norm = nn.utils.clip_grad_norm_(state.model.parameters(), recipe.clip)
    values = summed(sums) | {"gradient": number(norm.detach())}
    with held_signals():  # a step is taken whole or not at all
        state.optimiser.step()
        state.step, state.values = state.step + 1, values
        if state.ema is not None:
            average(state.ema, state.model, ema_decay(recipe, state.step))
    return values


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


def _optimisers(task: Task[Any], recipe: TrainingRecipe) -> Optimisers:
    return optimisers(
        task.model, recipe.learning_rate, recipe.weight_decay, recipe.betas, task.hidden
    )


def _due(step: int, every: int, recipe: TrainingRecipe) -> bool:
    return step % every == 0 or step == recipe.steps
