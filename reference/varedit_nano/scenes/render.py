"""Render scenes to pictures, and bound where each thing may be in them."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import skia

from varedit_nano.scenes.backgrounds import BACKGROUNDS
from varedit_nano.scenes.brush import Brush
from varedit_nano.scenes.figures import draw_figure
from varedit_nano.scenes.objects import OBJECTS
from varedit_nano.scenes.scene import Background, Item, Look, Scene
from varedit_nano.scenes.styles import apply_style

Bounds = tuple[float, float, float, float]
"""Left, top, right, bottom in pictures."""

COLUMNS = {"left": 0.17, "right": 0.83, "top left": 0.17, "top right": 0.83}
AIR, FAR, NEAR = 0.2, 0.83, 0.93
"""y of airborne objects' centres, and of the feet of objects behind and in front of the figure."""

MARGIN = 0.02
"""Margin around a thing's shape for outlines and antialiasing."""


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


def changed_bounds(before: Scene, after: Scene) -> list[Bounds]:
    """Return rectangles that contain every pixel in which the two pictures can differ."""
    if _whole(before) != _whole(after):
        return [(0.0, 0.0, 1.0, 1.0)]
    changed = [_item_bounds(item) for item in set(before.items) ^ set(after.items)]
    if before.figure != after.figure:
        for figure in (before.figure, after.figure):
            if figure:
                half = 0.47 * figure.height * figure.girth
                top = figure.base - 1.25 * figure.height
                changed.append((figure.x - half, top, figure.x + half, figure.base + 0.1))
    return changed


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


def _whole(scene: Scene) -> tuple[Background, Look, str]:
    """Return what every pixel of the picture depends on."""
    return scene.background, scene.look, scene.style


def _draw_item(brush: Brush, item: Item) -> None:
    kind = OBJECTS[item.kind]
    with brush.placed(*_position(item), kind.size * item.scale):
        kind.draw(brush, item.tint.rgb)


def _position(item: Item) -> tuple[float, float]:
    kind = OBJECTS[item.kind]
    y = AIR if kind.airborne else NEAR if kind.front else FAR
    return COLUMNS[item.slot] + item.dx, y + item.dy


def _item_bounds(item: Item) -> Bounds:
    kind = OBJECTS[item.kind]
    x, y = _position(item)
    height = kind.size * item.scale
    half = kind.half_width * height + MARGIN
    up, down = (0.5, 0.5) if kind.airborne else (1.16, 0.22)
    return x - half, y - up * height - MARGIN, x + half, y + down * height + MARGIN
