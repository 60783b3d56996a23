"""What a bundle has to pass before it is published, and what `verify` asks of one again.

- The static graphs, of which engines are compiled, agree with the reference; so does their symbolic
  twin, as ONNX Runtime runs it, for the largest batch and for one picture.
- Where products are rounded to 16 bits, the reference rounded alike draws nearly the same bits: no
  CPU computes such graphs as a GPU will. bf16 graphs run on no CPU at all but for their coders.
- A model that is too large to be held several times over is compared block by block instead
  (`streamed.py`).
- `verify --golden` compares with a recording of the released implementation as well, and
  `verify --backend` compares engines with ONNX Runtime and with the reference.
"""

from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from itertools import chain
from math import prod

import numpy as np
import torch
from msgspec import structs

from varedit_export.errors import ParityError
from varedit_export.manifest_model import sources_of
from varedit_export.parity.compare import (
    BITS_OUT,
    LOGITS_OUT,
    SUM_OUT,
    CoderInputs,
    Expected,
    Rules,
    compare_run,
    compare_whole,
    run_edit,
)
from varedit_export.parity.edit import (
    ComparedEdit,
    random_coder_inputs,
    random_edit,
    with_grids,
)
from varedit_export.parity.measures import ROUNDED_TOKENS, picture_lines
from varedit_export.parity.reference_backend import Reference, ReferenceBackend
from varedit_export.parity.static_backend import StaticBackend
from varedit_export.parity.streamed import compare_streamed
from varedit_export.sources import Sources, TextSource
from varedit_reference.config import ModelConfig
from varedit_reference.golden.recordings import Recording
from varedit_reference.weights_file import check_finite, open_weights, read_header
from varedit_runtime.backends import DEFAULT, ChosenBackend
from varedit_runtime.backends.base import Backend, ScaleOutput
from varedit_runtime.backends.onnxruntime.backend import OnnxBackend
from varedit_runtime.backends.onnxruntime.integers import check_exact
from varedit_runtime.backends.onnxruntime.options import OnnxRuntimeOptions
from varedit_runtime.backends.wiring import FUSED, SYMBOLIC, TEXT, of_batch
from varedit_runtime.bundle import Bundle
from varedit_runtime.errors import CheckpointError
from varedit_runtime.manifest import UNGUIDED, ParityLine, Variant, weights_file
from varedit_runtime.pictures import from_decoder
from varedit_runtime.precision import Precision

# Bytes of a model's weights in fp32, over which it is compared block by block: the whole
# comparison holds them some four times, in the reference, rounded and in ONNX Runtime's sessions.
LARGEST_WHOLE = 10**9
WITHOUT = " without guidance"  # says in a line of the twin's which rows it computed
ALONE = " of one picture"


def compare_bundle(bundle: Bundle, config: ModelConfig, sources: Sources) -> Iterator[ParityLine]:
    """Compare every graph of every variant with the reference of these weights.

    They are those that the bundle was built from or, by `sources_of`, its own. Raises BackendError
    if this processor computes the bundle's precision wrongly.
    """
    check_exact(bundle.manifest.policy)
    if is_large(count_parameters(bundle)):
        return compare_streamed(bundle, config, sources)
    return compare_graphs(bundle, Reference.from_sources(config, sources))


def check_weights(bundle: Bundle) -> None:
    """Raise ParityError, naming a weight, on numbers in a bundle's files that are not finite."""
    for component in bundle.components:
        for name, tensor in open_weights(bundle.weights_path(component)).items():
            try:
                check_finite(name, tensor)
            except CheckpointError as error:
                raise ParityError(f"{bundle.path}, {component}: {error}") from error


def is_large(parameters: int) -> bool:
    """Say whether a model is too large to be compared whole."""
    return parameters * torch.float32.itemsize > LARGEST_WHOLE


def count_parameters(bundle: Bundle) -> int:
    """Count the numbers that a bundle's weights are."""
    headers = (read_header(bundle.path, weights_file(name)) for name in bundle.components)
    return sum(prod(tensor.shape) for header in headers for tensor in header.values())


