"""The autoregressive loop over scales: the heart of an edit."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from varedit_reference.config import ModelConfig
from varedit_reference.quantisation import add_scale, from_tokens, next_tokens, positions
from varedit_reference.sampling import bit_probability, draw, guide, nucleus
from varedit_reference.transformer import VAR, TextCondition
from varedit_runtime.noise import uniform_noise
from varedit_runtime.settings import PerScale, per_scale, temperature_per_scale

# (scale, chance of bit 1 [B, L, c]) -> bits [B, L, c]
ChooseBits = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class PredictedScale:
    """One turn of the loop.

    tokens [B, L, c]: the input, None for the first scale. logits [B, L, c, 2]: guided.
    probability, bits [B, L, c]: the chance of bit 1 after the nucleus, and what was chosen.
    sum [B, d, h_K, w_K]: the running sum of codes, up to and with this scale.
    """

    scale: int
    tokens: Tensor | None
    logits: Tensor
    probability: Tensor
    bits: Tensor
    sum: Tensor


def predict_scales(
    model: VAR,
    config: ModelConfig,
    source_tokens: Tensor,
    text: TextCondition,
    choose: ChooseBits,
    guidance_scale: PerScale,
    temperature: PerScale,
) -> Iterator[PredictedScale]:
    """Predict an edit coarse to fine; a caller may look at every scale, or stop.

    source_tokens [B, S, c]; text has B rows, or 2B with guidance; guidance_scale and temperature
    are numbers or one per scale. Raises ConfigError on another count, and on a temperature that is
    not over 0.
    """
    grids, patch = config.transformer.grids, config.tokenizer.patch
    guidance = per_scale(guidance_scale, len(grids), "guidance_scale")
    temperatures = temperature_per_scale(temperature, len(grids))
    pictures = len(source_tokens)
    guided = len(text.pooled) == 2 * pictures
    total = source_tokens.new_zeros(
        (pictures, config.tokenizer.bits, *positions(grids[-1], patch)), dtype=torch.float32
    )
    cache = model.prefill(source_tokens, text)
    for k, grid in enumerate(grids):
        tokens = None if k == 0 else next_tokens(total, grid, patch)
        logits = guide(model.predict(k, tokens, text, cache), guidance[k], temperatures[k], guided)
        probability = nucleus(bit_probability(logits))
        bits = choose(k, probability)
        total = add_scale(total, from_tokens(bits, grid, patch))
        yield PredictedScale(k, tokens, logits, probability, bits, total)


def seeded(seeds: Sequence[int]) -> ChooseBits:
    """Draw every picture's bits from the noise of its own seed, whatever the batch."""

    def choose(scale: int, probability: Tensor) -> Tensor:
        _, tokens, channels = probability.shape
        noise = [torch.from_numpy(uniform_noise(s, scale, tokens, channels)) for s in seeds]
        return draw(probability, torch.stack(noise).to(probability.device))

    return choose


def forced(bits: Sequence[Tensor]) -> ChooseBits:
    """Take given bits [B, L_k, c] in place of drawing: teacher forcing."""
    return lambda scale, probability: bits[scale].to(probability.device)
