"""Pictures in and out, exactly as the released models see them.

    open_picture -> to_square -> [the model] -> from_decoder -> restore -> save_picture

Sizes follow their library: Pillow's are (width, height), an array's are (height, width).
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps, TiffImagePlugin, UnidentifiedImageError

from varedit_runtime.errors import PictureError, one_line, shown
from varedit_runtime.files import atomic_file

Source = str | os.PathLike[str] | bytes | BinaryIO | Image.Image

# Only these decoders see untrusted files; Pillow's rarer ones are less tested against attacks.
READ_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")

WRITE_FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}

MAX_PIXELS = 89_478_485  # Pillow warns of a decompression bomb from here, and refuses twice this
MAX_CANVAS_PIXELS = 2**28  # 1 GiB in Pillow's memory; a square of 16384 px

_WHITE = (255, 255, 255)
_PIECE = 2**20  # samples that are scaled to 8 bits at a time


def open_picture(source: Source, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open a path, a file's bytes, a binary file or a Pillow image as a plain RGB picture.

    The size is checked against max_pixels before anything is decoded. Then:

    - the first frame of an animation or page of a document is taken (of a Pillow image the
      current one) and turned upright by its EXIF orientation;
    - 16-bit grey is scaled to 8 bits (in colour, Pillow keeps the high byte); 32-bit integers and
      floats, whose white is not defined, are scaled from their darkest to their brightest sample;
    - colours are converted to sRGB by the embedded ICC profile; a profile that is broken or of
      another colour space is ignored, and without one Pillow's formulas convert grey, CMYK, YCbCr;
    - alpha, a transparent palette entry and a transparent colour are composited on white.

    The result carries no EXIF, GPS, XMP, ICC profile or comment. Raises PictureError if the source
    is no picture in one of READ_FORMATS, is damaged, or has no pixels or too many.
    """
    if isinstance(source, Image.Image):
        with _explained("the picture"):
            return _plain_rgb(source, max_pixels)
    name = str(source) if isinstance(source, str | os.PathLike) else "the picture"
    with _explained(name):
        file = BytesIO(source) if isinstance(source, bytes) else source
        with Image.open(file, formats=READ_FORMATS) as image:
            return _plain_rgb(image, max_pixels)


