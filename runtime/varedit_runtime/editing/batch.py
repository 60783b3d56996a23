"""The pictures that are edited at once, and the time that their stages take."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from threading import Event
from time import perf_counter

from varedit_runtime.backends.base import StageOutput
from varedit_runtime.editing.arguments import ScaleSettings, Wanted
from varedit_runtime.editing.results import OnScale
from varedit_runtime.errors import one_of_many


class Timings:
    """Seconds by stage, in the order that stages began."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def of(self, stage: str) -> Iterator[None]:
        """Count the time in the context for a stage, besides what it took before."""
        start = perf_counter()
        yield
        self._add(stage, perf_counter() - start)

    def of_each(self, outputs: Iterator[StageOutput]) -> Iterator[StageOutput]:
        """Hand outputs on, counting the time that each takes to come for its stage."""
        start = perf_counter()
        for output in outputs:
            self._add(output.stage, perf_counter() - start)
            yield output
            start = perf_counter()

    def _add(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds


@dataclass(frozen=True)
class PictureBatch:
    """The pictures edited at once.

    rows: padded to the batch. places: those in the results, of which there are `results`.
    """

    rows: Sequence[Wanted]
    places: range
    results: int
    sampling: ScaleSettings
    on_scale: OnScale | None
    cancelled: Event
    timings: Timings = field(default_factory=Timings)

    @property
    def wanted(self) -> Sequence[Wanted]:
        return self.rows[: len(self.places)]

    def naming(self, row: int) -> AbstractContextManager[None]:
        """Say in an error about a row which of the call's results it is."""
        return one_of_many("result", self.places[min(row, len(self.places) - 1)], self.results)

    @property
    def masked(self) -> bool:
        return any(row.mask is not None for row in self.rows)
