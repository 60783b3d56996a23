"""Pictures in and out: exact against the recordings, safe with untrusted files."""

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from disks import file_size_limit
from picture_files import WHITE, encoded, noise, pixels, png, srgb_profile, swapped_profile, tiff
from PIL import Image
from safetensors.numpy import load_file

from varedit_runtime.decoding.to_rgb import on_white
from varedit_runtime.errors import ConfigError, PictureError
from varedit_runtime.pictures import (
    MAX_CANVAS_PIXELS,
    WRITE_FORMATS,
    encode_picture,
    from_decoder,
    open_picture,
    pad_and_resize,
    restore,
    save_picture,
    to_square,
)

RECORDINGS = sorted((Path(__file__).parent / "golden").iterdir())
# 3 x 2 pixels, all of them different; repeated into blocks, so that JPEG keeps them apart.
STEPS = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
BLOCKS = Image.fromarray(STEPS.repeat(16, 0).repeat(16, 1)).convert("RGB")


def grey(*levels: int) -> list[list[int]]:
    return [[level] * 3 for level in levels]


# As released


@pytest.mark.parametrize("recording", RECORDINGS, ids=lambda path: path.name)
def test_in_and_out_are_exactly_as_recorded(recording: Path):
    tensors = load_file(recording / "golden.safetensors")
    source = Image.fromarray(tensors["in.image_rgb_u8"])
    expected = tensors["out.preprocessed_image"]
    square = to_square(source, expected.shape[1:])
    assert square.dtype == np.float32
    assert np.array_equal(square, expected)
    restored = restore(tensors["out.image_rgb_u8"], source.size)
    assert np.array_equal(np.asarray(restored), tensors["out.restored_image_rgb_u8"])


def test_a_square_of_the_models_size_is_not_touched():
    picture = noise(32, 32)
    assert np.array_equal(np.asarray(pad_and_resize(picture, (32, 32))), np.asarray(picture))


def test_decoded_values_are_clamped_and_truncated():
    values = np.array([-2, -1, -0.5, 0, 0.5, 0.9999, 1, 2], dtype=np.float32)
    levels = from_decoder(np.broadcast_to(values, (3, 1, 8)))
    assert levels.dtype == np.uint8
    assert levels[0].tolist() == grey(0, 0, 63, 127, 191, 254, 255, 255)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_decoded_picture_that_is_not_finite_never_passes(value: float):
    decoded = np.zeros((3, 4, 4), dtype=np.float32)
    decoded[1, 2, 3] = value
    with pytest.raises(PictureError, match="not finite"):
        from_decoder(decoded)


# Canvases that are not square


@pytest.mark.parametrize(
    ("height", "width"), [(40, 60), (60, 40), (50, 50), (1, 7), (1500, 900), (900, 1500)]
)
def test_a_square_canvas_is_the_released_one(height: int, width: int):
    picture = noise(height, width)
    side = max(height, width)
    canvas = Image.new("RGB", (side, side), "white")
    canvas.paste(picture, (0, 0))
    released = np.asarray(canvas.resize((32, 32), Image.Resampling.LANCZOS), np.float32) / 127.5 - 1
    assert np.array_equal(to_square(picture, (32, 32)), released.transpose(2, 0, 1))


def test_padding_lies_below_or_on_the_right():
    picture = Image.new("RGB", (30, 20))
    square = to_square(picture, (180, 60))
    assert square.shape == (3, 180, 60)
    # 40 rows of picture; Lanczos blurs its edge by 6 rows at most.
    assert np.all(square[:, :34] == -1) and np.all(square[:, 46:] == 1)
    square = to_square(Image.new("RGB", (20, 30)), (60, 180))
    assert np.all(square[:, :, :34] == -1) and np.all(square[:, :, 46:] == 1)


@pytest.mark.parametrize("size", [(64, 64), (96, 32), (40, 56)])
@pytest.mark.parametrize("original", [(31, 17), (17, 31), (100, 20)])
def test_restoring_gives_back_size_and_content(size: tuple[int, int], original: tuple[int, int]):
    picture = Image.new("RGB", original, (10, 200, 30))
    restored = restore(np.asarray(pad_and_resize(picture, size)), original)
    assert restored.size == original
    assert restored.getpixel((0, 0)) == (10, 200, 30)


@pytest.mark.parametrize("original", [(1500, 900), (900, 1500), (7, 1), (1300, 1300)])
def test_restoring_is_resizing_the_whole_canvas_and_cropping(original: tuple[int, int]):
    edited, side = noise(64, 64), max(original)
    canvas = edited.resize((side, side), Image.Resampling.LANCZOS)
    expected = canvas.crop((0, 0, *original))
    assert restore(np.asarray(edited), original).tobytes() == expected.tobytes()


