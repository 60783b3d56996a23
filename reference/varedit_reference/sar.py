"""The scale-aligned reference (SAR): the source at the resolution of the predicted scale.

Source features on the finest grid guide a coarse target scale badly (arXiv 2508.15772), above all
in the first block, whose attention ranges widely. So block 0 sees the source pooled to the grid of
the predicted scale; all later blocks see it at full resolution. Eq. 6-7 of the paper pool features
and then project them to keys and values. The released weights need the keys (after rotary
embedding) and values pooled, which is not the same: a key's rotation depends on its position.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from varedit_reference.config import Grid


def scale_aligned_references(source_SRHD: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
    """Average-pool block 0's source keys (or values) to every scale's grid.

    source_SRHD: [h_K·w_K, R, H, D] on the finest grid; keys are given after the rotary embedding.
    Returns one [h_k·w_k, R, H, D] per scale. Pools in fp32, whatever the type.
    """
    rows, columns = grids[-1]
    source_RCHW = source_SRHD.unflatten(0, (rows, columns)).permute(2, 3, 4, 0, 1).flatten(1, 2)
    pooled = [F.adaptive_avg_pool2d(source_RCHW.float(), grid) for grid in grids]
    return [
        p.unflatten(1, source_SRHD.shape[2:]).flatten(3).permute(3, 0, 1, 2).to(source_SRHD.dtype)
        for p in pooled
    ]
