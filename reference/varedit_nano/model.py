"""The sizes of nano, and loading its weights."""

from dataclasses import replace
from pathlib import Path

import torch

from varedit_reference.checkpoint import load_tokenizer, load_transformer
from varedit_reference.config import Conditioning, ModelConfig, TokenizerConfig, TransformerConfig
from varedit_reference.pipeline import VAREdit
from varedit_reference.text_encoder import TextEncoder
from varedit_runtime.grids import scale_grids

WEIGHTS = Path(__file__).parent / "weights"
TOKENIZER_FILE, TRANSFORMER_FILE, TEXT_FOLDER = (
    "tokenizer.safetensors",
    "transformer.safetensors",
    "text_encoder",
)

# Pictures of 128 px with 8x downsampling have the token grids of 256 px with 16x.
NANO = ModelConfig(
    name="nano",
    tokenizer=TokenizerConfig(
        bits=32, downsampling=8, channels=16, multipliers=(1, 2, 4, 8), groups=8
    ),
    transformer=TransformerConfig(
        depth=6,
        width=192,
        heads=3,
        token_channels=32,
        text_channels=128,
        grids=scale_grids(256),
        table_grids=scale_grids(1024),
        rotary="paper",
    ),
    guidance_scale=2.0,
    temperature=0.5,
)


def nano(
    conditioning: Conditioning = "sar", tokenizer: TokenizerConfig = NANO.tokenizer
) -> ModelConfig:
    """Return nano's configuration with one of the paper's conditionings, on any tokenizer."""
    channels = tokenizer.token_channels
    transformer = replace(NANO.transformer, conditioning=conditioning, token_channels=channels)
    return replace(NANO, tokenizer=tokenizer, transformer=transformer)


def load_nano(
    weights: str | Path = WEIGHTS,
    conditioning: Conditioning = "sar",
    device: str | torch.device = "cpu",
    tokenizer: TokenizerConfig = NANO.tokenizer,
) -> VAREdit:
    """Load nano in fp32 from a folder that `export_weights` wrote, by default the package's own.

    tokenizer: the sizes of the folder's tokenizer. Raises CheckpointError if weights are missing
    or do not fit.
    """
    folder = Path(weights)
    config = nano(conditioning, tokenizer)
    text_encoder = TextEncoder.load(folder / TEXT_FOLDER)
    text_encoder.model.to(device)  # pyright: ignore[reportArgumentType]
    return VAREdit(
        config,
        load_tokenizer(folder / TOKENIZER_FILE, config.tokenizer).to(device),
        load_transformer(folder / TRANSFORMER_FILE, config.transformer).to(device),
        text_encoder,
    )
