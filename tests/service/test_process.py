"""The service as a process: what importing it loads, a real server on a real port, and a clean end."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from service.inference import LocalEngine
from tests.service import pictures
from tests.service.checks import assert_problem

ROOT = Path(__file__).parents[2]
SERVE = """
import service.app
from service.serve import serve
from service.settings import Settings
from tests.service.fakes import FakeCaptioner
service.app.bundle_loader = lambda settings: {load}
serve(Settings.load(port={port}))
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("module", ["service.app", "service.serve", "service.settings"])
def test_importing_it_loads_no_torch_and_no_runtime(module: str) -> None:
    heavy = "{'torch', 'onnxruntime', 'model.captioner'}"
    done = run(f"import {module}, sys; print(sorted({heavy} & set(sys.modules)))")
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def test_making_an_app_begins_nothing() -> None:
    done = run(
        "import sys, threading; from service.app import create_app; from service.settings import Settings\n"
        "create_app(Settings()); print(threading.active_count(), 'torch' in sys.modules)"
    )
    assert done.stdout.split() == ["1", "False"], done.stderr


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """The app under uvicorn in a thread, on a free port."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


def wait_ready(client: httpx.Client) -> None:
    for _ in range(500):
        if client.get("/readyz").status_code == 200:
            return
        time.sleep(0.01)
    raise AssertionError("not ready in five seconds")


def test_a_real_server_takes_a_form_and_counts_bytes(app: FastAPI) -> None:
    with serving(app) as address, httpx.Client(base_url=address, timeout=10) as client:
        wait_ready(client)
        photo = {"image": ("photo.jpg", pictures.jpeg(), "image/jpeg")}
        response = client.post("/v1/caption", files=photo, data={"speed": "fast"})
        assert response.status_code == 200
        assert response.json()["speed"]["tier"] == "fast"
        assert response.headers["x-request-id"] == response.json()["request_id"]
        # Chunked, so that nothing announces its size.
        large = client.post("/v1/caption", content=(bytes(10_000) for _ in range(21)))
        assert_problem(large, 413, "body_too_large")
        assert client.post("/v1/caption", content=pictures.jpeg()).status_code == 200


def test_a_client_that_hangs_up_while_it_waits(
    app: FastAPI, make_engine: Callable[[], LocalEngine], captioner: object
) -> None:
    from tests.service.fakes import FakeCaptioner

    assert isinstance(captioner, FakeCaptioner)
    with serving(app) as address, httpx.Client(base_url=address, timeout=10) as client:
        wait_ready(client)
        captioner.looked.clear()
        captioner.go.clear()
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/caption", content=pictures.jpeg(), timeout=0.1)
        with pytest.raises(httpx.ReadTimeout):  # waits behind the first, and is given up
            client.post("/v1/caption", content=pictures.encode(pictures.photo((20, 20))), timeout=0.1)
        time.sleep(0.1)
        captioner.go.set()
        assert client.post("/v1/caption", content=pictures.jpeg()).status_code == 200
        assert captioner.looked == [pictures.SIZE, pictures.SIZE]
        assert 'outcome="client_gone"' in client.get("/metrics").text


def test_serve_prints_its_address_and_ends_cleanly() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE.format(load="FakeCaptioner", port=0)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        first = process.stdout.readline()
        address = first.split(" at ")[1].split(" ")[0]
        assert "curl -F image=@" in process.stdout.readline()
        with httpx.Client(base_url=address, timeout=10) as client:
            wait_ready(client)
            assert client.post("/v1/caption", files={"image": pictures.jpeg()}).status_code == 200
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=20)
        assert process.returncode == 0, errors
        assert "Traceback" not in errors
    finally:
        process.kill()
    port = int(address.rsplit(":", 1)[1])
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", port))  # free again


def test_serve_ends_with_1_where_the_model_cannot_be_loaded() -> None:
    done = run(SERVE.format(load="lambda: [][0]", port=0))
    assert done.returncode == 1
    assert "the model cannot be loaded" in done.stderr


def test_serve_ends_with_1_where_the_port_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = run(SERVE.format(load="FakeCaptioner", port=taken.getsockname()[1]))
    assert done.returncode == 1
    assert "DEECAP_PORT" in done.stderr
