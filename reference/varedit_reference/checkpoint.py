"""The released checkpoints: their names and shapes, and loading them.

The tables map each of this reference's parameters to its name and shape in a released file; a
layout is built from them. Files in this reference's own names (`convert.py`) load as well.

    blocks.5.self_attention.log_scale [H]
    block_chunks.1.module.1.sa.scale_mul_1H11 [1, H, 1, 1]    the same in a released 2b file

Models are built on the meta device, without memory, and given the file's tensors: loading copies
nothing that is stored in its final type. Names and shapes must match exactly, so that no weight
silently stays uninitialised or unread.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from varedit_reference.config import (
    MAX_TEXT_TOKENS,
    PRESETS,
    TokenizerConfig,
    TransformerConfig,
    preset,
)
from varedit_reference.tokenizer import Tokenizer
from varedit_reference.transformer import VAR
from varedit_reference.weights_file import Weights, check_finite, check_float, open_weights
from varedit_runtime.errors import CheckpointError

Shape = tuple[int, ...]
Module = TypeVar("Module", bound=nn.Module)


class NamedShape(NamedTuple):
    """A parameter's name and shape, in a file or in this reference."""

    name: str
    shape: Shape


# A layout: from a parameter of this reference to the same parameter as a file stores it.
FileLayout = Callable[[NamedShape], NamedShape]


# Released names of parameters, and of modules whose parameters keep their own names.
UNCONDITIONAL_TEXT = "unconditional_text"
TRANSFORMER_TABLE = {
    UNCONDITIONAL_TEXT: "cfg_uncond",
    "start_token": "pos_start",
    "level_embedding": "lvl_embed",
    "token_embedding": "word_embed",
    "text_norm": "text_norm",
    "text_pool.query": "text_proj_for_sos.ca.mat_q",  # sos: the start token is made from it
    "text_pool.kv": "text_proj_for_sos.ca.mat_kv",
    "text_pool.value_bias": "text_proj_for_sos.ca.v_bias",
    "text_pool.projection": "text_proj_for_sos.ca.proj",
    "text_memory.0": "text_proj_for_ca.0",
    "text_memory.2": "text_proj_for_ca.2",
    "shared_modulation": "shared_ada_lin.1",
    "head_modulation": "head_nm.ada_lin.1",
    "head": "head",
}
BLOCK_TABLE = {
    "modulation": "ada_gss",  # gammas, scales and shifts, two each
    "self_attention.qkv": "sa.mat_qkv",
    "self_attention.query_bias": "sa.q_bias",
    "self_attention.value_bias": "sa.v_bias",
    "self_attention.log_scale": "sa.scale_mul_1H11",
    "self_attention.projection": "sa.proj",
    "cross_norm": "ca_norm",
    "cross_attention.query": "ca.mat_q",
    "cross_attention.kv": "ca.mat_kv",
    "cross_attention.value_bias": "ca.v_bias",
    "cross_attention.projection": "ca.proj",
    "mlp.0": "ffn.fc1",
    "mlp.2": "ffn.fc2",
}
# Released shapes, where they are not this reference's. The elements' order is the same in both.
RELEASED_SHAPES: dict[str, Callable[[Shape], Shape]] = {
    "start_token": lambda shape: (1, 1, *shape),
    "text_pool.query": lambda shape: (1, *shape),
    "modulation": lambda shape: (1, 1, *shape),
    "self_attention.log_scale": lambda shape: (1, *shape, 1, 1),
}
# Substitutions in a tokenizer parameter's name, applied in this order.
TOKENIZER_TABLE = {
    r"^encoder\.levels": "encoder.down",
    r"^decoder\.levels": "decoder.up",
    r"\.blocks\.": ".block.",
    r"\.middle\.0\.": ".mid.block_1.",
    r"\.middle\.1\.": ".mid.block_2.",
    r"\.shortcut\.": ".nin_shortcut.",
    r"\.(down|up)sample\.": r".\1sample.conv.",
}

# What the released code stores besides parameters: beside the bias of values that of keys, which is
# zero, and buffers, which are not read.
VALUE_BIAS, ZERO_BIAS = ".v_bias", ".zero_k_bias"
BUFFERS = re.compile(
    r"(quantizer|quantize)\..*"
    r"|(.*\.)?(lvl_1L|attn_bias_for_masking|Infinity_visible_kvlen|Infinity_invisible_qlen)"
)
BUFFER_DIMENSIONS, BUFFER_ELEMENTS = 4, 2**30


def own_layout(own: NamedShape) -> NamedShape:
    """Keep this reference's own name and shape: the layout of converted files."""
    return own


