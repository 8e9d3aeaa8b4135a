"""A reader of the pages: where they stand, what they have there, and a service of theirs to talk to."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.docs.blocks import ROOT

HOST = "127.0.0.1:8000"  # what the pages call the service
PHOTOS = {"photo.jpg": "cat.jpg", "a.jpg": "astronaut.jpg", "b.jpg": "coffee.jpg"}  # what the pages call the reader's
START_SECONDS = 60


def environment(folder: Path) -> dict[str, str]:
    """That of the tests without the developer's own settings, for a reader who stands in `folder`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DEECAP_")}
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": path, "CURL_HOME": str(folder)}


def furnish(folder: Path) -> Path:
    """Makes it the project's folder, with photos of the reader's own and the command `deecap` of these sources."""
    for name in ("model", "service", "samples"):
        (folder / name).symlink_to(ROOT / name)
    for name, sample in PHOTOS.items():
        shutil.copy(ROOT / "samples" / sample, folder / name)
    (folder / ".curlrc").write_text("fail-with-body\nsilent\nshow-error\n")
    (folder / "bin").mkdir()
    command = folder / "bin" / "deecap"
    command.write_text(f"#!{sys.executable}\nfrom service.cli import main\nmain()\n")
    command.chmod(0o755)
    return folder


def run(text: str, folder: Path, seconds: float, python: bool = False) -> subprocess.CompletedProcess[str]:
    """Runs lines for a shell, or of Python, in a furnished folder."""
    return subprocess.run(
        [sys.executable, "-c", text] if python else ["sh", "-euc", text],
        cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=seconds, check=False,
    )  # fmt: skip


@contextmanager
def serving(line: str, folder: Path) -> Iterator[str]:
    """Runs a line for a shell that serves, on a free port; host and port once it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "serve.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["sh", "-euc", line],
            cwd=folder,
            env={**environment(folder), "DEECAP_PORT": str(port)},
            stdout=output,
            stderr=output,
            start_new_session=True,  # the shell and what it started are ended together
        )
    try:
        end = time.monotonic() + START_SECONDS
        while not ready(port):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(START_SECONDS)


def ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200
    except httpx.TransportError:
        return False
