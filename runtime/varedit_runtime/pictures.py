"""Pictures in and out, exactly as the released models see them.

    open_picture -> to_square -> [the model] -> from_decoder -> restore -> save_picture

Sizes follow their library: Pillow's are (width, height), an array's are (height, width).
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from threading import RLock
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image
from PIL.MpoImagePlugin import MpoImageFile
from PIL.TiffImagePlugin import TiffImageFile

from varedit_runtime.decoding.limits import MAX_MEMORY, MAX_PIXELS, Limits, picture_memory
from varedit_runtime.decoding.picture_file import NO_AVIF, READ_FORMATS, has_avif, open_file
from varedit_runtime.decoding.tiff_directory import beginning_at
from varedit_runtime.decoding.to_rgb import WHITE, on_white, to_mask, to_rgb, to_rgba
from varedit_runtime.errors import ConfigError, PictureError, reason, shown
from varedit_runtime.files import atomic_file, unwritable
from varedit_runtime.values import AnyPath, checked


@dataclass(frozen=True)
class FileContent:
    """What a file held when it was read, and its path, which errors name."""

    path: Path
    content: bytes


# Of a decoded picture, its EXIF orientation, limits, and whether it may be overwritten.
_Convert = Callable[[Image.Image, int, Limits, bool], Image.Image]
Source = AnyPath | bytes | bytearray | memoryview | BinaryIO | Image.Image | FileContent

WRITE_FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".avif": "AVIF",
}

_WITH_ALPHA = ("PNG", "WEBP", "TIFF", "AVIF")

# Names of files that may be pictures in one of READ_FORMATS.
READ_SUFFIXES = (*WRITE_FORMATS, ".gif", ".jfif", ".jpe", ".dib", ".heic", ".heif")

MAX_CANVAS_PIXELS = 2**28  # a square of 16384 px

_PIECE = 2**20  # bytes or pixels that are handled at a time
_READ_AGAIN = (*READ_FORMATS, "MPO")  # MPO is what Pillow calls a JPEG of several pictures
_ONE_AT_A_TIME = RLock()  # for what threads may share: open files, and Pillow images


def open_picture(
    source: Source, max_pixels: int = MAX_PIXELS, max_memory: int = MAX_MEMORY
) -> Image.Image:
    """Open a path, a file's bytes, a binary file or a Pillow image as a plain picture.

    It is RGB, or RGBA if any of its pixels is not wholly opaque. The size is checked against
    max_pixels before anything is decoded, and so is the memory that this takes (the file, the
    decoder, the pixels) against max_memory, in bytes. Then:

    - the first frame of an animation or page of a document is taken (of a Pillow image the
      current one) and turned upright by its EXIF orientation;
    - 16-bit grey is scaled to 8 bits (in colour, Pillow keeps the high byte); 32-bit integers and
      floats, whose white is not defined, are scaled from their darkest to their brightest sample;
    - colours are converted to sRGB by the embedded ICC profile; a profile that is broken, larger
      than 1 MB in a PNG, or of another colour space is ignored, and without one Pillow's formulas
      convert grey, CMYK, YCbCr;
    - a transparent palette entry and a transparent colour become alpha, and so does alpha of 16
      bits, of which the high byte is kept.

    Optional parts of a PNG that are damaged or huge are left out. The result carries no EXIF, GPS,
    XMP, ICC profile or comment. The source stays as it is, so that threads may share it: a Pillow
    image that was not loaded is read from its file again.

    Raises PictureError if the source is no picture in one of READ_FORMATS (HEIF, for HEIC files,
    needs the extra `heif`), is damaged or costly to decode (such as a JPEG of hundreds of scans),
    or has no pixels, too many, or takes too much memory; ConfigError if a limit is no integer.
    """
    limits = Limits(checked("max_pixels", max_pixels, int), checked("max_memory", max_memory, int))
    return _opened("picture", source, limits, to_rgb)


def read_file(path: Path) -> FileContent:
    """Read a picture's file, to open it later. Raises PictureError as `open_picture` does."""
    with _explained(str(path)):
        return FileContent(path, _read(path, Limits()))


