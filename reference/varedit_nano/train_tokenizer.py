"""Train nano's tokenizer: `python -m varedit_nano.train_tokenizer --run FOLDER`."""

from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import click
import torch
from PIL import Image
from torch import Tensor, nn

from varedit_export.training.sheets import contact_sheet
from varedit_nano.benchmark import psnr
from varedit_nano.data import VALIDATION_SEEDS, PictureBatches, to_model, to_pixels
from varedit_nano.files import write_weights
from varedit_nano.model import NANO, TOKENIZER_FILE
from varedit_nano.scenes import draw_picture
from varedit_nano.task import NanoMachine
from varedit_nano.training import (
    NanoRecipe,
    run_training,
    tokenizer_options,
    training_options,
)
from varedit_reference.checkpoint import load_tokenizer
from varedit_reference.config import Grid, TokenizerConfig
from varedit_reference.initialise import initialise
from varedit_reference.quantisation import quantise
from varedit_reference.tokenizer import ResidualBlock, Tokenizer

DEFAULT_RUN = Path.home() / ".cache" / "varedit-nano" / "tokenizer"
RECIPE = NanoRecipe(
    steps=6000,
    batch=4,
    learning_rate=1.5e-3,
    weight_decay=1e-4,
    betas=(0.9, 0.99),
    warmup=100,
    ema_decay=0.998,
)
FIRST_RESIDUAL = 0.3
VALIDATION_PICTURES = 32


@dataclass(frozen=True)
class LossWeights:
    """Weights of the loss's parts, and when quantisation starts, as shares of all steps.

    With quantisation from the first step, features collapse. So no picture is quantised before
    `mixed_from`, a growing share of each batch from then on, and all from `quantised_from` on.
    """

    absolute: float = 1.0
    squared: float = 5.0
    edges: float = 0.5
    commitment: float = 1.0
    mixed_from: float = 0.05
    quantised_from: float = 0.25


class TokenizerTask:
    """Learns to reconstruct drawn pictures through the multi-scale bits."""

    def __init__(
        self,
        model: Tokenizer,
        recipe: NanoRecipe,
        machine: NanoMachine,
        grids: tuple[Grid, ...] = NANO.transformer.grids,
        weights: LossWeights | None = None,
    ) -> None:
        self.model, self.recipe, self.machine = model, recipe, machine
        self.grids = grids
        self.weights = weights or LossWeights()
        self.size = grids[-1][0] * model.config.downsampling
        self._encode, self._decode = model.encode, model.decode
        if machine.compiled:
            self._encode, self._decode = torch.compile(model.encode), torch.compile(model.decode)

    @property
    def hidden(self) -> tuple[nn.Parameter, ...]:
        """All kernels but those of the first and the last convolution of either part."""
        ends = ("encoder.conv_in", "encoder.conv_out", "decoder.conv_in", "decoder.conv_out")
        return tuple(
            module.get_parameter("weight")
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Conv2d) and name not in ends
        )

    @property
    def dataset(self) -> PictureBatches:
        return PictureBatches(self.recipe.batch, self.size, self.recipe.first_seed)

    def losses(self, batch: Tensor, step: int, fast: bool = True) -> dict[str, Tensor]:
        weights = self.weights
        pictures = to_model(batch.to(self.machine.device))
        encode, decode = self.model.encode, self.model.decode
        if fast:
            encode, decode = self._encode, self._decode
        bf16 = fast and self.machine.precision == "bf16"
        with torch.autocast(self.machine.device, torch.bfloat16, enabled=bf16):
            features = encode(pictures).float()
        quantised, balance = quantised_features(features.detach(), self.grids)
        inputs = features + self._where_quantised(features, step) * (quantised - features).detach()
        with torch.autocast(self.machine.device, torch.bfloat16, enabled=bf16):
            decoded = decode(inputs).float()
        parts = {
            "absolute": (decoded - pictures).abs().mean(),
            "squared": (decoded - pictures).square().mean(),
            "edges": edge_difference(decoded, pictures),
            "commitment": (features - quantised).square().mean(),
        }
        loss = sum(getattr(weights, name) * part for name, part in parts.items())
        return {"loss": torch.as_tensor(loss), **parts, "imbalance": balance}

    def _where_quantised(self, features: Tensor, step: int) -> Tensor:
        """Draw which pictures of the batch are quantised, [B, 1, 1, 1]: 1 for those."""
        generator = torch.Generator().manual_seed(step)
        chosen = torch.rand(len(features), 1, 1, 1, generator=generator) < self.quantised_share(
            step
        )
        return chosen.to(features.device, features.dtype)

    def quantised_share(self, step: int) -> float:
        start = self.weights.mixed_from * self.recipe.steps
        end = self.weights.quantised_from * self.recipe.steps
        return min(max((step - start) / max(end - start, 1), 0.0), 1.0)

    @torch.no_grad()
    def report(self, model: nn.Module) -> tuple[dict[str, float], Image.Image]:
        assert isinstance(model, Tokenizer)
        features = model.encode(to_model(self._validation.to(self.machine.device)))
        quantised, _ = quantised_features(features, self.grids)
        exact, decoded = to_pixels(model.decode(features)), to_pixels(model.decode(quantised))
        pictures = self._validation.numpy()
        scores = {
            "psnr": _mean_psnr(pictures, decoded),
            "psnr_unquantised": _mean_psnr(pictures, exact),
        }
        rows = list(zip(pictures[:24], decoded[:24], strict=True))
        return scores, contact_sheet(rows, columns=4)

    @cached_property
    def _validation(self) -> Tensor:
        seeds = VALIDATION_SEEDS[:VALIDATION_PICTURES]
        return torch.stack([torch.from_numpy(draw_picture(seed, self.size)) for seed in seeds])

    def export(self, model: nn.Module, folder: Path) -> None:
        write_weights(folder / TOKENIZER_FILE, model.state_dict())

    def restore(self, folder: Path) -> None:
        tokenizer = load_tokenizer(folder / TOKENIZER_FILE, self.model.config)
        self.model.load_state_dict(tokenizer.state_dict())
        # Trained weights decode quantised features; unquantised ones would make them unlearn it.
        self.weights = replace(self.weights, mixed_from=-1.0, quantised_from=0.0)


