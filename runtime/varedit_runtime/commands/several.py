"""Edit several pictures into a folder: what was finished before is skipped, failures are told."""

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

import click
from PIL import Image

from varedit_runtime.commands.job import Job, KnownJob, OpenJob
from varedit_runtime.commands.orders import Order, Orders
from varedit_runtime.commands.record import Record, key_of
from varedit_runtime.commands.results import edited_names, step_names, write_steps
from varedit_runtime.editing.masks import fitted
from varedit_runtime.editing.results import EditResult
from varedit_runtime.errors import PictureError, VareditError, printable, reason
from varedit_runtime.pictures import FileContent, open_mask, open_picture, read_file
from varedit_runtime.terminal.command import error_as_json, say
from varedit_runtime.terminal.streams import OutputError


def edit_several(orders: Orders, count: int, folder: Path, job: Job) -> int:
    """Edit pictures, of which there are `count`; return how many could not be edited."""
    record = Record(folder)
    with job.opened() as opened, Told(opened, count) as told:
        run = _LocalRun(Results(opened, told, record, orders), opened)
        places = enumerate(orders)
        while waiting := list(islice(run.waiting(places), opened.variant.batch)):
            run.edit(waiting)
    return told.ended()


def read_order(
    order: Order, common: Mapping[str, Any]
) -> tuple[str, FileContent, FileContent | None]:
    """Return the key of an order, its picture and its mask as their files have them.

    common: see `KnownJob.common`. Raises PictureError.
    """
    order.check_files()
    # Once: what is recorded is what was edited, though others write to the file meanwhile.
    image, marked = read_file(order.image), order.mask and read_file(order.mask)
    return key_of(order, image, marked, common), image, marked


def opened_pictures(
    image: FileContent, marked: FileContent | None
) -> tuple[Image.Image, Image.Image | None]:
    """Return a picture and its mask. Raises PictureError."""
    source = open_picture(image)
    return source, marked and fitted(open_mask(marked), source)


def _read_files(orders: Orders) -> frozenset[str]:
    """Return the files that are read, which results must not replace."""
    files = (path for order in orders for path in (order.image, order.mask) if path)
    return frozenset(map(os.path.realpath, files))


@dataclass(frozen=True)
class _Waiting:
    """An order whose picture was read. place: from 0. key: see `record.key_of`."""

    place: int
    order: Order
    key: str
    source: Image.Image
    mask: Image.Image | None


class Results:
    """The results of orders in a record's folder."""

    def __init__(self, known: KnownJob, told: "Told", record: Record, orders: Orders) -> None:
        self.told = told
        self._known, self._folder, self._record, self._own = (
            known,
            record.folder,
            record,
            set[str](),
        )
        # Files that are read are not replaced.
        self._read = _read_files(orders) if known.job.overwrite else frozenset()
        self._untried: dict[str, Iterator[Path]] = {}

    def finished(self, order: Order, key: str) -> bool:
        """Return whether an earlier run finished an order, and tell of it if it did."""
        if self._known.job.overwrite or not (found := self._record.take(key, self._own)):
            return False
        self._own.add(found.output)
        self.told.finished(order, self._folder / found.output, found.seed)
        return True

    def write(
        self,
        place: int,
        order: Order,
        key: str,
        kept: Sequence[Image.Image | bytes],
        turns: Sequence[EditResult],
        seconds: float,
    ) -> None:
        """Write the pictures of an edit that are kept, and tell of it or why that failed."""
        seed, asked = turns[-1].seed, self._known.asked

        def record(path: Path, content: bytes) -> None:
            self._record.add(content, **asked(order, path.name) | {"seed": seed, "key": key})

        try:
            output = write_steps(self._names(order), kept, self._known.job.overwrite, record)
        except PictureError as error:
            self.told.failed(place, order, error)
            return
        self._own.add(output.name)
        self.told.edited(order, output, turns, seconds)

    def _names(self, order: Order) -> Iterator[Path]:
        """Yield names of a result that are of no other of this run, and of no file it reads."""
        stem = order.image.stem
        # Of many pictures of one stem each goes on where the last one found its name.
        for path in self._untried.setdefault(stem, edited_names(self._folder, stem)):
            written = (*step_names(path, self._known.job.kept), path)
            if path.name not in self._own and self._read.isdisjoint(map(os.path.realpath, written)):
                yield path


