"""Pictures from strangers: costly, damaged and unusual files."""

import contextlib
import io
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from threading import Event

import numpy as np
import pytest
from picture_files import (
    WHITE,
    check_damaged,
    chunk,
    encoded,
    jpeg_tiff,
    many_scans,
    noise,
    pixels,
    png,
    srgb_profile,
    swapped_profile,
    tiff,
    with_segments,
)
from PIL import Image
from PIL.ImageFile import ImageFile

from varedit_runtime.decoding.jpeg import MAX_SCANS
from varedit_runtime.errors import PictureError
from varedit_runtime.pictures import open_picture


def smooth(height: int, width: int) -> Image.Image:
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(((rows * 3 + columns) % 256).astype(np.uint8)).convert("RGB")


# Transparent colours


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_one_transparent_grey_is_one_level_of_the_file(depth: int):
    levels = list(range(2**depth))
    bits = "".join(f"{level:0{depth}b}" for level in levels).ljust(8, "0")
    row = b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big")
    for clear in {0, 1, 3 % 2**depth, 2**depth - 1}:
        key = chunk(b"tRNS", struct.pack(">H", clear))
        file = png(len(levels), 1, depth=depth, data=row, before=key)
        opaque = [[level * 255 // (2**depth - 1)] * 3 for level in levels]
        expected = [WHITE if level == clear else opaque[level] for level in levels]
        assert pixels(file) == expected
        assert pixels(Image.open(io.BytesIO(file))) == expected


@pytest.mark.parametrize("interlaced", [0, 1])
def test_one_transparent_16_bit_colour_is_compared_in_all_its_bits(interlaced: int):
    colours = [(0x1234, 0xFFFF, 0), (0x1234, 0xFFFF, 1), (0x1235, 0xFFFF, 0), (0, 0, 0)]
    colours += [(0x1234, 0xFEFF, 0), (0x12, 0xFF, 0)]
    rows = [b"\0" + struct.pack(">3H", *colour) for colour in colours]  # 1 x 6 px
    if interlaced:  # passes of rows 0, 4, 2, then the odd ones
        rows = [rows[0], rows[4], rows[2], rows[1], rows[3], rows[5]]
    for clear in colours:
        key = chunk(b"tRNS", struct.pack(">3H", *clear))
        file = bytearray(png(1, 6, depth=16, colour=2, data=b"".join(rows), before=key))
        if interlaced:
            file[8:33] = chunk(b"IHDR", bytes(file[16:28]) + b"\1")
        expected = [WHITE if colour == clear else [c >> 8 for c in colour] for colour in colours]
        assert pixels(bytes(file)) == expected


def test_bits_beyond_the_depth_of_a_transparent_colour_are_ignored():
    key = chunk(b"tRNS", struct.pack(">3H", 0x0101, 0x0202, 0xFF03))
    file = png(2, 1, colour=2, data=b"\0\1\2\3\3\2\1", before=key)
    assert pixels(file) == [WHITE, [3, 2, 1]]
    broken = png(2, 1, colour=2, data=b"\0\1\2\3\3\2\1", before=chunk(b"tRNS", b"\0\1"))
    assert pixels(broken) == [[1, 2, 3], [3, 2, 1]]


# PNGs whose pixels are sound


def large_chunks() -> dict[str, bytes]:
    text, packed = bytes(2**21).replace(b"\0", b"x"), zlib.compress(bytes(2**21))
    return {
        "text": chunk(b"tEXt", b"Comment\0" + text),
        "packed text": chunk(b"zTXt", b"Comment\0\0" + packed),
        "international text": chunk(b"iTXt", b"Comment\0\1\0\0\0" + packed),
        "XMP": chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + text),
        "profile": chunk(b"iCCP", b"ICC\0\0" + zlib.compress(srgb_profile(2**21))),
        "EXIF": chunk(b"eXIf", b"II*\0" + text),
        "private": chunk(b"prVt", text),
        "many": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(10**6))) * 70,
    }


