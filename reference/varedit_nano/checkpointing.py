"""The run folder: options, checkpoint, log and sheets of one training run.

    options.json     the recipe and data of the run, fixed by its first start
    checkpoint.pt    tensors only: model, EMA, optimiser state, steps done
    log.jsonl        losses or scores, one entry a line
    sheets/          pictures to look at
    ema/             the averaged weights, as the reference loads them

A run may be killed at any point: the checkpoint is replaced as a whole, and everything else is
made again from it.
"""

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from varedit_nano.optimisers import Optimisers
from varedit_reference.weights_file import whole_file
from varedit_runtime.errors import CheckpointError, ConfigError, one_line


@dataclass
class TrainingState:
    """A model in training, the running average of its weights (EMA), and the steps done."""

    model: nn.Module
    ema: nn.Module
    optimiser: Optimisers
    step: int = 0

    @classmethod
    def start(cls, model: nn.Module, optimiser: Optimisers) -> "TrainingState":
        return cls(model, copy.deepcopy(model).requires_grad_(False).eval(), optimiser)


class RunFolder:
    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.checkpoint = self.folder / "checkpoint.pt"
        self.log_file = self.folder / "log.jsonl"
        self.sheets = self.folder / "sheets"
        self.ema = self.folder / "ema"
        self.sheets.mkdir(parents=True, exist_ok=True)

    def keep_options(self, options: Mapping[str, Any]) -> None:
        """Record the run's options. Raises ConfigError if it was started with different ones."""
        path = self.folder / "options.json"
        given = json.loads(json.dumps(options))
        if not path.exists():
            text = json.dumps(given, indent=2) + "\n"
            with whole_file(path, len(text)) as partial:
                partial.write_text(text)
            return
        kept = json.loads(path.read_text())
        changed = sorted(key for key in kept | given if kept.get(key) != given.get(key))
        if changed:
            told = ", ".join(f"{key} {kept.get(key)}, not {given.get(key)}" for key in changed)
            raise ConfigError(
                f"{self.folder} was started with {told}: give these, or another folder"
            )

    def save(self, state: TrainingState) -> None:
        content = {
            "model": state.model.state_dict(),
            "ema": state.ema.state_dict(),
            "optimiser": state.optimiser.state_dict(),
            "step": state.step,
        }
        with whole_file(self.checkpoint, 0) as partial:
            torch.save(content, partial)

    def _load(self) -> dict[str, Any]:
        return torch.load(self.checkpoint, map_location="cpu", weights_only=True)

    @contextmanager
    def _fitting(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, KeyError, ValueError, EOFError) as error:
            reason = one_line(error)[:200]
            raise CheckpointError(
                f"{self.checkpoint} does not fit this model ({reason}): use another run folder"
            ) from error

    def resume(self, state: TrainingState) -> None:
        """Load the checkpoint, if there is one, into a new state; drop later lines of the log.

        Raises CheckpointError if the checkpoint does not fit the model.
        """
        if self.checkpoint.exists():
            with self._fitting():
                content = self._load()
                state.model.load_state_dict(content["model"])
                state.ema.load_state_dict(content["ema"])
                state.optimiser.load_state_dict(content["optimiser"])
                state.step = content["step"]
        self._cut_log(state.step)

    def log(self, entry: Mapping[str, Any]) -> None:
        with self.log_file.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def _cut_log(self, step: int) -> None:
        if not self.log_file.exists():
            return
        kept = [line for line in self.log_file.read_text().splitlines() if _step_of(line) <= step]
        text = "".join(line + "\n" for line in kept)
        with whole_file(self.log_file, len(text)) as partial:
            partial.write_text(text)


def write_weights(
    path: Path, state: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
) -> None:
    """Write weights, converted to one type, as a safetensors file: whole or not at all."""
    weights = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in state.items()}
    with whole_file(path, sum(tensor.nbytes for tensor in weights.values())) as partial:
        save_file(weights, partial, {"format": "pt"})


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # cut off by a kill
        return float("inf")
