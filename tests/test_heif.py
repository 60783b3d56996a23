"""AVIF and HEIC files: what is read of them, what decoders see, and what is refused."""

import contextlib
import io
import struct
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import numpy as np
import pytest
from picture_files import check_damaged, encoded, swapped_profile
from PIL import Image, ImageOps

from varedit_runtime.decoding.coded_frame import Frame, av1_frame, hevc_frame
from varedit_runtime.decoding.heif import read_avif, read_heif
from varedit_runtime.decoding.heif_items import Items, boxes
from varedit_runtime.decoding.to_rgb import on_white
from varedit_runtime.errors import PictureError
from varedit_runtime.pictures import open_picture

pillow_heif: Any = None
with contextlib.suppress(ImportError):
    import pillow_heif

needs_heif = pytest.mark.skipif(pillow_heif is None, reason="pillow-heif is not installed")
FORMATS = ["AVIF", pytest.param("HEIC", marks=needs_heif)]
READERS = {"AVIF": read_avif, "HEIC": read_heif}


def smooth(width: int = 90, height: int = 60, mode: str = "RGBA") -> Image.Image:
    samples = np.random.default_rng(0).integers(0, 256, (6, 9, 4), dtype=np.uint8)
    image = Image.fromarray(samples).resize((width, height), Image.Resampling.BICUBIC)
    return image.convert(mode)


def heic(image: Image.Image, **options: Any) -> bytes:
    """Return a HEIC file, without registering its writer with Pillow."""
    file = io.BytesIO()
    pillow_heif.from_pillow(image).save(file, **options)
    return file.getvalue()


def written(image: Image.Image, written_as: str, **options: Any) -> bytes:
    return encoded(image, "AVIF", **options) if written_as == "AVIF" else heic(image, **options)


def decoded(file: bytes) -> Image.Image:
    """Return what a library makes of a whole file."""
    image = Image.open(io.BytesIO(file)) if b"avif" in file[:40] else None
    image = image or pillow_heif.open_heif(file).to_pillow()
    return ImageOps.exif_transpose(image)


# Files of any structure


