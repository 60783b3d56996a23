"""Masks: only the marked part of a picture may change.

At every scale, tokens under which no pixel is marked do not take the bits that the model draws:

    bits = sign(down(source - sum so far))

which are the source's own bits as long as the sum is the source's. A coarse token with only a few
marked pixels is the model's, and reaches beyond them; at the finer scales these bits undo that, as
they correct all mistakes of scales before them.

A decoded picture is never exactly its source, so what is not marked is put back pixel by pixel.
Inside the mask, along its border, source and result are mixed, so that no seam is seen.

Masks are pictures of mode L, 255 where marked and else 0, as `pictures.open_mask` returns them.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import prod

import numpy as np
from PIL import Image, ImageChops

from varedit_runtime.backends.base import Sampling
from varedit_runtime.decoding.to_rgb import MORE, on_white
from varedit_runtime.errors import PictureError
from varedit_runtime.geometry import area_matrix
from varedit_runtime.grids import Grid
from varedit_runtime.pictures import canvas_size

FEATHER = 0.5  # width of the mixed border, in tokens of the finest grid
_STEPS = 8  # a wider border is computed on a smaller picture


def fitted(mask: Image.Image | None, picture: Image.Image) -> Image.Image | None:
    """Return a picture's mask, None if everything may change.

    Raises PictureError if the mask is not of the upright picture's size, or marks nothing.
    """
    if mask is None:
        return None
    if mask.size != picture.size:
        (width, height), (wide, high) = mask.size, picture.size
        raise PictureError(
            f"the mask is {width} x {height} and the picture, upright, {wide} x {high}: give a "
            "mask of the picture's size"
        )
    darkest, brightest = mask.getextrema()
    if not brightest:
        raise PictureError(
            "the mask marks nothing, so nothing may change: make white, or transparent, what may"
        )
    return None if darkest else mask


def visible(picture: Image.Image, mask: Image.Image | None) -> Image.Image:
    """Return a picture on white if its mask marks only what is transparent in it, else as it is.

    Such a mask asks for a hole to be filled: in a transparent result that would not be seen.
    """
    if mask is None or picture.mode == "RGB":
        return picture
    opaque = picture.getchannel("A").point(MORE)
    return picture if ImageChops.darker(opaque, mask).getbbox() else on_white(picture)


def resized(mask: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Return a mask in another (width, height), which marks a pixel if any of its own is marked."""
    if mask.size == size:
        return mask
    pixels = np.asarray(mask)
    rows, columns = (
        np.arange(count) * side // count
        for count, side in zip(reversed(size), pixels.shape, strict=True)
    )
    return Image.fromarray(_brightest(pixels, rows, columns))


