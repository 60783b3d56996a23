"""Resolve the options of a fine-tuning, say what it takes, and run it."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import torch

from varedit_export.errors import ExportError
from varedit_export.options import TrainOptions
from varedit_export.pairs.pair import Pair
from varedit_export.pairs.read import read_pairs
from varedit_export.resolve_options import model_and_weights
from varedit_export.sources import Sources
from varedit_export.training import parallel
from varedit_export.training.fine_tune import (
    DRAWN,
    TRANSFORMER,
    FineTuning,
    Lessons,
    fill,
    new_learner,
)
from varedit_export.training.learner import Learner
from varedit_export.training.loop import ComputeType, TrainingMachine, TrainingRecipe, train
from varedit_export.training.memory import MemoryPlan, plan_memory
from varedit_export.training.run_folder import RunFolder
from varedit_export.training.tokens import made_by, tokens_of
from varedit_export.weights.digest import weights_digest
from varedit_export.weights.download import Download
from varedit_export.weights.lora import TRAINED
from varedit_reference.config import ModelConfig
from varedit_runtime.backends.host import available_memory
from varedit_runtime.errors import ConfigError, readable_size

# The paper's, at 256 px and from 512 px on (2b; 8b at 512 px had the first one, at 1,536 pairs a
# step). LoRA learns best at ten times the rate of full training (Schulman et al. 2025, "LoRA
# Without Regret", thinkingmachines.ai/blog/lora).
SMALL_RATE, RATE, LORA_FACTOR, LARGE = 6e-5, 1.875e-5, 10, 512
BETAS, WEIGHT_DECAY = (0.9, 0.97), 0.02  # Infinity's, whose weight decay is small too
WARMUP, WARMUP_SHARE = 100, 0.1
CACHE = "tokens"  # folder of a run
KEYS = 1000  # of pairs that tell data from other data

Made = TypeVar("Made")


@dataclass(frozen=True)
class TrainingPlan:
    """A fine-tuning before it starts, for people to read."""

    options: TrainOptions
    config: ModelConfig
    machine: TrainingMachine
    memory: MemoryPlan
    trained: int
    parameters: int

    def __str__(self) -> str:
        options, (height, _) = self.options, self.config.picture_size
        kind = "all weights" if options.lora is None else f"LoRA of rank {options.lora}"
        return "\n  ".join(
            [
                f"{options.output}: {self.config.name} at {height} px, {kind}",
                f"{self.trained:,} of {self.parameters:,} parameters are trained, in "
                f"{self.machine.precision} on {self.machine.device}",
                f"{options.steps} steps of {options.batch} pairs",
                f"needs {self.memory}",
            ]
        )

    def check(self) -> None:
        """Raise ExportError if the device has less memory free than it needs."""
        if self.machine.device.startswith("cuda"):
            free, needed = torch.cuda.mem_get_info()[0], self.memory.total
        else:  # all processes are in the same memory
            free, needed = available_memory(), self.memory.total * self.memory.processes
        if free is not None and free < needed:
            raise ExportError(
                f"{readable_size(free)} of memory are free and training needs "
                f"{readable_size(needed)}: use --lora, fewer pairs --at-once, or more GPUs with "
                "torchrun"
            )


def plan_training(options: TrainOptions, device: str | None = None) -> TrainingPlan:
    """Return what training takes; weights and data are not read. Raises ConfigError.

    device: of this process, by default the best one.
    """
    config, _ = model_and_weights(options.build_options)
    processes = parallel.processes()
    if options.batch % processes:
        raise ConfigError(
            f"--batch is {options.batch}, which {processes} processes cannot share: give a multiple"
        )
    machine = _machine(options, device or best_device())
    new = partial(_learner, options=options, machine=machine)
    pictures = min(options.at_once, options.batch // processes)
    memory = plan_memory(config, new, pictures, processes)
    sizes = [(p.numel(), p.requires_grad) for p in new(config).parameters()]
    trained = sum(size for size, learns in sizes if learns)
    return TrainingPlan(options, config, machine, memory, trained, sum(size for size, _ in sizes))


def fine_tune(
    options: TrainOptions, notice: Callable[[str], None], accept: Callable[[Download], None]
) -> Path:
    """Train to the last step, or go on with a run; return the file of what was learned.

    notice: called with lines for people, by the first process alone. accept: see `build`.
    """
    with parallel.process_group(best_device()) as device:
        notice = notice if parallel.is_first() else lambda line: None
        plan = plan_training(options, device)
        notice(str(plan))
        plan.check()
        pairs = _in_turn(lambda: read_pairs([str(place) for place in options.data], accept))
        config, sources = _in_turn(lambda: model_and_weights(options.build_options, accept))
        folder = RunFolder(Path(options.output), weights="")
        with folder.locked(), torch.enable_grad():
            record = _record(plan, config, sources, pairs)
            folder.keep_options(record)
            task = _task(plan, config, sources, pairs, record["base"])
            recipe = task.lessons.recipe
            passes = recipe.steps * recipe.batch / len(task.lessons.places)
            notice(f"{len(pairs)} pairs, {len(task.held_out)} held out: {passes:.3g} passes")
            train(task, recipe, plan.machine, folder, notice)
    return Path(options.output) / (TRANSFORMER if options.lora is None else TRAINED)


def best_device() -> str:
    """Return the kind of device that training runs on here."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _machine(options: TrainOptions, device: str) -> TrainingMachine:
    gpu = device.startswith("cuda")
    auto: ComputeType = "bf16" if gpu else "fp32"
    return TrainingMachine(
        device,
        precision=auto if options.precision == "auto" else options.precision,
        log_every=options.log_every,
        save_every=options.save_every,
        report_every=options.report_every,
    )


