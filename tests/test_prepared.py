"""Prepared edits: checked before anything is computed, small, and equal to edits that were not."""

import logging
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bundles import small_bundle
from editing import pair_bundle, picture
from PIL import Image
from test_kept import counted

from varedit_runtime import EditHandle, EditResult, PreparedEdit, Preparer
from varedit_runtime.editing.editor import Editor
from varedit_runtime.errors import (
    BundleError,
    ConfigError,
    EditCancelled,
    EditorError,
    PictureError,
    TextError,
)
from varedit_runtime.locate import embedded

PHOTO = picture(90, 60)


@pytest.fixture(scope="module")
def pair() -> Iterator[Editor]:
    with Editor.open(pair_bundle(), threads=1) as editor:
        yield editor


def cut_out() -> Image.Image:
    """Return a transparent picture."""
    image = PHOTO.copy()
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def mask() -> Image.Image:
    drawn = Image.new("L", PHOTO.size)
    drawn.paste(255, (20, 10, 60, 50))
    return drawn


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "guidance": {"guidance_scale": 2, "temperature": [1, 0.5, 0.5, 2, 1, 1, 1]},
    "fast": {"fast": True},
    "negative": {"negative_prompt": "a dog"},
    "model's size": {"output_size": "model"},
    "mask": {"mask": mask()},
    "alpha": {"image": cut_out(), "output_size": 40},
    "alpha and mask": {"image": cut_out(), "mask": mask(), "output_size": 70},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_what_another_process_prepares_gives_the_same_edit(
    nano: Editor, settings: dict[str, Any]
) -> None:
    asked = {"image": PHOTO, "prompt": "add a hat", "seed": 3} | settings
    expected = nano.edit(**asked)
    sent = pickle.dumps(Preparer.open(embedded()).prepare(**asked))
    prepared = pickle.loads(sent)
    assert isinstance(prepared, PreparedEdit)
    (result,) = nano.edit_prepared([prepared])
    assert result.image == expected.image and result.seed == prepared.seed == 3
    assert result.image.size == prepared.size and result.warnings == prepared.warnings


def test_only_what_shows_in_the_result_is_kept_of_a_source(nano: Editor) -> None:
    large = PHOTO.resize((1200, 900))
    square = nano.variant.picture[0] ** 2 * 3
    asked: list[tuple[str, Image.Image, Image.Image | None, Any]] = [
        ("opaque", large, None, "source"),
        ("alpha", cut_out().resize(large.size), None, "source"),
        ("small alpha", cut_out().resize(large.size), None, 120),
        ("mask", large, mask().resize(large.size), "source"),
        ("small mask", large, mask().resize(large.size), 120),
    ]
    bytes_of = {
        name: len(pickle.dumps(nano.prepare(image, "red", mask=marks, output_size=size)))
        for name, image, marks, size in asked
    }
    pixels, few = 1200 * 900, 120 * 90
    expected = {"opaque": 0, "alpha": pixels, "small alpha": few}
    expected |= {"mask": 4 * pixels, "small mask": 4 * few}
    for name, size in expected.items():
        assert 0 <= bytes_of[name] - square - size < 5000, name


