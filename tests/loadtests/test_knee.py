"""`make loadtest` in short: the service starts, is loaded beyond what it holds, and the report is written."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[2]


def test_the_knee_is_found_and_reported(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "loadtests", "--scale", "0.15", "--speeds", "turbo", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = list(csv.DictReader((tmp_path / "steps.csv").open()))
    assert {row["speed"] for row in rows} == {"turbo"}
    offered = [float(row["offered"]) for row in rows]
    assert offered == sorted(offered)
    assert all(int(row["failed"]) == 0 and float(row["goodput"]) > 0 for row in rows)
    assert all(float(row["p50"]) <= float(row["p95"]) <= float(row["p99"]) for row in rows)
    page = (tmp_path / "index.html").read_text()
    assert "saturation" in page
    assert "data:image/png;base64," in page
    with Image.open(tmp_path / "load.png") as picture:
        assert picture.width > 1000
