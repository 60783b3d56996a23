"""Numbers for Prometheus."""

from collections.abc import Callable, Mapping, Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

EDITS = "/v1/images/edits"
LEFT = "left"  # in place of a status: the client had gone before its answer
# Numbers that are there from the start, so that the first event is seen as one.
_STATUSES = ("200", "400", "401", "408", "413", "429", "500", "503", LEFT)
_WHEN = (
    "uploading",
    "waiting",
    "running",
    "waiting, past the deadline",
    "running, past the deadline",
)
_REASONS = ("died", "silent", "stuck", "failed", "unfit")

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120)
_SIZES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """All numbers of one server, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = own = CollectorRegistry()
        ProcessCollector(registry=own)
        self._requests = Counter(
            "varedit_requests", "Requests by path and status", ["path", "status"], registry=own
        )
        self._latency = Histogram(
            "varedit_edit_request_seconds",
            "Time of edits that were answered with 200",
            buckets=_SECONDS,
            registry=own,
        )
        self._queue = Gauge("varedit_queue_pictures", "Pictures that wait", registry=own)
        self._ready = Gauge("varedit_workers_ready", "Processes that can edit now", registry=own)
        self._waited = Histogram(
            "varedit_queue_seconds", "Time that pictures waited", buckets=_SECONDS, registry=own
        )
        self._batches = Histogram(
            "varedit_batch_pictures", "Pictures of a batch", buckets=_SIZES, registry=own
        )
        self._stages = Counter(
            "varedit_stage_seconds", "Time of all batches, by stage", ["stage"], registry=own
        )
        self._cancelled = Counter(
            "varedit_cancelled", "Requests that were not answered, by when", ["when"], registry=own
        )
        self._restarts = Counter(
            "varedit_restarts", "Replaced editing processes, by reason", ["reason"], registry=own
        )

        for status in _STATUSES:
            self._requests.labels(EDITS, status)
        for when in _WHEN:
            self._cancelled.labels(when)
        for why in _REASONS:
            self._restarts.labels(why)

    def watch_queue(self, length: Callable[[], int], ready: Callable[[], int]) -> None:
        """Take the queue's length and the ready processes from functions whenever asked for."""
        self._queue.set_function(length)
        self._ready.set_function(ready)

    def answered(self, path: str, status: str, seconds: float) -> None:
        """Count an answer. path: one of the server's own, or other."""
        self._requests.labels(path, status).inc()
        if (path, status) == (EDITS, "200"):  # refusals are quick, and would hide slow edits
            self._latency.observe(seconds)

    def started(self, waited: Sequence[float], batch: int) -> None:
        """Count a batch. waited: seconds of the pictures that run for the first time."""
        self._batches.observe(batch)
        for seconds in waited:
            self._waited.observe(seconds)

    def edited(self, timings: Mapping[str, float]) -> None:
        """Add up a batch's seconds by stage."""
        for stage, seconds in timings.items():
            self._stages.labels(stage).inc(seconds)

    def cancelled(self, when: str) -> None:
        """Count a request that was not answered."""
        self._cancelled.labels(when).inc()

    def restarted(self, reason: str) -> None:
        """Count a replaced process."""
        self._restarts.labels(reason).inc()

    def text(self) -> bytes:
        """Return all numbers as Prometheus reads them."""
        return generate_latest(self._registry)
