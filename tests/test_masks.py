"""Masked edits: what a mask does not mark keeps its pixels, and what it marks is edited."""

from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundles import small_bundle
from click.testing import CliRunner
from editing import Recorder, full_bundle, pair_bundle, picture
from PIL import ExifTags, Image, ImageDraw

from varedit_reference.quantisation import from_tokens, to_tokens
from varedit_runtime.backends.base import Sampling
from varedit_runtime.cli import main
from varedit_runtime.editing.editor import Editor
from varedit_runtime.editing.masks import SourceKeeper, feather_width, marked_tokens, put_back
from varedit_runtime.editing.results import Progress
from varedit_runtime.errors import ConfigError, PictureError
from varedit_runtime.pictures import open_mask, open_picture

SAMPLE = Path(__file__).parent.parent / "docs" / "samples" / "person.png"
HEAD, FEET = (32, 0, 96, 64), (25, 83, 103, 127)


def ellipse(size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).ellipse(box, fill=255)
    return mask


def changed(result: Image.Image, source: Image.Image) -> np.ndarray:
    """Return by how much each pixel differs, [H, W]."""
    return np.abs(np.asarray(result, int) - np.asarray(source, int)).max(axis=2)


@pytest.fixture(scope="module")
def small() -> Iterator[Editor]:
    with Editor.open(small_bundle(), threads=1) as editor:
        yield editor


# What may change, and what may not


def test_a_hat_is_put_on_the_head_and_nothing_else_changes(nano: Editor) -> None:
    source, mask = open_picture(SAMPLE), ellipse((128, 128), HEAD)
    free = nano.edit(source, "add a hat", seed=1).image
    hat = (changed(free, source) > 100) & (np.asarray(mask) > 0)
    edited = nano.edit(source, "add a hat", seed=1, mask=mask).image
    differences = changed(edited, source)
    assert differences[np.asarray(mask) == 0].max() == 0
    assert hat.sum() > 300 and (differences[hat] > 60).mean() > 0.8


def test_a_mask_over_the_feet_puts_a_hat_nowhere(nano: Editor) -> None:
    source, mask = open_picture(SAMPLE), ellipse((128, 128), FEET)
    edited = nano.edit(source, "add a hat", seed=1, mask=mask).image
    differences = changed(edited, source)
    assert differences[np.asarray(mask) == 0].max() == 0
    red = np.asarray(edited, int) - np.asarray(source, int)
    assert (red[..., 0] - red[..., 2] > 100).sum() == 0
    dress = nano.edit(source, "make the dress red", seed=1, mask=mask).image
    red = np.asarray(dress, int) - np.asarray(source, int)
    assert (red[..., 0] - red[..., 2] > 100).sum() > 300


def test_a_full_mask_is_as_none(nano: Editor) -> None:
    source, full = open_picture(SAMPLE).crop((0, 0, 128, 90)), Image.new("L", (128, 90), 255)
    masked, free = (nano.edit(source, "add a hat", seed=3, mask=m).image for m in (full, None))
    assert masked == free


@pytest.mark.parametrize("path", [small_bundle, full_bundle])
def test_tokens_without_marked_pixels_take_the_sources_bits(path: Callable[[], Path]) -> None:
    source, mask = picture(64, 64), Image.new("L", (64, 64))
    mask.putpixel((63, 63), 255)
    with Editor.open(path(), threads=1) as editor:
        recorder = Recorder.of(editor)
        editor.edit(source, "add a hat", seed=1, mask=mask)
    for sampling, step in zip(recorder.sampled, recorder.steps, strict=True):
        assert sampling.forced_mask is not None and sampling.forced_bits is not None
        kept = sampling.forced_mask
        free = np.logical_not(kept.all(axis=3))[0]
        assert free[-1, -1] and free.sum() <= 4  # neighbours share the finest token
        bits = step.bits.numpy().reshape(kept.shape)
        assert np.array_equal(bits[kept], sampling.forced_bits[kept])


@pytest.mark.parametrize("patch", [1, 2])
def test_what_is_kept_adds_up_to_the_source(patch: int) -> None:
    """Whatever the marked tokens of earlier scales were, later ones go on to the source."""
    random, grids = np.random.default_rng(0), ((1, 1), (2, 3), (4, 6), (8, 12))
    source = random.normal(size=(1, 8, 12, 4 * patch**2)).astype(np.float32)
    marked = marked_tokens(ellipse((120, 80), (0, 0, 30, 20)), grids[-1])
    keeper = SourceKeeper([marked], grids[-1], patch)
    wrong = random.normal(size=(1, 4, 8 * patch, 12 * patch)).astype(np.float32)
    noise = np.zeros((1, 8, 12, 4 * patch**2), np.float32)
    drawn = Sampling(noise, 1.0, 1.0)
    forced = keeper.force(drawn, source, wrong)
    assert forced.forced_mask is not None and forced.forced_bits is not None
    free = ~forced.forced_mask[0, ..., 0]
    assert free[0, 1] and not free[:, 4:].any() and not free[3:].any()
    maps = torch.from_numpy(source).flatten(1, 2)
    tensor = from_tokens(maps, (8, 12), patch) - torch.from_numpy(wrong)
    expected = to_tokens(tensor > 0, patch).unflatten(1, (8, 12)).numpy()
    assert np.array_equal(forced.forced_bits, expected)


