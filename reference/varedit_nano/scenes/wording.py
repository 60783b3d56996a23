"""The wording of edits: names that are unique in their scene, several wordings of each edit."""

from collections.abc import Sequence

import numpy as np

from varedit_nano.scenes.objects import OBJECTS
from varedit_nano.scenes.scene import Item, Scene

Clauses = tuple[str, ...]
"""Imperative clauses that all ask for the same edit."""

SENTENCES = (
    *("{}",) * 8,
    "please {}",
    "{} please",
    "now {}",
    "can you {}?",
    "could you {}?",
    "i want you to {}",
    "{}.",
    "{}!",
)
JOINTS = (
    "{} and {}",
    "{}, and {}",
    "{} and then {}",
    "{}, then {}",
    "{} and also {}",
    "first {}, then {}",
)

ADD_WEARABLE = (
    "add {a}",
    "add {a} to {figure}",
    "put {a} on {figure}",
    "give {figure} {a}",
    "let {figure} wear {a}",
    "make {figure} wear {a}",
    "dress {figure} in {a}",
)
ADD_OBJECT = (
    "add {a}",
    "draw {a}",
    "insert {a}",
    "add {a} to the picture",
    "put {a} in the picture",
    "make {a} appear",
)
ADD_OBJECT_AT = (
    "add {a} {where}",
    "put {a} {where}",
    "draw {a} {where}",
    "place {a} {where}",
    "insert {a} {where}",
    "make {a} appear {where}",
)
ADD_FIGURE = (
    "add {a}",
    "add {a} in the middle",
    "put {a} in the picture",
    "draw {a}",
    "place {a} in the middle",
    "insert {a}",
)
REMOVE = (
    "remove {the}",
    "delete {the}",
    "erase {the}",
    "take away {the}",
    "get rid of {the}",
    "remove {the} from the picture",
)
UNDRESS = (
    "remove {the}",
    "take off {the}",
    "take {the} off {figure}",
    "remove {the} from {figure}",
    "get rid of {the}",
    "delete {the}",
)
REPLACE = (
    "replace {the} with {a}",
    "turn {the} into {a}",
    "change {the} to {a}",
    "change {the} into {a}",
    "swap {the} for {a}",
    "make {the} {a}",
)
RECOLOUR = (
    "make {the} {colour}",
    "paint {the} {colour}",
    "colour {the} {colour}",
    "turn {the} {colour}",
    "change the color of {the} to {colour}",
    "change the colour of {the} to {colour}",
)
ENLARGE = (
    "make {the} bigger",
    "make {the} larger",
    "enlarge {the}",
    "increase the size of {the}",
    "scale up {the}",
    "grow {the}",
)
SHRINK = (
    "make {the} smaller",
    "make {the} tiny",
    "shrink {the}",
    "reduce the size of {the}",
    "scale down {the}",
    "decrease the size of {the}",
)
MOVE = (
    "move {the} to the {side}",
    "shift {the} to the {side}",
    "put {the} on the {side}",
    "place {the} on the {side}",
    "bring {the} to the {side} side",
    "move {the} {side}",
)
BACKGROUND = (
    "change the background to {a}",
    "replace the background with {a}",
    "make the background {a}",
    "set the background to {a}",
    "turn the background into {a}",
    "use {a} as the background",
)

BACKGROUNDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "meadow": (("a meadow", "a green field"), ("move the scene to a meadow", "put it in a meadow")),
    "beach": (("a beach", "the seaside"), ("move the scene to the beach", "put it on a beach")),
    "night": (("a night sky", "the night"), ("make it night", "turn it into night")),
    "snow": (("a snowy field", "snow"), ("make it winter", "make it snow")),
    "city": (
        ("a city", "the city"),
        ("move the scene to the city", "put it in a city"),
    ),
    "room": (("a room", "a plain room"), ("move the scene indoors", "put it in a room")),
    "desert": (("a desert", "the desert"), ("move the scene to the desert", "put it in a desert")),
    "sunset": (("a sunset", "an evening sky"), ("make it sunset", "make it evening")),
    "forest": (("a forest", "the woods"), ("move the scene to the forest", "put it in a forest")),
    "underwater": (
        ("the sea floor", "the sea"),
        ("put it underwater", "put it under the sea"),
    ),
}
"""Each background's names, and its own clauses."""

