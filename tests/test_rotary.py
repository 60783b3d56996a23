"""Rotary positions of both layouts, and the rotation itself."""

from dataclasses import replace

import torch
from small import small_config

from varedit_reference.config import preset
from varedit_reference.rotary import (
    full_rotation,
    scale_positions,
    scale_rotation,
    source_positions,
    source_rotation,
)


def test_released_positions_at_1024_are_what_the_rule_says() -> None:
    config = preset("tiny-2b", 1024).transformer
    assert source_positions(config)[[0, 65]].tolist() == [[64, 64], [65, 65]]
    for scale, (rows, columns) in enumerate(config.grids):
        expected = [
            [round(r * 64 / rows), round(c * 64 / columns)]
            for r in range(rows)
            for c in range(columns)
        ]
        assert scale_positions(config, scale).tolist() == expected


def test_released_positions_at_512_read_into_the_source_grid() -> None:
    config = preset("tiny-2b", 512).transformer
    source = source_positions(config)
    assert source[64].tolist() == [65, 64]  # 32 columns of tokens, but 64 of the table
    assert scale_positions(config, 0).tolist() == [[64 + 1024 // 64, 64]]
    assert scale_positions(config, 1)[0].tolist() == [64 + 1025 // 64, 64 + 1]


def test_released_positions_off_squares_use_their_own_table() -> None:
    config = preset("tiny-2b", 1024, "2:1").transformer
    rows, columns = config.finest
    assert source_positions(config)[0].tolist() == [rows, columns]
    assert scale_positions(config, 2)[-1].tolist() == [round(3 * rows / 4), round(columns / 2)]


def test_paper_positions() -> None:
    config = small_config(rotary="paper").transformer  # finest 16x16
    assert source_positions(config)[17].tolist() == [65, 65]
    assert scale_positions(config, 3)[7].tolist() == [2, 2]  # 6x6: steps of 16 // 6
    assert scale_positions(config, 1)[3].tolist() == [8, 8]


def test_full_conditioning_gives_every_source_scale_its_positions() -> None:
    paper = small_config(conditioning="full", rotary="paper").transformer
    released = replace(paper, rotary="released")
    for config in (paper, released):
        scales = [scale_positions(config, k) + 64 for k in range(7)]
        assert torch.equal(source_positions(config), torch.cat(scales))


def test_rotation_turns_row_pairs_by_row_and_column_pairs_by_column() -> None:
    config = small_config(rotary="paper").transformer  # heads of width 32: 8 + 8 pairs
    rotate = scale_rotation(config, 1, torch.device("cpu"))  # (0,0) (0,8) (8,0) (8,8)
    x = torch.randn(1, 1, 4, 32, generator=torch.Generator().manual_seed(0))
    y = rotate(x)
    torch.testing.assert_close(y[0, 0, 0], x[0, 0, 0])
    torch.testing.assert_close(y[0, 0, 1, :16], x[0, 0, 1, :16])
    torch.testing.assert_close(y[0, 0, 2, 16:], x[0, 0, 2, 16:])
    angle = torch.tensor(8 * 10000 ** (-2 * 3 / 16))  # pair 3 of the row's, at row 8
    pair = torch.view_as_complex(x[0, 0, 2, 6:8].contiguous())
    turned = torch.view_as_real(pair * torch.polar(torch.tensor(1.0), angle))
    torch.testing.assert_close(y[0, 0, 2, 6:8], turned, atol=1e-6, rtol=0)


def test_the_whole_sequence_is_the_source_then_the_scales() -> None:
    config, device = small_config().transformer, torch.device("cpu")
    parts = [source_rotation(config, device)]
    parts += [scale_rotation(config, k, device) for k in range(7)]
    assert torch.equal(full_rotation(config, device).cos, torch.cat([p.cos for p in parts]))
    assert torch.equal(full_rotation(config, device).sin, torch.cat([p.sin for p in parts]))


def test_tables_made_in_inference_mode_can_be_trained_with() -> None:
    config = small_config("tiny-8b", rotary="paper").transformer
    with torch.inference_mode():
        rotate = scale_rotation(config, 2, torch.device("cpu"))
    with torch.enable_grad():
        x = torch.randn(1, 1, 16, 32, requires_grad=True)
        rotate(x).sum().backward()
    assert x.grad is not None
