"""One comparison of any two backends: a fault is found in the stage that has it, and no other."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from bundles import bundle_config, random_weights, small_bundle

from varedit_export.errors import ParityError
from varedit_export.parity.compare import (
    CoderInputs,
    Expected,
    Rules,
    begin_edit,
    compare_run,
    run_edit,
)
from varedit_export.parity.edit import (
    ComparedEdit,
    random_coder_inputs,
    random_edit,
    scale_sampling,
)
from varedit_export.parity.measures import gate, share_line, share_of_error_line
from varedit_export.parity.reference_backend import Reference, ReferenceBackend
from varedit_export.parity.static_backend import StaticBackend
from varedit_runtime.backends.base import Sampling, ScaleOutput
from varedit_runtime.bundle import Bundle
from varedit_runtime.manifest import ParityLine
from varedit_runtime.precision import Gates

BROKEN = 2  # the scale


@pytest.fixture(scope="module")
def backend() -> ReferenceBackend:
    (variant,) = Bundle.open(small_bundle()).manifest.variants
    reference = Reference.from_sources(bundle_config(), random_weights())
    return ReferenceBackend(reference.of(variant), variant)


@pytest.fixture(scope="module")
def given(backend: ReferenceBackend) -> tuple[Expected, ComparedEdit, CoderInputs]:
    config, variant = backend.reference.config, backend.variant
    edit, inputs = random_edit(variant, config), random_coder_inputs(variant, config, 30)
    return run_edit(backend, edit, inputs), edit, inputs


def failed(lines: list[ParityLine]) -> set[tuple[str, str]]:
    """Stages, and the first word of what was measured, of lines over their tolerance."""
    return {
        (line.stage, line.measure.split()[0].strip(","))
        for line in lines
        if not line.value <= line.tolerance
    }


@pytest.mark.parametrize("half", [False, True])
def test_a_backend_agrees_with_itself_exactly(
    backend: ReferenceBackend, given: tuple[Expected, ComparedEdit, CoderInputs], half: bool
) -> None:
    lines = list(compare_run(backend, *given, Rules(half=half)))
    assert len(lines) == 4 + 3 * len(backend.variant.grids)
    assert {line.value for line in lines} == {0}


def moved(array: np.ndarray) -> np.ndarray:
    return array + np.float32(0.02) * np.sign(array)


def flipped(output: ScaleOutput, sampling: Sampling) -> ScaleOutput:
    """Draw other bits, but take the forced ones."""
    if sampling.forced_bits is None:
        return replace(output, bits=~output.bits)
    return output


@pytest.mark.parametrize(
    ("stage", "fault", "found"),
    [
        ("encode_text", moved, {("text_encoder", "features")}),
        ("encode_pictures", moved, {("image_encoder", "source")}),
        ("decode", lambda x: x[:, ::-1], {("image_decoder", "picture")}),
    ],
)
def test_a_coder_that_computes_otherwise_is_named(
    backend: ReferenceBackend,
    given: tuple[Expected, ComparedEdit, CoderInputs],
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    fault: Callable[[np.ndarray], np.ndarray],
    found: set[tuple[str, str]],
) -> None:
    compute = getattr(backend, stage)
    monkeypatch.setattr(backend, stage, lambda *given: fault(compute(*given)))
    assert failed(list(compare_run(backend, *given, Rules()))) == found


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (lambda out, _: replace(out, logits=moved(out.logits)), {"logits"}),
        (lambda out, _: replace(out, running_sum=moved(out.running_sum)), {"sum"}),
        (flipped, {"bits"}),
    ],
)
def test_a_scale_that_computes_otherwise_is_named_and_no_other(
    backend: ReferenceBackend,
    given: tuple[Expected, ComparedEdit, CoderInputs],
    monkeypatch: pytest.MonkeyPatch,
    fault: Any,
    found: set[str],
) -> None:
    broken(backend, monkeypatch, fault)
    lines = list(compare_run(backend, *given, Rules()))
    assert failed(lines) == {(f"scale_{BROKEN:02}", name) for name in found}


def test_bits_that_are_drawn_although_they_are_forced_are_found(
    backend: ReferenceBackend,
    given: tuple[Expected, ComparedEdit, CoderInputs],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected, edit, _ = given
    variant, predict = backend.variant, backend.predict
    begin_edit(backend, edit)
    outputs = [
        predict(k, scale_sampling(variant, edit, k, ~scale.bits, half=True))
        for k, scale in enumerate(expected.scales)
    ]
    forced = Expected(outputs)
    assert not failed(list(compare_run(backend, forced, edit, {}, Rules(half=True))))
    monkeypatch.setattr(backend, "predict", lambda k, s: predict(k, replace(s, forced_bits=None)))
    lines = list(compare_run(backend, forced, edit, {}, Rules(half=True)))
    assert {"sum", "bits"} <= {name for _, name in failed(lines)}


@pytest.mark.parametrize(("value", "said"), [(np.nan, "not finite"), (0.0, "constant")])
def test_what_is_not_finite_or_constant_is_an_error(
    backend: ReferenceBackend,
    given: tuple[Expected, ComparedEdit, CoderInputs],
    monkeypatch: pytest.MonkeyPatch,
    value: float,
    said: str,
) -> None:
    broken(backend, monkeypatch, lambda out, _: replace(out, logits=out.logits * 0 + value))
    with pytest.raises(ParityError, match=f"scale_{BROKEN:02}: logits is {said}"):
        list(compare_run(backend, *given, Rules()))


def broken(
    backend: ReferenceBackend,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[ScaleOutput, Sampling], ScaleOutput],
) -> None:
    predict = backend.predict

    def other(scale: int, sampling: Sampling) -> ScaleOutput:
        output = predict(scale, sampling)
        return fault(output, sampling) if scale == BROKEN else output

    monkeypatch.setattr(backend, "predict", other)


def test_a_flipped_bit_counts_the_same_in_every_batch() -> None:
    """A batch repeats one picture, so one flip is in all rows; the first scales have few bits."""
    for batch in (1, 2, 4):
        differs = np.zeros((batch, 1, 1, 24), np.bool_)
        differs[..., :2] = True
        line = share_line("scale_00", "share", differs, Gates(bits=0.02))
        assert line.value <= line.tolerance
        differs[..., :3] = True
        line = share_line("scale_00", "share", differs, Gates(bits=0.02))
        assert not line.value <= line.tolerance


def test_the_error_of_rounded_features_is_a_share_of_them_in_every_batch() -> None:
    features = np.array([[3.0, -4.0]])
    for rows in (1, 4):
        expected = np.repeat(features, rows, 0)
        line = share_of_error_line("text_encoder", "features", expected + 0.5, expected, 0.2)
        assert line.value == pytest.approx(0.5 / 12.5**0.5)
        assert gate([line]) == [line]
    bad = share_of_error_line("text_encoder", "features", expected * np.nan, expected, 0.2)
    with pytest.raises(ParityError):
        gate([bad])


def test_a_static_graph_with_another_shape_than_its_manifest_is_refused() -> None:
    bundle = Bundle.open(small_bundle())
    (variant,) = bundle.manifest.variants
    with closing(StaticBackend(bundle, variant)) as static:
        step = static.steps["image_encoder"]
        (name, view), *_ = step.outputs.items()
        rows, *rest = view.shape
        longer = replace(view, shape=(rows, *rest[:-1], rest[-1] + 1))
        static._shapes[view.value] = longer
        pictures = np.random.default_rng(0).random((variant.batch, 3, *variant.picture), np.float32)
        with pytest.raises(ParityError, match=r"image_encoder: .* manifest says"):
            static._run(replace(step, outputs={name: longer}), {"pictures": pictures})