@pytest.mark.parametrize("kind", large_chunks())
def test_large_optional_chunks_of_a_png_are_left_out(kind: str):
    row, large = b"\0" + bytes(range(6)), large_chunks()[kind]
    assert pixels(png(2, 1, colour=2, data=row, before=large)) == [[0, 1, 2], [3, 4, 5]]
    assert pixels(png(2, 1, colour=2, data=row, after=large)) == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("kind", [b"tEXt", b"iCCP", b"gAMA", b"pHYs", b"eXIf", b"tRNS", b"prVt"])
@pytest.mark.parametrize("content", [b"", b"\0\0\0\1\0\2", b"Comment\0text"])
def test_damaged_optional_chunks_of_a_png_are_left_out(kind: bytes, content: bytes):
    row, damaged = b"\0" + bytes(range(6)), chunk(kind, content, checksum=1)
    assert pixels(png(2, 1, colour=2, data=row, before=damaged)) == [[0, 1, 2], [3, 4, 5]]
    assert pixels(png(2, 1, colour=2, data=row, after=damaged)) == [[0, 1, 2], [3, 4, 5]]


def test_pngs_of_too_many_chunks_are_refused():
    with pytest.raises(PictureError, match="over 200000 PNG chunks"):
        open_picture(png(1, 1, data=b"\0\0", before=chunk(b"prVt", b"") * 200_000))


def test_a_packed_chunk_is_unpacked_once(monkeypatch: pytest.MonkeyPatch):
    unpacked: list[int] = []
    original = zlib.decompressobj
    monkeypatch.setattr(zlib, "decompressobj", lambda: unpacked.append(1) or original())
    large = chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(bytes(2**21)))
    profile = chunk(b"iCCP", b"ICC\0\0" + zlib.compress(bytes(2**21)))
    assert pixels(png(1, 1, data=b"\0\7", before=(large + profile) * 50)) == [[7] * 3]
    assert len(unpacked) == 2


def test_exif_data_in_a_text_turn_a_picture_upright():
    data = b"Exif\0\0II*\0\x08\0\0\0\1\0" + struct.pack("<HHII", 274, 3, 1, 6) + bytes(4)
    text = b"\nexif\n%8d\n%s\n" % (len(data), data.hex().encode())
    for stored in (
        chunk(b"tEXt", b"Raw profile type exif\0" + text),
        chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text)),
    ):
        assert open_picture(png(2, 1, data=b"\0\1\2", after=stored)).size == (1, 2)


def test_used_optional_chunks_are_kept_beside_damaged_ones():
    profile = chunk(b"iCCP", b"ICC\0\0" + zlib.compress(srgb_profile()))
    turned = chunk(b"eXIf", b"II*\0\x08\0\0\0\1\0" + struct.pack("<HHII", 274, 3, 1, 6) + bytes(4))
    damaged = chunk(b"tEXt", b"x\0y", checksum=0)
    file = png(2, 1, colour=2, data=b"\0" + bytes(6), before=damaged + profile, after=turned)
    assert open_picture(file).size == (1, 2)


@pytest.mark.parametrize("kind", [b"IHDR", b"PLTE", b"IDAT"])
def test_damaged_pixels_of_a_png_are_refused(kind: bytes):
    file = bytearray(encoded(smooth(8, 8).quantize(16), "PNG"))
    place = file.index(kind)
    (length,) = struct.unpack_from(">I", file, place - 4)
    file[place + 4 + length] ^= 1
    with pytest.raises(PictureError, match=f"its {kind.decode()} chunk"):
        open_picture(bytes(file))


def test_the_first_picture_of_an_animated_png_needs_none_of_the_others():
    first, second = smooth(8, 8), noise(8, 8)
    file = encoded(first, "PNG", save_all=True, append_images=[second])
    broken = bytearray(file)
    place = broken.index(b"fdAT")
    broken[place + 4 : place + 8] = b"\xff" * 4
    assert pixels(bytes(broken)) == pixels(first)


# JPEGs


def test_jpegs_may_have_as_many_scans_as_encoders_write():
    assert pixels(many_scans(MAX_SCANS)) == [[77] * 3] * 64 * 64


