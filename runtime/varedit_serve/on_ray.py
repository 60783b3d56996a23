"""The server as an application of Ray Serve, whose proxies answer HTTP.

    serve run varedit_serve.on_ray:app bundle=/bundles/2b-512 workers=2 host=127.0.0.1

Arguments are the options of `varedit-serve`, with underscores; where it listens is said to Ray.
"""

import asyncio
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp, Receive, Scope, Send

from varedit_runtime import Preparer
from varedit_runtime.terminal.command import BackendCommand
from varedit_serve.app import Application, Settings
from varedit_serve.cli import main, settings_of
from varedit_serve.editing.messages import Opening
from varedit_serve.editing.replicas import Fleet, replicas

_log = logging.getLogger(__name__)


def app(arguments: Mapping[str, Any]) -> serve.Application:
    """Return the application: one ingress, which has the queue, and replicas that edit."""
    words = _words(arguments)
    given = _read(words)
    preparer, least, most = _preparer(given), given["workers"], _most(given)
    opening = Opening(given["bundle"], given["variant"], given["backend"], given["digest"])
    editing = replicas(opening, preparer.bundle.digest, least, most)
    connections = given["max_connections"]
    deployed = serve.deployment(max_ongoing_requests=connections)(serve.ingress()(Ingress))
    return deployed.bind(words, editing)


def _words(arguments: Mapping[str, Any]) -> list[str]:
    """Return arguments as a command line."""
    # Where Ray's proxies listen is not known here: without another word, where others reach them.
    words = [str(arguments["bundle"]), "--host=0.0.0.0"]
    for name in arguments.keys() - {"bundle"}:
        values = arguments[name] if isinstance(arguments[name], list) else [arguments[name]]
        words += [f"--{name.replace('_', '-')}={value}" for value in values]
    return words


def _read(words: Sequence[str]) -> dict[str, Any]:
    """Return what a command line says."""
    command = BackendCommand("varedit-serve", params=main.params, callback=lambda **given: given)
    return command.main(list(words), standalone_mode=False)


def _preparer(given: dict[str, Any]) -> Preparer:
    return Preparer.open(given["bundle"], variant=given["variant"], digest=given["digest"])


def _most(given: dict[str, Any]) -> int:
    return max(given["workers"], given["max_workers"] or 0)


def _end_if_failed(watching: "asyncio.Task[None]") -> None:
    """End this process, which Ray then replaces, if it cannot watch the replicas any more."""
    if not watching.cancelled():
        _log.error("the replicas cannot be watched: %s", watching.exception())
        os._exit(1)


class Ingress:
    """What Ray's proxies ask: admission and the queue. There is one replica of it."""

    def __init__(self, words: Sequence[str], editing: DeploymentHandle) -> None:
        given = _read(words)
        application = Application(_preparer(given), Settings(**settings_of(**given)))
        name = serve.get_replica_context().app_name
        fleet = Fleet(name, lambda: editing, _most(given), application.queue)
        self._asgi = _Asgi(application, fleet)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Return the ASGI application; Ray Serve calls this."""
        return self._asgi


@dataclass(frozen=True)
class _Asgi:
    """An ASGI application that feeds the replicas between its startup and shutdown."""

    application: Application
    fleet: Fleet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await self.application.guard(scope, receive, send)
            return
        await receive()
        queue = self.application.queue
        works = (self.fleet.run(), *(queue.run(lane) for lane in self.fleet.lanes))
        tasks = [asyncio.create_task(work) for work in works]
        tasks[0].add_done_callback(_end_if_failed)
        await send({"type": "lifespan.startup.complete"})
        await receive()
        self.application.draining = True
        for task in tasks:
            task.cancel()
        await send({"type": "lifespan.shutdown.complete"})
