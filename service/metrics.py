"""What a front tells Prometheus. Our names begin with `deecap_`, times are in seconds, counters end in `_total`."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from service.errors import KINDS
from service.front import Front
from service.jobs import PRIORITIES, QueueState
from service.uploads import Uploads

# Close together where captions are, and an edge at each promise: 0.1 s and 0.25 s. The last is the usual deadline.
SECONDS = (
    0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.125, 0.15, 0.2, 0.25, 0.35, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
)  # fmt: skip
LONGEST_EXEMPLAR_ID = 128 - len("request_id")  # OpenMetrics 1.0 lets an exemplar's labels have 128 characters in all
# Told before any worker saw the photo.
REJECTED = frozenset(code for code, kind in KINDS.items() if kind.status in (400, 401, 408, 413, 415, 422, 429, 503))


class Metrics:
    """One front's metrics, in a registry of their own so that several apps can live in one process."""

    def __init__(self, front: Front, uploads: Uploads) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.registry.register(QueueCollector(front))
        self.in_flight = Gauge("deecap_requests_in_flight", "Requests being answered.", registry=self.registry)
        held = Gauge("deecap_uploads_bytes", "Of request bodies that this front holds.", registry=self.registry)
        held.set_function(lambda: uploads.held)
        self._requests = Histogram(
            "deecap_request_duration_seconds",
            "From a request's headers to the end of its answer. `outcome` is ok, accepted (202, for later), the "
            "problem's code, or cancelled.",
            ["route", "speed", "outcome"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self._rejections = Counter(
            "deecap_rejections",
            "Requests to do something (POST) that were refused, by the problem's code: at fault, over a limit, or not "
            "to be served now; and what was sent and is no request.",
            ["reason"],
            registry=self.registry,
        )
        self._batch_images = Counter(
            "deecap_batch_images",
            "Photos of requests to `/v1/captions`. `outcome` is ok or the problem's code; the request itself is ok.",
            ["outcome"],
            registry=self.registry,
        )
        self._disconnects = Counter(
            "deecap_disconnects", "Requests whose client hung up before the answer.", registry=self.registry
        )

    def batch_image_done(self, outcome: str) -> None:
        self._batch_images.labels(outcome).inc()

    def refused(self, code: str) -> None:
        """What was sent came to no request."""
        self._rejections.labels(code).inc()

    def request_done(self, method: str, route: str, speed: str, outcome: str, seconds: float, request_id: str) -> None:
        exemplar = {"request_id": request_id} if len(request_id) <= LONGEST_EXEMPLAR_ID else None
        self._requests.labels(route, speed, outcome).observe(seconds, exemplar)
        if outcome == "client_gone":
            self._disconnects.inc()
        elif method == "POST" and outcome in REJECTED:
            self._rejections.labels(outcome).inc()


class QueueCollector(Collector):
    """Queue and workers as the front last saw them. Every front of a queue tells the same: take the maximum.

    While the store is lost there are no such series, since nobody knows.
    """

    def __init__(self, front: Front) -> None:
        self._front = front

    def collect(self) -> Iterable[Metric]:
        front = self._front
        yield GaugeMetricFamily("deecap_captions_under_way", "Captions that requests wait for.", front.under_way)
        yield CounterMetricFamily(
            "deecap_resubmissions",
            "Jobs submitted again, since the store did not know them any more.",
            front.resubmitted,
        )
        yield CounterMetricFamily("deecap_store_losses", "Times that the store was lost.", front.store_losses)
        late = CounterMetricFamily(
            "deecap_deadline_misses",
            "Captions that were late. `place` is where the photo was: front, queue or worker.",
            labels=["place"],
        )
        for place in ("front", "queue", "worker"):
            late.add_metric([place], front.late.get(place, 0))
        yield late
        state = front.state
        yield GaugeMetricFamily("deecap_store_up", "Whether the store behind the queue answers.", state is not None)
        if state is not None:
            yield from _queue(state)

    def describe(self) -> Iterable[Metric]:
        return ()  # so that registering collects nothing


def _queue(state: QueueState) -> Iterable[Metric]:
    jobs = GaugeMetricFamily("deecap_queue_jobs", "Photos that wait for a worker.", labels=["priority"])
    for priority in PRIORITIES:
        jobs.add_metric([priority], state.waiting.get(priority, 0))
    yield jobs
    yield GaugeMetricFamily("deecap_queue_oldest_seconds", "How long the oldest of them has waited.", state.oldest)
    yield CounterMetricFamily("deecap_queue_answered", "Jobs answered since the queue began.", state.answered)
    yield CounterMetricFamily("deecap_redeliveries", "Jobs taken over from dead workers.", state.redelivered)
    yield CounterMetricFamily("deecap_dead_letters", "Jobs given up since every worker died of them.", state.dead)
    workers = GaugeMetricFamily("deecap_workers", "Workers that live, and those that caption.", labels=["state"])
    workers.add_metric(["alive"], len(state.workers))
    workers.add_metric(["ready"], sum(worker.ready for worker in state.workers))
    yield workers
    slots = sum(worker.slots for worker in state.workers)
    yield GaugeMetricFamily("deecap_slots", "Captions that all workers together can have in the making.", slots)
    running = sum(worker.running for worker in state.workers)
    yield GaugeMetricFamily("deecap_jobs_running", "Jobs that workers have taken and not answered.", running)
