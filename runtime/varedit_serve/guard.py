"""Who may ask: the Host and Origin of a request, its API key; and what every answer has in common.

A page of another site can send a form to a server on this machine without being asked to. So
requests that come from pages of other sites are refused, and so are names of this machine that
others may have pointed at it.
"""

import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from varedit_serve.asked import ASKED, Asked
from varedit_serve.errors import ApiError, unexpected
from varedit_serve.keys import Keys
from varedit_serve.metrics import EDITS, LEFT, Metrics

_GUARDED = ("/v1/", "/metrics")  # paths that need a key
_EXPOSED = "retry-after, x-request-id, x-should-retry, x-varedit-seed"
_NO_PATH = {
    404: "this server has no such path: /openapi.json lists those that there are",
    405: "the path takes another method: /openapi.json says which",
}

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Guard:
    """An ASGI application around another one.

    route: returns the known path that a request's is, or other. hosts: names that requests may be
    sent to; None for all. origins: other sites whose pages may send requests.
    """

    inner: ASGIApp
    route: Callable[[str], str]
    keys: Keys
    metrics: Metrics
    hosts: Collection[str] | None
    origins: Collection[str]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            raise ValueError(f"this server has no {scope['type']}")
        start, status, headers = time.monotonic(), 0, Headers(scope=scope)
        asked = scope[ASKED] = Asked.of(headers.get("x-request-id", ""))

        async def completed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._add_headers(MutableHeaders(raw=message["headers"]), headers, asked.id)
            await send(message)

        try:
            answer = await self._answer(scope, receive, completed, headers)
        except Exception as error:
            answer = _told(asked, error)
        if answer is not None and not status:
            await answer(scope, receive, completed)
        self._count(scope["path"], asked, status, time.monotonic() - start)

    async def _answer(
        self, scope: Scope, receive: Receive, send: Send, headers: Headers
    ) -> Response | None:
        """Answer a request; return what is left to be sent."""
        self._check(headers)
        if scope["method"] == "OPTIONS" and "origin" in headers:
            return Response(status_code=204)
        if scope["path"].startswith(_GUARDED):
            scope[ASKED].key = self.keys.find(headers.get("authorization", ""))
        await self.inner(scope, receive, send)
        return None

    def _check(self, headers: Headers) -> None:
        """Raise ApiError on a Host or Origin that is not ours."""
        host = headers.get("host", "")
        if self.hosts is not None and _name(f"//{host}") not in self.hosts:
            told = "the server has another name: see --allow-host"
            raise ApiError(403, told, code="foreign_host")
        origin = headers.get("origin")
        if origin is not None and origin not in self.origins and origin.partition("://")[2] != host:
            told = "pages of other sites may not use this server: see --allow-origin"
            raise ApiError(403, told, code="foreign_origin")

    def _add_headers(self, headers: MutableHeaders, sent: Headers, request_id: str) -> None:
        origin = sent.get("origin", "")
        headers["x-content-type-options"] = "nosniff"
        headers["x-request-id"] = request_id
        if self.origins:
            headers.add_vary_header("origin")
        if origin in self.origins:
            # OpenAI's JavaScript client sends headers of its own, which change with its version.
            wanted = sent.get("access-control-request-headers", "authorization, content-type")
            headers["access-control-allow-origin"] = origin
            headers["access-control-allow-methods"] = "GET, POST"
            headers["access-control-allow-headers"] = wanted
            headers["access-control-expose-headers"] = _EXPOSED

    def _count(self, path: str, asked: Asked, status: int, seconds: float) -> None:
        """Count and log an answer; status 0 says that the client left before it."""
        known, told = self.route(path), str(status or LEFT)
        self.metrics.answered(known, told, seconds)
        if known == EDITS:
            _log.info("%s %s", known, asked.line(told, seconds))


def _told(asked: Asked, error: Exception) -> Response:
    """Return the answer to a request that cannot be served; note why."""
    more = {}
    if isinstance(error, HTTPException):  # of starlette's routes
        more = error.headers or {}
        error = ApiError(error.status_code, _NO_PATH.get(error.status_code, error.detail))
    asked.error = error if isinstance(error, ApiError) else unexpected(error, asked.id)
    return JSONResponse(asked.error.body, asked.error.status, {**asked.error.headers, **more})


def _name(address: str) -> str | None:
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None
