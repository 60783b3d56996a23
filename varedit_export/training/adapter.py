"""LoRA (Hu et al. 2021, arXiv 2106.09685): train a small change of each product of the blocks.

    y = W·x + alpha / rank · B·(A·x)        W [out, in] frozen, A [rank, in], B [out, rank]

B is zero at first: training starts from the model as it is. alpha is the rank, so that the factor
is 1; the learning rate does what another alpha would. `weights/lora.py` merges what is written.
"""

import json
from collections.abc import Iterator, Mapping
from math import sqrt
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varedit_export.weights.lora import BASE, METADATA
from varedit_reference.checkpoint import FileLayout, NamedShape, released_transformer
from varedit_reference.initialise import RandomWeights
from varedit_reference.transformer import VAR, Linear
from varedit_reference.weights_file import write_safetensors

DOWN, UP = "lora_A", "lora_B"  # PEFT's names


class AdaptedLinear(Linear):
    """A frozen product and the change of it that is trained, in fp32."""

    def __init__(self, frozen: Linear, rank: int) -> None:
        """Take a product's sizes and types; its weights come with all others."""
        super().__init__(
            frozen.in_features,
            frozen.out_features,
            frozen.bias is not None,
            compute_dtype=frozen.compute_dtype,
            weight_dtype=frozen.weight.dtype,
        )
        self.lora_A = nn.Parameter(torch.empty(rank, frozen.in_features))
        self.lora_B = nn.Parameter(torch.empty(frozen.out_features, rank))

    def forward(self, input: Tensor, bias: Tensor | None = None) -> Tensor:
        dtype = self.compute_dtype
        change = F.linear(F.linear(input.to(dtype), self.lora_A.to(dtype)), self.lora_B.to(dtype))
        return super().forward(input, bias) + change


def adapt(model: VAR, rank: int) -> None:
    """Freeze a transformer that has no content yet; let all products of its blocks be adapted."""
    model.requires_grad_(False)
    products = [n for n, m in model.named_modules() if isinstance(m, Linear)]
    with model.start_token.device:
        for name in products:
            if name.startswith("blocks."):
                model.set_submodule(name, AdaptedLinear(_linear(model, name), rank))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_change(name))


def is_change(name: str) -> bool:
    """Return whether a parameter is a factor of a change, by its name."""
    return name.endswith((DOWN, UP))


def first_changes(model: nn.Module, seed: int) -> Mapping[str, Tensor]:
    """Return the factors of all changes as training starts: A is normal, B is zero."""
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if is_change(n)}
    return RandomWeights(shapes, f"{seed} lora", _first)


def write_adapter(path: Path, changes: Mapping[str, Tensor], depth: int, base: str) -> None:
    """Write an adapter in diffusers' layout, with released names, for `build --lora`.

    The names are those without chunks, which fit checkpoints whose blocks are in any chunks.

    changes: the factors by the names of the model's parameters. base: `weights_digest` of the
    weights that it changes.
    """
    layout = released_transformer(depth, None)
    stored = dict(_released(changes, layout))
    rank = min(factor.shape[0] for name, factor in changes.items() if name.endswith(DOWN))
    settings = {"transformer.r": rank, "transformer.lora_alpha": rank}
    told = {"format": "pt", METADATA: json.dumps(settings), BASE: base}
    write_safetensors(path, {name: tensor.cpu() for name, tensor in stored.items()}, told)


def _released(changes: Mapping[str, Tensor], layout: FileLayout) -> Iterator[tuple[str, Tensor]]:
    for name, factor in changes.items():
        module, _, part = name.rpartition(".")
        own = layout(NamedShape(f"{module}.weight", ())).name.removesuffix(".weight")
        yield f"transformer.{own}.{part}.weight", factor


def _linear(model: VAR, name: str) -> Linear:
    module = model.get_submodule(name)
    assert isinstance(module, Linear)
    return module


def _first(name: str, normal: Tensor) -> Tensor:
    return normal / sqrt(normal.shape[1]) if name.endswith(DOWN) else torch.zeros_like(normal)
