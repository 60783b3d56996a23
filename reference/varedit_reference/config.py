"""Model sizes as data: the configuration of a VAREdit model's parts, and the presets.

Letters used throughout the reference: B pictures, G rows per picture (2 with guidance, else 1),
R = G·B rows (conditional rows of all pictures first), K scales, L tokens of a scale, S tokens of a
sequence, C width, H heads, D = C/H, d the tokenizer's bits per position, c the token's channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, ValidationError, convert, to_builtins

from varedit_runtime.errors import ConfigError, shown
from varedit_runtime.grids import Conditioning, Grid, scale_grids

RotaryLayout = Literal["released", "paper"]

TEXT_HEAD_WIDTH = 128
MAX_TEXT_TOKENS = 512  # rows of the learned unconditional text
MAX_BLOCKS = 256  # of a transformer or text encoder: more are a mistake, or take for ever to build
MAX_WIDTH = 2**20  # channels, heads, words
MAX_BITS, MAX_TOKENIZER_LEVELS = 256, 8  # the released ones have at most 32 and 5
MAX_LEVELS = 15  # rows of the level embedding; the released schedules use up to 13


@dataclass(frozen=True)
class TokenizerConfig:
    """Sizes of the convolutional autoencoder with binary spherical quantisation.

    bits: d, bits per position of the feature grid. downsampling: side of a position in pixels.
    channels: channels of the first convolution; a level has this times its multiplier, and
    multipliers list the finest level first. patchify: make a token of 2x2 positions, not of one.
    groups: groups of every GroupNorm; None means 32 where a level's channels divide by 32, else
    24. Raises ConfigError on sizes that cannot be built.
    """

    bits: int
    downsampling: int
    channels: int
    multipliers: tuple[int, ...]
    patchify: bool = False
    groups: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= len(self.multipliers) <= MAX_TOKENIZER_LEVELS:
            raise ConfigError(
                f"a tokenizer has {len(self.multipliers)} multipliers; give 1 to "
                f"{MAX_TOKENIZER_LEVELS}"
            )
        if self.downsampling != 2 ** (len(self.multipliers) - 1):
            raise ConfigError(
                f"a tokenizer with {len(self.multipliers)} multipliers downsamples by "
                f"{2 ** (len(self.multipliers) - 1)}, but downsampling is {self.downsampling}: "
                "change one of them"
            )
        for channels in (self.channels, *self.level_channels):
            groups = self.group_count(channels)
            if not 1 <= channels <= MAX_WIDTH or channels % groups:
                raise ConfigError(
                    f"a tokenizer level has {channels} channels: at most {MAX_WIDTH} are expected, "
                    f"which divide into {groups} groups for GroupNorm; change channels, "
                    "multipliers or groups"
                )
        if not 1 <= self.bits <= MAX_BITS:
            raise ConfigError(f"bits is {self.bits}; a tokenizer has 1 to {MAX_BITS} a position")

    def group_count(self, channels: int) -> int:
        """Return the number of groups of a GroupNorm over this many channels."""
        return self.groups or (32 if channels % 32 == 0 else 24)

    @property
    def level_channels(self) -> tuple[int, ...]:
        return tuple(self.channels * m for m in self.multipliers)

    @property
    def patch(self) -> int:
        """Side of a token in tokenizer positions."""
        return 2 if self.patchify else 1

    @property
    def token_channels(self) -> int:
        """c: the bits of one token, each of which is one input channel of the transformer."""
        return self.bits * self.patch**2

    @property
    def token_pixels(self) -> int:
        """Side of a token in pixels."""
        return self.downsampling * self.patch


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of the next-scale transformer.

    depth: blocks. width: C. heads: H. token_channels: c. text_channels: width of the text encoder.
    grids: (height, width) of every scale in tokens, coarse to fine. table_grids: the schedule
    whose positions the released rotary layout reads: the 1-megapixel one of the same aspect ratio.
    conditioning: how blocks see the source: "sar" (block 0 sees it pooled to the predicted scale's
    grid, all others at the finest), or one of the paper's ablations: "finest" (the finest grid in
    every block) and "full" (all grids in every block). rotary: where positions come from, see
    `rotary.py`. Raises ConfigError on sizes that cannot be built.
    """

    depth: int
    width: int
    heads: int
    token_channels: int
    text_channels: int
    grids: tuple[Grid, ...]
    table_grids: tuple[Grid, ...]
    conditioning: Conditioning = "sar"
    rotary: RotaryLayout = "released"

    def __post_init__(self) -> None:
        sizes = self.depth, self.width, self.heads, self.text_channels
        if min(sizes) < 1 or self.depth > MAX_BLOCKS or max(sizes) > MAX_WIDTH:
            raise ConfigError(
                f"depth {self.depth}, width {self.width}, heads {self.heads} and text_channels "
                f"{self.text_channels} must all be at least 1, depth at most {MAX_BLOCKS} and the "
                f"others at most {MAX_WIDTH}"
            )
        if self.width % self.heads or self.head_width % 4:
            raise ConfigError(
                f"width {self.width} over {self.heads} heads must give a whole head width that "
                "divides by 4: rotary embedding rotates pairs, half by row and half by column"
            )
        if self.text_channels % TEXT_HEAD_WIDTH or self.width % self.text_heads:
            raise ConfigError(
                f"text_channels is {self.text_channels} and width {self.width}; the text pool "
                f"needs text_channels that divide by {TEXT_HEAD_WIDTH} (the quotient is its number "
                "of heads) and a width that divides by that number"
            )
        if not 1 <= len(self.grids) <= MAX_LEVELS:
            raise ConfigError(f"grids has {len(self.grids)} scales; give 1 to {MAX_LEVELS}")
        if self.rotary == "released" and _positions(self.table_grids) < _positions(self.grids):
            raise ConfigError(
                f"table_grids give {_positions(self.table_grids)} positions, too few for the "
                f"{_positions(self.grids)} of source and scales: use a longer schedule"
            )
        if self.mlp_width == 0:
            raise ConfigError(f"width is {self.width}, too small for an MLP of 4·width channels")

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def text_heads(self) -> int:
        return self.text_channels // TEXT_HEAD_WIDTH

    @property
    def mlp_width(self) -> int:
        """Hidden channels of a block's MLP: 4·C, rounded to a multiple of 256 (halves to even)."""
        return round(4 * self.width / 256) * 256

    @property
    def finest(self) -> Grid:
        return self.grids[-1]

    @property
    def lengths(self) -> tuple[int, ...]:
        """L of every scale: h_k·w_k tokens."""
        return tuple(rows * columns for rows, columns in self.grids)


