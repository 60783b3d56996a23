"""The whole server but its socket: routes, and the parts behind them."""

from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.resources import files
from time import time

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from varedit_runtime import Preparer
from varedit_serve.answering.answers import Sign, unsigned
from varedit_serve.answering.moderation import Everything, Moderation
from varedit_serve.budget import Budget
from varedit_serve.editing.queue import Queue
from varedit_serve.edits import Edits
from varedit_serve.errors import ApiError
from varedit_serve.guard import Guard
from varedit_serve.keys import Keys
from varedit_serve.limits import Limits
from varedit_serve.metrics import EDITS, Metrics
from varedit_serve.openapi import openapi

METRICS = "/metrics"
_PAGE = {"/": "index.html", "/page.js": "page.js", "/page.css": "page.css"}
_KINDS = {"html": "text/html", "js": "text/javascript", "css": "text/css"}
# The page loads nothing from elsewhere, and no other page may show it.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@dataclass(frozen=True)
class Settings:
    """What an operator chooses.

    model: its name; None for the bundle's. largest: pictures of a batch; None for one on a CPU, and
    for as many as the bundle takes on a GPU. hosts: names that requests may be sent to; None for
    all. origins: sites whose pages may send requests. own_metrics: whether the numbers have an
    address of their own. sign: see `Answer`.
    """

    model: str | None = None
    keys: Keys = field(default_factory=lambda: Keys([]))
    largest: int | None = None
    hosts: Collection[str] | None = None
    origins: Collection[str] = ()
    limits: Limits = field(default_factory=Limits)
    moderation: Moderation = field(default_factory=Everything)
    own_metrics: bool = False
    sign: Sign = unsigned


class Application:
    """A server's parts.

    guard: the ASGI application. numbers: that of the numbers alone, which asks for no key.
    draining: whether no more edits are admitted.
    """

    def __init__(self, preparer: Preparer, settings: Settings) -> None:
        limits = settings.limits
        self.draining, self._started = False, int(time())
        self.model = settings.model or preparer.bundle.manifest.name
        self.metrics = Metrics()
        self.queue = Queue(self.metrics, settings.largest, limits.deadline)
        self.budget = Budget(limits, self.queue.retry_after)
        self.edits = Edits(
            preparer,
            self.model,
            limits,
            self.budget,
            self.queue,
            self.metrics,
            self._admits_no_edit,
            settings.moderation,
            settings.sign,
        )
        description = openapi(self.edits.fields, version("varedit-export"))
        routes, numbers = self._routes(), [Route(METRICS, self._numbers)]
        if settings.own_metrics:
            del description["paths"][METRICS]
        else:
            routes += numbers
        self._description = JSONResponse(description).body
        hosts = settings.hosts and {host.lower() for host in settings.hosts}
        self.guard = self._guarded(routes, settings.keys, hosts, settings.origins)
        self.numbers = self._guarded(numbers, Keys([]), None, ())

    def _guarded(
        self,
        routes: Sequence[Route],
        keys: Keys,
        hosts: Collection[str] | None,
        origins: Collection[str],
    ) -> Guard:
        def known(path: str) -> str:
            return next((one.path for one in routes if one.path_regex.match(path)), "other")

        routed = self._routed(Router(routes, redirect_slashes=False))
        return Guard(routed, known, keys, self.metrics, hosts, origins)

    def _routes(self) -> list[Route]:
        pages = [Route(path, _page(name)) for path, name in _PAGE.items()]
        return [
            Route(EDITS, self.edits, methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/v1/models/{name}", self._one_model),
            Route("/livez", self._live),
            Route("/readyz", self._ready),
            Route("/openapi.json", self._describe),
            *pages,
        ]

    def _routed(self, router: Router) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
        async def routed(scope: Scope, receive: Receive, send: Send) -> None:
            scope["app"] = self  # starlette then raises an exception for an unknown path
            await router(scope, receive, send)

        return routed

    def _admits_no_edit(self) -> str | None:
        """Return why no edit is admitted; it is while processes that died are replaced."""
        if self.draining:
            return "draining"
        return "loading" if self.queue.facts is None else None

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._told()]})

    async def _one_model(self, request: Request) -> Response:
        if request.path_params["name"] != self.model:
            told = f"there is no such model; this server has {self.model}"
            raise ApiError(404, told, param="model", code="model_not_found")
        return JSONResponse(self._told())

    def _told(self) -> dict[str, object]:
        return {
            "id": self.model,
            "object": "model",
            "created": self._started,
            "owned_by": "varedit",
        }

    async def _live(self, request: Request) -> Response:
        return JSONResponse({"status": "live"})

    async def _ready(self, request: Request) -> Response:
        why = self._admits_no_edit() or ("" if self.queue.ready else "restarting")
        if why:
            raise ApiError(503, f"the server is {why}", code=why, retry_after=5)
        return JSONResponse({"status": "ready"})

    async def _numbers(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _describe(self, request: Request) -> Response:
        return Response(self._description, media_type="application/json")


def _page(name: str) -> Callable[[Request], Awaitable[Response]]:
    content = files("varedit_serve").joinpath("page", name).read_bytes()
    headers = {"content-security-policy": _POLICY, "cache-control": "no-cache"}
    kind = _KINDS[name.partition(".")[2]]

    async def page(request: Request) -> Response:
        return Response(content, headers=headers, media_type=kind)

    return page
