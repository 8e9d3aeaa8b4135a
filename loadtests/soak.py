"""Finds the knee of front and worker over Redis, then loads them at a share of it, and watches their memory."""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path

import gevent
import locust  # noqa: F401  # first of what uses sockets: it replaces them with gevent's

from loadtests import measure, scenarios
from loadtests.__main__ import CLIENTS, describe, endless, make_world
from loadtests.sender import closed_loop, send
from loadtests.service import Service

SHARE = 0.7  # of what it does at most
BURST_SECONDS = 8.0
WATCH_SECONDS = 60  # a hundredth of the time, at most


def main() -> None:
    words = argparse.ArgumentParser(prog="python -m loadtests.soak", description=__doc__)
    words.add_argument("--queue", required=True, help="redis://...")
    words.add_argument("--seconds", type=float, default=600.0)
    words.add_argument("--out", type=Path, required=True, help="JSON")
    options = words.parse_args()
    with Service(options.out.with_suffix(".log"), options.queue) as service:
        world = make_world(service.url)
        knee = measure.goodput(closed_loop(service.url, endless(world, "balanced"), CLIENTS, BURST_SECONDS))
        begin = time.monotonic()
        resident: dict[str, list[tuple[float, int]]] = {name: [] for name in service.processes}

        def watch() -> None:
            while True:
                for name, size in service.resident().items():
                    resident[name].append((round(time.monotonic() - begin, 1), size))
                gevent.sleep(min(WATCH_SECONDS, options.seconds / 100))

        watcher = gevent.spawn(watch)
        samples = send(service.url, scenarios.steady(world, "balanced", SHARE * knee, options.seconds))
        watcher.kill()
    step = measure.step("balanced", SHARE * knee, samples)
    bad = Counter(f"{each.verdict.outcome} {each.verdict.why}" for each in samples if each.verdict.outcome != "ok")
    said = {"words": f"knee {knee:.1f}/s; {describe(step)}", "not ok": dict(bad), "resident": resident}
    options.out.write_text(json.dumps(said))
    print(said["words"])


if __name__ == "__main__":
    main()