def box(kind: bytes, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return struct.pack(">I4s", 8 + len(body), kind) + body


Properties = list[tuple[bytes, bytes, bool]]  # kind, content, whether it is essential


def built(
    items: list[tuple[bytes, bytes, Properties]],
    references: tuple[tuple[bytes, int, list[int]], ...] = (),
    brand: bytes = b"avif",
    pieces: dict[int, list[tuple[int, int]]] | None = None,
    more: bytes = b"",
) -> bytes:
    """Return a file of items, numbered from 1, the first of which is shown.

    references: kind, from, to. pieces: where an item's data are in place of where they are. more:
    boxes to add to the list.
    """
    start = box(b"ftyp", brand, bytes(4), brand)
    data, places = b"", {}
    for number, (_, content, _) in enumerate(items, 1):
        places[number] = [(len(start) + 8 + len(data), len(content))]
        data += content
    places |= pieces or {}
    stored = [own for *_, properties in items for own in properties]
    named, first = b"", 1
    for number, (*_, properties) in enumerate(items, 1):
        used = [own[2] << 7 | first + place for place, own in enumerate(properties)]
        named += struct.pack(">HB", number, len(used)) + bytes(used)
        first += len(used)
    located = b"".join(
        struct.pack(">HHH", number, 0, len(own)) + b"".join(struct.pack(">II", *p) for p in own)
        for number, own in places.items()
    )
    listed = [
        box(b"infe", struct.pack(">IHH4sx", 2 << 24, number, 0, kind))
        for number, (kind, *_) in enumerate(items, 1)
    ]
    parts = [
        box(b"hdlr", bytes(8), b"pict", bytes(13)),
        box(b"pitm", struct.pack(">IH", 0, 1)),
        box(b"iinf", struct.pack(">IH", 0, len(items)), *listed),
        box(b"iloc", bytes(4), struct.pack(">HH", 0x4400, len(places)), located),
        box(
            b"iprp",
            box(b"ipco", *(box(kind, content) for kind, content, _ in stored)),
            box(b"ipma", struct.pack(">II", 0, len(items)), named),
        ),
        box(
            b"iref",
            bytes(4),
            *(
                box(kind, struct.pack(f">HH{len(to)}H", number, len(to), *to))
                for kind, number, to in references
            ),
        ),
    ]
    return start + box(b"mdat", data) + box(b"meta", bytes(4), *parts, more)


def parts(file: bytes) -> tuple[bytes, bytes, Properties]:
    """Return the main picture of a file as an item: its kind, content and properties."""
    items = Items(file)
    item = items[items.primary]
    properties = [(p.kind, bytes(p.content), p.essential) for p in item.properties]
    return item.kind, items.content(item), properties


def avif_tile(colour: str) -> tuple[bytes, bytes, Properties]:
    return parts(encoded(Image.new("RGB", (64, 64), colour), "AVIF", subsampling="4:4:4"))


def size_box(width: int, height: int) -> tuple[bytes, bytes, bool]:
    return b"ispe", struct.pack(">III", 0, width, height), False


def grid(
    rows: int, columns: int, size: tuple[int, int], wide: bool = False
) -> tuple[bytes, bytes, Properties]:
    layout = ">4B2I" if wide else ">4B2H"
    return b"grid", struct.pack(layout, 0, wide, rows - 1, columns - 1, *size), [size_box(*size)]


# What is read


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
@pytest.mark.parametrize("written_as", FORMATS)
def test_pictures_are_what_libraries_make_of_the_whole_file(written_as: str, mode: str) -> None:
    file = written(smooth(mode=mode), written_as, quality=80)
    image = open_picture(file)
    assert image.mode == ("RGBA" if mode == "RGBA" else "RGB")
    assert image.tobytes() == decoded(file).convert(image.mode).tobytes()
    difference = np.asarray(on_white(image), int) - np.asarray(
        on_white(open_picture(smooth(mode=mode)))
    )
    assert np.abs(difference).mean() < 10


@needs_heif
@pytest.mark.parametrize("options", [{"tile_size": 64}, {"chroma": 444}, {"chroma": 422}])
def test_tiles_and_chroma_of_heic(options: dict[str, Any]) -> None:
    file = heic(smooth(200, 130, "RGB"), **options)
    assert open_picture(file).tobytes() == decoded(file).tobytes()


def lengths_of(size: int, units: list[bytes]) -> bytes:
    """Return an HEVC stream of units, each after its length in so many bytes."""
    return b"".join(len(unit).to_bytes(size, "big") + unit for unit in units)


def with_lengths_of(size: int, properties: Properties) -> Properties:
    """Return an item's properties, of which hvcC says that lengths have so many bytes."""
    return [
        (kind, value[:21] + bytes([value[21] & 0xFC | size - 1]) + value[22:], essential)
        if kind == b"hvcC"
        else (kind, value, essential)
        for kind, value, essential in properties
    ]


@needs_heif
@pytest.mark.parametrize("size", [2, 3])
def test_heic_with_short_lengths_of_units(size: int) -> None:
    file = heic(smooth(64, 64, "RGB"))
    kind, content, properties = parts(file)
    short = lengths_of(size, [content[4:]])
    assert lengths_of(4, [content[4:]]) == content
    opened = open_picture(built([(kind, short, with_lengths_of(size, properties))], brand=b"heic"))
    assert opened.tobytes() == open_picture(file).tobytes()


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_decoders_see_the_units_that_were_checked(size: int) -> None:
    """Whatever their lengths: libheif reads 4 bytes of each, and so could find other units."""
    units = [b"\x4e\x01\1\2", b"\x26\x01\x80\0", b"\x26\x01\0\0"]
    kind, content, properties = hevc_item(lengths_of(size, units), 64, 64)
    file = built([(kind, content, with_lengths_of(size, properties))], brand=b"heic")
    seen = parts(read_heif(file).data)
    assert seen[1] == lengths_of(4, units)
    assert {kind: value for kind, value, _ in seen[2]}[b"hvcC"] == configuration(64, 64)


@needs_heif
def test_more_than_8_bits_are_converted() -> None:
    file, samples = io.BytesIO(), np.asarray(smooth(mode="RGB")).astype(np.uint16) * 257
    pillow_heif.encode("RGB;16", (90, 60), samples.tobytes(), file, quality=90)
    difference = np.asarray(open_picture(file.getvalue()), int) - np.asarray(smooth(mode="RGB"))
    assert np.abs(difference).mean() < 10


# The properties that turn a picture by an EXIF orientation: first quarters of a turn to the left.
TURNS: dict[int, Properties] = {
    1: [],
    2: [(b"imir", b"\1", True)],
    3: [(b"irot", b"\2", True)],
    4: [(b"imir", b"\0", True)],
    5: [(b"irot", b"\1", True), (b"imir", b"\0", True)],
    6: [(b"irot", b"\3", True)],
    7: [(b"irot", b"\3", True), (b"imir", b"\0", True)],
    8: [(b"irot", b"\1", True)],
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("written_as", FORMATS)
def test_pictures_are_turned_upright_once(written_as: str, orientation: int) -> None:
    """By their properties, as the formats ask for, whatever EXIF data say."""
    lying = smooth(64, 96, "RGB")
    kind, content, properties = parts(written(lying, written_as, quality=95))
    brand = b"avif" if written_as == "AVIF" else b"heic"
    opened = open_picture(built([(kind, content, properties + TURNS[orientation])], brand=brand))
    lying.getexif()[274] = orientation
    expected = ImageOps.exif_transpose(lying)
    assert opened.size == expected.size and not opened.getexif()
    assert np.abs(np.asarray(opened, int) - np.asarray(expected)).mean() < 10


@pytest.mark.parametrize("written_as", FORMATS)
def test_an_embedded_profile_is_applied(written_as: str) -> None:
    image = Image.new("RGB", (64, 64), (255, 0, 0))
    image.info["icc_profile"] = swapped_profile()
    opened = open_picture(written(image, written_as, quality=95))
    assert np.allclose(np.asarray(opened), (0, 255, 0), atol=8) and not opened.info


def test_the_first_picture_of_an_animation_is_taken() -> None:
    first, second = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue")
    file = encoded(first, "AVIF", save_all=True, append_images=[second])
    assert file[8:12] == b"avis"
    assert np.allclose(np.asarray(open_picture(file)), (255, 0, 0), atol=8)
    film = b"".join(
        box(kind, content.tobytes()) for kind, content in boxes(memoryview(file)) if kind != b"meta"
    )
    with pytest.raises(PictureError, match="films and animations are not read"):
        open_picture(film)


@pytest.mark.parametrize("wide", [False, True])
def test_tiles_of_avif(wide: bool) -> None:
    tiles = [avif_tile(colour) for colour in ("red", "lime", "blue", "white")]
    file = built([grid(2, 2, (100, 90), wide), *tiles], ((b"dimg", 1, [2, 3, 4, 5]),))
    image = np.asarray(open_picture(file))
    assert image.shape == (90, 100, 3)
    corners = [image[y, x] for y, x in ((0, 0), (0, 99), (89, 0), (89, 99))]
    assert np.allclose(corners, [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255,) * 3], atol=8)


def test_premultiplied_alpha() -> None:
    file = encoded(Image.new("RGBA", (64, 64), (128, 64, 0, 128)), "AVIF", quality=100)
    items = Items(file)
    (alpha,) = (number for kind, number in items.references if kind == b"auxl")
    alpha_item = items[alpha]
    properties = [(p.kind, bytes(p.content), p.essential) for p in alpha_item.properties]
    two = [parts(file), (alpha_item.kind, items.content(alpha_item), properties)]
    references = (b"auxl", 2, [1]), (b"prem", 1, [2])
    image = open_picture(built(two, references))
    assert np.allclose(np.asarray(image)[5, 5], (255, 128, 0, 128), atol=6)
    image = open_picture(built(two, references[:1]))
    assert np.allclose(np.asarray(image)[5, 5], (128, 64, 0, 128), atol=6)


@pytest.mark.parametrize("written_as", FORMATS)
def test_decoders_see_the_main_picture_alone(written_as: str) -> None:
    own = parts(written(smooth(mode="RGB"), written_as))
    strange = (b"unci", b"strange", [(b"cmpd", b"strange", True)])
    thumbnail = parts(written(smooth(16, 16, "RGB"), written_as))
    items, references = [own, strange, thumbnail], ((b"thmb", 3, [1]), (b"auxl", 2, [3]))
    brand = b"avif" if written_as == "AVIF" else b"heic"
    more = box(b"grpl", box(b"altr", bytes(8))) + box(b"free", bytes(100))
    file = built(items, references, brand, more=more)
    checked = READERS[written_as](file)
    assert len(checked.data) < len(own[1]) + 1000
    for unwanted in (b"unci", b"strange", b"thmb", b"grpl", thumbnail[1]):
        assert unwanted not in checked.data
    assert open_picture(file).tobytes() == open_picture(built([own], brand=brand)).tobytes()


@pytest.mark.parametrize("written_as", FORMATS)
def test_a_pillow_image_stays_as_it_is(written_as: str) -> None:
    exif = Image.Exif()
    exif[271] = "camera"
    file = written(smooth(), written_as, **({"exif": exif} if written_as == "AVIF" else {}))
    opener: Any = Image.open if written_as == "AVIF" else pillow_heif.HeifImageFile
    image = opener(io.BytesIO(file))
    before = [image.mode, image.size, dict(image.info), list(image.tile)]
    assert open_picture(image).tobytes() == open_picture(file).tobytes()
    assert image.fp is not None and [image.mode, image.size, image.info, image.tile] == before


@needs_heif
def test_the_current_picture_of_several_is_taken() -> None:
    file = io.BytesIO()
    pictures = pillow_heif.from_pillow(Image.new("RGB", (64, 64), "red"))
    pictures.add_from_pillow(Image.new("RGB", (64, 64), "blue"))
    pictures.save(file, primary_index=1)
    assert np.allclose(np.asarray(open_picture(file)), (0, 0, 255), atol=8)
    image = pillow_heif.HeifImageFile(file)
    assert np.allclose(np.asarray(open_picture(image)), (0, 0, 255), atol=8)
    image.seek(0)
    assert np.allclose(np.asarray(open_picture(image)), (255, 0, 0), atol=8)


@needs_heif
def test_pillow_does_not_learn_to_read_heic() -> None:
    open_picture(heic(smooth()))
    assert "HEIF" not in Image.OPEN and ".heic" not in Image.registered_extensions()


def test_without_pillow_heif_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    item = b"hvc1", hevc_stream(), [(b"hvcC", configuration(64, 64), True), size_box(64, 64)]
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(PictureError, match=r'pip install "varedit-export\[heif\]"'):
        open_picture(built([item], brand=b"heic"))


# What is refused


def bits(*fields: tuple[int, int]) -> bytes:
    """Return numbers, each in so many bits."""
    text = "".join(f"{value:0{count}b}" for value, count in fields)
    return int(text.ljust(-len(text) % 8 + len(text), "0"), 2).to_bytes(-(-len(text) // 8), "big")


def golomb(value: int) -> tuple[int, int]:
    return value + 1, 2 * (value + 1).bit_length() - 1


def av1_stream(width: int, height: int, frames: int = 1, **header: int) -> bytes:
    """Return an AV1 stream of frames without content."""
    reduced = header.get("reduced", 1)
    fields = [(header.get("profile", 0), 3), (reduced, 1), (reduced, 1)]
    fields += [(0, 5)] if reduced else [(0, 1), (0, 1), (0, 5), (0, 12), (8, 5), (0, 1)]
    fields += [
        (15, 4),
        (15, 4),
        (width - 1, 16),
        (height - 1, 16),
        (0, 6),
        (header.get("deep", 0), 1),
    ]
    content = bits(*fields)
    return bytes([1 << 3 | 2, len(content)]) + content + bytes([6 << 3 | 2, 1, 0]) * frames


def configuration(width: int, height: int, chroma: int = 1, deep: int = 0) -> bytes:
    """Return the content of a box hvcC, with a parameter set of pictures of this size."""
    fields = [(0, 4), (0, 3), (1, 1), (0, 88), (93, 8), golomb(0), golomb(chroma)]
    fields += [(0, 1)] if chroma == 3 else []
    fields += [golomb(width), golomb(height), (0, 1), golomb(deep), golomb(deep)]
    unit = b"\x42\x01" + bits(*fields)
    unit = unit.replace(b"\0\0\0", b"\0\0\3\0")
    return bytes(21) + b"\3\1" + struct.pack(">BHH", 33, 1, len(unit)) + unit


def hevc_stream(slices: int = 1, first: int = 1) -> bytes:
    return struct.pack(">I", 4) + b"\x26\x01" + bytes([first << 7, 0]) + hevc_slices(slices - 1)


def hevc_slices(count: int) -> bytes:
    return (struct.pack(">I", 4) + b"\x26\x01\0\0") * count


def test_the_size_of_frames() -> None:
    file = encoded(smooth(90, 61, "RGB"), "AVIF")
    assert av1_frame(parts(file)[1]) == Frame(90, 61, 1.5)
    file = encoded(smooth(90, 61, "RGB"), "AVIF", subsampling="4:4:4")
    assert av1_frame(parts(file)[1]) == Frame(90, 61, 3)
    assert av1_frame(av1_stream(70, 80, deep=1)) == Frame(70, 80, 3)
    assert av1_frame(av1_stream(70, 80, frames=4)) == Frame(70, 80, 4 * 1.5)  # all are held
    whole = Frame(2**16, 2**16, 3)
    assert av1_frame(av1_stream(70, 80, reduced=0)) == whole  # frames may be as large
    assert hevc_frame(configuration(64, 72), hevc_stream(5)) == Frame(64, 72, 1.5)
    assert hevc_frame(configuration(640, 72, 3, 2), hevc_stream()) == Frame(640, 72, 6)


@needs_heif
def test_the_size_of_frames_of_an_encoder() -> None:
    _, content, properties = parts(heic(smooth(90, 60, "RGB"), chroma=444))
    own = {kind: value for kind, value, _ in properties}
    assert hevc_frame(own[b"hvcC"], content)[:2] == (96, 64) or hevc_frame(own[b"hvcC"], content)[
        :2
    ] == (90, 64)


def av1_item(
    content: bytes, *more: tuple[bytes, bytes, bool], stated: tuple[int, int] = (64, 64)
) -> tuple[bytes, bytes, Properties]:
    return b"av01", content, [(b"av1C", b"\x81\0\x0c\0", True), size_box(*stated), *more]


def hevc_item(content: bytes, *size: int) -> tuple[bytes, bytes, Properties]:
    return b"hvc1", content, [(b"hvcC", configuration(*size), True), size_box(64, 64)]


def many_sets_item() -> tuple[bytes, bytes, Properties]:
    """Return an item with a large parameter set after 1000 small ones."""
    first, large = configuration(64, 64), configuration(8000, 8000)[26:]
    sets = first[26:] + b"\0\3\x44\1\0" * 999 + large
    content = first[:22] + struct.pack(">BBH", 1, 33, 1001) + sets
    return b"hvc1", hevc_stream(), [(b"hvcC", content, True), size_box(64, 64)]


TILE = av1_item(av1_stream(64, 64))
MANY = [TILE] * 4
FOUR = ((b"dimg", 1, [2, 3, 4, 5]),)  # references of a grid to its tiles
MEMORY = "of memory, of at most"
ALPHA = b"auxC", bytes(4) + b"urn:mpeg:mpegB:cicp:systems:auxiliary:alpha\0", True
TILE_OF_ALPHA = av1_item(av1_stream(64, 64), ALPHA)
REFUSED: dict[str, tuple[bytes, str]] = {
    "a large AV1 frame": (built([av1_item(av1_stream(12000, 12000))]), "tiles are 12000 x 12000"),
    "an AV1 frame of any size": (built([av1_item(av1_stream(64, 64, reduced=0))]), "65536 x 65536"),
    "a large HEVC frame": (
        built([hevc_item(hevc_stream(), 20000, 20000)], brand=b"heic"),
        "tiles are 20000 x 20000",
    ),
    "memory": (built([av1_item(av1_stream(9000, 9000, profile=1, deep=1))]), MEMORY),
    "memory of a grid": (
        built(
            [grid(1, 4, (28000, 3000)), *[av1_item(av1_stream(7000, 3000, profile=1))] * 4], FOUR
        ),
        MEMORY,
    ),
    "memory of a small frame that is scaled": (
        built([av1_item(av1_stream(64, 64, profile=1), stated=(8696, 8696))]),
        MEMORY,
    ),
    "memory of small tiles that are scaled": (
        built(
            [grid(2, 2, (8696, 8696))]
            + [av1_item(av1_stream(64, 64, profile=1), stated=(4348, 4348))] * 4,
            FOUR,
        ),
        MEMORY,
    ),
    "memory of a grid that is larger than its tiles": (
        built([grid(2, 2, (8696, 8696)), *[av1_item(av1_stream(64, 64, profile=1))] * 4], FOUR),
        MEMORY,
    ),
    "memory of a small alpha that is scaled": (
        built(
            [av1_item(av1_stream(8000, 8000), stated=(8000, 8000)), TILE_OF_ALPHA],
            ((b"auxl", 2, [1]),),
        ),
        MEMORY,
    ),
    "memory of several frames": (
        built([av1_item(av1_stream(8000, 8000, frames=4), stated=(8000, 8000))]),
        MEMORY,
    ),
    "a large grid": (built([grid(2, 2, (60000, 60000)), *MANY], FOUR), "it is 60000 x 60000"),
    "many tiles": (
        built([grid(40, 40, (64, 64)), *MANY], ((b"dimg", 1, [2] * 1600),)),
        "1600 tiles",
    ),
    "too few tiles": (
        built([grid(2, 2, (64, 64)), *MANY], ((b"dimg", 1, [2, 3, 4]),)),
        "its grid has 3 of 4 tiles",
    ),
    "a tile that repeats": (
        built(
            [grid(30, 30, (64, 64)), av1_item(av1_stream(64, 64) + bytes(900))],
            ((b"dimg", 1, [2] * 900),),
        ),
        "its tiles overlap",
    ),
    "a grid of itself": (built([grid(1, 1, (64, 64))], ((b"dimg", 1, [1]),)), "of a rare kind"),
    "a missing tile": (built([grid(1, 1, (64, 64))], ((b"dimg", 1, [7]),)), "does not have"),
    "several frames": (built([av1_item(av1_stream(64, 64, frames=5))]), "not several"),
    "several frames in repeated headers": (
        built([av1_item(av1_stream(64, 64) + bytes([7 << 3 | 2, 1, 0]) * 4)]),
        "not several",
    ),
    "many HEVC parameter sets": (
        built([many_sets_item()], brand=b"heic"),
        "over 1000 HEVC parameter sets",
    ),
    "several HEVC frames": (
        built([hevc_item(hevc_stream() + hevc_stream(), 64, 64)], brand=b"heic"),
        "not several",
    ),
    "no frame": (built([hevc_item(hevc_slices(3), 64, 64)], brand=b"heic"), "not several"),
    "many units": (built([av1_item(av1_stream(64, 64) + b"\x12\0" * 1000)]), "not whole"),
    "a rare codec": (built([(b"unci", b"", [size_box(64, 64)])]), "of a rare kind"),
    "a rare property": (
        built([av1_item(av1_stream(64, 64), (b"lsel", b"\0\0", True))]),
        "of a rare kind",
    ),
    "no size": (built([(b"av01", av1_stream(64, 64), [])]), "does not say how"),
    "data beyond the end": (built([TILE], pieces={1: [(60, 10_000)]}), "are not whole"),
    "pieces": (built([TILE], pieces={1: [(60, 1)] * 10_000}), "over 10000 pieces"),
    "boxes": (built([TILE], more=box(b"free") * 10_000), "over 10000 boxes"),
    "items": (built([TILE] + [(b"mime", b"", [])] * 5000), "5001 items"),
    "a box that is too short": (
        b"\0\0\0\x18ftypavif" + bytes(8) + b"avif\0\0\0\4meta",
        "cut short",
    ),
}


@pytest.mark.parametrize(("file", "message"), REFUSED.values(), ids=REFUSED)
def test_what_costs_too_much_is_not_decoded(
    file: bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "open", None)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(PictureError, match=message):
        open_picture(file)


def test_tiles_of_the_same_bytes_are_not_copied() -> None:
    tile = av1_item(av1_stream(64, 64) + bytes([15 << 3]) + bytes(10**6))
    file = built([grid(30, 30, (64, 64)), tile], ((b"dimg", 1, [2] * 900),))
    tracemalloc.start()
    try:
        with pytest.raises(PictureError, match="its tiles overlap"):
            open_picture(file)
        assert tracemalloc.get_traced_memory()[1] < 10**7
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("written_as", FORMATS)
@pytest.mark.parametrize("kept", [0.02, 0.3, 0.6, 0.95])
def test_a_truncated_file_is_refused(written_as: str, kept: float) -> None:
    file = written(smooth(), written_as)
    with pytest.raises(PictureError):
        open_picture(file[: int(len(file) * kept)])


def samples() -> list[bytes]:
    """Return small pictures in every coding that is at hand."""
    exif = Image.Exif()
    exif[274] = 6
    files = [encoded(smooth(20, 12), "AVIF", exif=exif, icc_profile=swapped_profile())]
    files += [encoded(smooth(20, 12, mode), "AVIF") for mode in ("RGB", "L")]
    files += [
        built([grid(2, 2, (100, 90)), *[avif_tile("red")] * 4], ((b"dimg", 1, [2, 3, 4, 5]),))
    ]
    if pillow_heif is not None:
        turned = smooth(20, 12)
        turned.getexif()[274] = 6
        files += [heic(turned), heic(smooth(100, 70, "RGB"), tile_size=64)]
    return files


def test_fuzz_damaged_files_give_a_picture_or_an_error(
    cases: Callable[[int], Iterator[Random]], capfd: pytest.CaptureFixture[str]
) -> None:
    check_damaged(samples(), cases(400), capfd)