def open_mask(source: Source) -> Image.Image:
    """Open what `open_picture` takes as a mask: mode L, 255 where it marks a pixel, else 0.

    Marked is what is transparent. If nothing is, as in a picture without alpha, it is what is
    white. Half transparent or grey pixels count as what they are nearer to. The mask is turned
    upright by its own EXIF orientation. Files are checked, and refused, as by `open_picture`.
    """
    return _opened("mask", source, Limits(), to_mask)


def pad_and_resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Put a picture on a white canvas and resize it to (height, width), as a model sees it.

    It is RGB, or RGBA and then composited on white; the result is RGB. The picture lies top left on
    the smallest canvas of that aspect ratio that holds it; for a square its side is the picture's
    longer one, as in the released code. Raises PictureError if the picture is so long and thin that
    its canvas would have over MAX_CANVAS_PIXELS.
    """
    height, width = size
    canvas_width, canvas_height = canvas_size(image.size, size)
    # As Pillow resizes: first all rows, then all columns. So the canvas is never there as a whole.
    narrow = Image.new("RGB", (width, canvas_height), WHITE)
    rows = max(1, _PIECE // canvas_width)
    for top in range(0, image.height, rows):
        part = image.crop((0, top, image.width, min(top + rows, image.height)))
        canvas = Image.new("RGB", (canvas_width, part.height), WHITE)
        canvas.paste(on_white(part), (0, 0))
        narrow.paste(canvas.resize((width, part.height), Image.Resampling.LANCZOS), (0, top))
    return narrow.resize((width, height), Image.Resampling.LANCZOS)


def to_square(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """Turn a picture into the tokenizer's input: float32 [3, height, width] in [-1, 1].

    size: (height, width). Pads and resizes as `pad_and_resize` does, and raises what it raises.
    """
    return to_encoder(np.asarray(pad_and_resize(image, size)))


def to_encoder(pixels: np.ndarray) -> np.ndarray:
    """Turn a padded and resized picture, 8-bit RGB [H, W, 3], into the tokenizer's input."""
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

    Undoes `pad_and_resize`: resizes to the canvas (Lanczos), then crops the padding off. Any size
    of the source's aspect ratio will do. Raises PictureError as `pad_and_resize` does.
    """
    canvas_width, canvas_height = canvas_size(original_size, pixels.shape[:2])
    width, height = original_size
    # As Pillow resizes: first all rows, then all columns. So the canvas is never there as a whole.
    edited = Image.fromarray(pixels)
    wide = edited.resize((canvas_width, edited.height), Image.Resampling.LANCZOS)
    restored = Image.new("RGB", original_size)
    columns = max(1, _PIECE // canvas_height)
    for left in range(0, width, columns):
        part = wide.crop((left, 0, min(left + columns, width), wide.height))
        tall = part.resize((part.width, canvas_height), Image.Resampling.LANCZOS)
        restored.paste(tall.crop((0, 0, part.width, height)), (left, 0))
    return restored


def side_by_side(left: Image.Image, right: Image.Image) -> Image.Image:
    """Return two pictures, RGB or RGBA, side by side on white."""
    size = left.width + right.width, max(left.height, right.height)
    both = Image.new("RGB", size, WHITE)
    both.paste(on_white(left), (0, 0))
    both.paste(on_white(right), (left.width, 0))
    return both


def check_target(path: Path) -> str:
    """Return the format that `save_picture` writes for a path's extension.

    Raises PictureError if the extension is not in WRITE_FORMATS, the path is a folder, or its
    folder does not exist or cannot be written to.
    """
    why = unwritable(path)
    if why is None and path.suffix.lower() == ".avif" and not has_avif():
        why = NO_AVIF
    if why is None and path.suffix.lower() not in WRITE_FORMATS:
        why = f"its format must be {', '.join(WRITE_FORMATS)}, not {shown(path.suffix)}"
    if why is not None:
        raise PictureError(f"{path} cannot be written: {why}")
    return WRITE_FORMATS[path.suffix.lower()]


def save_picture(image: Image.Image, path: AnyPath) -> None:
    """Write a picture, without any metadata, in the format of the path's extension.

    Alpha is kept in PNG, WebP, TIFF and AVIF files; in others the picture is composited on white.
    The file appears whole or not at all, and replaces an existing one. Raises PictureError if the
    extension is not in WRITE_FORMATS, or the file cannot be written; ConfigError on arguments of
    other types.
    """
    image, target = checked("image", image, Image.Image), Path(checked("path", path, AnyPath))
    write_encoded(encode_picture(image, check_target(target), target=target), target)


def encode_picture(
    image: Image.Image,
    format: str = "PNG",
    *,
    quality: int = 95,
    compression: int = 6,
    target: Path | str = "the picture",
) -> bytes:
    """Return a picture's file as bytes, without any metadata.

    format: PNG, JPEG, WEBP, BMP, TIFF or AVIF. quality: 1 to 100, of JPEG, WebP and AVIF, which
    lose some of the picture; the other formats lose nothing. compression: 0 to 9, of PNG: more
    takes longer and gives fewer bytes. target: where it goes, for messages.

    Alpha is kept in PNG, WebP, TIFF and AVIF; in others the picture is composited on white. Raises
    PictureError if the format cannot hold the picture, ConfigError on arguments of other kinds.
    """
    image, known = checked("image", image, Image.Image), sorted(set(WRITE_FORMATS.values()))
    name = checked("format", format, str).upper()
    if name not in known:
        raise ConfigError(f"format is {shown(format)}; give {', '.join(known)}")
    if name == "AVIF" and not has_avif():
        raise PictureError(f"{target} cannot be written: {NO_AVIF}")
    options = {
        "quality": _within("quality", quality, 1, 100),
        "compress_level": _within("compression", compression, 0, 9),
    }
    # In memory: Pillow does not notice when a full disk takes only part of a write.
    encoded = BytesIO()
    with _writing(target):
        _pixels_only(image, name in _WITH_ALPHA).save(encoded, format=name, **options)
    return encoded.getvalue()


def _within(name: str, value: int, least: int, most: int) -> int:
    number = checked(name, value, int)
    if not least <= number <= most:
        raise ConfigError(f"{name} is {shown(number)}; give {least} to {most}")
    return number


def write_encoded(content: bytes, target: Path, replace: bool = True) -> None:
    """Write a picture's file whole or not at all.

    replace: False raises FileExistsError where there is a file. Raises PictureError if it cannot be
    written.
    """
    with _writing(target), atomic_file(target, replace) as whole:
        whole.write_bytes(content)


@contextmanager
def _writing(target: Path | str) -> Iterator[None]:
    try:
        yield
    except FileExistsError:
        raise
    except (OSError, ValueError) as error:
        raise PictureError(f"{target} cannot be written: {_reason(error)}") from error


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn any exception of reading into a PictureError, whose one line starts with the name."""
    try:
        yield
    except Exception as error:  # decoders raise errors of every kind on damaged files
        raise PictureError(f"{name} cannot be read: {_reason(error)}") from error


