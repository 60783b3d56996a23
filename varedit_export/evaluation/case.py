"""The interfaces of an evaluation: what a benchmark asks for, and what a metric returns."""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from varedit_export.errors import DatasetError
from varedit_runtime.decoding.to_rgb import on_white

OVERALL = "overall"  # the group of all edits in a report
Load = Callable[[], Image.Image]
Values = Mapping[str, float | None]  # scores of one edit by name; None where there is none


@dataclass(frozen=True)
class Case:
    """An edit that a benchmark asks for.

    id: unique in the benchmark. groups: the groups of the report that it counts in, its type first.
    source: loads the picture to edit. after: the case whose result is edited instead, of an edit in
    several turns; it stands earlier. target: loads the right result. mask: loads which pixels the
    edit may change, bool [H, W]. before, caption: what the source shows, and the right result. The
    functions raise DatasetError, which names the row of the data set.
    """

    id: str
    groups: tuple[str, ...]
    instruction: str
    source: Load
    after: str | None = None
    target: Load | None = None
    mask: Callable[[], np.ndarray] | None = None
    before: str | None = None
    caption: str | None = None


@dataclass(frozen=True)
class Edited:
    """An edit that was made, as metrics see it: pictures are RGB, on white where transparent."""

    case: Case
    source: Image.Image
    result: Image.Image

    @cached_property
    def target(self) -> Image.Image | None:
        return None if self.case.target is None else on_white(self.case.target())

    @cached_property
    def mask(self) -> np.ndarray | None:
        """Which pixels may change, bool [H, W]. Raises DatasetError on a mask of another size."""
        if self.case.mask is None:
            return None
        mask = self.case.mask()
        if mask.shape != self.source.size[::-1]:
            raise DatasetError(
                f"the mask of {self.case.id} is {mask.shape[1]} x {mask.shape[0]}, and its picture "
                f"{self.source.width} x {self.source.height}: both must have one size"
            )
        return mask


@dataclass(frozen=True)
class Score:
    """A score of a family. The score of a group is the mean over its edits that have one.

    label: its heading. better: 1 if higher is better, -1 if lower is. digits: after the point.
    """

    name: str
    label: str
    better: int = 1
    digits: int = 3


class Metric(Protocol):
    """What computes a family's scores.

    identity: what the scores depend on, such as a digest of the weights; scores that were made with
    another one are computed again. at_once: how many edits `measure` gets at a time; a metric that
    waits for a server asks for several.
    """

    @property
    def identity(self) -> str: ...
    @property
    def at_once(self) -> int: ...

    def measure(self, edited: Sequence[Edited]) -> Sequence[Values]:
        """Return the scores of each edit. Raises VareditError if they cannot be computed now."""
        ...


@dataclass(frozen=True)
class Family:
    """A family of scores that are computed together.

    open: makes the metric, given its weights. weights: where they are by default, a folder or an
    address on the hub; None if there is no default. files: the files it takes of a repository, in
    choices as `weights.hub` has them; none for a family without weights. benchmark: the only one
    whose edits it can score, if there is one.
    """

    scores: tuple[Score, ...]
    open: Callable[[Path | None], Metric]
    weights: str | None = None
    files: Sequence[Sequence[str]] = ()
    benchmark: str | None = None


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: its data set's format, and how it is scored.

    read: returns the cases of a data set's folder, after checking every row; raises DatasetError.
    families: of metrics, in the report's order. files: of a repository, as for `Family`; none for a
    benchmark without data. weights: of families whose default this benchmark does not take.
    judge: the family that is computed where a judge is named. place: what `--data` can be besides
    the folder of one's own copy, for the message where it is missing.
    """

    title: str
    read: Callable[[Path], list[Case]]
    families: tuple[str, ...]
    files: Sequence[Sequence[str]] = ()
    weights: Mapping[str, str] = field(default_factory=dict)
    judge: str = "judge-paper"
    place: str = ""


@dataclass(frozen=True)
class Wanted:
    """An edit to make. place: of its case in the benchmark."""

    place: int
    source: Image.Image
    instruction: str
    seed: int


Made = Generator[tuple[Wanted, Image.Image | str]]


class Edits(Protocol):
    """What edits pictures.

    name: for the report. identity: what results depend on besides the cases and their seeds.
    """

    @property
    def name(self) -> str: ...
    @property
    def identity(self) -> Mapping[str, Any]: ...

    def edit(self, wanted: Iterable[Wanted]) -> Made:
        """Yield each wanted edit with its result, or why it has none, in any order.

        What is wanted is taken bit by bit, as it has pictures in memory.
        """
        ...


def batches(wanted: Iterable[Wanted], count: int) -> Iterator[list[Wanted]]:
    """Yield lists of up to so many edits."""
    left = iter(wanted)
    while batch := list(islice(left, count)):
        yield batch
