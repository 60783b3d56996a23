"""The next-scale transformer, top to bottom: VAR, then a block, then its parts.

    x = x + gamma1 · SelfAttention(LN(x)·(1 + scale1) + shift1)
    x = x + CrossAttention(LN(x)·weight + bias, text)
    x = x + gamma2 · MLP(LN(x)·(1 + scale2) + shift2)

gamma, scale and shift (AdaLN) come from the pooled text, plus a learned [6, C] per block.

Shape suffixes: R rows (pictures x guidance, conditional rows first), L tokens in, S tokens seen,
T text tokens, C width, H heads, D = C/H, c bits of a token. The cache is [S, R, H, D].

The residual stream, norms, softmax, AdaLN and head are fp32; the other matrix products take
`compute_dtype`. Weights may be stored in a smaller type and are then widened product by product.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import log
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from varedit_reference.config import MAX_LEVELS, MAX_TEXT_TOKENS, TransformerConfig
from varedit_reference.kv_cache import BlockContext, Context, KVCache, teacher_forced_context
from varedit_reference.rotary import Rotation, full_rotation, scale_rotation, source_rotation

MAX_LOG_SCALE = log(100)

# (channels in, channels out, bias) -> a Linear with the model's compute and weight types
LinearFactory = Callable[..., "Linear"]
# queries [R, H, L, D], keys and values [R, H, S, D] -> softmax(q·kᵀ)·v [R, H, L, D]
AttentionFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
# The same with a mask of the keys [R, 1, 1, S], true on those that are seen; queries not yet scaled
MaskedAttentionFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class TextCondition:
    """Everything the model takes from the text, computed once per edit.

    pooled: [R, C]. modulation: the AdaLN signal that all blocks share, [R, 6, C]. keys, values: of
    the cross-attention, one [R, H, T, D] per block. mask: [R, 1, 1, T], true on real tokens.
    """

    pooled: Tensor
    modulation: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    mask: Tensor


class VAR(nn.Module):
    """The transformer: predicts a scale's bits from the source, the text and the scales before."""

    def __init__(
        self,
        config: TransformerConfig,
        compute_dtype: torch.dtype = torch.float32,
        weight_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        product = partial(
            Linear, compute_dtype=compute_dtype, weight_dtype=weight_dtype or compute_dtype
        )
        width = config.width
        # Learned features of "no instruction", which guidance moves away from.
        self.unconditional_text = nn.Parameter(torch.empty(MAX_TEXT_TOKENS, config.text_channels))
        self.start_token = nn.Parameter(torch.empty(width))
        self.level_embedding = nn.Embedding(MAX_LEVELS, width)  # which scale a token belongs to
        self.token_embedding = product(config.token_channels, width)  # source and target share it
        self.text_norm = nn.RMSNorm(config.text_channels, eps=1e-6)
        self.text_pool = TextPool(config, product)
        self.text_memory = nn.Sequential(
            product(config.text_channels, width), nn.GELU("tanh"), product(width, width)
        )
        # Shared by all blocks: 6·C·C weights in each would be much, beside its other 16·C·C.
        self.shared_modulation = nn.Linear(width, 6 * width)
        self.blocks = cast(
            "Sequence[Block]", nn.ModuleList(Block(config, product) for _ in range(config.depth))
        )
        self.head_modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, 2 * config.token_channels)

    def text_rows(
        self, prompts: Sequence[Tensor], guided: bool, negatives: Sequence[Tensor] | None = None
    ) -> list[Tensor]:
        """Return the text features of all R rows, from each picture's [T_i, text_channels].

        With guidance the unconditional rows follow: those of the negative prompts or, without any,
        the first T_i rows of a learned text.
        """
        if not guided:
            return list(prompts)
        if negatives is None:
            negatives = [self.unconditional_text[: len(prompt)] for prompt in prompts]
        return [*prompts, *negatives]

    def condition(self, rows: Sequence[Tensor]) -> TextCondition:
        """Compute the text condition of R rows of features [T_r, text_channels]."""
        lengths = torch.tensor([len(row) for row in rows])
        mask = (torch.arange(int(lengths.max())) < lengths[:, None])[:, None, None, :]
        mask = mask.to(rows[0].device)
        text_RTC = self.text_norm(pad_sequence([row.float() for row in rows], batch_first=True))
        pooled = self.text_pool(text_RTC, mask).float()
        memory = self.text_memory(text_RTC)
        projected = [block.cross_attention.project(memory) for block in self.blocks]
        return TextCondition(
            pooled=pooled,
            modulation=self.shared_modulation(F.silu(pooled)).unflatten(1, (6, -1)),
            keys=[keys for keys, _ in projected],
            values=[values for _, values in projected],
            mask=mask,
        )

    def prefill(self, source_tokens: Tensor, text: TextCondition) -> KVCache:
        """Run the source [B, S, c] through all blocks once; return the cache of its keys, values.

        It depends on the text (AdaLN and cross-attention), so all R rows are run.
        """
        cache = KVCache(self.config)
        x_RSC = self._embed_source(source_tokens, text)
        self._run(x_RSC, text, source_rotation(self.config, x_RSC.device), cache.add_source)
        return cache

    def predict(
        self, scale: int, tokens: Tensor | None, text: TextCondition, cache: KVCache
    ) -> Tensor:
        """Return the next scale's logits [R, L, c, 2]; append its keys and values to the cache.

        tokens: the scale's input [B, L, c]; None for the first scale, which starts from the text.
        """
        assert scale == cache.scales_seen, "scales are predicted in order"
        x_RLC = self._embed_scale(scale, tokens, text)
        rotate = scale_rotation(self.config, scale, x_RLC.device)
        x_RLC = self._run(x_RLC, text, rotate, cache.add_scale)
        cache.scales_seen += 1
        return self._logits(x_RLC, text)

    def forward(
        self, source_tokens: Tensor, scale_tokens: Sequence[Tensor], text: TextCondition
    ) -> list[Tensor]:
        """Return the logits of all scales from one pass (teacher forcing), equal to the loop's.

        scale_tokens: the inputs [B, L_k, c] of all scales except the first.
        """
        inputs: list[Tensor | None] = [None, *scale_tokens]  # scale 1 starts from the text
        x_RSC = torch.cat(
            [self._embed_source(source_tokens, text)]
            + [self._embed_scale(k, tokens, text) for k, tokens in enumerate(inputs)],
            dim=1,
        )
        rotate = full_rotation(self.config, x_RSC.device)
        x_RSC = self._run(x_RSC, text, rotate, teacher_forced_context(self.config))
        lengths = self.config.lengths
        scales = x_RSC[:, -sum(lengths) :].split(lengths, dim=1)  # the source predicts nothing
        return [self._logits(x_RLC, text) for x_RLC in scales]

    def _run(
        self, x_RLC: Tensor, text: TextCondition, rotate: Rotation, context: Context
    ) -> Tensor:
        for i, block in enumerate(self.blocks):
            x_RLC = block(x_RLC, text, i, rotate, partial(context, i))
        return x_RLC

    def _embed_source(self, source_tokens: Tensor, text: TextCondition) -> Tensor:
        """Embed the source, adding the last level's embedding; with "full", each scale's own."""
        tokens_RLC = self.token_embedding(_repeat_rows(source_tokens, len(text.pooled))).float()
        levels = torch.arange(len(self.config.grids), device=tokens_RLC.device)
        if self.config.conditioning == "full":
            lengths = torch.tensor(self.config.lengths, device=levels.device)
            levels = levels.repeat_interleave(lengths)
        else:
            levels = levels[-1:]  # the source lies on the finest grid
        return tokens_RLC + self.level_embedding(levels)

    def _embed_scale(self, scale: int, tokens: Tensor | None, text: TextCondition) -> Tensor:
        if tokens is None:
            x_RLC = (text.pooled + self.start_token)[:, None]
        else:
            x_RLC = self.token_embedding(_repeat_rows(tokens, len(text.pooled))).float()
        return x_RLC + self.level_embedding.weight[scale]

    def _logits(self, x_RLC: Tensor, text: TextCondition) -> Tensor:
        scale, shift = self.head_modulation(F.silu(text.pooled))[:, None].chunk(2, dim=-1)
        return self.head(_layer_norm(x_RLC) * (1 + scale) + shift).unflatten(-1, (-1, 2))