def _opened(what: str, source: Source, limits: Limits, convert: _Convert) -> Image.Image:
    """Read and decode a source and convert it. what: "picture" or "mask", for messages."""
    known, name = _known(what, source), f"the {what}"
    if isinstance(known, FileContent):
        known, name = known.content, str(known.path)
    elif isinstance(known, Path):
        name = str(known)
    with _explained(name):
        if isinstance(known, Image.Image):
            return _from_pillow(known, limits, convert)
        image = open_file(_read(known, limits), limits).decode()
        return convert(image, _orientation(image), limits, True)


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else "") or reason(error)


def _known(what: str, source: Any) -> Path | bytes | BinaryIO | Image.Image | FileContent:
    """Return a source of a kind that can be read. Raises PictureError on all others."""
    with suppress(Exception):  # a caller's object may raise anything
        if isinstance(source, bytes | bytearray | memoryview):
            return bytes(source)
        if isinstance(source, Image.Image | FileContent):
            return source
        if callable(getattr(source, "read", None)):
            return source
        return Path(checked(what, source, AnyPath))
    raise PictureError(
        f"the {what} is {shown(source)}; give a path, the bytes of a file, a binary file, or a "
        "Pillow image, such as Image.fromarray(array)"
    )


def _read(source: Path | bytes | BinaryIO, limits: Limits) -> bytes:
    if isinstance(source, bytes):
        return source
    if isinstance(source, Path):
        with source.open("rb") as file:
            return _content(file, limits)
    return _content(source, limits)


