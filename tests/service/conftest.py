"""The app over a fake captioner, and a client that talks to it without a socket."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable

import httpx
import pytest
from fastapi import FastAPI

from service.app import create_app
from service.images import ImageLimits
from service.inference import LocalEngine
from service.settings import Settings
from tests.service.fakes import FakeCaptioner


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The developer's own DEECAP_ settings must not decide a test."""
    for name in list(os.environ):
        if name.startswith("DEECAP_"):
            monkeypatch.delenv(name)


@pytest.fixture
def captioner() -> FakeCaptioner:
    return FakeCaptioner()


@pytest.fixture
def settings() -> Settings:
    return Settings(max_body_bytes=200_000, max_pixels=100_000, timeout_ms=5_000, queue_depth=2)


@pytest.fixture
def make_engine(captioner: FakeCaptioner, settings: Settings) -> Callable[[], LocalEngine]:
    limits = ImageLimits(settings.max_pixels, settings.min_side)
    return lambda: LocalEngine(lambda: captioner, limits, settings.queue_depth)


@pytest.fixture
def app(settings: Settings, make_engine: Callable[[], LocalEngine]) -> FastAPI:
    return create_app(settings, make_engine())


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app, raise_app_exceptions=True)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test", timeout=10) as client,
    ):
        for _ in range(200):
            if (await client.get("/readyz")).status_code == 200:
                break
            await asyncio.sleep(0.01)
        yield client
