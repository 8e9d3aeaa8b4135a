"""`python -m loadtests.overhead`: what the service itself costs, beside a model that only sleeps.

The model is `tests.faults.stand_in`: it sleeps the times given, and tells in each caption how long it worked on it. The
service runs in processes of its own, as it would; this one is the client. Photos come at their times however slow the
answers are (an open loop), at a share of what the model can do. Two costs are told, both in milliseconds:

- own: request time less the time that the model worked on this photo. With even arrivals below capacity photos never
  meet at the model, so this is the service's cost. The targets are for this.
- idle: request time less all time in which the model worked on anything. With random (Poisson) arrivals photos do meet,
  and wait for each other behind any service; what remains is the time in which the model could have worked and did not.

With `--real` the bundle that ships takes the place of the stand-in. How long it worked is then what the answer tells of
looking and describing, whose own waits for a core are not told apart; idle is not known.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from bisect import bisect_right
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate, count
from pathlib import Path
from statistics import quantiles
from typing import Any
from urllib.parse import urlsplit

from service.loop import new_loop
from tests.faults.stand_in import caption_of, photo
from tests.service.fakes import SPEEDS
from tests.service.redis_server import RedisServer

ROOT = Path(__file__).parents[1]
REAL, STAND_IN = ["-c", "from service.cli import main; main()"], ["-m", "tests.faults.launch"]
TARGETS = {"memory": (3.0, 15.0), "redis": (6.0, 25.0)}  # milliseconds, p50 and p99
WARM_UP = 2.0  # seconds at the same rate, not counted: connections, caches, the first of everything
START_SECONDS = 30.0
KEPT_SECONDS = 3.0  # that an unused connection is used again; the server closes it after five
SIZE, GRAIN = (224, 224), 40  # a photo of 20 kB


@dataclass(frozen=True)
class Sample:
    """One photo that was captioned. Times in seconds, by time.monotonic()."""

    due: float
    sent: float
    answered: float
    model: float  # that the model worked on it
    told: dict[str, float]  # the answer's `timings_ms`


class Client:
    """As little of HTTP/1.1 as this needs: a client's own time counts as the service's here."""

    def __init__(self, url: str) -> None:
        self._place = urlsplit(url)
        self._free: list[tuple[float, asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def post(self, target: str, body: bytes) -> tuple[int, bytes]:
        reader, writer = await self._connection()
        head = f"POST {target} HTTP/1.1\r\nHost: {self._place.netloc}\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        answer = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
        length = next(int(line.split(":")[1]) for line in answer if line.startswith("content-length:"))
        content = await reader.readexactly(length)
        self._free.append((time.monotonic(), reader, writer))
        return int(answer[0].split()[1]), content

    def close(self) -> None:
        for _, _, writer in self._free:
            writer.close()

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while self._free:
            since, reader, writer = self._free.pop()
            if time.monotonic() - since < KEPT_SECONDS:
                return reader, writer
            writer.close()
        return await asyncio.open_connection(self._place.hostname, self._place.port)


class Service:
    """Front and one worker, with the stand-in for a model: one process over memory, or two and a Redis."""

    def __init__(self, broker: str, look: float, words: float, real: bool) -> None:
        """`look`, `words`: seconds that the model takes for each photo; `real`: not the stand-in."""
        self._broker, self._look, self._words, self._real = broker, look, words, real
        self._stack = ExitStack()
        self.worked: list[tuple[float, float]] = []  # when the model did, by time.monotonic(); known after the end
        self.url = ""
        self.worker_url = ""

    def __enter__(self) -> Service:
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="deecap-overhead-")))
            work = folder / "work"
            stack.callback(self._read_work, work)
            clean = {name: value for name, value in os.environ.items() if not name.startswith("DEECAP_")}
            model = {"STAND_IN_LOOK": self._look, "STAND_IN_WORDS": self._words, "STAND_IN_WORK": work}
            ours: dict[str, object] = {"DEECAP_PORT": 0, "DEECAP_METRICS_PORT": 0, "DEECAP_FEATURE_CACHE_MB": 0}
            if self._broker == "redis":
                redis = RedisServer()
                redis.start()
                stack.callback(redis.close)
                ours["DEECAP_BROKER"] = redis.url
            said = {name: str(value) for name, value in {**ours, **model}.items()}
            self._environment = {**clean, **said, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
            log = stack.enter_context((folder / "log").open("wb"))
            front = self._start(stack, "serve", log)
            self.url = self.worker_url = _first_line(front, folder / "log").split(" at ")[1].split(" ")[0]
            if self._broker == "redis":
                worker = self._start(stack, "worker", log)
                self.worker_url = f"http://127.0.0.1:{_first_line(worker, folder / 'log').split()[-1]}"
            self._wait_ready()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def cpu_seconds(self) -> float:
        """Of all its processes but Redis, since they began."""
        found = 0.0
        for url in {self.url, self.worker_url}:
            with urllib.request.urlopen(f"{url}/metrics", timeout=5) as answer:
                lines = answer.read().decode().splitlines()
            found += next(float(line.split()[1]) for line in lines if line.startswith("process_cpu_seconds_total "))
        return found

    def _start(self, stack: ExitStack, what: str, log: Any) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, *(REAL if self._real else STAND_IN), what],
            env=self._environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=log,
        )  # fmt: skip
        stack.callback(_end, process)
        return process

    def _read_work(self, path: Path) -> None:
        """One clock for all processes of a machine, so that it can be compared with a client's times."""
        if path.exists():
            self.worked = [(float(begin), float(end)) for begin, end in map(str.split, path.read_text().splitlines())]

    def _wait_ready(self) -> None:
        end = time.monotonic() + START_SECONDS
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/readyz", timeout=5).close()
                return
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)


