"""What is transparent in a source is so in the result."""

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from editing import picture
from picture_files import chunk, encoded, png
from PIL import Image, ImageDraw

from varedit_runtime.cli import main
from varedit_runtime.decoding.to_rgb import on_white
from varedit_runtime.editing.editor import Editor
from varedit_runtime.editing.finish import with_alpha
from varedit_runtime.editing.results import Progress
from varedit_runtime.locate import embedded
from varedit_runtime.pictures import WRITE_FORMATS, open_picture, save_picture, to_square

SIZE = (90, 60)


def clear(size: tuple[int, int] = SIZE) -> Image.Image:
    """Return a picture that is transparent on its left, opaque on its right."""
    image, alpha = picture(*size).convert("RGBA"), np.zeros(size[::-1], np.uint8)
    alpha[:] = np.linspace(-60, 320, size[0]).clip(0, 255)
    image.putalpha(Image.fromarray(alpha))
    return image


# In


def in_palette(**options: object) -> bytes:
    image = Image.new("P", (2, 1))
    image.putpalette([9, 9, 9, 50, 60, 70])
    image.putpixel((1, 0), 1)
    return encoded(image, "PNG", **options)


def samples_of_16_bits(colour: int, *samples: int, before: bytes = b"") -> bytes:
    row = b"\0" + struct.pack(f">{len(samples)}H", *samples)
    return png(2, 1, depth=16, colour=colour, data=row, before=before)


IN: dict[str, tuple[Image.Image | bytes, list[tuple[int, ...]]]] = {
    "LA": (
        Image.fromarray(np.array([[[0, 128], [200, 255]]], np.uint8)),
        [(0, 0, 0, 128), (200,) * 3 + (255,)],
    ),
    "RGBA": (
        Image.fromarray(np.array([[[1, 2, 3, 0], [4, 5, 6, 77]]], np.uint8)),
        [(1, 2, 3, 0), (4, 5, 6, 77)],
    ),
    "one entry": (in_palette(transparency=0), [(9, 9, 9, 0), (50, 60, 70, 255)]),
    "entries": (in_palette(transparency=b"\xff\x22"), [(9, 9, 9, 255), (50, 60, 70, 0x22)]),
    "16 bits": (
        samples_of_16_bits(6, *(0x1234, 0x5678, 0x9ABC, 0x80FF), *(65535, 0, 0, 65535)),
        [(0x12, 0x56, 0x9A, 0x80), (255, 0, 0, 255)],
    ),
    "grey of 16 bits": (
        samples_of_16_bits(0, 1000, 65535, before=chunk(b"tRNS", struct.pack(">H", 1000))),
        [(4, 4, 4, 0), (255, 255, 255, 255)],
    ),
    "GIF": (
        encoded(Image.open(io.BytesIO(in_palette())), "GIF", transparency=1),
        [(9, 9, 9, 255), (50, 60, 70, 0)],
    ),
}


@pytest.mark.parametrize(("source", "expected"), IN.values(), ids=IN)
def test_transparency_is_read_as_alpha(
    source: Image.Image | bytes, expected: list[tuple[int, ...]]
) -> None:
    image = open_picture(source)
    assert (image.mode, image.info) == ("RGBA", {})
    assert [image.getpixel((x, 0)) for x in range(2)] == expected


@pytest.mark.parametrize("mode", ["LA", "PA", "RGBA", "RGBa"])
def test_what_is_wholly_opaque_has_no_alpha(mode: str) -> None:
    image = picture(*SIZE).convert("RGBA").convert(mode) if mode != "PA" else None
    image = image or picture(*SIZE).convert("P").convert("PA")
    opened = open_picture(image)
    assert opened.mode == "RGB" and opened.tobytes() == image.convert("RGB").tobytes()


def test_a_model_sees_it_on_white() -> None:
    image = clear()
    white = Image.new("RGBA", SIZE, "white")
    expected = Image.alpha_composite(white, image).convert("RGB")
    ours, theirs = (to_square(source, (48, 64)) for source in (image, expected))
    assert abs(ours - theirs).max() < 3 / 127.5  # of rounding


# Out


def test_on_white_the_result_looks_as_the_model_drew_it() -> None:
    random = np.random.default_rng(0)
    drawn = Image.fromarray(random.integers(0, 256, (300, 400, 3), dtype=np.uint8))
    alpha = Image.fromarray(random.integers(0, 256, (300, 400), dtype=np.uint8))
    result = with_alpha(drawn, alpha)
    assert result.getchannel("A") == alpha
    seen, wanted = np.asarray(on_white(result), int), np.asarray(drawn, int)
    opacity = np.asarray(alpha)[..., None]
    possible = wanted >= 255 - opacity  # darker cannot be seen through so little
    assert abs(seen - wanted)[possible].max() <= 1
    assert not np.asarray(result)[..., :3][
        ~np.broadcast_to(possible, seen.shape) & (opacity > 0)
    ].any()
    hidden = np.asarray(alpha) == 0
    assert np.array_equal(np.asarray(result)[hidden][:, :3], wanted[hidden])


