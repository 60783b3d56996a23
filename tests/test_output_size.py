"""The size of a result: the source's, the model's own, or one with a longest side."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from editing import picture
from PIL import Image, ImageDraw

from varedit_runtime.cli import main
from varedit_runtime.editing.arguments import choose_size
from varedit_runtime.editing.editor import Editor
from varedit_runtime.editing.masks import resized
from varedit_runtime.errors import ConfigError
from varedit_runtime.locate import embedded
from varedit_runtime.pictures import restore


@pytest.mark.parametrize(
    ("wanted", "picture", "model", "expected"),
    [
        ("source", (4000, 3000), (512, 512), (4000, 3000)),
        ("model", (4000, 3000), (512, 512), (512, 384)),
        ("model", (30, 40), (512, 512), (384, 512)),
        ("model", (300, 1000), (736, 368), (221, 736)),
        ("model", (1000, 300), (736, 368), (368, 110)),
        ("model", (9000, 1), (512, 512), (512, 1)),
        (1024, (4000, 3000), (512, 512), (1024, 768)),
        (4000, (4000, 3000), (512, 512), (4000, 3000)),
        (10**30, (4000, 3000), (512, 512), (4000, 3000)),
        (1, (4000, 3000), (512, 512), (1, 1)),
    ],
)
def test_the_size_of_a_result(
    wanted: Any, picture: tuple[int, int], model: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert choose_size(wanted, model)(picture) == expected


@pytest.mark.parametrize("wanted", [0, -5, 1.5, "large", True, None, (64, 64)])
def test_other_sizes_are_refused(nano: Editor, wanted: Any) -> None:
    with pytest.raises(ConfigError, match="output_size is"):
        nano.edit(picture(90, 60), "red", output_size=wanted)


@pytest.mark.parametrize("size", [(90, 60), (60, 90), (300, 200), (41, 40)])
@pytest.mark.parametrize("model", [(64, 64), (96, 32)])
def test_the_models_own_pixels_are_not_resized(
    size: tuple[int, int], model: tuple[int, int]
) -> None:
    drawn = np.random.default_rng(0).integers(0, 256, (*model, 3), dtype=np.uint8)
    own = choose_size("model", model)(size)
    assert np.array_equal(np.asarray(restore(drawn, own)), drawn[: own[1], : own[0]])


def test_the_same_edit_in_other_sizes(nano: Editor) -> None:
    source = picture(90, 60)
    height, width = nano.variant.picture
    whole = nano.edit(source, "red", seed=1).image
    own = nano.edit(source, "red", seed=1, output_size="model").image
    less = nano.edit(source, "red", seed=1, output_size=45).image
    assert (whole.size, own.size, less.size) == ((90, 60), (width, round(height * 2 / 3)), (45, 30))
    for other in (own, less):
        difference = np.asarray(other.resize(whole.size), int) - np.asarray(whole)
        assert np.abs(difference).mean() < 20


@pytest.mark.parametrize("wanted", [45, "model"])
def test_outside_a_mask_are_the_sources_pixels_in_that_size(nano: Editor, wanted: Any) -> None:
    source, mask = picture(90, 60), Image.new("L", (90, 60))
    ImageDraw.Draw(mask).ellipse((20, 10, 70, 50), fill=255)
    alone = nano.edit(source, "red", seed=1, mask=mask).image
    result = nano.edit(source, "red", seed=1, mask=mask, output_size=wanted).image
    expected = np.asarray(source.resize(result.size, Image.Resampling.LANCZOS))
    outside = np.asarray(resized(mask, result.size)) == 0
    assert np.array_equal(np.asarray(result)[outside], expected[outside])
    assert 0.3 < outside.mean() < 0.8 and (np.asarray(result) != expected).any()
    assert alone.size == source.size


def test_alpha_has_the_results_size(nano: Editor) -> None:
    source = picture(90, 60).convert("RGBA")
    source.putalpha(Image.linear_gradient("L").resize(source.size))
    result = nano.edit(source, "red", seed=1, output_size=30).image
    assert (result.mode, result.size) == ("RGBA", (30, 20))
    expected = source.getchannel("A").resize((30, 20), Image.Resampling.LANCZOS)
    assert np.abs(np.asarray(result.getchannel("A"), int) - np.asarray(expected)).max() <= 1


def test_one_marked_pixel_is_marked_in_every_size() -> None:
    mask = Image.new("L", (90, 60))
    mask.putpixel((33, 22), 255)
    for size in ((90, 60), (9, 6), (1, 1), (7, 5), (200, 100)):
        other = resized(mask, size)
        assert other.size == size and set(other.tobytes()) <= {0, 255}
        box = other.getbbox()
        assert box is not None
        assert box[0] / size[0] <= 33.5 / 90 <= box[2] / size[0]
        assert box[1] / size[1] <= 22.5 / 60 <= box[3] / size[1]


def run(folder: Path, *options: object) -> Any:
    words = [folder / "photo.png", "red", "--bundle", embedded(), "--threads", 1, *options]
    return CliRunner().invoke(main, list(map(str, words)))


def test_the_command_takes_a_longest_side(tmp_path: Path, nano: Editor) -> None:
    source, height = picture(90, 60), nano.variant.picture[0]
    source.save(tmp_path / "photo.png")
    sizes: dict[str, Any] = {"45": 45, "model": "model", str(10 * height): "source"}
    for given, wanted in sizes.items():
        edited_file = tmp_path / f"{given}.png"
        done = run(tmp_path, "--seed", 7, "--max-side", given, "-o", edited_file)
        assert done.exit_code == 0, done.output
        expected = nano.edit(source, "red", seed=7, output_size=wanted).image
        with Image.open(edited_file) as edited:
            assert (edited.size, edited.tobytes()) == (expected.size, expected.tobytes())
        assert f"{expected.width} x {expected.height}" in done.stdout


@pytest.mark.parametrize("given", ["0", "-1", "1.5", "big", "", "1" * 5000, "\u0664"])
def test_the_command_refuses_other_sides_at_once(tmp_path: Path, given: str) -> None:
    done = run(tmp_path, f"--max-side={given}")
    assert done.exit_code == 1 and "--max-side is" in done.stderr
    assert "give a number of pixels, or model" in done.stderr
