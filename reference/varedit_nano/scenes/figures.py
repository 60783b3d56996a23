"""The figures: one drawing function and one line in `FIGURES` each.

A figure stands on the origin and its height is the unit, so its head is near y = -0.7.
"""

from collections.abc import Callable
from dataclasses import dataclass

from varedit_nano.scenes.brush import Brush
from varedit_nano.scenes.palette import INK, WHITE, Rgb, darker, lighter
from varedit_nano.scenes.scene import Figure
from varedit_nano.scenes.wearables import WEARABLES

PINK: Rgb = (0.95, 0.58, 0.62)
ORANGE: Rgb = (0.97, 0.62, 0.15)
SHOE: Rgb = (0.28, 0.22, 0.22)


@dataclass(frozen=True)
class FigureKind:
    """A kind of figure.

    parts: each part's colours; the first is used if the instruction names none. places: position
    (y) and size (unit) of wearables.
    """

    draw: Callable[[Brush, Figure], None]
    parts: dict[str, tuple[str, ...]]
    places: dict[str, tuple[float, float]]


def draw_figure(brush: Brush, figure: Figure) -> None:
    kind = FIGURES[figure.kind]
    with brush.placed(figure.x, figure.base, figure.height, figure.girth):
        brush.shadow(0.34)
        kind.draw(brush, figure)
        for worn in figure.worn:
            wearable = WEARABLES[worn.kind]
            y, unit = kind.places[wearable.place]
            with brush.placed(0, y, unit):
                wearable.draw(brush, worn.tint.rgb)


def boy(brush: Brush, figure: Figure) -> None:
    shirt, trousers = figure.part("shirt").rgb, figure.part("trousers").rgb
    for side in (-1, 1):
        brush.limb([(0.08 * side, -0.25), (0.09 * side, -0.06)], 0.13, trousers)
        brush.ellipse(0.105 * side, -0.035, 0.085, 0.045, SHOE)
    _arms(brush, figure, shirt)
    brush.box(-0.165, -0.53, 0.165, -0.2, shirt, 0.08)
    brush.ellipse(0, -0.74, 0.215, 0.22, figure.skin)
    hair = figure.part("hair").rgb
    fringe = [(-0.28, -0.66), (-0.27, -1.02), (0.0, -1.06), (0.27, -1.02), (0.28, -0.66)]
    brush.blob([*fringe, (0.14, -0.86), (-0.1, -0.84)], hair)
    _face(brush, figure, -0.72)


def girl(brush: Brush, figure: Figure) -> None:
    hair, dress = figure.part("hair").rgb, figure.part("dress").rgb
    brush.box(-0.265, -0.97, 0.265, -0.42, hair, 0.2)
    for side in (-1, 1):
        brush.limb([(0.07 * side, -0.2), (0.075 * side, -0.06)], 0.085, figure.skin)
        brush.ellipse(0.09 * side, -0.035, 0.075, 0.045, SHOE)
    _arms(brush, figure, figure.skin)
    brush.polygon([(-0.12, -0.54), (0.12, -0.54), (0.25, -0.14), (-0.25, -0.14)], dress)
    brush.ellipse(0, -0.74, 0.21, 0.215, figure.skin)
    fringe = [(-0.27, -0.68), (-0.25, -1.02), (0.0, -1.05), (0.25, -1.02), (0.27, -0.68)]
    brush.blob([*fringe, (0.12, -0.92), (-0.02, -0.88), (-0.12, -0.92)], hair)
    _face(brush, figure, -0.72)


def cat(brush: Brush, figure: Figure) -> None:
    fur = figure.part("fur").rgb
    brush.limb([(0.16, -0.1), (0.45, -0.12), (0.33, -0.38 - 0.1 * figure.pose)], 0.09, fur)
    _body(brush, fur)
    for side in (-1, 1):
        brush.polygon([(0.27 * side, -0.98), (0.25 * side, -0.68), (0.04 * side, -0.84)], fur)
        brush.patch([(0.23 * side, -0.91), (0.21 * side, -0.76), (0.11 * side, -0.83)], PINK)
    brush.ellipse(0, -0.67, 0.27, 0.225, fur)
    _eyes(brush, figure, -0.69)
    brush.patch([(-0.035, -0.62), (0.035, -0.62), (0, -0.58)], PINK)
    whisker = lighter(fur, 0.6) if sum(fur) < 1.4 else darker(fur, 0.55)
    for side in (-1, 1):
        brush.line([(0.1 * side, -0.59), (0.24 * side, -0.61)], 0.018, whisker)
        brush.line([(0.1 * side, -0.56), (0.23 * side, -0.53)], 0.018, whisker)


