"""Drawn scenes: determinism, exact masks, unambiguous wording, distinct alternatives."""

import pickle
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from varedit_nano.scenes import KINDS, draw_alternatives, draw_edit, draw_picture, vocabulary_text
from varedit_nano.scenes import wording as wordings
from varedit_nano.scenes.backgrounds import BACKGROUNDS
from varedit_nano.scenes.compose import (
    plain_background,
    plain_figure,
    plain_item,
    plain_wearable,
    random_scene,
)
from varedit_nano.scenes.edits import EDITORS
from varedit_nano.scenes.figures import FIGURES
from varedit_nano.scenes.objects import OBJECTS
from varedit_nano.scenes.palette import COLOURS
from varedit_nano.scenes.render import draw_pair, draw_scene, position
from varedit_nano.scenes.samples import SMALLEST_CHANGE, plan_edit
from varedit_nano.scenes.scene import Item, Look, Scene
from varedit_nano.scenes.styles import STYLES
from varedit_nano.scenes.wearables import WEARABLES
from varedit_runtime.errors import ConfigError

LOOK = Look(outline=0.014, light=0.5, shade=0.8)
# Half of each object's width, in its heights.
HALF_WIDTHS = {
    "ball": 0.55,
    "tree": 0.42,
    "flower": 0.36,
    "house": 0.64,
    "car": 1.2,
    "mushroom": 0.58,
    "box": 0.74,
    "umbrella": 0.54,
    "lamp": 0.46,
    "balloon": 0.32,
    "star": 0.54,
    "kite": 0.37,
    "cloud": 0.78,
}
MARGIN = 0.02  # around a thing's shape, for outlines and antialiasing
Bounds = tuple[float, float, float, float]  # left, top, right, bottom in pictures


def _empty(background: str = "meadow") -> Scene:
    return Scene(plain_background(background, 0.65), None, (), LOOK)


def _rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def changed_bounds(before: Scene, after: Scene) -> list[Bounds]:
    """Return rectangles that contain every pixel in which the two pictures can differ."""
    wholes = [(scene.background, scene.look, scene.style) for scene in (before, after)]
    if wholes[0] != wholes[1]:
        return [(0.0, 0.0, 1.0, 1.0)]
    changed = [_item_bounds(item) for item in set(before.items) ^ set(after.items)]
    if before.figure != after.figure:
        for figure in (before.figure, after.figure):
            if figure:
                half = 0.47 * figure.height * figure.girth
                top = figure.base - 1.25 * figure.height
                changed.append((figure.x - half, top, figure.x + half, figure.base + 0.1))
    return changed


def _item_bounds(item: Item) -> Bounds:
    kind, (x, y) = OBJECTS[item.kind], position(item)
    height = kind.size * item.scale
    half = HALF_WIDTHS[item.kind] * height + MARGIN
    up, down = (0.5, 0.5) if kind.airborne else (1.16, 0.22)
    return x - half, y - up * height - MARGIN, x + half, y + down * height + MARGIN


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_the_same_seed_draws_the_same_edit(kind: str | None) -> None:
    one, two = draw_edit(7, 64, kind), pickle.loads(pickle.dumps(draw_edit(7, 64, kind)))
    assert (one.kind, one.instruction) == (two.kind, two.instruction)
    assert np.array_equal(one.source, two.source)
    assert np.array_equal(one.target, two.target)
    assert np.array_equal(one.mask, two.mask)


def test_different_seeds_draw_different_pictures() -> None:
    pictures = {draw_picture(seed, 64).tobytes() for seed in range(30)}
    edits = {draw_edit(seed, 64).source.tobytes() for seed in range(30)}
    assert len(pictures) == 30
    assert len(edits) == 30


@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_where_source_and_target_differ(kind: str) -> None:
    for seed in range(60):
        sample = draw_edit(seed, 64, kind)
        assert sample.kind == kind
        assert sample.source.shape == sample.target.shape == (64, 64, 3)
        assert sample.source.dtype == sample.target.dtype == np.uint8
        assert np.array_equal(sample.mask, (sample.source != sample.target).any(axis=-1))
        assert sample.mask.mean() >= SMALLEST_CHANGE, (seed, sample.instruction)
        assert sample.source.std() > 5


def test_nothing_changes_outside_the_bounds_of_what_is_edited() -> None:
    size = 64
    rng = _rng(0)
    local = 0
    for _ in range(400):
        scene, edit = plan_edit(rng)
        source, target = draw_pair(scene, edit.after, size)
        allowed = np.zeros((size, size), bool)
        for left, top, right, bottom in changed_bounds(scene, edit.after):
            rows = slice(max(0, int(top * size)), int(bottom * size) + 1)
            allowed[rows, max(0, int(left * size)) : int(right * size) + 1] = True
        differs = (source != target).any(axis=-1)
        assert not (differs & ~allowed).any(), edit.clauses[0]
        local += not allowed.all()
    assert local > 250


def test_a_pair_is_drawn_as_its_two_scenes_are() -> None:
    rng = _rng(1)
    for _ in range(40):
        scene, edit = plan_edit(rng)
        source, target = draw_pair(scene, edit.after, 64)
        assert np.array_equal(source, draw_scene(scene, 64))
        assert np.array_equal(target, draw_scene(edit.after, 64))


def test_an_edit_is_the_same_at_every_size() -> None:
    for seed in range(12):
        small, large = draw_edit(seed, 128), draw_edit(seed, 256)
        assert small.instruction == large.instruction
        assert large.source.shape == (256, 256, 3)
        halved = large.source.reshape(128, 2, 128, 2, 3).mean(axis=(1, 3))
        error = np.square(halved - small.source).mean()
        assert 10 * np.log10(255**2 / error) > 25


