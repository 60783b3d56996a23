"""How much may be waited for at a time: results, and bytes of memory."""

from collections.abc import Callable
from types import TracebackType

from varedit_serve.errors import ApiError
from varedit_serve.limits import Limits


class Budget:
    """Counts what all requests hold. retry_after: returns seconds until a place may be free."""

    def __init__(self, limits: Limits, retry_after: Callable[[], float]) -> None:
        self._limits, self._retry_after = limits, retry_after
        self.pictures = self.bytes = 0

    @property
    def most_bytes(self) -> int:
        return self._limits.max_queue_bytes

    def claim(self) -> "Claim":
        """Return a claim that holds nothing yet; it gives back what it holds at its block's end."""
        return Claim(self)

    def _take(self, pictures: int, size: int) -> None:
        limits = self._limits
        too_many = pictures > 0 and self.pictures + pictures > limits.max_queue
        if too_many or (size > 0 and self.bytes + size > limits.max_queue_bytes):
            raise ApiError(
                503, "the queue is full: try again", code="full", retry_after=self._retry_after()
            )
        self.pictures += pictures
        self.bytes += size


class Claim:
    """What one request holds of the budget."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self.pictures = self.bytes = 0

    def hold(self, pictures: int, size: int) -> None:
        """Hold so many results and bytes from now on.

        Raises ApiError: 503 if there is no room now, 413 if there never is.
        """
        if size > self._budget.most_bytes:
            told = "the request needs more memory than the server has: ask for fewer results"
            raise ApiError(413, f"{told}, or send a smaller picture", code="request_too_large")
        self._budget._take(pictures - self.pictures, size - self.bytes)
        self.pictures, self.bytes = pictures, size

    def __enter__(self) -> "Claim":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.hold(0, 0)
