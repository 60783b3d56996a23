"""The graphs of a bundle: one stage each, named tensors in, named tensors out.

    text_encoder -> condition ---------------------------.
    image_encoder -> prefill (or scale + references) -> scale_00 .. scale_NN -> image_decoder

`scale` is the symbolic-length twin of all scales, and of the prefill: its geometry comes in as
inputs. A scale draws its bits, and hands on the running sum and the next tokens, so that nothing
between scales needs the host.

Shape suffixes: B pictures, R rows, T text tokens, h·w = L tokens of a scale, c bits of a token, d
bits of a tokenizer position, p positions along a token's side, N positions along a picture's side.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varedit_export.graphs.model import GraphTransformer, Past, TextInputs, layer_norm, parameter
from varedit_export.graphs.text import GraphTextEncoder
from varedit_reference.config import Grid, ModelConfig, TransformerConfig
from varedit_reference.kv_cache import source_length, target_length
from varedit_reference.quantisation import positions
from varedit_reference.sampling import NUCLEUS
from varedit_reference.tokenizer import Tokenizer
from varedit_runtime.geometry import bilinear_matrix
from varedit_runtime.manifest import scale_name

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LENGTHS = ("h", "w", "next_h", "next_w", "reference", "past_0", "past")  # symbolic dimensions
Kind = Literal["first", "middle", "last"]


@dataclass(frozen=True)
class Spec:
    """A graph input: its type, and its shape with names for symbolic dimensions."""

    dtype: torch.dtype
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Shapes:
    """What a variant's graphs are shaped by.

    rows: of the transformer, twice the batch with guidance. dtype: of products and caches.
    """

    config: ModelConfig
    batch: int
    guided: bool
    text_tokens: int
    dtype: torch.dtype

    @property
    def rows(self) -> int:
        return self.batch * (2 if self.guided else 1)

    @property
    def positions(self) -> Grid:
        """The tokenizer's finest grid."""
        return positions(self.config.transformer.finest, self.config.tokenizer.patch)

    def kv(self, length: int | str) -> Spec:
        transformer = self.config.transformer
        shape = (length, self.rows, transformer.heads, transformer.head_width)
        return Spec(self.dtype, shape)

    def map(self) -> Spec:
        return Spec(torch.float32, (self.batch, self.config.tokenizer.bits, *self.positions))