@pytest.mark.parametrize("inside", ["JPEG", "MPO", "TIFF"])
def test_jpegs_of_too_many_scans_are_not_decoded(inside: str):
    file = many_scans(1000)
    if inside == "MPO":
        usual = encoded(smooth(64, 64), "MPO", save_all=True, append_images=[noise(64, 64)])
        first = usual.index(b"\xff\xdb")
        file = usual[:first] + file[2:] + usual[usual.index(b"\xff\xd9") :]
    elif inside == "TIFF":
        file = jpeg_tiff(file, (64, 64))
    with pytest.raises(PictureError, match="has 1000 JPEG scans"):
        open_picture(file)


@pytest.mark.parametrize("inside", ["JPEG", "TIFF"])
def test_large_jpegs_may_have_fewer_scans(inside: str):
    file = bytearray(many_scans(25))  # of 2 * 10^9 pixels at most
    struct.pack_into(">HH", file, file.index(b"\xff\xc2") + 5, 9000, 9000)
    data = bytes(file) if inside == "JPEG" else jpeg_tiff(bytes(file), (9000, 9000))
    with pytest.raises(PictureError, match="has 25 JPEG scans, of at most 24"):
        open_picture(data)


def test_a_jpeg_in_a_tiff_is_read():
    file = jpeg_tiff(encoded(smooth(64, 64).convert("L"), "JPEG", quality=100), (64, 64))
    assert np.allclose(np.asarray(open_picture(file)), np.asarray(smooth(64, 64)), atol=20)
    with Image.open(io.BytesIO(jpeg_tiff(many_scans(10), (64, 64)))) as image:
        assert image.size == (64, 64)


@pytest.mark.parametrize("marker", [0xE0, 0xE1, 0xE2, 0xED, 0xFE])
def test_repeated_metadata_of_a_jpeg_are_left_out(marker: int):
    starts = {0xE1: b"Exif\0\0II*\0", 0xE0: b"JFIF\0", 0xE2: b"ICC_PROFILE\0\1\1"}
    content = starts.get(marker, b"Photoshop 3.0\0").ljust(60_000, b"x")
    file = encoded(smooth(64, 64), "JPEG")
    many = with_segments(file, *[(marker, content)] * 300)
    assert pixels(many) == pixels(file)


def test_jpegs_of_too_many_segments_are_refused():
    file = encoded(smooth(64, 64), "JPEG")
    for segment in ((0xFE, b""), (0xDD, b"\0\0")):
        with pytest.raises(PictureError, match="over 10000 JPEG segments"):
            open_picture(with_segments(file, *[segment] * 10_001))
    with pytest.raises(PictureError, match="too many quantisation tables"):
        open_picture(with_segments(file, *[(0xDB, bytes(2**15))] * 3))


def test_jpegs_in_a_tiff_have_as_few_segments():
    file = with_segments(encoded(smooth(8, 8).convert("L"), "JPEG"), *[(0xFE, b"")] * 10_001)
    with pytest.raises(PictureError, match="over 10000 JPEG segments"):
        open_picture(jpeg_tiff(file, (8, 8)))
    file = with_segments(encoded(smooth(8, 8).convert("L"), "JPEG"), *[(0xFE, b"")] * 9_000)
    places = {"_273": [8, 8 + len(file)], "_279": [len(file)] * 2}
    two = tiff(file * 2, _256=8, _257=16, _258=8, _259=7, _262=1, _277=1, _278=8, **places)
    with pytest.raises(PictureError, match="too many JPEG segments"):
        open_picture(two)


def test_a_jpeg_needs_one_supported_frame():
    file = encoded(smooth(64, 64), "JPEG")
    frame = file.index(b"\xff\xc0")
    for wrong in (
        file.replace(b"\xff\xc0", b"\xff\xc9"),  # arithmetic coding
        file[:frame] + file[frame : frame + 19] + file[frame:],
        file[: frame + 10],
    ):
        with pytest.raises(PictureError, match="cannot be read: it"):
            open_picture(wrong)


# GIFs


