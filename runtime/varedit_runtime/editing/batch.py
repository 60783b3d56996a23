"""The pictures that are edited at once, and the time that their stages take."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from threading import Event
from time import perf_counter, process_time

import numpy as np

from varedit_runtime.backends.base import Negatives, Prompts, StageOutput
from varedit_runtime.editing.arguments import Wanted
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

    rows: the pictures; the last one is repeated up to the size of the batch. places: those in the
    results, of which there are `results`. guided_scales: how many scales, the first ones, need
    unconditional rows.
    """

    rows: Sequence[Wanted]
    places: range
    results: int
    guided_scales: int
    on_scale: OnScale | None
    cancelled: Event
    timings: Timings = field(default_factory=Timings)

    @property
    def wanted(self) -> Sequence[Wanted]:
        return self.rows[: len(self.places)]

    def naming(self, row: int) -> AbstractContextManager[None]:
        """Say in an error about a row which of the call's results it is."""
        return one_of_many("result", self.places[min(row, len(self.places) - 1)], self.results)

    def prompts(self, guided: bool, lengths: Sequence[int]) -> Prompts:
        """Return the texts' token ids; with those of unconditional rows if any scale needs them.

        guided: whether there are such rows. lengths: that texts may be padded to; the first that
        all of them fit into is taken.
        """
        prompts = [one.prompt for one in self.rows]
        # Rows without a negative prompt use the model's own; their ids here are only a filling.
        negatives = [one.negative or one.prompt for one in self.rows]
        if not (guided and self.guided_scales):
            negatives = []
        longest = max(map(len, (*prompts, *negatives)))
        length = next(length for length in lengths if length >= longest)
        ids, mask = _padded(prompts, length)
        if not negatives:
            return Prompts(ids, mask)
        present = np.array([bool(one.negative) for one in self.rows])
        return Prompts(ids, mask, Negatives(*_padded(negatives, length), present))

    @property
    def masked(self) -> bool:
        return any(row.mask is not None for row in self.rows)


def guided_scales(guidances: Iterable[Sequence[float]]) -> int:
    """Return how many scales, the first ones, need unconditional rows for some picture."""
    guided = (
        scale + 1 for guidance in guidances for scale, value in enumerate(guidance) if value != 1
    )
    return max(guided, default=0)


def _padded(prompts: Sequence[list[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Pad token ids; return ids int64 and mask bool, both [B, T]."""
    ids = np.zeros((len(prompts), length), np.int64)
    mask = np.zeros(ids.shape, np.bool_)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
        mask[row, : len(prompt)] = True
    return ids, mask
