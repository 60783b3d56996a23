"""From logits to bits: temperature, guidance, nucleus, and a draw from supplied noise.

The noise is an argument rather than drawn inside, so that every backend draws the same bits.
"""

import torch
from torch import Tensor

NUCLEUS = 0.97  # top-p, over the two values of a bit
TIE = 1e-5  # distance in probability up to which rounding explains a differing bit


def guide(
    logits: Tensor, guidance_scale: float | Tensor, temperature: float | Tensor, guided: bool
) -> Tensor:
    """Divide logits [R, L, c, 2] by the temperature and guide them; return [B, L, c, 2].

    Classifier-free guidance: the first half of the rows is conditional, the second unconditional,
    and the result is g·conditional + (1-g)·unconditional. guidance_scale, temperature: a number, or
    one for each picture [B, 1, 1, 1].
    """
    if not guided:
        return logits.float() / temperature
    conditional, unconditional = (rows / temperature for rows in logits.float().chunk(2))
    return guidance_scale * conditional + (1 - guidance_scale) * unconditional


def bit_probability(logits: Tensor) -> Tensor:
    """Return P(bit = 1) before the nucleus, [B, L, c], for guided logits [B, L, c, 2]."""
    return logits.softmax(-1)[..., 1]


def nucleus(probability: Tensor) -> Tensor:
    """Round P(bit = 1) to 0 or 1 where the less likely value has a probability <= 0.03.

    This is top-p sampling with two values: at p = 0.975 the likelier one alone reaches 0.97.
    """
    less_likely = probability.minimum(1 - probability)
    return probability.where(less_likely > 1 - NUCLEUS, probability.round())


def distance_to_cut(probability: Tensor) -> Tensor:
    """Return the distance of P(bit = 1), before the nucleus, from where the nucleus rounds it."""
    less_likely = probability.minimum(1 - probability)
    return (less_likely - (1 - NUCLEUS)).abs()


def draw(probability: Tensor, noise: Tensor) -> Tensor:
    """Draw bits [B, L, c]: true where the uniform noise in [0, 1) is less than P(bit = 1)."""
    return noise < probability


def tie_margin(logits: Tensor, noise: Tensor) -> Tensor:
    """Return how far each bit is from being drawn otherwise, [B, L, c]; logits are [B, L, c, 2].

    This is the distance from P(bit = 1) to the noise or to the nucleus's cut, the nearer one. Where
    it is within rounding error, the same arithmetic in another order may draw the other bit.
    """
    probability = bit_probability(logits)
    return torch.minimum((noise - probability).abs(), distance_to_cut(probability))