def test_gifs_of_too_many_blocks_before_the_picture_are_refused():
    file = encoded(smooth(8, 8).convert("P"), "GIF", comment=b"x" * 1000)
    start = file.index(b"!\xfe")
    comment = b"!\xfe" + b"\1x" * 1000 + b"\0"
    assert pixels(file[:start] + comment * 99 + file[start:]) == pixels(file)
    with pytest.raises(PictureError, match="over 100000 GIF blocks"):
        open_picture(file[:start] + comment * 101 + file[start:])


# TIFFs


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "jpeg", "group4"])
def test_libtiff_writes_nothing_to_stderr(compression: str, capfd: pytest.CaptureFixture[str]):
    picture = noise(64, 64).convert("1" if compression == "group4" else "RGB")
    file = bytearray(encoded(picture, "TIFF", compression=compression))
    file[200:1000:7] = b"\x5a" * len(file[200:1000:7])
    with contextlib.suppress(PictureError):
        open_picture(bytes(file))
    assert capfd.readouterr().err == ""


def test_a_tiff_of_too_many_or_overlapping_pieces_is_refused():
    many = tiff(bytes(8), _256=9000, _257=9000, _273=[8] * 100_001, _279=[8] * 100_001)
    with pytest.raises(PictureError, match="100001 strips"):
        open_picture(many)
    jpeg = encoded(smooth(64, 64).convert("L"), "JPEG")
    places = {"_273": [8, 9], "_279": [len(jpeg)] * 2}
    file = tiff(jpeg, _256=64, _257=128, _258=8, _259=7, _262=1, _277=1, _278=64, **places)
    with pytest.raises(PictureError, match="overlap"):
        open_picture(file)


def test_a_tiff_with_both_strips_and_tiles_is_refused():
    places = {"_273": 8, "_279": 64, "_324": 8, "_325": 64}
    file = tiff(bytes(64), _256=8, _257=8, _258=8, _259=7, _262=1, **places)
    with pytest.raises(PictureError, match="not both"):
        open_picture(file)


@pytest.mark.parametrize("compression", [6, 34925, 50000, 50001])
def test_rare_compressions_of_a_tiff_are_refused(compression: int):
    file = tiff(bytes(64), _256=8, _257=8, _258=8, _259=compression, _262=1, _273=8, _279=64)
    with pytest.raises(PictureError, match=f"compression {compression} is not supported"):
        open_picture(file)


# Memory


def webp_header(width: int, height: int) -> bytes:
    sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + sides
    return b"RIFF" + struct.pack("<I", len(body)) + body


def progressive_header(side: int) -> bytes:
    """Return a progressive JPEG in full colour that claims this size."""
    file = bytearray(encoded(smooth(64, 64), "JPEG", progressive=True, subsampling=0))
    struct.pack_into(">HH", file, file.index(b"\xff\xc2") + 5, side, side)
    return bytes(file)


def large_tiff(**layout: int | list[int]) -> bytes:
    """Return a TIFF of 9000 x 9000 px with 16-bit RGBA samples, without the pixels."""
    return tiff(bytes(8), _256=9000, _257=9000, _258=[16] * 4, _259=5, _262=2, _277=4, **layout)


# Within the limit of pixels, but decoding takes over 512 MiB.
LARGE: dict[str, Callable[[], bytes]] = {
    "one column": lambda: png(1, 89_000_000),
    "one row": lambda: png(60_000_000, 1, depth=16, colour=6),
    "interlaced": lambda: png(9000, 9000, depth=16, colour=2, before=chunk(b"tRNS", bytes(6))),
    "WebP": lambda: webp_header(7000, 7000),
    "progressive JPEG": lambda: progressive_header(9000),
    "one strip": lambda: large_tiff(_273=8, _279=8),
    "one tile": lambda: large_tiff(_322=9008, _323=9008, _324=8, _325=8),
    "strips": lambda: large_tiff(_273=[8] * 90_000, _279=[8] * 90_000, _274=6),
}


@pytest.mark.parametrize("kind", LARGE)
def test_memory_is_estimated_before_anything_is_decoded(kind: str):
    with pytest.raises(PictureError, match="of memory, of at most 537 MB"):
        open_picture(LARGE[kind]())


