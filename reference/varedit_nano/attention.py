"""Attention as matrix products, for training in bf16 on a CPU."""

import torch.nn.functional as F
from torch import Tensor


def eager_attention(q_RHLD: Tensor, k_RHSD: Tensor, v_RHSD: Tensor) -> Tensor:
    """Compute softmax(q·kᵀ)·v as matrix products, which CPUs with bf16 do faster than fused.

    Scores in bf16 are coarser than the fused kernel's. Subtracting the keys' mean shifts all scores
    of a query alike, which softmax ignores; the values' mean is added back. Without their means,
    the numbers that are rounded to bf16 are smaller, and so are the errors.
    """
    keys = k_RHSD - k_RHSD.mean(-2, keepdim=True)
    mean = v_RHSD.mean(-2, keepdim=True)
    weights = F.softmax(q_RHLD @ keys.transpose(-1, -2), dim=-1)
    return weights @ (v_RHSD - mean) + mean
