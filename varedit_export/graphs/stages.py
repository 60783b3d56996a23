"""The graphs of a bundle: one stage each, named tensors in, named tensors out.

    text_encoder -> condition ---------------------------.
    image_encoder -> prefill (or scale + references) -> scale_00 .. scale_NN -> image_decoder

A stage is a PyTorch module that knows its inputs by name, type and shape (`Stage.inputs`) and
computes named outputs from them (`Stage.compute`); `trace.py` makes an ONNX graph of it. Here are
the stages that run once for each edit; `scales.py` has those that predict the scales. The modules
`model.py` and `text.py` do the arithmetic: a stage only says what goes in and what comes out.

Shape suffixes: B pictures, R rows (2·B with guidance, the conditional rows first; B where an edit
needs no guidance any more), T text tokens,
S source tokens, h·w = L tokens of a scale, C width, H heads, D = C/H, c bits of a token, d bits of
a tokenizer position, p positions along a token's side, N positions along a picture's side.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varedit_export.graphs.model import (
    GraphTransformer,
    Past,
    TextInputs,
    first_tokens,
    parameter,
)
from varedit_export.graphs.text import GraphTextEncoder
from varedit_reference.config import Grid, ModelConfig, TransformerConfig
from varedit_reference.kv_cache import source_length, target_length
from varedit_reference.quantisation import positions
from varedit_reference.tokenizer import Tokenizer
from varedit_reference.weights_file import torch_dtype
from varedit_runtime.backends.wiring import PICTURES
from varedit_runtime.geometry import area_matrix, source_grid, source_levels
from varedit_runtime.manifest import UNGUIDED
from varedit_runtime.precision import Precision

# The names of the symbolic numbers of rows, of text tokens and of pictures.
ROWS, TEXT_TOKENS, BATCH = "rows", "text_tokens", "batch"


@dataclass(frozen=True)
class InputSpec:
    """A graph input: its type, and its shape with names for symbolic dimensions."""

    dtype: torch.dtype
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Shapes:
    """What a variant's graphs are shaped by.

    rows: of the transformer, a symbolic length in a variant with guidance: twice the batch or,
    where no picture needs guidance, the batch. text_tokens: the most that an instruction has; their
    number is symbolic as well. any_batch: so is the number of pictures, of which batch is the most;
    static graphs are made without it. fixed: nothing is symbolic, and all are the largest. dtype:
    of keys and values.
    """

    config: ModelConfig
    batch: int
    guided: bool
    text_tokens: int
    precision: Precision
    fixed: bool = False
    any_batch: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return torch_dtype(self.precision.type)

    @property
    def pictures(self) -> int | str:
        """Return how many pictures there are, which may be a symbolic length."""
        return BATCH if self.any_batch else self.batch

    @property
    def rows(self) -> int | str:
        if self.fixed:
            return max(self.forms.values())
        return ROWS if self.guided else self.pictures

    @property
    def tokens(self) -> int | str:
        return self.text_tokens if self.fixed else TEXT_TOKENS

    @property
    def forms(self) -> dict[str, int]:
        """Return the rows of each form of a static graph, by what is appended to its name."""
        return {"": 2 * self.batch, UNGUIDED: self.batch} if self.guided else {"": self.batch}

    @property
    def positions(self) -> Grid:
        """Return the finest grid in positions of the tokenizer."""
        return positions(self.config.transformer.finest, self.config.tokenizer.patch)

    def kv(self, length: int | str) -> InputSpec:
        transformer = self.config.transformer
        shape = (length, self.rows, transformer.heads, transformer.head_width)
        return InputSpec(self.dtype, shape)

    def map(self) -> InputSpec:
        return InputSpec(
            torch.float32, (self.pictures, self.config.tokenizer.bits, *self.positions)
        )


class Stage(nn.Module, ABC):
    """A graph. Subclasses compute named outputs from named inputs. opset: of ONNX's operators."""

    name: str
    shapes: Shapes
    opset: int = 20

    @abstractmethod
    def inputs(self) -> dict[str, InputSpec]:
        """Return the graph's inputs, in order."""

    @abstractmethod
    def compute(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the graph's outputs, in order."""

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        results = self.compute(dict(zip(self.inputs(), tensors, strict=True)))
        self.output_names = tuple(results)
        return tuple(results.values())


class TextEncoderStage(Stage):
    """Token ids of the instructions -> their features."""

    name = "text_encoder"

    def __init__(self, shapes: Shapes, text_encoder: GraphTextEncoder) -> None:
        super().__init__()
        self.shapes, self.text_encoder = shapes, text_encoder

    def inputs(self) -> dict[str, InputSpec]:
        shape = (self.shapes.pictures, self.shapes.tokens)
        return {
            "token_ids": InputSpec(torch.int64, shape),
            "text_mask": InputSpec(torch.bool, shape),
        }

    def compute(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        ids, mask, most = given["token_ids"], given["text_mask"], self.shapes.text_tokens
        return {"text_features": self.text_encoder(ids, mask, most)}


class ImageEncoderStage(Stage):
    """Pictures -> the source's tokens: the tokenizer's continuous features."""

    name = "image_encoder"

    def __init__(self, shapes: Shapes, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.shapes, self.encoder = shapes, tokenizer.encoder
        self.pools = _pools(shapes, shapes.config.tokenizer.patch)

    def inputs(self) -> dict[str, InputSpec]:
        size = self.shapes.config.picture_size
        return {"pictures": InputSpec(torch.float32, (self.shapes.pictures, 3, *size))}

    def compute(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        features, patch = self.encoder(given["pictures"]), self.shapes.config.tokenizer.patch
        if self.shapes.config.transformer.conditioning != "full":
            return {"source_tokens": to_token_grid(features, patch)}
        scales = [
            to_token_grid(rows @ features @ columns.T, patch).flatten(1, 2)
            for rows, columns in self.pools
        ]
        return {"source_tokens": torch.cat(scales, dim=1)[:, None]}


class ImageDecoderStage(Stage):
    """The sum of codes -> pictures, not yet clamped."""

    name = "image_decoder"

    def __init__(self, shapes: Shapes, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.shapes, self.decoder = shapes, tokenizer.decoder

    def inputs(self) -> dict[str, InputSpec]:
        return {"running_sum": self.shapes.map()}

    def compute(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"pictures": self.decoder(given["running_sum"])}


class ConditionStage(Stage):
    """Text features -> all that the transformer needs of the text.

    Rows are independent of each other. A row without guidance is an instruction; with guidance,
    unconditional rows follow, which are negative prompts or, where `learned` is set, the text of no
    instruction that the model learned.
    """

    name = "condition"

    def __init__(self, shapes: Shapes, model: GraphTransformer) -> None:
        super().__init__()
        self.shapes, self.model = shapes, model

    def inputs(self) -> dict[str, InputSpec]:
        rows, tokens = self.shapes.rows, self.shapes.tokens
        channels = self.shapes.config.transformer.text_channels
        inputs = {
            "text_features": InputSpec(torch.float32, (rows, tokens, channels)),
            "text_mask": InputSpec(torch.bool, (rows, tokens)),
        }
        if self.shapes.guided:
            inputs["learned"] = InputSpec(torch.bool, (rows,))
        return inputs

    def compute(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        model = self.model
        features, mask = given["text_features"], given["text_mask"]
        if self.shapes.guided:
            learned = first_tokens(model.unconditional_text[None], features.shape[1])
            features = torch.where(given["learned"][:, None, None], learned, features)
        bias_RT = torch.where(mask, 0.0, -torch.inf)
        text_RTC = F.rms_norm(features, features.shape[-1:], model.text_norm, 1e-6)
        pooled_RC = model.text_pool(text_RTC, bias_RT[:, None])
        signal_RC = F.silu(pooled_RC)
        hidden = F.gelu(model.text_memory["0"](text_RTC), approximate="tanh")
        memory_RTC = model.text_memory["2"](hidden)
        outputs = {
            "start": (pooled_RC + model.start_token)[:, None],
            "modulation": model.shared_modulation(signal_RC).unflatten(1, (6, -1)),
            "head_modulation": model.head_modulation(signal_RC).unflatten(1, (2, -1)),
            "text_bias": bias_RT[:, None, None],
        }
        memory = model.memory_rounding(memory_RTC)
        for i, block in enumerate(model.blocks):
            keys, values = block.cross_kv(memory)
            outputs |= {f"cross_key.{i}": keys, f"cross_value.{i}": values}
        return outputs


class PositionTable(nn.Module):
    """Rotary cos and sin of [source | scale 1 .. scale K], [S, D/2]: weights of a grid's own."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        tokens = source_length(config) + target_length(config)
        self.cos = parameter(tokens, config.head_width // 2)
        self.sin = parameter(tokens, config.head_width // 2)

    def source(self) -> tuple[Tensor, Tensor]:
        """Return cos and sin [S, 1, D/2] of the source's tokens."""
        tokens = source_length(self.config)
        return self.cos[:tokens, None], self.sin[:tokens, None]

    def at(self, first: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin [L, 1, D/2] of L tokens [R, L, C], from a position [1] on."""
        places = first + torch.arange(tokens.shape[1])
        return self.cos[places][:, None], self.sin[places][:, None]


class PrefillStage(Stage):
    """Source tokens -> every block's keys and values; under SAR block 0's, scale by scale."""

    name = "prefill"

    def __init__(self, shapes: Shapes, model: GraphTransformer, table: PositionTable) -> None:
        super().__init__()
        self.shapes, self.model = shapes, model
        self.table = table
        self.references = ReferencesStage(shapes) if has_references(shapes) else None

    def inputs(self) -> dict[str, InputSpec]:
        transformer = self.shapes.config.transformer
        grid = source_grid(transformer.grids, transformer.conditioning)
        shape = (self.shapes.batch, *grid, transformer.token_channels)
        source = {"source_tokens": InputSpec(torch.float32, shape)}
        return source | pictures_of_rows(self.shapes) | text_input_specs(self.shapes)

    def compute(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        model = self.model
        depth = model.config.depth
        x_BLC = model.token_embedding(given["source_tokens"].flatten(1, 2)).float()
        grids = model.config.grids
        if model.config.conditioning == "full":
            x_BLC = x_BLC + model.level_embedding[torch.from_numpy(source_levels(grids))]
        else:
            x_BLC = x_BLC + model.level_embedding[len(grids) - 1]
        text = text_of(given, depth)
        x_RLC = repeat_rows(x_BLC, given)
        _, keys, values = model.run(x_RLC, text, *self.table.source(), [Past()] * depth)
        outputs = {}
        if self.references is not None:
            outputs = self.references.compute({"source_key": keys[0], "source_value": values[0]})
        first = 0 if self.references is None else 1
        for i in range(first, depth):
            outputs |= {f"source_key.{i}": keys[i], f"source_value.{i}": values[i]}
        return outputs


class ReferencesStage(Stage):
    """Block 0's source keys and values, area-downsampled to every scale (SAR)."""

    name = "references"

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.shapes = shapes
        self.finest = shapes.config.transformer.finest
        self.pools = _pools(shapes, 1)

    def inputs(self) -> dict[str, InputSpec]:
        source = self.shapes.kv(self.finest[0] * self.finest[1])
        return {"source_key": source, "source_value": source}

    def compute(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        outputs = {}
        for kind in ("key", "value"):
            source_SRHD = given[f"source_{kind}"]
            source = source_SRHD.float().flatten(1).unflatten(0, self.finest)
            for k, (rows, columns) in enumerate(self.pools):
                by_rows = (rows @ source.flatten(1)).unflatten(1, source.shape[1:])
                pooled = (columns @ by_rows).flatten(0, 1).unflatten(1, source_SRHD.shape[1:])
                outputs[f"reference_{kind}.{k}"] = pooled.to(source_SRHD.dtype)
        return outputs


def _pools(shapes: Shapes, patch: int) -> list[tuple[Tensor, Tensor]]:
    """Return the matrices that average the finest grid, rows and columns, to every scale's.

    patch: positions along a token's side.
    """
    grids = [positions(grid, patch) for grid in shapes.config.transformer.grids]
    axes = (zip(grid, grids[-1], strict=True) for grid in grids)
    return [
        (torch.from_numpy(area_matrix(*rows)), torch.from_numpy(area_matrix(*columns)))
        for rows, columns in axes
    ]


def where_bool(condition: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Choose between bools as torch.where does: ONNX Runtime has no Where for bools."""
    return (condition & one) | (~condition & other)


def pictures_of_rows(shapes: Shapes) -> dict[str, InputSpec]:
    """Return the input that says whose rows there are, with guidance: 0 .. B-1, once or twice."""
    return {PICTURES: InputSpec(torch.int64, (shapes.rows,))} if shapes.guided else {}


def repeat_rows(x_BLC: Tensor, given: dict[str, Tensor]) -> Tensor:
    """Return what all rows start from: with guidance the same for both of a picture's rows."""
    return x_BLC.index_select(0, given[PICTURES]) if PICTURES in given else x_BLC


def to_token_grid(map_BdNN: Tensor, patch: int) -> Tensor:
    """Turn a map [B, d, h·p, w·p] into tokens [B, h, w, c], as pixel_unshuffle does."""
    patches = map_BdNN.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3)


def has_references(shapes: Shapes) -> bool:
    """Return whether block 0 sees the source averaged to each scale's grid (SAR)."""
    return shapes.config.transformer.conditioning == "sar"


def text_input_specs(shapes: Shapes, head: bool = False) -> dict[str, InputSpec]:
    """Return the inputs that the condition makes of the text. head: the head's signal too."""
    transformer, rows, tokens = shapes.config.transformer, shapes.rows, shapes.tokens
    width, heads, head_width = transformer.width, transformer.heads, transformer.head_width
    inputs = {"modulation": InputSpec(torch.float32, (rows, 6, width))}
    if head:
        inputs["head_modulation"] = InputSpec(torch.float32, (rows, 2, width))
    inputs["text_bias"] = InputSpec(torch.float32, (rows, 1, 1, tokens))
    for i in range(transformer.depth):
        inputs[f"cross_key.{i}"] = InputSpec(shapes.dtype, (rows, heads, head_width, tokens))
        inputs[f"cross_value.{i}"] = InputSpec(shapes.dtype, (rows, heads, tokens, head_width))
    return inputs


def text_of(given: dict[str, Tensor], depth: int) -> TextInputs:
    """Return what the transformer reads of the text, from `text_input_specs`."""
    return TextInputs(
        given["modulation"],
        given["text_bias"],
        [given[f"cross_key.{i}"] for i in range(depth)],
        [given[f"cross_value.{i}"] for i in range(depth)],
    )
