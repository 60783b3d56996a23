"""Attention, in the two forms that graphs have it in.

- **Written out**, as two products and a softmax. CPUs run it, and TensorRT fuses it.
- **As one operator**, ONNX's `Attention`, which ONNX Runtime's CUDA provider has fused kernels for
  and which TensorRT's parser need not know. The provider chooses a kernel by how the operator is
  used: Flash Attention for 16-bit tensors without a mask, the memory-efficient kernel for fp32 or
  with a mask, provided that heads of a multiple of 8 channels are merged into the last axis
  ([rows, tokens, heads · channels]; it would transpose [rows, heads, tokens, channels]), that
  neither past nor any output but the first is used, and that a mask is numbers of the keys' type,
  its rows a multiple of 4 tokens long.

Shape suffixes are those of `model.py`.
"""

import torch
from torch import Tensor

OPERATOR_OPSET = 23  # the first with the operator


class WrittenOut:
    """Attention as products and a softmax in fp32."""

    def bias(self, bias_R11T: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
        """Prepare the text's bias for blocks of this many tokens. dtype: of keys and values."""
        return bias_R11T

    def over_tokens(self, q_RLHD: Tensor, keys_SRHD: Tensor, values_SRHD: Tensor) -> Tensor:
        """Attend to all tokens seen, queries scaled; return [R, L, C]."""
        return softmax_attention(
            q_RLHD.transpose(1, 2), keys_SRHD.permute(1, 2, 3, 0), values_SRHD.permute(1, 2, 0, 3)
        )

    def over_text(
        self, q_RLHD: Tensor, keys_RHDT: Tensor, values_RHTD: Tensor, bias: Tensor
    ) -> Tensor:
        """Attend to the text, queries not yet scaled; return [R, L, C]."""
        q_RHLD = q_RLHD.transpose(1, 2) * (q_RLHD.shape[-1] ** -0.5)
        return softmax_attention(q_RHLD, keys_RHDT, values_RHTD, bias)


class Operator(WrittenOut):
    """Attention as one operator, whose kernels have softmaxes of their own."""

    def bias(self, bias_R11T: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
        # The provider's kernels read a row of it for every query, and do not broadcast.
        return bias_R11T.to(dtype).expand(-1, -1, tokens, -1)

    def over_tokens(self, q_RLHD: Tensor, keys_SRHD: Tensor, values_SRHD: Tensor) -> Tensor:
        rows, _, heads, _ = q_RLHD.shape
        # Caches are [S, R, H, D]: as one row of R · H heads, keys and values need no transposition.
        q_1LK, keys_1SK, values_1SK = (
            x.flatten(1)[None] for x in (q_RLHD.transpose(0, 1), keys_SRHD, values_SRHD)
        )
        attended_1LK = _attention(q_1LK, keys_1SK, values_1SK, None, rows * heads, 1.0)
        attended_LRHD = attended_1LK.squeeze(0).unflatten(-1, (rows, heads, -1))
        # Heads are merged last: on a CPU ONNX Runtime 1.32 crashes where an fp16 product reads a
        # transposition directly.
        return attended_LRHD.transpose(0, 1).flatten(2)

    def over_text(
        self, q_RLHD: Tensor, keys_RHDT: Tensor, values_RHTD: Tensor, bias: Tensor
    ) -> Tensor:
        heads, width = q_RLHD.shape[2:]
        keys_RTC = keys_RHDT.permute(0, 3, 1, 2).flatten(2)
        values_RTC = values_RHTD.transpose(1, 2).flatten(2)
        q_RLC = cast_to(q_RLHD, keys_RTC.dtype).flatten(2)
        return _attention(q_RLC, keys_RTC, values_RTC, bias, heads, width**-0.5)


WRITTEN_OUT, OPERATOR = WrittenOut(), Operator()


def softmax_attention(
    q_RHLD: Tensor, keys_RHDS: Tensor, values_RHSD: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Compute attention with an fp32 softmax; return [R, L, C], heads merged."""
    scores_RHLS = (cast_to(q_RHLD, keys_RHDS.dtype) @ keys_RHDS).float()
    weights = (scores_RHLS if bias is None else scores_RHLS + bias).softmax(-1)
    return (weights.to(values_RHSD.dtype) @ values_RHSD).transpose(1, 2).flatten(2)


def cast_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast, leaving no node in the graph where the type is the same."""
    return x if x.dtype == dtype else x.to(dtype)


def _attention(
    queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, heads: int, scale: float
) -> Tensor:
    attended, *_ = torch.onnx.ops.attention(
        queries, keys, values, bias, q_num_heads=heads, kv_num_heads=heads, scale=scale
    )
    return attended
