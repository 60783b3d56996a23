"""The Scale-Aligned Reference: the source at the scale being predicted, for block 0."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from varedit_reference.config import Grid


def scale_aligned_references(source_SRHD: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
    """Area-downsample block 0's source keys (or values) to every scale's grid.

    source_SRHD [h_K·w_K, R, H, D] on the finest grid, keys after the rotary embedding ->
    one [h_k·w_k, R, H, D] per scale. The paper's Eq. 6-7 pools the features before projecting;
    the released weights need the keys and values pooled.
    """
    rows, columns = grids[-1]
    source_RCHW = source_SRHD.unflatten(0, (rows, columns)).permute(2, 3, 4, 0, 1).flatten(1, 2)
    pooled = [F.adaptive_avg_pool2d(source_RCHW.float(), grid) for grid in grids]
    return [
        p.unflatten(1, source_SRHD.shape[2:]).flatten(3).permute(3, 0, 1, 2).to(source_SRHD.dtype)
        for p in pooled
    ]