def even(rate: float, seconds: float, _: random.Random) -> Iterator[float]:
    """Seconds from the begin at which photos come."""
    yield from (number / rate for number in range(round(rate * seconds)))


def poisson(rate: float, seconds: float, chance: random.Random) -> Iterator[float]:
    """The same rate, and each photo comes regardless of the others."""
    at = chance.expovariate(rate)
    while at < seconds:
        yield at
        at += chance.expovariate(rate)


ARRIVALS = {"even": even, "poisson": poisson}


async def send(url: str, times: Sequence[float], numbers: Iterator[int], real: bool) -> list[Sample]:
    """A photo at each of the times, in seconds from now. Raises `RuntimeError` for an answer with no caption of it."""
    photos = [(number, photo(number, size=SIZE, grain=GRAIN)) for number, _ in zip(numbers, times, strict=False)]
    tau = SPEEDS.resolve().tau
    client = Client(url)

    async def one(due: float, number: int, image: bytes) -> Sample:
        sent = time.monotonic()
        status, content = await client.post("/v1/caption", image)
        answered = time.monotonic()
        document = json.loads(content)
        expected = "" if real else f"{caption_of(number, tau)} model "
        if status != 200 or not document["caption"].startswith(expected):
            raise RuntimeError(f"asked for {expected!r}, got {status}: {content.decode()}")
        told = document["timings_ms"]
        model = (told["look"] + told["describe"]) / 1000 if real else int(document["caption"].split()[-1]) / 1e6
        return Sample(due, sent, answered, model, told)

    begin = time.monotonic()
    async with asyncio.TaskGroup() as group:
        tasks = []
        for after, (number, image) in zip(times, photos, strict=True):
            await asyncio.sleep(begin + after - time.monotonic())
            tasks.append(group.create_task(one(begin + after, number, image)))
    client.close()
    return [task.result() for task in tasks]


def run(sending: Coroutine[Any, Any, list[Sample]]) -> list[Sample]:
    """On the service's own kind of loop: what the client takes for itself counts as the service's here."""
    with asyncio.Runner(loop_factory=new_loop()) as runner:
        return runner.run(sending)


class Working:
    """Answers how much of a span the model worked."""

    def __init__(self, spans: Sequence[tuple[float, float]]) -> None:
        """`spans`: in order, none within another."""
        self._spans = spans
        self._begins = [begin for begin, _ in spans]
        self._sums = [0.0, *accumulate(end - begin for begin, end in spans)]

    def within(self, begin: float, end: float) -> float:
        return self._until(end) - self._until(begin)

    def _until(self, at: float) -> float:
        number = bisect_right(self._begins, at)
        if not number:
            return 0.0
        last = self._spans[number - 1]
        return self._sums[number] - max(0.0, last[1] - at)


def measure(broker: str, arrivals: str, options: argparse.Namespace) -> dict[str, Any]:
    """One row of the report."""
    chance, numbers = random.Random(options.seed), count(1)
    look, words = options.look_ms / 1000, options.words_ms / 1000
    rate = options.load / (look + words)
    arrive = ARRIVALS[arrivals]
    with Service(broker, look, words, options.real) as service:
        run(send(service.url, list(arrive(rate, WARM_UP, chance)), numbers, options.real))
        cpu = service.cpu_seconds()
        samples = run(send(service.url, list(arrive(rate, options.seconds, chance)), numbers, options.real))
        cpu = service.cpu_seconds() - cpu
    working = Working(service.worked)
    own = [sample.answered - sample.sent - sample.model for sample in samples]
    idle = [sample.answered - sample.sent - working.within(sample.sent, sample.answered) for sample in samples]
    took = [sample.answered - sample.sent for sample in samples]
    outside = [seconds - sample.told["total"] / 1000 for seconds, sample in zip(took, samples, strict=True)]
    stages = ("queue", "decode_image", "look", "describe")
    between = [(each.told["total"] - sum(each.told[stage] for stage in stages)) / 1000 for each in samples]
    return {
        "broker": broker,
        "arrivals": arrivals,
        "photos": len(samples),
        "per_second": round(rate, 2),
        "own_ms": _percentiles(own),
        "idle_ms": None if options.real else _percentiles(idle),
        "request_ms": _percentiles(took),
        "model_ms": _percentiles([sample.model for sample in samples]),
        "late_ms": _percentiles([sample.sent - sample.due for sample in samples]),  # the client's own lateness
        "cpu_ms_per_photo": round(1000 * cpu / len(samples), 2),
        # Where the time goes: the worker's waits, the decoding, front and store both ways, the connection.
        "parts_ms": {
            "queue": _percentiles([sample.told["queue"] / 1000 for sample in samples]),
            "decode": _percentiles([sample.told["decode_image"] / 1000 for sample in samples]),
            "front": _percentiles(between),
            "connection": _percentiles(outside),
        },
    }


