"""Parity of a bundle of any size: block by block, in the memory that one block takes.

What proves that every graph computes the model:

- every weight that a graph refers to lies where the header of its file says (`_places`);
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
"""

import ctypes
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from math import gcd, isnan
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varedit_export.errors import ParityError
from varedit_export.graphs.layout import Weight, transformer_layout
from varedit_export.graphs.stages import DTYPES, Shapes
from varedit_export.graphs.text import text_encoder_layout
from varedit_export.parity.cut import Arrays, Attention, CutCoder, CutGraph, Runner, WeightFiles
from varedit_export.parity.teacher_forcing import (
    FEATURES,
    SUMS,
    bits_line,
    config_of,
    line,
    noise_of,
    picture_lines,
    random_edit,
    run_reference,
    scale_arrays,
    share_line,
    source_array,
    text_arrays,
    tokenizer_of,
)
from varedit_export.sources import Sources, TextSource
from varedit_reference.config import ModelConfig
from varedit_reference.kv_cache import KVCache, Sight
from varedit_reference.quantisation import to_tokens
from varedit_reference.rotary import Rotation, full_rotation, scale_rotation, source_rotation
from varedit_reference.sampling import bit_probability, guide, nucleus
from varedit_reference.sar import scale_aligned_references
from varedit_reference.transformer import VAR, Block, Linear, TextCondition
from varedit_runtime.bundle import Bundle
from varedit_runtime.geometry import scale_inputs, scale_sizes
from varedit_runtime.manifest import ParityLine, Variant, scale_name, scale_of, weights_file
from varedit_runtime.pictures import from_decoder

if TYPE_CHECKING:
    from transformers.models.t5.modeling_t5 import T5Stack

# Largest error over the rms of what a block adds, or of its keys and values: fp32 arithmetic in
# another order gives under 1e-4 at full size, two swapped biases of a random model over 1e-2.
RELATIVE = 1e-3
POSITIONS = 8  # of the tokenizer, along the side of a picture that coders are compared at
TOKENS = 64  # of a scale, that blocks are compared at
DRAWING = 2  # parameters at a time
CPU = torch.device("cpu")
M_MMAP_THRESHOLD, LARGE_ARRAY = -3, 2**20  # of glibc's malloc.h; bytes
TRANSFORMER, TEXT = weights_file("transformer"), weights_file("text_encoder")


