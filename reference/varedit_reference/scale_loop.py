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
from varedit_runtime.values import PerScale, per_scale, temperature_per_scale

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
    scales = len(config.transformer.grids)
    guidance = per_scale(guidance_scale, scales, "guidance_scale")
    temperatures = temperature_per_scale(temperature, scales)
    loop = ScaleLoop(model, config, source_tokens, text)
    for k in range(scales):
        yield loop.predict(k, choose, guidance[k], temperatures[k])


class ScaleLoop:
    """An edit whose source has been read, predicted one scale after the other."""

    def __init__(
        self, model: VAR, config: ModelConfig, source_tokens: Tensor, text: TextCondition
    ) -> None:
        """Run the prefill. source_tokens, text: as `predict_scales` takes them."""
        self._model, self._config, self._text = model, config, text
        pictures, patch = len(source_tokens), config.tokenizer.patch
        self._guided = len(text.pooled) == 2 * pictures
        shape = (pictures, config.tokenizer.bits, *positions(config.transformer.grids[-1], patch))
        self._sums = [source_tokens.new_zeros(shape, dtype=torch.float32)]  # before every scale
        self._cache = model.prefill(source_tokens, text)
        self._rows = torch.empty(0)  # the logits of the scale predicted last, as the model has them

    def predict(
        self,
        scale: int,
        choose: ChooseBits,
        guidance_scale: float | Tensor,
        temperature: float | Tensor,
    ) -> PredictedScale:
        """Predict the next scale, or the last one again with other bits.

        guidance_scale, temperature: as `guide` takes them.
        """
        grid, patch = self._config.transformer.grids[scale], self._config.tokenizer.patch
        total = self._sums[scale]
        tokens = None if scale == 0 else next_tokens(total, grid, patch)
        if scale == self._cache.scales_seen:
            self._rows = self._model.predict(scale, tokens, self._text, self._cache)
        logits = guide(self._rows, guidance_scale, temperature, self._guided)
        probability = nucleus(bit_probability(logits))
        bits = choose(scale, probability)
        after = add_scale(total, from_tokens(bits, grid, patch))
        self._sums[scale + 1 :] = [after]
        return PredictedScale(scale, tokens, logits, probability, bits, after)


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