def _learner(config: ModelConfig, options: TrainOptions, machine: TrainingMachine) -> Learner:
    return new_learner(config, machine, options.lora, not options.keep_activations)


def _recipe(options: TrainOptions, config: ModelConfig) -> TrainingRecipe:
    rate = SMALL_RATE if config.picture_size[0] < LARGE else RATE
    rate *= 1 if options.lora is None else LORA_FACTOR
    return TrainingRecipe(
        steps=options.steps,
        batch=options.batch,
        learning_rate=rate if options.learning_rate is None else options.learning_rate,
        weight_decay=WEIGHT_DECAY,
        betas=BETAS,
        warmup=min(WARMUP, int(WARMUP_SHARE * options.steps)),
        ema_decay=0.0,
        seed=options.seed,
    )


def _task(
    plan: TrainingPlan, config: ModelConfig, sources: Sources, pairs: Sequence[Pair], base: str
) -> FineTuning:
    options, machine = plan.options, plan.machine
    folder = Path(options.output) / CACHE if options.cache is None else Path(options.cache)
    tokens, tokenizer = tokens_of(pairs, config, sources, folder, machine.device)
    count = min(options.held_out, len(pairs) // 10)
    held_out = [i * len(pairs) // count for i in range(count)]
    places = sorted({*range(len(pairs))}.difference(held_out))
    learner = _learner(config, options, machine)
    fill(learner, sources.transformer, machine.device, options.seed)
    lessons = Lessons(
        tokens,
        [pair.weight for pair in pairs],
        places,
        config,
        _recipe(options, config),
        options.at_once,
        parallel.rank(),
        parallel.processes(),
    )
    return FineTuning(
        learner,
        lessons,
        machine,
        tokenizer,
        held_out,
        {place: pairs[place].instruction for place in (held_out or places)[:DRAWN]},
        _types(learner, sources) if options.lora is None else {},
        base,
    )


def _types(learner: Learner, sources: Sources) -> dict[str, torch.dtype]:
    names = (name for name, _ in learner.transformer.named_parameters())
    return {name: sources.transformer[name].dtype for name in names}


def _record(
    plan: TrainingPlan, config: ModelConfig, sources: Sources, pairs: Sequence[Pair]
) -> dict[str, Any]:
    """Return what a run must not change while it goes on."""
    options = plan.options
    encoders = repr(made_by(config, sources)).encode()
    few = range(0, len(pairs), max(1, len(pairs) // KEYS))
    keys = [len(pairs), *(f"{pairs[place].key} {pairs[place].weight}" for place in few)]
    return {
        **asdict(_recipe(options, config)),
        "size": plan.config.name,
        "pixels": plan.config.picture_size[0],
        "lora": options.lora,
        "precision": plan.machine.precision,
        "held_out": options.held_out,
        "base": weights_digest(sources.transformer),
        "encoders": sha256(encoders).hexdigest(),
        "data": sha256(repr(keys).encode()).hexdigest(),
    }


def _in_turn(make: Callable[[], Made]) -> Made:
    """Return what a function makes, in the first process before the others: it may download."""
    if parallel.is_first():
        made = make()
        parallel.wait_for_all()
        return made
    parallel.wait_for_all()
    return make()