class Stage(nn.Module, ABC):
    """A graph. Subclasses compute named outputs from named inputs."""

    name: str
    shapes: Shapes

    @abstractmethod
    def inputs(self) -> dict[str, Spec]:
        """The graph's inputs, in order."""

    @abstractmethod
    def compute(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """The graph's outputs, in order."""

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

    def inputs(self) -> dict[str, Spec]:
        shape = (self.shapes.batch, self.shapes.text_tokens)
        return {"token_ids": Spec(torch.int64, shape), "text_mask": Spec(torch.bool, shape)}

    def compute(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"text_features": self.text_encoder(given["token_ids"], given["text_mask"])}


class ImageEncoderStage(Stage):
    """Pictures -> the source's tokens: the tokenizer's continuous features."""

    name = "image_encoder"

    def __init__(self, shapes: Shapes, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.shapes, self.encoder = shapes, tokenizer.encoder

    def inputs(self) -> dict[str, Spec]:
        size = self.shapes.config.picture_size
        return {"pictures": Spec(torch.float32, (self.shapes.batch, 3, *size))}

    def compute(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        features = self.encoder(given["pictures"])
        return {"source_tokens": _to_tokens(features, self.shapes.config.tokenizer.patch)}


class ImageDecoderStage(Stage):
    """The sum of codes -> pictures, not yet clamped."""

    name = "image_decoder"

    def __init__(self, shapes: Shapes, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.shapes, self.decoder = shapes, tokenizer.decoder

    def inputs(self) -> dict[str, Spec]:
        return {"running_sum": self.shapes.map()}

    def compute(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"pictures": self.decoder(given["running_sum"])}


class ConditionStage(Stage):
    """Text features -> all that the transformer needs of the text.

    The unconditional row is the negative prompt where there is one, else the learned rows.
    """

    name = "condition"

    def __init__(self, shapes: Shapes, model: GraphTransformer) -> None:
        super().__init__()
        self.shapes, self.model = shapes, model

    def inputs(self) -> dict[str, Spec]:
        batch, tokens = self.shapes.batch, self.shapes.text_tokens
        channels = self.shapes.config.transformer.text_channels
        features = Spec(torch.float32, (batch, tokens, channels))
        mask = Spec(torch.bool, (batch, tokens))
        inputs = {"text_features": features, "text_mask": mask}
        if self.shapes.guided:
            inputs |= {"negative_features": features, "negative_mask": mask}
            inputs["has_negative"] = Spec(torch.bool, (batch,))
        return inputs

    def compute(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        model = self.model
        features, mask = given["text_features"], given["text_mask"]
        if self.shapes.guided:
            learned = model.unconditional_text[: self.shapes.text_tokens]
            has_negative = given["has_negative"][:, None]
            negative = torch.where(has_negative[..., None], given["negative_features"], learned)
            features = torch.cat((features, negative))
            mask = torch.cat((mask, _choose(has_negative, given["negative_mask"], mask)))
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
        for i, block in enumerate(model.blocks):
            keys, values = block.cross_kv(memory_RTC)
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
        """cos and sin [S, 1, D/2] of the source's tokens."""
        tokens = source_length(self.config)
        return self.cos[:tokens, None], self.sin[:tokens, None]

    def at(self, first: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Of as many tokens as there are, from the given place [1] on."""
        places = first + torch.arange(tokens.shape[1])
        return self.cos[places][:, None], self.sin[places][:, None]


class PrefillStage(Stage):
    """Source tokens -> every block's keys and values; under SAR block 0's, scale by scale."""

    name = "prefill"

    def __init__(self, shapes: Shapes, model: GraphTransformer, table: PositionTable) -> None:
        super().__init__()
        self.shapes, self.model = shapes, model
        self.table = table
        self.references = References(shapes) if _uses_references(shapes) else None

    def inputs(self) -> dict[str, Spec]:
        transformer = self.shapes.config.transformer
        shape = (self.shapes.batch, *transformer.finest, transformer.token_channels)
        return {"source_tokens": Spec(torch.float32, shape), **_text_inputs(self.shapes)}

    def compute(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        model = self.model
        depth = model.config.depth
        x_BLC = model.token_embedding(given["source_tokens"].flatten(1, 2)).float()
        x_BLC = x_BLC + model.level_embedding[len(model.config.grids) - 1]
        x_RLC = _repeat_rows(x_BLC, self.shapes)
        text = _text(given, depth)
        _, keys, values = model.run(x_RLC, text, *self.table.source(), [Past()] * depth)
        outputs = {}
        if self.references is not None:
            outputs = self.references.compute({"source_key": keys[0], "source_value": values[0]})
        first = 0 if self.references is None else 1
        for i in range(first, depth):
            outputs |= {f"source_key.{i}": keys[i], f"source_value.{i}": values[i]}
        return outputs


class References(Stage):
    """Block 0's source keys and values, area-downsampled to every scale (SAR)."""

    name = "references"

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.shapes = shapes
        self.finest = shapes.config.transformer.finest
        self.pools = [
            tuple(area_matrix(n, n_in) for n, n_in in zip(grid, self.finest, strict=True))
            for grid in shapes.config.transformer.grids
        ]

    def inputs(self) -> dict[str, Spec]:
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


@dataclass(frozen=True)
class Geometry:
    """What differs between scales besides shapes.

    level [C]; cos, sin [L, 1, D/2]; up: from the scale's grid to the finest, down: from the finest
    to the next scale's, rows and columns apart, [out, in]. The last scale needs neither.
    """

    level: Tensor
    cos: Tensor
    sin: Tensor
    up: tuple[Tensor, Tensor] | None
    down: tuple[Tensor, Tensor] | None


class ScaleStage(Stage):
    """One scale: its keys and values, guided logits, bits, the running sum, the next tokens.

    A template of the first scale, of the last, or of any between. What one scale does not share
    with all of its kind comes in as inputs, or as symbolic lengths; `Scale` fills it in.
    """

    def __init__(self, shapes: Shapes, model: GraphTransformer, kind: Kind) -> None:
        super().__init__()
        self.name = f"{kind}_scale"
        self.shapes, self.model = shapes, model
        self.kind: Kind = kind
        index = 0 if kind == "first" else len(shapes.config.transformer.grids) - 1
        known = {} if kind == "middle" else scale_sizes(shapes.config.transformer, index)
        self.sizes: dict[str, int | str] = {name: known.get(name, name) for name in LENGTHS}

    def inputs(self) -> dict[str, Spec]:
        transformer = self.shapes.config.transformer
        grid = self.sizes["h"], self.sizes["w"]
        inputs = {"start": _start(self.shapes)}
        if self.kind != "first":
            inputs = {"tokens": _tokens(self.shapes, *grid), "running_sum": self.shapes.map()}
        angles = Spec(torch.float32, (*grid, transformer.head_width // 2))
        inputs |= {"level": Spec(torch.float32, (transformer.width,)), "cos": angles, "sin": angles}
        if self.kind != "last":
            inputs |= _resampling_inputs(self.shapes, self.sizes)
        lengths = (self.sizes[name] for name in ("reference", "past_0", "past"))
        return {
            **inputs,
            **_sampling_inputs(self.shapes, *grid),
            **_text_inputs(self.shapes, head=True),
            **_past_inputs(self.shapes, *lengths),
        }

    def compute(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        up, down = (None, None) if self.kind == "last" else _resampling(given)
        cos, sin = (given[name].flatten(0, 1)[:, None] for name in ("cos", "sin"))
        geometry = Geometry(given["level"], cos, sin, up, down)
        tokens, total = given.get("tokens"), given.get("running_sum")
        x_RLC = given["start"] if tokens is None else _embed(self.shapes, self.model, tokens)
        grid = given["noise"].shape[1], given["noise"].shape[2]
        return _predict(self.shapes, self.model, x_RLC, geometry, grid, total, given)


class Rows(NamedTuple):
    """Rows of a weight, which the parameter names: as many as an input holds, from `first` on."""

    weight: str
    first: int


@dataclass(frozen=True)
class Scale:
    """What makes a template (`ScaleStage`) the static graph of one scale.

    sizes: its symbolic lengths; constants: inputs that become constants; parts: inputs that become
    rows of weights: the level's embedding and the rotary tables' rows.
    """

    name: str
    kind: Kind
    sizes: dict[str, int]
    constants: dict[str, Tensor]
    parts: dict[str, Rows]


def scale(shapes: Shapes, index: int) -> Scale:
    """A scale of the variant."""
    transformer = shapes.config.transformer
    last = len(transformer.grids) - 1
    sizes = scale_sizes(transformer, index)
    return Scale(
        scale_name(index),
        "first" if index == 0 else "last" if index == last else "middle",
        sizes,
        {} if index == last else scale_matrices(shapes, index),
        {
            "level": Rows("model.level_embedding", index),
            "cos": Rows("table.cos", sizes["past"]),
            "sin": Rows("table.sin", sizes["past"]),
        },
    )


class SymbolicScaleStage(Stage):
    """The twin of all scales with symbolic lengths: what differs between scales is an input.

    It is the prefill as well: source tokens in, with no reference and no past.
    """

    name = "scale"

    def __init__(self, shapes: Shapes, model: GraphTransformer, table: PositionTable) -> None:
        super().__init__()
        self.shapes, self.model, self.table = shapes, model, table

    def inputs(self) -> dict[str, Spec]:
        return {
            "tokens": _tokens(self.shapes, "h", "w"),
            "running_sum": self.shapes.map(),
            "start": _start(self.shapes),
            "is_first": Spec(torch.bool, (1,)),
            "level": Spec(torch.int64, (1,)),
            "first_position": Spec(torch.int64, (1,)),
            **_resampling_inputs(self.shapes, {name: name for name in LENGTHS}),
            **_sampling_inputs(self.shapes, "h", "w"),
            **_text_inputs(self.shapes, head=True),
            **_past_inputs(self.shapes, "reference", "past_0", "past"),
        }

    def compute(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        model = self.model
        x_RLC = _embed(self.shapes, model, given["tokens"])
        cos, sin = self.table.at(given["first_position"], x_RLC)
        level = model.level_embedding[given["level"]]
        geometry = Geometry(level, cos, sin, *_resampling(given))
        x_RLC = torch.where(given["is_first"], given["start"], x_RLC)
        grid = given["tokens"].shape[1], given["tokens"].shape[2]
        total = given["running_sum"]
        return _predict(self.shapes, model, x_RLC, geometry, grid, total, given)


def scale_sizes(config: TransformerConfig, index: int) -> dict[str, int]:
    """What the symbolic lengths are at a scale: its grid, the next one, and what came before."""
    grids = config.grids
    before = sum(config.lengths[:index])
    sizes = {
        "h": grids[index][0],
        "w": grids[index][1],
        "reference": config.lengths[index],
        "past_0": before,
        "past": source_length(config) + before,
    }
    if index + 1 < len(grids):
        sizes |= {"next_h": grids[index + 1][0], "next_w": grids[index + 1][1]}
    return sizes


def scale_matrices(shapes: Shapes, index: int) -> dict[str, Tensor]:
    """The resizing matrices of a scale: up to the finest grid, down to the next scale's."""
    grids, patch = shapes.config.transformer.grids, shapes.config.tokenizer.patch
    finest = shapes.positions
    own, following = (positions(grid, patch) for grid in grids[index : index + 2])
    return {
        "up_rows": _bilinear(finest[0], own[0]).unflatten(1, (-1, patch)),
        "up_columns": _bilinear(finest[1], own[1]).unflatten(1, (-1, patch)),
        "down_rows": _bilinear(following[0], finest[0]).unflatten(0, (-1, patch)),
        "down_columns": _bilinear(following[1], finest[1]).unflatten(0, (-1, patch)),
    }


def area_matrix(size: int, size_in: int) -> Tensor:
    """Adaptive average pooling along one axis as a matrix [size, size_in]."""
    cells, places = torch.arange(size)[:, None], torch.arange(size_in)
    start = cells * size_in // size
    end = -(-(cells + 1) * size_in // size)
    return ((places >= start) & (places < end)).float() / (end - start)


def _bilinear(size: int, size_in: int) -> Tensor:
    return torch.from_numpy(bilinear_matrix(size, size_in))


def _predict(
    shapes: Shapes,
    model: GraphTransformer,
    x_RLC: Tensor,
    geometry: Geometry,
    grid: tuple[int, int],
    running_sum: Tensor | None,
    given: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Everything inside a scale but the embedding of its tokens."""
    depth = model.config.depth
    text, past = _text(given, depth), [_past(given, i) for i in range(depth)]
    x_RLC = x_RLC + geometry.level
    x_RLC, keys, values = model.run(x_RLC, text, geometry.cos, geometry.sin, past)
    logits_Bhwc2 = _guided_logits(shapes, model, x_RLC, given).unflatten(1, grid)
    bits_Bhwc = _draw(logits_Bhwc2, given)
    tokenizer = shapes.config.tokenizer
    codes = (2 * bits_Bhwc.float() - 1) / sqrt(tokenizer.bits)
    added = _to_map(codes, tokenizer.bits, tokenizer.patch)
    added = added if geometry.up is None else _resample(added, geometry.up)
    total = added if running_sum is None else running_sum + added
    outputs = {"logits": logits_Bhwc2, "bits": bits_Bhwc, "running_sum_out": total}
    if geometry.down is not None:
        outputs["next_tokens"] = _to_tokens(_resample(total, geometry.down), tokenizer.patch)
    for i in range(depth):
        outputs |= {f"new_key.{i}": keys[i], f"new_value.{i}": values[i]}
    return outputs


def _guided_logits(
    shapes: Shapes, model: GraphTransformer, x_RLC: Tensor, given: dict[str, Tensor]
) -> Tensor:
    """[B, L, c, 2]: divided by the temperature, then guided."""
    scale, shift = (given["head_modulation"][:, i, None] for i in range(2))
    logits = model.head(layer_norm(x_RLC) * scale + shift).unflatten(-1, (-1, 2))
    logits = logits / given["temperature"]
    if not shapes.guided:
        return logits
    conditional, unconditional = logits[: shapes.batch], logits[shapes.batch :]
    guidance_scale = given["guidance_scale"]
    return guidance_scale * conditional + (1 - guidance_scale) * unconditional


def _draw(logits_Bhwc2: Tensor, given: dict[str, Tensor]) -> Tensor:
    """Bits [B, h, w, c]: forced where the mask is set, elsewhere drawn after the nucleus."""
    probability = logits_Bhwc2.softmax(-1)[..., 1]
    less_likely = torch.minimum(probability, 1 - probability)
    likely = (probability > 0.5).float()
    probability = torch.where(less_likely > 1 - NUCLEUS, probability, likely)
    drawn = given["noise"] < probability
    return _choose(given["forced_mask"], given["forced_bits"], drawn)


def _choose(condition: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """torch.where for bools, which ONNX Runtime does not have."""
    return (condition & one) | (~condition & other)


def _embed(shapes: Shapes, model: GraphTransformer, tokens_Bhwc: Tensor) -> Tensor:
    return _repeat_rows(model.token_embedding(tokens_Bhwc.flatten(1, 2)).float(), shapes)


def _repeat_rows(x_BLC: Tensor, shapes: Shapes) -> Tensor:
    return torch.cat((x_BLC, x_BLC)) if shapes.guided else x_BLC


def _resample(map_BdNN: Tensor, matrices: tuple[Tensor, Tensor]) -> Tensor:
    rows, columns = matrices
    return rows @ map_BdNN @ columns.transpose(0, 1)


def _to_map(tokens_Bhwc: Tensor, bits: int, patch: int) -> Tensor:
    """Tokens -> [B, d, h·p, w·p], as pixel_shuffle does."""
    patches = tokens_Bhwc.unflatten(3, (bits, patch, patch)).permute(0, 3, 1, 4, 2, 5)
    return patches.flatten(4, 5).flatten(2, 3)


def _to_tokens(map_BdNN: Tensor, patch: int) -> Tensor:
    """[B, d, h·p, w·p] -> tokens [B, h, w, c], as pixel_unshuffle does."""
    patches = map_BdNN.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3)


def _resampling_inputs(shapes: Shapes, sizes: Mapping[str, int | str]) -> dict[str, Spec]:
    """Resizing matrices of a scale that is not the last; positions by token and place in it."""
    patch, (rows, columns) = shapes.config.tokenizer.patch, shapes.positions
    return {
        "up_rows": Spec(torch.float32, (rows, sizes["h"], patch)),
        "up_columns": Spec(torch.float32, (columns, sizes["w"], patch)),
        "down_rows": Spec(torch.float32, (sizes["next_h"], patch, rows)),
        "down_columns": Spec(torch.float32, (sizes["next_w"], patch, columns)),
    }


def _resampling(given: dict[str, Tensor]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Up [out, in] and down [out, in], rows and columns each."""
    up = given["up_rows"].flatten(1), given["up_columns"].flatten(1)
    return up, (given["down_rows"].flatten(0, 1), given["down_columns"].flatten(0, 1))


def _uses_references(shapes: Shapes) -> bool:
    return shapes.config.transformer.conditioning == "sar"


def _start(shapes: Shapes) -> Spec:
    return Spec(torch.float32, (shapes.rows, 1, shapes.config.transformer.width))


def _tokens(shapes: Shapes, rows: int | str, columns: int | str) -> Spec:
    channels = shapes.config.transformer.token_channels
    return Spec(torch.float32, (shapes.batch, rows, columns, channels))


def _sampling_inputs(shapes: Shapes, rows: int | str, columns: int | str) -> dict[str, Spec]:
    noise, number = _tokens(shapes, rows, columns), Spec(torch.float32, (1,))
    inputs = {"temperature": number, "noise": noise}
    inputs |= {name: Spec(torch.bool, noise.shape) for name in ("forced_bits", "forced_mask")}
    return {"guidance_scale": number, **inputs} if shapes.guided else inputs


def _text_inputs(shapes: Shapes, head: bool = False) -> dict[str, Spec]:
    transformer, rows, tokens = shapes.config.transformer, shapes.rows, shapes.text_tokens
    width, heads, head_width = transformer.width, transformer.heads, transformer.head_width
    inputs = {"modulation": Spec(torch.float32, (rows, 6, width))}
    if head:
        inputs["head_modulation"] = Spec(torch.float32, (rows, 2, width))
    inputs["text_bias"] = Spec(torch.float32, (rows, 1, 1, tokens))
    for i in range(transformer.depth):
        inputs[f"cross_key.{i}"] = Spec(shapes.dtype, (rows, heads, head_width, tokens))
        inputs[f"cross_value.{i}"] = Spec(shapes.dtype, (rows, heads, tokens, head_width))
    return inputs


def _past_inputs(
    shapes: Shapes, reference: int | str, past_0: int | str, past: int | str
) -> dict[str, Spec]:
    """Block 0's reference and targets so far under SAR; elsewhere source and targets so far."""
    inputs = {}
    first = 0
    if _uses_references(shapes):
        inputs |= {f"reference_{kind}": shapes.kv(reference) for kind in ("key", "value")}
        if past_0:
            inputs |= {f"past_{kind}.0": shapes.kv(past_0) for kind in ("key", "value")}
        first = 1
    for i in range(first, shapes.config.transformer.depth):
        inputs |= {f"past_{kind}.{i}": shapes.kv(past) for kind in ("key", "value")}
    return inputs


def _text(given: dict[str, Tensor], depth: int) -> TextInputs:
    return TextInputs(
        given["modulation"],
        given["text_bias"],
        [given[f"cross_key.{i}"] for i in range(depth)],
        [given[f"cross_value.{i}"] for i in range(depth)],
    )


def _past(given: dict[str, Tensor], block: int) -> Past:
    def parts(kind: str) -> Iterator[Tensor]:
        if block == 0 and f"reference_{kind}" in given:
            yield given[f"reference_{kind}"]
        if f"past_{kind}.{block}" in given:
            yield given[f"past_{kind}.{block}"]

    return Past(list(parts("key")), list(parts("value")))