def released_transformer(depth: int, chunks: int | None = 8) -> FileLayout:
    """Return the released transformer's layout, its blocks in this many chunks or one list (None).

    The released code groups blocks into chunks: block i is module i % n of chunk i // n, where n is
    depth // chunks.
    """

    def layout(own: NamedShape) -> NamedShape:
        table, prefix, part = TRANSFORMER_TABLE, "", own.name
        if own.name.startswith("blocks."):
            _, block, part = own.name.split(".", 2)
            chunk, place = divmod(int(block), max(depth // (chunks or 1), 1))
            chunked = f"block_chunks.{chunk}.module.{place}."
            table, prefix = BLOCK_TABLE, f"blocks.{block}." if chunks is None else chunked
        module, _, leaf = part.rpartition(".")
        name = table[part] if part in table else f"{table[module]}.{leaf}"
        reshape = RELEASED_SHAPES.get(part, lambda shape: shape)
        return NamedShape(prefix + name, reshape(own.shape))

    return layout


def released_tokenizer(inner_names: bool = True) -> FileLayout:
    """Return the released tokenizer's layout, whose layers may wrap an inner `.conv` or `.norm`."""

    def layout(own: NamedShape) -> NamedShape:
        name = own.name
        for pattern, released in TOKENIZER_TABLE.items():
            name = re.sub(pattern, released, name)
        if inner_names:
            layer, leaf = name.rsplit(".", 1)
            kind = "norm" if layer.rsplit(".", 1)[1].startswith("norm") else "conv"
            name = f"{layer}.{kind}.{leaf}"
        return NamedShape(name, own.shape)

    return layout


def load_transformer(
    path: str | Path,
    config: TransformerConfig,
    compute_dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
) -> VAR:
    """Load a checkpoint's transformer for inference, on the CPU.

    Matrix products run in compute_dtype; their weights are kept in weight_dtype, by default the
    same. Weights that the file stores in their final type stay views of the file's memory map.
    Raises CheckpointError if the file cannot be read or does not hold this transformer.
    """
    model = empty_transformer(config, compute_dtype, weight_dtype)
    return load(model, transformer_weights(path, config))


def load_tokenizer(path: str | Path, config: TokenizerConfig) -> Tokenizer:
    """Load a checkpoint's tokenizer for inference, in fp32 on the CPU.

    Raises CheckpointError if the file cannot be read or does not hold this tokenizer.
    """
    return load(empty_tokenizer(config), tokenizer_weights(path, config))


def transformer_weights(
    path: str | Path, config: TransformerConfig, prefer_ema: bool = False
) -> Weights:
    """Open a checkpoint's transformer by this reference's names, in the file's types; see `fit`.

    The learned unconditional text gets the model's rows: an instruction of T tokens takes its first
    T rows, so those past the longest instruction are never read, and missing ones are zero.
    prefer_ema: see `open_weights`.
    """
    weights = open_weights(path, prefer_ema)
    for name in (UNCONDITIONAL_TEXT, TRANSFORMER_TABLE[UNCONDITIONAL_TEXT]):
        rows, *width = weights[name].shape if name in weights else (0,)
        if width == [config.text_channels] and rows not in (0, MAX_TEXT_TOKENS):
            text = weights[name][:MAX_TEXT_TOKENS]
            missing = text.new_zeros(MAX_TEXT_TOKENS - len(text), *width)
            weights[name] = torch.cat([text, missing])
            done = "cut" if rows > MAX_TEXT_TOKENS else "padded with zeros"
            weights.notes += (f"{name} {done} from {rows} to {MAX_TEXT_TOKENS} rows",)
    layout = recognise_transformer_layout(weights, config)
    return fit(empty_transformer(config), weights, layout, path)


def tokenizer_weights(path: str | Path, config: TokenizerConfig) -> Weights:
    """Open a checkpoint's tokenizer by this reference's names, in the file's types; see `fit`."""
    weights = open_weights(path)
    return fit(empty_tokenizer(config), weights, recognise_tokenizer_layout(weights), path)


def empty_transformer(
    config: TransformerConfig,
    compute_dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
) -> VAR:
    """Build a transformer on the meta device: names, shapes and types, without memory."""
    with torch.device("meta"):
        return VAR(config, compute_dtype, weight_dtype)


def empty_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Build a tokenizer on the meta device: names and shapes, without memory."""
    with torch.device("meta"):
        return Tokenizer(config)


def recognise_transformer_layout(names: Collection[str], config: TransformerConfig) -> FileLayout:
    """Recognise a transformer file's layout by the names of its tensors."""
    if any(".self_attention." in name for name in names):  # this reference's own word
        return own_layout
    chunks = {int(i) for i in re.findall(r"^block_chunks\.(\d+)\.", "\n".join(names), re.M)}
    return released_transformer(config.depth, len(chunks) or None)


def recognise_tokenizer_layout(names: Collection[str]) -> FileLayout:
    """Recognise a tokenizer file's layout by the names of its tensors."""
    if any(".levels." in name for name in names):
        return own_layout
    return released_tokenizer(inner_names="encoder.conv_in.conv.weight" in names)


def load(model: Module, weights: Mapping[str, Tensor]) -> Module:
    """Give a model its weights as `assign` does; return it in eval mode, without gradients."""
    return assign(model, weights).requires_grad_(False).eval()


def assign(model: Module, weights: Mapping[str, Tensor]) -> Module:
    """Give a model its weights, by its own names; those in their final type are not copied.

    Raises CheckpointError, naming the weight, on numbers that are not finite in that type.
    """
    types = {name: parameter.dtype for name, parameter in model.state_dict().items()}
    state = {
        name: check_finite(name, weights[name], dtype).to(dtype) for name, dtype in types.items()
    }
    model.load_state_dict(state, strict=True, assign=True)
    return model


def fit(
    model: nn.Module, weights: Mapping[str, Tensor], layout: FileLayout, path: str | Path
) -> Weights:
    """Return a file's weights under the model's own names and shapes, in the file's types.

    Raises CheckpointError, naming path, on missing, unexpected or misshapen tensors, on weights
    that are not of a float type, and on key biases that are not zero: the model has none, and
    ignoring a trained one would give wrong edits.
    """
    if differences := mismatch(model, weights, layout):
        raise CheckpointError(f"{path} does not fit: {differences}; {_advice(weights)}")
    places = _places(model, layout)
    for name in _key_biases(dict(place for _, place in places)):
        if name in weights and weights[name].count_nonzero():
            raise CheckpointError(
                f"{path} has a key bias ({name}) that is not zero: expected zeros, as in every "
                "VAREdit model; give another checkpoint"
            )
    fitting = {
        own.name: check_float(place.name, weights[place.name]).reshape(own.shape)
        for own, place in places
    }
    return Weights(fitting, weights.notes if isinstance(weights, Weights) else ())


def mismatch(model: nn.Module, weights: Mapping[str, Tensor], layout: FileLayout) -> str:
    """Describe how a file's names and shapes differ from a model's; empty if they do not."""
    shapes = {place.name: place.shape for _, place in _places(model, layout)}
    known = shapes | _key_biases(shapes)
    kinds = {
        "missing": [name for name in shapes if name not in weights],
        "unexpected": [n for n, t in weights.items() if n not in known and not _is_buffer(n, t)],
        "misshapen": [
            f"{name} {list(weights[name].shape)} for {list(shape)}"
            for name, shape in known.items()
            if name in weights and tuple(weights[name].shape) != shape
        ],
    }
    return listed(kinds)


def listed(kinds: Mapping[str, Sequence[str]], most: int = 3) -> str:
    """Return how many names there are of each kind, and at most this many of them."""
    return ", ".join(
        f"{len(names)} {kind} ({', '.join(names[:most])}{', ...' if len(names) > most else ''})"
        for kind, names in kinds.items()
        if names
    )


def _places(model: nn.Module, layout: FileLayout) -> list[tuple[NamedShape, NamedShape]]:
    owns = [NamedShape(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()]
    return [(own, layout(own)) for own in owns]


def _key_biases(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Return the zero key biases that a file may have, each shaped as the values' bias is."""
    return {
        name.removesuffix(VALUE_BIAS) + ZERO_BIAS: shape
        for name, shape in shapes.items()
        if name.endswith(VALUE_BIAS)
    }


def _is_buffer(name: str, tensor: Tensor) -> bool:
    small = tensor.ndim <= BUFFER_DIMENSIONS and tensor.numel() <= BUFFER_ELEMENTS
    return small and BUFFERS.fullmatch(name) is not None


def _advice(weights: Mapping[str, Tensor]) -> str:
    """Say what to do about weights that do not fit: which size and component they are, if any."""
    for name in PRESETS:
        config = preset(name)
        transformer = empty_transformer(config.transformer)
        layout = recognise_transformer_layout(weights, config.transformer)
        if not mismatch(transformer, weights, layout):
            return f"this looks like the transformer of size {name}: pass --size {name}"
        tokenizer = empty_tokenizer(config.tokenizer)
        if not mismatch(tokenizer, weights, recognise_tokenizer_layout(weights)):
            return (
                f"this looks like the tokenizer of size {name}: pass it as one, with --size {name}"
            )
    return "give a whole checkpoint of the size asked for"
