"""Sizes and presets."""

from dataclasses import replace

import pytest

from varedit_reference.config import PRESETS, TokenizerConfig, preset
from varedit_runtime.errors import ConfigError
from varedit_runtime.grids import RESOLUTIONS


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_every_preset_draws_pictures_of_its_resolution(name: str, resolution: int) -> None:
    config = preset(name, resolution)
    assert config.picture_size == (resolution, resolution)
    assert len(config.transformer.grids) == RESOLUTIONS[resolution]


def test_released_sizes() -> None:
    two, eight = preset("2b"), preset("8b")
    assert (two.transformer.depth, two.transformer.width, two.transformer.heads) == (32, 2048, 16)
    assert (eight.transformer.depth, eight.transformer.width) == (40, 3584)
    assert two.transformer.head_width == eight.transformer.head_width == 128
    assert (two.transformer.mlp_width, eight.transformer.mlp_width) == (8192, 14336)
    assert (two.tokenizer.token_channels, eight.tokenizer.token_channels) == (32, 56)
    assert preset("tiny-8b").transformer.mlp_width == 512  # 384: halfway, to even


def test_other_aspect_ratios_are_reachable_by_name() -> None:
    config = preset("2b", 1024, "3:2")
    assert config.picture_size == (78 * 16, 52 * 16)
    assert preset("2b", 1024, "2:3").picture_size == (52 * 16, 78 * 16)


def test_unknown_names_say_what_exists() -> None:
    with pytest.raises(ConfigError, match=r"3b.*2b, 8b"):
        preset("3b")
    with pytest.raises(ConfigError, match="256"):
        preset("2b", 300)
    with pytest.raises(ConfigError, match="1:1"):
        preset("2b", 256, "7:1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "head width"),
        ({"heads": 0}, "heads 0 .* at least 1"),
        ({"depth": 0}, "depth 0, .* at least 1"),
        ({"text_channels": 0}, "text_channels 0 must all be at least 1"),
        ({"table_grids": ((1, 1), (8, 8))}, "table_grids give 129 positions"),
        ({"table_grids": ()}, "table_grids give 0 positions"),
        ({"text_channels": 100}, "text pool"),
        ({"grids": ()}, "scales"),
        ({"width": 16, "heads": 1, "text_channels": 128}, "too small"),
    ],
)
def test_impossible_transformers_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(preset("tiny-2b").transformer, **change)  # type: ignore[arg-type]


def test_impossible_tokenizers_are_refused() -> None:
    with pytest.raises(ConfigError, match="downsamples by 8"):
        TokenizerConfig(8, 16, 32, (1, 1, 1, 2))
    with pytest.raises(ConfigError, match="groups"):
        TokenizerConfig(8, 8, 30, (1, 1, 1, 2))
    with pytest.raises(ConfigError, match="groups"):
        TokenizerConfig(8, 8, 0, (1, 1, 1, 2))
    with pytest.raises(ConfigError, match="bits is 0; a tokenizer has 1 to 256"):
        TokenizerConfig(0, 8, 32, (1, 1, 1, 2))
    with pytest.raises(ConfigError, match="bits a token"):
        replace(preset("tiny-2b"), tokenizer=preset("tiny-8b").tokenizer)