def _content(file: BinaryIO, limits: Limits) -> bytes:
    """Read a whole file, from its start if it has one; leave its position as it was."""
    with _ONE_AT_A_TIME:
        try:
            position = file.tell()
            file.seek(0)
        except (AttributeError, OSError):
            position = None
        else:
            try:
                return _rest(file, limits)
            finally:
                file.seek(position)
    # A pipe or connection, which threads cannot share: waiting for it must not stop the others.
    return _rest(file, limits)


def _rest(file: BinaryIO, limits: Limits) -> bytes:
    content = BytesIO()
    while piece := file.read(_PIECE):
        content.write(piece)
        limits.check_memory(content.tell())
    return content.getvalue()


def _from_pillow(image: Image.Image, limits: Limits, convert: _Convert) -> Image.Image:
    """Convert a Pillow image, whose own decoding is not safe in several threads.

    One that was opened but not loaded is decoded from its file again, and stays as it is; only
    after changes to it, or in a format or frame that is not read from files, it is loaded.
    """
    limits.check_pixels(image.size)
    ours = _decoded_again(image, limits)
    if ours is not None:
        return convert(ours, _orientation(ours), limits, True)
    with _ONE_AT_A_TIME:
        if getattr(image, "fp", None) is not None:
            limits.check_memory(picture_memory(image.size, image.mode))
        image.load()
        orientation = _orientation(image)
    return convert(image, orientation, limits, False)


def _decoded_again(image: Image.Image, limits: Limits) -> Image.Image | None:
    """Decode a Pillow image that is not loaded from its file, if it can be done without it."""
    with _ONE_AT_A_TIME:
        file: BinaryIO | None = getattr(image, "fp", None)
        if file is None or image.format not in _READ_AGAIN:
            return None
        content = _from_frame(image, _content(file, limits))
    if content is None:
        return None
    opened = open_file(content, limits)
    return opened.decode() if opened.shows(image) else None


def _from_frame(image: Image.Image, content: bytes) -> bytes | None:
    """Return a file that begins with the image's frame; None if that builds on earlier ones."""
    if image.tell() == 0 and (image.format != "HEIF" or getattr(image, "n_frames", 1) == 1):
        return content
    if isinstance(image, TiffImageFile):
        return beginning_at(content, image.tag_v2.offset)
    if isinstance(image, MpoImageFile):
        return content[image.offset :]
    return None


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF data is no reason to refuse a picture
        return 1


def _pixels_only(image: Image.Image, alpha: bool) -> Image.Image:
    """Copy a picture's pixels, without the metadata that Pillow carries along.

    The copy is RGBA if the picture has alpha and the format takes it, else RGB on white.
    """
    if image.has_transparency_data:
        shown = to_rgba(image)
        shown = shown if alpha else on_white(shown)
    else:
        shown = image if image.mode == "RGB" else image.convert("RGB")
    plain = Image.new(shown.mode, image.size)
    plain.paste(shown)
    return plain


def canvas_size(picture: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Return (width, height) of the smallest canvas of size's aspect ratio that holds the picture.

    picture is (width, height), size is (height, width). Raises PictureError if it is too large.
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
