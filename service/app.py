"""Puts the HTTP front together: `create_app` returns one that has not begun anything yet."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.middleware.cors import CORSMiddleware

from service.broker.base import FrontBroker
from service.broker.memory import MemoryBroker
from service.errors import install_handlers
from service.front import Front
from service.images import ImageLimits
from service.keys import Quota, read_keys
from service.metrics import Metrics
from service.middleware import Envelope, KeyGuard
from service.routes import caption, captions, home, jobs, metrics, model, open_inference, probes
from service.routes.caption_docs import add_key_schemes, add_problem_schema
from service.routes.context import Context
from service.routes.open_inference_docs import add_infer_schemas
from service.settings import MEMORY, Settings, read_origins
from service.stepwise import StepwiseCaptioner
from service.tracing import Tracing
from service.tracing import start as start_tracing
from service.uploads import Uploads
from service.wiring import make_worker, redis_broker
from service.worker import Worker

log = logging.getLogger(__name__)

DESCRIPTION = """Captions photos at a speed you choose: every word leaves the decoder at the shallowest layer that is
certain enough. `POST /v1/caption` with a photo; `GET /v1/speeds` for what there is to choose from.
Every error is an RFC 9457 problem whose `code` never changes. Send `X-Request-ID` to find a request again."""
# What pages of other origins may send, and what they may read of the answers.
CORS_HEADERS = (
    "Accept", "Authorization", "Content-Type", "Idempotency-Key", "Inference-Header-Content-Length", "Prefer",
    "X-API-Key", "X-Request-ID", "traceparent", "tracestate",
)  # fmt: skip
CORS_ANSWERED = (
    "Inference-Header-Content-Length", "Location", "Preference-Applied", "Retry-After", "Server-Timing",
    "WWW-Authenticate", "X-Request-ID",
)  # fmt: skip


def create_app(
    settings: Settings,
    *,
    broker: FrontBroker | None = None,
    load: Callable[[], StepwiseCaptioner] | None = None,
    on_failure: Callable[[], None] | None = None,
    on_loaded: Callable[[], None] = lambda: None,
    tracing: Tracing | None = None,
) -> FastAPI:
    """The ASGI app. Nothing begins before its lifespan does; then it answers at once, and captions when it can.

    Over the memory broker of the settings a worker runs in the same process, with the captioner that `load` returns, by
    default the settings' bundle. `broker` instead makes the app a front alone, and so does a broker elsewhere in the
    settings. `on_loaded` is called on the event loop when the model is there, and `on_failure` if it cannot be loaded;
    without the latter the app stays up and not ready. `tracing` is by default what the settings say, and is closed with
    the app.

    Raises `service.settings.SettingsError` for API keys that cannot be read and tracing that cannot be had, and
    `service.broker.base.BrokerError` for an address of Redis that cannot.
    """
    keys = read_keys(settings)
    tracing = tracing or start_tracing(settings, "deecap")
    limits = ImageLimits(settings.max_pixels, settings.min_side)
    own: MemoryBroker | None = None
    if broker is None and settings.broker == MEMORY:
        broker = own = MemoryBroker(
            settings.depths, settings.worker_timeout_s, settings.tries, waiting_bytes=settings.max_uploads_bytes
        )
    front = Front(broker or redis_broker(settings), own_worker=own is not None)
    quota = Quota(settings.quota_per_minute)
    uploads = Uploads(settings.max_uploads_bytes)
    told = Metrics(front, uploads)
    context = Context(settings, front, told, limits, quota, uploads)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        await front.start()
        async with AsyncExitStack() as stack:
            if tracing is not None:
                stack.push_async_callback(tracing.close)  # the last: all others may have something to tell
            if own is not None:
                worker = make_worker(settings, own, told.registry, load, tracing)
                stack.push_async_callback(worker.stop)
                starting = asyncio.create_task(_start(worker, on_loaded, on_failure))
                stack.callback(starting.cancel)
            stack.push_async_callback(front.stop)  # before the worker: its requests are told, and nothing is given back
            yield

    app = FastAPI(
        title="DeeCap",
        version="1",
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,  # its page loads scripts from elsewhere; ours is in routes/home.py
        redoc_url=None,
        # A redirect would make clients send their photo twice.
        redirect_slashes=False,
    )
    context.install(app)
    install_handlers(app)
    app.add_middleware(KeyGuard, keys=keys, open_probes=settings.open_probes)
    if origins := read_origins(settings.cors_origins):
        # Around the keys: a browser asks first whether it may, and sends none with that.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=CORS_HEADERS,
            expose_headers=CORS_ANSWERED,
            max_age=3600,  # seconds that a browser need not ask again
        )
    app.add_middleware(Envelope, metrics=told, quota=quota, tracing=tracing)  # added last: around all else
    for routes in (caption, captions, jobs, model, open_inference, probes, metrics, home):
        app.include_router(routes.router)
    _describe(app, with_keys=bool(keys))
    return app


async def _start(worker: Worker, on_loaded: Callable[[], None], on_failure: Callable[[], None] | None) -> None:
    try:
        await worker.start()
        on_loaded()
    except Exception as error:
        log.critical("the model cannot be loaded: %s", error, exc_info=error)
        if on_failure is not None:
            on_failure()


def _describe(app: FastAPI, with_keys: bool) -> None:
    """Completes the OpenAPI document, made on the first request for it."""

    def openapi() -> dict[str, Any]:
        if not app.openapi_schema:
            document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            app.openapi_schema = add_problem_schema(add_infer_schemas(document))
            if with_keys:
                add_key_schemes(document)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend it
