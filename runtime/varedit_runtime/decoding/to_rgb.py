"""Convert decoded pictures to upright 8-bit sRGB with or without alpha, or to masks.

Works piece by piece, which takes little memory beside the picture.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from io import BytesIO

import numpy as np
from PIL import Image, ImageCms

from varedit_runtime.decoding.limits import Limits, picture_memory, pieces
from varedit_runtime.errors import PictureError

WHITE = (255, 255, 255)

MORE = [0] * 128 + [255] * 128  # a table for Image.point: 255 for levels from 128 on, else 0

# How a picture with this EXIF orientation is turned upright; 1 is upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def to_rgb(image: Image.Image, orientation: int, limits: Limits, reuse: bool) -> Image.Image:
    """Convert a decoded picture as `pictures.open_picture` says.

    orientation: as in EXIF. reuse: whether the picture is no one else's and may be overwritten.

    Raises PictureError if its samples are not finite, or this takes more memory than allowed.
    """
    turn = _TURNS.get(orientation)
    memory = picture_memory(image.size)
    width, height = image.size
    upright = (height, width) if orientation > 4 else (width, height)
    turned = picture_memory(upright) if turn is not None else 0
    if reuse and image.mode == "RGB" and not image.has_transparency_data:
        limits.check_memory(memory + turned)
        converted = _overwritten(image)
    else:
        own = picture_memory(image.size, image.mode) if reuse else 0
        limits.check_memory(memory + own + turned)
        converted = _converted(image)
    return converted if turn is None else converted.transpose(turn)


def to_rgba(image: Image.Image) -> Image.Image:
    """Convert a picture with transparent pixels to RGBA."""
    return (image.convert("LA") if image.mode == "La" else image).convert("RGBA")


def on_white(image: Image.Image) -> Image.Image:
    """Composite an RGB or RGBA picture on white; an RGB picture is returned as it is."""
    if image.mode == "RGB":
        return image
    white = Image.new("RGB", image.size, WHITE)
    white.paste(image, mask=image)
    return white


def to_mask(image: Image.Image, orientation: int, limits: Limits, reuse: bool) -> Image.Image:
    """Convert a decoded picture as `pictures.open_mask` says. Arguments and errors: as of `to_rgb`.

    If a mask has transparent pixels, these are what is marked, and its colours do not count.
    """
    limits.check_memory(picture_memory(image.size) + 2 * picture_memory(image.size, "L"))
    if not image.has_transparency_data:
        return _white(image, orientation, limits, reuse)
    eight_bit, hole = _eight_bit(image), Image.new("L", image.size)
    for box in pieces(image.size):
        _, alpha = _split_alpha(eight_bit(image.crop(box)))
        if alpha is not None:
            hole.paste(alpha.point(MORE[::-1]), box[:2])
    if hole.getbbox() is None:
        return _white(image, orientation, limits, reuse)
    turn = _TURNS.get(orientation)
    return hole if turn is None else hole.transpose(turn)


def _white(image: Image.Image, orientation: int, limits: Limits, reuse: bool) -> Image.Image:
    """Return 255 where a picture is more white than black, and 0 elsewhere.

    Samples of 32 bits that are all equal have no darkest and brightest: all but 0 are white.
    """
    upright = to_rgb(image, orientation, limits, reuse)
    white = Image.new("L", upright.size)
    for box in pieces(upright.size):
        white.paste(on_white(upright.crop(box)).convert("L").point(MORE), box[:2])
    if image.mode in ("I", "F"):
        darkest, brightest = _range(image)
        if darkest == brightest != 0:
            return Image.new("L", white.size, 255)
    return white


def _overwritten(image: Image.Image) -> Image.Image:
    """Convert an RGB picture where it is."""
    to_srgb = _srgb_transform(image.info.get("icc_profile"), "RGB")
    if to_srgb is not None:
        to_srgb.apply_in_place(image)
    plain = image._new(image.im)  # with no metadata but the information, and the same pixels
    plain.info.clear()
    return plain


def _converted(image: Image.Image) -> Image.Image:
    """Convert a picture to another one."""
    eight_bit = _eight_bit(image)
    transform = cache(partial(_srgb_transform, image.info.get("icc_profile")))
    converted = Image.new("RGBA" if _is_transparent(image, eight_bit) else "RGB", image.size)
    for box in pieces(image.size):
        colours, alpha = _split_alpha(eight_bit(image.crop(box)))
        if colours.mode not in ("L", "CMYK", "LAB"):
            colours = colours.convert("RGB")
        to_srgb = transform(colours.mode)
        rgb = to_srgb.apply(colours) if to_srgb else colours.convert("RGB")
        if converted.mode == "RGBA" and alpha is not None:
            rgb.putalpha(alpha)
        converted.paste(rgb, box[:2])
    return converted


def _is_transparent(image: Image.Image, eight_bit: Callable[[Image.Image], Image.Image]) -> bool:
    """Return whether any pixel is not wholly opaque."""
    if not image.has_transparency_data:
        return False
    alphas = (_split_alpha(eight_bit(image.crop(box)))[1] for box in pieces(image.size))
    return any(alpha is not None and alpha.getextrema()[0] != 255 for alpha in alphas)


def _eight_bit(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """Return what scales a piece's samples of 16 or 32 bits to 8 bits."""
    if image.mode.startswith("I;16"):
        return _from_16_bit
    if image.mode in ("I", "F"):
        return _stretch(image)
    return lambda piece: piece


def _from_16_bit(piece: Image.Image) -> Image.Image:
    samples = np.asarray(piece).astype(np.uint32)
    grey = Image.fromarray(((samples + 128) // 257).astype(np.uint8))
    if "transparency" not in piece.info:
        return grey
    opaque = Image.fromarray(samples != piece.info["transparency"])
    return Image.merge("LA", (grey, opaque.convert("L")))


def _range(image: Image.Image) -> tuple[float, float]:
    """Return a picture's darkest and brightest sample. Raises PictureError if one is not finite."""
    ends = [
        (float(samples.min()), float(samples.max()))
        for samples in (np.asarray(image.crop(box)) for box in pieces(image.size))
    ]
    if not all(math.isfinite(end) for pair in ends for end in pair):
        raise PictureError("it has samples that are not finite")
    return min(end[0] for end in ends), max(end[1] for end in ends)


def _stretch(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """Return what scales a piece's samples from the picture's darkest to its brightest."""
    darkest, brightest = _range(image)

    def stretched(piece: Image.Image) -> Image.Image:
        samples = np.asarray(piece).astype(np.float64)
        scaled = (samples - darkest) / ((brightest - darkest) or 1) * 255
        return Image.fromarray(scaled.round().astype(np.uint8))

    return stretched


def _split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Split off the 8-bit alpha channel, if there is one; a grey picture's colours stay grey."""
    if not image.has_transparency_data:
        return image, None
    rgba = to_rgba(image)
    colours = rgba.convert("L" if image.mode in ("L", "LA", "La") else "RGB")
    return colours, rgba.getchannel("A")


def _srgb_transform(profile: bytes | None, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return what converts a mode's colours to sRGB; None if Pillow's formulas are to do it."""
    srgb = ImageCms.createProfile("sRGB")
    if mode == "LAB":  # is absolute; Pillow would build this for every piece
        return ImageCms.buildTransform(ImageCms.createProfile("LAB"), srgb, "LAB", "RGB")
    if not profile:
        return None
    try:
        embedded = ImageCms.ImageCmsProfile(BytesIO(profile))
        return ImageCms.buildTransform(embedded, srgb, mode, "RGB")
    except (ImageCms.PyCMSError, OSError):
        return None
