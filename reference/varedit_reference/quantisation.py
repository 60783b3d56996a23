"""Binary spherical quantisation, over several scales of a residual.

A feature map is [B, d, h, w]; its bits are a bool map of the same shape; its tokens are
[B, L, c], row-major, with c = d, or 4·d where a token is a 2x2 patch of positions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from varedit_reference.config import Conditioning, Grid


def to_bits(features: Tensor) -> Tensor:
    """Features [B, d, h, w] -> bits, by sign. (Normalising to the sphere first keeps the sign.)"""
    return features > 0


def to_codes(bits: Tensor) -> Tensor:
    """Bits [B, d, h, w] -> the nearest corners of the unit sphere's cube, (2·bit - 1)/sqrt(d)."""
    return (2 * bits.float() - 1) / sqrt(bits.shape[1])


@dataclass(frozen=True)
class QuantisedScale:
    """One scale: the residual on its grid, its bits, and the sum of codes up to and with it."""

    residual: Tensor
    bits: Tensor
    sum: Tensor


def quantise(
    features: Tensor, grids: Sequence[Grid], bits: Sequence[Tensor] | None = None
) -> Iterator[QuantisedScale]:
    """Multi-scale residual quantisation of features [B, d, h_K, w_K], scale by scale.

    grids are the tokenizer's own, the last one the features' size. Each scale area-downsamples
    what the scales before it left, quantises it, and adds its bilinearly upsampled codes to the
    sum. Given bits are summed in place of those the residual gives.
    """
    total = features.new_zeros(features.shape)
    for k, grid in enumerate(grids):
        residual = F.interpolate(features - total, grid, mode="area")
        chosen = to_bits(residual) if bits is None else bits[k]
        total = add_scale(total, chosen)
        yield QuantisedScale(residual, chosen, total)


def add_scale(total: Tensor, bits: Tensor) -> Tensor:
    """The running sum F [B, d, h_K, w_K] plus one scale's codes, bilinearly upsampled."""
    return total + resize(to_codes(bits), (total.shape[2], total.shape[3]))


def dequantise(bits: Sequence[Tensor]) -> Tensor:
    """Bits of all scales -> the sum of their codes [B, d, h_K, w_K], the decoder's input."""
    total = to_codes(bits[-1]).new_zeros(bits[-1].shape)
    for scale in bits:
        total = add_scale(total, scale)
    return total


def resize(features: Tensor, grid: Grid) -> Tensor:
    """Bilinear with half-pixel centres and no antialias, also when it shrinks."""
    if features.shape[2:] == grid:
        return features
    return F.interpolate(features, grid, mode="bilinear", align_corners=False)


def to_tokens(features: Tensor, patch: int) -> Tensor:
    """A map [B, d, h, w] -> tokens [B, L, c]; channel 4·i + 2·row + column in a patch."""
    return F.pixel_unshuffle(features, patch).flatten(2).transpose(1, 2)


def from_tokens(tokens: Tensor, grid: Grid, patch: int) -> Tensor:
    """Tokens [B, L, c] on a grid of tokens -> the map [B, d, h, w] of tokenizer positions."""
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, grid), patch)


def positions(grid: Grid, patch: int) -> Grid:
    """A grid of tokens -> the tokenizer's grid."""
    return grid[0] * patch, grid[1] * patch


def next_tokens(total: Tensor, grid: Grid, patch: int) -> Tensor:
    """The running sum -> the input tokens [B, L, c] of the scale with that grid."""
    return to_tokens(resize(total, positions(grid, patch)), patch)


def source_tokens(
    features: Tensor, grids: Sequence[Grid], patch: int, conditioning: Conditioning
) -> Tensor:
    """The encoder's continuous features of the source -> what the prefill reads, [B, S, c].

    The finest grid, or for full conditioning every grid, area-downsampled, coarse to fine.
    """
    scales = grids if conditioning == "full" else grids[-1:]
    pooled = [F.interpolate(features, positions(grid, patch), mode="area") for grid in scales]
    return torch.cat([to_tokens(scale, patch) for scale in pooled], dim=1)
