"""Compute what a model attends to while it edits: self-attention and cross-attention, by layer.

The reference edits, with the weights of a bundle or those that one is built from, and the functions
that compute its attention are replaced by recording ones. Kept are the weights of the conditional
rows, averaged over heads, and over the pictures if there are several.

A layer's map has a row for each token of the target, scale by scale, and a column for each key:

    [source | scale 1 | .. | scale K],   NaN where a token does not see a key

The source's columns are the tokens that the layer sees: the finest grid or, under full
conditioning, all scales. In layer 0 under SAR they are the references of all scales, of which
tokens of scale k see the k-th.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from varedit_export.manifest_model import sources_of
from varedit_export.parity.edit import with_grids
from varedit_export.parity.reference_backend import Reference, make_contiguous
from varedit_export.sources import Sources, t5_encoder
from varedit_reference.config import MAX_TEXT_TOKENS, ModelConfig
from varedit_reference.kv_cache import uses_references
from varedit_reference.pipeline import VAREdit
from varedit_reference.text_encoder import TextEncoder
from varedit_reference.transformer import VAR, fused_attention, masked_attention
from varedit_runtime.bundle import Bundle
from varedit_runtime.decoding.to_rgb import on_white
from varedit_runtime.errors import ConfigError
from varedit_runtime.files import atomic_file
from varedit_runtime.grids import Grid
from varedit_runtime.pictures import Source, open_picture
from varedit_runtime.text import END_TOKEN, Instructions, read_tokenizer

WORD_STARTS = "▁", "Ġ"  # how pieces of a word's beginning are marked by T5, and by byte tokenizers


@dataclass(frozen=True)
class LayerMap:
    """What the target's T tokens attend to in a layer.

    source: the grids that the source's columns are of. weights: [T, S + T], every row's sum is 1.
    words: of the cross-attention, [T, words].
    """

    source: tuple[Grid, ...]
    weights: np.ndarray
    words: np.ndarray


@dataclass(frozen=True)
class AttentionMaps:
    """The maps of an edit's layers by number.

    grids: of the target's scales. words: of the instruction. source, result: the first picture,
    and what it was edited to.
    """

    grids: tuple[Grid, ...]
    words: tuple[str, ...]
    layers: Mapping[int, LayerMap]
    source: Image.Image
    result: Image.Image

    def shares(self, layer: int) -> np.ndarray:
        """Return the share of each scale's attention that each scale gets, source first.

        It is [K, scales of the source + K]; NaN where nothing is seen.
        """
        one = self.layers[layer]
        seen = np.add.reduceat(np.nan_to_num(one.weights), _starts((*one.source, *self.grids)), 1)
        sums = np.add.reduceat(seen, _starts(self.grids), 0)
        unseen = np.isnan(one.weights)[np.ix_(*map(_starts, (self.grids, self._keys(layer))))]
        return np.where(unseen, np.nan, sums / np.array([*map(prod, self.grids)])[:, None])

    def distances(self, layer: int) -> np.ndarray:
        """Return how far away each scale looks, over how far an even look would go, [K].

        It is the distance of the centres of two tokens' areas of the picture, averaged over the
        attention, and over the tokens of the scale; NaN where all that is seen is in one place.
        """
        weights, keys = self.layers[layer].weights, self._keys(layer)
        places, own = (np.concatenate([*map(_centres, grids)]) for grids in (keys, self.grids))
        apart = np.linalg.norm(own[:, None] - places, axis=2)
        alike = np.nanmean(np.where(np.isnan(weights), np.nan, apart), axis=1)
        looked = (np.nan_to_num(weights) * apart).sum(1)
        scales = _starts(self.grids)
        looked, alike = (np.add.reduceat(x, scales) for x in (looked, alike))
        return np.divide(looked, alike, out=np.full_like(alike, np.nan), where=alike > 0)

    def write(self, path: Path) -> None:
        """Write all maps as an .npz file; docs/reference.md names the arrays."""
        arrays: dict[str, np.ndarray] = {"grids": np.array(self.grids)}
        arrays["words"] = np.array(self.words)
        for number, layer in self.layers.items():
            arrays |= {
                f"weights.{number}": layer.weights,
                f"words.{number}": layer.words,
                f"source_grids.{number}": np.array(layer.source),
            }
        with atomic_file(path) as whole:
            np.savez_compressed(whole, **arrays)  # pyright: ignore[reportArgumentType]

    def _keys(self, layer: int) -> tuple[Grid, ...]:
        return (*self.layers[layer].source, *self.grids)


def bundle_maps(
    bundle: Bundle,
    pictures: Sequence[Source],
    instruction: str,
    *,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    variant: str | None = None,
) -> AttentionMaps:
    """Return what a bundle's model attends to; see `attention_maps`.

    Raises BundleError if it has no text encoder, ConfigError on an unknown variant.
    """
    bundle.check_text()
    chosen = bundle.manifest.variant(variant)
    config, sources = sources_of(bundle)
    config = with_grids(chosen, config)
    maps = attention_maps(config, sources, pictures, instruction, layers=layers, seed=seed)
    bundle.check_stands()  # its weights were read by their path
    return maps


def attention_maps(
    config: ModelConfig,
    sources: Sources,
    pictures: Sequence[Source],
    instruction: str,
    *,
    layers: Sequence[int] | None = None,
    seed: int = 0,
) -> AttentionMaps:
    """Edit pictures with a model and its weights; return what it attends to.

    layers: from 0, by default the first, the last, and two between. Raises ConfigError on a layer
    that the model lacks, and what `Editor.edit` raises.
    """
    numbers, text = check_layers(layers, config.transformer.depth), sources.text
    assert text is not None, "an instruction needs a text encoder"
    opened, results = [on_white(open_picture(one)) for one in pictures], list[Image.Image]()
    vocabulary = read_tokenizer(text.tokenizer_json)
    words, places = words_of(Instructions(vocabulary, MAX_TEXT_TOKENS).pieces(instruction))
    model = _model(config, sources, TextEncoder(t5_encoder(text), vocabulary))
    totals: dict[int, LayerMap] = {}
    for picture in opened:
        with recorded(model.transformer, numbers) as recorders:
            results += model.edit([picture], [instruction], seed=[seed])
        for number, layer in layer_maps(model.transformer, recorders).items():
            grouped = np.add.reduceat(layer.words[:, : len(places)], _firsts(places), 1)
            totals[number] = _added(totals.get(number), layer, grouped, len(pictures))
    return AttentionMaps(config.transformer.grids, words, totals, opened[0], results[0])


def _model(config: ModelConfig, sources: Sources, encoder: TextEncoder) -> VAREdit:
    """Load the reference in fp32."""
    reference = Reference.from_sources(config, sources)
    for module in (reference.transformer, reference.tokenizer, encoder.model):
        make_contiguous(module)
    return VAREdit(config, reference.tokenizer, reference.transformer, encoder)


def _added(total: LayerMap | None, layer: LayerMap, words: np.ndarray, pictures: int) -> LayerMap:
    """Add one picture's share to the mean over all pictures."""
    weights, words = layer.weights / pictures, words / pictures
    if total is not None:
        weights, words = total.weights + weights, total.words + words
    return LayerMap(layer.source, weights, words)


