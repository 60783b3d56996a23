"""Who may ask: the Host and Origin of a request, its API key; and what every answer has in common.

A page of another site can send a form to a server on this machine without being asked to. So
requests that come from pages of other sites are refused, and so are names of this machine that
others may have pointed at it.
"""

import logging
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from varedit_serve.edits import KEY
from varedit_serve.errors import ApiError, unexpected
from varedit_serve.keys import Keys
from varedit_serve.metrics import Metrics

EDITS = "/v1/images/edits"

_GUARDED = ("/v1/", "/metrics")  # paths that need a key
_EXPOSED = "retry-after, x-should-retry, x-varedit-seed"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Guard:
    """An ASGI application around another one.

    paths: known ones, which may be logged. hosts: names that requests may be sent to; None for all.
    origins: other sites whose pages may send requests.
    """

    inner: ASGIApp
    paths: Collection[str]
    keys: Keys
    metrics: Metrics
    hosts: Collection[str] | None
    origins: Collection[str]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            raise ValueError(f"this server has no {scope['type']}")
        start, status, headers = time.monotonic(), 0, Headers(scope=scope)
        origin = headers.get("origin", "")

        async def completed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._add_headers(MutableHeaders(raw=message["headers"]), origin)
            await send(message)

        try:
            answer = await self._answer(scope, receive, completed, headers)
        except Exception as error:
            answer = _answer(unexpected(error))
        if answer is not None and not status:
            await answer(scope, receive, completed)
        seconds = time.monotonic() - start
        self._count(scope["path"], status, seconds)

    async def _answer(
        self, scope: Scope, receive: Receive, send: Send, headers: Headers
    ) -> Response | None:
        """Answer a request; return what is left to be sent."""
        try:
            self._check(headers)
            if scope["method"] == "OPTIONS" and "origin" in headers:
                return Response(status_code=204)
            if scope["path"].startswith(_GUARDED):
                scope[KEY] = self.keys.find(headers.get("authorization", ""))
            await self.inner(scope, receive, send)
        except ApiError as error:
            return _answer(error)
        except HTTPException as error:  # of starlette's routes
            return _answer(ApiError(error.status_code, error.detail), error.headers)
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

    def _add_headers(self, headers: MutableHeaders, origin: str) -> None:
        headers["x-content-type-options"] = "nosniff"
        if self.origins:
            headers.add_vary_header("origin")
        if origin in self.origins:
            headers["access-control-allow-origin"] = origin
            headers["access-control-allow-methods"] = "GET, POST"
            headers["access-control-allow-headers"] = "authorization, content-type"
            headers["access-control-expose-headers"] = _EXPOSED

    def _count(self, path: str, status: int, seconds: float) -> None:
        """Count and log an answer; status 0 says that the client left before it."""
        path, told = path if path in self.paths else "other", str(status or "client left")
        edit = path == EDITS
        self.metrics.answered(path, told, seconds if edit else None)
        if edit:
            _log.info("%s: %s in %.2f s", path, told, seconds)


def _answer(error: ApiError, more: Mapping[str, str] | None = None) -> Response:
    return JSONResponse(error.body, error.status, {**error.headers, **(more or {})})


def _name(address: str) -> str | None:
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None
