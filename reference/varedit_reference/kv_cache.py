"""What each token attends to: the explicit KV cache, and its equal for teacher forcing.

A token of scale k sees, in block i:

    i = 0 under SAR:  [source pooled to the grid of scale k | scale 1 | .. | scale k]
    otherwise:        [source on the finest grid            | scale 1 | .. | scale k]

Scale k sees itself whole, and nothing later exists yet, so the loop needs no mask. The source sees
itself alone: its keys and values are computed once (the prefill) and serve all scales.

One block serves prefill, loop and teacher forcing. They differ only in the `context` it is given: a
function from its new keys and values to what its queries see. Teacher forcing splits the queries
into scales, each with a slice of the keys, instead of masking one S x S product: no work is spent
on what is masked, and the fused kernels need no mask.

Keys and values are sequence-first, [S, R, H, D]: what a scale appends is one contiguous write.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from varedit_reference.config import TransformerConfig
from varedit_reference.sar import scale_aligned_references


@dataclass(frozen=True)
class Sight:
    """A run of successive queries, each of which sees all of these keys and values [S, R, H, D]."""

    queries: int
    keys: Tensor
    values: Tensor


# (new keys, new values) of a block, [S, R, H, D] -> what its queries see
BlockContext = Callable[[Tensor, Tensor], list[Sight]]
# The same, with the block's index first.
Context = Callable[[int, Tensor, Tensor], list[Sight]]


class KVCache:
    """The keys and values of the source and of the scales predicted so far, for every block."""

    def __init__(self, config: TransformerConfig) -> None:
        self.config = config
        self.scales_seen = 0
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._lengths: list[int] = []  # rows of each block's buffers that are filled
        self._references: list[tuple[Tensor, Tensor]] = []

    def add_source(self, block: int, keys: Tensor, values: Tensor) -> list[Sight]:
        """Store a block's source keys and values; return the prefill's context: the source alone.

        Blocks must be added in order.
        """
        room = target_length(self.config)
        if uses_references(self.config, block):
            # A reference differs from scale to scale, so it stays outside the growing buffer.
            pooled = (scale_aligned_references(x, self.config.grids) for x in (keys, values))
            self._references = list(zip(*pooled, strict=True))
            kept_keys, kept_values = keys[:0], values[:0]  # the buffer holds target scales alone
        else:
            kept_keys, kept_values = keys, values
        self._keys.append(_with_room(kept_keys, room))
        self._values.append(_with_room(kept_values, room))
        self._lengths.append(len(kept_keys))
        return [Sight(len(keys), keys, values)]

    def add_scale(self, block: int, keys: Tensor, values: Tensor) -> list[Sight]:
        """Append a scale to a block; return its context: source, scales before, and itself."""
        start = self._lengths[block]
        end = start + len(keys)
        self._keys[block][start:end] = keys
        self._values[block][start:end] = values
        self._lengths[block] = end
        seen_keys, seen_values = self._keys[block][:end], self._values[block][:end]
        if uses_references(self.config, block):  # one block of 32 or 40, so a copy costs little
            reference_keys, reference_values = self._references[self.scales_seen]
            seen_keys = torch.cat((reference_keys, seen_keys))
            seen_values = torch.cat((reference_values, seen_values))
        return [Sight(len(keys), seen_keys, seen_values)]


def teacher_forced_context(config: TransformerConfig) -> Context:
    """Return the context of [source | scale 1 .. scale K]: each part sees what the loop shows it.

    Tokens of scale 2 see the source (in block 0 of SAR its reference for scale 2), scales 1 and 2.
    """
    lengths = [source_length(config), *config.lengths]

    def context(block: int, keys: Tensor, values: Tensor) -> list[Sight]:
        seen = (_seen_by_parts(config, block, x.split(lengths)) for x in (keys, values))
        return list(map(Sight, lengths, *seen))

    return context


def uses_references(config: TransformerConfig, block: int) -> bool:
    """Return whether this block sees the source as scale-aligned references."""
    return config.conditioning == "sar" and block == 0


def source_length(config: TransformerConfig) -> int:
    """Return S of the source: the finest grid's tokens; with full conditioning, all grids'."""
    return sum(config.lengths) if config.conditioning == "full" else config.lengths[-1]


def target_length(config: TransformerConfig) -> int:
    """Return the tokens of all target scales."""
    return sum(config.lengths)


def _seen_by_parts(
    config: TransformerConfig, block: int, parts_SRHD: Sequence[Tensor]
) -> list[Tensor]:
    """Return the keys (or values) that the source sees, then those that each scale sees."""
    source, *scales = parts_SRHD
    if uses_references(config, block):
        references = scale_aligned_references(source, config.grids)
    else:
        references = [source] * len(scales)
    seen = [torch.cat((own, *scales[: k + 1])) for k, own in enumerate(references)]
    return [source, *seen]


def _with_room(x_SRHD: Tensor, room: int) -> Tensor:
    """Copy into a buffer with room to append: concatenating would copy the cache every scale."""
    buffer = x_SRHD.new_empty((len(x_SRHD) + room, *x_SRHD.shape[1:]))
    buffer[: len(x_SRHD)] = x_SRHD
    return buffer
