"""The service as a process: what importing it loads, a real server on a real port, and a clean end."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from tests.service import pictures
from tests.service.checks import assert_problem
from tests.service.fakes import FakeCaptioner
from tests.service.over_sockets import serving

ROOT = Path(__file__).parents[2]
SERVE = """
import service.wiring
from service.serve import serve
from service.settings import Settings
from tests.service.fakes import FakeCaptioner
service.wiring.bundle_loader = lambda settings: {load}
class SlowCaptioner(FakeCaptioner):
    def step(self):
        import time
        time.sleep(0.5)
        super().step()
serve(Settings.load(port={port}))
"""
FRONT_ALONE = """
import sys
from service.serve import serve
from service.settings import Settings
serve(Settings.load(port=0, broker="redis://user:correct-horse@127.0.0.1:{port}/0"))
print("heavy:", sorted({{"torch", "onnxruntime", "model.captioner"}} & set(sys.modules)))
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


def wait_ready(client: httpx.Client) -> None:
    for _ in range(500):
        if client.get("/readyz").status_code == 200:
            return
        time.sleep(0.01)
    raise AssertionError("not ready in five seconds")


def wait_for(client: httpx.Client, series: str) -> None:
    for _ in range(500):
        if series in client.get("/metrics").text:
            return
        time.sleep(0.01)
    raise AssertionError(f"{series} did not come about in five seconds")


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


def test_a_client_that_hangs_up_while_it_waits(app: FastAPI, captioner: FakeCaptioner) -> None:
    with serving(app) as address, httpx.Client(base_url=address, timeout=10) as client:
        wait_ready(client)
        captioner.looked.clear()
        captioner.go.clear()
        with ThreadPoolExecutor(2) as threads:  # their photos are in the worker's hands, so that the third waits
            stay = [threads.submit(client.post, "/v1/caption", content=pictures.jpeg()) for _ in range(2)]
            wait_for(client, "deecap_captions_under_way 2.0")
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/caption", content=pictures.encode(pictures.photo((20, 32))), timeout=0.2)
            wait_for(client, "deecap_disconnects_total 1.0")
            captioner.go.set()
            assert [response.result().status_code for response in stay] == [200, 200]
        assert client.post("/v1/caption", content=pictures.jpeg()).status_code == 200
        assert (20, 32) not in captioner.looked
        assert captioner.looked[-1] == pictures.SIZE
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


def test_a_process_that_serves_collects_no_garbage_of_what_it_keeps() -> None:
    code = SERVE.format(load="counted", port=0).replace(
        "serve(Settings",
        "import gc, service.app\n"
        "def counted():\n    global kept\n    kept = [[] for _ in range(50_000)]\n    return FakeCaptioner()\n"
        "import atexit; atexit.register(lambda: print('frozen', gc.get_freeze_count(), len(gc.get_objects())))\n"
        "serve(Settings",
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().split(" at ")[1].split(" ")[0]
        with httpx.Client(base_url=address, timeout=10) as client:
            wait_ready(client)
            assert client.post("/v1/caption", content=pictures.jpeg()).status_code == 200
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=20)
        frozen, looked_at = map(int, out.split("frozen ")[1].split())
        assert frozen > 70_000, "the model's objects are not among them"
        assert looked_at < 20_000
    finally:
        process.kill()
        process.communicate()


def test_a_signal_during_a_caption_lets_it_finish_and_refuses_others() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE.format(load="SlowCaptioner", port=0)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        address = process.stdout.readline().split(" at ")[1].split(" ")[0]
        with httpx.Client(base_url=address, timeout=10) as client, ThreadPoolExecutor(1) as threads:
            wait_ready(client)
            under_way = threads.submit(client.post, "/v1/caption", content=pictures.jpeg())
            wait_for(client, "deecap_captions_under_way 1.0")
            process.send_signal(signal.SIGTERM)
            for _ in range(100):
                response = client.get("/readyz")
                if response.status_code != 200:
                    break
                time.sleep(0.01)
            assert_problem(response, 503, "stopping")
            assert_problem(client.post("/v1/caption", content=pictures.jpeg()), 503, "stopping")
            assert client.get("/livez").status_code == 200
            assert under_way.result().status_code == 200
        _, errors = process.communicate(timeout=20)
        assert process.returncode == 0, errors
        assert "Traceback" not in errors
    finally:
        process.kill()
        process.communicate()


def test_a_front_alone_loads_neither_torch_nor_the_runtime_and_ends_cleanly() -> None:
    """Over a store that is not there: it answers all the same, and says so."""
    code = FRONT_ALONE.format(port=free_port())
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        first = process.stdout.readline()
        assert "captions come from the workers of the queue deecap at redis://user:***@127.0.0.1" in first
        with httpx.Client(base_url=first.split(" at ")[1].split(" ")[0], timeout=10) as client:
            assert client.get("/livez").status_code == 200
            for _ in range(500):
                response = client.get("/readyz")
                if response.json()["code"] == "unavailable":
                    break
                time.sleep(0.01)
            assert_problem(response, 503, "unavailable")
            assert_problem(client.post("/v1/caption", content=pictures.jpeg()), 503, "unavailable")
        process.send_signal(signal.SIGTERM)
        out, errors = process.communicate(timeout=20)
        assert process.returncode == 0, errors
        assert out.splitlines()[-1] == "heavy: []"
        assert "correct-horse" not in out + errors
        settings = [json.loads(line) for line in errors.splitlines() if '"settings"' in line]
        assert settings[0]["DEECAP_BROKER"].startswith("redis://user:***@127.0.0.1:")
    finally:
        process.kill()
        process.communicate()


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


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
