"""Makes the docs' pictures of the dashboards: `python -m tests.deploy.pictures --out docs/images`.

Starts docker-compose.yml as processes, sends some minutes of mixed traffic and all kinds of mistakes, and draws.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from tests.deploy import queries, traffic
from tests.deploy.compose import ROOT, Compose, load

DASHBOARDS = {path.stem for path in queries.DASHBOARDS.glob("*.json")}


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--minutes", type=float, default=4.0)
    words.add_argument("--rate", type=float, default=6.0, help="captions per second")
    words.add_argument("--out", type=Path, required=True)
    options = words.parse_args()
    services = load("docker-compose.yml")
    del services["grafana"]
    with tempfile.TemporaryDirectory() as folder, Compose(Path(folder), services) as compose:
        compose.start(*services)
        for name in services:
            compose.wait_healthy(name)
        url, third = compose.url("front", 8000), str(20 * options.minutes)
        traffic.everything(compose)
        for scenario in ("mixed", "hot", "bad"):
            command = [sys.executable, "-m", "loadtests", scenario, "--url", url, "--seconds", third]
            subprocess.run([*command, "--rate", str(options.rate)], cwd=ROOT, check=True)
        draw = [sys.executable, str(ROOT / "deploy/grafana/preview.py"), "--interval", "20s", "--out", str(options.out)]
        minutes = str(options.minutes + 0.7)
        subprocess.run([*draw, "--minutes", minutes, "--prometheus", compose.url("prometheus", 9090)], check=True)
    for path in options.out.glob("*.png"):
        if path.stem in DASHBOARDS:
            with Image.open(path) as picture:
                small = picture.convert("RGB").quantize(96)  # a third of the size, and the same to see
            small.save(path, optimize=True)


if __name__ == "__main__":
    main()
