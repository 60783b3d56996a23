"""A widened nano computes what nano does, and its new parts learn."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from varedit_nano.model import NANO, load_nano
from varedit_nano.train_tokenizer import new_tokenizer, quantised_features
from varedit_nano.widen import widen, widened_tokenizer
from varedit_reference.config import TokenizerConfig
from varedit_reference.tokenizer import Tokenizer

NARROW = TokenizerConfig(bits=4, downsampling=4, channels=8, multipliers=(1, 1, 2), groups=4)
WIDE = replace(NARROW, bits=6, multipliers=(1, 2, 4))
GRIDS = ((1, 1), (4, 4))


@pytest.fixture
def narrow() -> Tokenizer:
    return new_tokenizer(NARROW, seed=0)


def widened(narrow: Tokenizer, noise: float) -> Tokenizer:
    wide = Tokenizer(WIDE)
    wide.load_state_dict(widened_tokenizer(narrow, WIDE, noise))
    return wide


def test_a_widened_tokenizer_decodes_the_same(narrow: Tokenizer) -> None:
    pictures = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    decoded: list[Tensor] = []
    for tokenizer in (narrow, widened(narrow, noise=0)):
        codes, _ = quantised_features(tokenizer.encode(pictures), GRIDS)
        decoded.append(tokenizer.decode(codes))
    torch.testing.assert_close(*decoded, rtol=0, atol=1e-5)


def test_copies_and_new_bits_learn_apart(narrow: Tokenizer) -> None:
    wide = widened(narrow, noise=0.1)
    codes = torch.randn(1, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.enable_grad():
        wide.decode(codes).square().mean().backward()
    inner = wide.get_parameter("decoder.middle.0.conv1.weight").grad
    new = wide.get_parameter("decoder.conv_in.weight").grad
    assert inner is not None and new is not None
    assert not torch.allclose(inner[0], inner[1])
    assert new[:, 4:].abs().min() > 0


def test_a_widened_nano_predicts_the_same_bits(tmp_path: Path) -> None:
    narrow = NANO.tokenizer.bits
    size = replace(NANO.tokenizer, bits=narrow + 8)
    nano = load_nano()
    widen(nano, size, tmp_path)
    wide = load_nano(tmp_path, tokenizer=size)
    generator = torch.Generator().manual_seed(0)
    text = [torch.randn(5, 128, generator=generator)]
    source = torch.randn(1, 256, narrow, generator=generator)
    logits: list[Tensor] = []
    for model, bits in ((nano, narrow), (wide, size.bits)):
        tokens = torch.zeros(1, 256, bits)
        tokens[..., :narrow] = source * (narrow / bits) ** 0.5
        condition = model.transformer.condition(text)
        inputs = [torch.zeros(1, n, bits) for n in model.config.transformer.lengths[1:]]
        (*_, last) = model.transformer(tokens, inputs, condition)
        logits.append(last)
    torch.testing.assert_close(logits[0], logits[1][..., :narrow, :], rtol=0, atol=1e-4)
    assert not logits[1][..., narrow:, :].any()
