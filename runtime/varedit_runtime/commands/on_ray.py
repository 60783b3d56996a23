"""Edit several pictures on a Ray cluster, with Ray Data.

Processes of the cluster read pictures and edit them. This process alone writes results and the
record, so that each result is written once, however often one that died makes Ray edit it again.
"""

import logging
import pickle
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import cached_property
from io import BytesIO
from pathlib import Path
from time import perf_counter
from typing import Any

from PIL import Image
from ray.data import ActorPoolStrategy, DataContext, from_items
from ray.exceptions import RayError
from ray.util.annotations import RayDeprecationWarning

from varedit_runtime.backends import ChosenBackend
from varedit_runtime.commands.job import Job, KnownJob, OpenJob
from varedit_runtime.commands.orders import Order, Orders
from varedit_runtime.commands.record import Record
from varedit_runtime.commands.several import Results, Told, opened_pictures, read_order
from varedit_runtime.editing.preparer import Preparer
from varedit_runtime.editing.results import EditResult
from varedit_runtime.errors import BackendError, BundleError, EditWarning, VareditError, reason
from varedit_runtime.locate import Found
from varedit_runtime.pictures import FileContent, encode_picture
from varedit_runtime.terminal.ray_cluster import DIED, RETRIES, most_editors, resources

_MOST_BLOCKS = 1000  # that the orders are divided into
_READING = 0.5  # of a core, for a task that reads pictures: the processes that edit leave one


@dataclass(frozen=True)
class _Read:
    """An order as it was read. image: None if the record has the key of a result of it."""

    order: Order
    key: str
    image: FileContent | None = None
    mask: FileContent | None = None


@dataclass(frozen=True)
class _Edited:
    """A result. kept: the files to write. turns: without their pictures."""

    key: str
    kept: list[bytes]
    turns: list[EditResult]
    chosen: ChosenBackend | None
    provider: str


@dataclass(frozen=True)
class _Unopened:
    """Why a process cannot open the bundle."""

    error: VareditError


_Outcome = _Read | _Edited | _Unopened | VareditError
_Row = dict[str, Any]  # place: that of the order; told: an _Outcome, pickled


def edit_on_ray(orders: Orders, count: int, folder: Path, job: Job) -> int:
    """Do what `edit_several` does, on the cluster that this process has joined."""
    found = job.find()
    preparer = Preparer.open(found.path, variant=job.variant, digest=job.digest)
    known = KnownJob(job, found, preparer.bundle, preparer.variant)
    known.check_then()
    record = Record(folder)
    with Told(known, count) as told, redirect_stdout(sys.stderr):  # where Ray tells of faults
        results = Results(known, told, record, orders)
        left = dict(enumerate(orders))
        keys = frozenset[str]() if job.overwrite else record.keys
        while left:
            left, keys = _pass(known, results, left, keys), frozenset[str]()
    return told.ended()


def _pass(
    known: KnownJob,
    results: Results,
    left: dict[int, Order],
    keys: frozenset[str],
    alone: bool = False,
) -> dict[int, Order]:
    """Edit orders; return those whose results are not in the record, although their keys are.

    A file was changed since, or equal orders are more than there are results. keys: see `_reading`.
    alone: edit each in a batch of its own. What is lost runs so once more: a picture that ends its
    process takes others with it.
    """
    begun, again = perf_counter(), dict[int, Order]()
    for place, outcome in _outcomes(known, left, keys, alone):
        order = left.pop(place)
        if isinstance(outcome, _Unopened):
            raise outcome.error
        if isinstance(outcome, VareditError):
            results.told.failed(place, order, outcome)
        elif isinstance(outcome, _Edited):
            known.chosen, known.provider = outcome.chosen, outcome.provider
            for text in outcome.turns[-1].warnings:
                warnings.warn(text, EditWarning, stacklevel=2)
            now, image = perf_counter(), Image.open(BytesIO(outcome.kept[-1]))
            turns = [replace(turn, image=image) for turn in outcome.turns]  # which tell its size
            results.write(place, order, outcome.key, outcome.kept, turns, now - begun)
            begun = now
        elif not results.finished(order, outcome.key):
            again[place] = order
    if left and not alone:
        return again | _pass(known, results, left, keys, alone=True)
    for place, order in left.items():
        lost = BackendError(f"the process that edited it {DIED}")
        results.told.failed(place, order, lost)
    return again


