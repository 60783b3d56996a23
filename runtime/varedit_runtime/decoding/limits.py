"""Limits on pixels and memory, and the memory that Pillow's pictures take."""

from collections.abc import Iterator
from dataclasses import dataclass

from varedit_runtime.errors import PictureError, readable_size

MAX_PIXELS = 89_478_485  # Pillow warns of a decompression bomb from here, and refuses twice this
MAX_MEMORY = 2**29  # bytes

_PIECE = 2**18  # pixels
_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16L": 2, "I;16B": 2, "I;16N": 2}


@dataclass(frozen=True)
class Limits:
    """Limits on reading one picture. pixels: width times height. memory: bytes at a time."""

    pixels: int = MAX_PIXELS
    memory: int = MAX_MEMORY

    def check_pixels(self, size: tuple[int, int]) -> None:
        """Raise PictureError if a picture has no pixels or too many."""
        width, height = size
        if not 0 < width * height <= self.pixels:
            raise PictureError(
                f"it is {width} x {height}; a picture must have 1 to {self.pixels} pixels"
            )

    def check_tile(self, size: tuple[int, int]) -> None:
        """Raise PictureError if what is decoded at once has too many pixels."""
        width, height = size
        if width * height > self.pixels:
            raise PictureError(
                f"its tiles are {width} x {height}; a tile may have up to {self.pixels} pixels"
            )

    def check_memory(self, needed: int) -> None:
        """Raise PictureError if reading a picture takes too many bytes."""
        if needed > self.memory:
            raise PictureError(
                f"reading it takes {readable_size(needed)} of memory, of at most "
                f"{readable_size(self.memory)}: make the picture smaller"
            )


@dataclass(frozen=True)
class Checked:
    """A file that its format's reader let pass.

    data: the file as Pillow is to see it. size: (width, height), as far as the reader knows it.
    decoder: bytes that decoding takes beside the decoded picture. tile: (width, height) of what is
    decoded at once, where that may exceed the picture. transparent: the levels of the one colour
    that is transparent, with `depth` bits each.
    """

    data: bytes
    size: tuple[int, int]
    decoder: int = 0
    tile: tuple[int, int] = (1, 1)
    transparent: tuple[int, ...] = ()
    depth: int = 8


def picture_memory(size: tuple[int, int], mode: str = "RGB") -> int:
    """Return the bytes of a picture in Pillow: padded rows, and a pointer to each row."""
    width, height = size
    return height * (8 + -(-width * _BYTES.get(mode, 4) // 4) * 4)


def pieces(size: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    """Yield boxes of up to 262,144 pixels that make up a picture: left, top, right, bottom.

    What is done piece by piece takes little memory beside the picture.
    """
    width, height = min(size[0], _PIECE), max(1, _PIECE // size[0])
    for top in range(0, size[1], height):
        for left in range(0, size[0], width):
            yield left, top, min(left + width, size[0]), min(top + height, size[1])
