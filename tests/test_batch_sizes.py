"""One editor takes any number of pictures up to its batch; fewer of them cost less."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import small_bundle
from click.testing import CliRunner
from editing import changed_bundle, picture
from msgspec import structs
from stand_in_cuda import pretend

from varedit_runtime.backends.auto import wanted_backend
from varedit_runtime.backends.graph_backend import GraphBackend
from varedit_runtime.backends.wiring import of_batch
from varedit_runtime.bench import measure_batches
from varedit_runtime.cli import main
from varedit_runtime.editing.editor import Editor
from varedit_runtime.editing.results import EditResult
from varedit_runtime.manifest import Manifest

MOST = 3
PHOTOS = [picture(90, 60), picture(60, 90, 200), picture(40, 40, 20)]
PROMPTS = ["red", "a blue dog", "a hat"]
GUIDANCE = [3.0, 2.0, 4.0]


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the small bundle for three pictures: the graphs of ONNX Runtime have any number."""

    def change(manifest: Manifest) -> Manifest:
        variants = tuple(of_batch(variant, MOST) for variant in manifest.variants)
        return structs.replace(manifest, variants=variants)

    return changed_bundle(tmp_path_factory.mktemp("three"), change, small_bundle)


@pytest.fixture
def editor(three: Path) -> Iterator[Editor]:
    with Editor.open(three, threads=1) as editor:
        yield editor


@pytest.fixture(scope="module")
def alone() -> list[EditResult]:
    """Edit each picture in an editor of one."""
    with Editor.open(small_bundle(), threads=1) as editor:
        return [edit(editor, [place])[0] for place in range(MOST)]


def edit(editor: Editor, places: list[int], **options: Any) -> list[EditResult]:
    guidance = [[GUIDANCE[place]] * 4 for place in places]
    photos, prompts = [PHOTOS[place] for place in places], [PROMPTS[place] for place in places]
    seeds = [7 + place for place in places]
    return editor.edit(photos, prompts, guidance_scale=guidance, seed=seeds, **options)


def computed(editor: Editor) -> list[tuple[str, int]]:
    """List the stages that run from now on, with the pictures, or rows, that they compute."""
    runs, backend = list[tuple[str, int]](), editor._open_backend()
    assert isinstance(backend, GraphBackend)
    run = backend._run

    def counting(step: Any, given: Any) -> Any:
        for name in ("token_ids", "pictures", "learned", "noise", "running_sum"):
            if name in step.inputs:
                runs.append((step.stage, step.inputs[name].shape[0]))
                break
        return run(step, given)

    backend._run = counting  # type: ignore[method-assign]
    return runs


@pytest.mark.parametrize("places", [[0], [1, 2], [0, 1, 2]])
def test_an_edit_computes_no_more_pictures_than_it_has(editor: Editor, places: list[int]) -> None:
    runs, count = computed(editor), len(places)
    edit(editor, places)
    coded = [("text_encoder", count), ("image_encoder", count), ("condition", 2 * count)]
    assert runs == [*coded, *[("scale", count)] * 5, ("image_decoder", count)]


def test_more_pictures_than_fit_are_edited_in_batches_of_which_the_last_is_smaller(
    editor: Editor,
) -> None:
    runs = computed(editor)
    results = edit(editor, [0, 1, 2, 0])
    assert [rows for stage, rows in runs if stage == "image_decoder"] == [3, 1]
    assert results[0].image == results[3].image


@pytest.mark.parametrize("options", [{}, {"offload": "text"}])
def test_pictures_in_a_batch_of_any_size_have_the_bits_that_they_have_alone(
    three: Path, alone: list[EditResult], options: dict[str, Any]
) -> None:
    """Larger batches before leave nothing behind that a smaller one reads."""
    with Editor.open(three, threads=1, provider="cpu", **options) as editor:
        for places in ([0, 1, 2], [2, 0], [1], [1, 2]):
            for place, result in zip(places, edit(editor, places), strict=True):
                assert result.image == alone[place].image, places


@pytest.mark.parametrize("guidance", [1, [3.0, 3.0, 1.0, 1.0]])
def test_rows_of_a_smaller_batch_are_dropped_together(three: Path, guidance: Any) -> None:
    with Editor.open(small_bundle(), threads=1) as editor:
        expected = [
            editor.edit(PHOTOS[i], PROMPTS[i], seed=i, guidance_scale=guidance).image
            for i in range(2)
        ]
    with Editor.open(three, threads=1) as editor:
        edit(editor, [2, 1, 0])
        for _ in range(2):  # the second time, all but the prefill was kept
            results = editor.edit(PHOTOS[:2], PROMPTS[:2], seed=[0, 1], guidance_scale=guidance)
            assert [one.image for one in results] == expected


def test_results_of_one_picture_encode_it_once(editor: Editor) -> None:
    runs = computed(editor)
    editor.edit(PHOTOS[0], "red", num_images_per_prompt=3, seed=1)
    assert runs[:3] == [("text_encoder", 1), ("image_encoder", 1), ("condition", 6)]
    editor.edit(PHOTOS[:2], "red", seed=1)  # of which one picture is new
    assert runs[9:11] == [("image_encoder", 1), ("condition", 4)]


def test_a_preview_of_a_smaller_batch_can_be_taken_after_a_larger_one(
    three: Path, alone: list[EditResult]
) -> None:
    shown: list[Any] = []
    with Editor.open(three, threads=1) as editor:
        edit(editor, [1, 0], on_scale=shown.append)
        edit(editor, [0, 1, 2])
        assert shown[-1].preview(0) == alone[1].image


def test_on_cuda_every_number_of_pictures_is_captured_once(
    three: Path, alone: list[EditResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = pretend(monkeypatch)
    with Editor.open(three, provider="cuda", threads=1) as editor:
        for places in ([0], [1, 2], [2], [0, 1, 2], [0, 2]):
            for place, result in zip(places, edit(editor, places), strict=True):
                ours, theirs = (np.asarray(one.image, int) for one in (result, alone[place]))
                assert abs(ours - theirs).max() <= 1  # its texts are padded further
    (captured,) = (session for session in made if session.options["enable_cuda_graph"] == "1")
    assert len(set(captured.runs)) == MOST * 5 and len(captured.runs) == 5 * 5


def test_bench_tells_what_a_picture_costs_in_batches_of_each_size(three: Path) -> None:
    backend = wanted_backend("onnxruntime", threads=1)
    costs = measure_batches(three, 1, backend)
    assert [cost.pictures for cost in costs] == [1, 2, MOST]
    assert all(cost.wall.median > 0 and cost.cpu.median > 0 for cost in costs)
    result = CliRunner().invoke(
        main, ["bench", str(three), "--batches", "--repeat", "1", "--threads", "1"]
    )
    table = result.output.partition("pictures at once")[2].splitlines()
    assert [line.split()[0] for line in table[1:4]] == ["1", "2", "3"], result.output
