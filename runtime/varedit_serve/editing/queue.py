"""Pictures that wait, the batches that they are edited in, and what runs again after a fault."""

import asyncio
import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any, Protocol

from PIL import Image

from varedit_runtime.editing.results import EditResult
from varedit_serve.editing.child import BatchFailedError, ChildDiedError
from varedit_serve.editing.messages import Order, Ready
from varedit_serve.errors import ApiError
from varedit_serve.metrics import Metrics

FAULTS = 2  # of the process while it edits a picture; then the picture is to blame
_PIXEL = 4  # bytes of a decoded picture, about as many as the base64 of an encoded one has at most

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Partial:
    """A preview of a job's one picture. index: from 0, coarse to fine."""

    index: int
    image: Image.Image


@dataclass(frozen=True)
class Finished:
    """A job's result. place: which one it is."""

    place: int
    result: EditResult


@dataclass(eq=False)
class Job:
    """A request's pictures, all of one prepared edit.

    size: (width, height) of each. group: edits of one group can share a batch. events: what happens
    to them, in order; ApiError is the last one.
    """

    prepared: bytes
    size: tuple[int, int]
    group: Hashable
    seeds: Sequence[int]
    previews: tuple[int, ...]
    events: "asyncio.Queue[Partial | Finished | ApiError]" = field(default_factory=asyncio.Queue)
    over: bool = False  # nobody waits for more
    timer: asyncio.TimerHandle | None = None

    @property
    def memory(self) -> int:
        """The bytes of the edit, its results and its previews."""
        pictures = len(self.seeds) + len(self.previews)
        return len(self.prepared) + pictures * self.size[0] * self.size[1] * _PIXEL


@dataclass(eq=False)
class _Picture:
    job: Job
    place: int
    since: float
    alone: bool = False  # it was in a batch that failed
    faults: int = 0
    told: int = 0  # previews

    @property
    def order(self) -> Order:
        return Order(self.job.prepared, self.job.seeds[self.place], self.job.previews)


class Lane(Protocol):
    """What edits one batch at a time: a `Child`, or a lane to the replicas of Ray."""

    @property
    def ready(self) -> bool:
        """Whether it can edit now."""
        ...

    async def edit(
        self, orders: list[Order], on_partial: Callable[[int, int, Any], None]
    ) -> list[EditResult]:
        """Edit a batch; see `Child.edit`."""
        ...

    def cancel(self) -> None:
        """End the batch that is edited."""

    def replace(self, why: str) -> None:
        """Have the process replaced."""


