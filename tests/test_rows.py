"""Rows by guidance: what is computed where guidance is 1, and that no picture changes by it."""

import ctypes
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import bundle_config, small_bundle
from editing import (
    Recorder,
    equal_until_tie,
    noise_of,
    pair_bundle,
    picture,
    plain_bundle,
)
from simulated_gpu import SimulatedGpu
from stand_in_cuda import pretend
from uncompiled import compiled, keep_engines_in, near

from varedit_export.parity.static_backend import StaticBackend
from varedit_reference.scale_loop import PredictedScale
from varedit_runtime.backends.engines.backend import EngineBackend
from varedit_runtime.backends.engines.engine_set import EngineLayout
from varedit_runtime.backends.graph_backend import GraphBackend
from varedit_runtime.backends.onnxruntime import cuda
from varedit_runtime.bundle import Bundle
from varedit_runtime.editing.editor import Editor
from varedit_runtime.editing.preparer import read_instructions
from varedit_runtime.editing.results import Progress
from varedit_runtime.errors import ConfigError
from varedit_runtime.manifest import UNGUIDED

PHOTO, OTHER = picture(90, 60), picture(60, 90, 200)
GRIDS, CHANNELS = bundle_config().transformer.grids, bundle_config().transformer.token_channels
OFF = {"everywhere": [1.0] * 4, "from the third on": [2.0, 3, 1, 1], "at the last": [1.0, 2, 3, 1]}


def rows_of(editor: Editor) -> list[tuple[str, int]]:
    """Record the rows of the transformer's steps from now on, by name."""
    rows: list[tuple[str, int]] = []
    backend = editor.backend
    assert isinstance(backend, GraphBackend)
    run = backend._run

    def recorded(step: Any, given: Any) -> Any:
        if "modulation" in {**step.inputs, **step.outputs}:
            view = {**step.inputs, **step.outputs}["modulation"]
            rows.append((step.name.removesuffix(UNGUIDED), view.shape[0]))
        return run(step, given)

    backend._run = recorded  # type: ignore[method-assign]
    return rows


@pytest.mark.parametrize(
    ("guidance", "expected"),
    [
        (3, [2, 2, 2, 2, 2, 2]),
        (1, [1, 1, 1, 1, 1, 1]),
        ([2, 2, 2, 1], [2, 2, 2, 2, 2, 1]),
        ([2, 1, 1, 1], [2, 2, 2, 1, 1, 1]),
        ([1, 1, 2, 1], [2, 2, 2, 2, 2, 1]),  # a guided scale follows: it needs all caches
        ([1, 1, 1, 0.5], [2, 2, 2, 2, 2, 2]),
    ],
)
def test_a_scale_computes_the_rows_that_it_and_later_ones_need(
    guidance: Any, expected: list[int]
) -> None:
    names = ["condition", "prefill", *(f"scale_{k:02}" for k in range(4))]
    with Editor.open(small_bundle(), threads=1) as editor:
        rows = rows_of(editor)
        editor.edit(PHOTO, "red", guidance_scale=guidance, seed=1)
        assert rows == list(zip(names, expected, strict=True))


def test_fast_switches_guidance_off_at_the_last_two_scales() -> None:
    with Editor.open(small_bundle(), threads=1) as editor:
        rows = rows_of(editor)
        ours = editor.edit(PHOTO, "red", fast=True, seed=1).image
        assert [count for _, count in rows] == [2, 2, 2, 2, 1, 1]
        guidance = editor.bundle.manifest.guidance_scale
        asked = {"guidance_scale": [guidance, guidance, 1, 1], "seed": 1}
        assert ours == editor.edit(PHOTO, "red", **asked).image
    with Editor.open(plain_bundle(), threads=1) as editor:
        assert editor.edit(PHOTO, "red", fast=True, seed=1).seed == 1
        with pytest.raises(ConfigError, match="fast is 'yes'; give True or False"):
            editor.edit(PHOTO, "red", fast="yes")  # type: ignore[call-overload]


def steps_of(editor: Editor, **options: Any) -> list[PredictedScale]:
    recorder = Recorder.of(editor)
    editor.edit([PHOTO, OTHER], ["add a hat", "make it night"], seed=7, **options)
    return recorder.steps


@pytest.mark.parametrize("guidance", OFF.values(), ids=OFF)
def test_dropped_rows_change_no_bit(guidance: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two pictures at a time, whose rows lie between each other's in the caches."""
    with Editor.open(pair_bundle(), threads=1) as editor:
        ours = steps_of(editor, guidance_scale=guidance)
    monkeypatch.setattr(GraphBackend, "drops_rows", False)
    with Editor.open(pair_bundle(), threads=1) as editor:
        theirs = steps_of(editor, guidance_scale=guidance)
    assert equal_until_tie(ours, theirs, noise_of([7, 8], GRIDS, CHANNELS))
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one.logits, other.logits, rtol=0, atol=2e-4)


