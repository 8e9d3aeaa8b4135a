"""Some seconds of all that clients and faults do, so that each metric has something to tell."""

from __future__ import annotations

import io
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from PIL import Image

from tests.deploy.compose import ROOT, Compose

SAMPLES = sorted((ROOT / "samples").glob("*.jpg"))
SPEEDS = (
    {"speed": "full"},
    {"speed": "balanced"},
    {"speed": "fast"},
    {"speed": "turbo"},
    {"speed": "2.5"},
    {"tau": "1"},
)
SECONDS = 6.0  # between the first and the last of a kind, at least: Prometheus must see a counter twice to see it grow


def everything(compose: Compose) -> None:
    with httpx.Client(base_url=compose.url("front", 8000), timeout=30) as client:
        begin, number = time.monotonic(), 0
        captions(client, number)
        mistakes(client)
        for _ in range(20):  # on a slow machine the front, on a fast one nobody, may be the only one to see it
            late(client)
            if "deecap_worker_deadline_misses_total{" in httpx.get(compose.url("worker", 8001) + "/metrics").text:
                break
        hang_up(compose.addresses["front"], 8000)
        cache_lost(compose, client)
        while time.monotonic() < begin + SECONDS:
            number += 1
            captions(client, number)
        mistakes(client)
        late(client)
        hang_up(compose.addresses["front"], 8000)


def captions(client: httpx.Client, number: int) -> None:
    """One at each speed; new photos, and one that is asked for again and again, also twice at once."""
    for index, speed in enumerate(SPEEDS):
        response = client.post("/v1/caption", params=speed, content=cropped(SAMPLES[index % len(SAMPLES)], number))
        assert response.status_code == 200, response.text
        assert response.json()["caption"]
    known = {"url": "/v1/caption", "content": SAMPLES[0].read_bytes()}
    with ThreadPoolExecutor(4) as threads:
        assert {each.status_code for each in threads.map(lambda _: client.post(**known), range(4))} == {200}


def mistakes(client: httpx.Client) -> None:
    assert client.post("/v1/caption", content=b"no photo").status_code == 415
    assert client.post("/v1/caption", params={"speed": "warp"}, content=SAMPLES[0].read_bytes()).status_code == 422


def late(client: httpx.Client) -> None:
    """With deadlines that pass at different places."""
    for milliseconds in (1, 4, 8, 12, 16, 20, 25, 30):
        photo = cropped(SAMPLES[0], 900 + milliseconds + int(time.monotonic() * 10) % 97)
        response = client.post("/v1/caption", params={"timeout_ms": milliseconds, "beam": 5}, content=photo)
        assert response.status_code in (200, 408, 504), response.text


def hang_up(host: str, port: int) -> None:
    photo = SAMPLES[1].read_bytes()
    with socket.create_connection((host, port), timeout=5) as connection:
        head = f"POST /v1/caption HTTP/1.1\r\nHost: deecap\r\nContent-Length: {len(photo)}\r\n\r\n"
        connection.sendall(head.encode() + photo)


def cache_lost(compose: Compose, client: httpx.Client) -> None:
    """The cache goes and comes back; nobody who asks for captions sees it."""
    compose.stop("redis-cache")
    for number in (501, 502):
        assert client.post("/v1/caption", content=cropped(SAMPLES[0], number)).status_code == 200
        time.sleep(1.1)  # a scrape between them
    compose.start("redis-cache")
    compose.wait_healthy("redis-cache")


def cropped(path: Path, number: int) -> bytes:
    """Another photo for every number: other bytes, and much the same to see."""
    with Image.open(path) as image:
        buffer = io.BytesIO()
        width, height = image.size
        cut = number % 100
        image.crop((cut, number // 100, width - cut // 2, height)).convert("RGB").save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
