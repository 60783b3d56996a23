"""Servers for tests: their parts in this process, with a stand-in for the one that edits."""

import asyncio
import io
import json
import logging
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from PIL import Image

from varedit_runtime import Preparer
from varedit_runtime.editing.results import EditResult
from varedit_runtime.locate import embedded
from varedit_serve.app import Application, Settings
from varedit_serve.editing.messages import Order, Ready

EDITS = "/v1/images/edits"
Fields = Sequence[tuple[str, str | bytes]]


@cache
def preparer() -> Preparer:
    return Preparer.open(embedded())


@cache
def png(side: int = 24, mode: str = "RGB") -> bytes:
    content = io.BytesIO()
    colour = (200, 30, 30, 128)[: len(mode)] if "RGB" in mode else 255
    Image.new(mode, (side, side), colour).save(content, "PNG")
    return content.getvalue()


@contextmanager
def logged() -> Iterator[list[str]]:
    """Yield a list that gets every line that the server logs meanwhile."""
    logger, lines = logging.getLogger("varedit_serve"), list[str]()
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(handler.format(record))
    logger.addHandler(handler)
    level, _ = logger.level, logger.setLevel(logging.DEBUG)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@dataclass(eq=False)
class StandIn:
    """Stands in for a Child. fail: gets each batch, and returns the error to raise.

    gate: a batch waits for it; cancelling opens it.
    """

    ready: bool = True
    fail: Callable[[list[Order]], Exception | None] = lambda orders: None
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    batches: list[list[int]] = field(default_factory=list)
    cancelled: int = 0
    replaced: list[str] = field(default_factory=list)

    async def edit(
        self, orders: list[Order], on_partial: Callable[[int, int, Any], None]
    ) -> list[EditResult]:
        self.batches.append([order.seed for order in orders])
        for place, order in enumerate(orders):
            for index in range(len(order.previews)):
                on_partial(place, index, Image.new("RGB", (24, 24), (index, 0, 0)))
        await self.gate.wait()
        if (error := self.fail(orders)) is not None:
            raise error
        return [result(order.seed) for order in orders]

    def replace(self, why: str) -> None:
        self.replaced.append(why)

    def cancel(self) -> None:
        self.cancelled += 1
        self.gate.set()


def result(seed: int) -> EditResult:
    image = Image.new("RGB", (24, 24), (seed % 256, 0, 0))
    return EditResult(image, seed, {"scale_00": 0.1}, {"scale_00": 0.1}, 0.0, ())


@dataclass
class Reply:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def blamed(self) -> tuple[int, str | None]:
        return self.status, self.json["error"]["param"]

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line[6:]) for line in self.body.splitlines() if line[:6] == b"data: "]


@dataclass
class Server:
    """child: the first of the children."""

    application: Application
    children: list[StandIn]

    @property
    def child(self) -> StandIn:
        return self.children[0]

    async def ask(
        self,
        method: str = "GET",
        path: str = EDITS,
        headers: dict[str, str] | None = None,
        body: Iterable[bytes | float] = (),
        left: asyncio.Event | None = None,
        reads: asyncio.Event | None = None,
    ) -> Reply:
        """Send a request. body: parts, and seconds to wait. left: set when the client leaves.

        reads: set when the client reads on; before, the server waits after it has sent pictures.
        """
        path, _, query = path.partition("?")
        parts, reply, left = iter(body), Reply(), left or asyncio.Event()
        arrived = False

        async def receive() -> dict[str, Any]:
            nonlocal arrived
            for part in parts:
                if isinstance(part, bytes):
                    return {"type": "http.request", "body": part, "more_body": True}
                await asyncio.sleep(part)
            if arrived or left.is_set():
                await left.wait()
                return {"type": "http.disconnect"}
            arrived = True
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                assert not reply.status, "two answers"
                pairs = message["headers"]
                reply.status = message["status"]
                reply.headers = {name.decode(): value.decode() for name, value in pairs}
            else:
                if reply.body and reads is not None:
                    await reads.wait()
                reply.body += message["body"]

        sent = {"host": "localhost:8000", **(headers or {})}
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "scheme": "http",
            "headers": [(name.encode(), value.encode()) for name, value in sent.items()],
        }
        await self.application.guard(scope, receive, send)
        return reply

    async def edit(
        self,
        *fields: tuple[str, str | bytes],
        headers: dict[str, str] | None = None,
        left: asyncio.Event | None = None,
    ) -> Reply:
        """Edit with a form. fields: besides a picture and a prompt."""
        names = {name.removesuffix("[]") for name, _ in fields}
        usual: Fields = [("image", png()), ("prompt", "add a hat")]
        kind, body = form([*(one for one in usual if one[0] not in names), *fields])
        return await self.ask("POST", EDITS, {**kind, **(headers or {})}, [body], left)


def form(fields: Fields) -> tuple[dict[str, str], bytes]:
    """Return the headers and body of a form; values of bytes are files."""
    body = b""
    for name, value in fields:
        told = f'form-data; name="{name}"' + ('; filename="a"' if isinstance(value, bytes) else "")
        content = value if isinstance(value, bytes) else value.encode()
        body += f"--XX\r\nContent-Disposition: {told}\r\n\r\n".encode() + content + b"\r\n"
    body += b"--XX--\r\n"
    kind = "multipart/form-data; boundary=XX"
    return {"content-type": kind, "content-length": str(len(body))}, body


@asynccontextmanager
async def served(waits: bool = False, children: int = 1, **settings: Any):
    """Run a server's parts. waits: whether batches wait for the `gate` of their child.

    kind: of the children.
    """
    kind = settings.pop("kind", StandIn)
    hosts = settings.pop("hosts", ("localhost",))
    application = Application(preparer(), Settings("nano", hosts=hosts, **settings))
    queue = application.queue
    queue.on_ready(Ready("CUDA", lambda edit: len(edit.prompt), 4, 0.5, 4))
    stand_ins = [kind() for _ in range(children)]
    running = [asyncio.create_task(queue.run(child)) for child in stand_ins]  # type: ignore[arg-type]
    if not waits:
        for child in stand_ins:
            child.gate.set()
    try:
        await asyncio.sleep(0)  # they begin
        yield Server(application, stand_ins)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def until(true: Callable[[], object], seconds: float = 20) -> None:
    """Let other tasks run until something holds."""
    async with asyncio.timeout(seconds):
        while not true():
            await asyncio.sleep(0.001)
