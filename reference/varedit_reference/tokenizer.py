"""The picture tokenizer: a convolutional autoencoder without attention.

x_BCHW is a batch of feature maps. `quantisation.py` turns its features into bits and codes.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from varedit_reference.config import TokenizerConfig


class Tokenizer(nn.Module):
    """Encoder and decoder: pictures to continuous features, and sums of codes to pictures."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode(self, pictures: Tensor) -> Tensor:
        """Encode pictures [B, 3, H, W] in [-1, 1]; downsampling s gives [B, d, H/s, W/s]."""
        return self.encoder(pictures)

    def decode(self, features: Tensor) -> Tensor:
        """Decode a sum of codes [B, d, h, w] to pictures [B, 3, H, W], not yet clamped."""
        return self.decoder(features)


class Encoder(nn.Module):
    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        channels = config.level_channels
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1)
        self.levels = nn.ModuleList(
            EncoderLevel(config, channels_in, channels[i], last=i == len(channels) - 1)
            for i, channels_in in enumerate((config.channels, *channels[:-1]))
        )
        self.middle = _residual_blocks(config, 2, channels[-1], channels[-1])
        self.norm_out = _norm(config, channels[-1])
        self.conv_out = nn.Conv2d(channels[-1], config.bits, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.conv_in(x_BCHW)
        for level in self.levels:
            x_BCHW = level(x_BCHW)
        return self.conv_out(F.silu(self.norm_out(self.middle(x_BCHW))))


class EncoderLevel(nn.Module):
    """Two residual blocks and, except on the coarsest level, a convolution of stride 2."""

    def __init__(
        self, config: TokenizerConfig, channels_in: int, channels: int, last: bool
    ) -> None:
        super().__init__()
        self.blocks = _residual_blocks(config, 2, channels_in, channels)
        self.downsample = None if last else nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.blocks(x_BCHW)
        if self.downsample is None:
            return x_BCHW
        return self.downsample(F.pad(x_BCHW, (0, 1, 0, 1)))  # right and bottom alone, as released


class Decoder(nn.Module):
    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        channels = config.level_channels
        self.conv_in = nn.Conv2d(config.bits, channels[-1], 3, padding=1)
        self.middle = _residual_blocks(config, 2, channels[-1], channels[-1])
        self.levels = nn.ModuleList(
            DecoderLevel(
                config, channels[min(i + 1, len(channels) - 1)], channels[i], finest=i == 0
            )
            for i in range(len(channels))
        )
        self.norm_out = _norm(config, channels[0])
        self.conv_out = nn.Conv2d(channels[0], 3, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.middle(self.conv_in(x_BCHW))
        for level in reversed(self.levels):  # stored finest first, as in the released files
            x_BCHW = level(x_BCHW)
        return self.conv_out(F.silu(self.norm_out(x_BCHW)))


class DecoderLevel(nn.Module):
    """Three residual blocks and, except on the finest level, nearest x2 and a convolution."""

    def __init__(
        self, config: TokenizerConfig, channels_in: int, channels: int, finest: bool
    ) -> None:
        super().__init__()
        self.blocks = _residual_blocks(config, 3, channels_in, channels)
        self.upsample = None if finest else nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.blocks(x_BCHW)
        if self.upsample is None:
            return x_BCHW
        return self.upsample(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))


class ResidualBlock(nn.Module):
    def __init__(self, config: TokenizerConfig, channels_in: int, channels: int) -> None:
        super().__init__()
        self.norm1 = _norm(config, channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.norm2 = _norm(config, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.shortcut = nn.Conv2d(channels_in, channels, 1) if channels_in != channels else None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        shortcut_BCHW = x_BCHW if self.shortcut is None else self.shortcut(x_BCHW)
        x_BCHW = self.conv1(F.silu(self.norm1(x_BCHW)))
        x_BCHW = self.conv2(F.silu(self.norm2(x_BCHW)))
        return shortcut_BCHW + x_BCHW


def _residual_blocks(
    config: TokenizerConfig, count: int, channels_in: int, channels: int
) -> nn.Sequential:
    inputs = [channels_in] + [channels] * (count - 1)
    return nn.Sequential(*(ResidualBlock(config, each, channels) for each in inputs))


def _norm(config: TokenizerConfig, channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(config.group_count(channels), channels, eps=1e-6)