def test_the_limit_on_memory_can_be_set(tmp_path: Path):
    file = encoded(smooth(1000, 1000), "PNG")
    needed = 4_000_000 + 8_000 + 2 * len(file)
    (tmp_path / "file.png").write_bytes(file)
    for source in (file, io.BytesIO(file), tmp_path / "file.png", Image.open(io.BytesIO(file))):
        assert open_picture(source, max_memory=needed + 10_000).size == (1000, 1000)
        with pytest.raises(PictureError, match="make the picture smaller"):
            open_picture(source, max_memory=needed - 1000)
    loaded = noise(1000, 1000)
    with pytest.raises(PictureError, match="of memory, of at most"):
        open_picture(loaded, max_memory=4_000_000)
    with (
        open("/dev/zero", "rb") as endless,
        pytest.raises(PictureError, match="of memory, of at most"),
    ):
        open_picture(endless, max_memory=10**7)


def memory_cases(folder: Path) -> Iterator[Path]:
    """Write pictures of 4 megapixels in every format."""
    picture, turned = Image.new("RGB", (2000, 2000), (200, 100, 0)), Image.Exif()
    turned[274] = 6
    clear = Image.new("RGBA", (2000, 2000), (200, 100, 0, 128))
    quick = {"method": 0, "quality": 0}
    for name, image, options in [
        ("base.jpg", picture, {}),
        ("turned.jpg", picture, {"exif": turned}),
        ("progressive.jpg", picture, {"progressive": True}),
        ("full.jpg", picture, {"progressive": True, "subsampling": 0}),
        ("rgb.png", picture, {"compress_level": 1}),
        ("alpha.png", clear, {"compress_level": 1}),
        ("palette.gif", picture.convert("P"), {}),
        ("lossy.webp", picture, quick),
        ("lossless.webp", clear, {"lossless": True, **quick}),
        ("rgb.bmp", picture, {}),
        ("raw.tif", picture, {}),
        ("strip.tif", clear, {"compression": "tiff_lzw", "strip_size": 10**8}),
        ("jpeg.tif", picture, {"compression": "jpeg", "strip_size": 10**8}),
        ("rgb.avif", picture, {"speed": 10}),
        ("alpha.avif", clear, {"speed": 10, "subsampling": "4:4:4", "exif": turned}),
        ("turned.tif", picture, {"compression": "packbits", "exif": turned}),
    ]:
        image.save(folder / name, **options)
        yield folder / name
    scaled = bytearray(encoded(smooth(64, 64), "AVIF", subsampling="4:4:4"))
    stated = scaled.index(b"ispe") + 8
    scaled[stated : stated + 8] = struct.pack(">II", 3000, 3000)
    (folder / "scaled.avif").write_bytes(scaled)
    yield folder / "scaled.avif"
    with contextlib.suppress(ImportError):
        import pillow_heif

        for name, image in (
            ("rgb.heic", picture),
            ("alpha.heic", clear),
            ("small.heic", smooth(8, 8)),
        ):
            pillow_heif.from_pillow(image).save(folder / name, quality=10)
        yield from (folder / "rgb.heic", folder / "alpha.heic")
    (folder / "column.png").write_bytes(png(1, 4_000_000, data=bytes(8_000_000)))
    yield folder / "column.png"


# Each picture in a process of its own, forked when everything is imported.
MEASURE = """
import os, resource, sys
from PIL import Image
from varedit_runtime.decoding.limits import Limits
from varedit_runtime.pictures import open_picture
small, *paths = sys.argv[1:]
for path in paths:
    open_picture(small + os.path.splitext(path)[1])
needed = []
Limits.check_memory = lambda self, bytes: needed.append(bytes)
for path in paths:
    if not os.fork():
        before = int(open("/proc/self/statm").read().split()[1]) * 4096
        open_picture(path)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        print(path, peak, max(needed), flush=True)
        os._exit(0)
    os.wait()
"""


