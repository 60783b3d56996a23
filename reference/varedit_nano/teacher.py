"""What the transformer learns from a target picture: inputs and bits of every scale."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from varedit_reference.config import Grid
from varedit_reference.quantisation import (
    add_scale,
    next_tokens,
    positions,
    to_bits,
    to_tokens,
)

LARGEST_FLIP_RATE = 0.3


@dataclass(frozen=True)
class Lesson:
    """bits [B, L_k, c]: the targets of every scale; inputs [B, L_k, c]: of all but the first."""

    inputs: list[Tensor]
    bits: list[Tensor]


def lesson(
    features: Tensor,
    grids: Sequence[Grid],
    patch: int,
    generator: torch.Generator,
    largest_flip_rate: float = LARGEST_FLIP_RATE,
) -> Lesson:
    """Teacher forcing with bitwise self-correction, from features [B, d, h_K, w_K].

    At every scale a share of each picture's bits, drawn from 0 .. largest_flip_rate, is flipped in
    the input path only: later inputs hold the mistakes, and later bits, those of the residual
    that is left, mend them.
    """
    total = torch.zeros_like(features)
    inputs, targets = [], []
    for k, grid in enumerate(grids):
        residual = F.interpolate(features - total, positions(grid, patch), mode="area")
        bits = to_bits(residual)
        targets.append(to_tokens(bits.float(), patch).bool())
        total = add_scale(total, flip(bits, largest_flip_rate, generator))
        if k + 1 < len(grids):
            inputs.append(next_tokens(total, grids[k + 1], patch))
    return Lesson(inputs, targets)


def flip(bits: Tensor, largest_rate: float, generator: torch.Generator) -> Tensor:
    """Flip a share of each picture's bits [B, ...], drawn from 0 .. largest_rate."""
    device = generator.device
    rate = largest_rate * torch.rand(len(bits), 1, 1, 1, generator=generator, device=device)
    flipped = torch.rand(bits.shape, generator=generator, device=device) < rate
    return bits ^ flipped.to(bits.device)


def scale_weights(grids: Sequence[Grid]) -> list[float]:
    """Each scale's share of the loss: its tokens weigh 1/sqrt(h·w) each, all together 1."""
    shares = [sqrt(rows * columns) for rows, columns in grids]
    return [share / sum(shares) for share in shares]


def bit_losses(logits: Sequence[Tensor], bits: Sequence[Tensor]) -> list[Tensor]:
    """Cross-entropy per bit, mean over each scale: logits [B, L, c, 2], bits [B, L, c]."""
    return [
        # The two-way softmax's cross-entropy, in one number a bit.
        F.binary_cross_entropy_with_logits(scale[..., 1] - scale[..., 0], target.float())
        for scale, target in zip(logits, bits, strict=True)
    ]