def test_an_edge_has_no_white_fringe() -> None:
    source = Image.new("RGBA", (8, 8), (0, 0, 0, 128))
    result = with_alpha(on_white(source), source.getchannel("A"))
    assert np.abs(np.asarray(result, int) - np.asarray(source)).max() <= 1


def test_an_edit_keeps_alpha(nano: Editor) -> None:
    source, seen = clear(), []
    opaque = nano.edit(on_white(source), "red", seed=1).image

    def on_scale(progress: Progress) -> None:
        seen.extend(progress.preview())

    result = nano.edit(source, "red", seed=1, on_scale=on_scale).image
    assert opaque.mode == "RGB" and result.mode == "RGBA" == seen[0].mode
    assert result.getchannel("A") == source.getchannel("A") and seen[-1] == result
    solid = np.asarray(source.getchannel("A")) == 255
    assert np.array_equal(np.asarray(result)[solid][:, :3], np.asarray(opaque)[solid])


def test_a_masked_edit_keeps_every_band_outside(nano: Editor) -> None:
    source, mask = clear(), Image.new("L", SIZE)
    ImageDraw.Draw(mask).ellipse((20, 10, 80, 50), fill=255)
    result = np.asarray(nano.edit(source, "red", seed=1, mask=mask).image)
    outside = np.asarray(mask) == 0
    assert np.array_equal(result[outside], np.asarray(source)[outside])
    assert np.array_equal(result[..., 3], np.asarray(source)[..., 3])
    assert (result != np.asarray(source)).any()


def test_a_picture_may_be_its_own_mask(nano: Editor) -> None:
    """The erased part of a picture is filled, as by OpenAI's API, and can be seen."""
    source, mask = picture(*SIZE).convert("RGBA"), Image.new("L", SIZE)
    ImageDraw.Draw(mask).ellipse((20, 10, 80, 50), fill=255)
    source.putalpha(mask.point(lambda level: 255 - level))
    result = nano.edit(source, "red", seed=1, mask=source).image
    assert result == nano.edit(on_white(source), "red", seed=1, mask=mask).image
    assert result.mode == "RGB"


# Files


@pytest.mark.parametrize("suffix", WRITE_FORMATS)
def test_alpha_is_written_where_the_format_has_it(tmp_path: Path, suffix: str) -> None:
    source, path = clear(), tmp_path / f"out{suffix}"
    save_picture(source, path)
    written = open_picture(path)
    if suffix in (".jpg", ".jpeg", ".bmp"):
        assert written.mode == "RGB"
    else:
        assert written.getchannel("A") == source.getchannel("A")
    seen = (np.asarray(on_white(image), int) for image in (written, source))
    assert np.abs(next(seen) - next(seen)).max() < 12


def run(folder: Path, *options: object) -> Any:
    words = [folder / "photo.png", "red", "--bundle", embedded(), "--threads", 1, *options]
    return CliRunner().invoke(main, list(map(str, words)))


def test_the_command_keeps_alpha(tmp_path: Path) -> None:
    clear().save(tmp_path / "photo.png")
    both, previews = tmp_path / "both.jpg", tmp_path / "previews"
    done = run(tmp_path, "--seed", 7, "--compare", both, "--previews", previews)
    assert done.exit_code == 0, done.output
    with Image.open(tmp_path / "photo-edited.png") as edited, Image.open(both) as pair:
        assert edited.getchannel("A") == clear().getchannel("A")
        assert (pair.mode, pair.size) == ("RGB", (180, 60))
    with Image.open(previews / "scale-00.png") as preview:
        assert preview.mode == "RGBA"
    done = run(tmp_path, "--seed", 7, "-o", tmp_path / "out.jpg")
    assert done.exit_code == 0, done.output


# What is given stays as it is


def given() -> dict[str, Image.Image]:
    turned = Image.Exif()
    turned[274] = 6
    palette = Image.open(io.BytesIO(in_palette(transparency=0))).resize(SIZE)
    palette.load()
    return {
        "RGB": picture(*SIZE),
        "RGBA": clear(),
        "palette": palette,
        "a profile": Image.open(io.BytesIO(encoded(clear(), "PNG", exif=turned))),
        "16 bits": Image.fromarray(np.asarray(picture(*SIZE).convert("L"), np.uint16) * 200),
    }


@pytest.mark.parametrize("kind", given())
def test_pictures_and_masks_of_callers_stay_as_they_are(nano: Editor, kind: str) -> None:
    source, mask = given()[kind], Image.new("L", given()[kind].size, 0)
    mask = mask.transpose(Image.Transpose.ROTATE_270) if kind == "a profile" else mask
    mask.paste(255, (5, 5, 40, 40))
    before = [(i.mode, i.size, i.info.copy(), i.copy().tobytes()) for i in (source, mask)]
    for options in ({}, {"mask": mask}, {"mask": mask, "output_size": 30}):
        result = nano.edit(source, "red", seed=1, **options)  # type: ignore[arg-type]
        result.image.paste(0, (0, 0, *result.image.size))
    assert [(i.mode, i.size, i.info, i.copy().tobytes()) for i in (source, mask)] == before
