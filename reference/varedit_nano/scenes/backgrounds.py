"""The backgrounds: one drawing function and one line in `BACKGROUNDS` each.

Each takes the height of its horizon and eight numbers in [0, 1] that vary it; a background that an
instruction asks for has 0.5 everywhere.
"""

from collections.abc import Callable

from varedit_nano.scenes.brush import Brush
from varedit_nano.scenes.palette import WHITE, Rgb, darker, lighter, mix, vary

VARIATIONS = 8
CANONICAL = (0.5,) * VARIATIONS

Variation = tuple[float, ...]

BLOCKS = ((0.0, 0.2, 0.6), (0.22, 0.17, 1.0), (0.41, 0.2, 0.8), (0.63, 0.16, 1.0), (0.81, 0.2, 0.6))
"""Left edge, width and share of the varied height of the city's buildings."""
BUBBLES = ((0.3, 0.12, 0.03), (0.35, 0.26, 0.02), (0.7, 0.4, 0.028), (0.66, 0.1, 0.02))


def meadow(brush: Brush, horizon: float, v: Variation) -> None:
    grass = vary((0.47, 0.74, 0.33), v[0], v[1])
    _sky(brush, horizon, vary((0.42, 0.70, 0.94), v[2], v[3]), (0.83, 0.94, 0.98))
    brush.dot(0.2 * v[4], horizon + 0.06, 0.45, 0.18, darker(grass, 0.16))
    brush.dot(0.8 + 0.2 * v[5], horizon + 0.06, 0.5, 0.14, darker(grass, 0.1))
    _ground(brush, horizon, lighter(grass, 0.12), darker(grass, 0.14))
    _mottle(brush, horizon, lighter(grass, 0.3), v)


def beach(brush: Brush, horizon: float, v: Variation) -> None:
    sand = vary((0.95, 0.85, 0.62), v[0], v[1])
    _sky(brush, horizon - 0.14, vary((0.36, 0.74, 0.95), v[2], v[3]), (0.86, 0.96, 0.99))
    brush.dot(0.3 + 0.4 * v[4], 0.15, 0.08, 0.08, (1.0, 0.95, 0.6))
    sea = vary((0.13, 0.55, 0.76), v[5], 0.5)
    brush.gradient(0, horizon - 0.14, 1, horizon + 0.06, sea, lighter(sea, 0.4))
    _ground(brush, horizon + 0.04, lighter(sand, 0.2), darker(sand, 0.1))
    brush.dot(0.5 * v[6], horizon + 0.05, 0.6, 0.03, WHITE, 0.8)
    _mottle(brush, horizon + 0.04, darker(sand, 0.15), v)


def night(brush: Brush, horizon: float, v: Variation) -> None:
    ground = vary((0.12, 0.22, 0.24), v[0], v[1])
    _sky(brush, horizon, (0.05, 0.06, 0.19), vary((0.20, 0.24, 0.47), v[2], v[3]))
    moon = 0.3 + 0.4 * v[4]
    brush.glow(moon, 0.14, 0.2, 0.2, (0.7, 0.75, 1.0), 0.35)
    brush.dot(moon, 0.14, 0.075, 0.075, (0.97, 0.96, 0.84))
    for x, y in ((0.06, 0.1), (0.2, 0.33), (0.4, 0.4), (0.66, 0.36), (0.78, 0.2), (0.94, 0.38)):
        brush.dot(x + 0.06 * (v[5] - 0.5), y, 0.013, 0.013, (1.0, 1.0, 0.85))
    brush.dot(0.2 + 0.2 * v[6], horizon + 0.05, 0.5, 0.13, darker(ground, 0.2))
    _ground(brush, horizon, lighter(ground, 0.08), darker(ground, 0.25))


