"""The autoencoder's shapes; its arithmetic is checked by the recordings."""

import pytest
import torch

from varedit_reference.checkpoint import empty_tokenizer
from varedit_reference.config import TokenizerConfig, preset
from varedit_reference.initialise import initialise


@pytest.mark.parametrize(
    "config",
    [
        TokenizerConfig(5, 8, 24, (2, 1, 4, 1)),
        TokenizerConfig(3, 1, 32, (1,)),
        preset("tiny-8b").tokenizer,
    ],
)
def test_features_have_the_grid_and_pictures_the_size(config: TokenizerConfig) -> None:
    tokenizer = initialise(empty_tokenizer(config), seed=0)
    pictures = torch.rand(2, 3, 64, 32, generator=torch.Generator().manual_seed(0))
    features = tokenizer.encode(pictures)
    assert features.shape == (2, config.bits, 64 // config.downsampling, 32 // config.downsampling)
    assert tokenizer.decode(features).shape == pictures.shape


def test_the_first_convolution_has_the_base_channels_whatever_the_finest_multiplier() -> None:
    tokenizer = empty_tokenizer(TokenizerConfig(8, 4, 32, (2, 1, 3)))
    assert tokenizer.encoder.conv_in.out_channels == 32
    assert tokenizer.encoder.norm_out.num_channels == 96
    assert tokenizer.decoder.norm_out.num_channels == 64