def test_a_preparer_needs_no_backend() -> None:
    script = """
import sys
from PIL import Image
from varedit_runtime import Preparer
from varedit_runtime.locate import embedded
print(Preparer.open(embedded()).prepare(Image.new("RGB", (9, 9)), "red", seed=1).seed)
print("onnxruntime" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["1", "False"], done.stderr


def test_all_is_checked_when_an_edit_is_prepared(nano: Editor, tmp_path: Path) -> None:
    refused: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"image": Image.new("1", (60000, 1))}, PictureError, "too long and thin"),
        ({"image": "missing.png"}, PictureError, "cannot be read"),
        ({"prompt": " "}, TextError, "is empty"),
        ({"mask": Image.new("L", (5, 5))}, PictureError, "the mask is 5 x 5"),
        ({"prompt": "red " * 100}, TextError, "at most"),
        ({"negative_prompt": "red " * 100}, TextError, "at most"),
        ({"mask": Image.new("L", (99, 99))}, PictureError, "of the picture's size"),
        ({"mask": b"none"}, PictureError, "the mask cannot be read"),
        ({"temperature": 0}, ConfigError, "temperature"),
        ({"guidance_scale": [1, 2]}, ConfigError, "guidance_scale"),
        ({"guidance_scale": range(20_000)}, ConfigError, "guidance_scale"),
        ({"seed": -1}, ConfigError, "seed"),
        ({"fast": 3}, ConfigError, "fast"),
        ({"output_size": 0}, ConfigError, "output_size"),
        ({"image": [PHOTO]}, ConfigError, "one edit is prepared at a time"),
        ({"prompt": ["red"]}, ConfigError, "one edit is prepared at a time"),
        ({"seed": [1]}, ConfigError, "one edit is prepared at a time"),
    ]
    runs = counted(nano)
    for change, error, message in refused:
        asked = {"image": PHOTO, "prompt": "red"} | change
        for prepare in (nano.prepare, Preparer.open(embedded()).prepare):
            with pytest.raises(error, match=message) as caught:
                prepare(**asked)
            wanted = None if "one edit" in message else next(iter(change))
            assert caught.value.argument == wanted  # type: ignore[attr-defined]
    assert not runs
    with pytest.raises(BundleError, match="there is no bundle"):
        Preparer.open(tmp_path / "missing")
    with pytest.raises(BundleError, match="not the one asked for"):
        Preparer.open(embedded(), digest="0" * 64)
    with pytest.raises(BundleError, match="no variant"):
        Preparer.open(embedded(), variant="9-b9")


def test_edits_with_settings_of_their_own_share_a_batch(pair: Editor) -> None:
    """Each gets the bits that it gets alone, whatever its place and its neighbour are."""
    prepared = [
        pair.prepare(PHOTO, "red", guidance_scale=3, temperature=0.5, seed=1),
        pair.prepare(picture(40, 80), "hat", guidance_scale=2, seed=9, negative_prompt="dog"),
        pair.prepare(picture(64, 64, 9), "sea", guidance_scale=[4, 1, 1, 2], temperature=2, seed=4),
    ]
    assert len(set(map(pair.grouping, prepared))) == 1
    alone = [pair.edit_prepared([one])[0] for one in prepared]
    for order in ((0, 1), (1, 2), (2, 0), (1, 0)):
        runs = counted(pair)
        together = pair.edit_prepared([prepared[i] for i in order])
        assert runs["scale_00"] == 1
        assert [one.image for one in together] == [alone[i].image for i in order]


def test_edits_that_would_change_each_others_last_bits_are_made_apart(pair: Editor) -> None:
    """Texts of other lengths, and guidance at other scales, decide how numbers are added up."""
    asked: list[dict[str, Any]] = [
        {"prompt": "red", "seed": 1},
        {"prompt": "a red hat at night", "seed": 2},
        {"prompt": "sea", "seed": 3},
        {"prompt": "hat", "seed": 4, "fast": True},
        {"prompt": "hat", "seed": 5, "guidance_scale": 1},
        {"prompt": "hat", "seed": 6, "negative_prompt": "a red hat at night"},
    ]
    prepared = [pair.prepare(PHOTO, **one) for one in asked]
    grouping = pickle.loads(pickle.dumps(pair.grouping))
    groups = [tuple(grouping(one)) for one in prepared]
    assert groups == [(16, 4), (24, 4), (16, 4), (16, 2), (16, 0), (24, 4)]
    alone = [pair.edit(PHOTO, **one) for one in asked]
    told = list[tuple[int, ...]]()
    together = pair.edit_prepared(
        prepared, on_scale=lambda progress: told.append(tuple(progress.pictures))
    )
    assert list(dict.fromkeys(told)) == [(0, 2), (1, 5), (3,), (4,)]
    assert [(r.seed, r.image) for r in together] == [(r.seed, r.image) for r in alone]


def test_a_preview_of_one_picture_decodes_once(pair: Editor) -> None:
    prepared = [pair.prepare(PHOTO, "red", seed=1), pair.prepare(picture(40, 80), "hat", seed=9)]
    runs, seen = counted(pair), list[list[Image.Image]]()

    def on_scale(progress: Any) -> None:
        if progress.scale == 3:
            seen.extend(([progress.preview(1), progress.preview(0)], progress.preview()))
        for place in (2, -1, None, "0"):
            if place is not None:
                with pytest.raises(ConfigError, match="give one of 0, 1"):
                    progress.preview(place)

    results = pair.edit_prepared(prepared, on_scale=on_scale)
    first, second = (one.image for one in results)
    assert seen == [[second, first], [first, second]]
    assert runs["image_decoder"] == 2


def test_edits_of_another_model_or_size_are_refused(nano: Editor, pair: Editor) -> None:
    runs = counted(nano)
    with pytest.raises(ConfigError, match="prepared for another model or size"):
        nano.edit_prepared([pair.prepare(PHOTO, "red")])
    for wrong in (3, [3], "x", None, [None]):
        with pytest.raises(ConfigError):
            nano.edit_prepared(wrong)  # type: ignore[arg-type]
    assert nano.edit_prepared([]) == [] and not runs


def test_one_size_of_batch_takes_what_was_prepared_for_another(pair: Editor) -> None:
    prepared = Preparer.open(small_bundle()).prepare(PHOTO, "red", seed=1)
    (result,) = pair.edit_prepared([prepared])
    assert result.image == pair.edit(PHOTO, "red", seed=1).image


def test_a_closed_editor_prepares_nothing() -> None:
    with Editor.open(embedded(), threads=1) as editor:
        prepared = editor.prepare(PHOTO, "red")
    for use in (
        lambda: editor.prepare(PHOTO, "red"),
        lambda: editor.edit_prepared([prepared]),
        lambda: editor.grouping,
    ):
        with pytest.raises(EditorError, match="is closed"):
            use()


def test_a_seed_is_drawn_when_an_edit_is_prepared(nano: Editor) -> None:
    one, other = nano.prepare(PHOTO, "red"), nano.prepare(PHOTO, "red")
    assert one.seed != other.seed
    again: list[EditResult] = nano.edit_prepared([one, one])
    assert again[0].seed == one.seed and again[0].image == again[1].image


class Lines(logging.Handler):
    """Gathers what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def test_logs_tell_of_work_and_of_no_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log, told = logging.getLogger("varedit_runtime"), Lines()
    monkeypatch.setattr(log, "handlers", [told])
    log.setLevel(logging.DEBUG)
    PHOTO.save(tmp_path / "secret.png")
    asked: dict[str, Any] = {"prompt": "secret hat", "negative_prompt": "secret dog", "seed": 77}
    cancelled = EditHandle()
    cancelled.cancel()
    with Editor.open(embedded(), threads=1) as editor:
        editor.edit(tmp_path / "secret.png", **asked)
        with pytest.raises(EditCancelled):
            editor.edit(tmp_path / "secret.png", **asked, handle=cancelled)
    assert [line.split()[0] for line in told.lines] == ["opened", "edited", "cancelled", "closed"]
    assert "seeds [77]" in told.lines[1] and "(90, 60)" in told.lines[1]
    assert not any(word in line for line in told.lines for word in ("secret", str(tmp_path)))
    log.setLevel(logging.NOTSET)