@pytest.mark.parametrize("guidance", OFF.values(), ids=OFF)
def test_static_graphs_drop_rows_as_the_twin_does(guidance: list[float]) -> None:
    bundle = Bundle.open(pair_bundle())
    (variant,) = bundle.manifest.variants
    with Editor.open(pair_bundle(), threads=1) as editor:
        theirs = steps_of(editor, guidance_scale=guidance)
    static = StaticBackend(bundle, variant)
    instructions = read_instructions(bundle, variant.text_tokens)
    with Editor(bundle, variant, static, instructions) as editor:
        ours = steps_of(editor, guidance_scale=guidance)
    assert equal_until_tie(ours, theirs, noise_of([7, 8], GRIDS, CHANNELS))


def test_pictures_of_one_batch_have_settings_of_their_own() -> None:
    """As alone, with the same noise: one with guidance at the last scale only, and temperatures."""
    rows = [1.0, 1, 1, 2], [2.0, 3, 4, 3]
    temperatures = np.array([[0.5], [0.9]])
    with Editor.open(pair_bundle(), threads=1) as editor:
        both = steps_of(editor, guidance_scale=rows, temperature=temperatures)
    for i, (guidance, temperature) in enumerate(zip(rows, (0.5, 0.9), strict=True)):
        with Editor.open(pair_bundle(), threads=1) as editor:
            same = steps_of(editor, guidance_scale=guidance, temperature=temperature)
        ours, theirs = ([only(step, i) for step in steps] for steps in (both, same))
        assert equal_until_tie(ours, theirs, noise_of([7 + i], GRIDS, CHANNELS))


def only(step: PredictedScale, picture: int) -> PredictedScale:
    own = slice(picture, picture + 1)
    return PredictedScale(
        step.scale, None, step.logits[own], step.probability, step.bits[own], step.sum[own]
    )


def test_a_list_of_lists_is_of_pictures_and_a_list_is_of_scales() -> None:
    with Editor.open(small_bundle(), threads=1) as editor:
        several = editor.edit(PHOTO, "red", guidance_scale=[[1], [2], [3, 3, 3, 1]], seed=5)
        assert [one.seed for one in several] == [5, 6, 7]
        for one, guidance in zip(several, (1, 2, [3, 3, 3, 1]), strict=True):
            alone = editor.edit(PHOTO, "red", guidance_scale=guidance, seed=one.seed)
            assert one.image == alone.image
        assert isinstance(editor.edit(PHOTO, "red", temperature=[[1.0]], seed=5), list)
        array = np.full((2, 4), 2.0)
        both: Any = {"guidance_scale": array}
        assert len(editor.edit([PHOTO, OTHER], "red", seed=5, **both)) == 2


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"guidance_scale": [[1], [2]]}, "guidance_scale has 2 entries: lists must be equally"),
        ({"temperature": np.ones((3, 3))}, "temperature has 3 values; give one, or one for each"),
        ({"guidance_scale": [[1], [2], [3, 3]]}, "guidance_scale has 2 values"),
        ({"guidance_scale": [[1], [2], []]}, "guidance_scale has 0 values"),
        ({"guidance_scale": [2, [1], [3], [1]]}, "give a number, or one for each of 4 scales"),
        ({"guidance_scale": [[1], [[2]], [3]]}, "guidance_scale has 1 values"),
        ({"guidance_scale": np.ones((3, 4, 1))}, "give a number, or one for each of 4 scales"),
        ({"temperature": [[1], [0], [1]]}, "it must be over 0"),
        ({"temperature": [["hot"]] * 3}, "temperature is 'hot'"),
        ({"temperature": [[1]] * 10_001}, "give a list of at most 10000"),
    ],
)
def test_wrong_settings_of_pictures_are_refused(wrong: dict[str, Any], said: str) -> None:
    with Editor.open(small_bundle(), threads=1) as editor, pytest.raises(ConfigError, match=said):
        editor.edit([PHOTO] * 3, "red", **wrong)


def test_guidance_of_one_picture_asks_for_a_guided_bundle() -> None:
    with Editor.open(plain_bundle(), threads=1) as editor:
        assert len(editor.edit([PHOTO] * 2, "red", guidance_scale=[[1], [1]], seed=1)) == 2
        with pytest.raises(ConfigError, match="was built without guidance"):
            editor.edit([PHOTO] * 2, "red", guidance_scale=[[1], [2]])


