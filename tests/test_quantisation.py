"""Bits, codes, scales and tokens."""

from collections.abc import Sequence

import pytest
import torch
from small import small_config

from varedit_reference.quantisation import (
    add_scale,
    from_tokens,
    next_tokens,
    positions,
    quantise,
    resize,
    source_tokens,
    to_bits,
    to_codes,
    to_tokens,
)


def features(channels: int = 8, side: int = 16) -> torch.Tensor:
    return torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(1))


def dequantise(bits: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the sum of all scales' codes [B, d, h_K, w_K]."""
    total = to_codes(bits[-1]).new_zeros(bits[-1].shape)
    for scale in bits:
        total = add_scale(total, scale)
    return total


def test_codes_are_the_nearest_corners_of_the_sphere() -> None:
    x = features()
    codes = to_codes(to_bits(x))
    torch.testing.assert_close(codes.norm(dim=1), torch.ones(2, 16, 16))
    assert torch.equal(codes > 0, x > 0)
    assert not to_bits(torch.zeros(1, 8, 1, 1)).any()


def test_multi_scale_bits_sum_to_what_the_inverse_gives() -> None:
    x = features()
    steps = list(quantise(x, small_config().transformer.grids))
    assert torch.equal(dequantise([step.bits for step in steps]), steps[-1].sum)
    errors = [(x - step.sum).square().mean().item() for step in steps]
    assert errors[-1] < errors[0]


def test_each_residual_is_what_the_scales_before_left() -> None:
    x = features()
    steps = list(quantise(x, [(1, 1), (4, 4), (16, 16)]))
    torch.testing.assert_close(steps[0].residual[:, :, 0, 0], x.mean((2, 3)))
    torch.testing.assert_close(steps[2].residual, x - steps[1].sum)


def test_given_bits_replace_those_of_the_residual() -> None:
    x = features()
    flipped = [~step.bits for step in quantise(x, [(1, 1), (4, 4), (16, 16)])]
    steps = list(quantise(x, [(1, 1), (4, 4), (16, 16)], flipped))
    assert torch.equal(steps[-1].sum, dequantise(flipped))


@pytest.mark.parametrize("patch", [1, 2])
def test_tokens_are_row_major_and_invert(patch: int) -> None:
    x = features(4)
    tokens = to_tokens(x, patch)
    assert tokens.shape == (2, (16 // patch) ** 2, 4 * patch**2)
    assert torch.equal(from_tokens(tokens, (16 // patch, 16 // patch), patch), x)
    if patch == 2:  # channel 4·i + 2·row + column of the second token of the first row
        assert torch.equal(tokens[0, 1, 4 * 3 + 2 * 1 + 0], x[0, 3, 1, 2])


def test_resizing_down_has_no_antialias() -> None:
    x = features()
    expected = (x[:, :, 7:9:1, 7:9].mean((2, 3), keepdim=True)).squeeze()
    torch.testing.assert_close(resize(x, (1, 1)).squeeze(), expected)
    assert torch.equal(next_tokens(x, (16, 16), 1), to_tokens(x, 1))


def test_source_tokens_of_every_conditioning() -> None:
    x, grids = features(), small_config().transformer.grids
    assert torch.equal(source_tokens(x, grids, 1, "sar"), to_tokens(x, 1))
    assert torch.equal(source_tokens(x, grids, 1, "finest"), to_tokens(x, 1))
    full = source_tokens(x, grids, 1, "full")
    assert full.shape[1] == sum(rows * columns for rows, columns in grids)
    torch.testing.assert_close(full[:, 0], x.mean((2, 3)))
    assert positions((3, 5), 2) == (6, 10)