def snow(brush: Brush, horizon: float, v: Variation) -> None:
    white = vary((0.93, 0.95, 0.98), v[0], v[1])
    _sky(brush, horizon, vary((0.60, 0.70, 0.82), v[2], v[3]), (0.83, 0.88, 0.93))
    brush.dot(0.25 * v[4], horizon + 0.04, 0.5, 0.14, (0.84, 0.89, 0.95))
    pine = (0.24, 0.42, 0.40)
    for x in (0.08 + 0.1 * v[5], 0.8 + 0.1 * v[6], 0.95):
        brush.patch([(x - 0.07, horizon), (x, horizon - 0.2), (x + 0.07, horizon)], pine)
    _ground(brush, horizon - 0.01, white, darker(white, 0.12))
    for x, y in ((0.07, 0.2), (0.24, 0.06), (0.36, 0.3), (0.6, 0.1), (0.72, 0.34), (0.93, 0.16)):
        brush.dot(x + 0.06 * (v[7] - 0.5), y, 0.017, 0.017, WHITE)


def city(brush: Brush, horizon: float, v: Variation) -> None:
    _sky(brush, horizon, vary((0.62, 0.78, 0.90), v[0], v[1]), (0.95, 0.91, 0.84))
    wall = vary((0.45, 0.52, 0.62), v[2], v[3])
    window = (0.98, 0.90, 0.60)
    for block, (left, width, share) in enumerate(BLOCKS):
        top = horizon - 0.2 - 0.26 * v[block + 3] * share
        shade = darker(wall, 0.12 * (block % 2))
        brush.gradient(left, top, left + width, horizon, shade, lighter(shade, 0.15))
        for x in (left + 0.3 * width, left + 0.7 * width):
            for y in (top + 0.07, top + 0.16):
                brush.gradient(x - 0.025, y - 0.025, x + 0.025, y + 0.025, window, window)
    _ground(brush, horizon, (0.55, 0.55, 0.57), (0.42, 0.42, 0.45))
    brush.gradient(0, horizon, 1, horizon + 0.05, (0.74, 0.73, 0.71), (0.68, 0.67, 0.65))


def room(brush: Brush, horizon: float, v: Variation) -> None:
    hues: tuple[Rgb, ...] = ((0.86, 0.78, 0.66), (0.92, 0.86, 0.70), (0.72, 0.84, 0.80))
    wall = vary(mix(mix(hues[0], hues[1], v[0]), hues[2], abs(2 * v[1] - 1)), v[2], v[3])
    floor = vary((0.66, 0.47, 0.32), v[4], v[5])
    _sky(brush, horizon, wall, darker(wall, 0.1))
    left = 0.3 + 0.2 * v[6]
    brush.gradient(left, 0.07, left + 0.2, 0.31, WHITE, (0.93, 0.93, 0.93))
    brush.gradient(left + 0.02, 0.09, left + 0.18, 0.29, (0.55, 0.78, 0.95), (0.82, 0.93, 0.98))
    _ground(brush, horizon, lighter(floor, 0.1), darker(floor, 0.15))
    brush.gradient(0, horizon - 0.025, 1, horizon + 0.01, WHITE, (0.85, 0.85, 0.85))
    rug = vary((0.78, 0.45, 0.42), v[7], v[0])
    brush.dot(0.5, 0.92, 0.46, 0.1, rug)
    brush.dot(0.5, 0.92, 0.36, 0.07, lighter(rug, 0.25))


def desert(brush: Brush, horizon: float, v: Variation) -> None:
    sand = vary((0.90, 0.66, 0.36), v[0], v[1])
    _sky(brush, horizon, vary((0.47, 0.74, 0.86), v[2], v[3]), (0.99, 0.90, 0.70))
    brush.dot(0.3 + 0.4 * v[4], 0.16, 0.09, 0.09, (1.0, 0.93, 0.72))
    rock = (0.74, 0.42, 0.28)
    x, top = 0.15 + 0.2 * v[5], horizon - 0.17
    brush.patch([(x - 0.2, horizon), (x - 0.13, top), (x + 0.1, top), (x + 0.17, horizon)], rock)
    brush.dot(0.85, horizon + 0.05, 0.5, 0.05 + 0.08 * v[6], darker(sand, 0.12))
    _ground(brush, horizon, lighter(sand, 0.1), darker(sand, 0.08))
    _mottle(brush, horizon, darker(sand, 0.18), v)


