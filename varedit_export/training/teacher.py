"""Teacher forcing: the inputs and target bits of every scale, and the loss over them."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from varedit_reference.config import Grid
from varedit_reference.quantisation import add_scale, next_tokens, positions, to_bits, to_tokens

LARGEST_FLIP_RATE = 0.3


@dataclass(frozen=True)
class Lesson:
    """What is learned from target pictures, per scale.

    bits: the targets [B, L_k, c]. inputs: the tokens [B, L_k, c] of all scales except the first.
    """

    inputs: list[Tensor]
    bits: list[Tensor]


def lesson(
    features: Tensor,
    grids: Sequence[Grid],
    patch: int,
    generator: torch.Generator,
    largest_flip_rate: float = LARGEST_FLIP_RATE,
) -> Lesson:
    """Make a lesson from features [B, d, h_K, w_K], with bitwise self-correction (Infinity).

    At every scale a random share of each picture's bits, 0 .. largest_flip_rate, is flipped, in the
    inputs only: the next inputs contain the mistakes, and the next targets, the signs of what is
    then missing, correct them. Otherwise the model would never see the mistakes that it makes.
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
    """Return each scale's share of the loss, in all 1; a token weighs 1/sqrt(h_k·w_k)."""
    shares = [sqrt(rows * columns) for rows, columns in grids]
    return [share / sum(shares) for share in shares]


def bit_losses(logits: Sequence[Tensor], bits: Sequence[Tensor]) -> list[Tensor]:
    """Return each scale's mean cross-entropy per bit of every picture, [B].

    logits: [B, L, c, 2] of every scale. bits: the targets [B, L, c].
    """
    return [
        # softmax over two logits is the sigmoid of their difference
        F.binary_cross_entropy_with_logits(
            scale[..., 1] - scale[..., 0], target.float(), reduction="none"
        ).mean((1, 2))
        for scale, target in zip(logits, bits, strict=True)
    ]


def edit_losses(
    logits: Sequence[Tensor], bits: Sequence[Tensor], grids: Sequence[Grid], shares: Tensor
) -> dict[str, Tensor]:
    """Return the loss of a batch, and of every scale: scale1, scale2, and so on.

    logits, bits: as `bit_losses` takes them. shares [B]: what each picture's loss is multiplied by.
    """
    by_scale = [loss @ shares for loss in bit_losses(logits, bits)]
    weighted = (weight * part for weight, part in zip(scale_weights(grids), by_scale, strict=True))
    parts = {f"scale{k + 1}": part for k, part in enumerate(by_scale)}
    return {"loss": torch.stack([*weighted]).sum(), **parts}
