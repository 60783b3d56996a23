"""Texts are padded to the fewest tokens that graphs take them in, which changes no edit."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from bundles import small_bundle
from editing import pair_bundle, picture
from stand_in_cuda import pretend

from varedit_runtime.backends.graph_backend import GraphBackend
from varedit_runtime.backends.wiring import text_lengths
from varedit_runtime.editing.editor import Editor

PHOTO = picture(40, 30)
SHORT, LONG = "red", "a red hat at night"


@pytest.fixture
def editor() -> Iterator[Editor]:
    with Editor.open(small_bundle(), threads=1) as editor:
        yield editor


def lengths_of(editor: Editor, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Gather how many text tokens each stage reads from now on."""
    read, backend = dict[str, int](), editor._open_backend()
    assert isinstance(backend, GraphBackend)
    run = backend._run

    def reading(step: Any, given: Any) -> Any:
        for name, axis in (("text_mask", 1), ("text_bias", 3)):
            if name in step.inputs:
                read[step.name.removesuffix("_unguided")] = step.inputs[name].shape[axis]
        return run(step, given)

    monkeypatch.setattr(backend, "_run", reading)
    return read


@pytest.mark.parametrize(
    ("most", "lengths"),
    [(8, [8]), (16, [16]), (24, [16, 24]), (128, [16, 32, 64, 128]), (512, [16, 32, 64, 128, 256])],
)
def test_texts_have_few_lengths(most: int, lengths: Sequence[int]) -> None:
    assert text_lengths(most)[: len(lengths)] == lengths
    assert text_lengths(most)[-1] == most


@pytest.mark.parametrize(
    ("prompt", "negative", "length"),
    [(SHORT, None, 16), (LONG, None, 24), (SHORT, LONG, 24), (LONG, SHORT, 24)],
)
def test_all_stages_read_the_shortest_text_that_holds_all(
    editor: Editor, monkeypatch: pytest.MonkeyPatch, prompt: str, negative: str, length: int
) -> None:
    assert len(editor.prepare(PHOTO, SHORT).prompt) <= 16 < len(editor.prepare(PHOTO, LONG).prompt)
    read = lengths_of(editor, monkeypatch)
    editor.edit(picture(40, 30), prompt, negative_prompt=negative, seed=1)
    assert set(read) == {
        "text_encoder",
        "condition",
        "prefill",
        *(f"scale_{k:02}" for k in range(4)),
    }
    assert set(read.values()) == {length}


def test_a_negative_prompt_that_nobody_reads_lengthens_nothing(
    editor: Editor, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = lengths_of(editor, monkeypatch)
    editor.edit(picture(40, 30), SHORT, negative_prompt=LONG, guidance_scale=1, seed=1)
    assert set(read.values()) == {16}


def test_cuda_which_captures_addresses_reads_all_texts_in_one_length(
    editor: Editor, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch)
    with Editor.open(small_bundle(), provider="cuda", threads=1) as on_cuda:
        read = lengths_of(on_cuda, monkeypatch)
        for text in (SHORT, LONG, SHORT):
            ours, theirs = (
                np.asarray(one.edit(picture(40, 30), text, seed=1).image, np.int64)
                for one in (on_cuda, editor)
            )
            assert abs(ours - theirs).max() <= 1
            assert set(read.values()) == {24}


@pytest.mark.parametrize("negative", [None, "blue"])
@pytest.mark.parametrize("guidance", [[1.0], [3.0], [3.0, 3.0, 1.0, 1.0]])
def test_a_shorter_padding_changes_no_edit(
    monkeypatch: pytest.MonkeyPatch, negative: str | None, guidance: list[float]
) -> None:
    """Rows of a batch have texts of other lengths; earlier, longer texts leave nothing behind."""
    pictures, prompts = [picture(40, 30), picture(20, 60, blue=200)], [SHORT, "a dog"]
    edits = []
    with Editor.open(pair_bundle(), threads=1) as editor:
        editor.edit(pictures, [LONG, LONG], seed=3)
        for lengths in ([16, 24], [24]):
            backend = type(editor._open_backend())
            monkeypatch.setattr(backend, "text_lengths", property(lambda _, n=lengths: n))
            edits.append(
                editor.edit(
                    pictures,
                    prompts,
                    negative_prompt=negative,
                    guidance_scale=guidance * (4 // len(guidance)),
                    seed=1,
                )
            )
    for short, full in zip(*edits, strict=True):
        ours, theirs = (np.asarray(one.image, np.int64) for one in (short, full))
        assert abs(ours - theirs).max() <= 1
