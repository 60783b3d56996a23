"""The token grids of every scale, coarse to fine, as the released models define them.

They are a table because the released grids follow no rule. Aspect ratios are height:width, so
"3:2" is upright. The published models were trained on squares only.
"""

from typing import Literal

from varedit_runtime.errors import ConfigError

Grid = tuple[int, int]
# How a model sees its source: see the reference's `TransformerConfig`.
Conditioning = Literal["sar", "finest", "full"]

TOKEN_PIXELS = 16  # the side of the square of pixels that one token stands for

# Side of the square in pixels -> number of scales.
RESOLUTIONS = {256: 7, 512: 10, 1024: 13}

# Lines break where a resolution's scales end.
# fmt: off
_UPRIGHT: dict[str, tuple[Grid, ...]] = {
    "1:1": (
        (1, 1), (2, 2), (4, 4), (6, 6), (8, 8), (12, 12), (16, 16),
        (20, 20), (24, 24), (32, 32),
        (40, 40), (48, 48), (64, 64),
    ),
    "5:4": (
        (1, 1), (2, 2), (3, 3), (5, 4), (10, 8), (15, 12), (20, 16),
        (25, 20), (30, 24), (35, 28),
        (45, 36), (55, 44), (70, 56),
    ),
    "4:3": (
        (1, 1), (2, 2), (4, 3), (8, 6), (12, 9), (16, 12), (20, 15),
        (24, 18), (28, 21), (36, 27),
        (48, 36), (60, 45), (72, 54),
    ),
    "3:2": (
        (1, 1), (2, 2), (3, 2), (6, 4), (9, 6), (15, 10), (21, 14),
        (27, 18), (33, 22), (39, 26),
        (48, 32), (63, 42), (78, 52),
    ),
    "7:4": (
        (1, 1), (2, 2), (3, 3), (7, 4), (11, 6), (14, 8), (21, 12),
        (28, 16), (35, 20), (42, 24),
        (56, 32), (70, 40), (84, 48),
    ),
    "2:1": (
        (1, 1), (2, 2), (4, 2), (6, 3), (10, 5), (16, 8), (22, 11),
        (30, 15), (38, 19), (46, 23),
        (60, 30), (74, 37), (90, 45),
    ),
    "5:2": (
        (1, 1), (2, 2), (5, 2), (10, 4), (15, 6), (20, 8), (25, 10),
        (30, 12), (40, 16), (50, 20),
        (65, 26), (80, 32), (100, 40),
    ),
    "3:1": (
        (1, 1), (2, 2), (6, 2), (9, 3), (15, 5), (21, 7), (27, 9),
        (36, 12), (45, 15), (54, 18),
        (72, 24), (90, 30), (111, 37),
    ),
}
# fmt: on


def _turned(aspect: str) -> str:
    height, width = aspect.split(":")
    return f"{width}:{height}"


ASPECT_RATIOS: dict[str, tuple[Grid, ...]] = _UPRIGHT | {
    _turned(aspect): tuple((w, h) for h, w in grids) for aspect, grids in _UPRIGHT.items()
}


def scale_grids(resolution: int, aspect: str = "1:1") -> tuple[Grid, ...]:
    """Return (height, width) in tokens of every scale, coarse to fine.

    resolution: 256, 512 or 1024, the side of the square in pixels. Other aspect ratios have about
    as many pixels as that square; at 256, up to a quarter more. Raises ConfigError on an unknown
    resolution or aspect ratio; the message lists the known ones.
    """
    if resolution not in RESOLUTIONS:
        known = ", ".join(map(str, RESOLUTIONS))
        raise ConfigError(f"there is no resolution {resolution}; choose one of {known}")
    _check_aspect(aspect)
    return ASPECT_RATIOS[aspect][: RESOLUTIONS[resolution]]


def picture_size(resolution: int, aspect: str = "1:1") -> tuple[int, int]:
    """Return (height, width) in pixels of a model's input and output pictures."""
    height, width = scale_grids(resolution, aspect)[-1]
    return height * TOKEN_PIXELS, width * TOKEN_PIXELS


def is_trained(aspect: str) -> bool:
    """Return whether the published models were trained on this aspect ratio (squares only)."""
    _check_aspect(aspect)
    return aspect == "1:1"


def _check_aspect(aspect: str) -> None:
    if aspect not in ASPECT_RATIOS:
        known = ", ".join(ASPECT_RATIOS)
        raise ConfigError(f"there is no aspect ratio {aspect} (height:width); choose from {known}")
