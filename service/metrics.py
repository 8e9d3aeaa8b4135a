"""What the service tells Prometheus. Our names begin with `deecap_`, times are in seconds, counters end in `_total`."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector

from model.exits import ResolvedSpeed
from service.inference import Answer, ModelInfo

# From a cached answer on a GPU to the default deadline.
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.175, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


def speed_label(resolved: ResolvedSpeed) -> str:
    """One of six values, so that numbers sent by clients cannot multiply the time series."""
    if resolved.requested is None:
        return "tau"
    return resolved.tier or "custom"


class Metrics:
    """One app's metrics, in a registry of their own so that several apps can live in one process."""

    def __init__(self, waiting: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.in_flight = Gauge("deecap_requests_in_flight", "Requests being answered.", registry=self.registry)
        queued = Gauge("deecap_queue_jobs", "Photos that wait for the model.", registry=self.registry)
        queued.set_function(waiting)
        self._requests = Histogram(
            "deecap_request_duration_seconds",
            "From a request's headers to the end of its answer. `outcome` is ok, the problem's code, or cancelled.",
            ["route", "speed", "outcome"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self._stages = Histogram(
            "deecap_stage_duration_seconds",
            "Parts of a caption: queue, decode_image, look, describe (encoder and words).",
            ["stage"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self._words = Counter("deecap_words", "Words written.", ["speed"], registry=self.registry)
        self._saved = Counter(
            "deecap_layers_saved",
            "Decoder layers above the exits of decoding steps, end of sentence included.",
            ["speed"],
            registry=self.registry,
        )
        self._exits: Histogram | None = None

    def model_loaded(self, info: ModelInfo) -> None:
        """Adds what depends on the model. To be called once."""
        Info("deecap_model", "The model served.", registry=self.registry).info(
            {"name": info.name, "revision": info.revision, "device": info.device, "layers": str(info.layers)}
        )
        self._exits = Histogram(
            "deecap_exit_layer",
            "The layer at which a decoding step left, end of sentence included.",
            ["speed"],
            buckets=range(1, info.layers + 1),
            registry=self.registry,
        )

    def request_done(self, route: str, speed: str, outcome: str, seconds: float) -> None:
        self._requests.labels(route, speed, outcome).observe(seconds)

    def captioned(self, answer: Answer) -> None:
        caption, times = answer.caption, answer.timings
        speed = speed_label(caption.speed)
        for stage in ("queue", "decode_image", "look", "describe"):
            self._stages.labels(stage).observe(getattr(times, stage))
        self._words.labels(speed).inc(len(caption.words))
        self._saved.labels(speed).inc(sum(caption.layers - step.exit_layer for step in caption.steps))
        if self._exits is not None:
            for step in caption.steps:
                self._exits.labels(speed).observe(step.exit_layer)
