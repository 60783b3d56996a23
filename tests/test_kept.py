"""What is kept of earlier edits: it saves work, and changes no picture."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from bundles import small_bundle
from editing import pair_bundle, picture

from varedit_runtime.backends.graph_backend import GraphBackend
from varedit_runtime.editing.editor import Editor
from varedit_runtime.editing.kept import MOST_KEPT
from varedit_runtime.editing.results import EditResult
from varedit_runtime.errors import BackendError, EditCancelled

PHOTO, OTHER = picture(90, 60), picture(60, 90, 200)
ONCE = ("text_encoder", "image_encoder", "condition", "prefill")


@pytest.fixture
def editor() -> Iterator[Editor]:
    with Editor.open(small_bundle(), threads=1) as editor:
        yield editor


def counted(editor: Editor) -> Counter[str]:
    """Count the stages that run from now on, by name."""
    runs, backend = Counter[str](), editor._open_backend()
    assert isinstance(backend, GraphBackend)
    run = backend._run

    def counting(step: Any, given: Any) -> Any:
        runs[step.name.removesuffix("_unguided")] += 1
        return run(step, given)

    backend._run = counting  # type: ignore[method-assign]
    return runs


def same(ours: list[EditResult], theirs: list[EditResult]) -> bool:
    return [one.image for one in ours] == [one.image for one in theirs]


def alone(seeds: range, **options: Any) -> list[EditResult]:
    """Make each result by an editor that knows nothing of the others."""
    with Editor.open(small_bundle(), threads=1) as editor:
        results = []
        for seed in seeds:
            editor.forget()
            results.append(editor.edit(PHOTO, "red", seed=seed, **options))
        return results


def test_results_of_one_picture_and_instruction_share_all_but_the_scales(editor: Editor) -> None:
    runs = counted(editor)
    results = editor.edit(PHOTO, "red", num_images_per_prompt=3, seed=5)
    assert [runs[stage] for stage in ONCE] == [1, 1, 1, 1]
    assert runs["scale_00"] == runs["scale_03"] == runs["image_decoder"] == 3
    assert same(results, alone(range(5, 8)))
    assert {*ONCE} <= results[0].timings.keys() and "prefill" not in results[1].timings
    again = editor.edit(PHOTO, "red", seed=8)
    assert runs["prefill"] == 1 and same([again], alone(range(8, 9)))


def test_an_edit_without_guidance_has_another_prefill(editor: Editor) -> None:
    runs = counted(editor)
    for guidance in (3, 1, 3):
        editor.edit(PHOTO, "red", guidance_scale=guidance, seed=1)
    assert runs["prefill"] == 3 and runs["text_encoder"] == runs["image_encoder"] == 1
    results = editor.edit(PHOTO, "red", guidance_scale=1, num_images_per_prompt=2, seed=1)
    assert runs["prefill"] == 4 and same(results, alone(range(1, 3), guidance_scale=1))


def test_where_rows_were_dropped_the_prefill_is_computed_again(editor: Editor) -> None:
    runs = counted(editor)
    results = editor.edit(PHOTO, "red", fast=True, num_images_per_prompt=2, seed=1)
    assert [runs[stage] for stage in ONCE] == [1, 1, 2, 2]
    assert same(results, alone(range(1, 3), fast=True))


@pytest.mark.parametrize("change", ["picture", "instruction", "negative prompt"])
def test_another_picture_or_text_is_not_taken_for_the_last(editor: Editor, change: str) -> None:
    asked: dict[str, Any] = {"image": PHOTO, "prompt": "red", "negative_prompt": None}
    other = {"picture": OTHER, "instruction": "blue", "negative prompt": "a dog"}[change]
    name = {"picture": "image", "instruction": "prompt"}.get(change, "negative_prompt")
    with Editor.open(small_bundle(), threads=1) as fresh:
        expected = fresh.edit(**asked | {name: other}, seed=1)
    runs = counted(editor)
    editor.edit(**asked, seed=1)
    changed = editor.edit(**asked | {name: other}, seed=1)
    assert same([changed], [expected]) and runs["prefill"] == 2
    assert runs["image_encoder"] == 1 + (change == "picture")
    assert runs["text_encoder"] == 1 + (change != "picture")


def test_the_encoders_share_by_rows_of_a_batch() -> None:
    with Editor.open(pair_bundle(), threads=1) as editor:
        runs = counted(editor)
        editor.edit([PHOTO, OTHER], ["red", "blue"], seed=1)
        editor.edit([OTHER, PHOTO], ["blue", "blue"], seed=1)
    assert runs["text_encoder"] == runs["image_encoder"] == 1 and runs["prefill"] == 2


def test_little_is_kept_and_the_latest_stays(editor: Editor) -> None:
    runs = counted(editor)
    for i in range(MOST_KEPT + 1):
        editor.edit(PHOTO, f"red {i}", seed=1)
        editor.edit(PHOTO, "red 0", seed=1)
    assert runs["text_encoder"] == MOST_KEPT + 1 and runs["image_encoder"] == 1
    editor.edit(PHOTO, "red 1", seed=1)
    assert runs["text_encoder"] == MOST_KEPT + 2


def test_what_was_kept_can_be_forgotten(editor: Editor) -> None:
    runs = counted(editor)
    for _ in range(2):
        editor.edit(PHOTO, "red", seed=1)
        editor.forget()
    assert [runs[stage] for stage in ONCE] == [2, 2, 2, 2]


def test_whoever_takes_the_backend_may_have_changed_its_caches(editor: Editor) -> None:
    runs, first = counted(editor), editor.edit(PHOTO, "red", seed=1)
    editor.backend.prefill(np.zeros((1, 6, 6, 16), np.float32))
    assert same([editor.edit(PHOTO, "red", seed=1)], [first])
    assert runs["prefill"] == 3


def test_the_backend_may_be_held_while_the_editor_edits(editor: Editor) -> None:
    first, backend = editor.edit(PHOTO, "red", seed=1), editor.backend
    editor.edit(PHOTO, "red", seed=2)
    backend.prefill(np.zeros((1, 6, 6, 16), np.float32))
    assert same([editor.edit(PHOTO, "red", seed=1)], [first])


def test_an_edit_that_ended_early_leaves_no_prefill(editor: Editor) -> None:
    runs = counted(editor)
    with pytest.raises(EditCancelled):
        editor.edit(PHOTO, "red", seed=1, on_scale=lambda progress: progress.cancel())
    editor.edit(PHOTO, "red", seed=1)
    assert runs["prefill"] == 2 and runs["image_encoder"] == 1


def test_numbers_that_are_not_finite_are_not_kept(
    editor: Editor, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = editor.backend
    with monkeypatch.context() as patch:
        patch.setattr(backend, "encode_pictures", lambda x: np.full((1, 6, 6, 16), np.nan))
        with pytest.raises(BackendError, match="image_encoder computed numbers that are not"):
            editor.edit(PHOTO, "red", seed=1)
    editor.edit(PHOTO, "red", seed=1)
