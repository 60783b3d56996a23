"""Temperature, guidance, nucleus, draw."""

import pytest
import torch

from varedit_reference.sampling import bit_probability, distance_to_cut, draw, guide, nucleus


def test_guidance_comes_after_the_temperature() -> None:
    logits = torch.tensor([[[[1.0, 2.0]]], [[[0.5, -1.0]]]])
    assert guide(logits, 3.0, 0.5, guided=True).flatten().tolist() == [4.0, 16.0]
    assert guide(logits, 3.0, 0.5, guided=False)[0].flatten().tolist() == [2.0, 4.0]


def test_the_nucleus_makes_rare_values_impossible() -> None:
    p = torch.tensor([0.0299, 0.0301, 0.5, 0.9699, 0.9701, 0.0, 1.0])
    assert nucleus(p).tolist() == pytest.approx([0, 0.0301, 0.5, 0.9699, 1, 0, 1])
    assert distance_to_cut(p[:2]).tolist() == pytest.approx([1e-4, 1e-4], abs=1e-7)


def test_probability_is_of_bit_1_and_draws_are_strictly_under_it() -> None:
    logits = torch.tensor([[0.0, 1.0]])
    assert bit_probability(logits).item() == pytest.approx(0.7310586)
    probability = torch.tensor([0.5, 0.5, 0.0, 1.0])
    noise = torch.tensor([0.5, 0.49, 0.0, 0.999])
    assert draw(probability, noise).tolist() == [False, True, False, True]
