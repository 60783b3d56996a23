"""A prepared edit: one picture to make, of which everything was checked."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from varedit_runtime.editing.finish import Finish


@dataclass(frozen=True)
class ScaleSettings:
    """Guidance scale and temperature of every scale, coarse to fine."""

    guidance_scale: tuple[float, ...]
    temperature: tuple[float, ...]


def guided_scales(guidance_scale: Sequence[float]) -> int:
    """Return how many scales, the first ones, need unconditional rows."""
    return max((k + 1 for k, value in enumerate(guidance_scale) if value != 1), default=0)


@dataclass(frozen=True, eq=False)
class PreparedEdit:
    """One picture to make, as `Preparer.prepare` returns it; it can be pickled.

    prompt, negative (the negative prompt): token ids. square: the picture as the model sees it,
    uint8 [H, W, 3]. marked: the tokens of the finest grid that may change, bool [h, w]; None for
    all. finish: what the result takes from its source. warnings: why the result will hardly be
    what is wanted, a line each. made_for: facts of the model, which editors compare with their own.
    """

    prompt: Sequence[int]
    negative: Sequence[int] | None
    square: np.ndarray
    marked: np.ndarray | None
    finish: Finish
    warnings: tuple[str, ...]
    settings: ScaleSettings
    made_for: tuple[object, ...]
    seed: int

    @property
    def size(self) -> tuple[int, int]:
        """The result's (width, height)."""
        return self.finish.size


class Group(NamedTuple):
    """What the edits of a batch have in common.

    text_length: the number of tokens that texts are padded to. guided_scales: how many scales, the
    first ones, are computed with unconditional rows.
    """

    text_length: int
    guided_scales: int


@dataclass(frozen=True)
class Grouping:
    """Tells which edits may share a batch, so that each gets the bits that it gets alone.

    Both parts of a group decide how numbers are added up, and so their last bits. text_lengths: the
    backend's. scales: how many there are. drops_rows: whether unconditional rows can be left out.
    """

    text_lengths: tuple[int, ...]
    scales: int
    drops_rows: bool

    def __call__(self, edit: PreparedEdit) -> Group:
        """Return an edit's group: edits of one group may share a batch."""
        guided = guided_scales(edit.settings.guidance_scale) if self.drops_rows else self.scales
        negative = edit.negative if guided and edit.negative else ()
        longest = max(len(edit.prompt), len(negative))
        return Group(next(n for n in self.text_lengths if n >= longest), guided)
