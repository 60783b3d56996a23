"""Check how a TIFF file stores its first picture; keep the tags that say so.

Neither Pillow nor libtiff then sees private tags, further pictures or nested metadata.
"""

from varedit_runtime.decoding.exif import ORIENTATION
from varedit_runtime.decoding.jpeg import MAX_SEGMENTS, check_scans, check_stream
from varedit_runtime.decoding.limits import Checked, picture_memory
from varedit_runtime.decoding.tiff_directory import Directory
from varedit_runtime.errors import PictureError

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _SAMPLES = 256, 257, 258, 259, 277
_ROWS, _TILE_WIDTH, _TILE_HEIGHT = 278, 322, 323
_OFFSETS, _LENGTHS = (273, 324), (279, 325)  # of strips, of tiles
_COLOUR_MAP, _JPEG_TABLES, _XMP, _PROFILE = 320, 347, 700, 34675
# Also photometric interpretation, fill order, planes, CCITT options, predictor, ink set, and the
# position of chroma samples.
_SINGLE = {_WIDTH, _HEIGHT, _COMPRESSION, _SAMPLES, _ROWS, _TILE_WIDTH, _TILE_HEIGHT, ORIENTATION}
_SINGLE |= {262, 266, 284, 292, 293, 317, 332, 531}
# Also extra samples, sample formats, YCbCr coefficients and subsampling, black and white.
_FEW = {_BITS, 338, 339, 529, 530, 532}
_LONG = {*_OFFSETS, *_LENGTHS, _COLOUR_MAP}
_BYTES = {_JPEG_TABLES, _XMP, _PROFILE}

_RAW, _JPEG = 1, 7
# Also CCITT, LZW, deflate, PackBits, and deflate's older number.
_COMPRESSIONS = {_RAW, 2, 3, 4, 5, _JPEG, 8, 32773, 32946}
_MAX_SAMPLES = 6  # of a pixel, as in Pillow, which logs an error from there on
_MAX_VALUES = 64  # of a tag that has one or two for each sample
_MAX_PIECES = 100_000  # strips or tiles; Pillow takes some time and memory for each
_PIECE_MEMORY = 1000  # bytes


def read_tiff(data: bytes) -> Checked:
    """Check a TIFF file.

    Raises PictureError if it is damaged, is compressed in a rare way, or has too many strips.
    """
    directory = Directory(data)
    for tag in _SINGLE | _FEW:
        if directory.count(tag) > (_MAX_VALUES if tag in _FEW else 1):
            raise PictureError(f"it is damaged: its TIFF tag {tag} has too many values")
    samples, compression = directory.one(_SAMPLES, 1), directory.one(_COMPRESSION, 1)
    if samples > _MAX_SAMPLES:
        raise PictureError(f"it has {samples} samples per pixel, of at most {_MAX_SAMPLES}")
    if compression not in _COMPRESSIONS:
        raise PictureError(
            f"its TIFF compression {compression} is not supported: use LZW, deflate or none"
        )
    size = directory.one(_WIDTH, 0), directory.one(_HEIGHT, 0)
    for strips, tiles in (_OFFSETS, _LENGTHS):
        if strips in directory and tiles in directory:  # libtiff takes either
            raise PictureError("it is damaged: a TIFF has strips or tiles, not both")
    pieces = max(directory.count(tag) for tag in (*_OFFSETS, *_LENGTHS))
    if pieces > _MAX_PIECES:
        raise PictureError(f"it has {pieces} strips or tiles; a TIFF may have {_MAX_PIECES}")
    tile = _tile(directory, size)
    decoder = pieces * _PIECE_MEMORY
    if compression != _RAW:
        bits = max(directory.integers(_BITS, (1,))) * samples
        decoder += tile[0] * tile[1] * max(4, -(-bits // 8))
    if directory.one(ORIENTATION, 1) != 1:  # Pillow turns it
        decoder += picture_memory(size)
    if compression == _JPEG:
        decoder += _check_jpegs(data, directory, size)
    return Checked(directory.only(_SINGLE | _FEW | _LONG | _BYTES), size, decoder, tile)


def _tile(directory: Directory, size: tuple[int, int]) -> tuple[int, int]:
    """Return the (width, height) of a tile, which may exceed the picture, or of a strip."""
    width, height = size
    if _TILE_WIDTH in directory or _TILE_HEIGHT in directory:
        return directory.one(_TILE_WIDTH, 0), directory.one(_TILE_HEIGHT, 0)
    return width, min(height, directory.one(_ROWS, height))


def _check_jpegs(data: bytes, directory: Directory, size: tuple[int, int]) -> int:
    """Check the JPEG streams of strips or tiles; return the bytes of the largest's coefficients."""
    offsets, lengths = (
        next((directory.integers(tag) for tag in tags if tag in directory), ())
        for tags in (_OFFSETS, _LENGTHS)
    )
    streams = set(zip(offsets, lengths, strict=False))
    if len(offsets) != len(lengths) or sum(length for _, length in streams) > len(data):
        raise PictureError("it is damaged: its strips or tiles overlap")
    left, largest = MAX_SEGMENTS + 16 * len(streams), 0
    for offset, length in streams:
        stream = check_stream(data, offset, min(offset + length, len(data)))
        check_scans(stream.scans, size)
        left -= len(stream.segments)
        if left < 0:
            raise PictureError("it has too many JPEG segments: save it again")
        largest = max(largest, stream.coefficients)
    return largest
