"""One edit that graphs and the reference are both driven through, and the measures of agreement.

One flipped bit changes all later scales, so every scale is given the reference's own input and
bits. Bits are drawn from the same noise and must be equal, but for ties.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from varedit_export.errors import ParityError
from varedit_reference.agreement import TIE, tie_margin
from varedit_reference.checkpoint import empty_tokenizer
from varedit_reference.config import ModelConfig
from varedit_reference.scale_loop import PredictedScale, forced, predict_scales, seeded
from varedit_reference.tokenizer import Tokenizer
from varedit_reference.transformer import VAR
from varedit_runtime.backends.base import Backend, Sampling
from varedit_runtime.grids import scale_grids
from varedit_runtime.manifest import ParityLine, Variant
from varedit_runtime.noise import uniform_noise

# fp32 arithmetic in another order; a wrong formula differs by far more.
FEATURES, LOGITS, SUMS = 1e-3, 1e-3, 1e-4
# Bits that may differ when products are rounded to 16 bits; the first scales have few, of which a
# single one would be more.
ROUNDED_SHARE, ROUNDED_BITS = 0.02, 2


@dataclass(frozen=True)
class Edit:
    """One edit to compare: what the transformer reads, and how bits are chosen.

    text and negative [T, text]; source [1, S, c]; guidance and temperature one per scale; bits
    [1, L, c] per scale are forced where given, else drawn with the seed.
    """

    text: Tensor
    negative: Tensor | None
    source: Tensor
    guidance: Sequence[float]
    temperature: Sequence[float]
    bits: Sequence[Tensor] | None
    seed: int


def config_of(variant: Variant, config: ModelConfig) -> ModelConfig:
    """A model's config with a variant's grids."""
    transformer = replace(
        config.transformer,
        grids=variant.grids,
        table_grids=scale_grids(1024, variant.aspect),
    )
    return replace(config, transformer=transformer)


def tokenizer_of(config: ModelConfig, state: Mapping[str, Tensor]) -> Tokenizer:
    """The reference's tokenizer, fp32, of weights by its own names."""
    tokenizer = empty_tokenizer(config.tokenizer)
    names = tokenizer.state_dict()
    tokenizer.load_state_dict({name: state[name].float() for name in names}, assign=True)
    return tokenizer.eval()


