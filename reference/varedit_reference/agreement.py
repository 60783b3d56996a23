"""Do two runs of the same edit agree? Bits must be equal but for ties.

A bit is drawn as u < p. Where u, or the nucleus's cut, lies within rounding of p, arithmetic in
another order may draw the other bit, and a free-running edit then goes another way for good.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from varedit_reference.sampling import bit_probability, distance_to_cut
from varedit_reference.scale_loop import PredictedScale

TIE = 1e-5


@dataclass(frozen=True)
class BitAgreement:
    """How two runs' bits of one scale agree.

    margin: the largest distance to a tie among the bits that differ, 0 if none does, infinite if
    any logit is not finite.
    """

    scale: int
    bits: int
    differing: int
    margin: float

    @property
    def explained(self) -> bool:
        """Whether every difference is a tie."""
        return self.margin <= TIE


def compare_scale(one: PredictedScale, other: PredictedScale, noise: Tensor) -> BitAgreement:
    """Compare a scale of two runs that had the same input and noise [B, L, c]."""
    differs = one.bits != other.bits
    margins = torch.minimum(tie_margin(one.logits, noise), tie_margin(other.logits, noise))
    finite = bool(one.logits.isfinite().all() and other.logits.isfinite().all())
    margin = margins.where(differs, 0).max().item() if finite else inf
    return BitAgreement(one.scale, differs.numel(), int(differs.sum()), margin)


def compare_until_tie(
    one: Iterable[PredictedScale], other: Iterable[PredictedScale], noise: Iterable[Tensor]
) -> list[BitAgreement]:
    """Compare two free-running edits scale by scale, up to the first scale that differs."""
    compared = []
    for a, b, u in zip(one, other, noise, strict=True):
        compared.append(compare_scale(a, b, u))
        if compared[-1].differing:
            break
    return compared


def tie_margin(logits: Tensor, noise: Tensor) -> Tensor:
    """Guided logits [B, L, c, 2] -> how far each bit's draw is from going the other way.

    The distance of the chance of bit 1 to the noise or to the nucleus's cut, whichever is nearer.
    """
    probability = bit_probability(logits)
    return torch.minimum((noise - probability).abs(), distance_to_cut(probability))