def compare_graphs(bundle: Bundle, model: Reference) -> Iterator[ParityLine]:
    """Compare every graph of every variant with the reference, held whole."""
    precision = bundle.manifest.policy
    exact = precision.exact
    rules = Rules(half=True)
    if not exact:
        said = "" if precision.integers else ", computed in fp32"
        rules = replace(_rounded(precision), half=True, rounding=said)
    for variant in bundle.manifest.variants:
        reference = ReferenceBackend(model.of(variant), variant)
        edit, inputs = _random(variant, reference.reference.config, model.text)
        with closing(reference):  # keys and values of a whole edit, which are not needed again
            expected = run_edit(reference, edit, inputs)
            without = _without_guidance(reference, edit)
        if not precision.onnxruntime:  # but for its coders, which are fp32
            coded = {stage: out for stage, out in expected.coded.items() if stage != TEXT}
            static = StaticBackend(bundle, variant)
            yield from compare_run(static, Expected((), coded), edit, inputs, Rules())
        else:
            with closing(StaticBackend(bundle, variant)) as static:
                yield from compare_run(static, expected, edit, inputs, rules)
                yield from _compare_unguided(static, without, replace(rules, form=UNGUIDED))
            for stage in (SYMBOLIC, FUSED):
                if stage in variant.graphs:
                    twin_rules = _twin_rules(stage, precision)
                    with closing(_onnx(bundle, variant, stage)) as twin:
                        scales = Expected(expected.scales)
                        yield from compare_run(twin, scales, edit, {}, twin_rules)
                        if twin.drops_rows:
                            own = replace(twin_rules, against=WITHOUT)
                            yield from _compare_unguided(twin, without, own)
            if variant.batch > 1:
                with closing(_onnx(bundle, of_batch(variant, 1), SYMBOLIC)) as twin:
                    first = _first_pictures(expected), edit, _first_rows(inputs)
                    own = replace(_twin_rules(SYMBOLIC, precision), against=ALONE)
                    yield from compare_run(twin, *first, own)
        if not exact:
            yield from _compare_rounding(reference, Expected(expected.scales), edit, precision)


def _first_pictures(expected: Expected) -> Expected:
    """Return what is expected of a batch's first picture."""
    scales = [ScaleOutput(*(array[:1] for array in vars(one).values())) for one in expected.scales]
    return Expected(scales, {stage: array[:1] for stage, array in expected.coded.items()})


def _first_rows(inputs: CoderInputs) -> CoderInputs:
    return {stage: [array[:1] for array in given] for stage, given in inputs.items()}


def _rounded(precision: Precision) -> Rules:
    """Return how far rounded products may take a run from the reference in fp32."""
    gates = precision.gates
    return Rules(rounded=gates, largest_logit=gates.logits)


def _without_guidance(backend: Backend, edit: ComparedEdit) -> list[tuple[ComparedEdit, Expected]]:
    """Return a guided edit's twin with conditional rows only, and what a backend computes of it."""
    if not (edit.guided and backend.drops_rows):
        return []
    unguided = edit.without_guidance
    return [(unguided, run_edit(backend, unguided, {}))]


def _compare_unguided(
    backend: Backend, without: Iterable[tuple[ComparedEdit, Expected]], rules: Rules
) -> Iterator[ParityLine]:
    """Compare what `_without_guidance` returns."""
    for unguided, scales in without:
        yield from compare_run(backend, scales, unguided, {}, rules)


def _twin_rules(stage: str, precision: Precision) -> Rules:
    """Return how a twin is compared; the fused one is not what the static graphs compute."""
    if precision.exact:
        return Rules((LOGITS_OUT, SUM_OUT), twin=stage)
    bits = (BITS_OUT,) if stage == FUSED else ()
    rules = replace(_rounded(precision), rounding=", on a CPU", twin=stage)
    return replace(rules, outputs=(LOGITS_OUT, *bits, SUM_OUT))


def _compare_rounding(
    reference: ReferenceBackend, expected: Expected, edit: ComparedEdit, precision: Precision
) -> Iterator[ParityLine]:
    """Measure what the precision's products change in the reference itself."""
    model = reference.reference.rounded(precision)
    rounding = f", reference with products rounded to {precision.name}"
    rules = replace(_rounded(precision), outputs=(LOGITS_OUT, BITS_OUT), rounding=rounding)
    yield from compare_run(ReferenceBackend(model, reference.variant), expected, edit, {}, rules)


