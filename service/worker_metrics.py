"""What a worker tells Prometheus. Our names begin with `deecap_`, times are in seconds, counters end in `_total`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

from model.caption import Caption
from model.exits import ResolvedSpeed
from service.jobs import ModelInfo, Timings

# A cached photo on a GPU is described in a few milliseconds, an uncached one on two cores in some tens; the rest is
# queueing, up to the usual timeout.
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.025, 0.04, 0.06, 0.1, 0.175, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
NATS = (0.25, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0)  # the most certain words to those of any vocabulary
COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # of photos or captions that shared one run of the network

Place = Literal["decode", "look", "describe"]  # what a job was at, or waited for, when its deadline passed


class WorkerMetrics:
    """One worker's metrics, in a registry that may be shared with a front's. May be called from any thread."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self._stages = Histogram(
            "deecap_stage_duration_seconds",
            "Parts of a caption: queue (all waiting), decode_image, look, describe (encoder and words).",
            ["stage"],
            buckets=SECONDS,
            registry=registry,
        )
        self._looks = Histogram(
            "deecap_look_batch_photos", "Photos in one run of the extractor.", buckets=COUNTS, registry=registry
        )
        self._steps = Histogram(
            "deecap_step_batch_captions", "Captions that shared a decoding step.", buckets=COUNTS, registry=registry
        )
        self._words = Counter("deecap_words", "Words written.", ["speed"], registry=registry)
        self._saved = Counter(
            "deecap_layers_saved",
            "Decoder layers above the exits of decoding steps, end of sentence included.",
            ["speed"],
            registry=registry,
        )
        self._entropies = Histogram(
            "deecap_word_entropy_nats",
            "Entropy of the distribution a decoding step left with, end of sentence included.",
            ["speed"],
            buckets=NATS,
            registry=registry,
        )
        self._promised = Gauge(
            "deecap_speed_promised",
            "SpeedUp that the model's table promises at a tier, as measured on validation data.",
            ["speed"],
            registry=registry,
        )
        self._hits = Counter("deecap_cache_hits", "Photos whose regions were cached.", ["cache"], registry=registry)
        self._misses = Counter("deecap_cache_misses", "Photos whose regions were not.", ["cache"], registry=registry)
        self._cache_errors = Counter("deecap_cache_errors", "Failures of the cache.", ["cache"], registry=registry)
        self._coalesced = Counter(
            "deecap_coalesced", "Jobs answered with a caption already in the making for another.", registry=registry
        )
        self._jobs = Counter(
            "deecap_worker_jobs",
            "Jobs that left the worker. `outcome` is answered, the problem's code, given_back, cancelled, not_ours "
            "(another worker has it by now) or undelivered (the broker could not be reached).",
            ["outcome"],
            registry=registry,
        )
        self._redeliveries = Counter(
            "deecap_worker_redeliveries", "Jobs taken over from a worker that died.", registry=registry
        )
        self._misses_of_deadline = Counter(
            "deecap_worker_deadline_misses",
            "Jobs whose deadline passed, by what they were at or waited for.",
            ["place"],
            registry=registry,
        )
        self._running = Gauge("deecap_worker_jobs_running", "Jobs taken and not answered.", registry=registry)
        self._success = Gauge(
            "deecap_worker_last_success_timestamp_seconds",
            "When a caption last went through, a canary's included, since 1970.",
            registry=registry,
        )
        self._moved = Counter(
            "deecap_speed_moved",
            "Jobs made faster than asked, as they allowed, because photos waited.",
            registry=registry,
        )
        self._level = Gauge(
            "deecap_load_level",
            "How far this worker moves the speed of jobs that allow it: 0 as asked, 1 as fast as each allows.",
            registry=registry,
        )
        self._exits: Histogram | None = None

    def joined(
        self,
        info: ModelInfo,
        running: Callable[[], int],
        last_success: Callable[[], float],
        level: Callable[[], float],
    ) -> None:
        """Adds what is known once the model has been loaded. To be called once."""
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
        for tier in info.speeds.tiers:
            self._promised.labels(tier).set(info.speeds.resolve(tier).promised)
        self._running.set_function(running)
        self._success.set_function(last_success)
        self._level.set_function(level)

    def looked(self, photos: int) -> None:
        self._looks.observe(photos)

    def stepped(self, captions: int) -> None:
        self._steps.observe(captions)

    def captioned(self, caption: Caption) -> None:
        """Once for each caption made, however many jobs it answers."""
        speed = speed_label(caption.speed)
        self._words.labels(speed).inc(len(caption.words))
        self._saved.labels(speed).inc(sum(caption.layers - step.exit_layer for step in caption.steps))
        entropies = self._entropies.labels(speed)
        for step in caption.steps:
            entropies.observe(step.entropy)
        if self._exits is not None:
            exits = self._exits.labels(speed)
            for step in caption.steps:
                exits.observe(step.exit_layer)

    def answered(self, timings: Timings) -> None:
        self._stages.labels("queue").observe(timings.queue)
        self._stages.labels("decode_image").observe(timings.decode_image)
        self._stages.labels("look").observe(timings.look)
        self._stages.labels("describe").observe(timings.describe)

    def ended(self, outcome: str, jobs: int = 1) -> None:
        self._jobs.labels(outcome).inc(jobs)

    def cache_asked(self, cache: str, hit: bool) -> None:
        (self._hits if hit else self._misses).labels(cache).inc()

    def cache_failed(self, cache: str) -> None:
        self._cache_errors.labels(cache).inc()

    def coalesced(self) -> None:
        self._coalesced.inc()

    def speed_moved(self) -> None:
        self._moved.inc()

    def redelivered(self) -> None:
        self._redeliveries.inc()

    def missed_deadline(self, place: Place) -> None:
        self._misses_of_deadline.labels(place).inc()


def speed_label(resolved: ResolvedSpeed) -> str:
    """One of six values, so that numbers sent by clients cannot multiply the time series. That of what was asked for,
    also where load moved the speed."""
    if resolved.requested is None:
        return "tau"
    return resolved.tier or "custom"
