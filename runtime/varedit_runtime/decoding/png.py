"""Check a PNG's chunks; keep its first picture and the metadata that are used.

So damaged and huge optional chunks do no harm, and neither do the frames of an animation.
"""

import struct
import zlib
from collections.abc import Iterator

from varedit_runtime.decoding.exif import only_orientation
from varedit_runtime.decoding.limits import Checked, picture_memory
from varedit_runtime.errors import PictureError

SIGNATURE = b"\x89PNG\r\n\x1a\n"

_MAX_CHUNKS = 200_000  # chunks of pixels usually have 8 KiB or more
_MAX_METADATA = 2**20  # bytes, unpacked; Pillow refuses a picture with more in a chunk
_CRITICAL = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
_BEFORE_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"iCCP")
_GREY, _RGB = 0, 2
_SAMPLES = {_GREY: 1, _RGB: 3, 3: 1, 4: 2, 6: 4}  # of a pixel, by colour type
_XMP = b"XML:com.adobe.xmp\0\0"  # the second 0: not compressed
_HEX_EXIF = b"Raw profile type exif"  # how ImageMagick stores EXIF data


def read_png(data: bytes) -> Checked:
    """Check a PNG file.

    Raises PictureError if its header, palette or pixels are damaged or cut short.
    """
    kept: dict[bytes, bytes] = {}
    pixels: list[memoryview] = []
    for kind, content in _sound_chunks(memoryview(data)):
        if kind == b"IDAT":
            pixels.append(content)
        elif not (pixels and kind in _BEFORE_PIXELS):
            for used, smaller in _used(kind, content):
                kept.setdefault(used, smaller)
    header = kept.pop(b"IHDR", b"")
    if len(header) != 13 or header[9] not in _SAMPLES or not pixels:
        raise PictureError("it is truncated or damaged: a PNG has a header and pixels")
    width, height, depth, colour = struct.unpack_from(">IIBB", header)
    size, transparent = (width, height), _transparent(colour, kept)
    decoder = 2 * (width * depth * _SAMPLES[colour] // 8 + 2)  # a row and the one before
    if transparent and colour == _RGB and depth == 16:  # is decoded twice
        decoder += picture_memory(size) + picture_memory(size, "L")
    chunks = [_chunk(b"IHDR", header), *(_chunk(kind, content) for kind, content in kept.items())]
    chunks += [_chunk(b"IDAT", *pixels), _chunk(b"IEND")]
    whole = b"".join([SIGNATURE, *(part for chunk in chunks for part in chunk)])
    return Checked(whole, size, decoder, transparent=transparent, depth=depth)


def _sound_chunks(data: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """Yield kind and content of chunks up to the last, but none that is optional and damaged."""
    position = len(SIGNATURE)
    for _ in range(_MAX_CHUNKS):
        if len(data) < position + 12:
            return
        length, kind = struct.unpack_from(">I4s", data, position)
        content = data[position + 8 : position + 8 + length]
        position += 12 + length
        whole = position <= len(data)
        if whole:
            (checksum,) = struct.unpack_from(">I", data, position - 4)
            whole = checksum == zlib.crc32(content, zlib.crc32(kind))
        if kind == b"IEND":
            return
        if whole:
            yield kind, content
        elif kind in _CRITICAL:
            name = kind.decode()
            raise PictureError(f"it is truncated or damaged: its {name} chunk is not whole")
    raise PictureError(f"it has over {_MAX_CHUNKS} PNG chunks: save it again")


def _used(kind: bytes, content: memoryview) -> Iterator[tuple[bytes, bytes]]:
    """Yield what is used of a chunk, as kind and content."""
    if kind in (b"IHDR", b"PLTE", b"tRNS"):
        yield kind, bytes(content)
    if len(content) > _MAX_METADATA:
        return
    data = bytes(content)
    keyword, _, rest = data.partition(b"\0")
    if kind == b"eXIf":
        yield kind, _exif(data)
    elif (kind == b"iCCP" and _unpacked(rest)) or (kind == b"iTXt" and data.startswith(_XMP)):
        yield kind, data
    elif kind in (b"tEXt", b"zTXt") and keyword == _HEX_EXIF:
        text = rest if kind == b"tEXt" else _unpacked(rest)
        digits = b"".join(text.split(b"\n")[3:]).decode("latin-1")
        try:
            yield b"eXIf", _exif(bytes.fromhex(digits))
        except ValueError:
            return


def _exif(data: bytes) -> bytes:
    return only_orientation(data)[6:]


def _unpacked(method_and_data: bytes) -> bytes:
    """Return what a chunk holds compressed; nothing if that is damaged or too large."""
    unpacker = zlib.decompressobj()
    try:
        content = unpacker.decompress(method_and_data[1:], _MAX_METADATA)
    except zlib.error:
        return b""
    return b"" if unpacker.unconsumed_tail or method_and_data[0] else content


def _transparent(colour: int, kept: dict[bytes, bytes]) -> tuple[int, ...]:
    """Return the levels of a grey or RGB picture's transparent colour; drop a damaged one."""
    if colour not in (_GREY, _RGB) or b"tRNS" not in kept:
        return ()
    if len(kept[b"tRNS"]) != 2 * _SAMPLES[colour]:
        del kept[b"tRNS"]
        return ()
    return struct.unpack(f">{_SAMPLES[colour]}H", kept[b"tRNS"])


def _chunk(kind: bytes, *parts: bytes | memoryview) -> list[bytes | memoryview]:
    """Return a chunk in pieces; the checksum of pixels was compared, and is not computed again."""
    checksum = 0 if kind == b"IDAT" else zlib.crc32(kind + b"".join(parts))
    length = sum(map(len, parts))
    return [struct.pack(">I", length), kind, *parts, struct.pack(">I", checksum)]
