"""Attention as matrix products, for training in bf16 on a CPU."""

import torch.nn.functional as F
from torch import Tensor


def eager_attention(q_RHLD: Tensor, k_RHSD: Tensor, v_RHSD: Tensor) -> Tensor:
    """softmax(q·kᵀ)·v, as `fused_attention`, from products that a CPU with bf16 does faster.

    Scores in bf16 are coarser than the fused kernel's. Neither a shift of all keys, which moves a
    query's scores together, nor one of all values, added again to their mean, changes the result:
    without their means, what is rounded is smaller.
    """
    keys = k_RHSD - k_RHSD.mean(-2, keepdim=True)
    mean = v_RHSD.mean(-2, keepdim=True)
    weights = F.softmax(q_RHLD @ keys.transpose(-1, -2), dim=-1)
    return weights @ (v_RHSD - mean) + mean
