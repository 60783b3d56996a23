"""Parity of a bundle's graphs with the reference, teacher-forced, scale by scale.

One flipped bit changes all later scales, so every scale is given the reference's own input and
bits. Bits are drawn from the same noise and must be equal, but for ties.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from varedit_export.bundle_model import sources_of
from varedit_export.errors import ParityError
from varedit_export.graphs.stages import DTYPES
from varedit_export.parity.cut import WeightFiles
from varedit_export.parity.streamed import compare_streamed
from varedit_export.parity.teacher_forcing import (
    FEATURES,
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
    scale_arrays,
    share_line,
    source_array,
    text_arrays,
    tokenizer_of,
)
from varedit_export.sources import Sources, TextSource
from varedit_reference.config import ModelConfig
from varedit_reference.golden import Recording
from varedit_reference.quantisation import to_tokens
from varedit_reference.scale_loop import PredictedScale
from varedit_reference.tokenizer import Tokenizer
from varedit_reference.transformer import VAR
from varedit_runtime.backends.onnxruntime.backend import OnnxBackend, load_graph
from varedit_runtime.backends.onnxruntime.options import OnnxRuntimeOptions
from varedit_runtime.backends.wiring import KINDS
from varedit_runtime.bundle import Bundle
from varedit_runtime.manifest import Manifest, ParityLine, Variant, scale_name, weights_file
from varedit_runtime.pictures import from_decoder

if TYPE_CHECKING:
    from transformers.models.t5.modeling_t5 import T5Stack

# Bytes of a model's weights in fp32, over which it is compared block by block: the whole
# comparison holds them some four times, in the reference, rounded and in ONNX Runtime's sessions.
WHOLE = 10**9


@dataclass(frozen=True)
class Reference:
    """The PyTorch model that graphs are compared with. text is None without a text encoder."""

    config: ModelConfig
    transformer: VAR
    tokenizer: Tokenizer
    text: TextSource | None

    @classmethod
    def from_sources(cls, config: ModelConfig, sources: Sources) -> "Reference":
        """The weights that a bundle is built from."""
        transformer = {name: sources.transformer[name] for name in sources.transformer}
        tokenizer = tokenizer_of(config, sources.tokenizer)
        return cls(config, _var(config, transformer), tokenizer, sources.text)

    def of(self, variant: Variant) -> "Reference":
        """The same weights with a variant's grids."""
        config = config_of(variant, self.config)
        transformer = _var(config, self.transformer.state_dict())
        return replace(self, config=config, transformer=transformer)


def verify_folder(
    folder: Path, manifest: Manifest, sources: Sources, config: ModelConfig
) -> list[ParityLine]:
    """Compare an unpublished bundle with the weights it was built from.

    Raises ParityError if a measure exceeds its tolerance or is not finite.
    """
    bundle = Bundle(folder, manifest, digest="")
    if not is_large(parameters(bundle)):
        return gate(compare(bundle, Reference.from_sources(config, sources)))
    return gate(compare_streamed(bundle, config, sources))


def is_large(parameters: int) -> bool:
    """Whether a model is too large to be compared whole."""
    return parameters * torch.float32.itemsize > WHOLE


def parameters(bundle: Bundle) -> int:
    """How many numbers its weights are."""
    files = WeightFiles(bundle.path)
    layouts = (files.layout(weights_file(name)) for name in bundle.components)
    return sum(prod(tensor.shape) for layout in layouts for tensor in layout.values())


def gate(lines: Iterator[ParityLine]) -> list[ParityLine]:
    """All lines. Raises ParityError naming those that exceed their tolerance; NaN does."""
    lines_ = list(lines)
    failed = [line for line in lines_ if not line.value <= line.tolerance]
    if failed:
        named = "; ".join(
            f"{line.stage}: {line.measure} {line.value:.3g} over {line.tolerance:.3g}"
            for line in failed[:3]
        )
        raise ParityError(f"{len(failed)} of {len(lines_)} measures failed: {named}")
    return lines_


@torch.inference_mode()
def compare(bundle: Bundle, reference: Reference) -> Iterator[ParityLine]:
    """Every graph of every variant against the reference."""
    for variant in bundle.manifest.variants:
        reference = reference.of(variant)
        yield from _compare_coders(bundle, variant, reference.tokenizer)
        edit = random_edit(variant, reference.config)
        steps = run_reference(reference.transformer, reference.config, edit)
        precision = bundle.manifest.precision
        if reference.text is not None and precision != "bf16":
            yield from _compare_text(bundle, variant, reference.text)
        if precision != "fp32":
            yield from _compare_rounding(reference, edit, steps, precision)
        if precision != "bf16":  # which ONNX Runtime does not have on CPUs
            yield from _compare_static(bundle, variant, edit, steps)
            yield from _compare_symbolic(bundle, variant, edit, steps)


