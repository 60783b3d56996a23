"""Named colours, and functions that lighten, darken and vary them."""

from dataclasses import dataclass

Rgb = tuple[float, float, float]
"""Red, green and blue in [0, 1]."""

COLOURS: dict[str, Rgb] = {
    "red": (0.88, 0.17, 0.18),
    "orange": (0.97, 0.55, 0.13),
    "yellow": (0.98, 0.84, 0.20),
    "green": (0.24, 0.66, 0.27),
    "blue": (0.16, 0.40, 0.86),
    "purple": (0.52, 0.24, 0.72),
    "pink": (0.97, 0.53, 0.72),
    "brown": (0.53, 0.32, 0.17),
    "white": (0.95, 0.95, 0.94),
    "grey": (0.58, 0.59, 0.61),
    "black": (0.16, 0.16, 0.19),
}

SKINS: tuple[Rgb, ...] = (
    (0.99, 0.87, 0.76),
    (0.95, 0.77, 0.61),
    (0.84, 0.62, 0.44),
    (0.64, 0.43, 0.29),
    (0.45, 0.29, 0.20),
)

INK: Rgb = (0.13, 0.12, 0.16)
WHITE: Rgb = (1.0, 1.0, 1.0)
BLACK: Rgb = (0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Tint:
    """A colour that has a name in instructions and a slightly varied value in the picture."""

    name: str
    rgb: Rgb


def pure(name: str) -> Tint:
    """Return a named colour without variation, as it is after an instruction asked for it."""
    return Tint(name, COLOURS[name])


def mix(a: Rgb, b: Rgb, amount: float) -> Rgb:
    """Return (1 - amount)·a + amount·b."""
    return (
        a[0] + (b[0] - a[0]) * amount,
        a[1] + (b[1] - a[1]) * amount,
        a[2] + (b[2] - a[2]) * amount,
    )


def lighter(colour: Rgb, amount: float) -> Rgb:
    return mix(colour, WHITE, amount)


def darker(colour: Rgb, amount: float) -> Rgb:
    return mix(colour, BLACK, amount)


def vary(colour: Rgb, brightness: float, warmth: float) -> Rgb:
    """Vary a colour's brightness and warmth a little; 0.5 and 0.5 leave it as it is."""
    gain, shift = 1 + 0.16 * (brightness - 0.5), 0.08 * (warmth - 0.5)
    red, green, blue = (gain * value for value in colour)
    return (_clip(red + shift), _clip(green), _clip(blue - shift))


def _clip(value: float) -> float:
    return min(1.0, max(0.0, value))
