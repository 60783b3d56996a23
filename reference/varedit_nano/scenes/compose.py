"""Draw random scenes, and the standard things that instructions ask for."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from varedit_nano.scenes.backgrounds import BACKGROUNDS, CANONICAL, VARIATIONS
from varedit_nano.scenes.figures import FIGURES
from varedit_nano.scenes.objects import OBJECTS
from varedit_nano.scenes.palette import COLOURS, SKINS, Tint, mix, pure, vary
from varedit_nano.scenes.scene import SLOTS, Background, Figure, Item, Look, Scene, Wearable
from varedit_nano.scenes.wearables import WEARABLES

LOOKALIKES = {"forest": "tree", "snow": "tree", "night": "star", "city": "house"}
"""Objects that a background itself shows, so that their names would be ambiguous there."""

T = TypeVar("T")
Rng = np.random.Generator


def pick(rng: Rng, options: Sequence[T]) -> T:
    return options[int(rng.integers(len(options)))]


def random_scene(rng: Rng) -> Scene:
    """Draw a scene: usually a figure, 0 to 3 objects, a background and a look."""
    look = Look(
        outline=float(rng.uniform(0.011, 0.017)) if rng.random() < 0.5 else 0.0,
        light=float(rng.uniform(-1, 1)),
        shade=float(rng.uniform(0.5, 1)),
    )
    variation = tuple(float(value) for value in rng.random(VARIATIONS))
    background = Background(pick(rng, tuple(BACKGROUNDS)), float(rng.uniform(0.6, 0.7)), variation)
    figure = _random_figure(rng) if rng.random() < 0.92 else None
    count = pick(rng, (0, 1, 1, 1, 2, 2, 2, 3) if figure else (2, 3))
    return Scene(background, figure, _random_items(rng, count, background.kind), look)


def plain_background(kind: str, horizon: float) -> Background:
    return Background(kind, horizon, CANONICAL)


def plain_item(kind: str, slot: str, colour: str | None = None) -> Item:
    return Item(kind, slot, pure(colour or OBJECTS[kind].colour))


def plain_wearable(kind: str, colour: str | None = None) -> Wearable:
    return Wearable(kind, pure(colour or WEARABLES[kind].colour))


def plain_figure(kind: str) -> Figure:
    parts = tuple((part, pure(colours[0])) for part, colours in FIGURES[kind].parts.items())
    return Figure(kind, 0.5, 0.92, 0.64, 1.0, 0.4, 0.0, SKINS[1], parts, ())


def recast(figure: Figure, kind: str) -> Figure:
    """Return another kind of figure in this one's place, with the same wearables."""
    plain = plain_figure(kind)
    return replace(figure, kind=kind, skin=plain.skin, parts=plain.parts)


def _random_figure(rng: Rng) -> Figure:
    kind = pick(rng, tuple(FIGURES))
    parts = tuple(
        (part, _random_tint(rng, pick(rng, colours)))
        for part, colours in FIGURES[kind].parts.items()
    )
    tone = float(rng.random()) * (len(SKINS) - 1)
    step = min(int(tone), len(SKINS) - 2)
    return Figure(
        kind=kind,
        x=float(rng.uniform(0.43, 0.57)),
        base=float(rng.uniform(0.9, 0.94)),
        height=float(rng.uniform(0.56, 0.7)),
        girth=float(rng.uniform(0.93, 1.1)),
        pose=float(rng.random()),
        gaze=float(rng.uniform(-1, 1)),
        skin=mix(SKINS[step], SKINS[step + 1], tone - step),
        parts=parts,
        worn=_random_worn(rng),
    )


def _random_worn(rng: Rng) -> tuple[Wearable, ...]:
    worn: dict[str, Wearable] = {}
    for _ in range(pick(rng, (0, 0, 0, 1, 1, 1, 2))):
        kind = pick(rng, tuple(WEARABLES))
        worn[WEARABLES[kind].place] = Wearable(kind, _random_tint(rng, pick(rng, tuple(COLOURS))))
    return tuple(worn[place] for place in sorted(worn))


def _random_items(rng: Rng, count: int, background: str) -> tuple[Item, ...]:
    """Draw objects of different kinds; sometimes two of a kind, in different colours."""
    slots = rng.permutation(len(SLOTS))[:count]
    allowed = {kind for kind in OBJECTS if kind != LOOKALIKES.get(background)}
    items: list[Item] = []
    for slot in (SLOTS[index] for index in sorted(slots)):
        airborne = slot.startswith("top")
        alike = [item for item in items if OBJECTS[item.kind].airborne == airborne]
        kinds = allowed - {item.kind for item in alike}
        colours = [name for name in COLOURS if name not in {item.tint.name for item in alike}]
        kind = pick(rng, [k for k, v in OBJECTS.items() if v.airborne == airborne and k in kinds])
        if alike and rng.random() < 0.3:
            kind = alike[0].kind
        colour = OBJECTS[kind].colour
        if colour not in colours or rng.random() < 0.65:
            colour = pick(rng, colours)
        items.append(
            Item(
                kind,
                slot,
                _random_tint(rng, colour),
                dx=float(rng.uniform(-0.03, 0.03)),
                dy=float(rng.uniform(-0.03, 0.02)),
                scale=float(rng.uniform(0.88, 1.12)),
            )
        )
    return tuple(items)


def _random_tint(rng: Rng, name: str) -> Tint:
    return Tint(name, vary(COLOURS[name], float(rng.random()), float(rng.random())))
