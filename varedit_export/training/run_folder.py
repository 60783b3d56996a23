"""The run folder: options, checkpoint, log and sheets of one training run.

    options.json     the recipe and data of the run, fixed by its first start
    checkpoint.pt    tensors only: trained weights, EMA, optimiser state, steps done
    log.jsonl        losses or scores, one entry a line
    sheets/          pictures to look at
    ema/             the averaged weights of nano, as the reference loads them

A run may be killed at any point, and the machine may lose its power: the checkpoint is replaced as
a whole once it is on the disk, and everything else is made again from it. Of several processes the
first one writes; a checkpoint is the same for any number of them.
"""

import copy
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from varedit_export.resumable.locked import locked
from varedit_export.training.optimisers import Optimisers
from varedit_export.training.parallel import gathered, is_first, share_like, wait_for_all
from varedit_reference.weights_file import read_header_file, whole_file
from varedit_runtime.errors import CheckpointError, ConfigError, one_line

LEFTOVER = re.compile(r"\.[0-9a-f]{32}")  # of `atomic_file` in a process that was killed


@dataclass
class TrainingState:
    """A model in training, the running average of its weights (EMA), and the steps done.

    values: losses and norm of the gradient of the last step; none before the first one.
    """

    model: nn.Module
    ema: nn.Module | None
    optimiser: Optimisers
    step: int = 0
    values: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def start(
        cls, model: nn.Module, optimiser: Optimisers, averaging: bool = True
    ) -> "TrainingState":
        ema = copy.deepcopy(model).requires_grad_(False).eval() if averaging else None
        return cls(model, ema, optimiser)

    @property
    def averaged(self) -> nn.Module:
        """The model to use: the average, if there is one."""
        return self.model if self.ema is None else self.ema

    def content(self) -> dict[str, Any]:
        """Return what a checkpoint holds of it; frozen weights are not trained, so not kept."""
        trained = [name for name, p in self.model.named_parameters() if p.requires_grad]
        models = {"model": self.model} | ({} if self.ema is None else {"ema": self.ema})
        states = {name: model.state_dict() for name, model in models.items()}
        kept = {name: {key: state[key] for key in trained} for name, state in states.items()}
        return {**kept, "optimiser": self.optimiser.state_dict(), "step": self.step}

    def restore(self, content: Mapping[str, Any]) -> None:
        """Take the content of a checkpoint. Raises KeyError, ValueError or RuntimeError."""
        for name, model in {"model": self.model, "ema": self.ema}.items():
            if model is not None:
                _load_trained(model, content[name], self.model)
        self.optimiser.load_state_dict(content["optimiser"])
        self.step = content["step"]


class RunFolder:
    def __init__(self, folder: str | Path, weights: str = "ema") -> None:
        """Make the folder. weights: where in it the task writes what it has learned."""
        self.folder = Path(folder)
        self.checkpoint = self.folder / "checkpoint.pt"
        self.log_file = self.folder / "log.jsonl"
        self.sheets = self.folder / "sheets"
        self.weights = self.folder / weights
        self.sheets.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out of the folder, and delete what killed ones were writing.

        Raises ConfigError if another process trains there.
        """
        if not is_first():
            yield
            return
        with locked(self.folder, "trains"):
            for path in self.folder.iterdir():
                if LEFTOVER.fullmatch(path.name):
                    rmtree(path, ignore_errors=True)
            yield

    def keep_options(self, options: Mapping[str, Any]) -> None:
        """Record the run's options. Raises ConfigError if it was started with different ones."""
        path = self.folder / "options.json"
        given = json.loads(json.dumps(options))
        if is_first() and not path.exists():
            text = json.dumps(given, indent=2) + "\n"
            with whole_file(path, len(text)) as partial:
                partial.write_text(text)
        wait_for_all()
        kept = self._kept_options(path)
        changed = sorted(key for key in kept | given if kept.get(key) != given.get(key))
        if changed:
            told = ", ".join(f"{key} {kept.get(key)}, not {given.get(key)}" for key in changed)
            raise ConfigError(
                f"{self.folder} was started with {told}: give these, or another folder"
            )

    @staticmethod
    def _kept_options(path: Path) -> dict[str, Any]:
        try:
            kept = json.loads(read_header_file(path))
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{path} cannot be read: choose another folder") from error
        if not isinstance(kept, dict):
            raise ConfigError(f"{path} holds no options of a run: choose another folder")
        return kept

    def save(self, state: TrainingState) -> None:
        """Write the checkpoint: whole and on the disk, or not at all."""
        content = gathered(state.content())
        if is_first():
            size = sum(tensor.nbytes for tensor in _tensors(content))
            with whole_file(self.checkpoint, size) as partial, partial.open("wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
        wait_for_all()

    def resume(self, state: TrainingState) -> None:
        """Load the checkpoint, if there is one, into a new state; drop later lines of the log.

        Raises CheckpointError if the checkpoint does not fit the model.
        """
        if self.checkpoint.exists():
            try:
                kept = torch.load(self.checkpoint, "cpu", weights_only=True, mmap=True)
                state.restore(kept)
            except (OSError, RuntimeError, KeyError, ValueError, EOFError) as error:
                raise CheckpointError(
                    f"{self.checkpoint} does not fit this model ({one_line(error)[:200]}): use "
                    "another run folder"
                ) from error
        if is_first():
            self._cut_log(state.step)

    def log(self, entry: Mapping[str, Any]) -> None:
        if is_first():
            with self.log_file.open("a") as file:
                file.write(json.dumps(entry) + "\n")

    def keep_sheet(self, name: str, sheet: Image.Image) -> None:
        """Write a sheet of pictures."""
        if is_first():
            sheet.save(self.sheets / name)

    def _cut_log(self, step: int) -> None:
        if not self.log_file.exists():
            return
        kept = [line for line in self.log_file.read_text().splitlines() if _step_of(line) <= step]
        text = "".join(line + "\n" for line in kept)
        with whole_file(self.log_file, len(text)) as partial:
            partial.write_text(text)


def _load_trained(model: nn.Module, kept: Mapping[str, Tensor], trained: nn.Module) -> None:
    """Give a model the kept weights of all parameters that are trained. Raises KeyError."""
    targets = dict(model.named_parameters())
    names = [name for name, parameter in trained.named_parameters() if parameter.requires_grad]
    if unknown := kept.keys() - names:
        raise KeyError(f"{len(unknown)} more weights, such as {min(unknown)}")
    with torch.no_grad():
        for name in names:
            if kept[name].shape != targets[name].shape:
                raise ValueError(f"{name} {[*kept[name].shape]} for {[*targets[name].shape]}")
            targets[name].copy_(share_like(kept[name], targets[name]))


def _tensors(content: Any) -> Iterator[Tensor]:
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, Mapping):
        for value in content.values():
            yield from _tensors(value)
    elif isinstance(content, list | tuple):
        for value in content:
            yield from _tensors(value)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # cut off by a kill
        return float("inf")
