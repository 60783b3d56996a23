"""The styles of a whole picture: pure functions of its pixels.

Each takes and returns float32 [S, S, 3] in [0, 1]; results are clipped by `apply_style`.
"""

from collections.abc import Callable

import numpy as np

Picture = np.ndarray

LUMA = np.array([0.299, 0.587, 0.114], np.float32)
"""ITU-R BT.601 luma weights."""


def apply_style(picture: Picture, style: str) -> Picture:
    """Apply one of `STYLES` to a picture, uint8 [S, S, 3]."""
    if style == "plain":
        return picture
    styled = STYLES[style](picture.astype(np.float32) / 255)
    return np.rint(255 * np.clip(styled, 0, 1)).astype(np.uint8)


def grey(picture: Picture) -> Picture:
    return np.repeat((picture @ LUMA)[..., None], 3, axis=-1)


def sepia(picture: Picture) -> Picture:
    return (picture @ LUMA)[..., None] * _rgb(1.12, 0.92, 0.68) + 0.03


def negative(picture: Picture) -> Picture:
    return 1 - picture


def warm(picture: Picture) -> Picture:
    return picture * _rgb(1.08, 0.92, 0.60) + _rgb(0.10, 0.02, 0.00)


def cool(picture: Picture) -> Picture:
    return picture * _rgb(0.62, 0.90, 1.05) + _rgb(0.00, 0.02, 0.12)


def poster(picture: Picture) -> Picture:
    """Reduce every channel to four levels."""
    return np.rint(3 * picture) / 3


def pixels(picture: Picture, blocks: int = 32) -> Picture:
    """Replace each of blocks x blocks squares by its mean."""
    size = len(picture)
    owner = np.arange(size) * blocks // size
    starts = np.searchsorted(owner, np.arange(blocks))
    counts = np.bincount(owner).astype(np.float32)
    sums = np.add.reduceat(np.add.reduceat(picture, starts, axis=0), starts, axis=1)
    means = sums / (counts[:, None] * counts)[..., None]
    return means[owner][:, owner]


def sketch(picture: Picture) -> Picture:
    """Draw pencil strokes where the picture is darker than around: luma / blurred luma."""
    luma = picture @ LUMA + 0.06
    ratio = luma / _blurred(luma, radius=max(1, round(0.024 * len(luma))))
    return np.repeat((1.1 * ratio - 0.16)[..., None], 3, axis=-1)


def _rgb(red: float, green: float, blue: float) -> np.ndarray:
    return np.array([red, green, blue], np.float32)


def _blurred(plane: np.ndarray, radius: int) -> np.ndarray:
    """Average a plane [S, S] over a square window, repeating its edges."""
    width = 2 * radius + 1
    for _ in range(2):
        padded = np.pad(plane.T, ((0, 0), (radius + 1, radius)), mode="edge")
        total = np.cumsum(padded, axis=1, dtype=np.float64)
        plane = (total[:, width:] - total[:, :-width]) / width
    return plane.astype(np.float32)


STYLES: dict[str, Callable[[Picture], Picture]] = {
    "grey": grey,
    "sepia": sepia,
    "negative": negative,
    "warm": warm,
    "cool": cool,
    "poster": poster,
    "pixels": pixels,
    "sketch": sketch,
}