def test_a_picture_too_long_and_thin_is_refused():
    ribbon = Image.new("RGB", (int(MAX_CANVAS_PIXELS**0.5) + 1, 1))
    with pytest.raises(PictureError, match="long and thin"):
        to_square(ribbon, (64, 64))
    with pytest.raises(PictureError, match="long and thin"):
        restore(np.zeros((64, 64, 3), np.uint8), ribbon.size)


# Every mode


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("1", (1, 1), 1), grey(255)),
        (Image.new("L", (1, 1), 77), grey(77)),
        (Image.new("LA", (1, 1), (0, 128)), grey(127)),
        (Image.new("La", (1, 1), (0, 128)), grey(127)),
        (Image.new("RGBA", (1, 1), (255, 0, 0, 0)), [WHITE]),
        (Image.new("RGBA", (1, 1), (255, 0, 0, 128)), [[255, 127, 127]]),
        (Image.new("RGBX", (1, 1), (1, 2, 3, 0)), [[1, 2, 3]]),
        (Image.new("PA", (1, 1), 0), [WHITE]),
        (Image.new("CMYK", (1, 1), (0, 255, 255, 0)), [[255, 0, 0]]),
        (Image.new("YCbCr", (1, 1), (128, 128, 128)), grey(128)),
        (Image.new("LAB", (1, 1), (128, 128, 128)), grey(119)),
        (Image.new("HSV", (1, 1), (0, 255, 255)), [[255, 0, 0]]),
    ],
    ids=lambda value: getattr(value, "mode", ""),
)
def test_modes_become_rgb_on_white(image: Image.Image, expected: list[list[int]]):
    assert pixels(image) == expected


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N"])
@pytest.mark.parametrize(("sample", "level"), [(0, 0), (257, 1), (32768, 128), (65535, 255)])
def test_16_bit_grey_is_scaled(mode: str, sample: int, level: int):
    assert pixels(Image.new(mode, (1, 1), sample)) == grey(level)


@pytest.mark.parametrize(
    "samples",
    [np.array([[-100, 0, 300]], np.int32), np.array([[0.25, 0.375, 0.75]], np.float32)],
    ids=["I", "F"],
)
def test_samples_without_a_stated_white_are_stretched(samples: np.ndarray):
    assert pixels(Image.fromarray(samples)) == grey(0, 64, 255)
    assert pixels(Image.fromarray(samples[:, :1])) == grey(0)


def test_many_float_samples_are_scaled_alike():
    samples = np.arange(1500 * 1000, dtype=np.float32).reshape(1500, 1000)
    grey = np.asarray(open_picture(Image.fromarray(samples)))[..., 0]
    assert np.array_equal(grey, (samples.astype(np.float64) / samples.max() * 255).round())


def tiled_tiff(side: int) -> bytes:
    """Return a TIFF of 16 x 16 grey px in one tile of this side, which is cut short."""
    layout = {"_322": side, "_323": side, "_324": 8, "_325": 256}
    return tiff(bytes(range(256)), _256=16, _257=16, _258=8, _259=1, _262=1, **layout)


def test_tiles_larger_than_allowed_are_not_decoded():
    assert np.asarray(open_picture(tiled_tiff(16)))[15, 15, 0] == 255
    with pytest.raises(PictureError, match="its tiles are 12000 x 12000"):
        open_picture(tiled_tiff(12000), max_pixels=10**6)


def test_float_samples_must_be_finite():
    with pytest.raises(PictureError, match="not finite"):
        open_picture(Image.fromarray(np.array([[0, np.nan]], np.float32)))


