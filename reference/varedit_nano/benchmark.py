"""nano's own benchmark: edits of drawn scenes that it never saw, and their scores.

    varedit-export evaluate nano --benchmark nano -o RUN

- Accuracy: an edit is accurate if its result is closer to the right target than to any other
  candidate: a dozen alternative edits of the scene, and the unchanged source. Closer means a
  smaller mean squared error inside the union of the two edits' masks.
- Preservation: PSNR to the source outside the right mask. Only local edits count: styles,
  backgrounds and masks of more than half of the picture are left out.
- Tokenizer: PSNR of the source's reconstruction.
- Ceiling: the accuracy of the right target's reconstruction. No transformer can do better.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from varedit_export.evaluation.case import Benchmark, Case, Edited, Family, Score, Values
from varedit_nano.data import EVALUATION_SEEDS, to_model, to_pixels
from varedit_nano.model import NANO, TOKENIZER_FILE, WEIGHTS, load_nano
from varedit_nano.scenes import KINDS, EditSample, draw_alternatives, draw_edit
from varedit_reference.pipeline import VAREdit
from varedit_reference.quantisation import quantise
from varedit_runtime.bundle import file_digest

EDITS = 540
ALTERNATIVES = 12
GLOBAL_KINDS = ("background", "style")
LARGEST_LOCAL_MASK = 0.5


@dataclass(frozen=True)
class Question:
    """An edit to make, and the alternative edits that its result is compared with."""

    seed: int
    right: EditSample
    alternatives: list[EditSample]


def kind_of(seed: int) -> str:
    """Return the kind of a seed's edit: all kinds in turn."""
    return KINDS[seed % len(KINDS)]


@lru_cache(maxsize=16)
def right_edit(seed: int, size: int) -> EditSample:
    """Draw the edit of a reserved seed."""
    return draw_edit(seed, size, kind_of(seed))


def draw_question(seed: int, size: int) -> Question:
    """Draw the edit of a reserved seed, and its alternatives."""
    alternatives = draw_alternatives(seed, size, ALTERNATIVES, kind_of(seed))
    return Question(seed, right_edit(seed, size), alternatives)


def scenes(size: int = NANO.picture_size[0]) -> list[Case]:
    """Return the edits of the reserved seeds, whose ids are their seeds."""
    return [_case(seed, size) for seed in EVALUATION_SEEDS[:EDITS]]


def _case(seed: int, size: int) -> Case:
    return Case(
        id=str(seed),
        groups=(kind_of(seed),),
        instruction=right_edit(seed, size).instruction,
        source=lambda: Image.fromarray(right_edit(seed, size).source),
        target=lambda: Image.fromarray(right_edit(seed, size).target),
        mask=lambda: right_edit(seed, size).mask,
    )


class SceneScores:
    """The metric; it reconstructs pictures with the model's tokenizer, by default nano's."""

    at_once = 1

    def __init__(self, weights: Path | None = None, model: VAREdit | None = None) -> None:
        self.identity = file_digest((weights or WEIGHTS) / TOKENIZER_FILE)
        self._given = model

    @cached_property
    def _model(self) -> VAREdit:
        return self._given or load_nano()

    def measure(self, edited: Sequence[Edited]) -> Sequence[Values]:
        return [self._scores(one) for one in edited]

    def _scores(self, one: Edited) -> Values:
        result = np.asarray(one.result)
        question = draw_question(int(one.case.id), len(result))
        right = question.right
        again = reconstruct(self._model, [right.source, right.target])
        return score(question, result, *again)


@torch.inference_mode()
def reconstruct(model: VAREdit, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Encode pictures to the tokenizer's bits and decode them, uint8 [S, S, 3]."""
    device = next(model.tokenizer.parameters()).device
    batch = torch.from_numpy(np.stack(pictures)).to(device)
    grids, patch = model.config.transformer.grids, model.config.tokenizer.patch
    positions = [(rows * patch, columns * patch) for rows, columns in grids]
    *_, last = quantise(model.tokenizer.encode(to_model(batch)), positions)
    return list(to_pixels(model.tokenizer.decode(last.sum)))


def score(
    question: Question, result: np.ndarray, source_again: np.ndarray, target_again: np.ndarray
) -> Values:
    """Score a result, given the tokenizer's reconstructions of source and target."""
    right = question.right
    narrowest = margin(question, result)
    local = right.kind not in GLOBAL_KINDS and right.mask.mean() <= LARGEST_LOCAL_MASK
    return {
        "accuracy": 100.0 * (narrowest > 0),
        "margin": narrowest,
        "preservation": psnr(result, right.source, ~right.mask) if local else None,
        "tokenizer": psnr(source_again, right.source),
        "ceiling": 100.0 * (margin(question, target_again) > 0),
    }


def margin(question: Question, result: np.ndarray) -> float:
    """Return the smallest margin of an edit over its candidates, in [-1, 1]; accurate if > 0.

    A margin is (e - r) / (e + r), with the squared errors r to the right target and e to the
    candidate, inside the union of the masks. NaN counts as -1.
    """
    right = question.right
    others = [(other.target, right.mask | other.mask) for other in question.alternatives]
    others.append((right.source, right.mask))
    margins = []
    for other, region in others:
        to_right = squared_error(result, right.target, region)
        to_other = squared_error(result, other, region)
        margins.append((to_other - to_right) / (to_other + to_right))
    return float(np.nan_to_num(min(margins, key=lambda m: -np.inf if np.isnan(m) else m), nan=-1.0))


def squared_error(a: np.ndarray, b: np.ndarray, region: np.ndarray | None = None) -> float:
    """Return the mean squared difference of pictures [S, S, 3] (0 .. 255) in a region [S, S]."""
    difference = a.astype(np.float64) - b
    return float(np.mean(np.square(difference if region is None else difference[region])))


def psnr(a: np.ndarray, b: np.ndarray, region: np.ndarray | None = None) -> float:
    """Return the PSNR in dB, 10·log10(255² / error); 100 for equal pictures."""
    error = squared_error(a, b, region)
    return float(10 * np.log10(255**2 / max(error, 255**2 * 1e-10)))


FAMILY = Family(
    (
        Score("accuracy", "accurate %", digits=1),
        Score("margin", "margin"),
        Score("preservation", "kept dB", digits=2),
        Score("tokenizer", "tokenizer dB", digits=2),
        Score("ceiling", "ceiling %", digits=1),
    ),
    SceneScores,
    benchmark="nano",
)
SCENES = Benchmark("nano's scenes", lambda _: scenes(), ("nano",))
