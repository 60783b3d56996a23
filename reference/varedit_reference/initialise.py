"""Random weights by seed: for tests of structure, speed and size, and to start training from.

Every parameter has a generator of its own, seeded by the seed and the parameter's name. So a model
can be drawn whole or tensor by tensor, in any order and type, always with the same values.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from hashlib import sha256
from math import log, prod, sqrt
from typing import TypeVar

import torch
from torch import Tensor

from varedit_reference.checkpoint import assign
from varedit_reference.tokenizer import Tokenizer
from varedit_reference.transformer import VAR

Module = TypeVar("Module", VAR, Tokenizer)

SMALL = 0.02
# silu(x) of a standard normal x has an rms of 0.6; the convolution after it restores 1.
SILU_GAIN = 1 / 0.6


def initialise(model: Module, seed: int) -> Module:
    """Give a model random weights in its parameters' types; it may be on the meta device."""
    return assign(model, random_weights(model, seed))


def random_weights(model: VAR | Tokenizer, seed: int) -> Mapping[str, Tensor]:
    """Return a model's random parameters by name; it may be on the meta device."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if isinstance(model, VAR):
        return RandomWeights(shapes, str(seed), partial(_transformer_weight, len(model.blocks)))
    return RandomWeights(shapes, str(seed), _tokenizer_weight)


class RandomWeights(Mapping[str, Tensor]):
    """Random tensors by name, in fp32; each is drawn when it is looked up."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        key: str,
        scale: Callable[[str, Tensor], Tensor],
    ) -> None:
        """Seed by a key and the tensor's name; scale: from that name and standard normals."""
        self._shapes, self._key, self._scale = shapes, key, scale

    def __getitem__(self, name: str) -> Tensor:
        seed = sha256(f"{self._key} {name}".encode()).digest()[:8]
        generator = torch.Generator().manual_seed(int.from_bytes(seed, "little"))
        normal = torch.randn(self._shapes[name], generator=generator, device="cpu")
        return self._scale(name, normal)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def _transformer_weight(depth: int, name: str, normal: Tensor) -> Tensor:
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
