"""Compiled engines against ONNX Runtime and the reference, stage by stage and teacher-forced."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from varedit_export.bundle_model import sources_of
from varedit_export.errors import ParityError
from varedit_export.parity.teacher_forcing import (
    FEATURES,
    LOGITS,
    SUMS,
    Edit,
    begin,
    bits_line,
    check_output,
    config_of,
    line,
    noise_of,
    picture_lines,
    random_edit,
    run_reference,
    sampling,
)
from varedit_export.parity.verify import Reference, is_large, parameters, t5_encoder
from varedit_reference.quantisation import to_tokens
from varedit_reference.scale_loop import PredictedScale
from varedit_runtime.backends import ChosenBackend
from varedit_runtime.backends.base import (
    Backend,
    EditWhole,
    Negatives,
    Prompts,
    Sampling,
    ScaleOutput,
    edit_by_stages,
)
from varedit_runtime.backends.onnxruntime.backend import OnnxBackend
from varedit_runtime.backends.onnxruntime.options import OnnxRuntimeOptions
from varedit_runtime.backends.wiring import DECODER, ENCODER, TEXT, sized
from varedit_runtime.bundle import Bundle
from varedit_runtime.manifest import ParityLine, Variant, scale_name
from varedit_runtime.pictures import from_decoder

ROUNDED_FEATURES = 0.1  # of 16-bit coders, as where their graphs are compared
# Of the largest logit: rounding flips few bits; what errs by more is another computation.
ROUNDED_LOGITS = 0.2


def compare_chosen(
    bundle: Bundle, backend: ChosenBackend, variant: str | None = None
) -> Iterator[ParityLine]:
    """Compare a backend, as it runs a variant of a bundle on this machine.

    It is opened at once, and compared as lines are asked for. Raises what `ChosenBackend.open`
    does; and ParityError on a stage that puts out what is not finite, or constant.
    """
    chosen = bundle.manifest.variant(variant)
    opened = backend.open(bundle, chosen)

    def lines() -> Iterator[ParityLine]:
        with closing(opened):
            yield from compare_backend(bundle, chosen, opened)

    return lines()


@torch.inference_mode()
def compare_backend(bundle: Bundle, variant: Variant, backend: Backend) -> Iterator[ParityLine]:
    """A backend against ONNX Runtime on the CPU, but in bf16, which that lacks; and, where the
    model can be held whole, against the reference.

    Raises ParityError where it can be neither.
    """
    config, sources = sources_of(bundle)
    edit = random_edit(variant, config_of(variant, config))
    precision = bundle.manifest.precision
    exact, large = precision == "fp32", is_large(parameters(bundle))
    if precision == "bf16" and large:
        raise ParityError(
            f"{bundle.path} is in bf16, which ONNX Runtime does not compute on CPUs, and too large "
            "to be compared with the reference: verify engines of the same model in fp16"
        )
    if precision != "bf16":
        onnx = OnnxBackend(bundle, variant, OnnxRuntimeOptions(threads=torch.get_num_threads()))
        yield from _compare_coders(variant, backend, onnx, "ONNX Runtime", exact)
        steps = _predicted(onnx, variant, edit)
        yield from _compare_scales(variant, backend, edit, steps, "ONNX Runtime", exact)
    if not large:
        reference = Reference.from_sources(config, sources).of(variant)
        coders = _ReferenceCoders(reference, variant)
        yield from _compare_coders(variant, backend, coders, "the reference", exact)
        steps = run_reference(reference.transformer, reference.config, edit)
        yield from _compare_scales(variant, backend, edit, steps, "the reference", exact)
    if (whole := backend.whole) is not None:
        yield _compare_whole(bundle, variant, backend, whole)


class Coders(Protocol):
    """What encodes and decodes: backends do."""

    def encode_text(self, token_ids: np.ndarray, text_mask: np.ndarray) -> np.ndarray: ...

    def encode_pictures(self, pictures: np.ndarray) -> np.ndarray: ...

    def decode(self, running_sum: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class _ReferenceCoders:
    """The reference's coders, on arrays."""

    reference: Reference
    variant: Variant

    def encode_text(self, token_ids: np.ndarray, text_mask: np.ndarray) -> np.ndarray:
        assert self.reference.text is not None
        encoder = t5_encoder(self.reference.text)
        ids, mask = torch.from_numpy(token_ids), torch.from_numpy(text_mask).long()
        return encoder(input_ids=ids, attention_mask=mask).last_hidden_state.numpy()

    def encode_pictures(self, pictures: np.ndarray) -> np.ndarray:
        features = self.reference.tokenizer.encode(torch.from_numpy(pictures))
        tokens = to_tokens(features, self.reference.config.tokenizer.patch)
        return tokens.unflatten(1, self.variant.grids[-1]).numpy()

    def decode(self, running_sum: np.ndarray) -> np.ndarray:
        return self.reference.tokenizer.decode(torch.from_numpy(running_sum)).numpy()