def test_the_estimate_of_memory_is_what_decoding_takes(tmp_path: Path):
    for suffix in (".jpg", ".png", ".gif", ".webp", ".bmp", ".tif", ".avif"):
        smooth(8, 8).save(tmp_path / f"small{suffix}")
    paths = list(memory_cases(tmp_path))
    command = [sys.executable, "-c", MEASURE, tmp_path / "small", *paths]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    measured = {path: (int(a), int(b)) for path, a, b in map(str.split, told.splitlines())}
    assert len(measured) == len(paths)
    for path, (peak, estimate) in measured.items():
        assert estimate / 2 < peak < estimate + 12e6, path


def test_run_lengths_of_a_large_bmp_are_not_decoded():
    header = struct.pack("<IiiHHIIiiII", 40, 3000, 3000, 1, 8, 1, 0, 0, 0, 0, 0)
    file = b"BM" + struct.pack("<IHHI", 0, 0, 0, 1078) + header + bytes(1024)
    with pytest.raises(PictureError, match="run-length"):
        open_picture(file + b"\0\0" * 3000)


# Pillow images


class SlowFile(io.BytesIO):
    """A file that lets other threads run after every read."""

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        time.sleep(0.0001)
        return data


def lazily_opened() -> dict[str, tuple[bytes, ImageFile]]:
    """Return files in every format, and Pillow's images of them before they are loaded."""
    picture, exif = noise(97, 101), Image.Exif()
    exif[274] = 6
    profile = srgb_profile()
    files = {
        "PNG": encoded(picture, "PNG", icc_profile=profile, exif=exif),
        "clear PNG": png(4, 1, depth=2, data=b"\0\x1b", before=chunk(b"tRNS", b"\0\1")),
        "JPEG": encoded(picture, "JPEG", exif=exif, comment=b"x", icc_profile=profile),
        "MPO": encoded(picture, "MPO", save_all=True, append_images=[noise(8, 8)]),
        "WEBP": encoded(picture, "WEBP", lossless=True, exif=exif),
        "GIF": encoded(picture.quantize(16), "GIF", transparency=3),
        "BMP": encoded(picture, "BMP"),
        "TIFF": encoded(picture, "TIFF", compression="tiff_lzw", exif=exif),
        "AVIF": encoded(picture, "AVIF", exif=exif, icc_profile=profile),
        "PPM": encoded(picture, "PPM"),
    }
    return {name: (file, Image.open(SlowFile(file))) for name, file in files.items()}


@pytest.mark.parametrize("kind", lazily_opened())
def test_threads_may_share_a_picture_that_is_not_loaded(kind: str):
    file, image = lazily_opened()[kind]
    expected = open_picture(Image.open(io.BytesIO(file))).tobytes()
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: open_picture(image).tobytes(), range(16)))
    assert results == [expected] * 16


def test_threads_may_share_an_open_file():
    file = SlowFile(encoded(noise(97, 101), "PNG"))
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: open_picture(file).tobytes(), range(16)))
    assert set(results) == {noise(97, 101).tobytes()}


def test_a_stream_that_has_not_arrived_stops_no_other_picture():
    file = encoded(noise(97, 101), "PNG")
    asked, arrived = Event(), Event()

    class Stream(io.BytesIO):
        def tell(self) -> int:
            raise io.UnsupportedOperation

        def read(self, size: int | None = -1, /) -> bytes:
            asked.set()
            arrived.wait(60)
            return super().read(size)

    with ThreadPoolExecutor(2) as pool:
        try:
            late = pool.submit(open_picture, Stream(file))
            assert asked.wait(60)
            pool.submit(open_picture, io.BytesIO(file)).result(timeout=10)
        finally:
            arrived.set()
        assert late.result().tobytes() == noise(97, 101).tobytes()


@pytest.mark.parametrize("kind", sorted(lazily_opened().keys() - {"PPM"}))
def test_a_pillow_image_stays_as_it_is(kind: str):
    file, image = lazily_opened()[kind]
    read_to = image.fp and image.fp.tell()
    before = [image.mode, image.size, dict(image.info), list(image.tile), read_to]
    assert pixels(image) == pixels(file)
    read_to = image.fp and image.fp.tell()
    assert [image.mode, image.size, image.info, image.tile, read_to] == before
    image.load()
    assert image.tobytes() == Image.open(io.BytesIO(file)).tobytes()


