"""`python -m loadtests`: starts the service, loads it, says what it held. By default it finds the knee."""

from __future__ import annotations

import argparse
import itertools
import platform
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import locust  # first of what uses sockets: it replaces them with gevent's
import psutil

from loadtests import measure, report, scenarios
from loadtests.measure import Sample, Step
from loadtests.photos import scenes
from loadtests.scenarios import TIERS, Arrivals, Request, World
from loadtests.sender import closed_loop, send
from loadtests.service import Service, ask
from model.threads import available_cores

CLIENTS = 32  # of the closed loop: enough to keep the batches full, and fewer than the queue takes
BURST_SECONDS = 4.0
# Share of saturation, and for how many seconds: what the docs tell of, longer. Times `--scale`.
STEPS = ((0.5, 7.0), (0.8, 7.0), (0.95, 4.0), (1.1, 4.0), (1.4, 3.0), (2.0, 4.0))
SCENARIOS: dict[str, Callable[[World, float, float], Arrivals]] = {
    "steady": lambda world, rate, seconds: scenarios.steady(world, "balanced", rate, seconds),
    "soak": lambda world, rate, seconds: scenarios.steady(world, "balanced", rate, seconds),
    "mixed": scenarios.mixed,
    "spike": scenarios.spike,
    "hot": scenarios.hot,
    "bad": scenarios.bad,
}


def main() -> int:
    options = parser().parse_args()
    begin = time.monotonic()
    if options.url:
        return run(options, options.url, None, begin)
    with Service(options.out / "service.log", options.queue, options.workers) as service:
        return run(options, service.url, service, begin)


def parser() -> argparse.ArgumentParser:
    words = argparse.ArgumentParser(prog="python -m loadtests", description=__doc__)
    words.add_argument("scenario", nargs="?", default="knee", choices=["knee", *SCENARIOS])
    words.add_argument("--url", default="", help="a service that runs already; default: start one for the test")
    words.add_argument("--queue", default="", help="redis://...: start front and workers apart")
    words.add_argument("--workers", type=int, default=1, help="how many of them, with --queue")
    words.add_argument("--rate", type=float, default=10.0, help="requests per second of a scenario")
    words.add_argument("--seconds", type=float, default=30.0, help="of a scenario")
    words.add_argument(
        "--scale", type=float, default=1.0, help="how much longer than three minutes to look for the knee"
    )
    words.add_argument("--speeds", default=",".join(TIERS), help="of the knee; default: %(default)s")
    words.add_argument(
        "--out", type=Path, default=Path("bench/load"), help="folder of the report; default: %(default)s"
    )
    return words


def run(options: argparse.Namespace, url: str, service: Service | None, begin: float) -> int:
    world = make_world(url)
    print(f"{url} is ready after {time.monotonic() - begin:.0f} s", flush=True)
    if options.scenario != "knee":
        samples = send(url, SCENARIOS[options.scenario](world, options.rate, options.seconds))
        return say(samples, options.rate, service)
    steps, saturation = find_knee(url, world, options.speeds.split(","), options.scale)
    about = {
        "command": shlex.join(["python", "-m", "loadtests", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {available_cores()} cores, which the sender uses too",
        "service": "front and workers apart, over Redis" if options.queue else "one process",
        "versions": f"Python {platform.python_version()}, locust {locust.__version__}",
        "load of the machine at the end (1 minute)": f"{psutil.getloadavg()[0]:.1f}",
    }
    report.write(options.out, steps, saturation, about)
    for row in report.table(steps, saturation):
        print("| " + " | ".join(row) + " |")
    failed = sum(one.failed for one in steps)
    print(f"{options.out / 'index.html'}: {len(steps)} steps, {failed} wrong answers, {time.monotonic() - begin:.0f} s")
    return 1 if failed else 0


def make_world(url: str) -> World:
    """Photos, and the captions that they get while nothing else goes on."""
    photos = scenes()
    captions = {
        (number, speed): ask(f"{url}/v1/caption?speed={speed}", photo)["caption"]
        for number, photo in enumerate(photos)
        for speed in TIERS
    }
    return World(photos, ask(f"{url}/v1/model")["layers"], captions)


def find_knee(url: str, world: World, speeds: Sequence[str], scale: float) -> tuple[list[Step], dict[str, float]]:
    """Of each speed: what it does at most by a closed loop, then steps of an open loop below and above that.

    Saturation is the most good answers per second that either of the two saw.
    """
    steps, saturation = [], {}
    for speed in speeds:
        burst = closed_loop(url, endless(world, speed), CLIENTS, BURST_SECONDS * scale)
        at_most = measure.goodput(burst)
        for share, seconds in STEPS:
            offered = share * at_most
            samples = send(url, scenarios.steady(world, speed, offered, seconds * scale))
            steps.append(measure.step(speed, offered, samples))
            print(f"{speed}: {describe(steps[-1])}", flush=True)
            tell_failures(samples)
        saturation[speed] = max(at_most, *(one.goodput for one in steps if one.speed == speed))
    return steps, saturation


def endless(world: World, speed: str) -> Iterator[Request]:
    return (world.request(number, speed) for number in itertools.count())


def describe(one: Step) -> str:
    return (
        f"{one.offered:.1f}/s offered, {one.goodput:.1f}/s good, "
        f"p50 {1000 * one.p50:.0f} ms, p99 {1000 * one.p99:.0f} ms, "
        f"{one.refused:.0%} refused, {one.late:.0%} late, {one.failed} wrong" + ("" if one.valid else " (sender late)")
    )


def say(samples: Sequence[Sample], rate: float, service: Service | None) -> int:
    """What a scenario showed, by what was asked for."""
    for name in sorted({sample.name for sample in samples}):
        chosen = [sample for sample in samples if sample.name == name]
        print(f"{name}: {describe(measure.step(name, rate * len(chosen) / len(samples), chosen))}")
    if service is not None:
        print(", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in service.resident().items()))
    return 1 if tell_failures(samples) else 0


def tell_failures(samples: Sequence[Sample]) -> int:
    """How many answers were wrong; says what was wrong with them."""
    wrong = Counter(f"{sample.name}: {sample.verdict.why}" for sample in samples if sample.verdict.outcome == "failed")
    for words, count in wrong.most_common(5):
        print(f"  {count} x {words}", file=sys.stderr)
    return sum(wrong.values())


if __name__ == "__main__":
    sys.exit(main())
