"""The transformer as its graphs compute it: the reference, rewritten for ONNX.

One set of weights, named as in `layout.py`, serves all stages. Key-value caches are explicit, and
weights need no work at run time; attention has the forms of `attention.py`.

Shape suffixes: R rows (conditional rows of all pictures first), T text tokens, L new tokens, S all
tokens seen, C width, H heads, D = C/H.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varedit_export.graphs import engine_products, integers
from varedit_export.graphs.attention import WRITTEN_OUT, WrittenOut, cast_to, softmax_attention
from varedit_export.graphs.integers import Quantised
from varedit_reference.config import MAX_LEVELS, MAX_TEXT_TOKENS, TransformerConfig
from varedit_reference.weights_file import torch_dtype
from varedit_runtime.errors import ConfigError, reason, shown
from varedit_runtime.precision import EngineColumns, Format, Int8Columns, Precision, Storage

Formats = Callable[[str], Format]  # of the products of a component, by name


@dataclass(frozen=True)
class TextInputs:
    """The text's part of all other stages' inputs; keys are laid out for the product.

    bias: [R, 1, 1, T], or as a form of attention prepares it.
    """

    modulation_R6C: Tensor
    bias: Tensor
    keys_RHDT: Sequence[Tensor]
    values_RHTD: Sequence[Tensor]


@dataclass(frozen=True)
class Past:
    """The keys and values [P, R, H, D] that a block's new tokens see besides their own."""

    keys: Sequence[Tensor] = ()
    values: Sequence[Tensor] = ()


