"""The edits: each kind is a function from a scene to an edited scene with its wordings.

What an instruction leaves open follows a fixed rule: a new thing has its kind's own colour and the
exact centre of its slot, and goes right unless that side is taken.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from varedit_nano.scenes import wording
from varedit_nano.scenes.compose import (
    Rng,
    pick,
    plain_background,
    plain_figure,
    plain_item,
    plain_wearable,
    recast,
)
from varedit_nano.scenes.figures import FIGURES
from varedit_nano.scenes.objects import OBJECTS
from varedit_nano.scenes.palette import COLOURS, pure
from varedit_nano.scenes.scene import SLOTS, Figure, Item, Scene, Wearable
from varedit_nano.scenes.wearables import WEARABLES
from varedit_nano.scenes.wording import Clauses

GROWTH, SHRINKAGE = 1.5, 0.6
FIGURE_GROWTH, FIGURE_SHRINKAGE = 1.25, 0.7
TALLEST = 0.64
"""The largest height of a figure that still fits in the picture after it grows."""
FIGURE_COLUMNS = {"left": 0.26, "right": 0.74}
OPPOSITE = {"left": "right", "right": "left", "top left": "top right", "top right": "top left"}


@dataclass(frozen=True)
class SceneEdit:
    """An edit of a scene.

    subject: what it changes: a slot, a place of wearables, a part, "figure", "background" or
    "style". clauses: alternative wordings. steps: the edits that a compound one joins.
    """

    kind: str
    subject: str
    clauses: Clauses
    after: Scene
    steps: tuple["SceneEdit", ...] = ()


def add(scene: Scene, rng: Rng) -> SceneEdit | None:
    if scene.figure is None and rng.random() < 0.5:
        return _add_figure(scene, rng)
    return (_add_wearable if scene.figure and rng.random() < 0.6 else _add_object)(scene, rng)


def remove(scene: Scene, rng: Rng) -> SceneEdit | None:
    thing = _any_thing(scene, rng)
    match thing:
        case Item():
            clauses = wording.each(wording.REMOVE, wording.item_names(scene, thing))
            return SceneEdit("remove", thing.slot, clauses, _with_item(scene, thing, None))
        case Wearable():
            figure = wording.figure_name(scene)
            names = wording.worn_names(scene, thing.kind)[:1]
            clauses = wording.each(wording.UNDRESS, names, figure=figure)
            after = _with_worn(scene, thing, None)
            return SceneEdit("remove", WEARABLES[thing.kind].place, clauses, after)
        case Figure():
            clauses = wording.each(wording.REMOVE, [wording.figure_name(scene)])
            return SceneEdit("remove", "figure", clauses, replace(scene, figure=None))
    return None


def replace_thing(scene: Scene, rng: Rng) -> SceneEdit | None:
    thing = _any_thing(scene, rng)
    match thing:
        case Item():
            kinds = _new_objects(scene, airborne=OBJECTS[thing.kind].airborne)
            kind, colour = pick(rng, kinds), _maybe_colour(rng)
            item = replace(thing, kind=kind, tint=pure(colour or OBJECTS[kind].colour))
            a, names = wording.indefinite(kind, colour), wording.item_names(scene, thing)
            clauses = wording.each(wording.REPLACE, names, a=a)
            return SceneEdit("replace", thing.slot, clauses, _with_item(scene, thing, item))
        case Wearable():
            place = WEARABLES[thing.kind].place
            kinds = [k for k, v in WEARABLES.items() if v.place == place and k != thing.kind]
            if not kinds:
                return None
            kind, colour = pick(rng, kinds), _maybe_colour(rng)
            after = _with_worn(scene, thing, plain_wearable(kind, colour))
            names = wording.worn_names(scene, thing.kind)
            clauses = wording.each(wording.REPLACE, names, a=wording.indefinite(kind, colour))
            return SceneEdit("replace", place, clauses, after)
        case Figure():
            kind = pick(rng, [kind for kind in FIGURES if kind != thing.kind])
            names = [wording.figure_name(scene)]
            clauses = wording.each(wording.REPLACE, names, a=wording.indefinite(kind))
            return SceneEdit(
                "replace", "figure", clauses, replace(scene, figure=recast(thing, kind))
            )
    return None


def recolour(scene: Scene, rng: Rng) -> SceneEdit | None:
    thing = _any_thing(scene, rng)
    match thing:
        case Item():
            colour = _other_colour(rng, thing.tint.name)
            after = _with_item(scene, thing, replace(thing, tint=pure(colour)))
            subject, names = thing.slot, wording.item_names(scene, thing)
        case Wearable():
            colour = _other_colour(rng, thing.tint.name)
            after = _with_worn(scene, thing, replace(thing, tint=pure(colour)))
            subject = WEARABLES[thing.kind].place
            names = wording.worn_names(scene, thing.kind)
        case Figure():
            subject, tint = pick(rng, thing.parts)
            colour = _other_colour(rng, tint.name)
            after = replace(scene, figure=thing.painted(subject, pure(colour)))
            names = wording.part_names(scene, subject)
        case None:
            return None
    return SceneEdit(
        "recolour", subject, wording.each(wording.RECOLOUR, names, colour=colour), after
    )


def resize_thing(scene: Scene, rng: Rng) -> SceneEdit | None:
    thing, grow = pick(rng, (*scene.items, scene.figure)), rng.random() < 0.5
    templates = wording.ENLARGE if grow else wording.SHRINK
    if isinstance(thing, Item):
        scale = thing.scale * (GROWTH if grow else SHRINKAGE)
        clauses = wording.each(templates, wording.item_names(scene, thing))
        after = _with_item(scene, thing, replace(thing, scale=scale))
        return SceneEdit("resize", thing.slot, clauses, after)
    if thing is None or (grow and thing.height > TALLEST):
        return None
    height = thing.height * (FIGURE_GROWTH if grow else FIGURE_SHRINKAGE)
    clauses = wording.each(templates, [wording.figure_name(scene)])
    after = replace(scene, figure=replace(thing, height=height))
    return SceneEdit("resize", "figure", clauses, after)


def move(scene: Scene, rng: Rng) -> SceneEdit | None:
    thing = pick(rng, (*scene.items, scene.figure))
    if isinstance(thing, Item):
        slot = OPPOSITE[thing.slot]
        if scene.item_in(slot):
            return None
        side, names = wording.side_of(slot), wording.item_names(scene, thing)
        after = _with_item(scene, thing, replace(thing, slot=slot, dx=0.0))
        return SceneEdit("move", slot, wording.each(wording.MOVE, names, side=side), after)
    side = pick(rng, tuple(FIGURE_COLUMNS))
    if thing is None or scene.item_in(side):
        return None
    clauses = wording.each(wording.MOVE, [wording.figure_name(scene)], side=side)
    after = replace(scene, figure=replace(thing, x=FIGURE_COLUMNS[side]))
    return SceneEdit("move", "figure", clauses, after)


def background(scene: Scene, rng: Rng) -> SceneEdit | None:
    """Change the background, keeping its horizon."""
    others = [kind for kind in wording.BACKGROUNDS if kind != scene.background.kind]
    kind = pick(rng, others)
    names, own = wording.BACKGROUNDS[kind]
    clauses = [clause for name in names for clause in wording.fill(wording.BACKGROUND, a=name)]
    after = replace(scene, background=plain_background(kind, scene.background.horizon))
    return SceneEdit("background", "background", (*clauses, *own, *own, *own), after)


def style(scene: Scene, rng: Rng) -> SceneEdit | None:
    kind = pick(rng, tuple(wording.STYLES))
    return SceneEdit("style", "style", wording.STYLES[kind], replace(scene, style=kind))


def compound(scene: Scene, rng: Rng) -> SceneEdit | None:
    """Join two edits of different things; the second edits the scene that the first leaves."""
    first = pick(rng, LOCAL)(scene, rng)
    second = first and pick(rng, (*LOCAL, *LOCAL, background, background, style))(first.after, rng)
    if not first or not second or _undoes(second, first):
        return None
    clauses = tuple(
        wording.joined(rng, pick(rng, first.clauses), pick(rng, second.clauses)) for _ in range(2)
    )
    subject = f"{first.subject} and {second.subject}"
    return SceneEdit("compound", subject, clauses, second.after, (first, second))


def in_turn(scene: Scene, count: int, rng: Rng) -> list[SceneEdit] | None:
    """Draw so many local edits of different things, each of the scene that the last one leaves."""
    turns: list[SceneEdit] = []
    for _ in range(count):
        edit = pick(rng, LOCAL)(turns[-1].after if turns else scene, rng)
        if not edit or any(_undoes(edit, other) for other in turns):
            return None
        turns.append(edit)
    return turns


def _undoes(second: SceneEdit, first: SceneEdit) -> bool:
    whole = second.subject == "figure" and second.kind in ("remove", "replace")
    return whole or second.subject == first.subject


LOCAL = (add, add, remove, replace_thing, recolour, recolour, resize_thing, move)

EDITORS: dict[str, Callable[[Scene, Rng], SceneEdit | None]] = {
    "add": add,
    "remove": remove,
    "replace": replace_thing,
    "recolour": recolour,
    "resize": resize_thing,
    "move": move,
    "background": background,
    "style": style,
    "compound": compound,
}


def _add_wearable(scene: Scene, rng: Rng) -> SceneEdit | None:
    figure = scene.figure
    if figure is None:
        return None
    taken = {WEARABLES[worn.kind].place for worn in figure.worn}
    kinds = [kind for kind, wearable in WEARABLES.items() if wearable.place not in taken]
    if not kinds:
        return None
    kind, colour = pick(rng, kinds), _maybe_colour(rng)
    worn = (*figure.worn, plain_wearable(kind, colour))
    words = {"a": wording.indefinite(kind, colour), "figure": wording.figure_name(scene)}
    clauses = wording.fill((*wording.ADD_WEARABLE[:1] * 3, *wording.ADD_WEARABLE), **words)
    after = replace(scene, figure=replace(figure, worn=worn))
    return SceneEdit("add", WEARABLES[kind].place, clauses, after)


def _add_object(scene: Scene, rng: Rng) -> SceneEdit | None:
    free = [slot for slot in SLOTS if not scene.item_in(slot)]
    if not free:
        return None
    airborne = pick(rng, free).startswith("top")
    slots = [slot for slot in free if slot.startswith("top") == airborne]
    kind, colour = pick(rng, _new_objects(scene, airborne)), _maybe_colour(rng)
    a = wording.indefinite(kind, colour)
    if rng.random() < 0.5:
        slot, clauses = slots[-1], wording.fill(wording.ADD_OBJECT, a=a)
    else:
        slot = pick(rng, slots)
        wheres = wording.places(scene, kind, wording.side_of(slot))
        clauses = tuple(
            clause
            for where in wheres
            for clause in wording.fill(wording.ADD_OBJECT_AT, a=a, where=where)
        )
    after = replace(scene, items=(*scene.items, plain_item(kind, slot, colour)))
    return SceneEdit("add", slot, clauses, after)


def _add_figure(scene: Scene, rng: Rng) -> SceneEdit:
    kind = pick(rng, tuple(FIGURES))
    clauses = wording.fill(wording.ADD_FIGURE, a=wording.indefinite(kind))
    return SceneEdit("add", "figure", clauses, replace(scene, figure=plain_figure(kind)))


def _any_thing(scene: Scene, rng: Rng) -> Item | Wearable | Figure | None:
    worn = scene.figure.worn if scene.figure else ()
    return pick(rng, (*scene.items, *worn, scene.figure))


def _with_item(scene: Scene, old: Item, new: Item | None) -> Scene:
    items = tuple(new if item is old else item for item in scene.items)
    return replace(scene, items=tuple(item for item in items if item))


def _with_worn(scene: Scene, old: Wearable, new: Wearable | None) -> Scene:
    assert scene.figure, "only a figure wears something"
    worn = tuple(new if wearable is old else wearable for wearable in scene.figure.worn)
    return replace(scene, figure=replace(scene.figure, worn=tuple(w for w in worn if w)))


def _new_objects(scene: Scene, airborne: bool) -> list[str]:
    present = {item.kind for item in scene.items}
    return [k for k, v in OBJECTS.items() if v.airborne == airborne and k not in present]


def _maybe_colour(rng: Rng) -> str | None:
    return pick(rng, tuple(COLOURS)) if rng.random() < 0.45 else None


def _other_colour(rng: Rng, name: str) -> str:
    return pick(rng, [colour for colour in COLOURS if colour != name])