def random_edit(variant: Variant, config: ModelConfig) -> Edit:
    generator = torch.Generator().manual_seed(0)
    transformer, scales = config.transformer, len(config.transformer.grids)
    shape = (1, transformer.lengths[-1], transformer.token_channels)
    guidance = config.guidance_scale if variant.guided else 1.0
    return Edit(
        torch.randn(variant.text_tokens // 2, transformer.text_channels, generator=generator),
        None,
        torch.randn(shape, generator=generator) / transformer.token_channels**0.5,
        [guidance] * scales,
        [config.temperature] * scales,
        None,
        seed=1,
    )


def run_reference(model: VAR, config: ModelConfig, edit: Edit) -> list[PredictedScale]:
    guided = any(g != 1 for g in edit.guidance)
    negative = None if edit.negative is None else [edit.negative]
    text = model.condition(model.text_rows([edit.text], guided, negative))
    choose = seeded([edit.seed]) if edit.bits is None else forced(edit.bits)
    steps = predict_scales(
        model, config, edit.source, text, choose, edit.guidance, edit.temperature
    )
    return list(steps)


def text_arrays(variant: Variant, edit: Edit) -> dict[str, np.ndarray]:
    features, mask = _padded(edit.text, variant)
    arrays = {"text_features": features, "text_mask": mask}
    if variant.guided:
        negative, negative_mask = _padded(
            edit.text[:1] if edit.negative is None else edit.negative, variant
        )
        has_negative = np.full(variant.batch, edit.negative is not None)
        arrays |= {"negative_features": negative, "negative_mask": negative_mask}
        arrays["has_negative"] = has_negative
    return arrays


def _padded(text: Tensor, variant: Variant) -> tuple[np.ndarray, np.ndarray]:
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


def scale_arrays(
    variant: Variant, edit: Edit, steps: Sequence[PredictedScale], index: int
) -> dict[str, np.ndarray]:
    """What a scale's graph reads besides the text and the past; half of the bits are forced."""
    step, shape = steps[index], (1, *variant.grids[index], -1)
    mask = torch.arange(step.bits.numel()).reshape(step.bits.shape) % 2 == 0
    one = {
        "noise": noise_of(edit, step).numpy().reshape(shape),
        "forced_bits": step.bits.numpy().reshape(shape),
        "forced_mask": mask.numpy().reshape(shape),
    }
    if step.tokens is not None:
        one["tokens"] = step.tokens.numpy().reshape(shape)
        one["running_sum"] = steps[index - 1].sum.numpy()
    return {
        **{name: np.repeat(array, variant.batch, 0) for name, array in one.items()},
        "guidance_scale": np.array([edit.guidance[index]], np.float32),
        "temperature": np.array([edit.temperature[index]], np.float32),
    }


def source_array(variant: Variant, edit: Edit) -> np.ndarray:
    source = edit.source.numpy().reshape(1, *variant.grids[-1], -1)
    return np.repeat(source, variant.batch, 0)


def begin(backend: Backend, variant: Variant, edit: Edit) -> None:
    """An edit up to its first scale."""
    backend.condition(text_arrays(variant, edit))
    backend.prefill(source_array(variant, edit))


def sampling(variant: Variant, edit: Edit, scale: int, forced: Tensor | None = None) -> Sampling:
    """How a backend draws a scale's bits; forced: those [.., c] that it takes instead."""
    rows, columns = variant.grids[scale]
    channels = edit.source.shape[-1]
    noise = uniform_noise(edit.seed, scale, rows * columns, channels)
    shape = (variant.batch, rows, columns, channels)
    noise = np.broadcast_to(noise.reshape(shape[1:]), shape)
    guidance, temperature = edit.guidance[scale], edit.temperature[scale]
    if forced is None:
        return Sampling(noise, guidance, temperature)
    bits = np.broadcast_to(forced.numpy().reshape(shape[1:]), shape)
    return Sampling(noise, guidance, temperature, bits, np.ones(shape, np.bool_))


def noise_of(edit: Edit, step: PredictedScale) -> Tensor:
    """The noise that the reference drew a scale's bits from."""
    _, tokens, channels = step.bits.shape
    return torch.from_numpy(uniform_noise(edit.seed, step.scale, tokens, channels))[None]


def bits_line(
    stage: str, bits: np.ndarray, step: PredictedScale, noise: Tensor, exact: bool
) -> ParityLine:
    differs = torch.from_numpy(bits) != step.bits
    if exact:
        wrong = differs & (tie_margin(step.logits, noise) > TIE)
        return ParityLine(stage, "bits that differ and are no ties", float(wrong.sum()), 0.0)
    return share_line(stage, "share of bits that differ, computed in fp32", differs)


def share_line(stage: str, measure: str, differs: Tensor) -> ParityLine:
    """The share of bits that rounding to 16 bits changed."""
    tolerance = max(ROUNDED_SHARE, ROUNDED_BITS / differs.numel())
    return ParityLine(stage, measure, differs.float().mean().item(), tolerance)


def picture_lines(picture: np.ndarray, expected: np.ndarray) -> Iterator[ParityLine]:
    difference = np.abs(picture.astype(np.int16) - expected.astype(np.int16))
    yield ParityLine("image_decoder", "picture, levels", float(difference.max()), 1.0)
    share = float((difference > 0).mean())
    yield ParityLine("image_decoder", "picture, share of values differing", share, 0.01)


def check_output(stage: str, name: str, array: np.ndarray) -> None:
    """Raises ParityError on numbers that are not finite, or all the same."""
    if array.dtype == np.bool_ or name == "text_bias":  # which is infinite where it masks
        return
    if not np.isfinite(array).all():
        raise ParityError(f"{stage}: {name} is not finite")
    if array.size > 1 and not array.std():
        raise ParityError(f"{stage}: {name} is constant")


def line(
    stage: str, measure: str, actual: np.ndarray, expected: np.ndarray, tolerance: float = LOGITS
) -> ParityLine:
    error = np.abs(actual.astype(np.float64) - expected)
    value = float(error.max()) if np.isfinite(error).all() else float("inf")
    return ParityLine(stage, measure, value, tolerance)
