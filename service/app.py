"""Puts the HTTP front together: `create_app` returns one that has not begun anything yet."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from service.errors import install_handlers
from service.images import ImageLimits
from service.inference import Engine, LocalEngine, bundle_loader
from service.metrics import Metrics
from service.middleware import Envelope
from service.routes import caption, home, metrics, model, probes
from service.routes.caption_docs import add_problem_schema
from service.routes.context import Context
from service.settings import Settings

log = logging.getLogger(__name__)

DESCRIPTION = """Captions photos at a speed you choose: every word leaves the decoder at the shallowest layer that is
certain enough. `POST /v1/caption` with a photo; `GET /v1/speeds` for what there is to choose from.
Every error is an RFC 9457 problem whose `code` never changes. Send `X-Request-ID` to find a request again."""


def create_app(
    settings: Settings, engine: Engine | None = None, on_engine_failure: Callable[[], None] | None = None
) -> FastAPI:
    """The ASGI app. The engine (by default one that runs the settings' bundle in this process) starts with it.

    It answers while the engine starts: `/readyz` and captions with 503. `on_engine_failure` is called on the
    event loop if the engine cannot start; without it the app stays up and not ready.
    """
    limits = ImageLimits(settings.max_pixels, settings.min_side)
    running: Engine = engine or LocalEngine(bundle_loader(settings), limits, settings.queue_depth)
    context = Context(settings, running, Metrics(lambda: running.waiting), limits)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        starting = asyncio.create_task(_start(context, on_engine_failure))
        try:
            yield
        finally:
            starting.cancel()
            await running.stop()

    app = FastAPI(
        title="DeeCap",
        version="1",
        description=DESCRIPTION,
        lifespan=lifespan,
        redoc_url=None,
        # A redirect would make clients send their photo twice.
        redirect_slashes=False,
    )
    context.install(app)
    install_handlers(app)
    app.add_middleware(Envelope, metrics=context.metrics)
    for routes in (caption, model, probes, metrics, home):
        app.include_router(routes.router)
    _describe(app)
    return app


async def _start(context: Context, on_failure: Callable[[], None] | None) -> None:
    try:
        await context.engine.start()
    except Exception as error:
        log.critical("the model cannot be loaded: %s", error, exc_info=error)
        if on_failure is not None:
            on_failure()
        return
    if context.engine.info is not None:
        context.metrics.model_loaded(context.engine.info)


def _describe(app: FastAPI) -> None:
    """Completes the OpenAPI document, made on the first request for it."""

    def openapi() -> dict[str, Any]:
        if not app.openapi_schema:
            document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            app.openapi_schema = add_problem_schema(document)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend it
