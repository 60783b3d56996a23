"""Compare a backend with what another one computes of the same edit.

`run_edit` lets one backend compute the edit of `edit.py`, and keeps what it puts out. `compare_run`
gives another one the same inputs, and measures every named output against those kept:

    expected = run_edit(ReferenceBackend(reference, variant), edit, coder_inputs)
    lines = compare_run(StaticBackend(bundle, variant), expected, edit, coder_inputs, Rules())

The two may be any: the reference, graphs on ONNX Runtime, compiled engines. So is what is
`Expected`: a recording of the released implementation serves as well.

Scales are teacher-forced. Each is predicted twice. First it draws its bits, from the noise that the
expected ones were drawn from, so that they must be equal; half of them may be forced meanwhile,
which shows that forcing works. Then all are forced to the expected ones: the sum after the scale
must be equal but for rounding, and the next scale starts from where the other run was, whatever
this one drew. Errors so stay where they are made, in a scale and not in all that follow.
"""

from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from varedit_export.parity.edit import ComparedEdit, scale_sampling, source_array, text_arrays
from varedit_export.parity.measures import (
    FEATURES,
    LOGITS,
    SUMS,
    check_output,
    line,
    picture_lines,
    share_line,
    share_of_error_line,
    ties_line,
)
from varedit_runtime.backends.base import (
    Backend,
    EditWhole,
    Negatives,
    Prompts,
    ScaleOutput,
    edit_by_stages,
)
from varedit_runtime.backends.wiring import DECODER, ENCODER, TEXT
from varedit_runtime.manifest import ParityLine, scale_name
from varedit_runtime.pictures import from_decoder
from varedit_runtime.precision import Gates

CoderInputs = Mapping[str, Sequence[np.ndarray]]
LOGITS_OUT, BITS_OUT, SUM_OUT = "logits", "bits", "running_sum"


@dataclass(frozen=True)
class Expected:
    """What a run put out: coded, of the coders by stage; scales, of every scale."""

    scales: Sequence[ScaleOutput]
    coded: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Rules:
    """What is compared of two runs, how far it may differ, and what the lines say.

    outputs: the names of a scale's outputs that are compared. rounded: how many bits may differ,
    where products are rounded; None: those that differ must be ties. half: whether every other bit
    is forced while the others are drawn. tokens: the tolerance of the image encoder. largest_logit:
    the tolerance of guided logits, where rounding makes it more than LOGITS, as a share of the
    largest one.

    against: names the expected run, where a report has lines against several, as " against the
    reference". rounding: says what was rounded. form: UNGUIDED where the graphs without guidance
    are run, whose names the lines then have. twin: the symbolic graph that all scales are runs of,
    whose stage the lines then have.
    """

    outputs: Collection[str] = (LOGITS_OUT, BITS_OUT, SUM_OUT)
    rounded: Gates | None = None
    half: bool = False
    tokens: float = SUMS
    largest_logit: float = 0.0
    against: str = ""
    rounding: str = ""
    form: str = ""
    twin: str = ""


def run_edit(backend: Backend, edit: ComparedEdit, coder_inputs: CoderInputs) -> Expected:
    """Compute an edit, every scale from the bits that the one before drew."""
    coded = {stage: _code(backend, stage, given) for stage, given in coder_inputs.items()}
    begin_edit(backend, edit)
    scales = range(len(backend.variant.grids))
    drawn = [backend.predict(k, scale_sampling(backend.variant, edit, k)) for k in scales]
    return Expected(drawn, coded)


def begin_edit(backend: Backend, edit: ComparedEdit) -> None:
    """Give a backend the edit up to its first scale; the text is padded."""
    backend.condition(text_arrays(backend.variant, edit))
    backend.prefill(source_array(backend.variant, edit))


def compare_run(
    backend: Backend,
    expected: Expected,
    edit: ComparedEdit,
    coder_inputs: CoderInputs,
    rules: Rules,
) -> Generator[ParityLine, None, ScaleOutput | None]:
    """Compare whatever is expected, coders first; return the last scale, all of its bits forced.

    Raises ParityError on an output that is not finite, or constant.
    """
    for stage, theirs in expected.coded.items():
        coded = _code(backend, stage, coder_inputs[stage])
        yield from _coder_lines(stage, coded, theirs, coder_inputs[stage], rules)
    ours = None
    if expected.scales:
        begin_edit(backend, edit)
    for k, theirs in enumerate(expected.scales):
        left = [name for name in (LOGITS_OUT, BITS_OUT, SUM_OUT) if name in rules.outputs]
        if BITS_OUT in left:
            forced = theirs.bits if rules.half else None
            drawn = scale_sampling(backend.variant, edit, k, forced, rules.half)
            ours, noise = backend.predict(k, drawn), drawn.noise
            yield from _scale_lines(k, left[: left.index(BITS_OUT) + 1], ours, theirs, noise, rules)
            left = left[left.index(BITS_OUT) + 1 :]
        all_forced = scale_sampling(backend.variant, edit, k, theirs.bits)
        ours = backend.predict(k, all_forced)
        yield from _scale_lines(k, left, ours, theirs, all_forced.noise, rules)
    return ours


