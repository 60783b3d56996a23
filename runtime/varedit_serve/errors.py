"""Errors as clients see them: OpenAI's shape, a status, and headers that say whether to retry."""

import logging
from math import ceil

from varedit_runtime.errors import printable

LONGEST_WAIT = 120  # seconds: OpenAI's clients give up on a longer Retry-After

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}

_log = logging.getLogger(__name__)


class ApiError(Exception):
    """An answer that is no picture.

    param: the field that is to blame. code: a short name for programs. retry_after: seconds after
    which the same request may succeed. retry: False tells clients not to try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        retry: bool | None = None,
    ) -> None:
        super().__init__(printable(message))
        self.param = None if param is None else printable(param)
        self.status, self.code = status, code
        self.retry_after, self.retry = retry_after, retry

    @property
    def body(self) -> dict[str, object]:
        """The answer's JSON."""
        other = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = _TYPES.get(self.status, other)
        told = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": told}

    @property
    def headers(self) -> dict[str, str]:
        """The answer's headers."""
        headers = {}
        if self.retry_after is not None:
            headers["retry-after"] = str(min(LONGEST_WAIT, max(1, ceil(self.retry_after))))
        if self.retry is not None:
            headers["x-should-retry"] = str(self.retry).lower()
        return headers


def wrong(param: str | None, message: str, code: str | None = "invalid_value") -> ApiError:
    """Return the error of a field that cannot be used."""
    return ApiError(400, message, param=param, code=code)


def unexpected(error: Exception, request_id: str) -> ApiError:
    """Log a fault of the server where it happened, without what a client sent; return its error."""
    place, trace = "", error.__traceback__
    while trace is not None:
        place = f"{trace.tb_frame.f_code.co_qualname}, line {trace.tb_lineno}"
        trace = trace.tb_next
    _log.error("id=%s: %s in %s", request_id, type(error).__name__, place)
    return ApiError(500, "the server failed; its log says more", code="server_error")