def _compare_coders(
    variant: Variant, backend: Coders, other: Coders, name: str, exact: bool
) -> Iterator[ParityLine]:
    """name: the other's."""
    random = np.random.default_rng(3)
    tolerance = FEATURES if exact else ROUNDED_FEATURES
    measure = f"against {name}, largest error"
    if TEXT in variant.graphs:
        shape = variant.batch, variant.text_tokens
        ids, mask = random.integers(3, 30, shape), np.zeros(shape, np.bool_)
        mask[:, : max(shape[1] // 2, 1)] = True
        ours, theirs = (one.encode_text(ids, mask)[mask] for one in (backend, other))
        check_output(TEXT, "text_features", ours)
        yield line(TEXT, f"features {measure}", ours, theirs, tolerance)
    pictures = random.uniform(-1, 1, (variant.batch, 3, *variant.picture)).astype(np.float32)
    ours, theirs = (one.encode_pictures(pictures) for one in (backend, other))
    check_output(ENCODER, "source_tokens", ours)
    tolerance = SUMS if exact else ROUNDED_FEATURES
    yield line(ENCODER, f"tokens {measure}", ours, theirs, tolerance)
    (total,) = (sized(spec, {}) for spec in variant.graph(DECODER).inputs)
    sums = random.normal(size=total).astype(np.float32) / total[1] ** 0.5
    ours, theirs = (from_decoder(one.decode(sums)[0]) for one in (backend, other))
    for found in picture_lines(ours, theirs):
        yield ParityLine(
            found.stage, f"{found.measure}, against {name}", found.value, found.tolerance
        )


def _compare_whole(
    bundle: Bundle, variant: Variant, backend: Backend, whole: EditWhole
) -> ParityLine:
    """An edit in one piece against the same by stages: all must be equal."""
    prompts, pictures, samplings = _random_edit(variant, bundle.manifest.model.token_channels)
    edited = whole(prompts, pictures, samplings)
    staged = [
        array
        for output in edit_by_stages(backend, prompts, pictures, samplings)
        for name, array in output.arrays.items()
        if name in ("logits", "pictures")
    ]
    pairs = zip((*edited.logits, edited.pictures), staged, strict=True)
    different = sum(not np.array_equal(ours, theirs) for ours, theirs in pairs)
    measure = "an edit in one piece: scales and pictures that differ from those by stages"
    return ParityLine("edit", measure, float(different), 0.0)


def _random_edit(variant: Variant, channels: int) -> tuple[Prompts, np.ndarray, Sequence[Sampling]]:
    random, batch = np.random.default_rng(4), variant.batch
    ids = random.integers(3, 30, (batch, variant.text_tokens))
    mask = np.ones(ids.shape, np.bool_)
    negatives = None
    if variant.guided:
        negatives = Negatives(ids[:, ::-1].copy(), mask, np.ones(batch, np.bool_))
    pictures = random.uniform(-1, 1, (batch, 3, *variant.picture)).astype(np.float32)
    noise = [random.random((batch, *grid, channels)).astype(np.float32) for grid in variant.grids]
    return Prompts(ids, mask, negatives), pictures, [Sampling(one, 2.0, 1.0) for one in noise]


def _compare_scales(
    variant: Variant,
    backend: Backend,
    edit: Edit,
    steps: Sequence[PredictedScale],
    other: str,
    exact: bool,
) -> Iterator[ParityLine]:
    """steps: what another makes of the edit; its bits are forced after every scale."""
    begin(backend, variant, edit)
    for step in steps:
        stage = scale_name(step.scale)
        output = backend.predict(step.scale, sampling(variant, edit, step.scale))
        check_output(stage, "logits", output.logits)
        logits = output.logits[:1].reshape(step.logits.shape)
        measure = f"logits against {other}, largest error"
        tolerance = LOGITS if exact else ROUNDED_LOGITS * float(step.logits.abs().max())
        yield line(stage, measure, logits, step.logits.numpy(), tolerance)
        bits = output.bits[:1].reshape(step.bits.shape)
        found = bits_line(stage, bits, step, noise_of(edit, step), exact)
        yield ParityLine(stage, f"{found.measure}, against {other}", found.value, found.tolerance)
        forced = backend.predict(step.scale, sampling(variant, edit, step.scale, step.bits))
        measure = f"sum against {other}, largest error"
        yield line(stage, measure, forced.running_sum[:1], step.sum.numpy(), SUMS)


def _predicted(backend: Backend, variant: Variant, edit: Edit) -> list[PredictedScale]:
    """A backend's own edit, as the reference tells its."""
    begin(backend, variant, edit)
    scales = range(len(variant.grids))
    outputs = [backend.predict(k, sampling(variant, edit, k)) for k in scales]
    return [_as_reference(k, output) for k, output in enumerate(outputs)]


def _as_reference(scale: int, output: ScaleOutput) -> PredictedScale:
    logits = torch.from_numpy(output.logits[:1]).flatten(1, 2)
    bits = torch.from_numpy(output.bits[:1]).flatten(1, 2)
    sums = torch.from_numpy(output.running_sum[:1])
    return PredictedScale(scale, None, logits, torch.empty(0), bits, sums)