def dog(brush: Brush, figure: Figure) -> None:
    fur = figure.part("fur").rgb
    brush.limb([(0.18, -0.12), (0.33, -0.2), (0.34, -0.3 - 0.12 * figure.pose)], 0.08, fur)
    _body(brush, fur)
    brush.ellipse(0, -0.67, 0.25, 0.24, fur)
    for side in (-1, 1):
        brush.ellipse(0.255 * side, -0.66, 0.08, 0.18, darker(fur, 0.42))
    brush.dot(0, -0.565, 0.13, 0.105, lighter(fur, 0.6))
    _eyes(brush, figure, -0.7)
    brush.dot(0, -0.61, 0.055, 0.042, INK)
    brush.dot(0, -0.51, 0.035, 0.05, PINK)


def rabbit(brush: Brush, figure: Figure) -> None:
    fur = figure.part("fur").rgb
    brush.ellipse(0.24, -0.14, 0.08, 0.08, lighter(fur, 0.4))
    _body(brush, fur)
    for side in (-1, 1):
        tip = 0.15 * side + 0.06 * (figure.pose - 0.5)
        brush.limb([(0.1 * side, -0.76), (tip, -1.02)], 0.13, fur)
        brush.line([(0.1 * side, -0.8), (tip, -1.02)], 0.055, PINK)
    brush.ellipse(0, -0.63, 0.235, 0.215, fur)
    _eyes(brush, figure, -0.66)
    brush.dot(0, -0.58, 0.03, 0.024, PINK)
    brush.patch([(-0.035, -0.53), (0.035, -0.53), (0.03, -0.46), (-0.03, -0.46)], WHITE)


def bear(brush: Brush, figure: Figure) -> None:
    fur = figure.part("fur").rgb
    for side in (-1, 1):
        brush.limb([(0.18 * side, -0.38), (0.29 * side, -0.24 - 0.16 * figure.pose)], 0.12, fur)
    _body(brush, fur)
    for side in (-1, 1):
        brush.ellipse(0.2 * side, -0.87, 0.095, 0.095, fur)
        brush.dot(0.2 * side, -0.87, 0.05, 0.05, lighter(fur, 0.45))
    brush.ellipse(0, -0.68, 0.265, 0.24, fur)
    brush.dot(0, -0.59, 0.12, 0.095, lighter(fur, 0.5))
    _eyes(brush, figure, -0.71)
    brush.dot(0, -0.63, 0.05, 0.038, INK)
    brush.line([(-0.045, -0.56), (0, -0.53), (0.045, -0.56)], 0.022, INK)


def penguin(brush: Brush, figure: Figure) -> None:
    fur = figure.part("fur").rgb
    for side in (-1, 1):
        brush.ellipse(0.12 * side, -0.035, 0.1, 0.045, ORANGE)
        wing = 0.3 + 0.06 * figure.pose
        brush.limb([(0.2 * side, -0.5), (wing * side, -0.24 - 0.1 * figure.pose)], 0.1, fur)
    shape = [(-0.3, -0.02), (-0.3, -0.6), (-0.22, -1.02), (0.22, -1.02), (0.3, -0.6), (0.3, -0.02)]
    brush.blob(shape, fur)
    brush.dot(0, -0.27, 0.175, 0.23, WHITE)
    brush.dot(-0.085, -0.7, 0.105, 0.13, WHITE)
    brush.dot(0.085, -0.7, 0.105, 0.13, WHITE)
    _eyes(brush, figure, -0.72)
    brush.patch([(-0.07, -0.65), (0.07, -0.65), (0, -0.56)], ORANGE)


