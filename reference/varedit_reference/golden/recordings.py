"""Compare the reference with recordings of the released implementation.

A recording is a folder of `config.json`, `var.pth`, `vae.pth` and `golden.safetensors`: a small
model in the released layout, an edit's inputs, and what the released code computed from them in
fp32. Every stage reads what this reference computed before it, except that bits are taken from the
recording: one bit that flips at a tie would change everything after it.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from varedit_reference.checkpoint import load_tokenizer, load_transformer
from varedit_reference.config import ModelConfig, TokenizerConfig, TransformerConfig
from varedit_reference.quantisation import positions, quantise, source_tokens, to_tokens
from varedit_reference.sampling import bit_probability, distance_to_cut, nucleus
from varedit_reference.scale_loop import forced, predict_scales
from varedit_reference.tokenizer import Tokenizer
from varedit_reference.transformer import VAR
from varedit_runtime.errors import CheckpointError, shown
from varedit_runtime.grids import scale_grids
from varedit_runtime.pictures import from_decoder, restore, to_square
from varedit_runtime.values import per_scale, temperature_per_scale

# Sides of square pictures by the released code's names of pixel counts.
PIXEL_BUDGETS = {"0.06M": 256, "0.25M": 512, "1M": 1024}

# Largest absolute errors. The recordings are fp32 on a CPU; arithmetic in another order differs
# by up to 9e-5 on guided logits, and float64 is as far from the recordings as float32 is.
FEATURES, SUMS, CONDITION, LOGITS, PROBABILITY = 1e-4, 1e-4, 1e-5, 2e-4, 5e-5
# Ties: a bit may differ where the residual is this close to zero, a probability where it is this
# close to the nucleus's cut.
SIGN_MARGIN, CUT_MARGIN = 2e-5, 5e-5


@dataclass(frozen=True)
class Measurement:
    """One line of the check: a stage, its largest absolute error, and the tolerance of it."""

    stage: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Recording:
    """A recording, and the small model and settings it was made with."""

    folder: Path
    config: ModelConfig
    guidance_scale: tuple[float, ...]
    temperature: tuple[float, ...]
    tokenizer: Tokenizer
    transformer: VAR
    tensors: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise CheckpointError(
                f"{self.folder}/golden.safetensors lacks {shown(name)}: record it again"
            )
        return self.tensors[name]

    @property
    def forced_bits(self) -> list[Tensor]:
        """The recorded bits of every scale, as tokens [1, L_k, c]."""
        patch = self.config.tokenizer.patch
        maps = [
            self[f"in.forced_bits.{k}"].permute(2, 0, 1)[None].float()
            for k in range(len(self.config.transformer.grids))
        ]
        return [to_tokens(bits, patch).bool() for bits in maps]


def open_recording(folder: Path) -> Recording:
    """Load a recording. Raises CheckpointError if the folder is not one."""
    try:
        settings = json.loads((folder / "config.json").read_text())
        tensors = load_file(folder / "golden.safetensors")
        config = recorded_config(folder.name, settings)
        scales = len(config.transformer.grids)
        guidance = 1.0 if settings.get("cfg") is None else settings["cfg"]
        guidance_scale = per_scale(guidance, scales, "cfg")
        temperature = temperature_per_scale(settings["tau"], scales)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} is not a recording ({type(error).__name__}: {error}): give a folder with "
            "config.json, var.pth, vae.pth and golden.safetensors"
        ) from error
    return Recording(
        folder,
        config,
        guidance_scale,
        temperature,
        load_tokenizer(folder / "vae.pth", config.tokenizer),
        load_transformer(folder / "var.pth", config.transformer),
        tensors,
    )


def recorded_config(name: str, settings: dict[str, Any]) -> ModelConfig:
    """Return the configuration of the model that a recording's `config.json` describes."""
    tokenizer = TokenizerConfig(
        bits=int(settings["codebook_dim"]),
        downsampling=int(settings["patch"]),
        channels=int(settings["base_ch"]),
        multipliers=tuple(int(m) for m in settings["ch_mult"]),
        patchify=bool(settings["patchify"]),
    )
    transformer = TransformerConfig(
        depth=int(settings["depth"]),
        width=int(settings["embed_dim"]),
        heads=int(settings["num_heads"]),
        token_channels=tokenizer.token_channels,
        text_channels=int(settings["text_channels"]),
        grids=scale_grids(PIXEL_BUDGETS[settings["pn"]]),
        table_grids=scale_grids(1024),
    )
    return ModelConfig(name, tokenizer, transformer)


@torch.inference_mode()
def check(recording: Recording) -> Iterator[Measurement]:
    """Run every stage of the recorded edit and yield its errors; see the module's docstring."""
    source = Image.fromarray(recording["in.image_rgb_u8"].numpy())
    picture = torch.from_numpy(to_square(source, recording.config.picture_size))
    yield _measure("preprocessed image", picture, recording["out.preprocessed_image"], 0)
    features = recording.tokenizer.encode(picture[None])
    yield _measure("encoder features", features, recording["out.encoder_features"], FEATURES)
    yield from _check_quantiser(recording, features)
    yield from _check_transformer(recording, features)


