"""Checkpoints as the released code writes them: names, shapes and nesting."""

from mmap import MAP_SHARED
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.serialization import set_default_mmap_options, skip_data

from varedit_reference.checkpoint import (
    FileLayout,
    NamedShape,
    empty_tokenizer,
    empty_transformer,
    released_tokenizer,
    released_transformer,
)
from varedit_reference.config import ModelConfig
from varedit_reference.initialise import random_weights
from varedit_reference.tokenizer import Tokenizer
from varedit_reference.transformer import VAR
from varedit_reference.weights_file import whole_file


def released_state(model: nn.Module, layout: FileLayout) -> dict[str, Tensor]:
    """Return the model's weights as a released checkpoint names and shapes them."""
    stored = {}
    for name, tensor in model.state_dict().items():
        place = layout(NamedShape(name, tuple(tensor.shape)))
        stored[place.name] = tensor.reshape(place.shape)
    return stored


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
    layout: FileLayout,
    seed: int,
    path: Path,
    dtype: torch.dtype,
    key: str | None,
) -> None:
    stored = {
        name: layout(NamedShape(name, tuple(parameter.shape)))
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
        for name, tensor in random_weights(model, seed).items():
            weights[stored[name].name].copy_(tensor.reshape(stored[name].shape))
