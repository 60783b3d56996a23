"""The description of a scene: frozen classes with every number that its picture depends on.

Lengths are in pictures: x runs from 0 (left) to 1 (right), y from 0 (top) to 1 (bottom).
"""

from dataclasses import dataclass, replace

from varedit_nano.scenes.palette import Rgb, Tint

SLOTS = ("left", "right", "top left", "top right")
"""The places of objects: two on the ground beside the figure, two in the air above them."""


@dataclass(frozen=True)
class Look:
    """The style of drawing: outline width, side the light comes from, depth of shading."""

    outline: float
    light: float
    shade: float


@dataclass(frozen=True)
class Background:
    """A background; variation: numbers in [0, 1] that its drawing function uses freely."""

    kind: str
    horizon: float
    variation: tuple[float, ...]


@dataclass(frozen=True)
class Wearable:
    kind: str
    tint: Tint


@dataclass(frozen=True)
class Figure:
    """The main figure. `parts` are its colours by name, `worn` its wearables."""

    kind: str
    x: float
    base: float
    height: float
    girth: float
    pose: float
    gaze: float
    skin: Rgb
    parts: tuple[tuple[str, Tint], ...]
    worn: tuple[Wearable, ...]

    def part(self, name: str) -> Tint:
        return dict(self.parts)[name]

    def painted(self, name: str, tint: Tint) -> "Figure":
        """Return the figure with one part in another colour."""
        parts = tuple((part, tint if part == name else old) for part, old in self.parts)
        return replace(self, parts=parts)


@dataclass(frozen=True)
class Item:
    """An object, (dx, dy) from its slot's centre and `scale` times its kind's size."""

    kind: str
    slot: str
    tint: Tint
    dx: float = 0.0
    dy: float = 0.0
    scale: float = 1.0


@dataclass(frozen=True)
class Scene:
    background: Background
    figure: Figure | None
    items: tuple[Item, ...]
    look: Look
    style: str = "plain"

    def item_in(self, slot: str) -> Item | None:
        return next((item for item in self.items if item.slot == slot), None)
