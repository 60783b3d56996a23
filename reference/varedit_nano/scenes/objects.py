"""The objects: one drawing function and one line in `OBJECTS` each.

A ground object stands on the origin and reaches up to y = -1; an airborne one is centred on the
origin and reaches from -0.5 to 0.5.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from varedit_nano.scenes.brush import Brush
from varedit_nano.scenes.palette import COLOURS, WHITE, Rgb, darker, lighter

WOOD: Rgb = (0.47, 0.31, 0.20)
STALK: Rgb = (0.25, 0.55, 0.24)
DARK: Rgb = (0.20, 0.20, 0.24)
GLASS: Rgb = (0.72, 0.89, 0.97)
CREAM: Rgb = (0.97, 0.93, 0.84)
DOME = tuple(math.pi * step / 16 for step in range(17))


@dataclass(frozen=True)
class ObjectKind:
    """A kind of object.

    colour: used if the instruction names none. size: height in pictures. front: whether it stands
    in front of the figure.
    """

    draw: Callable[[Brush, Rgb], None]
    colour: str
    size: float
    airborne: bool = False
    front: bool = False


def ball(brush: Brush, colour: Rgb) -> None:
    brush.shadow(0.5)
    brush.ellipse(0, -0.5, 0.5, 0.5, colour)
    brush.line([(-0.42, -0.36), (0, -0.1), (0.42, -0.36)], 0.13, WHITE)
    brush.dot(-0.16, -0.74, 0.13, 0.09, WHITE, 0.7)


def tree(brush: Brush, colour: Rgb) -> None:
    brush.shadow(0.3)
    brush.box(-0.08, -0.45, 0.08, 0, WOOD, 0.03)
    brush.ellipse(-0.2, -0.5, 0.19, 0.18, darker(colour, 0.12))
    brush.ellipse(0.2, -0.5, 0.19, 0.18, darker(colour, 0.12))
    brush.ellipse(0, -0.68, 0.3, 0.31, colour)
    brush.dot(-0.1, -0.8, 0.09, 0.06, lighter(colour, 0.4), 0.6)


def flower(brush: Brush, colour: Rgb) -> None:
    brush.shadow(0.2)
    brush.limb([(0, -0.6), (0.03, 0)], 0.08, STALK)
    brush.ellipse(-0.14, -0.16, 0.15, 0.07, STALK)
    brush.ellipse(0.18, -0.24, 0.15, 0.07, STALK)
    for petal in range(6):
        angle = math.pi * petal / 3
        brush.ellipse(0.2 * math.sin(angle), -0.68 - 0.2 * math.cos(angle), 0.13, 0.13, colour)
    centre = "brown" if colour[0] > 0.9 and 0.7 < colour[1] < 0.9 else "yellow"
    brush.ellipse(0, -0.68, 0.12, 0.12, COLOURS[centre])


def house(brush: Brush, colour: Rgb) -> None:
    brush.shadow(0.52)
    brush.box(-0.42, -0.58, 0.42, 0, colour)
    brush.polygon([(-0.54, -0.55), (0, -1), (0.54, -0.55)], darker(colour, 0.45))
    brush.box(-0.1, -0.34, 0.12, 0, WOOD, 0.03)
    brush.box(-0.35, -0.42, -0.16, -0.24, GLASS)
    brush.box(0.18, -0.42, 0.36, -0.24, GLASS)


def car(brush: Brush, colour: Rgb) -> None:
    brush.shadow(1.0)
    brush.polygon([(-0.55, -0.55), (-0.36, -1), (0.3, -1), (0.58, -0.55)], colour)
    brush.box(-0.98, -0.62, 0.98, -0.18, colour, 0.16)
    brush.patch([(-0.42, -0.6), (-0.29, -0.9), (-0.06, -0.9), (-0.06, -0.6)], GLASS)
    brush.patch([(0.06, -0.6), (0.06, -0.9), (0.25, -0.9), (0.42, -0.6)], GLASS)
    for x in (-0.54, 0.54):
        brush.ellipse(x, -0.2, 0.22, 0.22, DARK)
        brush.dot(x, -0.2, 0.1, 0.1, (0.8, 0.8, 0.82))
    brush.dot(0.88, -0.46, 0.08, 0.08, COLOURS["yellow"])


def mushroom(brush: Brush, colour: Rgb) -> None:
    brush.shadow(0.32)
    brush.box(-0.17, -0.52, 0.17, 0, CREAM, 0.12)
    cap = [(-0.56, -0.36), (-0.5, -1.02), (0, -1.1), (0.5, -1.02), (0.56, -0.36), (0, -0.44)]
    brush.blob(cap, colour)
    spots = lighter(colour, 0.82) if sum(colour) < 2.6 else COLOURS["red"]
    for x, y, radius in ((-0.24, -0.62, 0.09), (0.04, -0.82, 0.1), (0.26, -0.58, 0.08)):
        brush.dot(x, y, radius, radius, spots)


def box(brush: Brush, colour: Rgb) -> None:
    brush.shadow(0.62)
    ribbon = WHITE if sum(colour) < 2.4 else COLOURS["red"]
    brush.box(-0.5, -0.72, 0.5, 0, colour, 0.04)
    brush.box(-0.56, -0.84, 0.56, -0.6, lighter(colour, 0.15), 0.04)
    brush.patch([(-0.09, -0.84), (0.09, -0.84), (0.09, 0), (-0.09, 0)], ribbon)
    brush.ellipse(-0.15, -0.91, 0.14, 0.08, ribbon)
    brush.ellipse(0.15, -0.91, 0.14, 0.08, ribbon)


def umbrella(brush: Brush, colour: Rgb) -> None:
    brush.shadow(0.24)
    brush.limb([(0, -0.8), (0, 0)], 0.06, WOOD)
    pale = lighter(colour, 0.65) if sum(colour) < 2.4 else COLOURS["grey"]
    rim = [(0.25 * tip, -0.56 - 0.05 * (tip % 2)) for tip in (-2, -1, 0, 1, 2)]
    dome = [(0.5 * math.cos(angle), -0.56 - 0.42 * math.sin(angle)) for angle in DOME]
    brush.polygon([*rim, *dome[1:-1]], colour)
    for left, right in ((rim[0], rim[1]), (rim[2], rim[3])):
        brush.patch([(0, -0.97), left, right], pale)


def lamp(brush: Brush, colour: Rgb) -> None:
    brush.shadow(0.22)
    brush.glow(0, -0.8, 0.44, 0.36, (1.0, 0.95, 0.7), 0.55)
    brush.limb([(0, -0.65), (0, -0.03)], 0.07, DARK)
    brush.box(-0.2, -0.08, 0.2, 0, DARK, 0.03)
    brush.polygon([(-0.17, -0.98), (0.17, -0.98), (0.31, -0.6), (-0.31, -0.6)], colour)


def balloon(brush: Brush, colour: Rgb) -> None:
    brush.line([(0, 0.16), (-0.08, 0.32), (0.03, 0.48)], 0.045, (0.42, 0.42, 0.45))
    brush.polygon([(0, 0.12), (-0.07, 0.23), (0.07, 0.23)], darker(colour, 0.2))
    brush.ellipse(0, -0.16, 0.28, 0.33, colour)
    brush.dot(-0.1, -0.29, 0.06, 0.09, WHITE, 0.7)


def star(brush: Brush, colour: Rgb) -> None:
    points = []
    for corner in range(10):
        radius, angle = (0.5, 0.24)[corner % 2], math.pi * corner / 5
        points.append((radius * math.sin(angle), -radius * math.cos(angle)))
    brush.polygon(points, colour)


def kite(brush: Brush, colour: Rgb) -> None:
    brush.line([(0, 0.25), (0.2, 0.36), (0.05, 0.49)], 0.05, (0.42, 0.42, 0.45))
    brush.polygon([(0, -0.5), (0.33, -0.12), (0, 0.3), (-0.33, -0.12)], colour)
    pale = lighter(colour, 0.6) if sum(colour) < 2.4 else COLOURS["grey"]
    brush.patch([(0, -0.44), (0.27, -0.12), (0, -0.12)], pale)
    brush.patch([(0, 0.23), (-0.27, -0.12), (0, -0.12)], pale)


def cloud(brush: Brush, colour: Rgb) -> None:
    brush.ellipse(-0.42, 0.12, 0.3, 0.26, colour)
    brush.ellipse(0.42, 0.12, 0.3, 0.26, colour)
    brush.ellipse(0.02, 0.0, 0.4, 0.4, colour)


OBJECTS: dict[str, ObjectKind] = {
    "ball": ObjectKind(ball, "red", 0.21, front=True),
    "tree": ObjectKind(tree, "green", 0.46),
    "flower": ObjectKind(flower, "pink", 0.31, front=True),
    "house": ObjectKind(house, "orange", 0.33),
    "car": ObjectKind(car, "blue", 0.165, front=True),
    "mushroom": ObjectKind(mushroom, "red", 0.24, front=True),
    "box": ObjectKind(box, "brown", 0.22, front=True),
    "umbrella": ObjectKind(umbrella, "purple", 0.36),
    "lamp": ObjectKind(lamp, "yellow", 0.42),
    "balloon": ObjectKind(balloon, "red", 0.29, airborne=True),
    "star": ObjectKind(star, "yellow", 0.22, airborne=True),
    "kite": ObjectKind(kite, "orange", 0.29, airborne=True),
    "cloud": ObjectKind(cloud, "white", 0.17, airborne=True),
}
