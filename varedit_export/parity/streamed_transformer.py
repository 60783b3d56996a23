"""The transformer's graphs of a bundle, compared block by block with the reference.

The order of events, each step in the memory of one block:

1. The reference is run without its blocks: a `BlocksRecorder` stands in their place, keeps the
   stream that enters them in every scale, and hands it on unchanged. Every graph, also
   without its blocks, must give the same logits, bits and sums from it. With guidance there is a
   second such run (`Run`), of the conditional rows only, for the graphs that compute only these.
2. Then, block by block, the reference's block is loaded once and compared in every graph that is to
   be compared at it (`blocks_to_run`): one block of each kind, and all blocks of one small scale,
   through which the exact stream runs, and of the condition.

A block of a large scale is compared at `TOKENS` of its tokens: attention costs most by far, and the
new keys and values of all tokens, which the chosen ones see, are taken from the graph (`_Seen`).
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from varedit_export.errors import ParityError
from varedit_export.graphs.layout import transformer_layout
from varedit_export.graphs.stages import Shapes
from varedit_export.parity.blockwise import (
    ComparedGraph,
    ExactWeights,
    RoundedWeights,
    blocks_line,
    blocks_to_run,
    open_cut_graph,
    random_values,
)
from varedit_export.parity.cut import CutAttention, CutGraph
from varedit_export.parity.edit import (
    random_edit,
    scale_arrays,
    source_array,
    text_arrays,
)
from varedit_export.parity.measures import SUMS, line, share_line, ties_line
from varedit_export.parity.outer import OuterReference, Run
from varedit_export.parity.rounding import formatted, reference_formats
from varedit_export.parity.runner import Arrays, Runner
from varedit_export.parity.weight_files import WeightFiles
from varedit_export.sources import Sources
from varedit_reference.config import ModelConfig
from varedit_reference.kv_cache import KVCache, Sight, source_length
from varedit_reference.rotary import Rotation, full_rotation, scale_rotation, source_rotation
from varedit_reference.sampling import bit_probability, guide, nucleus
from varedit_reference.sar import scale_aligned_references
from varedit_reference.transformer import Block, Linear, TextCondition
from varedit_reference.weights_file import torch_dtype
from varedit_runtime.backends.wiring import FUSED, SYMBOLIC
from varedit_runtime.bundle import Bundle
from varedit_runtime.geometry import scale_inputs, scale_sizes
from varedit_runtime.manifest import ParityLine, Variant, scale_name, scale_of

TOKENS = 64  # tokens of a scale that blocks are compared at
CPU = torch.device("cpu")


class TransformerComparison:
    """The comparison of a variant's transformer graphs with the reference."""

    def __init__(
        self,
        bundle: Bundle,
        variant: Variant,
        config: ModelConfig,
        sources: Sources,
        files: WeightFiles,
    ) -> None:
        self._bundle, self._variant, self._config = bundle, variant, config
        self._precision = bundle.manifest.policy
        self._formats = reference_formats(config.transformer, self._precision)
        self._files, self._runner = files, Runner(files)
        layout = transformer_layout(config.transformer)
        self._stored = RoundedWeights(
            sources.transformer, layout, files, "transformer", self._precision
        )
        self._shapes = Shapes(
            config, variant.batch, variant.guided, variant.text_tokens, self._precision
        )
        self._exact = ExactWeights(sources.transformer)
        self._edit = random_edit(variant, config)
        # The scale whose blocks are all run: small, so that weights cost more than computing.
        self._thorough = min(2, max(len(variant.grids) - 2, 0))
        self._halves = torch.arange(config.transformer.head_width).view(-1, 2).T.flatten()

    def lines(self) -> Iterator[ParityLine]:
        outer = self._outer()
        whole, *others = outer.runs()
        self._steps = whole.steps
        yield from self._tables()
        yield from self._condition(outer)
        for run in (whole, *others):
            yield from self._prefill(run)
            yield from self._scales(run)
        if "references" in self._variant.graphs:
            references = open_cut_graph(self._bundle, self._variant, "references")
            yield from self._references(references, references.inputs, whole)
        for stage in (SYMBOLIC, FUSED):
            if stage in self._variant.graphs:
                yield from self._twin(stage, whole)
        x_RLC = whole.seen[1 + self._thorough]
        self._text = outer.text(self._edit)
        del outer
        yield from self._blocks(x_RLC)

    def _outer(self) -> OuterReference:
        return OuterReference(self._config, self._stored, self._edit, self._shapes.guided)

    def _tables(self) -> Iterator[ParityLine]:
        """Compare the positions and levels that the graphs read, which must be exact."""
        config = self._config.transformer
        levels = self._stored["level_embedding.weight"]
        for stage in self._variant.graphs:
            graph, error = open_cut_graph(self._bundle, self._variant, stage), 0.0
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

    def _condition(self, outer: OuterReference) -> Iterator[ParityLine]:
        graph = open_cut_graph(self._bundle, self._variant, "condition")
        given = text_arrays(self._variant, self._edit)
        values = self._runner.run(graph, graph.before, given)
        text, memory = outer.text(self._edit), outer.probe.cross_attention.memory
        entering = graph.entering(0)
        tokens = memory.shape[1]
        yield self._line("condition", "modulation", values["modulation"], text.modulation)
        yield self._line("condition", "text memory", values[entering][:, :tokens], memory)
        padded = np.zeros_like(values[entering])
        padded[:, :tokens] = self._tiled(memory)
        self._inputs = values
        self._memory = memory
        self._stages = [ComparedGraph(graph, None, {}, {entering: padded}, True, len(memory))]

    def _prefill(self, run: Run) -> Iterator[ParityLine]:
        graph = open_cut_graph(self._bundle, self._variant, "prefill" + run.form)
        given = {"source_tokens": source_array(self._variant, run.edit)}
        stage = ComparedGraph(graph, None, {}, self._inputs_of(run) | given, False, run.rows)
        before = self._before(stage)
        yield self._line(graph.name, "stream", before[graph.entering(0)], run.seen[0])
        self._stages.append(stage)
        if "references" in self._variant.graphs:
            yield from self._references(graph, list(graph.after.inputs.values()), run)

    def _inputs_of(self, run: Run) -> Arrays:
        """Return what graphs read of the text: the conditional rows come first."""
        rows = run.rows * self._variant.batch
        return {name: values[:rows] for name, values in self._inputs.items()}

    def _references(self, graph: CutGraph, names: Sequence[str], run: Run) -> Iterator[ParityLine]:
        config, rows = self._config.transformer, run.rows * self._variant.batch
        shape = (config.lengths[-1], rows, config.heads, config.head_width)
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

    def _scales(self, run: Run) -> Iterator[ParityLine]:
        for k in range(len(self._variant.grids)):
            graph = open_cut_graph(self._bundle, self._variant, scale_name(k) + run.form)
            every = k == self._thorough and not run.form
            yield from self._without_blocks(graph, graph.name, k, {}, every, run)

    def _twin(self, stage: str, run: Run) -> Iterator[ParityLine]:
        """Compare a symbolic twin as the first scale and as a middle one, without blocks."""
        batch = self._variant.batch
        channels, bits = self._config.transformer.token_channels, self._config.tokenizer.bits
        for k in sorted({0, self._thorough} - {len(self._variant.grids) - 1}):
            graph = open_cut_graph(self._bundle, self._variant, stage)
            given = {
                "tokens": np.zeros((batch, 1, 1, channels), np.float32),
                "running_sum": np.zeros((batch, bits, *self._shapes.positions), np.float32),
                **scale_inputs(
                    self._variant.grids,
                    k,
                    self._config.tokenizer.patch,
                    self._config.transformer.conditioning,
                ),
            }
            yield from self._without_blocks(graph, f"{stage} as {k}", k, given, False, run)

    def _without_blocks(
        self, graph: CutGraph, called: str, k: int, given: Arrays, every: bool, run: Run
    ) -> Iterator[ParityLine]:
        """Compare a scale without its blocks: their input is taken as their output."""
        stage = graph.name
        suffix = called.removeprefix(stage)
        arrays = scale_arrays(self._variant, run.edit, run.steps, k)
        sizes = scale_sizes(self._variant.grids, k, self._config.transformer.conditioning)
        inputs = self._inputs_of(run)
        compared = ComparedGraph(graph, k, sizes, inputs | given | arrays, every, run.rows)
        values = compared.values | self._before(compared)
        x_RLC, step = run.seen[1 + k], run.steps[k]
        yield self._line(stage, f"stream{suffix}", values[graph.entering(0)], x_RLC)
        values[graph.carried[graph.blocks[-1]]] = self._tiled(x_RLC)
        out = self._runner.run(graph, graph.after, values)
        batch = self._variant.batch
        logits = out["logits"][:1].reshape(step.logits.shape)
        yield self._line(stage, f"logits{suffix}", logits, step.logits)
        noise = compared.values["noise"][:1].reshape(step.bits.shape)
        differs = out["bits"][:1].reshape(step.bits.shape) != step.bits.numpy()
        measure = "bits that differ and are no ties"
        yield ties_line(stage, measure, differs, step.logits.numpy(), noise)
        if differs.any():  # ties, which may fall to either side: what follows is of other bits
            compared.values |= {"forced_mask": np.ones_like(arrays["forced_mask"])}
            values |= compared.values | self._before(compared)
            values[graph.carried[graph.blocks[-1]]] = self._tiled(x_RLC)
            out = self._runner.run(graph, graph.after, values)
        sums = {"running_sum_out": step.sum}
        if k + 1 < len(run.steps):
            sums["next_tokens"] = run.steps[k + 1].tokens  # type: ignore[assignment]
        error = max(
            line("", "", out[n][:1].reshape(x.shape), x.numpy()).value for n, x in sums.items()
        )
        yield ParityLine(stage, f"sum and next tokens{suffix}, largest error", error, SUMS)
        if any((out["bits"][b] != out["bits"][0]).any() for b in range(batch)):
            raise ParityError(f"{stage}: equal pictures of one batch get different bits")
        self._stages.append(compared)

    def _blocks(self, x_RLC: Tensor) -> Iterator[ParityLine]:
        condition, *stages = self._stages
        kinds = [blocks_to_run(stage) for stage in stages]
        (thorough,) = [stage for stage in stages if stage.every]
        thorough.x_RLC = other_RLC = x_RLC
        depth = self._config.transformer.depth
        for i in range(depth):
            block = self._block(i)
            text = self._text_of(block)
            self._compare_text(condition, i, text)
            if not self._precision.exact:
                other_RLC = self._otherwise(block, i, thorough, other_RLC)
            for stage, blocks in zip(stages, kinds, strict=True):
                if i in blocks:
                    self._compare_block(stage, i, block, text)
        yield blocks_line(condition, depth, self._precision)
        for stage, blocks in zip(stages, kinds, strict=True):
            yield blocks_line(stage, len(blocks), self._precision)
        if not self._precision.exact:
            yield self._rounding(thorough, other_RLC)

    def _block(self, index: int, exact: bool = False) -> Block:
        """Load a block as the bundle stores it, or as it was before it was rounded."""
        product = partial(Linear, compute_dtype=torch.float32, weight_dtype=torch.float32)
        with torch.device("meta"):
            block = Block(self._config.transformer, product)
        for linear, format in formatted(block, self._formats, f"blocks.{index}."):
            if format.storage is None:
                linear.type(torch_dtype(format.type))  # held as stored, widened to compute with
            elif not exact:
                linear.round_input = format.storage.round_input
        weights = self._exact if exact else self._stored
        weights.load(block, lambda name: f"blocks.{index}.{name}")
        return block

    def _text_of(self, block: Block) -> TextCondition:
        """Return the text condition with one block's keys and values."""
        keys, values = block.cross_attention.project(self._memory)
        return replace(self._text, keys=[keys], values=[values])

    def _compare_text(self, stage: ComparedGraph, i: int, text: TextCondition) -> None:
        """Compare a block's keys and values of the text; give them to the other graphs."""
        found = self._runner.run(stage.graph, stage.graph.block(i).first, stage.values)
        for kind, expected_RHTD in (("key", text.keys[0]), ("value", text.values[0])):
            own = torch.from_numpy(found[f"cross_{kind}.{i}"])[:: self._variant.batch]
            own_RHTD = own.transpose(2, 3) if kind == "key" else own
            stage.compare(own_RHTD[:, :, : expected_RHTD.shape[2]], expected_RHTD)
        for other in self._stages[1:]:
            rows = other.rows * self._variant.batch
            other.values = {n: x for n, x in other.values.items() if not n.startswith("cross_")}
            other.values |= {name: values[:rows] for name, values in found.items()}

    def _compare_block(
        self, stage: ComparedGraph, i: int, block: Block, text: TextCondition
    ) -> None:
        """Compare a block of a graph with the reference's: stream, keys and values."""
        graph, cut, batch = stage.graph, stage.graph.block(i), self._variant.batch
        length = self._length(stage)
        chosen = torch.arange(length)
        if length > TOKENS:
            chosen = torch.linspace(0, length - 1, TOKENS).long()
        x_RLC = stage.x_RLC
        if x_RLC is None:
            x_RLC = random_values((stage.rows, length, self._config.transformer.width), i)
        values = stage.values | self._before(stage)
        values[graph.entering(i)] = self._tiled(x_RLC)
        new = None
        if cut.attention is None:  # a block of the fused twin is one piece: only small scales
            values |= self._past_arrays(self._past(stage, i))
        values |= self._runner.run(graph, cut.first, values)
        if cut.attention is not None:
            new = self._attend(stage, i, values, cut.attention, chosen)
        given = x_RLC[:, chosen]
        context = _Seen(_joined(self._past(stage, i)), new, chosen)
        text = _first_rows(text, stage.rows)
        expected = block(given, text, 0, self._rotation(stage, chosen), context)
        for kind, own in context.own.items():
            own_SRHD = own[..., self._halves] if kind == "key" else own
            for name in (f"new_{kind}.{i}", f"source_{kind}.{i}"):
                if name in values:
                    stage.compare(torch.from_numpy(values[name])[chosen][:, ::batch], own_SRHD)
        del context, new
        if cut.rest is not None:
            values |= self._runner.run(graph, cut.rest, values)
        if graph.carried.get(i) in values:
            leaving = values[graph.carried[i]]
            stage.compare(torch.from_numpy(leaving)[::batch][:, chosen], expected, given)
        if stage.x_RLC is not None:
            stage.x_RLC = expected

    def _attend(
        self, stage: ComparedGraph, i: int, values: Arrays, attention: CutAttention, chosen: Tensor
    ) -> dict[str, Tensor] | None:
        """Run a block's attention for the chosen tokens; the others get zeros.

        Returns the new keys and values [L, R, H, D] of the graph if not all tokens are chosen.
        """
        graph, batch = stage.graph, self._variant.batch
        for join in attention.joins:
            # One at a time: at a large scale these are the largest arrays.
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

    def _before(self, stage: ComparedGraph) -> Arrays:
        """Run the part before the blocks, which reads at most the number of rows of the past."""
        transformer, rows = self._config.transformer, stage.rows * self._variant.batch
        none = np.zeros((0, rows, transformer.heads, transformer.head_width), np.float32)
        read = stage.graph.before.inputs.values()
        past = {name: none for name in read if name.startswith("past_")}
        return self._runner.run(stage.graph, stage.graph.before, past | stage.values)

    def _past(
        self, stage: ComparedGraph, i: int, names: Collection[str] | None = None
    ) -> dict[str, Tensor]:
        """Draw past keys (unit vectors) and values [P, R, H, D], by the graph's inputs."""
        transformer, past = self._config.transformer, {}
        for n, name in enumerate(stage.graph.inputs):
            of_block = re.fullmatch(rf"past_(key|value)\.{i}", name)
            if not (of_block or (i == 0 and name.startswith("reference_"))):
                continue
            if names is not None and name not in names:
                continue
            length = stage.graph.shapes[name][0]
            length = stage.sizes[length] if isinstance(length, str) else length
            shape = (length, stage.rows, transformer.heads, transformer.head_width)
            past[name] = random_values(shape, n)
            if "key" in name:
                past[name] /= past[name].norm(dim=-1, keepdim=True).clamp_min(1e-12)
        return past

    def _past_arrays(self, past: Mapping[str, Tensor]) -> Arrays:
        """Lay out the past as the graphs read it: keys in halves, rows for the whole batch."""
        arrays = {}
        for name, x_SRHD in past.items():
            halves = x_SRHD[..., self._halves] if "key" in name else x_SRHD
            arrays[name] = self._tiled(halves, 1)
        return arrays

    def _rotation(self, stage: ComparedGraph, chosen: Tensor) -> Rotation:
        config = self._config.transformer
        if stage.scale is None:
            whole = source_rotation(config, CPU)
        else:
            whole = scale_rotation(config, stage.scale, CPU)
        return Rotation(whole.cos[chosen], whole.sin[chosen])

    def _length(self, stage: ComparedGraph) -> int:
        config = self._config.transformer
        return source_length(config) if stage.scale is None else config.lengths[stage.scale]

    def _otherwise(self, block: Block, i: int, stage: ComparedGraph, x_RLC: Tensor) -> Tensor:
        """Return the stream after a block whose products are rounded unlike those compared.

        What is stored as values and scales is compared as it is computed, and is exact here;
        16 bits are compared in fp32, and are rounded here.
        """
        block = self._block(i, exact=True) if self._precision.stored else block
        products = list(formatted(block, self._formats, f"blocks.{i}."))
        for product, format in products:
            product.compute_dtype = torch_dtype(format.type)
        past = {n: x.to(self._shapes.dtype) for n, x in self._past(stage, i).items()}
        every = torch.arange(x_RLC.shape[1])
        context = _Seen(_joined(past), None, every)
        after = block(x_RLC, self._text_of(block), 0, self._rotation(stage, every), context)
        for product, _ in products:
            product.compute_dtype = torch.float32
        return after

    def _rounding(self, stage: ComparedGraph, other_RLC: Tensor) -> ParityLine:
        """Measure what rounded products change, in the reference: no CPU computes in 16 bits."""
        outer, k = self._outer(), self._thorough
        model, text = outer.model, outer.text(self._edit)
        noise, bits = torch.tensor(stage.values["noise"][:1]).flatten(1, 2), []
        for x_RLC in (stage.x_RLC, other_RLC):
            outer.probe.given = x_RLC
            cache = KVCache(self._config.transformer)
            cache.scales_seen = k
            logits = model.predict(k, self._steps[k].tokens, text, cache)
            logits = guide(
                logits, self._edit.guidance[k], self._edit.temperature[k], self._shapes.guided
            )
            bits.append(noise < nucleus(bit_probability(logits)))
        differs = bits[0] != bits[1]
        if not other_RLC.isfinite().all():
            differs = torch.ones_like(differs)
        name = self._precision.name
        measure = f"share of bits that differ, reference with products rounded to {name}"
        return share_line(stage.graph.name, measure, differs.numpy(), self._precision.gates)

    def _line(self, stage: str, measure: str, actual: np.ndarray, expected: Tensor) -> ParityLine:
        """Compare the rows of the batch's first picture."""
        step = len(actual) // len(expected)
        return line(stage, f"{measure}, largest error", actual[::step], expected.numpy())

    def _tiled(self, x: Tensor, axis: int = 0) -> np.ndarray:
        """Repeat one picture's rows for a batch."""
        batch = self._variant.batch
        return (x if batch == 1 else x.repeat_interleave(batch, axis)).numpy()


class _Seen:
    """A block's context: the past and all new tokens, of which the block computes some.

    past, new: by kind, "key" or "value". new: the graph's own for all new tokens, if the block
    computes only the chosen ones. own: what the block computed, once it has run.
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


def _first_rows(text: TextCondition, rows: int) -> TextCondition:
    return TextCondition(
        text.pooled[:rows],
        text.modulation[:rows],
        [keys[:rows] for keys in text.keys],
        [values[:rows] for values in text.values],
        text.mask[:rows],
    )


def _joined(past: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Join the past by kind, references first."""
    return {
        kind: torch.cat(parts)
        for kind in ("key", "value")
        if (parts := [x for name, x in past.items() if kind in name])
    }
