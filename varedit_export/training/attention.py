"""The types and kernels that a transformer in training computes with."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varedit_reference.transformer import (
    AttentionFunction,
    Linear,
    SelfAttention,
    fused_attention,
)


def compute_in(model: nn.Module, dtype: torch.dtype, device: str) -> None:
    """Set the type that matrix products are computed in; weights keep theirs."""
    eager = dtype == torch.bfloat16 and device == "cpu"
    attend: AttentionFunction = eager_attention if eager else fused_attention
    for module in model.modules():
        if isinstance(module, Linear):
            module.compute_dtype = dtype
        elif isinstance(module, SelfAttention):
            module.attend = attend


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
