"""What Prometheus reads at /metrics."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.types import Scope


class Counters:
    """Of one service; nothing here is shared by the process."""

    MEDIA = CONTENT_TYPE_LATEST

    def __init__(self, images: int) -> None:
        self._registry = CollectorRegistry()
        kind = {"registry": self._registry}
        self._requests = Counter("neucore_requests", "Requests by address and status", ["path", "status"], **kind)
        steps = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
        self._seconds = Histogram("neucore_request_seconds", "Seconds a request", ["path"], buckets=steps, **kind)
        sizes = (1, 2, 4, 8, 16, 32)
        self._batches = Histogram("neucore_batch_queries", "Queries answered together", buckets=sizes, **kind)
        self._waiting = Gauge("neucore_waiting", "Queries that wait for the model", **kind)
        Gauge("neucore_index_images", "Pictures in the index", **kind).set(images)

    def count(self, scope: Scope, status: int, seconds: float) -> None:
        """A request that is answered; an address that is none of ours counts as `other`, so that they stay few."""
        route = scope.get("route")
        path = getattr(route, "path", "other")
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def waiting(self, number: Callable[[], int]) -> None:
        """Where the number of waiting queries is had from."""
        self._waiting.set_function(number)

    def batch(self, size: int) -> None:
        """Queries that the model answered together."""
        self._batches.observe(size)

    def text(self) -> bytes:
        """All of them."""
        return generate_latest(self._registry)
