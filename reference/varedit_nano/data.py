"""Batches of drawn pictures and edits, each a pure function of its step.

Evaluation, validation (pictures shown during training) and training have disjoint ranges of seeds.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

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


@dataclass(frozen=True)
class EditBatch:
    """A batch of edits: pictures uint8 [B, H, W, 3] before and after, and the instructions."""

    source: Tensor
    target: Tensor
    instructions: list[str]


class PictureBatches(Dataset[list[Tensor]]):
    """The pictures of every step, uint8 [B, H, W, 3], in one part."""

    def __init__(self, batch: int, size: int, first_seed: int = FIRST_TRAINING_SEED) -> None:
        self.batch, self.size, self.first_seed = batch, size, first_seed

    def __getitem__(self, index: int) -> list[Tensor]:
        seeds = step_seeds(index, self.batch, self.first_seed)
        return [_stack([draw_picture(seed, self.size) for seed in seeds])]


class EditBatches(Dataset[list[EditBatch]]):
    """The edits of every step, in one part."""

    def __init__(self, batch: int, size: int, first_seed: int = FIRST_TRAINING_SEED) -> None:
        self.batch, self.size, self.first_seed = batch, size, first_seed

    def __getitem__(self, index: int) -> list[EditBatch]:
        edits = [
            draw_edit(seed, self.size, training_kind(seed))
            for seed in step_seeds(index, self.batch, self.first_seed)
        ]
        sources = _stack([edit.source for edit in edits])
        targets = _stack([edit.target for edit in edits])
        return [EditBatch(sources, targets, [edit.instruction for edit in edits])]


def training_kind(seed: int) -> str:
    """Return the kind of edit that training draws from a seed."""
    return draw_kind(np.random.default_rng([seed, 3]), TRAINING_SHARES)


def step_seeds(step: int, batch: int, first_seed: int = FIRST_TRAINING_SEED) -> range:
    """Return a step's training seeds; no two steps share any."""
    start = first_seed + step * batch
    return range(start, start + batch)


def to_model(pictures: Tensor) -> Tensor:
    """Convert uint8 [B, H, W, 3] to fp32 [B, 3, H, W] in [-1, 1]."""
    return (pictures.float() / 127.5 - 1).permute(0, 3, 1, 2).contiguous()


def to_pixels(pictures: Tensor) -> np.ndarray:
    """Convert decoded [B, 3, H, W] to uint8 [B, H, W, 3], clamped and truncated as in an edit."""
    levels = (pictures.float().clamp(-1, 1) + 1) / 2 * 255
    return levels.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def _stack(pictures: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(pictures))
