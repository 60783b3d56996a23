"""Binary spherical quantisation (BSQ, arXiv 2406.07548), over several scales of a residual.

A vector of d features, normalised, is replaced by the nearest point of the unit sphere whose
components are all ±1/sqrt(d). That is d independent bits, by sign, and no search:

    bit_i = (f_i > 0),   code_i = (2·bit_i - 1) / sqrt(d)
    d = 4:  f = (0.3, -0.1, 0.7, -0.2)  ->  bits 1 0 1 0  ->  code (0.5, -0.5, 0.5, -0.5)

The same vocabulary as a codebook would take 2^32 entries for d = 32, and a softmax as wide; d bits
take d two-way predictions (Infinity, arXiv 2412.04431).

A code of norm 1 is a coarse answer, so scale after scale quantises what is still missing:

    R_k = down(f - F_(k-1)),   F_k = F_(k-1) + up(code(R_k)),   F_0 = 0

down averages over areas, up is bilinear to the finest grid. F_K is what the decoder draws, and each
scale also corrects the mistakes of those before it.

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
    """Return the bits of features, by sign: normalising them first would not change it."""
    return features > 0


def to_codes(bits: Tensor) -> Tensor:
    """Return the codes of bits [B, d, h, w]: (2·bit - 1)/sqrt(d), vectors of norm 1 over d."""
    return (2 * bits.float() - 1) / sqrt(bits.shape[1])


@dataclass(frozen=True)
class QuantisedScale:
    """One scale: the residual and its bits [B, d, h_k, w_k], the sum F_k [B, d, h_K, w_K]."""

    residual: Tensor
    bits: Tensor
    sum: Tensor


def quantise(
    features: Tensor, grids: Sequence[Grid], bits: Sequence[Tensor] | None = None
) -> Iterator[QuantisedScale]:
    """Quantise features [B, d, h_K, w_K] scale by scale; see the module's equations.

    grids: the tokenizer's own (`positions`), the last one of the features' size. bits: summed, if
    given, in place of the residual's own signs, as after bits were flipped or recorded.
    """
    total = features.new_zeros(features.shape)
    for k, grid in enumerate(grids):
        residual = F.interpolate(features - total, grid, mode="area")  # what is missing, averaged
        chosen = to_bits(residual) if bits is None else bits[k]
        total = add_scale(total, chosen)  # with its errors, which the next residual contains
        yield QuantisedScale(residual, chosen, total)


def add_scale(total: Tensor, bits: Tensor) -> Tensor:
    """Return F_k: the running sum [B, d, h_K, w_K] plus one scale's codes, bilinearly upsampled."""
    return total + resize(to_codes(bits), (total.shape[2], total.shape[3]))


def resize(features: Tensor, grid: Grid) -> Tensor:
    """Resize bilinearly, with half-pixel centres and, even when shrinking, without antialias."""
    if features.shape[2:] == grid:
        return features  # the last scale's codes are added as they are
    return F.interpolate(features, grid, mode="bilinear", align_corners=False)


def to_tokens(features: Tensor, patch: int) -> Tensor:
    """Turn a map [B, d, h, w] into tokens [B, L, c]; with patches, c = 4·i + 2·row + column."""
    return F.pixel_unshuffle(features, patch).flatten(2).transpose(1, 2)


def from_tokens(tokens: Tensor, grid: Grid, patch: int) -> Tensor:
    """Turn tokens [B, L, c] of a grid into the map [B, d, h, w] of tokenizer positions."""
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, grid), patch)


def positions(grid: Grid, patch: int) -> Grid:
    """Return the tokenizer's grid under a grid of tokens: patch times as many each way."""
    return grid[0] * patch, grid[1] * patch


def next_tokens(total: Tensor, grid: Grid, patch: int) -> Tensor:
    """Return the input tokens [B, L, c] of the next scale, made from the running sum.

    The paper averages here; the released code resizes bilinearly, and the weights expect that.
    """
    return to_tokens(resize(total, positions(grid, patch)), patch)


def source_tokens(
    features: Tensor, grids: Sequence[Grid], patch: int, conditioning: Conditioning
) -> Tensor:
    """Return the tokens [B, S, c] that the prefill reads, from the encoder's continuous features.

    Not from codes: quantising would only lose detail of a picture that is known, not predicted.
    S is the finest grid; for full conditioning every grid, averaged over areas, coarse to fine.
    """
    scales = grids if conditioning == "full" else grids[-1:]
    pooled = [F.interpolate(features, positions(grid, patch), mode="area") for grid in scales]
    return torch.cat([to_tokens(scale, patch) for scale in pooled], dim=1)
