"""The stages that predict the scales: one static graph per scale, and their symbolic twin.

A scale draws its bits and hands on the running sum and the next tokens, so that nothing between
two scales needs the host. Two kinds of graphs compute that:

- **static graphs**, for engines: every length is known, and what differs between scales
  (`Geometry`) is constants and parts of weights. A scale has one or, in a variant with guidance,
  two: one with all rows, and one with the conditional rows only, for where guidance is off;
- **the twin** `scale` (`SymbolicScaleStage`), for backends that hold one session for all scales and
  for the prefill: lengths are symbolic, that of the rows too, and what differs comes in as inputs.
  `FusedScaleStage` is the same for GPUs, with the other form of attention and always all rows.

Tracing takes seconds, and there are up to 13 scales. So three templates are traced, not 26 graphs:
the first scale has no tokens, the last hands nothing on, and all others are alike but for lengths,
matrices and rows of weights. `ScaleStage` is such a template, with symbolic lengths; a `Binding`
says what fills it in. Scale 5 of 10, for instance, is the template `middle_scale` with h = w = 12,
next_h = next_w = 16, the resizing matrices of these grids as constants, row 5 of the level
embedding, and the rows of the rotary table from `geometry.scale_sizes(grids, 5)["past"]` on.

Shape suffixes are those of `stages.py`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import sqrt
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from varedit_export.graphs.attention import OPERATOR_OPSET
from varedit_export.graphs.model import GraphTransformer, Past, layer_norm
from varedit_export.graphs.stages import (
    ROWS,
    TEXT_TOKENS,
    InputSpec,
    PositionTable,
    Shapes,
    Stage,
    has_references,
    pictures_of_rows,
    repeat_rows,
    text_input_specs,
    text_of,
    to_token_grid,
    where_bool,
)
from varedit_reference.sampling import NUCLEUS
from varedit_runtime.backends.wiring import FUSED, PICTURES, SYMBOLIC
from varedit_runtime.geometry import LENGTHS, Sizes, resizing_matrices, scale_sizes

Kind = Literal["first", "middle", "last"]
_SYMBOLS = {name: name for name in LENGTHS}


@dataclass(frozen=True)
class Geometry:
    """What differs between scales besides shapes.

    level [C], or [L, C] where a source has several; cos, sin [L, 1, D/2]; up: from the scale's grid
    to the finest, down: from the finest to the next scale's, rows and columns apart, [out, in]. The
    last scale needs neither.
    """

    level: Tensor
    cos: Tensor
    sin: Tensor
    up: tuple[Tensor, Tensor] | None
    down: tuple[Tensor, Tensor] | None


class ScaleStage(Stage):
    """One scale: its keys and values, guided logits, bits, the running sum, the next tokens.

    A template of the first scale, of the last, or of any between. What one scale does not share
    with all of its kind comes in as inputs, or as symbolic lengths; a `Binding` fills it in.
    """

    def __init__(self, shapes: Shapes, model: GraphTransformer, kind: Kind) -> None:
        super().__init__()
        self.name = f"{kind}_scale"
        self.shapes, self.model = shapes, model
        self.kind: Kind = kind
        index = 0 if kind == "first" else len(shapes.config.transformer.grids) - 1
        known = {} if kind == "middle" else _sizes(shapes, index)
        self.sizes: dict[str, int | str] = {name: known.get(name, name) for name in LENGTHS}

    def inputs(self) -> dict[str, InputSpec]:
        transformer = self.shapes.config.transformer
        grid = self.sizes["h"], self.sizes["w"]
        inputs = {"start": _start(self.shapes)}
        if self.kind != "first":
            inputs = {"tokens": _tokens(self.shapes, *grid), "running_sum": self.shapes.map()}
            inputs |= pictures_of_rows(self.shapes)
        angles = InputSpec(torch.float32, (*grid, transformer.head_width // 2))
        inputs |= {
            "level": InputSpec(torch.float32, (transformer.width,)),
            "cos": angles,
            "sin": angles,
        }
        if self.kind != "last":
            inputs |= _resampling_inputs(self.shapes, self.sizes)
        lengths = (self.sizes[name] for name in ("reference", "past_0", "past"))
        return {
            **inputs,
            **_sampling_inputs(self.shapes, *grid),
            **text_input_specs(self.shapes, head=True),
            **_past_inputs(self.shapes, *lengths),
        }

    def compute(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        up, down = (None, None) if self.kind == "last" else _resampling(given)
        cos, sin = (given[name].flatten(0, 1)[:, None] for name in ("cos", "sin"))
        geometry = Geometry(given["level"], cos, sin, up, down)
        tokens, total = given.get("tokens"), given.get("running_sum")
        x_RLC = given["start"] if tokens is None else _embed(self.model, tokens, given)
        return _predict(self.shapes, self.model, x_RLC, geometry, total, given)


class WeightRows(NamedTuple):
    """Rows of a weight, which the parameter names: as many as an input holds, from `first` on."""

    weight: str
    first: int


@dataclass(frozen=True)
class Binding:
    """What makes a template, a stage with symbolic lengths, a static graph.

    sizes: its symbolic lengths; constants: inputs that become constants; parts: inputs that become
    rows of weights: the level's embedding and the rotary tables' rows.
    """

    name: str
    sizes: dict[str, int]
    constants: dict[str, np.ndarray]
    parts: dict[str, WeightRows] = field(default_factory=dict)


def row_binding(shapes: Shapes, name: str, rows: int) -> Binding:
    """Return what makes a template a graph for a number of rows."""
    sizes = {ROWS: rows, TEXT_TOKENS: shapes.text_tokens}
    return Binding(name, sizes, {PICTURES: np.arange(rows) % shapes.batch})


def kind_of(shapes: Shapes, index: int) -> Kind:
    """Return which template a scale is made from."""
    last = len(shapes.config.transformer.grids) - 1
    return "first" if index == 0 else "last" if index == last else "middle"


def scale_binding(shapes: Shapes, index: int, name: str, rows: int) -> Binding:
    """Return what makes a template one scale of the variant, for a number of rows."""
    grids, patch = shapes.config.transformer.grids, shapes.config.tokenizer.patch
    last, sizes, own = len(grids) - 1, _sizes(shapes, index), row_binding(shapes, name, rows)
    return Binding(
        name,
        sizes | own.sizes,
        own.constants | ({} if index == last else resizing_matrices(grids, index, patch)),
        {
            "level": WeightRows("model.level_embedding", index),
            "cos": WeightRows("table.cos", sizes["past"]),
            "sin": WeightRows("table.sin", sizes["past"]),
        },
    )


def _sizes(shapes: Shapes, index: int) -> Sizes:
    transformer = shapes.config.transformer
    return scale_sizes(transformer.grids, index, transformer.conditioning)


class SymbolicScaleStage(Stage):
    """The twin of all scales with symbolic lengths: what differs between scales is an input.

    It is the prefill as well: source tokens in, with no reference and no past. Nothing of the
    prefill is read but keys and values, so that behind the last block's only as many tokens are
    computed as there is noise for: all of a scale's, and one of the prefill's, because not every
    runtime takes empty tensors.
    """

    name = SYMBOLIC

    def __init__(self, shapes: Shapes, model: GraphTransformer, table: PositionTable) -> None:
        super().__init__()
        self.shapes, self.model, self.table = shapes, model, table
        self.level_of_each = shapes.config.transformer.conditioning == "full"

    def inputs(self) -> dict[str, InputSpec]:
        return {
            "tokens": _tokens(self.shapes, "h", "w"),
            "running_sum": self.shapes.map(),
            **pictures_of_rows(self.shapes),
            "start": _start(self.shapes),
            "is_first": InputSpec(torch.bool, (1,)),
            "level": InputSpec(torch.int64, ("h", "w") if self.level_of_each else (1,)),
            "first_position": InputSpec(torch.int64, (1,)),
            **_resampling_inputs(self.shapes, {**_SYMBOLS, "h": "kept_h", "w": "kept_w"}),
            **_sampling_inputs(self.shapes, "kept_h", "kept_w"),
            **text_input_specs(self.shapes, head=True),
            **_past_inputs(self.shapes, "reference", "past_0", "past"),
        }

    def compute(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        model = self.model
        x_RLC = _embed(model, given["tokens"], given)
        cos, sin = self.table.at(given["first_position"], x_RLC)
        level = model.level_embedding[given["level"].flatten()]
        geometry = Geometry(level, cos, sin, *_resampling(given))
        x_RLC = torch.where(given["is_first"], given["start"], x_RLC)
        kept = given["noise"][0, :, :, 0].numel()
        return _predict(self.shapes, model, x_RLC, geometry, given["running_sum"], given, kept)


class FusedScaleStage(SymbolicScaleStage):
    """The twin for ONNX Runtime's CUDA provider: its model's attention is one operator.

    It always computes all rows: the operator's number of heads, which rows are merged with, is no
    length but an attribute.
    """

    name = FUSED
    opset = OPERATOR_OPSET

    def __init__(self, shapes: Shapes, model: GraphTransformer, table: PositionTable) -> None:
        super().__init__(replace(shapes, fixed=True), model, table)


def _predict(
    shapes: Shapes,
    model: GraphTransformer,
    x_RLC: Tensor,
    geometry: Geometry,
    running_sum: Tensor | None,
    given: dict[str, Tensor],
    kept: int | None = None,
) -> dict[str, Tensor]:
    """Compute a scale's outputs from its embedded tokens: blocks, head, bits, sum, next tokens.

    kept: how many tokens all but keys and values is computed for; None for all.
    """
    depth = model.config.depth
    text, past = text_of(given, depth), [_past(given, i) for i in range(depth)]
    x_RLC = x_RLC + geometry.level
    x_RLC, keys, values = model.run(x_RLC, text, geometry.cos, geometry.sin, past, kept)
    grid = given["noise"].shape[1], given["noise"].shape[2]
    logits_Bhwc2 = _guided_logits(shapes, model, x_RLC, given).unflatten(1, grid)
    bits_Bhwc = _draw(logits_Bhwc2, given)
    tokenizer = shapes.config.tokenizer
    codes = (2 * bits_Bhwc.float() - 1) / sqrt(tokenizer.bits)
    added = _to_map(codes, tokenizer.bits, tokenizer.patch)
    added = added if geometry.up is None else _resample(added, geometry.up)
    total = added if running_sum is None else running_sum + added
    outputs = {"logits": logits_Bhwc2, "bits": bits_Bhwc, "running_sum_out": total}
    if geometry.down is not None:
        outputs["next_tokens"] = to_token_grid(_resample(total, geometry.down), tokenizer.patch)
    for i in range(depth):
        outputs |= {f"new_key.{i}": keys[i], f"new_value.{i}": values[i]}
    return outputs


def _guided_logits(
    shapes: Shapes, model: GraphTransformer, x_RLC: Tensor, given: dict[str, Tensor]
) -> Tensor:
    """Return logits [B, L, c, 2], divided by the temperature, then guided.

    Without unconditional rows the last rows are the conditional ones: a guidance of 1, the only one
    there is without them, then gives exactly these.
    """
    scale, shift = (given["head_modulation"][:, i, None] for i in range(2))
    logits = model.head(layer_norm(x_RLC) * scale + shift).unflatten(-1, (-1, 2))
    temperature, halves = _per_picture(given["temperature"]), _halves(shapes, logits, given)
    conditional = next(halves) / temperature
    if not shapes.guided:
        return conditional
    unconditional = next(halves) / temperature
    guidance_scale = _per_picture(given["guidance_scale"])
    return guidance_scale * conditional + (1 - guidance_scale) * unconditional


def _halves(shapes: Shapes, logits: Tensor, given: dict[str, Tensor]) -> Iterator[Tensor]:
    """Yield the conditional rows of logits, then as many of the last ones.

    A slice of a symbolic length would make torch demand that there are at least as many rows.
    """
    if shapes.any_batch and shapes.guided:
        rows, batch = logits.shape[0], given["noise"].shape[0]
        yield logits.index_select(0, torch.arange(batch))
        yield logits.index_select(0, torch.arange(rows - batch, rows))
    elif shapes.any_batch:
        yield logits
    else:
        yield logits[: shapes.batch]
        yield logits[-shapes.batch :]


def _per_picture(numbers_B: Tensor) -> Tensor:
    """Return numbers of pictures in the shape that multiplies logits [B, L, c, 2]."""
    return numbers_B[:, None, None, None]


def _draw(logits_Bhwc2: Tensor, given: dict[str, Tensor]) -> Tensor:
    """Return bits [B, h, w, c]: forced where the mask is set, elsewhere drawn in the nucleus."""
    probability = logits_Bhwc2.softmax(-1)[..., 1]
    less_likely = torch.minimum(probability, 1 - probability)
    likely = (probability > 0.5).float()
    probability = torch.where(less_likely > 1 - NUCLEUS, probability, likely)
    drawn = given["noise"] < probability
    return where_bool(given["forced_mask"], given["forced_bits"], drawn)


def _embed(model: GraphTransformer, tokens_Bhwc: Tensor, given: dict[str, Tensor]) -> Tensor:
    return repeat_rows(model.token_embedding(tokens_Bhwc.flatten(1, 2)).float(), given)


def _resample(map_BdNN: Tensor, matrices: tuple[Tensor, Tensor]) -> Tensor:
    rows, columns = matrices
    return rows @ map_BdNN @ columns.transpose(0, 1)


def _to_map(tokens_Bhwc: Tensor, bits: int, patch: int) -> Tensor:
    """Turn tokens into a map [B, d, h·p, w·p], as pixel_shuffle does."""
    patches = tokens_Bhwc.unflatten(3, (bits, patch, patch)).permute(0, 3, 1, 4, 2, 5)
    return patches.flatten(4, 5).flatten(2, 3)


def _resampling_inputs(shapes: Shapes, sizes: Mapping[str, int | str]) -> dict[str, InputSpec]:
    """Return the resizing matrices as inputs; positions are split by token and place in it."""
    patch, (rows, columns) = shapes.config.tokenizer.patch, shapes.positions
    return {
        "up_rows": InputSpec(torch.float32, (rows, sizes["h"], patch)),
        "up_columns": InputSpec(torch.float32, (columns, sizes["w"], patch)),
        "down_rows": InputSpec(torch.float32, (sizes["next_h"], patch, rows)),
        "down_columns": InputSpec(torch.float32, (sizes["next_w"], patch, columns)),
    }


def _resampling(given: dict[str, Tensor]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the matrices [out, in] up and down, for rows and columns each."""
    up = given["up_rows"].flatten(1), given["up_columns"].flatten(1)
    return up, (given["down_rows"].flatten(0, 1), given["down_columns"].flatten(0, 1))


