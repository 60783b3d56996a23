"""What a token attends to: the explicit KV cache, and its teacher-forced equal.

Keys and values are sequence-first, [S, R, H, D], so that what a scale adds is contiguous. The
source comes first, then the target's scales. Under SAR, block 0 keeps the source apart, as one
reference per scale.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from varedit_reference.config import TransformerConfig
from varedit_reference.sar import scale_aligned_references

# (new keys, new values) of a block -> all keys, all values, which may be seen ([L, S]; None: all)
BlockContext = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor | None]]
# The same, with the block's index first.
Context = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor, Tensor | None]]


class KVCache:
    """Keys and values of the source and of the scales predicted so far, one pair per block."""

    def __init__(self, config: TransformerConfig) -> None:
        self.config = config
        self.scales_seen = 0
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._lengths: list[int] = []
        self._references: list[tuple[Tensor, Tensor]] = []

    def add_source(self, block: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, None]:
        """The prefill's context: the source sees itself."""
        room = target_length(self.config)
        if uses_references(self.config, block):
            self._references = list(
                zip(
                    scale_aligned_references(keys, self.config.grids),
                    scale_aligned_references(values, self.config.grids),
                    strict=True,
                )
            )
            kept_keys, kept_values = keys[:0], values[:0]
        else:
            kept_keys, kept_values = keys, values
        self._keys.append(_with_room(kept_keys, room))
        self._values.append(_with_room(kept_values, room))
        self._lengths.append(len(kept_keys))
        return keys, values, None

    def add_scale(self, block: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, None]:
        """The context of the next scale's tokens: the source, the scales before, and itself."""
        start = self._lengths[block]
        end = start + len(keys)
        self._keys[block][start:end] = keys
        self._values[block][start:end] = values
        self._lengths[block] = end
        seen_keys, seen_values = self._keys[block][:end], self._values[block][:end]
        if uses_references(self.config, block):
            reference_keys, reference_values = self._references[self.scales_seen]
            seen_keys = torch.cat((reference_keys, seen_keys))
            seen_values = torch.cat((reference_values, seen_values))
        return seen_keys, seen_values, None


def teacher_forced_context(config: TransformerConfig, device: torch.device) -> Context:
    """The context of all tokens [source | scale 1 .. scale K] at once: a mask in place of time."""

    def context(block: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not uses_references(config, block):
            return keys, values, causal_mask(config, device)
        keys, values = (_with_references(config, x) for x in (keys, values))
        return keys, values, sar_mask(config, device)

    return context


def uses_references(config: TransformerConfig, block: int) -> bool:
    return config.conditioning == "sar" and block == 0


def source_length(config: TransformerConfig) -> int:
    """Tokens of the source: the finest grid's, or under full conditioning every grid's."""
    return sum(config.lengths) if config.conditioning == "full" else config.lengths[-1]


def target_length(config: TransformerConfig) -> int:
    return sum(config.lengths)


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # a cached inference tensor could not take part in training
def causal_mask(config: TransformerConfig, device: torch.device) -> Tensor:
    """[S, S], S = source and all scales: block-causal over scales, the source seeing itself."""
    order = _order(config)
    return (order[:, None] >= order).to(device)


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # a cached inference tensor could not take part in training
def sar_mask(config: TransformerConfig, device: torch.device) -> Tensor:
    """[S, S_0] for block 0, whose keys are [source | references of scales 1 .. K-1 | targets].

    A scale sees its own reference, the last scale's being the source itself, and the targets up
    to its own. The source sees the source.
    """
    order = _order(config)
    is_target = order > 0
    own_reference = order.where(order > 0, len(config.grids))
    reference_of = torch.cat(
        [torch.full((source_length(config),), len(config.grids))]
        + [torch.full((length,), k) for k, length in enumerate(config.lengths[:-1], start=1)]
    )
    sees_target = (order[:, None] >= order[is_target]) & is_target[:, None]
    sees_reference = own_reference[:, None] == reference_of
    return torch.cat((sees_reference, sees_target), dim=1).to(device)


def _order(config: TransformerConfig) -> Tensor:
    """0 for the source's tokens, k for those of target scale k = 1 .. K, [S]."""
    return torch.repeat_interleave(torch.tensor((source_length(config), *config.lengths)))


def _with_references(config: TransformerConfig, x_SRHD: Tensor) -> Tensor:
    source, targets = x_SRHD.tensor_split([source_length(config)])
    references = scale_aligned_references(source, config.grids)[:-1]
    return torch.cat([source, *references, targets])


def _with_room(x_SRHD: Tensor, room: int) -> Tensor:
    buffer = x_SRHD.new_empty((len(x_SRHD) + room, *x_SRHD.shape[1:]))
    buffer[: len(x_SRHD)] = x_SRHD
    return buffer