def check_layers(layers: Sequence[int] | None, depth: int) -> list[int]:
    """Return the layers to show, in order. Raises ConfigError on one that the model lacks."""
    if layers is None:
        return sorted({0, depth // 3, 2 * depth // 3, depth - 1})
    for number in layers:
        if not 0 <= number < depth:
            raise ConfigError(f"there is no layer {number}: the model has 0 to {depth - 1}")
    return sorted(set(layers))


def words_of(pieces: Sequence[str]) -> tuple[tuple[str, ...], list[int]]:
    """Return the words of a text's pieces, and the number of each piece's word."""
    words: list[str] = []
    places = []
    for piece in pieces:
        starts = not words or piece.startswith(WORD_STARTS) or piece == END_TOKEN
        text = piece.lstrip("".join(WORD_STARTS))
        if starts:
            words.append(text)
        else:
            words[-1] += text
        places.append(len(words) - 1)
    return tuple(words), places


class _Recorder:
    """An attention function that keeps its weights: the first row's, averaged over heads."""

    def __init__(self, attend: Callable[..., Tensor], scale: Callable[[Tensor], float]) -> None:
        self._attend, self._scale = attend, scale
        self.maps: list[np.ndarray] = []  # [queries, keys] of every call

    def __call__(self, q_RHLD: Tensor, k_RHSD: Tensor, v_RHSD: Tensor, *mask: Tensor) -> Tensor:
        mean = torch.zeros(q_RHLD.shape[2], k_RHSD.shape[2])
        for q_LD, k_SD in zip(q_RHLD[0].float(), k_RHSD[0].float(), strict=True):
            scores = q_LD @ k_SD.T * self._scale(q_LD)
            if mask:
                scores = scores.masked_fill(~mask[0][0, 0], -torch.inf)
            mean += scores.softmax(-1) / len(q_RHLD[0])
        self.maps.append(mean.numpy())
        return self._attend(q_RHLD, k_RHSD, v_RHSD, *mask)


Recorders = Mapping[int, tuple[_Recorder, _Recorder]]  # of each layer: its own, of the text


@contextmanager
def recorded(model: VAR, layers: Sequence[int]) -> Iterator[Recorders]:
    """Record layers' self-attention and cross-attention during one edit."""
    blocks = {number: model.blocks[number] for number in layers}
    recorders = {
        number: (
            _Recorder(fused_attention, lambda q: 1.0),
            _Recorder(masked_attention, lambda q: q.shape[-1] ** -0.5),
        )
        for number in layers
    }
    for number, block in blocks.items():
        block.self_attention.attend, block.cross_attention.attend = recorders[number]
    try:
        yield recorders
    finally:
        for block in blocks.values():
            block.self_attention.attend = fused_attention
            block.cross_attention.attend = masked_attention


def layer_maps(model: VAR, recorders: Recorders) -> dict[int, LayerMap]:
    """Return the maps of what was recorded: of every scale, as the source is no target."""
    return {
        number: LayerMap(*_assembled(model, number, own.maps[1:]), np.concatenate(cross.maps[1:]))
        for number, (own, cross) in recorders.items()
    }


def _assembled(
    model: VAR, layer: int, maps: Sequence[np.ndarray]
) -> tuple[tuple[Grid, ...], np.ndarray]:
    """Join the maps of the scales. Returns the grids of the source's columns, and the map."""
    config, lengths = model.config, model.config.lengths
    aligned = uses_references(config, layer)
    every = aligned or config.conditioning == "full"
    source = config.grids if every else config.grids[-1:]
    tokens = sum(map(prod, source))
    weights = np.full((sum(lengths), tokens + sum(lengths)), np.nan, np.float32)
    first = 0
    for length, found in zip(lengths, maps, strict=True):
        own = weights[first : first + length]
        seen = first + length
        start = first if aligned else 0
        own[:, start : start + found.shape[1] - seen] = found[:, :-seen]
        own[:, tokens : tokens + seen] = found[:, -seen:]
        first += length
    return source, weights


def _starts(grids: Sequence[Grid]) -> np.ndarray:
    """Return the first token of each grid in a sequence of them."""
    return np.cumsum([0, *map(prod, grids[:-1])])


def _firsts(places: Sequence[int]) -> np.ndarray:
    return np.unique(places, return_index=True)[1]


def _centres(grid: Grid) -> np.ndarray:
    """Return the centres (row, column) of a grid's tokens in a picture of 1 x 1, [tokens, 2]."""
    rows, columns = ((np.arange(count) + 0.5) / count for count in grid)
    return np.stack(np.meshgrid(rows, columns, indexing="ij"), -1).reshape(-1, 2)
