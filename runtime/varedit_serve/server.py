"""Listen, run the server's parts, and end: SIGTERM lets admitted edits finish, a second one not."""

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Thread
from typing import Any, Protocol

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from varedit_runtime.errors import ConfigError, reason
from varedit_serve.app import Application
from varedit_serve.editing.queue import Lane
from varedit_serve.limits import Limits

_HEAD_BYTES = 16_384  # of a request's headers
_LAST_SECONDS = 10  # for clients to read the last answers
SPARE = 64  # connections more than there may be, which are told so if they send a request
_SCRAPING = 32  # connections to the numbers, where they have an address of their own
_SWITCH = 0.0005  # seconds; with Python's own 5 ms, /livez took half as long again under attack
_PAUSE = 0.05  # seconds between looks whether all is done

_log = logging.getLogger(__name__)
# It warns of each malformed request, so that strangers could fill the log.
logging.getLogger("uvicorn.error").setLevel(logging.ERROR)


class _Protocol(H11Protocol):
    """Closes connections whose client does not go on.

    It may not send a request's head, the rest of a refused body, or read what it is sent; uvicorn
    bounds none of these times.
    """

    seconds = 30.0
    _timer: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()
        if self.limit_concurrency and len(self.connections) > self.limit_concurrency + SPARE:
            transport.abort()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._timer, self._unread):
            if timer is not None:
                timer.cancel()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(self.seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()

    def _wait(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(self.seconds, self._end_if_idle)

    def _end_if_idle(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()


def protocol(seconds: float) -> type[_Protocol]:
    """Return what uvicorn makes for each connection. seconds: that a client may take."""
    return type("Protocol", (_Protocol,), {"seconds": seconds})


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to `serve`."""
        yield


def _why(error: Exception) -> str:
    """Return why an address cannot be listened at, without the address, which Python appends."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.partition(" (while attempting")[0]
    return reason(error)


def listen(
    host: str, port: int, other: str = "--port, or a --host of this machine"
) -> socket.socket:
    """Return a listening socket. Raises ConfigError, which says to choose another one than this."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, TypeError, ValueError) as error:  # the last ones of what is no name at all
        raise ConfigError(
            f"{host}, port {port}, cannot be listened at ({_why(error)}): choose another {other}"
        ) from error
    # Connections inherit it. asyncio sets it only where the socket names its protocol; without it
    # the body of an answer waits 40 ms until the client has acknowledged its head.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


class Keeper(Protocol):
    """What keeps processes that edit running: a `Child`, or Ray's `Fleet`."""

    async def run(self) -> None:
        """Keep them running. Raises BackendError if the bundle cannot be opened."""

    def end(self) -> None:
        """End them at once."""


def serve(
    application: Application,
    keepers: Sequence[Keeper],
    lanes: Sequence[Lane],
    listening: socket.socket,
    limits: Limits,
) -> None:
    """Serve until SIGTERM or Ctrl-C. Raises BackendError if the bundle cannot be opened."""
    # After each call of the system this thread waits so long for others that compute in Python.
    sys.setswitchinterval(_SWITCH)
    asyncio.run(_serve(application, keepers, lanes, listening, limits))


def serve_numbers(application: Application, host: str, port: int, limits: Limits) -> int:
    """Serve the numbers at an address of their own, in a thread, while this process lives.

    Returns the port. Raises ConfigError if the address cannot be used.
    """
    listening = listen(host, port, "--metrics")
    server = _Server(_config(application.numbers, limits.upload_seconds, _SCRAPING))
    Thread(target=server.run, args=([listening],), daemon=True).start()
    return listening.getsockname()[1]


def _config(application: ASGIApp, seconds: float, connections: int) -> uvicorn.Config:
    """Return how uvicorn serves strangers. seconds: that a client may take."""
    return uvicorn.Config(
        application,
        http=protocol(seconds),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=connections,
        h11_max_incomplete_event_size=_HEAD_BYTES,
        timeout_graceful_shutdown=_LAST_SECONDS,
    )


async def _serve(
    application: Application,
    keepers: Sequence[Keeper],
    lanes: Sequence[Lane],
    listening: socket.socket,
    limits: Limits,
) -> None:
    server = _Server(_config(application.guard, limits.upload_seconds, limits.max_connections))
    _on_signals(application, keepers, server)
    works = (
        server.serve(sockets=[listening]),
        *(keeper.run() for keeper in keepers),
        *(application.queue.run(lane) for lane in lanes),
    )
    tasks = [asyncio.create_task(work) for work in works]
    done, waiting = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    for task in done:
        task.result()


def _on_signals(
    application: Application, keepers: Sequence[Keeper], server: uvicorn.Server
) -> None:
    """Drain at the first signal; end at the second, at once."""
    loop, drains = asyncio.get_running_loop(), set[asyncio.Task[None]]()

    def ended(number: int) -> None:
        if application.draining:
            _log.warning("ended at once; results that are lost: %d", application.budget.pictures)
            for keeper in keepers:
                keeper.end()
            os._exit(128 + number)
        application.draining = True
        told = "draining; results that are still waited for: %d"
        _log.info(told, application.budget.pictures)
        drains.add(loop.create_task(_drained(application, server)))

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ended, number)


async def _drained(application: Application, server: uvicorn.Server) -> None:
    while application.budget.pictures:
        await asyncio.sleep(_PAUSE)
    _log.info("drained: the server ends")
    server.should_exit = True
