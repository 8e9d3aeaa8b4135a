"""The app over a fake captioner, and a client that talks to it without a socket."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator

import httpx
import pytest
from fastapi import FastAPI

from service.app import create_app
from service.settings import Settings
from tests.service.fakes import FakeCaptioner
from tests.service.running import running, until_ready


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
def quick_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker asks for jobs in short turns, since a stop waits for the turn to end."""
    monkeypatch.setattr("service.worker.TAKE_SECONDS", 0.02)


@pytest.fixture
def captioner() -> FakeCaptioner:
    return FakeCaptioner()


@pytest.fixture
def settings() -> Settings:
    """Small limits. The worker has two jobs in hand that it has not begun, and the queue takes two more."""
    return Settings(
        max_body_bytes=200_000,
        max_pixels=100_000,
        timeout_ms=5_000,
        queue_depth=2,
        batch_queue_depth=2,
        look_batch=1,
        feature_cache_mb=0,
    )


@pytest.fixture
def app(settings: Settings, captioner: FakeCaptioner, quick_stop: None) -> FastAPI:
    return create_app(settings, load=lambda: captioner)


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with running(app) as client:
        await until_ready(client)
        yield client
