"""Random weights by seed: for tests of structure, speed and size, and to start training from.

Every parameter has a generator of its own, seeded by the seed and the parameter's name. So a model
can be drawn whole or tensor by tensor, in any order and type, always with the same values.
"""

import re
from collections.abc import Iterator, Mapping
from hashlib import sha256
from math import log, prod, sqrt
from mmap import MAP_SHARED
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.serialization import set_default_mmap_options, skip_data

from varedit_reference.checkpoint import (
    Layout,
    Stored,
    empty_tokenizer,
    empty_transformer,
    released_tokenizer,
    released_transformer,
)
from varedit_reference.config import ModelConfig
from varedit_reference.tokenizer import Tokenizer
from varedit_reference.transformer import VAR
from varedit_reference.weights_file import whole_file

Module = TypeVar("Module", VAR, Tokenizer)

SMALL = 0.02
# silu(x) of a standard normal x has an rms of 0.6; the convolution after it restores 1.
SILU_GAIN = 1 / 0.6


def initialise(model: Module, seed: int) -> Module:
    """Give a model random weights in its parameters' types; it may be on the meta device."""
    types = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    state = {name: tensor.to(types[name]) for name, tensor in random_state(model, seed)}
    model.load_state_dict(state, strict=True, assign=True)
    return model


def random_state(model: VAR | Tokenizer, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Yield random fp32 parameters for a model, one at a time; it may be on the meta device."""
    weights = RandomWeights(model, seed)
    return ((name, weights[name]) for name in weights)


class RandomWeights(Mapping[str, Tensor]):
    """A model's random parameters by name, in fp32; each is drawn when it is looked up."""

    def __init__(self, model: VAR | Tokenizer, seed: int) -> None:
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        self._depth = len(model.blocks) if isinstance(model, VAR) else None
        self._seed = seed

    def __getitem__(self, name: str) -> Tensor:
        key = sha256(f"{self._seed} {name}".encode()).digest()[:8]
        generator = torch.Generator().manual_seed(int.from_bytes(key, "little"))
        normal = torch.randn(self._shapes[name], generator=generator, device="cpu")
        if self._depth is None:
            return _tokenizer_weight(name, normal)
        return _transformer_weight(name, normal, self._depth)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def _transformer_weight(name: str, normal: Tensor, depth: int) -> Tensor:
    """Scale standard normals to a parameter that keeps activations near rms 1 through all blocks.

    Products keep the variance of their input (std 1/sqrt(channels in)). What a block adds to the
    residual stream is scaled by 1/sqrt(2·depth), and gammas lie around 1 instead of near 0 as in
    training: every block matters, and all together add about as much as the stream began with.
    """
    if name == "token_embedding.weight":
        return normal  # codes have norm 1
    if name == "unconditional_text":
        return normal
    if name.endswith("log_scale"):
        return torch.full_like(normal, log(4))
    if name.endswith("norm.weight"):
        return torch.ones_like(normal)
    if name.endswith(".modulation"):
        gammas = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
        return gammas[:, None] + 0.1 * normal
    if name.endswith("bias"):
        return SMALL * normal
    if name == "start_token" or name.startswith("level_embedding"):
        return 0.5 * normal
    if name.startswith(("shared_modulation", "head_modulation")):
        return 0.2 * _fan_in(normal)
    if re.fullmatch(r"blocks\..*(projection|mlp\.2)\.weight", name):
        return _fan_in(normal) / sqrt(2 * depth)
    return _fan_in(normal)


def _tokenizer_weight(name: str, normal: Tensor) -> Tensor:
    """Scale standard normals to a parameter that keeps features and pictures in a usable range.

    Features get a norm of about 1, as codes have; pictures an rms near 0.5, mostly in [-1, 1].
    """
    if name.endswith("bias"):
        return SMALL * normal
    if "norm" in name:
        return torch.ones_like(normal)
    if name == "encoder.conv_out.weight":
        return SILU_GAIN * _fan_in(normal) / sqrt(len(normal))
    if name == "decoder.conv_out.weight":
        return 0.5 * SILU_GAIN * _fan_in(normal)
    if re.search(r"\.conv[12]\.", name):
        return SILU_GAIN * _fan_in(normal)
    return _fan_in(normal)


def _fan_in(normal: Tensor) -> Tensor:
    return normal / sqrt(prod(normal.shape[1:]))


def write_released_transformer(
    config: ModelConfig, seed: int, path: str | Path, dtype: torch.dtype, chunks: int = 8
) -> None:
    """Write a random transformer with the released format (torch.save), names and shapes.

    Needs the memory of one tensor. Raises CheckpointError if the disk has no room.
    """
    model = empty_transformer(config.transformer)
    layout = released_transformer(config.transformer.depth, chunks)
    _write_released(model, layout, seed, Path(path), dtype, key=None)


def write_released_tokenizer(
    config: ModelConfig, seed: int, path: str | Path, dtype: torch.dtype
) -> None:
    """Write a random tokenizer with the released format (torch.save), names and nesting.

    Raises CheckpointError if the disk has no room.
    """
    model = empty_tokenizer(config.tokenizer)
    _write_released(model, released_tokenizer(), seed, Path(path), dtype, key="vae")


def _write_released(
    model: VAR | Tokenizer,
    layout: Layout,
    seed: int,
    path: Path,
    dtype: torch.dtype,
    key: str | None,
) -> None:
    stored = {
        name: layout(Stored(name, tuple(parameter.shape)))
        for name, parameter in model.state_dict().items()
    }
    unwritten = {place.name: torch.empty(place.shape, dtype=dtype) for place in stored.values()}
    size = sum(tensor.nbytes for tensor in unwritten.values())
    with whole_file(path, size) as partial:
        with skip_data():  # writes the file's structure; the weights follow through a memory map
            torch.save({key: unwritten} if key else unwritten, partial)
        del unwritten
        with set_default_mmap_options(MAP_SHARED):
            content = torch.load(partial, map_location="cpu", weights_only=True, mmap=True)
        weights = content[key] if key else content
        for name, tensor in random_state(model, seed):
            weights[stored[name].name].copy_(tensor.reshape(stored[name].shape))
