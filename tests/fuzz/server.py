"""The service as a process of its own over a fake model, and what a fuzzer wants to know of it: answers and memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from service.errors import KINDS
from tests.service import pictures

ROOT = Path(__file__).parents[2]
URL = "/v1/caption"

# The fake looks at what the real preprocessing makes of a picture, since broken pictures may break that too; and it
# forgets what it was shown, so that memory that grows is the service's.
PROGRAM = """
from collections import deque
import service.wiring
from model.bottom_up.preprocess import to_pixels
from service.serve import serve
from service.settings import Settings
from tests.service.fakes import FakeCaptioner
import numpy as np

class Forgetful(FakeCaptioner):
    def __init__(self):
        super().__init__()
        self.looked, self.described = deque(maxlen=4), deque(maxlen=4)

    def prepare(self, image):
        return np.array([to_pixels(image).mean(), *image.size], np.float32)

service.wiring.bundle_loader = lambda settings: Forgetful
serve(Settings.load(port=0))
"""


@dataclass(frozen=True)
class Server:
    """A process that serves."""

    process: subprocess.Popen[bytes]
    port: int
    client: httpx.Client
    log: Path

    def assert_it_captions(self) -> None:
        """A good photo still gets its caption, and the process is the one that was started."""
        assert self.process.poll() is None, f"the service ended with {self.process.returncode}: {self.said()}"
        response = self.client.post(URL, content=pictures.jpeg())
        assert response.status_code == 200, response.text
        assert response.json()["caption"].endswith(" {} {}".format(*pictures.SIZE))

    def megabytes(self) -> float:
        """Resident memory."""
        lines = self.client.get("/metrics").text.splitlines()
        (line,) = [line for line in lines if line.startswith("process_resident_memory_bytes ")]
        return float(line.split()[1]) / 1e6

    def said(self) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace")[-5_000:]

    def assert_no_exception_was_logged(self) -> None:
        """A request that failed inside may still have been answered with a 4xx: the log has the truth."""
        faults = []
        for line in self.log.read_text(errors="replace").splitlines():
            # The decoders' libraries write to the same place, and no JSON.
            record = json.loads(line) if line.startswith("{") else {"level": "info", "message": line}
            # uvicorn's way to say that a connection broke before its answer was out.
            below = "ASGI callable returned without" in line
            failed = record["level"] in ("error", "critical")
            if (failed or "Traceback" in line or "never awaited" in line) and not below:
                faults.append(record.get("exception", line))
        assert not faults, f"{len(faults)} in the log\n" + "\n".join(faults[:5])


@contextmanager
def serving(folder: Path, **settings: object) -> Iterator[Server]:
    """The service with these settings on a free port, ready; its log goes to a file in `folder`.

    At its end it must stop on SIGTERM, cleanly.
    """
    # Photos already seen are kept on purpose, up to a bound: that would look like growth.
    settings = {"feature_cache_mb": 0, "log_format": "json", **settings}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DEECAP_")}
    environment |= {f"DEECAP_{name.upper()}": str(value) for name, value in settings.items()}
    # A heap for each thread would keep what that thread once needed, some tens of megabytes by chance: one heap, and
    # what is large goes back to the system at once, so that what stays is what is held.
    environment |= {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=output
        )
    try:
        assert process.stdout is not None
        first = process.stdout.readline().decode()
        assert " at http://" in first, log.read_text()
        address = first.split(" at ")[1].split(" ")[0]
        # More than the service itself may take, so that it is the test that says how long is too long.
        with httpx.Client(base_url=address, timeout=60) as client:
            wait_ready(client)
            yield Server(process, int(address.rsplit(":", 1)[1]), client, log)
        process.terminate()
        process.communicate(timeout=30)
        assert process.returncode == 0, log.read_text()[-5_000:]
    finally:
        process.kill()
        process.communicate()


def wait_ready(client: httpx.Client) -> None:
    end = time.monotonic() + 30
    while client.get("/readyz").status_code != 200:
        assert time.monotonic() < end, "not ready in 30 seconds"
        time.sleep(0.02)


def what_is_wrong(response: httpx.Response) -> str:
    """Why the answer is none that the service promises to whoever sends nonsense, "" where it is one.

    It must be a caption, or a problem with a 4xx status in the one shape.
    """
    if response.status_code == 200:
        return "" if response.json()["caption"] else f"an empty caption: {response.text}"
    if not 400 <= response.status_code < 500:
        return f"status {response.status_code}: {response.text[:500]}"
    return problem_fault(response.status_code, dict(response.headers), response.content)


def problem_fault(status: int, headers: dict[str, str], content: bytes) -> str:
    """Why this is no problem of RFC 9457 in our shape, "" where it is one. Names of headers in lower case."""
    if headers.get("content-type") != "application/problem+json":
        return f"{status} has Content-Type {headers.get('content-type')}: {content[:300]!r}"
    problem = httpx.Response(status, content=content).json()
    if set(problem) != {"type", "title", "status", "detail", "code", "request_id"}:
        return f"the problem's members are {sorted(problem)}"
    code = problem["code"]
    kind = KINDS.get(code)
    if kind is None or problem["type"] != f"/problems/{code}" or problem["title"] != kind.title:
        return f"code, type and title do not belong together: {problem}"
    # A status that the framework chose keeps it, under the general code of its class.
    if problem["status"] != status or (code != "bad_request" and kind.status != status):
        return f"status {status} does not belong to {problem}"
    if not problem["detail"] or problem["request_id"] != headers.get("x-request-id"):
        return f"no detail, or not this request's id: {problem}"
    return ""
