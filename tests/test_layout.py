"""Weights as graphs use them."""

import torch
import torch.nn.functional as F
from small import random_var, small_config
from transformers.models.t5.modeling_t5 import T5Attention

from varedit_export.graphs.layout import Restored, make_weight, transformer_layout
from varedit_export.graphs.text import relative_buckets
from varedit_reference.config import TextEncoderConfig
from varedit_runtime.geometry import area_matrix, bilinear_matrix


def test_the_layout_uses_every_parameter_once_and_is_undone() -> None:
    config = small_config("tiny-8b").transformer
    state = random_var(small_config("tiny-8b")).state_dict()
    layout = transformer_layout(config)
    used = [source for weight in layout.values() for source in weight.sources]
    assert sorted(used) == sorted(state)
    made = {name: make_weight(weight, state, torch.float32) for name, weight in layout.items()}
    restored = Restored(layout, made)
    assert restored.keys() == state.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(restored[name], tensor, atol=1e-6, rtol=1e-6)


def test_heads_in_halves_keep_their_products() -> None:
    config = small_config().transformer
    state = random_var(small_config()).state_dict()
    name = "blocks.0.qkv.weight"
    made = make_weight(transformer_layout(config)[name], state, torch.float32)
    x = torch.randn(5, config.width)
    q, k, _ = (x @ made).unflatten(1, (3, config.heads, -1)).unbind(1)
    plain = x @ state["blocks.0.self_attention.qkv.weight"].T
    q_plain, k_plain, _ = plain.unflatten(1, (3, config.heads, -1)).unbind(1)
    torch.testing.assert_close(
        (q * k.flip(0)).sum(-1), (q_plain * k_plain.flip(0)).sum(-1), atol=1e-4, rtol=1e-4
    )
    assert not torch.equal(q, q_plain)


def test_bilinear_matrices_resize_as_torch_does() -> None:
    for size, size_in in ((16, 6), (6, 16), (32, 12), (1, 8), (8, 1), (5, 5), (24, 32)):
        x = torch.randn(1, 1, size_in, size_in)
        matrix = torch.from_numpy(bilinear_matrix(size, size_in))
        expected = F.interpolate(x, (size, size), mode="bilinear", align_corners=False)
        torch.testing.assert_close(matrix @ x @ matrix.T, expected, atol=1e-6, rtol=0)


def test_area_matrices_pool_as_torch_does() -> None:
    for size, size_in in ((1, 16), (6, 16), (12, 16), (16, 16), (9, 32), (24, 32)):
        x = torch.randn(1, 1, size_in, size_in)
        matrix = torch.from_numpy(area_matrix(size, size_in))
        expected = F.adaptive_avg_pool2d(x, (size, size))
        torch.testing.assert_close(matrix @ x @ matrix.T, expected, atol=1e-6, rtol=0)


def test_relative_positions_are_bucketed_as_in_t5() -> None:
    config = TextEncoderConfig(384, 128, 64, 2, 256, 2, 32, 128, 1e-6)
    places = torch.arange(200)
    expected = T5Attention._relative_position_bucket(places - places[:, None], True, 32, 128)
    assert torch.equal(relative_buckets(200, config), expected)
