"""What nano's trainers have besides those of any model: a fast path, and weights to start from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from varedit_export.training.loop import Task, TrainingMachine


@dataclass(frozen=True)
class NanoMachine(TrainingMachine):
    """How a machine computes a part of nano. compiled: by torch.compile."""

    compiled: bool = False

    @property
    def memory_format(self) -> torch.memory_format:
        """The faster memory format of the tokenizer's convolutions, forward and backward."""
        return torch.channels_last if self.device == "cuda" else torch.contiguous_format


class NanoTask(Task[Any], Protocol):
    """A part of nano to train."""

    def losses(self, batch: Any, step: int, fast: bool = True) -> dict[str, Tensor]:
        """Return a batch's losses. fast: compute as the machine says, else eager fp32."""
        ...

    def restore(self, folder: Path) -> None:
        """Load the weights that `export` wrote. Raises VareditError if they do not fit."""
        ...
