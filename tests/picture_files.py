"""Build picture files that no encoder writes, and check what damaged ones give."""

import io
import math
import struct
import warnings
import zlib
from collections.abc import Iterable, Sequence
from random import Random

import numpy as np
import pytest
from PIL import Image, ImageCms

from varedit_runtime.decoding.to_rgb import on_white
from varedit_runtime.errors import PictureError
from varedit_runtime.pictures import open_picture


def encoded(image: Image.Image, written_as: str, **options: object) -> bytes:
    """Return a picture as a file's bytes."""
    file = io.BytesIO()
    image.save(file, written_as, **options)
    return file.getvalue()


WHITE = [255, 255, 255]


def pixels(source: Image.Image | bytes) -> list[list[int]]:
    """Return the pixels of a picture as it is opened, on white."""
    return np.asarray(on_white(open_picture(source))).reshape(-1, 3).tolist()


def noise(height: int, width: int) -> Image.Image:
    """Return a picture of which every pixel is drawn at random."""
    samples = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(samples)


def srgb_profile(padding: int = 0) -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes() + bytes(padding)


def swapped_profile() -> bytes:
    """Return an sRGB profile with its red and green primaries exchanged."""
    profile = srgb_profile().replace(b"rXYZ", b"swap")
    return profile.replace(b"gXYZ", b"rXYZ").replace(b"swap", b"gXYZ")


def chunk(kind: bytes, content: bytes, checksum: int | None = None) -> bytes:
    """Return a PNG chunk, by default with the right checksum."""
    if checksum is None:
        checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def png(
    width: int,
    height: int,
    *,
    depth: int = 8,
    colour: int = 0,
    data: bytes = b"",
    before: bytes = b"",
    after: bytes = b"",
) -> bytes:
    """Return a PNG of rows that each begin with a filter. before, after: chunks around pixels."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(data))
    body = chunk(b"IHDR", header) + before + pixels + after + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def with_checksums(file: bytes | bytearray) -> bytes:
    """Return a PNG with the right checksums of its chunks; another file as it is."""
    data, place = bytearray(file), 8
    while file.startswith(b"\x89PNG") and place + 12 <= len(data):
        end = place + 8 + int.from_bytes(data[place : place + 4], "big")
        checksum = zlib.crc32(data[place + 4 : end])
        data[end : end + 4] = struct.pack(">I", checksum) if end + 4 <= len(data) else b""
        place = end + 4
    return bytes(data)


def many_scans(scans: int, size: tuple[int, int] = (64, 64)) -> bytes:
    """Return a progressive JPEG with this many scans, most of them repeating one of 10 bytes."""
    file = encoded(Image.new("L", size, 77), "JPEG", progressive=True)
    last = file.rindex(b"\xff\xda")
    wanted = scans - file.count(b"\xff\xda")
    return file[:-2] + file[last:-2] * wanted + b"\xff\xd9"


def with_segments(jpeg: bytes, *segments: tuple[int, bytes]) -> bytes:
    """Return a JPEG with segments, each a marker and its content, behind its start."""
    added = [struct.pack(">BBH", 0xFF, marker, 2 + len(data)) + data for marker, data in segments]
    return jpeg[:2] + b"".join(added) + jpeg[2:]


def tiff(pixels: bytes, **tags: int | list[int]) -> bytes:
    """Return a TIFF; pixels are at offset 8. tags: _256=width and so on, numbers or lists."""
    entries, values = [], b""
    start = 8 + len(pixels)
    for tag, value in sorted((int(name[1:]), value) for name, value in tags.items()):
        numbers = value if isinstance(value, list) else [value]
        place = struct.pack("<I", numbers[0])
        if len(numbers) > 1:
            place = struct.pack("<I", start + len(values))
            values += struct.pack(f"<{len(numbers)}I", *numbers)
        entries.append(struct.pack("<HHI", tag, 4, len(numbers)) + place)
    header = b"II*\0" + struct.pack("<I", start + len(values))
    return header + pixels + values + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)


def jpeg_tiff(jpeg: bytes, size: tuple[int, int]) -> bytes:
    """Return a TIFF of one grey strip, compressed as a JPEG."""
    width, height = size
    return tiff(
        jpeg,
        _256=width,
        _257=height,
        _258=8,
        _259=7,
        _262=1,
        _273=8,
        _277=1,
        _278=height,
        _279=len(jpeg),
    )


def damaged(file: bytes, random: Random) -> bytes:
    """Return a file with some bytes changed, moved, repeated or cut off, most near its start."""
    data = bytearray(file)
    for _ in range(random.choice((1, 1, 2, 5, 20))):
        place = random.randrange(random.choice((min(64, len(data)), len(data))))
        end = place + random.choice((1, 2, 4, 16, 200))
        kind = random.randrange(6)
        if kind == 0:
            data[place] ^= 1 << random.randrange(8)
        elif kind == 1:
            data[place:end] = random.choice((b"\0", b"\xff", b"\x7f")) * len(data[place:end])
        elif kind == 2:
            data[place:end] = random.randbytes(len(data[place:end]))
        elif kind == 3:
            data[place:place] = data[place:end] * random.choice((1, 1, 100))
        elif kind == 4:
            del data[place:end]
        else:
            del data[max(place, 8) :]
        if not data:
            return b""
    return bytes(data) if random.random() < 0.5 else with_checksums(data)


def check_damaged(
    files: Sequence[bytes], cases: Iterable[Random], capfd: pytest.CaptureFixture[str]
) -> None:
    """Check that files, damaged at random, give a plain picture or one error, and say nothing."""
    refused = total = 0
    for random in cases:
        file, total = damaged(random.choice(files), random), total + 1
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                picture = open_picture(file, max_pixels=10**6, max_memory=2**26)
            except PictureError as error:
                assert "cannot be read: " in str(error)
                refused += 1
            else:
                assert picture.mode in ("RGB", "RGBA") and picture.info == {}
                assert len(picture.tobytes()) == len(picture.mode) * math.prod(picture.size) > 0
        assert not told, str(told[0].message)
        assert capfd.readouterr().err == ""
    assert total / 5 < refused < total
