"""The autoregressive loop over scales: the heart of an edit.

For each scale k, coarse to fine, with the running sum of codes F_0 = 0:

    logits = guide(transformer(tokens_k, source, text, scales before))  all h_k·w_k tokens at once
    bits   = noise < nucleus(P(bit = 1))                                each bit independently
    F_k    = F_(k-1) + up(code(bits)),   tokens_(k+1) = down(F_k)

tokens_1 is absent: the first scale starts from the text. The next input is made from F, the whole
picture so far, and not from the scale's bits alone; so a scale can repair what earlier ones drew.
"""

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

# (scale, P(bit = 1) [B, L, c]) -> bits [B, L, c]
ChooseBits = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class PredictedScale:
    """One turn of the loop.

    scale: from 0, the coarsest. tokens [B, L, c]: the input, None for the first scale.
    logits [B, L, c, 2]: after temperature and guidance. probability [B, L, c]: P(bit = 1) after
    the nucleus. bits [B, L, c]: those chosen. sum [B, d, h_K, w_K]: F_k, which can be decoded.
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
    """Predict an edit coarse to fine, yielding every scale: a caller may preview, or stop.

    source_tokens: [B, S, c]. text: of B rows, or 2B with guidance. guidance_scale, temperature: one
    number, or one per scale. Raises ConfigError on another count, or a temperature <= 0.
    """
    grids, patch = config.transformer.grids, config.tokenizer.patch
    guidance = per_scale(guidance_scale, len(grids), "guidance_scale")
    temperatures = temperature_per_scale(temperature, len(grids))
    pictures = len(source_tokens)
    guided = len(text.pooled) == 2 * pictures  # the second half of the rows is unconditional
    total = source_tokens.new_zeros(
        (pictures, config.tokenizer.bits, *positions(grids[-1], patch)), dtype=torch.float32
    )
    cache = model.prefill(source_tokens, text)  # the source is computed once, for all scales
    for k, grid in enumerate(grids):
        tokens = None if k == 0 else next_tokens(total, grid, patch)
        logits = guide(model.predict(k, tokens, text, cache), guidance[k], temperatures[k], guided)
        probability = nucleus(bit_probability(logits))
        bits = choose(k, probability)
        total = add_scale(total, from_tokens(bits, grid, patch))
        yield PredictedScale(k, tokens, logits, probability, bits, total)


def seeded(seeds: Sequence[int]) -> ChooseBits:
    """Draw each picture's bits from its own seed, so that they do not depend on the batch."""

    def choose(scale: int, probability: Tensor) -> Tensor:
        _, tokens, channels = probability.shape
        noise = [torch.from_numpy(uniform_noise(s, scale, tokens, channels)) for s in seeds]
        return draw(probability, torch.stack(noise).to(probability.device))

    return choose


def forced(bits: Sequence[Tensor]) -> ChooseBits:
    """Take given bits [B, L_k, c] instead of drawing (teacher forcing)."""
    return lambda scale, probability: bits[scale].to(probability.device)
