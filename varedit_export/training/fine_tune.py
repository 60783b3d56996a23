"""Fine-tune a model of any size on pairs: `varedit-export train`.

RUN/options.json, checkpoint.pt, log.jsonl, sheets/      see run_folder.py
RUN/adapter.safetensors        of LoRA, for `build --lora`
RUN/transformer.safetensors    of all weights, with released names, for `build --checkpoint`
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from varedit_export.training import parallel
from varedit_export.training.adapter import adapt, first_changes, is_change, write_adapter
from varedit_export.training.attention import compute_in
from varedit_export.training.learner import Example, Learner, PairTokens, make_example
from varedit_export.training.loop import TrainingMachine, TrainingRecipe
from varedit_export.training.sheets import contact_sheet
from varedit_export.weights.lora import TRAINED
from varedit_reference.checkpoint import (
    NamedShape,
    empty_transformer,
    released_transformer,
)
from varedit_reference.config import ModelConfig
from varedit_reference.tokenizer import Tokenizer
from varedit_reference.weights_file import check_finite, write_safetensors
from varedit_runtime.pictures import from_decoder

TRANSFORMER = "transformer.safetensors"
DRAWN = 4  # pairs of a sheet


class Order:
    """The order in which training sees pairs: shuffled anew in each pass, the same in every run.

    A position counts all pairs that were seen before it, so that it is all that resuming needs.
    """

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._seed = count, seed
        self._pass, self._shuffled = -1, np.empty(0, np.int64)

    def __getitem__(self, position: int) -> int:
        """Return the place of the pair at a position, 0 or more."""
        number, place = divmod(position, self._count)
        if number != self._pass:
            random = np.random.default_rng([self._seed, number])
            self._pass, self._shuffled = number, random.permutation(self._count)
        return int(self._shuffled[place])


@dataclass(frozen=True)
class Lessons(Dataset[Sequence[Sequence[Example]]]):
    """What this process learns at every step, in parts that are computed at a time.

    A step's pairs, their order, and their random mistakes depend on the seed and the step alone,
    and not on how many processes share them.
    """

    tokens: Sequence[PairTokens]
    weights: Sequence[float]
    places: Sequence[int]  # of the pairs that are learned from
    config: ModelConfig
    recipe: TrainingRecipe
    at_once: int
    rank: int = 0
    processes: int = 1

    def __getitem__(self, step: int) -> list[list[Example]]:
        first = step * self.recipe.batch
        positions = range(first, first + self.recipe.batch)
        pairs = [self.places[self._order[position]] for position in positions]
        total = sum(self.weights[pair] for pair in pairs)
        own = slice(self.rank, None, self.processes)
        examples = [
            make_example(
                self.tokens[pair],
                self.config,
                self.weights[pair] / total,
                self._generator(position),
            )
            for pair, position in zip(pairs[own], positions[own], strict=True)
        ]
        return _parts(examples, self.at_once)

    def _generator(self, position: int) -> torch.Generator:
        # A CPU generator keeps 32 bits of its seed, so they have to depend on all of the position.
        seed = np.random.SeedSequence((self.recipe.seed, position)).generate_state(1)[0]
        return torch.Generator().manual_seed(int(seed))

    @cached_property
    def _order(self) -> Order:
        return Order(len(self.places), self.recipe.seed)


@dataclass
class FineTuning:
    """A model that is fine-tuned on pairs: a task of the training loop.

    held_out: places of pairs that are not learned from, whose losses are reported. instructions: of
    the pairs of a sheet. types: of the weights as they were stored. base: their `weights_digest`.
    """

    model: Learner
    lessons: Lessons
    machine: TrainingMachine
    tokenizer: Tokenizer
    held_out: Sequence[int]
    instructions: Mapping[int, str]
    types: Mapping[str, torch.dtype]
    base: str
    hidden: tuple[nn.Parameter, ...] = ()

    @property
    def dataset(self) -> Lessons:
        return self.lessons

    def losses(self, batch: Sequence[Example], step: int) -> dict[str, Tensor]:
        return self.model(batch)

    def report(self, model: nn.Module) -> tuple[dict[str, float], Image.Image]:
        """Return the losses of the held-out pairs, without mistakes, and a sheet of some edits."""
        assert isinstance(model, Learner)
        tokens, config = self.lessons.tokens, self.lessons.config
        losses: dict[str, float] = {}
        for place in self.held_out:
            example = make_example(tokens[place], config, 1 / len(self.held_out), None)
            with torch.no_grad():
                parts = model([example])
            losses = {n: losses.get(n, 0.0) + float(part) for n, part in parts.items()}
        drawn = [tokens[place] for place in self.instructions]
        # One at a time: the keys and values of an edit take gigabytes.
        pictures = self._decoded([model.draw(pair, n).cpu() for n, pair in enumerate(drawn)])
        sources, targets = (
            self._decoded([getattr(pair, name)[None].float() for pair in drawn])
            for name in ("source", "target")
        )
        rows = [*zip(sources, pictures, targets, strict=True)]
        sheet = contact_sheet(rows, [*self.instructions.values()], columns=2)
        return {f"held_out_{name}": loss for name, loss in losses.items()}, sheet

    @torch.no_grad()
    def _decoded(self, features: Sequence[Tensor]) -> list[np.ndarray]:
        """Decode features [B, d, h, w], some at a time, on the device for as long as it takes."""
        tokenizer = self.tokenizer.to(self.machine.device)
        pictures = [
            np.asarray(from_decoder(one))
            for some in features
            for one in tokenizer.decode(some.to(self.machine.device)).cpu().numpy()
        ]
        tokenizer.to("cpu")
        return pictures

    def export(self, model: nn.Module, folder: Path) -> None:
        """Write the adapter, or all weights with released names and in the types they had."""
        assert isinstance(model, Learner)
        trained = {n: p for n, p in model.transformer.named_parameters() if p.requires_grad}
        weights = parallel.gathered({name: p.detach() for name, p in trained.items()})
        if not parallel.is_first():
            return
        depth = self.lessons.config.transformer.depth
        if any(map(is_change, weights)):
            write_adapter(folder / TRAINED, weights, depth, self.base)
            return
        layout, stored = released_transformer(depth), dict[str, Tensor]()
        for name, weight in weights.items():
            place = layout(NamedShape(name, tuple(weight.shape)))
            stored[place.name] = weight.cpu().to(self.types[name]).reshape(place.shape)
        write_safetensors(folder / TRANSFORMER, stored, {"format": "pt"})


def new_learner(
    config: ModelConfig, machine: TrainingMachine, rank: int | None, recompute: bool
) -> Learner:
    """Make a learner on the meta device. rank: of LoRA, or None to train all weights.

    What is trained is fp32, and computed in the machine's type; frozen products are of that type.
    """
    dtype = torch.bfloat16 if machine.precision == "bf16" else torch.float32
    stored = torch.float32 if rank is None else dtype
    transformer = empty_transformer(config.transformer, dtype, stored)
    if rank is not None:
        adapt(transformer, rank)
    compute_in(transformer, dtype, machine.device.split(":")[0])
    learner = Learner(transformer, config)
    if recompute:
        learner.recompute()
    return learner


@torch.no_grad()
def fill(learner: Learner, weights: Mapping[str, Tensor], device: str, seed: int) -> None:
    """Give a learner its weights, one at a time; several processes share them out.

    Raises CheckpointError on numbers that are not finite in the type that they get.
    """
    transformer = learner.transformer
    changes = first_changes(transformer, seed)
    if parallel.processes() > 1:
        parallel.shard(learner, [block for block in transformer.blocks])  # type: ignore[misc]
    learner.to_empty(device=device)
    for name, parameter in transformer.named_parameters():
        value = changes[name] if name in changes else weights[name]
        value = check_finite(name, value, parameter.dtype).to(device, parameter.dtype)
        parameter.copy_(parallel.share_like(value, parameter))


def _parts(examples: list[Example], size: int) -> list[list[Example]]:
    return [examples[start : start + size] for start in range(0, len(examples), size)]