def test_kinds_are_balanced() -> None:
    rng = _rng(2)
    shares = Counter(plan_edit(rng)[1].kind for _ in range(2000))
    assert set(shares) == set(KINDS)
    assert 0.2 < shares["add"] / 2000 < 0.3
    assert all(count > 60 for count in shares.values())


def test_a_new_thing_follows_from_scene_and_instruction() -> None:
    """Edits with the same words do the same to the same scene, whatever the random numbers."""
    scene = random_scene(_rng(3))
    results: dict[str, Scene] = {}
    for seed in range(3000):
        rng = _rng(seed)
        if edit := EDITORS[KINDS[seed % len(KINDS)]](scene, rng):
            for clause in edit.clauses:
                assert results.setdefault(clause, edit.after) == edit.after, clause
    assert len(results) > 500


@pytest.mark.parametrize("kind", KINDS)
def test_every_edit_has_several_wordings(kind: str) -> None:
    rng = _rng(4)
    for _ in range(50):
        _, edit = plan_edit(rng, kind)
        steps = edit.steps or (edit,)
        assert all(len(set(step.clauses)) >= 5 for step in steps)


def test_instructions_vary_and_ask_for_a_hat() -> None:
    texts = list(vocabulary_text(6000))
    assert len(texts) == 6000
    assert "add a hat" in texts
    assert len(set(texts)) > 3000
    words = {word for text in texts for word in re.findall("[a-z']+", text.lower())}
    assert words >= {*COLOURS, *FIGURES, *OBJECTS, "left", "right", "bow", "glasses"}
    assert len(words) < 400
    assert any(text.isupper() for text in texts)


def test_names_are_unique_in_their_scene() -> None:
    rng = _rng(5)
    twins = 0
    for _ in range(600):
        scene = random_scene(rng)
        names = [name for item in scene.items for name in set(wordings.item_names(scene, item))]
        assert len(names) == len(set(names)), names
        twins += len({item.kind for item in scene.items}) < len(scene.items)
    assert twins > 20


def test_twins_of_one_colour_go_by_their_sides() -> None:
    balls = (plain_item("ball", "left", "red"), plain_item("ball", "right", "red"))
    scene = replace(_empty(), items=balls)
    assert wordings.item_names(scene, balls[0]) == ("the left ball", "the ball on the left")
    assert wordings.item_names(scene, balls[1]) == ("the right ball", "the ball on the right")


def test_indefinite_articles() -> None:
    assert wordings.indefinite("ball") == "a ball"
    assert wordings.indefinite("umbrella") == "an umbrella"
    assert wordings.indefinite("ball", "orange") == "an orange ball"
    assert wordings.indefinite("glasses", "red") == "red glasses"


@pytest.mark.parametrize("kind", KINDS)
def test_alternatives_share_the_source_and_differ_in_the_target(kind: str) -> None:
    for seed in range(3):
        right = draw_edit(seed, 64, kind)
        others = draw_alternatives(seed, 64, kind=kind)
        assert len(others) == 12
        targets = [right.source, right.target, *(other.target for other in others)]
        for index, target in enumerate(targets):
            for earlier in targets[:index]:
                assert (target != earlier).any(axis=-1).mean() >= SMALLEST_CHANGE
        assert all(np.array_equal(other.source, right.source) for other in others)
        assert sum(other.kind == kind for other in others) >= 3


def test_alternatives_are_the_same_on_every_call() -> None:
    one, two = draw_alternatives(3, 64), draw_alternatives(3, 64)
    assert [sample.instruction for sample in one] == [sample.instruction for sample in two]
    assert all(np.array_equal(a.target, b.target) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("kind", OBJECTS)
def test_every_object_is_a_bold_shape_within_its_bounds(kind: str) -> None:
    slot = "top left" if OBJECTS[kind].airborne else "left"
    scene = replace(_empty(), items=(plain_item(kind, slot),))
    bare, drawn = draw_pair(_empty(), scene, 128)
    rows, columns = np.nonzero((bare != drawn).any(axis=-1))
    assert np.ptp(rows) >= 16
    assert np.ptp(columns) >= 16
    ((left, top, right, bottom),) = changed_bounds(_empty(), scene)
    assert left * 128 <= columns.min() and columns.max() <= right * 128
    assert top * 128 <= rows.min() and rows.max() <= bottom * 128


@pytest.mark.parametrize("kind", FIGURES)
def test_every_figure_wears_everything(kind: str) -> None:
    bare = replace(_empty(), figure=plain_figure(kind))
    for wearable in WEARABLES:
        figure = replace(plain_figure(kind), worn=(plain_wearable(wearable),))
        source, target = draw_pair(bare, replace(bare, figure=figure), 64)
        assert (source != target).any(axis=-1).mean() >= SMALLEST_CHANGE


def test_backgrounds_and_styles_are_all_different_and_all_have_words() -> None:
    pictures = [draw_scene(_empty(kind), 64).astype(float) for kind in BACKGROUNDS]
    scene = replace(_empty(), figure=plain_figure("girl"))
    for style in ("plain", *STYLES):
        pictures.append(draw_scene(replace(scene, style=style), 64).astype(float))
    for index, picture in enumerate(pictures):
        assert all(np.abs(picture - other).mean() > 4 for other in pictures[:index])
    assert set(wordings.BACKGROUNDS) == set(BACKGROUNDS)
    assert set(wordings.STYLES) == set(STYLES)


@pytest.mark.parametrize("size", [32, 72, 100])
@pytest.mark.parametrize("style", STYLES)
def test_styles_work_at_any_size(style: str, size: int) -> None:
    picture = draw_scene(replace(_empty(), style=style), size)
    assert picture.shape == (size, size, 3)
    assert picture.std() > 3


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown kind of edit 'rotate'"):
        draw_edit(0, 64, "rotate")