def frog(brush: Brush, figure: Figure) -> None:
    skin = figure.part("skin").rgb
    for side in (-1, 1):
        brush.ellipse(0.22 * side, -0.12, 0.13, 0.12, darker(skin, 0.15))
    _body(brush, skin)
    brush.ellipse(0, -0.64, 0.29, 0.2, skin)
    for side in (-1, 1):
        brush.ellipse(0.15 * side, -0.8, 0.1, 0.1, skin)
    _eyes(brush, figure, -0.8, 0.15, 1.25)
    brush.line([(-0.16, -0.6), (0, -0.5), (0.16, -0.6)], 0.026, INK)


def _arms(brush: Brush, figure: Figure, sleeve: Rgb) -> None:
    """Draw two arms; the pose may raise the right one."""
    for side, lift in ((-1, 0.1), (1, figure.pose)):
        hand = (0.27 * side, -0.26 - 0.34 * lift)
        brush.limb([(0.13 * side, -0.46), (0.24 * side, -0.4), hand], 0.095, sleeve)
        brush.dot(*hand, 0.052, 0.052, figure.skin)


def _body(brush: Brush, fur: Rgb) -> None:
    """Draw a sitting animal's body, feet and pale belly."""
    brush.ellipse(0, -0.27, 0.225, 0.27, fur)
    brush.dot(0, -0.23, 0.125, 0.17, lighter(fur, 0.5))
    for side in (-1, 1):
        brush.ellipse(0.13 * side, -0.045, 0.1, 0.055, fur)


def _eyes(brush: Brush, figure: Figure, y: float, x: float = 0.1, size: float = 1.0) -> None:
    for side in (-1, 1):
        brush.dot(x * side, y, 0.055 * size, 0.06 * size, WHITE)
        brush.dot(x * side + 0.018 * figure.gaze, y + 0.005, 0.036 * size, 0.043 * size, INK)


def _face(brush: Brush, figure: Figure, y: float) -> None:
    _eyes(brush, figure, y, 0.09, 0.85)
    for side in (-1, 1):
        brush.dot(0.14 * side, y + 0.085, 0.04, 0.028, PINK, 0.6)
    brush.line([(-0.055, y + 0.1), (0, y + 0.145), (0.055, y + 0.1)], 0.024, darker(PINK, 0.5))


HAIRS = ("brown", "black", "yellow", "orange")
CLOTHES = ("blue", "red", "green", "yellow", "purple", "white", "orange", "pink")
PERSON = {"head": (-0.74, 0.22), "eyes": (-0.72, 0.22), "neck": (-0.5, 0.2)}

FIGURES: dict[str, FigureKind] = {
    "boy": FigureKind(
        boy, {"hair": HAIRS, "shirt": CLOTHES, "trousers": ("brown", "blue", "grey")}, PERSON
    ),
    "girl": FigureKind(girl, {"hair": HAIRS, "dress": ("red", *CLOTHES[2:], "blue")}, PERSON),
    "cat": FigureKind(
        cat,
        {"fur": ("orange", "grey", "black", "white")},
        {"head": (-0.68, 0.23), "eyes": (-0.69, 0.24), "neck": (-0.45, 0.22)},
    ),
    "dog": FigureKind(
        dog,
        {"fur": ("brown", "white", "orange", "grey")},
        {"head": (-0.68, 0.23), "eyes": (-0.7, 0.24), "neck": (-0.44, 0.22)},
    ),
    "rabbit": FigureKind(
        rabbit,
        {"fur": ("white", "grey", "brown")},
        {"head": (-0.63, 0.22), "eyes": (-0.66, 0.24), "neck": (-0.42, 0.22)},
    ),
    "bear": FigureKind(
        bear,
        {"fur": ("brown", "black", "white")},
        {"head": (-0.69, 0.24), "eyes": (-0.71, 0.24), "neck": (-0.45, 0.22)},
    ),
    "penguin": FigureKind(
        penguin,
        {"fur": ("black", "blue", "grey")},
        {"head": (-0.73, 0.22), "eyes": (-0.72, 0.22), "neck": (-0.49, 0.24)},
    ),
    "frog": FigureKind(
        frog,
        {"skin": ("green", "yellow", "blue")},
        {"head": (-0.77, 0.22), "eyes": (-0.8, 0.34), "neck": (-0.43, 0.22)},
    ),
}
