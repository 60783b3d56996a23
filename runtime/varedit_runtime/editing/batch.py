"""The pictures that are edited at once, and the time that their stages take."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from time import perf_counter, process_time

import numpy as np

from varedit_runtime.backends.base import Negatives, Prompts, StageOutput
from varedit_runtime.backends.handle import EditHandle
from varedit_runtime.editing.prepared import Group, Grouping, PreparedEdit
from varedit_runtime.editing.results import OnScale
from varedit_runtime.errors import one_of_many


class Timings:
    """Seconds by stage, in the order that stages began.

    cpu_seconds: the same of the processors, all threads of this process together.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}

    @contextmanager
    def of(self, stage: str) -> Iterator[None]:
        """Count the time in the context for a stage, besides what it took before."""
        start = _clocks()
        yield
        self._add(stage, start)

    def of_each(self, outputs: Iterator[StageOutput]) -> Iterator[StageOutput]:
        """Hand outputs on, counting the time that each takes to come for its stage."""
        start = _clocks()
        for output in outputs:
            self._add(output.stage, start)
            yield output
            start = _clocks()

    def _add(self, stage: str, start: tuple[float, float]) -> None:
        for kept, since, now in zip(
            (self.seconds, self.cpu_seconds), start, _clocks(), strict=True
        ):
            kept[stage] = kept.get(stage, 0.0) + now - since


def _clocks() -> tuple[float, float]:
    return perf_counter(), process_time()


@dataclass(frozen=True)
class PictureBatch:
    """The pictures edited at once.

    rows: the pictures, all of one group; the last one is repeated where the backend takes no batch
    of fewer.
    places: those in the results, of which there are `results`. handle: None where nobody can end
    the edit. waited: see `EditResult`.
    """

    rows: Sequence[PreparedEdit]
    places: Sequence[int]
    results: int
    group: Group
    on_scale: OnScale | None
    handle: EditHandle | None
    waited: float
    timings: Timings = field(default_factory=Timings)

    @property
    def edits(self) -> Sequence[PreparedEdit]:
        return self.rows[: len(self.places)]

    def naming(self, row: int) -> AbstractContextManager[None]:
        """Say in an error about a row which of the call's results it is."""
        return one_of_many("result", self.places[min(row, len(self.places) - 1)], self.results)

    def prompts(self, guided: bool) -> Prompts:
        """Return the texts' token ids; with those of unconditional rows if any scale needs them.

        guided: whether there are such rows.
        """
        length = self.group.text_length
        ids, mask = _padded([one.prompt for one in self.rows], length)
        if not (guided and self.group.guided_scales):
            return Prompts(ids, mask)
        present = np.array([bool(one.negative) for one in self.rows])
        # Rows without a negative prompt use the model's own; their ids here are only a filling.
        negatives = [one.negative or one.prompt for one in self.rows]
        return Prompts(ids, mask, Negatives(*_padded(negatives, length), present))

    @property
    def masked(self) -> bool:
        return any(row.marked is not None for row in self.rows)


def batches(
    edits: Sequence[PreparedEdit], grouping: Grouping, size: int
) -> Iterator[tuple[Group, list[int]]]:
    """Yield the places of edits that share a batch of at most this size, with their group."""
    groups: dict[Group, list[int]] = {}
    for place, edit in enumerate(edits):
        groups.setdefault(grouping(edit), []).append(place)
    for group, places in groups.items():
        for first in range(0, len(places), size):
            yield group, places[first : first + size]


def _padded(prompts: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Pad token ids; return ids int64 and mask bool, both [B, T]."""
    ids = np.zeros((len(prompts), length), np.int64)
    mask = np.zeros(ids.shape, np.bool_)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
        mask[row, : len(prompt)] = True
    return ids, mask
