"""Plans in their files: zlib streams one behind the other, of a piece of the plan each.

Most of a plan are sources of kernels, over and over, which pack well, or weights, which do not:
pieces that would not are stored as they are, so that gigabytes of them are read at once.
"""

import zlib
from collections.abc import Iterator

PIECE = 2**20
LONGEST = PIECE + 2**12  # that a piece is when it is packed: it is stored at worst
SAMPLE = 2**16  # what a piece starts with, and is judged by
WORTHWHILE = 0.5


def pack(data: bytes) -> bytes:
    pieces = (data[start : start + PIECE] for start in range(0, len(data), PIECE))
    return b"".join(zlib.compress(piece, _level(piece)) for piece in pieces)


def _level(piece: bytes) -> int:
    sample = piece[:SAMPLE]
    packs = len(zlib.compress(sample, zlib.Z_BEST_SPEED)) < WORTHWHILE * len(sample)
    return zlib.Z_DEFAULT_COMPRESSION if packs else zlib.Z_NO_COMPRESSION


def unpack(data: bytes, size: int) -> bytes:
    """What was packed, of that size. Raises ValueError on anything else, unpacking no more."""
    plan = bytearray()
    for piece in _pieces(data):
        plan += piece
        if len(plan) > size:
            break
    if len(plan) != size:
        raise ValueError(f"it does not unpack to {size} bytes")
    return bytes(plan)


def unpacked_size(data: bytes) -> int:
    """Bytes. Raises ValueError on what was not packed."""
    return sum(map(len, _pieces(data)))


def _pieces(data: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(data):
        window = data[at : at + LONGEST]
        unpacker = zlib.decompressobj()
        try:
            piece = unpacker.decompress(window, PIECE + 1)  # one more, so that it comes to its end
        except zlib.error as error:
            raise ValueError(f"it is not packed ({error})") from error
        if not unpacker.eof:
            raise ValueError("it is cut short, or of longer pieces")
        yield piece
        at += len(window) - len(unpacker.unused_data)
