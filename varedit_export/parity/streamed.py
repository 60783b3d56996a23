"""Parity of a bundle of any size: block by block, in the memory that one block takes.

What proves that every graph computes the model:

- every weight that a graph refers to lies where the header of its file says (`_misplaced_weights`);
- every graph without its blocks agrees with the reference without its blocks, teacher-forced;
- in every graph, blocks that are alike but for their number are found by comparing them, and one
  of each kind agrees with the reference's block;
- every block agrees in the graphs where each weight is read: the condition's, one scale's, and the
  text encoder's.

The reference takes the weights that the bundle was built from, as rounded, one block at a time, and
hands its own exact output on: errors do not add up. Keys and values of what came before are random,
the same for both. Large scales are compared at some of their tokens. Pieces run in fp32 whatever
the graph's types: what 16-bit products change is measured in the reference, through all blocks of
one scale.

Here are the checks of the weights' places, the image coders and the text encoder; the transformer
is in `streamed_transformer.py`. `cut.py` takes graphs apart, and `runner.py` runs their pieces.
"""

import ctypes
import sys
from collections.abc import Iterator
from functools import partial
from math import gcd
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from msgspec import structs
from torch import Tensor, nn

from varedit_export.graphs.text import text_encoder_layout
from varedit_export.parity.blockwise import (
    ComparedGraph,
    RoundedWeights,
    blocks_line,
    open_cut_graph,
    random_values,
)
from varedit_export.parity.cut import CutCoder
from varedit_export.parity.edit import with_grids
from varedit_export.parity.measures import FEATURES, SUMS, check_output, line, picture_lines
from varedit_export.parity.runner import Arrays, Runner
from varedit_export.parity.streamed_transformer import TransformerComparison
from varedit_export.parity.weight_files import WeightFiles
from varedit_export.sources import Sources, TextSource, tokenizer_of
from varedit_reference.config import ModelConfig
from varedit_reference.quantisation import source_tokens
from varedit_reference.text_encoder import t5_stack
from varedit_runtime.backends.graph_file import read_graph
from varedit_runtime.bundle import Bundle
from varedit_runtime.manifest import ParityLine, Variant, scale_of
from varedit_runtime.pictures import from_decoder
from varedit_runtime.precision import Storage, product_of

if TYPE_CHECKING:
    from transformers.models.t5.modeling_t5 import T5Stack

POSITIONS = 8  # tokenizer positions along the side of the pictures that coders are compared on
M_MMAP_THRESHOLD, LARGE_ARRAY = -3, 2**20  # of glibc's malloc.h; bytes


@torch.inference_mode()
def compare_streamed(bundle: Bundle, config: ModelConfig, sources: Sources) -> Iterator[ParityLine]:
    """Compare every graph of every variant with the reference, block by block."""
    _return_memory_when_freed()
    for variant in bundle.manifest.variants:
        files, config = WeightFiles(bundle.path), with_grids(variant, config)
        yield from _misplaced_weights(bundle, variant, files)
        if sources.text is not None and "text_encoder" in variant.graphs:
            yield from TextComparison(bundle, variant, sources.text, files).lines()
        yield from CoderComparison(bundle, variant, config, sources, files).lines()
        yield from TransformerComparison(bundle, variant, config, sources, files).lines()


