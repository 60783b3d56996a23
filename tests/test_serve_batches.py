"""Batches in a real editing process: what one of four pictures does to the other three."""

import asyncio
import pickle
import resource
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from editing import changed_bundle, picture
from msgspec import structs
from poisoned_worker import POISON
from serving import until

from varedit_runtime.backends.auto import wanted_backend
from varedit_runtime.backends.wiring import of_batch
from varedit_runtime.editing.editor import Editor
from varedit_runtime.locate import embedded
from varedit_runtime.manifest import Manifest
from varedit_serve.editing.child import COMMAND, Child
from varedit_serve.editing.messages import Opening
from varedit_serve.editing.queue import Finished, Job, Partial, Queue
from varedit_serve.errors import ApiError
from varedit_serve.metrics import Metrics

PHOTO, SEEDS = picture(64, 48), (1, 2, POISON, 4)
UNSOUND: dict[str, Any] = {"guidance_scale": 1e9, "temperature": 1e-30}  # its logits are not finite
POISONED = sys.executable, str(Path(__file__).with_name("poisoned_worker.py"))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return nano for four pictures at a time."""

    def change(manifest: Manifest) -> Manifest:
        variants = tuple(of_batch(variant, 4) for variant in manifest.variants)
        return structs.replace(manifest, variants=variants)

    return changed_bundle(tmp_path_factory.mktemp("four"), change, embedded)


@pytest.fixture(scope="module")
def editor() -> Iterator[Editor]:
    with Editor.open(embedded(), threads=1) as editor:
        yield editor


@asynccontextmanager
async def editing(
    bundle: Path, largest: int | None = 4, command: Sequence[str] = COMMAND
) -> AsyncIterator[tuple[Queue, Child, list[int]]]:
    """Run a process; yield its queue, itself, and a list that gets the size of each batch."""
    queue, sizes = Queue(Metrics(), largest, deadline=600.0), list[int]()
    backend = wanted_backend("onnxruntime", threads=1)
    child = Child(Opening(bundle, None, backend), queue, command)
    edit = child.edit

    async def noted(orders: list[Any], on_partial: Any) -> Any:
        sizes.append(len(orders))
        return await edit(orders, on_partial)

    child.edit = noted  # type: ignore[method-assign]
    works = [asyncio.create_task(work) for work in (child.run(), queue.run(child))]
    try:
        await until(lambda: child.ready, 120)  # it loads libraries and edits
        yield queue, child, sizes
    finally:
        for work in works:
            work.cancel()
            with suppress(asyncio.CancelledError):
                await work


def submitted(editor: Editor, queue: Queue, unsound: int | None = None) -> list[Job]:
    """Submit four edits at once. unsound: the place of the one whose arithmetic must fail."""
    jobs = []
    for place, seed in enumerate(SEEDS):
        own = UNSOUND if place == unsound else {}
        edit = editor.prepare(PHOTO, "add a hat", seed=0, **own)
        prepared, group = pickle.dumps(edit), editor.grouping(edit)
        jobs.append(Job(prepared, edit.size, group, [seed], (0,) if place == 0 else ()))
        queue.submit(jobs[-1])
    return jobs


async def outcome(job: Job) -> Any:
    """Return a job's picture or error."""
    while isinstance(event := await job.events.get(), Partial):
        pass
    return event.result.image if isinstance(event, Finished) else event


def check(editor: Editor, outcomes: list[Any], failed: int) -> None:
    """Check that one edit alone failed, and that the others are what they are alone."""
    error = outcomes[failed]
    assert isinstance(error, ApiError) and (error.status, error.retry) == (500, False)
    for place, seed in enumerate(SEEDS):
        if place != failed:
            assert outcomes[place] == editor.edit(PHOTO, "add a hat", seed=seed).image


def test_a_picture_that_kills_the_process_fails_alone(four: Path, editor: Editor) -> None:
    async def test() -> None:
        async with editing(four, command=POISONED) as (queue, child, sizes):
            jobs, pid = submitted(editor, queue), child.pid
            outcomes = [await outcome(job) for job in jobs]
            assert sizes == [4, 1, 1, 1, 1] and child.pid != pid
            check(editor, outcomes, SEEDS.index(POISON))

    asyncio.run(test())


@pytest.mark.skipif(sys.platform != "linux", reason="limits of other processes are Linux's")
def test_a_process_that_runs_out_of_memory_is_replaced_and_loses_nothing(
    four: Path, editor: Editor
) -> None:
    async def test() -> None:
        async with editing(four) as (queue, child, sizes):
            pid = child.pid
            assert pid is not None
            _, most = resource.prlimit(pid, resource.RLIMIT_AS)
            # It has what it has, which was enough for one picture, and gets no more.
            resource.prlimit(pid, resource.RLIMIT_AS, (1, most))
            jobs = submitted(editor, queue)
            outcomes = [await outcome(job) for job in jobs]
            assert sizes == [4, 1, 1, 1, 1] and child.pid != pid
            for seed, image in zip(SEEDS, outcomes, strict=True):
                assert image == editor.edit(PHOTO, "add a hat", seed=seed).image

    asyncio.run(test())


def test_an_edit_whose_numbers_are_not_finite_fails_alone_and_the_process_stays(
    four: Path, editor: Editor
) -> None:
    async def test() -> None:
        async with editing(four) as (queue, child, sizes):
            jobs, pid = submitted(editor, queue, unsound=1), child.pid
            outcomes = [await outcome(job) for job in jobs]
            assert sizes == [4, 1, 1, 1, 1] and child.pid == pid
            check(editor, outcomes, 1)

    asyncio.run(test())


def test_of_four_that_run_one_can_leave(four: Path, editor: Editor) -> None:
    async def test() -> None:
        async with editing(four) as (queue, _, sizes):
            jobs = submitted(editor, queue)
            assert isinstance(await jobs[0].events.get(), Partial)  # the first scale is done
            assert queue.leave(jobs[3]) == "running"
            for job, seed in zip(jobs[:3], SEEDS, strict=False):
                assert await outcome(job) == editor.edit(PHOTO, "add a hat", seed=seed).image
            assert sizes == [4]

    asyncio.run(test())


def test_on_a_cpu_pictures_are_edited_one_by_one_unless_asked(four: Path, editor: Editor) -> None:
    async def test() -> None:
        async with editing(four, largest=None) as (queue, _, sizes):
            for job in submitted(editor, queue):
                await outcome(job)
            assert sizes == [1, 1, 1, 1]

    asyncio.run(test())
