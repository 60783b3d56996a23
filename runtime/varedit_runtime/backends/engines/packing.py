"""Plans in their files: zlib streams one behind the other, of a piece of the plan each.

Most of a plan are sources of kernels, over and over, which pack well, or weights, which do not:
pieces that would not are stored as they are, so that gigabytes of them are read at once. Beside the
plan no more than pieces of it are held, in either direction.
"""

import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

PIECE = 2**20
SAMPLE = 2**16  # what a piece starts with, and is judged by
WORTHWHILE = 0.5
PART = 2**18  # that is unpacked at once
MOST = 1032  # bytes that zlib can have made one of

Buffer = bytes | memoryview


def pack_into(path: Path, plan: Buffer) -> None:
    whole = memoryview(plan)
    with path.open("wb") as file:
        for start in range(0, len(whole), PIECE):
            piece = whole[start : start + PIECE]
            file.write(zlib.compress(piece, _level(piece)))


def _level(piece: memoryview) -> int:
    sample = piece[:SAMPLE]
    packs = len(zlib.compress(sample, zlib.Z_BEST_SPEED)) < WORTHWHILE * len(sample)
    return zlib.Z_DEFAULT_COMPRESSION if packs else zlib.Z_NO_COMPRESSION


def unpack(chunks: Iterable[bytes], packed: int, size: int) -> bytearray:
    """What was packed, of that size, from all chunks of a file.

    packed: the file's own size. Raises ValueError on anything else, unpacking no more.
    """
    wrong = ValueError(f"it does not unpack to {size} bytes")
    if size > MOST * packed:
        raise wrong
    plan, filled = bytearray(size), 0
    for part in _parts(chunks):
        end = filled + len(part)
        if end > size:
            raise wrong
        plan[filled:end] = part
        filled = end
    if filled != size:
        raise wrong
    return plan


def unpacked_size(chunks: Iterable[bytes]) -> int:
    """Bytes. Raises ValueError on what was not packed."""
    return sum(map(len, _parts(chunks)))


def _parts(chunks: Iterable[bytes]) -> Iterator[bytes]:
    unpacker = None
    for chunk in chunks:
        while chunk:
            unpacker = unpacker or zlib.decompressobj()
            try:
                yield unpacker.decompress(chunk, PART)
            except zlib.error as error:
                raise ValueError(f"it is not packed ({error})") from error
            chunk = unpacker.unconsumed_tail or unpacker.unused_data
            if unpacker.eof:
                unpacker = None
    if unpacker:
        raise ValueError("it is cut short")