Size = Annotated[int, Meta(ge=1, le=MAX_WIDTH)]
T5_NAMES = {
    "vocabulary": "vocab_size",
    "width": "d_model",
    "head_width": "d_kv",
    "heads": "num_heads",
    "mlp_width": "d_ff",
    "depth": "num_layers",
    "buckets": "relative_attention_num_buckets",
    "max_distance": "relative_attention_max_distance",
    "epsilon": "layer_norm_epsilon",
    "mlp": "feed_forward_proj",
}


class TextEncoderConfig(Struct, frozen=True, rename=T5_NAMES):
    """Sizes of a T5 encoder; those that a config.json leaves out are transformers' defaults.

    head_width: D of each of the heads. buckets: of relative positions, up to max_distance tokens
    apart. epsilon: of all norms. mlp: its kind, "gated-gelu" in T5 v1.1 and Flan-T5.
    """

    vocabulary: Size = 32128
    width: Size = 512
    head_width: Size = 64
    heads: Size = 8
    mlp_width: Size = 2048
    depth: Annotated[int, Meta(ge=1, le=MAX_BLOCKS)] = 6
    buckets: Annotated[int, Meta(ge=4, le=MAX_WIDTH)] = 32
    max_distance: Size = 128
    epsilon: Annotated[float, Meta(gt=0, le=1)] = 1e-6
    mlp: str = "relu"

    @classmethod
    def from_json(cls, settings: Mapping[str, Any]) -> "TextEncoderConfig":
        """Read what a T5 folder's config.json holds. Raises ConfigError on impossible sizes."""
        try:
            config = convert(settings, cls)
        except ValidationError as error:
            raise ConfigError(f"the sizes of a text encoder: {error}") from error
        if config.max_distance <= config.buckets // 4:
            raise ConfigError(
                f"a text encoder whose {config.buckets} buckets end at {config.max_distance} "
                f"tokens: more than {config.buckets // 4} are expected"
            )
        return config

    @property
    def json(self) -> dict[str, Any]:
        """The sizes as a config.json holds them."""
        return to_builtins(self)


