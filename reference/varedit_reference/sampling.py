"""From logits to bits: temperature, guidance, nucleus, and a draw from supplied noise."""

from torch import Tensor

NUCLEUS = 0.97


def guide(logits: Tensor, guidance_scale: float, temperature: float, guided: bool) -> Tensor:
    """Logits [R, L, c, 2] -> [B, L, c, 2]: divided by the temperature, then guided.

    With guidance the first half of the rows is conditional, the second unconditional, and the
    result is g·conditional + (1-g)·unconditional.
    """
    logits = logits.float() / temperature
    if not guided:
        return logits
    conditional, unconditional = logits.chunk(2)
    return guidance_scale * conditional + (1 - guidance_scale) * unconditional


def bit_probability(logits: Tensor) -> Tensor:
    """Guided logits [B, L, c, 2] -> the chance of bit 1 before the nucleus, [B, L, c]."""
    return logits.softmax(-1)[..., 1]


def nucleus(probability: Tensor) -> Tensor:
    """Make certain every bit whose less likely value has a chance of at most 0.03."""
    less_likely = probability.minimum(1 - probability)
    return probability.where(less_likely > 1 - NUCLEUS, probability.round())


def distance_to_cut(probability: Tensor) -> Tensor:
    """How far the chance of bit 1, before the nucleus, is from where the nucleus decides."""
    less_likely = probability.minimum(1 - probability)
    return (less_likely - (1 - NUCLEUS)).abs()


def draw(probability: Tensor, noise: Tensor) -> Tensor:
    """Bits [B, L, c]: 1 where the uniform noise in [0, 1) lies under the chance of bit 1."""
    return noise < probability
