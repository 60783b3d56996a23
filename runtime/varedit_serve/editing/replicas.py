"""Editing processes on a Ray cluster: replicas, which Ray Serve places, watches and replaces.

The queue's part is the same as with processes of this machine. As many lanes as there may be
replicas each give one batch at a time to Ray, which finds a replica that is free. The lanes of
replicas that run now take batches. When most of them are busy, Ray starts more.
"""

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from varedit_runtime import EditHandle
from varedit_runtime.editing.results import EditResult
from varedit_runtime.errors import BackendError, BundleError, reason
from varedit_runtime.terminal.ray_cluster import check_room, resources
from varedit_serve.editing.child import BatchFailedError, ChildDiedError, patience
from varedit_serve.editing.messages import BEAT, Opening, Order, Ready
from varedit_serve.editing.queue import Queue
from varedit_serve.editing.worker import edit_orders, opened

EDITING = "Replica"
BUSY = 0.7  # the part of time that replicas may edit before there are more of them
_DRAIN_SECONDS = 120  # for a replica that Ray takes away to finish its edit

_log = logging.getLogger(__name__)


class Replica:
    """Edits with an editor of its own."""

    def __init__(self, opening: Opening, digest: str) -> None:
        """digest: of the bundle that is served, which another machine must have too."""
        self._editor, self._facts = opened(opening)
        if self._editor.bundle.digest != digest:
            raise BundleError(f"{opening.bundle} is another bundle on another machine")
        self._thread, self._late = ThreadPoolExecutor(1), float("inf")

    async def facts(self) -> Ready:
        """Return what the queue has to know of the editor."""
        return self._facts

    async def edit(self, orders: list[Order]) -> AsyncIterator[tuple[Any, ...]]:
        """Yield what `edit_orders` tells of a batch.

        If the editor fails, the process ends, which may be damaged or short of memory.
        """
        told, handle = asyncio.Queue[tuple[Any, ...]](), EditHandle()
        loop = asyncio.get_running_loop()

        def tell(*message: Any) -> None:
            if message[0] == "failed" and message[1] != "cancelled" and not message[2]:
                _log.error("the editing process is replaced: %s", message[1])
                os._exit(1)
            loop.call_soon_threadsafe(told.put_nowait, message)

        self._late = time.monotonic() + patience(self._facts, len(orders))
        loop.run_in_executor(self._thread, edit_orders, self._editor, orders, handle, tell)
        try:
            message = ("partial",)
            while message[0] == "partial":
                yield (message := await told.get())
        finally:
            self._late = float("inf")
            handle.cancel()

    def check_health(self) -> None:
        """Raise an error, upon which Ray replaces the process, if an edit takes far too long."""
        if time.monotonic() > self._late:
            raise TimeoutError("an edit is stuck")


@contextmanager
def fleet(
    queue: Queue, opening: Opening, digest: str, least: int, most: int | None
) -> Iterator[tuple[list["Fleet"], list["Lane"]]]:
    """Yield what a server feeds with its queue, on the cluster that this process has joined."""
    name = f"varedit-{os.getpid()}"

    def deploy() -> DeploymentHandle:
        check_room(resources(opening.backend))  # Ray would wait for a machine without end
        application = replicas(opening, digest, least, most or least)
        serve.start(proxy_location="Disabled")  # the server answers HTTP itself
        return serve.run(application, name=name, route_prefix=None)

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    made = Fleet(name, deploy, most or least, queue)
    try:
        yield [made], made.lanes
    finally:
        with suppress(RayServeException):  # Serve may not have started
            serve.delete(name)


def replicas(opening: Opening, digest: str, least: int, most: int) -> serve.Application:
    """Return the part of an application that edits, with so many replicas."""
    scaling: dict[str, Any] = {"num_replicas": least}
    if most > least:
        bounds = {"min_replicas": least, "max_replicas": most}
        scaling = {"autoscaling_config": {**bounds, "target_ongoing_requests": BUSY}}
    given = resources(opening.backend)
    opening = replace(opening, backend=opening.backend.with_threads(int(given["num_cpus"])))
    deployment = serve.deployment(
        name=EDITING,
        max_ongoing_requests=1,
        ray_actor_options=given,
        health_check_period_s=5,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=_DRAIN_SECONDS,
        **scaling,
    )
    return deployment(Replica).bind(opening, digest)


class Lane:
    """Gives replicas one batch at a time, if at least `place` + 1 of them run."""

    def __init__(self, fleet: "Fleet", place: int) -> None:
        self._fleet, self._place = fleet, place
        self._response: Any = None
        self._cancelled = False

    @property
    def ready(self) -> bool:
        return self._place < self._fleet.running

    async def edit(
        self, orders: list[Order], on_partial: Callable[[int, int, Any], None]
    ) -> list[EditResult]:
        """Edit a batch; see `Child.edit`."""
        assert self._fleet.handle is not None
        self._cancelled = False
        self._response = self._fleet.handle.options(stream=True).edit.remote(orders)
        try:
            async for kind, *told in self._response:
                if kind == "edited":
                    return told[0]
                if kind == "failed":
                    raise BatchFailedError(*told)
                on_partial(*told)
        except BatchFailedError:
            raise
        except (Exception, asyncio.CancelledError) as error:  # Ray's have no common base
            if not self._cancelled and isinstance(error, asyncio.CancelledError):
                raise
            if self._cancelled:
                raise BatchFailedError("cancelled") from error
            self._fleet.lost(error)
            raise ChildDiedError from error
        raise ChildDiedError

    def cancel(self) -> None:
        """End the batch that is edited."""
        self._cancelled = True
        self._response.cancel()

    def replace(self, why: str) -> None:
        """Do nothing: a replica whose editor failed has ended itself."""


class Fleet:
    """The lanes, and what is known of the replicas. running: how many replicas run."""

    def __init__(
        self, name: str, deploy: Callable[[], DeploymentHandle], most: int, queue: Queue
    ) -> None:
        """name: of the application on Ray Serve. deploy: returns the replicas' handle."""
        self._name, self._deploy, self._queue = name, deploy, queue
        self.lanes = [Lane(self, place) for place in range(most)]
        self.handle: DeploymentHandle | None = None
        self.running = 0

    async def run(self) -> None:
        """Start the replicas and watch how many run. Raises BackendError if none can be."""
        try:
            self.handle = await asyncio.to_thread(self._deploy)
            facts = await self.handle.facts.remote()
        except (RuntimeError, RayError) as error:
            raise BackendError(f"Ray can start no editing process: {reason(error)}") from error
        self._queue.on_ready(facts)
        while True:
            try:
                self.running = await asyncio.to_thread(self._count)
            except RayError as error:  # the replicas go on while Ray replaces what counts them
                _log.warning("Ray cannot tell which replicas run: %s", type(error).__name__)
            self._queue.wake()
            await asyncio.sleep(BEAT)

    def _count(self) -> int:
        application = serve.status().applications.get(self._name)
        deployment = application and application.deployments.get(EDITING)
        states = deployment.replica_states if deployment else {}
        return sum(count for state, count in states.items() if state == "RUNNING")

    def end(self) -> None:
        """Do nothing: Ray ends what it has started."""

    def lost(self, error: BaseException) -> None:
        """Learn that a batch was lost."""
        _log.error("an editing process was lost: %s", type(error).__name__)
        self._queue.on_restart("died")
