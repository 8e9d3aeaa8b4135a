"""A whole service of real processes: Redis, a front, workers; what it says of itself, and ways to harm it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import redis

from tests.service.redis_server import RedisServer

ROOT = Path(__file__).parents[2]
FRONT = [sys.executable, "-c", "from service.cli import main; main()", "serve"]  # as the console script does
WORKER = [sys.executable, "-m", "tests.faults.launch", "worker"]
LOOK_MS, WORDS_MS = 25, 15  # of the stand-in: about what a model on one core takes
PER_WORKER = 1000 / (LOOK_MS + WORDS_MS)  # captions per second of one worker; of the model, not of the test
INTERACTIVE_DEPTH, BATCH_DEPTH = 100, 300  # the first for two seconds of two workers, the second for a crowd
WORKER_TIMEOUT = 1.5  # seconds: some beats (every 0.2 s) may be late on a busy machine
HANG_TIMEOUT = 4.0
QUEUE = "{deecap:faults}"


class Process:
    """One process of ours, and all that it said."""

    def __init__(self, name: str, command: list[str], environment: dict[str, str], folder: Path) -> None:
        self.name = name
        self._log = folder / f"{name}.log"
        self._begins = self._log.stat().st_size if self._log.exists() else 0
        with self._log.open("ab") as log:
            self.popen = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
        self.address = ""

    @property
    def alive(self) -> bool:
        return self.popen.poll() is None

    @property
    def said(self) -> str:
        return self._log.read_bytes()[self._begins :].decode()

    def find_address(self, pattern: str) -> bool:
        """Whether the process has told by now where it listens."""
        assert self.alive, f"{self.name} ended with {self.popen.returncode}:\n{self.said}"
        found = re.search(pattern, self.said)
        if found:
            self.address = f"http://127.0.0.1:{found[1]}"
        return found is not None

    def signal(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)

    def ended(self, seconds: float) -> int:
        """Its exit status; fails where it does not end in time."""
        try:
            return self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} did not end within {seconds:g} seconds:\n{self.said[-2000:]}") from None

    def kill(self) -> None:
        """Also one that was stopped; returns when it is gone."""
        self.popen.kill()
        self.popen.wait()

    def metrics(self) -> Metrics:
        return Metrics(httpx.get(f"{self.address}/metrics", timeout=5).text)


class Metrics:
    """One scrape. What has no series counts as 0."""

    def __init__(self, text: str) -> None:
        self._series = dict(line.rsplit(" ", 1) for line in text.splitlines() if line and line[0] != "#")

    def value(self, series: str) -> float:
        return float(self._series.get(series, 0.0))

    def answers(self) -> Counter[str]:
        """Requests for captions, by outcome."""
        pattern = r'deecap_request_duration_seconds_count{outcome="(\w+)",route="/v1/caption",speed="\w+"}'
        found: Counter[str] = Counter()
        for series, value in self._series.items():
            if match := re.fullmatch(pattern, series):
                found[match[1]] += int(float(value))
        return found


class Cluster:
    """One front, two workers, one Redis. `heal` before each use; `close` ends all processes, whatever happened."""

    def __init__(self, folder: Path, *, append_only: bool = False, **environment: object) -> None:
        """`environment`: of its processes; it overrides what all clusters have."""
        self._folder = folder
        self._environment = {name: str(value) for name, value in environment.items()}
        self.redis = RedisServer(append_only=append_only)
        self.workers: list[Process] = []
        self._front: Process | None = None
        self._started = 0  # processes
        self.redis.start()
        self.store = redis.Redis.from_url(self.redis.url)

    @property
    def front(self) -> Process:
        assert self._front is not None, "not healed yet"
        return self._front

    def heal(self, workers: int = 2) -> None:
        """Starts what is missing, and returns when the front sees as many workers that caption, and no work is left."""
        self.workers = [worker for worker in self.workers if worker.alive]
        while len(self.workers) > workers:
            self.workers.pop().kill()
        if self._front is None or not self._front.alive:
            self._front = self._start("front", FRONT)
        for _ in range(workers - len(self.workers)):
            self.start_worker()
        until(lambda: self.front.find_address(r"answers at http://\S+?:(\d+)"), 20, "the front tells its address")
        for worker in self.workers:
            until(lambda worker=worker: worker.find_address(r"metrics at port (\d+)"), 20, f"{worker.name} starts")
        until(lambda: self._sees(workers), 10, f"the front sees {workers} workers, ready, and no others")
        self.settle()

    def start_worker(self) -> Process:
        """Returns before it is ready."""
        self.workers.append(self._start("worker", WORKER))
        return self.workers[-1]

    def supervise(self) -> list[Process]:
        """Starts a new worker for each that ended, as a supervisor would; returns those that ended."""
        ended = [worker for worker in self.workers if not worker.alive]
        for worker in ended:
            self.workers.remove(worker)
            self.start_worker()
        return ended

    def settle(self, seconds: float = 10.0) -> None:
        """Returns once nothing waits and nothing is in anybody's hands; fails, and says what is left."""
        try:
            until(lambda: not self.left_over(), seconds, "")
        except AssertionError:
            raise AssertionError(f"{seconds:g} seconds later this is still there: {self.left_over()}") from None

    def left_over(self) -> dict[str, int]:
        """Entries of the queue, those in workers' hands, and the front's requests: what there is of each."""
        found = {}
        for stream in ("interactive", "batch"):
            key = f"{QUEUE}:{stream}"
            found[f"{stream} entries"] = self.store.xlen(key)
            if self.store.exists(key):
                found[f"{stream} pending"] = self.store.xpending(key, "workers")["pending"]
        if self.front.alive:
            found["captions under way"] = int(self.front.metrics().value("deecap_captions_under_way"))
        return {name: count for name, count in found.items() if count}

    def at_work(self) -> int:
        """How many workers have a photo in hand."""
        consumers = self.store.xpending(f"{QUEUE}:interactive", "workers")["consumers"]
        return len([each for each in consumers if each["name"] != b"(queue)"])

    def count(self, name: str) -> int:
        """One of the store's own counters: answered, redelivered, dead."""
        return int(self.store.hget(f"{QUEUE}:counts", name) or 0)

    def close(self) -> None:
        for process in [*self.workers, *([self._front] if self._front else [])]:
            with suppress(ProcessLookupError):
                process.kill()
        self.store.close()
        self.redis.close()

    def _sees(self, workers: int) -> bool:
        found = self.front.metrics()
        return all(found.value(f'deecap_workers{{state="{state}"}}') == workers for state in ("alive", "ready"))

    def _start(self, name: str, command: list[str]) -> Process:
        self._started += 1
        clean = {name: value for name, value in os.environ.items() if not name.startswith("DEECAP_")}
        settings = {
            "broker": self.redis.url,
            "queue": "faults",
            "port": 0,
            "metrics_port": 0,
            "queue_depth": INTERACTIVE_DEPTH,
            "batch_queue_depth": BATCH_DEPTH,
            "worker_timeout_s": WORKER_TIMEOUT,
            "hang_timeout_s": HANG_TIMEOUT,
            "drain_timeout_s": 15,
            "feature_cache_mb": 0,  # a photo that is tried again must be looked at again
            "log_format": "json",
        }
        ours = {f"DEECAP_{name.upper()}": str(value) for name, value in settings.items()}
        model = {"STAND_IN_LOOK": str(LOOK_MS / 1000), "STAND_IN_WORDS": str(WORDS_MS / 1000)}
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        environment = {**clean, **threads, **ours, **model, **self._environment}
        return Process(f"{name}-{self._started}", command, environment, self._folder)


def until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Waits, blocking, until the condition holds; fails where that takes longer. A refused connection is a no."""
    for _ in _ticks(seconds):
        with suppress(httpx.TransportError, redis.RedisError):
            if condition():
                return
    raise AssertionError(f"not within {seconds:g} seconds: {what}")


def _ticks(seconds: float) -> Iterator[None]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield
        time.sleep(0.03)