def test_changes_to_a_pillow_image_before_it_is_loaded_count():
    file = encoded(smooth(64, 64), "JPEG", icc_profile=swapped_profile())
    image = Image.open(io.BytesIO(file))
    del image.info["icc_profile"]
    assert pixels(image) == pixels(encoded(smooth(64, 64), "JPEG"))
    image = Image.open(io.BytesIO(file))
    image.draft("RGB", (16, 16))
    assert open_picture(image).size == (16, 16)


@pytest.mark.parametrize("written_as", ["PNG", "WEBP", "GIF", "TIFF", "MPO"])
def test_the_current_frame_of_a_pillow_image_is_taken(written_as: str):
    second, third = noise(97, 101), Image.new("RGB", (101, 97), (1, 2, 3))
    lossless = {"lossless": True} if written_as == "WEBP" else {}
    frames = {"save_all": True, "append_images": [second, third], **lossless}
    image = Image.open(SlowFile(encoded(smooth(97, 101), written_as, **frames)))
    image.seek(1)
    with ThreadPoolExecutor(8) as pool:
        results = set(pool.map(lambda _: open_picture(image).tobytes(), range(16)))
    image.seek(1)
    assert results == {image.convert("RGB").tobytes()}


@pytest.mark.parametrize("written_as", ["MPO", "TIFF"])
def test_a_frame_of_too_many_scans_is_not_decoded(written_as: str):
    jpeg, grey = many_scans(1000), Image.new("L", (64, 64))
    if written_as == "MPO":
        file = encoded(grey, "MPO", save_all=True, append_images=[grey])
        file = file[: file.rindex(b"\xff\xd8")] + jpeg
    else:
        page = {"_256": 64, "_257": 64, "_258": 8, "_262": 1, "_277": 1, "_278": 64}
        first = tiff(bytes(4096) + jpeg, _259=1, _273=8, _279=4096, **page)
        second = tiff(b"", _259=7, _273=8 + 4096, _279=len(jpeg), **page)[8:]
        file = first[:-4] + struct.pack("<I", len(first)) + second
    image = Image.open(io.BytesIO(file))
    image.seek(1)
    with pytest.raises(PictureError, match="1000 JPEG scans"):
        open_picture(image)


# Any file


def samples() -> list[bytes]:
    """Return small pictures in every format and coding."""
    picture = smooth(12, 20)
    clear = picture.convert("RGBA")
    clear.putalpha(picture.getchannel("R"))
    extra = {"icc_profile": srgb_profile(), "exif": Image.Exif()}
    extra["exif"][274] = 6
    frames = {"save_all": True, "append_images": [noise(12, 20)]}
    files = [encoded(picture, name, **extra) for name in ("PNG", "JPEG", "WEBP", "TIFF")]
    files += [encoded(picture, name, **frames) for name in ("PNG", "GIF", "WEBP", "TIFF", "MPO")]
    files += [encoded(clear, "WEBP", lossless=True), encoded(clear, "PNG"), encoded(clear, "BMP")]
    files += [encoded(picture.quantize(8), name) for name in ("PNG", "GIF", "BMP", "TIFF")]
    files += [encoded(picture.convert(mode), "TIFF") for mode in ("1", "L", "F", "CMYK", "LAB")]
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits"):
        files.append(encoded(picture, "TIFF", compression=compression))
    files += [encoded(picture.convert("1"), "TIFF", compression=f"group{n}") for n in (3, 4)]
    files += [encoded(picture, "JPEG", progressive=True), many_scans(20)]
    files += [png(4, 1, depth=2, data=b"\0\x1b", before=chunk(b"tRNS", b"\0\1"))]
    files += [png(1, 1, depth=16, colour=2, data=bytes(7), before=chunk(b"tRNS", bytes(6)))]
    return files


def test_fuzz_damaged_files_give_a_picture_or_an_error(
    cases: Callable[[int], Iterator[Random]], capfd: pytest.CaptureFixture[str]
):
    check_damaged(samples(), cases(600), capfd)
