"""Read what a judge's server sends, none of which is trusted."""

from collections.abc import Callable, Iterator, Mapping
from time import monotonic
from typing import Annotated

import httpx2
import msgspec
from msgspec import Meta

LARGEST = 2**20  # bytes of a reply: a judge's has some hundreds


class _Message(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    message: _Message


_Tokens = Annotated[int, Meta(ge=0)]


class _Usage(msgspec.Struct):
    prompt_tokens: _Tokens | None = None
    completion_tokens: _Tokens | None = None


class Completion(msgspec.Struct):
    """A reply, as chat completions have them; other fields are not read."""

    choices: Annotated[list[_Choice], Meta(min_length=1)]
    usage: _Usage | None = None


def parse(content: bytes) -> Completion | None:
    """Return a reply; None for one of another form."""
    try:
        return msgspec.json.decode(content, type=Completion)
    except (msgspec.MsgspecError, RecursionError):
        return None


class Bounded(httpx2.SyncByteStream):
    """A body that is cut after LARGEST bytes, and must have come within some seconds."""

    def __init__(self, stream: httpx2.SyncByteStream, seconds: float) -> None:
        self._stream, self._until = stream, monotonic() + seconds

    def __iter__(self) -> Iterator[bytes]:
        left = LARGEST
        for piece in self._stream:
            yield piece[:left]
            left -= len(piece)
            if left <= 0:
                return
            if monotonic() > self._until:
                raise httpx2.ReadTimeout("the answer comes too slowly")

    def close(self) -> None:
        self._stream.close()


def client(
    seconds: float, sending: Callable[[Mapping[str, str]], None] = lambda headers: None
) -> httpx2.Client:
    """Return a client that sends to the host it was told alone, and reads bounded answers.

    It follows no redirects, and unpacks nothing: small packed answers may be huge. sending: called
    with the headers of a request before it is sent.
    """

    def bound(response: httpx2.Response) -> None:
        assert isinstance(response.stream, httpx2.SyncByteStream)
        response.headers.pop("Content-Encoding", None)  # none was asked for
        response.stream = Bounded(response.stream, seconds)

    return httpx2.Client(
        follow_redirects=False,
        headers={"Accept-Encoding": "identity"},
        event_hooks={
            "request": [lambda request: sending(request.headers)],
            "response": [bound],
        },
    )
