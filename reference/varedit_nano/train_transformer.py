"""Train nano's transformer and text encoder: `python -m varedit_nano.train_transformer`."""

from dataclasses import replace
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer as Vocabulary
from torch import Tensor, nn
from transformers.models.t5.modeling_t5 import T5Stack

from varedit_export.training.attention import compute_in
from varedit_export.training.sheets import contact_sheet
from varedit_export.training.teacher import edit_losses, lesson
from varedit_nano.benchmark import psnr
from varedit_nano.data import (
    TRAINING_SHARES,
    VALIDATION_SEEDS,
    EditBatch,
    EditBatches,
    to_model,
    to_pixels,
)
from varedit_nano.files import write_weights
from varedit_nano.model import TEXT_FOLDER, TRANSFORMER_FILE, nano
from varedit_nano.scenes import EditSample, draw_edit, vocabulary_text
from varedit_nano.task import NanoMachine
from varedit_nano.text import build_vocabulary, new_text_encoder, text_features, write_text_folder
from varedit_nano.train_tokenizer import quantised_features
from varedit_nano.training import (
    NanoRecipe,
    run_training,
    tokenizer_options,
    training_options,
)
from varedit_reference.checkpoint import load_tokenizer, load_transformer
from varedit_reference.config import Conditioning, ModelConfig, TokenizerConfig, TransformerConfig
from varedit_reference.initialise import initialise
from varedit_reference.pipeline import VAREdit
from varedit_reference.quantisation import source_tokens
from varedit_reference.text_encoder import TextEncoder
from varedit_reference.tokenizer import Tokenizer
from varedit_reference.transformer import VAR, Linear
from varedit_reference.weights_file import open_weights
from varedit_runtime.errors import ConfigError

DEFAULT_RUN = Path.home() / ".cache" / "varedit-nano" / "transformer"
RECIPE = NanoRecipe(
    steps=20000,
    batch=8,
    learning_rate=1e-3,
    weight_decay=0.02,
    betas=(0.9, 0.97),
    warmup=200,
    ema_decay=0.999,
)
TEXT_DROPOUT = 0.1
SOURCE_PASSES = (0.7, 0.2, 0.1)
"""Shares of sources that went through the tokenizer no time, once, and twice, before an edit.

Their targets did not, so an edit of an edit learns to mend what the turns before it blurred.
"""
FIRST_GAMMA = 1e-3
REPORTED_EDITS = 16
READS_BITS, PREDICTS_BITS = "token_embedding", "head"


class EditModel(nn.Module):
    """The two parts that are trained on edits: transformer and text encoder."""

    def __init__(self, transformer: VAR, text_encoder: T5Stack) -> None:
        super().__init__()
        self.transformer = transformer
        self.text_encoder = text_encoder