def test_padding_is_no_part_that_may_change() -> None:
    marked = marked_tokens(Image.new("L", (40, 20), 255), (4, 4))
    keeper = SourceKeeper([marked, None], (4, 4), 1)
    tokens = np.zeros((2, 4, 4, 3), np.float32)
    forced = keeper.force(Sampling(tokens, 1.0, 1.0), tokens, None).forced_mask
    assert forced is not None and forced.shape == tokens.shape
    assert not forced[0, :2].any() and forced[0, 2:].all() and not forced[1].any()


# The border


@pytest.mark.parametrize("width", [1, 3, 8, 9, 40])
def test_outside_all_pixels_are_the_sources_and_deep_inside_the_results(width: int) -> None:
    source, edited = picture(300, 200), picture(300, 200, blue=250)
    mask = ellipse((300, 200), (20, 10, 240, 190))
    result = np.asarray(put_back(source, edited, mask, width))
    inside = np.asarray(mask) > 0
    assert np.array_equal(result[~inside], np.asarray(source)[~inside])
    assert np.array_equal(result[100, 80:180], np.asarray(edited)[100, 80:180])
    across = result[100, 10:131, 2].astype(int)  # from 90 to 250
    assert (np.diff(across) >= 0).all()
    mixed = ((across > 90) & (across < 250)).sum()
    assert width - 1 <= mixed + 1 and mixed <= 1.3 * width + 1


def test_a_pictures_own_border_is_no_border_of_a_mask() -> None:
    source, edited, mask = picture(60, 40), picture(60, 40, blue=250), Image.new("L", (60, 40))
    mask.paste(255, (0, 0, 30, 40))
    result = put_back(source, edited, mask, 4)
    assert result.crop((0, 0, 26, 40)) == edited.crop((0, 0, 26, 40))


def test_what_is_thinner_than_the_border_is_edited_too() -> None:
    source, edited, mask = (
        picture(300, 200),
        picture(300, 200, blue=250),
        Image.new("L", (300, 200)),
    )
    mask.paste(255, (100, 50, 101, 60))
    assert changed(put_back(source, edited, mask, 40), source)[50:60, 100].min() > 100


def test_the_border_grows_with_the_picture() -> None:
    assert feather_width((128, 128), (16, 16)) == 4
    assert feather_width((4000, 3000), (32, 32)) == 62
    assert feather_width((10, 10), (32, 32)) == 1


# Which pictures are masks, and what they mark


def white_on_black(mode: str) -> Image.Image:
    return ellipse((40, 30), (5, 5, 25, 20)).convert(mode)


def with_a_hole() -> Image.Image:
    """Return a photo of which a part was erased, as OpenAI's API takes it."""
    photo = picture(40, 30, blue=255).convert("RGBA")
    photo.putalpha(white_on_black("L").point(lambda level: 255 - level))
    return photo


def one_transparent_colour() -> Image.Image:
    image = white_on_black("P")
    image.info["transparency"] = 255
    return image


def sixteen_bits() -> Image.Image:
    return Image.fromarray(np.asarray(white_on_black("L")).astype(np.uint16) * 257)


