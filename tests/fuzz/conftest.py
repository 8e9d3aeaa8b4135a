"""One real server for all the fuzzing of pictures and of HTTP, with limits small enough to be reached."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fuzz.server import Server, serving

MAX_PIXELS = 4_000_000  # 12 MB decoded: a picture let in that declares as much is worked on in tens of milliseconds
MAX_BODY_BYTES = 8_000_000  # the largest mutant, in base64
TIMEOUT_MS = 3_000


@pytest.fixture(scope="session")
def _process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    limits = {"max_pixels": MAX_PIXELS, "max_body_bytes": MAX_BODY_BYTES, "timeout_ms": TIMEOUT_MS}
    with serving(folder, **limits) as server:
        yield server
        server.assert_no_exception_was_logged()


@pytest.fixture
def server(_process: Server) -> Iterator[Server]:
    """It captions before and after each test, whatever the test sent it."""
    _process.assert_it_captions()
    yield _process
    _process.assert_it_captions()
    _process.assert_no_exception_was_logged()