def pad_and_resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Put an RGB picture on a white canvas and resize it to (height, width), as a model sees it.

    The picture lies top left on the smallest canvas of that aspect ratio that holds it; for a
    square its side is the picture's longer one, as in the released code. Raises PictureError if
    the picture is so long and thin that its canvas would not fit in memory.
    """
    height, width = size
    canvas = Image.new("RGB", _canvas_size(image.size, size), _WHITE)
    canvas.paste(image, (0, 0))
    return canvas.resize((width, height), Image.Resampling.LANCZOS)


def to_square(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """Turn an RGB picture into the tokenizer's input: float32 [3, height, width] in [-1, 1].

    size: (height, width). Pads and resizes as `pad_and_resize` does, and raises what it raises.
    """
    pixels = np.asarray(pad_and_resize(image, size))
    scaled = pixels.astype(np.float32) / np.float32(127.5) - np.float32(1)
    return np.ascontiguousarray(scaled.transpose(2, 0, 1))


def from_decoder(decoded: np.ndarray) -> np.ndarray:
    """Turn the tokenizer's output [3, H, W] into 8-bit RGB [H, W, 3].

    Values are clamped to [-1, 1] and mapped to (x + 1) / 2 · 255, truncated (not rounded) as in the
    released code. Raises PictureError on NaN or infinity: the model's arithmetic failed.
    """
    if not np.isfinite(decoded).all():
        raise PictureError(
            "the decoded picture is not finite, the model's arithmetic overflowed: build the "
            "bundle with another precision, such as fp32"
        )
    clamped = decoded.astype(np.float32).clip(-1, 1)
    levels = (clamped + np.float32(1)) / np.float32(2) * np.float32(255)
    return np.ascontiguousarray(levels.astype(np.uint8).transpose(1, 2, 0))


def restore(pixels: np.ndarray, original_size: tuple[int, int]) -> Image.Image:
    """Bring an edited picture, 8-bit RGB [H, W, 3], back to its source's (width, height).

    Undoes `pad_and_resize`: resizes to the canvas (Lanczos), then crops the padding off. Raises
    PictureError as it does.
    """
    canvas_size = _canvas_size(original_size, pixels.shape[:2])
    canvas = Image.fromarray(pixels).resize(canvas_size, Image.Resampling.LANCZOS)
    return canvas.crop((0, 0, *original_size))


def side_by_side(left: Image.Image, right: Image.Image) -> Image.Image:
    """Return two RGB pictures side by side, with white below the lower one."""
    size = left.width + right.width, max(left.height, right.height)
    both = Image.new("RGB", size, _WHITE)
    both.paste(left, (0, 0))
    both.paste(right, (left.width, 0))
    return both


def check_target(path: Path) -> str:
    """Return the format that `save_picture` writes for a path's extension.

    Raises PictureError if the extension is not in WRITE_FORMATS, or the folder does not exist.
    """
    if path.suffix.lower() not in WRITE_FORMATS:
        known = ", ".join(WRITE_FORMATS)
        raise PictureError(f"{path}: pictures are written as {known}, not {shown(path.suffix)}")
    if not path.parent.is_dir():
        raise PictureError(f"{path} cannot be written: there is no folder {path.parent}; make it")
    return WRITE_FORMATS[path.suffix.lower()]


def save_picture(image: Image.Image, path: str | os.PathLike[str]) -> None:
    """Write a picture, without any metadata, in the format of the path's extension.

    The file appears whole or not at all, and replaces an existing one. Raises PictureError if the
    extension is not in WRITE_FORMATS, or the file cannot be written.
    """
    path = Path(path)
    written_as = check_target(path)
    # Encode in memory: Pillow does not notice when a full disk takes only part of a write.
    encoded = BytesIO()
    try:
        # quality is for JPEG and WebP; the other formats are lossless.
        _pixels_only(image).save(encoded, format=written_as, quality=95)
        with atomic_file(path) as whole:
            whole.write_bytes(encoded.getbuffer())
    except (OSError, ValueError) as error:
        raise PictureError(f"{path} cannot be written: {_reason(error)}") from error


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn any exception of reading into a PictureError, whose one line starts with the name."""
    try:
        yield
    except UnidentifiedImageError as error:
        known = ", ".join(READ_FORMATS)
        raise PictureError(f"{name} is not a picture in a known format: give {known}") from error
    except Exception as error:  # decoders raise errors of every kind on damaged files
        raise PictureError(f"{name} cannot be read: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return one_line(text) or type(error).__name__


def _plain_rgb(image: Image.Image, max_pixels: int) -> Image.Image:
    width, height = image.size
    if not 0 < width * height <= max_pixels:
        raise PictureError(
            f"it is {width} x {height}; a picture must have 1 to {max_pixels} pixels"
        )
    _check_tiles(image, max_pixels)
    image.load()  # decodes; from here on size, mode and info can be trusted
    colours, alpha = _split_alpha(_eight_bit(image))
    rgb = Image.new("RGB", image.size, _WHITE)
    rgb.paste(_to_srgb(colours, image.info.get("icc_profile")), mask=alpha)
    rgb.getexif()[ExifTags.Base.Orientation] = _orientation(image)
    return ImageOps.exif_transpose(rgb)


def _check_tiles(image: Image.Image, max_pixels: int) -> None:
    """Refuse a TIFF with huge tiles: they may exceed the picture, and are decoded whole."""
    tags = getattr(image, "tag_v2", {})
    sides = (tags.get(TiffImagePlugin.TILEWIDTH, 1), tags.get(TiffImagePlugin.TILELENGTH, 1))
    if sides[0] * sides[1] > max_pixels:
        raise PictureError(
            f"its tiles are {sides[0]} x {sides[1]}; a tile may have up to {max_pixels} pixels"
        )


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF data is no reason to refuse a picture
        return 1


def _eight_bit(image: Image.Image) -> Image.Image:
    """Scale samples of 16 or 32 bits to 8 bits; leave other pictures as they are."""
    if image.mode.startswith("I;16"):
        samples = np.asarray(image).astype(np.uint32)
        grey = Image.fromarray(((samples + 128) // 257).astype(np.uint8))
        if "transparency" not in image.info:
            return grey
        opaque = Image.fromarray(samples != image.info["transparency"])
        return Image.merge("LA", (grey, opaque.convert("L")))
    if image.mode in ("I", "F"):
        samples = np.asarray(image).reshape(-1)
        darkest, brightest = float(samples.min()), float(samples.max())
        if not (math.isfinite(darkest) and math.isfinite(brightest)):
            raise PictureError("it has samples that are not finite")
        levels = np.empty(samples.shape, np.uint8)
        # In pieces: all at once would take 20 bytes a pixel.
        for first in range(0, samples.size, _PIECE):
            piece = samples[first : first + _PIECE].astype(np.float64)
            scaled = (piece - darkest) / ((brightest - darkest) or 1) * 255
            levels[first : first + _PIECE] = scaled.round()
        return Image.fromarray(levels.reshape(image.height, image.width))
    return image


def _split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Split off the 8-bit alpha channel, if there is one; a grey picture's colours stay grey."""
    if not image.has_transparency_data:
        return image, None
    if image.mode == "La":
        image = image.convert("LA")
    rgba = image.convert("RGBA")
    colours = image.convert("L") if image.mode in ("L", "LA") else rgba.convert("RGB")
    return colours, rgba.getchannel("A")


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    if image.mode not in ("L", "CMYK"):
        image = image.convert("RGB")
    if profile:
        try:
            embedded = ImageCms.ImageCmsProfile(BytesIO(profile))
            srgb = ImageCms.createProfile("sRGB")
            return ImageCms.buildTransform(embedded, srgb, image.mode, "RGB").apply(image)
        except (ImageCms.PyCMSError, OSError):
            pass
    return image.convert("RGB")


def _pixels_only(image: Image.Image) -> Image.Image:
    """Copy a picture's pixels to RGB, without the metadata that Pillow carries along."""
    return Image.fromarray(np.asarray(image.convert("RGB")))


def _canvas_size(picture: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Return (width, height) of the smallest canvas of size's aspect ratio that holds the picture.

    picture is (width, height), size is (height, width).
    """
    width, height = picture
    if height * size[1] > width * size[0]:
        width = math.ceil(height * size[1] / size[0])
    else:
        height = math.ceil(width * size[0] / size[1])
    if width * height > MAX_CANVAS_PIXELS:
        raise PictureError(
            f"a picture of {picture[0]} x {picture[1]} is too long and thin: padded it would have "
            f"{width} x {height} pixels, of at most {MAX_CANVAS_PIXELS}; crop it first"
        )
    return width, height