def sunset(brush: Brush, horizon: float, v: Variation) -> None:
    _sky(brush, 0.45 * horizon, vary((0.38, 0.24, 0.52), v[0], v[1]), (0.88, 0.42, 0.44))
    brush.gradient(0, 0.45 * horizon, 1, horizon, (0.88, 0.42, 0.44), (1.0, 0.77, 0.42))
    sun = 0.3 + 0.4 * v[2]
    brush.glow(sun, horizon - 0.06, 0.36, 0.32, (1.0, 0.9, 0.5), 0.5)
    brush.dot(sun, horizon - 0.06, 0.13, 0.13, (1.0, 0.92, 0.60))
    ground = vary((0.38, 0.24, 0.34), v[3], v[4])
    brush.dot(0.1 + 0.3 * v[5], horizon + 0.06, 0.5, 0.12, darker(ground, 0.1))
    _ground(brush, horizon, lighter(ground, 0.1), darker(ground, 0.25))


def forest(brush: Brush, horizon: float, v: Variation) -> None:
    leaves = vary((0.20, 0.42, 0.28), v[0], v[1])
    _sky(brush, horizon, darker(leaves, 0.1), lighter(leaves, 0.35))
    trunk = vary((0.36, 0.25, 0.19), v[2], v[3])
    for index, x in enumerate((0.04, 0.26, 0.5, 0.75, 0.97)):
        x += 0.1 * (v[(index + 3) % VARIATIONS] - 0.5)
        brush.gradient(x - 0.035, 0, x + 0.035, horizon, darker(trunk, 0.2), trunk)
    for index, x in enumerate((0.0, 0.3, 0.62, 0.95)):
        y = 0.06 * v[(index + 2) % VARIATIONS]
        brush.dot(x, y, 0.22, 0.14, darker(leaves, 0.08 + 0.12 * (index % 2)))
    moss = vary((0.36, 0.50, 0.25), v[4], v[5])
    _ground(brush, horizon, lighter(moss, 0.1), darker(moss, 0.2))
    _mottle(brush, horizon, lighter(moss, 0.25), v)


def underwater(brush: Brush, horizon: float, v: Variation) -> None:
    water = vary((0.10, 0.52, 0.72), v[0], v[1])
    _sky(brush, 1.0, lighter(water, 0.4), darker(water, 0.35))
    for index, x in enumerate((0.12, 0.47, 0.8)):
        x += 0.1 * (v[index + 2] - 0.5)
        brush.patch([(x, 0), (x + 0.09, 0), (x + 0.01, 0.6), (x - 0.12, 0.6)], WHITE, 0.12)
    for x, y, radius in BUBBLES:
        brush.dot(x + 0.06 * (v[5] - 0.5), y, radius, radius, WHITE, 0.45)
    weed = vary((0.13, 0.48, 0.36), v[6], v[7])
    for x in (0.04, 0.31, 0.69, 0.95):
        stem = [(x, horizon + 0.06), (x + 0.06, horizon - 0.1), (x, horizon - 0.24)]
        brush.line(stem, 0.045, weed)
    sand = vary((0.80, 0.76, 0.58), v[2], v[3])
    _ground(brush, horizon, sand, darker(sand, 0.2))


def _sky(brush: Brush, horizon: float, upper: Rgb, lower: Rgb) -> None:
    brush.gradient(0, 0, 1, horizon + 0.01, upper, lower)


def _ground(brush: Brush, horizon: float, far: Rgb, near: Rgb) -> None:
    brush.gradient(0, horizon, 1, 1, far, near)


def _mottle(brush: Brush, horizon: float, colour: Rgb, v: Variation) -> None:
    """Draw soft, faint patches on the ground."""
    deep = 1 - horizon
    for index, (x, y) in enumerate(((0.12, 0.75), (0.42, 0.4), (0.66, 0.8), (0.92, 0.45))):
        x += 0.16 * (v[(index + 4) % VARIATIONS] - 0.5)
        brush.glow(x, horizon + y * deep, 0.17, 0.06, colour, 0.6)


BACKGROUNDS: dict[str, Callable[[Brush, float, Variation], None]] = {
    "meadow": meadow,
    "beach": beach,
    "night": night,
    "snow": snow,
    "city": city,
    "room": room,
    "desert": desert,
    "sunset": sunset,
    "forest": forest,
    "underwater": underwater,
}