class Stored(Mapping[str, Tensor]):
    """The reference's parameters with the values that a bundle's weights were rounded to."""

    def __init__(
        self,
        state: Mapping[str, Tensor],
        layout: Mapping[str, Weight],
        files: WeightFiles,
        file: str,
    ) -> None:
        places = files.layout(file)
        self._state = state
        self._types = {
            source: places[name].dtype for name, w in layout.items() for source in w.sources
        }

    def __getitem__(self, name: str) -> Tensor:
        return self._state[name].float().to(self._types[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)

    def load(self, module: nn.Module, rename: Callable[[str], str]) -> None:
        """Give a module on the meta device its parameters. rename: its own name -> a name here."""
        types = {name: tensor.dtype for name, tensor in module.state_dict().items()}
        # Drawing random ones, or reading them from a disk, takes longer than computing with them.
        with ThreadPoolExecutor(DRAWING) as pool:
            # In order: 16-bit products of transposed ones are a hundred times slower.
            tensors = pool.map(lambda n: self[rename(n)].to(types[n]).contiguous(), types)
            state = dict(zip(types, tensors, strict=True))
        module.load_state_dict(state, assign=True)
        module.requires_grad_(False).eval()


class Probe(nn.Module):
    """Stands where the blocks are, and keeps what they would read.

    memory: of the text; seen: the stream of the source and of every scale; given: the stream handed
    on in its place.
    """

    def __init__(self) -> None:
        super().__init__()
        self.cross_attention = _Memory()
        self.seen: list[Tensor] = []
        self.given: Tensor | None = None

    def forward(self, x_RLC: Tensor, *_: object) -> Tensor:
        self.seen.append(x_RLC)
        return x_RLC if self.given is None else self.given


class _Memory(nn.Module):
    """A cross-attention that keeps the text's memory [R, T, C]."""

    memory: Tensor

    def project(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        self.memory = memory
        return memory[:0], memory[:0]


@dataclass
class Stage:
    """A graph with blocks, at given lengths.

    source, scale: what it predicts, the prefill's source or a scale; values: all that it reads but
    keys and values; every: whether all of its blocks are run; x_RLC: the stream of the next one.
    """

    graph: CutGraph
    scale: int | None
    sizes: Mapping[str, int]
    values: Arrays
    every: bool
    x_RLC: Tensor | None = None
    error: float = 0.0

    def compare(self, actual: Tensor, expected: Tensor, given: Tensor | None = None) -> None:
        """Keep the largest error, over the rms of what was added to the given stream."""
        added = expected if given is None else expected - given
        error = ((actual - expected).abs().max() / added.square().mean().sqrt()).item()
        self.error = error if isnan(error) else max(self.error, error)


@torch.inference_mode()
def compare_streamed(bundle: Bundle, config: ModelConfig, sources: Sources) -> Iterator[ParityLine]:
    """Every graph of every variant against the weights it was built from."""
    _return_freed_memory()
    for variant in bundle.manifest.variants:
        files, config = WeightFiles(bundle.path), config_of(variant, config)
        yield from _places(bundle, variant, files)
        if sources.text is not None and "text_encoder" in variant.graphs:
            yield from TextComparison(bundle, variant, sources.text, files).lines()
        yield from Coders(bundle, variant, config, sources, files).lines()
        yield from Comparison(bundle, variant, config, sources, files).lines()


def _return_freed_memory() -> None:
    """Let large arrays go back to the system when they are freed.

    glibc keeps up to 32 MB of each for later, in pieces that the next ones do not fit into.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE_ARRAY)


def _cut(bundle: Bundle, variant: Variant, stage: str) -> CutGraph:
    return CutGraph(stage, bundle.graph_bytes(variant.name, stage))


def _places(bundle: Bundle, variant: Variant, files: WeightFiles) -> Iterator[ParityLine]:
    """Weights that lie elsewhere than the header of their file says, by graph.

    A scale's parts of weights, which have no name there, are compared by value.
    """
    for stage in variant.graphs:
        wrong = 0
        for name, weight in _cut(bundle, variant, stage).places.items():
            if scale_of(stage) is None or name not in PARTS:
                wrong += files.layout(weight.place.file).get(name) != weight
        yield ParityLine(stage, "weights not where their file has them", float(wrong), 0.0)


PARTS = ("level", "cos", "sin")


class Comparison:
    """The transformer's graphs of a variant."""

    def __init__(
        self,
        bundle: Bundle,
        variant: Variant,
        config: ModelConfig,
        sources: Sources,
        files: WeightFiles,
    ) -> None:
        self._bundle, self._variant, self._config = bundle, variant, config
        self._dtype = DTYPES[bundle.manifest.precision]
        self._files, self._runner = files, Runner(files, torch.get_num_threads())
        layout = transformer_layout(config.transformer)
        self._stored = Stored(sources.transformer, layout, files, TRANSFORMER)
        self._shapes = Shapes(
            config, variant.batch, variant.guided, variant.text_tokens, self._dtype
        )
        self._edit = random_edit(variant, config)
        # Small, so that reading every block's weights costs more than computing with them.
        self._thorough = min(2, max(len(variant.grids) - 2, 0))
        self._halves = torch.arange(config.transformer.head_width).view(-1, 2).T.flatten()

    def lines(self) -> Iterator[ParityLine]:
        self._model, self._probe = self._outer()
        self._steps = run_reference(self._model, self._config, self._edit)
        yield from self._tables()
        yield from self._condition()
        yield from self._prefill()
        yield from self._scales()
        yield from self._twin()
        x_RLC = self._probe.seen[1 + self._thorough]
        self._text = self._text_condition(self._model)
        del self._model, self._probe
        yield from self._blocks(x_RLC)

    def _outer(self) -> tuple[VAR, Probe]:
        """The reference without its blocks."""
        with torch.device("meta"):
            config = replace(self._config.transformer, depth=1)
            model = VAR(config, torch.float32, self._dtype)
        probe = Probe()
        model.blocks = nn.ModuleList([probe])  # type: ignore[assignment]
        self._stored.load(model, lambda name: name)
        return model, probe

    def _text_condition(self, model: VAR) -> TextCondition:
        return model.condition(model.text_rows([self._edit.text], self._shapes.guided))

    def _tables(self) -> Iterator[ParityLine]:
        """Positions and levels that the graphs read, exactly."""
        config = self._config.transformer
        levels = self._stored["level_embedding.weight"]
        for stage in self._variant.graphs:
            graph, error = _cut(self._bundle, self._variant, stage), 0.0
            scale = scale_of(stage)
            if not {"cos", "sin"} & graph.places.keys():
                continue
            rotation = full_rotation(config, CPU)
            expected = {"cos": rotation.cos, "sin": rotation.sin}
            if scale is not None:
                rotation = scale_rotation(config, scale, CPU)
                expected = {"cos": rotation.cos, "sin": rotation.sin, "level": levels[scale]}
            for name, table in expected.items():
                stored = self._files.read(graph.places[name])
                error = max(error, float((stored.view(table.shape) - table).abs().max()))
            yield ParityLine(stage, "positions and level, largest error", error, 0.0)

    def _condition(self) -> Iterator[ParityLine]:
        graph = _cut(self._bundle, self._variant, "condition")
        given = text_arrays(self._variant, self._edit)
        values = self._runner.run(graph, graph.before, given)
        text, memory = self._text_condition(self._model), self._probe.cross_attention.memory
        entering = graph.entering(0)
        tokens = memory.shape[1]
        yield self._line("condition", "modulation", values["modulation"], text.modulation)
        yield self._line("condition", "text memory", values[entering][:, :tokens], memory)
        padded = np.zeros_like(values[entering])
        padded[:, :tokens] = self._tiled(memory)
        self._inputs = values
        self._memory = memory
        self._stages = [Stage(graph, None, {}, {entering: padded}, True)]

    def _prefill(self) -> Iterator[ParityLine]:
        graph = _cut(self._bundle, self._variant, "prefill")
        given = {"source_tokens": source_array(self._variant, self._edit)}
        stage = Stage(graph, None, {}, self._inputs | given, False)
        before = self._runner.run(graph, graph.before, stage.values)
        yield self._line("prefill", "stream", before[graph.entering(0)], self._probe.seen[0])
        self._stages.append(stage)
        if "references" in self._variant.graphs:
            yield from self._references(graph, list(graph.after.inputs.values()))
            references = _cut(self._bundle, self._variant, "references")
            yield from self._references(references, references.inputs)

    def _references(self, graph: CutGraph, names: Sequence[str]) -> Iterator[ParityLine]:
        config = self._config.transformer
        shape = (config.lengths[-1], self._variant.rows, config.heads, config.head_width)
        generator = torch.Generator().manual_seed(4)
        sources = [torch.randn(shape, generator=generator) for _ in names]
        piece = graph.after if graph.blocks else graph.before
        given = {name: source.numpy() for name, source in zip(names, sources, strict=True)}
        pooled = self._runner.run(graph, piece, given)
        error = 0.0
        for kind, source in zip(("key", "value"), sources, strict=True):
            for k, expected in enumerate(scale_aligned_references(source, config.grids)):
                name = f"reference_{kind}.{k}"
                error = max(error, line("", "", pooled[name], expected.numpy()).value)
        yield ParityLine(graph.name, "references, largest error", error, SUMS)

    def _scales(self) -> Iterator[ParityLine]:
        for k in range(len(self._variant.grids)):
            graph = _cut(self._bundle, self._variant, scale_name(k))
            yield from self._without_blocks(graph, graph.name, k, {}, k == self._thorough)

    def _twin(self) -> Iterator[ParityLine]:
        """The symbolic twin as the first scale and as a middle one."""
        batch = self._variant.batch
        channels, bits = self._config.transformer.token_channels, self._config.tokenizer.bits
        for k in sorted({0, self._thorough} - {len(self._variant.grids) - 1}):
            graph = _cut(self._bundle, self._variant, "scale")
            given = {
                "tokens": np.zeros((batch, 1, 1, channels), np.float32),
                "running_sum": np.zeros((batch, bits, *self._shapes.positions), np.float32),
                **scale_inputs(self._variant.grids, k, self._config.tokenizer.patch),
            }
            yield from self._without_blocks(graph, f"scale as {k}", k, given, False)

    def _without_blocks(
        self, graph: CutGraph, called: str, k: int, given: Arrays, every: bool
    ) -> Iterator[ParityLine]:
        """A scale whose blocks are left out: what goes in comes out of them."""
        stage = graph.name
        suffix = called.removeprefix(stage)
        arrays = scale_arrays(self._variant, self._edit, self._steps, k)
        sizes = scale_sizes(self._variant.grids, k)
        compared = Stage(graph, k, sizes, self._inputs | given | arrays, every)
        values = compared.values | self._runner.run(graph, graph.before, compared.values)
        x_RLC, step = self._probe.seen[1 + k], self._steps[k]
        yield self._line(stage, f"stream{suffix}", values[graph.entering(0)], x_RLC)
        values[graph.carried[graph.blocks[-1]]] = self._tiled(x_RLC)
        out = self._runner.run(graph, graph.after, values)
        batch = self._variant.batch
        logits = out["logits"][:1].reshape(step.logits.shape)
        yield self._line(stage, f"logits{suffix}", logits, step.logits)
        bits = out["bits"][:1].reshape(step.bits.shape)
        yield bits_line(stage, bits, step, noise_of(self._edit, step), exact=True)
        sums = {"running_sum_out": step.sum}
        if k + 1 < len(self._steps):
            sums["next_tokens"] = self._steps[k + 1].tokens  # type: ignore[assignment]
        error = max(
            line("", "", out[n][:1].reshape(x.shape), x.numpy()).value for n, x in sums.items()
        )
        yield ParityLine(stage, f"sum and next tokens{suffix}, largest error", error, SUMS)
        if any((out["bits"][b] != out["bits"][0]).any() for b in range(batch)):
            raise ParityError(f"{stage}: equal pictures of one batch get different bits")
        self._stages.append(compared)

    def _blocks(self, x_RLC: Tensor) -> Iterator[ParityLine]:
        condition, *stages = self._stages
        kinds = [_to_run(stage) for stage in stages]
        (thorough,) = [stage for stage in stages if stage.every]
        thorough.x_RLC = rounded_RLC = x_RLC
        depth = self._config.transformer.depth
        for i in range(depth):
            block = self._block(i, torch.float32)
            text = self._text_of(block)
            self._compare_text(condition, i, text)
            if self._dtype != torch.float32:
                rounded_RLC = self._rounded(block, i, thorough, rounded_RLC)
            for stage, blocks in zip(stages, kinds, strict=True):
                if i in blocks:
                    self._compare_block(stage, i, block, text)
        yield _blocks_line(condition, depth)
        for stage, blocks in zip(stages, kinds, strict=True):
            yield _blocks_line(stage, len(blocks))
        if self._dtype != torch.float32:
            yield self._rounding(thorough, rounded_RLC)

    def _block(self, index: int, compute_dtype: torch.dtype) -> Block:
        block = self._empty_block(compute_dtype)
        self._stored.load(block, lambda name: f"blocks.{index}.{name}")
        return block

    def _empty_block(self, compute_dtype: torch.dtype) -> Block:
        product = partial(Linear, compute_dtype=compute_dtype, weight_dtype=self._dtype)
        with torch.device("meta"):
            return Block(self._config.transformer, product)

    def _text_of(self, block: Block) -> TextCondition:
        """The text as one block reads it."""
        keys, values = block.cross_attention.project(self._memory)
        return replace(self._text, keys=[keys], values=[values])

    def _compare_text(self, stage: Stage, i: int, text: TextCondition) -> None:
        """A block's keys and values of the text, which the other graphs then read."""
        found = self._runner.run(stage.graph, stage.graph.block(i).first, stage.values)
        for kind, expected_RHTD in (("key", text.keys[0]), ("value", text.values[0])):
            own = torch.from_numpy(found[f"cross_{kind}.{i}"])[:: self._variant.batch]
            own_RHTD = own.transpose(2, 3) if kind == "key" else own
            stage.compare(own_RHTD[:, :, : expected_RHTD.shape[2]], expected_RHTD)
        for other in self._stages[1:]:
            other.values = {n: x for n, x in other.values.items() if not n.startswith("cross_")}
            other.values |= found

    def _compare_block(self, stage: Stage, i: int, block: Block, text: TextCondition) -> None:
        """A block of a graph against the reference's: stream, keys and values."""
        graph, cut, batch = stage.graph, stage.graph.block(i), self._variant.batch
        length = self._length(stage)
        chosen = torch.arange(length)
        if length > TOKENS:
            chosen = torch.linspace(0, length - 1, TOKENS).long()
        x_RLC = stage.x_RLC
        if x_RLC is None:
            x_RLC = _random((len(self._memory), length, self._config.transformer.width), i)
        values = stage.values | self._runner.run(graph, graph.before, stage.values)
        values[graph.entering(i)] = self._tiled(x_RLC)
        values |= self._runner.run(graph, cut.first, values)
        new = None
        if cut.attention is not None:
            new = self._attend(stage, i, values, cut.attention, chosen)
        given = x_RLC[:, chosen]
        context = _Seen(_joined(self._past(stage, i)), new, chosen)
        expected = block(given, text, 0, self._rotation(stage, chosen), context)
        for kind, own in context.own.items():
            own_SRHD = own[..., self._halves] if kind == "key" else own
            for name in (f"new_{kind}.{i}", f"source_{kind}.{i}"):
                if name in values:
                    stage.compare(torch.from_numpy(values[name])[chosen][:, ::batch], own_SRHD)
        del context, new
        if cut.rest is not None:
            leaving = self._runner.run(graph, cut.rest, values)[graph.carried[i]]
            stage.compare(torch.from_numpy(leaving)[::batch][:, chosen], expected, given)
        if stage.x_RLC is not None:
            stage.x_RLC = expected

    def _attend(
        self, stage: Stage, i: int, values: Arrays, attention: Attention, chosen: Tensor
    ) -> dict[str, Tensor] | None:
        """Attend for the chosen tokens; the others attend to nothing.

        -> the new keys and values [L, R, H, D] that the graph computed, where not all are chosen.
        """
        graph, batch = stage.graph, self._variant.batch
        for join in attention.joins:
            # One at a time: of a large scale these are the largest arrays there are.
            past = self._past(stage, i, set(join.inputs.values()))
            values |= self._runner.run(graph, join, values | self._past_arrays(past))
            del past
        queries, places = values.pop(attention.queries), chosen.numpy()
        some = values | {attention.queries: queries[:, :, places]}
        attended = self._runner.run(graph, attention.piece, some)[attention.attended]
        values[attention.attended] = np.zeros_like(queries)
        values[attention.attended][:, :, places] = attended
        keys_RHDS = torch.from_numpy(values.pop(attention.keys))[::batch]
        values_RHSD = torch.from_numpy(values.pop(attention.values))[::batch]
        length = queries.shape[2]
        if len(chosen) == length:
            return None
        keys = keys_RHDS[..., -length:].permute(3, 0, 1, 2)[..., self._halves.argsort()]
        return {"key": keys, "value": values_RHSD[:, :, -length:].permute(2, 0, 1, 3).clone()}

    def _past(
        self, stage: Stage, i: int, names: Collection[str] | None = None
    ) -> dict[str, Tensor]:
        """Random keys, unit vectors, and values of what came before, [P, R, H, D], by input."""
        transformer, past = self._config.transformer, {}
        for n, name in enumerate(stage.graph.inputs):
            of_block = re.fullmatch(rf"past_(key|value)\.{i}", name)
            if not (of_block or (i == 0 and name.startswith("reference_"))):
                continue
            if names is not None and name not in names:
                continue
            length = stage.graph.shapes[name][0]
            length = stage.sizes[length] if isinstance(length, str) else length
            shape = (length, len(self._memory), transformer.heads, transformer.head_width)
            past[name] = _random(shape, n)
            if "key" in name:
                past[name] /= past[name].norm(dim=-1, keepdim=True).clamp_min(1e-12)
        return past

    def _past_arrays(self, past: Mapping[str, Tensor]) -> Arrays:
        """As the graphs read them: keys in halves, one picture's rows as a batch's."""
        arrays = {}
        for name, x_SRHD in past.items():
            halves = x_SRHD[..., self._halves] if "key" in name else x_SRHD
            arrays[name] = self._tiled(halves, 1)
        return arrays

    def _rotation(self, stage: Stage, chosen: Tensor) -> Rotation:
        config = self._config.transformer
        if stage.scale is None:
            whole = source_rotation(config, CPU)
        else:
            whole = scale_rotation(config, stage.scale, CPU)
        return Rotation(whole.cos[chosen], whole.sin[chosen])

    def _length(self, stage: Stage) -> int:
        return self._config.transformer.lengths[-1 if stage.scale is None else stage.scale]

    def _rounded(self, exact: Block, i: int, stage: Stage, x_RLC: Tensor) -> Tensor:
        """The stream after a block whose products are rounded to 16 bits."""
        block = self._empty_block(self._dtype)
        block.load_state_dict(exact.state_dict(), assign=True)
        past = {n: x.to(self._dtype) for n, x in self._past(stage, i).items()}
        every = torch.arange(x_RLC.shape[1])
        context = _Seen(_joined(past), None, every)
        return block(x_RLC, self._text_of(block), 0, self._rotation(stage, every), context)

    def _rounding(self, stage: Stage, rounded_RLC: Tensor) -> ParityLine:
        """What 16-bit products change, in the reference itself: no CPU computes the graphs so."""
        model, probe = self._outer()
        text, k = self._text_condition(model), self._thorough
        noise, bits = noise_of(self._edit, self._steps[k]), []
        for x_RLC in (stage.x_RLC, rounded_RLC):
            probe.given = x_RLC
            cache = KVCache(self._config.transformer)
            cache.scales_seen = k
            logits = model.predict(k, self._steps[k].tokens, text, cache)
            logits = guide(
                logits, self._edit.guidance[k], self._edit.temperature[k], self._shapes.guided
            )
            bits.append(noise < nucleus(bit_probability(logits)))
        differs = bits[0] != bits[1]
        if not rounded_RLC.isfinite().all():
            differs = torch.ones_like(differs)
        precision = self._bundle.manifest.precision
        measure = f"share of bits that differ, reference with products rounded to {precision}"
        return share_line(stage.graph.name, measure, differs)

    def _line(self, stage: str, measure: str, actual: np.ndarray, expected: Tensor) -> ParityLine:
        """Of the first picture's rows."""
        step = len(actual) // len(expected)
        return line(stage, f"{measure}, largest error", actual[::step], expected.numpy())

    def _tiled(self, x: Tensor, axis: int = 0) -> np.ndarray:
        """One picture's rows as a batch's."""
        batch = self._variant.batch
        return (x if batch == 1 else x.repeat_interleave(batch, axis)).numpy()


class _Seen:
    """A block's context: what came before, and the new tokens, of which some are computed.

    past, new: by kind, "key" or "value"; new: what the graph computed for all new tokens, where
    only the chosen ones are the block's own. own: the block's own, once it has run.
    """

    def __init__(
        self, past: Mapping[str, Tensor], new: Mapping[str, Tensor] | None, chosen: Tensor
    ) -> None:
        self._past, self._new, self._chosen = past, new, chosen
        self.own: dict[str, Tensor] = {}

    def __call__(self, keys: Tensor, values: Tensor) -> list[Sight]:
        self.own = {"key": keys, "value": values}
        seen = {}
        for kind, own in self.own.items():
            if self._new is not None:
                self._new[kind][self._chosen] = own
                own = self._new[kind]
            seen[kind] = torch.cat((self._past[kind], own)) if kind in self._past else own
        return [Sight(len(keys), seen["key"], seen["value"])]


class Coders:
    """The image coders, for smaller pictures than the variant's."""

    def __init__(
        self,
        bundle: Bundle,
        variant: Variant,
        config: ModelConfig,
        sources: Sources,
        files: WeightFiles,
    ) -> None:
        self._bundle, self._variant = bundle, variant
        self._runner = Runner(files, torch.get_num_threads())
        self._patch, self._sides = config.tokenizer.patch, variant.picture
        self._tokenizer = tokenizer_of(config, sources.tokenizer)
        # Of the tokenizer's positions, so that all sides divide.
        sides = [side // config.tokenizer.downsampling for side in variant.picture]
        self._factor = max(f for f in _divisors(gcd(*sides)) if min(sides) // f >= POSITIONS)

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
        cut = CutCoder(stage, self._bundle.graph_bytes(self._variant.name, stage), self._factor)
        made = self._runner.run(cut.small, cut.small.before, {name: given.numpy()})[cut.maps]
        height, width = given.shape[2:]
        yield line(
            stage, f"maps of {height} x {width}, largest error", made, expected.numpy(), SUMS
        )
        if stage == "image_encoder":
            whole = _random(cut.whole.shapes[cut.maps], 5)  # type: ignore[arg-type]
            tokens = self._runner.run(cut.whole, cut.tail, {cut.maps: whole.numpy()})
            ordered = to_tokens(whole, self._patch).numpy()
            (found,) = tokens.values()
            yield line(stage, "order of tokens", found.reshape(ordered.shape), ordered, 0.0)
        else:
            yield from picture_lines(from_decoder(made[0]), from_decoder(expected[0].numpy()))


def _divisors(number: int) -> list[int]:
    return [i for i in range(1, number + 1) if number % i == 0]


class TextComparison:
    """The text encoder's graph against transformers' T5, block by block, with padding."""

    def __init__(
        self, bundle: Bundle, variant: Variant, text: TextSource, files: WeightFiles
    ) -> None:
        self._graph = _cut(bundle, variant, "text_encoder")
        self._runner = Runner(files, torch.get_num_threads())
        self._json = text.json
        self._depth = text.config.depth
        self._stored = Stored(text.state, text_encoder_layout(text.config), files, TEXT)
        shape = (variant.batch, variant.text_tokens)
        generator = torch.Generator().manual_seed(2)
        self._ids = torch.randint(3, text.config.vocabulary, shape, generator=generator)
        self._mask = (torch.arange(shape[1]) < max(shape[1] // 2, 1)).expand(shape)

    def lines(self) -> Iterator[ParityLine]:
        graph, stack = self._graph, self._stack()
        stage = Stage(graph, None, {}, {}, True)
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
        yield _blocks_line(stage, self._depth)
        self._stored.load(norm, lambda name: f"encoder.final_layer_norm.{name}")
        values[graph.carried[self._depth - 1]] = x_BTC.numpy()
        features = self._runner.run(graph, graph.after, values)["text_features"]
        yield self._line("features", features, norm(x_BTC))

    def _stack(self) -> "T5Stack":
        """An encoder of one block, without weights."""
        from transformers import T5Config, T5EncoderModel

        with torch.device("meta"):
            encoder = T5EncoderModel(T5Config(**{**self._json, "num_layers": 1})).encoder
        encoder.set_input_embeddings(nn.Identity())
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


def _of_block(index: int, name: str) -> str:
    """A one-block encoder's parameter -> a block's in T5's names; positions are the first's."""
    block = 0 if "relative_attention_bias" in name else index
    return f"encoder.{name}".replace("block.0.", f"block.{block}.", 1)


def _to_run(stage: Stage) -> list[int]:
    """One block of each kind, or all."""
    kinds: dict[tuple[bytes, ...], int] = {}
    for i in stage.graph.blocks:
        kinds.setdefault(stage.graph.block(i).kind, i)
    return list(stage.graph.blocks if stage.every else kinds.values())


def _blocks_line(stage: Stage, count: int) -> ParityLine:
    blocks = f"all {count} blocks" if stage.every else f"{count} unlike blocks"
    at = f" at scale {stage.scale}" if stage.graph.name == "scale" else ""
    measure = f"{blocks}{at}, largest error over what they add"
    return ParityLine(stage.graph.name, measure, stage.error, RELATIVE)


def _joined(past: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What came before by kind, references first."""
    return {
        kind: torch.cat(parts)
        for kind in ("key", "value")
        if (parts := [x for name, x in past.items() if kind in name])
    }


def _random(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
