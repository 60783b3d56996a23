"""Render scenes to pictures."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import skia

from varedit_nano.scenes.backgrounds import BACKGROUNDS
from varedit_nano.scenes.brush import Brush
from varedit_nano.scenes.figures import draw_figure
from varedit_nano.scenes.objects import OBJECTS
from varedit_nano.scenes.scene import Item, Scene
from varedit_nano.scenes.styles import apply_style

COLUMNS = {"left": 0.17, "right": 0.83, "top left": 0.17, "top right": 0.83}
AIR, FAR, NEAR = 0.2, 0.83, 0.93
"""y of airborne objects' centres, and of the feet of objects behind and in front of the figure."""


def draw_scene(scene: Scene, size: int) -> np.ndarray:
    """Draw a scene's picture, uint8 [size, size, 3]."""
    return _finish(_draw_things(_draw_background(scene, size), scene), scene)


def draw_pair(before: Scene, after: Scene, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw both scenes' pictures; what they share is drawn only once."""
    if (before.background, before.look) != (after.background, after.look):
        return draw_scene(before, size), draw_scene(after, size)
    backdrop = _draw_background(before, size)
    source = _draw_things(backdrop.copy(), before)
    same = (before.figure, before.items) == (after.figure, after.items)
    target = source if same else _draw_things(backdrop, after)
    return _finish(source, before), _finish(target, after)


def _draw_background(scene: Scene, size: int) -> np.ndarray:
    """Draw the background, RGBA uint8 [size, size, 4]."""
    pixels = np.zeros((size, size, 4), np.uint8)
    with _brush(pixels, scene) as brush:
        background = scene.background
        BACKGROUNDS[background.kind](brush, background.horizon, background.variation)
    return pixels


def _draw_things(pixels: np.ndarray, scene: Scene) -> np.ndarray:
    """Draw figure and objects into the pixels."""
    with _brush(pixels, scene) as brush:
        for item in scene.items:
            if not OBJECTS[item.kind].front:
                _draw_item(brush, item)
        if scene.figure:
            draw_figure(brush, scene.figure)
        for item in scene.items:
            if OBJECTS[item.kind].front:
                _draw_item(brush, item)
    return pixels


def _finish(pixels: np.ndarray, scene: Scene) -> np.ndarray:
    return apply_style(np.ascontiguousarray(pixels[..., :3]), scene.style)


@contextmanager
def _brush(pixels: np.ndarray, scene: Scene) -> Iterator[Brush]:
    """Give a brush whose unit of length is the picture's side."""
    with skia.Surface(pixels, colorType=skia.kRGBA_8888_ColorType) as canvas:
        canvas.scale(len(pixels), len(pixels))
        yield Brush(canvas, scene.look)


def _draw_item(brush: Brush, item: Item) -> None:
    kind = OBJECTS[item.kind]
    with brush.placed(*position(item), kind.size * item.scale):
        kind.draw(brush, item.tint.rgb)


def position(item: Item) -> tuple[float, float]:
    """Return where an object's origin is, in pictures."""
    kind = OBJECTS[item.kind]
    y = AIR if kind.airborne else NEAR if kind.front else FAR
    return COLUMNS[item.slot] + item.dx, y + item.dy