class GraphTransformer(nn.Module):
    """The weights of all stages, in a precision."""

    def __init__(
        self,
        config: TransformerConfig,
        precision: Precision,
        attention: WrittenOut = WRITTEN_OUT,
    ) -> None:
        super().__init__()
        self.config, self.attention = config, attention
        formats = partial(precision.format, "transformer")
        width, text = config.width, config.text_channels
        self.unconditional_text = parameter(MAX_TEXT_TOKENS, text)
        self.start_token = parameter(width)
        self.level_embedding = parameter(MAX_LEVELS, width)
        self.token_embedding = GraphLinear(config.token_channels, width, formats("token_embedding"))
        self.text_norm = parameter(text)
        self.text_pool = GraphTextPool(config, formats)
        memory = formats("text_memory")
        self.text_memory = nn.ModuleDict(
            {"0": GraphLinear(text, width, memory), "2": GraphLinear(width, width, memory)}
        )
        self.memory_rounding = Rounding(formats("blocks.cross_kv"))
        self.shared_modulation = GraphLinear(width, 6 * width, formats("shared_modulation"))
        self.head_modulation = GraphLinear(width, 2 * width, formats("head_modulation"))
        self.head = GraphLinear(width, 2 * config.token_channels, formats("head"))
        self.dtype = torch_dtype(precision.type)
        blocks = (GraphBlock(config, formats, self.dtype, attention) for _ in range(config.depth))
        self.blocks = cast("Sequence[GraphBlock]", nn.ModuleList(blocks))

    def run(
        self,
        x_RLC: Tensor,
        text: TextInputs,
        cos: Tensor,
        sin: Tensor,
        past: Sequence[Past],
        kept: int | None = None,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Run all blocks; return the stream, and each block's new keys and values [L, R, H, D].

        kept: how many tokens of the stream to return, the first ones; the last block computes the
        others' keys and values alone. None for all.
        """
        keys, values = [], []
        every, some = (
            replace(text, bias=self.attention.bias(text.bias, tokens, self.dtype))
            for tokens in (x_RLC.shape[1], x_RLC.shape[1] if kept is None else kept)
        )
        for i, block in enumerate(self.blocks):
            last = i == len(self.blocks) - 1
            own = (some, kept) if last else (every, None)
            x_RLC, key, value = block(x_RLC, own[0], i, cos, sin, past[i], own[1])
            keys.append(key)
            values.append(value)
        return x_RLC, keys, values


class GraphBlock(nn.Module):
    """Self-attention, cross-attention to the text, MLP. dtype: of keys and values."""

    def __init__(
        self,
        config: TransformerConfig,
        formats: Formats,
        dtype: torch.dtype,
        attention: WrittenOut,
    ) -> None:
        super().__init__()
        width = config.width
        self.heads, self.dtype, self.attention = config.heads, dtype, attention
        self.modulation = parameter(6, width)
        self.qkv = GraphLinear(width, 3 * width, formats("blocks.qkv"))
        self.attention_scale = parameter(config.heads)
        self.projection = GraphLinear(width, width, formats("blocks.projection"))
        self.cross_norm = Affine(width)
        self.cross_query = GraphLinear(width, width, formats("blocks.cross_query"))
        self.cross_kv = TextKeysValues(config, formats("blocks.cross_kv"), dtype)
        self.cross_projection = GraphLinear(width, width, formats("blocks.cross_projection"))
        self.mlp_up = GraphLinear(width, config.mlp_width, formats("blocks.mlp_up"))
        self.mlp_down = GraphLinear(config.mlp_width, width, formats("blocks.mlp_down"))

    def forward(
        self,
        x_RLC: Tensor,
        text: TextInputs,
        index: int,
        cos: Tensor,
        sin: Tensor,
        past: Past,
        kept: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        modulation = (text.modulation_R6C + self.modulation)[:, :, None]
        gamma1, gamma2, scale1, scale2, shift1, shift2 = (modulation[:, i] for i in range(6))
        normed = layer_norm(x_RLC) * scale1 + shift1
        attended, keys, values = self._attend(normed, cos, sin, past, kept)
        x_RLC = first_tokens(x_RLC, kept) + gamma1 * attended
        x_RLC = x_RLC + self._attend_text(self.cross_norm(x_RLC), text, index)
        hidden = F.gelu(self.mlp_up(layer_norm(x_RLC) * scale2 + shift2), approximate="tanh")
        return x_RLC + gamma2 * self.mlp_down(hidden).float(), keys, values

    def _attend(
        self, x_RLC: Tensor, cos: Tensor, sin: Tensor, past: Past, kept: int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (x.unflatten(-1, (self.heads, -1)) for x in split(self.qkv(x_RLC), 3))
        q_RLHD = _rotate(_unit(q.float()) * self.attention_scale[:, None], cos, sin)
        k_RLHD = _rotate(_unit(k.float()), cos, sin)
        keys = k_RLHD.to(self.dtype).transpose(0, 1)
        values = cast_to(v, self.dtype).transpose(0, 1)
        seen_keys = torch.cat((*past.keys, keys)) if past.keys else keys
        seen_values = torch.cat((*past.values, values)) if past.values else values
        q_RLHD = first_tokens(q_RLHD.to(self.dtype), kept)
        attended = self.attention.over_tokens(q_RLHD, seen_keys, seen_values)
        return self.projection(attended).float(), keys, values

    def _attend_text(self, x_RLC: Tensor, text: TextInputs, index: int) -> Tensor:
        q_RLHD = self.cross_query(x_RLC).unflatten(-1, (self.heads, -1))
        attended = self.attention.over_text(
            q_RLHD, text.keys_RHDT[index], text.values_RHTD[index], text.bias
        )
        return self.cross_projection(attended).float()


class GraphTextPool(nn.Module):
    def __init__(self, config: TransformerConfig, formats: Formats) -> None:
        super().__init__()
        self.query = parameter(config.text_heads, config.width // config.text_heads)
        self.kv = GraphLinear(config.text_channels, 2 * config.width, formats("text_pool.kv"))
        self.projection = GraphLinear(config.width, config.width, formats("text_pool.projection"))

    def forward(self, text_RTC: Tensor, bias_R1T: Tensor) -> Tensor:
        """Pool normalised text to [R, C], in fp32."""
        k, v = (x.unflatten(-1, (len(self.query), -1)) for x in split(self.kv(text_RTC), 2))
        keys_RHDT, values_RHTD = k.permute(0, 2, 3, 1), v.transpose(1, 2)
        query_H1D = (self.query * self.query.shape[1] ** -0.5).to(keys_RHDT.dtype)[:, None]
        pooled = softmax_attention(query_H1D, keys_RHDT, values_RHTD, bias_R1T[:, None])
        return self.projection(pooled).float()[:, 0]


class GraphLinear(nn.Module):
    """A linear layer x·W + b, computed and stored as its format says; W is [in, out]."""

    def __init__(self, channels_in: int, channels: int, format: Format) -> None:
        super().__init__()
        self.dtype = torch_dtype(format.type)
        self.weight = weight_parameter(channels_in, channels, format)
        self.bias = parameter(channels, dtype=self.dtype)

    def forward(self, x: Tensor | Quantised) -> Tensor:
        return product(x, self.weight, self.dtype) + self.bias


class TextKeysValues(GraphLinear):
    """A block's projection of the text to keys and values."""

    def __init__(self, config: TransformerConfig, format: Format, kept: torch.dtype) -> None:
        """Make the projection; kept: the type of keys and values."""
        super().__init__(config.width, 2 * config.width, format)
        self.heads, self.kept = config.heads, kept

    def forward(self, memory_RTC: Tensor | Quantised) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Project the text memory [R, T, C] to keys [R, H, D, T] and values [R, H, T, D]."""
        keys_values = cast_to(super().forward(memory_RTC), self.kept)
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


class Packed(nn.Module):
    """A weight W [in, out] that is kept as several tensors.

    Raises ConfigError if these are not what tensors of a module can be.
    """

    def __init__(self, storage: Storage, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.storage = storage
        try:
            for name, (kind, size) in storage.parts(shape).items():
                if not name.isidentifier():
                    raise ValueError(f"no part can be called {shown(name)}")
                self.register_parameter(name, parameter(*size, dtype=torch_dtype(kind)))
        except Exception as error:
            raise ConfigError(
                f"{type(storage).__name__} cannot keep a weight of shape {shape}: {reason(error)}"
            ) from error

    def multiply(self, x: Tensor | Quantised, dtype: torch.dtype) -> Tensor:
        """Compute x·W in a type."""
        parts = dict(self.named_parameters())
        rows = x if isinstance(x, Quantised) else quantised(self.storage, x.to(dtype))
        if isinstance(rows, Tensor):
            return self.storage.multiply(rows, parts)
        if isinstance(self.storage, EngineColumns):
            return engine_products.multiply(rows, parts, dtype)
        return integers.multiply(rows, parts)


def quantised(storage: Storage | None, x: Tensor) -> Tensor | Quantised:
    """Round rows x as a product of 8-bit values takes them; return x for other products."""
    if isinstance(storage, EngineColumns):
        return engine_products.quantise(storage, x)
    return integers.quantise(storage, x) if isinstance(storage, Int8Columns) else x


class Rounding(nn.Module):
    """Rounds what several products read, once for all of them; where none does, it does nothing.

    The optimiser would make one of equal roundings in several blocks, and put it into the first:
    the others would no longer be like it.
    """

    def __init__(self, format: Format) -> None:
        super().__init__()
        self.format = format

    def forward(self, x: Tensor) -> Tensor | Quantised:
        storage = self.format.storage
        return x if storage is None else quantised(storage, x.to(torch_dtype(self.format.type)))


def weight_parameter(channels_in: int, channels: int, format: Format) -> nn.Parameter | Packed:
    """Make room for a product's weight [in, out], as its format stores it."""
    if format.storage is not None:
        return Packed(format.storage, (channels_in, channels))
    return parameter(channels_in, channels, dtype=torch_dtype(format.type))


def product(x: Tensor | Quantised, weight: Tensor | Packed, dtype: torch.dtype) -> Tensor:
    """Compute x·W in a type. x is quantised only where the weight is packed."""
    if isinstance(weight, Packed):
        return weight.multiply(x, dtype)
    assert isinstance(x, Tensor)
    return x.to(dtype) @ weight


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def _rotate(x_RLHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads whose channels lie in halves; cos and sin [L, 1, D/2]."""
    first, second = split(x_RLHD, 2)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


def first_tokens(x_RL: Tensor, kept: int | None) -> Tensor:
    """Return the first tokens, by index: the length of a slice would be a minimum of symbols."""
    return x_RL if kept is None else x_RL.index_select(1, torch.arange(kept))


def split(x: Tensor, parts: int) -> tuple[Tensor, ...]:
    """Split the last axis into equal parts, as one ONNX Split."""
    return x.split(x.shape[-1] // parts, dim=-1)


def layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