class Block(nn.Module):
    """Self-attention and MLP under AdaLN, with a text cross-attention between them."""

    def __init__(self, config: TransformerConfig, product: LinearFactory) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.empty(6, config.width))
        self.self_attention = SelfAttention(config, product)
        self.cross_norm = nn.LayerNorm(config.width, eps=1e-6)
        self.cross_attention = CrossAttention(config, product)
        self.mlp = nn.Sequential(
            product(config.width, config.mlp_width),
            nn.GELU("tanh"),
            product(config.mlp_width, config.width),
        )

    def forward(
        self,
        x_RLC: Tensor,
        text: TextCondition,
        index: int,
        rotate: Rotation,
        context: BlockContext,
    ) -> Tensor:
        modulation = (text.modulation + self.modulation)[:, :, None]
        gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation.unbind(1)
        attended = self.self_attention(_layer_norm(x_RLC) * (1 + scale1) + shift1, rotate, context)
        x_RLC = x_RLC + gamma1 * attended
        x_RLC = x_RLC + self.cross_attention(
            self.cross_norm(x_RLC), text.keys[index], text.values[index], text.mask
        )
        return x_RLC + gamma2 * self.mlp(_layer_norm(x_RLC) * (1 + scale2) + shift2)


class SelfAttention(nn.Module):
    """Cosine attention: unit queries and keys, a learned scale per head, rotary positions.

    The scale, exp(min(log_scale, ln 100)), bounds the logits, so that they cannot overflow fp16.
    """

    def __init__(self, config: TransformerConfig, product: LinearFactory) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = product(config.width, 3 * config.width, bias=False)
        self.query_bias = nn.Parameter(torch.empty(config.width))
        self.value_bias = nn.Parameter(torch.empty(config.width))
        self.log_scale = nn.Parameter(torch.empty(config.heads))
        self.projection = product(config.width, config.width)
        self.attend: AttentionFunction = fused_attention  # others for training and maps

    def forward(self, x_RLC: Tensor, rotate: Rotation, context: BlockContext) -> Tensor:
        key_bias = torch.zeros_like(self.value_bias)
        qkv = self.qkv(x_RLC, bias=torch.cat((self.query_bias, key_bias, self.value_bias)))
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scale = self.log_scale.clamp(max=MAX_LOG_SCALE).exp()[:, None, None]
        # Normalised, scaled and rotated in fp32, and rounded to the products' type only then.
        q_RHLD = rotate(F.normalize(q.float(), dim=-1, eps=1e-12) * scale).to(v.dtype)
        k_RHLD = rotate(F.normalize(k.float(), dim=-1, eps=1e-12)).to(v.dtype)
        sights = context(_sequence_first(k_RHLD), _sequence_first(v))
        queries = q_RHLD.split([sight.queries for sight in sights], dim=2)
        attended = [
            self.attend(own_RHLD, _heads_first(sight.keys), _heads_first(sight.values))
            for own_RHLD, sight in zip(queries, sights, strict=True)
        ]
        return self.projection(_merge_heads(torch.cat(attended, dim=2)))