def marked_tokens(mask: Image.Image, grid: Grid) -> np.ndarray:
    """Return which tokens of a grid have a marked pixel, bool [h, w]; padding has none."""
    pixels, canvas = np.asarray(mask), canvas_size(mask.size, grid)[::-1]
    marked = np.zeros(grid, np.bool_)
    starts = [np.arange(count) * side // count for count, side in zip(grid, canvas, strict=True)]
    rows, columns = (s[s < side] for s, side in zip(starts, pixels.shape, strict=True))
    marked[: len(rows), : len(columns)] = _brightest(pixels, rows, columns) > 0
    return marked


class SourceKeeper:
    """Keeps what the masks of a batch do not mark, scale by scale."""

    def __init__(self, marked: Sequence[np.ndarray | None], finest: Grid, patch: int) -> None:
        """Begin a batch.

        marked: each picture's tokens as `marked_tokens` returns them, None for all of them. finest:
        the grid of the last scale. patch: the tokenizer's positions along a token's side.
        """
        everything = np.ones(finest, np.bool_)
        rows = [everything if tokens is None else tokens for tokens in marked]
        self._marked = np.stack(rows).astype(np.float32)
        self._patch = patch

    def force(
        self, sampling: Sampling, source_tokens: np.ndarray, running_sum: np.ndarray | None
    ) -> Sampling:
        """Force the bits of a scale's tokens that have no marked pixel.

        source_tokens: [B, h, w, c], of which the last lie on the finest grid. running_sum:
        [B, d, H, W] of the scales before this one, None before the first.
        """
        if self._marked.all():
            return sampling
        batch, *grid = self._marked.shape
        finest = source_tokens.reshape(batch, -1, source_tokens.shape[-1])[:, -prod(grid) :]
        missing = _as_map(finest.reshape(batch, *grid, -1), self._patch)
        if running_sum is not None:
            missing = missing - running_sum
        height, width = sampling.noise.shape[1:3]
        missing = _averaged(missing, (height * self._patch, width * self._patch))
        marked = _averaged(self._marked, (height, width)) > 0
        kept = np.broadcast_to(~marked[..., None], sampling.noise.shape)
        return replace(sampling, forced_bits=_as_tokens(missing > 0, self._patch), forced_mask=kept)


def put_back(
    source: Image.Image, edited: Image.Image, mask: Image.Image, width: int
) -> Image.Image:
    """Return a picture that is `edited` where the mask marks it, else exactly `source`.

    All are of one size. width: pixels inside the mask, along its border, that mix the two.
    """
    box = mask.getbbox()
    assert box is not None, "a mask that marks nothing is refused"
    # One pixel more on each side, but not beyond the picture: its own border is no border of masks.
    left, top = max(box[0] - 1, 0), max(box[1] - 1, 0)
    box = left, top, min(box[2] + 1, mask.width), min(box[3] + 1, mask.height)
    result = source.copy()
    result.paste(edited.crop(box), box, _feathered(mask.crop(box), width))
    return result


def feather_width(picture: tuple[int, int], grid: Grid) -> int:
    """Return `put_back`'s width for a picture (width, height), given the finest grid."""
    return max(1, round(FEATHER * canvas_size(picture, grid)[0] / grid[1]))


def _feathered(mask: Image.Image, width: int) -> Image.Image:
    """Return how much of the result counts: 0 outside the mask, up to 255 at a depth of width."""
    factor = max(1, width // _STEPS)
    inside = np.asarray(mask.reduce(factor)) == 255
    depth = np.zeros(inside.shape, np.uint8)
    for _ in range(max(1, width // factor)):
        depth += inside
        padded = np.pad(inside, 1, mode="edge")
        rows = padded[:-2] & padded[1:-1] & padded[2:]
        inside = rows[:, :-2] & rows[:, 1:-1] & rows[:, 2:]
    if not depth.any():
        return mask  # all of it is thinner than what is computed
    levels = Image.fromarray((depth.astype(np.uint16) * 255 // depth.max()).astype(np.uint8))
    return ImageChops.multiply(levels.resize(mask.size, Image.Resampling.BILINEAR), mask)


def _brightest(pixels: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return the brightest pixel of each area. rows, columns: where areas begin."""
    return np.maximum.reduceat(np.maximum.reduceat(pixels, rows, axis=0), columns, axis=1)


def _averaged(maps: np.ndarray, size: Grid) -> np.ndarray:
    """Average maps [..., H, W] over the areas of the positions of a smaller size."""
    rows, columns = map(area_matrix, size, maps.shape[-2:])
    return rows @ maps @ columns.T


def _as_map(tokens: np.ndarray, patch: int) -> np.ndarray:
    """Turn tokens [B, h, w, c] into a map of the tokenizer's positions [B, d, H, W]."""
    batch, height, width, _ = tokens.shape
    apart = tokens.reshape(batch, height, width, -1, patch, patch)
    return apart.transpose(0, 3, 1, 4, 2, 5).reshape(batch, -1, height * patch, width * patch)


def _as_tokens(maps: np.ndarray, patch: int) -> np.ndarray:
    """Undo `_as_map`."""
    batch, depth, height, width = maps.shape
    apart = maps.reshape(batch, depth, height // patch, patch, width // patch, patch)
    return apart.transpose(0, 2, 4, 1, 3, 5).reshape(batch, height // patch, width // patch, -1)