def _positions(grids: tuple[Grid, ...]) -> int:
    """Count the tokens of the source, which lies on the finest grid, and of all scales."""
    return sum(rows * columns for rows, columns in (*grids, *grids[-1:]))


@dataclass(frozen=True)
class ModelConfig:
    """A whole model: tokenizer, transformer, and the sampling settings it was published with.

    guidance_scale: g of classifier-free guidance; 1 is none. temperature: > 0; higher is more
    varied. Raises ConfigError if the transformer predicts other tokens than the tokenizer's.
    """

    name: str
    tokenizer: TokenizerConfig
    transformer: TransformerConfig
    guidance_scale: float = 4.0
    temperature: float = 0.5

    def __post_init__(self) -> None:
        if self.transformer.token_channels != self.tokenizer.token_channels:
            raise ConfigError(
                f"the transformer predicts {self.transformer.token_channels} bits a token and the "
                f"tokenizer has {self.tokenizer.token_channels}: token_channels must be equal"
            )

    @property
    def picture_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the model's input and output pictures."""
        height, width = self.transformer.finest
        return height * self.tokenizer.token_pixels, width * self.tokenizer.token_pixels


@dataclass(frozen=True)
class _Size:
    tokenizer: TokenizerConfig
    depth: int
    width: int
    heads: int
    text_channels: int
    guidance_scale: float = 4.0
    temperature: float = 0.5


# 2b and 8b are the released sizes; the others share their structure at a size for tests.
_SIZES = {
    "2b": _Size(TokenizerConfig(32, 16, 128, (1, 2, 4, 4, 4)), 32, 2048, 16, 2048),
    "8b": _Size(TokenizerConfig(14, 8, 128, (1, 2, 4, 4), True), 40, 3584, 28, 2048, 3.0, 0.1),
    "125m": _Size(TokenizerConfig(32, 16, 32, (1, 1, 2, 2, 4)), 12, 768, 6, 768),
    "tiny-2b": _Size(TokenizerConfig(8, 16, 32, (1, 1, 1, 1, 2)), 4, 64, 2, 128),
    "tiny-8b": _Size(TokenizerConfig(4, 8, 32, (1, 1, 1, 2), True), 4, 96, 3, 256, 3.0, 0.1),
}
PRESETS = tuple(_SIZES)


def preset(name: str, resolution: int = 512, aspect: str = "1:1") -> ModelConfig:
    """Return the named size at a resolution (256, 512 or 1024 px) and aspect (height:width).

    Only squares were trained; `varedit_runtime.grids` lists the other aspect ratios. Raises
    ConfigError on an unknown name, resolution or aspect; the message lists the known ones.
    """
    if name not in _SIZES:
        raise ConfigError(f"no size is called {shown(name)}; choose one of {', '.join(PRESETS)}")
    size = _SIZES[name]
    transformer = TransformerConfig(
        depth=size.depth,
        width=size.width,
        heads=size.heads,
        token_channels=size.tokenizer.token_channels,
        text_channels=size.text_channels,
        grids=scale_grids(resolution, aspect),
        table_grids=scale_grids(1024, aspect),
    )
    return ModelConfig(name, size.tokenizer, transformer, size.guidance_scale, size.temperature)
