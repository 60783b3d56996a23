"""The endpoint `POST /v1/images/edits`, from a request to its answer."""

import asyncio
import pickle
import re
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from PIL import Image
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from varedit_runtime import Preparer
from varedit_runtime.editing.finish import Finish
from varedit_runtime.editing.prepared import PreparedEdit
from varedit_runtime.errors import ConfigError, PictureError, TextError
from varedit_runtime.pictures import open_picture
from varedit_serve.answering.answers import Answer, Sign, error_event
from varedit_serve.answering.moderation import Moderation, heed
from varedit_serve.asked import ASKED, Asked
from varedit_serve.body import GoneError, content_length, parse_json, read_body
from varedit_serve.budget import Budget, Claim
from varedit_serve.editing.queue import Finished, Job, Partial, Queue
from varedit_serve.errors import ApiError, unexpected, wrong
from varedit_serve.fields import (
    LARGEST_SEED,
    Field,
    check_together,
    choose_format,
    fields_of,
    read_fields,
)
from varedit_serve.keys import Key
from varedit_serve.limits import Limits
from varedit_serve.metrics import Metrics

T = TypeVar("T")

_REFUSED = re.compile(r"\bq\s*=\s*0(\.0*)?\s*(;|$)")
_PIECE = 2**20  # bytes
_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back
]