def verdict(row: dict[str, Any]) -> str:
    """Of the rows that the targets are for."""
    if row["arrivals"] != "even" or row["idle_ms"] is None:
        return ""
    p50, p99 = TARGETS[row["broker"]]
    good = row["own_ms"]["p50"] <= p50 and row["own_ms"]["p99"] <= p99
    return f"{'met' if good else 'missed'}: own p50 <= {p50:g}, p99 <= {p99:g}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    head = ("broker", "arrivals", "photos", "own p50", "p99", "idle p50", "p99", "late p99", "cpu/photo", "target")
    lines = [head]
    for row in rows:
        spans = (row["own_ms"], row["idle_ms"])
        shown = [f"{span[share]:.2f}" if span else "" for span in spans for share in ("p50", "p99")]
        shown += [f"{number:.2f}" for number in (row["late_ms"]["p99"], row["cpu_ms_per_photo"])]
        lines.append((row["broker"], row["arrivals"], str(row["photos"]), *shown, verdict(row)))
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]

    def shown_in(line: tuple[str, ...]) -> str:
        words, numbers, last = line[:2], line[2:-1], line[-1]
        cells = [word.ljust(width) for word, width in zip(words, widths[:2], strict=True)]
        cells += [number.rjust(width) for number, width in zip(numbers, widths[2:-1], strict=True)]
        return "  ".join([*cells, last]).rstrip()

    return "\n".join(map(shown_in, lines))


def main() -> int:
    options = _parser().parse_args()
    report: dict[str, Any] = {
        "command": "python -m loadtests.overhead " + shlex.join(sys.argv[1:]),
        "load": options.load,
        "real": options.real,
        "model": {"look_ms": options.look_ms, "words_ms": options.words_ms},
        "machine": {"processor": platform.processor(), "cores": os.cpu_count(), "load_before": os.getloadavg()[0]},
        "rows": [],
    }
    for broker in options.broker:
        for arrivals in options.arrivals:
            report["rows"].append({**(row := measure(broker, arrivals, options)), "verdict": verdict(row)})
            parts = ", ".join(f"{name} {each['p50']:.2f}" for name, each in row["parts_ms"].items())
            print(f"{broker}, {arrivals}: median ms of the parts: {parts}", file=sys.stderr)
    report["machine"]["load_after"] = os.getloadavg()[0]
    print(table(report["rows"]))
    before, after = report["machine"]["load_before"], report["machine"]["load_after"]
    print(f"milliseconds; {os.cpu_count()} cores, load average {before:.1f} before and {after:.1f} after")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    words = argparse.ArgumentParser(prog="python -m loadtests.overhead", description=(__doc__ or "").split("\n")[0])
    words.add_argument("--seconds", type=float, default=20.0, help="of each row; default: %(default)g")
    words.add_argument("--load", type=float, default=0.5, help="share of what the model can do; default: %(default)g")
    # What the bundle that ships took on two cores, encoder and words at `balanced` together (docs/decoding.md).
    words.add_argument("--look-ms", type=float, default=8.0, help="extraction of one photo; default: %(default)g")
    words.add_argument("--words-ms", type=float, default=11.0, help="all words of one caption; default: %(default)g")
    words.add_argument("--real", action="store_true", help="the bundle that ships, in place of the stand-in")
    words.add_argument("--broker", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    words.add_argument("--arrivals", nargs="+", choices=list(ARRIVALS), default=list(ARRIVALS))
    words.add_argument("--seed", type=int, default=0, help="of the random arrivals")
    words.add_argument("--json", type=Path, help="file to write all numbers to")
    return words


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """In milliseconds."""
    cuts = quantiles(seconds, n=100, method="inclusive")
    shares = {"p50": cuts[49], "p90": cuts[89], "p99": cuts[98], "max": max(seconds)}
    return {name: round(1000 * value, 3) for name, value in shares.items()}


def _first_line(process: subprocess.Popen[bytes], log: Path) -> str:
    assert process.stdout is not None
    line = process.stdout.readline().decode()
    if not line:
        raise RuntimeError(f"a process of the service ended at its start:\n{log.read_text()}")
    return line


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


if __name__ == "__main__":
    raise SystemExit(main())
