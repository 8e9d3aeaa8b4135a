"""The service to be tested: started for the test, watched, and stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

READY_SECONDS = 120.0


class Service:
    """`deecap serve`, and with a queue's address as many `deecap worker` as wanted, as processes of this machine."""

    def __init__(self, log: Path, queue: str = "", workers: int = 1) -> None:
        """`queue`: the Redis between front and workers; without, both are one process."""
        self._log = log
        self._queue = queue
        self._workers = workers if queue else 0
        self.processes: dict[str, psutil.Popen] = {}
        self.url = ""

    def __enter__(self) -> Service:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("DEECAP_")}
        if self._queue:
            environment["DEECAP_BROKER"] = self._queue
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("wb") as log:
            for number in range(self._workers):
                command = [_deecap(), "worker", "--metrics-port", "0"]
                self.processes[f"worker {number}"] = psutil.Popen(command, env=environment, stdout=log, stderr=log)
            command = [_deecap(), "serve", "--port", "0"]
            front = psutil.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
        self.processes["front" if self._queue else "service"] = front
        try:
            first = front.stdout.readline()
            if " at http" not in first:
                raise RuntimeError(f"the service did not start: see {self._log}")
            self.url = first.split(" at ")[1].split(" ")[0]
            self._wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        for process in reversed(self.processes.values()):
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(40)
            except psutil.TimeoutExpired:
                process.kill()

    def resident(self) -> dict[str, int]:
        """Bytes of each process."""
        return {name: process.memory_info().rss for name, process in self.processes.items()}

    def _wait_ready(self) -> None:
        end = time.monotonic() + READY_SECONDS
        while True:
            try:
                ask(f"{self.url}/readyz")
                return
            except OSError:
                if time.monotonic() > end or any(process.poll() is not None for process in self.processes.values()):
                    raise RuntimeError(f"the service is not ready: see {self._log}") from None
                time.sleep(0.1)


def ask(url: str, body: bytes | None = None) -> dict[str, Any]:
    """One answer in JSON; with a body, to a POST. Raises `OSError`, which HTTP errors are too."""
    request = urllib.request.Request(url, body, {"Content-Type": "application/octet-stream"})
    with urllib.request.urlopen(request, timeout=30) as response:
        said: dict[str, Any] = json.loads(response.read())
    return said


def _deecap() -> str:
    return str(Path(sys.executable).with_name("deecap"))
