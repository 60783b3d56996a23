"""Warn of edits that can be made, but will hardly be what is wanted."""

from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from varedit_runtime.manifest import Model
from varedit_runtime.pictures import canvas_size, pad_and_resize
from varedit_runtime.text import Instructions

# Drawings have areas of one colour or of a smooth shade; photographs have texture nearly
# everywhere. So the share of the pixels around which little changes tells them apart, at the size
# at which nano sees them, where noise and compression of larger pictures are averaged out.
# Of 500 of nano's scenes none is taken for a photograph as PNG, JPEG of quality 95, WebP, cropped,
# or at 200 to 1024 px, there also as JPEG of quality 20; at 64 px 0.2 % are, and of JPEGs of 128 px
# and quality 75, 50, 25 and 10 it is 0.8, 3, 6 and 12 %. Of 23 photographs 14 are recognised: those
# with large areas of sky, of dark, or out of focus are not.
SIDE = 128
WINDOW, MOST_CHANGE = 7, 24  # pixels along a side of a neighbourhood; levels between its extremes
STEPS = (1, 2, 3)  # by which windows of 1, 2 and 4 pixels grow, to WINDOW
LEAST_CALM = 0.3


def warnings_of(
    model: Model,
    instructions: Instructions,
    text: str,
    picture: Image.Image,
    guidance_scale: Sequence[float],
) -> Iterator[str]:
    """Yield what speaks against an edit of a picture, as `open_picture` returns it: a line each.

    guidance_scale: of every scale.
    """
    if model.random:
        yield (
            "the bundle's weights are random, so the result is noise: use a bundle that was built "
            "from checkpoints"
        )
    if min(guidance_scale) < 0:
        yield ("guidance_scale is below 0, which leads away from the instruction: give 1 or more")
    if instructions.mostly_unknown(text):
        yield (
            "most of the instruction is in characters that the model's tokenizer does not know: "
            "word it in English"
        )
    if model.trained_on == "drawn scenes" and looks_photographed(picture):
        yield (
            "the picture looks like a photograph, and the model was trained on drawn scenes alone: "
            "photographs need a bundle of the published weights"
        )


def looks_photographed(picture: Image.Image) -> bool:
    """Return whether a picture, RGB or RGBA, has texture nearly everywhere, as photographs have."""
    canvas = canvas_size(picture.size, (SIDE, SIDE))
    width, height = (
        max(1, SIDE * side // whole) for side, whole in zip(picture.size, canvas, strict=True)
    )
    small = np.asarray(pad_and_resize(picture, (SIDE, SIDE)).crop((0, 0, width, height)))
    change = _around(small, np.maximum) - _around(small, np.minimum)
    most = np.maximum(np.maximum(change[..., 0], change[..., 1]), change[..., 2])
    return (most <= MOST_CHANGE).mean() < LEAST_CALM


def _around(pixels: np.ndarray, extreme: np.ufunc) -> np.ndarray:
    """Return the extremes of each pixel's neighbourhood, which ends at the picture's border.

    They are those of neighbourhoods that grow: of 2, 4 and then 7 pixels.
    """
    for axis in (0, 1):
        reach = [(WINDOW // 2,) * 2 if side == axis else (0, 0) for side in range(3)]
        padded = np.moveaxis(np.pad(pixels, reach, mode="edge"), axis, 0)
        for step in STEPS:
            padded = extreme(padded[:-step], padded[step:])
        pixels = np.moveaxis(padded, 0, axis)
    return pixels