@dataclass
class Edits:
    """An ASGI application that edits. why_not: why no edit is admitted now, None if one is.

    Pictures are decoded and encoded in `threads`, which end when the server does.
    """

    preparer: Preparer
    model: str
    limits: Limits
    budget: Budget
    queue: Queue
    metrics: Metrics
    why_not: Callable[[], str | None]
    moderation: Moderation
    sign: Sign
    threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2))

    def __post_init__(self) -> None:
        self.fields: dict[str, Field] = fields_of(self.limits, len(self.preparer.variant.grids))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request. Raises ApiError, as long as no answer has begun."""
        request, asked = Request(scope, receive), scope[ASKED]
        for name in request.query_params:
            told = "fields are read from the body alone: give none in the address"
            raise wrong(name[:64], told, "unknown_field")
        with self.budget.claim() as claim:
            self._admit(asked.key, 1)
            claim.hold(1, content_length(request, self.limits))
            try:
                values, only_bytes = await self._read(request)
            except GoneError:
                self.metrics.cancelled("uploading")
                return
            self._admit(asked.key, values["n"], charged=1)
            claim.hold(values["n"], claim.bytes)
            job, answer = await self._in_thread(self._prepare, values)
            del values["image"], values["mask"]  # which are not counted any more
            claim.hold(values["n"], job.memory + answer.memory)
            gone = asyncio.create_task(_until_gone(receive))
            self.queue.submit(job)
            try:
                if values["stream"]:
                    await self._stream(job, answer, gone, claim, send, asked)
                else:
                    response = await self._whole(job, answer, gone, only_bytes)
                    await _start(send, response.raw_headers)
                    await _finish(send, claim, bytes(response.body), _kept(job, answer))
            except GoneError:
                pass
            finally:
                when = None if job.over else self.queue.leave(job)
                if gone.done() and when is not None:
                    self.metrics.cancelled(when)
                gone.cancel()

    def _admit(self, key: Key | None, results: int, charged: int = 0) -> None:
        """Raise ApiError if no edit is admitted, or the key has used up its rate."""
        if (why := self.why_not()) is not None:
            told = f"the server is {why}: try again"
            raise ApiError(503, told, code=why, retry_after=self.queue.retry_after() or 5)
        if key is not None:
            key.charge(results, charged)

    async def _in_thread(self, work: Callable[..., T], *given: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.threads, work, *given)

    async def _read(self, request: Request) -> tuple[dict[str, Any], bool]:
        """Return the fields' values, and whether the answer is a picture's bytes."""
        values = await self._in_thread(self._values, await read_body(request, self.limits))
        only_bytes = choose_format(values, _accepted(request.headers.get("accept", "")))
        check_together(values)
        if values["model"] not in (None, self.model):
            told = f"there is no such model; this server has {self.model}"
            raise ApiError(404, told, param="model", code="model_not_found")
        return values, only_bytes

    def _values(self, body: list[tuple[str, Any]] | bytes) -> dict[str, Any]:
        is_form = isinstance(body, list)
        return read_fields(self.fields, body if is_form else parse_json(body, self.limits), is_form)

    def _prepare(self, values: dict[str, Any]) -> tuple[Job, Answer]:
        """Decode and check all that is edited. Raises ApiError 400."""
        image = self._opened("image", values["image"])
        if values["size"] not in ("auto", f"{image.width}x{image.height}"):
            told = f"results have the picture's size: give auto, or {image.width}x{image.height}"
            raise wrong("size", told)
        if values["background"] == "transparent" and image.mode != "RGBA":
            told = "the picture is opaque, and so is its result: give background=auto or opaque"
            raise wrong("background", told)
        mask = None if values["mask"] is None else self._opened("mask", values["mask"])
        try:
            edit = self.preparer.prepare(
                image,
                values["prompt"],
                negative_prompt=values["negative_prompt"],
                mask=mask,
                guidance_scale=values["guidance_scale"],
                temperature=values["temperature"],
                fast=values["quality"] == "low",
                seed=0,
            )
        except (ConfigError, PictureError, TextError) as error:
            raise wrong(error.argument, str(error)) from error
        for name in ("prompt", "negative_prompt"):
            if values[name]:
                heed(self.moderation.prompt(values[name]), name)
        # Drawn now, so that an edit that runs again gives the same result.
        seed = values["seed"]
        if seed is None:
            seed = secrets.randbelow(LARGEST_SEED + 2 - values["n"])
        assert self.queue.facts is not None, "nothing is admitted before"
        # It is finished here, in a thread: large pictures would hold up whoever unpickles them.
        height, width, _ = edit.square.shape
        drawn = replace(edit, finish=Finish((width, height), None, None))
        job = Job(
            pickle.dumps(drawn, pickle.HIGHEST_PROTOCOL),
            edit.size,
            self.queue.facts.group(edit),
            range(seed, seed + values["n"]),
            _previews(values["partial_images"], len(self.preparer.variant.grids)),
        )
        return job, self._answer(values, edit)

    def _opened(self, name: str, content: bytes) -> Image.Image:
        try:
            image = open_picture(content, max_pixels=self.limits.max_pixels)
        except PictureError as error:
            raise wrong(name, str(error), "invalid_image") from error
        if max(image.size) > self.limits.max_side:
            told = f"a side of {name} has over {self.limits.max_side} pixels"
            raise wrong(name, told, "invalid_image")
        return image

    def _answer(self, values: dict[str, Any], edit: PreparedEdit) -> Answer:
        text_tokens = len(edit.prompt)
        tokens = [rows * columns for rows, columns in self.preparer.variant.grids]
        read, made = text_tokens + tokens[-1], sum(tokens) * values["n"]
        usage = {
            "input_tokens": read,
            "input_tokens_details": {"image_tokens": tokens[-1], "text_tokens": text_tokens},
            "output_tokens": made,
            "total_tokens": read + made,
        }
        return Answer(
            edit.finish,
            self.preparer.variant.grids[-1],
            values["output_format"],
            values["output_compression"],
            values["background"],
            "low" if values["quality"] == "low" else "high",
            usage,
            self.moderation,
            self.sign,
        )

    async def _whole(
        self, job: Job, answer: Answer, gone: "asyncio.Task[None]", only_bytes: bool
    ) -> Response:
        """Wait for all results. Raises ApiError; GoneError if the client leaves."""
        results = {}
        while len(results) < len(job.seeds):
            event = await _next(job, gone)
            if isinstance(event, Finished):
                results[event.place] = event.result
        if only_bytes:
            content, headers = await self._in_thread(answer.picture, results[0])
            return Response(content, headers=headers)
        ordered = [results[place] for place in sorted(results)]
        content = await self._in_thread(answer.results, ordered)
        return Response(content, media_type="application/json")

    async def _stream(
        self,
        job: Job,
        answer: Answer,
        gone: "asyncio.Task[None]",
        claim: Claim,
        send: Send,
        asked: Asked,
    ) -> None:
        """Send events. Raises what `_whole` does, ApiError only before the first event."""
        event = await _next(job, gone)
        await _start(send, list(_STREAM))  # more are added to the list
        try:
            while isinstance(event, Partial):
                content = await self._in_thread(answer.partial, event.image, event.index)
                await _send(send, content)
                event = await _next(job, gone)
            content = await self._in_thread(answer.completed, event.result)
        except GoneError:
            raise
        except Exception as error:
            asked.error = error if isinstance(error, ApiError) else unexpected(error, asked.id)
            content = error_event(asked.error)
        del event  # which has the result's picture
        await _finish(send, claim, content, _kept(job, answer))


def _accepted(header: str) -> list[str]:
    """Return the media types that a header Accept names, in its order, but those of quality 0."""
    kinds = (kind.partition(";") for kind in header.lower().split(","))
    return [kind.strip() for kind, _, quality in kinds if not _REFUSED.search(quality)]


async def _start(send: Send, headers: list[tuple[bytes, bytes]]) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": headers})


async def _send(send: Send, content: bytes) -> None:
    """Send a part of an answer in pieces, so that other clients are answered between them."""
    for start in range(0, len(content), _PIECE):
        piece = content[start : start + _PIECE]
        await send({"type": "http.response.body", "body": piece, "more_body": True})


def _kept(job: Job, answer: Answer) -> int:
    """Return the bytes that a request holds besides its results until it is answered."""
    return len(job.prepared) + answer.memory


async def _finish(send: Send, claim: Claim, content: bytes, kept: int) -> None:
    """Send the last part of an answer: it holds memory until it is read, but no place.

    kept: bytes that the request holds meanwhile besides this part.
    """
    claim.hold(0, min(claim.bytes, len(content) + kept))
    await _send(send, content)
    # This waits until the client has read what came before.
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _next(job: Job, gone: "asyncio.Task[None]") -> Partial | Finished:
    """Return a job's next event. Raises ApiError; GoneError if the client leaves before it."""
    event = asyncio.create_task(job.events.get())
    try:
        await asyncio.wait({event, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not event.done():
            raise GoneError
        if isinstance(told := event.result(), ApiError):
            raise told
        return told
    finally:
        event.cancel()


def _previews(count: int, scales: int) -> tuple[int, ...]:
    """Return the scales to show, spread evenly over those before the last."""
    places = (round((scales - 1) * (i + 1) / (count + 1)) for i in range(count))
    return tuple(dict.fromkeys(min(place, scales - 2) for place in places if scales > 1))
