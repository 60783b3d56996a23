"""Draw edits as pictures, for training and evaluation."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from varedit_nano.scenes.compose import Rng, pick, random_scene
from varedit_nano.scenes.edits import EDITORS, SceneEdit, in_turn
from varedit_nano.scenes.render import draw_pair, draw_scene
from varedit_nano.scenes.scene import Scene
from varedit_nano.scenes.wording import joined, sentence
from varedit_runtime.errors import ConfigError

SHARES = {
    "add": 0.25,
    "remove": 0.12,
    "replace": 0.13,
    "recolour": 0.13,
    "resize": 0.07,
    "move": 0.07,
    "background": 0.08,
    "style": 0.06,
    "compound": 0.09,
}
"""The share of each kind of edit."""

KINDS: tuple[str, ...] = tuple(SHARES)

SMALLEST_CHANGE = 0.005
"""The least share of the picture in which two alternatives must differ."""

PROBE = 64
"""The size in pixels at which this is decided, so that the answer is the same at every size."""


@dataclass(frozen=True)
class EditSample:
    """An edit as pictures, uint8 [S, S, 3]; mask: bool [S, S], the pixels that differ."""

    kind: str
    instruction: str
    source: np.ndarray
    target: np.ndarray
    mask: np.ndarray


def draw_edit(seed: int, size: int = 128, kind: str | None = None) -> EditSample:
    """Draw the edit of a seed, of one of `KINDS` or (None) of any.

    Raises ConfigError on an unknown kind.
    """
    scene, edit, instruction = _plan(seed, kind)
    return _sample(scene, edit, instruction, size)


def draw_alternatives(
    seed: int, size: int = 128, count: int = 12, kind: str | None = None
) -> list[EditSample]:
    """Draw other edits of the scene of `draw_edit(seed, size, kind)`.

    Their targets differ visibly from each other, from the right target and from the source. Up to
    a third are near misses: the right edit with its subject edited once more, or the first half of
    a compound edit. Another third are of the right edit's kind.
    """
    scene, right, _ = _plan(seed, kind)
    rng = np.random.default_rng([seed, 1])
    probes = [draw_scene(scene, PROBE), draw_scene(right.after, PROBE)]
    samples: list[EditSample] = []
    for edit in _others(scene, right, count, rng):
        probe = draw_scene(edit.after, PROBE)
        if all(_mask(probe, other).mean() >= SMALLEST_CHANGE for other in probes):
            probes.append(probe)
            samples.append(_sample(scene, edit, sentence(rng, pick(rng, edit.clauses)), size))
        if len(samples) == count:
            break
    return samples


def draw_turns(seed: int, count: int, size: int = 128) -> list[EditSample]:
    """Draw edits of one scene in turn: local ones, of different things.

    The source of all is the scene before the first; a mask has what differs after any turn so far.
    """
    rng = np.random.default_rng([seed, 4])
    scene = random_scene(rng)
    while not (edits := in_turn(scene, count, rng)):
        scene = random_scene(rng)
    samples: list[EditSample] = []
    changed = np.zeros((size, size), bool)
    for edit in edits:
        sample = _sample(scene, edit, sentence(rng, pick(rng, edit.clauses)), size)
        changed = changed | sample.mask
        samples.append(replace(sample, mask=changed))
    return samples


def draw_picture(seed: int, size: int) -> np.ndarray:
    """Draw a scene before or after an edit, to train a tokenizer on: uint8 [size, size, 3]."""
    rng = np.random.default_rng([seed, 2])
    scene = random_scene(rng)
    edit = EDITORS[pick(rng, KINDS)](scene, rng)
    return draw_scene(edit.after if edit and rng.random() < 0.7 else scene, size)


def vocabulary_text(count: int = 20000) -> Iterator[str]:
    """Yield instructions to build a vocabulary from."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        _, edit = plan_edit(rng)
        yield sentence(rng, pick(rng, edit.clauses))


def draw_kind(rng: Rng, shares: Mapping[str, float]) -> str:
    """Draw a kind of edit; shares: the probability of each kind, in all 1."""
    return str(rng.choice(list(shares), p=list(shares.values())))


def plan_edit(rng: Rng, kind: str | None = None) -> tuple[Scene, SceneEdit]:
    """Draw a scene and an edit of it, of one kind or (None) of any."""
    kind = kind or draw_kind(rng, SHARES)
    while True:
        scene = random_scene(rng)
        for _ in range(4):
            if edit := EDITORS[kind](scene, rng):
                return scene, edit


def _plan(seed: int, kind: str | None) -> tuple[Scene, SceneEdit, str]:
    if kind is not None and kind not in KINDS:
        raise ConfigError(f"unknown kind of edit {kind!r}: choose one of {', '.join(KINDS)}")
    rng = np.random.default_rng(seed)
    scene, edit = plan_edit(rng, kind)
    return scene, edit, sentence(rng, pick(rng, edit.clauses))


def _sample(scene: Scene, edit: SceneEdit, instruction: str, size: int) -> EditSample:
    source, target = draw_pair(scene, edit.after, size)
    return EditSample(edit.kind, instruction, source, target, _mask(source, target))


def _mask(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    differs = source != target
    return differs[..., 0] | differs[..., 1] | differs[..., 2]


def _others(scene: Scene, right: SceneEdit, count: int, rng: Rng) -> Iterator[SceneEdit]:
    """Yield edits of the scene without end, the most similar to the right one first; may repeat."""
    yield from right.steps[:1]
    near = (edit for edit in _random_edits(right.after, 20 * count, rng) if _again(edit, right))
    for edit in islice(near, count // 3):
        clause = joined(rng, pick(rng, right.clauses), pick(rng, edit.clauses))
        yield SceneEdit(right.kind, right.subject, (clause,), edit.after)
    alike = (EDITORS[right.kind](scene, rng) for _ in range(2 * count))
    yield from islice(filter(None, alike), count // 3)
    while True:
        yield from _random_edits(scene, count, rng)


def _again(edit: SceneEdit, right: SceneEdit) -> bool:
    return edit.subject == right.subject and edit.kind != "compound"


def _random_edits(scene: Scene, count: int, rng: Rng) -> Iterator[SceneEdit]:
    for _ in range(count):
        if edit := EDITORS[pick(rng, KINDS)](scene, rng):
            yield edit