def compare_recording(bundle: Bundle, recording: Recording) -> Iterator[ParityLine]:
    """Compare a bundle, built from a recording's checkpoints, with the recording's own numbers.

    Raises ParityError if the recording is of another model.
    """
    (variant,) = bundle.manifest.variants
    channels = bundle.manifest.model.token_channels
    sizes = [height * width * channels for height, width in variant.grids]
    if (recorded := [bits.numel() for bits in recording.forced_bits]) != sizes:
        raise ParityError(
            f"the recording has scales of {recorded} bits and {bundle.path} of {sizes}: give the "
            "recording whose checkpoints the bundle was built from"
        )
    edit = ComparedEdit(
        recording["in.text_features"],
        recording.tensors.get("in.negative_text_features"),
        recording["out.source_tokens"].unflatten(1, variant.grids[-1]),
        recording.guidance_scale,
        recording.temperature,
        seed=0,
    )
    scales = []
    for k, (grid, bits) in enumerate(zip(variant.grids, recording.forced_bits, strict=True)):
        logits = recording[f"out.guided_logits.{k}"].numpy().reshape(1, *grid, -1, 2)
        forced = bits.numpy().reshape(1, *grid, -1)
        both = (np.repeat(one, variant.batch, 0) for one in (logits, forced))
        scales.append(ScaleOutput(*both, running_sum=np.empty(0)))  # sums are not recorded
    against = " against the recording"
    with closing(_onnx(bundle, variant)) as twin:
        rules = Rules((LOGITS_OUT,), against=against)
        last = yield from compare_run(twin, Expected(scales), edit, {}, rules)
        assert last is not None  # a variant has scales
        picture = from_decoder(twin.decode(last.running_sum)[0])
        yield from picture_lines(picture, recording["out.image_rgb_u8"].numpy(), against)


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


def compare_backend(bundle: Bundle, variant: Variant, backend: Backend) -> Iterator[ParityLine]:
    """Compare a backend with ONNX Runtime on the CPU and with the reference.

    Not with ONNX Runtime in bf16, which it lacks on CPUs, nor with the reference where the model
    is too large to be held whole. Raises ParityError where it can be compared with neither.
    """
    config, sources = sources_of(bundle)
    edit, inputs = _random(variant, with_grids(variant, config), sources.text)
    precision, large = bundle.manifest.policy, is_large(count_parameters(bundle))
    if large and not precision.onnxruntime:
        raise ParityError(
            f"{bundle.path} is in {precision.name}, which ONNX Runtime does not compute on CPUs, "
            "and too large to be compared with the reference: verify engines of the same model in "
            "fp16"
        )
    rules = Rules()
    if not precision.exact:
        rules = replace(_rounded(precision), tokens=ROUNDED_TOKENS)
    if precision.onnxruntime:
        with closing(_onnx(bundle, variant)) as onnx:
            expected = run_edit(onnx, edit, inputs)
            without = _without_guidance(onnx, edit) if backend.drops_rows else []
        against = replace(rules, against=" against ONNX Runtime")
        own = replace(against, form=UNGUIDED)
        lines = compare_run(backend, expected, edit, inputs, against)
        for line in chain(lines, _compare_unguided(backend, without, own)):
            yield structs.replace(line, against=DEFAULT)
    if not large:
        reference = ReferenceBackend(Reference.from_sources(config, sources).of(variant), variant)
        expected = run_edit(reference, edit, inputs)
        without = _without_guidance(reference, edit) if backend.drops_rows else []
        against = replace(rules, against=" against the reference")
        yield from compare_run(backend, expected, edit, inputs, against)
        yield from _compare_unguided(backend, without, replace(against, form=UNGUIDED))
    if (whole := backend.whole) is not None:
        yield compare_whole(backend, whole, edit, inputs)


def _random(
    variant: Variant, config: ModelConfig, text: TextSource | None
) -> tuple[ComparedEdit, CoderInputs]:
    vocabulary = None if text is None else text.config.vocabulary
    return random_edit(variant, config), random_coder_inputs(variant, config, vocabulary)


def _onnx(bundle: Bundle, variant: Variant, twin: str | None = None) -> OnnxBackend:
    return OnnxBackend(bundle, variant, OnnxRuntimeOptions(threads=torch.get_num_threads()), twin)