@pytest.mark.parametrize("written_as", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_of_an_animation_is_taken(written_as: str):
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    lossless = {"lossless": True} if written_as == "WEBP" else {}
    file = encoded(first, written_as, save_all=True, append_images=[second], **lossless)
    assert pixels(file) == [[255, 0, 0]] * 64


def test_a_jpeg_of_several_pictures_gives_its_first():
    second = Image.new("RGB", BLOCKS.size)
    file = encoded(BLOCKS, "MPO", save_all=True, append_images=[second], quality=95)
    difference = np.asarray(open_picture(file), int) - np.asarray(BLOCKS)
    assert abs(difference).max() < 8


# Colour profiles


@pytest.mark.parametrize("written_as", ["PNG", "TIFF"])
def test_an_embedded_profile_is_applied(written_as: str):
    profile = swapped_profile()
    file = encoded(Image.new("RGB", (1, 1), (255, 0, 0)), written_as, icc_profile=profile)
    assert np.allclose(pixels(file), [[0, 255, 0]], atol=2)
    file = encoded(Image.new("RGBA", (1, 1), (255, 0, 0, 128)), written_as, icc_profile=profile)
    assert np.allclose(pixels(file), [[127, 255, 127]], atol=2)


def grey_profile_with_gamma_1() -> bytes:
    """Return a minimal ICC profile: a linear tone curve and the D50 white point."""
    curve = b"curv" + struct.pack(">IIHxx", 0, 1, 256)
    white = b"XYZ " + struct.pack(">Iiii", 0, 63190, 65536, 54061)
    tags = struct.pack(">I4sII4sII", 2, b"kTRC", 156, 14, b"wtpt", 172, 20)
    kind = struct.pack(">4sI4s4s4s", b"", 0x02400000, b"mntr", b"GRAY", b"XYZ ")
    illuminant = struct.pack(">iii", 63190, 65536, 54061)
    header = kind + bytes(12) + b"acsp" + bytes(28) + illuminant + bytes(48)
    return struct.pack(">I", 192) + header + tags + curve + white


@pytest.mark.parametrize("mode", ["L", "LA"])
def test_a_grey_profile_is_applied_to_a_grey_picture(mode: str):
    # Half of the light is sRGB level 188.
    image = Image.new("L", (1, 1), 128).convert(mode)
    file = encoded(image, "PNG", icc_profile=grey_profile_with_gamma_1())
    assert np.allclose(pixels(file), grey(188), atol=1)


def test_an_srgb_profile_changes_nothing():
    picture = noise(16, 16)
    file = encoded(picture, "PNG", icc_profile=srgb_profile())
    assert np.array_equal(np.asarray(open_picture(file)), np.asarray(picture))


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
def test_an_unusable_profile_is_ignored(mode: str):
    image = Image.new(mode, (1, 1))
    profile = b"no profile" if mode == "RGB" else srgb_profile()
    assert pixels(encoded(image, "TIFF", icc_profile=profile)) == pixels(image)


# Orientation and metadata


@pytest.mark.parametrize("written_as", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, STEPS),
        (2, STEPS[:, ::-1]),
        (3, STEPS[::-1, ::-1]),
        (4, STEPS[::-1]),
        (5, STEPS.T),
        (6, STEPS[::-1].T),
        (7, STEPS[::-1, ::-1].T),
        (8, STEPS[:, ::-1].T),
        (99, STEPS),
    ],
)
def test_pictures_are_turned_upright_once(written_as: str, orientation: int, upright: np.ndarray):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = open_picture(encoded(BLOCKS, written_as, exif=exif))
    assert not picture.getexif()
    centres = np.asarray(picture)[8::16, 8::16, 0]
    assert centres.shape == upright.shape
    assert np.allclose(centres, upright, atol=6)


def test_damaged_exif_data_is_ignored():
    file = encoded(BLOCKS, "JPEG", exif=b"Exif\0\0MM\0junkjunk", quality=95)
    assert open_picture(file).size == BLOCKS.size


def metadata() -> dict[str, object]:
    exif = Image.Exif()
    exif[0x010F] = "camera"
    exif.get_ifd(0x8825)[1] = "N"
    xmp = b"<x:xmpmeta xmlns:x='adobe:ns:meta/'>secret</x:xmpmeta>"
    return {"exif": exif, "xmp": xmp, "icc_profile": srgb_profile()}


def test_no_metadata_is_passed_on(tmp_path: Path):
    source = Image.open(io.BytesIO(encoded(BLOCKS, "JPEG", comment=b"secret", **metadata())))
    assert source.info.keys() >= {"exif", "icc_profile", "comment", "xmp"}
    picture = open_picture(source)
    assert picture.info == {} and not picture.getexif()
    for suffix in WRITE_FORMATS:
        path = tmp_path / f"out{suffix}"
        save_picture(source, path)
        assert not any(word in path.read_bytes() for word in (b"secret", b"camera", b"sRGB"))
        with Image.open(path) as written:
            assert written.getexif().get_ifd(0x8825) == {}
            assert not {"exif", "xmp", "icc_profile", "comment"} & written.info.keys()


# What is no picture


def test_all_kinds_of_sources_give_the_same(tmp_path: Path):
    path = tmp_path / "picture.png"
    save_picture(BLOCKS, path)
    data = path.read_bytes()
    opened = [open_picture(source) for source in (path, str(path), data, io.BytesIO(data), BLOCKS)]
    assert len({picture.tobytes() for picture in opened}) == 1


@pytest.mark.parametrize("written_as", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.95])
def test_a_truncated_file_is_refused(written_as: str, kept: float):
    file = encoded(noise(64, 64), written_as)
    with pytest.raises(PictureError):
        open_picture(file[: int(len(file) * kept)])


@pytest.mark.parametrize(
    "data",
    [b"", b"plain text", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"P5 1 1 255 a"],
    ids=["empty", "text", "EPS", "PGM"],
)
def test_what_is_not_in_a_listed_format_is_refused(data: bytes):
    with pytest.raises(PictureError, match=r"PNG, JPEG, .*, AVIF, or, with the extra heif, HEIF"):
        open_picture(data)


