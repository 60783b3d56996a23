"""Find how large the frames in AV1 and HEVC streams are, as their decoders will allocate them.

The boxes around a stream state a size as well, but decoders do not obey it.
"""

import struct
from collections.abc import Iterator
from typing import NamedTuple

from varedit_runtime.errors import PictureError

_MAX_UNITS = 1_000  # of a stream; a picture has one for each slice or group of tiles
_MAX_FRAMES = 4  # layers of an AV1 picture, from coarse to fine
# Decoders also take what ought to be a repeated header (7) for a frame's first.
_AV1_SEQUENCE, _AV1_FRAMES = 1, (3, 6, 7)
_HEVC_SPS, _HEVC_SLICES = 33, range(32)
_LONGEST_HEADER = 512  # bytes

_SAMPLES = {0: 1.0, 1: 1.5, 2: 2.0, 3: 3.0}  # of a pixel, by HEVC's number of a chroma format


class Frame(NamedTuple):
    """A frame. pixel: the bytes per pixel, of all frames that a decoder holds at a time."""

    width: int
    height: int
    pixel: float

    @property
    def memory(self) -> int:
        """Return the bytes of all samples."""
        return int(self.width * self.height * self.pixel)

    def resized(self, size: tuple[int, int]) -> "Frame":
        """Return a frame of the same samples per pixel and another (width, height)."""
        return Frame(*size, self.pixel)

    @classmethod
    def of(cls, width: int, height: int, samples: float, deep: bool) -> "Frame":
        """Return a frame with so many samples per pixel, deep ones of two bytes each."""
        return cls(width, height, samples * (2 if deep else 1))


class _Bits:
    """Reads a header bit by bit."""

    def __init__(self, data: bytes) -> None:
        header = data[:_LONGEST_HEADER]
        self._value, self._left = int.from_bytes(header, "big"), 8 * len(header)

    def take(self, count: int) -> int:
        """Return the next bits as a number."""
        self._left -= count
        if self._left < 0:
            raise PictureError("it is damaged: the header of its frames is cut short")
        return self._value >> self._left & (1 << count) - 1

    def exp_golomb(self) -> int:
        """Return the next number, which begins with as many zeros as its bits after the first."""
        zeros = 0
        while not self.take(1):
            zeros += 1
        return (1 << zeros) - 1 + self.take(zeros)


def av1_frame(data: bytes) -> Frame:
    """Return the largest frame that an AV1 stream can have, with the bytes of all its frames.

    Raises PictureError if it is damaged, or has more frames than a picture.
    """
    sizes, count = [], 0
    for kind, content in _open_bitstream_units(data):
        if kind == _AV1_SEQUENCE:
            sizes.append(_av1_sequence(_Bits(content)))
        count += kind in _AV1_FRAMES
    return _largest(sizes, count, _MAX_FRAMES)


def with_long_lengths(configuration: bytes, data: bytes) -> tuple[bytes, bytes]:
    """Return an HEVC configuration and stream with 4 bytes for the length of each unit.

    libheif reads 4, whatever the configuration says. configuration: the content of the box hvcC.
    Raises PictureError if one of them is damaged.
    """
    if len(configuration) < 23:
        raise PictureError("it is damaged: its HEVC configuration is cut short")
    units = _prefixed(data, 1 + (configuration[21] & 3))
    stream = b"".join(part for unit in units for part in (struct.pack(">I", len(unit)), unit))
    return configuration[:21] + bytes([configuration[21] | 3]) + configuration[22:], stream


def hevc_frame(configuration: bytes, data: bytes) -> Frame:
    """Return the largest frame that an HEVC stream can have.

    Takes what `with_long_lengths` returns. Raises PictureError if the stream is damaged, or has
    more frames than a picture.
    """
    units = [*_parameter_sets(configuration), *_prefixed(data, 4)]
    kinds = [unit[0] >> 1 & 63 for unit in units]
    sizes = [_hevc_sequence(u) for u, k in zip(units, kinds, strict=True) if k == _HEVC_SPS]
    # The first bit of a slice says whether a frame begins with it.
    count = sum(k in _HEVC_SLICES and u[2] >> 7 for u, k in zip(units, kinds, strict=True))
    return _largest(sizes, count, 1)


def _largest(frames: list[Frame], count: int, most: int) -> Frame:
    if not frames or not 0 < count <= most:
        raise PictureError("it is damaged: a coded picture has a header and a frame, not several")
    largest = max(frames, key=lambda frame: frame.memory)
    return largest._replace(pixel=largest.pixel * count)