def _start(shapes: Shapes) -> InputSpec:
    return InputSpec(torch.float32, (shapes.rows, 1, shapes.config.transformer.width))


def _tokens(shapes: Shapes, rows: int | str, columns: int | str) -> InputSpec:
    channels = shapes.config.transformer.token_channels
    return InputSpec(torch.float32, (shapes.pictures, rows, columns, channels))


def _sampling_inputs(shapes: Shapes, rows: int | str, columns: int | str) -> dict[str, InputSpec]:
    noise, numbers = _tokens(shapes, rows, columns), InputSpec(torch.float32, (shapes.pictures,))
    inputs = {"temperature": numbers, "noise": noise}
    inputs |= {name: InputSpec(torch.bool, noise.shape) for name in ("forced_bits", "forced_mask")}
    return {"guidance_scale": numbers, **inputs} if shapes.guided else inputs


def _past_inputs(
    shapes: Shapes, reference: int | str, past_0: int | str, past: int | str
) -> dict[str, InputSpec]:
    """Return the keys and values before a scale: source and targets, or reference and targets."""
    inputs = {}
    first = 0
    if has_references(shapes):
        inputs |= {f"reference_{kind}": shapes.kv(reference) for kind in ("key", "value")}
        if past_0:
            inputs |= {f"past_{kind}.0": shapes.kv(past_0) for kind in ("key", "value")}
        first = 1
    for i in range(first, shapes.config.transformer.depth):
        inputs |= {f"past_{kind}.{i}": shapes.kv(past) for kind in ("key", "value")}
    return inputs


def _past(given: dict[str, Tensor], block: int) -> Past:
    def parts(kind: str) -> Iterator[Tensor]:
        if block == 0 and f"reference_{kind}" in given:
            yield given[f"reference_{kind}"]
        if f"past_{kind}.{block}" in given:
            yield given[f"past_{kind}.{block}"]

    return Past(list(parts("key")), list(parts("value")))
