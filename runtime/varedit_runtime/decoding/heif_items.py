"""Read the items of AVIF and HEIC files, as far as a picture needs them.

Both are ISO base media files: boxes in boxes. Pictures are items; each has a kind, data,
properties, and references to other items, such as from a grid to its tiles.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from varedit_runtime.errors import PictureError

_MAX_BOXES = 10_000  # beside each other
_MAX_ITEMS = 5_000
_MAX_PIECES = 10_000  # of all items' data, and properties of all items
_IN_FILE, _IN_BOX = 0, 1  # where an item's data are

References = dict[tuple[bytes, int], list[int]]  # by kind and the item that refers


@dataclass(frozen=True)
class Property:
    """A property of an item: the kind and content of its box, and whether readers must know it.

    place: its place in the file's list, which items may share.
    """

    place: int
    kind: bytes
    content: memoryview
    essential: bool


@dataclass
class Item:
    """An item. pieces: where its data are, each with offset and length. inside: in the box idat."""

    kind: bytes
    pieces: list[tuple[int, int]] = field(default_factory=list)
    inside: bool = False
    properties: list[Property] = field(default_factory=list)


class _Reader:
    """Reads numbers from the content of a box, most significant byte first."""

    def __init__(self, data: memoryview, *, versioned: bool = True) -> None:
        self.data, self.position = data, 0
        self.version, self.flags = 0, 0
        if versioned:
            self.version, self.flags = self.number(1), self.number(3)

    def number(self, size: int) -> int:
        """Return the number in the next bytes; 0 if there are none."""
        return int.from_bytes(self.take(size), "big")

    def take(self, size: int) -> bytes:
        """Return the next bytes."""
        self.position += size
        if self.position > len(self.data):
            raise PictureError("it is truncated or damaged: a box is cut short")
        return bytes(self.data[self.position - size : self.position])

    def rest(self) -> memoryview:
        return self.data[self.position :]


def boxes(data: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """Yield kind and content of boxes. Raises PictureError if one is cut short."""
    position = 0
    for _ in range(_MAX_BOXES):
        if position == len(data):
            return
        reader = _Reader(data[position : position + 16], versioned=False)
        size, kind = reader.number(4), reader.take(4)
        if size == 1:
            size = reader.number(8)
        elif size == 0:  # up to the end
            size = len(data) - position
        if not reader.position <= size <= len(data) - position:
            raise PictureError("it is truncated or damaged: a box is cut short")
        yield kind, data[position + reader.position : position + size]
        position += size
    raise PictureError(f"it has over {_MAX_BOXES} boxes: save it again")


class Items:
    """The items of a file. Raises PictureError if it is damaged or has too many."""

    def __init__(self, data: bytes) -> None:
        self._data, self._left = memoryview(data), len(data)
        meta = next((content for kind, content in boxes(self._data) if kind == b"meta"), None)
        if meta is None:
            raise PictureError("it has no picture: films and animations are not read")
        found: dict[bytes, memoryview] = {}
        for kind, content in boxes(_Reader(meta).rest()):
            found.setdefault(kind, content)
        missing = {b"pitm", b"iinf", b"iloc", b"iprp"} - found.keys()
        if missing:
            raise PictureError("it is truncated or damaged: its list of pictures is not whole")
        self._inside = found.get(b"idat", memoryview(b""))
        reader = _Reader(found[b"pitm"])
        self.primary = reader.number(4 if reader.version else 2)
        self._items = dict(_kinds(_Reader(found[b"iinf"])))
        self._locate(_Reader(found[b"iloc"]))
        self._describe(found[b"iprp"])
        self.references = _references(found.get(b"iref"))

    def __getitem__(self, number: int) -> Item:
        """Return an item."""
        if number not in self._items:
            raise PictureError("it is damaged: it refers to an item that it does not have")
        return self._items[number]

    def kinds(self) -> set[bytes]:
        """Return the kinds of all items."""
        return {item.kind for item in self._items.values()}

    def content(self, item: Item) -> bytes:
        """Return an item's data. All that is returned together cannot be larger than the file."""
        self._left -= sum(length for _, length in item.pieces)
        if self._left < 0:
            raise PictureError("it is truncated or damaged: its tiles overlap, or are not whole")
        data = self._inside if item.inside else self._data
        parts = [data[start : start + length] for start, length in item.pieces]
        if not parts or any(
            len(p) != length for p, (_, length) in zip(parts, item.pieces, strict=True)
        ):
            raise PictureError("it is truncated or damaged: a picture's data are not whole")
        return b"".join(parts)

    def _locate(self, reader: _Reader) -> None:
        """Read where items are."""
        sizes = reader.number(2)
        offset, length, base, index = (sizes >> shift & 15 for shift in (12, 8, 4, 0))
        left = _MAX_PIECES
        for _ in range(reader.number(4 if reader.version == 2 else 2)):
            number = reader.number(4 if reader.version == 2 else 2)
            method = reader.number(2) & 15 if reader.version else _IN_FILE
            elsewhere, start, count = reader.number(2), reader.number(base), reader.number(2)
            left -= 1 + count
            if left < 0:
                raise PictureError(f"its items have over {_MAX_PIECES} pieces: save it again")
            pieces = []
            for _ in range(count):
                reader.number(index if reader.version else 0)
                pieces.append((start + reader.number(offset), reader.number(length)))
            usable = method in (_IN_FILE, _IN_BOX) and not elsewhere
            if number in self._items and usable:
                self._items[number].pieces, self._items[number].inside = pieces, method == _IN_BOX

    def _describe(self, content: memoryview) -> None:
        """Read items' properties."""
        parts = list(boxes(content))
        properties = [p for kind, part in parts if kind == b"ipco" for p in boxes(part)]
        left = _MAX_PIECES
        for reader in (_Reader(part) for kind, part in parts if kind == b"ipma"):
            size = 2 if reader.flags & 1 else 1
            for _ in range(reader.number(4)):
                number, count = reader.number(4 if reader.version else 2), reader.number(1)
                left -= 1 + count
                if left < 0:
                    raise PictureError(f"its items have over {_MAX_PIECES} properties")
                for _ in range(count):
                    essential, place = divmod(reader.number(size), 1 << 8 * size - 1)
                    if 0 < place <= len(properties) and number in self._items:
                        kind, value = properties[place - 1]
                        own = Property(place, kind, value, bool(essential))
                        self._items[number].properties.append(own)


def _kinds(reader: _Reader) -> Iterator[tuple[int, Item]]:
    """Yield the numbers of a file's items, and items of which only the kind is known."""
    count = reader.number(4 if reader.version else 2)
    if count > _MAX_ITEMS:
        raise PictureError(f"it has {count} items, of at most {_MAX_ITEMS}: save it again")
    for kind, content in boxes(reader.rest()):
        entry = _Reader(content)
        if kind == b"infe" and entry.version >= 2:
            number = entry.number(2 if entry.version == 2 else 4)
            entry.take(2)
            yield number, Item(entry.take(4))


def _references(content: memoryview | None) -> References:
    """Return which items refer to which; a kind that repeats for an item counts once."""
    found: References = {}
    if content is None:
        return found
    reader = _Reader(content)
    size, left = 4 if reader.version else 2, _MAX_PIECES
    for kind, part in boxes(reader.rest()):
        entry = _Reader(part, versioned=False)
        item, count = entry.number(size), entry.number(2)
        left -= 1 + count
        if left < 0:
            raise PictureError(f"its items have over {_MAX_PIECES} references: save it again")
        found.setdefault((kind, item), [entry.number(size) for _ in range(count)])
    return found
