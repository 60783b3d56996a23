"""Open and decode a picture file with Pillow, after its format's reader has checked it."""

import ctypes
import re
from dataclasses import dataclass
from functools import cache
from io import BytesIO

import numpy as np
from PIL import Image, UnidentifiedImageError, features

from varedit_runtime.decoding.exif import only_orientation
from varedit_runtime.decoding.heif import read_avif, read_heif
from varedit_runtime.decoding.jpeg import read_jpeg
from varedit_runtime.decoding.limits import Checked, Limits, picture_memory, pieces
from varedit_runtime.decoding.other_formats import read_bmp, read_gif, read_webp
from varedit_runtime.decoding.png import read_png
from varedit_runtime.decoding.tiff import read_tiff
from varedit_runtime.errors import PictureError, needs_extra

# Only these decoders see untrusted files; Pillow's rarer ones are less tested against attacks.
_READERS = {
    "PNG": (rb"\x89PNG\r\n\x1a\n", read_png),
    "JPEG": (rb"\xff\xd8\xff", read_jpeg),
    "WEBP": (rb"RIFF....WEBPVP8[ LX]", read_webp),
    "GIF": (rb"GIF8[79]a", read_gif),
    "BMP": (rb"BM", read_bmp),
    "TIFF": (rb"II\*\0|MM\0\*|II\+\0", read_tiff),
    "AVIF": (rb"....ftyp(?:avi[fs]|m[is]f1.{0,40}avi[fs])", read_avif),
    "HEIF": (rb"....ftyp(?:he[iv][cmsx]|mif1|msf1)", read_heif),
}
READ_FORMATS = tuple(_READERS)
NO_AVIF = "the Pillow that is installed was built without AVIF"
_EXIF = {"exif", "Raw profile type exif"}


@dataclass(frozen=True)
class PictureFile:
    """A picture file that was checked and opened, but not decoded."""

    image: Image.Image
    checked: Checked

    def shows(self, image: Image.Image) -> bool:
        """Return whether an image that Pillow opened from this file was not changed since."""
        return (
            (self.image.mode, self.image.size) == (image.mode, image.size)
            and bool(_EXIF & self.image.info.keys()) == bool(_EXIF & image.info.keys())
            and all(
                self.image.info.get(key) == image.info.get(key)
                for key in ("icc_profile", "transparency")
            )
        )

    def decode(self) -> Image.Image:
        """Decode the picture. A transparent colour becomes a level of the picture, or alpha."""
        levels, depth = self.checked.transparent, self.checked.depth
        self.image.load()
        # Apart from the file, whose decoder may hold much memory.
        image = self.image._new(self.image.im)
        if len(levels) == 3 and depth == 16:
            image.putalpha(self._opaque(image))
            del image.info["transparency"]
        elif levels and depth < 16:
            most = 2**depth - 1
            own = [(level & most) * (255 // most) for level in levels]
            image.info["transparency"] = own[0] if len(own) == 1 else tuple(own)
        return image

    def _opaque(self, high: Image.Image) -> Image.Image:
        """Compare 16-bit colours with the transparent one: Pillow decodes their high bytes alone.

        Read as little-endian, the same samples give the low bytes.
        """
        low = Image.open(BytesIO(self.checked.data), formats=["PNG"])
        low.tile = [tile._replace(args="RGB;16L") for tile in low.tile]
        opaque = Image.new("L", high.size)
        for box in pieces(high.size):
            samples = np.asarray(high.crop(box)).astype(np.uint16) << 8
            samples |= np.asarray(low.crop(box))
            differs = (samples != np.array(self.checked.transparent)).any(axis=2)
            opaque.paste(Image.fromarray(differs), box[:2])
        return opaque


def open_file(data: bytes, limits: Limits) -> PictureFile:
    """Check and open a picture file.

    Raises PictureError if it cannot be read or exceeds the limits, and whatever Pillow raises.
    """
    written_as, reader = _reader(data)
    checked = reader(data)
    limits.check_pixels(checked.size)
    limits.check_tile(checked.tile)
    copied = 0 if checked.data is data else len(checked.data)
    needed = len(data) + copied + checked.decoder
    limits.check_memory(needed)
    if written_as == "TIFF":
        _silence_libtiff()
    image = _opened(checked.data, written_as)
    limits.check_pixels(image.size)
    limits.check_memory(needed + picture_memory(image.size, image.mode))
    if image.info.get("exif"):
        image.info["exif"] = only_orientation(image.info["exif"])
    return PictureFile(image, checked)


def has_avif() -> bool:
    """Return whether Pillow reads and writes AVIF files, as it was built."""
    return bool(features.check("avif"))


def _opened(data: bytes, written_as: str) -> Image.Image:
    try:
        if written_as == "HEIF":
            with needs_extra("heif"):
                from pillow_heif import HeifImageFile

            return HeifImageFile(BytesIO(data))
        if written_as == "AVIF" and not has_avif():
            raise PictureError(NO_AVIF)
        return Image.open(BytesIO(data), formats=[written_as])
    except (UnidentifiedImageError, SyntaxError) as error:
        raise PictureError(f"its {written_as} header is damaged or of a rare kind") from error


def _reader(data: bytes):
    for name, (signature, reader) in _READERS.items():
        if re.match(signature, data, re.DOTALL):
            return name, reader
    known = ", ".join(READ_FORMATS).replace("HEIF", "or, with the extra heif, HEIF")
    raise PictureError(f"it is not a picture in a known format: give {known}")


@cache
def _silence_libtiff() -> None:
    """Stop libtiff from writing to stderr what it finds wrong with a file; Pillow raises it."""
    library = ctypes.CDLL(Image.core.__file__)  # its own symbols, and those it is linked with
    for setter in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
        if hasattr(library, setter):
            getattr(library, setter)(None)