def _return_memory_when_freed() -> None:
    """Have glibc return large arrays to the system when they are freed.

    By default it keeps up to 32 MB of each, in pieces that the next arrays do not fit into.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE_ARRAY)


def _misplaced_weights(
    bundle: Bundle, variant: Variant, files: WeightFiles
) -> Iterator[ParityLine]:
    """Count, by graph, the weights that lie elsewhere than the header of their file says.

    A scale's parts of weights, which have no names there, are compared by value.
    """
    for stage in variant.graphs:
        wrong = 0
        for name, weight in open_cut_graph(bundle, variant, stage).places.items():
            if scale_of(stage) is None or name not in PARTS:
                wrong += files.layout(weight.place.file).get(name) != weight
        yield ParityLine(stage, "weights not where their file has them", float(wrong), 0.0)


PARTS = ("level", "cos", "sin")


class CoderComparison:
    """The comparison of the image coders, on smaller pictures than the variant's."""

    def __init__(
        self,
        bundle: Bundle,
        variant: Variant,
        config: ModelConfig,
        sources: Sources,
        files: WeightFiles,
    ) -> None:
        self._bundle, self._variant = bundle, variant
        self._runner = Runner(files)
        self._config, self._sides = config, variant.picture
        self._tokenizer = tokenizer_of(config, sources.tokenizer)
        # In positions of the tokenizer, so that all sides divide.
        sides = [side // config.tokenizer.downsampling for side in variant.picture]
        fitting = range(1, min(sides) // POSITIONS + 1)
        self._factor = max(factor for factor in fitting if gcd(*sides) % factor == 0)

    def lines(self) -> Iterator[ParityLine]:
        generator = torch.Generator().manual_seed(3)
        height, width = (side // self._factor for side in self._sides)
        shape = (self._variant.batch, 3, height, width)
        pictures = torch.rand(shape, generator=generator) * 2 - 1
        features = self._tokenizer.encode(pictures)
        yield from self._compare("image_encoder", "pictures", pictures, features)
        total = torch.randn(features.shape, generator=generator) / features.shape[1] ** 0.5
        yield from self._compare(
            "image_decoder", "running_sum", total, self._tokenizer.decode(total)
        )

    def _compare(
        self, stage: str, name: str, given: Tensor, expected: Tensor
    ) -> Iterator[ParityLine]:
        cut = CutCoder(stage, read_graph(self._bundle, self._variant, stage), self._factor)
        made = self._runner.run(cut.small, cut.small.before, {name: given.numpy()})[cut.maps]
        check_output(stage, cut.maps, made)
        height, width = given.shape[2:]
        yield line(
            stage, f"maps of {height} x {width}, largest error", made, expected.numpy(), SUMS
        )
        if stage == "image_encoder":
            of_one = cut.whole.shapes[cut.maps][1:]
            whole = random_values((len(given), *of_one), 5)  # type: ignore[arg-type]
            tokens = self._runner.run(cut.whole, cut.tail, {cut.maps: whole.numpy()})
            grids, kind = self._variant.grids, self._config.transformer.conditioning
            ordered = source_tokens(whole, grids, self._config.tokenizer.patch, kind).numpy()
            (found,) = (one.reshape(ordered.shape) for one in tokens.values())
            averaged = SUMS if kind == "full" else 0.0
            yield line(stage, "order of tokens", found, ordered, averaged)
        else:
            yield from picture_lines(from_decoder(made[0]), from_decoder(expected[0].numpy()))


class TextComparison:
    """The comparison of the text encoder with transformers' T5, block by block, with padding."""

    def __init__(
        self, bundle: Bundle, variant: Variant, text: TextSource, files: WeightFiles
    ) -> None:
        self._graph = open_cut_graph(bundle, variant, "text_encoder")
        self._runner = Runner(files)
        self._config, self._depth = text.config, text.config.depth
        self._precision, layout = bundle.manifest.policy, text_encoder_layout(text.config)
        self._stored = RoundedWeights(text.state, layout, files, "text_encoder", self._precision)
        self._storages = {
            source: self._precision.format("text_encoder", product_of(name)).storage
            for name, weight in layout.items()
            for source in weight.sources
        }
        shape = (variant.batch, variant.text_tokens)
        generator = torch.Generator().manual_seed(2)
        self._ids = torch.randint(3, text.config.vocabulary, shape, generator=generator)
        self._mask = (torch.arange(shape[1]) < max(shape[1] // 2, 1)).expand(shape)

    def lines(self) -> Iterator[ParityLine]:
        graph, stack = self._graph, self._stack()
        stage = ComparedGraph(graph, None, {}, {}, True)
        given = {"token_ids": self._ids.numpy(), "text_mask": self._mask.numpy()}
        values = given | self._runner.run(graph, graph.before, given)
        x_BTC = F.embedding(self._ids, self._stored["shared.weight"]).float()
        yield self._line("embedding", values[graph.entering(0)], x_BTC)
        norm, stack.final_layer_norm = stack.final_layer_norm, nn.Identity()  # type: ignore[assignment]
        for i in range(self._depth):
            self._stored.load(stack, partial(_of_block, i))
            expected = stack(inputs_embeds=x_BTC, attention_mask=self._mask.long())
            values[graph.entering(i)] = x_BTC.numpy()
            left = self._block(i, values)
            after = expected.last_hidden_state
            stage.compare(left[self._mask], after[self._mask], x_BTC[self._mask])
            x_BTC = after
            stack = self._stack()
            stack.final_layer_norm = nn.Identity()  # type: ignore[assignment]
        yield blocks_line(stage, self._depth, self._precision)
        self._stored.load(norm, lambda name: f"encoder.final_layer_norm.{name}")
        values[graph.carried[self._depth - 1]] = x_BTC.numpy()
        features = self._runner.run(graph, graph.after, values)["text_features"]
        yield self._line("features", features, norm(x_BTC))

    def _stack(self) -> "T5Stack":
        """Make an encoder of one block, without weights."""
        encoder = t5_stack(structs.replace(self._config, depth=1))
        encoder.set_input_embeddings(nn.Identity())
        for name, module in encoder.named_modules():
            if isinstance(module, nn.Linear):
                storage = self._storages[_of_block(0, f"{name}.weight")]
                if storage is not None:
                    module.register_forward_pre_hook(partial(_round_input, storage))
        return encoder.eval()

    def _block(self, i: int, values: Arrays) -> Tensor:
        graph, cut = self._graph, self._graph.block(i)
        values = dict(values)
        for piece in (cut.first, cut.attention and cut.attention.piece, cut.rest):
            if piece is not None:
                values |= self._runner.run(graph, piece, values)
        return torch.from_numpy(values[graph.carried[i]])

    def _line(self, measure: str, actual: np.ndarray, expected: Tensor) -> ParityLine:
        kept = self._mask.numpy()
        measure = f"{measure}, largest error"
        return line("text_encoder", measure, actual[kept], expected.numpy()[kept], FEATURES)


def _round_input(storage: Storage, _: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
    return (storage.round_input(given[0]),)


def _of_block(index: int, name: str) -> str:
    """Return T5's name of a block's parameter; only the first block has relative positions."""
    block = 0 if "relative_attention_bias" in name else index
    return f"encoder.{name}".replace("block.0.", f"block.{block}.", 1)