class CrossAttention(nn.Module):
    """Attention to the text, whose keys and values are projected once per edit."""

    def __init__(self, config: TransformerConfig, product: LinearFactory) -> None:
        super().__init__()
        self.heads = config.heads
        self.query = product(config.width, config.width)
        self.kv = product(config.width, 2 * config.width, bias=False)
        self.value_bias = nn.Parameter(torch.empty(config.width))
        self.projection = product(config.width, config.width)
        self.attend: MaskedAttentionFunction = masked_attention

    def project(self, memory_RTC: Tensor) -> tuple[Tensor, Tensor]:
        """Project the text memory [R, T, C] to keys and values [R, H, T, D]."""
        return _project_kv(self.kv, self.value_bias, memory_RTC, self.heads)

    def forward(self, x_RLC: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        q_RHLD = self.query(x_RLC).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        attended = self.attend(q_RHLD, keys, values, mask)
        return self.projection(_merge_heads(attended))


class TextPool(nn.Module):
    """Attention pooling of the text, with one learned query per head."""

    def __init__(self, config: TransformerConfig, product: LinearFactory) -> None:
        super().__init__()
        heads = config.text_heads
        self.query = nn.Parameter(torch.empty(heads, config.width // heads))
        self.kv = product(config.text_channels, 2 * config.width, bias=False)
        self.value_bias = nn.Parameter(torch.empty(config.width))
        self.projection = product(config.width, config.width)

    def forward(self, text_RTC: Tensor, mask: Tensor) -> Tensor:
        """Pool normalised text [R, T, text_channels] under a mask [R, 1, 1, T] to [R, C]."""
        keys, values = _project_kv(self.kv, self.value_bias, text_RTC, len(self.query))
        query_RHLD = self.query.to(keys.dtype)[None, :, None].expand(len(text_RTC), -1, -1, -1)
        pooled = F.scaled_dot_product_attention(query_RHLD, keys, values, attn_mask=mask)
        return self.projection(pooled.flatten(1))


class Linear(nn.Linear):
    """A linear layer that computes in compute_dtype, whatever its input's and weight's types.

    round_input: rounds what is multiplied, where a precision has fewer values of it than its type.
    """

    round_input: Callable[[Tensor], Tensor] | None = None

    def __init__(
        self,
        channels_in: int,
        channels: int,
        bias: bool = True,
        *,
        compute_dtype: torch.dtype,
        weight_dtype: torch.dtype,
    ) -> None:
        super().__init__(channels_in, channels, bias, dtype=weight_dtype)
        self.compute_dtype = compute_dtype

    def forward(self, input: Tensor, bias: Tensor | None = None) -> Tensor:
        dtype = self.compute_dtype
        input = input if self.round_input is None else self.round_input(input)
        bias = self.bias if bias is None else bias
        return F.linear(
            input.to(dtype), self.weight.to(dtype), None if bias is None else bias.to(dtype)
        )


def fused_attention(q_RHLD: Tensor, k_RHSD: Tensor, v_RHSD: Tensor) -> Tensor:
    """Compute softmax(q·kᵀ)·v; the queries are already scaled."""
    return F.scaled_dot_product_attention(q_RHLD, k_RHSD, v_RHSD, scale=1.0)


def masked_attention(q_RHLD: Tensor, k_RHSD: Tensor, v_RHSD: Tensor, mask: Tensor) -> Tensor:
    """Compute softmax(q·kᵀ/√D)·v over the keys that the mask shows."""
    return F.scaled_dot_product_attention(q_RHLD, k_RHSD, v_RHSD, attn_mask=mask)


def _project_kv(
    product: Linear, value_bias: Tensor, text: Tensor, heads: int
) -> tuple[Tensor, Tensor]:
    kv = product(text, bias=torch.cat((torch.zeros_like(value_bias), value_bias)))
    keys, values = kv.unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4)
    return keys, values


def _layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def _repeat_rows(tokens_BLc: Tensor, rows: int) -> Tensor:
    return tokens_BLc.repeat(rows // len(tokens_BLc), 1, 1)


def _sequence_first(x_RHSD: Tensor) -> Tensor:
    return x_RHSD.permute(2, 0, 1, 3)


def _heads_first(x_SRHD: Tensor) -> Tensor:
    return x_SRHD.permute(1, 2, 0, 3)


def _merge_heads(x_RHLD: Tensor) -> Tensor:
    return x_RHLD.transpose(1, 2).flatten(2)
