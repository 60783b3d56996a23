"""The sizes of nano, and where its weights are."""

from pathlib import Path

from varedit_reference.config import ModelConfig, TokenizerConfig, TransformerConfig
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
    tokenizer=TokenizerConfig(bits=24, downsampling=8, channels=24, multipliers=(1, 1, 2, 4)),
    transformer=TransformerConfig(
        depth=8,
        width=256,
        heads=4,
        token_channels=24,
        text_channels=128,
        grids=scale_grids(256),
        table_grids=scale_grids(1024),
        rotary="paper",
    ),
    guidance_scale=2.0,
    temperature=0.5,
)
