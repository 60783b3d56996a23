"""Pack plans into gzip files, and unpack them: `gunzip < scale_00.plan.gz` gives the plan.

A plan holds sources of kernels, repeated again and again, which pack well, and weights, which do
not. So a file has a gzip member for every piece of the plan: pieces that would not get smaller are
stored as they are, and gigabytes of weights are written and read at once. In both directions only
pieces are held in memory beside the plan.

Why not the gzip module: it cannot change the level between members without this loop, and its
reader takes 9.5 s for 100 MB of stored members, where zlib's takes 0.1 s.
"""

import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

PIECE = 2**20
SAMPLE = 2**16  # bytes at a piece's start that decide whether it is compressed
WORTHWHILE = 0.5  # compressed size, relative to the sample's, below which it is
PART = 2**18  # bytes that are unpacked at once
MOST = 1032  # zlib's largest compression ratio
GZIP = 16 + zlib.MAX_WBITS
GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS  # sets compiled by earlier versions are zlib streams

BytesLike = bytes | memoryview


def pack_into(path: Path, plan: BytesLike) -> None:
    """Write a plan to a file."""
    whole = memoryview(plan)
    with path.open("wb") as file:
        for start in range(0, len(whole), PIECE):
            piece = whole[start : start + PIECE]
            file.write(zlib.compress(piece, _level(piece), GZIP))


def _level(piece: memoryview) -> int:
    sample = piece[:SAMPLE]
    packs = len(zlib.compress(sample, zlib.Z_BEST_SPEED)) < WORTHWHILE * len(sample)
    return zlib.Z_DEFAULT_COMPRESSION if packs else zlib.Z_NO_COMPRESSION


def unpack(chunks: Iterable[bytes], packed: int, size: int) -> bytearray:
    """Return the plan of this size, given all chunks of its file.

    packed: the file's size. Raises ValueError if the file unpacks to another size, as soon as it is
    exceeded: a damaged or hostile file cannot exhaust memory.
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


def _parts(chunks: Iterable[bytes]) -> Iterator[bytes]:
    unpacker = None
    for chunk in chunks:
        while chunk:
            unpacker = unpacker or zlib.decompressobj(GZIP_OR_ZLIB)
            try:
                yield unpacker.decompress(chunk, PART)
            except zlib.error as error:
                raise ValueError(f"it is not packed ({error})") from error
            chunk = unpacker.unconsumed_tail or unpacker.unused_data
            if unpacker.eof:
                unpacker = None
    if unpacker:
        raise ValueError("it is cut short")
