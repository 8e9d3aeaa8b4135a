"""Workers, caches and brokers as the settings want them. Nothing has begun yet in what these make."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry

from service.broker.base import WorkerBroker
from service.broker.redis import RedisBroker
from service.feature_cache import FeatureCache, MemoryFeatureCache, RedisFeatureCache
from service.images import ImageLimits
from service.model_thread import ModelThread
from service.patience import Patience
from service.settings import Settings
from service.stepwise import StepwiseCaptioner, bundle_loader
from service.tracing import Tracing
from service.worker import Worker
from service.worker_metrics import WorkerMetrics


def make_worker(
    settings: Settings,
    broker: WorkerBroker,
    registry: CollectorRegistry,
    load: Callable[[], StepwiseCaptioner] | None = None,
    tracing: Tracing | None = None,
) -> Worker:
    """A worker for the broker, its metrics in the registry, with the captioner that `load` returns, by default the
    settings' bundle. Where the model hangs it ends the process, for a supervisor to start it again.
    """
    metrics = WorkerMetrics(registry)
    patience = Patience(settings.worker_timeout_s, settings.hang_timeout_s)
    patience.compare()
    return Worker(
        broker,
        ModelThread(load or bundle_loader(settings), metrics, settings.look_batch, patience=patience),
        ImageLimits(settings.max_pixels, settings.min_side),
        make_cache(settings, metrics),
        metrics,
        hang_seconds=settings.hang_timeout_s,
        stall_seconds=settings.worker_timeout_s,
        load_seconds=settings.load_timeout_s,
        drain_seconds=settings.drain_timeout_s,
        target_wait=settings.target_wait_ms / 1000,
        tracing=tracing,
    )


def make_cache(settings: Settings, metrics: WorkerMetrics) -> FeatureCache:
    """Redis where the settings name one, else this process's memory."""
    if settings.redis_cache:
        return RedisFeatureCache(
            settings.redis_cache, settings.feature_cache_ttl_s, lambda: metrics.cache_failed(RedisFeatureCache.name)
        )
    return MemoryFeatureCache(settings.feature_cache_mb * 1_000_000)


def redis_broker(settings: Settings) -> RedisBroker:
    """The broker at the settings' address. Raises `service.broker.base.BrokerError` for one that cannot be read."""
    return RedisBroker(settings.broker, settings.queue, settings.depths, settings.worker_timeout_s, settings.tries)