def _outcomes(
    known: KnownJob, orders: Mapping[int, Order], keys: frozenset[str], alone: bool
) -> Iterator[tuple[int, _Outcome]]:
    """Yield places and what becomes of their orders; nothing of those whose process died."""
    context = DataContext.get_current()
    context.max_errored_blocks, context.enable_progress_bars = -1, False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    batch, given = 1 if alone else known.variant.batch, resources(known.job.backend)
    most = most_editors(known.bundle, known.variant, given, spare=1)  # for those that read
    threads = int(given["num_cpus"])
    job = replace(known.job, backend=known.job.backend.with_threads(threads))
    items = [{"place": place, "told": pickle.dumps(order)} for place, order in orders.items()]
    blocks = len(items) if alone else max(1, min(len(items) // batch, _MOST_BLOCKS))
    ahead = 1 if alone else 2  # batches that one process has at a time
    common = known.common

    def read(row: _Row) -> _Row:
        return {**row, "told": pickle.dumps(_reading(pickle.loads(row["told"]), common, keys))}

    rows = from_items(items, override_num_blocks=blocks).map(read, num_cpus=_READING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RayDeprecationWarning)  # the number of retries has no other
        rows = rows.map_batches(
            _Editing,
            fn_constructor_args=(job, known.found, known.bundle.digest),
            batch_size=batch,
            batch_format="pandas",
            compute=ActorPoolStrategy(
                min_size=1, max_size=most, max_tasks_in_flight_per_actor=ahead
            ),
            num_cpus=given["num_cpus"],
            num_gpus=given["num_gpus"],
            max_restarts=-1,
            max_task_retries=RETRIES,
        )
    try:
        for row in rows.iter_rows():
            yield row["place"], pickle.loads(row["told"])
    except RayError as error:
        raise BackendError(f"Ray cannot go on: {reason(error)}") from error


def _reading(order: Order, common: Mapping[str, Any], keys: frozenset[str]) -> _Outcome:
    """Read an order's pictures, unless it has one of the keys."""
    try:
        key, image, mask = read_order(order, common)
    except VareditError as error:
        return error
    return _Read(order, key) if key in keys else _Read(order, key, image, mask)


class _Editing:
    """Edits batches, with an editor of its own."""

    def __init__(self, job: Job, found: Found, digest: str) -> None:
        """digest: of the bundle, which another machine must have too.

        It is opened by the first call: Ray bounds how often a call is made again whose process
        dies, and not how often a process is made.
        """
        self._job, self._found, self._digest = job, found, digest

    @cached_property
    def _opened(self) -> OpenJob:
        editor = self._job.open(self._found)
        if editor.bundle.digest != self._digest:
            raise BundleError(f"{self._found.path} is another bundle on another machine")
        return OpenJob(self._job, self._found, editor.bundle, editor.variant, editor=editor)

    def __call__(self, batch: Any) -> Any:
        """Return a batch with what becomes of its orders in place of what was read."""
        outcomes: list[_Outcome] = list(map(pickle.loads, batch["told"]))
        try:
            _ = self._opened
        except VareditError as error:
            return batch.assign(told=[pickle.dumps(_Unopened(error))] * len(outcomes))
        reads = {i: one for i, one in enumerate(outcomes) if isinstance(one, _Read) and one.image}
        for place, outcome in zip(reads, self._outcomes(list(reads.values())), strict=True):
            outcomes[place] = outcome
        return batch.assign(told=list(map(pickle.dumps, outcomes)))

    def _outcomes(self, reads: list[_Read]) -> list[_Outcome]:
        """Edit a batch; if that fails, each picture alone."""
        try:
            return list(map(self._edited, reads, self._edit(reads))) if reads else []
        except VareditError as error:
            if len(reads) == 1:
                return [error]
            return [outcome for one in reads for outcome in self._outcomes([one])]

    def _edit(self, reads: list[_Read]) -> list[tuple[EditResult, ...]]:
        pictures = [opened_pictures(one.image, one.mask) for one in reads if one.image]
        sources, masks = zip(*pictures, strict=True)
        return self._opened.edit([one.order for one in reads], sources, masks)

    def _edited(self, read: _Read, turns: Sequence[EditResult]) -> _Edited:
        editor = self._opened.editor
        kept = [
            encode_picture(turn.image, target=read.order.image)
            for turn in turns[-self._opened.job.kept :]
        ]
        bare = [replace(turn, image=Image.new("1", (1, 1))) for turn in turns]
        return _Edited(read.key, kept, bare, editor.chosen, editor.provider)
