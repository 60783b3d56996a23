"""Compiled engines against ONNX Runtime and the reference, stage by stage and teacher-forced."""

from collections.abc import Iterator, Sequence
from contextlib import closing

import numpy as np
import torch

from varedit_export.teacher_forcing import (
    FEATURES,
    SUMS,
    Edit,
    bits_line,
    check_output,
    config_of,
    line,
    noise_of,
    picture_lines,
    random_edit,
    run_reference,
    source_array,
    text_arrays,
)
from varedit_export.verify import Reference, is_large, parameters, sources_of
from varedit_reference.scale_loop import PredictedScale
from varedit_runtime.backend import Backend, Sampling, ScaleOutput
from varedit_runtime.bundle import Bundle
from varedit_runtime.engine_backend import open_engines
from varedit_runtime.manifest import ParityLine, Variant
from varedit_runtime.noise import uniform_noise
from varedit_runtime.onnx_backend import OnnxBackend
from varedit_runtime.pictures import from_decoder
from varedit_runtime.tensorrt_module import EngineKind
from varedit_runtime.wiring import ENCODER, TEXT, scale_name

ROUNDED_FEATURES = 0.1  # of 16-bit coders, as where their graphs are compared


def compare_engines(
    bundle: Bundle, kind: EngineKind, digest: str | None = None, trust: bool = False
) -> Iterator[ParityLine]:
    """The engines of every variant on this machine's GPU; digest, trust: as for `open_engines`.

    Raises ParityError on a stage that puts out what is not finite, or constant; and what
    `open_engines` does.
    """
    for variant in bundle.manifest.variants:
        with closing(open_engines(bundle, variant, kind, digest, trust)) as engines:
            yield from compare_backend(bundle, variant, engines)


@torch.inference_mode()
def compare_backend(bundle: Bundle, variant: Variant, backend: Backend) -> Iterator[ParityLine]:
    """A backend against ONNX Runtime on the CPU, but in bf16, which that lacks; and, where the
    model can be held whole, against the reference."""
    config, sources = sources_of(bundle)
    edit = random_edit(variant, config_of(variant, config))
    precision = bundle.manifest.precision
    exact = precision == "fp32"
    if precision != "bf16":
        onnx = OnnxBackend(bundle, variant, "cpu", torch.get_num_threads())
        yield from _compare_coders(variant, backend, onnx, exact)
        steps = _predicted(onnx, variant, edit)
        yield from _compare_scales(variant, backend, edit, steps, "ONNX Runtime", exact)
    if not is_large(parameters(bundle)):
        reference = Reference.from_sources(config, sources).of(variant)
        steps = run_reference(reference.transformer, reference.config, edit)
        yield from _compare_scales(variant, backend, edit, steps, "the reference", exact)


def _compare_coders(
    variant: Variant, backend: Backend, onnx: Backend, exact: bool
) -> Iterator[ParityLine]:
    random = np.random.default_rng(3)
    tolerance = FEATURES if exact else ROUNDED_FEATURES
    if TEXT in variant.graphs:
        shape = variant.batch, variant.text_tokens
        ids, mask = random.integers(3, 30, shape), np.zeros(shape, np.bool_)
        mask[:, : max(shape[1] // 2, 1)] = True
        ours, theirs = (one.encode_text(ids, mask)[mask] for one in (backend, onnx))
        check_output(TEXT, "text_features", ours)
        yield line(TEXT, "features against ONNX Runtime, largest error", ours, theirs, tolerance)
    pictures = random.uniform(-1, 1, (variant.batch, 3, *variant.picture)).astype(np.float32)
    ours, theirs = (one.encode_pictures(pictures) for one in (backend, onnx))
    check_output(ENCODER, "source_tokens", ours)
    tolerance = SUMS if exact else ROUNDED_FEATURES
    yield line(ENCODER, "tokens against ONNX Runtime, largest error", ours, theirs, tolerance)
    (total,) = (spec.shape for spec in variant.graph("image_decoder").inputs)
    sums = random.normal(size=tuple(map(int, total))).astype(np.float32) / int(total[1]) ** 0.5
    ours, theirs = (from_decoder(one.decode(sums)[0]) for one in (backend, onnx))
    yield from picture_lines(ours, theirs)


def _compare_scales(
    variant: Variant,
    backend: Backend,
    edit: Edit,
    steps: Sequence[PredictedScale],
    other: str,
    exact: bool,
) -> Iterator[ParityLine]:
    """steps: what another makes of the edit; its bits are forced after every scale."""
    _begin(backend, variant, edit)
    for step in steps:
        stage = scale_name(step.scale)
        output = backend.predict(step.scale, _sampling(variant, edit, step.scale))
        check_output(stage, "logits", output.logits)
        logits = output.logits[:1].reshape(step.logits.shape)
        if exact:
            measure = f"logits against {other}, largest error"
            yield line(stage, measure, logits, step.logits.numpy())
        bits = output.bits[:1].reshape(step.bits.shape)
        found = bits_line(stage, bits, step, noise_of(edit, step), exact)
        yield ParityLine(stage, f"{found.measure}, against {other}", found.value, found.tolerance)
        forced = backend.predict(step.scale, _sampling(variant, edit, step.scale, step.bits))
        measure = f"sum against {other}, largest error"
        yield line(stage, measure, forced.running_sum[:1], step.sum.numpy(), SUMS)


def _predicted(backend: Backend, variant: Variant, edit: Edit) -> list[PredictedScale]:
    """A backend's own edit, as the reference tells its."""
    _begin(backend, variant, edit)
    scales = range(len(variant.grids))
    outputs = [backend.predict(k, _sampling(variant, edit, k)) for k in scales]
    return [_as_reference(k, output) for k, output in enumerate(outputs)]


def _as_reference(scale: int, output: ScaleOutput) -> PredictedScale:
    logits = torch.from_numpy(output.logits[:1]).flatten(1, 2)
    bits = torch.from_numpy(output.bits[:1]).flatten(1, 2)
    sums = torch.from_numpy(output.running_sum[:1])
    return PredictedScale(scale, None, logits, torch.empty(0), bits, sums)


def _begin(backend: Backend, variant: Variant, edit: Edit) -> None:
    backend.condition(text_arrays(variant, edit))
    backend.prefill(source_array(variant, edit))


def _sampling(
    variant: Variant, edit: Edit, scale: int, forced: torch.Tensor | None = None
) -> Sampling:
    rows, columns = variant.grids[scale]
    channels = edit.source.shape[-1]
    noise = uniform_noise(edit.seed, scale, rows * columns, channels)
    shape = (variant.batch, rows, columns, channels)
    noise = np.broadcast_to(noise.reshape(shape[1:]), shape)
    guidance, temperature = edit.guidance[scale], edit.temperature[scale]
    if forced is None:
        return Sampling(noise, guidance, temperature)
    bits = np.broadcast_to(forced.numpy().reshape(1, *shape[1:]), shape)
    return Sampling(noise, guidance, temperature, bits, np.ones(shape, np.bool_))
