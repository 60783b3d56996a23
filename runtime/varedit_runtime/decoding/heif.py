"""Check AVIF and HEIC files; write their main picture anew, with nothing else.

Decoders then see no other items, frames of animations, thumbnails, or kinds of boxes.
"""

import math
import struct
from dataclasses import dataclass, field, replace

from varedit_runtime.decoding.coded_frame import Frame, av1_frame, hevc_frame, with_long_lengths
from varedit_runtime.decoding.exif import EXIF, only_orientation
from varedit_runtime.decoding.heif_items import Item, Items, Property
from varedit_runtime.decoding.limits import Checked
from varedit_runtime.errors import PictureError

_MAX_TILES = 1000  # as in libheif
_AV1, _HEVC, _GRID = b"av01", b"hvc1", b"grid"
_CONFIGURATION = {_AV1: b"av1C", _HEVC: b"hvcC"}
_SIZE, _AUXILIARY = b"ispe", b"auxC"
_OF_TILES = (_SIZE, b"pixi", b"colr", *_CONFIGURATION.values())
_TURNS = (b"irot", b"imir", b"clap")
_KNOWN = (*_OF_TILES, *_TURNS, _AUXILIARY)
_ALPHA = (b"urn:mpeg:mpegB:cicp:systems:auxiliary:alpha\0", b"urn:mpeg:hevc:2015:auxid:1\0")

Size = tuple[int, int]


def read_avif(data: bytes) -> Checked:
    """Check an AVIF file; keep its main picture, which of an animation is the first.

    Raises PictureError if it is damaged, of a rare kind, or has too many tiles.
    """
    return _read(data, _AV1, b"avif")


def read_heif(data: bytes) -> Checked:
    """Check a HEIC file, as `read_avif` does an AVIF file."""
    return _read(data, _HEVC, b"heic")


def _read(data: bytes, codec: bytes, brand: bytes) -> Checked:
    items = Items(data)
    picture = _Picture(items, codec)
    main, shown = picture.add(items.primary, (*_OF_TILES, *_TURNS))
    alpha = _alpha(items)
    if alpha is not None:
        before = picture.frames
        added, own = picture.add(alpha, (*_OF_TILES, *_TURNS, _AUXILIARY))
        # Decoders scale alpha to the size of the picture.
        picture.frames = max(picture.frames, before + own.resized(shown[:2]).memory)
        picture.refer(b"auxl", added, [main])
        if alpha in items.references.get((b"prem", items.primary), []):
            picture.refer(b"prem", main, [added])
    if b"Exif" in items.kinds():  # `PictureFile.shows` compares whether a picture has any
        exif = picture.write(b"Exif", bytes(4) + only_orientation(b"").removeprefix(EXIF), [])
        picture.refer(b"cdsc", exif, [main])
    # Frames, and a copy of them that is joined, turned or converted; then interleaved colours.
    colours = (3 if alpha is None else 4) * shown.width * shown.height
    decoder = 2 * picture.frames + colours
    return Checked(picture.file(brand, main), shown[:2], decoder, picture.largest)


def _alpha(items: Items) -> int | None:
    """Return the item that is the main picture's alpha."""
    for (kind, number), targets in items.references.items():
        if kind == b"auxl" and items.primary in targets:
            for own in items[number].properties:
                if own.kind == _AUXILIARY and bytes(own.content[4:64]).startswith(_ALPHA):
                    return number
    return None


