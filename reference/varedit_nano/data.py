"""Batches of drawn pictures and edits, each a pure function of its step.

Evaluation, validation (pictures shown during training) and training have disjoint ranges of seeds.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from varedit_nano.scenes import draw_edit, draw_kind, draw_picture

EVALUATION_SEEDS = range(0, 1_000_000)
VALIDATION_SEEDS = range(1_000_000, 2_000_000)
FIRST_TRAINING_SEED = 2_000_000

TRAINING_SHARES = {
    "add": 0.22,
    "remove": 0.08,
    "replace": 0.20,
    "recolour": 0.13,
    "resize": 0.15,
    "move": 0.06,
    "background": 0.03,
    "style": 0.04,
    "compound": 0.09,
}
"""The share of each kind of edit in training; kinds that are harder to learn have more."""

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class EditBatch:
    """A batch of edits: pictures uint8 [B, H, W, 3] before and after, and the instructions."""

    source: Tensor
    target: Tensor
    instructions: list[str]


class PictureBatches(Dataset[Tensor]):
    """The pictures of every step, uint8 [B, H, W, 3]."""

    def __init__(self, batch: int, size: int, first_seed: int = FIRST_TRAINING_SEED) -> None:
        self.batch, self.size, self.first_seed = batch, size, first_seed

    def __getitem__(self, index: int) -> Tensor:
        return _stack(
            [
                draw_picture(seed, self.size)
                for seed in step_seeds(index, self.batch, self.first_seed)
            ]
        )


class EditBatches(Dataset[EditBatch]):
    """The edits of every step."""

    def __init__(self, batch: int, size: int, first_seed: int = FIRST_TRAINING_SEED) -> None:
        self.batch, self.size, self.first_seed = batch, size, first_seed

    def __getitem__(self, index: int) -> EditBatch:
        edits = [
            draw_edit(seed, self.size, training_kind(seed))
            for seed in step_seeds(index, self.batch, self.first_seed)
        ]
        return EditBatch(
            _stack([edit.source for edit in edits]),
            _stack([edit.target for edit in edits]),
            [edit.instruction for edit in edits],
        )


def training_kind(seed: int) -> str:
    """Return the kind of edit that training draws from a seed."""
    return draw_kind(np.random.default_rng([seed, 3]), TRAINING_SHARES)


def step_seeds(step: int, batch: int, first_seed: int = FIRST_TRAINING_SEED) -> range:
    """Return a step's training seeds; no two steps share any."""
    start = first_seed + step * batch
    return range(start, start + batch)


def batches(dataset: Dataset[Batch], steps: range, workers: int) -> Iterator[Batch]:
    """Yield the batches of these steps in order; worker processes, if any, draw them ahead."""
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
    )
    return iter(loader)


def to_model(pictures: Tensor) -> Tensor:
    """Convert uint8 [B, H, W, 3] to fp32 [B, 3, H, W] in [-1, 1]."""
    return (pictures.float() / 127.5 - 1).permute(0, 3, 1, 2).contiguous()


def to_pixels(pictures: Tensor) -> np.ndarray:
    """Convert decoded [B, 3, H, W] to uint8 [B, H, W, 3], clamped and truncated as in an edit."""
    levels = (pictures.float().clamp(-1, 1) + 1) / 2 * 255
    return levels.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def _stack(pictures: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(pictures))
