"""What figures wear: one drawing function and one line in `WEARABLES` each.

Each is drawn where it sits (head, eyes or neck) with the radius of the head as the unit.
"""

from collections.abc import Callable
from dataclasses import dataclass

from varedit_nano.scenes.brush import Brush
from varedit_nano.scenes.palette import COLOURS, WHITE, Rgb, darker, lighter


@dataclass(frozen=True)
class WearableKind:
    draw: Callable[[Brush, Rgb], None]
    place: str
    colour: str


def hat(brush: Brush, colour: Rgb) -> None:
    brush.box(-0.74, -1.62, 0.74, -0.62, colour, 0.16)
    brush.patch([(-0.73, -0.98), (0.73, -0.98), (0.73, -0.74), (-0.73, -0.74)], darker(colour, 0.5))
    brush.box(-1.2, -0.78, 1.2, -0.52, colour, 0.12)


def cap(brush: Brush, colour: Rgb) -> None:
    dome = [(-1.1, -0.5), (-1.0, -1.25), (-0.3, -1.5), (0.5, -1.5), (1.05, -1.1), (1.0, -0.5)]
    brush.blob(dome, colour)
    brush.box(-1.5, -0.74, 0.2, -0.5, darker(colour, 0.25), 0.12)


def crown(brush: Brush, colour: Rgb) -> None:
    points = [(-0.8, -0.6), (-0.92, -1.5), (-0.42, -1.1), (0, -1.62), (0.42, -1.1), (0.92, -1.5)]
    brush.polygon([*points, (0.8, -0.6)], colour)
    jewel = COLOURS["red"] if colour[0] < 0.9 or colour[1] > 0.5 else WHITE
    for x in (-0.45, 0.0, 0.45):
        brush.dot(x, -0.82, 0.12, 0.12, jewel)


def party_hat(brush: Brush, colour: Rgb) -> None:
    pale = lighter(colour, 0.7) if sum(colour) < 2.4 else COLOURS["grey"]
    brush.polygon([(-0.68, -0.66), (0, -1.95), (0.68, -0.66)], colour)
    brush.patch([(-0.34, -1.3), (0.34, -1.3), (0.48, -1.02), (-0.48, -1.02)], pale)
    brush.ellipse(0, -1.92, 0.2, 0.2, pale)


def glasses(brush: Brush, colour: Rgb) -> None:
    for x in (-0.42, 0.42):
        brush.dot(x, 0, 0.37, 0.35, colour)
        brush.dot(x, 0, 0.25, 0.23, (0.78, 0.92, 0.98))
    brush.line([(-0.1, -0.04), (0.1, -0.04)], 0.14, colour)


def scarf(brush: Brush, colour: Rgb) -> None:
    brush.box(0.12, 0.1, 0.52, 1.05, darker(colour, 0.15), 0.1)
    brush.box(-0.82, -0.24, 0.82, 0.24, colour, 0.22)


def bow_tie(brush: Brush, colour: Rgb) -> None:
    brush.polygon([(0, 0.08), (-0.68, -0.26), (-0.68, 0.42)], colour)
    brush.polygon([(0, 0.08), (0.68, -0.26), (0.68, 0.42)], colour)
    brush.ellipse(0, 0.08, 0.17, 0.19, darker(colour, 0.25))


WEARABLES: dict[str, WearableKind] = {
    "hat": WearableKind(hat, "head", "red"),
    "cap": WearableKind(cap, "head", "blue"),
    "crown": WearableKind(crown, "head", "yellow"),
    "party hat": WearableKind(party_hat, "head", "purple"),
    "glasses": WearableKind(glasses, "eyes", "black"),
    "scarf": WearableKind(scarf, "neck", "green"),
    "bow tie": WearableKind(bow_tie, "neck", "red"),
}
