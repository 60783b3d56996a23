"""Check a PNG's chunks; keep its first picture and the metadata that are used.

Damaged or huge optional chunks then do no harm, nor do the frames of an animation.
"""

import struct
import zlib
from collections.abc import Iterator

from varedit_runtime.decoding.exif import EXIF, only_orientation
from varedit_runtime.decoding.limits import Checked, picture_memory
from varedit_runtime.errors import PictureError

SIGNATURE = b"\x89PNG\r\n\x1a\n"

_MAX_CHUNKS = 200_000  # chunks of pixels usually have 8 KiB or more
_MAX_METADATA = 2**20  # bytes, unpacked; Pillow refuses a picture with more in a chunk
_CRITICAL = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
_FIRST = (b"IHDR", b"PLTE", b"tRNS", b"iCCP")  # chunks that count before the pixels
_GREY, _RGB = 0, 2
_SAMPLES = {_GREY: 1, _RGB: 3, 3: 1, 4: 2, 6: 4}  # of a pixel, by colour type
# Chunks that count anywhere, and how they begin: XMP that is not compressed, and ImageMagick's EXIF
# data in hexadecimal digits.
_XMP, _HEX_EXIF = b"XML:com.adobe.xmp\0\0", b"Raw profile type exif\0"
_LATER = {b"eXIf": b"", b"iTXt": _XMP, b"tEXt": _HEX_EXIF, b"zTXt": _HEX_EXIF}


def read_png(data: bytes) -> Checked:
    """Check a PNG file.

    Raises PictureError if its header, palette or pixels are damaged or cut short.
    """
    found: dict[bytes, memoryview] = {}
    pixels: list[memoryview] = []
    for kind, content in _sound_chunks(memoryview(data)):
        if kind == b"IDAT":
            pixels.append(content)
        elif (kind in _FIRST and not pixels) or _begins(content, _LATER.get(kind)):
            found.setdefault(kind, content)
    header = bytes(found.pop(b"IHDR", b""))
    if len(header) != 13 or header[9] not in _SAMPLES or not pixels:
        raise PictureError("it is truncated or damaged: a PNG has a header and pixels")
    width, height, depth, colour = struct.unpack_from(">IIBB", header)
    kept = dict(_kept(found, colour))
    size, transparent = (width, height), _transparent(colour, kept)
    decoder = 2 * (width * depth * _SAMPLES[colour] // 8 + 2)  # a row and the one before
    if len(transparent) == 3 and depth == 16:  # is decoded twice
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


def _begins(content: memoryview, prefix: bytes | None) -> bool:
    return prefix is not None and content[: len(prefix)] == prefix


def _kept(found: dict[bytes, memoryview], colour: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield kind and content of the chunks that Pillow is to see beside header and pixels."""
    data = {kind: bytes(c) for kind, c in found.items() if len(c) <= _MAX_METADATA}
    if b"PLTE" in data:
        yield b"PLTE", data[b"PLTE"]
    lengths = {_GREY: 2, _RGB: 6}
    if b"tRNS" in data and len(data[b"tRNS"]) == lengths.get(colour, len(data[b"tRNS"])):
        yield b"tRNS", data[b"tRNS"]
    if b"iCCP" in data and _unpacked(data[b"iCCP"].partition(b"\0")[2]):
        yield b"iCCP", data[b"iCCP"]
    if b"iTXt" in data:
        yield b"iTXt", data[b"iTXt"]
    text = data.get(b"tEXt", b"")[len(_HEX_EXIF) :]
    text = text or _unpacked(data.get(b"zTXt", b"")[len(_HEX_EXIF) :])
    exif = data.get(b"eXIf") or _from_hex(text)
    if exif:
        yield b"eXIf", only_orientation(exif).removeprefix(EXIF)


def _from_hex(text: bytes) -> bytes:
    """Return the EXIF data in a text: three lines before hexadecimal digits."""
    try:
        return bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode("latin-1"))
    except ValueError:
        return b""


def _unpacked(method_and_data: bytes) -> bytes:
    """Return what a chunk holds compressed; nothing if that is damaged or too large."""
    unpacker = zlib.decompressobj()
    if method_and_data[:1] != b"\0":  # deflate
        return b""
    try:
        content = unpacker.decompress(method_and_data[1:], _MAX_METADATA)
    except zlib.error:
        return b""
    return b"" if unpacker.unconsumed_tail else content


def _transparent(colour: int, kept: dict[bytes, bytes]) -> tuple[int, ...]:
    """Return the levels of a grey or RGB picture's transparent colour."""
    if colour not in (_GREY, _RGB) or b"tRNS" not in kept:
        return ()
    return struct.unpack(f">{_SAMPLES[colour]}H", kept[b"tRNS"])


def _chunk(kind: bytes, *parts: bytes | memoryview) -> list[bytes | memoryview]:
    """Return a chunk in pieces; the checksum of pixels was compared, and is not computed again."""
    checksum = 0 if kind == b"IDAT" else zlib.crc32(kind + b"".join(parts))
    length = sum(map(len, parts))
    return [struct.pack(">I", length), kind, *parts, struct.pack(">I", checksum)]