def _open_bitstream_units(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield kind and content of the units of an AV1 stream."""
    position = 0
    for _ in range(_MAX_UNITS):
        if position >= len(data):
            return
        header = data[position]
        position += 1 + (header >> 2 & 1)
        size = len(data) - position
        if header & 2:
            size, shift = 0, 0
            for byte in data[position : position + 8]:
                position, size, shift = position + 1, size | (byte & 127) << shift, shift + 7
                if byte < 128:
                    break
        if header & 128 or not 0 <= size <= len(data) - position:
            break
        yield header >> 3 & 15, data[position : position + size]
        position += size
    raise PictureError("it is truncated or damaged: its AV1 stream is not whole")


def _av1_sequence(bits: _Bits) -> Frame:
    """Return the largest frame that an AV1 sequence header allows."""
    samples = 3.0 if bits.take(3) else 1.5  # the main profile has no more
    bits.take(1)
    reduced = bits.take(1)
    if reduced:
        bits.take(5)
    else:
        _skip_operating_points(bits)
    width_bits, height_bits = bits.take(4) + 1, bits.take(4) + 1
    if not reduced:  # a frame may have a size of its own, in as many bits
        return Frame.of(1 << width_bits, 1 << height_bits, samples, deep=True)
    width, height = bits.take(width_bits) + 1, bits.take(height_bits) + 1
    bits.take(6)  # tools of the codec
    return Frame.of(width, height, samples, deep=bool(bits.take(1)))


def _skip_operating_points(bits: _Bits) -> None:
    delay = 0
    if bits.take(1):  # timing
        bits.take(64)
        if bits.take(1):
            bits.exp_golomb()
        if bits.take(1):  # a model of the decoder
            delay = bits.take(5) + 1
            bits.take(42)
    has_display_delay = bits.take(1)
    for _ in range(bits.take(5) + 1):
        bits.take(12)
        if bits.take(5) > 7:
            bits.take(1)
        if delay and bits.take(1):
            bits.take(2 * delay + 1)
        if has_display_delay and bits.take(1):
            bits.take(4)


def _parameter_sets(configuration: bytes) -> Iterator[bytes]:
    """Yield the parameter sets in the content of a box hvcC."""
    position = 23
    for _ in range(configuration[22]):
        count = int.from_bytes(configuration[position + 1 : position + 3], "big")
        position += 3
        if count > _MAX_UNITS:
            raise PictureError(f"it has over {_MAX_UNITS} HEVC parameter sets: save it again")
        for _ in range(count):
            length = int.from_bytes(configuration[position : position + 2], "big")
            unit = configuration[position + 2 : position + 2 + length]
            if not 2 < length == len(unit):
                raise PictureError("it is damaged: its HEVC parameter sets are cut short")
            yield unit
            position += 2 + length


def _prefixed(data: bytes, prefix: int) -> Iterator[bytes]:
    """Yield the units of an HEVC stream, each of which follows its length."""
    position = 0
    for _ in range(_MAX_UNITS):
        if position >= len(data):
            return
        length = int.from_bytes(data[position : position + prefix], "big")
        position += prefix
        if not 2 < length <= len(data) - position:
            break
        yield data[position : position + length]
        position += length
    raise PictureError("it is truncated or damaged: its HEVC stream is not whole")


def _hevc_sequence(unit: bytes) -> Frame:
    """Return the frame that an HEVC sequence parameter set describes."""
    bits = _Bits(unit[2:_LONGEST_HEADER].replace(b"\0\0\3", b"\0\0"))
    bits.take(4)
    layers = bits.take(3)
    bits.take(1 + 88 + 8)  # profile and level
    present = [(bits.take(1), bits.take(1)) for _ in range(layers)]
    if layers:
        bits.take(2 * (8 - layers))
    for profile, level in present:
        bits.take(88 * profile + 8 * level)
    bits.exp_golomb()
    chroma = bits.exp_golomb()
    if chroma == 3:
        bits.take(1)
    width, height = bits.exp_golomb(), bits.exp_golomb()
    if bits.take(1):  # a part of the frame is shown
        for _ in range(4):
            bits.exp_golomb()
    deep = bits.exp_golomb() + bits.exp_golomb() > 0
    return Frame.of(width, height, _SAMPLES.get(chroma, 3.0), deep)
