"""A server's memory does not grow with the number of requests, whatever they are."""

import asyncio
import gc
import tracemalloc
from collections.abc import Callable, Coroutine
from typing import Any

from serving import Server, form, png, served

from varedit_serve.answering.moderation import Everything, Moderation
from varedit_serve.limits import Limits

MOST = 200  # bytes that a request may leave behind; Python keeps names of up to 4,096 attributes


class Leaking(Everything):
    """Keeps as much as a small picture of each edit."""

    def __init__(self) -> None:
        self.kept: list[bytes] = []

    def prompt(self, text: str) -> None:
        self.kept.append(bytes(24 * 24 * 3))


async def leaving(server: Server) -> None:
    """Leave while uploading."""
    kind, body = form([("image", png()), ("prompt", "add a hat")])
    left = asyncio.Event()
    left.set()
    await server.ask("POST", headers=kind, body=[body[:100]], left=left)


KINDS: list[Callable[[Server], Coroutine[Any, Any, Any]]] = [
    lambda server: server.edit(),
    lambda server: server.edit(("stream", "true"), ("partial_images", "2")),
    lambda server: server.edit(("image", b"no picture")),
    lambda server: server.edit(("promt", "x")),
    lambda server: server.ask("POST", headers={"content-type": "application/json"}, body=[b"{"]),
    lambda server: server.ask("POST", headers={"content-length": str(10**9)}),
    lambda server: server.ask(path=f"/{id(object())}"),
    leaving,
]


def grown(requests: int, moderation: Moderation) -> float:
    """Return the bytes that each of so many requests left behind."""

    async def asked(server: Server, times: int) -> int:
        for number in range(times):
            await KINDS[number % len(KINDS)](server)
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    async def test() -> float:
        async with served(moderation=moderation, limits=Limits(max_queue=4)) as server:
            before = await asked(server, 200)  # what is kept once is then kept
            server.child.batches.clear()
            after = await asked(server, requests)
            server.child.batches.clear()
            return (after - before) / requests

    tracemalloc.start()
    try:
        return asyncio.run(test())
    finally:
        tracemalloc.stop()


def test_memory_is_flat_over_two_thousand_requests() -> None:
    assert grown(2000, Everything()) < MOST


def test_a_leak_would_be_seen() -> None:
    assert grown(200, Leaking()) > 2 * MOST