class Queue:
    """Feeds the processes that edit, each by a `run` of its own.

    largest: pictures of a batch; None for as many as pay where they are edited. facts: what the
    last process that became ready told of its editor, which is that of all; None before it.
    """

    def __init__(self, metrics: Metrics, largest: int | None, deadline: float) -> None:
        self._metrics, self._largest, self._deadline = metrics, largest, deadline
        self._waiting: list[_Picture] = []
        self._running: dict[Lane, list[_Picture]] = {}
        self._wake = asyncio.Event()
        self._seconds = 1.0  # that a process takes for a picture, about
        self.facts: Ready | None = None
        metrics.watch_queue(lambda: len(self._waiting), lambda: self.ready)

    @property
    def ready(self) -> int:
        """How many processes can edit now."""
        return sum(lane.ready for lane in list(self._running))  # a thread may ask, for metrics

    def on_ready(self, facts: Ready) -> None:
        """Look again for what can be done: a process is ready."""
        self.facts, self._seconds = facts, facts.seconds
        if facts.seconds > self._deadline:
            told = "an edit takes %.0f s and --deadline is %g s: no request will be answered"
            _log.warning(told, facts.seconds, self._deadline)
        self.wake()

    def wake(self) -> None:
        """Look again for what can be done."""
        self._wake.set()

    def on_restart(self, why: str) -> None:
        """Count a process that is replaced."""
        self._metrics.restarted(why)

    def retry_after(self) -> float:
        """Return the seconds until what waits now may be done."""
        pictures = len(self._waiting) + sum(map(len, self._running.values()))
        return pictures * self._seconds / max(1, self.ready)

    def submit(self, job: Job) -> None:
        """Let a job's pictures wait for their turn."""
        loop = asyncio.get_running_loop()
        places = range(len(job.seeds))
        self._waiting += [_Picture(job, place, loop.time()) for place in places]
        job.timer = loop.call_later(self._deadline, self._expire, job)
        self.wake()

    def leave(self, job: Job) -> str | None:
        """Drop what is left of a job; return "waiting" or "running" if anything was, else None."""
        if job.timer is not None:
            job.timer.cancel()
        job.over = True
        waiting = [one for one in self._waiting if one.job is job]
        self._waiting = [one for one in self._waiting if one.job is not job]
        running = False
        for lane, batch in self._running.items():
            if any(one.job is job for one in batch):
                running = True
                if all(one.job.over for one in batch):
                    lane.cancel()
        return "running" if running else "waiting" if waiting else None

    def _expire(self, job: Job) -> None:
        if not job.over and (when := self.leave(job)) is not None:
            self._metrics.cancelled(f"{when}, past the deadline")
            told = f"the server is busy: the edit was not done within {self._deadline:g} s"
            error = ApiError(503, told, code="deadline", retry_after=self.retry_after())
            job.events.put_nowait(error)

    async def run(self, lane: Lane) -> None:
        """Edit what waits by one lane, batch by batch, until cancelled."""
        self._running[lane] = []
        try:
            while True:
                self._wake.clear()
                if self._waiting and lane.ready:
                    await self._run_batch(lane, self._next_batch())
                else:
                    await self._wake.wait()
        finally:
            del self._running[lane]

    def _next_batch(self) -> list[_Picture]:
        """Return what one process shall edit: its share, where others have nothing to do."""
        assert self.facts is not None
        idle = sum(lane.ready and not batch for lane, batch in self._running.items())
        size = min(self._largest or self.facts.usual, self.facts.batch)
        size = min(size, ceil(len(self._waiting) / idle))
        first = self._waiting[0]
        batch = [first]
        if not first.alone:
            batch = [
                one for one in self._waiting if one.job.group == first.job.group and not one.alone
            ][:size]
        self._waiting = [one for one in self._waiting if one not in batch]
        return batch

    async def _run_batch(self, lane: Lane, batch: list[_Picture]) -> None:
        start = asyncio.get_running_loop().time()
        self._running[lane] = batch
        self._metrics.started([start - one.since for one in batch if not one.alone], len(batch))

        def on_partial(place: int, index: int, image: Image.Image) -> None:
            picture = batch[place]
            if index == picture.told and not picture.job.over:  # after a fault some come again
                picture.told += 1
                picture.job.events.put_nowait(Partial(index, image))

        try:
            results = await lane.edit([one.order for one in batch], on_partial)
        except (ChildDiedError, BatchFailedError) as error:
            self._run_again(batch, error)
            judged = isinstance(error, ChildDiedError) or error.own
            if not judged and any(one.faults == 1 and not one.job.over for one in batch):
                lane.replace("failed")  # the fault may be the process's: judge in another one
            return
        finally:
            self._running[lane] = []
        elapsed = (asyncio.get_running_loop().time() - start) / len(batch)
        self._seconds = (3 * self._seconds + elapsed) / 4
        self._metrics.edited(results[0].timings)
        for picture, result in zip(batch, results, strict=True):
            picture.job.events.put_nowait(Finished(picture.place, result))

    def _run_again(self, batch: list[_Picture], error: ChildDiedError | BatchFailedError) -> None:
        """Let pictures whose batch failed run alone; blame one that does so again."""
        suspects, faults = [one for one in batch if not one.job.over], 1
        if isinstance(error, BatchFailedError) and error.own:
            # Of several it is not said which one; one that is alone would fail again.
            faults = FAULTS if len(batch) == 1 else 0
        for picture in suspects:
            picture.alone, picture.faults = True, picture.faults + faults
            if picture.faults >= FAULTS and not picture.job.over:
                why = str(error) or "the editing process ended"
                _log.error("an edit is given up, which would fail again: %s", why)
                self.leave(picture.job)
                told = "the edit failed, and would again: do not send it again"
                picture.job.events.put_nowait(ApiError(500, told, code="edit_failed", retry=False))
        self._waiting[:0] = [one for one in suspects if not one.job.over]
        self.wake()  # others may have nothing to do
