"""Reduce EXIF data to the orientation of the picture."""

import struct

from varedit_runtime.decoding.tiff_directory import Directory
from varedit_runtime.errors import PictureError

ORIENTATION = 274
EXIF = b"Exif\0\0"


def only_orientation(exif: bytes) -> bytes:
    """Return EXIF data with the orientation alone. Damaged data count as upright.

    Pillow then neither parses long data nor prints warnings about damaged data on stderr.
    """
    try:
        value = Directory(exif.removeprefix(EXIF)).one(ORIENTATION, 1)
    except PictureError:
        value = 1
    entry = struct.pack("<HHII", ORIENTATION, 3, 1, value if value <= 8 else 1)
    return EXIF + b"II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4)
