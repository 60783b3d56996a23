"""The transformer as its graphs compute it: the reference, rewritten for ONNX.

One set of weights, named as in `layout.py`, serves all stages. Attention is written
out, key-value caches are explicit, weights need no work at run time.

Shape suffixes: R rows (conditional rows of all pictures first), T text tokens, L new tokens, S all
tokens seen, C width, H heads, D = C/H.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varedit_reference.config import MAX_LEVELS, MAX_TEXT_TOKENS, TransformerConfig


@dataclass(frozen=True)
class TextInputs:
    """What the condition stage hands to all others; keys lie ready for the product."""

    modulation_R6C: Tensor
    bias_R11T: Tensor
    keys_RHDT: Sequence[Tensor]
    values_RHTD: Sequence[Tensor]


@dataclass(frozen=True)
class Past:
    """Keys and values a block's new tokens see besides their own, [P, R, H, D] each."""

    keys: Sequence[Tensor] = ()
    values: Sequence[Tensor] = ()


class GraphTransformer(nn.Module):
    """The weights of all stages. dtype: of the matrix products and of the caches."""

    def __init__(self, config: TransformerConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        width, text = config.width, config.text_channels
        self.unconditional_text = parameter(MAX_TEXT_TOKENS, text)
        self.start_token = parameter(width)
        self.level_embedding = parameter(MAX_LEVELS, width)
        self.token_embedding = Product(config.token_channels, width, dtype)
        self.text_norm = parameter(text)
        self.text_pool = TextPool(config, dtype)
        self.text_memory = nn.ModuleDict(
            {"0": Product(text, width, dtype), "2": Product(width, width, dtype)}
        )
        self.shared_modulation = Product(width, 6 * width, torch.float32)
        self.head_modulation = Product(width, 2 * width, torch.float32)
        self.head = Product(width, 2 * config.token_channels, torch.float32)
        self.blocks = cast(
            "Sequence[Block]", nn.ModuleList(Block(config, dtype) for _ in range(config.depth))
        )

    def run(
        self, x_RLC: Tensor, text: TextInputs, cos: Tensor, sin: Tensor, past: Sequence[Past]
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """All blocks: the residual stream, and every block's new keys and values [L, R, H, D]."""
        keys, values = [], []
        for i, block in enumerate(self.blocks):
            x_RLC, key, value = block(x_RLC, text, i, cos, sin, past[i])
            keys.append(key)
            values.append(value)
        return x_RLC, keys, values


class Block(nn.Module):
    def __init__(self, config: TransformerConfig, dtype: torch.dtype) -> None:
        super().__init__()
        width = config.width
        self.heads, self.dtype = config.heads, dtype
        self.modulation = parameter(6, width)
        self.qkv = Product(width, 3 * width, dtype)
        self.attention_scale = parameter(config.heads)
        self.projection = Product(width, width, dtype)
        self.cross_norm = Affine(width)
        self.cross_query = Product(width, width, dtype)
        self.cross_kv = TextKeysValues(config, dtype)
        self.cross_projection = Product(width, width, dtype)
        self.mlp_up = Product(width, config.mlp_width, dtype)
        self.mlp_down = Product(config.mlp_width, width, dtype)

    def forward(
        self, x_RLC: Tensor, text: TextInputs, index: int, cos: Tensor, sin: Tensor, past: Past
    ) -> tuple[Tensor, Tensor, Tensor]:
        modulation = (text.modulation_R6C + self.modulation)[:, :, None]
        gamma1, gamma2, scale1, scale2, shift1, shift2 = (modulation[:, i] for i in range(6))
        attended, keys, values = self._attend(layer_norm(x_RLC) * scale1 + shift1, cos, sin, past)
        x_RLC = x_RLC + gamma1 * attended
        x_RLC = x_RLC + self._attend_text(self.cross_norm(x_RLC), text, index)
        hidden = F.gelu(self.mlp_up(layer_norm(x_RLC) * scale2 + shift2), approximate="tanh")
        return x_RLC + gamma2 * self.mlp_down(hidden).float(), keys, values

    def _attend(
        self, x_RLC: Tensor, cos: Tensor, sin: Tensor, past: Past
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (x.unflatten(-1, (self.heads, -1)) for x in split(self.qkv(x_RLC), 3))
        q_RLHD = _rotate(_unit(q.float()) * self.attention_scale[:, None], cos, sin)
        k_RLHD = _rotate(_unit(k.float()), cos, sin)
        keys = k_RLHD.to(self.dtype).transpose(0, 1)
        values = v.transpose(0, 1)
        seen_keys = torch.cat((*past.keys, keys)) if past.keys else keys
        seen_values = torch.cat((*past.values, values)) if past.values else values
        attended = attention(
            q_RLHD.to(self.dtype).transpose(1, 2),
            seen_keys.permute(1, 2, 3, 0),
            seen_values.permute(1, 2, 0, 3),
        )
        return self.projection(attended).float(), keys, values

    def _attend_text(self, x_RLC: Tensor, text: TextInputs, index: int) -> Tensor:
        q_RLHD = self.cross_query(x_RLC).unflatten(-1, (self.heads, -1))
        q_RHLD = q_RLHD.transpose(1, 2) * (q_RLHD.shape[-1] ** -0.5)
        attended = attention(q_RHLD, text.keys_RHDT[index], text.values_RHTD[index], text.bias_R11T)
        return self.cross_projection(attended).float()


class TextPool(nn.Module):
    def __init__(self, config: TransformerConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.query = parameter(config.text_heads, config.width // config.text_heads)
        self.kv = Product(config.text_channels, 2 * config.width, dtype)
        self.projection = Product(config.width, config.width, dtype)

    def forward(self, text_RTC: Tensor, bias_R1T: Tensor) -> Tensor:
        """Normed text -> pooled text [R, C], fp32."""
        k, v = (x.unflatten(-1, (len(self.query), -1)) for x in split(self.kv(text_RTC), 2))
        keys_RHDT, values_RHTD = k.permute(0, 2, 3, 1), v.transpose(1, 2)
        query_H1D = (self.query * self.query.shape[1] ** -0.5).to(keys_RHDT.dtype)[:, None]
        pooled = attention(query_H1D, keys_RHDT, values_RHTD, bias_R1T[:, None])
        return self.projection(pooled).float()[:, 0]


class Product(nn.Module):
    """x·W + b in its own type, W stored [in, out]."""

    def __init__(self, channels_in: int, channels: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = parameter(channels_in, channels, dtype=dtype)
        self.bias = parameter(channels, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.bias)


class TextKeysValues(nn.Module):
    """The keys and values of the text that a block attends to."""

    def __init__(self, config: TransformerConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads = config.heads
        self.weight = parameter(config.width, 2 * config.width, dtype=dtype)
        self.bias = parameter(2 * config.width, dtype=dtype)

    def forward(self, memory_RTC: Tensor) -> tuple[Tensor, Tensor]:
        """The text's memory -> keys [R, H, D, T] and values [R, H, T, D]."""
        keys_values = product(memory_RTC, self.weight, self.bias)
        k, v = (x.unflatten(-1, (self.heads, -1)) for x in split(keys_values, 2))
        return k.permute(0, 2, 3, 1), v.transpose(1, 2)


class Affine(nn.Module):
    """A layer norm with weight and bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = parameter(width)
        self.bias = parameter(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, 1e-6)


def product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.to(weight.dtype) @ weight + bias


def attention(
    q_RHLD: Tensor, keys_RHDS: Tensor, values_RHSD: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Softmax attention, heads merged [R, L, C]; the softmax is fp32."""
    scores_RHLS = (q_RHLD @ keys_RHDS).float()
    weights = (scores_RHLS if bias is None else scores_RHLS + bias).softmax(-1)
    return (weights.to(values_RHSD.dtype) @ values_RHSD).transpose(1, 2).flatten(2)


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def _rotate(x_RLHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads whose channels lie in halves; cos and sin [L, 1, D/2]."""
    first, second = split(x_RLHD, 2)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


def split(x: Tensor, parts: int) -> tuple[Tensor, ...]:
    """Equal parts along the last axis, as one ONNX Split."""
    return x.split(x.shape[-1] // parts, dim=-1)


def layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
