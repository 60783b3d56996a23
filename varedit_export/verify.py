"""Parity of a bundle's graphs with the reference, teacher-forced, scale by scale.

One flipped bit changes all later scales, so every scale is given the reference's own input and
bits. Bits are drawn from the same noise and must be equal, but for ties.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import log2
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from safetensors.torch import load_file
from torch import Tensor

from varedit_export.layout import restore_transformer
from varedit_export.sources import Sources, TextSource
from varedit_reference.agreement import TIE, tie_margin
from varedit_reference.checkpoint import empty_tokenizer
from varedit_reference.config import ModelConfig, TokenizerConfig, TransformerConfig
from varedit_reference.golden import Recording
from varedit_reference.quantisation import to_tokens
from varedit_reference.scale_loop import PredictedScale, forced, predict_scales, seeded
from varedit_reference.tokenizer import Tokenizer
from varedit_reference.transformer import VAR
from varedit_runtime.bundle import Bundle
from varedit_runtime.errors import VareditError
from varedit_runtime.grids import scale_grids
from varedit_runtime.manifest import Manifest, ParityLine, Variant
from varedit_runtime.noise import uniform_noise
from varedit_runtime.onnx_backend import OnnxBackend, Sampling
from varedit_runtime.pictures import from_decoder

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# fp32 arithmetic in another order; a wrong formula differs by far more.
FEATURES, LOGITS, SUMS = 1e-3, 1e-3, 1e-4
# Bits that may differ when products are rounded to 16 bits.
ROUNDED_SHARE = 0.02


class ParityError(VareditError):
    """Graphs that do not agree with the reference; the message names the worst."""


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
        tokenizer = empty_tokenizer(config.tokenizer)
        state = {name: sources.tokenizer[name].float() for name in tokenizer.state_dict()}
        tokenizer.load_state_dict(state, assign=True)
        transformer = {name: sources.transformer[name] for name in sources.transformer}
        return cls(config, _var(config, transformer), tokenizer.eval(), sources.text)


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


def verify_folder(
    folder: Path, manifest: Manifest, sources: Sources, config: ModelConfig
) -> list[ParityLine]:
    """Compare an unpublished bundle with the weights it was built from.

    Raises ParityError if a measure exceeds its tolerance or is not finite.
    """
    bundle = Bundle(folder, manifest, digest="")
    return gate(compare(bundle, Reference.from_sources(config, sources)))


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
        yield from _compare_coders(bundle, variant, reference)
        edit = _random_edit(bundle, variant, reference)
        steps = _run_reference(reference.transformer, reference.config, edit)
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
        yield _line(f"scale_{k:02}", "recorded guided logits, largest error", logits, expected)
        if k == count - 1:
            picture = from_decoder(_session(bundle, variant, "image_decoder")(running_sum=total)[0])
            yield from _picture_lines(picture, recording["out.image_rgb_u8"].numpy())


def reference_of(bundle: Bundle) -> Reference:
    """The reference made of a bundle's own weights, all but the text encoder."""
    weights = {name: load_file(bundle.weights_path(name)) for name in ("transformer", "tokenizer")}
    config = _config_of(bundle, weights["tokenizer"])
    tokenizer = empty_tokenizer(config.tokenizer)
    tokenizer.load_state_dict(weights["tokenizer"], assign=True)
    state = restore_transformer(config.transformer, weights["transformer"])
    return Reference(config, _var(config, state), tokenizer.eval(), None)


