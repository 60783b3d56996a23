"""Read the directory of a TIFF file; EXIF data have the same structure."""

import struct
from collections.abc import Container

from varedit_runtime.errors import PictureError

# Signature -> byte order; the formats of an offset, of a directory's length, and of one entry.
_LAYOUTS = {
    b"II*\0": ("<", "I", "H", "HHI4x"),
    b"MM\0*": (">", "I", "H", "HHI4x"),
    b"II+\0": ("<", "Q", "Q", "HHQ8x"),
}
_INTEGERS = {1: "B", 3: "H", 4: "I", 16: "Q"}
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 7: 1, 16: 8}  # bytes of a value, by type
_MAX_TAGS = 1000  # a picture has some tens


def beginning_at(data: bytes, start: int, end: bytes = b"") -> bytes:
    """Return a TIFF file whose first directory is the one at an offset. end: is added to it."""
    order, offset, *_ = _LAYOUTS[data[:4]]
    word = struct.calcsize(offset)
    place = struct.pack(order + offset, start)
    return b"".join([data[:word], place, memoryview(data)[2 * word :], end])


class Directory:
    """The first directory of a TIFF file. Of a repeated tag the first counts, as in libtiff.

    Everything raises PictureError where the file is cut short or damaged.
    """

    def __init__(self, data: bytes) -> None:
        """Find the tags; read no values."""
        if data[:4] not in _LAYOUTS:
            raise PictureError("it is no TIFF file")
        self._data = data
        self._order, self._offset, self._length, self._entry = _LAYOUTS[data[:4]]
        self._word = struct.calcsize(self._offset)  # an offset, and where it stands in the header
        start = self._numbers(self._offset, self._word)[0]
        count = self._numbers(self._length, start)[0]
        if count > _MAX_TAGS:
            raise PictureError(f"it has {count} tags; a TIFF file may have up to {_MAX_TAGS}")
        start += struct.calcsize(self._length)
        size = struct.calcsize(self._order + self._entry)
        self._places: dict[int, int] = {}
        for place in range(start, start + count * size, size):
            self._places.setdefault(self._numbers(self._entry, place)[0], place)

    def __contains__(self, tag: int) -> bool:
        """Return whether the file has a tag."""
        return tag in self._places

    def count(self, tag: int) -> int:
        """Return the number of a tag's values; 0 without the tag."""
        return self._numbers(self._entry, self._places[tag])[2] if tag in self else 0

    def integers(self, tag: int, default: tuple[int, ...] = ()) -> tuple[int, ...]:
        """Return a tag's integers."""
        if tag not in self:
            return default
        start, _ = self._value(tag)
        kind = self._numbers(self._entry, self._places[tag])[1]
        if kind not in _INTEGERS:
            raise PictureError(f"it is damaged: its TIFF tag {tag} has type {kind}")
        return self._numbers(f"{self.count(tag)}{_INTEGERS[kind]}", start)

    def one(self, tag: int, default: int) -> int:
        """Return a tag's first integer."""
        return self.integers(tag, (default,))[0]

    def only(self, tags: Container[int]) -> bytes:
        """Return the file with these tags alone, and without further pictures."""
        kept = sorted(tag for tag in self._places if tag in tags)
        for tag in kept:
            self._value(tag)
        size = struct.calcsize(self._order + self._entry)
        entries = [self._data[self._places[tag] : self._places[tag] + size] for tag in kept]
        padding = bytes(-len(self._data) % 8)
        length = struct.pack(self._order + self._length, len(kept))
        end = b"".join([padding, length, *entries, bytes(self._word)])
        return beginning_at(self._data, len(self._data) + len(padding), end)

    def _value(self, tag: int) -> tuple[int, int]:
        """Return where a tag's values begin and end."""
        place = self._places[tag]
        _, kind, count = self._numbers(self._entry, place)
        size = count * _SIZES.get(kind, 0)
        start = place + struct.calcsize(self._order + self._entry) - self._word
        if size > self._word:
            start = self._numbers(self._offset, start)[0]
        if not 0 < size <= len(self._data) - start:
            raise PictureError(f"it is damaged: its TIFF tag {tag} has no value")
        return start, start + size

    def _numbers(self, layout: str, place: int) -> tuple[int, ...]:
        try:
            return struct.unpack_from(self._order + layout, self._data, place)
        except (struct.error, OverflowError) as error:
            raise PictureError("it is damaged: its TIFF directory is cut short") from error