# Engines


@pytest.mark.parametrize("guidance", OFF.values(), ids=OFF)
@pytest.mark.parametrize(
    ("layout", "dropping"), [("external", True), ("profiles", True), ("baked", False)]
)
def test_engines_drop_rows_in_one_launch_and_by_stages(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    layout: EngineLayout,
    dropping: bool,
    guidance: list[float],
) -> None:
    """Baked engines, which would hold all weights once more, compute all rows."""
    keep_engines_in(tmp_path, monkeypatch)
    bundle, engines = compiled(pair_bundle(), layout)
    (variant,) = bundle.manifest.variants
    gpu = SimulatedGpu(bundle.graphs_folder)
    backend = EngineBackend(bundle, variant, engines, gpu)
    assert backend.drops_rows is dropping
    editor = Editor(bundle, variant, backend, read_instructions(bundle, variant.text_tokens))
    asked = ([PHOTO, OTHER], ["add a hat", "red"])
    with Editor.open(pair_bundle(), threads=1) as other:
        expected = other.edit(*asked, guidance_scale=guidance, seed=7)
    whole = editor.edit(*asked, guidance_scale=guidance, seed=7)
    # By stages it begins at the first scale, if the caches still have all rows, and then again.
    warm = editor.edit(*asked, guidance_scale=guidance, seed=7, on_scale=nobody)
    editor.forget()
    staged = editor.edit(*asked, guidance_scale=guidance, seed=7, on_scale=nobody)
    again = editor.edit(*asked, guidance_scale=guidance, seed=7)
    for ours in (whole, warm, staged, again):
        assert all(near(a.image, b.image) for a, b in zip(ours, expected, strict=True))
    assert list(again[0].timings) == ["edit"]


def nobody(progress: Progress) -> None:
    """Watch an edit, which therefore runs by stages."""


def test_further_results_of_engines_are_one_shorter_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_engines_in(tmp_path, monkeypatch)
    bundle, engines = compiled(small_bundle(), "external")
    (variant,) = bundle.manifest.variants
    gpu = SimulatedGpu(bundle.graphs_folder)
    backend = EngineBackend(bundle, variant, engines, gpu)
    editor = Editor(bundle, variant, backend, read_instructions(bundle, variant.text_tokens))
    with Editor.open(small_bundle(), threads=1) as other:
        expected = other.edit(PHOTO, "red", num_images_per_prompt=3, seed=1)
    before, work = gpu.launches, [gpu.submitted]
    results = []
    for seed in (1, 2, 3):
        results.append(editor.edit(PHOTO, "red", seed=seed))
        work.append(gpu.submitted)
    assert all(near(a.image, b.image) for a, b in zip(results, expected, strict=True))
    first, second, third = (b - a for a, b in pairwise(work))
    assert gpu.launches - before == 3 and second == third == first - 4  # encoders and prefill


# ONNX Runtime on CUDA


class Cudart:
    """CUDA's library, whose memory is the host's."""

    def __init__(self, error: int = 0) -> None:
        self.copied: list[int] = []
        self.error = error

    def cudaMemcpy2D(self, *arguments: Any) -> int:
        target, pitch, source, apart, width, count, kind = (
            getattr(a, "value", a) for a in arguments
        )
        assert kind == 3 and pitch == width and apart == 2 * width
        assert target + width * count <= source, "what is copied overlaps its target"
        for i in range(count):
            ctypes.memmove(target + i * width, source + i * apart, width)
        self.copied.append(width * count)
        return self.error

    def cudaDeviceSynchronize(self) -> int:
        return 0


def test_caches_on_cuda_are_moved_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with Editor.open(small_bundle(), threads=1) as editor:
        expected = editor.edit(PHOTO, "red", guidance_scale=[2, 2, 1, 1], seed=1).image
    copy_runs, library = cuda.copy_runs, Cudart()
    pretend(monkeypatch)
    monkeypatch.setattr(cuda, "copy_runs", copy_runs)  # what is tested here
    monkeypatch.setattr(cuda.ctypes, "CDLL", lambda name: library)
    with Editor.open(small_bundle(), provider="cuda", threads=1) as editor:
        for _ in range(2):
            ours = editor.edit(PHOTO, "red", guidance_scale=[2, 2, 1, 1], seed=1).image
            assert ours == expected
    assert library.copied


def test_cudas_refusal_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda.ctypes, "CDLL", lambda name: Cudart(error=1))
    memory = (ctypes.c_uint8 * 8)()
    start = ctypes.addressof(memory)
    with pytest.raises(RuntimeError, match="cudaMemcpy2D: error 1"):
        cuda.copy_runs(start, start + 2, 2, 1)