MASKS = {
    **{mode: white_on_black(mode) for mode in ("1", "L", "P", "RGB", "RGBA", "LA")},
    "hole": with_a_hole(),
    "palette": one_transparent_colour(),
    "16 bits": sixteen_bits(),
    "grey": white_on_black("L").point([100] * 128 + [150] * 128),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_white_or_transparent_is_marked(mask: Image.Image) -> None:
    marked = white_on_black("L")
    file = BytesIO()
    mask.save(file, "PNG")
    for source in (mask, file.getvalue()):
        assert open_mask(source) == marked


@pytest.mark.parametrize("level", [1, 255, -3, 0.5])
def test_equal_samples_of_32_bits_mark_everything_unless_they_are_0(level: float) -> None:
    for kind in (np.int32, np.float32):
        samples = np.full((6, 9), level, kind)
        expected = 255 if samples.any() else 0
        assert open_mask(Image.fromarray(samples)) == Image.new("L", (9, 6), expected)


def test_a_mask_is_turned_upright_as_pictures_are(small: Editor, tmp_path: Path) -> None:
    """A photo that lies on its side, and masks of it: drawn as it is seen, or erased from it."""
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    upright = picture(60, 90)
    lying = upright.transpose(Image.Transpose.ROTATE_90)
    lying.save(tmp_path / "photo.png", exif=turned)
    seen = ellipse(upright.size, (10, 40, 50, 85))
    erased = lying.convert("RGBA")
    hole = seen.transpose(Image.Transpose.ROTATE_90).point(lambda level: 255 - level)
    erased.putalpha(hole)
    erased.save(tmp_path / "erased.png", exif=turned)
    results = [
        small.edit(tmp_path / "photo.png", "red", seed=1, mask=mask).image
        for mask in (seen, tmp_path / "erased.png")
    ]
    assert results[0] == results[1]
    differences = changed(results[0], upright)
    assert differences[np.asarray(seen) == 0].max() == 0 < differences.max()
    with pytest.raises(PictureError, match="mask is 90 x 60 and the picture, upright, 60 x 90"):
        small.edit(tmp_path / "photo.png", "red", mask=Image.new("L", (90, 60), 255))


REFUSED: dict[str, tuple[Any, str]] = {
    "size": (
        Image.new("L", (45, 30), 255),
        "the mask is 45 x 30 and the picture, upright, 90 x 60",
    ),
    "empty": (Image.new("L", (90, 60)), "marks nothing, so nothing may change: make white"),
    "no picture": (b"mask", "the mask cannot be read: .* not a picture"),
    "missing": ("missing.png", "missing.png cannot be read"),
    "an array": (np.ones((60, 90), bool), "the mask is array.*; give a path"),
}


@pytest.mark.parametrize(("mask", "message"), REFUSED.values(), ids=REFUSED)
def test_wrong_masks_are_refused_before_anything_is_computed(
    small: Editor, monkeypatch: pytest.MonkeyPatch, mask: Any, message: str
) -> None:
    monkeypatch.setattr(small.backend, "encode_text", None)
    with pytest.raises(PictureError, match=message):
        small.edit(picture(90, 60), "red", mask=mask)


# Calls


def test_a_batch_has_a_mask_for_all_or_one_for_each() -> None:
    size = (64, 64)
    left, right = ellipse(size, (0, 0, 30, 60)), ellipse(size, (34, 0, 63, 60))
    sources = [picture(*size), picture(*size, blue=10), picture(*size, blue=200)]
    with Editor.open(pair_bundle(), threads=1) as editor:
        one = editor.edit(sources, "red", seed=1, mask=left)
        each = editor.edit(sources, "red", seed=1, mask=[left, None, right])
        free = editor.edit(sources, "red", seed=1)
        copies = editor.edit(sources[0], "red", seed=1, mask=[left], num_images_per_prompt=2)
        with pytest.raises(ConfigError, match="image has 3, mask has 2 entries"):
            editor.edit(sources, "red", mask=[left, None])
    for results, masks in ((one, [left] * 3), (each, [left, None, right])):
        for result, source, mask in zip(results, sources, masks, strict=True):
            differences = changed(result.image, source)
            assert differences.any()
            assert mask is None or not differences[np.asarray(mask) == 0].any()
    assert (changed(each[1].image, free[1].image) <= 1).all()
    assert copies[0].image != copies[1].image
    assert all(not changed(c.image, sources[0])[np.asarray(left) == 0].any() for c in copies)


def test_previews_are_masked_too(small: Editor) -> None:
    source, mask, previews = picture(90, 60), ellipse((90, 60), (10, 10, 50, 50)), []

    def on_scale(progress: Progress) -> None:
        previews.extend(progress.preview())

    result = small.edit(source, "red", seed=1, mask=mask, on_scale=on_scale)
    assert previews[-1] == result.image
    assert not any(changed(p, source)[np.asarray(mask) == 0].any() for p in previews)


# The command


def run(folder: Path, *options: object) -> Any:
    words = [folder / "photo.png", "red", "--bundle", small_bundle(), "--threads", 1, *options]
    return CliRunner().invoke(main, list(map(str, words)))


def test_the_command_takes_a_mask(tmp_path: Path, small: Editor) -> None:
    source, mask = picture(90, 60), ellipse((90, 60), (10, 10, 50, 50))
    source.save(tmp_path / "photo.png")
    mask.save(tmp_path / "mask.png")
    both, previews = tmp_path / "both.png", tmp_path / "previews"
    options = ("--mask", tmp_path / "mask.png", "--compare", both, "--previews", previews)
    done = run(tmp_path, "--seed", 7, *options)
    assert done.exit_code == 0, done.output
    expected = small.edit(source, "red", seed=7, mask=mask).image
    with Image.open(tmp_path / "photo-edited.png") as edited, Image.open(both) as pair:
        assert edited.tobytes() == expected.tobytes()
        assert pair.crop((90, 0, 180, 60)).tobytes() == expected.tobytes()
    for target in ("-o", "--compare"):
        refused = run(tmp_path, "--mask", tmp_path / "mask.png", target, tmp_path / "mask.png")
        assert refused.exit_code == 1 and "mask.png is the mask" in refused.stderr


def test_a_mask_that_does_not_fit_is_refused_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Editor, "open", None)
    picture(90, 60).save(tmp_path / "photo.png")
    Image.new("L", (60, 90), 255).save(tmp_path / "mask.png")
    done = run(tmp_path, "--mask", tmp_path / "mask.png")
    assert done.exit_code == 1 and "mask is 60 x 90 and the picture" in done.stderr
