"""From the model's pixels to the picture that an edit returns: its size, its alpha, its mask."""

import numpy as np
from PIL import Image

from varedit_runtime.decoding.limits import pieces
from varedit_runtime.editing.arguments import Wanted
from varedit_runtime.editing.masks import feather_width, put_back, resized
from varedit_runtime.grids import Grid
from varedit_runtime.pictures import restore


def finished(pixels: np.ndarray, one: Wanted, finest: Grid) -> Image.Image:
    """Return the result of an edit: of the size asked for, with its source's alpha, and masked.

    pixels: what the model drew, 8-bit RGB [H, W, 3]. finest: the grid of the last scale.
    """
    edited = restore(pixels, one.size)
    if one.mask is None and one.picture.mode == "RGB":
        return edited
    source = one.picture
    if source.size != one.size:
        source = source.resize(one.size, Image.Resampling.LANCZOS)
    if source.mode == "RGBA":
        edited = with_alpha(edited, source.getchannel("A"))
    if one.mask is None:
        return edited
    return put_back(source, edited, resized(one.mask, one.size), feather_width(one.size, finest))


def with_alpha(edited: Image.Image, alpha: Image.Image) -> Image.Image:
    """Return an RGB picture with alpha: on white it looks as before, wherever that is possible.

    The model sees its source on white, and draws so: an edge that is half transparent would have a
    white fringe on any other ground. So a colour that is seen as `white - (white - c) · alpha` is
    turned back into c. Under what is wholly transparent, colours stay as they were drawn.
    """
    result = Image.new("RGBA", edited.size)
    for box in pieces(edited.size):
        own = alpha.crop(box)
        opacity = np.asarray(own, np.float32)[..., None] / 255
        darkness = 255 - np.asarray(edited.crop(box), np.float32)
        colours = 255 - darkness / np.where(opacity, opacity, 1)
        piece = Image.fromarray(colours.clip(0, 255).round().astype(np.uint8))
        piece.putalpha(own)
        result.paste(piece, box[:2])
    return result