def test_errors_name_the_file_in_one_line(tmp_path: Path):
    missing = tmp_path / "missing.png"
    with pytest.raises(PictureError, match=r"missing\.png cannot be read: No such file"):
        open_picture(missing)
    with pytest.raises(PictureError, match="Is a directory"):
        open_picture(tmp_path)


@pytest.mark.parametrize("size", [(0, 5), (5, 0)])
def test_a_picture_without_pixels_is_refused(size: tuple[int, int]):
    with pytest.raises(PictureError, match="0"):
        open_picture(Image.new("RGB", size))


def test_the_limit_is_checked_before_anything_is_decoded():
    no_pixels_follow = png(300, 200)
    with pytest.raises(PictureError, match=r"300 x 200.*59999 pixels"):
        open_picture(no_pixels_follow, max_pixels=59_999)
    with pytest.raises(PictureError, match="truncated"):
        open_picture(no_pixels_follow, max_pixels=60_000)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 60_000])
def test_a_decompression_bomb_is_refused(side: int):
    with pytest.raises(PictureError, match="pixels"):
        open_picture(png(side, side))


# Writing


@pytest.mark.parametrize("suffix", WRITE_FORMATS)
def test_pictures_are_written_in_the_format_of_the_extension(tmp_path: Path, suffix: str):
    path = tmp_path / f"out{suffix.upper()}"
    path.write_text("an older file")
    save_picture(BLOCKS, path)
    with Image.open(path) as written:
        assert written.format == WRITE_FORMATS[suffix]
    difference = np.asarray(open_picture(path), int) - np.asarray(BLOCKS)
    assert abs(difference).max() <= (8 if suffix in {".jpg", ".jpeg", ".webp", ".avif"} else 0)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("mode", ["L", "LA", "La", "P", "PA", "RGBA", "RGBa", "CMYK", "LAB"])
def test_pictures_of_any_mode_are_written(tmp_path: Path, mode: str):
    picture = Image.new(mode, (1, 1))
    picture.putpixel((0, 0), (77, 100, 99, 55)[: len(picture.getbands())])
    expected = open_picture(picture)
    for name in ("out.png", "out.bmp"):
        save_picture(picture, tmp_path / name)
        written = open_picture(tmp_path / name)
        shown = expected if name == "out.png" else on_white(expected)
        if mode == "LAB":  # whose conversion is that of Pillow, without a profile
            shown = picture.convert("RGB")
        assert (written.mode, written.tobytes()) == (shown.mode, shown.tobytes())


@pytest.mark.parametrize("name", ["out", "out.xyz", "out.gif"])
def test_an_unknown_extension_is_refused(tmp_path: Path, name: str):
    with pytest.raises(PictureError, match=r"\.png, \.jpg"):
        save_picture(BLOCKS, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_pictures_are_encoded_as_bytes():
    image = Image.effect_noise((64, 48), 80).convert("RGB")
    for name in sorted(set(WRITE_FORMATS.values())):
        with Image.open(io.BytesIO(encode_picture(image, name.lower()))) as encoded:
            assert encoded.format == name and encoded.size == image.size
    for name in ("JPEG", "WEBP", "AVIF"):
        coarse, fine = (len(encode_picture(image, name, quality=of)) for of in (10, 100))
        assert coarse < fine / 2
    fast, small = (encode_picture(image.resize((300, 300)), compression=of) for of in (0, 9))
    assert len(small) < len(fast) / 1.1
    assert open_picture(fast) == open_picture(small)


@pytest.mark.parametrize(
    "wrong",
    [{"format": "PPM"}, {"quality": 0}, {"quality": 101}, {"compression": 10}, {"quality": 0.5}],
)
def test_what_no_encoder_takes_is_refused(wrong: dict[str, Any]):
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))} is .*; give "):
        encode_picture(Image.new("RGB", (2, 2)), **wrong)
    with pytest.raises(PictureError, match="the picture cannot be written"):
        encode_picture(Image.new("RGB", (70000, 1)), "JPEG")


def test_a_path_that_cannot_be_written_is_refused(tmp_path: Path):
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    for path in ("missing/out.png", "file/out.png", "folder.png"):
        with pytest.raises(PictureError, match="cannot be written"):
            save_picture(BLOCKS, tmp_path / path)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder.png"}


def test_a_full_disk_leaves_the_older_file(tmp_path: Path):
    path = tmp_path / "out.bmp"
    path.write_text("an older file")
    with file_size_limit(1000), pytest.raises(PictureError, match="cannot be written"):
        save_picture(BLOCKS, path)
    assert path.read_text() == "an older file"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(self: Path, target: Path) -> None:
        assert list(tmp_path.iterdir()) == [self.parent]
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_picture(BLOCKS, tmp_path / "out.png")
    assert not list(tmp_path.iterdir())
