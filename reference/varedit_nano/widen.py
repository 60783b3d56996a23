"""Widen nano: `python -m varedit_nano.widen OUT --bits 40 --multipliers 2 2 4 8`.

A widened model computes what the narrow one does (Net2Net, Chen et al. 2016, arXiv 1511.05641), so
its training starts from all that the narrow one has learned. Channels are repeated, copies next to
each other: the groups of a norm keep their statistics. What reads n copies weighs each by 1/n.
Copies would get the same gradients for ever, so noise tells them apart. New bits change nothing at
first: they are decoded with zeros, predicted as even odds, and read with zeros.
"""

from math import sqrt
from pathlib import Path

import click
import torch
from torch import Tensor

from varedit_nano.files import write_weights
from varedit_nano.model import TEXT_FOLDER, TOKENIZER_FILE, TRANSFORMER_FILE, WEIGHTS, load_nano
from varedit_nano.text import write_text_folder
from varedit_nano.training import tokenizer_options
from varedit_reference.checkpoint import empty_tokenizer
from varedit_reference.config import TokenizerConfig
from varedit_reference.pipeline import VAREdit
from varedit_reference.tokenizer import Tokenizer

NOISE = 0.1


def widened_tokenizer(
    tokenizer: Tokenizer, size: TokenizerConfig, noise: float = NOISE
) -> dict[str, Tensor]:
    """Return the weights of a larger tokenizer that decodes the same from the same bits.

    size: at least as many bits, and on every level a multiple of the channels. noise: standard
    deviation of a widened weight, relative to the weight.
    """
    generator = torch.Generator().manual_seed(0)
    narrow = tokenizer.state_dict()
    wide = {}
    for name, shape in ((n, w.shape) for n, w in empty_tokenizer(size).state_dict().items()):
        weight = narrow[name] if name in narrow else _identity(shape)
        if name.startswith("encoder.conv_out."):
            weight = _new_bits(weight, size.bits, generator)
        elif name == "decoder.conv_in.weight":
            weight = _read_new_bits(weight, size.bits)
        wide[name] = _repeat(weight, shape, noise, generator)
    return wide


def _identity(shape: torch.Size) -> Tensor:
    """Return a shortcut of the wide model where the narrow one just keeps its channels."""
    channels = min(shape[:2])
    return torch.zeros(channels) if len(shape) == 1 else torch.eye(channels)[:, :, None, None]


def _new_bits(weight: Tensor, bits: int, generator: torch.Generator) -> Tensor:
    """Scale the encoder's last layer to the codes' new length, and give new bits random weights."""
    new = torch.randn(bits - len(weight), *weight.shape[1:], generator=generator)
    new = new * weight.std() if weight.ndim > 1 else torch.zeros(len(new))
    return torch.cat((weight, new)) * sqrt(len(weight) / bits)


def _read_new_bits(weight: Tensor, bits: int) -> Tensor:
    """Undo the scale of `_new_bits` in a layer [out, bits, ...] that reads codes; append zeros."""
    zeros = weight.new_zeros(len(weight), bits - weight.shape[1], *weight.shape[2:])
    return torch.cat((weight * sqrt(bits / weight.shape[1]), zeros), 1)


def _repeat(weight: Tensor, shape: torch.Size, noise: float, generator: torch.Generator) -> Tensor:
    """Repeat outputs, and inputs with their share of the weight, up to the shape."""
    wide = weight.repeat_interleave(shape[0] // len(weight), 0)
    if len(shape) == 1:
        return wide
    wide = wide.repeat_interleave(shape[1] // weight.shape[1], 1) * (weight.shape[1] / shape[1])
    if wide.shape == weight.shape:
        return wide
    return wide * (1 + noise * torch.randn(wide.shape, generator=generator))


def widened_transformer(weights: dict[str, Tensor], bits: int) -> dict[str, Tensor]:
    """Return a transformer's weights with more bits per token, which change no other bit's odds."""
    wide = dict(weights)
    wide["token_embedding.weight"] = _read_new_bits(weights["token_embedding.weight"], bits)
    for name in ("head.weight", "head.bias"):
        old = weights[name]
        wide[name] = torch.cat((old, old.new_zeros(2 * bits - len(old), *old.shape[1:])))
    return wide


def widen(model: VAREdit, size: TokenizerConfig, out: Path) -> None:
    """Write a widened model, from which both trainers and the scores start."""
    write_weights(out / TOKENIZER_FILE, widened_tokenizer(model.tokenizer, size))
    transformer = widened_transformer(model.transformer.state_dict(), size.token_channels)
    write_weights(out / TRANSFORMER_FILE, transformer)
    text = model.text_encoder
    write_text_folder(out / TEXT_FOLDER, text.model, text.vocabulary)


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--weights", type=click.Path(exists=True, path_type=Path), default=WEIGHTS)
@tokenizer_options
def main(size: TokenizerConfig, out: Path, weights: Path) -> None:
    """Write nano's weights, widened to the given sizes, to the folder OUT."""
    widen(load_nano(weights), size, out)


if __name__ == "__main__":
    main()
