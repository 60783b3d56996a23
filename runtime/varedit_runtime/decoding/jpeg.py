"""Check a JPEG's segments and scans; keep its picture and the metadata that are used."""

import re
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from varedit_runtime.decoding.exif import EXIF, only_orientation
from varedit_runtime.decoding.limits import Checked
from varedit_runtime.errors import PictureError

# A scan of a progressive JPEG goes over the whole picture, even if it is a few bytes long: 100
# scans of 88 megapixels take 6 s. libjpeg writes 10 scans, and optimisers up to about 20.
MAX_SCANS = 100
_MAX_SCANS_OF_LARGEST = 22
_MAX_SCANNED = 2 * 10**9  # pixels in all scans
MAX_SEGMENTS = 10_000  # a profile may take 255
_MAX_TABLES = 2**16  # bytes of quantisation tables, which Pillow parses; four of them take 520

SOI = b"\xff\xd8"
_SOI, _EOI, _SOS, _DQT, _EXIF, _COMMENT = 0xD8, 0xD9, 0xDA, 0xDB, 0xE1, 0xFE
_PROGRESSIVE = 0xC2
_SUPPORTED = {0xC0, 0xC1, _PROGRESSIVE}  # baseline and extended are the sequential processes
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # a marker of each coding process
_METADATA = {*range(0xE0, 0xF0), _COMMENT}
# The metadata that are used: marker, how the segment begins, how many of them.
_USED = [
    (0xE0, b"JFIF", 1),
    (_EXIF, EXIF, 1),
    (_EXIF, b"http://ns.adobe.com/xap/1.0/\0", 1),
    (0xE2, b"ICC_PROFILE\0", 255),
    (0xEE, b"Adobe", 1),
]
# What follows FF in a marker; in entropy-coded data 00 and the restarts, D0 to D7, follow it.
_MARKER = re.compile(rb"\xff([\x02-\xcf\xd8-\xfe])")


@dataclass(frozen=True)
class Segment:
    """A segment of a JPEG: its marker, where it starts, and where its content begins and ends."""

    marker: int
    start: int
    begin: int
    end: int


@dataclass(frozen=True)
class Stream:
    """One picture's JPEG stream.

    size: (width, height). scans: their number. coefficients: bytes of those that decoding keeps,
    all or none.
    """

    segments: list[Segment]
    size: tuple[int, int]
    scans: int
    coefficients: int


def read_jpeg(data: bytes) -> Checked:
    """Check a JPEG file, whose first picture is taken.

    Raises PictureError if it is damaged, coded in a rare way, or has too many scans or segments.
    """
    stream = check_stream(data, 0, len(data))
    check_scans(stream.scans, stream.size)
    first_scan = next(s for s in stream.segments if s.marker == _SOS)
    head = [s for s in stream.segments if s.start < first_scan.start]
    if sum(s.end - s.begin for s in head if s.marker == _DQT) > _MAX_TABLES:
        raise PictureError("it is damaged: it has too many quantisation tables")
    picture = memoryview(data)[first_scan.start :]
    return Checked(b"".join([SOI, *_kept(data, head), picture]), stream.size, stream.coefficients)


def check_scans(scans: int, size: tuple[int, int]) -> None:
    """Raise PictureError if a picture (width, height) has too many scans for its size."""
    by_size = _MAX_SCANNED // max(1, size[0] * size[1])
    allowed = max(_MAX_SCANS_OF_LARGEST, min(MAX_SCANS, by_size))
    if scans > allowed:
        raise PictureError(
            f"it has {scans} JPEG scans, of at most {allowed}: save it as a baseline JPEG"
        )


def check_stream(data: bytes, start: int, end: int) -> Stream:
    """Check one JPEG stream in a file's bytes.

    Raises PictureError if it is damaged, coded in a rare way, or has too many segments.
    """
    segments = []
    for segment in _segments(data, start, end):
        segments.append(segment)
        if len(segments) > MAX_SEGMENTS:
            raise PictureError(f"it has over {MAX_SEGMENTS} JPEG segments: save it again")
    scans = [s for s in segments if s.marker == _SOS]
    frames = [s for s in segments if s.marker in _FRAMES]
    if len(frames) != 1 or not scans:
        raise PictureError("it is damaged: a JPEG must have one frame and its scans")
    size, sampling = _frame(data, frames[0])
    in_first_scan = (scans[0].end - scans[0].begin - 4) // 2  # components
    whole = frames[0].marker == _PROGRESSIVE or in_first_scan < len(sampling)
    return Stream(segments, size, len(scans), _coefficients(size, sampling) if whole else 0)


def _segments(data: bytes, start: int, end: int) -> Iterator[Segment]:
    """Yield a stream's segments, up to its end or that of the data."""
    if data[start : start + 2] != SOI:
        raise PictureError("it is damaged: a JPEG stream does not begin as one")
    position = start + 2
    while match := _MARKER.search(data, position, end):
        marker = match[1][0]
        if marker == _EOI:
            return
        begin = match.end() + 2
        position = match.end() + int.from_bytes(data[match.end() : begin], "big")
        if marker == _SOI or not begin <= position <= end:
            raise PictureError("it is truncated or damaged: a JPEG segment is cut short")
        yield Segment(marker, match.start(), begin, position)


def _frame(data: bytes, frame: Segment) -> tuple[tuple[int, int], list[tuple[int, int]]]:
    """Return a frame's size, and its components' horizontal and vertical sampling factors."""
    if frame.marker not in _SUPPORTED:
        raise PictureError("its JPEG coding is a rare one: save it as a baseline JPEG")
    content = data[frame.begin : frame.end]
    factors = [divmod(factor, 16) for factor in content[7::3]]
    if not factors or not all(1 <= h <= 4 and 1 <= v <= 4 for h, v in factors):
        raise PictureError("it is damaged: a JPEG frame has no valid components")
    height, width = struct.unpack_from(">HH", content, 1)
    return (width, height), factors


def _coefficients(size: tuple[int, int], sampling: list[tuple[int, int]]) -> int:
    """Return the bytes of all coefficients: 128 for a block of 8 x 8 samples."""
    widest, highest = (max(factors) for factors in zip(*sampling, strict=True))
    units = -(-size[0] // (8 * widest)) * -(-size[1] // (8 * highest))
    return sum(128 * units * h * v for h, v in sampling)


def _kept(data: bytes, head: list[Segment]) -> Iterator[bytes]:
    """Yield the segments before the first scan, without metadata that are not used."""
    left: Counter[tuple[int, bytes | None]] = Counter()
    left.update({(marker, prefix): count for marker, prefix, count in _USED})
    for segment in head:
        used = (segment.marker, _prefix(data, segment))
        if segment.marker in _METADATA and left[used] <= 0:
            continue
        left[used] -= 1
        if used == (_EXIF, EXIF):
            exif = only_orientation(data[segment.begin : segment.end])
            yield struct.pack(">BBH", 0xFF, _EXIF, 2 + len(exif)) + exif
        else:
            yield data[segment.start : segment.end]


def _prefix(data: bytes, segment: Segment) -> bytes | None:
    """Return how a segment of used metadata begins."""
    for marker, prefix, _ in _USED:
        if segment.marker == marker and data.startswith(prefix, segment.begin, segment.end):
            return prefix
    return None