def quantised_features(features: Tensor, grids: tuple[Grid, ...]) -> tuple[Tensor, Tensor]:
    """Return the sum of all scales' codes, and the finest bits' imbalance (0 even, 0.5 dead)."""
    *_, last = quantise(features, grids)
    return last.sum, (last.bits.float().mean((0, 2, 3)) - 0.5).abs().mean()


def edge_difference(a: Tensor, b: Tensor) -> Tensor:
    """Return the mean absolute difference between two pictures' finite differences."""
    difference = a - b
    rows = (difference[:, :, 1:] - difference[:, :, :-1]).abs().mean()
    columns = (difference[..., 1:] - difference[..., :-1]).abs().mean()
    return rows + columns


def _mean_psnr(pictures: Any, others: Any) -> float:
    return float(sum(psnr(a, b) for a, b in zip(pictures, others, strict=True)) / len(pictures))


def new_tokenizer(config: TokenizerConfig, seed: int) -> Tokenizer:
    """Build a tokenizer whose residual blocks add little at first: it learns faster from there."""
    model = initialise(Tokenizer(config), seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, ResidualBlock):
                module.conv2.weight *= FIRST_RESIDUAL
    return model


def new_tokenizer_task(
    config: TokenizerConfig, recipe: NanoRecipe, machine: NanoMachine
) -> TokenizerTask:
    model = new_tokenizer(config, recipe.seed)
    model.to(machine.device, memory_format=machine.memory_format)  # pyright: ignore[reportCallIssue]
    return TokenizerTask(model, recipe, machine)


@click.command()
@training_options(RECIPE, DEFAULT_RUN)
@tokenizer_options
def main(size: TokenizerConfig, **options: Any) -> None:
    """Train nano's tokenizer, or a larger one, or continue a run that was stopped."""
    run_training(partial(new_tokenizer_task, size), RECIPE, {"tokenizer": asdict(size)}, **options)


if __name__ == "__main__":
    main()
