"""OpenAI's own clients, in Python and JavaScript, meet every class of error."""

import asyncio
import io
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

import openai
import pytest
from node import NEEDED, answers
from server_process import PERSON
from serving import Server, StandIn, png, served

from varedit_serve import server
from varedit_serve.editing.child import ChildDiedError
from varedit_serve.editing.messages import Order
from varedit_serve.keys import read_keys
from varedit_serve.limits import Limits

OWN, LIMITED = "sk-own-0123456789", "sk-limited-0123456789"
DEADLY, LATE = 13, 14  # seeds: of edits that end the process, and that take longer than they may
LIMITS = Limits(max_body=100_000, upload_seconds=20.0, deadline=20.0)
HURRIED, STRICT = replace(LIMITS, upload_seconds=2.0), replace(LIMITS, deadline=2.0)

ERRORS = {  # kind, status, code, param
    "400": ("BadRequestError", 400, "invalid_value", "size"),
    "unknown": ("BadRequestError", 400, "unknown_field", "promt"),
    "401": ("AuthenticationError", 401, "invalid_api_key", None),
    "404": ("NotFoundError", 404, "model_not_found", "model"),
    "408": ("APIStatusError", 408, "timeout", None),
    "413": ("APIStatusError", 413, "request_too_large", None),
    "415": ("APIStatusError", 415, "unsupported_media_type", None),
    "429": ("RateLimitError", 429, "rate_limit_exceeded", None),
    "500": ("InternalServerError", 500, "edit_failed", None),
    "503": ("InternalServerError", 503, "deadline", None),
    "event": ("APIError", None, "edit_failed", None),
}


class Faulty(StandIn):
    """Dies at some edits, and is never done with others."""

    async def edit(self, orders: list[Order], on_partial: Callable[[int, int, Any], None]) -> Any:
        self.gate.clear()
        if orders[0].seed != LATE:
            self.gate.set()
        return await super().edit(orders, on_partial)


def dies(orders: list[Order]) -> Exception | None:
    return ChildDiedError() if orders[0].seed == DEADLY else None


@asynccontextmanager
async def listening(limits: Limits = LIMITS) -> AsyncIterator[tuple[Server, str]]:
    """Run a server's parts at a port; yield them and its address."""
    keys = read_keys(None, f"own {OWN}\nlimited {LIMITED} 1")
    given = {"keys": keys, "hosts": ("127.0.0.1",), "limits": limits, "kind": Faulty}
    async with served(**given) as parts:
        parts.child.fail = dies
        http = server._Server(server._config(parts.application.guard, limits.upload_seconds, 100))
        with server.listen("127.0.0.1", 0) as listener:
            running = asyncio.create_task(http.serve(sockets=[listener]))
            yield parts, f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
            http.should_exit = True
            await running


def asked_in_python(address: str, hurried: str, strict: str) -> dict[str, Any]:
    """Return what the client raises, by the names of ERRORS.

    hurried, strict: addresses of servers that wait only a short time for an upload, or an edit.
    """
    client = openai.OpenAI(api_key=OWN, base_url=address, max_retries=0, timeout=60.0)
    limited = client.with_options(api_key=LIMITED)
    to_hurried = client.with_options(base_url=hurried)
    to_strict = client.with_options(base_url=strict)

    def edit(by: openai.OpenAI = client, image: Any = None, **fields: Any) -> Any:
        ours = {name: fields.pop(name) for name in ("seed", "promt") if name in fields}
        call: Any = by.images.edit
        return call(image=image or png(), prompt="add a hat", extra_body=ours, **fields)

    def too_often() -> None:
        with suppress(openai.InternalServerError):  # which counts too
            edit(limited)
        edit(limited)

    plain: Any = {"headers": {"content-type": "text/plain"}}
    attempts = {
        "400": lambda: edit(size="1024x1024"),
        "unknown": lambda: edit(promt="x"),
        "401": lambda: edit(client.with_options(api_key="sk-another-0123456789")),
        "404": lambda: edit(model="gpt-image-1"),
        "408": lambda: edit(to_hurried, image=Trickling(png())),
        "413": lambda: edit(image=bytes(200_000)),
        "415": lambda: client.post("/images/edits", cast_to=object, content=b"x", options=plain),
        "429": too_often,
        "500": lambda: edit(client.with_options(max_retries=2), seed=DEADLY),
        "503": lambda: edit(to_strict, seed=LATE),
        "event": lambda: list(edit(seed=DEADLY, stream=True, partial_images=1)),
    }
    return {name: failed(attempt) for name, attempt in attempts.items()}


class Trickling(io.BytesIO):
    """A file that is read more slowly than a request may arrive."""

    def read(self, size: int | None = -1) -> bytes:
        time.sleep(0.2)
        return super().read(1)


def failed(attempt: Callable[[], object]) -> tuple[Any, ...]:
    with pytest.raises(openai.APIError) as raised:
        attempt()
    error: Any = raised.value
    told = type(error).__name__, getattr(error, "status_code", None), error.code, error.param
    assert told[1] is None or error.request_id.startswith("req_")
    return told


@pytest.mark.parametrize("client", ["Python", pytest.param("JavaScript", marks=NEEDED)])
def test_the_client_meets_each_class_of_error(client: str) -> None:
    def asked(*addresses: str) -> dict[str, Any]:
        if client == "Python":
            return asked_in_python(*addresses)
        told = answers("errors.js", *addresses, PERSON, OWN, LIMITED)
        return {name: tuple(error) for name, error in told.items()}

    async def test() -> None:
        async with (
            listening() as (parts, address),
            listening(HURRIED) as (_, hurried),
            listening(STRICT) as (_, strict),
        ):
            told = await asyncio.to_thread(asked, address, hurried, strict)
            assert told == {name: in_client(error, client) for name, error in ERRORS.items()}
            # Asked once, although the client tries again what may succeed; died of it twice.
            deadly = [batch for batch in parts.child.batches if batch == [DEADLY]]
            assert len(deadly) == 2 * 2

    asyncio.run(test())


def in_client(error: tuple[Any, ...], client: str) -> tuple[Any, ...]:
    """Return an error as a client has it: JavaScript's has no class for each status."""
    kind = "APIError" if (client, error[0]) == ("JavaScript", "APIStatusError") else error[0]
    return kind, *error[1:]
