"""Compare two runs of the same edit by the reference: all bits must be equal, except at ties.

Every later scale reads the bits of the ones before, so two free-running edits are comparable only
up to the first scale in which they differ.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from varedit_reference.sampling import TIE, tie_margin
from varedit_reference.scale_loop import PredictedScale


@dataclass(frozen=True)
class BitAgreement:
    """The agreement of two runs on one scale: how many bits there are and how many differ.

    margin: the largest distance to a tie (`tie_margin`) among the differing bits; 0 if none
    differs, infinite if any logit is not finite.
    """

    scale: int
    bits: int
    differing: int
    margin: float

    @property
    def explained(self) -> bool:
        """True if every differing bit is a tie."""
        return self.margin <= TIE


def compare_scale(one: PredictedScale, other: PredictedScale, noise: Tensor) -> BitAgreement:
    """Compare one scale of two runs that had the same input and the same noise [B, L, c]."""
    differs = one.bits != other.bits
    margins = torch.minimum(tie_margin(one.logits, noise), tie_margin(other.logits, noise))
    finite = bool(one.logits.isfinite().all() and other.logits.isfinite().all())
    margin = margins.where(differs, 0).max().item() if finite else inf
    return BitAgreement(one.scale, differs.numel(), int(differs.sum()), margin)


def compare_until_tie(
    one: Iterable[PredictedScale], other: Iterable[PredictedScale], noise: Iterable[Tensor]
) -> list[BitAgreement]:
    """Compare two free-running edits scale by scale; stop after the first scale that differs."""
    compared = []
    for a, b, u in zip(one, other, noise, strict=True):
        compared.append(compare_scale(a, b, u))
        if compared[-1].differing:
            break
    return compared