def _check_quantiser(recording: Recording, features: Tensor) -> Iterator[Measurement]:
    grids, patch = recording.config.transformer.grids, recording.config.tokenizer.patch
    recorded = [
        recording[f"out.quantizer_bits.{k}"].flatten(0, 1).permute(0, 3, 1, 2).bool()
        for k in range(len(grids))
    ]
    total = features
    for k, scale in enumerate(
        quantise(features, [positions(grid, patch) for grid in grids], recorded)
    ):
        wrong = (scale.residual > 0) != scale.bits
        margin = scale.residual.abs().where(wrong, 0)
        yield _measure(f"quantiser, residual of a flipped bit, scale {k}", margin, 0, SIGN_MARGIN)
        total = scale.sum
    yield _measure("quantised sum", total, recording["out.quantized_sum"], SUMS)


def _check_transformer(recording: Recording, features: Tensor) -> Iterator[Measurement]:
    config, model = recording.config, recording.transformer
    source = source_tokens(features, config.transformer.grids, config.tokenizer.patch, "sar")
    yield _measure("source tokens", source, recording["out.source_tokens"], FEATURES)

    negatives = recording.tensors.get("in.negative_text_features")
    guided = len(recording["out.text_pooled"]) == 2
    rows = model.text_rows(
        [recording["in.text_features"]], guided, None if negatives is None else [negatives]
    )
    text = model.condition(rows)
    yield _measure("pooled text", text.pooled, recording["out.text_pooled"], CONDITION)

    blocks = _record_blocks(model)
    scales = predict_scales(
        model,
        config,
        source,
        text,
        forced(recording.forced_bits),
        recording.guidance_scale,
        recording.temperature,
    )
    total = features
    for step in scales:
        k = step.scale
        if step.tokens is not None:
            expected = recording[f"out.scale_input_tokens.{k}"]
            yield _measure(f"input tokens, scale {k}", step.tokens[0], expected, CONDITION)
        if k == 0:
            yield from _check_blocks(recording, blocks, "source", 0)
        yield from _check_blocks(recording, blocks, f"scale{k}", k + 1)
        expected = recording[f"out.guided_logits.{k}"]
        yield _measure(f"guided logits, scale {k}", step.logits[0], expected, LOGITS)
        expected = recording[f"out.bit1_probability.{k}"]
        error = _probability_error(step.logits[0], expected)
        yield _measure(f"bit probability, scale {k}", error, 0, PROBABILITY)
        total = step.sum
    yield from _check_decoder(recording, total)


def _check_blocks(
    recording: Recording, blocks: list[list[Tensor]], part: str, run: int
) -> Iterator[Measurement]:
    """Compare the blocks' outputs of one run, where recorded.

    The tolerance grows with an output's largest value, if that is over 1.
    """
    for i, outputs in enumerate(blocks):
        expected = recording.tensors.get(f"debug.block{i}.{part}")
        if expected is not None:
            tolerance = LOGITS * max(1.0, expected.abs().max().item())
            yield _measure(f"block{i}, {part}", outputs[run], expected, tolerance)


def _check_decoder(recording: Recording, total: Tensor) -> Iterator[Measurement]:
    decoded = from_decoder(recording.tokenizer.decode(total)[0].numpy())
    yield from _measure_picture(
        "decoded picture", decoded, recording["out.image_rgb_u8"], levels=1, share=0.01
    )
    height, width = recording["in.image_rgb_u8"].shape[:2]
    restored = np.asarray(restore(decoded, (width, height)))
    yield from _measure_picture(
        "restored picture", restored, recording["out.restored_image_rgb_u8"], levels=2, share=0.02
    )


def _record_blocks(model: VAR) -> list[list[Tensor]]:
    """Return lists that collect every block's outputs: of the prefill, then of each scale."""
    outputs: list[list[Tensor]] = [[] for _ in model.blocks]

    def recorder(kept: list[Tensor]) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, inputs, output: kept.append(output)

    for block, kept in zip(model.blocks, outputs, strict=True):
        block.register_forward_hook(recorder(kept))
    return outputs


def _probability_error(logits: Tensor, expected: Tensor) -> Tensor:
    """Return the errors of P(bit = 1), 0 where a tie at the nucleus's cut explains them."""
    before = bit_probability(logits)
    tied = distance_to_cut(before) <= CUT_MARGIN
    return (nucleus(before) - expected).masked_fill(tied, 0)


def _measure_picture(
    stage: str, picture: np.ndarray, expected: Tensor, levels: int, share: float
) -> Iterator[Measurement]:
    difference = (torch.from_numpy(picture.astype(np.int16)) - expected.short()).abs()
    yield _measure(f"{stage}, levels", difference, 0, levels)
    differing = (difference > 0).double().mean().item()
    yield Measurement(f"{stage}, share of values differing", differing, share)


def _measure(stage: str, actual: Tensor, expected: Tensor | float, tolerance: float) -> Measurement:
    if isinstance(expected, Tensor) and actual.shape != expected.shape:
        raise CheckpointError(
            f"{stage}: the reference gives {list(actual.shape)}, the recording holds "
            f"{list(expected.shape)}; its config.json does not describe its tensors"
        )
    error = (actual.double() - expected).abs()
    return Measurement(stage, error.max().item() if error.isfinite().all() else inf, tolerance)