def compare_whole(
    backend: Backend, whole: EditWhole, edit: ComparedEdit, coder_inputs: CoderInputs
) -> ParityLine:
    """Compare an edit in one piece with the same edit by stages: all must be equal."""
    variant, (ids, mask), (pictures,) = backend.variant, coder_inputs[TEXT], coder_inputs[ENCODER]
    negatives = None
    if variant.guided:
        negatives = Negatives(ids[::-1, ::-1].copy(), mask, np.ones(len(ids), np.bool_))
    prompts = Prompts(ids, mask, negatives)
    samplings = [scale_sampling(variant, edit, scale) for scale in range(len(variant.grids))]
    random = np.random.default_rng(4)  # every row's own noise, so that rows cannot be mixed up
    samplings = [
        replace(one, noise=random.random(one.noise.shape, np.float32)) for one in samplings
    ]
    edited = whole(prompts, pictures, samplings, False)
    staged = [
        array
        for output in edit_by_stages(backend, prompts, pictures, samplings)
        for name, array in output.arrays.items()
        if name in (LOGITS_OUT, "pictures")
    ]
    pairs = zip((*edited.logits, edited.pictures), staged, strict=True)
    different = sum(not np.array_equal(ours, theirs) for ours, theirs in pairs)
    measure = "an edit in one piece: scales and pictures that differ from those by stages"
    return ParityLine("edit", measure, float(different), 0.0)


def _code(backend: Backend, stage: str, given: Sequence[np.ndarray]) -> np.ndarray:
    code: dict[str, Callable[..., np.ndarray]] = {
        TEXT: backend.encode_text,
        ENCODER: backend.encode_pictures,
        DECODER: backend.decode,
    }
    return code[stage](*given)


def _coder_lines(
    stage: str, ours: np.ndarray, theirs: np.ndarray, given: Sequence[np.ndarray], rules: Rules
) -> Iterator[ParityLine]:
    check_output(stage, "output", ours)
    if stage == DECODER:
        ours, theirs = (np.stack([*map(from_decoder, batch)]) for batch in (ours, theirs))
        yield from picture_lines(ours, theirs, rules.against)
    elif stage == ENCODER:
        measure = f"source tokens{rules.against}, largest error"
        yield line(stage, measure, ours, theirs, rules.tokens)
    else:
        _, mask = given  # what stands where the padding is does not matter
        real = ours[mask], theirs[mask]
        if rules.rounded is None:
            yield line(stage, f"features{rules.against}, largest error", *real, FEATURES)
        else:
            measure = f"features{rules.against}, error as a share"
            most = max(rules.rounded.features, FEATURES)
            yield share_of_error_line(stage, measure, *real, most)


def _scale_lines(
    scale: int,
    names: Sequence[str],
    ours: ScaleOutput,
    theirs: ScaleOutput,
    noise: np.ndarray,
    rules: Rules,
) -> Iterator[ParityLine]:
    """Compare those outputs of a scale that are named."""
    against, own = rules.against, scale_name(scale) + rules.form
    stage, of, after = own, "", ""
    if rules.twin:
        stage, of, after = rules.twin, f" of scale {scale}", f" after scale {scale}"
    for name in names:
        check_output(own, name, getattr(ours, name))
    if LOGITS_OUT in names:
        tolerance = max(LOGITS, rules.largest_logit * float(np.abs(theirs.logits).max()))
        measure = f"logits{of}{against}, largest error{rules.rounding}"
        yield line(stage, measure, ours.logits, theirs.logits, tolerance)
    differs = ours.bits != theirs.bits
    if BITS_OUT in names and rules.rounded is None:
        measure = f"bits{against} that differ and are no ties"
        yield ties_line(stage, measure, differs, theirs.logits, noise)
    elif BITS_OUT in names and rules.rounded is not None:
        measure = f"share of bits{against} that differ{rules.rounding}"
        yield share_line(stage, measure, differs, rules.rounded)
    if SUM_OUT in names:
        measure = f"sum{after}{against}, largest error"
        yield line(stage, measure, ours.running_sum, theirs.running_sum, SUMS)