@torch.inference_mode()
def compare_recording(bundle: Bundle, recording: Recording) -> Iterator[ParityLine]:
    """A bundle, built from a recording's checkpoints, against the recording's own numbers."""
    (variant,) = bundle.manifest.variants
    scales = range(len(variant.grids))
    negative = recording.tensors.get("in.negative_text_features")
    count = len(scales)
    edit = Edit(
        recording["in.text_features"],
        negative,
        recording["out.source_tokens"],
        _each(recording.guidance_scale, count),
        _each(recording.temperature, count),
        recording.forced_bits,
        seed=0,
    )
    for k, logits, total in _run_symbolic(bundle, variant, edit, recording.forced_bits):
        expected = recording[f"out.guided_logits.{k}"].numpy().reshape(logits.shape)
        yield line(scale_name(k), "recorded guided logits, largest error", logits, expected)
        if k == count - 1:
            picture = from_decoder(_session(bundle, variant, "image_decoder")(running_sum=total)[0])
            yield from picture_lines(picture, recording["out.image_rgb_u8"].numpy())


def compare_bundle(bundle: Bundle) -> Iterator[ParityLine]:
    """Every graph of every variant against the reference made of the bundle's own weights."""
    if not is_large(parameters(bundle)):
        return compare(bundle, reference_of(bundle))
    return compare_streamed(bundle, *sources_of(bundle))


def reference_of(bundle: Bundle) -> Reference:
    """The reference made of a bundle's own weights."""
    return Reference.from_sources(*sources_of(bundle))


def _var(
    config: ModelConfig, state: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
) -> VAR:
    with torch.device("meta"):
        model = VAR(config.transformer, dtype)
    types = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    model.load_state_dict({n: t.to(types[n]) for n, t in state.items()}, assign=True)
    return model.eval()


def t5_encoder(text: TextSource) -> "T5Stack":
    """transformers' encoder of a bundle's text weights, in fp32."""
    from transformers import T5Config, T5EncoderModel

    with torch.device("meta"):
        encoder = T5EncoderModel(T5Config(**text.json)).encoder
    names = {
        name: "shared.weight" if name == "embed_tokens.weight" else f"encoder.{name}"
        for name in encoder.state_dict()
    }
    encoder.load_state_dict({n: text.state[t].float() for n, t in names.items()}, assign=True)
    return encoder.eval()


