"""What a transformer learns from pairs, and the edits that it makes meanwhile.

A pair is known by its tokens alone: neither the tokenizer nor the text encoder is trained. An
example is made of them for one step, with its own random mistakes (`teacher.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from varedit_export.training.teacher import LARGEST_FLIP_RATE, edit_losses, lesson
from varedit_reference.config import ModelConfig
from varedit_reference.quantisation import source_tokens
from varedit_reference.scale_loop import predict_scales, seeded
from varedit_reference.transformer import VAR

TEXT_DROPOUT = 0.1


@dataclass(frozen=True)
class PairTokens:
    """What the frozen parts make of a pair.

    source, target: the tokenizer's continuous features [d, h, w]. text: features of the
    instruction's tokens [T, text_channels].
    """

    source: Tensor
    target: Tensor
    text: Tensor


@dataclass(frozen=True)
class Example:
    """A pair as a step learns from it.

    source: tokens [S, c]. inputs: tokens of all scales but the first [L_2 + ... + L_K, c]. bits:
    those to predict [L_1 + ... + L_K, c]. text: [T, text_channels]. dropped: whether the text is
    replaced by the unconditional one. share: of the step's loss; those of a step are 1 together.
    """

    source: Tensor
    inputs: Tensor
    bits: Tensor
    text: Tensor
    dropped: bool
    share: float


def make_example(
    tokens: PairTokens, config: ModelConfig, share: float, generator: torch.Generator | None
) -> Example:
    """Make an example, with random mistakes and maybe without its text; exact without generator."""
    grids, patch = config.transformer.grids, config.tokenizer.patch
    source, target = tokens.source.float()[None], tokens.target.float()[None]
    chance = generator or torch.Generator()
    taught = lesson(target, grids, patch, chance, LARGEST_FLIP_RATE if generator else 0.0)
    return Example(
        source_tokens(source, grids, patch, config.transformer.conditioning)[0],
        torch.cat(taught.inputs, dim=1)[0],
        torch.cat(taught.bits, dim=1)[0],
        tokens.text,
        generator is not None and float(torch.rand((), generator=generator)) < TEXT_DROPOUT,
        share,
    )


class Learner(nn.Module):
    """A transformer, and what it computes in training."""

    def __init__(self, transformer: VAR, config: ModelConfig) -> None:
        super().__init__()
        self.transformer, self.config = transformer, config

    def forward(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Return the losses of examples, each multiplied by its share: "loss" and every scale's."""
        sizes = self.config.transformer
        text = self.transformer.condition([self._text(example) for example in examples])
        inputs = self._stacked([example.inputs for example in examples])
        bits = self._stacked([example.bits for example in examples])
        logits = self.transformer(
            self._stacked([example.source for example in examples]),
            inputs.split(sizes.lengths[1:], dim=1),
            text,
        )
        shares = torch.tensor([example.share for example in examples], device=bits.device)
        return edit_losses(logits, bits.split(sizes.lengths, dim=1), sizes.grids, shares)

    @torch.no_grad()
    def draw(self, pair: PairTokens, seed: int) -> Tensor:
        """Edit a pair's source; return the sum of codes [1, d, h, w], which can be decoded."""
        config, device = self.config, self._device
        features = pair.source[None].float().to(device)
        sizes = config.transformer
        source = source_tokens(features, sizes.grids, config.tokenizer.patch, sizes.conditioning)
        rows = self.transformer.text_rows([pair.text.to(device)], config.guidance_scale != 1)
        *_, last = predict_scales(
            self.transformer,
            config,
            source,
            self.transformer.condition(rows),
            seeded([seed]),
            config.guidance_scale,
            config.temperature,
        )
        return last.sum

    def recompute(self) -> None:
        """Keep of every block what it is given alone, and compute it again for its gradients."""
        for block in self.transformer.blocks:
            assert isinstance(block, nn.Module)
            again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
            block.forward = partial(again, block.forward)

    @property
    def _device(self) -> torch.device:
        return self.transformer.start_token.device

    def _text(self, example: Example) -> Tensor:
        # Both are read whichever is taken: all processes have to have the same gradients.
        unconditional = self.transformer.unconditional_text[: len(example.text)]
        dropped = torch.tensor(example.dropped, device=self._device)
        return torch.where(dropped, unconditional, example.text.float().to(self._device))

    def _stacked(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.stack([*tensors]).to(self._device, non_blocking=True)
