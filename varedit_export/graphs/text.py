"""The T5 encoder, written for its graph.

Relative positions are a table lookup with constant indices; norms and softmax are fp32.
"""

from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varedit_export.graphs.attention import softmax_attention
from varedit_export.graphs.layout import GraphWeight, Restored, same, transposed
from varedit_export.graphs.model import Formats, parameter, product, split, weight_parameter
from varedit_reference.config import TextEncoderConfig
from varedit_reference.weights_file import torch_dtype
from varedit_runtime.precision import Precision

GATED = "gated-gelu"  # the kind of MLP that is exported


class GraphTextEncoder(nn.Module):
    """A T5 encoder: token ids and mask [B, T] to features [B, T, width], in fp32."""

    def __init__(self, config: TextEncoderConfig, precision: Precision) -> None:
        super().__init__()
        self.config = config
        formats, dtype = partial(precision.format, "text_encoder"), torch_dtype(precision.type)
        self.embedding = parameter(config.vocabulary, config.width, dtype=dtype)
        self.relative_attention_bias = parameter(config.buckets, config.heads)
        self.blocks = nn.ModuleList(GraphTextBlock(config, formats) for _ in range(config.depth))
        self.final_norm = parameter(config.width)

    def forward(self, token_ids: Tensor, mask: Tensor, most: int) -> Tensor:
        """Encode texts of at most `most` tokens."""
        x_BTC = F.embedding(token_ids, self.embedding).float()
        bias_BHTT = self._position_bias(token_ids.shape[1], most)[None]
        bias_BHTT = bias_BHTT + torch.where(mask, 0.0, -torch.inf)[:, None, None]
        for block in self.blocks:
            x_BTC = block(x_BTC, bias_BHTT)
        return _rms_norm(x_BTC, self.final_norm, self.config.epsilon)

    def _position_bias(self, tokens: int, most: int) -> Tensor:
        """Return the bias of relative positions, [H, T, T]: the first of those of `most` tokens."""
        buckets, first = relative_buckets(most, self.config), torch.arange(tokens)
        buckets = buckets.index_select(0, first).index_select(1, first)
        return F.embedding(buckets, self.relative_attention_bias).permute(2, 0, 1)


class GraphTextBlock(nn.Module):
    """Self-attention and gated MLP. Its products have no biases."""

    def __init__(self, config: TextEncoderConfig, formats: Formats) -> None:
        super().__init__()
        self.config, self.formats = config, formats
        inner = config.heads * config.head_width
        self.attention_norm = parameter(config.width)
        self.qkv = weight_parameter(config.width, 3 * inner, formats("blocks.qkv"))
        self.projection = weight_parameter(inner, config.width, formats("blocks.projection"))
        self.mlp_norm = parameter(config.width)
        self.gate_up = weight_parameter(
            config.width, 2 * config.mlp_width, formats("blocks.gate_up")
        )
        self.down = weight_parameter(config.mlp_width, config.width, formats("blocks.down"))

    def forward(self, x_BTC: Tensor, bias_BHTT: Tensor) -> Tensor:
        qkv = self._product("qkv", _rms_norm(x_BTC, self.attention_norm, self.config.epsilon))
        q, k, v = (x.unflatten(-1, (self.config.heads, -1)) for x in split(qkv, 3))
        attended = softmax_attention(
            q.transpose(1, 2), k.permute(0, 2, 3, 1), v.transpose(1, 2), bias_BHTT
        )
        x_BTC = x_BTC + self._product("projection", attended).float()
        hidden = self._product("gate_up", _rms_norm(x_BTC, self.mlp_norm, self.config.epsilon))
        gate, up = split(hidden.to(self._dtype("down")), 2)
        hidden = F.gelu(gate, approximate="tanh") * up
        return x_BTC + self._product("down", hidden).float()

    def _dtype(self, name: str) -> torch.dtype:
        return torch_dtype(self.formats(f"blocks.{name}").type)

    def _product(self, name: str, x: Tensor) -> Tensor:
        return product(x, getattr(self, name), self._dtype(name))


def text_encoder_layout(config: TextEncoderConfig) -> dict[str, GraphWeight]:
    """Return every weight of the text encoder's graph, made from a T5 file's tensors."""
    relative = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    weights = {
        "embedding": same("shared.weight"),
        "relative_attention_bias": same(relative),
        "final_norm": same("encoder.final_layer_norm.weight"),
    }
    for i in range(config.depth):
        attention_, mlp = f"encoder.block.{i}.layer.0", f"encoder.block.{i}.layer.1"
        qkv = tuple(f"{attention_}.SelfAttention.{name}.weight" for name in "qkv")
        gate_up = tuple(f"{mlp}.DenseReluDense.{name}.weight" for name in ("wi_0", "wi_1"))
        weights |= {
            f"blocks.{i}.attention_norm": same(f"{attention_}.layer_norm.weight"),
            f"blocks.{i}.qkv": _fused(qkv),
            f"blocks.{i}.projection": transposed(f"{attention_}.SelfAttention.o.weight"),
            f"blocks.{i}.mlp_norm": same(f"{mlp}.layer_norm.weight"),
            f"blocks.{i}.gate_up": _fused(gate_up),
            f"blocks.{i}.down": transposed(f"{mlp}.DenseReluDense.wo.weight"),
        }
    return weights


def restore_text_encoder(
    weights: Mapping[str, Tensor], max_distance: int, epsilon: float
) -> tuple[TextEncoderConfig, Mapping[str, Tensor]]:
    """Return T5's sizes and fp32 tensors from a bundle's weights, undoing the layout.

    Each tensor is restored when it is looked up.
    """
    buckets, heads = weights["relative_attention_bias"].shape
    config = TextEncoderConfig(
        vocabulary=len(weights["embedding"]),
        width=len(weights["final_norm"]),
        head_width=len(weights["blocks.0.projection"]) // heads,
        heads=heads,
        mlp_width=len(weights["blocks.0.down"]),
        depth=sum(name.endswith(".attention_norm") for name in weights),
        buckets=buckets,
        max_distance=max_distance,
        epsilon=epsilon,
        mlp=GATED,
    )
    return config, Restored(text_encoder_layout(config), weights)


def relative_buckets(tokens: int, config: TextEncoderConfig) -> Tensor:
    """Return T5's bucket of every [query, key] pair: exact for near ones, logarithmic for far."""
    half = config.buckets // 2
    exact = half // 2
    distance = torch.arange(tokens) - torch.arange(tokens)[:, None]
    far = distance.abs().clamp(min=1).float() / exact
    reach = torch.tensor(config.max_distance / exact)
    logarithmic = exact + (far.log() / reach.log() * (half - exact)).long()
    bucket = torch.where(distance.abs() < exact, distance.abs(), logarithmic.clamp(max=half - 1))
    return bucket + half * (distance > 0)


def _fused(sources: tuple[str, ...]) -> GraphWeight:
    return GraphWeight(
        sources,
        lambda *weights: torch.cat(weights).T,
        lambda made: made.T.chunk(len(sources)),
    )


def _rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, epsilon)