def _compare_text(bundle: Bundle, variant: Variant, text: TextSource) -> Iterator[ParityLine]:
    """The text encoder's graph against transformers' T5, with padding."""
    encoder = t5_encoder(text)
    shape = (variant.batch, variant.text_tokens)
    ids = torch.randint(
        3, text.config.vocabulary, shape, generator=torch.Generator().manual_seed(2)
    )
    mask = torch.arange(shape[1]) < max(shape[1] // 2, 1)
    mask = mask.expand(shape)
    expected = encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    run = _session(bundle, variant, "text_encoder")
    features = run(token_ids=ids.numpy(), text_mask=mask.numpy())
    kept = mask.numpy()
    tolerance = FEATURES if bundle.manifest.precision == "fp32" else 0.1
    yield line(
        "text_encoder", "features, largest error", features[kept], expected.numpy()[kept], tolerance
    )


def _compare_coders(bundle: Bundle, variant: Variant, tokenizer: Tokenizer) -> Iterator[ParityLine]:
    generator = torch.Generator().manual_seed(3)
    patch = tokenizer.config.patch
    pictures = torch.rand((variant.batch, 3, *variant.picture), generator=generator) * 2 - 1
    features = tokenizer.encode(pictures)
    tokens = _session(bundle, variant, "image_encoder")(pictures=pictures.numpy())
    expected = to_tokens(features, patch).numpy().reshape(tokens.shape)
    yield line("image_encoder", "source tokens, largest error", tokens, expected, SUMS)
    total = torch.randn(features.shape, generator=generator) / features.shape[1] ** 0.5
    decoded = _session(bundle, variant, "image_decoder")(running_sum=total.numpy())
    expected = from_decoder(tokenizer.decode(total)[0].numpy())
    yield from picture_lines(from_decoder(decoded[0]), expected)


def _compare_rounding(
    reference: Reference, edit: Edit, steps: Sequence[PredictedScale], precision: str
) -> Iterator[ParityLine]:
    """What 16-bit products change, in the reference itself: no CPU computes the graphs so."""
    state = reference.transformer.state_dict()
    rounded = _var(reference.config, state, DTYPES[precision])
    given = _forced_edit(edit, steps)
    for step, other in zip(steps, run_reference(rounded, reference.config, given), strict=True):
        noise = noise_of(edit, step)
        differs = (noise < step.probability) != (noise < other.probability)
        measure = f"share of bits that differ, reference with products rounded to {precision}"
        yield share_line(scale_name(step.scale), measure, differs)


def _compare_static(
    bundle: Bundle, variant: Variant, edit: Edit, steps: Sequence[PredictedScale]
) -> Iterator[ParityLine]:
    """The static graphs, one loaded at a time, their caches handed on."""
    exact = bundle.manifest.precision == "fp32"
    text = _run_stage(bundle, variant, "condition", text_arrays(variant, edit))
    source = {"source_tokens": source_array(variant, edit)}
    cache = _run_stage(bundle, variant, "prefill", text | source)
    past = {name.replace("source", "past"): x for name, x in cache.items() if "source" in name}
    for step in steps:
        stage, noise = scale_name(step.scale), noise_of(edit, step)
        references = {f"reference_{kind}": f"reference_{kind}.{step.scale}" for kind in KINDS}
        given = {
            **text,
            **past,
            **{name: cache[stored] for name, stored in references.items() if stored in cache},
            **scale_arrays(variant, edit, steps, step.scale),
        }
        outputs = _run_stage(bundle, variant, stage, given)
        logits = outputs["logits"][:1].reshape(step.logits.shape)
        if exact:
            yield line(stage, "logits, largest error", logits, step.logits.numpy())
        yield bits_line(stage, outputs["bits"][:1].reshape(step.bits.shape), step, noise, exact)
        for i in range(bundle.manifest.model.depth):
            for kind in KINDS:
                name, new = f"past_{kind}.{i}", outputs[f"new_{kind}.{i}"]
                past[name] = np.concatenate((past[name], new)) if name in past else new


def _compare_symbolic(
    bundle: Bundle, variant: Variant, edit: Edit, steps: Sequence[PredictedScale]
) -> Iterator[ParityLine]:
    """The symbolic twin, as the runtime drives it, all bits forced."""
    exact = bundle.manifest.precision == "fp32"
    bits = [step.bits for step in steps]
    for k, logits, total in _run_symbolic(bundle, variant, edit, bits):
        if exact:
            expected = steps[k].logits.numpy().reshape(logits.shape)
            yield line("scale", f"logits of scale {k}, largest error", logits, expected)
        expected = steps[k].sum.numpy()
        yield line("scale", f"sum after scale {k}, largest error", total[:1], expected, SUMS)


def _run_symbolic(
    bundle: Bundle, variant: Variant, edit: Edit, bits: Sequence[Tensor]
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(scale, guided logits, running sum) of an edit with all bits forced."""
    backend = OnnxBackend(bundle, variant, OnnxRuntimeOptions(threads=torch.get_num_threads()))
    begin(backend, variant, edit)
    for k, chosen in enumerate(bits):
        output = backend.predict(k, sampling(variant, edit, k, chosen))
        yield k, output.logits[:1], output.running_sum


class _session:
    """A graph to run once, its first output returned."""

    def __init__(self, bundle: Bundle, variant: Variant, stage: str) -> None:
        self._given = bundle, variant, stage

    def __call__(self, **inputs: np.ndarray) -> np.ndarray:
        return next(iter(_run_stage(*self._given, inputs).values()))


def _run_stage(
    bundle: Bundle, variant: Variant, stage: str, inputs: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Load a graph, run it on those of the inputs it has, check its outputs, let it go."""
    session = load_graph(bundle.graph_bytes(variant.name, stage), bundle.graphs_folder)
    names = [tensor.name for tensor in session.get_inputs()]
    outputs = session.run(None, {name: inputs[name] for name in names})
    named = {o.name: np.asarray(x) for o, x in zip(session.get_outputs(), outputs, strict=True)}
    for name, array in named.items():
        check_output(stage, name, array)
    return named


def _forced_edit(edit: Edit, steps: Sequence[PredictedScale]) -> Edit:
    bits = [step.bits for step in steps]
    return Edit(
        edit.text, edit.negative, edit.source, edit.guidance, edit.temperature, bits, edit.seed
    )


def _each(value: float | Sequence[float], count: int) -> list[float]:
    return [float(value)] * count if isinstance(value, int | float) else list(value)