@dataclass
class _Picture:
    """The file that decoders are to see: items of a checked file, numbered anew from 1.

    frames: bytes that all of them take, each as large as it is coded or as is stated, whichever is
    more. largest: (width, height) of the one with the most pixels.
    """

    items: Items
    codec: bytes
    frames: int = 0
    largest: Size = (1, 1)
    contents: list[bytes] = field(default_factory=list)
    _kinds: list[bytes] = field(default_factory=list)
    _properties: list[list[Property]] = field(default_factory=list)
    _references: list[bytes] = field(default_factory=list)

    def add(self, number: int, kept: tuple[bytes, ...]) -> tuple[int, Frame]:
        """Add a picture and its tiles; return its new number, and a frame of its stated size."""
        item = self.items[number]
        if item.kind != _GRID:
            return self._add_coded(item, kept)
        content = self.items.content(item)
        wide = struct.calcsize(">4B2I") == len(content) and content[1] & 1
        try:
            _, _, rows, columns, width, height = struct.unpack(
                ">4B2I" if wide else ">4B2H", content
            )
        except struct.error as error:
            raise PictureError("it is damaged: its grid of tiles is not whole") from error
        tiles = self.items.references.get((b"dimg", number), [])
        count = (rows + 1) * (columns + 1)
        if count > _MAX_TILES:
            raise PictureError(f"it has {count} tiles, of at most {_MAX_TILES}: save it again")
        if len(tiles) != count:
            raise PictureError(f"it is damaged: its grid has {len(tiles)} of {count} tiles")
        before = self.frames
        own = [self._add_coded(self.items[tile], _OF_TILES) for tile in tiles]
        joined = Frame(width, height, max(frame.pixel for _, frame in own))
        self.frames = max(self.frames, before + joined.memory)
        added = self.write(_GRID, content, _chosen(item, kept))
        self.refer(b"dimg", added, [number for number, _ in own])
        return added, joined

    def _add_coded(self, item: Item, kept: tuple[bytes, ...]) -> tuple[int, Frame]:
        if item.kind != self.codec:
            raise PictureError("its picture is of a rare kind: save it as PNG or JPEG")
        content, properties = self.items.content(item), _chosen(item, kept)
        by_kind = {own.kind: own for own in properties if own.kind != b"colr"}
        configuration, size = by_kind.get(_CONFIGURATION[item.kind]), by_kind.get(_SIZE)
        if configuration is None or size is None or len(size.content) != 12:
            raise PictureError("it is damaged: it does not say how its picture is coded")
        if item.kind == _AV1:
            frame = av1_frame(content)
        else:
            settings, content = with_long_lengths(bytes(configuration.content), content)
            frame = hevc_frame(settings, content)
            changed = replace(configuration, content=memoryview(settings))
            properties = [changed if own is configuration else own for own in properties]
        # libavif scales a frame to the size that is stated.
        shown = frame.resized(struct.unpack_from(">2I", size.content, 4))
        self.frames += max(frame.memory, shown.memory)
        self.largest = max(self.largest, frame[:2], shown[:2], key=math.prod)
        return self.write(item.kind, content, properties), shown

    def write(self, kind: bytes, content: bytes, properties: list[Property]) -> int:
        """Add an item; return its number."""
        self._kinds.append(kind)
        self.contents.append(content)
        self._properties.append(properties)
        return len(self._kinds)

    def refer(self, kind: bytes, number: int, targets: list[int]) -> None:
        """Let an item refer to others."""
        numbers = struct.pack(f">HH{len(targets)}H", number, len(targets), *targets)
        self._references.append(_box(kind, numbers))

    def file(self, brand: bytes, main: int) -> bytes:
        """Return the file, of which one item is the picture to show."""
        begin = _box(b"ftyp", brand, bytes(4), brand, b"mif1miaf")
        data = [struct.pack(">I4sQ", 1, b"mdat", 16 + sum(map(len, self.contents))), *self.contents]
        handler = _box(b"hdlr", bytes(8), b"pict", bytes(13))
        parts = [handler, _box(b"pitm", struct.pack(">IH", 0, main)), self._places(len(begin) + 16)]
        parts += [self._list(), self._described()]
        if self._references:
            parts.append(_box(b"iref", bytes(4), *self._references))
        return b"".join([begin, *data, _box(b"meta", bytes(4), *parts)])

    def _places(self, start: int) -> bytes:
        """Return the box that says where items are, the first of them at start."""
        entries = []
        for number, content in enumerate(self.contents, 1):
            entries.append(struct.pack(">HHHQQ", number, 0, 1, start, len(content)))
            start += len(content)
        return _box(b"iloc", bytes(4), struct.pack(">HH", 0x8800, len(entries)), *entries)

    def _list(self) -> bytes:
        """Return the box that says what kinds of items there are."""
        entries = [
            _box(b"infe", struct.pack(">IHH4sB", 2 << 24, number, 0, kind, 0))
            for number, kind in enumerate(self._kinds, 1)
        ]
        return _box(b"iinf", struct.pack(">IH", 0, len(entries)), *entries)

    def _described(self) -> bytes:
        """Return the box with items' properties, each of which is there once."""
        every = {own.place: own for properties in self._properties for own in properties}
        numbers = {place: number for number, place in enumerate(every, 1)}
        entries = []
        for number, properties in enumerate(self._properties, 1):
            used = [own.essential << 15 | numbers[own.place] for own in properties]
            entries.append(struct.pack(f">HB{len(used)}H", number, len(used), *used))
        stored = _box(b"ipco", *(_box(own.kind, own.content) for own in every.values()))
        wide = 1  # numbers of properties have 15 bits
        return _box(
            b"iprp", stored, _box(b"ipma", struct.pack(">II", wide, len(entries)), *entries)
        )


def _chosen(item: Item, kept: tuple[bytes, ...]) -> list[Property]:
    """Return an item's properties of these kinds, the first of each; colour comes in two kinds."""
    found: dict[bytes, Property] = {}
    for own in item.properties:
        if own.essential and own.kind not in _KNOWN:
            raise PictureError("its picture is of a rare kind: save it as PNG or JPEG")
        if own.kind in kept:
            found.setdefault(own.kind + bytes(own.content[:4] if own.kind == b"colr" else b""), own)
    return list(found.values())


def _box(kind: bytes, *parts: bytes | memoryview) -> bytes:
    return b"".join([struct.pack(">I4s", 8 + sum(map(len, parts)), kind), *parts])
