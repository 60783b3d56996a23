"""The edit that two runs are compared on: what every stage is given, random but always the same.

No stage is given what an earlier one computed, so that an error is found where it is made: the
transformer reads random text features and source tokens, the image decoder a random sum. Scales are
an exception that teacher forcing mends. A scale reads what the ones before it drew, and one flipped
bit changes all later scales; so a run is forced to go on from the bits of the run that it is
compared with (`compare.py`). Noise comes from a seed, as in every edit.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from varedit_export.errors import ParityError
from varedit_reference.config import ModelConfig
from varedit_reference.quantisation import positions
from varedit_reference.scale_loop import PredictedScale
from varedit_runtime.backends.base import Sampling
from varedit_runtime.backends.wiring import DECODER, ENCODER, PICTURES, TEXT
from varedit_runtime.geometry import source_grid
from varedit_runtime.grids import scale_grids
from varedit_runtime.manifest import Variant
from varedit_runtime.noise import uniform_noise


@dataclass(frozen=True)
class ComparedEdit:
    """What the transformer reads, for one picture: a batch repeats it.

    text, negative: features [T, text] of the real tokens, negative None for the model's own.
    source: tokens [1, h, w, c] as the prefill takes them. guidance, temperature: one per scale.
    seed: of the noise.
    """

    text: Tensor
    negative: Tensor | None
    source: Tensor
    guidance: Sequence[float]
    temperature: Sequence[float]
    seed: int

    @property
    def guided(self) -> bool:
        """Whether unconditional rows are computed: at all scales, or at none."""
        return any(scale != 1 for scale in self.guidance)

    @property
    def without_guidance(self) -> "ComparedEdit":
        """Return the same edit with conditional rows only."""
        return replace(self, guidance=[1.0] * len(self.guidance))


def with_grids(variant: Variant, config: ModelConfig) -> ModelConfig:
    """Give a model's config a variant's grids."""
    transformer = replace(
        config.transformer,
        grids=variant.grids,
        table_grids=scale_grids(1024, variant.aspect),
    )
    return replace(config, transformer=transformer)


def random_edit(variant: Variant, config: ModelConfig) -> ComparedEdit:
    """Make up what the transformer reads; half of the text tokens are padding."""
    generator = torch.Generator().manual_seed(0)
    transformer, scales = config.transformer, len(config.transformer.grids)
    grid = source_grid(transformer.grids, transformer.conditioning)
    shape = (1, *grid, transformer.token_channels)
    guidance = config.guidance_scale if variant.guided else 1.0
    return ComparedEdit(
        torch.randn(variant.text_tokens // 2, transformer.text_channels, generator=generator),
        None,
        torch.randn(shape, generator=generator) / transformer.token_channels**0.5,
        [guidance] * scales,
        [config.temperature] * scales,
        seed=1,
    )


def random_coder_inputs(
    variant: Variant, config: ModelConfig, vocabulary: int | None
) -> dict[str, tuple[np.ndarray, ...]]:
    """Make up what the coders read, by stage: the arguments of the backend's method.

    vocabulary: how many token ids there are; None leaves out the text encoder. Half of its tokens
    are padding.
    """
    generator = torch.Generator().manual_seed(3)
    pictures = torch.rand((variant.batch, 3, *variant.picture), generator=generator) * 2 - 1
    bits, grid = config.tokenizer.bits, positions(variant.grids[-1], config.tokenizer.patch)
    total = torch.randn((variant.batch, bits, *grid), generator=generator) / bits**0.5
    inputs: dict[str, tuple[np.ndarray, ...]] = {
        ENCODER: (pictures.numpy(),),
        DECODER: (total.numpy(),),
    }
    if vocabulary is not None:
        shape = (variant.batch, variant.text_tokens)
        generator = torch.Generator().manual_seed(2)
        ids = torch.randint(3, vocabulary, shape, generator=generator)
        mask = np.arange(shape[1]) < max(shape[1] // 2, 1)
        inputs[TEXT] = ids.numpy(), np.repeat(mask[None], variant.batch, 0)
    return inputs


def text_arrays(variant: Variant, edit: ComparedEdit) -> dict[str, np.ndarray]:
    """Return the inputs of `Backend.condition`, the text padded to the variant's tokens."""
    features, mask = _padded(variant, edit.text)
    if not (variant.guided and edit.guided):
        return {"text_features": features, "text_mask": mask}
    negative, negative_mask = features, mask
    if edit.negative is not None:
        negative, negative_mask = _padded(variant, edit.negative)
    learned = edit.negative is None
    return {
        "text_features": np.concatenate((features, negative)),
        "text_mask": np.concatenate((mask, negative_mask)),
        "learned": np.repeat((False, learned), variant.batch),
    }


