"""Check WebP, GIF and BMP files, whose structure is simple."""

import re
import struct

from varedit_runtime.decoding.limits import Checked
from varedit_runtime.errors import PictureError

_MAX_BLOCKS = 100_000  # of a GIF's comments and other extensions, of up to 255 bytes each
_CONTROL = 0xF9
_GIF_BLOCK = re.compile(rb"[!,;]")  # an extension, a picture, the end
_RUN_LENGTHS = (b"\1\0\0\0", b"\2\0\0\0")  # compressions of a BMP
_MAX_RUN_PIXELS = 2**21  # Pillow decodes run lengths in Python


def read_webp(data: bytes) -> Checked:
    """Check a WebP file's header: Pillow allocates all memory for a picture when it opens one.

    Raises PictureError if the header is damaged.
    """
    kind, content = data[12:16], data[20:30]
    if len(content) < 10:
        raise PictureError("it is truncated: a WebP has a header")
    if kind == b"VP8X":
        width, height = (1 + int.from_bytes(content[at : at + 3], "little") for at in (4, 7))
    elif kind == b"VP8L":
        bits = int.from_bytes(content[1:5], "little")
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    else:
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", content, 6))
    # The canvas, the one before, the frame, and the file twice.
    return Checked(data, (width, height), 12 * width * height + 2 * len(data))


def read_gif(data: bytes) -> Checked:
    """Check a GIF file; keep its first picture without comments and other extensions.

    Raises PictureError if it has no picture, or too many blocks before it.
    """
    start = 13
    if len(data) > start and data[10] & 0x80:
        start += 3 << (data[10] & 7) + 1
    picture, control = _first_picture(data, start)
    size = struct.unpack_from("<HH", data, 6)
    left, top, width, height = struct.unpack_from("<HHHH", data, picture + 1)
    size = max(size[0], left + width), max(size[1], top + height)  # as Pillow does
    return Checked(b"".join([data[:start], control, memoryview(data)[picture:]]), size)


def _first_picture(data: bytes, start: int) -> tuple[int, bytes]:
    """Return where a GIF's first picture begins, and the extension that names a clear colour."""
    control, blocks = b"", 0
    while (block := _GIF_BLOCK.search(data, start)) and block[0] != b";":
        start = block.end()
        if block[0] == b",":
            if len(data) < start + 9:
                break
            return start - 1, control
        label, start = data[start : start + 1], start + 1
        if label == b"\xf9" and len(data) > start + 4:
            # Without what is done with the frame before the next one: Pillow prepares for it.
            control = bytes([0x21, _CONTROL, 4, data[start + 1] & 1, 0, 0, data[start + 4], 0])
        while start < len(data) and data[start]:
            start += 1 + data[start]
            blocks += 1
            if blocks > _MAX_BLOCKS:
                raise PictureError(f"it has over {_MAX_BLOCKS} GIF blocks: save it again")
        start += 1
    raise PictureError("it is truncated or damaged: a GIF has a picture")


def read_bmp(data: bytes) -> Checked:
    """Check a BMP file's header.

    Raises PictureError if it is cut short, or the picture is large and run-length encoded.
    """
    if len(data) < 26:
        raise PictureError("it is truncated: a BMP has a header")
    if struct.unpack_from("<I", data, 14)[0] == 12:  # the oldest kind of header
        width, height = struct.unpack_from("<HH", data, 18)
    else:
        width, height = struct.unpack_from("<Ii", data, 18)
    pixels, run_length_encoded = width * abs(height), data[30:34] in _RUN_LENGTHS
    if run_length_encoded and pixels > _MAX_RUN_PIXELS:
        raise PictureError(
            f"a run-length encoded BMP may have up to {_MAX_RUN_PIXELS} pixels: save it as PNG"
        )
    return Checked(data, (width, abs(height)), 3 * pixels if run_length_encoded else 0)
