"""Make the edits of an evaluation on a Ray cluster.

Processes of the cluster edit. This one alone reads the data set and writes the run, so that a run
is the same whatever made its edits, and continues in either way.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import ray
from PIL import Image
from ray.exceptions import RayError, RayTaskError

from varedit_export.evaluation.bundle_edits import BundleEdits, Opening
from varedit_export.evaluation.case import Made, Wanted, batches
from varedit_runtime.editing.editor import Editor
from varedit_runtime.errors import BackendError, VareditError, reason
from varedit_runtime.terminal.ray_cluster import DIED, RETRIES, most_editors, resources


class RayEdits:
    """Edits of a bundle, made on the cluster that this process has joined."""

    def __init__(self, edits: BundleEdits) -> None:
        self.name, self.identity, self._edits = edits.name, edits.identity, edits

    def edit(self, wanted: Iterable[Wanted]) -> Made:
        """Make edits; see `Edits`. Raises BackendError if the cluster has no room for one."""
        edits, given = self._edits, resources(self._edits.opening.backend)
        count = most_editors(edits.bundle, edits.variant, given)
        backend = edits.opening.backend.with_threads(int(given["num_cpus"]))
        kind: Any = ray.remote(
            num_cpus=given["num_cpus"],
            num_gpus=given["num_gpus"],
            max_restarts=-1,
            max_task_retries=RETRIES,
        )(_Editing)
        opening = replace(edits.opening, backend=backend)
        actors = [kind.remote(opening) for _ in range(count)]
        try:
            yield from _spread(actors, batches(wanted, edits.variant.batch))
        finally:
            for actor in actors:
                ray.kill(actor)


def _spread(actors: Sequence[Any], waiting: Iterator[list[Wanted]]) -> Made:
    """Give each process a batch whenever it has none, and yield what they made.

    A process that the cluster has no room for yet, or that has not opened the bundle, has none.
    """
    busy: dict[Any, tuple[Any, list[Wanted]]] = {a.edit.remote([]): (a, []) for a in actors}
    alone = list[list[Wanted]]()
    while busy:
        (done, *_), _ = ray.wait([*busy], num_returns=1)
        actor, batch = busy.pop(done)
        outcome = _outcome(done, batch)
        if outcome is None:
            alone += [[one] for one in batch]
        more = alone.pop() if alone else next(waiting, None)
        if more is not None:
            busy[actor.edit.remote(more)] = actor, more
        if outcome is not None:
            yield from zip(batch, outcome, strict=True)
        if more is None and not any(batch for _, batch in busy.values()):
            return


def _outcome(done: Any, batch: list[Wanted]) -> Sequence[Image.Image | str] | None:
    """Return the results of a batch; None if its process died, and each is to be edited alone.

    Of one edit that is why it has no result. Raises BackendError if the process cannot open the
    bundle, or fails, and what it raised itself.
    """
    try:
        outcome = ray.get(done)
    except RayTaskError as error:
        raise BackendError(f"a process that edits failed: {reason(error.cause)}") from error
    except RayError as error:
        if not batch:
            told = f"a process that opens the bundle {DIED}: its machine may lack memory"
            raise BackendError(told) from error
        return [f"the process that edited it {DIED}"] if len(batch) == 1 else None
    if isinstance(outcome, VareditError):
        raise outcome
    return outcome


class _Editing:
    """A process that edits batches, with an editor of its own."""

    def __init__(self, opening: Opening) -> None:
        self._opening = opening

    @cached_property
    def _editor(self) -> Editor:
        return self._opening.editor()

    def edit(self, batch: list[Wanted]) -> list[Image.Image | str] | VareditError:
        """Return the results of a batch; none of an empty one, for which the bundle is opened."""
        try:
            return self._opening.results(self._editor, batch)
        except VareditError as error:
            return error
