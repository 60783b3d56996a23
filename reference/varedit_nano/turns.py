"""nano's second benchmark: five local edits in turn, each of the last one's result.

    varedit-export evaluate nano --benchmark nano-turns -o RUN

- Kept: PSNR to the scene before the first edit, outside all masks so far. Every turn goes
  through the tokenizer once more, and what a turn spoils the next one gets as its source. Where
  masks cover more than half of the picture, it is left out.
- Inside: PSNR to the right scene after these turns, inside the masks so far.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from varedit_export.evaluation.case import Benchmark, Case, Edited, Family, Score, Values
from varedit_nano.benchmark import LARGEST_LOCAL_MASK, psnr
from varedit_nano.data import EVALUATION_SEEDS
from varedit_nano.model import NANO
from varedit_nano.scenes import EditSample, draw_turns

SCENES = 60
TURNS = 5


@lru_cache(maxsize=16)
def right_turns(seed: int, size: int) -> list[EditSample]:
    """Draw the turns of a reserved seed."""
    return draw_turns(seed, TURNS, size)


def turns(size: int = NANO.picture_size[0]) -> list[Case]:
    """Return all turns of the reserved seeds' scenes, with ids such as 7.2, the second of 7."""
    seeds = EVALUATION_SEEDS[:SCENES]
    return [_case(seed, turn, size) for seed in seeds for turn in range(TURNS)]


def _case(seed: int, turn: int, size: int) -> Case:
    def right() -> EditSample:
        return right_turns(seed, size)[turn]

    return Case(
        id=f"{seed}.{turn + 1}",
        groups=(f"turn {turn + 1}",),
        instruction=right().instruction,
        source=lambda: Image.fromarray(right().source),
        after=f"{seed}.{turn}" if turn else None,
        target=lambda: Image.fromarray(right().target),
        mask=lambda: right().mask,
    )


class TurnScores:
    """The metric. It needs no model."""

    at_once = 1
    identity = ""

    def __init__(self, weights: Path | None = None) -> None: ...

    def measure(self, edited: Sequence[Edited]) -> Sequence[Values]:
        return [self._scores(one) for one in edited]

    def _scores(self, one: Edited) -> Values:
        seed, _, turn = one.case.id.partition(".")
        result = np.asarray(one.result)
        return score(right_turns(int(seed), len(result))[int(turn) - 1], result)


def score(right: EditSample, result: np.ndarray) -> Values:
    """Score the result of a turn."""
    local = right.mask.mean() <= LARGEST_LOCAL_MASK
    return {
        "kept": psnr(result, right.source, ~right.mask) if local else None,
        "inside": psnr(result, right.target, right.mask),
    }


FAMILY = Family(
    (Score("kept", "kept dB", digits=2), Score("inside", "inside dB", digits=2)),
    TurnScores,
    benchmark="nano-turns",
)
BENCHMARK = Benchmark("nano's scenes in turns", lambda _: turns(), ("nano-turns",))