class TransformerTask:
    """Learns to predict the target's bits from source and instruction."""

    def __init__(
        self,
        config: ModelConfig,
        model: EditModel,
        tokenizer: Tokenizer,
        vocabulary: Vocabulary,
        recipe: NanoRecipe,
        machine: NanoMachine,
    ) -> None:
        self.config, self.model, self.recipe, self.machine = config, model, recipe, machine
        self.tokenizer = tokenizer.to(machine.device, memory_format=machine.memory_format)  # pyright: ignore[reportCallIssue]
        self.text = TextEncoder(model.text_encoder, vocabulary)
        self._forward = torch.compile(model.transformer) if machine.compiled else model.transformer

    @property
    def hidden(self) -> tuple[nn.Parameter, ...]:
        transformer = self.model.transformer
        inner = (*transformer.blocks, transformer.text_memory, transformer.text_pool)
        products = (
            module
            for part in (*inner, self.model.text_encoder)
            for module in part.modules()
            if isinstance(module, nn.Linear | Linear)
        )
        return tuple(module.get_parameter("weight") for module in products)

    @property
    def dataset(self) -> EditBatches:
        return EditBatches(self.recipe.batch, self.config.picture_size[0], self.recipe.first_seed)

    def losses(self, batch: EditBatch, step: int, fast: bool = True) -> dict[str, Tensor]:
        bf16 = fast and self.machine.precision == "bf16"
        dtype = torch.bfloat16 if bf16 else torch.float32
        compute_in(self.model.transformer, dtype, self.machine.device)
        generator = torch.Generator(self.machine.device).manual_seed(step)
        config, patch = self.config.transformer, self.config.tokenizer.patch
        source, target = self._encode(batch, generator)
        taught = lesson(target, config.grids, patch, generator)
        text = self.model.transformer.condition(self._text_rows(batch.instructions, generator))
        forward = self._forward if fast else self.model.transformer
        tokens = source_tokens(source, config.grids, patch, config.conditioning)
        shares = torch.full((len(source),), 1 / len(source), device=source.device)
        logits = forward(tokens, taught.inputs, text)
        return edit_losses(logits, taught.bits, config.grids, shares)

    @torch.no_grad()
    def _encode(self, batch: EditBatch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        pictures = torch.cat((batch.source, batch.target)).to(self.machine.device)
        source, target = self.tokenizer.encode(to_model(pictures)).contiguous().chunk(2)
        return self._passed(source, generator), target

    def _passed(self, features: Tensor, generator: torch.Generator) -> Tensor:
        """Send some features through pixels and back, as `SOURCE_PASSES` says."""
        shares = torch.tensor(SOURCE_PASSES, device=generator.device)
        passes = torch.multinomial(shares, len(features), replacement=True, generator=generator)
        for count in range(1, len(SOURCE_PASSES)):
            again = (passes >= count).to(features.device)
            if again.any():
                quantised, _ = quantised_features(features[again], self.config.transformer.grids)
                pixels = torch.from_numpy(to_pixels(self.tokenizer.decode(quantised)))
                features[again] = self.tokenizer.encode(to_model(pixels.to(features.device)))
        return features

    def _text_rows(self, instructions: list[str], generator: torch.Generator) -> list[Tensor]:
        """Return each instruction's features; some are dropped for the unconditional rows."""
        tokens = [self.text.tokenise(instruction) for instruction in instructions]
        rows = text_features(self.model.text_encoder, tokens)
        shape, device = (len(rows),), generator.device
        dropped = torch.rand(shape, generator=generator, device=device) < TEXT_DROPOUT
        unconditional = self.model.transformer.unconditional_text
        return [
            unconditional[: len(row)] if drop else row
            for row, drop in zip(rows, dropped.tolist(), strict=True)
        ]

    def report(self, model: nn.Module) -> tuple[dict[str, float], Image.Image]:
        """Edit validation scenes: PSNR to the target where it differs from the source, and not."""
        assert isinstance(model, EditModel)
        text = TextEncoder(model.text_encoder, self.text.vocabulary)
        editor = VAREdit(self.config, self.tokenizer, model.transformer, text)
        edits = self._validation
        results = editor.edit(
            [Image.fromarray(edit.source) for edit in edits],
            [edit.instruction for edit in edits],
            seed=range(len(edits)),
        )
        pairs = [(edit, np.asarray(picture)) for edit, picture in zip(edits, results, strict=True)]
        inside = [psnr(edit.target, picture, edit.mask) for edit, picture in pairs]
        local = [(edit, picture) for edit, picture in pairs if not edit.mask.all()]
        outside = [psnr(edit.target, picture, ~edit.mask) for edit, picture in local]
        rows = [(edit.source, picture, edit.target) for edit, picture in pairs]
        scores = {
            "psnr_inside": sum(inside) / len(inside),
            "psnr_outside": sum(outside) / max(len(outside), 1),
        }
        return scores, contact_sheet(rows, [edit.instruction for edit in edits], columns=2)

    @cached_property
    def _validation(self) -> list[EditSample]:
        size = self.config.picture_size[0]
        return [draw_edit(seed, size) for seed in VALIDATION_SEEDS[:REPORTED_EDITS]]

    def export(self, model: nn.Module, folder: Path) -> None:
        assert isinstance(model, EditModel)
        write_weights(folder / TRANSFORMER_FILE, model.transformer.state_dict())
        write_text_folder(folder / TEXT_FOLDER, model.text_encoder, self.text.vocabulary)

    def restore(self, folder: Path) -> None:
        weights = fitting_transformer_weights(folder / TRANSFORMER_FILE, self.config.transformer)
        text = TextEncoder.load(folder / TEXT_FOLDER)
        if text.vocabulary.to_str() != self.text.vocabulary.to_str():
            raise ConfigError(
                f"{folder} has another vocabulary than the scenes' instructions now: start anew"
            )
        self.model.transformer.load_state_dict(weights, strict=False)
        self.model.text_encoder.load_state_dict(text.model.state_dict())


def fitting_transformer_weights(path: Path, config: TransformerConfig) -> dict[str, Tensor]:
    """Load a transformer's weights, of those trained on a tokenizer of other bits what still fits.

    Such weights come without the layers that read and predict bits. Raises CheckpointError if the
    file differs in anything else.
    """
    embedding = open_weights(path).get(f"{READS_BITS}.weight")
    channels = config.token_channels if embedding is None else embedding.shape[1]
    weights = load_transformer(path, replace(config, token_channels=channels)).state_dict()
    if channels == config.token_channels:
        return weights
    return {n: w for n, w in weights.items() if n.split(".")[0] not in (READS_BITS, PREDICTS_BITS)}


def new_transformer(config: ModelConfig, seed: int) -> VAR:
    """Build a transformer to start training from: its blocks add next to nothing at first.

    The gammas of AdaLN are near zero, and output projections are scaled by 1/sqrt(2·blocks).
    """
    model = initialise(VAR(config.transformer), seed)
    width = config.transformer.width
    with torch.no_grad():
        model.shared_modulation.weight[: 2 * width] *= FIRST_GAMMA
        model.shared_modulation.bias[: 2 * width] *= FIRST_GAMMA
        for block in model.blocks:
            block.get_parameter("modulation")[:2] *= FIRST_GAMMA
        model.head.weight *= 0.1
    return model


def new_transformer_task(
    config: ModelConfig, tokenizer: Tokenizer, recipe: NanoRecipe, machine: NanoMachine
) -> TransformerTask:
    torch.manual_seed(recipe.seed)
    vocabulary = build_vocabulary(vocabulary_text())
    text_encoder = new_text_encoder(vocabulary, config.transformer.text_channels)
    model = EditModel(new_transformer(config, recipe.seed), text_encoder).to(machine.device)
    return TransformerTask(config, model, tokenizer, vocabulary, recipe, machine)


@click.command()
@click.option("--tokenizer", type=click.Path(exists=True, path_type=Path), required=True)
@click.option(
    "--conditioning", type=click.Choice(["sar", "finest", "full"]), default="sar", show_default=True
)
@training_options(RECIPE, DEFAULT_RUN)
@tokenizer_options
def main(
    tokenizer: Path, conditioning: Conditioning, size: TokenizerConfig, **options: Any
) -> None:
    """Train nano's transformer on a trained tokenizer, or continue a run that was stopped."""
    config = nano(conditioning, size)
    coder = load_tokenizer(tokenizer, config.tokenizer)
    digest = sha256(tokenizer.read_bytes()).hexdigest()
    learns = {
        "conditioning": conditioning,
        "tokenizer": digest,
        "shares": TRAINING_SHARES,
        "source_passes": SOURCE_PASSES,
    }
    run_training(partial(new_transformer_task, config, coder), RECIPE, learns, **options)


if __name__ == "__main__":
    main()