def _padded(variant: Variant, text: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return a text as features [B, T, text] and mask [B, T]."""
    if len(text) > variant.text_tokens:
        raise ParityError(
            f"the text has {len(text)} tokens and the bundle takes {variant.text_tokens}: build it "
            "with a larger --text-tokens"
        )
    features = np.zeros((variant.batch, variant.text_tokens, text.shape[1]), np.float32)
    features[:, : len(text)] = text.numpy()
    mask = np.zeros(features.shape[:2], np.bool_)
    mask[:, : len(text)] = True
    return features, mask


def source_array(variant: Variant, edit: ComparedEdit) -> np.ndarray:
    """Return the source tokens [B, h, w, c], as `Backend.prefill` takes them."""
    return np.repeat(edit.source.numpy(), variant.batch, 0)


def scale_sampling(
    variant: Variant,
    edit: ComparedEdit,
    scale: int,
    forced: np.ndarray | None = None,
    half: bool = False,
) -> Sampling:
    """Say how a scale's bits are chosen.

    forced: bits [B, h, w, c] that are taken instead of being drawn; half: only every other one.
    """
    grid, channels = variant.grids[scale], edit.source.shape[-1]
    noise = uniform_noise(edit.seed, scale, grid[0] * grid[1], channels)
    noise = _as_batch(variant, grid, noise)
    drawn = Sampling(noise, edit.guidance[scale], edit.temperature[scale], guided=edit.guided)
    if forced is None:
        return drawn
    mask = np.ones((*grid, channels), np.bool_)
    if half:
        mask.reshape(-1)[1::2] = False
    return replace(drawn, forced_bits=forced, forced_mask=_as_batch(variant, grid, mask[None]))


def scale_arrays(
    variant: Variant, edit: ComparedEdit, steps: Sequence[PredictedScale], index: int
) -> dict[str, np.ndarray]:
    """Return what a scale's graph reads besides the text and the past.

    steps: the edit as the reference predicts it, of which the scale takes its input and half of
    its bits.
    """
    step, grid = steps[index], variant.grids[index]
    bits = _as_batch(variant, grid, step.bits.numpy())
    chosen = scale_sampling(variant, edit, index, bits, half=True)
    arrays = {
        "noise": chosen.noise,
        "forced_bits": bits,
        "forced_mask": chosen.forced_mask,
        "guidance_scale": np.full(variant.batch, chosen.guidance_scale, np.float32),
        "temperature": np.full(variant.batch, chosen.temperature, np.float32),
        PICTURES: np.tile(np.arange(variant.batch), 2 if edit.guided else 1),
    }
    if step.tokens is not None:
        arrays["tokens"] = _as_batch(variant, grid, step.tokens.numpy())
        arrays["running_sum"] = np.repeat(steps[index - 1].sum.numpy(), variant.batch, 0)
    return arrays


def _as_batch(variant: Variant, grid: tuple[int, int], one: np.ndarray) -> np.ndarray:
    """Lay one picture's tokens [1, L, c] out on their grid, and repeat them: [B, h, w, c]."""
    return np.repeat(one.reshape(1, *grid, -1), variant.batch, 0)