STYLES: dict[str, Clauses] = {
    "grey": (
        "make it black and white",
        "convert to black and white",
        "turn it into a black and white photo",
        "make the picture grey",
        "remove all colours",
        "make it greyscale",
    ),
    "sepia": (
        "make it sepia",
        "make it look like an old photo",
        "apply a sepia tone",
        "turn it into a sepia photo",
        "make the picture look old",
        "give it a vintage look",
    ),
    "negative": (
        "invert the colours",
        "make it a negative",
        "turn it into a negative",
        "invert the picture",
        "make a photo negative",
        "reverse all colors",
    ),
    "warm": (
        "make it warmer",
        "make the colours warm",
        "give it a warm tone",
        "warm up the picture",
        "apply a warm filter",
        "make the picture look warm",
    ),
    "cool": (
        "make it cooler",
        "make the colours cold",
        "give it a cool tone",
        "cool down the picture",
        "apply a cool filter",
        "make the picture look cold",
    ),
    "poster": (
        "make it a poster",
        "turn it into pop art",
        "posterise the picture",
        "use only a few colours",
        "make it look like a poster",
        "apply a poster effect",
    ),
    "pixels": (
        "make it pixel art",
        "turn it into pixel art",
        "pixelate the picture",
        "make it look like an old video game",
        "draw it in pixels",
        "convert to pixel art",
    ),
    "sketch": (
        "make it a pencil sketch",
        "turn it into a sketch",
        "turn it into a pencil drawing",
        "draw it with a pencil",
        "make it look like a drawing",
        "convert to a line drawing",
    ),
}


def fill(templates: Sequence[str], **words: str) -> Clauses:
    return tuple(template.format(**words) for template in templates)


def each(templates: Sequence[str], names: Sequence[str], **words: str) -> Clauses:
    """Fill every template with every name of its object in place of {the}."""
    return tuple(clause for name in names for clause in fill(templates, the=name, **words))


def indefinite(kind: str, colour: str | None = None) -> str:
    """Return a thing's name with its article: "a ball", "an orange ball", "glasses"."""
    words = f"{colour} {kind}" if colour else kind
    if kind == "glasses":
        return words
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def item_names(scene: Scene, item: Item) -> tuple[str, ...]:
    """Return names that only this object has in its scene: by kind, else by colour or by side."""
    twins = [other for other in scene.items if other.kind == item.kind]
    coloured = f"the {item.tint.name} {item.kind}"
    if len(twins) == 1:
        return (f"the {item.kind}", f"the {item.kind}", coloured)
    side = side_of(item.slot)
    names = (f"the {side} {item.kind}", f"the {item.kind} on the {side}")
    if sum(other.tint.name == item.tint.name for other in twins) == 1:
        names = (coloured, coloured, *names)
    return names


def figure_name(scene: Scene) -> str:
    return f"the {scene.figure.kind}" if scene.figure else "the scene"


def part_names(scene: Scene, part: str) -> tuple[str, ...]:
    """Return a part's names; an animal's coat may also be named by the animal."""
    owned = f"{figure_name(scene)}'s {part}"
    return (figure_name(scene), owned) if part in ("fur", "skin") else (owned, f"the {part}")


def worn_names(scene: Scene, kind: str) -> tuple[str, ...]:
    return (f"the {kind}", f"{figure_name(scene)}'s {kind}")


def places(scene: Scene, kind: str, side: str) -> tuple[str, ...]:
    """Return wordings of a slot for this kind of object."""
    sky = ("in the sky on the {}", "at the top {}") if OBJECTS[kind].airborne else ()
    beside = (f"to the {{}} of {figure_name(scene)}",) if scene.figure and not sky else ()
    return tuple(place.format(side) for place in ("on the {}", "on the {} side", *sky, *beside))


def side_of(slot: str) -> str:
    return slot.split()[-1]


def sentence(rng: np.random.Generator, clause: str) -> str:
    """Vary a clause as people type: polite or terse, in lower or upper case."""
    text = SENTENCES[int(rng.integers(len(SENTENCES)))].format(clause)
    case = rng.random()
    if case < 0.3:
        return text[0].upper() + text[1:]
    return text.upper() if case > 0.95 else text


def joined(rng: np.random.Generator, first: str, second: str) -> str:
    return JOINTS[int(rng.integers(len(JOINTS)))].format(first, second)
