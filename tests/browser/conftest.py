"""A real browser, Debian's Chromium without a window, and pages in it that may load nothing from elsewhere."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from fastapi import FastAPI

from service.app import create_app
from service.settings import Settings
from tests.browser.browsing import DESKTOP, Opener, browser_of, open_page
from tests.service.fakes import FakeCaptioner
from tests.service.over_sockets import serving


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The developer's own DEECAP_ settings must not decide a test."""
    for name in list(os.environ):
        if name.startswith("DEECAP_"):
            monkeypatch.delenv(name)


# Of a module and not of the session: Playwright keeps an event loop in this thread, and other tests need their own.
@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    if shutil.which("chromium") is None:
        pytest.skip("chromium is not installed (Debian: apt-get install chromium)")
    with browser_of() as browser:
        yield browser


@pytest.fixture
def captioner() -> FakeCaptioner:
    return FakeCaptioner()


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[FastAPI], str]]:
    """Serves an app until the test ends; returns its address."""
    monkeypatch.setattr("service.worker.TAKE_SECONDS", 0.02)  # a stop waits for the worker's turn to end
    with ExitStack() as stack:
        yield lambda app: stack.enter_context(serving(app))


@pytest.fixture
def service(serve: Callable[[FastAPI], str], captioner: FakeCaptioner) -> str:
    """The address of the service over the fake captioner."""
    return serve(create_app(Settings(max_body_bytes=200_000, feature_cache_mb=0), load=lambda: captioner))


@pytest.fixture
def visit(browser: object) -> Iterator[Opener]:
    """`visit(address, size, scheme)` opens a page; at the end none may have complained or asked elsewhere."""
    with ExitStack() as stack:
        faults: list[str] = []

        def visit(address: str, size: tuple[int, int] = DESKTOP, scheme: str = "light") -> object:
            return stack.enter_context(open_page(browser, address, size, scheme, faults))

        yield visit
    assert faults == []