class _LocalRun:
    """Edits orders in this process."""

    def __init__(self, results: Results, opened: OpenJob) -> None:
        self._results, self._told, self._opened = results, results.told, opened

    def waiting(self, places: Iterator[tuple[int, Order]]) -> Iterator[_Waiting]:
        """Yield the orders that are to be edited; tell of those that are finished or failed."""
        for place, order in places:
            try:
                found = self._prepared(place, order)
            except VareditError as error:
                self._told.failed(place, order, error)
                continue
            if found is not None:
                yield found

    def _prepared(self, place: int, order: Order) -> _Waiting | None:
        key, image, marked = read_order(order, self._opened.common)
        if self._results.finished(order, key):
            return None
        return _Waiting(place, order, key, *opened_pictures(image, marked))

    def edit(self, waiting: Sequence[_Waiting]) -> None:
        """Edit a batch; if that fails, each picture alone."""
        begun = perf_counter()
        try:
            results = self._opened.edit(
                [one.order for one in waiting],
                [one.source for one in waiting],
                [one.mask for one in waiting],
            )
        except VareditError as error:
            if len(waiting) > 1:
                for one in waiting:
                    self.edit([one])
            else:
                self._told.failed(waiting[0].place, waiting[0].order, error)
            return
        for one, turns in zip(waiting, results, strict=True):
            kept = [turn.image for turn in turns][-self._opened.job.kept :]
            seconds = (perf_counter() - begun) / len(waiting)
            self._results.write(one.place, one.order, one.key, kept, turns, seconds)


class Told:
    """Says what becomes of every picture, and on a terminal how much is left."""

    def __init__(self, known: KnownJob, count: int) -> None:
        self._known, self._count = known, count
        self._done = self._failed = self._edited = 0
        self._seconds = 0.0
        self._stack, self._stdout = ExitStack(), sys.stdout
        self._bar: Any = None

    def __enter__(self) -> "Told":
        if sys.stderr.isatty():
            bar = click.progressbar(
                length=self._count,
                label="editing",
                file=sys.stderr,
                show_eta=False,
                show_percent=False,
                show_pos=True,
                item_show_func=lambda _: self._left(),
            )
            self._bar = self._stack.enter_context(bar)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def edited(
        self, order: Order, output: Path, turns: Sequence[EditResult], seconds: float
    ) -> None:
        """Tell of an edit that took some seconds."""
        self._edited += 1
        self._seconds += seconds
        self._say(self._known.tell(order, output, turns))

    def finished(self, order: Order, output: Path, seed: int) -> None:
        """Tell of an edit that an earlier run made."""
        told = self._known.asked(order, output) | {"seed": seed, "finished_before": True}
        as_json = self._known.job.as_json
        self._say(json.dumps(told) if as_json else f"{output}: finished before, seed {seed}")

    def failed(self, place: int, order: Order, error: VareditError) -> None:
        """Tell why a picture was not edited. Raises an error of standard output again."""
        if isinstance(error, OutputError):
            raise error
        self._failed += 1
        which = f"picture {place + 1} of {self._count}"
        if printable(str(order.image)) not in str(error):
            which += f", {order.image}"
        message = printable(f"{which}: {reason(error)}")
        self._clear()
        say(f"Error: {message}")
        if self._known.job.as_json:
            self._say(json.dumps(self._known.asked(order) | error_as_json(error, message, 1)))
        else:
            self._advance()

    def ended(self) -> int:
        """Tell on stderr how many failed, and return that."""
        if self._failed:
            say(f"Error: {self._failed} of {self._count} pictures could not be edited")
        return self._failed

    def _say(self, line: str) -> None:
        self._clear()
        click.echo(line, file=self._stdout)
        self._advance()

    def _clear(self) -> None:
        if self._bar is not None:
            click.echo("\r\033[K", nl=False, file=sys.stderr)

    def _advance(self) -> None:
        self._done += 1
        if self._bar is not None:
            self._bar.update(1)

    def _left(self) -> str | None:
        """Return how long the rest takes, as far as that is known."""
        if not self._edited:
            return None
        left = self._seconds / self._edited * (self._count - self._done)
        if left < 90:
            return f"{left:.0f} s left"
        return f"{left / 60:.0f} min left" if left < 5400 else f"{left / 3600:.1f} h left"
