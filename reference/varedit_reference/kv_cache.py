"""What a token attends to: the explicit KV cache, and its teacher-forced equal.

Keys and values are sequence-first, [S, R, H, D], so that what a scale adds is contiguous. The
source comes first, then the target's scales. Under SAR, block 0 keeps the source apart, as one
reference per scale.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from varedit_reference.config import TransformerConfig
from varedit_reference.sar import scale_aligned_references


@dataclass(frozen=True)
class Sight:
    """The keys and values [S, R, H, D] that each of some successive queries sees, all of them."""

    queries: int
    keys: Tensor
    values: Tensor


# (new keys, new values) of a block -> what its queries see
BlockContext = Callable[[Tensor, Tensor], list[Sight]]
# The same, with the block's index first.
Context = Callable[[int, Tensor, Tensor], list[Sight]]


class KVCache:
    """Keys and values of the source and of the scales predicted so far, one pair per block."""

    def __init__(self, config: TransformerConfig) -> None:
        self.config = config
        self.scales_seen = 0
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._lengths: list[int] = []
        self._references: list[tuple[Tensor, Tensor]] = []

    def add_source(self, block: int, keys: Tensor, values: Tensor) -> list[Sight]:
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
        return [Sight(len(keys), keys, values)]

    def add_scale(self, block: int, keys: Tensor, values: Tensor) -> list[Sight]:
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
        return [Sight(len(keys), seen_keys, seen_values)]


def teacher_forced_context(config: TransformerConfig) -> Context:
    """The context of [source | scale 1 .. scale K] at once: each sees what the cache shows it."""
    lengths = [source_length(config), *config.lengths]

    def context(block: int, keys: Tensor, values: Tensor) -> list[Sight]:
        seen = (_seen_by_parts(config, block, x.split(lengths)) for x in (keys, values))
        return list(map(Sight, lengths, *seen))

    return context


def uses_references(config: TransformerConfig, block: int) -> bool:
    return config.conditioning == "sar" and block == 0


def source_length(config: TransformerConfig) -> int:
    """Tokens of the source: the finest grid's, or under full conditioning every grid's."""
    return sum(config.lengths) if config.conditioning == "full" else config.lengths[-1]


def target_length(config: TransformerConfig) -> int:
    return sum(config.lengths)


def _seen_by_parts(
    config: TransformerConfig, block: int, parts_SRHD: Sequence[Tensor]
) -> list[Tensor]:
    """Of all keys (or values), those that the source sees and those that every scale sees."""
    source, *scales = parts_SRHD
    if uses_references(config, block):
        references = scale_aligned_references(source, config.grids)
    else:
        references = [source] * len(scales)
    seen = [torch.cat((own, *scales[: k + 1])) for k, own in enumerate(references)]
    return [source, *seen]


def _with_room(x_SRHD: Tensor, room: int) -> Tensor:
    buffer = x_SRHD.new_empty((len(x_SRHD) + room, *x_SRHD.shape[1:]))
    buffer[: len(x_SRHD)] = x_SRHD
    return buffer