def _config_of(bundle: Bundle, tokenizer: Mapping[str, Tensor]) -> ModelConfig:
    """The model that a bundle was built from; the tokenizer's widths are those of its weights."""
    model, (variant, *_) = bundle.manifest.model, bundle.manifest.variants
    levels = int(log2(model.downsampling)) + 1
    widths = [len(tokenizer[f"encoder.levels.{i}.blocks.0.conv1.weight"]) for i in range(levels)]
    channels = len(tokenizer["encoder.conv_in.weight"])
    return ModelConfig(
        model.size,
        TokenizerConfig(
            bits=model.bits,
            downsampling=model.downsampling,
            channels=channels,
            multipliers=tuple(width // channels for width in widths),
            patchify=model.patch == 2,
        ),
        TransformerConfig(
            depth=model.depth,
            width=model.width,
            heads=model.heads,
            token_channels=model.token_channels,
            text_channels=model.text_channels,
            grids=variant.grids,
            table_grids=scale_grids(1024, variant.aspect),
            conditioning=model.conditioning,
            rotary=model.rotary,
        ),
        bundle.manifest.guidance_scale,
        bundle.manifest.temperature,
    )


def _var(
    config: ModelConfig, state: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
) -> VAR:
    with torch.device("meta"):
        model = VAR(config.transformer, dtype)
    types = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    model.load_state_dict({n: t.to(types[n]) for n, t in state.items()}, assign=True)
    return model.eval()


def _random_edit(bundle: Bundle, variant: Variant, reference: Reference) -> Edit:
    generator = torch.Generator().manual_seed(0)
    config, scales = reference.config.transformer, len(reference.config.transformer.grids)
    shape = (1, config.finest[0] * config.finest[1], config.token_channels)
    guidance = bundle.manifest.guidance_scale if variant.rows > variant.batch else 1.0
    return Edit(
        torch.randn(variant.text_tokens // 2, config.text_channels, generator=generator),
        None,
        torch.randn(shape, generator=generator) / config.token_channels**0.5,
        [guidance] * scales,
        [bundle.manifest.temperature] * scales,
        None,
        seed=1,
    )


def _run_reference(model: VAR, config: ModelConfig, edit: Edit) -> list[PredictedScale]:
    guided = any(g != 1 for g in edit.guidance)
    negative = None if edit.negative is None else [edit.negative]
    text = model.condition(model.text_rows([edit.text], guided, negative))
    choose = seeded([edit.seed]) if edit.bits is None else forced(edit.bits)
    steps = predict_scales(
        model, config, edit.source, text, choose, edit.guidance, edit.temperature
    )
    return list(steps)


def _compare_text(bundle: Bundle, variant: Variant, text: TextSource) -> Iterator[ParityLine]:
    """The text encoder's graph against transformers' T5, with padding."""
    from transformers import T5Config, T5EncoderModel

    with torch.device("meta"):
        encoder = T5EncoderModel(T5Config(**text.json)).encoder
    names = {
        name: "shared.weight" if name == "embed_tokens.weight" else f"encoder.{name}"
        for name in encoder.state_dict()
    }
    encoder.load_state_dict({n: text.state[t].float() for n, t in names.items()}, assign=True)
    shape = (variant.batch, variant.text_tokens)
    ids = torch.randint(
        3, text.config.vocabulary, shape, generator=torch.Generator().manual_seed(2)
    )
    mask = torch.arange(shape[1]) < max(shape[1] // 2, 1)
    mask = mask.expand(shape)
    expected = encoder.eval()(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    run = _session(bundle, variant, "text_encoder")
    features = run(token_ids=ids.numpy(), text_mask=mask.numpy())
    kept = mask.numpy()
    tolerance = FEATURES if bundle.manifest.precision == "fp32" else 0.1
    yield _line(
        "text_encoder", "features, largest error", features[kept], expected.numpy()[kept], tolerance
    )


def _compare_coders(bundle: Bundle, variant: Variant, reference: Reference) -> Iterator[ParityLine]:
    generator = torch.Generator().manual_seed(3)
    patch, tokenizer = reference.config.tokenizer.patch, reference.tokenizer
    pictures = torch.rand((variant.batch, 3, *variant.picture), generator=generator) * 2 - 1
    features = tokenizer.encode(pictures)
    tokens = _session(bundle, variant, "image_encoder")(pictures=pictures.numpy())
    expected = to_tokens(features, patch).numpy().reshape(tokens.shape)
    yield _line("image_encoder", "source tokens, largest error", tokens, expected, SUMS)
    total = torch.randn(features.shape, generator=generator) / features.shape[1] ** 0.5
    decoded = _session(bundle, variant, "image_decoder")(running_sum=total.numpy())
    expected = from_decoder(tokenizer.decode(total)[0].numpy())
    yield from _picture_lines(from_decoder(decoded[0]), expected)


def _compare_rounding(
    reference: Reference, edit: Edit, steps: Sequence[PredictedScale], precision: str
) -> Iterator[ParityLine]:
    """What 16-bit products change, in the reference itself: no CPU computes the graphs so."""
    state = reference.transformer.state_dict()
    rounded = _var(reference.config, state, DTYPES[precision])
    given = _forced_edit(edit, steps)
    for step, other in zip(steps, _run_reference(rounded, reference.config, given), strict=True):
        noise = _noise(edit, step)
        share = ((noise < step.probability) != (noise < other.probability)).float().mean().item()
        measure = f"share of bits that differ, reference with products rounded to {precision}"
        yield ParityLine(f"scale_{step.scale:02}", measure, share, ROUNDED_SHARE)


def _compare_static(
    bundle: Bundle, variant: Variant, edit: Edit, steps: Sequence[PredictedScale]
) -> Iterator[ParityLine]:
    """The static graphs, one loaded at a time, their caches handed on."""
    exact = bundle.manifest.precision == "fp32"
    text = _run_stage(bundle, variant, "condition", _text_arrays(variant, edit))
    source = edit.source.numpy().reshape(1, *variant.grids[-1], -1)
    tiled = {**text, "source_tokens": np.repeat(source, variant.batch, 0)}
    cache = _run_stage(bundle, variant, "prefill", tiled)
    past = {name.replace("source", "past"): x for name, x in cache.items() if "source" in name}
    for step in steps:
        stage, shape = f"scale_{step.scale:02}", (1, *variant.grids[step.scale], -1)
        noise = _noise(edit, step)
        # Half of the bits are forced, the other half drawn.
        mask = torch.arange(step.bits.numel()).reshape(step.bits.shape) % 2 == 0
        given = {
            **text,
            **past,
            **{f"reference_{kind}": cache.get(f"reference_{kind}.{step.scale}") for kind in KINDS},
            **_sampling_arrays(variant, edit, step.scale),
            "noise": noise.numpy().reshape(shape),
            "forced_bits": step.bits.numpy().reshape(shape),
            "forced_mask": mask.numpy().reshape(shape),
        }
        if step.tokens is not None:
            given["tokens"] = step.tokens.numpy().reshape(shape)
            given["running_sum"] = steps[step.scale - 1].sum.numpy()
        batched = {n: _tile(variant, n, x) for n, x in given.items() if x is not None}
        outputs = _run_stage(bundle, variant, stage, batched)
        logits = outputs["logits"][:1].reshape(step.logits.shape)
        if exact:
            yield _line(stage, "logits, largest error", logits, step.logits.numpy())
        yield _bits_line(stage, outputs["bits"][:1].reshape(step.bits.shape), step, noise, exact)
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
            yield _line("scale", f"logits of scale {k}, largest error", logits, expected)
        expected = steps[k].sum.numpy()
        yield _line("scale", f"sum after scale {k}, largest error", total[:1], expected, SUMS)


def _run_symbolic(
    bundle: Bundle, variant: Variant, edit: Edit, bits: Sequence[Tensor]
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(scale, guided logits, running sum) of an edit with all bits forced."""
    backend = OnnxBackend(bundle, variant, "cpu", threads=torch.get_num_threads())
    backend.condition(_text_arrays(variant, edit))
    source = edit.source.numpy().reshape(1, *variant.grids[-1], -1)
    backend.prefill(np.repeat(source, variant.batch, 0))
    for k, chosen in enumerate(bits):
        array = chosen.numpy().reshape(1, *variant.grids[k], -1)
        array = np.repeat(array, variant.batch, 0)
        sampling = Sampling(
            np.zeros(array.shape, np.float32),
            edit.guidance[k],
            edit.temperature[k],
            array,
            np.ones(array.shape, np.bool_),
        )
        output = backend.predict(k, sampling)
        yield k, output.logits[:1], output.running_sum


KINDS = ("key", "value")


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
    settings = ort.SessionOptions()
    settings.log_severity_level = 2
    folder = "session.model_external_initializers_file_folder_path"
    settings.add_session_config_entry(folder, str(bundle.graphs_folder))
    session = ort.InferenceSession(
        bundle.graph_bytes(variant.name, stage), settings, providers=["CPUExecutionProvider"]
    )
    names = [tensor.name for tensor in session.get_inputs()]
    outputs = session.run(None, {name: inputs[name] for name in names})
    named = {o.name: np.asarray(x) for o, x in zip(session.get_outputs(), outputs, strict=True)}
    for name, array in named.items():
        if array.dtype != np.bool_ and name != "text_bias" and not np.isfinite(array).all():
            raise ParityError(f"{stage}: {name} is not finite")
        if array.dtype != np.bool_ and array.size > 1 and name != "text_bias" and not array.std():
            raise ParityError(f"{stage}: {name} is constant")
    return named


def _text_arrays(variant: Variant, edit: Edit) -> dict[str, np.ndarray]:
    features, mask = _padded(edit.text, variant)
    arrays = {"text_features": features, "text_mask": mask}
    if variant.rows > variant.batch:
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


def _sampling_arrays(variant: Variant, edit: Edit, scale: int) -> dict[str, np.ndarray]:
    return {
        "guidance_scale": np.array([edit.guidance[scale]], np.float32),
        "temperature": np.array([edit.temperature[scale]], np.float32),
    }


def _tile(variant: Variant, name: str, array: np.ndarray) -> np.ndarray:
    """One picture's input as a batch's."""
    one = ("noise", "forced_bits", "forced_mask", "tokens", "running_sum")
    return np.repeat(array, variant.batch, 0) if name in one else array


def _forced_edit(edit: Edit, steps: Sequence[PredictedScale]) -> Edit:
    bits = [step.bits for step in steps]
    return Edit(
        edit.text, edit.negative, edit.source, edit.guidance, edit.temperature, bits, edit.seed
    )


def _noise(edit: Edit, step: PredictedScale) -> Tensor:
    """The noise that the reference drew a scale's bits from."""
    _, tokens, channels = step.bits.shape
    return torch.from_numpy(uniform_noise(edit.seed, step.scale, tokens, channels))[None]


def _bits_line(
    stage: str, bits: np.ndarray, step: PredictedScale, noise: Tensor, exact: bool
) -> ParityLine:
    differs = torch.from_numpy(bits) != step.bits
    if exact:
        wrong = differs & (tie_margin(step.logits, noise) > TIE)
        return ParityLine(stage, "bits that differ and are no ties", float(wrong.sum()), 0.0)
    share = differs.float().mean().item()
    return ParityLine(stage, "share of bits that differ, computed in fp32", share, ROUNDED_SHARE)


def _picture_lines(picture: np.ndarray, expected: np.ndarray) -> Iterator[ParityLine]:
    difference = np.abs(picture.astype(np.int16) - expected.astype(np.int16))
    yield ParityLine("image_decoder", "picture, levels", float(difference.max()), 1.0)
    share = float((difference > 0).mean())
    yield ParityLine("image_decoder", "picture, share of values differing", share, 0.01)


def _line(
    stage: str, measure: str, actual: np.ndarray, expected: np.ndarray, tolerance: float = LOGITS
) -> ParityLine:
    error = np.abs(actual.astype(np.float64) - expected)
    value = float(error.max()) if np.isfinite(error).all() else float("inf")
    return ParityLine(stage, measure, value, tolerance)


def _each(value: float | Sequence[float], count: int) -> list[float]:
    return [float(value)] * count if isinstance(value, int | float) else list(value)
