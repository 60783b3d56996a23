"""From the model's pixels to the picture that an edit returns: its size, its alpha, its mask."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from varedit_runtime.decoding.limits import pieces
from varedit_runtime.editing.masks import feather_width, put_back, resized
from varedit_runtime.grids import Grid
from varedit_runtime.pictures import restore


@dataclass(frozen=True, eq=False)
class Finish:
    """What a result takes from its source and its mask.

    size: the result's (width, height), which the pictures here have. source: where there is a mask,
    the picture; without one its alpha alone, mode L, or None if it is opaque.
    """

    size: tuple[int, int]
    source: Image.Image | None
    mask: Image.Image | None

    @classmethod
    def of(cls, picture: Image.Image, mask: Image.Image | None, size: tuple[int, int]) -> "Finish":
        """Keep what a result of this size takes. mask: of the picture's size."""
        if mask is None and picture.mode == "RGB":
            return cls(size, None, None)
        if picture.size != size:
            picture = picture.resize(size, Image.Resampling.LANCZOS)
        if mask is None:
            return cls(size, picture.getchannel("A"), None)
        return cls(size, picture, resized(mask, size))

    def finished(self, pixels: np.ndarray, finest: Grid) -> Image.Image:
        """Return the result. pixels: what the model drew, 8-bit RGB [H, W, 3].

        finest: the grid of the last scale.
        """
        edited, source = restore(pixels, self.size), self.source
        if source is None:
            return edited
        if source.mode != "RGB":
            alpha = source if source.mode == "L" else source.getchannel("A")
            edited = with_alpha(edited, alpha)
        if self.mask is None:
            return edited
        return put_back(source, edited, self.mask, feather_width(self.size, finest))


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
